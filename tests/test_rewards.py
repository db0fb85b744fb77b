"""Rewards, terminations and true dynamics are the simulator's, and can be differentiated."""

import functools

import numpy as np
import pytest
import torch

from common import BadInput
from common.dynamics import double_integrator_cost, dynamics_fn
from common.envs import make_env
from common.rewards import REWARDS, TERMINATIONS, never, reward_fn, termination_fn

torch.set_num_threads(1)
STEPS = 2000  # per way of driving the environment, of which there are three
TERMINATING = {f"{name}-{version}" for name in ("Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum")
               for version in ("v4", "v5")} | {"ContinuousCartPole-v1"}  # fmt: skip
each_env = pytest.mark.parametrize("env_id", TERMINATIONS)  # some may have no REWARDS: --learned-reward
each_reward = pytest.mark.parametrize("env_id", REWARDS)


def scatter(env, rng):
    """Put a MuJoCo robot anywhere, at any speed; its observation (ds,), with 0 for a prepended x velocity."""
    core = env.unwrapped
    qpos = core.init_qpos + rng.choice([0.03, 0.3]) * rng.standard_normal(core.model.nq)
    core.set_state(qpos, rng.choice([0.1, 3.0]) * rng.standard_normal(core.model.nv))
    obs = core._get_obs()
    return np.append(np.zeros(env.observation_space.shape[0] - len(obs)), obs).astype(np.float32)


def drive(env_id, way, steps=STEPS):
    """Drive an environment: obs, action, next_obs, reward, terminated, each a list of `steps`.

    "random": uniform actions. "bang": -1 or 1, each held for a while, with a reset only well after a fall,
    never because time is up. "scattered": from states that no policy would come to.
    """
    env, rng = make_env(env_id, seed=1), np.random.default_rng(2)
    mujoco = hasattr(env.unwrapped, "set_state")
    rows, (obs, _), after_fall = [], env.reset(), 0
    action = np.ones(env.action_space.shape, np.float32)
    for step in range(steps):
        if way == "scattered" and mujoco and step % 3 == 0:
            obs = scatter(env, rng)
        if way != "bang" or step % 7 == 0:
            action = rng.uniform(-1, 1, action.shape).astype(np.float32)
            action = np.sign(action) if way == "bang" else action
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, next_obs, reward, terminated))
        after_fall += terminated
        obs = next_obs
        if after_fall > (30 if way == "bang" else 0) or (truncated and way != "bang"):
            (obs, _), after_fall = env.reset(), 0
    return list(zip(*rows, strict=True))


@functools.cache
def sample(env_id):
    """obs, action, next_obs (N, d) float32, reward (N,) float64, terminated (N,) bool: driven in all ways."""
    ways = [drive(env_id, way) for way in ("random", "bang", "scattered")]
    obs, action, next_obs, reward, terminated = (sum(parts, ()) for parts in zip(*ways, strict=True))
    states = [torch.as_tensor(np.array(x)) for x in (obs, action, next_obs)]
    return *states, torch.as_tensor(reward, dtype=torch.float64), torch.as_tensor(terminated)


def rows(env_id, count=64):
    """`count` sampled rows of obs, action, next_obs in float64, moved a little off the kinks of clipping."""
    chosen = torch.randperm(3 * STEPS, generator=torch.Generator().manual_seed(0))[:count]
    noise = torch.Generator().manual_seed(1)
    states = [x[chosen].double() for x in sample(env_id)[:3]]
    return [x + 0.01 * torch.randn(x.shape, generator=noise, dtype=x.dtype) for x in states]


def check_gradient(function, inputs):
    """torch.func.grad of function(*inputs) -> (B,) against central differences along a random direction."""
    argnums, noise = tuple(range(len(inputs))), torch.Generator().manual_seed(2)
    gradients = torch.func.grad(lambda *x: function(*x).sum(), argnums=argnums)(*inputs)
    directions = [torch.randn(x.shape, generator=noise, dtype=x.dtype) for x in inputs]
    slope = sum((g * d).sum(-1) for g, d in zip(gradients, directions, strict=True))
    ahead, behind = (
        function(*(x + sign * 1e-6 * d for x, d in zip(inputs, directions, strict=True))) for sign in (1, -1)
    )
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, atol=1e-5, rtol=1e-5)


def functions(env_id, inputs):
    """What is known of an environment, each with those of obs, action, next_obs that it takes."""
    reward = [(reward_fn(env_id), inputs)] if env_id in REWARDS else []
    return [*reward, (termination_fn(env_id), inputs[2:])]


@each_env
@pytest.mark.filterwarnings("ignore:.*You are calling 'step")  # after a fall: the point of it
def test_reward_and_termination_are_the_simulators(env_id):
    obs, action, next_obs, reward, terminated = sample(env_id)
    if env_id in REWARDS:
        error = (reward_fn(env_id)(obs, action, next_obs) - reward).abs() / reward.abs().clamp(min=1)
        print(f"\n{env_id}: error {error.max():.1e}, {len(reward)} steps, {terminated.sum()} terminations")
        assert error.max() <= 1e-5
    assert torch.equal(termination_fn(env_id)(next_obs), terminated)
    if env_id in TERMINATING:
        assert 100 < terminated.sum() < len(terminated) - 100
    elif termination_fn(env_id) is never:
        assert not terminated.any()


def test_an_environment_may_be_named_with_its_module(monkeypatch):
    for known, find in ((REWARDS, reward_fn), (TERMINATIONS, termination_fn)):
        with pytest.raises(BadInput, match="mine:Point-v0"):
            find("mine:Point-v0")
        monkeypatch.setitem(known, "Point-v0", bare := lambda *rows: rows[0][..., 0])
        assert find("mine:Point-v0") is bare
        monkeypatch.setitem(known, "mine:Point-v0", full := lambda *rows: rows[0][..., 1])
        assert find("mine:Point-v0") is full and find("Point-v0") is bare


def test_where_the_reward_is_known_so_is_the_end():
    assert REWARDS.keys() <= TERMINATIONS.keys() and TERMINATING < TERMINATIONS.keys()


@each_reward
def test_reward_gradient_matches_finite_differences(env_id):
    check_gradient(reward_fn(env_id), rows(env_id))


@each_reward
def test_derivatives_are_finite_even_at_zero(env_id):
    sampled = [x[::50].double() for x in sample(env_id)[:3]]
    for inputs in (sampled, [torch.zeros_like(x[:2]) for x in sampled]):
        inputs = [x.requires_grad_() for x in inputs]
        # The square of the action makes every reward depend on the inputs, even a constant one.
        value = reward_fn(env_id)(*inputs).sum() + sum(x.pow(2).sum() for x in inputs)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)
        assert all(torch.isfinite(g).all() for g in (*first, *second))


@each_env
def test_any_leading_shape_and_dtype(env_id):
    inputs = [x[:8] for x in sample(env_id)[:3]]
    before = [x.clone() for x in inputs]
    for function, args in functions(env_id, inputs):
        flat = function(*args)
        assert flat.shape == (8,) and flat.dtype == (torch.float32 if len(args) == 3 else torch.bool)
        torch.testing.assert_close(function(*(x.view(2, 4, -1) for x in args)), flat.view(2, 4))
        torch.testing.assert_close(function(*(x[0] for x in args)), flat[0])
        torch.testing.assert_close(torch.func.vmap(function)(*args), flat)
        if len(args) == 3:
            assert function(*(x.double() for x in args)).dtype == torch.float64
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@each_env
def test_device_agnostic_and_traceable(env_id):
    inputs = [x[:8] for x in sample(env_id)[:3]]
    meta = [x.to("meta") for x in inputs]  # holds no values: a branch or a transfer to the CPU would raise
    for (function, args), (_, without_values) in zip(
        functions(env_id, inputs), functions(env_id, meta), strict=True
    ):
        assert function(*without_values).device == meta[0].device
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*args), function(*args))
    torch.compiler.reset()


@pytest.mark.parametrize("env_id", sorted(TERMINATING))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_that_is_no_number_is_not_healthy(env_id, bad):
    reset_obs, _ = make_env(env_id).reset(seed=0)
    healthy = torch.as_tensor(reset_obs)
    assert not termination_fn(env_id)(healthy)
    spoilt = healthy.repeat(len(healthy), 1)
    spoilt.fill_diagonal_(bad)
    assert termination_fn(env_id)(spoilt).all()


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_a_hopper_imagined_too_fast_has_fallen(env_id):
    obs = torch.as_tensor(make_env(env_id).reset(seed=0)[0])
    obs[0] = 200.0  # the x velocity is no part of Gymnasium's state
    assert not termination_fn(env_id)(obs)
    obs[-1] = -100.0
    assert termination_fn(env_id)(obs)


@pytest.mark.parametrize("find", [reward_fn, termination_fn, dynamics_fn])
def test_an_unknown_environment_is_one_sentence(find):
    with pytest.raises(BadInput) as error:
        find("MountainCarContinuous-v0")
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and "'MountainCarContinuous-v0'" in message
    expected = ["--env-id", "REWARDS", "TERMINATIONS", "reward_fn", "termination_fn", "common/rewards.py"]
    for word in ["--oracle-dynamics"] if find is dynamics_fn else [*expected, "--learned-reward"]:
        assert word in message


# --- the oracle ---
def pendulum_obs(state):
    return torch.tensor([np.cos(state[0]), np.sin(state[0]), state[1]], dtype=torch.float64)


def test_oracle_rolls_out_whole_episodes_like_the_simulator():
    step, reward = dynamics_fn("Pendulum-v1"), reward_fn("Pendulum-v1")
    env = make_env("Pendulum-v1", seed=0)
    for way in ("random", "bang") * 2:
        env.reset()
        obs, done, errors, returns = pendulum_obs(env.unwrapped.state), False, [], np.zeros(2)
        while not done:
            action = env.action_space.sample()
            if way == "bang":  # along with the motion, so that the pendulum gets fast
                action = np.sign(abs(action) * env.unwrapped.state[1]).astype(np.float32)
            _, true_reward, _, done, _ = env.step(action)
            next_obs = step(obs, torch.as_tensor(action).double())
            returns += true_reward, float(reward(obs, torch.as_tensor(action).double(), next_obs))
            obs = next_obs
            errors.append((obs - pendulum_obs(env.unwrapped.state)).abs().max())
        gap = abs(returns[0] - returns[1])
        print(f"\nPendulum-v1, {way}: state error {max(errors):.1e}, returns differ by {gap:.1e}")
        assert len(errors) == 200 and max(errors) < 1e-5 and gap < 1e-3


def test_oracle_steps_from_any_state_in_float32():
    env, rng = make_env("Pendulum-v1", seed=0), np.random.default_rng(0)
    env.reset()
    errors, clipped = [], 0
    for _ in range(2000):
        env.unwrapped.state = rng.uniform([-4, -8], [4, 8])
        obs = pendulum_obs(env.unwrapped.state).float()
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        next_obs = dynamics_fn("Pendulum-v1")(obs, torch.as_tensor(action))
        true, *_ = env.step(action)
        errors.append((next_obs - torch.as_tensor(true)).abs().max())
        clipped += abs(true[2]) == 8
    assert max(errors) < 1e-5 and clipped > 50


def test_oracle_gradients_match_finite_differences():
    step, reward = dynamics_fn("Pendulum-v1"), reward_fn("Pendulum-v1")

    def discounted_return(obs, actions):
        total = 0.0
        for t in range(20):
            next_obs = step(obs, actions[:, t : t + 1])
            total, obs = total + 0.99**t * reward(obs, actions[:, t : t + 1], next_obs), next_obs
        return total

    noise = torch.Generator().manual_seed(0)
    obs = rows("Pendulum-v1", 32)[0]
    check_gradient(discounted_return, [obs, 2 * torch.rand(32, 20, generator=noise, dtype=obs.dtype) - 1])
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)  # an angle that is not one
    assert torch.isfinite(torch.autograd.grad(step(zero, zero[:, :1]).sum(), zero)[0]).all()


def test_the_exact_cost_of_the_double_integrator_is_that_of_its_simulation():
    gain, gamma = torch.tensor([-0.6, -0.8], dtype=torch.float64, requires_grad=True), 0.9
    reward, step = reward_fn("DoubleIntegrator-v1"), dynamics_fn("DoubleIntegrator-v1")
    start = obs = torch.randn(5, 2, dtype=torch.float64)
    value = 0.0
    for t in range(400):
        action = obs @ gain[:, None]
        value = value + gamma**t * reward(obs, action, None)
        obs = step(obs, action)
    cost = double_integrator_cost(gain, gamma)
    exact = -0.5 * (start @ cost * start).sum(-1)
    torch.testing.assert_close(exact, value)
    ours, simulated = (torch.autograd.grad(x.sum(), gain)[0] for x in (exact, value))
    torch.testing.assert_close(ours, simulated)
