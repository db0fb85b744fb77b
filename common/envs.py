"""Environments whose reward and termination are exact functions of (obs, action, next_obs).

`make_env` is the only way in: flat float32 observations, actions in [-1, 1]. `ReplayableEnv` lets a training
run stop and go on in mid-episode. The environments of common/tasks.py are registered at the end.
"""

import json
import os
import sys
from functools import cache, partial

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import RescaleAction, TransformAction, TransformObservation

from common import BadInput, Fault, one_line, say
from common.compare import Comparison

RUNNERS = ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Ant", "Humanoid")  # v4 and v5


def make_env(env_id, seed=None, render_mode=None):
    """Make an environment with observations (ds,) float32 and actions (da,) float32 in [-1, 1].

    Actions beyond [-1, 1] are clipped; each dimension is rescaled to the environment's own bounds. MuJoCo
    runners have info["x_velocity"], in m/s, put before their observation, 0 at reset: it is what they are
    paid for, and nothing else in the observation gives it exactly. What it returns is the caller's own array,
    also where the environment changes its arrays in place. With `seed`, the first bare `reset()` is
    `reset(seed=seed)`. Raises BadInput for an id or a space that cannot be used.
    """
    if render_mode == "rgb_array" and sys.platform == "linux":  # a picture needs no screen
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    warn_level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR  # not "v4 is out of date"
    try:
        env = WithoutStatistics(_make(env_id, render_mode))
        _check_spaces(env_id, env)
        if env.spec.id.removesuffix("-v4").removesuffix("-v5") in RUNNERS:
            env = PrependXVelocity(env)
        # Observations get no bounds: nobody uses them, and those of a float64 Box may not fit into float32.
        anything = Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        env = TransformObservation(env, partial(np.array, dtype=np.float32), anything)  # which copies
        # Clipped after the rescaling, which takes actions beyond [-1, 1] past the bounds, and may round past.
        own = env.action_space
        env = TransformAction(env, partial(_clip, space=own), Box(own.low, own.high, dtype=np.float32))
        env = RescaleAction(env, np.float32(-1), np.float32(1))
    finally:
        gym.logger.min_level = warn_level
    if seed is not None:
        env.action_space.seed(seed)
    return SeedFirstReset(env, seed, env_id)


def _make(env_id, render_mode):
    name = str(env_id).rpartition("-v")[0] or env_id  # a damaged args.json may name anything
    versions = [f"{name}-v{n}" for n in (0, 1, 4, 5) if f"{name}-v{n}" in gym.registry]
    if versions and name == env_id and env_id not in gym.registry:  # rewards are those of a version
        raise BadInput(f"--env-id {env_id!r}: give its version: {' or '.join(versions)}.")
    try:
        return gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except Exception as error:  # whatever goes wrong while it is built, the user can only choose another
        reason = " ".join(str(error).split()).rstrip(".")
        module = str(env_id).rpartition(":")[0]
        if f"No module named {module!r}" in str(error):
            fix = f"put {module}.py beside the script, or its folder on PYTHONPATH"
        elif isinstance(error, (ImportError, gym.error.DependencyNotInstalled)):
            fix = "install what it needs"
        elif isinstance(error, gym.error.Error):  # it is not registered, or not under this version
            fix = "give an id that Gymnasium knows, such as Hopper-v4, or its module too: points:Point-v0"
        else:
            reason = one_line(error, placed=True)
            fix = "see to it that it can be made, or, if it cannot be made twice, give --eval-episodes 0"
        if versions and env_id not in versions:  # MuJoCo's v2 and v3 are registered, but gone
            fix = f"use {' or '.join(versions)}"
        raise BadInput(f"--env-id {env_id!r} cannot be made ({reason}): {fix}.") from error


def _check_spaces(env_id, env):
    """Raise BadInput unless observations are a flat float Box and actions one with finite bounds."""
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, Box):
        kind = type(obs).__name__
        fault = f"has {kind} observations, not a flat Box: wrap it in gymnasium.wrappers.FlattenObservation"
    elif len(obs.shape) != 1 or obs.shape[0] == 0:
        fault = f"has observations of shape {obs.shape}, not (n,): choose one with a flat state, not images"
    elif not np.issubdtype(obs.dtype, np.floating):
        fix = "choose one that observes floats, or wrap it in gymnasium.wrappers.DtypeObservation"
        fault = f"has {obs.dtype} observations: {fix}"
    elif not isinstance(action, Box) or not np.issubdtype(action.dtype, np.floating):
        fault = f"has the action space {action}: choose one with continuous actions, a Box of floats"
    elif len(action.shape) != 1 or action.shape[0] == 0:
        fault = f"has actions of shape {action.shape}, not (n,): choose one with flat actions"
    elif not ((-1e30 < action.low) & (action.low < action.high) & (action.high < 1e30)).all():
        fault = f"has the action space {action}: give it finite action bounds, low < high"
    else:
        return
    close(env_id, env)
    raise BadInput(f"--env-id {env_id!r} {fault}.")


def _clip(action, space):
    return np.clip(action, space.low, space.high).astype(space.dtype)


def close(env_id, env):
    """Closes an environment. If one fails in this, its work is done: a sentence says so, once."""
    try:
        env.close()
    except Exception as error:
        say_once(f"{env_id} failed in close ({one_line(error)})")


say_once = cache(say)


def call(env_id, method, *args, **kwargs):
    """What an environment's reset or step returns. Fault if it raises, for it is somebody's code, where all
    may happen, if the observation is not what was promised, or if the reward is no finite number."""
    try:
        obs, *rest = method(*args, **kwargs)
    except Exception as error:
        raise Fault(f"{env_id} failed in {method.__name__} ({one_line(error)})") from error
    if obs.shape != method.__self__.observation_space.shape:
        raise Fault(f"an observation of {env_id} has shape {obs.shape}, not what its space says")
    if not np.isfinite(obs).all():
        raise Fault(f"the observation of {env_id} is not finite in float32")
    if len(rest) > 1:  # a step, and not a reset
        if np.shape(rest[0]):
            raise Fault(f"the reward of {env_id} has shape {np.shape(rest[0])}, it is not a number")
        if not abs(np.float64(rest[0])) <= np.finfo(np.float32).max:  # None is NaN there
            raise Fault(f"the reward of {env_id}, {rest[0]}, is not a finite number in float32")
        if np.shape(rest[1]) or rest[1] not in (True, False):
            raise Fault(f"{env_id} says for terminated {rest[1]}, which is neither True nor False")
    return obs, *rest


class PrependXVelocity(gym.Wrapper):
    """Observation (ds,) becomes (1 + ds,): first the mean x velocity over the last step, m/s, 0 at reset."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = Box(-np.inf, np.inf, (1 + env.observation_space.shape[0],), np.float64)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.append(0.0, obs), info

    def step(self, action):
        obs, *rest, info = self.env.step(action)
        return np.append(info["x_velocity"], obs), *rest, info


class WithoutStatistics(gym.Wrapper):
    """Leaves out the info["episode"] of an environment that records its returns: RecordEpisodeStatistics of
    Gymnasium, which the scripts put around it, accepts no other."""

    def step(self, action):
        *step, info = self.env.step(action)
        return *step, {name: value for name, value in info.items() if name != "episode"}


class SeedFirstReset(gym.Wrapper):
    """The first reset has a seed, later ones are bare, as Gymnasium wants it: the environment's own
    generator, of whatever kind, is seeded in the way that its author has foreseen."""

    def __init__(self, env, seed, given_id):
        super().__init__(env)
        self.next_seed, self.given_id = seed, given_id  # with the module: two may register the same id

    def reset(self, *, seed=None, options=None):
        seed, self.next_seed = self.next_seed if seed is None else seed, None
        return self.env.reset(seed=seed, options=options)


class ReplayableEnv(gym.Wrapper):
    """Wraps the training environment so that a stopped run goes on bit for bit, in mid-episode too.

    Its state is the random generator as it was just before the last reset, and the actions since: replaying
    them is exact wherever `np_random` is the only randomness. Setting positions and velocities is not, as
    MuJoCo's solver starts from its last solution. An episode that cannot be repeated is given up on resume,
    and a new one begins; one sentence says so then, and another one when the run starts, if two resets with
    the same seed and some steps differ. `obs` is the current observation (None before a reset).
    Whatever goes wrong in the environment, or comes out of it that is no number, is a Fault. A function of
    common/rewards.py that says something else than the environment is bad input if the steps of the first
    reset show it, a Fault in the first steps of the run, and a sentence if a later end of an episode does.
    """

    COMPARED = 100  # steps
    TRIED = 5  # steps after each of the two resets
    LONGEST = 10_000  # steps of an episode that a resume replays

    def __init__(self, env):
        super().__init__(env)
        self._left, self._doubted = self.COMPARED, False
        self._comparison = Comparison(self.env.get_wrapper_attr("given_id"))
        self.obs, self._seed, self._resets = None, None, 0  # None before a reset
        self._rng, self._reset_args, self._actions, self._length = None, None, [], 0

    def reset(self, **kwargs):
        seed = self.env.get_wrapper_attr("next_seed")
        if seed is not None and kwargs.get("seed") is None:  # the first reset of a run
            self._seed, kwargs = seed, kwargs | {"seed": seed}
            steps, again = self._try_out(kwargs), self._try_out(kwargs)
            if _as_bytes(steps) != _as_bytes(again):
                say(f"{self.spec.id} is not the same after two resets with one seed: runs of one --seed will "
                    "differ, and a resumed run will begin with a new episode")  # fmt: skip
            if fault := self._comparison.fault(steps):
                raise BadInput(fault)
            if doubt := self._comparison.doubt(steps):
                say(doubt)
        self._rng, self._reset_args = _random_state(self.unwrapped), kwargs
        self._actions, self._length = [], 0
        self._resets += 1
        self.obs, info = call(self.spec.id, self.env.reset, **kwargs)
        return self.obs, info

    def _try_out(self, kwargs):
        """The first steps after a reset, each (obs, action, next_obs, reward, terminated)."""
        rng, done, steps = np.random.default_rng(0), False, []
        obs, _ = call(self.spec.id, self.env.reset, **kwargs)
        while not done and len(steps) < self.TRIED:
            action = rng.uniform(-1, 1, self.action_space.shape).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = call(self.spec.id, self.env.step, action)
            steps.append((obs, action, next_obs, reward, terminated))
            obs, done = next_obs, terminated or truncated
        return steps

    def step(self, action):
        before, action = self.obs, np.array(action, np.float32)  # a copy: the caller may reuse its array
        self._length += 1
        if self._length <= self.LONGEST:
            self._actions.append(action)
        self.obs, reward, *rest = call(self.spec.id, self.env.step, action)
        self._left -= 1
        if self._left >= 0 or rest[0] and not self._doubted:  # ends are rare, and may come late
            fault = self._comparison.fault([(before, action, self.obs, reward, rest[0])])
            if fault and self._left >= 0:
                raise Fault(fault)
            if fault:
                self._doubted = True
                say(f"{fault}; the run goes on, but who learns from this function learns another task")
        return self.obs, reward, *rest

    def state_dict(self):
        """Plain data and a tensor, which torch.load(weights_only=True) reads."""
        actions = torch.from_numpy(np.array(self._actions, np.float32))  # (steps, da)
        return {"rng": self._rng, "reset_args": self._reset_args, "actions": actions, "length": self._length,
                "obs": None if self.obs is None else self.obs.tolist(), "seed": self._seed,
                "resets": self._resets}  # fmt: skip

    def load_state_dict(self, state):
        """Restores the generator, resets and replays: the environment then goes on as the saved one did.
        Where that is not possible a new episode begins, with a seed of its own."""
        self._seed, self._resets = state["seed"], state["resets"] - 1
        try:
            _set_random_state(self.unwrapped, state["rng"])
            self.reset(**state["reset_args"])
            ended = [any(self.step(action)[2:4]) for action in state["actions"].numpy()]
            same = self._length == state["length"] and self.obs.tolist() == state["obs"]
            repeated = same and not any(ended)
            reason = "it is not the same when repeated: the environment has changed, or differs each time"
        except Fault as error:
            repeated, reason = False, str(error)
        if not repeated:
            say(f"--resume: the unfinished episode of {self.spec.id} is given up after {state['length']} "
                f"steps ({reason}), and a new one begins")  # fmt: skip
            self._resets = state["resets"]
            seed = None if self._seed is None else [self._seed, self._resets]
            self.reset(seed=seed and int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1))


def _as_bytes(steps):
    return [np.asarray(x).tobytes() for step in steps for x in step]


def _random_state(env):
    """The state of an environment's np_random as plain data; None where it is no generator of NumPy's."""
    rng = getattr(env, "np_random", None)
    if isinstance(rng, np.random.Generator):
        state = rng.bit_generator.state
    elif isinstance(rng, np.random.RandomState):
        state = rng.get_state(legacy=False)
    else:
        return None
    return json.loads(json.dumps(state, default=np.ndarray.tolist))


def _set_random_state(env, state):
    rng = getattr(env, "np_random", None)
    if isinstance(rng, np.random.Generator) and state is not None:
        rng.bit_generator.state = state
    elif isinstance(rng, np.random.RandomState) and state is not None:
        rng.set_state(state)


# --- environments of our own: common/tasks.py ---
# Entry points are strings, which worker processes can import.
gym.register("ContinuousCartPole-v1", "common.tasks:ContinuousCartPole", max_episode_steps=500)
gym.register("DoubleIntegrator-v1", "common.tasks:DoubleIntegrator", max_episode_steps=200)
for _robot in ("HalfCheetah", "Ant", "Hopper", "Walker2d"):
    gym.register(f"mbbl/{_robot}-v0", f"common.tasks:Wang{_robot}", max_episode_steps=1000)
if int(mujoco.__version__.split(".")[0]) >= 3:
    gym.registry.pop("Pusher-v4", None)  # registering over it would warn
    gym.register("Pusher-v4", "common.tasks:PusherV4", max_episode_steps=100)
