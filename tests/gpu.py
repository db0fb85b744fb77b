"""What a GPU says of the scripts, in one command for a bare machine that is there for a few minutes only:

    python -m tests.gpu [--minutes 9] [--device cuda] [--out FOLDER]

It has five parts, each in processes of its own, so that one that fails or hangs takes no other with it:

1. card: what it is.
2. tests: those of the suite that need a GPU.
3. agreement: how far apart plain and faster functions are, for each script, after the same updates.
4. speed: milliseconds, launches, share of the float32 matmul rate and memory, for each script and way.
5. training: Dyna-TD3 and MAGE-TD3 on HalfCheetah-v4 with the paper preset, side by side, with the minutes
   that are left. The same command with the same folder goes on where they stopped.

FOLDER gets gpu.json, written anew after every part, with the tables agreement.csv, updates.csv and steps.csv,
and while the training goes on its curves, <script>/seed-0.csv (the runs are in runs/). What went wrong is
in gpu.json and on the screen, and the exit code is then 1. With --device cpu all sizes are tiny and nothing
is accelerated, which says nothing but that the command works.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("td3", "dyna_td3", "mage_td3", "maac_sac")
NEEDED = ("gymnasium", "mujoco", "numpy", "tyro", "tensorboard", "tqdm", "filelock", "imageio", "pytest")
# The part of all the minutes that one of these may take; the training gets what is left.
SHARES = {"card": 0.1, "tests": 0.2, "agreement": 0.25, "speed": 0.35, "training": 1.0}
TABLES = {"agreement": "agreement", "updates": "speed", "steps": "speed"}  # a CSV file, and whose it is
WAYS = {"cuda": ("none graph", "compile"), "cpu": ("none",)}  # compiling comes last: it takes the longest
TRAINED = ("dyna_td3", "mage_td3")
NEEDS_A_GPU = "needs a GPU"  # the reason why a test is skipped without one
STOPPING = 20  # seconds that the runs of the training get to save


# --- the parts, each in a process of its own ----------------------------------------------------------------
def tell(**row):
    """Hands a row of results to the process that asked for it."""
    print(json.dumps(row), flush=True)


def describe_card(_, device):
    row = dict(name=platform.machine(), cores=os.cpu_count(), torch=torch.__version__)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        row |= dict(name=card.name, cuda=torch.version.cuda, capability=f"{card.major}.{card.minor}",
                    memory_gib=round(card.total_memory / 2**30, 1))  # fmt: skip
    with contextlib.suppress(ImportError):  # what the other parts need may be missing
        row |= importlib.import_module("common.files").provenance(__file__)
    tell(**row)


class OnlyForGPU:
    """A plugin of pytest: of all tests those that need a GPU, and a row for each."""

    def pytest_collection_modifyitems(self, items):
        reasons = [[mark.kwargs.get("reason") for mark in item.iter_markers("skipif")] for item in items]
        items[:] = [item for item, why in zip(items, reasons, strict=True) if NEEDS_A_GPU in why]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            tell(test=report.nodeid, outcome=report.outcome)
        if report.failed:
            tell(error=f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")

    def pytest_collectreport(self, report):
        if report.failed:
            tell(error=f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")


def run_tests(_, device):
    import pytest

    files = [str(path) for path in (ROOT / "tests").glob("test_*.py") if NEEDS_A_GPU in path.read_text()]
    quiet = ("-s", "-p", "no:terminal", "-p", "no:cacheprovider")  # the rows alone are printed
    pytest.main([*sorted(files), *quiet, "--rootdir", str(ROOT)], plugins=[OnlyForGPU()])


def compare(names, device):
    agreement = importlib.import_module("tests.agreement")
    for name in names.split():
        for row in agreement.compare(name, device):
            tell(**row)


def measure(what, device):
    speed = importlib.import_module("tests.speed")
    names, ways, others = what.split(":", 2)
    for row in speed.rows(names.split(), ways.split(), device, others):
        tell(**row)


CHILDREN = {"card": describe_card, "tests": run_tests, "agreement": compare, "speed": measure}


# --- the whole ----------------------------------------------------------------------------------------------
class Measurement:
    """The parts in their order, the time that is left for them, and what they found."""

    def __init__(self, device, minutes, out):
        self.device, self.out, self.seconds, self.began = device, out, 60 * minutes, time.monotonic()
        self.result = {"device": device, "minutes": minutes}
        self.before = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}

    def left(self):
        return self.began + self.seconds - time.monotonic()

    def known(self, part):
        """Whether an earlier call has done this part, without an error, into the same folder."""
        done = self.before.get("device") == self.device and part in self.before
        if done := done and not self.before[part]["errors"]:
            self.result[part] = self.before[part]
        return done

    def write(self):
        """gpu.json and the tables, as far as they are known."""
        (self.out / "gpu.json.new").write_text(json.dumps(self.result, indent=1))
        (self.out / "gpu.json.new").replace(self.out / "gpu.json")
        for table, part in TABLES.items():
            rows = self.result[part]["rows"] if part in self.result else []
            rows = [row for row in rows if row.get("table", part) == table]
            with (self.out / f"{table}.csv").open("w", newline="") as file:
                names = [name for name in rows[0] if name != "table"] if rows else []
                writer = csv.DictWriter(file, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

    def all(self):
        """Runs every part -> whether all went well."""
        missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
        for part, share in SHARES.items():
            if part != "training" and self.known(part):
                print(f"{part:10} is in gpu.json already; another --out measures it anew", flush=True)
                continue
            found = self.result[part] = {"rows": [], "errors": []}
            began, end = time.monotonic(), min(self.left(), share * self.seconds) + time.monotonic()
            if self.left() <= 0:
                found["errors"].append("no time was left for it: give more --minutes")
            elif part != "card" and missing:
                found["errors"].append(f"{missing[0]} is missing here: pip install -r requirements.txt")
            else:
                try:
                    self.train(found, end) if part == "training" else self.ask_all(part, found, end)
                except Exception as error:
                    found["errors"].append(f"{type(error).__name__}: {error}")
            found["seconds"] = round(time.monotonic() - began, 1)
            self.write()
            print(f"{part:10} {found['seconds']:6.1f} s  {len(found['rows'])} results", flush=True)
            for error in dict.fromkeys(found["errors"]):
                print(f"error: {part}: {error}", file=sys.stderr, flush=True)
        return not any(self.result[part]["errors"] for part in SHARES)

    def ask_all(self, part, found, end):
        """The processes of a part, a script in each; those that are timed wait for each other."""
        names, groups = SCRIPTS if self.device == "cuda" else [" ".join(SCRIPTS)], [[""]]
        with tempfile.NamedTemporaryFile() as others:
            if part == "agreement":
                groups = [names]
            elif part == "speed":
                groups = [[f"{name}:{ways}:{others.name}" for name in names] for ways in WAYS[self.device]]
            for group in groups:
                self.ask(part, group, found, end)
                self.write()

    def ask(self, part, names, found, end):
        """A process for each of the names, all at once; none of them runs on after `end`."""
        if time.monotonic() >= end:
            found["errors"].append(f"no time was left for {' '.join(names)}: give more --minutes")
            return
        running = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                for i, name in enumerate(names):
                    words = ["tests.gpu", "--device", self.device, "--part", part, name]
                    running[name] = started(words, f"{folder}/{i}.out", f"{folder}/{i}.err", ROOT)
                for i, (what, process) in enumerate(running.items()):
                    out, said = (Path(folder, f"{i}.{kind}") for kind in ("out", "err"))
                    name = what.rpartition(":")[0] or what  # without the file by which they wait
                    failure = f"{name} was stopped, the time of this part was over"
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(max(0, end - time.monotonic()))
                        *_, last = ["", *said.read_text(errors="replace").strip().splitlines()]
                        failure = code and f"{name} ended with exit code {code}: {last}"
                    found["errors"] += [failure.strip()] if failure else []
                    for line in out.read_text(errors="replace").splitlines():
                        if line.startswith('{"') and line.endswith("}"):
                            row = json.loads(line)
                            found["errors" if "error" in row else "rows"].append(row.get("error", row))
            finally:
                for process in running.values():
                    stop(process)

    def train(self, found, end):
        """A sweep in the folder, stopped in time for its runs to save."""
        rows = self.result["agreement"]["rows"]
        agree = {(row["script"], row["accelerate"]) for row in rows if row.get("agrees")}
        fast = [how for how in ("compile", "graph") if agree >= {(name, how) for name in TRAINED}]
        found["accelerate"], *_ = [*fast, "none"]
        flags = ["--device", self.device, "--accelerate", found["accelerate"], "--checkpoint-every", "60"]
        if self.device == "cpu":
            tiny = importlib.import_module("tests.conftest").tiny
            flags += tiny("dyna_td3", env_id="HalfCheetah-v4", eval_max_steps=20)[2:]
        words = ["common.benchmark", "--scripts", *TRAINED, "--env-ids", "HalfCheetah-v4"]
        log, stopped = self.out / "training.log", True
        log.unlink(missing_ok=True)
        sweep = started([*words, "--seeds", "1", "--", *flags], log, log, self.out)
        try:
            while sweep.poll() is None and time.monotonic() < end - min(STOPPING, self.seconds / 4):
                time.sleep(0.5)
                self.collect(found)
            stopped = sweep.poll() is None
        finally:
            for wait in (max(1, end - time.monotonic() - 2), 2):
                if sweep.poll() is None:
                    sweep.terminate()  # it hands that on: its runs save, and at the second one end
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        sweep.wait(wait)
            stop(sweep)
        self.collect(found)
        lines = log.read_text(errors="replace").splitlines()
        found["errors"] += [line for line in lines if line.startswith(("failed ", "error: "))]
        if not stopped and sweep.returncode and not found["errors"]:
            found["errors"].append(f"{lines[-1] if lines else ''} (exit code {sweep.returncode})")

    def collect(self, found):
        """The curves of the runs so far."""
        found["rows"] = []
        for path in sorted(self.out.glob("runs/HalfCheetah-v4/*/seed-*/eval.csv")):
            script = path.parts[-3]
            copy = self.out / script / f"{path.parent.name}.csv"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            with copy.open(newline="") as file:
                found["rows"] += [{"script": script} | row for row in csv.DictReader(file)]


def started(words, out, err, folder):
    """A process of `python -m`, with its output in files."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = dict(env=os.environ | {"PYTHONPATH": path}, cwd=folder, start_new_session=True)
    with open(out, "ab") as out, open(err, "ab") as err:
        return subprocess.Popen([sys.executable, "-m", *words], stdout=out, stderr=err, **own)


def stop(process):
    """Ends a process and those that it started, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="all parts together take no longer")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder of the results")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        part, name = args.part
        torch.manual_seed(0)
        torch.set_num_threads(1)
        if args.device == "cpu" and part in TABLES.values():
            importlib.import_module("tests.speed").SIZES[:] = [True]
        CHILDREN[part](name, torch.device(args.device))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; use --device cpu to try the command.")
    if not 0 < args.minutes < 1e6:
        parser.error(f"--minutes {args.minutes}: give a number of minutes above 0.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made ({error.strerror}): name a folder that can.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends as well
    sys.exit(0 if Measurement(args.device, args.minutes, args.out.absolute()).all() else 1)


if __name__ == "__main__":
    main()
