"""Four tasks of Wang et al. 2019, "Benchmarking Model-Based Reinforcement Learning"; MAAC reports on them."""

import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv


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
