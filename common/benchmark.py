"""Sweeps: every script on every environment with every seed, each run a process of its own.

    python -m common.benchmark --scripts td3 mage_td3 --env-ids Pendulum-v1 --seeds 5 -- --preset laptop

What stands after `--` goes to every script. Runs that are finished are skipped, interrupted ones go on: the
same command may be given again at any time. The output of a run is in its folder's name with .log at the end.
With --ray the runs go to a Ray cluster (`pip install ray`; "local" starts one here), where they write into a
folder of their own, and their CSV files and args.json come back here.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from common import BadInput
from common.args import flag, parse_args
from common.files import newest, run_folder
from common.run import MAY_CHANGE

ROOT = Path(__file__).resolve().parent.parent
COME_BACK = ("args.json", "eval.csv", "train.csv")


@dataclass
class Args:
    scripts: list[str]  # td3, dyna_td3, mage_td3, maac_sac or your own beside them
    env_ids: list[str]  # environments
    seeds: int = 5  # seeds 0 ... N - 1
    workers: int | None = None  # runs at a time on this machine (default: its cores), one thread each
    ray: str | None = None  # address of a Ray cluster, or "local"; the runs at a time are then its cores


@dataclass
class Job:
    """One run: its command line and where it goes. Plain data, for it travels."""

    script: str
    argv: list[str]
    folder: str
    settings: dict


def plan(args, flags):
    """The runs of a sweep. BadInput, or tyro's message, if one of their command lines cannot be read."""
    for name in ("seeds", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least 1.")
    jobs = []
    for script in args.scripts:
        if not (ROOT / f"{script}.py").is_file():
            raise BadInput(f"--scripts {script}: there is no {script}.py beside common/.")
        module = importlib.import_module(script)
        for env_id in args.env_ids:
            for seed in range(args.seeds):
                argv = ["--env-id", env_id, "--seed", str(seed), *flags]
                chosen = parse_args(module.Args, module.PRESETS, argv)
                if chosen.run_dir:
                    raise BadInput("--run-dir: every run has a folder of its own; give --exp-name.")
                folder = run_folder(chosen, script)
                jobs.append(Job(script, argv, str(folder.absolute()), asdict(chosen)))
    return jobs


def finished(job, on_cluster):
    """Whether a run has come to its end. BadInput if its folder holds another one."""
    path = Path(job.folder, "args.json")
    if not path.exists():
        return False
    run = json.loads(path.read_text())
    names = [n for n, value in job.settings.items() if n not in MAY_CHANGE and run["args"].get(n) != value]
    if names:
        changed = ", ".join(map(flag, names))
        raise BadInput(f"{job.folder} holds a run with other settings ({changed}): give another --exp-name.")
    done = run["step"] >= job.settings["total_timesteps"]
    if on_cluster and not done and newest(job.folder):
        raise BadInput(f"{job.folder} holds a run of this machine: finish it without --ray.")
    return done


def execute(job, folder, log):
    """Runs a job's script in `folder`; returns None, or why it failed: its last line."""
    command = [sys.executable, str(ROOT / f"{job.script}.py"), *job.argv, "--run-dir", folder, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=environment).returncode
    if code:
        lines = Path(log).read_text().split("\n")
        return next((line for line in reversed(lines) if line.strip()), "") + f" (exit code {code})"


def here(job):
    Path(job.folder).parent.mkdir(parents=True, exist_ok=True)
    return execute(job, job.folder, f"{job.folder}.log")


def elsewhere(job):
    """On a machine of the cluster: -> why it failed or None, {file name: contents}."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        failure = execute(job, str(run), str(log))
        files = {name: (run / name).read_bytes() for name in COME_BACK if (run / name).exists()}
        return failure, files | {"log": log.read_bytes()}


def on_this_machine(jobs, workers):
    """Yields (job, why it failed or None) as they end."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(here, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt:  # the runs got it as well, save and stop; no other one starts
            pool.shutdown(cancel_futures=True)
            raise


def on_ray(jobs, address):
    """Yields (job, why it failed or None) as they end; writes what came back."""
    try:
        import ray
    except ImportError:
        raise BadInput("--ray: Ray is not installed: pip install ray.") from None
    code = {"working_dir": str(ROOT), "excludes": [".git", "runs", "tests"]}
    try:
        ray.init(address, runtime_env=code, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"--ray {address}: no cluster answers there ({error}).") from None
    waiting = {ray.remote(elsewhere).options(num_cpus=1, max_retries=2).remote(job): job for job in jobs}
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
    """Runs the sweep; returns the exit code: 0, or 1 if a run failed."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = tyro.cli(Args, prog="python -m common.benchmark", args=argv[:split])
    jobs = plan(args, flags=argv[split + 1 :])
    todo = [job for job in jobs if not finished(job, on_cluster=args.ray is not None)]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before")
    on_cluster = args.ray and todo
    results = on_ray(todo, args.ray) if on_cluster else on_this_machine(todo, args.workers or os.cpu_count())
    failed, start = 0, time.monotonic()
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run") as bar:
        for job, failure in results:
            failed += failure is not None
            tqdm.write(f"{'failed' if failure else 'done':6} {job.folder}  {failure or ''}")
            bar.update()
    print(f"{len(todo) - failed} runs done, {failed} failed, {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
