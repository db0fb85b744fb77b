"""How much of a run on HalfCheetah the robot spent on its back: python -m tests.look_at_cheetah RUN_FOLDER

For a run of any script: its ten evaluation episodes without noise, and the data it has learned from.
"""

import sys
from pathlib import Path

import numpy as np

from common.envs import make_env
from common.evaluate import load_script
from common.files import NEWEST, read_checkpoint
from common.run import EVAL_SEED


def upside_down(obs):  # (..., ds) -> bool; the angle of the torso is third, after x velocity and height
    return np.cos(obs[..., 2]) < 0


def main(run_dir):
    script, env_id = load_script(run_dir)
    state, policy, env = read_checkpoint(Path(run_dir, NEWEST)), script.load_policy(run_dir), make_env(env_id)
    returns, over = [], []
    for episode in range(10):
        obs, total, states = env.reset(seed=EVAL_SEED + state["args"]["seed"] + episode)[0], 0.0, []
        for _ in range(1000):
            obs, reward, *_ = env.step(policy(obs[None])[0])
            total += reward
            states.append(obs)
        returns.append(total)
        over.append(upside_down(np.array(states)).mean())
    print("return        ", *(f"{value:6.0f}" for value in returns))
    print("share on back ", *(f"{value:6.2f}" for value in over))
    rows = state["real" if "real" in state else "buffer"]["rows"].numpy()
    print("steps of data, share on back:")
    for i in range(0, len(rows), 500):
        print(f"  {i:6}-{i + 500:6} {upside_down(rows[i : i + 500]).mean():.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
