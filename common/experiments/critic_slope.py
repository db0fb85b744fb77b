"""A critic can be right in value and wrong in slope: the idea of MAGE in one picture.

    python -m common.experiments.critic_slope -o critic_slope.png

The task has one step, a state and an action in [-1, 1], and its true value is known: a hill over the actions,
which lies elsewhere in each state. The actor does nothing, its action is 0, and that is on the slope of the
hill. Two sets of critics are asked about this action alone, as the critics of Dyna-TD3 and of MAGE are asked
about the actor's own. The first learns from the TD error and finds the value there; its slope is left to
chance. The second learns from `mage_loss` of mage_td3.py, where the length of the TD error's action-gradient
is a second term, and finds both.

The third panel is no toy. It shows the cosine between the action-gradients of critics and the true ones on
Pendulum-v1, from the CSV file of `python -m common.experiments.mage_gradients` (--study).

Prints the errors of value and slope; the CSV file beside the figure has the curves of the first two panels.
"""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro

from common import BadInput
from common.args import one_sentence
from common.experiments import needs
from common.files import figure_path, write_table, write_whole

needs("mage_td3")
import mage_td3  # noqa: E402

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

STUDY = Path(__file__).resolve().parents[2] / "tests" / "reference" / "gradients" / "mage_gradients.csv"
LAM = 0.2  # the weight of the TD error beside its action-gradient, as in figure 2 of the paper
BATCH, HIDDEN, RATE = 64, 64, 2e-3
TRUTH, ALONE, MAGE, TD3 = "#222222", "#D55E00", "#0072B2", "#6b6b6b"  # told apart by the colour-blind too


@dataclass
class Args:
    # The figure goes here, and its curves into a CSV file beside it.
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("critic_slope.png")
    study: Path = STUDY  # The third panel shows what this file has.
    seed: int = 0  # This seeds the critics' first weights and the states.
    critics: int = 6  # Each of the two sets has this many critics.
    steps: int = 1500  # Each critic takes this many steps of gradient descent.


# --- what is learned ----------------------------------------------------------------------------------------
def true_value(obs, action):
    """The value of an action, (B, 1), (B, 1) -> (B,): a hill that moves with the state."""
    return torch.exp(-(((action - 0.55 - 0.2 * obs) / 0.45) ** 2))[:, 0]


def policy(obs):
    """What the actor does: nothing. So it never tells the critic what another action is worth."""
    return torch.zeros_like(obs)


def learn(args, with_gradient):
    """Critics that were asked about the actor's own actions alone, all of them in one `Critic`."""
    torch.manual_seed(args.seed)
    critic = mage_td3.Critic(mage_td3.Normaliser(1), 1, HIDDEN, args.critics)
    optimizer = mage_td3.radam(critic, RATE)
    for _ in range(args.steps):
        obs = torch.rand(BATCH, 1) * 2 - 1
        gradient_loss, td_loss = mage_td3.mage_loss(critic, partial(true_value, obs), obs, policy(obs))
        mage_td3.descend(optimizer, gradient_loss + LAM * td_loss if with_gradient else td_loss)
    return critic


def value_and_slope(f, obs):
    """What f(obs, action) is at the actor's action, and its slope there: (..., n) each."""
    action = policy(obs).expand(f(obs, policy(obs)).shape + (1,)).clone().requires_grad_()
    value = f(obs, action)
    return value.detach(), torch.autograd.grad(value.sum(), action)[0][..., 0]


def errors(critic):
    """Mean errors of the critics' values and slopes on the actor's actions, each over the mean true size."""
    obs = torch.linspace(-1, 1, 101)[:, None]
    truth, found = value_and_slope(true_value, obs), value_and_slope(critic, obs)
    return [((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(truth, found, strict=True)]


# --- figure -------------------------------------------------------------------------------------------------
def curves(critic, obs=0.0, n=201):
    """Actions (n,), true values (n,) and those of the critics (N, n) in one state."""
    action, obs = torch.linspace(-1, 1, n)[:, None], torch.full((n, 1), obs)
    with torch.no_grad():
        return action[:, 0], true_value(obs, action), critic(obs, action)


def draw_critics(panel, critic, colour, title, found):
    action, truth, values = curves(critic)
    here = torch.zeros(1, 1)
    (a,), height = policy(here)[0].tolist(), true_value(here, policy(here)).item()
    panel.plot(action, truth, color=TRUTH, lw=3, zorder=2)
    panel.plot(action, values.T, color=colour, lw=1.2, alpha=0.55, zorder=3)
    reach = np.array([-0.2, 0.2])
    for slope in value_and_slope(critic, here)[1][:, 0].tolist():
        panel.plot(a + reach, height + slope * reach, color=colour, lw=3.5, zorder=4, solid_capstyle="round")
    panel.plot(a, height, "o", color="white", mec=TRUTH, mew=2.2, ms=10, zorder=5)
    panel.set(xlim=(-1, 1), ylim=(-0.42, 1.18), xticks=[-1, 0, 1], yticks=[0, 1], xlabel="action")
    panel.set_title(title, color=colour)
    panel.text(0.97, 0.05, found, transform=panel.transAxes, ha="right", color=colour)
    return a, height


def cosines(path):
    """{run: (steps since learning began, median over seeds of the cosine)} of a study."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for run in ("frozen_mage_td3", "frozen_td3", "frozen_dyna_td3"):
        mine = [row for row in rows if row["run"] == run]
        steps = sorted({int(row["step"]) for row in mine if int(row["step"]) >= 200})
        by_step = [[float(row["gradient_cosine"]) for row in mine if int(row["step"]) == s] for s in steps]
        found[run] = np.array(steps) - 200, np.array([np.median(values) for values in by_step])
    return found


def draw_study(panel, path):
    lines = {"frozen_mage_td3": ("MAGE", MAGE, 0.09), "frozen_dyna_td3": ("Dyna-TD3", ALONE, 0),
             "frozen_td3": ("TD3, on\nreplayed\nactions", TD3, -0.34)}  # fmt: skip
    found = cosines(path)
    panel.axhline(0, color="0.8", lw=1, zorder=1)
    for run, (name, colour, up) in lines.items():
        steps, values = found[run]
        panel.plot(steps, values, color=colour, lw=2.5)
        panel.text(steps[-1] * 1.03, values[-1] + up, f"{name}  {values[-1]:.2f}".replace("-0", "−0"),
                   color=colour, va="center")  # fmt: skip
    panel.set(xlim=(0, steps[-1]), ylim=(-1.05, 1.1), yticks=[-1, 0, 1], xticks=[0, steps[-1]])
    panel.set(xlabel="environment steps", ylabel="cosine with the true slope")
    panel.set_title("Pendulum-v1", color=TRUTH)


def figure(args, alone, mage):
    with plt.rc_context({"font.size": 17, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 20, "axes.titlepad": 14, "axes.titleweight": "bold"}):  # fmt: skip
        fig, panels = plt.subplots(1, 3, figsize=(15, 5), width_ratios=[1, 1, 0.72])
        a, height = draw_critics(panels[0], alone, ALONE, "TD error alone", "right value,\nany slope")
        panels[0].annotate("the actor's\naction", (a, height), (-0.58, 0.62), color=TRUTH, ha="center",
                           arrowprops=dict(arrowstyle="-", color=TRUTH, shrinkB=9))  # fmt: skip
        panels[0].text(0.55, 1.05, "true value", color=TRUTH, ha="center")
        panels[0].set(ylabel="value")
        draw_critics(panels[1], mage, MAGE, "MAGE adds ‖∇ₐδ‖", "right value,\nright slope")
        draw_study(panels[2], args.study)
        fig.tight_layout(w_pad=2)
        write_whole(args.output, partial(fig.savefig, format=args.output.suffix[1:], dpi=100))
        plt.close(fig)


def main(args):
    for name in ("critics", "steps"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least 1.")
    if not args.study.is_file():
        raise BadInput(f"--study {args.study} is no file: common.experiments.mage_gradients makes it.")
    figure_path(args.output)
    torch.set_num_threads(1)  # as in the scripts: small networks are fastest on one
    alone, mage = (learn(args, with_gradient) for with_gradient in (False, True))
    (action, truth, values), others = curves(alone), curves(mage)[2]
    write_table(args.output.with_suffix(".csv"), [
        dict(action=f"{a:.2f}", truth=f"{q:.4f}")
        | {f"td_{k}": f"{v:.4f}" for k, v in enumerate(values[:, i].tolist())}
        | {f"mage_{k}": f"{v:.4f}" for k, v in enumerate(others[:, i].tolist())}
        for i, (a, q) in enumerate(zip(action.tolist(), truth.tolist(), strict=True))
    ])  # fmt: skip
    figure(args, alone, mage)
    print("| trained on | error of the value | error of the slope |\n|---|---|---|")
    for name, critic in (("the TD error", alone), ("both terms of mage_loss", mage)):
        print("| {} | {:.1%} | {:.1%} |".format(name, *errors(critic)))


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, prog="python -m common.experiments.critic_slope", description=__doc__))
