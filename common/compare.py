"""The functions of common/rewards.py, held against the environment: somebody's own may be wrong.

A critic would not notice a wrong formula, a shape that mixes rows or a missing gradient: it learns something
else, and no error is raised.
"""

import numpy as np
import torch

from common import one_line
from common.rewards import REWARDS, TERMINATIONS, known


class Comparison:
    """Says how the functions of an environment differ from it, in steps that were made.

    A step is (obs (ds,), action (da,), next_obs (ds,), reward, terminated).
    """

    def __init__(self, env_id):
        self.env_id, self.largest = env_id, 0.0  # the largest |reward| that was seen
        self.reward, self.terminated = known(REWARDS, env_id), known(TERMINATIONS, env_id)

    def fault(self, steps):
        """A sentence about the first difference, None where there is none."""
        *rows, reward, terminated = zip(*steps, strict=True)
        rows = [torch.as_tensor(np.array(x)) for x in rows]
        reward, terminated = np.array(reward, float), np.array(terminated, bool)
        self.largest = max(self.largest, abs(reward).max())
        # The reward may be off by a thousandth of the largest one, as a formula in float32 rounds.
        return (self.reward and self._differs(self.reward, rows, reward, 1e-3 * self.largest + 1e-7)
                or self.terminated and self._differs(self.terminated, rows[2:], terminated, 0.0))  # fmt: skip

    def _differs(self, function, rows, truth, tolerance):
        name = _name(function)
        # The rows come as they do in training: several at once, and ready to be differentiated.
        inputs = [x.clone().requires_grad_() for x in rows]
        try:
            told = function(*inputs)
        except Exception as error:
            return f"{name} fails for {len(truth)} rows of {self.env_id} ({one_line(error, placed=True)})"
        if any(not torch.equal(x, y) for x, y in zip(inputs, rows, strict=True)):
            return f"{name} changes its inputs, which belong to the buffer: let it work on copies"
        if not torch.is_tensor(told):
            return f"{name} returns a {type(told).__name__}: let it compute with tensors and return one"
        if told.shape != truth.shape:
            shapes = f"the shape {tuple(told.shape)} for {len(truth)} rows"
            return f"{name} returns {shapes}: let it return {truth.shape}, a number for each row"
        if told.dtype != torch.bool if truth.dtype == bool else not told.is_floating_point():
            return f"{name} returns {told.dtype}: a reward is a float, and a termination is a bool"
        near = (told.detach().double() - torch.as_tensor(truth).double()).abs() <= tolerance
        if not near.all():  # nor is NaN
            row = int((~near).nonzero()[0])
            says = f"says {told[row].item()}, where {self.env_id} gives {truth[row]}"
            return f"{name} {says} (actions are in [-1, 1], and next_obs is the state after the step)"
        return None

    def doubt(self, steps):
        """A sentence about a reward whose gradient says nothing, None where all is well."""
        rows = [torch.as_tensor(np.array(x)).requires_grad_() for x in list(zip(*steps, strict=True))[:3]]
        told = self.reward(*rows) if self.reward else torch.zeros(len(steps))
        gradients = [torch.zeros(())]
        if told.requires_grad:
            gradients = torch.autograd.grad(told.sum(), rows, allow_unused=True)
        gradients = [x for x in gradients if x is not None]
        if all((x == 0).all() for x in gradients) and (told != told[0]).any():
            return f"{_name(self.reward)} has no gradient, so that MAGE and MAAC see no slope of the reward"
        if not all(x.isfinite().all() for x in gradients):
            return f"the gradient of {_name(self.reward)} is not finite"
        return None


def _name(function):
    """What a reader finds in common/rewards.py: also for a functools.partial, or an object that is called."""
    function = getattr(function, "func", function)
    return f"{getattr(function, '__name__', type(function).__name__)} of common/rewards.py"
