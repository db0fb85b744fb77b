"""True derivatives of a step of a MuJoCo robot, by central differences, and a comparison with others."""

import copy

import mujoco
import numpy as np
import torch

from common import BadInput

# Robots whose observation is a smooth function of the state. A number: it is the positions from this one on
# and the velocities. None: it has sines, or places of bodies, and does not tell the whole state.
SMOOTH = {"HalfCheetah": 1, "Hopper": 1, "Walker2d": 1, "Swimmer": 2, "InvertedPendulum": 0,
          "Pusher": None, "Reacher": None}  # fmt: skip


class MuJoCoDerivatives:
    """Derivatives of a step of a MuJoCo robot, in the state in which the environment of `make_env` is.

    Each difference restores the state that decides what comes next (mjSTATE_INTEGRATION: positions,
    velocities, the solver's last solution), changes one number of it or of the action, and makes the whole
    frame-skipped step. The environment's own `step` makes it, below its time limit and the rounding to
    float32, and the mean x velocity comes first where make_env has it so. Within `with` the robot has a copy
    of its simulation, and afterwards the old one again, which goes on bit for bit.

    An action on its bound, beyond which it would be clipped, has a one-sided difference. Hopper and Walker2d
    clip the velocities that they show to [-10, 10]: a row of a clipped velocity is 0, and its column is the
    derivative by the velocity itself, which the observation does not tell. Where a contact begins or ends
    within EPS the derivative does not exist, and the difference is large or is that of one side.
    """

    EPS = 1e-5  # of an action in [-1, 1], of rad or m, of rad/s or m/s

    def __init__(self, env):
        self.env, self.robot = env, env.unwrapped
        name, _, version = env.spec.id.rpartition("-v")
        if name not in SMOOTH or version not in ("4", "5"):
            raise BadInput(
                f"{env.spec.id} has no true derivatives here, as its observation is not known to be a smooth "
                f"function of a MuJoCo state: give a run on {', '.join(SMOOTH)} (-v4 or -v5)."
            )
        self.first, self.model = SMOOTH[name], self.robot.model
        self.x_first = env.observation_space.shape[0] - self.robot.observation_space.shape[0]  # 0 or 1
        self.low, self.high = self.robot.action_space.low.astype(float), self.robot.action_space.high
        self.kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self.state = np.empty(mujoco.mj_stateSize(self.model, self.kind))

    def __enter__(self):
        self.own = self.robot.data
        self.data = self.robot.data = copy.copy(self.own)
        mujoco.mj_getState(self.model, self.data, self.state, self.kind)
        return self

    def __exit__(self, *_):
        self.robot.data = self.own

    def needs_the_whole_state(self):
        if self.first is None:
            raise BadInput(
                f"{self.env.spec.id} does not show its whole state, and parts of it twice: nothing can be "
                "restored from its observation or differentiated by it."
            )

    def restore(self, obs):
        """Makes obs (ds,) the state: the place on the track is 0, and the solver starts anew."""
        self.needs_the_whole_state()
        mujoco.mj_resetData(self.model, self.data)
        obs = np.asarray(obs, float)[self.x_first :]
        self.data.qpos[: self.first] = 0
        self.data.qpos[self.first :], self.data.qvel[:] = np.split(obs, [len(obs) - self.model.nv])
        mujoco.mj_getState(self.model, self.data, self.state, self.kind)

    def step(self, action, index=None, by=0.0):
        """The observation (ds,), float64, after a step with an action in [-1, 1]; it stays the same state.

        With `index`, that number of the observation is larger by `by` in the state that the step begins in.
        """
        mujoco.mj_setState(self.model, self.data, self.state, self.kind)
        if index is not None and index >= self.x_first:  # the x velocity of the last step has no effect
            index += self.first - self.x_first
            where = self.data.qpos if index < self.model.nq else self.data.qvel
            where[index if index < self.model.nq else index - self.model.nq] += by
        share = (np.asarray(action, float) + 1) / 2
        obs, *_, info = self.robot.step(self.low + (self.high - self.low) * share)
        return np.append(info["x_velocity"], obs) if self.x_first else obs

    def go_on(self, action):
        """Makes the state after a step the state -> its observation, and whether it is one in contact."""
        obs = self.step(action)
        mujoco.mj_getState(self.model, self.data, self.state, self.kind)
        return obs, self.data.ncon > 0  # contacts of the last physics step

    def by_action(self, action, eps=EPS):
        """The Jacobian (ds, da) of the next observation with respect to the action (da,)."""
        columns, action = [], np.asarray(action, float)
        for i in range(len(action)):
            up, down = action.copy(), action.copy()
            up[i], down[i] = min(action[i] + eps, 1), max(action[i] - eps, -1)
            columns.append((self.step(up) - self.step(down)) / (up[i] - down[i]))
        return np.stack(columns, 1)

    def by_obs(self, action, eps=EPS):
        """The Jacobian (ds, ds) of the next observation by the observation. BadInput if it does not exist."""
        self.needs_the_whole_state()
        size = self.env.observation_space.shape[0]
        ends = [[self.step(action, i, by) for by in (eps, -eps)] for i in range(size)]
        return np.stack([(up - down) / (2 * eps) for up, down in ends], 1)


# --- steps along a policy's trajectory ---
def trajectory(true, policy, obs, steps):
    """Steps of a policy from the state of a MuJoCoDerivatives, whose observation is obs (ds,), in float64.

    -> [[obs (ds,), action (da,), next_obs (ds,), by_action (ds, da), by_obs (ds, ds) or None, contact ()]].
    """
    path = []
    for _ in range(steps):
        with torch.no_grad():
            action = policy(torch.as_tensor(obs)[None])[0].numpy()
        by_action, by_obs = true.by_action(action), None if true.first is None else true.by_obs(action)
        next_obs, contact = true.go_on(action)
        found = obs, action, next_obs, by_action, by_obs, contact
        path.append([None if x is None else torch.as_tensor(np.array(x)) for x in found])
        obs = next_obs
    return path


def stacked(steps):
    """Steps in n states as one, whose tensors have the states first."""
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*steps, strict=True)]


def through_world(step, obs, action):
    """What comes next; right in value and gradient in the states and for the actions of a stacked step."""
    at_obs, at_action, next_obs, by_action, by_obs, _ = step
    found = next_obs + (by_action @ (action - at_action)[..., None])[..., 0]
    return found if by_obs is None else found + (by_obs @ (obs - at_obs)[..., None])[..., 0]


def compared(found, truth):
    """Gradients (..., n, *shape) beside true ones (n, *shape): a row of medians over all that stand in front.

    error: |found - truth| / |truth|, 1 for no gradient at all; error_90: 90% of the errors are smaller.
    """
    width = truth.flatten(1).shape[1]
    found, truth = found.reshape(-1, width), truth.expand_as(found).reshape(-1, width)
    length, true_length = found.norm(dim=1), truth.norm(dim=1)
    error = (found - truth).norm(dim=1) / true_length.clamp(min=1e-30)
    cosine = (found * truth).sum(1) / (length * true_length).clamp(min=1e-30)
    columns = dict(error=error, cosine=cosine, length=length, true_length=true_length)
    medians = {name: values.quantile(0.5).item() for name, values in columns.items()}
    return dict(count=len(truth)) | medians | dict(error_90=error.quantile(0.9).item())
