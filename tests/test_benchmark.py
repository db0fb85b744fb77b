"""Sweeps: every run is its own process, what is done is skipped, what fails is said."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from filelock import FileLock

import common.benchmark
import common.machine
from common import BadInput
from common.args import parse_args
from common.benchmark import Job, finished, main, on_this_machine, plan, why_failed
from common.files import digests
from tests.conftest import ROOT, checkpoint, script, tiny, train

FLAGS = [word for word in tiny("td3", total_timesteps=40) if word not in ("--env-id", "Pendulum-v1")]
AUTO = ["--device", "auto"]  # as where nothing is said of it
SWEEP = ["--scripts", "td3", "--env-ids", "Pendulum-v1", "ContinuousCartPole-v1", "--seeds", "2"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def steps(run):
    return [row["step"] for row in csv.DictReader(Path("runs", run, "eval.csv").open(newline=""))]


def test_a_sweep_runs_everything_once(capsys):
    assert main([*SWEEP, "--workers", "2", "--", *FLAGS]) == 0
    environments = ("Pendulum-v1", "ContinuousCartPole-v1")
    runs = [f"{env_id}/td3/seed-{seed}" for env_id in environments for seed in (0, 1)]
    for run in runs:
        args = json.loads(Path("runs", run, "args.json").read_text())["args"]
        assert steps(run) == ["0", "20", "40"] and args["actor_hidden"] == 8
        assert (args["env_id"].split("/")[-1], args["seed"]) == (run.split("/")[0], int(run[-1]))
        assert Path(f"runs/{run}.log").read_text().count("return") >= 3
    assert "4 runs done, 0 failed" in capsys.readouterr().out
    times = {run: Path("runs", run, "checkpoint.pt").stat().st_mtime_ns for run in runs}
    assert main([*SWEEP, "--", *FLAGS]) == 0
    assert "4 of them finished before" in capsys.readouterr().out
    assert times == {run: Path("runs", run, "checkpoint.pt").stat().st_mtime_ns for run in runs}


def test_a_longer_sweep_goes_on_and_other_settings_are_refused():
    one = ["--scripts", "td3", "--env-ids", "Pendulum-v1", "--seeds", "1", "--", *FLAGS]
    assert main(one) == 0
    assert main([*one, "--total-timesteps", "60"]) == 0
    assert steps("Pendulum-v1/td3/seed-0") == ["0", "20", "40", "60"]
    for where in ([], ["--ray", "local"]):
        with pytest.raises(BadInput, match="--lr"):
            main([*one[:6], *where, *one[6:], "--total-timesteps", "60", "--lr", "0.5"])
    with pytest.raises(BadInput, match="without --ray"):
        main([*one[:6], "--ray", "local", *one[6:], "--total-timesteps", "80"])
    assert checkpoint("runs/Pendulum-v1/td3/seed-0")["step"] == 60


def test_a_finished_run_of_another_script_is_not_taken_for_this_one():
    train("mage_td3", "runs/Pendulum-v1/x/seed-0", total_timesteps=0, exp_name="x")
    flags = [*tiny("dyna_td3", total_timesteps=0)[2:], "--exp-name", "x"]
    with pytest.raises(BadInput, match="a run of mage_td3.py, not dyna_td3.py: give another --exp-name"):
        main(["--scripts", "dyna_td3", "--env-ids", "Pendulum-v1", "--seeds", "1", "--", *flags])
    told = json.loads(Path("runs/Pendulum-v1/x/seed-0/args.json").read_text())
    with pytest.raises(BadInput, match="a run of mage_td3.py, not mine.py"):  # whose settings are the same
        finished(Job("mine", [], "runs/Pendulum-v1/x/seed-0", told["args"]), on_cluster=False)


@pytest.mark.parametrize("text", ["", "[]", '{"script": "td3.py", "step": 0}', '{"args": {}, "step": 0}'])
def test_a_damaged_run_is_named(text):
    Path("run").mkdir()
    Path("run/args.json").write_text(text)
    with pytest.raises(BadInput, match="args.json is damaged.* --exp-name"):
        finished(Job("td3", [], "run", {}), on_cluster=False)


def test_a_flag_that_a_script_has_got_since_then_was_at_its_default():
    train("td3", "run", total_timesteps=0)
    told = json.loads(Path("run/args.json").read_text())
    settings = told["args"].copy()
    default = next(f.default for f in dataclasses.fields(script("td3").Args) if f.name == "gamma")
    assert told["args"].pop("gamma") == default
    Path("run/args.json").write_text(json.dumps(told))
    assert finished(Job("td3", [], "run", settings), on_cluster=False)
    with pytest.raises(BadInput, match=r"other settings \(--gamma\)"):
        finished(Job("td3", [], "run", settings | {"gamma": 0.5}), on_cluster=False)


def test_a_sweep_gives_a_run_all_that_it_has_planned():
    """What it does not say on the command line would come from the run's folder, of an earlier sweep."""
    folder, argv = "runs/Pendulum-v1/td3/seed-0", tiny("td3")
    argv = [word for i, word in enumerate(argv) if "--total-timesteps" not in argv[max(i - 1, 0) : i + 1]]
    for total in (20, 40):
        told = parse_args(script("td3").Args, script("td3").PRESETS, [*argv, "--total-timesteps", str(total)])
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        job = Job("td3", argv, folder, dataclasses.asdict(told))
        process, begin = common.benchmark.start(job, folder, "log")
        assert why_failed(process, begin, "log") is None
        assert checkpoint(folder)["step"] == total


def test_a_sweep_takes_no_single_gpu(machine):
    machine(cores=4, gpus=2)
    with pytest.raises(BadInput, match="--device cuda:1 after --: give cuda.*CUDA_VISIBLE_DEVICES"):
        main([*SWEEP, "--", *FLAGS, "--device", "cuda:1"])


def test_settings_that_json_changes_are_still_the_same():
    train("td3", "run", total_timesteps=0)
    told = json.loads(Path("run/args.json").read_text())
    job = Job("td3", [], "run", told["args"] | {"widths": (1, 2)})
    told["args"]["widths"] = [1, 2]
    Path("run/args.json").write_text(json.dumps(told))
    assert finished(job, on_cluster=False)


def test_a_run_in_use_is_named_and_its_log_kept(capsys):
    run = Path("runs/Pendulum-v1/td3/seed-0")
    run.mkdir(parents=True)
    log, before = Path(f"{run}.log"), "error: of yesterday\n 50%|#####     | 30/60"
    log.write_text(before)
    with FileLock(run / "lock"):
        assert main([*SWEEP[:4], "--seeds", "1", "--", *FLAGS]) == 1
    assert re.search(r"failed  \S+  error: \S+ is in use by another process.* \(exit code 2\)",
                     capsys.readouterr().out)  # fmt: skip
    assert log.read_text().startswith(before) and "td3.py --env-id" in log.read_text()


@pytest.mark.parametrize("said, reason", [
    (b"step 20\n\r 50%|##  | 30/60error: no space.\n\r 51%|##  | 31/60", "error: no space."),
    (b"Traceback\nKeyError: 3\n\n", "KeyError: 3"), (b"\r 50%|##  |\r 51%|##  |", " 51%|##  |"), (b"", ""),
])  # fmt: skip
def test_a_failure_is_said_in_the_words_of_the_run(said, reason):
    before = b"error: of another run\n"
    Path("log").write_bytes(before + said)
    process = subprocess.Popen([sys.executable, "-c", "exit(3)"])
    assert why_failed(process, len(before), "log") == f"{reason} (exit code 3)"


def test_each_script_of_a_sweep_may_have_its_own_name():
    argv = ["--scripts", "td3", "mage_td3", *SWEEP[2:4], "--seeds", "1"]
    jobs = plan(tyro.cli(common.benchmark.Args, args=argv), ["--exp-name", "{script}-b", *FLAGS])
    assert [Path(job.folder).parts[-2] for job in jobs] == ["td3-b", "mage_td3-b"]


def test_a_finished_run_of_another_code_is_said(capsys):
    Path("run").mkdir()
    job = Job("td3", [], "run", dataclasses.asdict(script("td3").Args()) | dict(total_timesteps=20))
    another = {"td3.py": "0"}, "run is of another td3.py than today"
    for code, said in ((digests(ROOT / "td3.py"), ""), another):
        told = dict(script="td3.py", args=job.settings, step=20, starts=[{"code": code}])
        Path("run/args.json").write_text(json.dumps(told))
        assert finished(job, on_cluster=False)
        assert said in (stderr := capsys.readouterr().err) and bool(said) == bool(stderr)


def test_one_failure_does_not_stop_the_others(capsys):
    Path("runs/Pendulum-v1/td3").mkdir(parents=True)
    Path("runs/Pendulum-v1/td3/seed-0").write_text("a file is in the way")
    assert main([*SWEEP, "--", *FLAGS]) == 1
    out = capsys.readouterr().out
    assert "3 runs done, 1 failed" in out and "--run-dir" in out
    assert steps("ContinuousCartPole-v1/td3/seed-1") == ["0", "20", "40"]


def test_a_folder_that_cannot_be_made_fails_its_runs_alone(capsys):
    Path("runs/Pendulum-v1").parent.mkdir()
    Path("runs/Pendulum-v1").write_text("a file is in the way")
    assert main([*SWEEP, "--", *FLAGS]) == 1
    out = capsys.readouterr().out
    assert "2 runs done, 2 failed" in out and "cannot be written (Not a directory)" in out
    assert steps("ContinuousCartPole-v1/td3/seed-1") == ["0", "20", "40"]


@pytest.mark.parametrize("argv, hint", [
    (["--scripts", "nope", "--env-ids", "Pendulum-v1"], "nope.py"),
    ([*SWEEP, "--", "--run-dir", "here"], "--exp-name"),
    ([*SWEEP, "--workers", "0"], "--workers 0"), ([*SWEEP, "--seeds", "0"], "--seeds 0"),
    (["--scripts", "td3", "--env-ids"], "--env-ids: name"),
    (["--scripts", "--env-ids", "Pendulum-v1"], "--scripts: name"),
    (["--scripts", "td3", "--env-ids", "Pendulm-v1"], "Pendulm-v1"),
    (["--scripts", "td3", "td3.py", *SWEEP[2:]], "td3 and td3 would share .*seed-0: name each once"),
    (["--scripts", "td3", "mage_td3", *SWEEP[2:], "--", "--exp-name", "x"], "td3 and mage_td3 .*{script}"),
    (["--scripts", "dull", *SWEEP[2:]], "--scripts dull: it has no Args"),
    (["--scripts", "td3.v2", *SWEEP[2:]], "--scripts td3.v2: .*a dot in its name: rename it"),
    ([*SWEEP, "--", "--seed", "4"], "--seed after --"), ([*SWEEP, "--", "--seed=4"], "--seed after --"),
    ([*SWEEP, "--", "--env_id", "X"], "--env-id after --"), ([*SWEEP, "--", "--resume"], "--resume after --"),
    ([*SWEEP, "--", "--gamma", "2"], "--gamma 2"), ([*SWEEP, "--", "--batch-size", "0"], "--batch-size 0"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(argv, hint, monkeypatch, tmp_path):
    (folder := tmp_path / "scripts").mkdir()
    for path in ROOT.glob("*.py"):
        (folder / path.name).symlink_to(path)
    (folder / "dull.py").write_text("print('no script that trains')")
    (folder / "td3.v2.py").write_text((ROOT / "td3.py").read_text())
    monkeypatch.setattr(common.benchmark, "ROOT", folder)
    with pytest.raises(BadInput, match=hint) as refused:
        main(argv)
    assert len(str(refused.value).splitlines()) == 1 and not Path("runs").exists()


def test_a_cluster_that_does_not_answer(monkeypatch):
    ray = pytest.importorskip("ray")

    def init(*args, **kwargs):
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(BadInput, match="--ray nowhere:6379: no cluster answers"):
        main([*SWEEP, "--ray", "nowhere:6379", "--", *FLAGS])
    assert not Path("runs").exists()


@pytest.mark.parametrize("argv, program", [
    ([*SWEEP, "--", "--horizont", "3"], "td3.py"), ([*SWEEP, "--sedes", "3"], "python -m common.benchmark"),
])  # fmt: skip
def test_a_flag_that_does_not_exist_is_refused(argv, program, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert f" {program} --help" in capsys.readouterr().err
    assert stop.value.code == 2 and not Path("runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_sweep_that_is_stopped_goes_on(number):
    """The signal reaches the sweep alone. It lets the run save and end, and starts no other one."""
    flags = [*FLAGS, "--total-timesteps", "1500", "--eval-every", "500", "--learning-starts", "1400"]
    sweep = ["--scripts", "td3", "--env-ids", "Pendulum-v1", "--workers", "1", "--seeds"]
    command = [sys.executable, "-m", "common.benchmark", *sweep, "2", "--", *flags]
    run = Path("runs/Pendulum-v1/td3/seed-0")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (run / "eval.csv").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    assert stderr.endswith("stopped: 0 of 2 runs finished; the same command goes on\n")
    assert checkpoint(run)["step"] < 1500 and not run.with_name("seed-1").exists()
    assert main([*sweep, "1", "--", *flags]) == 0
    assert steps("Pendulum-v1/td3/seed-0") == ["0", "500", "1000", "1500"]


# --- the surroundings of a run ------------------------------------------------------------------------------
MINE = """
import gymnasium as gym
import numpy as np

class Base(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    start = np.loadtxt("start.txt", dtype="float32")

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.start, {}

    def step(self, action):
        return self.start, 1.0, False, False, {}

gym.register("Base-v0", Base, max_episode_steps=5)
"""


def test_what_the_check_finds_in_the_current_folder_the_run_finds_too():
    """Modules, and files under relative names; but the scripts are those beside common/, for both."""
    Path("here").mkdir()
    Path("here/mine.py").write_text(MINE)
    Path("here/start.txt").write_text("0.5 -0.5")
    Path("here/td3.py").write_text("raise SystemExit('the script of the current folder was taken')")
    sweep = ["--scripts", "td3", "--env-ids", "mine:Base-v0", "--seeds", "1", "--", *FLAGS]
    command = [sys.executable, "-m", "common.benchmark", *sweep]
    how = dict(cwd="here", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = csv.DictReader(Path("here/runs/mine:Base-v0/td3/seed-0/eval.csv").open(newline=""))
    assert [float(row["return_mean"]) for row in rows] == [5, 5, 5]


class Cluster:
    """Stands for the module ray: it keeps what it was asked for, and every run ends well."""

    def __init__(self, *machines):
        self.machines, self.asked, self.exceptions = machines, [], type("", (), {"RayError": RuntimeError})

    def init(self, address, **how):
        self.begun = how

    def nodes(self):
        return [{"Alive": True, "Resources": resources} for resources in self.machines]

    def remote(self, task):
        return self

    def options(self, **how):
        self.asked.append((how["num_cpus"], how["num_gpus"]))
        return type("", (), {"remote": staticmethod(lambda job: job.folder)})

    def wait(self, waiting):
        return waiting[:1], waiting[1:]

    def get(self, folder):
        return None, {}

    def shutdown(self):
        pass


def test_a_module_that_a_cluster_does_not_see_is_refused(monkeypatch, tmp_path):
    """One in the current folder does not go there; one that is found elsewhere may be installed there too."""
    monkeypatch.setitem(sys.modules, "ray", Cluster({"CPU": 1.0}))
    Path("start.txt").write_text("0.5 -0.5")
    Path("packed").mkdir()
    Path("packed/__init__.py").write_text(MINE.replace("Base", "Packed"))
    Path("elsewhere").mkdir()
    Path("alone.py").write_text(MINE.replace("Base", "Alone"))
    Path("elsewhere/installed.py").write_text(MINE.replace("Base", "Installed"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    sweep = ["--scripts", "td3", "--seeds", "1", "--ray", "there:6379", "--env-ids"]
    for env_id in ("packed:Packed-v0", "alone:Alone-v0"):
        with pytest.raises(BadInput, match=f"--env-ids {env_id}: the module .* put it beside common/"):
            main([*sweep, env_id, "--", *FLAGS])
    assert main([*sweep, "installed:Installed-v0", "--", *FLAGS]) == 0


# --- how many runs at a time --------------------------------------------------------------------------------
@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes this machine look as if it had so many cores and GPUs -> {what a sweep did}."""
    did = {"environments": []}

    class Process:
        """It runs until the sweep asks for the second time."""

        def __init__(self, command, env, **how):
            did["environments"].append(env)
            self.polls = 0

        def poll(self):
            self.polls += 1
            return None if self.polls == 1 else 0

        wait = poll

    def look(cores, gpus=0):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(os, "process_cpu_count", lambda: cores, raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr(subprocess, "Popen", Process)
        monkeypatch.setattr(common.benchmark, "on_this_machine", spy)
        return did

    def spy(jobs, workers, signals):
        did["workers"] = workers
        return on_this_machine(jobs, workers, signals)

    monkeypatch.setattr(common.machine, "CPU_MAX", tmp_path / "cpu.max", raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return look


@pytest.mark.parametrize("flags, slurm, quota, workers", [
    ([], None, None, 6), (["--threads", "2"], None, None, 3), (["--threads", "4"], None, None, 1),
    (["--threads", "40"], None, None, 1), ([], "2", None, 2), ([], "40", None, 6),
    ([], None, "max 100000", 6), ([], None, "350000 100000", 3), ([], None, "50000 100000", 1),
])  # fmt: skip
def test_as_many_runs_go_at_a_time_as_this_process_may_use(
    machine, monkeypatch, flags, slurm, quota, workers
):
    did = machine(cores=6)
    if slurm:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    if quota:
        Path("cpu.max").write_text(f"{quota}\n")
    assert main([*SWEEP, "--", *FLAGS, *flags]) == 0 and did["workers"] == workers
    threads = flags[-1] if flags else "1"
    assert [env["OMP_NUM_THREADS"] for env in did["environments"]] == [threads] * 4


def test_a_number_of_cores_that_is_none_is_refused_where_it_is_needed(machine, monkeypatch):
    did = machine(cores=6)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "four")
    with pytest.raises(BadInput, match="SLURM_CPUS_PER_TASK=four is no number: unset it, or give --workers."):
        main([*SWEEP, "--", *FLAGS])
    assert not Path("runs").exists()
    assert main([*SWEEP, "--workers", "5", "--", *FLAGS]) == 0 and did["workers"] == 5


@pytest.mark.parametrize("gpus, flags, visible, workers, given", [
    (1, [], None, 4, "0000000000"), (2, [], None, 8, "0101010101"), (2, [], "7,3", 8, "7373737373"),
    (1, ["--device", "cuda"], None, 4, "0000000000"), (1, ["--threads", "32"], None, 2, "0000000000"),
    (1, ["--device", "cpu"], None, 64, None), (0, [], None, 64, None),
])  # fmt: skip
def test_runs_share_the_gpus_that_there_are(machine, monkeypatch, gpus, flags, visible, workers, given):
    did = machine(cores=64, gpus=gpus)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert main([*SWEEP[:-1], "5", "--", *FLAGS, *AUTO, *flags]) == 0 and did["workers"] == workers
    found = [env.get("CUDA_VISIBLE_DEVICES") for env in did["environments"]]
    assert found == (list(given) if given else [None] * 10)


@pytest.mark.parametrize("machines, flags, asked, said", [
    ([{"CPU": 8.0}], [], (1, 0), ""), ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], [], (1, 0.25), ""),
    ([{"CPU": 8.0, "GPU": 1.0}], ["--device", "cpu"], (1, 0), ""),
    ([{"CPU": 8.0, "GPU": 1.0}], ["--device", "cuda", "--threads", "4"], (4, 0.25), ""),
    ([{"CPU": 8.0}], ["--device", "cuda"], (1, 0.25), "no node has room for --threads 1 and a GPU; the runs"),
    ([{"CPU": 2.0}], ["--threads", "4"], (4, 0), "no node has room for --threads 4; the runs wait"),
])  # fmt: skip
def test_a_run_asks_a_cluster_for_its_threads_and_its_share_of_a_gpu(
    machine, monkeypatch, capsys, machines, flags, asked, said
):
    """This machine has no GPU, which is of no matter. What nobody has is waited for, and that is said."""
    machine(cores=6)
    monkeypatch.setitem(sys.modules, "ray", ray := Cluster(*machines))
    assert main([*SWEEP, "--ray", "there:6379", "--", *FLAGS, *AUTO, *flags]) == 0
    assert ray.asked == [asked] and "num_cpus" not in ray.begun
    err = capsys.readouterr().err
    assert said in err and ("--ray there:6379: " in err) == bool(said)


def test_a_cluster_on_this_machine_has_its_cores(machine, monkeypatch):
    machine(cores=6)
    monkeypatch.setitem(sys.modules, "ray", ray := Cluster({"CPU": 6.0}))
    for threads, cores in (("2", 6), ("8", 8)):  # at least one run must fit
        assert main([*SWEEP, "--ray", "local", "--", *FLAGS, "--threads", threads]) == 0
        assert ray.begun["num_cpus"] == cores
    with pytest.raises(BadInput, match="--device cuda"):
        main([*SWEEP, "--ray", "local", "--", *FLAGS, "--device", "cuda"])


def test_a_sweep_on_ray(capsys):
    """On a cluster of one machine, which has its own code; the files come back and are found again."""
    pytest.importorskip("ray")
    sweep = ["--scripts", "td3", "--env-ids", "Pendulum-v1", "--seeds", "2", "--ray", "local", "--", *FLAGS]
    command = [sys.executable, "-m", "common.benchmark", *sweep]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for seed in range(2):
        assert str(ROOT) not in Path(f"runs/Pendulum-v1/td3/seed-{seed}.log").read_text()
        assert steps(f"Pendulum-v1/td3/seed-{seed}") == ["0", "20", "40"]
        run = Path(f"runs/Pendulum-v1/td3/seed-{seed}")
        assert json.loads((run / "args.json").read_text())["args"]["seed"] == seed
        assert (run / "train.csv").exists() and not (run / "checkpoint.pt").exists()
    capsys.readouterr()
    assert main(sweep) == 0 and "2 of them finished before" in capsys.readouterr().out
