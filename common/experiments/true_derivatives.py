"""Is the derivative of a learned model that of the world? Models and critics of runs on MuJoCo robots.

    python -m common.experiments.true_derivatives runs/HalfCheetah-v4/maac_sac/seed-0 -o true_derivatives.png

MAGE takes the gradient of its target through a learned model in the place of the world (Eq. 6 for Eq. 5), and
MAAC chains the model's derivatives H times. The world's own are had by differences (mujoco_derivatives.py) in
states of new episodes of the policy and, where an observation tells the state, in replayed ones; the action
is the policy's, without noise. Several runs may be named. The CSV file beside the figure has four parts:

model    the Jacobians of the model's mean change by action and by observation, in units of its normalisers:
         of the ensemble (mean over members) and of a member; by kind of quantity, and by contact. That by the
         observation is without the identity, which no model has to learn.
target   the action-gradient of the TD target r + gamma (1 - terminated) min Q(s', pi(s')) of the run's target
         networks, without noise: through the model against through the world. "ensemble" is the mean of the
         members' gradients, as Eq. 6 has it; "member" is one of them; "sample" is one with the model's noise,
         what a row of MAGE's batch sees; "derivative" has the world's s' and the ensemble's derivative.
critic   the action-gradient of the smaller critic against that of the target through the world. `residual` is
         the length of the TD error's action-gradient under the true dynamics (Eq. 5), mean over critics.
         "before the tanh" multiplies both with 1 - a^2, as the actor does, to which a slope counts little
         where its action is at a bound.
horizon  the gradient of H rewards and the critic after them by the first action, and by the policy's
         parameters (mean over states), along the policy's trajectories. "derivative" chains the model's
         derivatives on the true trajectory; "imagined" is the model's own, one for each member, with its
         noise, as in MAAC; "critic" is the action-gradient of the critic in the first state.

error is |found - truth| / |truth|, 1 for no gradient at all. It, cosine and lengths are medians over states;
error_90 is the 90% quantile. The critic of MAGE is trained for what `critic` measures, though with its model;
`horizon` judges each critic by more true rewards. Runs of td3.py have no model. The reward is the known
function, also in a run that learned one. MAAC's target is without entropy, its action the policy's mean.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import BadInput
from common.args import one_sentence
from common.experiments import needs
from common.experiments.mujoco_derivatives import compared, stacked, through_world
from common.experiments.robot_runs import Agent, records, step_sizes
from common.files import figure_path, write_table, write_whole
from common.true_gradients import critic_gradients

needs("maac_sac", "mage_td3")
import maac_sac  # noqa: E402
import mage_td3  # noqa: E402

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b", "#E69F00")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # These are the folders of runs.
    # The figure goes here.
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("true_derivatives.png")
    states: int = 256  # This many states of new episodes are measured, and as many replayed ones.
    every: int = 15  # Two states of an episode are this many steps apart.
    horizon: int = 20  # This is the longest horizon; H goes from 0 to it.
    starts: int = 64  # Trajectories start in this many of the states of new episodes.


# --- what is compared: rows {column: value} of the table ----------------------------------------------------
def by_contact(found, truth, contact, **more):
    """Rows for all states, those in contact and the others; more: columns of a number (n,) for each state."""
    for name, mask in (("", contact | True), ("yes", contact), ("no", ~contact)):
        if mask.any():
            medians = {key: values[mask].quantile(0.5).item() for key, values in more.items()}
            states = found.movedim(-truth.ndim, 0)[mask].movedim(0, -truth.ndim)
            yield dict(contact=name) | compared(states, truth[mask]) | medians


def model_jacobians(model, obs, action):
    """Of each member's normalised mean change, by action (K, n, ds, da) and by observation (K, n, ds, ds)."""
    obs, action = (x.expand(model.members, -1, -1).clone().requires_grad_() for x in (obs, action))
    mean = model(obs, action)[0] * (model.delta_norm.std / model.delta_norm.scale)  # 0 for what is constant
    rows = [torch.autograd.grad(mean[..., j].sum(), (action, obs), retain_graph=True)
            for j in range(mean.shape[-1])]  # fmt: skip
    return [torch.stack(parts, -2) for parts in zip(*rows, strict=True)]


def model_rows(agent, step):
    obs, action, _, by_action, by_obs, contact = step
    true, size = agent.true, agent.obs_dim
    scale, unit = agent.model.delta_norm.scale[:, None], agent.model.obs_norm.scale
    learned, kinds = model_jacobians(agent.model, obs, action), {}
    pairs = {"action": (learned[0], by_action / scale)}
    if by_obs is not None:
        identity = torch.eye(size, dtype=torch.float64)
        pairs["observation"] = (learned[1] * unit, (by_obs - identity) / scale * unit)
        velocities = size - true.model.nv
        kinds = dict(positions=range(true.x_first, velocities), velocities=range(velocities, size))
        kinds |= {"x velocity": range(1)} if true.x_first else {}
    for by, (hat, truth) in pairs.items():
        for what, found in (("ensemble", hat.mean(0)), ("member", hat)):
            about = dict(by=by, what=what)
            yield from (about | dict(kind="all") | row for row in by_contact(found, truth, contact))
            for kind, dims in kinds.items():
                yield about | dict(kind=kind) | compared(found[..., list(dims), :], truth[:, list(dims)])


def target_gradient(agent, obs, action, predict):
    """Action-gradient (..., n, da) of the TD target of a step; `predict(action)` is what comes next."""
    def step_target(action):
        reward, next_obs, terminated = agent.outcome(obs, action, predict(action))
        flat = reward.flatten(), next_obs.flatten(0, -2), terminated.flatten()
        noise = torch.zeros_like(reward).flatten()[:, None]
        y = mage_td3.td_target(agent.actor_target, agent.critic_target, *flat, noise, agent.gamma)
        return y.view(reward.shape)

    return mage_td3.with_action_gradient(step_target, action)[1]


def target_rows(agent, step, truth):
    obs, action, contact = step[0], step[1], step[-1]
    every = action.expand(agent.model.members, -1, -1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(agent.model.members, *obs.shape, generator=generator, dtype=obs.dtype)
    gradient = partial(target_gradient, agent, obs)
    member = gradient(every, lambda a: agent.imagined(obs, a))
    found = dict(ensemble=member.mean(0), member=member,
                 sample=gradient(every, lambda a: agent.imagined(obs, a, noise)),
                 derivative=gradient(action, lambda a: agent.through_model(step, obs, a)))  # fmt: skip
    for what, hat in found.items():
        yield from (dict(what=what) | row for row in by_contact(hat, truth, contact))


def critic_rows(agent, step, truth):
    obs, action, contact = step[0], step[1], step[-1]
    every = action.expand(agent.critic.members, -1, -1)
    _, grad_q = mage_td3.with_action_gradient(partial(agent.critic, obs), every)
    residual = (truth - grad_q).norm(dim=-1).mean(0)  # (n,)
    found, slope = critic_gradients(agent.critic, obs, action), 1 - action**2
    yield from by_contact(found, truth, contact, residual=residual)
    for row in by_contact(slope * found, slope * truth, contact):
        yield dict(what="before the tanh") | row


# --- the horizon --------------------------------------------------------------------------------------------
class Follow:
    """The policy without noise, as actor_loss of maac_sac.py asks it; its first action is given."""

    def __init__(self, actor, first):
        self.actor, self.first = actor, first

    def sample(self, obs):
        action, self.first = self.actor(obs) if self.first is None else self.first, None
        action = action.repeat(len(obs) // len(action), 1)  # the first one is that of all samples
        return action, torch.zeros_like(action[:, 0])


def horizon_gradients(agent, obs, predict, horizon, samples=1):
    """Of H rewards and the critic: by the first action (n, da), by the policy's parameters (1, .), a mean.

    predict(t, obs, action) is what comes next. The objective is MAAC's, without entropy.
    """
    first, t = agent.actor(obs), count()

    def step(obs, action):
        return agent.outcome(obs, action, predict(next(t), obs, action))

    policy = Follow(agent.actor, first)
    loss, _ = maac_sac.actor_loss(policy, agent.critic, step, 0.0, obs, agent.gamma, horizon, samples)
    by_action, *by_policy = torch.autograd.grad(-loss, [first, *agent.actor.parameters()])
    return by_action * len(obs), torch.cat([part.flatten() for part in by_policy])[None]


def horizon_rows(agent, paths, longest):
    """paths: a stacked step for each time."""
    def noisy(t, obs, action):
        return agent.model.sample(obs, action, torch.randn_like(obs))

    at_once = horizon_gradients(agent, paths[0][0], None, 0)[:1]  # by the action alone
    for horizon in range(longest + 1):
        gradients, found = partial(horizon_gradients, agent, paths[0][0]), {"critic": at_once}
        truth = gradients(lambda t, s, a: through_world(paths[t], s, a), horizon)
        if agent.model is not None:
            torch.manual_seed(horizon)
            found["derivative"] = gradients(lambda t, s, a: agent.through_model(paths[t], s, a), horizon)
            found["imagined"] = gradients(noisy, horizon, agent.model.members)
        for what, hats in found.items():
            for by, hat, true in zip(("action", "policy"), hats, truth, strict=False):
                yield dict(by=by, what=what, horizon=horizon) | compared(hat, true)


def measure(agent, args, bar):
    """The rows of a run."""
    for by, (median, most) in step_sizes(agent, args).items():
        print(f"{agent.name}: with a tenth of the difference the Jacobian by the {by} is another by "
              f"{median:.1g} of its length (median), {most:.1g} (90%)", flush=True)  # fmt: skip
    for states, paths in records(agent, args, bar).items():
        if not paths:
            continue
        step = stacked([path[0] for path in paths])
        touching, bound = step[-1].double().mean(), (step[1].abs() > 0.99).double().mean()
        print(f"{agent.name}: {states} states, {touching:.0%} of them in contact; {bound:.0%} of the numbers "
              "in their actions are beyond 0.99", flush=True)  # fmt: skip
        truth = target_gradient(agent, step[0], step[1], partial(through_world, step, step[0]))
        parts = {"critic": critic_rows(agent, step, truth)}
        if agent.model is not None:
            parts |= {"model": model_rows(agent, step), "target": target_rows(agent, step, truth)}
        if states == "fresh" and step[4] is not None and args.horizon:
            long = [path for path in paths if len(path) == args.horizon]
            parts["horizon"] = horizon_rows(
                agent, [stacked(steps) for steps in zip(*long, strict=True)], args.horizon)  # fmt: skip
        about = dict(run=agent.name, env_id=agent.env_id, step=agent.step, states=states)
        for part, rows in parts.items():
            for row in rows:
                numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                yield about | dict(part=part) | numbers


# --- figure and table ---------------------------------------------------------------------------------------
def figure(rows, path):
    def find(column, **wanted):  # numbers of the rows that have these values
        return [float(row[column]) for row in rows if all(row.get(k, "") == v for k, v in wanted.items())]

    def one(column, **wanted):
        return (find(column, contact="", states="fresh", **wanted) or [np.nan])[0]

    drawing, (a, b, c, d) = plt.subplots(1, 4, figsize=(16, 4.3), layout="constrained")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    kinds = ("all", "positions", "velocities", "x velocity")
    for i, run in enumerate(runs):
        width, colour = 0.8 / len(runs), COLOURS[i % len(COLOURS)]
        at = (i - (len(runs) - 1) / 2) * width
        mine = dict(run=run, part="model", by="action", what="ensemble")
        a.bar(np.arange(4) + at, [one("error", **mine, kind=kind) for kind in kinds], width, color=colour)
        bars = [one("cosine", run=run, part="target", what=what) for what in ("ensemble", "sample")]
        bars.append(one("cosine", run=run, part="critic"))
        b.bar(np.arange(3) + at, bars, width, color=colour)
        for what, style in (("imagined", "-"), ("critic", ":")):
            c.plot(find("cosine", run=run, part="horizon", by="action", what=what), style, color=colour)
        d.plot(find("true_length", run=run, part="horizon", what="critic"), color=colour, label=run)
    a.set_xticks(range(4), [kind.replace(" ", "\n") for kind in kinds])
    b.set_xticks(range(3), ["target through\nthe model", "a sample\nof it", "critic"])
    titles = ("Model, derivative by the action:\nrelative error", "Cosine with the true action-gradient\n"
              "of the TD target", "Gradient of H rewards by first action:\ncosine, model (-), critic (...)",
              "Gradient of H rewards by first action:\ntrue length")  # fmt: skip
    for panel, title in zip((a, b, c, d), titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
    c.set_xlabel("H")
    d.set(xlabel="H", yscale="log")
    drawing.legend(*d.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    write_whole(path, partial(drawing.savefig, format=path.suffix[1:], dpi=120))
    plt.close(drawing)


def main(args):
    for name, least in dict(states=1, every=1, horizon=0, starts=1).items():
        if getattr(args, name) < least:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least {least}.")
    if not args.runs:
        raise BadInput("No run is named: give the folders of some, runs/<env-id>/<script>/seed-<seed>.")
    path, rows = figure_path(args.output), []
    torch.set_num_threads(1)
    agents = [Agent(folder) for folder in args.runs]
    with tqdm(total=2 * args.states * len(agents), unit="state", disable=None) as bar:
        for agent in agents:
            rows += measure(agent, args, bar)
    write_table(path.with_suffix(".csv"), rows)
    figure(rows, path)
    names = ("run", "states", "part", "by", "what", "count", "error", "error_90", "cosine", "length",
             "true_length", "residual")  # fmt: skip
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for row in rows:
        if row["part"] != "horizon" and row.get("kind", "all") == "all" and not row["contact"]:
            print(f"| {' | '.join(str(row.get(name, '')) for name in names)} |")


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, prog="python -m common.experiments.true_derivatives", description=__doc__))
