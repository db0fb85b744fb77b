"""True dynamics as differentiable torch functions: a measure of a learned model, or its replacement.

Those of MuJoCo robots have derivatives by differences: common/experiments/mujoco_derivatives.py.
"""

import torch

from common import BadInput
from common.rewards import angle


def dynamics_fn(env_id):
    """The true dynamics of `env_id`: step(obs (..., ds), action (..., da) in [-1, 1]) -> next_obs (..., ds).

    Differentiable, for any leading shape, dtype and device. Raises BadInput if they are not known.
    """
    if env_id not in DYNAMICS:
        raise BadInput(
            f"--oracle-dynamics does not know --env-id {env_id!r} (only {', '.join(DYNAMICS)}): "
            "leave the flag out to learn a model."
        )
    return DYNAMICS[env_id]


def pendulum(obs, action):
    """Gymnasium's Pendulum-v1: obs (cos, sin, speed in rad/s), torque 2 N m times the action, 0.05 s.

    The order matters: the speed is limited to 8 rad/s before the angle moves with it (Pendulum-v0: after).
    """
    theta, speed = angle(obs[..., 0], obs[..., 1]), obs[..., 2]
    acceleration = 15 * torch.sin(theta) + 3 * (2 * action[..., 0])  # 3g/2l sin + 3/(m l^2) u; g 10, m, l 1
    speed = (speed + 0.05 * acceleration).clamp(-8, 8)
    theta = theta + 0.05 * speed
    return torch.stack([torch.cos(theta), torch.sin(theta), speed], dim=-1)


def double_integrator(obs, action):
    """The step of DoubleIntegrator-v1, s' = A s + B a: Euler's, of 0.05 s; the action is the acceleration."""
    return obs + 0.05 * torch.stack([obs[..., 1], action[..., 0]], dim=-1)


def double_integrator_cost(gain, gamma):
    """P (2, 2) of the exact value -s^T P s / 2 of the linear policy a = gain . s in the double integrator.

    gain is (2,). P = I + gain^T gain + gamma (A + B gain)^T P (A + B gain) is solved as one linear system,
    which can be differentiated by gain. Q(s, a) = r(s, a) - gamma s'^T P s' / 2 with s' = A s + B a.
    """
    a = torch.tensor([[1.0, 0.05], [0.0, 1.0]], dtype=gain.dtype)
    closed = a + torch.tensor([[0.0], [0.05]], dtype=gain.dtype) * gain  # (2, 2)
    cost = torch.eye(2, dtype=gain.dtype) + torch.outer(gain, gain)
    system = torch.eye(4, dtype=gain.dtype) - gamma * torch.kron(closed.T, closed.T)
    return torch.linalg.solve(system, cost.flatten()).view(2, 2)


DYNAMICS = {"Pendulum-v1": pendulum, "DoubleIntegrator-v1": double_integrator}
