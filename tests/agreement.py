"""How far apart the plain functions of a script and the faster ones are after the same updates.

Every way starts from the same weights and draws the same random numbers. "again" is the plain functions a
second time, which shows whether the device repeats itself; "capturable" is the plain ones too, but their
optimisers count on the GPU, as they do for a graph and for what is compiled.
"""

import importlib
import math

import torch
from torch import nn

from common import one_line
from common.acceleration import accelerate
from tests.speed import made

UPDATES = 20
# The largest difference that is rounding, as a part of what was learned. Where RAdam counts on the GPU it
# computes its rectification there, in float32, which cancels in the first steps: with the TD3 family on a CPU
# that makes 0.9% to 2%, and after 100 updates 0.2%; on a GPU it made 1.1%, and compiling MAAC made 2.8%. One
# update less makes 9% to 27%.
FAR = {"again": 0.001, "capturable": 0.04, "graph": 0.001, "compile": 0.04}


def learned(name, how, device):
    """Makes UPDATES updates -> {network: its weights before and after}, {loss: its last value}."""
    torch.manual_seed(0)
    functions, inside = made(name, device)
    nets = {key: list(net.parameters()) for key, net in inside.items() if isinstance(net, nn.Module)}
    nets = {key: parameters for key, parameters in nets.items() if parameters}
    optimizers = [x for x in inside.values() if isinstance(x, torch.optim.Optimizer)]
    for optimizer in optimizers if how == "capturable" else ():
        optimizer.param_groups[0]["capturable"] = True
    plain = "none" if how in ("again", "capturable") else how
    fast = {block: accelerate(f, plain, device, optimizers) for block, f in functions.items()}

    def weights():
        lists = {key: [p.detach().double().cpu().flatten() for p in net] for key, net in nets.items()}
        return {key: torch.cat(parts) for key, parts in lists.items()}

    before, losses = weights(), {}
    torch.manual_seed(1)
    for i in range(UPDATES):
        for block, function in fast.items():
            losses |= function(*[i % 2 == 1] * (block == "update" and name != "maac_sac"))
    after = weights()
    return {key: (before[key], after[key]) for key in nets}, {key: x.item() for key, x in losses.items()}


def apart(one, other):
    """How far apart two trainings from the same weights are, for the network that differs most: the length of
    the difference, as a part of the length of what was learned."""
    lengths = [(float((one[key][1] - after).norm()), float((after - before).norm()))
               for key, (before, after) in other.items()]  # fmt: skip
    return max((difference / change for difference, change in lengths if change > 0), default=math.nan)


def compare(name, device):
    """Yields a row for each way to make a script's updates, and {"error": sentence} if it does not agree."""
    inductor = importlib.import_module("torch._inductor.config")
    inductor.fallback_random = True  # what is compiled draws the numbers of the plain functions
    against, found = {"again": "none"}, {}
    if device.type == "cuda":
        against |= dict(capturable="none", graph="capturable", compile="capturable")
    for how in ("none", *against):
        try:
            found[how] = weights, losses = learned(name, how, device)
            if how == "none":
                continue
            base, theirs = found[against[how]]
            far = apart(weights, base)
            losses_apart = max(abs(losses[key] - x) / max(abs(x), 1e-6) for key, x in theirs.items())
            yield dict(script=name, accelerate=how, against=against[how], updates=UPDATES, weights_apart=far,
                       losses_apart=losses_apart, agrees=far <= FAR[how])  # fmt: skip
            if not far <= FAR[how]:
                yield dict(error=f"{name}: {how} is {far:.2g} apart from {against[how]}")
        except Exception as error:
            yield dict(error=f"{name}, {how}: {one_line(error)}")
