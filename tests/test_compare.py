"""A wrong reward or termination is found before a run, or as soon as the environment shows it."""

import re
from contextlib import nullcontext
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

from common import BadInput, Fault
from common.envs import ReplayableEnv, make_env
from common.rewards import REWARDS, TERMINATIONS, double_integrator, never, square

ENV_ID = "DoubleIntegrator-v1"


def right(obs, action, next_obs):
    return double_integrator(obs, action, next_obs)


def in_place(obs, action, next_obs):
    reward = right(obs, action, next_obs)
    with torch.no_grad():
        next_obs[:, 1] = 0
    return reward


def branch(obs, action, next_obs):
    return right(obs, action, next_obs) if next_obs[:, 0] > -100 else next_obs[:, 0]


WRONG = {
    "sign": (lambda *rows: -right(*rows), "says .* where DoubleIntegrator-v1 gives .*actions are in"),
    "a small one": (lambda *rows: right(*rows) - 0.01 * square(rows[1]), "says"),
    "nan": (lambda *rows: right(*rows) * torch.nan, "says nan"),
    "mixed rows": (lambda *rows: right(*rows).mean(0, keepdim=True), r"the shape \(1,\) for 5 rows"),
    "mixed values": (lambda *rows: right(*rows).mean() + 0 * rows[0][:, 0], "says"),
    "column": (lambda *rows: right(*rows)[:, None], r"the shape \(5, 1\) for 5 rows"),
    "in place": (in_place, "in_place of common/rewards.py changes its inputs"),
    "branch": (branch, r"branch of .* fails for 5 rows .*RuntimeError: Boolean .* in test_compare.py, line"),
    "numpy": (lambda *rows: rows[0].numpy()[:, 0], "fails for 5 rows .*RuntimeError: Can't call numpy"),
    "two inputs": (lambda obs, action: obs[:, 0], "fails for 5 rows .*TypeError"),
    "no tensor": (lambda *rows: 3.0, "returns a float: let it compute with tensors"),
    "nothing": (lambda *rows: None, "returns a NoneType"),
    "dtype": (lambda *rows: rows[0][:, 0] > 0, "returns torch.bool: a reward is a float"),
}


def scaled(scale, *rows):
    return scale * right(*rows)


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, *rows):
        return scaled(self.scale, *rows)


@pytest.mark.parametrize("make, name", [(partial(partial, scaled), "scaled"), (Scaled, "Scaled")])
def test_a_reward_may_be_anything_that_is_called(make, name, monkeypatch):
    for scale in (1.0, 2.0):
        monkeypatch.setitem(REWARDS, ENV_ID, make(scale))
        wrong = pytest.raises(BadInput, match=f"^{name} of common/rewards.py says")
        with wrong if scale == 2.0 else nullcontext():
            ReplayableEnv(make_env(ENV_ID, seed=0)).reset()


@pytest.mark.parametrize("function, expected", WRONG.values(), ids=WRONG)
def test_a_wrong_reward_is_refused_before_a_run(function, expected, monkeypatch):
    monkeypatch.setitem(REWARDS, ENV_ID, function)
    with pytest.raises(BadInput, match=expected):
        ReplayableEnv(make_env(ENV_ID, seed=0)).reset()


@pytest.mark.parametrize("function, expected", [
    (lambda next_obs: never(next_obs).float(), "returns torch.float32: .* a termination is a bool"),
    (lambda next_obs: ~never(next_obs), "says True, where DoubleIntegrator-v1 gives False"),
    (lambda next_obs: next_obs.abs_()[:, 0] > 1e9, "fails .* in-place"),
])  # fmt: skip
def test_a_wrong_termination_is_refused_before_a_run(function, expected, monkeypatch):
    monkeypatch.setitem(TERMINATIONS, ENV_ID, function)
    with pytest.raises(BadInput, match=expected):
        ReplayableEnv(make_env(ENV_ID, seed=0)).reset()


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_a_reward_may_have_any_unit(scale, monkeypatch):
    def scaled(sign):
        return lambda *rows: sign * scale * right(*rows)

    def make():
        env = make_env(ENV_ID, seed=0)
        step = env.unwrapped.step
        monkeypatch.setattr(env.unwrapped, "step", lambda action: scale_reward(step(action)))
        return ReplayableEnv(env)

    def scale_reward(result):
        return result[0], scale * result[1], *result[2:]

    monkeypatch.setitem(REWARDS, ENV_ID, scaled(1))
    env = make()
    env.reset()
    for _ in range(ReplayableEnv.COMPARED):
        env.step(env.action_space.sample())
    monkeypatch.setitem(REWARDS, ENV_ID, scaled(-1))
    with pytest.raises(BadInput, match="says"):
        make().reset()


def test_a_function_cannot_write_into_what_the_buffer_gets(monkeypatch):
    """A step's rows are copied for it; that it fails after the first steps is told as a fault."""
    calls = []

    def late(obs, action, next_obs):
        calls.append(1)
        return in_place(obs, action, next_obs) if len(calls) > 3 else right(obs, action, next_obs)

    monkeypatch.setitem(REWARDS, ENV_ID, late)
    env = ReplayableEnv(make_env(ENV_ID, seed=0))
    env.reset()
    with pytest.raises(Fault, match="changes its inputs"):
        for _ in range(4):
            env.step(np.ones(env.action_space.shape))
    assert env.obs[1] != 0


@pytest.mark.parametrize("function, expected", [
    (lambda *rows: right(*rows).detach(), "has no gradient, so that MAGE and MAAC see no slope"),
    (torch.no_grad()(right), "has no gradient"),
    (lambda *rows: right(*rows) + 0 * (0 * rows[2][:, 0]).sqrt(), "the gradient of .* is not finite"),
    (right, None),
])  # fmt: skip
def test_a_reward_without_a_gradient_is_doubted(function, expected, monkeypatch, capsys):
    monkeypatch.setitem(REWARDS, ENV_ID, function)
    ReplayableEnv(make_env(ENV_ID, seed=0)).reset()
    text = capsys.readouterr().err
    assert bool(text) == bool(expected)
    if expected:
        assert len(text.splitlines()) == 1 and re.search(expected, text)


@pytest.mark.parametrize("env_id", REWARDS)
def test_ours_are_not_doubted(env_id, capsys):
    """But for the one that pays 1 while the pole stands: it is right that nobody can learn from its slope."""
    ReplayableEnv(make_env(env_id, seed=0)).reset()
    assert ("no gradient" in capsys.readouterr().err) == (env_id == "InvertedPendulum-v5")


def test_a_late_end_that_a_function_does_not_know_is_said_once(monkeypatch, capsys):
    monkeypatch.setitem(TERMINATIONS, "Hopper-v4", never)
    monkeypatch.setattr(ReplayableEnv, "COMPARED", 5)
    env = ReplayableEnv(make_env("Hopper-v4", seed=0))
    env.reset()
    ends = 0
    for _ in range(200):
        if env.step(env.action_space.sample())[2]:
            ends += 1
            env.reset()
    text = capsys.readouterr().err
    assert ends > 1 and text.count("never of common/rewards.py says False, where Hopper-v4 gives True") == 1
    assert "the run goes on" in text


def test_two_modules_may_have_an_environment_of_the_same_name(monkeypatch):
    """`mine:Point-v0` is not compared with the functions of `other:Point-v0`."""
    monkeypatch.setitem(REWARDS, "other:MountainCarContinuous-v0", lambda *rows: rows[0][:, 0])
    ReplayableEnv(make_env("gymnasium:MountainCarContinuous-v0", seed=0)).reset()


def test_an_environment_must_say_whether_it_ended(monkeypatch):
    env = ReplayableEnv(make_env("MountainCarContinuous-v0", seed=0))
    step = env.unwrapped.step
    monkeypatch.setattr(env.unwrapped, "step", lambda action: (*step(action)[:2], None, False, {}))
    with pytest.raises(Fault, match="says for terminated None, which is neither True nor False"):
        env.reset()


def test_an_episode_that_is_shorter_when_it_is_repeated_is_given_up(capsys):
    env = ReplayableEnv(make_env(ENV_ID, seed=0))
    env.reset()
    for _ in range(12):
        env.step(np.ones(env.action_space.shape))
    shorter = ReplayableEnv(make_env(ENV_ID, seed=0))
    limited = next(x for x in wrappers(shorter) if isinstance(x, gym.wrappers.TimeLimit))
    limited._max_episode_steps = 10
    shorter.load_state_dict(env.state_dict())
    assert "given up after 12 steps" in (text := capsys.readouterr().err) and "has changed" in text


def wrappers(env):
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
