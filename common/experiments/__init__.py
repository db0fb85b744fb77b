"""Programs that reproduce a figure of a paper, each with the scripts as they are."""

import sys
from importlib.util import find_spec


def needs(*scripts):
    """Ends a program that somebody has copied without the scripts that it imports."""
    if missing := [f"{script}.py" for script in scripts if find_spec(script) is None]:
        *first, last = missing
        names = f"{', '.join(first)} and {last}" if first else last
        print(f"error: this experiment needs {names} beside common/.", file=sys.stderr)
        sys.exit(2)
