"""--accelerate graph without a GPU: a capture is played on the CPU, whole runs come out equal bit for bit.

The capture records every operation of PyTorch together with its tensors, a replay executes the same ones on
the same memory. As with a CUDA graph, whatever happens in Python happens once, at the capture: a tensor that
is replaced instead of changed in place, or read after the next replay has overwritten it, is found here.
"""

import contextlib
import types

import pytest
import torch
import torch.optim.adam as adam
import torch.optim.radam as radam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from common.acceleration import Graphed
from common.run import Run
from tests.conftest import SAC, checkpoint, script, stored, train

VIEWS = ("detach", "alias", "lift_fresh", "squeeze_", "unsqueeze_", "t_", "transpose_")  # move no data
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class Tape(TorchDispatchMode):
    """Records operations with their tensors, and executes them: a capture here is its own first replay."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], -1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, func
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in VIEWS:
            with torch.no_grad():
                operation = tree_map_only(torch.Tensor, torch.detach, (func, args, kwargs or {}, out))
            self.operations.append(operation)
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations if self.replays else ():
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != value.data_ptr():  # otherwise: done in place
                    old.copy_(value)


@pytest.fixture
def tapes(monkeypatch):
    """CUDA graphs that are Tapes -> the list of those that were made; optimisers count in tensors."""
    made = []

    @contextlib.contextmanager
    def graph(tape, stream):
        made.append(tape)
        with tape:
            yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(Stream=lambda: stream, current_stream=lambda: stream, graph=graph,
                 stream=contextlib.nullcontext, CUDAGraph=Tape)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for module in (radam, adam):
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *args, **kwargs: ["cpu"])
    return made


def accelerated(name, how, capturable, monkeypatch):
    """Has a script's functions replayed ("graph") or not, its optimisers capturable or not."""

    def accelerate(function, _, device, optimizers):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["capturable"] = capturable
        return Graphed(function) if how == "graph" else function

    monkeypatch.setattr(script(name), "accelerate", accelerate)


def both(name, folder, monkeypatch, **changes):
    """The checkpoints and train.csv of the same run, plain and replayed."""
    found = []
    for how in ("none", "graph"):
        accelerated(name, how, True, monkeypatch)  # capturable ones round in another way
        often = {} if name in ("td3", "maac_sac") else dict(model_train_every=10)
        run = train(name, folder / how, **often, **changes)
        head, *rows = [line.split(",") for line in (run / "train.csv").read_text().splitlines()]
        keep = [i for i, column in enumerate(head) if column != "steps_per_second"]
        found.append((checkpoint(run), [[row[i] for i in keep] for row in [head, *rows]]))
    return found


def different(one, two):
    """The parts of two checkpoints that are not equal bit for bit."""
    names = [name for name in one if isinstance(one[name], dict) and name not in ("args", "env", "tables")]
    assert len(names) > 7
    leaves = {name: tuple(map(tree_leaves, (one[name], two[name]))) for name in names}
    return [name for name, pair in leaves.items() if not all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*pair, strict=True)
    )]  # fmt: skip


CASES = [
    ("td3", dict(policy_delay=1)), ("td3", dict(policy_delay=3, env_id="Hopper-v4")), ("dyna_td3", {}),
    ("dyna_td3", dict(learned_reward=True)), ("mage_td3", dict(learned_reward=True, env_id="Hopper-v4")),
    ("mage_td3", dict(policy_delay=1, num_critics=1)), ("mage_td3", dict(policy_delay=3)), ("maac_sac", {}),
    ("maac_sac", dict(env_id="Hopper-v4")), ("maac_sac", SAC),
]  # fmt: skip


@pytest.mark.parametrize("name, changes", CASES)
def test_a_replayed_run_is_the_plain_run(name, changes, tapes, tmp_path, monkeypatch):
    (one, log), (two, replayed) = both(name, tmp_path, monkeypatch, **changes)
    assert not different(one, two) and replayed == log
    flags = 1 if name == "maac_sac" or changes.get("policy_delay") == 1 else 2
    models = 1 if name in ("dyna_td3", "mage_td3") else 0
    assert len(tapes) == flags + models and min(tape.replays for tape in tapes) > 2
    assert stored(one)[:, -1].any() == (changes.get("env_id") == "Hopper-v4")  # some episodes terminate


@pytest.mark.parametrize("name, settings", [("mage_td3", {}), ("maac_sac", SAC)])
def test_acceleration_may_change_on_resume(name, settings, tapes, tmp_path, monkeypatch):
    accelerated(name, "none", False, monkeypatch)
    whole = checkpoint(train(name, tmp_path / "whole", **settings))
    for how, total in [("none", 30), ("graph", 45), ("none", 60)]:
        accelerated(name, how, how == "graph", monkeypatch)
        changes = settings | dict(accelerate=how, resume=total > 30, total_timesteps=total)
        found = checkpoint(train(name, tmp_path / "parts", **changes))
        assert found["critic_opt"]["param_groups"][0]["capturable"] == (how == "graph")
    assert len(tapes) > 0
    for part in ("actor", "critic", "critic_target", "critic_opt"):
        torch.testing.assert_close(tree_leaves(found[part]), tree_leaves(whole[part]), rtol=1e-3, atol=1e-5)


# --- what would go wrong ------------------------------------------------------------------------------------
def rebinding(self, x, whole=None):
    """A Normaliser that puts a new tensor in the place of its mean."""
    x = torch.as_tensor(x, device=self.mean.device)
    self.moments[0] += 1
    self.mean = self.mean + (x.float() - self.mean) / self.moments[0]


def hoarding(self, **values):
    """Run.record without a copy of what the next replay overwrites."""
    for name, value in values.items():
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
        self.pending[name] = self.pending[name] + value if name in self.pending else value
        self.counts[name] = self.counts.get(name, 0) + 1


@pytest.mark.parametrize("where, method, wrong, networks", [
    (script("mage_td3").Normaliser, "update", rebinding, True), (Run, "record", hoarding, False),
])  # fmt: skip
def test_the_emulation_sees(where, method, wrong, networks, tapes, tmp_path, monkeypatch):
    """Neither is wrong in a plain run."""
    monkeypatch.setattr(where, method, wrong)
    (one, log), (two, replayed) = both("mage_td3", tmp_path, monkeypatch)
    assert replayed != log and ({"actor", "critic"} <= set(different(one, two))) == networks
