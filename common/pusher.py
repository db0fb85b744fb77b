"""Pusher-v4 for MuJoCo 3 and later."""

import mujoco
import numpy as np
from gymnasium.envs.mujoco.pusher_v5 import PusherEnv

MUJOCO_VERSION = tuple(int(part) for part in mujoco.__version__.split(".")[:2])


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
