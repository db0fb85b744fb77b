"""Evaluation protocol: one episode per copy of the environment, fixed start seeds, no noise.

    python -m common.evaluate runs/Pendulum-v1/mage_td3/seed-0 --episodes 100 --video swing-up.gif
"""

import importlib.util
import inspect
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import tyro

from common import BadInput, Fault
from common.args import one_sentence
from common.envs import call, close, make_env
from common.files import BEST, POLICY, loading, read_checkpoint

MAX_STEPS = 10_000  # an episode without end is cut here
STUDENT = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # 97.5%, by degrees of freedom


@dataclass
class Evaluation:
    returns: np.ndarray  # (n,) undiscounted return of each episode
    lengths: np.ndarray  # (n,) steps of each episode
    cut: bool  # whether one of them was still going on
    starts: np.ndarray  # (n, ds) their first observations


def load_state(run_dir):
    """The networks of a run, {name: state_dict}: of its last checkpoint, or those in the file `run_dir`."""
    path = Path(os.path.expanduser(run_dir))
    path = path if path.suffix == ".pt" else path / POLICY
    if not path.is_file():
        fix = "name a run's folder, runs/<env-id>/<script>/seed-<seed>, or let the run go on with --resume"
        raise BadInput(f"{path} does not exist: {fix}.")
    return read_checkpoint(path)


def load_run(run_dir, Args):
    """Arguments and networks of a run: (Args, {name: state_dict}). BadInput if they do not fit Args.

    A flag that the script has got since then takes its default. The run of a script with the same Args, such
    as a copy, is taken as well.
    """
    state = load_state(run_dir)
    ours, script = {f.name for f in fields(Args)}, Path(inspect.getfile(Args)).name
    others = sorted(set(state["args"]) - ours if state["script"] == script else set(state["args"]) ^ ours)
    if others:
        differ = f"their Args differ in {', '.join(others)}"
        fix = "use the one that args.json names, as it was then"
        raise BadInput(f"{run_dir} was not made by this script ({differ}): {fix}.")
    return Args(**state["args"]), state


def load_networks(run_dir, Args, networks, only=None):
    """Arguments and networks of a run: (Args, {name: module}), built by `networks` of its script.

    With `only`, names of networks, the others stay as they begin: their classes may have changed since.

    For example the action-gradient of a critic, and what the model says, with obs (B, ds) as make_env gives
    it and B a multiple of --ensemble-size:

        import mage_td3
        args, nets = load_networks("runs/Pendulum-v1/mage_td3/seed-0", mage_td3.Args, mage_td3.networks)
        action = nets["actor"](obs).detach().requires_grad_()  # (B, da), in [-1, 1]
        q = nets["critic"](obs, action).min(0).values  # (B,)
        slope = torch.autograd.grad(q.sum(), action)[0]  # (B, da)
        next_obs = nets["model"].sample(obs, action, torch.randn_like(obs))  # (B, ds)
    """
    args, state = load_run(run_dir, Args)
    spaces = make_env(args.env_id)
    nets = networks(args, spaces.observation_space.shape[0], spaces.action_space.shape[0])
    for name in nets if only is None else only:
        nets[name].load_state_dict(state[name])
    return args, nets


def as_policy(function, device="cpu"):
    """A function of tensors, such as an actor, as a policy: arrays (n, ds) -> (n, da), or (ds,) -> (da,)."""
    @torch.no_grad()
    def policy(obs):
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        action = function(obs) if obs.ndim > 1 else function(obs[None])[0]
        return action.cpu().numpy()

    return policy


def evaluate(policy, env_id, episodes=10, seed=0, max_steps=MAX_STEPS):
    """Runs `episodes` episodes side by side; copy i starts from seed + i, whatever was run before.

    policy: float32 arrays (n, ds) -> (n, da). Each copy contributes its first episode and nothing else: the
    first n episodes to end would be the short ones. An endless episode is cut after max_steps.
    Raises Fault for an action that is not finite, which MuJoCo would take for no action, and pay; BadInput
    where there is no episode to run.
    """
    if episodes < 1:
        raise BadInput(f"evaluate: {episodes} episodes are none: give at least 1.")
    returns, lengths, alive = np.zeros(episodes), np.zeros(episodes, int), np.ones(episodes, bool)
    envs = []
    try:
        for _ in range(episodes):
            envs.append(make_env(env_id))
        obs = np.stack([call(env_id, env.reset, seed=seed + i)[0] for i, env in enumerate(envs)])  # (n, ds)
        starts = obs.copy()
        while alive.any() and lengths.max() < max_steps:
            action = policy(obs)  # (n, da), of the finished copies too: sums round as their number has it
            if not np.isfinite(action).all():
                raise Fault("an action of the evaluated policy is not finite")
            for i in np.flatnonzero(alive):
                obs[i], reward, terminated, truncated, _ = call(env_id, envs[i].step, action[i])
                returns[i] += reward
                lengths[i] += 1
                alive[i] = not (terminated or truncated)
    finally:
        for env in envs:
            close(env_id, env)
    return Evaluation(returns, lengths, bool(alive.any()), starts)


def half_width(values):
    """Half the width of the 95% confidence interval of the mean over the first axis, by Student's t."""
    n = len(values)
    t = STUDENT[n - 1] if n <= len(STUDENT) else 1.96 + 2.4 / (n - 1)
    return t * values.std(0, ddof=1) / np.sqrt(n)


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # This is the folder of a run.
    episodes: int = 10  # So many episodes are run, from starts that the run's own evaluations never had.
    max_steps: int = MAX_STEPS  # An episode is cut after this many steps.
    best: bool = False  # The policy of the best evaluation is taken, and not the last one.
    video: Path | None = None  # The first episode is filmed into this GIF file.
    plan: bool = False  # The policy also searches with its model, where the algorithm can.


def load_script(run_dir):
    """The script that a run was made with, as a module, and the run's environment."""
    path = Path(run_dir, "args.json")
    if not path.is_file():
        raise BadInput(f"{path} does not exist: name a run's folder, runs/<env-id>/<script>/seed-<seed>.")
    try:
        run = json.loads(path.read_text())
        name, env_id = run["script"], run["args"]["env_id"]
        script = Path(__file__).parent.parent / Path(name).name  # a file of ours, whatever the folder says
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is damaged: it does not name script and environment.") from None
    if script.suffix != ".py" or not script.is_file():
        raise BadInput(f"{path} names {name}, which is not beside common/: put it there.")
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module, env_id


def main(args):
    """Prints the mean return of a run's policy and the 95% confidence interval of the mean."""
    for name, least in (("episodes", 2), ("max_steps", 1)):  # two, for a confidence interval
        if getattr(args, name) < least:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}.")
    args.video = args.video and Path(os.path.expanduser(args.video))
    if args.video and not (args.video.suffix == ".gif" and args.video.absolute().parent.is_dir()
                           and not args.video.is_dir()):
        raise BadInput(f"--video {args.video}: give the name of a GIF file in a folder that exists.")
    run_dir = Path(os.path.expanduser(args.run_dir))
    script, env_id = load_script(run_dir)
    torch.set_num_threads(1)  # as in the scripts: small networks are fastest on one
    torch.manual_seed(0)  # a planner draws
    with loading(run_dir):
        policy = script.load_policy(run_dir / BEST if args.best else run_dir, plan=args.plan)
    if args.video:
        from common.film import film  # which needs a library for pictures: only here

        total, steps = film(policy, env_id, args.video, seed=10**6, max_steps=args.max_steps)
        print(f"{args.video}: an episode of {steps} steps, return {total:.2f}")
    result = evaluate(policy, env_id, args.episodes, seed=10**6, max_steps=args.max_steps)
    returns, half = result.returns, half_width(result.returns)
    cut = "; episodes without end were cut" if result.cut else ""
    print(f"return {returns.mean():.2f} +- {half:.2f} (95%) over {args.episodes} episodes{cut}")


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, prog="python -m common.evaluate", description=__doc__))
