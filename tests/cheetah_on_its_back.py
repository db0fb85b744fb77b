"""How much of a HalfCheetah run the robot spent on its back: python -m tests.cheetah_on_its_back RUN_FOLDER

For a run of any script: its ten evaluation episodes without noise, and the data it has learned from; for one
of maac_sac.py also the entropy of its policy in both, which has a target on the data alone.
"""

from pathlib import Path

import numpy as np
import torch
import tyro

from common import BadInput
from common.args import one_sentence
from common.envs import make_env
from common.evaluate import load_script
from common.files import NEWEST, read_checkpoint
from common.run import EVAL_SEED
from maac_sac import Args, networks


def upside_down(obs):  # (..., ds) -> bool; the angle of the torso is third, after x velocity and height
    return np.cos(obs[..., 2]) < 0


@torch.no_grad()
def main(run_dir: tyro.conf.Positional[str]):
    script, env_id = load_script(run_dir)
    if env_id not in ("HalfCheetah-v4", "HalfCheetah-v5"):
        raise BadInput(f"{run_dir} is a run on {env_id}: name one on HalfCheetah-v4 or -v5.")
    state, policy, env = read_checkpoint(Path(run_dir, NEWEST)), script.load_policy(run_dir), make_env(env_id)
    returns, over, visited = [], [], []
    for episode in range(10):
        obs, total, states = env.reset(seed=EVAL_SEED + state["args"]["seed"] + episode)[0], 0.0, []
        for _ in range(1000):
            obs, reward, *_ = env.step(policy(obs[None])[0])
            total += reward
            states.append(obs)
        returns.append(total)
        over.append(upside_down(np.array(states)).mean())
        visited += states
    print("return        ", *(f"{value:6.0f}" for value in returns))
    print("share on back ", *(f"{value:6.2f}" for value in over))
    rows = state["real" if "real" in state else "buffer"]["rows"].numpy()
    print("steps of data, share on back:")
    for i in range(0, len(rows), 500):
        print(f"  {i:6}-{i + 500:6} {upside_down(rows[i : i + 500]).mean():.2f}")
    if "temperature" in state:
        actor = networks(Args(**state["args"]), len(obs), env.action_space.shape[0])["actor"]
        actor.load_state_dict(state["actor"])
        for where, states in (("where it goes", visited), ("on its data", rows[:, : len(obs)])):
            entropy = -actor.sample(torch.as_tensor(np.array(states)))[1].mean()
            print(f"entropy of the policy {where}: {entropy:.1f}")


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main, prog="python -m tests.cheetah_on_its_back", description=__doc__)
