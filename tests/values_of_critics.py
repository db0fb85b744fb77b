"""Does a critic on a robot say what its policy earns? python -m tests.values_of_critics RUN_FOLDERS

The policy acts as it does when it learns, but without the exploration noise of a TD3. Compared are, along its
episodes, the mean value of the smaller critic in their first half, and the discounted rewards that followed
there; and the reward of a step, and what the model says of it (mean over members). For maac_sac.py there are
also the temperature and the entropy of the policy where it goes, whose product its critic counts as a reward.

A second table has the TD errors of both critics over all transitions that the run has stored, each with the
noise that a TD3 puts on its target's action: their mean, their median, and the share of those larger than 1,
beyond which a Huber loss with this threshold is a straight line. The square makes the mean zero and the
straight line the median. With a discount factor of 0.99 a mean of -1 is what critics have that say 100 too
much everywhere: Q is then 100 too large, and the target, in which the next value is discounted, 99.

A third table has the runs in whose data episodes ended otherwise than by the time limit. The last transition
of such an episode is worth its reward and nothing more. What do the critics (mean over both) say of it, how
large is their TD error there and in all other transitions, and what share of a Huber loss over all of them do
the last ones have?
"""

import numpy as np
import torch
import tyro

from common import BadInput
from common.args import one_sentence
from common.envs import call
from common.experiments.robot_runs import SEED, Agent

EPISODES = 3


@torch.no_grad()
def look(agent, episodes=EPISODES):
    """Means {name: number}: Q, the discounted return, reward, the model's reward, entropy (NaN: none)."""
    torch.manual_seed(0)
    found = {name: [] for name in ("q", "discounted", "reward", "imagined", "entropy")}
    for episode in range(episodes):
        obs, _ = call(agent.env_id, agent.env.reset, seed=SEED + episode)
        rows, rewards, done = [], [], False
        while not done:
            state, log_prob = torch.as_tensor(obs[None]).double(), torch.full((1,), torch.nan)
            if hasattr(agent.actor, "sample"):
                action, log_prob = agent.actor.sample(state)
            else:
                action = agent.actor(state)
            q = agent.critic(state, action).min().item()
            imagined = torch.nan
            if agent.model is not None:
                next_obs = agent.imagined(state, action)
                imagined = agent.outcome(state, action, next_obs)[0].mean().item()
            rows.append((q, imagined, -log_prob.item()))
            obs, reward, terminated, truncated, _ = call(
                agent.env_id, agent.env.step, action[0].numpy().astype(np.float32))  # fmt: skip
            rewards.append(reward)
            done = terminated or truncated
        returns = np.zeros(len(rewards) + 1)
        for t in reversed(range(len(rewards))):
            returns[t] = rewards[t] + agent.gamma * returns[t + 1]
        half = max(len(rewards) // 2, 1)  # a time limit cuts the rewards of the second one
        columns = dict(zip(("q", "imagined", "entropy"), zip(*rows, strict=True), strict=True))
        found["q"].append(np.mean(columns["q"][:half]))
        found["discounted"].append(np.mean(returns[:half]))
        found["reward"].append(np.mean(rewards))
        found["imagined"].append(np.mean(columns["imagined"]))
        found["entropy"].append(np.mean(columns["entropy"]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def values(agent, noise=0.0):
    """Q and the TD errors of all transitions of a run, each (2, n); TD3's target action has this noise."""
    obs, action, reward, next_obs, end = agent.transitions()
    if hasattr(agent.actor, "sample"):
        next_action, _ = agent.actor.sample(next_obs)
    else:
        next_action = (agent.actor_target(next_obs) + noise).clamp(-1, 1)
    next_q = agent.critic_target(next_obs, next_action).min(0).values.masked_fill(end, 0.0)
    q = agent.critic(obs, action)
    return q, reward + agent.gamma * next_q - q


@torch.no_grad()
def look_at_errors(agent):
    """Mean and median of the TD errors over the data of a run, and the share of those larger than 1."""
    torch.manual_seed(0)
    size, clip = agent.target_noise
    noise = (size * torch.randn_like(agent.transitions()[1])).clamp(-clip, clip)
    _, delta = values(agent, noise)
    found = {"mean": delta.mean(), "median": delta.median(), "above_1": (delta.abs() > 1).double().mean()}
    return {name: value.item() for name, value in found.items()}


@torch.no_grad()
def look_at_ends(agent):
    """Numbers {name: number} about the data of a run, all transitions at once; {} if no episode has ended."""
    _, _, reward, _, end = agent.transitions()
    if not end.any():
        return {}
    q, delta = values(agent)
    loss = torch.nn.functional.huber_loss(delta, torch.zeros_like(delta), reduction="none")
    found = {
        "share": end.double().mean(), "reward": reward[end].mean(), "q": q[:, end].mean(),
        "error": delta[:, end].abs().median(), "other_error": delta[:, ~end].abs().median(),
        "share_of_loss": loss[:, end].sum() / loss.sum(),
    }  # fmt: skip
    return {name: value.item() for name, value in found.items()}


def main(run_dirs: tyro.conf.Positional[list[str]]):
    if not run_dirs:
        raise BadInput("name the folder of at least one run.")
    agents = [Agent(folder) for folder in run_dirs]  # before any work, as one may be no run
    print("| run | step | Q | discounted return | reward | in the model | temperature | entropy |")
    print("|---|---|---|---|---|---|---|---|")
    errors, ends = [], []  # (name, numbers); two runs may have one name
    for agent in agents:
        found = look(agent)
        errors.append((agent.name, look_at_errors(agent)))
        if at_ends := look_at_ends(agent):
            ends.append((agent.name, at_ends))
        cells = [f"{found[name]:.3g}" for name in ("q", "discounted", "reward", "imagined")]
        cells += [f"{agent.alpha:.2g}", f"{found['entropy']:.1f}"] if agent.alpha is not None else ["", ""]
        cells = [agent.name, str(agent.step), *("" if cell == "nan" else cell for cell in cells)]
        print(f"| {' | '.join(cells)} |")
    table("TD error, mean | median | share above 1", errors)
    if ends:
        names = "last transitions | their reward | Q there | TD error there | elsewhere | share of the loss"
        table(names, ends)


def table(names, runs):
    """Prints a table with these columns and a row for each (name, {column: number})."""
    print(f"\n| run | {names} |\n|---{'|---' * (names.count('|') + 1)}|")
    for run, found in runs:
        print(f"| {' | '.join([run, *(f'{value:.3g}' for value in found.values())])} |")


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main, prog="python -m tests.values_of_critics", description=__doc__)
