"""What the tests share: the scripts that exist, tiny settings, an environment that follows a plan.

With `--script mine.py` the tests run against a copy of a script in which somebody has changed something:

    cp mage_td3.py mine.py
    python -m pytest -q tests/test_losses.py --script mine.py

mine.py takes the place of the script that it resembles most, and of the shared text of the scripts below.
"""

import ast
import dataclasses
import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from common.args import flag, parse_args
from common.compare import Comparison
from common.rewards import REWARDS, TERMINATIONS

torch.set_num_threads(1)  # as in the scripts: small networks are fastest on one
ROOT = Path(__file__).resolve().parent.parent
LADDER = ["td3", "dyna_td3", "mage_td3", "maac_sac"]  # lowest rung first
SCRIPTS = [name for name in LADDER if (ROOT / f"{name}.py").exists()]
TD3 = ["td3", "dyna_td3", "mage_td3"]
DYNA = TD3[1:]
SAC = dict(soft_targets=True, horizon=0, steve=False, real_ratio=1)  # what makes maac_sac.py plain SAC
TINY = dict(
    env_id="Pendulum-v1", total_timesteps=60, eval_every=20, eval_episodes=1, learning_starts=20,
    buffer_size=500, updates_per_step=2, batch_size=8, actor_hidden=8, critic_hidden=8, ensemble_size=2,
    model_hidden=8, model_layers=1, model_train_every=20, model_batches=2, reward_hidden=8, reward_layers=1,
    rollouts=16, model_buffer_size=200, horizon=2, num_samples=2, model_lr=0.01,  # so that fits end soon
    device="cpu",  # on a machine with a GPU as well: what needs one says so
)  # fmt: skip


# --- a copy in the place of a script ------------------------------------------------------------------------
FAMILY = pytest.StashKey[str]()  # with --script: the script of which the file is a copy


def pytest_addoption(parser):
    parser.addoption("--script", metavar="FILE", help="test this copy of a script in the script's place")


def pytest_configure(config):
    about = "about(script, *names): what a test looks at, in `script` and wherever the text is the same"
    config.addinivalue_line("markers", about)
    if config.option.script:
        path = Path(config.invocation_params.dir, config.option.script)
        config.stash[FAMILY] = family = resembled(path)
        copy = loaded(path, family)
        for rung in LADDER[: LADDER.index(family) + 1]:  # what the scripts below have is in the copy as well
            sys.modules[rung] = copy


def pytest_collection_modifyitems(config, items):
    for item in items:
        about = item.get_closest_marker("about")
        lowest, *names = about.args if about else [None]
        if unknown := [name for name in names if name not in definitions(ROOT / f"{lowest}.py")]:
            raise pytest.UsageError(f"{item.name} is about {unknown[0]}, which {lowest}.py does not define.")
        if FAMILY in config.stash and (reason := why_not(item, config.stash[FAMILY], lowest, names)):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif FAMILY in config.stash:
            mine = definitions(Path(config.invocation_params.dir, config.option.script))
            if missing := [name for name in names if name not in mine]:
                raise pytest.UsageError(
                    f"{config.option.script} has no {missing[0]}, which {item.originalname} looks at: "
                    f"keep the name and its arguments, and change what is inside."
                )


def why_not(item, family, lowest, names):
    """Why a test says nothing of a copy of the script `family`, or None."""
    if lowest is None:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        named = parameters.get("name")
        return None if named == family else f"not about {family}.py" if named else "not about one script"
    if not names:
        return None if lowest == family else f"about {lowest}.py"
    theirs, ours = (definitions(ROOT / f"{name}.py") for name in (lowest, family))
    for name in names:
        if name not in ours:
            return f"about {name}, which {family}.py does not have"
        if ours[name] != theirs[name]:
            return f"about the {name} of {lowest}.py; {family}.py has its own"
    return None


def definitions(path):
    """{name: code} of a script's functions, classes and constants, and of its flags, {"Args.lr": code}."""
    return definitions_in(path.read_text())


@cache
def definitions_in(source):
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            found |= {ast.unparse(target): ast.unparse(node) for target in node.targets}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.unparse(node)
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
            found |= {f"Args.{x.target.id}": ast.unparse(x) for x in fields}
    return found


def resembled(path):
    """The script of which a file is a copy, by the names that it defines, or a sentence that it is none."""
    try:
        mine = set(definitions(path))
    except OSError as error:
        raise pytest.UsageError(f"--script {path}: the file cannot be read ({error.strerror}).") from None
    except (SyntaxError, ValueError) as error:
        reason = getattr(error, "msg", None) or error
        where = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise pytest.UsageError(f"--script {path} is no Python file ({reason}{where}).") from None
    theirs = {name: set(definitions(ROOT / f"{name}.py")) for name in SCRIPTS}
    family = max(theirs, key=lambda name: len(mine & theirs[name]) / len(mine | theirs[name]))
    lacking = [name for name in definitions(ROOT / f"{family}.py") if name not in mine]
    if 2 * len(lacking) > len(theirs[family]):
        named = [name for name in lacking if name[0].islower() or name in ("Actor", "Critic")][:4]
        raise pytest.UsageError(
            f"--script {path} is no copy of a script: it resembles {family}.py most, and lacks "
            f"{len(lacking)} of the {len(theirs[family])} names there, such as {', '.join(named)}."
        )
    return family


def loaded(path, name):
    """The module that a file makes, under the name of the script in whose place it stands."""
    spec = importlib.util.spec_from_file_location(name, path)
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look it up
    sys.path.append(str(path.parent))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules[name] = before
        why = f"{type(error).__name__}: {error}"
        raise pytest.UsageError(f"--script {path} cannot be imported ({why}).") from None
    return module


def script(name):
    """A script; with --script, the copy that stands in its place."""
    return importlib.import_module(name)


def fields(name):
    """The flags of a script: {field of Args: its type}."""
    return {field.name: field.type for field in dataclasses.fields(script(name).Args)}


def words(settings):
    """A command line: {"lr": 0.1, "resume": True, "steve": False} -> --lr 0.1 --resume --no-steve."""
    found = []
    for field, value in settings.items():
        switch = {True: [flag(field)], False: [flag(f"no_{field}")]}
        found += switch[value] if isinstance(value, bool) else [flag(field), str(value)]
    return found


def tiny(name, **changes):
    """A command line for a script: those of the TINY settings that it has, and the changes."""
    return words({field: value for field, value in TINY.items() if field in fields(name)} | changes)


def train(name, run_dir, **changes):
    """Trains in this process with TINY settings and the changes; returns the run folder."""
    module = script(name)
    module.train(parse_args(module.Args, module.PRESETS, tiny(name, run_dir=run_dir, **changes)))
    return Path(run_dir)


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def stored(state):
    """The replay buffer's rows (s, a, r, s', terminated) in a checkpoint."""
    return state["buffer" if "buffer" in state else "real"]["rows"]


class Planned(gym.Env):
    """Follows PLAN, a length and an end for each episode, over and over.

    It observes (number of the episode, steps in it) and pays 1 + 10 times the one + the other, as they were
    before the step: a row of a replay buffer tells where it comes from.
    """

    PLAN = ((3, "terminated"), (2, "truncated"), (1, "both"), (1, "truncated"), (1, "terminated"))

    def __init__(self):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.episode = -1

    def observe(self):
        return np.array([self.episode, self.steps], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = 0 if seed is not None else self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        reward = 1.0 + 10 * self.episode + self.steps
        self.steps += 1
        length, end = self.PLAN[self.episode % len(self.PLAN)]
        end = end if self.steps == length else None
        return self.observe(), reward, end in ("terminated", "both"), end in ("truncated", "both"), {}


@pytest.fixture
def register(monkeypatch):
    """A function that registers an environment, by default one whose reward and termination are known."""
    monkeypatch.setattr(gym.logger, "min_level", gym.logger.ERROR)  # Gymnasium's checker dislikes NaN
    ids = []

    def add(make, known=True):
        ids.append(f"test/Env{len(ids)}-v0")
        gym.register(ids[-1], make)
        if known:
            monkeypatch.setattr(Comparison, "fault", lambda self, steps: None)  # they pay something else
            monkeypatch.setitem(REWARDS, ids[-1], lambda obs, action, next_obs: obs[..., 0])
            monkeypatch.setitem(TERMINATIONS, ids[-1], lambda next_obs: next_obs[..., 0] > 1e6)
        return ids[-1]

    yield add
    for env_id in ids:
        del gym.registry[env_id]


@pytest.fixture
def planned(register):
    return register(Planned)


@pytest.fixture(autouse=True)
def no_oracle_in_evaluations(request, monkeypatch):
    """A critic's usefulness takes a third of a second at each evaluation: only where it is the subject."""
    if "gradient_quality" not in request.node.name:
        monkeypatch.setattr("common.run.gradient_quality", lambda *args: {})
