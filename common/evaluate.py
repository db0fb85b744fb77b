"""Evaluation on a fixed protocol: one episode per copy of the environment, fixed start seeds, no noise.

    python -m common.evaluate runs/Pendulum-v1/mage_td3/seed-0 --episodes 100
"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

from common import BadInput, Fault
from common.envs import make_env


@dataclass
class Evaluation:
    returns: np.ndarray  # (n,) undiscounted return of each episode
    lengths: np.ndarray  # (n,) steps of each episode


def as_policy(actor):
    """An actor module as a policy: float32 arrays (n, ds) -> (n, da)."""
    device = next(actor.parameters()).device

    @torch.no_grad()
    def policy(obs):
        return actor(torch.as_tensor(obs, device=device)).cpu().numpy()

    return policy


def evaluate(policy, env_id, episodes=10, seed=0, max_steps=10_000):
    """Runs `episodes` episodes side by side; copy i starts from seed + i, whatever was run before.

    policy: float32 arrays (n, ds) -> (n, da). Each copy contributes its first episode and nothing else: the
    first n episodes to end would be the short ones. An endless episode is cut after max_steps.
    Raises Fault for an action that is not finite, which MuJoCo would take for no action, and pay.
    """
    envs = gym.vector.SyncVectorEnv([lambda: make_env(env_id)] * episodes)
    try:
        obs, _ = envs.reset(seed=[seed + i for i in range(episodes)])
        returns, lengths, alive = np.zeros(episodes), np.zeros(episodes, int), np.ones(episodes, bool)
        while alive.any() and lengths.max() < max_steps:
            action = policy(obs)
            if not np.isfinite(action).all():
                raise Fault("an action of the evaluated policy is not finite")
            obs, reward, terminated, truncated, _ = envs.step(action)
            if not np.isfinite(reward[alive]).all():
                raise Fault("a reward of the evaluation is not finite")
            returns[alive] += reward[alive]
            lengths[alive] += 1
            alive &= ~(terminated | truncated)  # a finished copy starts again, uncounted
    finally:
        envs.close()
    return Evaluation(returns, lengths)


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # a run's folder
    episodes: int = 10  # from starts that the run's own evaluations did not use
    plan: bool = False  # search with the model too, where the algorithm can


def main(args):
    """Prints the mean return of a run's policy and the 95% confidence interval of the mean."""
    path = Path(args.run_dir) / "args.json"
    if args.episodes < 2:
        raise BadInput(f"--episodes {args.episodes}: give at least 2, for a confidence interval.")
    if not path.is_file():
        raise BadInput(f"{path} does not exist: name a run's folder, runs/<env-id>/<script>/seed-<seed>.")
    run = json.loads(path.read_text())
    spec = importlib.util.spec_from_file_location("script", Path(__file__).parent.parent / run["script"])
    script = importlib.util.module_from_spec(spec)
    sys.modules["script"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    torch.manual_seed(0)  # a planner draws
    policy = script.load_policy(args.run_dir, plan=args.plan)
    returns = evaluate(policy, run["args"]["env_id"], args.episodes, seed=10**6).returns
    half = 1.96 * returns.std(ddof=1) / np.sqrt(len(returns))
    print(f"return {returns.mean():.2f} +- {half:.2f} (95%) over {args.episodes} episodes")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (BadInput, Fault) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
