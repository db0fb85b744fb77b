"""Our Pusher-v4 moves as Gymnasium's did on MuJoCo 2.3.7, whichever MuJoCo is installed.

The reference is a recorded trace of an arm that pushes (tests/record_pusher.py says how it was made). Nothing
here needs torch, so these tests also run in a small environment with another MuJoCo:

    pip install gymnasium mujoco==<version> imageio packaging pytest
    python -m pytest --noconftest -s tests/test_pusher.py
"""

import copy
import pickle
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco.pusher_v5 import PusherEnv

from common.envs import make_env
from common.tasks import MUJOCO_VERSION, PusherV4

with np.load(Path(__file__).parent / "data" / "pusher_v4.npz") as file:
    TRACE = dict(file)
EPISODES = range(len(TRACE["seed"]))
only_mended = pytest.mark.skipif(MUJOCO_VERSION < (3, 0), reason="this MuJoCo is Gymnasium's own Pusher-v4's")


class Unmended(PusherV4):
    """Pusher-v4's model and reward in the physics of the installed MuJoCo."""

    _initialize_simulation = PusherEnv._initialize_simulation


def replay(env, episode, scale=1.0):
    """Replay the recorded actions divided by `scale`: observations (T + 1, 23), rewards (T,), infos."""
    obs, _ = env.reset(seed=int(TRACE["seed"][episode]))
    observations, rewards, infos = [obs], [], []
    for action in TRACE["action"][episode]:
        obs, reward, terminated, _, info = env.step(action / np.float32(scale))
        assert not terminated
        observations.append(obs), rewards.append(reward), infos.append(info)
    return np.array(observations), np.array(rewards), infos


def return_errors(make):
    """|return - recorded return| of each episode, in an environment from `make()`."""
    return [abs(replay(make(), i)[1].sum() - TRACE["reward"][i].sum()) for i in EPISODES]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(gym.logger, "min_level", gym.logger.ERROR)  # "v4 is out of date"


def test_the_trace_pushes():
    thing = TRACE["observation"][:, :, 17:20]
    assert (np.linalg.norm(thing[:, -1] - thing[:, 0], axis=1) > 0.10).all()


@pytest.mark.parametrize("episode", EPISODES)
def test_same_motion_rewards_and_info_as_recorded(episode):
    observations, rewards, infos = replay(gym.make("Pusher-v4"), episode)
    error = abs(rewards.sum() - TRACE["reward"][episode].sum())
    print(f"\nMuJoCo {mujoco.__version__}, episode {episode}: return differs by {error:.1e}")
    assert error < 1e-6
    np.testing.assert_allclose(observations, TRACE["observation"][episode], atol=1e-6, rtol=0)
    np.testing.assert_allclose(rewards, TRACE["reward"][episode], atol=1e-8, rtol=0)
    for name in ("reward_dist", "reward_ctrl"):
        np.testing.assert_allclose([info[name] for info in infos], TRACE[name][episode], atol=1e-8, rtol=0)
    assert infos[0].keys() == {"reward_dist", "reward_ctrl"}


@pytest.mark.parametrize("episode", EPISODES)
def test_same_through_make_env(episode):
    observations, rewards, _ = replay(make_env("Pusher-v4"), episode, scale=2.0)  # its actions are in [-1, 1]
    assert abs(rewards.sum() - TRACE["reward"][episode].sum()) < 1e-6
    np.testing.assert_array_equal(observations.dtype, np.float32)
    np.testing.assert_allclose(observations, TRACE["observation"][episode], atol=1e-5, rtol=0)


@only_mended
def test_without_the_mend_it_is_another_task():
    """So the tests above can fail, and the mend is still needed."""
    errors = return_errors(lambda: gym.wrappers.TimeLimit(Unmended(), 100))
    print(f"\nMuJoCo {mujoco.__version__} unmended: returns differ by {np.round(errors, 2)}")
    assert min(errors) > 1


@only_mended
def test_every_geom_has_the_margin_that_is_halved():
    assert len(set(Unmended().model.geom_margin)) == 1


@only_mended
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_are_mended_too(duplicate):
    assert max(return_errors(lambda: duplicate(PusherV4()))) < 1e-6
