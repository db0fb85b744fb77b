"""Figure 3 and lemma 4.1 of MAAC: gradients and bounds against differences, simulations and plain sums."""

import csv
import dataclasses
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import maac_sac
from common import BadInput
from common.dynamics import double_integrator_cost
from common.envs import make_env
from common.experiments import maac_horizon as he
from tests.conftest import ROOT

GAMMA = 0.9
GAIN = torch.tensor(he.GAIN, dtype=torch.float64)
COST = double_integrator_cost(GAIN, GAMMA)
EXACT_Q = partial(he.exact_critic, COST, GAMMA)
TRUE_STEP = partial(he.step_without_noise, he.DYNAMICS)


def some_starts(n=16, seed=0):
    return 2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def reward(s, a):  # -(position^2 + velocity^2 + action^2) / 2, (n, 2), (n,) -> (n,)
    return -0.5 * (s[:, 0] ** 2 + s[:, 1] ** 2 + a**2)


def push(s, a):  # one step of 0.05 s
    return torch.stack([s[:, 0] + 0.05 * s[:, 1], s[:, 1] + 0.05 * a], 1)


def simulated(starts, gain, steps, gamma=GAMMA):
    """Rewards of `steps` steps of a = gain . s and the states after them; nothing of the module is used."""
    s, total = starts, 0.0
    for t in range(steps):
        a = s[:, 0] * gain[0] + s[:, 1] * gain[1]
        total = total + gamma**t * reward(s, a)
        s = push(s, a)
    return total, s


def differences(value, at, eps=1e-5):
    """Central differences (2,) of a function of two numbers."""
    steps = eps * torch.eye(2, dtype=torch.float64)
    return torch.stack([(value(at + step) - value(at - step)) / (2 * eps) for step in steps])


def smooth(scale, outputs, seed):
    """A random smooth function (n, 2), (n, 1) -> (n, outputs)."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, outputs)).double()
    return lambda obs, action: scale * net(torch.cat([obs, action], -1))


def wrong_model(change):
    return partial(he.step_without_noise, lambda obs, action: he.DYNAMICS(obs, action) + change(obs, action))


def wrong_critic(change):
    return lambda obs, action: EXACT_Q(obs, action) + change(obs, action).T


def both_paths(step, critic, starts, horizon, gamma=GAMMA):
    """The true path and the learned one."""
    exact_q = partial(he.exact_critic, double_integrator_cost(GAIN, gamma), gamma)
    rest = (GAIN, starts, gamma, horizon)
    return he.follow(TRUE_STEP, exact_q, *rest), he.follow(step, critic, *rest)


# --- what is exact ------------------------------------------------------------------------------------------
def test_the_environment_never_clips_the_policy():
    corners = torch.tensor([[x, v] for x in (-1, 1) for v in (-1, 1)], dtype=torch.float64)
    s, most = corners, 0.0
    for _ in range(1000):  # |a| is convex in the start: the corners are the worst
        a = s @ GAIN
        most, s = max(most, a.abs().max().item()), push(s, a)
    assert most <= 1 and s.abs().max() < 1e-3

    env = make_env(he.ENV_ID, seed=0)
    obs, _ = env.reset()
    for _ in range(100):
        action, _ = he.LinearPolicy().sample(torch.as_tensor(obs[None]))
        paid, expected, _ = TRUE_STEP(torch.as_tensor(obs[None]), action)
        obs, r, *_ = env.step(action[0].detach().numpy())
        np.testing.assert_allclose(obs, expected[0].detach(), atol=1e-6)
        assert r == pytest.approx(paid.item(), abs=1e-6)


def test_the_exact_critic_satisfies_the_bellman_equation_and_is_the_simulated_return():
    s, a = some_starts(), some_starts(seed=1)[:, :1]
    q = EXACT_Q(s, a)
    assert q.shape == (1, 16)
    r, next_s, _ = TRUE_STEP(s, a)
    torch.testing.assert_close(q, r + GAMMA * EXACT_Q(next_s, (next_s @ GAIN)[:, None]))
    later, _ = simulated(push(s, a[:, 0]), GAIN, 400)
    torch.testing.assert_close(q[0], reward(s, a[:, 0]) + GAMMA * later)


def test_the_policy_gradient_is_that_of_a_long_simulated_return():
    starts = some_starts()
    expected = differences(lambda gain: simulated(starts, gain, 400)[0].mean(), GAIN)
    ours = he.policy_gradient(GAIN.clone().requires_grad_(), starts, GAMMA)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


# --- the objective ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("horizon", [0, 1, 2, 7])
def test_the_gradient_is_that_of_differences_with_the_critic_held_fixed(horizon):
    starts, policy = some_starts(), he.LinearPolicy().double()

    def objective(gain):
        total, s = simulated(starts, gain, horizon)
        a = s @ gain
        next_s = push(s, a)
        q = reward(s, a) - GAMMA / 2 * torch.einsum("ni,ij,nj->n", next_s, COST, next_s)
        return (total + GAMMA**horizon * q).mean()

    ours = he.gradient(policy, EXACT_Q, TRUE_STEP, 1, starts, GAMMA, horizon)
    torch.testing.assert_close(ours, differences(objective, GAIN), rtol=1e-6, atol=1e-8)


def test_the_gradient_with_a_long_horizon_is_the_policy_gradient():
    starts, policy = some_starts(), he.LinearPolicy().double()
    exact = he.policy_gradient(policy.gain, starts, GAMMA)
    ours = (he.gradient(policy, EXACT_Q, TRUE_STEP, 1, starts, GAMMA, h) for h in (0, 20, 200))
    far = [(gradient - exact).norm() for gradient in ours]
    assert far[0] > 0.5 * exact.norm() and far[2] < 1e-6 < far[1] < 0.5 * far[0]


# --- lemma 4.1 ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("horizon", [0, 1, 6])
def test_the_path_has_the_derivatives_of_autograd(horizon):
    torch.manual_seed(0)
    norm = maac_sac.Normaliser(2)
    norm.mean.normal_(), norm.std.uniform_(0.5, 2)
    model, critic = maac_sac.Dynamics(norm, 1, 8, 1, 4).double(), maac_sac.Critic(norm, 1, 8, 2).double()
    step = partial(he.step_without_noise, lambda s, a: model.sample(s, a, torch.zeros_like(s)))
    starts = some_starts()
    gains = GAIN.expand(16, 2).clone().requires_grad_()  # one for each start
    s, total = starts, 0.0
    for t in range(horizon):
        a = (s * gains).sum(-1, keepdim=True)
        r, next_s, _ = step(s, a)
        total, s = total + GAMMA**t * r, next_s
    x = torch.cat([s, (s * gains).sum(-1, keepdim=True)], -1)  # (n, 3)
    r, next_s, _ = step(x[:, :2], x[:, 2:])
    q = critic(x[:, :2], x[:, 2:]).min(0).values

    def by(inputs, *outputs):
        return [torch.autograd.grad(y.sum(), inputs, retain_graph=True)[0] for y in outputs]

    path = he.follow(step, critic, GAIN, starts, GAMMA, horizon)
    still = [torch.zeros_like(s)] * 2  # the start does not depend on the gain
    dx = torch.stack(by(gains, *x.T) if horizon else [*still, *by(gains, x[:, 2])], 1)
    df, dj = torch.stack(by(x, *next_s.T), 1), by(gains, total + GAMMA**horizon * q)
    expected = s, dx, df, *by(x, r, q), *dj
    assert [len(part) for part in path] == [horizon + 1] * 6
    for ours, autograd in zip(path, expected, strict=True):
        torch.testing.assert_close(ours[horizon], autograd.detach(), rtol=1e-9, atol=1e-12)
    # and their mean over starts is the gradient of the script's loss
    policy = he.LinearPolicy().double()
    script = he.gradient(policy, critic, step, 1, starts, GAMMA, horizon)
    torch.testing.assert_close(path[-1][horizon].mean(0), script, rtol=1e-6, atol=1e-8)


def by_hand(path, learned, gamma):
    """Errors and bounds, lists of (n,) by horizon, as sums that start anew at every horizon; and what the
    repaired one rests on: bounds on |dx| and |dx^ - dx| of every time."""

    def length(y):  # Euclidean, and the largest singular value of a matrix
        y = np.asarray(y)
        return np.linalg.norm(y, axis=-1) if y.ndim == 3 else np.linalg.svd(y, compute_uv=False)[..., 0]

    s, dx, df, dr, dq, dj = zip(path, learned, strict=True)
    eps_s, eps_f, eps_r, eps_q = (length(y[1] - y[0]) for y in (s, df, dr, dq))
    S, L_f, L_r, L_q = (max(length(part).max() for part in y) for y in (s, df, dr, dq))
    F = max(length(part[..., 2]).max() for part in df)
    C = max(length(part[..., :2] + part[..., 2:] * GAIN).max() for part in df)
    M, pi = math.sqrt(1 + 0.5), math.sqrt(0.5)
    T = len(s[0])
    K = max([1.0] + [length(part)[t].max() ** (1 / t) for part in dx for t in range(1, T)])
    L = L_f * (1 + pi)
    printed, repaired, sizes, changes = [], [], [], []
    for H in range(T):
        worst = eps_f[:H].max(0) if H else 0.0
        c1 = L_r * sum(gamma**t * (L ** (t + 1) - 1) / (L - 1) * K**t for t in range(H))
        c1 += L_q * (L**H - 1) / (L - 1) * (gamma * K) ** H
        printed.append(worst * c1 + eps_q[H] * (gamma * K) ** H)
        # solutions of the recursions: a sum over what entered at u < H, carried on by the closed loop
        sizes.append(S + M * sum(C ** (H - 1 - u) * F * S for u in range(H)))
        entered = (C ** (H - 1 - u) * (eps_f[u] * sizes[u] + F * eps_s[u]) for u in range(H))
        changes.append(eps_s[H] + M * sum(entered))
        rewards = sum(gamma**t * (eps_r[t] * sizes[t] + L_r * changes[t]) for t in range(H))
        repaired.append(rewards + gamma**H * (eps_q[H] * sizes[H] + L_q * changes[H]))
    held = [*(length(part) - np.array(sizes)[:, None] for part in dx), length(dx[1] - dx[0]) - changes]
    return dict(error=length(dj[1] - dj[0]), printed=np.stack(printed), repaired=np.stack(repaired)), held


@pytest.mark.parametrize("gamma", [0.9, 0.99])
@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.3])
def test_the_repaired_bound_holds_whatever_model_and_critic(gamma, scale):
    for seed in range(4):
        step, critic = wrong_model(smooth(scale, 2, seed)), wrong_critic(smooth(10 * scale, 1, seed + 100))
        paths = both_paths(step, critic, some_starts(seed=seed), 12, gamma)
        sides = he.lemma(*paths, GAIN, gamma)
        assert sides["error"].min() > 0 and (sides["repaired"] >= sides["error"]).all()
        expected, held = by_hand(*paths, gamma)
        assert max(difference.max() for difference in held) < 1e-12
        for name, values in expected.items():
            np.testing.assert_allclose(sides[name], values, rtol=1e-9, err_msg=name)


def test_nothing_is_wrong_with_true_dynamics_and_the_exact_critic():
    sides = he.lemma(*both_paths(TRUE_STEP, EXACT_Q, some_starts(), 5), GAIN, GAMMA)
    assert {name: values.abs().max().item() for name, values in sides.items()} == dict.fromkeys(sides, 0.0)


def test_the_printed_bound_misses_that_states_differ():
    """A model off by a constant, and a critic that is shifted just as the state is in which it is asked."""
    offset, starts = torch.tensor([0.02, -0.05], dtype=torch.float64), some_starts()

    def shifted(to_obs, to_action, obs, action):
        return EXACT_Q(obs - to_obs, action - to_action)

    step = wrong_model(lambda obs, action: offset)
    for horizon in (1, 2, 10):
        paths = both_paths(step, EXACT_Q, starts, horizon)
        shift = paths[1][0][horizon] - paths[0][0][horizon]  # (n, 2)
        torch.testing.assert_close(shift, shift[:1].expand(16, 2))  # the same for all starts: one function Q^
        to_obs, to_action = shift[0], shift[0] @ GAIN
        paths = both_paths(step, partial(shifted, to_obs, to_action), starts, horizon)
        error, printed, repaired = (side[horizon] for side in he.lemma(*paths, GAIN, GAMMA).values())
        assert printed.max() < 1e-9 and error.min() > 1e-4 and (repaired >= error).all()


def test_the_printed_bound_misses_starts_beyond_the_unit_circle():
    starts = torch.tensor([[0.5, 0.5], [0.9, 0.9]], dtype=torch.float64)
    paths = both_paths(TRUE_STEP, wrong_critic(lambda obs, action: 0.1 * action), starts, 1)
    error, printed, repaired = (side[0] for side in he.lemma(*paths, GAIN, GAMMA).values())
    torch.testing.assert_close(error, 0.1 * starts.norm(dim=-1))
    torch.testing.assert_close(printed, torch.full_like(printed, 0.1))
    assert (error > printed).tolist() == [False, True] and (repaired >= error).all()


# --- what is learned ----------------------------------------------------------------------------------------
def mean_step(model):
    return partial(he.step_without_noise, lambda s, a: model.sample(s, a, torch.zeros_like(s)))


def test_model_and_critic_learn(monkeypatch):
    """Predictions and derivatives where the policy goes, against networks as they are made."""
    quick = dict(lr=3e-3, tau=0.05, critic_hidden=64, num_critics=1)
    monkeypatch.setattr(he, "SIZES", dataclasses.replace(he.SIZES, **quick))
    starts, args = some_starts(64), he.Args(steps=200, critic_updates=800)

    def errors(model, critic):
        path, learned = both_paths(mean_step(model), critic, starts, 1)
        action = (starts @ GAIN)[:, None]
        found = [(learned[0][1] - path[0][1]).norm(), (learned[2] - path[2]).norm()]
        found += [(critic(starts, action) - EXACT_Q(starts, action)).norm(), (learned[4] - path[4]).norm()]
        return torch.stack(found).detach()

    trained = errors(*he.learn(args, 0))
    monkeypatch.setattr(maac_sac, "fit_model", lambda *args: None)
    untrained = errors(*he.learn(dataclasses.replace(args, critic_updates=0), 0))
    assert (trained < torch.tensor([0.1, 0.1, 0.1, 0.2]) * untrained).all(), trained / untrained


def test_the_data_are_noisy_episodes_of_the_policy_and_follow_the_seed(monkeypatch):
    buffers = []
    monkeypatch.setattr(maac_sac, "fit_model", lambda *args: buffers.append(args[2]))

    def data(seed):
        he.learn(he.Args(steps=104, critic_updates=0), seed)
        buffer = buffers.pop()
        return buffer.rows.double().split(buffer.widths, -1)

    obs, action, paid, next_obs, terminated = data(0)
    torch.testing.assert_close(next_obs, push(obs, action[:, 0]))
    torch.testing.assert_close(paid[:, 0], reward(obs, action[:, 0]))
    starts = (obs[1:] != next_obs[:-1]).any(1).nonzero()[:, 0] + 1
    assert starts.tolist() == [26, 52, 78] and not terminated.any()
    noise, inside = (action[:, 0] - obs @ GAIN), action[:, 0].abs() < 1
    assert action.abs().max() == 1 and 0.4 < noise[inside].std() < 0.6  # clipped like the environment's
    again, other = data(0), data(1)
    assert torch.equal(again[0], obs) and not torch.equal(again[0], other[0])
    assert not (other[0][::26] == obs[::26]).any()  # the starts are the environment's alone
    assert ((other[1][:, 0] - other[0] @ GAIN) - noise).abs().min() > 0


# --- the program --------------------------------------------------------------------------------------------
SMALL = dict(seeds=2, steps=30, critic_updates=5, horizon=3)


def test_the_program_writes_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(he, "STARTS", 8)
    args = he.Args(**SMALL, output=str(tmp_path / "one.png"))
    he.main(args)
    he.main(dataclasses.replace(args, output=str(tmp_path / "two.png")))
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()  # a seed is a run
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 4

    with (tmp_path / "one.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["seed"], row["horizon"]) for row in rows] == [(s, h) for s in (0, 1) for h in range(4)]
    printed = capsys.readouterr().out.splitlines()[2:]
    assert len(printed) == 2 * (2 + 4) + 2
    mean = np.mean([row["pg_learned_dynamics"] for row in rows if row["horizon"] == 2])
    assert f"| 2 | {mean:.3g} |" in printed[4]

    env = make_env(he.ENV_ID, seed=10_000)
    starts = torch.stack([torch.as_tensor(env.reset()[0]) for _ in range(8)]).double()
    policy, (model, critic) = he.LinearPolicy().double(), he.learn(args, 1)
    exact = he.policy_gradient(policy.gain, starts, GAMMA)
    paths = both_paths(mean_step(model), critic, starts, 3)
    sides = he.lemma(*paths, GAIN, GAMMA)
    imagined = partial(maac_sac.imagine, model, he.REWARD, he.TERMINATED)
    for row in rows[4:]:
        h = int(row["horizon"])
        versions = {
            "truncation": (EXACT_Q, TRUE_STEP, 1),
            "true_dynamics": (critic, TRUE_STEP, 1),
            "learned_dynamics": (critic, imagined, he.SAMPLES),
            "exact_q": (EXACT_Q, imagined, he.SAMPLES),
        }
        found = {name: he.gradient(policy, *v, starts, GAMMA, h) for name, v in versions.items()}
        expected = {f"pg_{name}": (g - exact).abs().sum() for name, g in found.items()}
        truth = found.pop("truncation")
        expected |= {f"same_{name}": (g - truth).abs().sum() for name, g in found.items()}
        expected |= {f"lemma_{name}": side[h].mean() for name, side in sides.items()}
        expected |= dict(lemma_violated=(sides["error"][h] > sides["printed"][h]).sum() / 8)
        assert set(row) == {"seed", "horizon", *expected}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value.item(), rel=1e-9, abs=1e-12), (name, h)


REFUSED = dict(seeds=[0], steps=[9], critic_updates=[-1], horizon=[0], gamma=[1.0, 0.0, math.nan],
               output=["figure.jpg", "nowhere/figure.png", "taken.png"])  # fmt: skip


@pytest.mark.parametrize("changes", [{k: v} for k, values in REFUSED.items() for v in values], ids=str)
def test_what_cannot_be_is_refused_before_anything_is_made(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken.png").mkdir()
    with pytest.raises(BadInput) as refused:
        he.main(he.Args(**SMALL | changes))
    name = next(iter(changes)).replace("_", "-")
    assert re.fullmatch(rf"--{name} \S+: [^.]*\S.*\.", str(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_the_command_refuses_in_one_sentence(tmp_path):
    program = [sys.executable, "-m", "common.experiments.maac_horizon"]
    command = [*program, "--horizon", "0", "-o", f"{tmp_path}/figure.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
    assert done.stderr == "error: --horizon 0: give at least 1.\n"
