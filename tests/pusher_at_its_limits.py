"""What a policy on Pusher does, what model and critic know: python -m tests.pusher_at_its_limits RUN_FOLDER

For a run of the TD3 family: ten episodes without noise, from the starts of the evaluations.
"""

import csv

import numpy as np
import torch
import tyro

import mage_td3
from common import BadInput
from common.args import one_sentence
from common.envs import make_env
from common.evaluate import as_policy, load_script
from common.files import loading, newest, read_checkpoint
from common.run import EVAL_SEED


def load(run_dir):
    state = read_checkpoint(newest(run_dir))
    args = mage_td3.Args(**state["args"])  # the other scripts have fewer
    norm, da = mage_td3.Normaliser(23), 7
    actor = mage_td3.Actor(norm, da, args.actor_hidden)
    critic = mage_td3.Critic(norm, da, args.critic_hidden, args.num_critics, args.layer_norm)
    model = mage_td3.Dynamics(norm, da, args.model_hidden, args.model_layers, args.ensemble_size)
    for name, net in dict(actor=actor, critic=critic, model=model).items():
        if name in state:
            net.load_state_dict(state[name])
    return args, actor, critic, model if "model" in state else None, state["buffer"]


def at_limits(obs, env):
    """How many of the arm's seven joints are within 0.03 rad of an end of their range: (..., 23) -> (...)."""
    low, high = env.unwrapped.model.jnt_range[:7].T
    return ((obs[..., :7] < low + 0.03) | (obs[..., :7] > high - 0.03)).sum(-1)


@torch.no_grad()
def main(run_dir: tyro.conf.Positional[str]):
    _, env_id = load_script(run_dir)
    if env_id not in ("Pusher-v4", "Pusher-v5") or not newest(run_dir):
        raise BadInput(f"{run_dir} is a run on {env_id}: name one on Pusher-v4 or -v5 that has a checkpoint.")
    with loading(run_dir):
        args, actor, critic, model, buffer = load(run_dir)
    policy, env = as_policy(actor), make_env(args.env_id)
    states, actions, rewards = [], [], []
    for episode in range(10):
        obs, done = env.reset(seed=EVAL_SEED + args.seed + episode)[0], False
        states.append([obs]), actions.append([]), rewards.append([])
        while not done:
            action = policy(obs[None])[0]
            obs, reward, terminated, done, _ = env.step(action)
            states[-1].append(obs), actions[-1].append(action), rewards[-1].append(reward)
    states, actions, rewards = (np.array(x) for x in (states, actions, rewards))  # (10, T, .)

    print(f"return {rewards.sum(1).mean():.1f}")
    goal = np.linalg.norm(states[:, :, 17:20] - states[:, :, 20:23], axis=-1)
    tip = np.linalg.norm(states[:, :, 17:20] - states[:, :, 14:17], axis=-1)
    print(f"object to goal, m: {goal[:, 0].mean():.2f} at the start, {goal[:, -1].mean():.2f} at the end;")
    print(f"  closer by more than 2 cm in {(goal[:, -1] < goal[:, 0] - 0.02).sum()} of 10 episodes, "
          f"farther by that in {(goal[:, -1] > goal[:, 0] + 0.02).sum()}")  # fmt: skip
    print(f"tip to object at the end, m: {tip[:, -1].mean():.2f}")
    obs, action, next_obs = (torch.tensor(x).flatten(0, 1) for x in (states[:, :-1], actions, states[:, 1:]))
    if model is not None:
        mean, _ = model(obs.expand(model.members, -1, -1), action.expand(model.members, -1, -1))
        std = model.delta_norm.std.clamp(min=1e-6)
        error = ((obs + model.delta_norm.inverse(mean.mean(0)) - next_obs) / std).square()
        print(f"one-step error of the model, in standard deviations: arm {error[:, :17].mean().sqrt():.2f}, "
              f"object {error[:, 17:19].mean().sqrt():.2f}")  # fmt: skip
    q = critic(obs, action).min(0).values.view(10, -1)
    last = rewards[:, -1].mean() / (1 - args.gamma)
    print(f"Q in the last state: {q[:, -1].mean():.1f}; its reward for ever: {last:.1f}")
    print(f"joints at an end of their range, of 7: {at_limits(states, env).mean():.1f}; in the data:")
    seen = np.array([at_limits(row, env) for row in buffer["rows"][: buffer["added"], :23].numpy()])
    for start in range(0, len(seen), 500):
        print(f"  {start:6d}-{start + 500:6d} {seen[start : start + 500].mean():.1f}")
    curve = [(int(r["step"]), float(r["return_mean"])) for r in csv.DictReader(open(f"{run_dir}/eval.csv"))]
    curve = [(step, value) for step, value in curve if args.learning_starts < step <= len(seen)]
    around = [seen[step - 100 : step + 100].mean() for step, _ in curve]
    correlation = np.corrcoef(around, [value for _, value in curve])[0, 1]
    print(f"their correlation, 100 steps before and after an evaluation, with its return: {correlation:.2f}")


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main, prog="python -m tests.pusher_at_its_limits", description=__doc__)
