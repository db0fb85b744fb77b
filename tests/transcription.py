"""The MAGE critic loss written down as it reads, for comparison: slow, and nothing clever.

Every member of the ensemble predicts every row, all predictions but one are thrown away; the whole TD error
is kept in the graph; its action-gradient is taken with create_graph=True, once for each critic.
"""

import torch
import torch.nn.functional as F


def mage_terms(critic, actor_target, critic_target, model, reward_of, terminated_at,
               obs, action, member, model_noise, target_noise, gamma):  # fmt: skip
    """The two terms of Eq. 8, Huber as in the authors' code.

    obs, model_noise (B, ds), action, target_noise (B, da); member (B,) says which member takes a row.
    """
    action = action.detach().clone().requires_grad_()
    mean, logvar = model(obs.expand(model.members, -1, -1), action.expand(model.members, -1, -1))
    row = torch.arange(len(obs))
    change = mean[member, row] + torch.exp(0.5 * logvar[member, row]) * model_noise
    next_obs = obs + model.delta_norm.inverse(change)

    next_action = torch.clamp(actor_target(next_obs) + target_noise, -1.0, 1.0)
    next_q = critic_target(next_obs, next_action)
    next_q = torch.amin(next_q, 0) if len(next_q) > 1 else next_q[0]
    not_done = 1.0 - terminated_at(next_obs).to(obs.dtype)
    target = reward_of(obs, action, next_obs) + gamma * not_done * next_q

    gradient_term = td_term = 0.0
    for i in range(critic.members):
        delta = target - critic(obs, action)[i]
        (grad_delta,) = torch.autograd.grad(delta.sum(), action, create_graph=True)
        length = torch.sqrt((grad_delta**2).sum(1))
        gradient_term = gradient_term + F.huber_loss(length, torch.zeros_like(length)) / critic.members
        td_term = td_term + F.huber_loss(delta, torch.zeros_like(delta)) / critic.members
    return gradient_term, td_term
