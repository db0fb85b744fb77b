"""Runs on MuJoCo robots: their networks, and what the world does in the states that they come to."""

from pathlib import Path

import numpy as np
import torch

from common import BadInput
from common.envs import call, make_env
from common.evaluate import load_script
from common.experiments.mujoco_derivatives import MuJoCoDerivatives, trajectory
from common.files import loading, newest, read_checkpoint
from common.rewards import reward_fn, termination_fn

SEED = 2 * 10**6  # of the first new episode; no evaluation starts there


class Agent:
    """The networks of a run's last checkpoint, in float64. BadInput if the robot has no true derivatives."""

    def __init__(self, folder):
        script, self.env_id = load_script(folder)
        self.env = make_env(self.env_id)
        self.true, path = MuJoCoDerivatives(self.env), newest(folder)
        if path is None:
            raise BadInput(f"{folder} has no checkpoint: let the run go on with --resume.")
        state, self.name = read_checkpoint(path), "/".join(Path(folder).absolute().parts[-2:])
        self.obs_dim, da = (x.shape[0] for x in (self.env.observation_space, self.env.action_space))
        with loading(path):
            args = script.Args(**state["args"])
            nets = script.networks(args, self.obs_dim, da)
            for name, net in nets.items():
                net.load_state_dict(state[name])
                net.double().requires_grad_(name == "actor")
            self.rows = state["real" if "real" in state else "buffer"]["rows"]
        self.actor, self.critic, self.critic_target = (nets[n] for n in ("actor", "critic", "critic_target"))
        # The target of maac_sac.py has no actor of its own, and td3.py has no model.
        self.actor_target, self.model = nets.get("actor_target", self.actor), nets.get("model")
        if self.model is not None and not self.model.net[-1].bias.any():  # they begin at 0
            self.model = None  # as in a run of SAC
        self.gamma, self.step = args.gamma, state["step"]
        # Size and clip of the noise on the target's action, which maac_sac.py does not have.
        self.target_noise = getattr(args, "target_noise", 0.0), getattr(args, "noise_clip", 0.0)
        temperature = state.get("temperature")  # of maac_sac.py
        self.alpha = temperature["log_alpha"].exp().item() if temperature else None

    def outcome(self, obs, action, next_obs):
        """What a step gives: reward, next_obs, terminated."""
        known = reward_fn(self.env_id), termination_fn(self.env_id)
        return known[0](obs, action, next_obs), next_obs, known[1](next_obs)

    def transitions(self):
        """All that the run has stored, in float64: obs, action, reward, next_obs, terminated."""
        ds, da = self.obs_dim, self.env.action_space.shape[0]
        obs, action, reward, next_obs, end = self.rows.double().split([ds, da, 1, ds, 1], -1)
        return obs, action, reward[:, 0], next_obs, end[:, 0] > 0

    def imagined(self, obs, action, noise=0.0):
        """The next observation by each member, (n, ds) with (n, da) or (K, n, da) -> (K, n, ds)."""
        rows = [x.expand(self.model.members, *x.shape[-2:]) for x in (obs, action)]
        mean, logvar = self.model(*rows)
        return obs + self.model.delta_norm.inverse(mean + (logvar / 2).exp() * noise)

    def through_model(self, step, obs, action):
        """What comes next in the world, with the derivatives of the model, mean over its members."""
        found = self.imagined(obs, action).mean(0)
        return step[2] + found - found.detach()


def records(agent, args, bar):
    """Trajectories of the policy in the world: from states of new episodes, and from replayed ones."""
    fresh, replayed, rng, every = [], [], np.random.default_rng(0), max(args.states // args.starts, 1)
    while len(fresh) < args.states:
        obs, _ = call(agent.env_id, agent.env.reset, seed=None if fresh else SEED)
        t, first, done = 0, rng.integers(args.every), False
        while not done and len(fresh) < args.states:
            if t % args.every == first:
                steps = max(args.horizon, 1) if len(fresh) % every == 0 else 1
                with agent.true as true:
                    fresh.append(trajectory(true, agent.actor, obs.astype(float), steps))
                bar.update()
            action = agent.actor(torch.as_tensor(obs[None]).double())[0].detach().numpy()
            obs, _, terminated, truncated, _ = call(agent.env_id, agent.env.step, action.astype(np.float32))
            t, done = t + 1, terminated or truncated
    for row in agent.rows[torch.as_tensor(rng.integers(len(agent.rows), size=args.states))]:
        obs = row[: agent.obs_dim].double().numpy()
        with agent.true as true:
            if true.first is not None:
                true.restore(obs)
                replayed.append(trajectory(true, agent.actor, obs, 1))
        bar.update()
    return {"fresh": fresh, "replayed": replayed}


def step_sizes(agent, args):
    """How much the Jacobians in a new episode change with a tenth of EPS: {by: (median, 90% quantile)}."""
    obs, _ = call(agent.env_id, agent.env.reset, seed=SEED)
    names = ["action"] + ["observation"] * (agent.true.first is not None)
    found = {by: [] for by in names}
    for t in range(20 * args.every):
        action = agent.actor(torch.as_tensor(obs[None]).double())[0].detach().numpy()
        if t % args.every == 0:
            with agent.true as true:
                for by, changes in found.items():
                    jacobian = true.by_action if by == "action" else true.by_obs
                    one, other = jacobian(action), jacobian(action, true.EPS / 10)
                    changes.append(np.linalg.norm(one - other) / np.linalg.norm(one))
        obs, _, terminated, truncated, _ = call(agent.env_id, agent.env.step, action.astype(np.float32))
        if terminated or truncated:
            break
    return {by: np.quantile(changes, (0.5, 0.9)) for by, changes in found.items()}
