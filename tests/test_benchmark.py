"""Sweeps and figures: every run is its own process, what is done is skipped, what fails is said."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import common.benchmark
import common.plot
from common import BadInput
from common.benchmark import Job, finished, main, on_this_machine, why_failed
from tests.conftest import ROOT, checkpoint, tiny, train

FLAGS = [word for word in tiny("td3", total_timesteps=40) if word not in ("--env-id", "Pendulum-v1")]
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
    with pytest.raises(BadInput, match="--lam"):
        main(["--scripts", "dyna_td3", "--env-ids", "Pendulum-v1", "--seeds", "1", "--", *flags])


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


def test_one_failure_does_not_stop_the_others(capsys):
    Path("runs/Pendulum-v1/td3").mkdir(parents=True)
    Path("runs/Pendulum-v1/td3/seed-0").write_text("a file is in the way")
    assert main([*SWEEP, "--", *FLAGS]) == 1
    out = capsys.readouterr().out
    assert "3 runs done, 1 failed" in out and "--run-dir" in out
    assert steps("ContinuousCartPole-v1/td3/seed-1") == ["0", "20", "40"]


@pytest.mark.parametrize("argv, hint", [
    (["--scripts", "nope", "--env-ids", "Pendulum-v1"], "nope.py"),
    ([*SWEEP, "--", "--run-dir", "here"], "--exp-name"),
    ([*SWEEP, "--workers", "0"], "--workers 0"), ([*SWEEP, "--seeds", "0"], "--seeds 0"),
    (["--scripts", "td3", "--env-ids"], "--env-ids: name"),
    (["--scripts", "--env-ids", "Pendulum-v1"], "--scripts: name"),
    (["--scripts", "td3", "--env-ids", "Pendulm-v1"], "Pendulm-v1"),
    (["--scripts", "td3", "td3.py", *SWEEP[2:]], "td3 and td3 would share .*seed-0: name each once"),
    (["--scripts", "td3", "mage_td3", *SWEEP[2:], "--", "--exp-name", "x"], "td3 and mage_td3 .*--exp-name"),
    ([*SWEEP, "--", "--seed", "4"], "--seed after --"), ([*SWEEP, "--", "--seed=4"], "--seed after --"),
    ([*SWEEP, "--", "--env_id", "X"], "--env-id after --"), ([*SWEEP, "--", "--resume"], "--resume after --"),
    ([*SWEEP, "--", "--gamma", "2"], "--gamma 2"), ([*SWEEP, "--", "--batch-size", "0"], "--batch-size 0"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(argv, hint):
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

    monkeypatch.setattr(common.benchmark, "CPU_MAX", tmp_path / "cpu.max", raising=False)
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
    assert main([*SWEEP[:-1], "5", "--", *FLAGS, *flags]) == 0 and did["workers"] == workers
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
    assert main([*SWEEP, "--ray", "there:6379", "--", *FLAGS, *flags]) == 0
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


# --- figures ------------------------------------------------------------------------------------------------
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
    assert "| Hopper-v4 | b | 1 | 2 | 2 +- 0 at step 1000 |" == b


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


def test_curves_are_compared_where_all_seeds_are(capsys):
    args = common.plot.Args([])
    two = (([0, 10, 20], [0, 1, 2]), ([0, 10], [4, 6]))
    seeds = [[np.array(x, float) for x in (s, r, s)] for s, r in two]
    x, values = common.plot.together(seeds, args, "name")
    assert x.tolist() == [0, 10] and values.tolist() == [[0, 1], [4, 6]]
    assert capsys.readouterr().err == "name: drawn until step 10, where one seed ends, not 20\n"


def test_what_lies_in_different_folders_is_not_averaged(capsys):
    for folder, value in (("mine/runs", 1), ("reference", 5)):
        write(Path(folder, "Hopper-v4/a/seed-0/eval.csv"), [0, 1000], [0, value])
    write(Path("reference/Hopper-v4/b/seed-0/eval.csv"), [0, 1000], [0, 2])
    found = common.plot.read(["mine", "reference", "reference/Hopper-v4"])["Hopper-v4"]
    ends = {name: [values[-1] for _, values, _ in seeds] for name, seeds in found.items()}
    assert ends == {"mine/runs/a": [1], "reference/a": [5], "b": [2]}


def test_a_run_in_any_folder_is_known_by_its_arguments():
    for folder, seed in (("one", 0), ("two", 1)):
        write(Path(folder, "eval.csv"), [0, 1000], [0, seed])
        told = {"script": "mage_td3.py", "args": {"env_id": "mbbl/Ant-v0", "exp_name": None, "seed": seed}}
        Path(folder, "args.json").write_text(json.dumps(told))
    found = common.plot.read(["one", "two"])
    assert list(found) == ["mbbl_Ant-v0"] and len(found["mbbl_Ant-v0"]["mage_td3"]) == 2


def make_run(folder, script="td3.py", last=1, **changes):
    write(Path(folder, "eval.csv"), [0, 1000], [0, last])
    args = {"env_id": "Ant-v4", "exp_name": "a", "seed": 0, "lr": 0.1, "threads": 1} | changes
    Path(folder, "args.json").write_text(json.dumps({"script": script, "args": args}))


def test_what_has_other_settings_is_not_averaged():
    for number, changes in enumerate(({}, dict(seed=1, threads=2), dict(lr=0.2))):
        make_run(f"runs/{number}", last=number, **changes)
    make_run("runs/3", "mage_td3.py", last=3, lam=0.2)
    found = common.plot.read(["runs"])["Ant-v4"]
    ends = {name: [values[-1] for _, values, _ in seeds] for name, seeds in found.items()}
    assert ends == {"a, td3.py, lr 0.1": [0, 1], "a, td3.py, lr 0.2": [2], "a, mage_td3.py": [3]}


def test_a_seed_that_has_only_started_does_not_cut_the_others(capsys):
    write(Path("runs/Hopper-v4/a/seed-0/eval.csv"), [0, 1000], [0, 1])
    write(Path("runs/Hopper-v4/a/seed-1/eval.csv"), [0], [5])
    ((_, values, _),) = common.plot.read(["runs"])["Hopper-v4"]["a"]
    assert values.tolist() == [0, 1] and "seed-1/eval.csv: left out" in capsys.readouterr().err


def test_a_copy_without_the_published_curves_draws_its_own(monkeypatch):
    write(Path("runs/Hopper-v4/a/seed-0/eval.csv"), [0, 50_000], [0, 1])
    for there in (True, False):
        common.plot.main(common.plot.Args(["runs"], "figure.svg"))
        assert ("SAC, published" in Path("figure.svg").read_text()) is there
        monkeypatch.setattr(common.plot, "PUBLISHED", Path("nowhere.csv"))


def test_the_running_mean_looks_back_only():
    assert common.plot.smoothed(np.array([4.0, 2.0, 0.0, 6.0]), 2).tolist() == [4, 3, 1, 3]
    assert common.plot.smoothed(np.array([4.0, 2.0]), 25).tolist() == [4, 3]


def test_the_median_is_not_moved_by_one_seed():
    values = np.array([[1.0], [2.0], [3.0], [4.0], [1000.0]])
    line, (low, high) = common.plot.middle(values, "median")
    assert line == 3 and 1 <= low <= 2 and high > 4
    line, (low, high) = common.plot.middle(np.array([[1.0], [3.0]]), "mean")
    assert line == 2 and high - 2 == pytest.approx(12.71)


def test_curves_are_cut_smoothed_and_drawn_against_minutes():
    seeds = [[np.array(x, float) for x in ([0, 10, 20], [0, 2, 8], [0, 60, 120])]]
    x, values = common.plot.together(seeds, common.plot.Args([], last_step=10, smooth=2), "a")
    assert x.tolist() == [0, 10] and values.tolist() == [[0, 1]]
    x, values = common.plot.together(seeds, common.plot.Args([], time=True), "a")
    assert (x[0], x[-1]) == (0, 2) and values[0, [0, -1]].tolist() == [0, 8]
    np.testing.assert_allclose(values[0], np.where(x < 1, 2 * x, 6 * x - 4))


def test_intervals_are_of_95_percent():
    """Student's t from a printed table; for the median of nine, binomial: the second value has 3.0% below."""
    for n, t in ((2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042), (101, 1.984)):
        values = np.random.default_rng(n).normal(size=(n, 1))
        _, (low, high) = common.plot.middle(values, "mean")
        half = t * values.std(ddof=1) / np.sqrt(n)
        assert (high - low)[0] / 2 == pytest.approx(half, rel=0.015)
        assert (high + low)[0] / 2 == pytest.approx(values.mean())
    line, (low, high) = common.plot.middle(np.arange(1.0, 10)[:, None], "median")
    assert (line, low, high) == (5, 2, 8)


def test_the_table_takes_the_median_and_the_spread_where_the_mean_is_highest(capsys):
    for seed, returns in enumerate(([0, 6, 9], [0, 6, 9], [0, 18, 2])):
        write(Path(f"runs/Hopper-v4/a/seed-{seed}/eval.csv"), [0, 1000, 2000], returns)
    common.plot.main(common.plot.Args(["runs"], "figure.png", statistic="median"))
    *_, row = capsys.readouterr().out.splitlines()
    assert "| Hopper-v4 | a | 3 | 9 +- 3.5 | 10 +- 6.928 at step 1000 |" == row


def test_published_curves_are_of_the_same_environment():
    curves = common.plot.published("HalfCheetah-v4")
    assert {"SAC", "MBPO", "TD3, v1"} <= set(curves) and not common.plot.published("Pendulum-v1")
    step, value = curves["MBPO"]
    assert 4000 < value[step == 25000] < 6000  # 5042 +- 935 in its authors' figure


HEAD = "step,return_mean,seconds\n"


@pytest.mark.parametrize("text, changes, hint", [
    (None, dict(runs=["nowhere"]), "nowhere"),
    (HEAD + "0,1,2\n", dict(runs=["runs", "rnus"]), "rnus: no eval.csv"),
    (None, dict(runs=[]), "RUNS"),
    ("a,b\n1,2\n", {}, "seed-0.csv is not"),
    ("", {}, "seed-0.csv is not"),
    (HEAD + "0,1,2\n250,", {}, "seed-0.csv is not"),  # a line was cut
    (HEAD + "0,1,two\n", {}, "seed-0.csv is not"),
    ("\0\xff", {}, "seed-0.csv is not"),
    (HEAD + "0,1,2\n", dict(column="return_std"), "--column return_std"),
    ("step,return_mean,seconds,return_std\n0,1,2,\n", dict(column="return_std"), "--column return_std"),
    (HEAD + "0,1,2\n", {}, "no run there has two evaluations"),
    (HEAD + "0,-1,2\n9,-1,2\n", dict(log=True), "--log"),
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
