"""Record tests/data/pusher_v4.npz: Gymnasium's own Pusher-v4 on MuJoCo 2.3.7, under a controller that pushes.

    python3.11 -m venv /tmp/old && /tmp/old/bin/pip install gymnasium==1.4.0 mujoco==2.3.7 imageio packaging
    /tmp/old/bin/python tests/record_pusher.py

Random actions hardly ever touch the object, and contact is where MuJoCo's versions differ. So a spring pulls
the hand into the object, its force turned into joint torques by the transposed Jacobian of the arm. In the
chosen seeds it gets there early and shoves the object about. The file holds, for each seed (first dimension
S = 3) and step (T = 100): seed (S,), action (S, T, 7) float32 in N m, observation (S, T + 1, 23), and reward,
reward_dist, reward_ctrl (S, T), the last two from `info`.
"""

from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np

PATH = Path(__file__).parent / "data" / "pusher_v4.npz"
SEEDS, STEPS = (1, 2, 4), 100
STIFFNESS, DAMPING = 30.0, 0.4  # N/m at the hand, N m s/rad at the joints


def pushing_action(env):
    """Joint torques (7,) float32 in N m, within Pusher's bounds, that pull the hand into the object."""
    model, data = env.unwrapped.model, env.unwrapped.data
    jacobian = np.zeros((3, model.nv))
    mujoco.mj_jacBody(model, data, jacobian, None, model.body("tips_arm").id)
    force = STIFFNESS * (data.body("object").xpos - data.body("tips_arm").xpos)
    return np.clip(jacobian[:, :7].T @ force - DAMPING * data.qvel[:7], -2, 2).astype(np.float32)


def record(seed):
    """One episode: name -> array, as described above without the dimension S."""
    env = gym.make("Pusher-v4")
    obs, _ = env.reset(seed=seed)
    trace = {"action": [], "observation": [obs], "reward": [], "reward_dist": [], "reward_ctrl": []}
    for _ in range(STEPS):
        action = pushing_action(env)
        obs, reward, _, _, info = env.step(action)
        for name, value in (("action", action), ("observation", obs), ("reward", reward), *info.items()):
            trace[name].append(value)
    moved = np.linalg.norm(obs[17:20] - trace["observation"][0][17:20])
    print(f"seed {seed}: return {sum(trace['reward']):.3f}, the object moved {100 * moved:.1f} cm")
    return {"seed": np.array(seed)} | {name: np.array(values) for name, values in trace.items()}


if __name__ == "__main__":
    if mujoco.__version__ != "2.3.7":
        raise SystemExit(f"this is MuJoCo {mujoco.__version__}, not 2.3.7: see the top of the file")
    traces = [record(seed) for seed in SEEDS]
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **{name: np.stack([trace[name] for trace in traces]) for name in traces[0]})
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")
