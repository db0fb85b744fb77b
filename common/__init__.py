"""Knowledge about environments and about runs; nothing here knows which algorithm is running."""

import re
import sys
import traceback
from pathlib import Path

from tqdm import tqdm


def one_line(error, placed=False):
    """What an exception says, as a part of a sentence: "ValueError: why", with `placed` also where it was."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")
    frames = traceback.extract_tb(error.__traceback__) if placed else []
    return text + "".join(f" in {Path(frame.filename).name}, line {frame.lineno}" for frame in frames[-1:])


def say(text):
    """A sentence about the run, on stderr, beside whatever progress bar there is."""
    tqdm.write(text, file=sys.stderr)


class BadInput(ValueError):
    """What the user asked for cannot be done: one sentence that names the flag and the fix (exit code 2)."""


class Fault(RuntimeError):
    """A run cannot go on: one sentence that names the part and the step (exit code 1)."""


def memory_is_full(error):
    """Whether an exception says that the memory of the computer or of its GPU is too small.

    PyTorch has a type of its own for some of these errors only, and says the others in words.
    """
    known = "out of memory|not enough memory|can't allocate memory|size calculation overflowed|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(known, str(error)))
