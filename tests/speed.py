"""What an update costs on this machine: python -m tests.speed [--quick] [--threads N]

Everything runs in turns in one process and the median is shown, so that ratios hold on a busy machine. Sizes
are the paper's: batch 1024, 8 members of 4 x 512, critics and actor of 2 x 384, HalfCheetah's dimensions.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dyna_td3
import maac_sac
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



class SoftNets:
    """Actor, critics and model of maac_sac.py at the paper's sizes."""

    def __init__(self):
        args = maac_sac.Args()
        self.actor, self.critic, self.critic_target, self.model = maac_sac.networks(args, DS, DA)
        self.actor_opt, self.critic_opt = (maac_sac.adam(net, args.lr) for net in (self.actor, self.critic))
        self.step = partial(maac_sac.imagine, self.model, REWARD, TERMINATED)

    def update_actor(self, horizon, samples):
        obs, nets = torch.randn(256, DS), (self.actor, self.critic, self.step)
        loss, _ = maac_sac.actor_loss(*nets, 0.1, obs, GAMMA, horizon, samples)
        maac_sac.descend(self.actor_opt, loss)

    def update_critic(self, horizon, members):
        obs, action, next_obs = torch.randn(256, DS), torch.randn(256, DA), torch.randn(256, DS)
        outcome = torch.randn(256), next_obs, torch.zeros(256, dtype=torch.bool)
        step = partial(self.step, shuffle=False)
        targets = (self.actor, self.critic_target, step, 0.1, *outcome, GAMMA, horizon, members)
        y, _ = maac_sac.soft_targets(*targets)
        maac_sac.descend(self.critic_opt, maac_sac.critic_loss(self.critic, obs, action, y))


class CountFlop(TorchDispatchMode):
    """Floating-point operations in matrix products; PyTorch's own counter fails at a double backward."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def table(title, make, jobs, turns):
    """Prints milliseconds (median over turns, every job once in each) and GFLOP of the jobs -> seconds."""
    nets, times, flop = {}, {name: [] for name in jobs}, {}
    for name, job in jobs.items():
        nets[name] = make()
        job(nets[name])
        with CountFlop() as counter:
            job(nets[name])
        flop[name] = counter.flop
    for _ in range(turns):
        for name, job in jobs.items():
            start = time.perf_counter()
            job(nets[name])
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[name]) for name in jobs}
    print(f"{title:46} {'ms':>9} {'GFLOP':>8} {'GFLOP/s':>8}")
    for name, value in seconds.items():
        print(f"{name:46} {1e3 * value:9.2f} {flop[name] / 1e9:8.2f} {flop[name] / 1e9 / value:8.1f}")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the turns")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    turns = 3 if args.quick else 9
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {turns} turns\n")
    jobs = {
        "MAGE critic update, naive transcription": transcription,
        "MAGE critic update": mage,
        "Dyna-TD3 critic update": dyna,
        "actor update": actor,
        "model batch (8 x 256)": model,
    }
    slow, fast, td, pi, batch = table("TD3 family", Nets, jobs, turns).values()
    training = 120 / 25 * batch + 10 / 2 * pi  # per environment step, the same in both
    whole = (10 * fast + training) / (10 * td + training)
    print(f"\nnaive / ours, MAGE critic update {slow / fast:.1f}")
    print(f"MAGE / Dyna-TD3, critic update {fast / td:.2f}; environment step, all learning {whole:.2f}\n")

    jobs = {
        "SAC actor update (H = 0, 1 sample)": lambda n: n.update_actor(0, 1),
        "MAAC actor update (H = 4, 5 samples)": lambda n: n.update_actor(4, 5),
        "SAC critic update": lambda n: n.update_critic(0, 1),
        "STEVE critic update (H = 2, 8 members)": lambda n: n.update_critic(2, 8),
    }
    sac_actor, maac_actor, sac_critic, steve = table("MAAC, batch 256", SoftNets, jobs, 10 * turns).values()
    print(f"\nMAAC / SAC, actor update {maac_actor / sac_actor:.1f}")
    print(f"STEVE / SAC, critic update {steve / sac_critic:.1f}")


if __name__ == "__main__":
    main()
