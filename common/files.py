"""Files of a run: written whole or not at all, read without executing anything; and what made them."""

import csv
import errno
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import gymnasium
import mujoco
import numpy as np
import torch

from common import BadInput, Fault, memory_is_full, one_line

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
POLICY, BEST = "policy.pt", "best.pt"  # networks alone: of the last checkpoint, of the best evaluation


def run_folder(args, script):
    name = args.exp_name or Path(script).stem
    folder = args.run_dir or Path("runs", args.env_id.replace("/", "_"), name, f"seed-{args.seed}")
    return Path(os.path.expanduser(folder))


def read_args(folder, script):
    """The settings of a script's run in a folder; {} if there is none, or another's, or it is damaged."""
    try:
        told = json.loads(Path(folder, "args.json").read_bytes())
        return dict(told["args"]) if told["script"] == script else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def read_run(folder):
    """What the args.json of a run's folder tells. BadInput if it is damaged."""
    path = Path(folder, "args.json")
    try:
        told = json.loads(path.read_bytes())
        if not (isinstance(told["args"], dict) and isinstance(told["step"], int) and told["script"]):
            raise ValueError
        return told
    except (OSError, ValueError, LookupError, TypeError):
        fix = "move the folder away, or give another --exp-name"
        raise BadInput(f"{path} is damaged or cannot be read: {fix}.") from None


def lock_folder(folder, resume, script):
    """A run's folder for this process alone -> its lock, which goes with the process, however that ends."""
    lock = filelock.FileLock(folder / "lock")
    try:
        # A run would write its own there. The script's own text may be what a failed start has left.
        there, copy = [name for name in ("eval.csv", "train.csv") if (folder / name).exists()], script.name
        there += [copy] if (folder / copy).exists() and digests(folder / copy) != digests(script) else []
        if there and not ((folder / "args.json").exists() or newest(folder)):
            raise BadInput(f"{folder} has a file {there[0]} that is no run's: choose another --run-dir.")
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BadInput(f"{folder} is in use by another process: choose another --run-dir.") from None
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        raise BadInput(f"{reason}: choose another --run-dir.") from None
    if (folder / "args.json").exists() and not resume:
        lock.release()
        way = "go on in it" if newest(folder) else "begin it anew, as it has no checkpoint,"
        fix = f"choose another --exp-name, --seed or --run-dir, or {way} with --resume"
        raise BadInput(f"{folder} holds a run: {fix}.")
    return lock


def write_whole(path, write, keep=None):
    """Writes a file so that, whatever happens, the old one or the new one is there and whole.

    write: called with the open file. keep: the name under which the old file stays; a process that is killed
    between the two renames leaves that one alone (see `newest`). Fault if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_name(keep))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        with suppress(OSError):
            if isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < 2**16:
                reason = os.strerror(errno.ENOSPC)
            part.unlink(missing_ok=True)
        raise Fault(f"{path} cannot be written ({reason})") from None


def figure_path(output):
    """Where a figure is to be written; BadInput, before any work, if it cannot be there."""
    path = Path(os.path.expanduser(output))
    if path.suffix not in (".png", ".pdf", ".svg") or not path.absolute().parent.is_dir() or path.is_dir():
        raise BadInput(f"--output {output}: name a .png, .pdf or .svg file in a folder that exists.")
    return path


def write_table(path, rows):
    """A CSV file of rows {column: value}; its columns are all that occur, in order of appearance. No rows,
    no file."""
    if not rows:
        return path.unlink(missing_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def newest(folder):
    """The checkpoint to go on from, or None."""
    paths = [Path(folder, name) for name in (NEWEST, PREVIOUS)]
    return next((path for path in paths if path.exists()), None)


def read_checkpoint(path):
    """A checkpoint as {name: plain data and tensors}. BadInput if it is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # PyTorch would not look: a flipped bit is a weight to it
                raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)  # plain data: nothing is executed
        if not (isinstance(state["args"], dict) and isinstance(state["step"], int)):
            raise ValueError
        return state
    except Exception as error:  # every kind of damage has another type
        if memory_is_full(error):
            raise
        before = path.with_name(PREVIOUS)
        older = path.name == NEWEST and before.exists()
        way = f"rename {PREVIOUS} to {NEWEST} to go on from the one before, or " if older else ""
        fix = f"{way}start anew with another --run-dir"
        own = {POLICY: "--resume writes it anew", BEST: f"take {POLICY}, which is that without --best"}
        fix = own.get(path.name, fix)
        raise BadInput(f"{path} is damaged or no checkpoint of these scripts: {fix}.") from None


def policy_step(folder):
    """The step that a run's policy.pt is of; None if there is none, or a damaged one."""
    try:
        return read_checkpoint(Path(folder, POLICY))["step"]
    except BadInput:
        return None


@contextmanager
def loading(path):
    """What does not fit while parts of a checkpoint are loaded is BadInput."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (BadInput, Fault)) or memory_is_full(error):  # these say more
            raise
        why = f"the script or the environment has changed since ({one_line(error)})"
        raise BadInput(f"{path} does not fit these networks: {why}.") from None


def digests(script):
    """{a script, and common/: the first letters of the SHA-256 of what is in it}: git may not know either."""
    parts = {Path(script).name: [script], "common/": sorted(Path(__file__).parent.glob("[!.]*.py"))}
    whole = {name: b"".join(Path(path).read_bytes() for path in paths) for name, paths in parts.items()}
    return {name: hashlib.sha256(code).hexdigest()[:12] for name, code in whole.items()}


def copy_code(script, folder):
    """Puts a script's text beside its run; another text that is there stays, with its digest in its name."""
    path, code = folder / script.name, script.read_bytes()
    if path.exists() and path.read_bytes() != code:
        os.replace(path, folder / f"{script.stem}.{digests(path)[script.name]}.py")
    write_whole(path, lambda file: file.write(code))


def changes(then, now):
    """What may change the numbers between two starts of a run, in words; "" if nothing does."""
    then, now = (start["versions"] | {"revision": start["revision"]} | start.get("code", {})
                 for start in (then, now))  # fmt: skip
    differ = [name for name in now if now[name] != then.get(name, now[name])]
    return ", ".join(f"{name} {then[name]} is now {now[name]}" for name in differ)


def provenance(script):
    """What decides, beside the arguments, which numbers come out: versions, git revision (or None), code."""
    versions = {m.__name__: str(m.__version__) for m in (torch, gymnasium, mujoco, np)}
    versions["python"] = platform.python_version()
    git = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        found = ""
    return dict(versions=versions, revision=found or None, code=digests(script))
