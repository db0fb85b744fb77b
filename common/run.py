"""A run: its folder, its log, its progress bar, its checkpoint. Nothing here knows the algorithm.

The folder holds args.json (arguments, versions, device), eval.csv (a line per evaluation), train.csv (means
of what was recorded since the line before), TensorBoard events, checkpoint.pt (everything that the run is)
and checkpoint.previous.pt, the one before. policy.pt and best.pt are small: the networks of the last
checkpoint and of the best evaluation. A copy of the script says what was run. The process that has the
folder open holds a lock on `lock`.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common import BadInput, Fault, files, say
from common.args import changed, flag, stop_signals
from common.envs import close
from common.evaluate import as_policy, evaluate
from common.forecast import Forecast
from common.true_gradients import gradient_quality

EVAL_SEED = 10_000  # evaluations start from EVAL_SEED + seed + episode, training from seed
# What of a Run is in its checkpoint, beside the state that it was given.
SAVED = ("step", "last_return", "best_return", "sums", "counts", "tables", "starts")


class Run:
    """A context around the training loop, which takes its steps from `steps` and each action through `fetch`.

    `state` is all that the script changes, {name: object with state_dict()}, its environment as "env". A
    checkpoint has this, and the step, the tables and the random state.
    """

    def __init__(self, args, script, state, device):
        self.args, self.state, self.device = args, state, device
        self.source, self.script = Path(script), Path(script).name
        self.folder = files.run_folder(args, script)
        self.step, self.saved_step, self.seconds, self.stop = 0, 0, 0.0, None
        self.last_return, self.best_return = math.nan, -math.inf
        self.tables = {"eval": [], "train": []}  # the rows of the CSV files
        self.starts = []  # one entry for each time the run was started: step, versions, code
        self.pending, self.sums, self.counts = {}, {}, {}  # records: on the device; for train.csv's next line
        nets = {name: part for name, part in state.items() if isinstance(part, nn.Module)}
        self.nets = {name: net for name, net in nets.items() if list(net.parameters())}
        named = [(name, *pair) for name, net in self.nets.items() for pair in net.named_parameters()]
        self.weights = {f"{name}.{part}": weight for name, part, weight in named}

    def __enter__(self):
        self.closing = ExitStack()
        try:
            self.open(self.closing.callback)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def open(self, at_the_end):
        at_the_end(close, self.args.env_id, self.state["env"])
        at_the_end(files.lock_folder(self.folder, self.args.resume, self.source).release)
        if self.args.resume and files.newest(self.folder):
            self.load()
        elif self.args.resume:
            say(f"--resume: {self.folder} has no checkpoint, the run starts at 0")
        if rest := self.args.total_timesteps % self.args.eval_every:
            say("--total-timesteps is no multiple of --eval-every: no line of eval.csv and train.csv will be "
                f"about the last {rest} steps")  # fmt: skip
        for name, rows in self.tables.items():  # what came after the checkpoint comes again
            files.write_table(self.folder / f"{name}.csv", rows)
        from torch.utils.tensorboard import SummaryWriter  # a second to import: not for bad input

        hook = threading.excepthook  # TensorBoard's thread hands its OSError on: it need not print it
        threading.excepthook = lambda failed: isinstance(failed.exc_value, OSError) or hook(failed)
        at_the_end(setattr, threading, "excepthook", hook)
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        at_the_end(self.writer.close)
        self.bar = tqdm(total=self.args.total_timesteps, initial=self.step, unit="step", dynamic_ncols=True)
        at_the_end(self.bar.close)
        if threading.current_thread() is threading.main_thread():  # no other one may handle signals
            for number in stop_signals():
                at_the_end(signal.signal, number, signal.signal(number, self.on_signal))
        if self.step < max(self.args.total_timesteps, 1):  # it is not finished
            self.starts.append({"step": self.step, **files.provenance(self.source)})
            files.copy_code(self.source, self.folder)
        self.write_args()  # the last thing: a start that fails leaves no run behind
        self.started = self.saved = self.logged = time.monotonic()
        self.logged_step = self.step
        self.forecast = Forecast(self.args, self.device, self.step)
        self.forecast.warn()

    def __exit__(self, kind, error, trace):
        try:
            self.closing.close()
        except OSError as late:  # TensorBoard's thread may find only now that the disk is full
            error = error or late
        if isinstance(error, OSError):
            what = f"{error.filename or self.folder} cannot be written or read"
            raise self.located(Fault(f"{what} ({error.strerror or error})")) from None
        if isinstance(error, Fault):
            self.located(error)

    def located(self, fault):
        """The fault, completed by where it happened and by what is safe."""
        kept = f"its checkpoint of step {self.saved_step}" if self.saved_step else "no checkpoint yet"
        fault.args = (f"{fault} at step {self.step}; {self.folder} has {kept}.",)
        return fault

    def write_args(self):
        """What somebody needs to repeat the run."""
        text = dict(script=self.script, args=dataclasses.asdict(self.args), device=str(self.device),
                    threads=torch.get_num_threads(), starts=self.starts, step=self.saved_step)  # fmt: skip
        text |= {name: self.starts[0][name] for name in ("versions", "revision")}
        files.write_whole(self.folder / "args.json", lambda f: f.write(json.dumps(text, indent=2).encode()))

    def on_signal(self, number, frame):
        """The first signal ends the run at the next step boundary, after saving; the second one at once."""
        if self.stop:
            os._exit(128 + number)
        self.stop = number
        with suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
            os.write(2, b"\nstopping: this step ends and the run is saved; a second signal ends it unsaved\n")

    def steps(self):
        """The numbers of the steps to come. Between two of them: log, checkpoint, orderly stop, forecast."""
        total = self.args.total_timesteps
        if self.step and self.step >= total:
            tqdm.write(f"{self.folder} is finished: a larger --total-timesteps than {self.step} goes on.")
            return
        for step in range(self.step + 1, total + 1):
            self.step = step
            yield step
            self.bar.update()
            if step % self.args.eval_every == 0:
                self.log()
            if self.stop or time.monotonic() - self.saved > self.args.checkpoint_every:
                self.save()
                if self.stop:  # a signal that comes after the line above waits for the next step
                    say(f"saved at step {step}, --resume goes on from there")
                    sys.exit(128 + self.stop)
            self.forecast.after(step, time.monotonic())
        self.save()

    # --- log ---
    def record(self, **values):
        """Numbers or 0-d tensors; tensors stay on their device until the next action is fetched."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
            if value.ndim:
                raise TypeError(f"record({name}=...): shape {tuple(value.shape)} is no number")
            self.pending[name] = self.pending[name] + value if name in self.pending else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    @torch.no_grad()
    def fetch(self, action):
        """The action as an array, in one transfer with all that was recorded and the norm of every weight.
        Fault if any of them is not finite."""
        norms = torch._foreach_norm(list(self.weights.values()))
        values = torch.cat([action, torch.stack([*self.pending.values(), *norms])]).cpu().numpy()
        if not np.isfinite(values).all():
            names = ["the action"] * len(action) + [*self.pending, *self.weights]
            raise Fault(f"{names[np.isfinite(values).argmin()]} is not finite")
        for name, value in zip(self.pending, values[len(action) :].tolist(), strict=False):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.pending = {}
        return values[: len(action)]

    def write_row(self, name, row):
        self.tables[name] = [r for r in self.tables[name] if r["step"] < self.step] + [row]  # each step once
        files.write_table(self.folder / f"{name}.csv", self.tables[name])

    def log(self):
        """A line of train.csv."""
        self.fetch(torch.zeros(0, device=self.device))
        now = time.monotonic()
        row = {name: self.sums[name] / self.counts[name] for name in self.sums}
        row["steps_per_second"] = (self.step - self.logged_step) / (now - self.logged)
        self.write_row("train", {"step": self.step} | {k: f"{v:.6g}" for k, v in row.items()})
        for name, value in row.items():
            self.writer.add_scalar(f"train/{name}", value, self.step)
        self.sums, self.counts, self.logged, self.logged_step = {}, {}, now, self.step

    def elapsed(self):
        return self.seconds + time.monotonic() - self.started

    def evaluate(self, actor, critic=None):
        """A line of eval.csv. Training's random numbers are not touched."""
        args = self.args
        if args.eval_episodes == 0:
            return
        began = time.monotonic()
        how = dict(seed=EVAL_SEED + args.seed, max_steps=args.eval_max_steps)
        result = evaluate(as_policy(actor, self.device), args.env_id, args.eval_episodes, **how)
        self.last_return, spread = float(result.returns.mean()), float(result.returns.std())
        row = dict(step=self.step, return_mean=f"{self.last_return:.4f}", return_std=f"{spread:.4f}",
                   length_mean=float(result.lengths.mean()), seconds=f"{self.elapsed():.1f}")  # fmt: skip
        row |= gradient_quality(actor, critic, args.env_id, args.gamma, result.starts)
        self.write_row("eval", row)
        for name, value in row.items():
            self.writer.add_scalar(f"eval/{name}", float(value), self.step)
        self.bar.set_postfix_str(f"return {self.last_return:.1f}")
        mean = f"{self.last_return:9.2f} +- {spread:<8.2f}"
        cut = "   (cut at --eval-max-steps)" if result.cut else ""
        tqdm.write(f"step {self.step:>7}   return {mean}   {row['seconds']} s{cut}")

        if self.last_return > self.best_return:
            self.best_return = self.last_return
            self.write_networks(files.BEST)
        self.forecast.evaluated(time.monotonic() - began)

    # --- checkpoint ---
    def write_networks(self, name):
        """What a policy needs, in a small file: the arguments and the networks."""
        small = {part: net.state_dict() for part, net in self.nets.items()}
        small |= dict(args=dataclasses.asdict(self.args), script=self.script, step=self.step)
        files.write_whole(self.folder / name, lambda file: torch.save(small, file))

    def save(self):
        """Everything that the run is, as tensors, numbers and strings in one file; Fault if it went wrong."""
        self.fetch(torch.zeros(0, device=self.device))
        whole = {name: part.state_dict() for name, part in self.state.items()}
        whole |= {name: getattr(self, name) for name in SAVED}
        whole |= dict(args=dataclasses.asdict(self.args), script=self.script, device=self.device.type,
                      seconds=self.elapsed(), rng=torch.get_rng_state())  # fmt: skip
        if self.device.type == "cuda":
            whole["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        files.write_whole(self.folder / files.NEWEST, lambda file: torch.save(whole, file), files.PREVIOUS)
        self.saved, self.saved_step = time.monotonic(), self.step
        self.write_networks(files.POLICY)
        self.write_args()

    def load(self):
        path = files.newest(self.folder)
        whole = files.read_checkpoint(path)
        on_gpu = ("cuda_rng",) if self.device.type == "cuda" else ()
        if whole.get("script", self.script) != self.script:
            raise BadInput(f"--resume: {self.folder} is a run of {whole['script']}: use that script, or give "
                           "another --run-dir.")  # fmt: skip
        parts = ("script", "device", "seconds", "rng", *on_gpu, *SAVED, *self.state)
        if missing := [name for name in parts if name not in whole]:
            raise BadInput(f"--resume: {path} has no {missing[0]}, another script or another version of it "
                           "wrote it: use the one that args.json names, or another --run-dir.")  # fmt: skip
        if whole["device"] != self.device.type:
            raise BadInput(f"--resume: {self.folder} was run with --device {whole['device']}: use that.")
        others = changed(whole["args"], dataclasses.asdict(self.args), self.args)
        if differ := ", ".join(f"{flag(name)} {then} is now {now}" for name, (then, now) in others.items()):
            raise BadInput(f"--resume: {self.folder} was started with other settings ({differ}).")
        if differ := files.changes(whole["starts"][-1], files.provenance(self.source)):
            say(f"--resume: {differ}; from here on the numbers may be others.")
        with files.loading(path):
            for name, part in self.state.items():
                if isinstance(part, torch.optim.Optimizer):  # --accelerate decides where steps are counted
                    for old, new in zip(whole[name]["param_groups"], part.param_groups, strict=True):
                        old |= {key: new[key] for key in ("capturable",) if key in new}
                part.load_state_dict(whole[name])
        for name in ("seconds", *SAVED):
            setattr(self, name, whole[name])
        self.saved_step = self.step
        torch.set_rng_state(whole["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(whole["cuda_rng"], self.device)
        if files.policy_step(self.folder) != self.step:  # a kill, or a full disk, came just before it
            self.write_networks(files.POLICY)
