"""The functions that a script accelerates (`update`, `train_model`), taken out of `train` to run them."""

import inspect
from unittest import mock

from common.args import parse_args
from tests.conftest import script


class Ready(Exception):
    """Everything is made, nothing was run."""


def inner_functions(name, argv, device):
    """-> {function's name: function}, {name: what they close over: args, networks, buffers, optimisers}."""
    module, found = script(name), {}

    def take(function, how, device, optimizers):
        found[function.__name__] = function
        return function

    changed = dict(prepare=lambda args: device, accelerate=take, Run=mock.Mock(side_effect=Ready))
    with mock.patch.multiple(module, **changed):
        try:
            module.train(parse_args(module.Args, module.PRESETS, argv))
        except Ready:
            pass
    inside = {}
    for function in found.values():
        inside |= inspect.getclosurevars(function).nonlocals
        for helper in [f for f in inside.values() if inspect.isfunction(f)]:
            inside |= inspect.getclosurevars(helper).nonlocals
    if "step_member" in inside:  # MAAC's model is in a partial
        inside["model"] = inside["step_member"].args[0]
    return found, inside


def fill(inside, rows=5000):
    """Puts made-up transitions into the buffers, and plausible statistics into the normalisers."""
    for name in ("buffer", "real", "imagined"):
        buffer = inside.get(name)
        if buffer is not None and len(buffer.rows) > 1:
            n = min(rows, len(buffer.rows))
            buffer.rows[:n].normal_()
            buffer.rows[:n, -1] = 0  # not terminated
            buffer.added = n
            buffer.size.fill_(n)
    if "model" in inside:
        inside["model"].delta_norm.std.fill_(0.1)
