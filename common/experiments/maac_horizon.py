"""Which horizon has the best gradient? Figure 3 and lemma 4.1 of MAAC (Clavera, Fu & Abbeel 2020), measured.

    python -m common.experiments.maac_horizon -o maac_horizon.png

A linear policy in the double integrator has an exact policy gradient. With the code of maac_sac.py a model
and a critic are learned for one, and the gradient of the actor's objective by its gain is compared with exact
ones at every horizon H. A CSV file beside the figure has a row for each seed and H:
pg_*     L1 distance from the exact policy gradient. pg_truncation is what true dynamics and exact Q leave:
         the gain acts through H + 1 actions, later ones are in the critic, which the objective holds fixed.
same_*   L1 distance from the gradient of the same objective with true dynamics and exact Q.
*_learned_dynamics, *_true_dynamics: with learned Q; *_exact_q: learned dynamics with exact Q.
lemma_*  error and bounds of lemma 4.1, means over the start states, for the model without its noise;
         lemma_violated is the share of the starts beyond the appendix's bound.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from common import BadInput
from common.args import one_sentence
from common.dynamics import double_integrator_cost, dynamics_fn
from common.envs import make_env
from common.experiments import needs
from common.files import figure_path, write_table, write_whole
from common.rewards import reward_fn, termination_fn

needs("maac_sac")
import maac_sac  # noqa: E402

ENV_ID = "DoubleIntegrator-v1"
DYNAMICS, REWARD, TERMINATED = dynamics_fn(ENV_ID), reward_fn(ENV_ID), termination_fn(ENV_ID)
GAIN = (-0.5, -0.5)  # a = gain . s; from no start does it leave [-1, 1], where the environment would clip it
NOISE, EPISODE = 0.5, 26  # of the data: deviation added to the actions; steps, as in the authors' code
STARTS, SAMPLES = 256, 4  # states the objective starts in; trajectories of the model from each
SIZES = maac_sac.Args(**maac_sac.LAPTOP_CLASSIC)  # of networks, batches and steps: the laptop preset's
LEARNED, TRUE = ("C3-", "learned dynamics, learned Q"), ("C0-", "true dynamics, learned Q")  # style, name
PANELS = {
    "MAAC figure 3: L1 error, policy gradient": {
        "pg_learned_dynamics": LEARNED, "pg_true_dynamics": TRUE,
        "pg_truncation": ("k--", "true dynamics, exact Q (truncation)")},
    "L1 error, the same objective made exact": {
        "same_learned_dynamics": LEARNED, "same_true_dynamics": TRUE,
        "same_exact_q": ("C1-.", "learned dynamics, exact Q")},
    "Lemma 4.1: L2 error, mean over starts": {
        "lemma_printed": ("C4--", "bound of the appendix"), "lemma_repaired": ("C2-.", "repaired bound"),
        "lemma_error": ("C3-", "error")},
}  # fmt: skip


@dataclass
class Args:
    seeds: int = 5  # Data, networks and noise are drawn with each of this many seeds, from 0 on.
    gamma: float = 0.9  # This is the discount factor, the authors' one.
    steps: int = 125  # The model learns from this many transitions, as in the authors' code.
    critic_updates: int = 10_000  # The critic is updated this many times.
    horizon: int = 60  # This is the longest horizon; H goes from 0 to it.
    # The figure goes here.
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "maac_horizon.png"


# --- what is exact ---
class LinearPolicy(torch.nn.Module):  # a = gain . s
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(GAIN))

    def sample(self, obs):  # (n, 2) -> action (n, 1), and zeros (n,) for the log-probability, as alpha is 0
        return obs @ self.gain[:, None], torch.zeros_like(obs[:, 0])


def step_without_noise(dynamics, obs, action):
    """maac_sac.imagine for dynamics that are a function: (n, 2), (n, 1) -> (n,), next_obs (n, 2), (n,)."""
    next_obs = dynamics(obs, action)
    return REWARD(obs, action, next_obs), next_obs, TERMINATED(next_obs)


def exact_critic(cost, gamma, obs, action):
    """Q(s, a) = r(s, a) - gamma/2 s'^T P s' of the policy with the cost P (2, 2): one critic, (1, n)."""
    next_obs = DYNAMICS(obs, action)
    return (REWARD(obs, action, next_obs) - gamma / 2 * (next_obs @ cost * next_obs).sum(-1))[None]


def policy_gradient(gain, starts, gamma):
    """Gradient (2,) of J = -1/2 E s_0^T P(gain) s_0 by the gain, through the linear system that P solves."""
    cost = double_integrator_cost(gain, gamma)
    return torch.autograd.grad(-(starts @ cost * starts).sum(-1).mean() / 2, gain)[0]


# --- what is learned ---
def learn(args, seed):
    """The script's model and critic for the policy, from noisy transitions of it; made float64 in the end."""
    torch.manual_seed(seed)
    env, policy = make_env(ENV_ID, seed), LinearPolicy()
    critic, critic_target, model, _ = maac_sac.networks(SIZES, 2, 1).values()
    buffer = maac_sac.ReplayBuffer(args.steps, 2, 1, "cpu")
    for step in range(args.steps):
        if step % EPISODE == 0:
            obs, _ = env.reset()
        mean = policy.sample(torch.as_tensor(obs[None]))[0][0].detach()
        action = (mean + NOISE * torch.randn(1)).clamp(-1, 1).numpy()
        next_obs, reward, terminated, _, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)
        model.obs_norm.update(obs)
        model.action_norm.update(action)
        model.delta_norm.update(next_obs - obs, model.obs_norm)
        obs = next_obs
    held_out = maac_sac.HeldOut(args.steps, model.members).mask
    maac_sac.fit_model(model, maac_sac.adam(model, SIZES.model_lr), buffer, held_out)
    optimizer = maac_sac.adam(critic, SIZES.lr)
    for _ in range(args.critic_updates):  # SAC's target without entropy: alpha 0, horizon 0, one member
        obs, action, *outcome = buffer.sample(SIZES.batch_size)
        y, _ = maac_sac.steve_targets(policy, critic_target, None, 0.0, *outcome, args.gamma, 0, 1)
        maac_sac.descend(optimizer, maac_sac.critic_loss(critic, obs, action, y))
        maac_sac.polyak(critic_target, critic, SIZES.tau)
    return model.double(), critic.double()


def gradient(policy, critic, step, samples, starts, gamma, horizon):
    """Gradient (2,) of MAAC's objective J by the gain; the script's loss is -J."""
    loss, _ = maac_sac.actor_loss(policy, critic, step, 0.0, starts, gamma, horizon, samples)
    return -torch.autograd.grad(loss, policy.gain)[0]


# --- lemma 4.1 ---
def follow(step, critic, gain, obs, gamma, horizon):
    """A trajectory of a = gain . s from obs (n, 2) and its derivatives, at T = H + 1 times; x = (s, a).

    -> s (T, n, 2); dx/dgain (T, n, 3, 2); by x those of s' (T, n, 2, 3), of r and of Q (T, n, 3); and the
    gradient by the gain of each start's objective that ends there (T, n, 2).
    """
    ds, rewards, found = torch.zeros(len(obs), 2, 2, dtype=obs.dtype), 0.0, []
    for t in range(horizon + 1):
        x = torch.cat([obs, obs @ gain[:, None]], -1).requires_grad_()  # (n, 3)
        reward, next_obs, _ = step(x[:, :2], x[:, 2:])
        outputs = (*next_obs.T, reward, critic(x[:, :2], x[:, 2:]).min(0).values)  # four of (n,)
        # No row depends on another one: the gradient of a sum over rows is that of each.
        *df, dr, dq = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in outputs)  # (n, 3) each
        df, dx = torch.stack(df, 1), torch.cat([ds, (obs + gain @ ds)[:, None]], 1)  # da = s + gain ds
        found.append((obs, dx, df, dr, dq, rewards + gamma**t * (dq[:, None] @ dx)[:, 0]))
        rewards = rewards + gamma**t * (dr[:, None] @ dx)[:, 0]  # (n, 2)
        obs, ds = next_obs.detach(), df @ dx
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def lemma(path, learned, gain, gamma):
    """Lemma 4.1 for each H and start: the error, the appendix's bound, a repaired one: {name: (T, n)}.

    ^ is of the learned path, d by the gain, ' by x, | | the Euclidean or the spectral norm. At every time
        eps_f = |f^' - f'|    eps_r = |r^' - r'|    eps_q = |Q^' - Q'|    eps_s = |s^ - s|
    and the largest on both paths, over starts and times: L_f of |f'|, L_r of |r'|, L_Q of |Q'|, S of |s|,
    F of |df/da|, C of |f' (1, gain)| (the closed loop), K >= 1 of |dx_t|^(1/t). With L = L_f (1 + |gain|) and
    n_t = 1 + L + ... + L^(t-1) appendix A.1 has, until its last line, which puts L for L_r and drops an L,
        max_{t<H} eps_f (sum_{t<H} (gamma K)^t L_r n_{t+1} + (gamma K)^H L_Q n_H) + eps_q (gamma K)^H
    It is no bound: |dx_0| = |s_0| may exceed K^0, and da = s + gain ds and r' depend on where the state is. A
    model off by a constant, with a critic shifted as its states are, has eps_f = eps_q = 0 and an error.
    Repaired, with eps_s and eps_r, M = |(1, gain)|, from ds = 0, and + for the next time:
        |dx| <= M |ds| + S                    |ds+| <= C |ds| + F S
        |dx^ - dx| <= M |ds^ - ds| + eps_s    |ds^+ - ds+| <= eps_f |dx^| + C |ds^ - ds| + F eps_s
        error <= sum_{t<H} gamma^t (eps_r |dx| + L_r |dx^ - dx|) + gamma^H (eps_q |dx| + L_Q |dx^ - dx|)
    """
    vector, matrix = partial(torch.linalg.vector_norm, dim=-1), partial(torch.linalg.matrix_norm, ord=2)
    s, dx, df, dr, dq, dj = (torch.stack(pair) for pair in zip(path, learned, strict=True))  # (2, T, n, ...)
    eps_s, eps_r, eps_q = (vector(y[1] - y[0]) for y in (s, dr, dq))  # (T, n)
    lift = torch.cat([torch.eye(2, dtype=gain.dtype), gain[None]])  # (3, 2): (1, gain)
    s_max, l_r, l_q, f_a = (vector(y).max() for y in (s, dr, dq, df[..., 2]))
    eps_f, l_f, closed, m = matrix(df[1] - df[0]), matrix(df).max(), matrix(df @ lift).max(), matrix(lift)
    max_f = torch.cat([torch.zeros_like(eps_f[:1]), eps_f.cummax(0).values[:-1]])  # (T, n): of t < H
    root = 1 / torch.arange(1, len(eps_f), dtype=gain.dtype)
    k = (matrix(dx)[:, 1:].amax((0, 2)) ** root).max().clamp(min=1)
    n_t = before = total = ds = ds_change = 0.0  # sums over t < H; bounds on |ds|, |ds^ - ds|
    printed, repaired = [], []
    for t in range(len(eps_f)):
        scale, discount = (gamma * k) ** t, gamma**t
        printed.append(max_f[t] * (before + scale * l_q * n_t) + eps_q[t] * scale)
        n_t = 1 + l_f * (1 + vector(gain)) * n_t
        before = before + scale * l_r * n_t
        size, change = m * ds + s_max, m * ds_change + eps_s[t]  # of |dx|, |dx^ - dx|
        repaired.append(total + discount * (eps_q[t] * size + l_q * change))
        total = total + discount * (eps_r[t] * size + l_r * change)
        ds, ds_change = closed * ds + f_a * s_max, eps_f[t] * size + closed * ds_change + f_a * eps_s[t]
    return dict(error=vector(dj[1] - dj[0]), printed=torch.stack(printed), repaired=torch.stack(repaired))


# --- figure and table ---
def measure(args, seed, starts):
    """The rows {column: value} of a seed, one for each horizon."""
    (model, critic), policy = learn(args, seed), LinearPolicy().double()
    gain, exact = policy.gain.detach(), policy_gradient(policy.gain, starts, args.gamma)
    exact_q = partial(exact_critic, double_integrator_cost(gain, args.gamma), args.gamma)
    true_step = partial(step_without_noise, DYNAMICS)
    mean_step = partial(step_without_noise, lambda s, a: model.sample(s, a, torch.zeros_like(s)))
    imagined = partial(maac_sac.imagine, model, REWARD, TERMINATED)
    versions = dict(truncation=(exact_q, true_step, 1), true_dynamics=(critic, true_step, 1),
        learned_dynamics=(critic, imagined, SAMPLES), exact_q=(exact_q, imagined, SAMPLES))  # fmt: skip
    path = follow(true_step, exact_q, gain, starts, args.gamma, args.horizon)
    learned = follow(mean_step, critic, gain, starts, args.gamma, args.horizon)
    sides, rows = lemma(path, learned, gain, args.gamma), []
    sides["violated"] = (sides["error"] > sides["printed"]).double()  # its mean is a share of the starts
    for h in range(args.horizon + 1):
        found = {name: gradient(policy, *v, starts, args.gamma, h) for name, v in versions.items()}
        row = {f"pg_{name}": (g - exact).abs().sum() for name, g in found.items()}
        truth = found.pop("truncation")
        row |= {f"same_{name}": (g - truth).abs().sum() for name, g in found.items()}
        row |= {f"lemma_{name}": values[h].mean() for name, values in sides.items()}
        rows.append({"seed": seed, "horizon": h} | {name: value.item() for name, value in row.items()})
    off = [(hat - true).norm() / true.norm() for true, hat in zip(path, learned, strict=True)]
    print(f"seed {seed}: the derivatives of f^ are off by {off[2]:.2%}, of Q^ by {off[4]:.1%}", flush=True)
    return rows


def main(args):
    for name, least in dict(seeds=1, steps=2 * maac_sac.HELD_OUT, critic_updates=0, horizon=1).items():
        if getattr(args, name) < least:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}.")
    if not 0 < args.gamma < 1:
        raise BadInput(f"--gamma {args.gamma}: give a number above 0 and below 1.")
    path = figure_path(args.output)
    torch.set_num_threads(1)
    env = make_env(ENV_ID, seed=10_000)  # the same starts for all seeds
    starts = torch.as_tensor(np.stack([env.reset()[0] for _ in range(STARTS)])).double()
    rows = [row for seed in range(args.seeds) for row in measure(args, seed, starts)]
    write_table(path.with_suffix(".csv"), rows)
    table = {c: np.reshape([row[c] for row in rows], (args.seeds, -1)) for c in rows[0]}  # (seeds, T)
    shown = [column for lines in PANELS.values() for column in lines] + ["lemma_violated"]
    print("| H | " + " | ".join(shown) + " |\n" + "|---" * (len(shown) + 1) + "|")
    for h in sorted({*(h for h in (0, 1, 2, 3, 5, 8, 12, 20, 30) if h < args.horizon), args.horizon}):
        print(f"| {h} | " + " | ".join(f"{table[c][:, h].mean():.3g}" for c in shown) + " |")
    figure = Figure(figsize=(11.5, 4), layout="tight")
    for panel, (title, lines) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for column, (style, label) in lines.items():
            values = table[column]  # (seeds, T): their mean, and from the smallest to the largest
            panel.plot(values.mean(0), style, label=label, lw=1.8)
            ends = values.min(0), values.max(0)
            panel.fill_between(range(len(ends[0])), *ends, color=style.strip("-."), alpha=0.15, lw=0)
        means = np.stack([table[column].mean(0) for column in lines])[:, 1:]  # at H = 0 one of them is 0
        panel.set(yscale="log", ylim=(means.min() / 2, means.max() * 2), xlabel="horizon H", ylabel="error")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    write_whole(path, partial(figure.savefig, format=path.suffix[1:], dpi=150))


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, prog="python -m common.experiments.maac_horizon", description=__doc__))
