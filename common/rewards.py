"""Reward and termination of each environment as differentiable torch functions, exact for `make_env`.

    reward = reward_fn("Hopper-v4")              reward(obs, action, next_obs) -> (...) float
    terminated = termination_fn("Hopper-v4")     terminated(next_obs) -> (...) bool

obs and next_obs are (..., ds), action is (..., da) in [-1, 1]. To add an environment, write its two functions
and name them in REWARDS and TERMINATIONS at the end. They keep some rules, because MAGE's critic and MAAC's
actor are trained through them: any leading shape, nothing in place, no branch on a value, a finite gradient
everywhere (a step such as "alive" has the gradient 0). A GPU replays them as a part of an update, so they
neither read a number back (.item()) nor make a tensor of numbers (torch.tensor). common/compare.py compares
what they return with the environment before a run and in its first steps, and looks before a run for a
gradient that is missing or not finite. The formulas follow Gymnasium's source, envs/mujoco/*_v4.py and
*_v5.py and envs/classic_control/, and that of Wang et al. 2019.

In next_obs of HalfCheetah, Hopper, Walker2d, Swimmer, Ant and Humanoid the index 0 is the mean x velocity, so
Gymnasium's own index i is i + 1 here.
"""

import torch

from common import BadInput


def bare(env_id):
    """The id that Gymnasium registers: "mine:Point-v0", where `mine` is a module, is "Point-v0"."""
    return str(env_id).rpartition(":")[2]


def known(functions, env_id):
    """What REWARDS or TERMINATIONS has for an id, with its module or without; or None."""
    return functions.get(env_id) or functions.get(bare(env_id))


def reward_fn(env_id):
    """The reward of `env_id`: reward(obs, action, next_obs) -> (...). Raises BadInput if it is not known."""
    if not (function := known(REWARDS, env_id)):
        raise BadInput(
            f"the reward of --env-id {env_id!r} is unknown: add a reward_fn to REWARDS in common/rewards.py "
            "(or give --learned-reward, where the script has it) and a termination_fn to TERMINATIONS there."
        )
    return function


def termination_fn(env_id):
    """When an episode of `env_id` ends: terminated(next_obs) -> (...) bool. Raises BadInput if not known."""
    if not (function := known(TERMINATIONS, env_id)):
        raise BadInput(
            f"when --env-id {env_id!r} terminates is not known: add a termination_fn to TERMINATIONS in "
            "common/rewards.py, and a reward_fn to REWARDS there unless --learned-reward is given."
        )
    return function


# --- building blocks ---


def square(x):
    """Sum of squares over the last dimension: (..., d) -> (...)."""
    return x.pow(2).sum(-1)


def norm(x):
    """Euclidean norm over the last dimension, with the gradient 0 at 0, where sqrt's would be infinite."""
    squared = square(x)
    is_zero = squared == 0
    return squared.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def angle(cos, sin):
    """atan2(sin, cos) in rad. A model may predict both as 0, where atan2 has no gradient: cos is then 1."""
    return torch.atan2(sin, cos.masked_fill(cos.pow(2) + sin.pow(2) < 1e-12, 1.0))


def between(x, low, high):
    """low < x < high, False for NaN."""
    return (x > low) & (x < high)


def finite(next_obs):
    """True where every entry is a number: (..., ds) -> (...). A NaN state is never healthy."""
    return torch.isfinite(next_obs).all(-1)


def alive(terminated, next_obs):
    """1 while healthy, else 0, in the dtype of next_obs: how the v5 environments pay for survival."""
    return (~terminated(next_obs)).to(next_obs.dtype)


# --- termination: next_obs (..., ds) -> (...) bool ---


def never(next_obs):
    return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


def hopper_fell(next_obs):
    # Gymnasium looks for speeds of 100 before it clips what is observed to 10: the robot does not get there.
    z, pitch, state = next_obs[..., 1], next_obs[..., 2], next_obs[..., 2:]
    return ~(finite(next_obs) & (z > 0.7) & between(pitch, -0.2, 0.2) & (state.abs() < 100).all(-1))


def walker_fell(next_obs):
    return ~(finite(next_obs) & between(next_obs[..., 1], 0.8, 2.0) & between(next_obs[..., 2], -1.0, 1.0))


def ant_fell(next_obs):
    z = next_obs[..., 1]
    return ~(finite(next_obs) & (z >= 0.2) & (z <= 1.0))


def humanoid_fell(next_obs):
    return ~(finite(next_obs) & between(next_obs[..., 1], 1.0, 2.0))


def inverted_pendulum_fell(next_obs):
    return ~(finite(next_obs) & (next_obs[..., 1].abs() <= 0.2))


def cartpole_failed(next_obs):
    x, theta = next_obs[..., 0], next_obs[..., 2]
    return ~(finite(next_obs) & (x.abs() <= 2.4) & (theta.abs() <= 12 * 2 * torch.pi / 360))


# --- reward: obs (..., ds), action (..., da), next_obs (..., ds) -> (...) ---


def pendulum(obs, action, next_obs):
    theta, speed, torque = angle(obs[..., 0], obs[..., 1]), obs[..., 2], 2 * action
    return -(theta.pow(2) + 0.1 * speed.pow(2) + 0.001 * square(torque))


def half_cheetah(obs, action, next_obs):
    return next_obs[..., 0] - 0.1 * square(action)


def swimmer(obs, action, next_obs):
    return next_obs[..., 0] - 1e-4 * square(action)


def hopper_v4(obs, action, next_obs):  # v4 pays for being alive on the fatal step too
    return next_obs[..., 0] + 1.0 - 1e-3 * square(action)


def hopper_v5(obs, action, next_obs):
    return next_obs[..., 0] + alive(hopper_fell, next_obs) - 1e-3 * square(action)


def walker_v5(obs, action, next_obs):
    return next_obs[..., 0] + alive(walker_fell, next_obs) - 1e-3 * square(action)


def ant_v4(obs, action, next_obs):
    return next_obs[..., 0] + 1.0 - 0.5 * square(action)


def ant_v5(obs, action, next_obs):
    contact_forces = next_obs[..., 28:].clamp(-1, 1)  # 13 bodies x 6; a model may predict beyond
    return next_obs[..., 0] + alive(ant_fell, next_obs) - 0.5 * square(action) - 5e-4 * square(contact_forces)


def humanoid_v4(obs, action, next_obs):
    return 1.25 * next_obs[..., 0] + 5.0 - 0.1 * square(0.4 * action)


def humanoid_v5(obs, action, next_obs):
    contact_cost = (5e-7 * square(next_obs[..., -78:])).clamp(max=10.0)  # 13 bodies x 6 contact forces
    survival = 5.0 * alive(humanoid_fell, next_obs)
    return 1.25 * next_obs[..., 0] + survival - 0.1 * square(0.4 * action) - contact_cost


def pusher_state_value(state):
    """Minus the distances object-goal and (half of it) object-tip, in m: (..., 23) -> (...)."""
    tip, thing, goal = state[..., 14:17], state[..., 17:20], state[..., 20:23]
    return -norm(thing - goal) - 0.5 * norm(thing - tip)


def pusher_v4(obs, action, next_obs):  # v4 looks before the physics step, v5 after it; so does Reacher
    return pusher_state_value(obs) - 0.1 * square(2 * action)


def pusher_v5(obs, action, next_obs):
    return pusher_state_value(next_obs) - 0.1 * square(2 * action)


def reacher_v4(obs, action, next_obs):
    return -norm(obs[..., 8:11]) - square(action)


def reacher_v5(obs, action, next_obs):
    return -norm(next_obs[..., 8:10]) - square(action)


def one(obs, action, next_obs):
    return torch.ones_like(next_obs[..., 0])


def inverted_pendulum_v5(obs, action, next_obs):
    return alive(inverted_pendulum_fell, next_obs)


def wang_half_cheetah(obs, action, next_obs):  # Wang et al. 2019 pay for the state before the step
    return obs[..., 8] - 0.1 * square(action)


def wang_walker(obs, action, next_obs):
    return obs[..., 8] - 0.1 * square(action) - 3 * (obs[..., 0] - 1.3).pow(2) + 1


def wang_hopper(obs, action, next_obs):
    return obs[..., 5] - 0.1 * square(action) - 3 * (obs[..., 0] - 1.3).pow(2) + 1


def wang_ant(obs, action, next_obs):
    return obs[..., 13] - 0.1 * square(action) - 3 * (obs[..., 0] - 0.57).pow(2) + 1


def double_integrator(obs, action, next_obs):
    return -0.5 * (square(obs) + square(action))


REWARDS = {
    "Pendulum-v1": pendulum, "ContinuousCartPole-v1": one, "DoubleIntegrator-v1": double_integrator,
    "HalfCheetah-v4": half_cheetah, "HalfCheetah-v5": half_cheetah,
    "Hopper-v4": hopper_v4, "Hopper-v5": hopper_v5,
    "Walker2d-v4": hopper_v4, "Walker2d-v5": walker_v5,
    "Swimmer-v4": swimmer, "Swimmer-v5": swimmer,
    "Ant-v4": ant_v4, "Ant-v5": ant_v5,
    "Humanoid-v4": humanoid_v4, "Humanoid-v5": humanoid_v5,
    "Pusher-v4": pusher_v4, "Pusher-v5": pusher_v5,
    "Reacher-v4": reacher_v4, "Reacher-v5": reacher_v5,
    "InvertedPendulum-v4": one, "InvertedPendulum-v5": inverted_pendulum_v5,
    "mbbl/HalfCheetah-v0": wang_half_cheetah, "mbbl/Ant-v0": wang_ant,
    "mbbl/Hopper-v0": wang_hopper, "mbbl/Walker2d-v0": wang_walker,
}  # fmt: skip
ENDLESS = ("Pendulum", "DoubleIntegrator", "HalfCheetah", "Swimmer", "Pusher", "Reacher", "mbbl/")
TERMINATIONS = {env_id: never for env_id in REWARDS if env_id.startswith(ENDLESS)} | {
    "ContinuousCartPole-v1": cartpole_failed,
    "Hopper-v4": hopper_fell, "Hopper-v5": hopper_fell,
    "Walker2d-v4": walker_fell, "Walker2d-v5": walker_fell,
    "Ant-v4": ant_fell, "Ant-v5": ant_fell,
    "Humanoid-v4": humanoid_fell, "Humanoid-v5": humanoid_fell,
    "InvertedPendulum-v4": inverted_pendulum_fell, "InvertedPendulum-v5": inverted_pendulum_fell,
}  # fmt: skip
