"""--accelerate: a function that updates networks, unchanged but compiled or replayed as a CUDA graph."""

import dataclasses
import functools
import inspect
import warnings

import torch

from common import BadInput, Fault, memory_is_full, one_line

WARM_UP = 3  # calls before a capture: they create gradients and the optimisers' state, and choose the kernels


def accelerate(function, how, device, optimizers=()):
    """function(*flags) -> {name: 0-d tensor}, made faster by --accelerate. `optimizers` are those that the
    function steps, and how is one of these:

    - "none": the function itself.
    - "graph", on a GPU only: it is replayed as a CUDA graph.
    - "compile": it goes through torch.compile, and on a GPU what comes of that is replayed as a CUDA graph.
    - "auto": "graph" on a GPU, "none" on a CPU.

    The flags are Python booleans by which the function branches, such as whether the actor is trained. The
    function must not wait for the device, and must change everything in place (parameters, statistics,
    optimisers' counters). The numbers are those of the plain function up to rounding, but for what `compile`
    draws: random numbers of its own, from the same seed.

    A graph keeps every Python number as it was when the function was recorded. A number that is to change
    during a run, such as a weight that falls with the step, must therefore be a tensor on the device that is
    changed in place: weight = torch.tensor(0.2, device=device), and later weight.fill_(0.1). A number that
    changes nevertheless ends the run with a message, if the function reads it from the function around it.
    """
    on_gpu = device.type == "cuda"
    if how == "auto":
        how = "graph" if on_gpu else "none"
    if how == "graph" and not on_gpu:
        raise BadInput("--accelerate graph is for a GPU: use --accelerate compile, or leave it out.")
    if how == "compile":
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=device))
        except Exception as error:  # each missing tool has an error of its own
            reason = next((x for x in str(error).split("\n") if x and not x.endswith("raised:")), "no reason")
            fix = "install a C++ compiler (on a GPU: Triton), or leave it out"
            raise BadInput(f"--accelerate compile does not work here ({reason}): {fix}.") from None
    if how != "none" and on_gpu:  # left alone, they count their steps on the CPU
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["capturable"] = True
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # the warm-up's
    if how == "compile":
        # The sizes never change. Told nothing, torch.compile takes some number for one that does, and PyTorch
        # 2.11 then ends with an error of its own on a GPU, where the optimiser is RAdam.
        function = torch.compile(function, dynamic=False)
    return Graphed(function) if how != "none" and on_gpu else function


class Graphed:
    """Replays a function as one CUDA graph for each combination of flags: no launch from Python is left.

    The first calls run as they are, on the stream of the capture. All of them count: a capture executes
    nothing, and the first replay follows at once. The next replay overwrites the output. What is returned is
    detached, since its history would tie the parameters' gradients to that stream when others use them.
    """

    def __init__(self, function):
        self.function, self.calls, self.graphs, self.numbers = function, {}, {}, {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *flags):
        self.calls[flags] = self.calls.get(flags, 0) + 1
        if self.calls[flags] <= WARM_UP:
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                out = self.run(*flags)
            here.wait_stream(self.stream)
            return out
        if flags not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self.graphs[flags] = graph, self.run(*flags)
            except RuntimeError as error:
                reason = error.__context__ or error  # PyTorch also says that the capture ended badly
                if memory_is_full(reason):
                    raise reason from None
                fault = f"--accelerate: an update cannot become a CUDA graph ({one_line(reason)})"
                raise Fault(
                    f"{fault}. What it calls, such as a reward of your own, must not wait for the GPU, as "
                    ".item(), torch.tensor and `if` on a tensor do: change that, or use --accelerate none."
                ) from reason
            self.numbers[flags] = numbers_around(self.function)
        now = numbers_around(self.function)
        for name, value in self.numbers[flags].items():
            if now.get(name) != value:
                raise Fault(
                    f"--accelerate: {'.'.join(name)} was {value} when an update became a CUDA graph, and is "
                    f"{now.get(name)} now, which the graph does not see. Make it a tensor on the device "
                    "and change it in place, as by .fill_, or use --accelerate none."
                )
        graph, out = self.graphs[flags]
        graph.replay()
        return out

    def run(self, *flags):
        return {name: value.detach() for name, value in self.function(*flags).items()}


def numbers_around(function):
    """The Python numbers that a function reads from the function around it: {name: number}.

    A name is a tuple, ("step",) or, for the field of a dataclass, ("args", "lam").
    """
    function, found = inspect.unwrap(function), {}  # torch.compile wraps what it compiles
    code = getattr(function, "__code__", None)  # which an object that is called does not have
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True) if code else ():
        try:
            value = cell.cell_contents
        except ValueError:  # nothing was assigned to it yet
            continue
        if isinstance(value, int | float):
            found[(name,)] = value
        elif dataclasses.is_dataclass(value):
            items = vars(value).items()
            found |= {(name, field): item for field, item in items if isinstance(item, int | float)}
    return found


def value_and_gradient(f, x, create_graph=False):
    """f(x), (..., B), and the gradient of its sum with respect to x, in the only form that torch.compile can
    differentiate once more."""
    gradient, out = torch.func.grad(lambda x: ((out := f(x)).sum(), out), has_aux=True)(x)
    return out, gradient if create_graph else gradient.detach()


def compiles_as(other):
    """A decorator: while torch.compile looks, `other` stands in the place of the function; otherwise nothing
    changes. Uncompiled, the plain form is faster and easier to read."""

    def decorate(function):
        @functools.wraps(function)
        def chosen(*args, **kwargs):
            return (other if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return chosen

    return decorate
