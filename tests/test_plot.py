"""Figures: what belongs together is one line, and whatever a name or a column has in it, all is drawn."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import common.curves
import common.plot
from common import BadInput
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, steps, returns, seconds=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(steps, returns, seconds or steps, strict=True)
    path.write_text("step,return_mean,seconds\n" + "".join(f"{s},{r},{t}\n" for s, r, t in rows))


def test_a_figure_and_its_table(capsys):
    for seed, shift in enumerate((0, 3, 6)):
        write(Path(f"runs/Hopper-v4/a/seed-{seed}/eval.csv"), [0, 1000, 2000], [shift, 10 + shift, 4 + shift])
    write(Path("ref/Hopper-v4/b/seed-0.csv"), [0, 1000], [1, 2])
    common.plot.main(common.plot.Args(["runs", "ref"], "figure.png"))
    assert Path("figure.png").read_bytes()[:4] == b"\x89PNG"
    a, b = capsys.readouterr().out.splitlines()[2:]
    # mean 7, deviation 3, Student's t with 2 degrees of freedom 4.30
    assert "| Hopper-v4 | a | 3 | 7 +- 7.448 | 13 +- 3 at step 1000 |" == a
    assert "| Hopper-v4 | b | 1 | 2 | 2 at step 1000 |" == b


def test_any_column_can_be_drawn(capsys):
    for seed in (0, 1):
        path = Path(f"runs/Pendulum-v1/a/seed-{seed}/eval.csv")
        write(path, [0, 1000], [-5, -6])
        lines = path.read_text().splitlines()
        cells = ["gradient_cosine", f"{0.25 - seed}", f"{0.5 + seed}"]
        path.write_text("".join(f"{line},{cell}\n" for line, cell in zip(lines, cells, strict=True)))
    common.plot.main(common.plot.Args(["runs"], "figure.png", column="gradient_cosine"))
    assert "| Pendulum-v1 | a | 2 | 1 +- 6.355 | 1 +- 0.7071 at step 1000 |" in capsys.readouterr().out
    for column, log, hint in (("cosine", False, "gradient_cosine"), ("return_mean", True, "--log")):
        with pytest.raises(BadInput, match=hint):
            common.plot.main(common.plot.Args(["runs"], "other.png", column=column, log=log))
    assert not Path("other.png").exists()


def test_a_column_of_train_csv_can_be_drawn(capsys):
    for seed in (0, 1):
        write(Path(f"runs/Pendulum-v1/a/seed-{seed}/eval.csv"), [0, 1000, 2000, 3000], [-5, -6, -7, -8])
        text = f"step,td_loss,mine\n1000,{seed},{seed}\n2000,{seed + 2},{seed + 3}\n3000,7,\n"
        Path(f"runs/Pendulum-v1/a/seed-{seed}/train.csv").write_text(text)
    for column, end in (("td_loss", 7), ("mine", 3.5)):
        common.plot.main(common.plot.Args(["runs"], "figure.png", column=column))
        said = capsys.readouterr()
        assert f"| Pendulum-v1 | a | 2 | {end} +- " in said.out
        assert "gaps" not in said.err
    with pytest.raises(BadInput, match="--column others: not in .*seconds, td_loss, mine: choose"):
        common.plot.main(common.plot.Args(["runs"], "other.png", column="others"))
    Path("runs/Pendulum-v1/a/seed-0/train.csv").write_text("no,table\n1,2\n")
    with pytest.raises(BadInput, match="seed-0/train.csv is not the train.csv of a run"):
        common.plot.main(common.plot.Args(["runs"], "other.png", column="td_loss"))


def test_lines_may_have_other_names_and_another_order(capsys, figures):
    for name in "abc":
        write(Path(f"runs/Hopper-v4/{name}/seed-0/eval.csv"), [0, 1000], [1, 2])
    colours = {}
    for labels in ({}, {"c": "C", "b": "B b"}):
        common.plot.main(common.plot.Args(["runs"], "figure.png", labels=labels))
        lines = [row.split(" | ")[1] for row in capsys.readouterr().out.splitlines()[2:]]
        assert lines == [*labels.values(), *(name for name in "abc" if name not in labels)]
        (panel,) = figures[-1].axes
        colours |= {line.get_label().split(",")[0]: line.get_color() for line in panel.lines}
    assert [colours[label] for label in ("C", "B b")] == common.plot.COLOURS[:2]
    for labels, hint in (({"d": "D"}, "--labels d: no line has this name; there are a, b, c."),
                         ({"a": "b"}, "--labels: two lines would be called b")):  # fmt: skip
        with pytest.raises(BadInput, match=hint):
            common.plot.main(common.plot.Args(["runs"], "other.png", labels=labels))


def test_curves_are_compared_where_all_seeds_are(capsys):
    args = common.plot.Args([])
    two = (([0, 10, 20], [0, 1, 2]), ([0, 10], [4, 6]))
    seeds = [[np.array(x, float) for x in (s, r, s)] for s, r in two]
    x, values = common.curves.align_seeds(seeds, args, "name")
    assert x.tolist() == [0, 10] and values.tolist() == [[0, 1], [4, 6]]
    assert capsys.readouterr().err == "name: drawn until step 10, where one seed ends, not 20\n"


def test_what_is_named_apart_has_a_panel_of_its_own(capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure: drawn.extend(figure.axes))
    for folder, env_id, name in (("one", "HalfCheetah-v4", "a"), ("two", "HalfCheetah-v4", "a"),
                                 ("two", "Hopper-v4", "b")):  # fmt: skip
        write(Path(folder, env_id, name, "seed-0.csv"), [0, 50_000], [0, 1])
    common.plot.main(common.plot.Args(["one", "two"], "figure.png", apart=True))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.rsplit("|", 3)[0] for line in lines] == [
        "| HalfCheetah-v4 (one) | a | 1 ", "| HalfCheetah-v4 (two) | a | 1 ",
        "| Hopper-v4 | b | 1 "]  # fmt: skip
    assert [panel.get_title() for panel in drawn] == [
        "HalfCheetah-v4 (one)", "HalfCheetah-v4 (two)", "Hopper-v4"]  # fmt: skip
    labels = [panel.get_legend_handles_labels()[1] for panel in drawn]
    assert all(any("published" in label for label in panel) for panel in labels[:2])
    paths = ["one/HalfCheetah-v4", "two/HalfCheetah-v4"]
    assert list(common.curves.apart(paths, "return_mean")) == ["HalfCheetah-v4 (one)", "HalfCheetah-v4 (two)"]
    common.plot.main(common.plot.Args(["one"], "figure.png", apart=True))
    assert "| HalfCheetah-v4 | a | 1 |" in capsys.readouterr().out


def test_what_lies_in_different_folders_is_not_averaged(capsys):
    for folder, value in (("mine/runs", 1), ("reference", 5)):
        write(Path(folder, "Hopper-v4/a/seed-0/eval.csv"), [0, 1000], [0, value])
    write(Path("reference/Hopper-v4/b/seed-0/eval.csv"), [0, 1000], [0, 2])
    found = common.curves.read(["mine", "reference", "reference/Hopper-v4"])["Hopper-v4"]
    ends = {name: [values[-1] for _, values, _ in seeds] for name, seeds in found.items()}
    assert ends == {"mine/runs/a": [1], "reference/a": [5], "b": [2]}


def test_a_run_in_any_folder_is_known_by_its_arguments():
    for folder, seed in (("one", 0), ("two", 1)):
        write(Path(folder, "eval.csv"), [0, 1000], [0, seed])
        told = {"script": "mage_td3.py", "args": {"env_id": "mbbl/Ant-v0", "exp_name": None, "seed": seed}}
        Path(folder, "args.json").write_text(json.dumps(told))
    found = common.curves.read(["one", "two"])
    assert list(found) == ["mbbl_Ant-v0"] and len(found["mbbl_Ant-v0"]["mage_td3"]) == 2


def make_run(folder, script="td3.py", last=1, **changes):
    write(Path(folder, "eval.csv"), [0, 1000], [0, last])
    args = {"env_id": "Ant-v4", "exp_name": "a", "seed": 0, "lr": 0.1, "threads": 1} | changes
    Path(folder, "args.json").write_text(json.dumps({"script": script, "args": args}))


def test_what_has_other_settings_is_not_averaged():
    for number, changes in enumerate(({}, dict(seed=1, threads=2), dict(lr=0.2))):
        make_run(f"runs/{number}", last=number, **changes)
    make_run("runs/3", "mage_td3.py", last=3, lam=0.2)
    found = common.curves.read(["runs"])["Ant-v4"]
    ends = {name: [values[-1] for _, values, _ in seeds] for name, seeds in found.items()}
    assert ends == {"a, td3.py, lr 0.1": [0, 1], "a, td3.py, lr 0.2": [2], "a, mage_td3.py": [3]}


def test_a_seed_that_has_only_started_does_not_cut_the_others(capsys):
    write(Path("runs/Hopper-v4/a/seed-0/eval.csv"), [0, 1000], [0, 1])
    write(Path("runs/Hopper-v4/a/seed-1/eval.csv"), [0], [5])
    ((_, values, _),) = common.curves.read(["runs"])["Hopper-v4"]["a"]
    assert values.tolist() == [0, 1] and "seed-1/eval.csv: left out" in capsys.readouterr().err


def test_a_copy_without_the_published_curves_draws_its_own(monkeypatch):
    write(Path("runs/Hopper-v4/a/seed-0/eval.csv"), [0, 50_000], [0, 1])
    for there in (True, False):
        common.plot.main(common.plot.Args(["runs"], "figure.svg"))
        assert ("SAC, published" in Path("figure.svg").read_text()) is there
        monkeypatch.setattr(common.curves, "PUBLISHED", Path("nowhere.csv"))


def test_the_running_mean_looks_back_only():
    assert common.curves.smoothed(np.array([4.0, 2.0, 0.0, 6.0]), 2).tolist() == [4, 3, 1, 3]
    assert common.curves.smoothed(np.array([4.0, 2.0]), 25).tolist() == [4, 3]


def test_the_median_is_not_moved_by_one_seed():
    values = np.array([[1.0], [2.0], [3.0], [4.0], [1000.0]])
    line, (low, high) = common.curves.centre_and_interval(values, "median")
    assert line == 3 and 1 <= low <= 2 and high > 4
    line, (low, high) = common.curves.centre_and_interval(np.array([[1.0], [3.0]]), "mean")
    assert line == 2 and high - 2 == pytest.approx(12.71)


def test_curves_are_cut_smoothed_and_drawn_against_minutes(capsys):
    seeds = [[np.array(x, float) for x in ([0, 10, 20], [0, 2, 8], [0, 60, 120])]]
    x, values = common.curves.align_seeds(seeds, common.plot.Args([], last_step=10, smooth=2), "a")
    assert x.tolist() == [0, 10] and values.tolist() == [[0, 1]]
    x, values = common.curves.align_seeds(seeds, common.plot.Args([], time=True), "a")
    assert (x[0], x[-1]) == (0, 2) and values[0, [0, -1]].tolist() == [0, 8]
    np.testing.assert_allclose(values[0], np.where(x < 1, 2 * x, 6 * x - 4))
    assert not capsys.readouterr().err
    seeds.append([x * 2 if i == 2 else x for i, x in enumerate(seeds[0])])
    x, values = common.curves.align_seeds(seeds, common.plot.Args([], time=True), "a")
    assert x[-1] == 2 and values[:, -1].tolist() == [8, 2]
    assert "a: drawn until minute 2.0, where one seed ends, not 4.0" in capsys.readouterr().err


def test_intervals_are_of_95_percent():
    """Student's t from a printed table; for the median of nine, binomial: the second value has 3.0% below."""
    for n, t in ((2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042), (101, 1.984)):
        values = np.random.default_rng(n).normal(size=(n, 1))
        _, (low, high) = common.curves.centre_and_interval(values, "mean")
        half = t * values.std(ddof=1) / np.sqrt(n)
        assert (high - low)[0] / 2 == pytest.approx(half, rel=0.015)
        assert (high + low)[0] / 2 == pytest.approx(values.mean())
    line, (low, high) = common.curves.centre_and_interval(np.arange(1.0, 10)[:, None], "median")
    assert (line, low, high) == (5, 2, 8)


def test_the_table_takes_the_median_and_the_spread_where_the_mean_is_highest(capsys):
    for seed, returns in enumerate(([0, 6, 9], [0, 6, 9], [0, 18, 2])):
        write(Path(f"runs/Hopper-v4/a/seed-{seed}/eval.csv"), [0, 1000, 2000], returns)
    common.plot.main(common.plot.Args(["runs"], "figure.png", statistic="median"))
    *_, row = capsys.readouterr().out.splitlines()
    assert "| Hopper-v4 | a | 3 | 9 [2, 9] | 10 +- 6.928 at step 1000 |" == row


def test_published_curves_are_of_the_same_environment():
    curves = common.curves.published("HalfCheetah-v4")
    assert {"SAC", "MBPO", "TD3, v1"} <= set(curves) and not common.curves.published("Pendulum-v1")
    step, value = curves["MBPO"]
    assert 4000 < value[step == 25000] < 6000  # 5042 +- 935 in its authors' figure


HEAD = "step,return_mean,seconds\n"


@pytest.mark.parametrize("text, changes, hint", [
    (None, dict(runs=["nowhere"]), "nowhere"),
    (HEAD + "0,1,2\n", dict(runs=["runs", "rnus"]), "rnus: no eval.csv"),
    (None, dict(runs=[]), "RUNS: name folders"),
    ("a,b\n1,2\n", {}, "seed-0.csv is not"),
    ("", {}, "seed-0.csv is not"),
    (HEAD + "0,1,2\n250,", {}, "seed-0.csv is not"),  # a line was cut
    (HEAD + "0,1,two\n", {}, "seed-0.csv is not"),
    ("\0\xff", {}, "seed-0.csv is not"),
    (HEAD + "0,1,2\n", dict(column="return_std"), "--column return_std"),
    ("step,return_mean,seconds,return_std\n0,1,2,\n", dict(column="return_std"), "--column return_std"),
    (HEAD + "0,1,2\n", {}, "no run there has two evaluations"),
    (HEAD + "0,1,2\n0,1,2\n", {}, "seed-0.csv is not"),
    (HEAD + "0,1,2\nnan,1,2\n", {}, "seed-0.csv is not"),
    (HEAD + "0,1,2\n9,1,inf\n", {}, "seed-0.csv is not"),
    (HEAD + "0,nan,2\n9,inf,2\n", {}, "--column return_mean: nowhere is it finite for all seeds of name"),
    (HEAD + "0,-1,2\n9,-1,2\n", dict(log=True), "--log"),
    (HEAD + "0,nan,2\n9,-1,2\n", dict(log=True), "--log: return_mean goes down to -1"),
    (HEAD + "0,1,2\n9,1,2\n", dict(last_step=0), "--last-step 0"),
    (HEAD + "250,1,2\n500,1,2\n", dict(last_step=249), "--last-step 249: give at least 250"),
    (HEAD + "0,1,2\n9,1,2\n", dict(smooth=0), "--smooth 0"),
    (HEAD + "0,1,2\n", dict(output="nowhere/a.png"), "--output nowhere/a.png"),
    (HEAD + "0,1,2\n", dict(output="a.jpg"), "--output a.jpg"),
    (HEAD + "0,1,2\n", dict(output="runs"), "--output runs"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_in_one_sentence(text, changes, hint, capsys):
    Path("runs/Env-v0/name").mkdir(parents=True)
    if text is not None:
        Path("runs/Env-v0/name/seed-0.csv").write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match=re.escape(hint)) as refused:
        common.plot.main(common.plot.Args(**{"runs": ["runs"], "output": "figure.png"} | changes))
    assert len(str(refused.value).splitlines()) == 1 and str(refused.value).endswith(".")
    assert os.listdir() == ["runs"] and not capsys.readouterr().out


# --- where runs are -----------------------------------------------------------------------------------------
def test_a_run_may_lie_just_below_the_root(monkeypatch):
    """Such as a disk of its own, /mnt. What it is its args.json tells; without that, nobody does."""
    told = {"script": "mage_td3.py", "args": {"env_id": "Ant-v4", "exp_name": None, "lr": 0.1, "seed": 1}}
    monkeypatch.setattr(Path, "read_text", lambda path: json.dumps(told))
    for there in (True, False):
        monkeypatch.setattr(Path, "is_file", lambda path: there)  # noqa: B023
        for run, above in (("/mnt", "/"), ("/mnt/disk", "/mnt"), ("/Ant-v4/mage_td3/seed-0", "/")):
            if there:
                line = ("mage_td3", above, (("script", "mage_td3.py"), ("env_id", "Ant-v4"), ("lr", "0.1")))
                assert common.curves.identity(Path(run)) == ("Ant-v4", line)
            elif run.count("/") > 2:
                assert common.curves.identity(Path(run)) == ("Ant-v4", ("mage_td3", "/", ()))
            else:
                with pytest.raises(LookupError):
                    common.curves.identity(Path(run))


def test_a_link_is_followed_and_names_its_run(capsys):
    """One to a folder elsewhere; `latest` is no other run; circles end; a link to nothing is said."""
    for seed in (0, 1):
        write(Path(f"scratch/job-{seed}/eval.csv"), [0, 1000], [0, seed])
        Path("runs/Hopper-v4/a").mkdir(parents=True, exist_ok=True)
        Path(f"runs/Hopper-v4/a/seed-{seed}").symlink_to(f"../../../scratch/job-{seed}")
    write(Path("runs/Hopper-v4/a/seed-2/eval.csv"), [0, 1000], [0, 2])
    Path("runs/Hopper-v4/a/latest").symlink_to("seed-2")
    Path("runs/Hopper-v4/circle").symlink_to("..")
    Path("other").symlink_to("runs")
    Path("runs/Hopper-v4/a/seed-3").symlink_to("nowhere")
    for runs, seeds in (
        (["runs"], [0, 1, 2]), (["other", "runs", "runs/../runs"], [0, 1, 2]), (["other"], [0, 1, 2]),
        (["runs/Hopper-v4/a/seed-1"], [1]), (["runs/Hopper-v4/a/seed-1/eval.csv"], [1]),
        (["other/Hopper-v4/a/latest"], [2]),
    ):  # fmt: skip
        found = common.curves.read(runs)
        assert list(found) == ["Hopper-v4"] and list(found["Hopper-v4"]) == ["a"]
        assert sorted(values[-1] for _, values, _ in found["Hopper-v4"]["a"]) == seeds
    assert "runs/Hopper-v4/a/seed-3: left out, it is a link to nothing" in capsys.readouterr().err


def test_the_home_folder_may_be_a_tilde(monkeypatch, tmp_path):
    home = tmp_path / "home"
    write(home / "runs/Hopper-v4/a/seed-0/eval.csv", [0, 1000], [0, 1])
    monkeypatch.setenv("HOME", str(home))
    common.plot.main(common.plot.Args(["~/runs"], "~/figure.png"))
    assert (home / "figure.png").exists() and os.listdir() == ["home"]
    with pytest.raises(BadInput, match="~nobody-is-called-so/runs: no eval.csv"):
        common.curves.read(["~nobody-is-called-so/runs"])


def test_a_folder_that_cannot_be_read_is_refused():
    with pytest.raises(BadInput, match="runs/x cannot be read .Permission denied.: name other folders."):
        common.curves.refuse(PermissionError(13, "Permission denied", "runs/x"))
    common.curves.refuse(NotADirectoryError(20, "Not a directory", "runs/seed-0.csv"))  # a file may be named


# --- names and values ---------------------------------------------------------------------------------------
@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which stay; no warning is given."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield drawn
    monkeypatch.undo()
    plt.close("all")


ODD = ["_first", "$x_$ and $", "50%_%s", "a|b", "two\nlines", "long_" * 40, "#{}\\$", "a^b$c$"]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_a_name_may_have_any_letter(name, figures, capsys):
    for seed in (0, 1):
        write(Path(f"runs/{name}/{name}/seed-{seed}/eval.csv"), [0, 1000], [0, 1])
    common.plot.main(common.plot.Args(["runs"], "figure.pdf"))
    (panel,) = figures[0].axes
    (label,) = [text.get_text() for text in panel.get_legend().get_texts()]
    plain = name.replace("\n", "?")
    for text, end in ((label, ", 2 seeds"), (panel.get_title(), "")):
        assert "$" not in text.replace(r"\$", "")  # no mathematics
        assert text.replace("\n", "").replace(r"\$", "$").strip() == (plain + end)
    widest, whole = panel.get_legend().get_window_extent(), figures[0].bbox
    assert whole.x0 <= widest.x0 and widest.x1 <= whole.x1
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert [cell.replace(r"\|", "|") for cell in cells[:3]] == [plain, plain, "2"] and len(cells) == 5


def test_a_name_that_is_no_text_is_drawn_and_one_that_the_terminal_has_no_letters_for_is_printed():
    assert common.plot.shown("a\udcff") == "a?"
    write(Path("runs/Hopper-v4/β/seed-0/eval.csv"), [0, 1000], [0, 1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "common.plot", "runs", "-o", "figure.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"| \u03b2 | 1 |" in done.stdout, done.stderr


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_a_gap(bad, seeds, statistic, figures, capsys):
    for seed in range(seeds):
        returns = [1, 2, bad, 4, bad, 6, 7]
        returns[seed % 2] = 0.5
        write(Path(f"runs/Env-v0/a/seed-{seed}/eval.csv"), range(0, 7000, 1000), returns)
    common.plot.main(common.plot.Args(["runs"], "figure.png", statistic=statistic))
    panel = figures[0].axes[0]
    for line in panel.lines:
        assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, True, False, False]
        assert line.get_marker() == "."  # or the value between the gaps is not seen
    assert -1 < panel.get_ylim()[0] < 0.5 and 7 < panel.get_ylim()[1] < 8
    out, err = capsys.readouterr()
    assert re.search(rf"\| Env-v0 \| a \| {seeds} \| 7.* \| 7.* at step 6000 \|", out)
    assert err.count("eval.csv: 2 of 7 values of return_mean are not finite and leave gaps") == seeds


def test_a_curve_may_end_in_a_gap(figures, capsys):
    for seed in range(5):
        write(Path(f"runs/Env-v0/a/seed-{seed}/eval.csv"), [0, 1000, 2000], [1, 3, "nan" if seed == 4 else 5])
    for time in (False, True):
        common.plot.main(common.plot.Args(["runs"], "figure.png", time=time))
    rows = [line for line in capsys.readouterr().out.splitlines() if "Env-v0" in line]
    assert rows[0] == "| Env-v0 | a | 5 | nan | 3 +- 0 at step 1000 |" and "| nan | 2.99 +- 0 at" in rows[1]


def test_seeds_that_are_never_finite_together_are_refused():
    """A mean over those that happen to be finite would be of other seeds at each place."""
    write(Path("runs/Env-v0/a/seed-0/eval.csv"), [0, 1000], ["nan", 1])
    write(Path("runs/Env-v0/a/seed-1/eval.csv"), [0, 1000], [1, "nan"])
    with pytest.raises(BadInput, match="--column return_mean: nowhere is it finite for all seeds of a: "):
        common.plot.main(common.plot.Args(["runs"], "figure.png"))
    assert os.listdir() == ["runs"]


def test_the_running_mean_passes_over_a_gap():
    nan = np.nan
    values = np.array([4.0, nan, 2.0, 6.0, nan, nan, 8.0])
    np.testing.assert_equal(common.curves.smoothed(values, 1), values)
    np.testing.assert_equal(common.curves.smoothed(values, 3), [4, nan, 3, 4, nan, nan, 8])


def test_one_evaluation_is_a_dot(figures):
    write(Path("runs/Env-v0/a/seed-0/eval.csv"), [1, 1000], [3, 4])
    common.plot.main(common.plot.Args(["runs"], "figure.png", last_step=1))
    assert figures[0].axes[0].lines[0].get_marker() == "."


def test_a_published_curve_below_zero_has_no_logarithm(figures):
    write(Path("runs/HalfCheetah-v4/a/seed-0/eval.csv"), [0, 300_000], [1, 10_000])
    assert min(min(returns) for _, returns in common.curves.published("HalfCheetah-v4").values()) < 0
    common.plot.main(common.plot.Args(["runs"], "figure.png", log=True))
    low, high = figures[0].axes[0].get_ylim()
    assert 0 < low < 1 and high > 10_000 and len(figures[0].axes[0].lines) > 3


def test_the_interval_of_a_median_has_two_ends(capsys):
    for seed, last in enumerate((-128, -131, -125, -130, -701)):
        write(Path(f"runs/Env-v0/a/seed-{seed}/eval.csv"), [0, 1000], [-1500, last])
    write(Path("runs/Env-v0/b/seed-0/eval.csv"), [0, 1000], [-1500, -128])
    common.plot.main(common.plot.Args(["runs"], "figure.png", statistic="median"))
    a, b = capsys.readouterr().out.splitlines()[2:]
    assert a == "| Env-v0 | a | 5 | -130 [-701, -125] | -243 +- 256 at step 1000 |"
    assert b == "| Env-v0 | b | 1 | -128 | -128 at step 1000 |"


def test_the_median_of_long_curves_takes_little_memory():
    values = np.random.default_rng(1).normal(size=(10, 1001)).cumsum(1)
    draws = np.random.default_rng(0).integers(10, size=(2000, 10))
    tracemalloc.start()
    line, interval = common.curves.centre_and_interval(values, "median")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 80e6  # all samples at once are 160 MB, and a copy
    some = values[:, ::100]
    np.testing.assert_array_equal(line[::100], np.median(some, 0))
    expected = np.quantile(np.median(some[draws], 1), [0.025, 0.975], 0)
    np.testing.assert_array_equal(interval[:, ::100], expected)
