"""Sweeps: every script on every environment with every seed, each run a process of its own.

    python -m common.benchmark --scripts td3 mage_td3 --env-ids Pendulum-v1 --seeds 5 -- --preset laptop

What stands after `--` goes to every script; the word {script} in it becomes the script's name, so that
`--exp-name {script}-b` gives each its own. Several values of a flag are several sweeps:

    for lam in 0.05 0.2; do
        python -m common.benchmark --scripts mage_td3 --env-ids Pendulum-v1 -- --lam $lam --exp-name lam-$lam
    done

Runs that are finished are skipped, interrupted ones go on: the same command may be given again at any time.
The output of a run is in its folder's name with .log at the end. SIGINT (Ctrl-C) and SIGTERM let the runs
save and end; the second one ends them at once. As many runs go at a time as this process may use cores, less
with more --threads, and on a GPU at most four. A run starts in the folder that you are in and finds the
modules there, as `--env-ids mine:Point-v0` needs.

With --ray the runs go to a Ray cluster (`pip install ray`; "local" starts one here), where they write into a
folder of their own, and their CSV files and args.json come back here. A machine of the cluster sees what lies
beside common/ here (but for .git, runs and tests) and what is installed there, and nothing else. A run asks
for as many cores as it has threads, and for a quarter of a GPU with --device cuda; with --device auto, if the
cluster has a GPU when the sweep starts.
"""

import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro
from tqdm import tqdm

from common import BadInput, say
from common.args import MAY_CHANGE, changed, check, flag, flag_of, one_sentence, parse_args, stop_signals
from common.envs import close, make_env
from common.files import digests, newest, read_run, run_folder
from common.machine import RUNS_PER_GPU, at_a_time, cores, gpus

ROOT = Path(__file__).resolve().parent.parent
COME_BACK = ("args.json", "eval.csv", "train.csv")
OURS = ("--env-id", "--seed", "--run-dir", "--resume", "--no-resume")  # a sweep sets them for each run


@dataclass
class Args:
    scripts: list[str]  # Name td3, dyna_td3, mage_td3, maac_sac, or your own beside them.
    env_ids: list[str]  # Every script runs on each of these environments.
    seeds: int = 5  # Each of them has this many seeds, from 0 on.
    workers: int | None = None  # So many runs go at a time, by default one a core, or four on a GPU.
    ray: str | None = None  # The runs go to the Ray cluster at this address; "local" starts one here.


@dataclass
class Job:
    """One run: its command line and where it goes. Plain data, for it travels."""

    script: str
    argv: list[str]
    folder: str
    settings: dict


def plan(args, flags):
    """The runs of a sweep. BadInput, or tyro's message, if one of them could not start."""
    for name, what in (("scripts", "script"), ("env_ids", "environment")):
        if not getattr(args, name):
            raise BadInput(f"{flag(name)}: name at least one {what}.")
    for name in ("seeds", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least 1.")
    for name in map(flag_of, flags):
        if name in OURS:
            raise BadInput(f"{name} after --: leave it out, it comes from --env-ids, --seeds and --exp-name.")
    scripts = [script.removesuffix(".py") for script in args.scripts]
    for script in scripts:
        if f"{script}.py" not in os.listdir(ROOT):
            raise BadInput(f"--scripts {script}: there is no {script}.py beside common/.")
        if "." in script:
            raise BadInput(f"--scripts {script}: Python imports no file with a dot in its name: rename it.")
    # A run looks there first; the folder that we are in may have a td3.py too.
    sys.path[:] = dict.fromkeys([str(ROOT), *sys.path])
    modules = [importlib.import_module(script) for script in scripts]
    for module in modules:
        if not all(hasattr(module, name) for name in ("Args", "PRESETS", "train")):
            lacks = "it has no Args, PRESETS and train, as td3.py has them"
            raise BadInput(f"--scripts {module.__name__}: {lacks}: name scripts that train.")
    for env_id in args.env_ids:
        close(env_id, make_env(env_id))
        if args.ray:
            check_that_it_travels(env_id)
    jobs, remarks = {}, []
    for module, env_id, seed in itertools.product(modules, args.env_ids, range(args.seeds)):
        script = module.__name__
        own = [word.replace("{script}", script) for word in flags]
        argv = ["--env-id", env_id, "--seed", str(seed), *own]
        chosen = parse_args(module.Args, module.PRESETS, argv)
        if ":" in chosen.device:
            raise BadInput(f"--device {chosen.device} after --: give cuda; a sweep spreads its runs over the "
                           "GPUs that CUDA_VISIBLE_DEVICES names, or over all.")  # fmt: skip
        # Another machine may have the GPU that is missing here.
        check(chosen if args.ray in (None, "local") else replace(chosen, device="auto"))
        folder = run_folder(chosen, script)
        if folder in jobs:
            other = jobs[folder].script
            fix = "name each once in --scripts and --env-ids"
            fix = fix if script == other else "leave --exp-name out, or write {script} in it"
            raise BadInput(f"{other} and {script} would share {folder}: {fix}.")
        remarks += [remark for remark in chosen.remarks if remark not in remarks]
        jobs[folder] = Job(script, argv, str(folder.absolute()), asdict(chosen))
    for remark in remarks:
        say(remark)
    return list(jobs.values())


def check_that_it_travels(env_id):
    """BadInput if the module of an environment is in the current folder alone, which no cluster gets."""
    name, here = env_id.rpartition(":")[0].split(".")[0], Path.cwd()
    if name and (spec := sys.modules[name].__spec__):
        folders = [Path(path).parent for path in spec.submodule_search_locations or [spec.origin or ""]]
        if here in folders and ROOT not in folders:
            why = f"the module {name} is in {here}, which the machines of a cluster do not see"
            raise BadInput(f"--ray with --env-ids {env_id}: {why}: put it beside common/.")


def finished(job, on_cluster):
    """Whether a run has come to its end. BadInput if its folder holds another one."""
    if not Path(job.folder, "args.json").exists():
        return False
    run, script = read_run(job.folder), f"{job.script}.py"
    if run["script"] != script:
        raise BadInput(f"{job.folder} holds a run of {run['script']}, not {script}: give another --exp-name.")
    if others := changed(run["args"], job.settings, importlib.import_module(job.script).Args):
        names = ", ".join(map(flag, others))
        raise BadInput(f"{job.folder} holds a run with other settings ({names}): give another --exp-name.")
    done = run["step"] >= job.settings["total_timesteps"]
    made = run.get("starts", [{}])[-1].get("code", {}).get(script)
    if made not in (None, digests(ROOT / script)[script]):
        say(f"{job.folder} is of another {script} than today's: another --exp-name makes a new run.")
    if on_cluster and not done and newest(job.folder):
        raise BadInput(f"{job.folder} holds a run of this machine: finish it without --ray.")
    return done


def start(job, folder, log, gpu=None):
    """Starts a job's script, its run in `folder`: -> its process, and where in the log its output begins."""
    command = [sys.executable, str(ROOT / f"{job.script}.py"), *job.argv, "--run-dir", folder, "--resume"]
    # On resume a flag that is not given is as the run has it. This sweep may have planned something else.
    given = {*OURS, "--exp-name", *map(flag_of, job.argv)}
    for name in [name for name in MAY_CHANGE if name in job.settings and flag(name) not in given]:
        command += [flag(name), str(job.settings[name])]
    # The check found the modules of environments in the current folder too: `python -m` looks there.
    path = filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])
    own = {"OMP_NUM_THREADS": str(job.settings["threads"]), "PYTHONPATH": os.pathsep.join(path)}
    own |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    # In a session of its own a run does not get Ctrl-C twice, from the terminal and from here.
    how = dict(env=os.environ | own, start_new_session=True)
    with open(log, "ab", buffering=0) as out:  # another process may have the run, and write there
        out.write(os.fsencode(f"\n{shlex.join(command)}\n"))
        begin = out.tell()
        return subprocess.Popen(command, stdout=out, stderr=out, **how), begin


def why_failed(process, begin, log):
    """Waits for a process to end: -> None, or its last sentence that begins with "error:", or last line."""
    if code := process.wait():
        said = Path(log).read_bytes()[begin:].decode(errors="replace")
        lines = re.findall(r"error: [^\r\n]+", said) or said.splitlines()  # which splits a progress bar too
        return next((line for line in reversed(lines) if line.strip()), "") + f" (exit code {code})"


def elsewhere(job):
    """On a machine of the cluster: -> why it failed or None, {file name: contents}."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        failure = why_failed(*start(job, str(run), log), log)
        names = [name for name in (*COME_BACK, f"{job.script}.py") if (run / name).exists()]
        files = {name: (run / name).read_bytes() for name in names}
        return failure, files | {"log": log.read_bytes()}


def on_this_machine(jobs, workers, signals):
    """Yields (job, why it failed or None) as they end. Signals go to the list, and to the runs as SIGTERM."""
    waiting, running, passed_on, devices = list(jobs), {}, 0, gpus(jobs)
    before = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in stop_signals()}
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < workers and not signals:
                job = waiting.pop(0)
                gpu = min(devices, key=[used for *_, used in running.values()].count, default=None)
                try:
                    Path(job.folder).parent.mkdir(parents=True, exist_ok=True)
                    process, begin = start(job, job.folder, f"{job.folder}.log", gpu)
                except OSError as error:
                    yield job, f"{error.filename or job.folder} cannot be written ({error.strerror})"
                    continue
                running[process] = job, begin, gpu
            if len(signals) > passed_on:
                passed_on = len(signals)
                for process in running:
                    process.terminate()
            for process in [process for process in running if process.poll() is not None]:
                job, begin, _ = running.pop(process)
                yield job, why_failed(process, begin, f"{job.folder}.log")
            time.sleep(0.05)
    finally:
        for process in running:  # an error ended the sweep: they would go on alone
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)


def on_ray(jobs, address):
    """Yields (job, why it failed or None) as they end; writes what came back."""
    try:
        import ray
    except ImportError:
        raise BadInput("--ray: Ray is not installed: pip install ray.") from None
    from common.benchmark import elsewhere  # which is looked up there; __main__ would bring our ROOT along

    code = {"working_dir": str(ROOT), "excludes": [".git", "runs", "tests"]}
    threads = max(job.settings["threads"] for job in jobs)
    devices = {job.settings["device"] for job in jobs}
    own = dict(num_cpus=max(cores(), threads)) if address == "local" else {}  # not all that the machine has
    try:
        ray.init(address, runtime_env=code, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"--ray {address}: no cluster answers there ({error}).") from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = "cuda" in devices or ("auto" in devices and any(has.get("GPU") for has in machines))
    share = 1 / RUNS_PER_GPU if gpu else 0
    if not any(has.get("CPU", 0) >= threads and has.get("GPU", 0) >= share for has in machines):
        say(f"--ray {address}: no node has room for --threads {threads}{' and a GPU' * gpu}; the runs wait.")
    remote = ray.remote(elsewhere).options(num_cpus=threads, num_gpus=share, max_retries=2)
    waiting = {remote.remote(job): job for job in jobs}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        job = waiting.pop(done)
        try:
            failure, files = ray.get(done)
        except ray.exceptions.RayError as error:
            failure, files = str(error).splitlines()[0], {}
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(f"{job.folder}.log" if name == "log" else f"{job.folder}/{name}").write_bytes(content)
        yield job, failure
    ray.shutdown()


def main(argv):
    """Runs the sweep; returns the exit code: 0, 1 if a run failed, or 128 + the signal that stopped it."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = tyro.cli(Args, prog="python -m common.benchmark", description=__doc__, args=argv[:split])
    jobs = plan(args, flags=argv[split + 1 :])
    todo = [job for job in jobs if not finished(job, on_cluster=args.ray is not None)]
    before, signals = len(jobs) - len(todo), []
    workers, counts, began = args.workers or at_a_time(todo), Counter(), time.monotonic()
    print(f"{len(jobs)} runs, {before} of them finished before" + f", {workers} at a time" * (not args.ray))
    results = on_ray(todo, args.ray) if args.ray and todo else on_this_machine(todo, workers, signals)
    with tqdm(total=len(jobs), initial=before, unit="run") as bar:
        for job, failure in results:
            word = "done" if failure is None else "stopped" if signals else "failed"
            counts[word] += 1
            tqdm.write(f"{word:7} {job.folder}  {failure if word == 'failed' else ''}")
            bar.update(word != "stopped")
    done, failed, minutes = counts["done"], counts["failed"], (time.monotonic() - began) / 60
    print(f"{done} runs done, {failed} failed, {minutes:.1f} minutes")
    if signals:
        say(f"stopped: {before + done} of {len(jobs)} runs finished; the same command goes on")
        return 128 + signals[0]
    return 1 if failed else 0


if __name__ == "__main__":
    with one_sentence():
        sys.exit(main(sys.argv[1:]))
