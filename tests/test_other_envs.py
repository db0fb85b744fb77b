"""Environments that other people wrote: what Gymnasium allows them to do, and what they do all the same."""

import gc
import tracemalloc
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tqdm import tqdm

import maac_sac
from common import BadInput
from common.envs import ReplayableEnv, make_env
from common.evaluate import evaluate
from common.film import film
from tests.conftest import SCRIPTS, checkpoint, stored, train


class Walk(gym.Env):
    """s' = s + 0.1 a, from a uniform start; an episode has 10 steps. The others are variations of it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    length = 10

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.steps = 0

    def uniform(self):
        return self.np_random.uniform(-1, 1, 2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.uniform().astype(np.float32), 0
        return self.state.copy(), self.info()

    def step(self, action):
        self.state = self.state + np.float32(0.1) * action
        self.steps += 1
        reward = float(self.state.sum())
        return self.state.copy(), reward, False, self.steps == self.length, self.info()

    def info(self):
        return {}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)


class InPlace(Walk):
    """It returns its own state, changes it in place, and the action too."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.state, {}

    def step(self, action):
        self.state += np.float32(0.1) * action
        self.steps += 1
        action *= np.nan
        return self.state, float(self.state.sum()), False, self.steps == self.length, {}


class OldGenerator(Walk):
    """Its generator is a RandomState, as dm_control's are."""

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.RandomState(seed)
        return super().reset(options=options)

    def uniform(self):
        return 2 * self.np_random.rand(2) - 1


class OwnGenerator(Walk):
    """Its generator is where nobody else can see it, but it is seeded as Gymnasium says."""

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.own = np.random.default_rng(seed)
        return super().reset(options=options)

    def uniform(self):
        return self.own.uniform(-1, 1, 2)


class GlobalRandomness(Walk):
    """Nobody can seed it."""

    def uniform(self):
        return np.random.default_rng().uniform(-1, 1, 2)


class RandomSteps(Walk):
    def step(self, action):
        return super().step(action + np.random.default_rng().uniform(-0.1, 0.1, 2).astype(np.float32))


class Contacts(Walk):
    def info(self):
        return {"contacts": np.zeros(self.steps % 3)}


class Records(Walk):
    """Its author has put RecordEpisodeStatistics around it, or a Monitor."""

    def info(self):
        return {"episode": 3}


class Once(Walk):
    """It binds a port, as it were."""

    taken = False

    def __init__(self, **kwargs):
        if Once.taken:
            raise OSError(98, "Address already in use")
        super().__init__(**kwargs)
        Once.taken = True

    def close(self):
        Once.taken = False


class Endless(Walk):
    length = None


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    """These worlds are without noise, and a model of them would be fitted for long."""
    monkeypatch.setattr(maac_sac, "fit_model", partial(maac_sac.fit_model, max_epochs=2))


ALL = [Walk, InPlace, OldGenerator, OwnGenerator, GlobalRandomness, RandomSteps, Contacts, Records, Endless]


def settings(env_id):
    return dict(env_id=env_id, total_timesteps=60, eval_max_steps=30)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("env", ALL)
def test_every_environment_trains_and_what_is_stored_is_what_happened(name, env, register, tmp_path):
    env_id = register(env)
    rows = stored(checkpoint(train(name, tmp_path, **settings(env_id)))).numpy()
    obs, action, reward, next_obs = rows[:, :2], rows[:, 2:4], rows[:, 4], rows[:, 5:7]
    assert len(rows) == 60 and np.abs(next_obs - obs).min() > 0
    noise = 0.011 if env is RandomSteps else 1e-6
    assert np.abs(next_obs - obs - 0.1 * action).max() < noise
    assert np.abs(reward - next_obs.sum(1)).max() < 1e-5
    going_on = np.arange(59) % 10 != 9 if env is not Endless else np.ones(59, bool)
    assert np.array_equal(obs[1:][going_on], next_obs[:-1][going_on])


def test_arrays_that_make_env_returns_belong_to_the_caller(register):
    env = make_env(register(InPlace), seed=0)
    action = np.ones(2, np.float32)
    first, _ = env.reset()
    kept = first.copy()
    second, *_ = env.step(action)
    kept_2 = second.copy()
    env.step(action)
    assert np.array_equal(first, kept) and np.array_equal(second, kept_2) and (action == 1).all()


@pytest.mark.parametrize("env", [Walk, OldGenerator, OwnGenerator])
def test_the_seed_reaches_the_environments_own_generator(env, register):
    def starts(seed):
        made = ReplayableEnv(make_env(env_id, seed=seed))
        return [made.reset()[0].tolist() for _ in range(3)]

    env_id = register(env)
    assert starts(3) == starts(3) and starts(3)[0] != starts(4)[0] and starts(3)[0] != starts(3)[1]
    bare = gym.make(env_id)
    assert starts(3)[0] == bare.reset(seed=3)[0].tolist() and starts(3)[1] == bare.reset()[0].tolist()


@pytest.mark.parametrize("env, says", [(env, env in (GlobalRandomness, RandomSteps)) for env in ALL])
def test_randomness_that_no_seed_reaches_is_said_at_the_start(env, says, register, tmp_path, capsys):
    train("td3", tmp_path, **settings(register(env)))
    assert ("is not the same after two resets" in capsys.readouterr().err) == says


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("env, exact", [
    (Walk, True), (InPlace, True), (OldGenerator, True), (Contacts, True), (Endless, True),
    (OwnGenerator, False), (GlobalRandomness, False), (RandomSteps, False),
])  # fmt: skip
def test_a_run_goes_on_whatever_the_environment(name, env, exact, register, tmp_path, capsys):
    """Stopped at step 25, in the middle of the third episode: exactly where that can be had."""
    common = settings(register(env))
    whole = checkpoint(train(name, tmp_path / "whole", **common))
    train(name, tmp_path / "run", **common | dict(total_timesteps=25))
    kept = stored(checkpoint(tmp_path / "run"))
    capsys.readouterr()
    after = checkpoint(train(name, tmp_path / "run", **common, resume=True))
    said = capsys.readouterr().err
    assert ("is given up after 5 steps" in said and "a new one begins" in said) == (not exact)
    assert torch.equal(stored(after)[:25], kept) and after["step"] == 60
    assert (torch.equal(stored(after), stored(whole))) == exact
    if env is OwnGenerator:  # from the new episode on it is a run like any other: it can be repeated
        again = tmp_path / "again"
        train(name, again, **common | dict(total_timesteps=25))
        assert torch.equal(stored(checkpoint(train(name, again, **common, resume=True))), stored(after))


def test_an_episode_too_long_to_be_replayed_is_given_up(register, monkeypatch, capsys):
    monkeypatch.setattr(ReplayableEnv, "LONGEST", 20)
    env = ReplayableEnv(make_env(env_id := register(Endless), seed=0))
    env.reset()
    for _ in range(30):
        env.step(np.ones(2))
    state = env.state_dict()
    assert len(state["actions"]) == 20
    resumed = ReplayableEnv(make_env(env_id, seed=0))
    resumed.load_state_dict(state)
    assert "given up after 30 steps" in capsys.readouterr().err
    resumed.step(np.ones(2))


def test_evaluation_reads_no_infos(register):
    result = evaluate(lambda obs: np.zeros_like(obs), register(Contacts), episodes=4)
    assert (result.lengths == 10).all()


def test_an_environment_that_can_exist_once_trains_without_evaluations(register, tmp_path):
    env_id = register(Once)
    train("td3", tmp_path / "a", env_id=env_id, eval_episodes=0)
    assert checkpoint(tmp_path / "a")["step"] == 60 and not (tmp_path / "a/eval.csv").exists()
    assert (tmp_path / "a/train.csv").exists() and not Once.taken
    with pytest.raises(BadInput, match="--eval-episodes 0") as refused:
        train("td3", tmp_path / "b", env_id=env_id)
    assert "Address already in use" in str(refused.value) and "that Gymnasium knows" not in str(refused.value)
    Once.taken = False


def test_an_episode_of_an_evaluation_ends_at_the_limit_that_is_given(register, tmp_path, capsys):
    run = train("td3", tmp_path, env_id=register(Endless), eval_max_steps=7)
    lengths = [line.split(",")[3] for line in (run / "eval.csv").read_text().splitlines()[1:]]
    assert set(lengths) == {"7.0"} and "--eval-max-steps" in capsys.readouterr().out


@pytest.mark.parametrize("rate", [None, 10, 50])
def test_a_film_has_a_usual_rate_where_none_is_given(rate, register, tmp_path, monkeypatch):
    monkeypatch.setattr(Walk, "metadata", {"render_modes": ["rgb_array"], "render_fps": rate})
    film(lambda obs: np.zeros(2, np.float32), register(Walk), tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size > 0


def test_the_frames_of_a_film_are_small_as_they_are_taken(register, tmp_path, monkeypatch):
    class Large(Walk):
        length = 100

        def render(self):
            return np.zeros((800, 800, 3), np.uint8)

    bars = []
    monkeypatch.setattr("common.film.tqdm", lambda **kwargs: bars.append(tqdm(**kwargs)) or bars[0])
    tracemalloc.start()
    film(lambda obs: np.zeros(2, np.float32), register(Large), tmp_path / "a.gif")
    gc.collect()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 800 * 800 * 3 * 0.7  # a quarter of each, and a few whole ones
    assert bars[0].n in (0, 100) and bars[0].total == 10_000  # 0: pytest's stderr is no terminal
