"""The true dynamics and their derivatives: a measure of a learned model, or its replacement.

`dynamics_fn` has two tasks as differentiable torch functions; `MuJoCoDerivatives` differentiates a robot.
"""

import copy

import mujoco
import numpy as np
import torch

from common import BadInput
from common.rewards import angle


def dynamics_fn(env_id):
    """The true dynamics of `env_id`: step(obs (..., ds), action (..., da) in [-1, 1]) -> next_obs (..., ds).

    Differentiable, for any leading shape, dtype and device. Raises BadInput if they are not known.
    """
    if env_id not in DYNAMICS:
        raise BadInput(
            f"--oracle-dynamics does not know --env-id {env_id!r} (only {', '.join(DYNAMICS)}): "
            "leave the flag out to learn a model."
        )
    return DYNAMICS[env_id]


def pendulum(obs, action):
    """Gymnasium's Pendulum-v1: obs (cos, sin, speed in rad/s), torque 2 N m times the action, 0.05 s.

    The order matters: the speed is limited to 8 rad/s before the angle moves with it (Pendulum-v0: after).
    """
    theta, speed = angle(obs[..., 0], obs[..., 1]), obs[..., 2]
    acceleration = 15 * torch.sin(theta) + 3 * (2 * action[..., 0])  # 3g/2l sin + 3/(m l^2) u; g 10, m, l 1
    speed = (speed + 0.05 * acceleration).clamp(-8, 8)
    theta = theta + 0.05 * speed
    return torch.stack([torch.cos(theta), torch.sin(theta), speed], dim=-1)


def double_integrator(obs, action):
    """Position and velocity after DT = 0.05 s of acceleration `action`: s' = A s + B a, exactly."""
    return obs + 0.05 * torch.stack([obs[..., 1], action[..., 0]], dim=-1)


def double_integrator_cost(gain, gamma):
    """P (2, 2) of the exact value -s^T P s / 2 of the linear policy a = gain . s in the double integrator.

    gain is (2,). P = I + gain^T gain + gamma (A + B gain)^T P (A + B gain) is solved as one linear system,
    which can be differentiated by gain. Q(s, a) = r(s, a) - gamma s'^T P s' / 2 with s' = A s + B a.
    """
    a = torch.tensor([[1.0, 0.05], [0.0, 1.0]], dtype=gain.dtype)
    closed = a + torch.tensor([[0.0], [0.05]], dtype=gain.dtype) * gain  # (2, 2)
    cost = torch.eye(2, dtype=gain.dtype) + torch.outer(gain, gain)
    system = torch.eye(4, dtype=gain.dtype) - gamma * torch.kron(closed.T, closed.T)
    return torch.linalg.solve(system, cost.flatten()).view(2, 2)


DYNAMICS = {"Pendulum-v1": pendulum, "DoubleIntegrator-v1": double_integrator}


# --- robots: derivatives by central differences -------------------------------------------------------------
# Robots whose observation is a smooth function of the state. A number: it is the positions from this one on
# and the velocities. None: it has sines, or places of bodies, and does not tell the whole state.
SMOOTH = {"HalfCheetah": 1, "Hopper": 1, "Walker2d": 1, "Swimmer": 2, "InvertedPendulum": 0,
          "Pusher": None, "Reacher": None}  # fmt: skip


class MuJoCoDerivatives:
    """Derivatives of a step of a MuJoCo robot, in the state in which the environment of `make_env` is.

    Each difference restores the state that decides what comes next (mjSTATE_INTEGRATION: positions,
    velocities, the solver's last solution), changes one number of it or of the action, and makes the whole
    frame-skipped step. The environment's own `step` makes it, below its time limit and the rounding to
    float32, and the mean x velocity comes first where make_env has it so. Within `with` the robot has a copy
    of its simulation, and afterwards the old one again, which goes on bit for bit.

    An action on its bound, beyond which it would be clipped, has a one-sided difference. Hopper and Walker2d
    clip the velocities that they show to [-10, 10]: a row of a clipped velocity is 0, and its column is the
    derivative by the velocity itself, which the observation does not tell. Where a contact begins or ends
    within EPS the derivative does not exist, and the difference is large or is that of one side.
    """

    EPS = 1e-5  # of an action in [-1, 1], of rad or m, of rad/s or m/s

    def __init__(self, env):
        self.env, self.robot = env, env.unwrapped
        name, _, version = env.spec.id.rpartition("-v")
        if name not in SMOOTH or version not in ("4", "5"):
            raise BadInput(
                f"{env.spec.id} has no true derivatives here, as its observation is not known to be a smooth "
                f"function of a MuJoCo state: give a run on {', '.join(SMOOTH)} (-v4 or -v5)."
            )
        self.first, self.model = SMOOTH[name], self.robot.model
        self.x_first = env.observation_space.shape[0] - self.robot.observation_space.shape[0]  # 0 or 1
        self.low, self.high = self.robot.action_space.low.astype(float), self.robot.action_space.high
        self.kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self.state = np.empty(mujoco.mj_stateSize(self.model, self.kind))

    def __enter__(self):
        self.own = self.robot.data
        self.data = self.robot.data = copy.copy(self.own)
        mujoco.mj_getState(self.model, self.data, self.state, self.kind)
        return self

    def __exit__(self, *_):
        self.robot.data = self.own

    def needs_the_whole_state(self):
        if self.first is None:
            raise BadInput(
                f"{self.env.spec.id} does not show its whole state, and parts of it twice: nothing can be "
                "restored from its observation or differentiated by it."
            )

    def restore(self, obs):
        """Makes obs (ds,) the state: the place on the track is 0, and the solver starts anew."""
        self.needs_the_whole_state()
        mujoco.mj_resetData(self.model, self.data)
        obs = np.asarray(obs, float)[self.x_first :]
        self.data.qpos[: self.first] = 0
        self.data.qpos[self.first :], self.data.qvel[:] = np.split(obs, [len(obs) - self.model.nv])
        mujoco.mj_getState(self.model, self.data, self.state, self.kind)

    def step(self, action, index=None, by=0.0):
        """The observation (ds,), float64, after a step with an action in [-1, 1]; it stays the same state.

        With `index`, that number of the observation is larger by `by` in the state that the step begins in.
        """
        mujoco.mj_setState(self.model, self.data, self.state, self.kind)
        if index is not None and index >= self.x_first:  # the x velocity of the last step has no effect
            index += self.first - self.x_first
            where = self.data.qpos if index < self.model.nq else self.data.qvel
            where[index if index < self.model.nq else index - self.model.nq] += by
        share = (np.asarray(action, float) + 1) / 2
        obs, *_, info = self.robot.step(self.low + (self.high - self.low) * share)
        return np.append(info["x_velocity"], obs) if self.x_first else obs

    def go_on(self, action):
        """Makes the state after a step the state -> its observation, and whether it is one in contact."""
        obs = self.step(action)
        mujoco.mj_getState(self.model, self.data, self.state, self.kind)
        return obs, self.data.ncon > 0  # contacts of the last physics step

    def by_action(self, action, eps=EPS):
        """The Jacobian (ds, da) of the next observation by the action (da,)."""
        columns, action = [], np.asarray(action, float)
        for i in range(len(action)):
            up, down = action.copy(), action.copy()
            up[i], down[i] = min(action[i] + eps, 1), max(action[i] - eps, -1)
            columns.append((self.step(up) - self.step(down)) / (up[i] - down[i]))
        return np.stack(columns, 1)

    def by_obs(self, action, eps=EPS):
        """The Jacobian (ds, ds) of the next observation by the observation. BadInput if it does not exist."""
        self.needs_the_whole_state()
        size = self.env.observation_space.shape[0]
        ends = [[self.step(action, i, by) for by in (eps, -eps)] for i in range(size)]
        return np.stack([(up - down) / (2 * eps) for up, down in ends], 1)
