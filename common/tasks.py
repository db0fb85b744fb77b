"""Environments that Gymnasium does not give us; common/envs.py registers them.

A cart-pole with a continuous force (after MAGE's), a double integrator (after MAAC's), four tasks of Wang et
al. 2019, "Benchmarking Model-Based Reinforcement Learning", on which MAAC reports, and a mended Pusher-v4.
"""

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.pusher_v5 import PusherEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from gymnasium.spaces import Box

MUJOCO_VERSION = tuple(int(part) for part in mujoco.__version__.split(".")[:2])


class ContinuousCartPole(CartPoleEnv):
    """Gymnasium's cart-pole (its constants, Euler steps and limits) with a force of 10 N times the action.

    Observation: x in m, its velocity, the pole's angle in rad, its velocity. The reward is 1 at every step.
    """

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def step(self, action):
        self.force_mag = 10.0 * float(action[0])  # and "to the right", which to Gymnasium's cart-pole is 1
        obs, _, terminated, truncated, info = super().step(np.ones(1, np.float32))
        return obs, 1.0, terminated, truncated, info


class DoubleIntegrator(gym.Env):
    """A point mass on a line, for exact answers: linear dynamics and quadratic cost (MAAC, section 5.2).

    Observation: position in m, velocity in m/s, each uniform in [-1, 1] at the start. The action is the
    acceleration in m/s^2 over DT = 0.05 s. Before the step it pays -(position^2 + velocity^2 + action^2) / 2.
    """

    DT = 0.05

    def __init__(self):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.copy(), {}

    def step(self, action):
        a = float(action[0])
        reward = -0.5 * (np.square(self.state).sum() + a**2)
        self.state = self.state + self.DT * np.array([self.state[1], a])
        return self.state.copy(), reward, False, False, {}


class Wang2019:
    """Gymnasium's v4 robots (model file, frame skip, start) with the observation [qpos, qvel], without the
    position along the track and unclipped, 1000 steps and no early end. The reward is that of the observation
    o before the step: o[velocity] - 0.1 |a|^2, and for all but HalfCheetah + 1 - 3 (o[0] - target_z)^2.
    """

    def _get_obs(self):
        return np.concatenate([self.data.qpos[self.first :], self.data.qvel])

    def step(self, action):
        obs = self._get_obs()
        reward = obs[self.velocity] - 0.1 * np.square(action).sum()
        if self.target_z is not None:
            reward += 1 - 3 * (obs[0] - self.target_z) ** 2
        self.do_simulation(action, self.frame_skip)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reward), False, False, {}


class WangHalfCheetah(Wang2019, HalfCheetahEnv):
    first, velocity, target_z = 1, 8, None  # first position observed, index of x velocity, m


class WangAnt(Wang2019, AntEnv):
    first, velocity, target_z = 2, 13, 0.57


class WangHopper(Wang2019, HopperEnv):
    first, velocity, target_z = 1, 5, 1.3


class WangWalker2d(Wang2019, Walker2dEnv):
    first, velocity, target_z = 1, 8, 1.3


class PusherV4(PusherEnv):
    """Pusher-v4 as MuJoCo 2.3.7 simulated it, on MuJoCo 3 and later, where Gymnasium refuses to make it.

    The object weighs 1e-8 kg; its inertia is the armature (0.04) of its two slide joints. `body_invweight0`
    sets how hard a contact pushes, and since 3.0 MuJoCo leaves armature out of it for bodies that only slide:
    76 million here in place of 17, contacts so soft that the arm sinks through the object. (Pusher-v5's
    heavier object leaves it 7,600 times too soft.) Three later changes also reach this model: a new routine
    for convex collisions (3.3), several contacts per collision (3.8), and the margins of two geoms adding up
    where the larger one used to count (3.5). All four are undone once the model is loaded.

    As in v4, the reward is that of the state before the physics step, and info["reward_ctrl"] is unweighted.
    """

    def __init__(self, xml_file="pusher.xml", *args, **kwargs):  # positional, as unpickling passes it back
        super().__init__(xml_file, *args, **kwargs)

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        for body in (model.body("object"), model.body("goal")):
            inertia = model.dof_armature[body.dofadr[0]] + body.mass[0]
            body.invweight0[:] = (2 / 3 / inertia, 0)  # a mean over three axes, one of which is fixed
        for flag in ("mjDSBL_NATIVECCD", "mjDSBL_MULTICCD"):  # each is absent before its change
            model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, flag, 0))
        if MUJOCO_VERSION >= (3, 5):
            model.geom_margin[:] /= 2  # all geoms of this model have the same one
        return model, data

    def step(self, action):
        reward, parts = self._get_rew(action)
        obs, *_ = super().step(action)
        parts = {"reward_dist": parts["reward_dist"], "reward_ctrl": -np.square(action).sum()}
        return obs, reward, False, False, parts
