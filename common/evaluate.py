"""Evaluation protocol: one episode per copy of the environment, fixed start seeds, no noise.

    python -m common.evaluate runs/Pendulum-v1/mage_td3/seed-0 --episodes 100 --video swing-up.gif
"""

import importlib.util
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import torch
import tyro

from common import BadInput, Fault, one_line
from common.envs import call, make_env
from common.files import NEWEST, fitting, newest, read_checkpoint

MAX_STEPS = 10_000  # an episode without end is cut here


@dataclass
class Evaluation:
    returns: np.ndarray  # (n,) undiscounted return of each episode
    lengths: np.ndarray  # (n,) steps of each episode
    cut: bool  # whether one of them was still going on
    starts: np.ndarray  # (n, ds) their first observations


def load_state(run_dir):
    """The checkpoint of a run: {name: state_dict}."""
    path = newest(run_dir)
    if path is None:
        missing = f"{Path(run_dir, NEWEST)} does not exist"
        raise BadInput(f"{missing}: name a run's folder, runs/<env-id>/<script>/seed-<seed>.")
    return read_checkpoint(path)


def load_run(run_dir, Args):
    """Arguments and checkpoint of a run: (Args, {name: state_dict}). BadInput if another script made it."""
    state = load_state(run_dir)
    others = sorted(set(state["args"]) ^ {f.name for f in fields(Args)})  # no two scripts have the same
    if others:
        differ = f"their Args differ in {', '.join(others)}"
        fix = "use the one that args.json names, as it was then"
        raise BadInput(f"{run_dir} was not made by this script ({differ}): {fix}.")
    return Args(**state["args"]), state


def as_policy(actor):
    """An actor module as a policy: float32 arrays (n, ds) -> (n, da)."""
    device = next(actor.parameters()).device

    @torch.no_grad()
    def policy(obs):
        return actor(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()

    return policy


def evaluate(policy, env_id, episodes=10, seed=0, max_steps=MAX_STEPS):
    """Runs `episodes` episodes side by side; copy i starts from seed + i, whatever was run before.

    policy: float32 arrays (n, ds) -> (n, da). Each copy contributes its first episode and nothing else: the
    first n episodes to end would be the short ones. An endless episode is cut after max_steps.
    Raises Fault for an action that is not finite, which MuJoCo would take for no action, and pay.
    """
    envs = gym.vector.SyncVectorEnv([lambda: make_env(env_id)] * episodes)
    try:
        obs, _ = call(env_id, envs.reset, seed=[seed + i for i in range(episodes)])
        starts = obs.copy()
        returns, lengths, alive = np.zeros(episodes), np.zeros(episodes, int), np.ones(episodes, bool)
        while alive.any() and lengths.max() < max_steps:
            action = policy(obs)
            if not np.isfinite(action).all():
                raise Fault("an action of the evaluated policy is not finite")
            obs, reward, terminated, truncated, _ = call(env_id, envs.step, action)
            if not np.isfinite(reward[alive]).all():
                raise Fault("a reward of the evaluation is not finite")
            returns[alive] += reward[alive]
            lengths[alive] += 1
            alive &= ~(terminated | truncated)  # a finished copy starts again, uncounted
    finally:
        envs.close()
    return Evaluation(returns, lengths, bool(alive.any()), starts)


def film(policy, env_id, path, seed=0):
    """Draws one episode into a GIF file, at most 25 frames a second -> return, length."""
    try:
        env = make_env(env_id, render_mode="rgb_array")
        rate = env.metadata.get("render_fps", 25)
        obs, _ = env.reset(seed=seed)
        frames, total, done = [env.render()], 0.0, False
        if frames[0] is None:
            raise ValueError("it draws nothing")
    except Exception as error:  # each library that draws fails in its own way
        cause = error.__cause__ or error  # make_env's own words are about --env-id
        reason, fix = one_line(cause), "leave --video out"  # it takes no render_mode, or draws nothing
        if not isinstance(cause, (TypeError, ValueError)):
            fix = "install gymnasium[classic-control] or [mujoco], and EGL or OSMesa where there is no screen"
        raise BadInput(f"--video: {env_id} cannot be drawn here ({reason}): {fix}.") from None
    steps, every = 0, int(np.ceil(rate / 25))
    while not done and steps < MAX_STEPS:
        obs, reward, terminated, truncated, _ = env.step(policy(obs[None])[0])
        steps, total, done = steps + 1, total + float(reward), terminated or truncated
        if steps % every == 0:
            frames.append(env.render())
    env.close()
    frames = [frame[::2, ::2] for frame in frames]
    try:
        imageio.mimsave(path, frames, duration=1000 * every / rate, loop=0)  # milliseconds; for ever
    except (OSError, ValueError) as error:
        raise BadInput(f"--video {path} cannot be written ({error}): give the name of a GIF file.") from None
    return total, steps


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # a run's folder
    episodes: int = 10  # from starts that the run's own evaluations did not use
    video: Path | None = None  # a GIF file for the first of them
    plan: bool = False  # search with the model too, where the algorithm can


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
    if args.episodes < 2:
        raise BadInput(f"--episodes {args.episodes}: give at least 2, for a confidence interval.")
    if args.video and not (args.video.suffix == ".gif" and args.video.absolute().parent.is_dir()
                           and not args.video.is_dir()):
        raise BadInput(f"--video {args.video}: give the name of a GIF file in a folder that exists.")
    script, env_id = load_script(args.run_dir)
    torch.set_num_threads(1)  # as in the scripts: small networks are fastest on one
    torch.manual_seed(0)  # a planner draws
    with fitting(args.run_dir):
        policy = script.load_policy(args.run_dir, plan=args.plan)
    if args.video:
        total, steps = film(policy, env_id, args.video, seed=10**6)
        print(f"{args.video}: an episode of {steps} steps, return {total:.2f}")
    result = evaluate(policy, env_id, args.episodes, seed=10**6)
    returns, cut = result.returns, "; episodes without end were cut" if result.cut else ""
    half = 1.96 * returns.std(ddof=1) / np.sqrt(len(returns))
    print(f"return {returns.mean():.2f} +- {half:.2f} (95%) over {args.episodes} episodes{cut}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, prog="python -m common.evaluate"))
    except (BadInput, Fault) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
