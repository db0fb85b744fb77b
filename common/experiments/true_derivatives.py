"""Is the derivative of a learned model that of the world? Models and critics of runs on MuJoCo robots.

    python -m common.experiments.true_derivatives RUN_FOLDERS -o true_derivatives.png

MAGE takes the gradient of its target through a learned model in the place of the world (Eq. 6 for Eq. 5), and
MAAC chains the model's derivatives H times. The world's own are to be had by differences (common/dynamics.py),
in states of new episodes of the policy and, where an observation tells the state, in replayed ones; the
action is the policy's, without noise. The CSV file beside the figure has four parts:

model    the Jacobians of the model's mean change, in units of its normalisers, by action and by observation:
         of the ensemble (mean of the members' Jacobians), and of members; by kind of quantity, and by contact.
         That by the observation is without the identity, which no model has to learn.
target   the action-gradient of the TD target r + gamma (1 - terminated) min Q(s', pi(s')) of the run's target
         networks, without noise: through the model against through the world. "ensemble" is the mean of
         the members' gradients, as Eq. 6 has it; "member" one of them; "sample" one with the model's noise,
         which a row of MAGE's batch sees; "derivative" has the world's s' and the ensemble's derivative.
critic   the action-gradient of the smaller critic against that of the target through the world. `residual` is
         the length of the TD error's action-gradient under the true dynamics (Eq. 5), mean over critics.
horizon  the gradient of H rewards and the critic after them by the first action, and by the policy's
         parameters (mean over states), along the policy's trajectories. "derivative" chains the model's
         derivatives on the true trajectory, "imagined" is the model's own, one for each member, with its noise
         as in MAAC; "critic" is the action-gradient of the critic in the first state.

error is |found - truth| / |truth|, 1 for no gradient at all; error, cosine and lengths are medians over states,
error_90 the 90% quantile. The critic of MAGE is trained for what `critic` measures, though with its model;
`horizon` judges each critic by more true rewards. Runs of td3.py have no model. The reward is the known
function, also in a run that learned one. MAAC's target is without entropy, and its action the policy's mean.
"""

import copy
import sys
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

from common import BadInput, Fault
from common.dynamics import MuJoCoDerivatives
from common.envs import call, make_env
from common.evaluate import as_policy, load_script
from common.files import figure_path, loading, newest, read_checkpoint, write_table, write_whole
from common.rewards import reward_fn, termination_fn
from common.true_gradients import critic_gradients

try:
    import maac_sac
    import mage_td3
except ModuleNotFoundError:
    scripts = "mage_td3.py and maac_sac.py"
    print(f"error: common.experiments.true_derivatives needs {scripts} beside common/.", file=sys.stderr)
    sys.exit(2)

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b", "#E69F00")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("true_derivatives.png")  # the figure
    states: int = 256  # of new episodes, and as many replayed ones
    episodes: int = 4  # new ones; they start where no evaluation of a run does
    horizon: int = 20  # the longest; H goes from 0 to it
    starts: int = 64  # states of new episodes in which trajectories start


# --- what is given ------------------------------------------------------------------------------------------
class Agent:
    """The networks of a run's last checkpoint, in float64. BadInput if the robot has no true derivatives."""

    def __init__(self, folder):
        script, self.env_id = load_script(folder)
        self.env = make_env(self.env_id)
        MuJoCoDerivatives(self.env)  # refuses what it does not know
        path = newest(folder)
        if path is None:
            raise BadInput(f"{folder} has no checkpoint: let the run go on with --resume.")
        state = read_checkpoint(path)
        args, sizes = tyro_args(script, state["args"]), [
            space.shape[0] for space in (self.env.observation_space, self.env.action_space)]  # fmt: skip
        with loading(path):
            if hasattr(script, "networks"):  # maac_sac.py, whose target has no actor of its own
                nets = dict(zip(("actor", "critic", "critic_target", "model"), script.networks(args, *sizes),
                                strict=True))  # fmt: skip
            else:
                norm = script.Normaliser(sizes[0])
                actor = script.Actor(norm, sizes[1], args.actor_hidden)
                critic = script.Critic(norm, sizes[1], args.critic_hidden, args.num_critics)
                nets = dict(actor=actor, actor_target=actor, critic=critic, critic_target=critic)
                if hasattr(script, "Dynamics"):
                    size = (args.model_hidden, args.model_layers, args.ensemble_size)
                    nets["model"] = script.Dynamics(norm, sizes[1], *size)
            for name, net in nets.items():  # copies: some of them stand in two places
                net.load_state_dict(state[name])
                nets[name] = copy.deepcopy(net).double().requires_grad_(name == "actor")
            self.rows = state["real" if "real" in state else "buffer"]["rows"]
        self.actor, self.critic, self.critic_target = (nets[n] for n in ("actor", "critic", "critic_target"))
        self.actor_target, self.model = nets.get("actor_target", self.actor), nets.get("model")
        if self.model is not None and not self.model.net[-1].bias.any():  # they begin at 0
            self.model = None  # as with --horizon 0 --no-steve --real-ratio 1
        self.gamma, self.step, self.obs_dim = args.gamma, state["step"], sizes[0]
        self.name = "/".join(Path(folder).absolute().parts[-2:])

    def outcome(self, obs, action, next_obs):
        """What the step to next_obs gives: reward, next_obs, terminated."""
        known = reward_fn(self.env_id), termination_fn(self.env_id)
        return known[0](obs, action, next_obs), next_obs, known[1](next_obs)

    def members(self, obs, action):
        """The next observation by each member, without noise: (..., ds), (..., da) -> (K, ..., ds)."""
        rows = [x.expand(self.model.members, *x.shape[-2:]) for x in (obs, action)]
        return obs + self.model.delta_norm.inverse(self.model(*rows)[0])


def tyro_args(script, values):
    """A script's Args of a run; a flag that the script has got since then takes its default."""
    try:
        return script.Args(**values)
    except TypeError as error:
        raise BadInput(f"a run was made by another version of {script.__file__} ({error}): use that one.") from None


def records(agent, args, bar):
    """What the world does: {"fresh": [T steps], "replayed": [one step]}, where they can be had.

    A step is obs (n, ds), action (n, da), next_obs (n, ds), by_action (n, ds, da), by_obs (n, ds, ds) or None,
    contact (n,), finer: |by_action - by_action with a tenth of the difference| / |by_action| (n,).
    """
    found, policy = {"fresh": [], "replayed": []}, as_policy(agent.actor.float())
    agent.actor.double()
    exact = as_policy_64(agent.actor)
    rng, env = np.random.default_rng(0), agent.env
    picked = -(-args.states // args.episodes)  # states of an episode
    for episode in range(args.episodes):
        agent.actor.float()
        obs, _ = call(agent.env_id, env.reset, seed=2 * 10**6 + episode)
        length, actions, done = 0, [], False
        while not done and length < 1000:
            actions.append(policy(obs))
            obs, _, terminated, truncated, _ = call(agent.env_id, env.step, actions[-1])
            length, done = length + 1, terminated or truncated
        agent.actor.double()
        wanted = set(rng.choice(length, min(picked, length), replace=False).tolist())
        obs, _ = call(agent.env_id, env.reset, seed=2 * 10**6 + episode)
        for t, action in enumerate(actions):
            if t in wanted:
                follow = args.horizon if len(found["fresh"]) % picked < -(-args.starts // args.episodes) else 0
                with MuJoCoDerivatives(env) as true:
                    found["fresh"].append(trajectory(true, exact, obs.astype(float), max(follow, 1)))
                bar.update()
            obs, *_ = call(agent.env_id, env.step, action)
    with MuJoCoDerivatives(env) as true:
        for row in agent.rows[rng.choice(len(agent.rows), min(args.states, len(agent.rows)), replace=False)]:
            if true.first is not None:
                obs = row[: agent.obs_dim].double().numpy()
                true.restore(obs)
                found["replayed"].append(trajectory(true, exact, obs, 1))
            bar.update()
    return found


def as_policy_64(actor):
    @torch.no_grad()
    def policy(obs):
        return actor(torch.as_tensor(obs)[None])[0].numpy()

    return policy


def trajectory(true, policy, obs, steps):
    """Steps of the policy in the world from the state that `true` is in, each with its derivatives."""
    path = []
    for t in range(steps):
        action = policy(obs)
        by_action = true.by_action(action)
        by_obs = None if true.first is None else true.by_obs(action)
        finer = true.by_action(action, true.EPS / 10) - by_action if t == 0 else np.nan
        next_obs, contact = true.go_on(action)
        values = obs, action, next_obs, by_action, by_obs, contact
        finer = np.linalg.norm(finer) / np.linalg.norm(by_action) if t == 0 else np.nan
        path.append([None if x is None else torch.as_tensor(np.array(x)) for x in (*values, finer)])
        obs = next_obs
    return path


def stacked(steps):
    """Records of one step in several states, as tensors with the states first."""
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*steps, strict=True)]


# --- what is compared ---------------------------------------------------------------------------------------
def compared(found, truth):
    """Columns for gradients (..., n, *shape) and true ones (n, *shape): medians over all that stand in front."""
    width = truth.flatten(1).shape[1]
    found, truth = found.reshape(-1, width), truth.expand_as(found).reshape(-1, width)
    lengths = found.norm(dim=1), truth.norm(dim=1)
    error = (found - truth).norm(dim=1) / lengths[1].clamp(min=1e-30)
    cosine = (found * truth).sum(1) / (lengths[0] * lengths[1]).clamp(min=1e-30)
    columns = dict(error=error, cosine=cosine, length=lengths[0], true_length=lengths[1])
    medians = {name: values.quantile(0.5).item() for name, values in columns.items()}
    return dict(states=len(truth), error_90=error.quantile(0.9).item()) | medians


def model_jacobians(agent, obs, action):
    """Of each member's normalised mean change, by action (K, n, ds, da) and by observation (K, n, ds, ds)."""
    model = agent.model
    obs, action = (x.expand(model.members, -1, -1).clone().requires_grad_() for x in (obs, action))
    mean, _ = model(obs, action)
    share = model.delta_norm.std / model.delta_norm.scale  # next to 0 for what is constant
    rows = [torch.autograd.grad(mean[..., j].sum() * share[j], (action, obs), retain_graph=True)
            for j in range(mean.shape[-1])]  # fmt: skip
    return [torch.stack(parts, -2) for parts in zip(*rows, strict=True)]


def kinds(true):
    """{kind of quantity: its dimensions in an observation}; only "all" where they are mixed."""
    size, found = true.env.observation_space.shape[0], {"all": slice(None)}
    if true.first is not None:
        last = size - true.model.nv
        found |= {"positions": slice(true.x_first, last), "velocities": slice(last, size)}
        found |= {"x velocity": slice(0, 1)} if true.x_first else {}
    return found


def model_rows(agent, step):
    obs, action, _, by_action, by_obs, contact, _ = step
    model, scale = agent.model, agent.model.delta_norm.scale[:, None]
    learned = model_jacobians(agent, obs, action)
    pairs = {"action": (learned[0], by_action / scale)}
    if by_obs is not None:
        unit = model.obs_norm.scale
        pairs["observation"] = (learned[1] * unit, (by_obs - torch.eye(len(unit)).double()) / scale * unit)
    for by, (hat, truth) in pairs.items():
        for what, estimate in (("ensemble", hat.mean(0)), ("member", hat)):
            for kind, dims in kinds(MuJoCoDerivatives(agent.env)).items():
                yield dict(by=by, what=what, kind=kind) | compared(estimate[..., dims, :], truth[:, dims])
            for where, mask in (("in contact", contact), ("no contact", ~contact)):
                if mask.any():
                    row = compared(estimate[..., mask, :, :], truth[mask])
                    yield dict(by=by, what=what, kind="all", where=where) | row


def through_world(step, obs, action):
    """The next observation, with the true derivatives: value and gradient are right in the recorded state."""
    at_obs, at_action, next_obs, by_action, by_obs, *_ = step
    found = next_obs + (by_action @ (action - at_action)[..., None])[..., 0]
    if by_obs is not None:
        found = found + (by_obs @ (obs - at_obs)[..., None])[..., 0]
    return found


def through_model(agent, step, obs, action):
    """The next observation of the world, with the derivatives of the model (mean over its members)."""
    found = agent.members(obs, action).mean(0)
    return step[2] + found - found.detach()


def target_gradient(agent, obs, action, predict):
    """Action-gradient (..., n, da) of the TD target of a step in which `predict(action)` is what comes next."""
    def step_target(action):
        outcome = agent.outcome(obs, action, predict(action))
        flat = [x.flatten(0, -2) if x is outcome[1] else x.flatten() for x in outcome]
        noise = torch.zeros(())
        y = mage_td3.td_target(agent.actor_target, agent.critic_target, *flat, noise, agent.gamma)
        return y.view(outcome[0].shape)

    return mage_td3.with_action_gradient(step_target, action)[1]


def target_rows(agent, step, truth):
    obs, action, contact = step[0], step[1], step[5]
    model, k = agent.model, agent.model.members

    def noisy(a):
        mean, logvar = model(obs.expand(k, -1, -1), a)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0), dtype=mean.dtype)
        return obs + model.delta_norm.inverse(mean + (logvar / 2).exp() * noise)

    every = action.expand(k, -1, -1)
    member = target_gradient(agent, obs, every, partial(agent.members, obs))
    found = dict(ensemble=member.mean(0), member=member, sample=target_gradient(agent, obs, every, noisy),
                 derivative=target_gradient(agent, obs, action, partial(through_model, agent, step, obs)))  # fmt: skip
    for what, gradient in found.items():
        for where, mask in (("", contact | True), ("in contact", contact), ("no contact", ~contact)):
            if mask.any():
                yield dict(what=what, where=where) | compared(gradient[..., mask, :], truth[mask])


def critic_rows(agent, step, truth):
    obs, action, contact = step[0], step[1], step[5]
    found = critic_gradients(agent.critic, obs, action)
    every = action.expand(agent.critic.members, -1, -1)
    _, grad_q = mage_td3.with_action_gradient(partial(agent.critic, obs), every)
    residual = (truth - grad_q).norm(dim=-1).mean(0)  # (n,)
    for where, mask in (("", contact | True), ("in contact", contact), ("no contact", ~contact)):
        if mask.any():
            row = compared(found[mask], truth[mask])
            yield dict(where=where) | row | dict(residual=residual[mask].quantile(0.5).item())


# --- the horizon --------------------------------------------------------------------------------------------
class Follow:
    """The policy without noise, as actor_loss of maac_sac.py asks it; its first action is given."""

    def __init__(self, actor, first):
        self.actor, self.first = actor, first

    def sample(self, obs):
        action, self.first = self.actor(obs) if self.first is None else self.first, None
        action = action.repeat(len(obs) // len(action), 1)  # the first one, once for each sample
        return action, torch.zeros_like(action[:, 0])


def horizon_gradients(agent, obs, predict, horizon, samples=1):
    """Of H rewards and the critic: by the first action (n, da), and by the policy's parameters (1, .), a mean.

    predict(t, obs, action) is what comes next; the objective is that of MAAC, without entropy.
    """
    first, t = agent.actor(obs), count()

    def step(obs, action):
        return agent.outcome(obs, action, predict(next(t), obs, action))

    policy = Follow(agent.actor, first)
    loss, _ = maac_sac.actor_loss(policy, agent.critic, step, 0.0, obs, agent.gamma, horizon, samples)
    by_action, *by_policy = torch.autograd.grad(-loss, [first, *agent.actor.parameters()], allow_unused=True)
    return by_action * len(obs), torch.cat([p.flatten() for p in by_policy if p is not None])[None]


def horizon_rows(agent, paths, longest):
    """paths: a recorded step of n states for each t."""
    obs = paths[0][0]
    start, _ = horizon_gradients(agent, obs, None, 0)
    for h in range(longest + 1):
        truth = horizon_gradients(agent, obs, lambda t, s, a: through_world(paths[t], s, a), h)
        found = {"critic": ((start,), 1)}
        if agent.model is not None:
            torch.manual_seed(h)
            chained = horizon_gradients(agent, obs, lambda t, s, a: through_model(agent, paths[t], s, a), h)
            k, model = agent.model.members, agent.model
            imagined = horizon_gradients(
                agent, obs, lambda t, s, a: model.sample(s, a, torch.randn_like(s)), h, k)  # fmt: skip
            found |= {"derivative": (chained, 2), "imagined": (imagined, 2)}
        for what, (gradients, pairs) in found.items():
            for by, hat, true in list(zip(("action", "policy"), gradients, truth, strict=False))[:pairs]:
                yield dict(by=by, what=what, horizon=h) | compared(hat, true)


def measure(agent, args, bar):
    """The rows {column: value} of a run."""
    found = records(agent, args, bar)
    for states, paths in found.items():
        if not paths:
            continue
        step = stacked([path[0] for path in paths])
        about = dict(run=agent.name, env_id=agent.env_id, step=agent.step)
        print(f"{agent.name}: {states} states, {step[5].double().mean():.0%} in contact; the Jacobian by the "
              f"action with a tenth of the difference is another by {step[6].quantile(0.5):.1g} (median), "
              f"{step[6].quantile(0.9):.1g} (90%)", flush=True)  # fmt: skip
        truth = target_gradient(agent, step[0], step[1], partial(through_world, step, step[0]))
        parts = {"critic": critic_rows(agent, step, truth)}
        if agent.model is not None:
            parts = {"model": model_rows(agent, step), "target": target_rows(agent, step, truth)} | parts
        long = [path for path in paths if len(path) == args.horizon > 0 and path[0][4] is not None]
        if states == "fresh" and long:
            stepwise = [stacked(steps) for steps in zip(*long, strict=True)]
            parts["horizon"] = horizon_rows(agent, stepwise, args.horizon)
        for part, rows in parts.items():
            for row in rows:
                yield about | dict(part=part, where_from=states) | {
                    name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}  # fmt: skip


# --- figure and table ---------------------------------------------------------------------------------------
def pick(rows, column, **wanted):
    """The numbers of a column in the rows that have these values, and of other keys none."""
    keys = ("run", "part", "where_from", "by", "what", "kind", "where")
    return [float(row[column]) for row in rows
            if all(row.get(key, "") == wanted.get(key, "") for key in keys if key in wanted or key == "where")]


def figure(rows, args, path):
    runs = list(dict.fromkeys(row["run"] for row in rows))
    drawing, panels = plt.subplots(1, 4, figsize=(16, 4), layout="tight")
    kinds = [kind for kind in ("all", "positions", "velocities", "x velocity")
             if any(row.get("kind") == kind for row in rows)]  # fmt: skip
    for i, (run, colour) in enumerate(zip(runs, COLOURS * len(runs), strict=False)):
        at, width = (i - (len(runs) - 1) / 2) * 0.8 / len(runs), 0.8 / len(runs)
        fresh = dict(run=run, where_from="fresh")
        model = [pick(rows, "error", **fresh, part="model", by="action", what="ensemble", kind=kind)
                 for kind in kinds]  # fmt: skip
        cosines = [pick(rows, "cosine", **fresh, part="target", what=what) for what in ("ensemble", "sample")]
        cosines.append(pick(rows, "cosine", **fresh, part="critic"))
        for panel, values in ((panels[0], model), (panels[1], cosines)):
            bars = [value[0] if value else np.nan for value in values]
            panel.bar(np.arange(len(bars)) + at, bars, width, color=colour, label=run)
        for what, style in (("imagined", "-"), ("critic", ":")):
            values = pick(rows, "cosine", **fresh, part="horizon", by="action", what=what)
            panels[2].plot(range(len(values)), values, style, color=colour)
        values = pick(rows, "true_length", **fresh, part="horizon", by="action", what="critic")
        panels[3].plot(range(len(values)), values, color=colour)
    panels[0].set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
    panels[1].set_xticks(range(3), ["target,\nthrough the\nmodel", "a sample\nof it", "critic"])
    panels[0].set_title("Model, by the action: relative error", fontsize=10)
    panels[1].set_title("Cosine with the true action-gradient\nof the TD target", fontsize=10)
    panels[2].set_title("H rewards, by the first action: cosine;\n- model, ... critic at once", fontsize=10)
    panels[3].set_title("Length of the true gradient of H rewards\nby the first action", fontsize=10)
    panels[3].set_yscale("log")
    for panel in panels[2:]:
        panel.set_xlabel("H")
    for panel in panels:
        panel.grid(alpha=0.25)
    panels[1].legend(fontsize=8, loc="lower left")
    write_whole(path, partial(drawing.savefig, format=path.suffix[1:], dpi=120))
    plt.close(drawing)


def main(args):
    for name, least in dict(states=1, episodes=1, horizon=0, starts=1).items():
        if getattr(args, name) < least:
            raise BadInput(f"--{name} {getattr(args, name)}: give at least {least}.")
    if not args.runs:
        raise BadInput("no run is named: give the folders of some, runs/<env-id>/<script>/seed-<seed>.")
    path = figure_path(args.output)
    torch.set_num_threads(1)
    agents = [Agent(folder) for folder in args.runs]
    rows = []
    with tqdm(total=2 * args.states * len(agents), unit="state", disable=None) as bar:
        for agent in agents:
            rows += measure(agent, args, bar)
    write_table(path.with_suffix(".csv"), rows)
    figure(rows, args, path)
    print("| run | part | what | error | 90% | cosine | length | true length |\n" + "|---" * 8 + "|")
    for row in rows:
        if (row["part"], row.get("by", "action"), row.get("kind", "all")) in [
                (part, "action", "all") for part in ("model", "target", "critic")] and not row.get("where"):  # fmt: skip
            names = (row["run"], f"{row['part']}, {row['where_from']}", row.get("what", ""))
            numbers = (row[c] for c in ("error", "error_90", "cosine", "length", "true_length"))
            print(f"| {' | '.join([*names, *numbers])} |")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, prog="python -m common.experiments.true_derivatives"))
    except (BadInput, Fault) as error:
        print(f"error: {str(error).removesuffix('.')}.", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
