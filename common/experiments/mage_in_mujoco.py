"""MAGE with the true derivatives of a MuJoCo robot in the place of a model: what is the model's fault?

    python -m common.experiments.mage_in_mujoco --env-id HalfCheetah-v4 --preset laptop --updates-per-step 2

It trains mage_td3.py, whose flags it takes except for `--accelerate`, with `--oracle-dynamics`. The next
state is the simulator's, and its derivative with respect to the action comes from central differences
(mujoco_derivatives.py), a pair of steps for each number of an action and each row of a batch. This is Eq. 5
in the place of Eq. 6: no bias is left, and the difference to a run with a learned model is what that model
costs. It is slow, as the simulator takes half a second on a busy core for the 256 rows of one update, so give
few updates and small batches, and the same to the run that it is compared with.

The robot must show its whole state (HalfCheetah, Hopper, Walker2d, Swimmer, InvertedPendulum). Its place on
the track is no part of that, and the contact solver starts anew in every state.
"""


import numpy as np
import torch

from common import BadInput
from common.args import main
from common.envs import make_env
from common.experiments import needs
from common.experiments.mujoco_derivatives import MuJoCoDerivatives

needs("mage_td3")
import mage_td3  # noqa: E402


class World:
    """The dynamics of a robot as a function: obs (n, ds), action (n, da) -> next_obs (n, ds).

    It can be differentiated once, with respect to the action.
    """

    def __init__(self, env_id):
        self.true = MuJoCoDerivatives(make_env(env_id))
        self.true.needs_the_whole_state()
        self.true.env.reset(seed=0)

    def __call__(self, obs, action):
        return Step.apply(action, obs, self.true)


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, action, obs, true):
        next_obs, jacobians = [], []
        with true:
            for state, a in zip(obs.cpu().numpy(), action.detach().cpu().numpy(), strict=True):
                true.restore(state)
                next_obs.append(true.step(a))
                if ctx.needs_input_grad[0]:
                    jacobians.append(true.by_action(a))
        if jacobians:
            ctx.save_for_backward(torch.as_tensor(np.stack(jacobians)).to(action))  # (n, ds, da)
        return torch.as_tensor(np.stack(next_obs)).to(action)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (jacobian,) = ctx.saved_tensors
        return (gradient[:, None] @ jacobian)[:, 0], None, None


def train(args):
    """mage_td3.train in this world."""
    if args.accelerate not in ("none", "auto"):
        raise BadInput(f"--accelerate {args.accelerate}: it cannot be with a simulator; leave it out.")
    args.accelerate = "none"  # also on a GPU
    args.oracle_dynamics, known = True, mage_td3.dynamics_fn
    mage_td3.dynamics_fn = World
    try:
        return mage_td3.train(args)
    finally:
        mage_td3.dynamics_fn = known


if __name__ == "__main__":
    main(train, mage_td3.Args, mage_td3.PRESETS)
