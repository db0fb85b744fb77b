"""Whole runs of a few dozen steps: what is learned from what, how often, again and again the same."""

import csv
import dataclasses
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit

import common.run
from common import Fault
from common.args import main
from common.envs import make_env
from common.evaluate import evaluate
from common.rewards import TERMINATIONS
from tests.conftest import (
    DYNA,
    ROOT,
    SAC,
    SCRIPTS,
    TD3,
    Planned,
    checkpoint,
    fields,
    script,
    stored,
    tiny,
    train,
    words,
)

NETWORKS = ("actor", "actor_target", "critic", "critic_target", "model", "reward_model")


def table(run_dir, name, without=()):
    rows = list(csv.DictReader((run_dir / f"{name}.csv").open(newline="")))
    return [{column: value for column, value in row.items() if column not in without} for row in rows]


def same(left, right):
    """Two parts of a checkpoint are equal, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return torch.equal(left, right) if torch.is_tensor(left) else left == right


def learned(run_dir):
    """All of a checkpoint but its clock, its settings and its history."""
    without = ("seconds", "args", "tables", "starts")
    return {name: part for name, part in checkpoint(run_dir).items() if name not in without}


def weights(state, network):
    return {name: value for name, value in state[network].items() if "norm" not in name}


def steps_of(state, optimizer):
    """How many steps an optimiser has made with each of its parameters; all of them agree."""
    (steps,) = {int(part["step"]) for part in state[optimizer]["state"].values()} or {0}
    return steps


# --- what a run does ----------------------------------------------------------------------------------------
CHANGES = [
    dict(),
    dict(learning_starts=21, updates_per_step=3),
    dict(learning_starts=0, updates_per_step=1, policy_delay=3),
    dict(learned_reward=True, model_train_every=7, model_batches=3),
    dict(num_critics=1, policy_delay=1, target_noise=0),
]


@pytest.mark.parametrize(
    "name, change", [(name, c) for name in TD3 for c in CHANGES if set(c) <= set(fields(name))], ids=str
)
def test_every_promised_update_happens_and_no_other(name, change, tmp_path):
    before = checkpoint(train(name, tmp_path / "before", **change | dict(total_timesteps=0)))
    after = checkpoint(train(name, tmp_path / "after", **change))
    args = after["args"]
    critic_steps = (args["total_timesteps"] - args["learning_starts"]) * args["updates_per_step"]
    steps = dict(critic_opt=critic_steps, actor_opt=critic_steps // args["policy_delay"])
    if name in DYNA:
        steps["model_opt"] = args["total_timesteps"] // args["model_train_every"] * args["model_batches"]
        steps["reward_opt"] = steps["model_opt"] if args["learned_reward"] else 0
    assert {optimizer: steps_of(after, optimizer) for optimizer in steps} == steps
    for network in set(NETWORKS) & set(after):
        moves = network != "reward_model" or args["learned_reward"]
        for part, value in weights(before, network).items():
            assert torch.equal(value, after[network][part]) != moves, f"{network} {part}"
            assert torch.isfinite(after[network][part]).all()


@pytest.mark.parametrize("change", [{}, dict(horizon=0), SAC], ids=str)
def test_maac_makes_every_promised_update(change, tmp_path):
    before = checkpoint(train("maac_sac", tmp_path / "before", **change | dict(total_timesteps=0)))
    after = checkpoint(train("maac_sac", tmp_path / "after", **change))
    assert [steps_of(after, f"{part}_opt") for part in ("actor", "critic", "alpha")] == [80, 80, 80]
    for network in ("actor", "critic", "critic_target", "temperature", "model"):
        moves = network != "model" or change != SAC
        for part, value in weights(before, network).items():
            assert torch.equal(value, after[network][part]) != moves, f"{network} {part}"
    assert steps_of(after, "model_opt") >= 3 * 5 if change != SAC else not after["model_opt"]["state"]


@pytest.mark.parametrize("name", DYNA)
def test_the_oracle_takes_the_place_of_the_model(name, tmp_path, monkeypatch):
    before = checkpoint(train(name, tmp_path / "before", total_timesteps=0, oracle_dynamics=True))
    after = checkpoint(train(name, tmp_path / "after", oracle_dynamics=True))
    assert same(weights(before, "model"), weights(after, "model")) and steps_of(after, "model_opt") == 0
    assert steps_of(after, "critic_opt") == 80
    module, reached = script(name), []
    monkeypatch.setattr(module.Dynamics, "sample", lambda *args: reached.append(1))
    train(name, tmp_path / "again", oracle_dynamics=True)
    assert not reached and same(learned(tmp_path / "again"), learned(tmp_path / "after"))


def test_lambda_weighs_the_td_error(tmp_path):
    """Without that error nothing sets the level of Q, only its slope."""
    start, without, some, more = (
        checkpoint(train("mage_td3", tmp_path / f"{lam} {steps}", lam=lam, total_timesteps=steps))["critic"]
        for lam, steps in ((0, 0), (0, 60), (0.05, 60), (0.2, 60))
    )
    level, slope = "net.4.bias", "net.4.weight"
    assert torch.equal(start[level], without[level]) and not torch.equal(start[slope], without[slope])
    assert not torch.equal(some[level], more[level]) and not torch.equal(some[slope], without[slope])


@pytest.mark.parametrize("name", TD3)
def test_the_threshold_of_the_huber_loss_reaches_the_critic(name, tmp_path):
    """Rewards of up to -16 make large errors, which weigh less with 1 than with 1000."""
    default, one, squares = (
        learned(train(name, tmp_path / str(i), **change))
        for i, change in enumerate(({}, dict(huber_threshold=1.0), dict(huber_threshold=1000.0)))
    )
    assert same(default, one) and not same(one, squares)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_folder_holds_what_is_promised(name, tmp_path):
    run = train(name, tmp_path / "run", seed=3)
    assert (run / "eval.csv").read_text().splitlines()[0] == "step,return_mean,return_std,length_mean,seconds"
    rows = table(run, "eval")
    assert [row["step"] for row in rows] == ["0", "20", "40", "60"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert {float(row["length_mean"]) for row in rows} == {200}

    rows = table(run, "train")
    columns = {"critic_grad", "actor_loss", "actor_grad", "steps_per_second"}
    columns |= {"td_loss"} if name in TD3 else {"critic_loss", "model_loss", "alpha", "entropy"}
    columns |= {"model_loss", "model_error", "model_grad"} if name in DYNA else set()
    columns |= {"gradient_loss"} if name == "mage_td3" else set()
    assert list(rows[0])[0] == "step" and columns <= set(rows[0])
    assert [row["step"] for row in rows] == ["20", "40", "60"]
    assert all(math.isfinite(float(row[column])) for row in rows[1:] for column in columns)
    assert rows[0]["actor_loss"] == ""  # nothing was learned yet

    described = json.loads((run / "args.json").read_text())
    args = script(name).Args(**described["args"])
    assert args.seed == 3 and args.run_dir == str(run) and args.lr == script(name).Args().lr
    assert {"torch", "gymnasium", "mujoco", "numpy", "python"} <= set(described["versions"])
    assert described["device"] == "cpu" and "revision" in described
    assert Path(described["script"]).name == f"{name}.py"
    assert dataclasses.asdict(args) == checkpoint(run)["args"]
    (events,) = run.glob("events.out.tfevents.*")
    assert b"eval/return_mean" in events.read_bytes() and b"train/actor_loss" in events.read_bytes()
    assert not list(run.glob("*.part"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_returns_the_last_return(name, tmp_path):
    module = script(name)
    result = module.train(module.Args(**dict(checkpoint(train(name, tmp_path / "a"))["args"],
                                             run_dir=str(tmp_path / "b"))))  # fmt: skip
    assert math.isfinite(result) and f"{result:.4f}" == table(tmp_path / "b", "eval")[-1]["return_mean"]


# --- the same again -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_seed_is_one_run(name, tmp_path):
    one, two, other = (train(name, tmp_path / run, seed=len(run)) for run in ("a", "b", "cc"))
    assert table(one, "eval", ["seconds"]) == table(two, "eval", ["seconds"])
    assert same(learned(one), learned(two))
    assert table(one, "eval", ["seconds"]) != table(other, "eval", ["seconds"])
    assert not same(weights(learned(one), "actor"), weights(learned(other), "actor"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation_leaves_training_alone(name, tmp_path):
    one, two = (learned(train(name, tmp_path / str(n), eval_every=n, eval_episodes=n)) for n in (2, 30))
    assert one.pop("last_return") != two.pop("last_return")  # of 2 episodes, of 30
    assert one.pop("best_return") != two.pop("best_return") and same(one, two)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "ContinuousCartPole-v1"])
@pytest.mark.parametrize("way", ["ends", "is told to stop"])
def test_a_run_that_stops_and_goes_on_is_the_same_run(name, env_id, way, tmp_path, monkeypatch):
    whole, parts = train(name, tmp_path / "whole", env_id=env_id), tmp_path / "parts"
    if way == "ends":
        train(name, parts, env_id=env_id, total_timesteps=35)
    else:
        step = common.run.Run.fetch

        def fetch(run, action):
            if run.step == 35 and not run.stop:
                signal.raise_signal(signal.SIGTERM)
            return step(run, action)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(common.run.Run, "fetch", fetch)
            train(name, parts, env_id=env_id)
        assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoint(parts)["step"] == 35
    train(name, parts, env_id=env_id, resume=True)
    assert table(parts, "eval", ["seconds"]) == table(whole, "eval", ["seconds"])
    assert table(parts, "train", ["steps_per_second"]) == table(whole, "train", ["steps_per_second"])
    assert same(learned(parts), learned(whole))


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """What was logged after the checkpoint is dropped: it happens again."""
    whole, parts = train("td3", tmp_path / "whole"), tmp_path / "parts"
    train("td3", parts, total_timesteps=35)
    state = (parts / "checkpoint.pt").read_bytes()
    train("td3", parts, total_timesteps=50, resume=True)
    (parts / "checkpoint.pt").write_bytes(state)
    assert [row["step"] for row in table(parts, "eval")] == ["0", "20", "40"]
    train("td3", parts, resume=True)
    assert table(parts, "eval", ["seconds"]) == table(whole, "eval", ["seconds"])
    assert table(parts, "train", ["steps_per_second"]) == table(whole, "train", ["steps_per_second"])
    assert same(learned(parts), learned(whole))


# --- transitions --------------------------------------------------------------------------------------------
def plan(steps):
    """The first rows (s, r, s', terminated) that Planned gives, and which of them are truncated."""
    rows, truncated = [], []
    for episode in range(steps):
        length, end = Planned.PLAN[episode % len(Planned.PLAN)]
        for step in range(length):
            last = step == length - 1
            rows.append((episode, step, 1 + 10 * episode + step, episode, step + 1,
                         last and end in ("terminated", "both")))  # fmt: skip
            truncated.append(last and end in ("truncated", "both"))
    return torch.tensor(rows[:steps], dtype=torch.float32), torch.tensor(truncated[:steps])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_buffer_stores_what_happened(name, planned, tmp_path):
    """The last observation of an episode is its own, not that of the reset; truncated is not terminated."""
    state = checkpoint(train(name, tmp_path / "run", env_id=planned))
    rows, truncated = plan(60)
    found = stored(state)
    assert torch.equal(torch.cat([found[:, :2], found[:, 4:]], 1), rows)
    terminated = rows[:, -1] > 0
    ends = set(zip(terminated.tolist(), truncated.tolist(), strict=True))
    assert ends == {(False, False), (False, True), (True, False), (True, True)}
    assert torch.allclose(state["actor"]["obs_norm.mean"], rows[:, :2].mean(0), rtol=1e-5)
    if name != "td3":
        assert torch.allclose(state["model"]["delta_norm.mean"], torch.tensor([0.0, 1.0]))
        assert torch.allclose(state["model"]["action_norm.mean"], found[:, 2:4].mean(0), atol=1e-5)


def test_truncation_bootstraps_and_termination_does_not(planned, tmp_path, monkeypatch):
    td3, seen = script("td3"), []

    def spy(actor_target, critic_target, reward, next_obs, terminated, noise, gamma):
        y = td_target(actor_target, critic_target, reward, next_obs, terminated, noise, gamma)
        next_action = (actor_target(next_obs) + noise).clamp(-1, 1)
        q = critic_target(next_obs, next_action).amin(0)
        assert gamma == 0.999
        seen.extend(zip(reward.tolist(), next_obs.tolist(), terminated.tolist(), y.tolist(), q.tolist(),
                        strict=True))  # fmt: skip
        return y

    td_target = td3.td_target
    monkeypatch.setattr(td3, "td_target", spy)
    train("td3", tmp_path / "run", env_id=planned, gamma=0.999, lr=0.01)
    rows, truncated = plan(60)
    ends = {tuple(row[3:5].tolist()): (row[5] > 0, end) for row, end in zip(rows, truncated, strict=True)}
    cut = 0
    for reward, next_obs, terminated, y, q in seen:
        is_terminated, is_truncated = ends[tuple(next_obs)]
        assert terminated == is_terminated and abs(q) > 1e-6
        assert y == pytest.approx(reward if is_terminated else reward + 0.999 * q, rel=1e-5)
        cut += bool(is_truncated and not is_terminated)
    assert cut > 20


# --- noise --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_warm_up_actions_are_uniform_and_independent(name, planned, tmp_path):
    changes = dict(total_timesteps=600, learning_starts=600, buffer_size=600, eval_every=600)
    changes |= dict(model_train_every=10**6) if name != "td3" else {}
    actions = stored(checkpoint(train(name, tmp_path / "run", env_id=planned, **changes)))[:, 2:4]
    assert actions.abs().max() <= 1
    for column in actions.T:
        tenths = torch.histc(column, 10, -1, 1)
        assert ((tenths - 60) ** 2 / 60).sum() < 27.9  # chi square, 9 degrees of freedom, p = 0.001
    assert abs(torch.corrcoef(actions.T)[0, 1]) < 0.13  # 3.3 standard deviations
    assert abs(torch.corrcoef(torch.stack([actions[1:, 0], actions[:-1, 0]]))[0, 1]) < 0.13


@pytest.mark.parametrize("name", TD3)
@pytest.mark.parametrize("mean", [(0.1, -0.2), (0.0, 0.95)])
def test_exploration_noise(name, mean, planned, tmp_path, monkeypatch):
    """It is centred, independent in each dimension and from step to step, and clipped with the action."""

    def actions(noise, n):
        changes = dict(total_timesteps=n, learning_starts=0, buffer_size=n, eval_every=n, updates_per_step=0)
        changes |= dict(model_train_every=10**6) if name in DYNA else {}
        run = train(name, tmp_path / str(noise), env_id=planned, exploration_noise=noise, **changes)
        return stored(checkpoint(run))[:, 2:4]

    mean = torch.tensor(mean)
    monkeypatch.setattr(script(name).Actor, "forward", lambda self, obs: mean.expand(len(obs), 2))
    assert torch.equal(actions(0, 9), mean.expand(9, 2))
    noise = actions(0.1, 1000) - mean
    assert (noise[:, 0].std() - 0.1).abs() < 0.01 and noise[:, 0].mean().abs() < 0.013  # 4 deviations
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.13
    assert abs(torch.corrcoef(torch.stack([noise[1:, 0], noise[:-1, 0]]))[0, 1]) < 0.13
    if mean[1] == 0.95:
        assert noise[:, 1].max() == 1 - mean[1] and (noise[:, 1] == noise[:, 1].max()).float().mean() > 0.25


@pytest.mark.parametrize("name", TD3)
@pytest.mark.parametrize("target_noise", [0.2, 0])
def test_target_noise_is_clipped_and_independent(name, target_noise, planned, tmp_path, monkeypatch):
    module, seen = script(name), []
    td_target = module.td_target

    def spy(actor_target, critic_target, reward, next_obs, terminated, noise, gamma):
        seen.append(noise)
        return td_target(actor_target, critic_target, reward, next_obs, terminated, noise, gamma)

    monkeypatch.setattr(module, "td_target", spy)
    train(name, tmp_path / "run", env_id=planned, target_noise=target_noise, noise_clip=0.3)
    noise = torch.cat(seen)
    assert noise.shape == (80 * 8, 2)
    if target_noise == 0:
        assert not noise.any()
        return
    assert noise.min() == -torch.tensor(0.3) and noise.max() == torch.tensor(0.3)
    assert 0.08 < (noise.abs() == torch.tensor(0.3)).float().mean() < 0.19  # 0.134 lie beyond 1.5 deviations
    assert noise.mean().abs() < 0.03 and abs(torch.corrcoef(noise.T)[0, 1]) < 0.13


# --- faults -------------------------------------------------------------------------------------------------
class Faulty(gym.Env):
    """Episodes of 4 steps for an evaluation; for training one long episode with a fault at the given step."""

    def __init__(self, part, value, at):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.part, self.value, self.at = part, value, at

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs, reward = self.np_random.normal(size=2).astype(np.float32), 1.0
        if self.steps == self.at:
            obs[1] = self.value if self.part == "observation" else obs[1]
            reward = self.value if self.part == "reward" else reward
        return obs, reward, self.at is None and self.steps == 4, False, {}


def faulty(part, value, at):
    """Makes the training environment first, then those of the evaluations, which have no fault."""
    steps = iter([at])
    return lambda: Faulty(part, value, next(steps, None))


@pytest.fixture
def fault_of(monkeypatch, capsys):
    """A function that gives the sentence with which a script ends at a fault."""

    def run(name, argv):
        module = script(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        with pytest.raises(SystemExit) as stop:
            main(module.train, module.Args, module.PRESETS)
        *_, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and line.startswith("error: ") and line.endswith("."), line
        return line

    return run


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("part, value", [("reward", np.nan), ("reward", np.inf), ("observation", np.nan)])
@pytest.mark.parametrize("at", [7, 27])
def test_an_environment_that_goes_wrong_ends_the_run(name, part, value, at, register, tmp_path, fault_of):
    """In the warm-up too, at that very step; whatever was saved before is still there."""
    env_id, run = register(faulty(part, value, at)), tmp_path / "run"
    message = fault_of(name, tiny(name, env_id=env_id, run_dir=run, checkpoint_every=0))
    assert part in message and f"step {at}" in message
    assert checkpoint(run)["step"] == at - 1 and torch.isfinite(stored(checkpoint(run))).all()
    assert [row["step"] for row in table(run, "eval")] == [str(step) for step in range(0, at, 20)]


def poison(run, network):
    """Puts a NaN into one weight of a network in a checkpoint."""
    state = checkpoint(run)
    state[network]["net.0.weight"][-1, 0, 0] = math.nan
    torch.save(state, run / "checkpoint.pt")
    return (run / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize(
    "name, network",
    [*itertools.product(SCRIPTS, ["actor", "critic", "critic_target"]),
     *itertools.product(TD3, ["actor_target"]), *itertools.product(SCRIPTS[1:], ["model"])],
)  # fmt: skip
@pytest.mark.parametrize(
    "change", [dict(eval_every=1), dict(checkpoint_every=0), dict(total_timesteps=36)], ids=str
)
def test_a_network_that_goes_wrong_ends_the_run(name, network, change, tmp_path, fault_of):
    """Within a step, before it is evaluated, saved or done; one member of an ensemble is enough."""
    run = train(name, tmp_path / "run", **change | dict(total_timesteps=35))
    before = poison(run, network)
    message = fault_of(name, tiny(name, run_dir=run, resume=True, **change))
    assert "not finite" in message and ("step 36" in message or "step 37" in message), message
    assert f"{network}.net.0.weight" in message or network == "actor" and "action" in message
    assert (run / "checkpoint.pt").read_bytes() == before
    assert all(math.isfinite(float(row["return_mean"])) for row in table(run, "eval"))


# --- evaluation and policies --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_policy_is_the_actor_with_its_normaliser(name, tmp_path):
    """Written out with NumPy: normalise, two hidden layers with swish, tanh."""
    state = checkpoint(train(name, tmp_path / "run", lr=0.01))["actor"]
    policy = script(name).load_policy(tmp_path / "run")
    obs = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    x = (obs - state["obs_norm.mean"].numpy()) / state["obs_norm.std"].numpy()
    for layer in (0, 2):
        x = x @ state[f"net.{layer}.weight"][0].numpy() + state[f"net.{layer}.bias"][0].numpy()
        x = x / (1 + np.exp(-x))
    wanted = np.tanh(x @ state["net.4.weight"][0].numpy() + state["net.4.bias"][0].numpy())[:, :1]
    action = policy(obs)
    assert action.dtype == np.float32 and action.shape == (7, 1) and abs(action).max() <= 1
    np.testing.assert_allclose(action, wanted, atol=1e-5)
    assert action.std() > 1e-3 and np.array_equal(policy(obs), action)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loaded_policy_scores_what_its_run_logged(name, tmp_path):
    run = train(name, tmp_path / "run", seed=5, eval_episodes=3)
    result = evaluate(script(name).load_policy(run), "Pendulum-v1", 3, seed=common.run.EVAL_SEED + 5)
    assert f"{result.returns.mean():.4f}" == table(run, "eval")[-1]["return_mean"]


def push(obs):
    """A policy without matrix products: the same for one row and for many."""
    return np.clip(3 * obs[:, -1:] + obs[:, :1], -1, 1).repeat(3, 1)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1", "ContinuousCartPole-v1"])
def test_evaluation_is_the_serial_loop(env_id):
    columns = 3 if env_id == "Hopper-v4" else 1

    def policy(obs):
        return push(obs)[:, :columns]

    returns, lengths = [], []
    for episode in range(5):
        env = make_env(env_id)
        obs, done = env.reset(seed=40 + episode)[0], False
        rewards = []
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy(obs[None])[0])
            rewards.append(reward)
            done = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    result = evaluate(policy, env_id, 5, seed=40)
    np.testing.assert_allclose(result.returns, returns, rtol=1e-12)
    assert result.lengths.tolist() == lengths
    assert len(set(lengths)) > 1 or env_id == "Pendulum-v1"


def test_evaluation_has_no_memory_and_no_randomness_of_its_own():
    torch.manual_seed(0)
    np.random.seed(0)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (evaluate(lambda obs: push(obs)[:, :1], "Pendulum-v1", 4, seed=1) for _ in range(2))
    assert np.array_equal(one.returns, two.returns) and len(set(one.returns)) == 4
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)
    other = evaluate(lambda obs: push(obs)[:, :1], "Pendulum-v1", 4, seed=2)
    assert np.array_equal(other.returns[:3], one.returns[1:])


def test_an_episode_that_never_ends_is_cut(register):
    env_id = register(lambda: Faulty(None, None, 0))
    result = evaluate(lambda obs: obs, env_id, 2, max_steps=37)
    assert result.lengths.tolist() == [37, 37] and result.returns.tolist() == [37.0, 37.0]


def test_a_policy_that_is_not_finite_does_not_score():
    """MuJoCo takes NaN for no action, and pays InvertedPendulum for every step."""
    with pytest.raises(Fault):
        evaluate(lambda obs: np.full((len(obs), 1), np.nan, np.float32), "InvertedPendulum-v4", 2)


def test_a_reward_that_is_not_finite_is_no_score(register):
    env_id = register(lambda: Faulty("reward", np.nan, 3))
    with pytest.raises(Fault):
        evaluate(lambda obs: obs, env_id, 2, max_steps=10)


# --- whole scripts ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_copied_out(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, f"{name}.py", *tiny(name, total_timesteps=30)]
    run = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state = checkpoint(tmp_path / f"runs/Pendulum-v1/{name}/seed-0")
    assert state["step"] == 30 and steps_of(state, "critic_opt") == 20


@pytest.mark.parametrize("name", ["mage_td3", "maac_sac"])
def test_it_learns_to_swing_up_a_pendulum(name, tmp_path):
    """-149 and -111 on one machine. Untrained -1550 and -1400; with a critic that knows the next reward alone
    -1100 (250 steps later), with a model that was fitted for a dozen steps -1400."""
    settings = dict(env_id="Pendulum-v1", preset="laptop", total_timesteps=1250, device="cpu",
                    run_dir=tmp_path / "run")  # fmt: skip
    module = script(name)
    assert module.train(common.args.parse_args(module.Args, module.PRESETS, words(settings))) >= -400
    returns = [float(row["return_mean"]) for row in table(tmp_path / "run", "eval")]
    assert len(returns) == 6 and returns[0] < -800


@pytest.mark.parametrize("k", [1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize("name", ["dyna_td3", "mage_td3"])
def test_learned_reward_is_as_good_in_any_unit(name, k, tmp_path, monkeypatch, register):
    """The loss is one in normalised units, and what the model says has the unit of the reward."""

    class Scaled(PendulumEnv):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, k * reward, *rest

    env_id = register(lambda **kwargs: TimeLimit(Scaled(**kwargs), 20), known=False)
    monkeypatch.setitem(TERMINATIONS, env_id, TERMINATIONS["Pendulum-v1"])
    settings = dict(total_timesteps=200, learning_starts=200, eval_every=100, model_batches=100)
    settings |= dict(model_lr=3e-3, learned_reward=True, reward_hidden=32)
    run = train(name, tmp_path / "run", env_id=env_id, **settings)
    losses = [float(row["reward_loss"]) for row in csv.DictReader((run / "train.csv").open())]
    assert losses[1] < 0.5 * losses[0] < 0.05
    state = checkpoint(run)
    (obs, action, reward, next_obs, _) = stored(state).split([3, 1, 1, 3, 1], 1)
    model = script(name).RewardModel(script(name).Normaliser(3), script(name).Normaliser(1), 32, 1)
    model.load_state_dict(state["reward_model"])
    error = (model(obs, action, next_obs) - reward[:, 0]).square().mean() / reward.var()
    assert error < 0.2
