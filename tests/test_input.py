"""Bad input ends in one sentence that names the flag, with exit code 2, before any file or folder exists."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

import td3
from common import BadInput
from common.args import flag, main, parse_args
from common.evaluate import load_run
from common.rewards import REWARDS
from common.run import Run
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

SIZES = """threads eval_every eval_max_steps buffer_size batch_size actor_hidden critic_hidden num_critics
    policy_delay ensemble_size model_hidden model_layers model_train_every reward_hidden reward_layers
    num_samples rollout_length model_buffer_size"""
BEYOND = dict(gamma=1.5, tau=2, seed=10**23, threads=10**6, real_ratio=1.5)  # more than makes sense


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(name, argv, monkeypatch):
    """Runs a script in this process as the command line would; returns its exit code."""
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    try:
        main(module.train, module.Args, module.PRESETS)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that checks how a command line is refused, and that all files are as they were."""

    def files():
        return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}

    def check(name, argv, *mentions):
        before, _ = files(), capsys.readouterr()
        code, stderr = call(name, argv, monkeypatch), capsys.readouterr().err
        assert code == 2, stderr
        (line,) = stderr.splitlines()
        assert line.startswith("error: ") and line.endswith(".") and "Traceback" not in line
        for mention in mentions:
            assert mention in line
        assert files() == before

    return check


# --- numbers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_sizes_are_at_least_one(name, refused):
    sizes = [field for field in SIZES.split() if field in fields(name)]
    for field, value in itertools.product(sizes, (0, -1)):
        refused(name, tiny(name, **{field: value}), f"{flag(field)} {value}:", "at least 1")


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_number_is_negative(name, refused):
    numbers = [field for field, kind in fields(name).items() if kind in (int, float)]
    assert {"seed", "total_timesteps", "learning_starts", "lr", "updates_per_step"} <= set(numbers)
    for field in numbers:
        refused(name, tiny(name, **{field: -1}), f"{flag(field)} -1", "at least")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_is_finite(name, refused):
    numbers = [field for field, kind in fields(name).items() if kind is float]
    assert {"lr", "gamma", "tau", "checkpoint_every"} <= set(numbers)
    for field, value in itertools.product(numbers, ("nan", "inf")):
        refused(name, tiny(name, **{field: value}), f"{flag(field)} {value}", "finite")


@pytest.mark.parametrize("name", SCRIPTS)
def test_some_numbers_have_a_largest_value(name, refused):
    for field in [field for field in BEYOND if field in fields(name)]:
        value = BEYOND[field]
        refused(name, tiny(name, **{field: value}), f"{flag(field)} {value}", "at most")


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_size_is_beyond_what_can_be_counted(name, refused):
    for field in ("buffer_size", "batch_size", "eval_episodes", "total_timesteps", "actor_hidden"):
        refused(name, tiny(name, **{field: 10**19}), f"{flag(field)} 1{'0' * 19}", f"at most {2**63 - 1}.")


def test_numbers_of_numpy_are_numbers(tmp_path):
    """A checkpoint with one of theirs could not be read again, as nothing in it is executed."""
    run = tmp_path / "run"
    args = parse_args(td3.Args, td3.PRESETS, tiny("td3", run_dir=run))
    args.lr, args.gamma = np.float64(1e-3), np.float32(0.5)
    args.seed, args.resume = np.int64(1), np.bool_(False)
    td3.train(args)
    assert json.loads((run / "args.json").read_text())["args"]["gamma"] == 0.5
    assert checkpoint(run)["args"]["lr"] == 1e-3
    assert load_run(run, td3.Args)[0].seed == 1
    train("td3", run, resume=True, total_timesteps=70, lr=1e-3, gamma=0.5, seed=1)


def test_a_setting_that_cannot_be_kept_is_named(tmp_path):
    args = td3.Args(run_dir=str(tmp_path / "run"))
    args.env_id = Path("Pendulum-v1")
    with pytest.raises(BadInput, match=f"--env-id: Args.env_id is of type {type(args.env_id).__name__}, "):
        td3.train(args)
    assert not (tmp_path / "run").exists()


def test_annotations_may_be_postponed(tmp_path, monkeypatch):
    text = "from __future__ import annotations\n"
    code = (ROOT / "td3.py").read_text().split('"""', 2)[2]
    (tmp_path / "later.py").write_text(text + code)
    monkeypatch.syspath_prepend(tmp_path)
    later = importlib.import_module("later")
    argv = ["--env-id", "Pendulum-v1", "--preset", "laptop", "--lr", "1"]
    args = parse_args(later.Args, later.PRESETS, argv)
    assert (args.lr, args.actor_hidden, args.preset) == (1.0, 64, "laptop")


@pytest.mark.parametrize("lam", ["-0.1", "nan", "inf"])
def test_lambda_is_finite_and_not_negative(lam, refused):
    refused("mage_td3", tiny("mage_td3", lam=lam), f"--lam {lam}")


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_the_members_share_a_batch_equally(name, refused):
    refused(name, tiny(name, batch_size=10, ensemble_size=4), "--batch-size 10", "--ensemble-size 4")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("size", [10**13, 10**18])  # the latter overflows a number of bytes
def test_a_buffer_that_memory_cannot_hold(name, size, refused):
    refused(name, tiny(name, buffer_size=size), f"--buffer-size {size}")


# --- environments -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("env_id, hint", [
    ("Nope-v0", "Hopper"), ("Hopper-v9", "v5"), ("", "Malformed"), ("CartPole-v1", "Discrete(2)"),
    ("foo:Bar-v0", "foo"), ("HalfCheetah-v2", ": use HalfCheetah-v4 or HalfCheetah-v5."),
    ("Pusher-v2", ": use Pusher-v4"), ("Hopper", ": give its version: Hopper-v4 or Hopper-v5."),
    ("Pendulum", ": give its version: Pendulum-v1."),
])  # fmt: skip
def test_environments_that_do_not_exist_or_do_not_fit(name, env_id, hint, refused):
    refused(name, tiny(name, env_id=env_id), f"--env-id {env_id!r}", hint)


class Spaces(Planned):
    def __init__(self, **spaces):
        super().__init__()
        vars(self).update(spaces)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("space, hint", [
    (dict(observation_space=Dict(a=Box(-1, 1, (2,)))), "Dict"),
    (dict(observation_space=Box(0, 255, (8, 8, 3), np.uint8)), "(8, 8, 3)"),
    (dict(action_space=Box(-np.inf, np.inf, (2,))), "finite"),
])  # fmt: skip
def test_spaces_that_do_not_fit(name, space, hint, register, refused):
    env_id = register(lambda: Spaces(**space))
    refused(name, tiny(name, env_id=env_id), f"--env-id {env_id!r}", hint)


@pytest.mark.parametrize("name, change", [(name, {}) for name in SCRIPTS[1:]]
                         + [(name, dict(learned_reward=True)) for name in DYNA], ids=str)  # fmt: skip
def test_a_model_needs_to_know_reward_and_termination(name, change, register, refused):
    env_id = register(Planned, known=False)
    refused(name, tiny(name, env_id=env_id, **change), f"--env-id {env_id!r}", "termination_fn", "reward_fn")


@pytest.mark.parametrize("name, change", [("td3", {}), ("maac_sac", SAC)], ids=str)
def test_without_a_model_neither_needs_to_be_known(name, change, register):
    train(name, "run", env_id=register(Planned, known=False), **change)
    assert checkpoint("run")["critic_opt"]["state"]


@pytest.mark.parametrize("name", DYNA)
def test_a_learned_reward_needs_the_termination_alone(name, register, monkeypatch):
    env_id = register(Planned)
    monkeypatch.delitem(REWARDS, env_id)
    train(name, "run", env_id=env_id, learned_reward=True)
    assert checkpoint("run")["critic_opt"]["state"]


@pytest.mark.parametrize("name", DYNA)
def test_the_oracle_knows_few_environments(name, refused):
    argv = tiny(name, env_id="ContinuousCartPole-v1", oracle_dynamics=True)
    refused(name, argv, "--oracle-dynamics", "Pendulum-v1")


# --- devices and folders ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_where_there_is_none(name, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(name, tiny(name, device="cuda"), "--device cuda")


@pytest.mark.parametrize("device", ["cuda:3", "cuda:01", "cuda:", "gpu", "CPU"])
def test_devices_that_pytorch_does_not_know(device, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    refused("td3", tiny("td3", device=device), f"--device {device}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_accelerations_that_cannot_be(name, monkeypatch, refused):
    def compile(*args, **kwargs):
        raise RuntimeError("backend='inductor' raised:\nno compiler\nand more lines")

    refused(name, tiny(name, accelerate="graph"), "--accelerate graph", "GPU")
    monkeypatch.setattr(torch, "compile", compile)
    refused(name, tiny(name, accelerate="compile"), "--accelerate compile", "(no compiler)")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("run_dir", ["file", "file/below"])
def test_a_run_folder_that_cannot_be(name, run_dir, refused):
    Path("file").write_text("mine")
    refused(name, tiny(name, run_dir=run_dir), "--run-dir", run_dir)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_folder_that_may_not_be_written(name, monkeypatch, refused):
    def mkdir(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)  # for root everything may be written
    refused(name, tiny(name, run_dir="locked/run"), "--run-dir", "locked/run", "Permission denied")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_is_not_overwritten(name, refused):
    train(name, "run", total_timesteps=0)
    refused(name, tiny(name, run_dir="run"), "--run-dir", "--resume", "run ")


def test_runs_of_one_name_and_seed_share_a_folder(refused, monkeypatch):
    argv = tiny("td3", total_timesteps=0, seed=3)
    assert call("td3", argv, monkeypatch) == 0 and Path("runs/Pendulum-v1/td3/seed-3/eval.csv").exists()
    refused("td3", argv, "--exp-name", "--seed", "--run-dir")
    assert call("td3", [*argv, "--exp-name", "other"], monkeypatch) == 0
    assert Path("runs/Pendulum-v1/other/seed-3/eval.csv").exists()


# --- flags without effect -----------------------------------------------------------------------------------
IDLE = [
    ("mage_td3", {"reward_hidden": 7}, {}, "without --learned-reward"),
    ("mage_td3", {"reward_hidden": 7}, {"learned_reward": True}, None),
    ("dyna_td3", {"model_hidden": 7}, {"oracle_dynamics": True}, "with --oracle-dynamics"),
    ("dyna_td3", {"model_lr": 7}, {"oracle_dynamics": True, "learned_reward": True}, None),
    ("mage_td3", {"huber_threshold": 7}, {"lam": 0}, "with --lam 0"),
    ("mage_td3", {"huber_threshold": 7}, {}, None),
    ("td3", {"huber_threshold": 7}, {}, None),
    ("maac_sac", {"steve_horizon": 3}, {"steve": False}, "without --steve"),
    ("maac_sac", {"steve_horizon": 3}, {}, None),
    ("maac_sac", {"num_samples": 7}, {"horizon": 0}, "with --horizon 0"),
    ("maac_sac", {"rollouts": 77}, {"real_ratio": 1}, "with --real-ratio 1"),
    ("maac_sac", {"model_lr": 7}, SAC, "with --horizon 0 --no-steve --real-ratio 1"),
    ("maac_sac", {"model_lr": 7}, {"horizon": 0, "real_ratio": 1}, None),
    ("td3", {"noise_clip": 7}, {"target_noise": 0}, "with --target-noise 0"),
    ("td3", {"eval_max_steps": 7}, {"eval_episodes": 0}, "with --eval-episodes 0"),
]


@pytest.mark.parametrize("name, given, beside, why", IDLE)
@pytest.mark.parametrize("preset", ["paper", "laptop"])
def test_a_flag_without_effect_is_said(name, given, beside, why, preset):
    module, argv = script(name), ["--env-id", "Pendulum-v1", "--preset", preset]
    assert parse_args(module.Args, module.PRESETS, argv + words(beside)).remarks == []
    remarks = parse_args(module.Args, module.PRESETS, argv + words(beside | given)).remarks
    ((field, value),) = given.items()
    value = fields(name)[field](value)
    said = [f"{flag(field)} {value} is of no use {why}"]
    assert [remark.split(", which")[0] for remark in remarks] == (said if why else [])


def test_ctrl_c_before_a_run_listens_for_it_is_one_word(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script("td3"), "train", interrupted)
    assert call("td3", [], monkeypatch) == 130 and capsys.readouterr().err == "stopped\n"


def test_it_is_said_when_the_run_begins(capsys):
    train("td3", "run", target_noise=0, noise_clip=0.4)
    assert "--noise-clip 0.4 is of no use with --target-noise 0\n" in capsys.readouterr().err


# --- resume -------------------------------------------------------------------------------------------------
def test_a_folder_that_does_not_exist_is_not_begun_by_mistake(refused):
    refused("td3", ["--run-dir", "sead-0", "--resume"], "--resume: there is no sead-0:", "--env-id")
    refused("td3", ["--run-dir", "s" * 300, "--resume"], "cannot be written", "--run-dir")


def test_a_script_of_somebody_is_not_overwritten(refused):
    Path("data").mkdir()
    Path("data/td3.py").write_text("mine")
    refused("td3", tiny("td3", run_dir="data"), "data has a file td3.py that is no run's", "--run-dir")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_is_resumed_with_its_own_settings(name, refused):
    train(name, "run", total_timesteps=0)
    for change in (dict(seed=1), dict(actor_hidden=9), dict(env_id="ContinuousCartPole-v1"), dict(gamma=0.5)):
        (field,) = change
        assert field in fields(name)
        refused(name, tiny(name, run_dir="run", resume=True, **change), "--resume", flag(field))


@pytest.mark.parametrize("name, other", list(itertools.permutations(SCRIPTS, 2)))
def test_a_run_is_resumed_by_its_own_script(name, other, refused):
    train(name, "run", total_timesteps=0)
    refused(other, tiny(other, run_dir="run", resume=True), "--resume")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_does_not_go_on_with_the_run_of_its_original(name, refused):
    """They have the same settings, and the same parts in their checkpoints."""
    path = train(name, "run", total_timesteps=0) / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"script": "mine.py"}, path)
    refused(name, tiny(name, run_dir="run", resume=True), "a run of mine.py", "--run-dir")


@pytest.mark.parametrize("table", ["eval.csv", "train.csv"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_table_that_is_no_runs_is_left_alone(table, resume, refused):
    Path("data").mkdir()
    Path("data", table).write_text("x,y\n1,2\n")
    refused("td3", tiny("td3", run_dir="data", resume=resume), f"data has a file {table}", "--run-dir")


@pytest.mark.parametrize("damage", ["empty", "text", "half", "folder", "other"])
def test_a_damaged_checkpoint_is_refused(damage, refused):
    path = train("td3", "run", total_timesteps=0) / "checkpoint.pt"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2]}[damage])
    refused("td3", tiny("td3", run_dir="run", resume=True), "checkpoint.pt", "--run-dir")


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_checkpoint_is_executed(refused):
    path = train("td3", "run", total_timesteps=0) / "checkpoint.pt"
    torch.save(Hostile(), path)
    refused("td3", tiny("td3", run_dir="run", resume=True), "checkpoint.pt")
    torch.load(path, weights_only=False)
    assert Path("executed").exists()  # it would have been


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_starts_anew_where_there_is_no_checkpoint(name, refused, capsys):
    train(name, "run", total_timesteps=0)
    Path("run/checkpoint.pt").unlink()
    refused(name, tiny(name, run_dir="run"), "begin it anew", "--resume")
    train(name, "run", total_timesteps=20, resume=True)
    assert "--resume: run has no checkpoint" in capsys.readouterr().err
    steps = [line.split(",")[0] for line in Path("run/eval.csv").read_text().splitlines()]
    assert steps == ["step", "0", "20"]


# --- what tyro refuses --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("argv", [["--device", "banana"], ["--preset", "banana"], ["--envid", "X"], ["stray"],
                                  ["--total-timesteps", "1e6"], ["--lr", "fast"], ["--seed"]])  # fmt: skip
def test_command_lines_that_cannot_be_read(name, argv, monkeypatch, capsys):
    assert call(name, [*words(dict(env_id="Pendulum-v1")), *argv], monkeypatch) == 2
    stderr = capsys.readouterr().err
    assert argv[-1] in stderr and "Traceback" not in stderr and not list(Path().iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_flags_and_the_values_of_the_preset(name, monkeypatch, capsys):
    assert call(name, ["--preset", "laptop", "--env-id", "Pendulum-v1", "--help"], monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(flag(field) in shown for field in fields(name))
    assert shown.count(". (default: ") == len(fields(name))  # each is explained by a sentence
    assert " ".join(script(name).Args.__doc__.split()) in shown
    assert str(script(name).PRESETS["laptop"]["Pendulum-v1"]["total_timesteps"]) in shown


# --- what works, though it looks odd ------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("change", [dict(lr=0), dict(gamma=0), dict(gamma=1), dict(tau=1),
                                    dict(buffer_size=10), dict(batch_size=1000), dict(seed=2**31 - 1)],
                         ids=str)  # fmt: skip
def test_odd_values_that_work(name, change):
    train(name, "run", total_timesteps=30, **change)
    assert checkpoint("run")["critic_opt"]["state"][0]["step"] == 20


@pytest.mark.parametrize("name, change", [*((name, {}) for name in TD3), ("maac_sac", SAC)], ids=str)
def test_learning_may_start_with_the_first_step(name, change):
    train(name, "run", total_timesteps=10, learning_starts=0, **change)
    assert checkpoint("run")["critic_opt"]["state"][0]["step"] == 20


def test_maac_needs_data_for_its_model(refused):
    for steps in (0, 1):
        refused("maac_sac", tiny("maac_sac", learning_starts=steps), "--learning-starts", "at least 10 steps")
    train("maac_sac", "run", learning_starts=10)
    assert checkpoint("run")["critic_opt"]["state"][0]["step"] == 100


def test_a_target_entropy_may_be_negative():
    train("maac_sac", "run", target_entropy=-0.5)
    assert checkpoint("run")["args"]["target_entropy"] == -0.5


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_learning_rate_of_0_changes_nothing(name):
    before, after = (checkpoint(train(name, f"run{t}", total_timesteps=t, lr=0)) for t in (0, 30))
    for part in ("actor", "critic"):
        weights = [key for key in before[part] if "obs_norm" not in key]
        assert weights and all(torch.equal(before[part][key], after[part][key]) for key in weights)


@pytest.mark.parametrize("steps, rest", [(20, None), (25, 5), (7, 7)])
def test_steps_that_no_evaluation_sees_are_named(steps, rest, capsys):
    train("td3", "run", total_timesteps=steps)
    said = capsys.readouterr().err
    assert f"the last {rest} steps" in said if rest else "--eval-every" not in said


def test_a_record_that_is_no_number_is_named():
    run = SimpleNamespace(device="cpu", pending={}, counts={})
    with pytest.raises(TypeError, match=r"record\(y=...\): shape \(8,\)"):
        Run.record(run, q=torch.tensor(1.0), y=torch.zeros(8))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_steps_are_one_evaluation(name):
    train(name, "run", total_timesteps=0)
    assert len(Path("run/eval.csv").read_text().splitlines()) == 2
    assert checkpoint("run")["step"] == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_learning_that_would_start_after_the_end_does_not_start(name):
    train(name, "run", learning_starts=10**9)
    assert not checkpoint("run")["critic_opt"]["state"] and "td_loss" not in Path("run/train.csv").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_small_buffer_keeps_the_last_transitions(name, planned):
    train(name, "run", env_id=planned, buffer_size=10)
    small, large = stored(checkpoint("run")), stored(checkpoint(train(name, "large", env_id=planned)))
    assert len(small) == 10 and len(large) == 60
    assert {tuple(obs.tolist()) for obs in small[:, :2]} == {tuple(obs.tolist()) for obs in large[-10:, :2]}


# --- presets ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("preset", ["paper", "laptop"])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "ContinuousCartPole-v1", "HalfCheetah-v4", "Hopper-v5"])
@pytest.mark.parametrize("spelling", ["{0} {1}", "{0}={1}"])
def test_a_preset_depends_on_the_environment(name, preset, env_id, spelling):
    module = script(name)
    argv = spelling.format("--env-id", env_id).split() + spelling.format("--preset", preset).split()
    args = parse_args(module.Args, module.PRESETS, argv)
    changes = module.PRESETS[preset].get(env_id, module.PRESETS[preset]["*"])
    assert args == module.Args(env_id=env_id, preset=preset, **changes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_laptop_preset_is_a_small_one(name):
    module = script(name)
    laptop, paper = (
        parse_args(module.Args, module.PRESETS, ["--env-id", "Pendulum-v1", "--preset", preset])
        for preset in ("laptop", "paper")
    )
    for field in ("total_timesteps", "actor_hidden", "critic_hidden", "batch_size"):
        assert getattr(laptop, field) < getattr(paper, field)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_wins_over_the_preset_on_either_side_of_it(name):
    module = script(name)
    chosen, given = ["--preset", "laptop", "--env-id", "Pendulum-v1"], ["--batch-size", "64", "--lr", "0.5"]
    left, right = (parse_args(module.Args, module.PRESETS, argv) for argv in (chosen + given, given + chosen))
    assert left == right and (left.batch_size, left.lr) == (64, 0.5)
    assert left.actor_hidden == module.PRESETS["laptop"]["Pendulum-v1"]["actor_hidden"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_run_folder_records_what_was_used(name, monkeypatch):
    argv = words(dict(preset="laptop", env_id="Pendulum-v1", lr=0.5, eval_episodes=1, total_timesteps=0))
    assert call(name, argv, monkeypatch) == 0
    used = json.loads(Path(f"runs/Pendulum-v1/{name}/seed-0/args.json").read_text())["args"]
    laptop = script(name).PRESETS["laptop"]["Pendulum-v1"]
    assert used["preset"] == "laptop" and used["lr"] == 0.5 and used["total_timesteps"] == 0
    assert used["actor_hidden"] == laptop["actor_hidden"] and used["batch_size"] == laptop["batch_size"]


# --- as a program -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("argv", [["--env-id", "Nope-v0"], ["--gamma", "1.5"]], ids=" ".join)
def test_a_refusal_of_the_program_itself(argv):
    run = subprocess.run([sys.executable, ROOT / "mage_td3.py", *argv], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ") and argv[0] in line
    assert not list(Path().iterdir())
