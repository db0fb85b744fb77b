"""A run: its folder, its log, its progress bar, its checkpoint. Nothing here knows the algorithm.

The folder holds args.json (arguments, versions, device), eval.csv (a line per evaluation), train.csv (means
of what was recorded since the line before), TensorBoard events and checkpoint.pt: everything that the run is.
"""

import csv
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
from tqdm import tqdm

from common import BadInput, Fault
from common.args import flag
from common.evaluate import evaluate

EVAL_SEED = 10_000  # evaluations start from EVAL_SEED + seed + episode, training from seed
MAY_CHANGE = ("resume", "total_timesteps", "checkpoint_every", "run_dir", "exp_name")  # when a run is resumed


# --- files --------------------------------------------------------------------------------------------------
def run_folder(args, script):
    name = args.exp_name or Path(script).stem
    return Path(args.run_dir or Path("runs", args.env_id.replace("/", "_"), name, f"seed-{args.seed}"))


def describe(args, script, device):
    """What somebody needs to repeat the run: script, arguments, versions, code revision, device."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        found = ""
    versions = {m.__name__: m.__version__ for m in (torch, gymnasium, mujoco, np)}
    versions["python"] = platform.python_version()
    return dict(script=Path(script).name, args=dataclasses.asdict(args), versions=versions,
                revision=found or None, device=str(device), threads=torch.get_num_threads())  # fmt: skip


def write_whole(path, write):
    """Writes a file so that, whatever happens, the old one or the new one is there and whole."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_rows(path):
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def write_rows(path, rows):
    """A CSV file; its columns are all the names that occur, in order of appearance."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def append_row(path, row):
    """Adds a line to a CSV file; it is written anew when the line brings a new column."""
    rows = read_rows(path)
    if rows and set(row) <= set(rows[0]):
        with path.open("a", newline="") as file:
            csv.DictWriter(file, list(rows[0])).writerow(row)
    else:
        write_rows(path, [*rows, row])


def read_checkpoint(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # plain data: nothing is executed
        if not {"args", "step"} <= set(state):
            raise ValueError("a file of something else")
        return state
    except Exception as error:  # PyTorch raises another type for every kind of damage
        raise BadInput(f"{path} cannot be read as a checkpoint ({type(error).__name__}): "
                       "start anew with another --run-dir.") from None  # fmt: skip


def load_run(run_dir, Args):
    """Arguments and checkpoint of a run: (Args, {name: state_dict})."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise BadInput(f"{path} does not exist: name a run's folder, runs/<env-id>/<script>/seed-<seed>.")
    state = read_checkpoint(path)
    return Args(**state["args"]), state


# --- the run ------------------------------------------------------------------------------------------------
class Run:
    """A context around the training loop. `state` is all that a run is: {name: object with state_dict()}."""

    def __init__(self, args, script, state, device):
        self.args, self.state, self.device = args, state, device
        self.folder = run_folder(args, script)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.step, self.seconds, self.last_return, self.stop = 0, 0.0, math.nan, None
        self.pending = {}  # name: tensor on the device, sum of this step's records
        self.sums, self.counts = {}, {}  # name: number, since the last line of train.csv
        if (self.folder / "args.json").exists() and not args.resume:
            raise BadInput(f"{self.folder} holds a run: choose another --exp-name, --seed or --run-dir, "
                           "or go on in it with --resume.")  # fmt: skip
        if args.resume and self.checkpoint.exists():
            self.load()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(describe(args, script, device), indent=2)
            write_whole(self.folder / "args.json", lambda file: file.write(text.encode()))
        except OSError as error:
            reason = f"{self.folder} cannot be written ({error.strerror})"
            raise BadInput(f"{reason}: choose another --run-dir.") from None
        for path in (self.folder / "eval.csv", self.folder / "train.csv"):  # what came after the checkpoint
            kept = [row for row in read_rows(path) if self.step and int(row["step"]) <= self.step]
            write_rows(path, kept) if kept else path.unlink(missing_ok=True)

    def __enter__(self):
        from torch.utils.tensorboard import SummaryWriter  # a second to import: not for --help or bad input

        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        self.bar = tqdm(total=self.args.total_timesteps, initial=self.step, unit="step", dynamic_ncols=True)
        self.started = self.saved = self.logged = time.monotonic()
        self.logged_step = self.saved_step = self.step
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Fault):
            kept = f"its checkpoint of step {self.saved_step}" if self.saved_step else "no checkpoint yet"
            error.args = (f"{error} at step {self.step}; {self.folder} has {kept}.",)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.writer.close()

    def on_signal(self, number, frame):
        """The first signal ends the run at the next step boundary, after saving; the second one at once."""
        if self.stop:
            os._exit(128 + number)
        self.stop = number

    def steps(self):
        """The numbers of the steps to come. Between two of them: log, checkpoint, orderly stop."""
        for step in range(self.step + 1, self.args.total_timesteps + 1):
            self.step = step
            yield step
            self.bar.update()
            if step % self.args.eval_every == 0:
                self.log()
            if self.stop or time.monotonic() - self.saved > self.args.checkpoint_every:
                self.save()
            if self.stop:
                sys.exit(128 + self.stop)
        self.save()

    # --- log ---
    def record(self, **values):
        """Numbers or 0-d tensors; tensors stay on their device until the next action is fetched."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
            self.pending[name] = self.pending[name] + value if name in self.pending else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def fetch(self, action):
        """The action as an array, in one transfer with all that was recorded. Fault if any is not finite."""
        values = torch.cat([action.detach(), *(value[None] for value in self.pending.values())]).cpu().numpy()
        action, recorded = np.split(values, [len(action)])
        self.pending, names = {}, ["the action", *self.pending]
        for name, value in zip(names, [action, *recorded], strict=True):
            if not np.isfinite(value).all():
                raise Fault(f"{name} is not finite")
        for name, value in zip(names[1:], recorded.tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value
        return action

    def log(self):
        """A line of train.csv."""
        self.fetch(torch.zeros(0, device=self.device))
        now = time.monotonic()
        row = {name: self.sums[name] / self.counts[name] for name in self.sums}
        row["steps_per_second"] = (self.step - self.logged_step) / (now - self.logged)
        append_row(self.folder / "train.csv", {"step": self.step} | {k: f"{v:.6g}" for k, v in row.items()})
        for name, value in row.items():
            self.writer.add_scalar(f"train/{name}", value, self.step)
        self.sums, self.counts, self.logged, self.logged_step = {}, {}, now, self.step

    def elapsed(self):
        return self.seconds + time.monotonic() - self.started

    def evaluate(self, policy):
        """A line of eval.csv. Training's random numbers are not touched."""
        args = self.args
        result = evaluate(policy, args.env_id, args.eval_episodes, seed=EVAL_SEED + args.seed)
        self.last_return, spread = float(result.returns.mean()), float(result.returns.std())
        row = dict(step=self.step, return_mean=f"{self.last_return:.4f}", return_std=f"{spread:.4f}",
                   length_mean=result.lengths.mean(), seconds=f"{self.elapsed():.1f}")  # fmt: skip
        append_row(self.folder / "eval.csv", row)
        self.writer.add_scalar("eval/return_mean", self.last_return, self.step)
        self.bar.set_postfix_str(f"return {self.last_return:.1f}")
        mean = f"{self.last_return:9.2f} +- {spread:<8.2f}"
        tqdm.write(f"step {self.step:>7}   return {mean}   {row['seconds']} s")

    # --- checkpoint ---
    def save(self):
        """Everything that the run is, as tensors, numbers and strings in one file; Fault if it went wrong."""
        self.fetch(torch.zeros(0, device=self.device))
        whole = {name: part.state_dict() for name, part in self.state.items()}
        whole |= {name: getattr(self, name) for name in ("step", "last_return", "sums", "counts")}
        whole |= dict(args=dataclasses.asdict(self.args), device=self.device.type, seconds=self.elapsed(),
                      rng=torch.get_rng_state())  # fmt: skip
        if self.device.type == "cuda":
            whole["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        write_whole(self.checkpoint, lambda file: torch.save(whole, file))
        self.saved, self.saved_step = time.monotonic(), self.step

    def load(self):
        whole = read_checkpoint(self.checkpoint)
        if whole["device"] != self.device.type:
            raise BadInput(f"--resume: {self.folder} was run with --device {whole['device']}: use that.")
        old, new = whole["args"], dataclasses.asdict(self.args)
        names = [name for name in old | new if old.get(name) != new.get(name) and name not in MAY_CHANGE]
        if names:
            changed = ", ".join(f"{flag(name)} {old.get(name)} is now {new.get(name)}" for name in names)
            raise BadInput(f"--resume: {self.folder} was started with other settings ({changed}).")
        for name, part in self.state.items():
            part.load_state_dict(whole[name])
        for name in ("step", "last_return", "seconds", "sums", "counts"):
            setattr(self, name, whole[name])
        torch.set_rng_state(whole["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(whole["cuda_rng"], self.device)
