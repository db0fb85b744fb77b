"""How good are the action-gradients of a critic? A comparison with the true ones, where these are known."""

import copy

import torch

from common.dynamics import DYNAMICS, dynamics_fn
from common.rewards import reward_fn


def action_gradients(env_id, actor, obs, gamma, steps=200, tail=300):
    """True action-gradients along an actor's trajectories, all from one backward pass.

    obs (n, ds): where they start. -> states (steps, n, ds), actions and gradients of Q^pi (steps, n, da).
    A zero is added to the action of step t; the derivative by it of the rewards from there on, with gamma for
    each step, is the gradient in (s_t, a_t), as the actor reacts to what follows. There is no time limit: the
    sum ends `tail` steps after the last of `steps`, where gamma^tail is missing. Precision: that of obs.
    """
    step, reward_of = dynamics_fn(env_id), reward_fn(env_id)
    states, actions, added, total = [], [], [], 0.0
    for t in range(steps + tail):
        action = actor(obs)  # (n, da)
        if t < steps:
            added.append(torch.zeros_like(action, requires_grad=True))
            states.append(obs.detach()), actions.append(action.detach())
            action = action + added[-1]
        next_obs = step(obs, action)
        total = total + reward_of(obs, action, next_obs).sum()
        obs = torch.lerp(next_obs.detach(), next_obs, gamma)  # the same state, gamma times its gradient
    return torch.stack(states), torch.stack(actions), torch.stack(torch.autograd.grad(total, added))


def critic_gradients(critic, states, actions):
    """Action-gradient of the smaller critic, (..., ds), (..., da) -> (..., da): what an actor learns from."""
    action = actions.flatten(0, -2).requires_grad_()
    q = critic(states.flatten(0, -2), action).min(0).values
    return torch.autograd.grad(q.sum(), action)[0].view_as(actions)


def gradient_quality(actor, critic, env_id, gamma, starts):
    """How well a critic's action-gradients g agree with the true ones along the actor's trajectories.

    starts (n, ds). A row of a table, empty without a critic or an oracle. Of each trajectory: the cosine (1:
    the same direction, what an actor needs), |g - truth| / |truth| (1: as good as no gradient at all), the
    discounted L1 error of MAGE's Eq. 14, the mean lengths of g and of the truth; then the median over the
    trajectories, as a chaotic one has gradients of many thousands. On the CPU, in float64.
    """
    if critic is None or env_id not in DYNAMICS:
        return {}
    actor, critic = (copy.deepcopy(net).double().cpu() for net in (actor, critic))
    states, actions, truth = action_gradients(env_id, actor, torch.as_tensor(starts).double(), gamma)
    g = critic_gradients(critic, states, actions)  # (steps, n, da)
    discount = gamma ** torch.arange(len(g))[:, None]  # (steps, 1)
    length = g.norm(dim=(0, 2)), truth.norm(dim=(0, 2)), (g - truth).norm(dim=(0, 2))  # (n,) each
    row = dict(
        gradient_cosine=(g * truth).sum((0, 2)) / (length[0] * length[1]).clamp(min=1e-30),
        gradient_error=length[2] / length[1],
        gradient_l1=(discount * (g - truth).abs().sum(-1)).mean(0),  # Eq. 14
        gradient_norm=g.norm(dim=-1).mean(0),
        true_norm=truth.norm(dim=-1).mean(0),
    )
    return {name: f"{values.quantile(0.5).item():.5g}" for name, values in row.items()}
