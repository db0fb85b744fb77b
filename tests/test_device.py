"""A second device without a GPU: whole runs on it, and whatever is made in the wrong place ends them.

Its tensors are ordinary ones whose memory is marked. An operation on marked and unmarked tensors fails, as it
does on a GPU, and what comes of marked ones is marked. The device goes by the name of PyTorch's "meta", which
no run uses for anything else. Its numbers are those of the CPU, so that a run is that of the CPU bit for bit.
"""

import inspect
import re
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common.run
from common.args import parse_args
from common.compare import Comparison
from common.evaluate import as_policy
from common.rewards import reward_fn, termination_fn
from common.run import Run
from tests.conftest import ROOT, SAC, checkpoint, loaded, script, tiny

CPU, GPU = torch.device("cpu"), torch.device("meta")


def memory(x):
    return torch.Tensor.untyped_storage(x)


class SecondDevice(TorchDispatchMode):
    """Makes what is asked for on the device on the CPU, marks its memory, and watches who meets whom."""

    def __init__(self):
        super().__init__()
        self.marked = {}  # by address, which nothing else can get as long as the memory is kept here

    def has(self, x):
        return memory(x)._cdata in self.marked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        here, name = [self.has(x) for x in given], func.overloadpacket.__name__
        others = [x for x, marked in zip(given, here, strict=True) if not marked]
        met = [x.shape for x in others if x.ndim or name != "where"]  # that makes tensors of numbers
        if any(here) and met and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{func} got tensors of two devices, on the CPU those of shapes {met}")
        wanted = (kwargs or {}).get("device")
        out = func(*args, **(kwargs or {}) | ({"device": CPU} if wanted else {}))
        backward = torch._C._current_graph_task_id() >= 0  # where PyTorch asks for the CPU, which it sees
        if wanted == GPU or (wanted is None and any(here)) or backward:
            old = {memory(x)._cdata for x in given}
            new = [memory(x) for x in tree_leaves(out) if torch.is_tensor(x)]
            self.marked |= {storage._cdata: storage for storage in new if storage._cdata not in old}
        return out


@pytest.fixture
def device(monkeypatch):
    """The device, to be entered, and what PyTorch says of it and does with it."""
    mode = SecondDevice()
    tensor, as_tensor, save = torch.tensor, torch.as_tensor, torch.save
    numpy, to = torch.Tensor.numpy, torch.Tensor.to

    def moved(x, *args, **kwargs):
        """PyTorch itself would see nothing to do in a move from the CPU to the CPU."""
        target = kwargs.get("device") or next((a for a in args if isinstance(a, (str, torch.device))), None)
        if target and torch.device(target) == CPU and mode.has(x):
            x = torch.ops.aten._to_copy(x, device=CPU)
        return to(x, *args, **kwargs)

    def array(x, *args, **kwargs):
        if mode.has(x):
            raise TypeError("a tensor of the device has no array: use cpu()")
        return numpy(x, *args, **kwargs)

    def made(make, data, dtype=None, device=None):
        return moved(make(data, dtype=dtype), device or CPU)

    def saved(parts, file):
        """PyTorch saves no numbers of the meta device."""
        save(tree_map_only(torch.Tensor, lambda x: moved(x, CPU), parts), file)

    where = property(lambda x: GPU if mode.has(x) else CPU)
    for name, value in dict(device=where, to=moved, numpy=array, cpu=lambda x: moved(x, CPU)).items():
        monkeypatch.setattr(torch.Tensor, name, value, raising=False)
    monkeypatch.setattr(torch, "tensor", partial(made, tensor))
    monkeypatch.setattr(torch, "as_tensor", partial(made, as_tensor))
    monkeypatch.setattr(torch, "save", saved)
    # This is differentiated on the CPU, and the mode takes all that is differentiated for the device's.
    monkeypatch.setattr(Comparison, "doubt", lambda self, steps: None)
    return mode


def run(module, folder, **changes):
    """A run, stopped and resumed -> its checkpoint; in the end MAAC plans, which it never does in a run."""
    name = module.__name__
    for total in (30, 60):
        changes |= dict(run_dir=folder, total_timesteps=total, resume=total == 60)
        args = parse_args(module.Args, module.PRESETS, tiny(name, **changes))
        module.train(args)
    if name == "maac_sac":
        nets = module.networks(args, 3, 1).values()
        critic, _, model, actor = (net.to(module.prepare(args)) for net in nets)
        step = partial(module.imagine, model, reward_fn("Pendulum-v1"), termination_fn("Pendulum-v1"))
        obs = torch.zeros(2, 3, device=module.prepare(args))
        module.plan_action(actor, critic, step, obs, 0.99, horizon=2, candidates=8, iterations=2, elites=2)
    return checkpoint(folder)


def short_fits(module, monkeypatch):
    if module.__name__ == "maac_sac":
        monkeypatch.setattr(module, "fit_model", partial(module.fit_model, max_epochs=4))


def prepare(args):
    torch.manual_seed(args.seed)
    return GPU


CASES = [("td3", {}), ("dyna_td3", {}), ("mage_td3", dict(learned_reward=True)), ("maac_sac", {}),
         ("maac_sac", SAC), ("mage_td3", dict(env_id="Hopper-v4"))]  # fmt: skip


@pytest.mark.parametrize("name, changes", CASES)
def test_a_run_on_the_device_is_that_on_the_cpu(name, changes, device, tmp_path, monkeypatch):
    short_fits(script(name), monkeypatch)
    one = run(script(name), tmp_path / "cpu", **changes)
    monkeypatch.setattr(script(name), "prepare", prepare)
    with device:
        two = run(script(name), tmp_path / "gpu", **changes)
    assert len(device.marked) > 1000 and two["device"] == "meta"
    for part in one.keys() - {"args", "device", "seconds", "sums", "starts", "tables"}:
        for left, right in zip(tree_leaves(one[part]), tree_leaves(two[part]), strict=True):
            assert torch.equal(left, right) if torch.is_tensor(left) else left == right, part


# --- what would go wrong ------------------------------------------------------------------------------------
PLACES = re.compile(r", device=[\w.]+|\.to\(device\)")
WRONG = [(name, i) for name in ("mage_td3", "maac_sac")
         for i in range(len(PLACES.findall((ROOT / f"{name}.py").read_text())))]  # fmt: skip


@pytest.mark.parametrize("name, i", WRONG)
def test_whatever_is_made_in_the_wrong_place_is_seen(name, i, device, tmp_path, monkeypatch):
    """Each mention of the device in a script, left out."""
    source = (ROOT / f"{name}.py").read_text()
    place = list(PLACES.finditer(source))[i]
    (tmp_path / f"{name}.py").write_text(source[: place.start()] + source[place.end() :])
    monkeypatch.setitem(sys.modules, name, script(name))  # to come back in the end
    monkeypatch.setattr(sys, "path", sys.path[:])
    module = loaded(tmp_path / f"{name}.py", name)
    monkeypatch.setattr(module, "prepare", prepare)
    short_fits(module, monkeypatch)
    with device, pytest.raises((RuntimeError, TypeError), match="of two devices|of the device"):
        run(module, tmp_path / "run", **dict(learned_reward=True) if name == "mage_td3" else {})


@pytest.mark.parametrize("method", ["record", "log", "save"])
def test_a_run_that_makes_tensors_in_the_wrong_place_is_seen(method, device, tmp_path, monkeypatch):
    source = inspect.getsource(getattr(Run, method))
    wrong = re.sub(", device=self.device", "", source)
    assert wrong != source
    names = vars(common.run) | {}
    exec(textwrap.dedent(wrong), names)
    monkeypatch.setattr(Run, method, names[method])
    monkeypatch.setattr(script("td3"), "prepare", prepare)
    with device, pytest.raises((RuntimeError, TypeError), match="of two devices|of the device"):
        run(script("td3"), tmp_path / "run")


def test_an_evaluation_in_the_wrong_place_is_seen(device, tmp_path, monkeypatch):
    monkeypatch.setattr(common.run, "as_policy", lambda actor, device: as_policy(actor))
    monkeypatch.setattr(script("td3"), "prepare", prepare)
    with device, pytest.raises(RuntimeError, match="of two devices"):
        run(script("td3"), tmp_path / "run")
