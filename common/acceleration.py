"""--accelerate: a function that updates networks, compiled or replayed as a CUDA graph; its text stays."""

import torch

from common import BadInput

WARM_UP = 3  # calls before a capture: they create gradients and the optimisers' state, and choose the kernels


def accelerate(function, how, device):
    """function(*flags) -> {name: 0-d tensor}, made faster: how is "none", "compile" or "graph" (CUDA only).

    The function must not wait for the device, and keep all it changes in place (parameters, statistics,
    optimisers' counters). The numbers are those of the plain function up to rounding, but for what `compile`
    draws: random numbers of its own, from the same seed.
    """
    if how == "graph":
        if device.type != "cuda":
            raise BadInput("--accelerate graph is for a GPU: use --accelerate compile, or leave it out.")
        return Graphed(function)
    if how == "compile":
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=device))
        except Exception as error:  # each missing tool has an error of its own
            reason = str(error).strip().splitlines()[0]
            fix = "install a C++ compiler (on a GPU: Triton), or leave it out"
            raise BadInput(f"--accelerate compile does not work here ({reason}): {fix}.") from None
        return torch.compile(function)
    return function


class Graphed:
    """Replays a function as one CUDA graph for each combination of flags: no launch from Python is left.

    The first calls run as they are, on a stream of their own as a capture wants it. All of them count: a
    capture executes nothing, and the first replay follows at once. The next replay overwrites the output.
    """

    def __init__(self, function):
        self.function, self.calls, self.graphs = function, {}, {}

    def __call__(self, *flags):
        self.calls[flags] = self.calls.get(flags, 0) + 1
        if self.calls[flags] <= WARM_UP:
            stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                out = self.function(*flags)
            here.wait_stream(stream)
            return out
        if flags not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.graphs[flags] = graph, self.function(*flags)
        graph, out = self.graphs[flags]
        graph.replay()
        return out
