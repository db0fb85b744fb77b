"""--accelerate: no update waits for the device, what is compiled is the same, every replay is one call.

Without a GPU the first is shown on PyTorch's meta device, which has shapes and no numbers; what needs a GPU
is skipped.
"""

import contextlib
import functools
import types
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common.acceleration
import td3
from common import Fault, memory_is_full
from common.acceleration import WARM_UP, Graphed, accelerate
from common.rewards import reward_fn, termination_fn
from tests.conftest import DYNA, SCRIPTS, TD3, checkpoint, script, tiny, train
from tests.inner_functions import inner_functions

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


class Watch(TorchDispatchMode):
    """Collects operations that make the host wait for the device, or copy between the two."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        made = {x.device.type for x in tree_leaves(out) if torch.is_tensor(x)}
        masked = func.overloadpacket == torch.ops.aten.index and any(x.dtype == torch.bool for x in given)
        copied = len({x.device.type for x in given} | made) > 1
        if func.overloadpacket.__name__ in WAITS or masked or copied:
            self.found.append(str(func))
        self.seen += "meta" in made
        return out


@pytest.fixture
def without_foreach(monkeypatch):
    """The meta device lacks PyTorch's own foreach functions and optimisers; a GPU has them."""
    for optimizer in (torch.optim.RAdam, torch.optim.Adam):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda tensors, **kwargs: tensors[0].norm())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", lambda *args, **kwargs: None)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Pusher-v4", "Hopper-v4", "Humanoid-v4"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_update_waits_for_the_device(name, env_id, without_foreach):
    functions, _ = inner_functions(name, tiny(name, env_id=env_id, batch_size=16), torch.device("meta"))
    assert len(functions) == (2 if name in DYNA else 1)
    for block, function in functions.items():
        for flags in [(False,), (True,)] if block == "update" and name in TD3 else [()]:
            with Watch() as watch:
                function(*flags)
            assert watch.seen > 50 and not watch.found, f"{block}: {sorted(set(watch.found))}"


def test_the_watch_sees_what_waits():
    """What the meta device cannot do at all raises by itself."""
    x = torch.ones(3, device="meta")
    with Watch() as watch:
        torch.zeros(3).to("meta")
    assert watch.found
    for wait in (lambda: x.cpu(), lambda: float(x.sum()), lambda: x[x > 0], lambda: bool((x > 0).any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@pytest.mark.parametrize("flags", [(), (True,)])
def test_every_call_of_a_graph_is_one_execution(flags, monkeypatch):
    """With a graph that only pretends: it records a call without executing it, a replay executes it."""
    done, recording, streams, used = [], [], [], []

    @contextlib.contextmanager
    def graph(g, stream):
        recording.append(g)
        used.append(stream)
        yield
        recording.pop()

    def function(*given):
        if recording:
            recording[-1].replay = lambda: done.append(given)
        else:
            done.append(given)
        return {"loss": torch.ones((), requires_grad=True) * 2}

    def stream():
        streams.append(types.SimpleNamespace(wait_stream=lambda other: None))
        return streams[-1]

    @contextlib.contextmanager
    def on(stream):
        used.append(stream)
        yield

    here = stream()
    fakes = dict(Stream=stream, current_stream=lambda: here, graph=graph, stream=on,
                 CUDAGraph=types.SimpleNamespace)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphed = Graphed(function)
    for call in range(1, WARM_UP + 5):
        loss = graphed(*flags)["loss"]
        assert loss == 2 and not loss.requires_grad and done == [flags] * call
    graphed(False)
    assert done[-1] == (False,) and len(graphed.graphs) == 1  # other flags warm up for themselves
    assert len(streams) == 2 and set(map(id, used)) == {id(streams[1])}  # warm-up and capture share one


def mage_terms(compiled, layer_norm):
    mage = script("mage_td3")
    torch.manual_seed(0)
    norm = mage.Normaliser(3)
    actor, (critic, target) = mage.Actor(norm, 1, 16), (
        mage.Critic(norm, 1, 16, 2, layer_norm) for _ in range(2))  # fmt: skip
    model = mage.Dynamics(norm, 1, 16, 2, 4)  # its parameters want gradients, in vain here
    model.delta_norm.std.fill_(0.1)
    reward_of, terminated_at = reward_fn("Pendulum-v1"), termination_fn("Pendulum-v1")
    obs, action = torch.randn(32, 3), torch.rand(32, 1) * 2 - 1
    model_noise, noise = torch.randn_like(obs), 0.1 * torch.randn_like(action)

    def step_target(action):
        next_obs = model.sample(obs, action, model_noise)
        step = (reward_of(obs, action, next_obs), next_obs, terminated_at(next_obs))
        return mage.td_target(actor, target, *step, noise, 0.99)

    loss = torch.compile(mage.mage_loss, fullgraph=True) if compiled else mage.mage_loss
    terms = loss(critic, step_target, obs, action)
    parameters, keep = list(critic.parameters()), dict(retain_graph=True, allow_unused=True)
    grads = [torch.autograd.grad(term, parameters, **keep) for term in terms]
    (terms[0] + terms[1]).backward()
    return terms, grads, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_compiled_mage_loss_is_the_loss(layer_norm):
    (terms, grads, others), (wanted, wanted_grads, _) = (mage_terms(how, layer_norm) for how in (True, False))
    torch.testing.assert_close(terms, wanted, rtol=1e-5, atol=1e-6)
    for found, want in zip(grads, wanted_grads, strict=True):
        for left, right in zip(found, want, strict=True):
            right = torch.zeros_like(left) if right is None else right
            torch.testing.assert_close(torch.zeros_like(right) if left is None else left, right,
                                       rtol=1e-4, atol=1e-6)  # fmt: skip
    assert all(grad is None for grad in others)


def test_a_compiled_run_learns_and_resumes(tmp_path):
    whole = train("td3", tmp_path / "whole", accelerate="compile", total_timesteps=24)
    train("td3", tmp_path / "parts", accelerate="compile", total_timesteps=22)
    parts = train("td3", tmp_path / "parts", accelerate="compile", total_timesteps=24, resume=True)
    one, two = checkpoint(whole), checkpoint(parts)
    (steps,) = {int(s["step"]) for s in one["critic_opt"]["state"].values()}
    assert steps == 8
    for network in ("actor", "actor_target", "critic", "critic_target"):
        assert all(torch.equal(one[network][key], two[network][key]) for key in one[network])


@pytest.mark.parametrize("how", ["none", "auto"])
def test_nothing_is_accelerated_unless_asked(how):
    function = object()
    assert accelerate(function, how, torch.device("cpu")) is function


@pytest.mark.parametrize("how, device, made", [
    ("none", "cuda", "f"), ("auto", "cuda", "graph of f"), ("graph", "cuda", "graph of f"),
    ("compile", "cuda", "graph of compiled f"), ("compile", "cpu", "compiled f"),
])  # fmt: skip
def test_what_is_made_of_a_function(how, device, made, monkeypatch):
    monkeypatch.setattr(common.acceleration, "Graphed", lambda function: f"graph of {function}")
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)  # the attempt to compile
    compiled = mock.Mock(side_effect=lambda f, **kwargs: f"compiled {f}" if f == "f" else lambda x: None)
    monkeypatch.setattr(torch, "compile", compiled)
    assert accelerate("f", how, torch.device(device)) == made
    if how == "compile":  # without this, PyTorch 2.11 fails on a GPU with an error of its own
        assert compiled.mock_calls[-1] == mock.call("f", dynamic=False)


@pytest.mark.parametrize("how, device, there", [
    ("none", "cuda", False), ("auto", "cuda", True), ("graph", "cuda", True), ("compile", "cuda", True),
    ("none", "cpu", False), ("auto", "cpu", False), ("compile", "cpu", False),
])  # fmt: skip
def test_optimisers_count_on_the_gpu_only_where_it_helps(how, device, there, monkeypatch):
    monkeypatch.setattr(common.acceleration, "Graphed", lambda function: function)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: lambda *args: None)
    optimizer = td3.radam(torch.nn.Linear(1, 1), 1e-4)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)  # the attempt to compile
    accelerate(lambda: None, how, torch.device(device), [optimizer])
    assert [group["capturable"] for group in optimizer.param_groups] == [there]


def test_a_capture_that_fails_says_what_to_do(monkeypatch):
    """Also where PyTorch says in the end that the capture is invalid, and hides the reason by that. A memory
    that is full is said to be so, as anywhere else."""

    @contextlib.contextmanager
    def graph(g, stream):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the capture ended badly")  # noqa: B904

    fakes = dict(Stream=mock.Mock, current_stream=mock.Mock, graph=graph, CUDAGraph=mock.Mock)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(common.acceleration, "WARM_UP", 0)
    for reason, type_, text in [
        ("Cannot copy", Fault, r"cannot become .* \(RuntimeError: Cannot copy\).* --accelerate none"),
        ("CUDA out of memory", RuntimeError, "^CUDA out of memory$"),
    ]:
        with pytest.raises(type_, match=text):
            Graphed(mock.Mock(side_effect=RuntimeError(reason)))()


@pytest.mark.parametrize("wrong", ["number", "setting", None])
@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(torch.compile, dynamic=False)])
def test_a_number_that_changes_is_not_taken_for_what_it_was(wrong, wrap, monkeypatch):
    """A graph would go on with the old one, and say nothing. A tensor changed in place is no mistake."""
    fakes = dict(Stream=mock.Mock, current_stream=mock.Mock, stream=lambda stream: contextlib.nullcontext(),
                 graph=lambda g, stream: contextlib.nullcontext(), CUDAGraph=mock.Mock)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    args, weight, tensor, flag = td3.Args(), 0.5, torch.ones(()), True

    def update():
        return {"loss": args.tau * weight * tensor if flag else later}

    graphed = Graphed(wrap(update))
    monkeypatch.setattr(graphed, "run", lambda *flags: {})
    for _ in range(WARM_UP + 2):
        graphed()
    tensor.fill_(0.25)
    later = None  # noqa: F841
    if wrong == "number":
        weight = 0.25
    elif wrong == "setting":
        args.tau = 0.01
    name = {"number": "weight was 0.5 .* 0.25", "setting": "args.tau was 0.005 .* 0.01", None: "none"}[wrong]
    fault = pytest.raises(Fault, match=f"--accelerate: {name} now, .*fill_, or use --accelerate none")
    with fault if wrong else contextlib.nullcontext():
        graphed()


@GPU
@pytest.mark.parametrize("wrong", [
    lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x if x.sum() > 0 else -x,
    lambda x: torch.tensor([3.0], device=x.device),
])  # fmt: skip
def test_a_function_that_waits_for_the_gpu_is_refused(wrong):
    """In one sentence, and the GPU can be used afterwards."""

    def reward(x):
        return {"reward": x.mean() + torch.as_tensor(wrong(x), device=x.device).sum()}

    x = torch.ones(3, device="cuda")
    function = accelerate(lambda: reward(x), "graph", torch.device("cuda"))
    for _ in range(WARM_UP):
        assert function()["reward"] == 4
    with pytest.raises(Fault, match="(?s)cannot become a CUDA graph.*must not wait.*--accelerate none"):
        function()
    assert reward(x)["reward"] == 4


@GPU
def test_memory_that_is_full_in_a_capture_is_said_to_be(monkeypatch):
    monkeypatch.setattr(common.acceleration, "WARM_UP", 0)
    x = torch.ones(2**20, device="cuda")
    function = accelerate(lambda: {"x": (x[:, None] * x).sum()}, "graph", torch.device("cuda"))
    with pytest.raises(RuntimeError) as error:
        function()
    assert memory_is_full(error.value) and x.sum() == 2**20


@GPU
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_graph_gives_the_numbers_of_the_plain_run(name, tmp_path, monkeypatch):
    """Of one whose optimisers count on the GPU as well: RAdam rounds otherwise where they count on the CPU,
    by up to 2% of what is learned in the first updates (tests/agreement.py)."""

    def plain(function, how, device, optimizers):
        for optimizer in optimizers:
            optimizer.param_groups[0]["capturable"] = True
        return function

    changes = dict(device="cuda", total_timesteps=60)
    two = checkpoint(train(name, tmp_path / "graph", accelerate="graph", **changes))
    monkeypatch.setattr(script(name), "accelerate", plain)
    one = checkpoint(train(name, tmp_path / "none", accelerate="none", **changes))
    for network in ("actor", "critic", "critic_target"):
        for key, value in one[network].items():
            torch.testing.assert_close(two[network][key], value, rtol=1e-3, atol=1e-4)
