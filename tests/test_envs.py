"""What make_env promises: spaces, seeds, plain refusals; and the environments of our own."""

import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from common import BadInput
from common.envs import RUNNERS, make_env
from common.rewards import REWARDS

OTHERS = ["MountainCarContinuous-v0", "InvertedDoublePendulum-v5", "HumanoidStandup-v5", "Reacher-v5"]
FLAT = Box(-1, 1, (2,), np.float32)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(gym.logger, "min_level", gym.logger.ERROR)  # for gym.make, where the tests call it


class Probe(gym.Env):
    """Observes and keeps the last action it was given; refuses one that is not in its action space."""

    def __init__(self, observation_space=FLAT, action_space=FLAT, error=None):
        self.observation_space, self.action_space = observation_space, action_space
        if error:
            raise error

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        self.action = action
        assert self.action_space.contains(action), action
        return np.asarray(action, self.observation_space.dtype), 0.0, False, False, {}


@pytest.fixture
def probe():
    """A function that registers a Probe with the given arguments and gives its id."""
    ids = []

    def register(**kwargs):
        ids.append(f"test/Probe{len(ids)}-v0")
        gym.register(ids[-1], Probe, kwargs=kwargs)
        return ids[-1]

    yield register
    for env_id in ids:
        del gym.registry[env_id]


# --- observations, actions, seeds ---
@pytest.mark.parametrize("env_id", [*REWARDS, *OTHERS])
def test_spaces_and_types(env_id):
    gym.logger.min_level = gym.logger.WARN
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "The environment Hopper-v4 is out of date"
        env = make_env(env_id, seed=0)
    da = env.action_space.shape[0]
    assert env.action_space == Box(-1, 1, (da,), np.float32) and len(env.observation_space.shape) == 1
    obs, _ = env.reset()
    for action in [np.full(da, x, np.float32) for x in (-1, 1, 0)]:
        assert obs.dtype == np.float32 and env.observation_space.contains(obs)
        obs, reward, terminated, truncated, _ = env.step(action)
        assert np.isfinite(reward) and type(terminated) is type(truncated) is bool


@pytest.mark.parametrize("env_id", [f"{robot}-{version}" for robot in RUNNERS for version in ("v4", "v5")])
def test_runners_observe_their_x_velocity_first(env_id):
    env, plain = make_env(env_id, seed=5), gym.make(env_id)
    obs, plain_obs = env.reset()[0], plain.reset(seed=5)[0]
    x_velocity = 0.0
    for _ in range(20):
        assert np.array_equal(obs, np.append(x_velocity, plain_obs).astype(np.float32))
        action = np.sign(env.action_space.sample())
        obs, *_, info = env.step(action)
        plain_obs, *_ = plain.step(np.where(action > 0, plain.action_space.high, plain.action_space.low))
        x_velocity = info["x_velocity"]
    assert x_velocity != 0


def test_the_logger_is_left_as_it_was():
    gym.logger.min_level = 17
    make_env("Hopper-v4")
    with pytest.raises(BadInput):
        make_env("Nope-v0")
    assert gym.logger.min_level == 17


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_observations_of_other_float_types(probe, dtype):
    huge = np.finfo(dtype).max  # means "no bounds" in some environments
    env = make_env(probe(observation_space=Box(-huge, huge, (1,), dtype), action_space=Box(-1, 1, (1,))))
    for obs in (env.reset()[0], env.step(np.ones(1, np.float32))[0]):
        assert obs.dtype == np.float32 and obs.shape == (1,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("low, high", [([-1, 0], [3, 0.5]), ([0.1, -7.3], [0.3, -0.1])])
def test_each_action_dimension_has_its_own_bounds(probe, low, high, dtype):
    low, high = np.array(low, dtype), np.array(high, dtype)
    env = make_env(probe(action_space=Box(low, high, dtype=dtype)))
    env.reset()
    for action, share in [(-1, 0), (1, 1), (0, 0.5), (0.5, 0.75), (-9, 0), (9, 1)]:
        wanted = low + share * (high - low)
        env.step(np.full(2, action, np.float32))
        np.testing.assert_allclose(env.unwrapped.action, wanted, rtol=1e-6)
        assert env.unwrapped.action.dtype == dtype
    for _ in range(1000):  # Probe refuses what is a rounding error beyond its bounds
        env.step(np.sign(env.action_space.sample()))
        env.step(env.action_space.sample())


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v4", "Pusher-v4", "ContinuousCartPole-v1"])
def test_a_seeded_environment_starts_as_reset_with_that_seed(env_id):
    env, other = make_env(env_id, seed=3), make_env(env_id)
    first, second = env.reset()[0], env.reset()[0]
    assert np.array_equal(first, other.reset(seed=3)[0])
    assert np.array_equal(second, other.reset()[0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, make_env(env_id, seed=4).reset()[0])
    samples = [make_env(env_id, seed=3).action_space.sample() for _ in range(2)]
    assert np.array_equal(*samples)


# --- refusals ---
def refusal(env_id):
    with pytest.raises(BadInput) as error:
        make_env(env_id)
    message = str(error.value)
    assert message.startswith("--env-id ") and message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "env_id, expected",
    [
        ("Nope-v0", "Did you mean: `Hopper`?"),
        ("Hopper-v9", "`v4`, `v5`"),
        ("nope/Hopper-v4", "Namespace nope not found"),
        ("", "Malformed environment ID"),
        (":Hopper-v4", "Hopper-v4"),
        ("foo:Bar-v0", "No module named 'foo'"),
        ("CartPole-v1", "Discrete(2)"),
        ("Blackjack-v1", "Tuple observations"),
        ("points_of_mine:Point-v0", "put points_of_mine.py beside the script, or its folder on PYTHONPATH"),
        ("Point-v0", "or its module too: points:Point-v0"),
    ],
)
def test_ids_that_cannot_be_used(env_id, expected):
    assert expected in refusal(env_id)


@pytest.mark.parametrize(
    "spaces, expected",
    [
        ({"action_space": Discrete(3)}, "Discrete(3): choose one with continuous actions"),
        ({"action_space": Box(0, 3, (2,), np.int32)}, "continuous actions"),
        ({"action_space": Box(-np.inf, np.inf, (2,))}, "give it finite action bounds"),
        ({"action_space": Box(np.float32([-1, 0]), np.float32([1, np.inf]))}, "give it finite action bounds"),
        ({"action_space": Box(-1e308, 1e308, (2,), np.float64)}, "give it finite action bounds"),
        ({"action_space": Box(np.float32([-1, 0]), np.float32([1, 0]))}, "low < high"),
        ({"action_space": Box(-1, 1, (2, 2))}, "actions of shape (2, 2)"),
        ({"observation_space": Dict(a=FLAT)}, "wrap it in gymnasium.wrappers.FlattenObservation"),
        ({"observation_space": Discrete(4)}, "Discrete observations"),
        ({"observation_space": Box(0, 255, (8, 8, 3), np.uint8)}, "not images"),
        ({"observation_space": Box(0, 255, (128,), np.uint8)}, "uint8 observations"),
        ({"observation_space": Box(-1, 1, ())}, "observations of shape ()"),
        ({"error": gym.error.DependencyNotInstalled("No Box2D")}, "(No Box2D): install what it needs."),
        ({"error": ImportError("No\nmodule")}, "(No module): install what it needs."),
        ({"error": KeyError("mass")}, "(KeyError: 'mass' in test_envs.py, line"),
    ],
)
def test_environments_that_cannot_be_used(probe, spaces, expected):
    assert expected in refusal(probe(**spaces))


# --- our own environments ---
@pytest.mark.parametrize("robot, size", [("HalfCheetah", 17), ("Ant", 27), ("Hopper", 11), ("Walker2d", 17)])
def test_wang_2019(robot, size):
    env, theirs = make_env(f"mbbl/{robot}-v0", seed=0), gym.make(f"{robot}-v4").unwrapped
    core = env.unwrapped
    assert core.fullpath == theirs.fullpath and core.frame_skip == theirs.frame_skip
    assert env.observation_space.shape == (size,)
    obs, _ = env.reset()
    rng, fastest, first = np.random.default_rng(0), 0, 2 if robot == "Ant" else 1
    for step in range(1, 1001):
        np.testing.assert_allclose(obs, np.append(core.data.qpos[first:], core.data.qvel), rtol=1e-6)
        fastest = max(fastest, abs(core.data.qvel).max())
        action = np.sign(rng.uniform(-1, 1, env.action_space.shape)).astype(np.float32)
        wanted = core.data.qvel[0] - 0.1 * len(action)
        if robot != "HalfCheetah":
            wanted += 1 - 3 * (obs[0].item() - (0.57 if robot == "Ant" else 1.3)) ** 2
        obs, reward, terminated, truncated, _ = env.step(action)
        assert reward == pytest.approx(wanted, abs=1e-6) and not terminated and truncated == (step == 1000)
    assert fastest > 10  # where Gymnasium would clip


def euler_cartpole(state, force):
    """One step of 0.02 s from Barto, Sutton and Anderson's equations of motion, friction left out."""
    x, x_dot, theta, theta_dot = state
    g, cart, pole, half_length, dt = 9.8, 1.0, 0.1, 0.5, 0.02
    total = cart + pole
    sin, cos, swing = math.sin(theta), math.cos(theta), pole * half_length
    pull = (-force - swing * theta_dot**2 * sin) / total
    theta_acc = (g * sin + cos * pull) / (half_length * (4 / 3 - pole * cos**2 / total))
    x_acc = (force + swing * (theta_dot**2 * sin - theta_acc * cos)) / total
    return x + dt * x_dot, x_dot + dt * x_acc, theta + dt * theta_dot, theta_dot + dt * theta_acc


def test_continuous_cartpole_is_eulers():
    env, rng = make_env("ContinuousCartPole-v1", seed=0), np.random.default_rng(0)
    lengths = []
    for _ in range(50):
        assert (abs(env.reset()[0]) <= 0.05).all()
        state, terminated, steps = env.unwrapped.state, False, 0
        while not terminated:
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            state = euler_cartpole(state, 10 * float(action[0]))
            obs, reward, terminated, truncated, _ = env.step(action)
            steps += 1
            np.testing.assert_allclose(env.unwrapped.state, state, rtol=1e-12, atol=1e-12)
            assert reward == 1.0 and np.array_equal(obs, np.float32(env.unwrapped.state)) and not truncated
            assert terminated == (abs(state[0]) > 2.4 or abs(state[2]) > math.radians(12))
        lengths.append(steps)
    assert min(lengths) > 5 and len(set(lengths)) > 10


def test_continuous_cartpole_ends_after_500_steps_or_off_the_track():
    env = make_env("ContinuousCartPole-v1", seed=0)
    obs, _ = env.reset()
    ends = []
    while not ends or not any(ends[-1]):
        push = 3 * obs[2] + obs[3] + 0.3 * obs[0] + 0.5 * obs[1]  # balances
        obs, _, *end, _ = env.step(np.array([push], np.float32))
        ends.append(end)
    assert len(ends) == 500 and ends[-1] == [False, True]
    env.reset()
    env.unwrapped.state = np.array([2.39, 3.0, 0.0, 0.0])
    assert env.step(np.zeros(1, np.float32))[2]


def test_continuous_cartpole_renders():
    pytest.importorskip("pygame")
    env = make_env("ContinuousCartPole-v1", seed=0, render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (400, 600, 3)
