"""Every bug of tests/bug_hunt.py raises no error, and is seen by the tests; an unchanged copy has none.

The tests run inside this process, against a copy in the place of a script: `--script`, as in conftest.py.
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import pytest

from common.args import parse_args
from tests import bug_hunt
from tests.bug_hunt import BUGS
from tests.conftest import LADDER, ROOT, loaded, resembled, tiny

FILES = ("tests.test_losses", "tests.test_maac", "tests.test_training")


class Reports:
    """A plugin of pytest that keeps what became of each test: {name: outcome}."""

    def __init__(self):
        self.outcomes, self.errors = {}, {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.partition("::")[2]] = (report.when, report.outcome)
            self.errors[report.nodeid.partition("::")[2]] = str(report.longrepr)


@contextmanager
def modules_as_they_were():
    """Scripts and files of tests are imported anew inside, and are the old ones afterwards."""
    for name in LADDER:
        importlib.import_module(name)
    before, path = {name: sys.modules.get(name) for name in (*LADDER, *FILES)}, sys.path[:]
    try:
        for name in FILES:
            sys.modules.pop(name, None)
        yield
    finally:
        sys.path[:] = path
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module


def run(path, *tests):
    """Runs tests (file::name, or files) against a copy of a script -> exit code, reports."""
    reports = Reports()
    with modules_as_they_were(), mock.patch.dict(os.environ, PYTEST_ADDOPTS=""):
        argv = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=no", f"--rootdir={ROOT}"]
        code = pytest.main([*argv, f"--script={path}", *tests], [reports])
    return code, reports


def node(bug):
    return f"{ROOT}/{bug.check.split()[0]}::{bug.test}"


COUNTER = itertools.count()


@pytest.fixture
def copy(tmp_path):
    """A function that writes a copy of a script, under a new name, and says where."""

    def write(text):
        path = tmp_path / f"mine{next(COUNTER)}.py"
        path.write_text(text)
        return path

    return write


# --- copies -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", LADDER)
def test_an_unchanged_copy_passes(script, copy):
    """The tests that see the bugs, and no test of a script that this is not."""
    mine = [bug for bug in BUGS if bug.script == script]
    path = copy((ROOT / f"{script}.py").read_text())
    code, reports = run(path, *dict.fromkeys(map(node, mine)))
    assert code == 0 and set(reports.outcomes.values()) == {("call", "passed")}
    assert len(reports.outcomes) >= len({bug.test for bug in mine}) >= 2


def test_tests_of_another_script_are_skipped_with_a_reason(copy):
    code, reports = run(copy((ROOT / "td3.py").read_text()), f"{ROOT}/tests/test_losses.py", "-k",
                        "naive_transcription or temperature or polyak or follow")  # fmt: skip
    assert code == 0
    outcomes = {name: when for name, (when, _) in reports.outcomes.items()}
    assert outcomes["test_polyak_moves_the_target_by_tau"] == "call"
    skipped = {"test_mage_loss_is_the_naive_transcription[Pendulum-v1-1]": "mage_loss, which td3.py does not",
               "test_temperature_rises_while_entropy_is_below_its_target": "temperature_loss",
               "test_an_actor_follows_the_critic_that_is_trained[mage_td3]": "not about td3.py"}  # fmt: skip
    for name, reason in skipped.items():
        assert outcomes[name] == "setup" and reason in reports.errors[name]


@pytest.mark.parametrize("script", LADDER)
def test_a_copy_is_recognised_whatever_was_rewritten(script, copy):
    """Every loss has another body, and a flag another default."""
    text = (ROOT / f"{script}.py").read_text()
    text, count = re.subn(r"(?m)^(def \w+_(?:loss|target|targets)\([^)]*\):\n)", r"\1    return 0\n", text)
    path = copy(text.replace("gamma: float = 0.99", "gamma: float = 0.9"))
    assert count >= 2 and resembled(path) == script


@pytest.mark.parametrize("text, sentence", [
    ("# A title\n\nThis is no script.\n", "is no Python file"),
    ("import torch\n\n\ndef train(args):\n    return 1\n", "is no copy of a script"),
    (None, "cannot be read (No such file"),
])  # fmt: skip
def test_a_file_that_is_no_script_gets_a_sentence(text, sentence, copy, tmp_path, capfd):
    path = tmp_path / "none.py" if text is None else copy(text)
    code, reports = run(path, f"{ROOT}/tests/test_losses.py")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert code == pytest.ExitCode.USAGE_ERROR and not reports.outcomes
    assert line.startswith(f"ERROR: --script {path}") and sentence in line and line.endswith(".")


@pytest.mark.parametrize("before, after, sentence", [
    ("def td_target", "def my_target", "has no td_target"),
    ("import torch\n", "import torch, nothing_of_that_name\n", "nothing_of_that_name"),
])  # fmt: skip
def test_a_copy_that_lacks_something_gets_a_sentence(before, after, sentence, copy, capfd):
    path = copy((ROOT / "td3.py").read_text().replace(before, after, 1))
    code, reports = run(path, f"{ROOT}/tests/test_losses.py")
    error = capfd.readouterr().err
    assert code == pytest.ExitCode.USAGE_ERROR and sentence in error and str(path) in error
    assert "Traceback" not in error


def test_a_copy_leaves_nothing_behind(copy):
    before = [importlib.import_module(name) for name in LADDER]
    path = copy((ROOT / "maac_sac.py").read_text())
    code, _ = run(path, f"{ROOT}/tests/test_losses.py::test_polyak_moves_the_target_by_tau")
    assert code == 0
    assert before == [sys.modules[name] for name in LADDER]


# --- bugs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(1, len(BUGS) + 1))
def test_a_bug_is_seen(number, copy):
    """By an assertion of the test that is named, or by shapes that do not fit."""
    bug = BUGS[number - 1]
    code, reports = run(copy(bug_hunt.copy_with(bug)), node(bug))
    assert code == 1 and ("call", "failed") in reports.outcomes.values()
    errors = " ".join(reports.errors.values())
    assert not re.search(r"\b(NameError|AttributeError|TypeError)\b", errors)


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1))
def test_a_bug_is_silent(number, copy, tmp_path):
    """A run with it ends as if nothing was."""
    bug = BUGS[number - 1]
    with modules_as_they_were():
        module = loaded(copy(bug_hunt.copy_with(bug)), bug.script)
        argv = tiny(bug.script, run_dir=tmp_path / "run", total_timesteps=22, eval_every=22, eval_max_steps=5)
        assert module.train(parse_args(module.Args, module.PRESETS, argv)) < 0


def test_code_is_found_whatever_stands_between_its_words():
    source = "x = f(  # a comment\n    a,\n    # another one\n    b)\ny = f(a, b) + g(a, b)\n"
    assert len(re.findall(bug_hunt.pattern("f(a, b)"), source)) == 2
    assert len(re.findall(bug_hunt.pattern("g(a, b)"), source)) == 1
    assert not re.findall(bug_hunt.pattern("f(a, c)"), source)


@pytest.mark.parametrize("before", ["gamma", "no_such_code(anywhere)"])
def test_code_that_does_not_stand_once_is_refused(before):
    bug = bug_hunt.Bug("td3", "", "", before, "x", "", "")
    with pytest.raises(ValueError, match="does not stand once in td3.py"):
        bug_hunt.copy_with(bug)


# --- the program --------------------------------------------------------------------------------------------
def test_questions_hints_and_answers_are_printed(capsys):
    bug_hunt.main([])
    shown = " ".join(capsys.readouterr().out.split())
    for number, bug in enumerate(BUGS, 1):
        assert f"{number} {bug.script}.py {bug.question}" in shown
        assert not {bug.why, bug.hint} & {shown} and bug.test not in shown
        bug_hunt.main([str(number), "--hint"])
        assert " ".join(capsys.readouterr().out.split()) == bug.hint
        bug_hunt.main(["--answer", str(number)])
        answer = capsys.readouterr().out
        assert bug.why in " ".join(answer.split()) and "\n-" in answer and "\n+" in answer


def test_a_copy_is_written_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bug_hunt.main(["3", "mine.py"])
    assert (tmp_path / "mine.py").read_text() == bug_hunt.copy_with(BUGS[2])
    shown = capsys.readouterr().out
    assert "python -m pytest -q tests/test_losses.py --script mine.py" in shown
    (tmp_path / "mine.py").write_text("mine")
    for argv, sentence in ((["3", "mine.py"], "mine.py cannot be written (File exists): name a new file"),
                           (["99", "x.py"], "no bug 99"), (["3"], "name a file")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            bug_hunt.main(argv)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == "mine"


def test_somebody_may_read_only_the_beginning():
    """`python -m tests.bug_hunt | head -1` closes the pipe, and there is nothing to complain of."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tests.bug_hunt"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
