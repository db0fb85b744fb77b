"""Evaluation on a fixed protocol: one episode per copy of the environment, fixed start seeds, no noise."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch

from common import Fault
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
