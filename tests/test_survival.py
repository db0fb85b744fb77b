"""A run survives what can happen to it: kills, signals, full disks, damaged files, environments that fail.

Whatever it is, what was saved is whole, the user reads one sentence, and a run that goes on ends as the run
that nothing happened to, bit for bit.
"""

import dataclasses
import errno
import inspect
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import common.evaluate
import common.files
import common.film
import common.run
from common import BadInput
from common.args import main, parse_args
from common.envs import ReplayableEnv
from common.evaluate import load_run
from common.files import BEST, NEWEST, POLICY, PREVIOUS, newest, read_checkpoint
from common.rewards import REWARDS
from tests.conftest import ROOT, SCRIPTS, Planned, checkpoint, script, stored, tiny, train
from tests.test_training import same, table

CLOCKS = ("seconds", "steps_per_second")
EVERY_STEP = dict(checkpoint_every=0)  # it saves after each of them
NO_ORACLE = dict(env_id="MountainCarContinuous-v0")  # for processes where conftest.py's fixture does not work
PROCESSES = multiprocessing.get_context("forkserver")  # a process of its own without three seconds of imports
PROCESSES.set_forkserver_preload([__name__, *SCRIPTS, "torch.utils.tensorboard", "torch._dynamo"])


class Killed(BaseException):
    """What no handler catches, as a kill, but leaves the tests alive."""


def outcome(run):
    """All that a run has come to, in its checkpoint and its tables, but its clock and its history."""
    state = read_checkpoint(newest(run))
    parts = {name: part for name, part in state.items() if name not in ("seconds", "args", "starts")}
    parts["tables"] = {name: [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
                       for name, rows in state["tables"].items()}  # fmt: skip
    return parts | {path.name: table(Path(run), path.stem, CLOCKS) for path in Path(run).glob("*.csv")}


def differences(one, two):
    """The parts in which two runs differ."""
    one, two = outcome(one), outcome(two)
    return [name for name in one | two if not same(one.get(name), two.get(name))]


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that gives the run to which nothing happened; each is made once."""
    runs = {}

    def make(name, **changes):
        key = name, *sorted(changes.items())
        if key not in runs:
            runs[key] = train(name, tmp_path_factory.mktemp("whole"), **changes)
        return runs[key]

    return make


@pytest.fixture
def copied(whole, tmp_path):
    """A function that gives a copy of such a run, for something to happen to it."""
    return lambda name, **changes: Path(shutil.copytree(whole(name, **changes), tmp_path / "run"))


@pytest.fixture
def program(monkeypatch, capsys):
    """A function that runs a script here as the command line would -> a subprocess.CompletedProcess."""

    def run(name, argv):
        module, code = script(name), 0
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        capsys.readouterr()
        try:
            main(module.train, module.Args, module.PRESETS)
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(argv, code, *capsys.readouterr())

    return run


def sentence(stderr):
    """The one sentence that ends what a script has to say."""
    *before, line = stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("."), stderr
    assert not any(line.startswith("error: ") for line in before)
    return line


def finished(argv, **options):
    """A program of its own, to its end."""
    options |= dict(capture_output=True, text=True, timeout=100)
    return subprocess.run([sys.executable, *map(str, argv)], **options)


@contextmanager
def started(argv, **options):
    """A program of its own, which does not outlive the test."""
    with subprocess.Popen([sys.executable, *map(str, argv)], **options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition, seconds=60):
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@pytest.fixture
def once(monkeypatch):
    """A function that makes owner.name do something else before, once, from a step of the run on.

    It gives a list, which then holds the step at which that was.
    """
    runs, enter = [], common.run.Run.__enter__
    monkeypatch.setattr(common.run.Run, "__enter__", lambda run: runs.append(run) or enter(run))

    def add(step, owner, name, what, when=lambda *args: True):
        method, done = getattr(owner, name), []

        def other(*args, **kwargs):
            if runs and runs[-1].step >= step and not done and when(*args):
                done.append(runs[-1].step)
                what(*args)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, other)
        return done

    return add


# --- kills --------------------------------------------------------------------------------------------------
def child(name, argv, log):
    """What a process of its own does: the command line, with its output in a file."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{name}.py", *argv]
    module = script(name)
    main(module.train, module.Args, module.PRESETS)


@pytest.fixture
def process(monkeypatch, tmp_path):
    """A function that starts a script in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = []

    def start(name, argv, target=child):
        processes.append(PROCESSES.Process(target=target, args=(name, argv, tmp_path / "log")))
        processes[-1].start()
        return processes[-1]

    yield start
    for each in processes:
        each.kill()
        each.join()


@pytest.mark.parametrize("name, kills, steps", [("td3", 25, 600), *((name, 3, 60) for name in SCRIPTS[1:])])
def test_a_run_that_is_killed_again_and_again_is_the_same_run(name, kills, steps, whole, process, tmp_path):
    """At random moments, many of which are in the middle of a save."""
    settings = dict(env_id="ContinuousCartPole-v1", total_timesteps=steps, eval_every=20, **EVERY_STEP)
    undisturbed, run, rng = whole(name, **settings), tmp_path / "run", random.Random(0)
    argv, reached, torn = tiny(name, run_dir=run, resume=True, **settings), [0], 0
    made, seconds = steps / 10, checkpoint(undisturbed)["seconds"] / 10  # how fast it is, for a start

    def begun():
        return (run / "args.json").stat().st_mtime_ns if (run / "args.json").exists() else 0

    for left in range(kills, 0, -1):
        before, running = begun(), process(name, argv)
        until(lambda before=before, running=running: begun() != before or not running.is_alive())
        delay = rng.uniform(0, 1.8) * (steps - reached[-1]) / (left + 1) * seconds / made
        time.sleep(delay)
        running.kill()
        running.join()
        torn += (run / f"{NEWEST}.part").exists() or not (run / NEWEST).exists()
        state = newest(run) and read_checkpoint(newest(run))
        reached.append(state["step"] if state else 0)
        made, seconds = made + reached[-1] - reached[-2], seconds + delay
        if running.exitcode == 0:  # it was faster than the kill
            break
        assert running.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    killed = sum(step < steps for step in reached[1:])
    assert reached == sorted(reached) and killed >= 0.6 * kills and len(set(reached)) > 0.4 * kills, reached
    assert torn >= 0.1 * kills or kills < 25
    running = process(name, argv)
    running.join()
    assert running.exitcode == 0, (tmp_path / "log").read_text()
    assert not differences(run, undisturbed)
    assert [row["step"] for row in table(run, "eval")] == [str(step) for step in range(0, steps + 1, 20)]
    assert not list(run.glob("*.part"))


WRITES = {  # where a save can be interrupted: what is called there, and with what
    "write": (torch, "save", lambda *args: True),
    "flush": (os, "fsync", lambda *args: True),
    "first rename": (os, "replace", lambda old, new: new.name == PREVIOUS),
    "second rename": (os, "replace", lambda old, new: new.name == NEWEST),
}


def stop_at(place, once, error):
    """Lets a save fail, at step 35; it has written something by then."""

    def fail(*args):
        if place == "write":
            args[1].write(b"half of it")
        raise error

    owner, name, when = WRITES[place]
    return once(35, owner, name, fail, when)


@pytest.mark.parametrize("place", WRITES)
def test_a_kill_within_a_save(place, once, whole, tmp_path):
    """Between its two renames the checkpoint before is the only one."""
    run = tmp_path / "run"
    stop_at(place, once, Killed())
    with pytest.raises(Killed):
        train("td3", run, **EVERY_STEP)
    assert (run / f"{NEWEST}.part").exists() and (run / NEWEST).exists() == (place != "second rename")
    assert newest(run).name == (PREVIOUS if place == "second rename" else NEWEST)
    assert read_checkpoint(newest(run))["step"] == 34
    train("td3", run, resume=True)
    assert not differences(run, whole("td3")) and not list(run.glob("*.part"))


# --- two of them --------------------------------------------------------------------------------------------
def test_a_second_process_in_a_folder_is_refused(process, program, whole, tmp_path):
    """The first one stands still meanwhile; once it is dead, whatever it died of, the second may go on."""
    run = tmp_path / "run"
    first = process("td3", tiny("td3", run_dir=run, **EVERY_STEP, **NO_ORACLE, total_timesteps=10**6))
    until((run / PREVIOUS).exists)
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(0.1)
    before = files(tmp_path)
    for resume in (False, True):
        second = program("td3", tiny("td3", run_dir=run, resume=resume) + ["--no-resume"] * (not resume))
        assert second.returncode == 2 and "in use" in sentence(second.stderr) and str(run) in second.stderr
        assert len(second.stderr.splitlines()) == 1 and files(tmp_path) == before
    first.kill()
    first.join()
    step = read_checkpoint(newest(run))["step"]
    settings = NO_ORACLE | dict(total_timesteps=step + 10)
    second = program("td3", tiny("td3", run_dir=run, resume=True, **settings))
    assert second.returncode == 0 and not differences(run, whole("td3", **settings))


# --- signals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_program(number, whole, tmp_path):
    """It saves at the end of the step, says so by its exit code and goes on from there as if nothing was."""
    run, settings = tmp_path / "run", NO_ORACLE | dict(eval_every=100)
    argv = [ROOT / "td3.py", *tiny("td3", run_dir=run, **settings, total_timesteps=10**6)]
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(table(run, "eval")) > 1 if (run / "eval.csv").exists() else False)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    step = checkpoint(run)["step"]
    assert step >= 100 and not list(run.glob("*.part"))
    train("td3", run, resume=True, **settings, total_timesteps=step + 20)
    assert not differences(run, whole("td3", **settings, total_timesteps=step + 20))


MOMENTS = {  # from which step on, during what
    "first evaluation": (0, common.run, "evaluate"),
    "step": (35, ReplayableEnv, "step"),
    "reset": (35, ReplayableEnv, "reset"),
    "update": (35, script("td3"), "descend"),
    "evaluation": (35, common.run, "evaluate"),
    "log": (35, common.files, "write_table"),
    "save": (35, torch, "save"),
    "rename": (35, os, "replace"),
    "last look at the clock": (35, time, "monotonic"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment, change", [
    *((moment, EVERY_STEP) for moment in MOMENTS),
    *((moment, {}) for moment in MOMENTS if moment not in ("save", "rename", "last look at the clock")),
    ("last look at the clock", {}),
])  # fmt: skip
def test_a_signal_at_any_moment(number, moment, change, once, program, whole, tmp_path):
    """The run ends at the end of that step, or of the next where it was over, and has saved it."""
    run, env_id = tmp_path / "run", "ContinuousCartPole-v1"
    raised = once(*MOMENTS[moment], lambda *args: signal.raise_signal(number))
    argv = tiny("td3", run_dir=run, env_id=env_id, **change)
    stopped = program("td3", argv)
    assert stopped.returncode == 128 + number and "Traceback" not in stopped.stderr
    assert checkpoint(run)["step"] - raised[0] in (0, 1) and checkpoint(run)["step"] < 60
    assert program("td3", [*argv, "--resume"]).returncode == 0
    assert not differences(run, whole("td3", env_id=env_id))


HANGS = """
import sys, time
from pathlib import Path
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv
import td3
from common.args import main, parse_args

class Hangs(PendulumEnv):
    made = 0

    def __init__(self):
        super().__init__()
        Hangs.made += 1
        self.left = 30 if Hangs.made == 1 else 0

    def reset(self, *, seed=None, options=None):
        if seed is not None and Hangs.made == 1:  # a run tries its environment out, and begins with this
            self.left = 30
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.left -= 1
        if self.left == 0:
            Path("hangs").touch()
            while True:  # short naps, as a signal that comes just before one is heard only after it
                time.sleep(0.05)
        return super().step(action)

gym.register("Hangs-v0", Hangs, max_episode_steps=200)
main(td3.train, td3.Args, td3.PRESETS)
"""


def test_the_second_signal_ends_a_program_that_hangs(tmp_path):
    (tmp_path / "driver.py").write_text(HANGS)
    argv = ["driver.py", *tiny("td3", run_dir="run", env_id="Hangs-v0", **EVERY_STEP)]
    said, environment = tmp_path / "said.txt", os.environ | {"PYTHONPATH": str(ROOT)}
    with said.open("wb") as stderr, started(argv, cwd=tmp_path, env=environment, stderr=stderr) as process:
        until((tmp_path / "hangs").exists)
        process.terminate()
        until(lambda: b"a second signal ends it unsaved" in said.read_bytes())
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "run")["step"] == 29


# --- full disks ---------------------------------------------------------------------------------------------
def test_a_checkpoint_that_grows_too_large_for_the_disk(whole, tmp_path):
    """The limit of a file's size stands for the disk's: writes fail from there on. The one before stays."""
    run = train("td3", tmp_path / "run", total_timesteps=30, **NO_ORACLE)
    limit = ((run / NEWEST).stat().st_size + (whole("td3", **NO_ORACLE) / NEWEST).stat().st_size) // 2 + 300
    argv = [ROOT / "td3.py", *tiny("td3", run_dir=run, resume=True, **EVERY_STEP, **NO_ORACLE)]
    full = finished(argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    step = checkpoint(run)["step"]
    assert full.returncode == 1 and 30 < step < 60
    for mention in (str(run / NEWEST), "File too large", f"step {step + 1};", f"checkpoint of step {step}."):
        assert mention in sentence(full.stderr)
    assert "Traceback" not in full.stderr and not list(run.glob("*.part"))
    train("td3", run, resume=True, **NO_ORACLE)
    assert not differences(run, whole("td3", **NO_ORACLE))


@pytest.mark.parametrize("place", WRITES)
def test_a_save_that_fails(place, once, program, whole, tmp_path):
    run = tmp_path / "run"
    stop_at(place, once, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    full = program("td3", tiny("td3", run_dir=run, **EVERY_STEP))
    assert full.returncode == 1 and "Traceback" not in full.stderr
    for mention in (NEWEST, "No space left", "at step 35", "checkpoint of step 34"):
        assert mention in sentence(full.stderr)
    assert read_checkpoint(newest(run))["step"] == 34 and not list(run.glob("*.part"))
    train("td3", run, resume=True)
    assert not differences(run, whole("td3"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("file, step", [
    ("args.json", 0),
    ("eval.csv", 0), ("train.csv", 20), (NEWEST, 60),
])  # fmt: skip
def test_a_file_that_cannot_be_written(file, step, program, whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{file}.part").symlink_to("/dev/full")
    full = program("td3", tiny("td3", run_dir=run))
    assert full.returncode == 1 and "Traceback" not in full.stderr
    for mention in (str(run / file), "No space left", f"at step {step}", "no checkpoint yet"):
        assert mention in sentence(full.stderr)
    assert not list(run.glob("*.part"))
    assert program("td3", tiny("td3", run_dir=run, resume=True)).returncode == 0
    assert not differences(run, whole("td3"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_takes_no_table_away(copied, program):
    run = copied("td3", total_timesteps=35)
    before = table(run, "eval")
    (run / "eval.csv.part").symlink_to("/dev/full")
    assert program("td3", tiny("td3", run_dir=run, resume=True)).returncode == 1
    assert table(run, "eval") == before


def full_events(name, argv, log, from_the_start=False):
    """A process in which TensorBoard's thread finds the disk full."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, written = RecordWriter.write, []

    def fail(writer, data):
        written.append(data)
        if from_the_start or len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, data)

    RecordWriter.write = fail
    child(name, argv, log)


@pytest.mark.parametrize("target", [
    full_events,
    partial(full_events, from_the_start=True),
], ids=["later", "at the start"])  # fmt: skip
def test_events_that_cannot_be_written(target, process, program, whole, tmp_path):
    run = tmp_path / "run"
    running = process("td3", tiny("td3", run_dir=run, **NO_ORACLE), target)
    running.join()
    line = sentence((tmp_path / "log").read_text())
    assert running.exitcode == 1 and str(run) in line and "No space left" in line and "at step " in line
    assert program("td3", tiny("td3", run_dir=run, resume=True, **NO_ORACLE)).returncode == 0
    assert not differences(run, whole("td3", **NO_ORACLE))


def test_events_that_cannot_be_written_are_one_sentence(process, tmp_path):
    process("td3", tiny("td3", run_dir=tmp_path / "run"), full_events).join()
    assert "Traceback" not in (tmp_path / "log").read_text()


# --- damaged files ------------------------------------------------------------------------------------------
def flip(path):
    """One bit of a weight: PyTorch itself reads the file as if nothing was."""
    def weight():
        return torch.load(path, weights_only=True)["actor"]["net.2.weight"]

    whole, before = bytearray(path.read_bytes()), weight()
    whole[whole.index(before.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(whole)
    assert not torch.equal(weight(), before)


DAMAGES = {
    "flipped": flip,
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(damage, copied, program, whole):
    run = copied("td3", total_timesteps=30)
    train("td3", run, resume=True, total_timesteps=35)
    DAMAGES[damage](run / NEWEST)
    before = files(run)
    argv = tiny("td3", run_dir=run, resume=True)
    refused = program("td3", argv)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and files(run) == before
    assert f"{run / NEWEST} is damaged" in sentence(refused.stderr)
    assert f"rename {PREVIOUS} to {NEWEST}" in refused.stderr
    (run / PREVIOUS).rename(run / NEWEST)
    assert checkpoint(run)["step"] == 30 and program("td3", argv).returncode == 0
    assert not differences(run, whole("td3"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [POLICY, BEST])
def test_a_damaged_policy_is_refused_and_its_run_goes_on(name, damage, copied, program, whole):
    run = copied("td3", total_timesteps=35)
    DAMAGES[damage](run / name)
    for read in (script("td3").load_policy, lambda path: load_run(path, script("td3").Args)):
        fix = "--resume writes it anew" if name == POLICY else "take policy.pt, .* without --best"
        with pytest.raises(BadInput, match=f"is damaged .*: {fix}"):
            read(run / name)
    with pytest.raises(BadInput, match="is damaged"):
        common.evaluate.main(common.evaluate.Args(str(run), best=name == BEST))
    assert program("td3", tiny("td3", run_dir=run, resume=True)).returncode == 0
    assert not differences(run, whole("td3"))


@pytest.mark.parametrize("damage", [Path.unlink, flip, None])
def test_a_finished_run_writes_a_policy_that_is_missing_or_older(damage, copied, program, whole):
    """As after a kill between the two writes of the last save."""
    run = copied("td3", total_timesteps=30)
    policy, older = run / POLICY, (run / POLICY).read_bytes()
    train("td3", run, resume=True)
    whole_policy = read_checkpoint(policy)
    policy.write_bytes(older)
    if damage:
        damage(policy)
    again = program("td3", tiny("td3", run_dir=run, resume=True))
    assert again.returncode == 0 and "is finished" in again.stdout
    found = read_checkpoint(policy)
    assert found["step"] == 60 and torch.equal(
        *(state["actor"]["net.0.weight"] for state in (found, whole_policy)))  # fmt: skip


def test_a_disk_that_is_full_between_checkpoint_and_policy(monkeypatch, program, tmp_path):
    """The sentence names the checkpoint that was saved, and says that the disk is full."""
    write, run = torch.save, tmp_path / "run"

    def save(state, file):
        if POLICY in file.name and state["step"] == 60:
            raise RuntimeError("[enforce fail at inline_container.cc:672]")
        write(state, file)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    full = program("td3", tiny("td3", run_dir=run))
    assert full.returncode == 1 and checkpoint(run)["step"] == 60
    for mention in (POLICY, "No space left", "checkpoint of step 60"):
        assert mention in sentence(full.stderr)


def test_where_there_is_no_checkpoint_before_none_is_offered(copied, program):
    run = copied("td3")
    DAMAGES["half"](run / NEWEST)
    refused = program("td3", tiny("td3", run_dir=run, resume=True))
    assert refused.returncode == 2 and PREVIOUS not in sentence(refused.stderr)
    (run / NEWEST).rename(run / PREVIOUS)
    refused = program("td3", tiny("td3", run_dir=run, resume=True))
    assert refused.returncode == 2 and "rename" not in sentence(refused.stderr)


def test_the_evaluation_program_refuses_a_damaged_checkpoint(copied):
    run = copied("td3")
    flip(run / POLICY)
    refused = finished(["-m", "common.evaluate", run], cwd=ROOT)
    assert refused.returncode == 2 and refused.stdout == ""
    assert "is damaged" in sentence(refused.stderr) and len(refused.stderr.splitlines()) == 1


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_no_reader_executes_what_is_in_a_checkpoint(copied, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = copied("td3")
    state = checkpoint(run) | {"actor": Hostile()}
    torch.save(state, run / NEWEST)
    torch.save(state, run / POLICY)
    resume = parse_args(script("td3").Args, {"paper": {"*": {}}}, ["--run-dir", str(run), "--resume"])
    for read in (
        lambda: script("td3").load_policy(run), lambda: common.evaluate.main(common.evaluate.Args(str(run))),
        lambda: script("td3").train(resume),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="is damaged"):
            read()
    assert not Path("executed").exists()
    torch.load(run / NEWEST, weights_only=False)
    assert Path("executed").exists()  # it would have been


@pytest.mark.parametrize("path", ["{0}/evil.py", "../../evil.py", "common/../../../evil.py"])
def test_no_script_from_elsewhere_is_executed(path, copied, monkeypatch, tmp_path):
    """A run folder comes from anywhere; what it names is looked for beside common/ alone."""
    run, evil = copied("td3"), tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    named = path.format(tmp_path)
    monkeypatch.setattr(common.evaluate, "__file__", str(tmp_path / "a/b/common/evaluate.py"))
    assert (tmp_path / "a/b" / named).resolve() == evil
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | {"script": named}))
    (tmp_path / "a/b/common").mkdir(parents=True)
    with pytest.raises(BadInput, match="not beside common/"):
        common.evaluate.main(common.evaluate.Args(str(run)))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "a/b/evil.py").write_text(evil.read_text())
    with pytest.raises(AttributeError):  # has no load_policy, but it was executed
        common.evaluate.main(common.evaluate.Args(str(run)))
    assert (tmp_path / "executed").exists()


RUN = {"script": "td3.py", "args": {"env_id": "Pendulum-v1"}}


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '"td3.py"', "\0\xff", json.dumps({}), json.dumps(RUN | {"script": 5}),
    json.dumps(RUN | {"script": ""}), json.dumps(RUN | {"script": ".."}), json.dumps(RUN | {"args": {}}),
    json.dumps(RUN | {"args": None}), json.dumps(RUN | {"script": "nothing.py"}),
    json.dumps(RUN | {"script": "maac_sac.py"}), json.dumps(RUN | {"args": {"env_id": 5}}),
    json.dumps(RUN | {"args": {"env_id": "Nope-v0"}}),
    json.dumps(RUN | {"script": "README.md"}),
])  # fmt: skip
def test_damaged_arguments_are_one_sentence(text, copied):
    run = copied("td3")
    (run / "args.json").write_bytes(text.encode("latin1"))
    with pytest.raises(BadInput) as refused:
        common.evaluate.main(common.evaluate.Args(str(run), episodes=2))
    assert str(refused.value).endswith(".") and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\xff"])
def test_a_run_does_not_need_its_arguments_file_to_go_on(text, program, whole, tmp_path):
    """It is for people; the checkpoint has all."""
    run = train("td3", tmp_path / "run", total_timesteps=35)
    (run / "args.json").write_bytes(text.encode("latin1"))
    assert program("td3", tiny("td3", run_dir=run, resume=True)).returncode == 0
    assert not differences(run, whole("td3")) and json.loads((run / "args.json").read_text())


# --- resume -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_says_so_and_goes_on_if_it_is_asked_to(name, copied, program, whole):
    run = copied(name)
    kept = {path: data for path, data in files(run).items() if path.suffix in (".csv", ".pt")}
    again = program(name, tiny(name, run_dir=run, resume=True))
    assert again.returncode == 0 and "is finished" in again.stdout and "--total-timesteps" in again.stdout
    assert len(kept) == 5 and files(run).items() >= kept.items()
    more = program(name, tiny(name, run_dir=run, resume=True, total_timesteps=90))
    assert more.returncode == 0 and "finished" not in more.stdout
    assert not differences(run, whole(name, total_timesteps=90))


def change(run, **parts):
    """Another checkpoint, as a program that knows the format could write it."""
    torch.save(checkpoint(run) | parts, run / NEWEST)


def test_other_versions_are_named_and_the_run_goes_on(copied, program, whole):
    run = copied("td3", total_timesteps=35)
    starts = checkpoint(run)["starts"]
    starts[-1]["versions"] |= {"torch": "0.1", "numpy": "0.2"}
    starts[-1]["revision"] = "0abcdef"
    change(run, starts=starts)
    again = program("td3", tiny("td3", run_dir=run, resume=True))
    assert again.returncode == 0 and not differences(run, whole("td3"))
    changed = {"torch 0.1": torch.__version__, "numpy 0.2": np.__version__, "revision 0abcdef": ""}
    assert ", ".join(f"{then} is now {now}" for then, now in changed.items()) in again.stderr
    assert "gymnasium" not in again.stderr and len(checkpoint(run)["starts"]) == 2


def test_a_script_that_was_edited_is_named_and_its_old_text_kept(tmp_path):
    """git does not know `mine.py`, and a resume has the settings alone to compare."""
    for name in ("common", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    mine, run = tmp_path / "mine.py", tmp_path / "run"
    text = (ROOT / "td3.py").read_text()
    mine.write_text(text)
    argv = [mine, *tiny("td3", run_dir=run, total_timesteps=40)]
    assert finished(argv).returncode == 0 and (run / "mine.py").read_text() == text
    again = finished([*argv, "--resume", "--total-timesteps", "50"])
    assert again.returncode == 0 and "is now" not in again.stderr
    mine.write_text(text.replace("policy_delay == 0", "policy_delay != 0"))
    edited = finished([*argv, "--resume"])
    assert edited.returncode == 0 and "is finished" in edited.stdout + edited.stderr
    edited = finished([*argv, "--resume", "--total-timesteps", "60"])
    first, second = (start["code"]["mine.py"] for start in checkpoint(run)["starts"][-2:])
    assert edited.returncode == 0 and f"--resume: mine.py {first} is now {second}; from" in edited.stderr
    assert (run / "mine.py").read_text() == mine.read_text() != text
    assert (run / f"mine.{first}.py").read_text() == text


def test_the_same_versions_are_not_named(copied, program):
    run = copied("td3", total_timesteps=35)
    assert "is now" not in program("td3", tiny("td3", run_dir=run, resume=True)).stderr


class Moody(Planned):
    """It has randomness of its own, which nobody can save."""

    def observe(self):
        return super().observe() + np.float32(np.random.default_rng().random())


def test_an_episode_that_cannot_be_repeated_is_given_up_and_the_run_goes_on(register, program, tmp_path):
    env_id, run = register(Moody), tmp_path / "run"
    train("td3", run, env_id=env_id, total_timesteps=35)
    kept = stored(checkpoint(run))
    goes_on = program("td3", tiny("td3", run_dir=run, env_id=env_id, resume=True))
    assert goes_on.returncode == 0 and checkpoint(run)["step"] == 60
    assert torch.equal(stored(checkpoint(run))[:35], kept)
    assert f"unfinished episode of {env_id} is given up" in goes_on.stderr


NETWORKS = ("actor", "actor_target", "critic", "critic_target")
FITS = ("env", "buffer", *NETWORKS, "actor_opt", "critic_opt")


def test_checkpoints_have_no_part_that_is_not_tested_below(whole):
    others = {"args", "script", "device", "seconds", "rng", *common.run.SAVED}
    assert set(checkpoint(whole("td3"))) == {*FITS, *others}


@pytest.mark.parametrize("part", [
    *FITS, "args", "step",
    "script", "device", "seconds", "rng", *common.run.SAVED[1:],
])  # fmt: skip
def test_a_checkpoint_without_a_part_is_refused(part, copied, program):
    """As one from an older version of these scripts may be."""
    run = copied("td3", total_timesteps=35)
    state = checkpoint(run)
    del state[part]
    torch.save(state, run / NEWEST)
    before = files(run)
    refused = program("td3", tiny("td3", run_dir=run, resume=True))
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert NEWEST in sentence(refused.stderr) and files(run) == before


@pytest.mark.parametrize("part", [
    *FITS
])  # fmt: skip
def test_a_checkpoint_with_a_part_that_is_something_else_is_refused(part, copied, program):
    run = copied("td3", total_timesteps=35)
    change(run, **{part: {"is": torch.zeros(2, 3)}})
    refused = program("td3", tiny("td3", run_dir=run, resume=True))
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert f"{NEWEST} does not fit" in sentence(refused.stderr)


def test_weights_of_another_shape_are_refused(copied, program):
    run = copied("td3", total_timesteps=35)
    weights = checkpoint(run)["critic"]
    change(run, critic=weights | {"net.0.weight": weights["net.0.weight"].mT.contiguous()})
    refused = program("td3", tiny("td3", run_dir=run, resume=True))
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "net.0.weight" in sentence(refused.stderr)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_actor_of_another_shape_is_no_policy(name, copied):
    run = copied(name)
    small = torch.load(run / POLICY, weights_only=True)
    torch.save(small | {"actor": {"net.0.weight": torch.zeros(1, 1, 1)}}, run / POLICY)
    with pytest.raises(BadInput, match="does not fit"):
        common.evaluate.main(common.evaluate.Args(str(run)))


# --- environments -------------------------------------------------------------------------------------------
REWARDS_THAT_ARE_NONE = {"array": np.ones(1), "long": np.ones(1000), "nan": np.nan, "none": None}


class Shaky(gym.Env):
    """Episodes of 10 steps. Something is wrong at step 17, or with the reset after step 20."""

    def __init__(self, fault, dtype=np.float32):
        self.observation_space = Box(-np.inf, np.inf, (2,), dtype)
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.fault, self.start, self.closed = fault, 0, False

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = self.steps if seed is None else self.start
        if self.steps == 20 and self.fault == "reset":
            raise ValueError("no start to be found")
        return np.zeros(2, self.observation_space.dtype), {}

    def step(self, action):
        self.steps += 1
        obs, reward = np.full(2, self.steps % 10, self.observation_space.dtype), 1.0
        if self.steps == 17 and self.fault in ("step", "lines"):
            raise ZeroDivisionError("the wheel came off" if self.fault == "step" else "the wheel\ncame off")
        if self.steps == 17 and self.fault == "shape":
            obs = np.zeros(3, np.float32)
        if self.steps == 17 and self.fault in REWARDS_THAT_ARE_NONE:
            reward = REWARDS_THAT_ARE_NONE[self.fault]
        return obs, reward, self.steps % 10 == 0, False, {}

    def close(self):
        self.closed = True


FAULTS = {"step": "came off", "lines": "came off", "reset": "to be found", "shape": "(3,)", "array": "reward",
          "long": "reward", "nan": "nan", "none": "None"}  # fmt: skip
LONG = ("lines", "long")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("fault", [
    *(fault for fault in FAULTS if fault not in LONG),
    *LONG,
])  # fmt: skip
def test_an_environment_that_fails(name, fault, register, program, tmp_path):
    made, run, step = [], tmp_path / "run", 20 if fault == "reset" else 17

    def make():
        made.append(Shaky(None if made else fault))  # the first one is to train in
        return made[-1]

    env_id = register(make)
    failed = program(name, tiny(name, run_dir=run, env_id=env_id, **EVERY_STEP))
    line = sentence(failed.stderr)
    assert failed.returncode == 1 and made[0].closed
    for mention in (env_id, f"at step {step}", f"checkpoint of step {step - 1}", FAULTS[fault]):
        assert mention in line, line
    assert checkpoint(run)["step"] == step - 1 and len(made) > 1
    assert ("Traceback" in failed.stderr) == (fault in ("step", "lines", "reset", "none"))  # of its code


@pytest.mark.parametrize("fault", ["step", "shape", *REWARDS_THAT_ARE_NONE])
def test_an_environment_that_fails_in_an_evaluation(fault, register, program, tmp_path):
    made, run = [], tmp_path / "run"

    def make():
        made.append(Shaky(fault if len(made) == 3 else None))  # trains, evaluates at 0, at 20, at 40
        made[-1].start = 15 if len(made) == 4 else 0
        return made[-1]

    env_id = register(make)
    failed = program("td3", tiny("td3", run_dir=run, env_id=env_id, **EVERY_STEP))
    assert failed.returncode == 1
    for mention in (env_id, "at step 40", "checkpoint of step 39"):
        assert mention in sentence(failed.stderr)


@pytest.mark.parametrize("eval_episodes", [0, 2])
def test_an_environment_that_cannot_be_closed(eval_episodes, register, program, tmp_path):
    """Its work is done by then, so that nothing is lost."""

    class Stuck(Shaky):
        def close(self):
            raise RuntimeError("port already closed")

    common.envs.say_once.cache_clear()
    env_id = register(lambda: Stuck(None))
    done = program("td3", tiny("td3", run_dir=tmp_path, env_id=env_id, eval_episodes=eval_episodes))
    assert done.returncode == 0 and checkpoint(tmp_path)["step"] == 60
    assert done.stderr.count(f"{env_id} failed in close (RuntimeError: port already closed)") == 1
    assert "Traceback" not in done.stderr


def test_an_environment_that_fails_before_the_first_step(register, program, tmp_path):
    class Broken(Planned):
        def reset(self, **kwargs):
            raise ValueError("no start")

    env_id = register(Broken)
    failed = program("td3", tiny("td3", run_dir=tmp_path / "run", env_id=env_id))
    assert failed.returncode == 1 and env_id in sentence(failed.stderr) and "no start" in failed.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_observations_of_float64_are_stored_as_float32(name, register, tmp_path):
    """Of integer values, too."""
    env_id = register(partial(Shaky, None, np.float64))
    rows = stored(checkpoint(train(name, tmp_path / "run", env_id=env_id)))
    wanted = torch.arange(60) % 10
    assert rows.dtype == torch.float32
    assert torch.equal(rows[:, 0], wanted.float()) and torch.equal(rows[:, 5], ((wanted + 1) % 10).float())


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("end", ["terminated", "truncated", "both"])
def test_episodes_of_one_step(name, end, register, monkeypatch, tmp_path):
    monkeypatch.setattr(Planned, "PLAN", ((1, end),))
    run = train(name, tmp_path / "run", env_id=register(Planned))
    rows = stored(checkpoint(run))
    assert rows[:, 0].tolist() == list(range(60)) and rows[:, 1].eq(0).all()
    assert rows[:, -1].eq(end != "truncated").all()
    assert {row["length_mean"] for row in table(run, "eval")} == {"1.0"}


class Endless(Planned):
    PLAN = ((10**9, "terminated"),)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_episode_without_end_is_cut_and_the_run_says_so(name, register, program, tmp_path):
    run = tmp_path / "run"
    endless = program(name, tiny(name, run_dir=run, env_id=register(Endless), eval_max_steps=37))
    assert endless.returncode == 0 and endless.stdout.count("cut") == 4
    assert {row["length_mean"] for row in table(run, "eval")} == {"37.0"}


def test_the_evaluation_program_says_that_it_cut(register, capsys, tmp_path):
    run = train("td3", tmp_path / "run", env_id=register(Endless), eval_max_steps=37)
    capsys.readouterr()
    common.evaluate.main(common.evaluate.Args(str(run), max_steps=37))
    assert "cut" in capsys.readouterr().out


# --- numbers that are none ----------------------------------------------------------------------------------
def poison(weight, value=torch.nan):
    with torch.no_grad():
        weight[-1, 0, 0] = value  # of the last member alone


@pytest.mark.parametrize("name, network, value", [
    *((name, network, np.nan) for name in SCRIPTS for network in ("actor", "critic", "critic_target")),
    *((name, "model", np.nan) for name in SCRIPTS[1:]), *((name, "critic", np.inf) for name in SCRIPTS),
])  # fmt: skip
def test_a_weight_that_goes_wrong(name, network, value, once, program, tmp_path):
    """In the middle of a run, after an update of the critic; the run ends before another step is made."""
    run, parts = tmp_path / "run", {}
    once(0, common.run.Run, "steps", lambda run: parts.update(run.state))
    once(30, script(name), "polyak", lambda *args: poison(parts[network].net[0].weight, value))
    failed = program(name, tiny(name, run_dir=run, checkpoint_every=0))
    line = sentence(failed.stderr)
    assert failed.returncode == 1 and "not finite" in line and ("step 30;" in line or "step 31;" in line)
    assert f"{network}.net" in line or any(part in line for part in ("_loss", "_grad", "action")), line
    assert checkpoint(run)["step"] == 29
    assert all(torch.isfinite(w).all() for part in parts if part in ("actor", "critic", "model")
               for w in checkpoint(run)[part].values())  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gradient_of_the_actor_that_goes_wrong(name, once, program, tmp_path):
    run = tmp_path / "run"

    def spoil(run, *args):
        run.state["actor"].net[0].weight.register_hook(lambda grad: grad * torch.nan)

    once(30, common.run.Run, "fetch", spoil)
    failed = program(name, tiny(name, run_dir=run, **EVERY_STEP))
    line = sentence(failed.stderr)
    assert failed.returncode == 1 and "actor" in line and "not finite" in line
    assert "step 30;" in line and "checkpoint of step 29" in line and checkpoint(run)["step"] == 29


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_a_known_reward_that_goes_wrong(name, once, program, monkeypatch, tmp_path):
    """The model is asked for rewards in imagined states, where such a function was never tried."""
    run, wrong, known = tmp_path / "run", [], REWARDS["Pendulum-v1"]
    once(30, common.run.Run, "fetch", lambda *args: wrong.append(1))

    def reward(*args):
        return known(*args) * (torch.nan if wrong and len(args[0]) > 1 else 1)

    monkeypatch.setitem(REWARDS, "Pendulum-v1", reward)
    failed = program(name, tiny(name, run_dir=run, **EVERY_STEP))
    line = sentence(failed.stderr)
    assert failed.returncode == 1 and "not finite" in line and ("step 30;" in line or "step 31;" in line)
    assert re.search("(td|critic|gradient|actor)_(loss|grad)", line), line
    assert checkpoint(run)["step"] == 29


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("network", ["actor", "critic"])
def test_what_the_last_update_of_a_run_breaks_is_not_saved(name, network, once, program, tmp_path):
    """Nothing comes after it: no action, no evaluation, no line of the log."""
    run, parts = tmp_path / "run", {}
    settings = dict(run_dir=run, eval_every=50)
    assert program(name, tiny(name, total_timesteps=59, **settings)).returncode == 0
    before = (run / NEWEST).read_bytes()
    once(0, common.run.Run, "steps", lambda run: parts.update(run.state))
    once(60, script(name), "polyak", lambda *args: poison(parts[network].net[0].weight, torch.inf))
    failed = program(name, tiny(name, resume=True, **settings))
    assert failed.returncode == 1 and "step 60;" in sentence(failed.stderr) and "step 59" in failed.stderr
    assert (run / NEWEST).read_bytes() == before


# --- odd surroundings ---------------------------------------------------------------------------------------
BARE = {"PATH": os.environ["PATH"], "LANG": "C", "LC_ALL": "C"}


@pytest.mark.parametrize("argv", [["--gamma", "1.5"], ["--run-dir", "/proc/nothing/run"], []], ids=str)
def test_bad_input_is_refused_without_asserts_and_surroundings(argv):
    """python -O drops them; no HOME, no DISPLAY, no TERM, no language, a working folder that is read-only."""
    settings = tiny("td3", **{} if argv else {"exp_name": "m\u00fcnchen"})
    refused = finished(["-O", ROOT / "td3.py", *settings, *argv], cwd="/proc", env=BARE)
    assert refused.returncode == 2 and refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert (argv or ["--run-dir"])[0] in sentence(refused.stderr)


def test_a_run_in_odd_surroundings_is_the_same_run(whole, tmp_path):
    argv = ["-O", ROOT / "td3.py", *tiny("td3", run_dir=tmp_path / "m\u00fcnchen \U0001f600", **NO_ORACLE)]
    odd = finished(argv, cwd="/proc", env=BARE)
    assert odd.returncode == 0, odd.stderr
    assert not differences(tmp_path / "m\u00fcnchen \U0001f600", whole("td3", **NO_ORACLE))
    again = finished([*argv, "--resume"], cwd="/proc", env=BARE)
    assert again.returncode == 0 and "finished" in again.stdout, again.stderr


# --- video --------------------------------------------------------------------------------------------------
def test_a_video_shows_an_episode(whole, tmp_path, capsys):
    video = tmp_path / "pendulum.gif"
    common.evaluate.main(common.evaluate.Args(str(whole("td3")), episodes=2, video=video))
    frames = imageio.v3.imread(video).astype(float)
    assert "an episode of 200 steps" in capsys.readouterr().out
    assert 90 <= len(frames) <= 110 and frames.shape[-1] == 3  # 30 a second are too many
    assert frames[0].std() > 5 and (abs(np.diff(frames, axis=0)).max((1, 2, 3)) > 50).all()


@pytest.mark.parametrize("video", ["video.mp4", "video", "nowhere/video.gif", "gif"])
def test_a_video_that_cannot_be_is_refused_first(video, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="--video"):
        common.evaluate.main(common.evaluate.Args("no run is needed to know", video=Path(video)))
    assert not list(tmp_path.iterdir())


def test_a_video_over_a_folder_is_refused_first(tmp_path):
    (tmp_path / "video.gif").mkdir()
    with pytest.raises(BadInput, match="--video .*video.gif"):
        common.evaluate.main(common.evaluate.Args("no run is needed", video=tmp_path / "video.gif"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_under_a_video(whole, tmp_path):
    """In its own process, as a writer that fails again when it is thrown away would print a traceback."""
    (tmp_path / "video.gif").symlink_to("/dev/full")
    argv = ["-m", "common.evaluate", whole("td3"), "--episodes", "2", "--video", tmp_path / "video.gif"]
    said = sentence(finished(argv, cwd=ROOT).stderr)
    assert "--video" in said and "No space left" in said


@pytest.mark.parametrize("error", [ImportError("no pygame"), RuntimeError("no\nEGL"), AttributeError()])
@pytest.mark.parametrize("method", ["render", "reset"])
def test_a_video_that_cannot_be_drawn(error, method, whole, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    def make_env(env_id, render_mode=None):
        env = common.envs.make_env(env_id)
        if render_mode:
            monkeypatch.setattr(env, method, fail)
        return env

    run = whole("td3")
    monkeypatch.setattr(common.film, "make_env", make_env)
    with pytest.raises(BadInput, match="--video: Pendulum-v1 cannot be drawn .*: install ") as refused:
        common.evaluate.main(common.evaluate.Args(str(run), video=tmp_path / "video.gif"))
    assert len(str(refused.value).splitlines()) == 1 and not list(tmp_path.iterdir())


class Undrawn(Planned):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return None


class DrawsAtFirst(Undrawn):
    pictures = 0

    def render(self):
        DrawsAtFirst.pictures += 1
        if DrawsAtFirst.pictures % 2 == 0:
            raise RuntimeError("GL context\nlost")
        return np.zeros((64, 64, 3), np.uint8)


class Grows(Undrawn):
    size = 64

    def render(self):
        Grows.size += 2
        return np.zeros((Grows.size, 64, 3), np.uint8)


@pytest.mark.parametrize("env", [
    Planned, Undrawn, DrawsAtFirst, Grows,
])  # fmt: skip
def test_an_environment_that_does_not_draw(env, register, tmp_path):
    run = train("td3", tmp_path / "run", env_id=register(env))
    with pytest.raises(BadInput, match="--video") as refused:
        common.evaluate.main(common.evaluate.Args(str(run), video=tmp_path / "video.gif"))
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "video.gif").exists()


def test_mujoco_draws_without_a_screen(monkeypatch, tmp_path):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    run = train("td3", tmp_path / "run", env_id="Hopper-v4", total_timesteps=0)
    video = tmp_path / "hopper.gif"
    try:
        common.evaluate.main(common.evaluate.Args(str(run), episodes=2, video=video))
    except BadInput as refused:
        pytest.skip(str(refused))
    frames = imageio.v3.imread(video).astype(float)
    assert len(frames) > 2 and frames[0].std() > 5 and abs(frames[-1] - frames[0]).max() > 50


# --- formats ------------------------------------------------------------------------------------------------
READER = """
import sys, torch
def look(part):
    if isinstance(part, dict):
        part = [*part, *part.values()]
    if type(part) in (list, tuple):
        for inner in part:
            look(inner)
    else:
        assert type(part) in (str, int, float, bool, type(None), torch.Tensor), type(part)
for path in sys.argv[1:]:
    state = torch.load(path, weights_only=True)
    look(state)
    print(state["step"], len(state))
"""


def test_a_checkpoint_is_plain_data_to_a_program_that_knows_nothing_of_ours(whole, tmp_path):
    runs = [whole(name) for name in SCRIPTS]
    read = finished(["-c", READER, *(run / NEWEST for run in runs)], cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    assert read.stdout.split("\n")[:-1] == [f"60 {len(checkpoint(run))}" for run in runs]


# --- the terminal, threads, flags, policies -----------------------------------------------------------------
@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_closed_pipe_ends_no_run(closed, whole, tmp_path):
    """python td3.py ... | head -1"""
    command = [sys.executable, str(ROOT / "td3.py"), *tiny("td3", run_dir=tmp_path / "run", **NO_ORACLE)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if closed == "both" else subprocess.PIPE}
    running = subprocess.Popen(command, cwd=tmp_path, text=True, **pipe)
    running.stdout.readline()
    running.stdout.close()
    said = running.stderr.read() if running.stderr else ""
    assert running.wait() == 0 and "Broken" not in said and "error" not in said
    assert not differences(tmp_path / "run", whole("td3", **NO_ORACLE))


def test_a_stream_that_was_never_open_ends_no_run(whole, tmp_path):
    """python td3.py ... >&-, as a daemon may start it. Without a stderr MuJoCo's glfw cannot be imported."""
    words = [sys.executable, ROOT / "td3.py", *tiny("td3", run_dir=tmp_path / "run", **NO_ORACLE)]
    command = f"{shlex.join(map(str, words))} >&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stderr
    assert not differences(tmp_path / "run", whole("td3", **NO_ORACLE))


def test_a_lost_terminal_saves_the_run(whole, tmp_path):
    command = [sys.executable, str(ROOT / "td3.py"), *tiny("td3", run_dir=tmp_path / "run", **NO_ORACLE)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    usual = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started with
    running = subprocess.Popen(command, cwd=tmp_path, preexec_fn=usual, **pipes)
    running.stdout.readline()
    running.send_signal(signal.SIGHUP)
    said = running.communicate()[1]
    assert running.returncode == 128 + signal.SIGHUP and "saved at step" in said
    train("td3", tmp_path / "run", resume=True, **NO_ORACLE)
    assert not differences(tmp_path / "run", whole("td3", **NO_ORACLE))


def test_a_terminal_that_is_gone_saves_the_run(whole, tmp_path):
    """The window is closed: SIGHUP comes, and nothing can be written there any more."""
    command = [sys.executable, str(ROOT / "td3.py"), *tiny("td3", run_dir=tmp_path / "run", **NO_ORACLE)]
    window, terminal = pty.openpty()
    usual = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    out = dict(stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=usual, cwd=tmp_path)
    running = subprocess.Popen(command, start_new_session=True, **out)
    os.close(terminal)
    while b"return" not in os.read(window, 1000):
        pass
    os.close(window)
    running.send_signal(signal.SIGHUP)
    assert running.wait(60) == 128 + signal.SIGHUP and (tmp_path / "run" / POLICY).exists()
    train("td3", tmp_path / "run", resume=True, **NO_ORACLE)
    assert not differences(tmp_path / "run", whole("td3", **NO_ORACLE))


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            seen = []
            patch.setattr(common.run.Run, "save", lambda run: seen.append(signal.getsignal(signal.SIGHUP)))
            train("td3", tmp_path / "run")
        assert set(seen) == {signal.SIG_IGN}
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_is_the_same_run(whole, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, "td3", tmp_path / "run").result()
    assert not differences(tmp_path / "run", whole("td3"))


def test_a_start_that_fails_leaves_no_run_that_refuses_the_next(monkeypatch, whole, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("td3", tmp_path / "run")
    train("td3", tmp_path / "run")
    assert not differences(tmp_path / "run", whole("td3"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_needs_no_flag_but_the_folder(name, program, whole, tmp_path):
    train(name, tmp_path / "run", total_timesteps=60)
    change(tmp_path / "run", step=60)
    args = json.loads((tmp_path / "run/args.json").read_text())
    refused = program(name, ["--run-dir", str(tmp_path / "run"), "--resume", "--gamma", "0.5"])
    assert refused.returncode == 2 and "--gamma 0.99 is now 0.5" in sentence(refused.stderr)
    more = ["--total-timesteps", "90", "--threads", "1", "--eval-every", "30"]
    assert program(name, ["--run-dir", str(tmp_path / "run"), "--resume", *more]).returncode == 0
    now = json.loads((tmp_path / "run/args.json").read_text())
    assert now["step"] == 90 and now["args"] == args["args"] | {
        "total_timesteps": 90, "eval_every": 30, "resume": True}  # fmt: skip
    assert same(stored(checkpoint(tmp_path / "run")), stored(checkpoint(whole(name, total_timesteps=90))))


def test_a_flag_that_a_script_has_got_since_then_takes_its_default(monkeypatch, tmp_path, capsys):
    """As when somebody adds --bonus to a copy of a script: its older runs can be used and go on."""
    td3 = script("td3")
    run = train("td3", tmp_path / "run", total_timesteps=40)
    wider = dataclasses.make_dataclass("Args", [("bonus", float, 0.5)], bases=(td3.Args,))
    wider.__module__ = td3.Args.__module__
    monkeypatch.setattr(inspect, "getfile", lambda cls: td3.__file__)
    assert load_run(run, wider)[0].bonus == 0.5
    args = parse_args(wider, td3.PRESETS, ["--run-dir", str(run), "--resume", "--total-timesteps", "60"])
    assert args.batch_size == 8
    td3.train(args)
    assert checkpoint(run)["step"] == 60 and checkpoint(run)["args"]["bonus"] == 0.5


def test_a_path_may_begin_with_the_home_directory(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train("td3", "~/runs/a", total_timesteps=0)
    assert (tmp_path / "runs/a/policy.pt").exists() and not (tmp_path / "~").exists()
    assert script("td3").load_policy("~/runs/a")(np.zeros((1, 3))).shape == (1, 1)
    common.evaluate.main(common.evaluate.Args("~/runs/a", episodes=2, video=Path("~/a.gif")))
    assert (tmp_path / "a.gif").exists()


def test_the_policy_of_the_best_evaluation_is_kept(monkeypatch, tmp_path, capsys):
    """The evaluations at 0, 20, 40 and 60 get -5, -1, -3 and -2."""
    returns, real = iter([-5.0, -1.0, -3.0, -2.0]), common.run.evaluate
    result = common.evaluate.Evaluation(np.zeros(1), np.ones(1), False, np.zeros((1, 3)))
    results = (dataclasses.replace(result, returns=np.array([value])) for value in returns)
    monkeypatch.setattr(common.run, "evaluate", lambda *args, **kwargs: next(results))
    run = train("td3", tmp_path / "run", total_timesteps=20)
    at_20 = checkpoint(run)["actor"]
    train("td3", run, resume=True, total_timesteps=60)
    best, last = (torch.load(run / name, weights_only=True) for name in (BEST, POLICY))
    assert same(best["actor"], at_20) and same(last["actor"], checkpoint(run)["actor"])
    assert best["step"] == 20 and last["step"] == 60 and not same(best["actor"], last["actor"])
    monkeypatch.setattr(common.run, "evaluate", real)
    obs = np.ones((2, 3), np.float32)
    assert (script("td3").load_policy(run / BEST)(obs) != script("td3").load_policy(run)(obs)).any()
    for best in (True, False):
        common.evaluate.main(common.evaluate.Args(str(run), episodes=2, best=best))
    said = re.findall(r"return (.*) over", capsys.readouterr().out)
    assert len(set(said)) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_policy_is_small_whatever_the_buffer_holds(name, tmp_path):
    run = train(name, tmp_path, buffer_size=5000)
    parts = set(torch.load(run / POLICY, weights_only=True))
    assert not {"env", "buffer", "real", "imagined", "critic_opt", "held_out"} & parts and "actor" in parts


@pytest.mark.parametrize("name, plan", [*((name, False) for name in SCRIPTS), ("maac_sac", True)])
def test_a_policy_takes_one_observation_or_many_of_any_kind(name, plan, whole):
    policy = script(name).load_policy(whole(name), plan=plan)
    for dtype in (np.float32, np.float64):
        assert policy(np.zeros((4, 3), dtype)).shape == (4, 1)
        one = policy(np.zeros(3, dtype))
        assert one.shape == (1,) and one.dtype == np.float32


@pytest.mark.parametrize("large", ["buffer_size", "batch_size"])
def test_too_little_memory_names_the_flag_that_is_large(large, program, tmp_path):
    settings = {"total_timesteps": 10**15, large: 10**13}  # a long run takes no memory
    failed = program("td3", tiny("td3", run_dir=tmp_path / "run", **settings))
    assert failed.returncode == 2 and f"--{large.replace('_', '-')} {10**13}" in sentence(failed.stderr)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000 bytes."),
])  # fmt: skip
@pytest.mark.parametrize("where", ["torch.load", "torch.nn.Module.load_state_dict"])
def test_a_good_checkpoint_is_not_blamed_for_a_full_memory(error, where, copied, monkeypatch, capsys):
    run = copied("td3", total_timesteps=30)
    monkeypatch.setattr(where, mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["td3.py", *tiny("td3", run_dir=run, resume=True)])
    module = script("td3")
    with pytest.raises(SystemExit) as end:
        main(module.train, module.Args, module.PRESETS)
    said = sentence(capsys.readouterr().err)
    assert end.value.code == 2 and "too little memory" in said and NEWEST not in said


@pytest.mark.parametrize("display", ["", ":17", None])
def test_mujoco_draws_whatever_display_says(display, tmp_path):
    """An empty one, one that is gone, none: EGL is tried before anybody is told to install it."""
    run = train("td3", tmp_path / "run", env_id="InvertedPendulum-v4", total_timesteps=0)
    drawing = ("DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER")
    surroundings = {name: value for name, value in os.environ.items() if name not in drawing}
    surroundings |= {} if display is None else {"DISPLAY": display}
    argv = ["-m", "common.evaluate", run, "--episodes", "2", "--video", tmp_path / "a.gif"]
    drawn = finished(argv, cwd=ROOT, env=surroundings)
    if not (tmp_path / "a.gif").exists():
        assert "EGL" in sentence(drawn.stderr)
