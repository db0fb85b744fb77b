"""How wrong are the action-gradients of a critic? Figures 3 and 5 and Proposition 3.1 of the MAGE paper.

    python -m common.experiments.mage_gradients -o mage_gradients.png

Runs the scripts on Pendulum-v1, whose true gradients are known, and draws what their eval.csv says of them:

Figure 3         critics of an actor that stays random (--policy-delay beyond the end), after 200 transitions:
                 MAGE and Dyna-TD3 imagine with the true dynamics, TD3 replays. Error of Eq. 14, and cosine.
Figure 5         MAGE-DDPG without the TD error (lambda 0): its action-gradients vanish.
Proposition 3.1  the error of the policy gradient with the last critic of each run, and the bound on it.

Not as in the paper: trajectories start in the same 10 states at every evaluation, and their median counts,
as the true gradients of one that swings over the top may be thousands of times larger; their rewards go on
beyond the time limit, which the critics do not know; TD3 makes as many updates as the others; a critic is
the smaller of two; sizes are the preset's, and the pendulum is that of Pendulum-v1. The actor is frozen as a
function of normalised observations, whose mean and deviation still settle.

The CSV files beside the figure have its numbers. Runs go to runs/; finished ones are not made again.
"""

import copy
import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import torch
import tyro

from common import BadInput, benchmark
from common.args import one_sentence
from common.envs import make_env
from common.evaluate import load_state
from common.experiments import needs
from common.files import figure_path, write_table, write_whole
from common.true_gradients import action_gradients, critic_gradients

needs("td3", "dyna_td3", "mage_td3")
import mage_td3  # noqa: E402

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

FROZEN = ["--policy-delay", "1000000000"]
DDPG = ["--oracle-dynamics", "--num-critics", "1", "--policy-delay", "1", "--target-noise", "0"]
RUNS = {  # name of the run: script, flags
    "frozen_mage_td3": ("mage_td3", ["--oracle-dynamics", "--lam", "0.05", *FROZEN]),
    "frozen_dyna_td3": ("dyna_td3", ["--oracle-dynamics", *FROZEN]),
    "frozen_td3": ("td3", ["--updates-per-step", "10", *FROZEN]),
    "mage_ddpg_lam_0": ("mage_td3", [*DDPG, "--lam", "0"]),
    "mage_ddpg_lam_0.2": ("mage_td3", [*DDPG, "--lam", "0.2"]),
}
COLUMNS = ("step", "gradient_cosine", "gradient_error", "gradient_l1", "gradient_norm", "true_norm")


@dataclass
class Args:
    # The figure goes here.
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("mage_gradients.png")
    seeds: int = 4  # Each run is made with this many seeds.
    steps: int = 800  # A run learns for this many environment steps, after 200 without learning.
    preset: Literal["paper", "laptop"] = "laptop"  # The scripts run with this preset.
    workers: int | None = None  # So many runs go at a time, by default as many as in a sweep.


def make_runs(args):
    """Makes the runs that are not there yet -> {name: [folder of each seed]}."""
    folders = {}
    for name, (script, flags) in RUNS.items():
        print(name)
        exp_name = f"{name}_{args.preset}_{args.steps}_steps"
        sweep = ["--scripts", script, "--env-ids", "Pendulum-v1", "--seeds", str(args.seeds)]
        sweep += [] if args.workers is None else ["--workers", str(args.workers)]
        flags = [*flags, "--preset", args.preset, "--total-timesteps", str(200 + args.steps)]
        flags += ["--learning-starts", "200", "--eval-every", "10", "--exp-name", exp_name]
        if code := benchmark.main([*sweep, "--", *flags]):
            sys.exit(code)  # it has said which run failed, or that it was stopped
        folders[name] = [Path("runs/Pendulum-v1", exp_name, f"seed-{seed}") for seed in range(args.seeds)]
    return folders


# --- Proposition 3.1 ----------------------------------------------------------------------------------------
def proposition(actor, critic, starts, env_id, gamma):
    """Both sides of Proposition 3.1, in 2-norms, on the actor's trajectories from starts (n, ds).

    Left: the length of sum_t gamma^t (grad_a Q^pi - grad_a Q^) grad_theta pi(s_t), mean over trajectories; it
    is grad J minus its estimate by the deterministic policy gradient theorem   Eq. 10, 11.
    Right: L_pi sum_t gamma^t |grad_a Q^pi - grad_a Q^|; L_pi is the largest |grad_theta pi(s_t)|   Eq. 12.
    gamma^t is the paper's d(s) / (1 - gamma); both sums end after the same 200 steps.
    """
    actor, critic = (copy.deepcopy(net).double().cpu() for net in (actor, critic))
    states, actions, truth = action_gradients(env_id, actor, torch.as_tensor(starts).double(), gamma)
    delta = truth - critic_gradients(critic, states, actions)  # (T, n, da)
    weight = gamma ** torch.arange(len(delta))[:, None] / delta.shape[1]  # (T, 1)
    again = actor(states.flatten(0, 1)).view_as(delta)  # pi(s_t), to be differentiated by theta
    difference = torch.autograd.grad((weight[..., None] * delta * again).sum(), list(actor.parameters()))
    theta = {name: p.detach() for name, p in actor.named_parameters()}

    def slope(obs):  # (ds,) -> |grad_theta pi(obs)|, Frobenius: at least the spectral norm
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(actor, p, obs[None])[0])(theta)
        return sum(block.square().sum() for block in jacobian.values()).sqrt()

    lipschitz = torch.func.vmap(slope, chunk_size=64)(states.flatten(0, 1)).max()
    left = sum(part.square().sum() for part in difference).sqrt()
    return left.item(), (lipschitz * (weight * delta.norm(dim=-1)).sum()).item()


def load_networks(folder):
    """Arguments, actor and critic of a run of the TD3 family on Pendulum-v1."""
    state = load_state(folder)  # the scripts have the same actors and critics
    args, obs_norm = state["args"], mage_td3.Normaliser(3)
    actor = mage_td3.Actor(obs_norm, 1, args["actor_hidden"])
    critic = mage_td3.Critic(obs_norm, 1, args["critic_hidden"], args["num_critics"])
    actor.load_state_dict(state["actor"])
    critic.load_state_dict(state["critic"])
    return args, actor, critic


def bound_of_run(folder):
    """Both sides of Proposition 3.1 for the networks at the end of a run."""
    args, actor, critic = load_networks(folder)
    env = make_env(args["env_id"], seed=args["seed"])
    starts = np.stack([env.reset()[0] for _ in range(10)])
    return proposition(actor, critic, starts, args["env_id"], args["gamma"])


# --- figure -------------------------------------------------------------------------------------------------
def read(folder):
    """eval.csv of a run as {column: (evaluations,)}."""
    with open(folder / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: np.array([float(row[column]) for row in rows]) for column in COLUMNS}


def draw(panel, runs, names, column, scale):
    """Median over seeds of a column of eval.csv, and every seed."""
    for name in names:
        colour = f"C{list(RUNS).index(name)}"  # the same in every panel
        steps, values = runs[name][0]["step"], np.stack([run[column] for run in runs[name]])  # (seeds, n)
        panel.plot(steps, np.median(values, 0), color=colour, label=name, lw=2)
        panel.plot(steps, values.T, color=colour, lw=0.5, alpha=0.5)
    panel.axvline(200, color="0.6", lw=0.8, ls=":")  # learning starts
    panel.set(xlabel="environment steps", yscale=scale)


def figure(args, runs, bounds):
    frozen, ddpg = ([name for name in RUNS if name.startswith(kind)] for kind in ("frozen", "mage_ddpg"))
    fig, ((error, cosine), (norm, bound)) = plt.subplots(2, 2, figsize=(11, 8))
    draw(error, runs, frozen, "gradient_l1", "log")
    error.set(title="figure 3: random actor", ylabel="error of the action-gradient (Eq. 14)")
    draw(cosine, runs, frozen, "gradient_cosine", "linear")
    cosine.set(title="the same critics", ylabel="cosine with the true action-gradients")
    draw(norm, runs, ddpg, "gradient_norm", "log")
    norm.set(title="figure 5: true dynamics, actor learns", ylabel="mean length of the action-gradient")
    for number, name in enumerate(RUNS):
        left, right = np.array(bounds[name]).T
        bound.loglog(right, left, f"C{number}o", ms=6, mfc="none", label=name)
    ends = np.array([min(map(min, sum(bounds.values(), []))), max(map(max, sum(bounds.values(), [])))])
    bound.plot(ends, ends, color="0.6", lw=0.8, ls=":")
    bound.set(title="proposition 3.1, last critics", xlabel="bound", ylabel="error of the policy gradient")
    for panel in fig.axes:
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, loc="lower right" if panel is cosine else "best")
    fig.tight_layout()
    write_whole(args.output, partial(fig.savefig, format=args.output.suffix[1:], dpi=150))
    plt.close(fig)


def main(args):
    for name, least in (("seeds", 1), ("steps", 10)):
        if getattr(args, name) < least:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least {least}.")
    if args.workers is not None and args.workers < 1:
        raise BadInput(f"--workers {args.workers}: give at least 1.")
    figure_path(args.output)
    torch.set_num_threads(1)  # as in the scripts: small networks are fastest on one
    folders = make_runs(args)
    runs = {name: [read(folder) for folder in folders[name]] for name in RUNS}
    bounds = {name: [bound_of_run(folder) for folder in folders[name]] for name in RUNS}
    write_table(args.output.with_suffix(".csv"), [
        dict(run=name, seed=seed) | {column: f"{run[column][i]:.5g}" for column in COLUMNS}
        for name in RUNS for seed, run in enumerate(runs[name]) for i in range(len(run["step"]))
    ])  # fmt: skip
    write_table(args.output.with_suffix(".bounds.csv"), [
        dict(run=name, seed=seed, policy_gradient_error=f"{left:.5g}", bound=f"{right:.5g}")
        for name in RUNS for seed, (left, right) in enumerate(bounds[name])
    ])  # fmt: skip
    figure(args, runs, bounds)
    print("| run | error (Eq. 14) | cosine | length | true length | policy gradient: error | its bound |")
    print("|---|---|---|---|---|---|---|")
    for name in RUNS:
        names = ("gradient_l1", "gradient_cosine", "gradient_norm", "true_norm")
        ends = [np.median([run[column][-1] for run in runs[name]]) for column in names]
        cells = " | ".join(f"{value:.3g}" for value in [*ends, *np.median(bounds[name], 0)])
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, prog="python -m common.experiments.mage_gradients", description=__doc__))
