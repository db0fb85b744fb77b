"""The command line: presets, checks, exit codes. Bad input ends in one sentence before anything exists."""

import collections
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import traceback
import typing
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
import tyro

from common import BadInput, Fault, memory_is_full
from common.files import read_args, run_folder

INF = math.inf
LIMITS = {  # what a number must lie between, ends included; any other: finite and not negative
    "seed": (0, 2**31 - 1), "threads": (1, 1024), "gamma": (0, 1), "tau": (0, 1), "real_ratio": (0, 1),
    "target_entropy": (-INF, INF), "rollout_growth": (1, INF), "huber_threshold": (0.001, INF),
    **dict.fromkeys(("eval_every", "eval_max_steps", "buffer_size", "batch_size", "actor_hidden",
                     "critic_hidden", "num_critics", "policy_delay", "ensemble_size", "model_hidden",
                     "model_layers", "model_train_every", "reward_hidden", "reward_layers",
                     "num_samples", "rollouts", "rollout_length", "model_buffer_size"), (1, INF)),
}  # fmt: skip


MAY_CHANGE = ("resume", "total_timesteps", "checkpoint_every", "run_dir", "exp_name", "device", "threads",
              "accelerate", "eval_every", "eval_episodes", "eval_max_steps")  # on resume  # fmt: skip
# These cost memory, so that a smaller one may help where there is too little of it.
MEMORY = ("buffer_size", "model_buffer_size", "rollouts", "batch_size", "num_samples", "horizon",
          "num_critics", "ensemble_size", "actor_hidden", "critic_hidden", "model_hidden", "model_layers",
          "reward_hidden", "reward_layers", "eval_episodes")  # fmt: skip


MODEL = ("ensemble_size", "model_hidden", "model_layers", "model_lr", "model_train_every", "model_batches")
# An entry has flags, the settings beside which they do nothing, and how that is said.
IDLE = [
    (("reward_hidden", "reward_layers"), lambda a: a["learned_reward"] is False, "without --learned-reward"),
    (MODEL, lambda a: a["oracle_dynamics"] and not a["learned_reward"], "with --oracle-dynamics"),
    (("steve_horizon",), lambda a: a["steve"] is False, "without --steve"),
    (("num_samples",), lambda a: a["horizon"] == 0, "with --horizon 0"),
    (("rollouts", "rollout_growth", "rollout_length", "model_buffer_size"),
     lambda a: a["real_ratio"] == 1, "with --real-ratio 1"),
    (MODEL, lambda a: a["horizon"] == 0 and not a["steve"] and a["real_ratio"] == 1,
     "with --horizon 0 --no-steve --real-ratio 1, which use no model"),
    (("huber_threshold",), lambda a: a["lam"] == 0, "with --lam 0"),
    (("noise_clip",), lambda a: a["target_noise"] == 0, "with --target-noise 0"),
    (("eval_max_steps",), lambda a: a["eval_episodes"] == 0, "with --eval-episodes 0"),
]  # fmt: skip


def idle(args, default):
    """Sentences about flags that differ from their default and do nothing beside the others."""
    now, before = collections.defaultdict(lambda: None, vars(args)), vars(default)
    return [f"{flag(name)} {now[name]} is of no use {why}" for names, holds, why in IDLE for name in names
            if name in before and now[name] != before[name] and holds(now)]  # fmt: skip


def parse_args(Args, presets, argv=None):
    """Command line -> Args. The preset is read first and sets the defaults, so a flag that is given wins.

    With --resume the run's own settings are the defaults, if its folder has any: no flag need be repeated.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(inspect.getfile(Args)).name  # a sweep reads the command lines of several scripts
    early = ("env_id", "preset", "seed", "exp_name", "run_dir", "resume")
    fields = [f for f in dataclasses.fields(Args) if f.name in early]
    types = typing.get_type_hints(Args, include_extras=True)  # which may be given as text
    First = dataclasses.make_dataclass("First", [(f.name, types[f.name], f.default) for f in fields])
    no_help = [word for word in argv if word not in ("-h", "--help")]
    first, _ = tyro.cli(First, prog=script, args=no_help, return_unknown_args=True)
    chosen = presets[first.preset].get(first.env_id, presets[first.preset]["*"])
    default = Args(env_id=first.env_id, preset=first.preset, **chosen)
    if first.resume:
        folder = run_folder(first, script)
        given = [flag_of(word) for word in argv]
        with suppress(OSError):  # a folder that cannot be looked at is refused when the run begins
            if first.run_dir and not folder.exists() and not {"--env-id", "--help", "-h"} & set(given):
                fix = "mend --run-dir, or give --env-id to begin a run there"
                raise BadInput(f"--resume: there is no {folder}: {fix}.")
        saved = read_args(folder, script)
        names = saved.keys() & dataclasses.asdict(default).keys() - {"run_dir", "resume"}
        default = dataclasses.replace(default, **{name: saved[name] for name in names})
    args = tyro.cli(Args, prog=script, args=argv, default=default)
    args.remarks = idle(args, default)  # no setting, but something for the run to say when it begins
    return args


def flag(name):
    return "--" + name.replace("_", "-")


def flag_of(word):
    """The flag in a word of a command line, in the spelling of --help: "--env_id=X" is --env-id."""
    return word.split("=")[0].replace("_", "-")


def changed(saved, settings, Args):
    """The settings that a saved run has otherwise, {name: (then, now)}, but for those that may change.

    A flag that the script has got since the run began was at its default.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Args)}
    old, new = (json.loads(json.dumps(x)) for x in (defaults | saved, settings))  # a tuple is a list there
    pairs = {name: (old.get(name), new.get(name)) for name in old | new if name not in MAY_CHANGE}
    return {name: (then, now) for name, (then, now) in pairs.items() if then != now}


def stop_signals():
    """The signals that end a program in good order; without SIGHUP under nohup, which ignores it."""
    lost = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
    return [signal.SIGINT, signal.SIGTERM, *lost]


def check(args):
    """Refuses values that make no sense (BadInput)."""
    for name, value in dataclasses.asdict(args).items():
        low, high = LIMITS.get(name, (0, INF))
        high = min(high, 2**63 - 1) if isinstance(value, int) else high  # which PyTorch and NumPy can count
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            least = f", at least {low}" if math.isfinite(low) else ""
            most = f" and at most {high}" if math.isfinite(high) else ""
            raise BadInput(f"{flag(name)} {value}: give a finite number{least}{most}.")
    if args.batch_size % getattr(args, "ensemble_size", 1):
        sizes = f"--batch-size {args.batch_size} is no multiple of --ensemble-size {args.ensemble_size}"
        raise BadInput(f"{sizes}: the members share the batch equally, change one of the two.")
    if getattr(args, "real_ratio", 1) < 1:
        if not args.ensemble_size <= args.rollouts <= args.model_buffer_size:
            raise BadInput(f"--rollouts {args.rollouts}: give from --ensemble-size to --model-buffer-size.")
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d*))?", args.device):
        raise BadInput(f"--device {args.device}: give auto, cpu, cuda, or cuda:1 for the second GPU.")
    if args.device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise BadInput(f"--device {args.device}: PyTorch sees no CUDA device here; use --device cpu.")
        if int(args.device[5:] or 0) >= count:
            there = "one CUDA device, cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise BadInput(f"--device {args.device}: PyTorch sees {there}; use that or --device cpu.")


def make_plain(args):
    """Makes a Python number of each that is NumPy's. BadInput for what args.json cannot keep."""
    for name in dataclasses.asdict(args):
        if isinstance(value := getattr(args, name), np.generic):
            setattr(args, name, value := value.item())
        try:
            json.dumps(value)
        except TypeError:
            kind = f"{flag(name)}: Args.{name} is of type {type(value).__name__}, which args.json cannot keep"
            raise BadInput(f"{kind}: make it a number, a text, or a list of these.") from None


def prepare(args):
    """Checks the values, sets PyTorch's threads and seed; returns the device."""
    make_plain(args)
    check(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device(args.device.replace("auto", "cuda"))
    if device.index is not None:
        torch.cuda.set_device(device)  # --accelerate makes its streams on the current one
    return device


class Lenient:
    """A stream that may be closed, from outside (`| head`) or from the start (`>&-`, where it is None): text
    then goes nowhere, and the run goes on."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # Python would try once more at its end, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        self.write("")


@contextmanager
def one_sentence():
    """Around a program: bad input ends it with one sentence and exit code 2, a fault with one and code 1.

    Whoever reads its output may stop reading (`| head`): the program goes on.
    """
    with redirect_stdout(Lenient(sys.stdout)), redirect_stderr(Lenient(sys.stderr)):
        try:
            yield
        except KeyboardInterrupt:  # before a run listens for it, or where there is none
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except (BadInput, Fault) as error:
            if isinstance(error, Fault) and error.__cause__:  # somebody's environment failed: where?
                traceback.print_exception(error.__cause__)
            print(f"error: {str(error).removesuffix('.')}.", file=sys.stderr)
            sys.exit(2 if isinstance(error, BadInput) else 1)


def main(train, Args, presets):
    """A script's command line. Exit code 0: done, 2: bad input, 1: a fault during the run."""
    with one_sentence():
        try:
            args = parse_args(Args, presets)
            train(args)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, Fault) or not memory_is_full(error):
                raise
            # The one to blame is the one that was raised most above its default.
            sizes = {f.name: max(f.default, 1) for f in dataclasses.fields(Args) if f.name in MEMORY}
            most = max(sizes, key=lambda name: getattr(args, name) / sizes[name])
            most = most if getattr(args, most) > sizes[most] else "buffer_size"
            fault = f"too little memory for {flag(most)} {getattr(args, most)}"
            raise BadInput(f"{fault}: give a smaller one.") from None
