"""How useful a critic is: its action-gradients against the true ones; Proposition 3.1."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from common.dynamics import double_integrator_cost, dynamics_fn
from common.envs import make_env
from common.evaluate import as_policy, evaluate
from common.experiments.mage_gradients import proposition
from common.rewards import reward_fn
from common.run import EVAL_SEED
from common.true_gradients import (
    action_gradients,
    critic_gradients,
    gradient_quality,
)
from mage_td3 import Actor, Critic, Normaliser
from tests.conftest import TD3, checkpoint, train
from tests.test_training import table

GAIN, GAMMA = (-0.5, -0.5), 0.9


class LinearActor(nn.Module):
    def __init__(self, gain=GAIN):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, obs):
        return (obs @ self.gain)[..., None]


class ExactCritic(nn.Module):
    """Q^pi of the linear actor in the double integrator times `scale`; the second critic is larger."""

    def __init__(self, scale=1.0, gain=GAIN):
        super().__init__()
        gain = torch.tensor(gain, dtype=torch.float64)
        self.scale, self.cost = scale, double_integrator_cost(gain, GAMMA)

    def forward(self, obs, action):
        next_obs = dynamics_fn("DoubleIntegrator-v1")(obs, action)
        reward = reward_fn("DoubleIntegrator-v1")(obs, action, next_obs)
        q = self.scale * (reward - GAMMA / 2 * (next_obs @ self.cost * next_obs).sum(-1))
        return torch.stack([q, q + 1 + action[..., 0] ** 2])


def starts(env_id, n=3):
    env = make_env(env_id, seed=0)
    return torch.as_tensor(np.stack([env.reset()[0] for _ in range(n)])).double()


def networks(hidden=8):
    torch.manual_seed(0)
    norm = Normaliser(3)
    return Actor(norm, 1, hidden).double(), Critic(norm, 1, hidden, 2).double()


def trained(run):
    """Actor and critic of a run with the sizes of conftest.TINY."""
    state = checkpoint(run)
    actor, critic = (net.float() for net in networks())
    actor.load_state_dict(state["actor"])
    critic.load_state_dict(state["critic"])
    return actor, critic


def rollout(env_id, actor, obs, gamma, steps, disturbance):
    """The discounted return (n,) when `disturbance` {step: number} is added to the actor's actions."""
    total = torch.zeros(len(obs), dtype=obs.dtype)
    with torch.no_grad():
        for t in range(steps):
            action = actor(obs) + disturbance.get(t, 0.0)
            next_obs = dynamics_fn(env_id)(obs, action)
            total += gamma**t * reward_fn(env_id)(obs, action, next_obs)
            obs = next_obs
    return total


def test_true_gradients_are_those_of_the_simulated_return():
    """Finite differences: one action is disturbed, the actor answers to what follows."""
    actor = networks()[0]
    first = starts("Pendulum-v1")
    states, actions, gradients = action_gradients("Pendulum-v1", actor, first, 0.97, steps=20, tail=30)
    assert states.shape == (20, 3, 3) and actions.shape == gradients.shape == (20, 3, 1)
    torch.testing.assert_close(states[0], first)
    torch.testing.assert_close(states[1:], dynamics_fn("Pendulum-v1")(states, actions)[:-1])
    for t in (0, 1, 7, 19):
        up, down = (rollout("Pendulum-v1", actor, first, 0.97, 50, {t: sign * 1e-5}) for sign in (1, -1))
        torch.testing.assert_close((up - down) / 2e-5 / 0.97**t, gradients[t, :, 0], rtol=1e-6, atol=1e-8)
    assert gradients.abs().min() > 1e-3  # nothing of it is 0 by chance


@pytest.mark.parametrize("gamma", [GAMMA, 0.0])
def test_true_gradients_are_exact_in_the_double_integrator(gamma):
    actor, critic = LinearActor(), ExactCritic()
    critic.cost = double_integrator_cost(actor.gain.detach(), gamma)
    states, actions, gradients = action_gradients(
        "DoubleIntegrator-v1", actor, starts("DoubleIntegrator-v1"), gamma
    )
    if gamma == 0:
        torch.testing.assert_close(gradients, -actions)  # of the reward alone, -a^2 / 2
    else:
        torch.testing.assert_close(critic_gradients(critic, states, actions), gradients)


def test_the_gradient_is_that_of_the_smaller_critic_in_every_state():
    critic = networks()[1]
    obs, action = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 1).double()
    found = critic_gradients(critic, obs, action)
    smaller = set()
    for i in np.ndindex(2, 4):
        a = action[i].clone().requires_grad_()
        q = critic(obs[i][None], a[None])[:, 0]
        smaller.add(int(q.argmin()))
        torch.testing.assert_close(found[i], torch.autograd.grad(q.min(), a)[0])
    assert smaller == {0, 1} and not action.requires_grad


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0, 0.0])
def test_gradient_quality_of_critics_that_are_wrong_by_a_factor(scale):
    first = starts("DoubleIntegrator-v1").numpy()
    found = gradient_quality(LinearActor(), ExactCritic(scale), "DoubleIntegrator-v1", GAMMA, first)
    found = {name: float(value) for name, value in found.items()}
    assert found["gradient_cosine"] == pytest.approx(math.copysign(1, scale) if scale else 0, abs=1e-4)
    assert found["gradient_error"] == pytest.approx(abs(1 - scale), abs=1e-4)
    assert found["gradient_norm"] == pytest.approx(abs(scale) * found["true_norm"], rel=1e-4, abs=1e-9)
    states, actions, truth = action_gradients(
        "DoubleIntegrator-v1", LinearActor(), starts("DoubleIntegrator-v1"), GAMMA
    )
    eq_14 = np.median([  # as it reads, for each trajectory
        sum(GAMMA**t * abs((1 - scale) * float(truth[t, j, 0])) for t in range(200)) / 200 for j in range(3)
    ])  # fmt: skip
    assert found["gradient_l1"] == pytest.approx(eq_14, rel=1e-4, abs=1e-6)
    assert found["true_norm"] == pytest.approx(float(truth.abs().mean((0, 2)).median()), rel=1e-4)


def test_gradient_quality_of_a_trajectory_is_not_that_of_all():
    """One of three trajectories is chaotic: its critic's error does not count."""
    first = starts("DoubleIntegrator-v1").numpy()
    critic = ExactCritic()
    plain = critic.forward

    def forward(obs, action):  # the 3 trajectories take turns in the rows
        wrong = torch.zeros(len(obs), dtype=obs.dtype)
        wrong[2::3] = 1e6 * action[2::3, 0]
        return plain(obs, action) + wrong

    critic.forward = forward
    found = gradient_quality(LinearActor(), critic, "DoubleIntegrator-v1", GAMMA, first)
    assert float(found["gradient_error"]) < 1e-4 and float(found["gradient_cosine"]) > 0.999


def test_gradient_quality_leaves_the_networks_alone():
    actor, critic = (net.float() for net in networks())
    before = [p.clone() for net in (actor, critic) for p in net.parameters()]
    gradient_quality(actor, critic, "Pendulum-v1", 0.99, np.ones((2, 3), np.float32))
    after = [p for net in (actor, critic) for p in net.parameters()]
    for p, q in zip(before, after, strict=True):
        assert torch.equal(p, q) and q.dtype == torch.float32 and q.grad is None


@pytest.mark.parametrize("name", TD3)
def test_gradient_quality_is_in_every_evaluation_and_changes_nothing(name, tmp_path, monkeypatch):
    run = train(name, tmp_path / "with")
    rows = table(run, "eval")
    columns = ("gradient_cosine", "gradient_error", "gradient_l1", "gradient_norm", "true_norm")
    assert len(rows) == 4 and all(math.isfinite(float(row[column])) for row in rows for column in columns)
    assert len({row["gradient_norm"] for row in rows}) == 4  # the critic has changed
    actor, critic = trained(run)
    first = evaluate(as_policy(actor), "Pendulum-v1", episodes=1, seed=EVAL_SEED).starts
    assert gradient_quality(actor, critic, "Pendulum-v1", 0.99, first) == {c: rows[-1][c] for c in columns}
    monkeypatch.setattr("common.run.gradient_quality", lambda *args: {})
    without = train(name, tmp_path / "without")
    for part in ("actor", "critic"):
        found, expected = checkpoint(run)[part], checkpoint(without)[part]
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(checkpoint(run)["rng"], checkpoint(without)["rng"])


@pytest.mark.parametrize("name, env_id", [("maac_sac", "Pendulum-v1"), ("td3", "ContinuousCartPole-v1")])
def test_gradient_quality_needs_an_oracle_and_a_critic_of_rewards(name, env_id, tmp_path):
    """The soft critic of maac_sac.py has entropy in it, for which there is no truth here."""
    run = train(name, tmp_path / "run", env_id=env_id)
    assert "true_norm" not in table(run, "eval")[0]


# --- Proposition 3.1 ---
def test_the_error_of_the_policy_gradient_is_that_of_finite_differences():
    """With no critic at all (Q^ = 0) the left side is the length of grad J itself."""
    actor = networks(4)[0]
    first = starts("Pendulum-v1")
    nothing = ExactCritic(0.0)
    nothing.forward = lambda obs, action: 0.0 * action.expand(2, *action.shape)[..., 0]
    left, right = proposition(actor, nothing, first, "Pendulum-v1", 0.8)
    difference = []
    for p in actor.parameters():
        for i in range(p.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * 1e-6
                sides.append(rollout("Pendulum-v1", actor, first, 0.8, 120, {}).mean())
                with torch.no_grad():
                    p.view(-1)[i] -= sign * 1e-6
            difference.append((sides[0] - sides[1]) / 2e-6)
    assert left == pytest.approx(float(torch.stack(difference).norm()), rel=1e-5)
    assert right >= left


def test_the_bound_is_what_it_says_and_holds():
    actor, critic = networks(4)
    first = starts("Pendulum-v1")
    left, right = proposition(actor, critic, first, "Pendulum-v1", 0.9)
    states, actions, truth = action_gradients("Pendulum-v1", actor, first, 0.9)
    delta = truth - critic_gradients(critic, states, actions)
    steepest, total, sums = 0.0, 0.0, 0.0
    for t, j in np.ndindex(200, 3):
        slopes = torch.autograd.grad(actor(states[t, j][None])[0, 0], list(actor.parameters()))
        slope = torch.cat([part.flatten() for part in slopes])
        steepest = max(steepest, float(slope.norm()))
        total += 0.9**t * abs(float(delta[t, j])) / 3
        sums = sums + 0.9**t * float(delta[t, j]) * slope / 3
    assert left == pytest.approx(float(sums.norm()), rel=1e-6)
    assert right == pytest.approx(steepest * total, rel=1e-6) and right > left > 0


def test_an_exact_critic_has_no_error_and_no_bound():
    first = starts("DoubleIntegrator-v1")
    sides = proposition(LinearActor(), ExactCritic(), first, "DoubleIntegrator-v1", GAMMA)
    assert sides == pytest.approx((0, 0), abs=1e-9)
    left, right = proposition(LinearActor(), ExactCritic(0.5), first, "DoubleIntegrator-v1", GAMMA)
    assert 0 < left < right
