"""Knowledge about environments and about runs; nothing here knows which algorithm is running."""


class BadInput(ValueError):
    """What the user asked for cannot be done: one sentence that names the flag and the fix (exit code 2)."""


class Fault(RuntimeError):
    """A run cannot go on: one sentence that names the part and the step (exit code 1)."""
