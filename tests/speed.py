"""What an update costs on this machine: python -m tests.speed [--quick] [--threads N]

Everything runs in turns in one process and the median is shown, so that ratios hold on a busy machine. Sizes
are the paper's: batch 1024, 8 members of 4 x 512, critics and actor of 2 x 384, HalfCheetah's dimensions.
"""

import argparse
import statistics
import time

import torch

import dyna_td3
import mage_td3
from common.rewards import reward_fn, termination_fn
from tests import naive

B, DS, DA, K, GAMMA = 1024, 18, 6, 8, 0.99
REWARD, TERMINATED = reward_fn("HalfCheetah-v4"), termination_fn("HalfCheetah-v4")


class Nets:
    def __init__(self):
        norm = mage_td3.Normaliser(DS)
        self.actor, self.actor_target = (mage_td3.Actor(norm, DA, 384) for _ in range(2))
        self.critic, self.critic_target = (mage_td3.Critic(norm, DA, 384, 2) for _ in range(2))
        self.model = mage_td3.Dynamics(norm, DA, 512, 4, K)
        self.critic_opt, self.model_opt = mage_td3.radam(self.critic, 1e-4), mage_td3.radam(self.model, 1e-4)
        self.actor_opt = mage_td3.radam(self.actor, 1e-4)

    def draw(self):
        obs = torch.randn(B, DS)
        with torch.no_grad():
            action = self.actor(obs)
        return obs, action, torch.randn_like(obs), 0.2 * torch.randn_like(action)


def step_target(n, obs, model_noise, target_noise):
    def target(action):
        next_obs = n.model.sample(obs, action, model_noise)
        step = (REWARD(obs, action, next_obs), next_obs, TERMINATED(next_obs))
        return mage_td3.td_target(n.actor_target, n.critic_target, *step, target_noise, GAMMA)

    return target


def mage(n):
    obs, action, model_noise, target_noise = n.draw()
    terms = mage_td3.mage_loss(n.critic, step_target(n, obs, model_noise, target_noise), obs, action)
    mage_td3.descend(n.critic_opt, terms[0] + 0.2 * terms[1])
    mage_td3.polyak(n.critic_target, n.critic, 0.005)


def dyna(n):
    obs, action, model_noise, target_noise = n.draw()
    with torch.no_grad():
        y = step_target(n, obs, model_noise, target_noise)(action)
    mage_td3.descend(n.critic_opt, dyna_td3.td_loss(n.critic, obs, action, y))
    mage_td3.polyak(n.critic_target, n.critic, 0.005)


def transcription(n):
    """The naive loss, an ordinary backward pass through everything, and one small update per parameter."""
    obs, action, model_noise, target_noise = n.draw()
    nets = (n.critic, n.actor_target, n.critic_target, n.model)
    draws = (obs, action, torch.randint(K, (B,)), model_noise, target_noise)
    terms = naive.mage_terms(*nets, REWARD, TERMINATED, *draws, GAMMA)
    n.critic_opt.zero_grad()
    (terms[0] + 0.2 * terms[1]).backward()
    torch.nn.utils.clip_grad_value_(n.critic.parameters(), 5.0)
    n.critic_opt.step()
    with torch.no_grad():
        for target, source in zip(n.critic_target.parameters(), n.critic.parameters(), strict=True):
            target.data.copy_(0.995 * target + 0.005 * source)


def actor(n):
    obs = torch.randn(B, DS)
    mage_td3.descend(n.actor_opt, mage_td3.actor_loss(n.actor, n.critic, obs))
    mage_td3.polyak(n.actor_target, n.actor, 0.005)


def model(n):
    obs, action = torch.randn(K, 256, DS), torch.randn(K, 256, DA)
    mage_td3.descend(n.model_opt, mage_td3.model_loss(n.model, obs, action, obs + 0.1)[0])



def measure(jobs, turns):
    """{name: seconds}: the median over turns in which every job runs once."""
    nets = {name: Nets() for name in jobs}
    for name, job in jobs.items():
        job(nets[name])
    times = {name: [] for name in jobs}
    for _ in range(turns):
        for name, job in jobs.items():
            start = time.perf_counter()
            job(nets[name])
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the turns")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    jobs = {
        "MAGE critic update, naive transcription": transcription,
        "MAGE critic update": mage,
        "Dyna-TD3 critic update": dyna,
        "actor update": actor,
        "model batch (8 x 256)": model,
    }
    seconds = measure(jobs, 3 if args.quick else 9)
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {3 if args.quick else 9} turns\n")
    for name, value in seconds.items():
        print(f"{name:42} {1e3 * value:9.1f} ms")
    slow, fast, td, pi, batch = seconds.values()
    print(f"\nnaive / ours, MAGE critic update           {slow / fast:9.1f}")
    print(f"MAGE / Dyna-TD3, critic update             {fast / td:9.2f}")
    training = 120 / 25 * batch + 10 / 2 * pi  # per environment step, the same in both
    print(f"MAGE / Dyna-TD3, whole environment step    {(10 * fast + training) / (10 * td + training):9.2f}")


if __name__ == "__main__":
    main()
