"""A training environment that is saved in mid-episode and loaded elsewhere goes on bit for bit."""

import io

import numpy as np
import pytest
import torch

from common import BadInput, Fault
from common.envs import ReplayableEnv, make_env
from common.rewards import REWARDS
from tests.test_training import same


def drive(env, rng, steps):
    """What `steps` random steps of a ReplayableEnv give, with resets where an episode ends."""
    seen = []
    for _ in range(steps):
        if env.obs is None:
            env.reset()
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        assert obs is env.obs
        if terminated or truncated:
            env.reset()
        seen.append((env.obs.copy(), reward, terminated, truncated))
    return seen


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", [1, 57, 333])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v4", "Ant-v4", "Pusher-v4", "Pendulum-v1"])
def test_a_resumed_environment_goes_on_bit_for_bit(env_id, steps):
    env, rng = ReplayableEnv(make_env(env_id, seed=7)), np.random.default_rng(0)
    drive(env, rng, steps)
    state = saved_and_loaded(env.state_dict())
    resumed = ReplayableEnv(make_env(env_id, seed=8))
    drive(resumed, np.random.default_rng(1), 5)  # whatever it did before is forgotten
    resumed.load_state_dict(state)
    assert np.array_equal(resumed.obs, env.obs) and same(resumed.state_dict(), env.state_dict())
    rng, again = np.random.default_rng(2), np.random.default_rng(2)
    wanted = drive(env, rng, 250)  # a time limit or a fall, and what comes after it, are in here
    for (obs, *rest), (resumed_obs, *resumed_rest) in zip(wanted, drive(resumed, again, 250), strict=True):
        assert np.array_equal(obs, resumed_obs) and rest == resumed_rest


def test_resuming_an_episode_that_was_reset_with_a_seed():
    env = ReplayableEnv(make_env("Hopper-v4"))
    env.reset(seed=11)
    drive(env, np.random.default_rng(0), 5)
    resumed = ReplayableEnv(make_env("Hopper-v4"))
    resumed.load_state_dict(saved_and_loaded(env.state_dict()))
    assert np.array_equal(env.obs, resumed.obs) and np.array_equal(env.reset()[0], resumed.reset()[0])


def test_recorded_actions_are_copies():
    env, resumed = (ReplayableEnv(make_env("Pendulum-v1", seed=0)) for _ in range(2))
    env.reset()
    action = np.ones(1, np.float32)
    for value in (1.0, -1.0, 0.3):
        action[:] = value
        env.step(action)
    resumed.load_state_dict(env.state_dict())
    assert np.array_equal(env.obs, resumed.obs)


@pytest.mark.parametrize("name, wrong", [
    ("reward", lambda obs, action, next_obs: 1.01 * REWARDS["Hopper-v5"](obs, action, next_obs)),
    ("reward", lambda obs, action, next_obs: REWARDS["Hopper-v5"](obs, action, next_obs)[:, None]),
    ("reward", lambda obs, action, next_obs: torch.full((len(obs),), float("nan"))),
    ("terminated", lambda next_obs: next_obs[:, 0] > -1e6),
], ids=["value", "shape", "nan", "termination"])  # fmt: skip
def test_a_function_that_says_something_else_than_the_environment_is_found(name, wrong):
    """In the first steps of a run, where those of its first reset did not show it (tests/test_compare.py)."""
    env = ReplayableEnv(make_env("Hopper-v4", seed=0))
    env.reset()
    setattr(env._comparison, name, wrong)
    with pytest.raises(Fault, match="of common/rewards.py (says .* where Hopper-v4 gives|returns the shape)"):
        drive(env, np.random.default_rng(0), 1)


@pytest.mark.parametrize("env_id", REWARDS)
def test_the_functions_we_have_say_what_the_environment_says(env_id):
    env = ReplayableEnv(make_env(env_id, seed=0))
    drive(env, np.random.default_rng(0), ReplayableEnv.COMPARED + 1)
    assert env._left < 0


def test_an_environment_named_with_its_module_is_compared_and_one_without_functions_is_not(monkeypatch):
    env_id = "gymnasium:MountainCarContinuous-v0"
    drive(ReplayableEnv(make_env(env_id, seed=0)), np.random.default_rng(0), 2)
    monkeypatch.setitem(REWARDS, env_id, REWARDS["InvertedPendulum-v4"])
    with pytest.raises(BadInput, match="one of common/rewards.py"):
        drive(ReplayableEnv(make_env(env_id, seed=0)), np.random.default_rng(0), 1)
