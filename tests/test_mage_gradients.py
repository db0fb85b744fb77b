"""The command of the MAGE paper's gradient experiments, with runs of a second."""

import csv
import shutil
import subprocess
import sys

import numpy as np
import pytest

from common import true_gradients
from common.args import parse_args
from common.envs import make_env
from common.experiments import mage_gradients
from tests.conftest import ROOT, checkpoint, script, tiny
from tests.test_training import table
from tests.test_true_gradients import trained


@pytest.fixture
def small_runs(monkeypatch, tmp_path):
    """In the place of a sweep its runs in this process, small ones of 40 steps; gives the command lines."""
    monkeypatch.chdir(tmp_path)
    short = (20, 30)  # steps and tail: they take the time
    monkeypatch.setattr(true_gradients.action_gradients, "__defaults__", short)
    calls = []

    def sweep(argv):
        before, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
        name, seeds = before[before.index("--scripts") + 1], int(before[before.index("--seeds") + 1])
        calls.append((name, flags))
        module = script(name)
        parse_args(module.Args, module.PRESETS, flags)  # whatever follows: the flags exist
        for seed in range(seeds):
            small = tiny(name, seed=seed, total_timesteps=40, learning_starts=20, eval_every=10)
            module.train(parse_args(module.Args, module.PRESETS, [*small, *flags_but_sizes(flags)]))
        return 0

    def flags_but_sizes(flags):
        dropped = ("--total-timesteps", "--learning-starts", "--preset", "--eval-every")
        return [w for i, w in enumerate(flags) if w not in dropped and flags[i - 1] not in dropped]

    monkeypatch.setattr(mage_gradients.benchmark, "main", sweep)
    return calls


def test_gradient_quality_of_all_critics_is_measured_and_drawn(small_runs, tmp_path, capsys):
    mage_gradients.main(mage_gradients.Args(tmp_path / "figure.png", seeds=2))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "figure.csv").open()))
    assert len(rows) == 5 * 2 * 5  # runs, seeds, evaluations
    for name in mage_gradients.RUNS:
        for seed in (0, 1):
            run = tmp_path / f"runs/Pendulum-v1/{name}_laptop_800_steps/seed-{seed}"
            copied = [row for row in rows if row["run"] == name and row["seed"] == str(seed)]
            for ours, theirs in zip(copied, table(run, "eval"), strict=True):
                for column in mage_gradients.COLUMNS:
                    assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-4)
    bounds = list(csv.DictReader((tmp_path / "figure.bounds.csv").open()))
    assert len(bounds) == 10
    assert all(0 < float(row["policy_gradient_error"]) < float(row["bound"]) for row in bounds)
    env = make_env("Pendulum-v1", seed=1)
    starts = np.stack([env.reset()[0] for _ in range(10)])
    for row in bounds:
        if row["run"].startswith("frozen") and row["seed"] == "1":
            nets = trained(tmp_path / f"runs/Pendulum-v1/{row['run']}_laptop_800_steps/seed-1")
            left, right = mage_gradients.proposition(*nets, starts, "Pendulum-v1", 0.99)
            assert [row["policy_gradient_error"], row["bound"]] == [f"{left:.5g}", f"{right:.5g}"]
    table_printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table_printed) == 6 and float(table_printed[1].split("|")[2]) == pytest.approx(
        np.median(
            [float(r["gradient_l1"]) for r in rows if r["run"] == "frozen_mage_td3" and r["step"] == "40"]
        ),
        rel=0.01,
    )


def test_gradient_quality_runs_are_those_of_the_paper(small_runs, tmp_path):
    """Frozen actors do not learn, critics do; the others imagine with the truth, and lambda is 0 or not."""
    mage_gradients.main(mage_gradients.Args(tmp_path / "figure.png", seeds=1, steps=80))
    settings = {}
    for name in mage_gradients.RUNS:
        folder = tmp_path / f"runs/Pendulum-v1/{name}_laptop_80_steps/seed-0"
        state = checkpoint(folder)
        settings[name] = state["args"]
        steps = {
            opt: max((s["step"] for s in state[opt]["state"].values()), default=0)
            for opt in ("actor_opt", "critic_opt")
        }
        assert steps["critic_opt"] > 0 and (steps["actor_opt"] > 0) == name.startswith("mage_ddpg"), name
        if "model_opt" in state:
            assert not state["model_opt"]["state"] and state["args"]["oracle_dynamics"]
    assert settings["mage_ddpg_lam_0"]["lam"] == 0 and settings["mage_ddpg_lam_0.2"]["lam"] == 0.2
    assert (
        settings["mage_ddpg_lam_0"]["num_critics"] == 1 and settings["frozen_td3"]["updates_per_step"] == 10
    )
    for _, flags in small_runs:
        assert flags[flags.index("--total-timesteps") + 1] == "280"
        assert (
            flags[flags.index("--learning-starts") + 1] == "200"
            and flags[flags.index("--eval-every") + 1] == "10"
        )


def test_the_figure_has_medians_over_seeds_and_errors_over_their_bounds(tmp_path, monkeypatch):
    columns = {name: np.array([1.0, 10.0]) for name in mage_gradients.COLUMNS}
    seeds = [{name: values * factor for name, values in columns.items()} for factor in (1, 2, 6)]
    for run in seeds:
        run["step"] = np.array([200.0, 210.0])
    figures, close = [], mage_gradients.plt.close
    monkeypatch.setattr(mage_gradients.plt, "close", figures.append)
    monkeypatch.setattr(mage_gradients, "write_whole", lambda *args: None)
    names, bounds = list(mage_gradients.RUNS), [(1.0, 2.0), (3.0, 5.0)]  # (error, bound) of two seeds
    args = mage_gradients.Args(tmp_path / "figure.png")
    mage_gradients.figure(args, dict.fromkeys(names, seeds), dict.fromkeys(names, bounds))
    error, cosine, norm, bound = figures[0].axes
    for panel, start in ((error, "frozen"), (cosine, "frozen"), (norm, "mage_ddpg")):
        lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
        shown = [name for name in names if name.startswith(start)]
        assert [lines[name] for name in shown] == [[[200, 2], [210, 20]]] * len(shown)
    dots = {line.get_label(): line.get_xydata().tolist() for line in bound.lines}
    assert [dots[name] for name in names] == [[[2, 1], [5, 3]]] * 5
    close(figures[0])


def test_without_the_scripts_it_says_which_it_needs(tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "common")
    command = [sys.executable, "-m", "common.experiments.mage_gradients", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "td3.py, dyna_td3.py and mage_td3.py" in done.stderr


@pytest.mark.parametrize("words, named", [
    (["--seeds", "0"], "--seeds"), (["--steps", "5"], "--steps"), (["--workers", "0"], "--workers"),
    (["-o", "nowhere/x.png"], "--output"), (["-o", "x.txt"], "--output"), (["-o", "."], "--output"),
])  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_exists(words, named, tmp_path):
    command = [sys.executable, "-m", "common.experiments.mage_gradients", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and named in done.stderr
    assert not done.stdout
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
