"""Every equation against something written down differently, in float64: a transcription, Jacobians, sums.

`python -m pytest -q tests/test_losses.py --script mine.py` puts your copy of a script in the script's place.
"""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torch.func import grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import dyna_td3
import maac_sac
import mage_td3
import td3
from common.dynamics import double_integrator_cost, dynamics_fn
from common.envs import make_env
from common.rewards import reward_fn, termination_fn
from tests import inner_functions
from tests.conftest import DYNA, TD3, script, tiny
from tests.transcription import mage_terms

about = pytest.mark.about  # the lowest script with what a test looks at, and its names: see conftest.py
GAMMA, B, K = 0.97, 24, 4


class Setting:
    """Random networks, a batch of real states and noise for one environment, all in float64."""

    def __init__(self, env_id, critics=2, seed=0):
        torch.manual_seed(seed)
        env = make_env(env_id, seed=seed)
        ds, da = env.observation_space.shape[0], env.action_space.shape[0]
        rows, _ = [env.reset()[0]], env.action_space.seed(seed)
        for _ in range(8 * B):
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            rows.append(env.reset()[0] if terminated or truncated else obs)
        self.obs = torch.tensor(np.array(rows[-8 * B :: 8][:B]), dtype=torch.float64)
        self.obs_norm = td3.Normaliser(ds).double()
        self.actor, self.actor_target = (self.net(td3.Actor(self.obs_norm, da, 16)) for _ in range(2))
        self.critic, self.critic_target = (
            self.net(td3.Critic(self.obs_norm, da, 16, critics)) for _ in range(2)
        )
        self.model = self.net(dyna_td3.Dynamics(self.obs_norm, da, 16, 2, K))
        for norm in (self.obs_norm, self.model.action_norm, self.model.delta_norm):
            norm.mean.normal_(std=0.1)
            norm.scale.copy_(norm.std.uniform_(0.3, 1.0))
        self.action = self.actor(self.obs).detach()
        self.model_noise, self.target_noise = torch.randn_like(self.obs), 0.2 * torch.randn_like(self.action)
        self.member = torch.arange(K).repeat_interleave(B // K)
        self.reward_of, self.terminated_at = reward_fn(env_id), termination_fn(env_id)

    @staticmethod
    def net(module):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.4)  # biases too
        return module.double()

    def step_target(self, action):
        next_obs = self.model.sample(self.obs, action, self.model_noise)
        reward, terminated = self.reward_of(self.obs, action, next_obs), self.terminated_at(next_obs)
        step = (reward, next_obs, terminated)
        return td3.td_target(self.actor_target, self.critic_target, *step, self.target_noise, GAMMA)

    def naive_terms(self):
        nets = (self.critic, self.actor_target, self.critic_target, self.model)
        noise = (self.member, self.model_noise, self.target_noise)
        known = (self.reward_of, self.terminated_at)
        return mage_terms(*nets, *known, self.obs, self.action, *noise, GAMMA)


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)


def assert_same(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        torch.testing.assert_close(a.expand_as(b), b, **({"rtol": 1e-9, "atol": 1e-11} | tolerance))


def huber_of_td_errors(s, y):
    q1, q2 = s.critic(s.obs, s.action)
    sizes = torch.cat([y - q1, y - q2]).abs()
    assert (sizes < 1).any() and (sizes > 1).any()
    return torch.where(sizes < 1, 0.5 * sizes**2, sizes - 0.5).mean()


@pytest.fixture(params=["Pendulum-v1", "Hopper-v4"])
def setting(request):
    return Setting(request.param)


# --- MAGE ---------------------------------------------------------------------------------------------------
@about("mage_td3", "mage_loss", "with_action_gradient", "huber", "td_target")
@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v4"])
def test_mage_loss_is_the_naive_transcription(env_id, critics):
    s = Setting(env_id, critics)
    ours, theirs = mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action)[:2], s.naive_terms()
    assert_same(ours, theirs)
    for term, expected in zip(ours, theirs, strict=True):
        assert_same(gradients(term, s.critic), gradients(expected, s.critic))
        assert max(g.abs().max() for g in gradients(term, s.critic) if g is not None) > 1e-3


@about("dyna_td3", "Dynamics", "td_target")
def test_some_of_the_imagined_states_are_terminal_and_some_are_not():
    s = Setting("Hopper-v4")
    terminated = s.terminated_at(s.model.sample(s.obs, s.action, s.model_noise))
    assert terminated.any() and not terminated.all()


@about("mage_td3", "mage_loss", "with_action_gradient", "huber", "td_target")
def test_action_gradient_is_equation_13_from_explicit_jacobians(setting):
    """d delta/da = dr/da + ds'/da (dr/ds' + gamma (1 - done) (dQ/ds' + dpi/ds' dQ/da')) - dQ/da."""
    s = setting

    def one_row(obs, action, model_noise, target_noise, member):
        def step(a):
            repeated = [x.expand(K, 1, -1) for x in (obs, a)]
            mean, logvar = (out[:, 0] for out in s.model(*repeated))
            pick = (torch.arange(K) == member)[:, None]
            mean, logvar = torch.where(pick, mean, 0).sum(0), torch.where(pick, logvar, 0).sum(0)
            return obs + s.model.delta_norm.inverse(mean + torch.exp(logvar / 2) * model_noise)

        def pi(x):
            return torch.clamp(s.actor_target(x[None])[0] + target_noise, -1, 1)

        next_obs = step(action)
        next_action = pi(next_obs)
        smaller = s.critic_target(next_obs[None], next_action[None])[:, 0].argmin()

        def q_bar(x, a):
            both = s.critic_target(x[None], a[None])[:, 0]
            return torch.where(torch.arange(2) == smaller, both, 0).sum()

        dr_da, dr_dn = grad(s.reward_of, (1, 2))(obs, action, next_obs)
        dn_da = jacrev(step)(action)  # (ds, da)
        dq_dn, dq_da = grad(q_bar, (0, 1))(next_obs, next_action)
        dpi_dn = jacrev(pi)(next_obs)  # (da, ds)
        not_done = 1 - s.terminated_at(next_obs).double()
        target_part = dr_da + dn_da.T @ (dr_dn + GAMMA * not_done * (dq_dn + dpi_dn.T @ dq_da))
        q_part = jacrev(lambda a: s.critic(obs[None], a[None])[:, 0])(action)  # (N, da)
        return target_part - q_part

    rows = (s.obs, s.action, s.model_noise, s.target_noise, s.member)
    expected = vmap(one_row, out_dims=1)(*rows)  # (N, B, da)
    _, grad_y = mage_td3.with_action_gradient(s.step_target, s.action)
    actions = s.action.expand(2, -1, -1)
    _, grad_q = mage_td3.with_action_gradient(lambda a: s.critic(s.obs, a), actions)
    assert_same([grad_y - grad_q], [expected])
    norm = expected.norm(dim=-1)
    huber = torch.where(norm < 1, 0.5 * norm**2, norm - 0.5).mean()
    assert_same(mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action)[:1], [huber])


@about("mage_td3", "mage_loss")
def test_the_td_term_of_mage_is_the_loss_of_dyna(setting):
    s = setting
    td_term = mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action)[1]
    expected = huber_of_td_errors(s, s.step_target(s.action).detach())
    assert_same([td_term], [expected])
    assert_same(gradients(td_term, s.critic), gradients(expected, s.critic))


@about("td3", "td_loss", "huber")
def test_the_loss_of_td3_and_dyna_is_the_huber_loss_of_every_critics_td_error(setting):
    s = setting
    y = s.step_target(s.action).detach()
    loss, expected = td3.td_loss(s.critic, s.obs, s.action, y), huber_of_td_errors(s, y)
    assert_same([loss], [expected])
    assert_same(gradients(loss, s.critic), gradients(expected, s.critic))


def thresholds(s, y):
    """[(threshold, Huber loss of each critic's TD error)]: one between their sizes, and one above all."""
    sizes = (y - s.critic(s.obs, s.action)).abs()
    assert (sizes < 2).any() and (sizes > 2).any() and (sizes < 1000).all()
    squares = 0.5 * sizes**2
    return [(2, torch.where(sizes < 2, squares, 2 * sizes - 2).mean()), (1000, squares.mean())]


@about("td3", "td_loss", "huber")
def test_td_errors_count_linearly_from_the_threshold_on(setting):
    s = setting
    y = s.step_target(s.action).detach()
    for threshold, expected in thresholds(s, y):
        loss = td3.td_loss(s.critic, s.obs, s.action, y, threshold)
        assert_same([loss], [expected])
        assert_same(gradients(loss, s.critic), gradients(expected, s.critic))


@about("mage_td3", "mage_loss", "huber")
def test_the_td_errors_of_mage_count_linearly_from_the_threshold_on(setting):
    """The gradient term keeps its own threshold, 1."""
    s = setting
    gradient_loss = mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action)[0]
    for threshold, expected in thresholds(s, s.step_target(s.action).detach()):
        gradient_term, td_term = mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action, threshold)
        assert_same([gradient_term, td_term], [gradient_loss, expected])
        assert_same(gradients(td_term, s.critic), gradients(expected, s.critic))


@about("mage_td3", "mage_loss")
def test_a_critic_with_the_right_action_gradient_has_no_gradient_term():
    """Degenerate case: a linear system in which Q(s, a) = y(a) + constant leaves the TD term alone."""

    class Shifted(torch.nn.Module):
        members = 2

        def forward(self, obs, action):
            return (3 * action.sum(-1) + 0.7).expand(2, len(obs))

    obs, action = torch.zeros(5, 3), torch.randn(5, 2)
    gradient_term, td_term = mage_td3.mage_loss(Shifted(), lambda a: 3 * a.sum(-1), obs, action)[:2]
    assert gradient_term == 0 and abs(td_term - 0.5 * 0.7**2) < 1e-6


# --- TD target ----------------------------------------------------------------------------------------------
@about("td3", "td_target", "Critic")
def test_td_target_takes_the_smaller_critic_and_stops_at_termination(setting):
    s = setting
    reward, terminated = torch.randn(B).double(), torch.arange(B) % 3 == 0
    y = td3.td_target(s.actor_target, s.critic_target, reward, s.obs, terminated, s.target_noise, GAMMA)
    next_action = torch.clamp(s.actor_target(s.obs) + s.target_noise, -1, 1)
    q1, q2 = s.critic_target(s.obs, next_action)
    assert (q1 < q2).any() and (q2 < q1).any()
    assert_same([y[terminated]], [reward[terminated]])
    assert_same([y[~terminated]], [(reward + GAMMA * torch.minimum(q1, q2))[~terminated]])


@about("td3", "actor_loss", "descend")
def test_actor_loss_is_minus_the_smaller_q_and_ascends_it(setting):
    s = setting
    q1, q2 = s.critic(s.obs, s.actor(s.obs))
    loss = td3.actor_loss(s.actor, s.critic, s.obs)
    assert_same([loss], [-torch.minimum(q1, q2).mean()])
    optimizer = torch.optim.SGD(s.actor.parameters(), 1e-4)
    td3.descend(optimizer, loss)
    assert td3.actor_loss(s.actor, s.critic, s.obs) < loss
    assert all(p.grad is None for p in s.critic.parameters())


# --- model --------------------------------------------------------------------------------------------------
@about("dyna_td3", "model_loss")
def test_model_loss_is_the_gaussian_log_likelihood(setting):
    s = setting
    obs, action = s.obs.expand(K, -1, -1), s.action.expand(K, -1, -1)
    next_obs = obs + 0.3 * torch.randn_like(obs)
    loss, error = dyna_td3.model_loss(s.model, obs, action, next_obs)
    mean, logvar = s.model(obs, action)
    target = (next_obs - obs - s.model.delta_norm.mean) / s.model.delta_norm.std
    log_prob = torch.distributions.Normal(mean, torch.exp(logvar / 2)).log_prob(target)
    assert_same([loss, error], [(-2 * log_prob - np.log(2 * np.pi)).mean(), ((mean - target) ** 2).mean()])
    assert (torch.exp(logvar / 2) > np.exp(-2.5)).all() and (torch.exp(logvar / 2) < np.exp(-0.5)).all()


@about("dyna_td3", "Dynamics")
def test_each_share_of_the_rows_goes_through_its_own_member(setting):
    s = setting
    sample = s.model.sample(s.obs, s.action, s.model_noise)
    mean, logvar = s.model(s.obs.expand(K, -1, -1), s.action.expand(K, -1, -1))
    for row, k in enumerate(s.member):
        change = mean[k, row] + torch.exp(logvar[k, row] / 2) * s.model_noise[row]
        expected = s.obs[row] + change * s.model.delta_norm.std + s.model.delta_norm.mean
        assert_same([sample[row]], [expected])
    assert len({tuple(m[0].tolist()) for m in mean}) == K  # the members do differ


@about("dyna_td3", "Dynamics")
def test_a_dimension_that_never_varied_stays_where_it_was(setting):
    s = setting
    s.model.delta_norm.std[0], s.model.delta_norm.mean[0] = 0.0, 0.0
    sample = s.model.sample(s.obs, s.action.requires_grad_(), s.model_noise)
    assert (sample[:, 0] == s.obs[:, 0]).all() and (sample[:, 1] != s.obs[:, 1]).all()
    assert (torch.autograd.grad(sample[:, 0].sum(), s.action)[0] == 0).all()


@about("dyna_td3", "Dynamics", "model_loss", "Normaliser")
def test_the_first_contact_does_not_set_resting_things_in_motion():
    """An object rests, but for rounding, until it is hit once. What the model makes of its rest must not grow
    a thousandfold with the new scale, as it does where rounding errors are scaled up to learn from them."""
    torch.manual_seed(0)
    model = dyna_td3.Dynamics(td3.Normaliser(2), 1, 32, 2, K)
    obs, action = torch.randn(500, 2), torch.rand(500, 1) * 2 - 1
    next_obs = obs + torch.cat([0.1 * action, 3e-6 * torch.randn(500, 1)], 1)
    for rows in zip(obs, action, next_obs - obs, strict=True):
        model.obs_norm.update(rows[0])
        model.action_norm.update(rows[1])
        model.delta_norm.update(rows[2], model.obs_norm)
    optimizer = td3.radam(model, 3e-3)
    for _ in range(400):
        i = torch.randint(500, (K, 64))
        td3.descend(optimizer, dyna_td3.model_loss(model, obs[i], action[i], next_obs[i])[0])
    model.delta_norm.update(torch.tensor([0.0, 0.01]), model.obs_norm)
    change = (model.sample(obs, action, torch.randn(500, 2)) - obs)[:, 1]
    assert change.std() < 0.2 * model.delta_norm.std[1] < 1e-4


@about("dyna_td3", "Dynamics", "model_loss", "Normaliser")
@pytest.mark.parametrize("unit", [1.0, 1e-3, 9e-5, 1e-7])
@pytest.mark.parametrize("origin", [0.0, 10.0])
def test_a_state_may_have_small_steps_in_its_unit(unit, origin):
    """s' = s + unit (a, a^2): small for the state, which is somewhere in [-1, 1] units of 1 or of `unit`."""
    torch.manual_seed(0)
    model = dyna_td3.Dynamics(td3.Normaliser(2), 1, 32, 2, K)
    spread = max(unit, 1e-3 * (unit > 1e-6))  # of the states
    obs, action = spread * (origin + torch.randn(500, 2).double()), torch.rand(500, 1).double() * 2 - 1
    change = unit * torch.cat([action, action**2], 1)
    next_obs = (obs + change).float()
    obs, action = obs.float(), action.float()
    for o, a, n in zip(obs, action, next_obs, strict=True):
        model.obs_norm.update(o)
        model.action_norm.update(a)
        model.delta_norm.update(n - o, model.obs_norm)
    optimizer = td3.radam(model, 3e-3)
    for _ in range(600):
        i = torch.randint(500, (K, 64))
        td3.descend(optimizer, dyna_td3.model_loss(model, obs[i], action[i], next_obs[i])[0])
    predicted = model.delta_norm.inverse(model(obs.expand(K, -1, -1), action.expand(K, -1, -1))[0]).mean(0)
    error = ((predicted - change) ** 2).mean(0) / change.var(0)
    assert (error < 0.05).all()  # 1 - R^2


@about("dyna_td3", "RewardModel")
def test_learned_reward_sees_all_three_of_its_inputs(setting):
    s = setting
    reward = Setting.net(dyna_td3.RewardModel(s.obs_norm, s.model.action_norm, 16, 2))
    reward.reward_norm.mean.fill_(3.0), reward.reward_norm.std.fill_(5.0)
    inputs = [x.clone().requires_grad_() for x in (s.obs, s.action, s.obs + 0.1)]
    out = reward(*inputs)
    assert out.shape == (B,)
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert (gradient.abs().sum(1) > 0).all()


@about("dyna_td3", "Dynamics")
def test_a_model_that_is_the_truth_rolls_out_like_the_simulator():
    """The oracle in the place of an ensemble of one: normalising and back, shares, change of the state."""
    truth, env = dynamics_fn("Pendulum-v1"), make_env("Pendulum-v1", seed=3)

    class Truth(dyna_td3.Dynamics):
        def forward(self, obs, action):
            return self.delta_norm(truth(obs, action) - obs), torch.full_like(obs, -200.0)

    model = Truth(td3.Normaliser(3), 1, 4, 1, 1)
    obs, _ = env.reset()
    for _ in range(200):
        model.delta_norm.update(np.random.default_rng(0).normal([0.1, 0, -3], [1, 2, 0.5]))
        model.delta_norm.update(obs)
    imagined = torch.tensor(obs[None]).double()
    model.double()
    for t in range(200):
        action = np.array([np.sin(t / 7)], np.float32)
        imagined = model.sample(imagined, torch.tensor(action[None]).double(), torch.randn(1, 3).double())
        obs, *_ = env.step(action)
        np.testing.assert_allclose(imagined[0], obs, atol=2e-4)


# --- networks -----------------------------------------------------------------------------------------------
@about("td3", "mlp", "EnsembleLinear")
def test_a_stack_of_networks_is_as_many_networks():
    torch.manual_seed(0)
    stack, x = td3.mlp(3, 5, 7, 2, 2), torch.randn(3, 4, 5)
    for k in range(3):
        h = x[k]
        for layer in stack:
            linear = isinstance(layer, td3.EnsembleLinear)
            h = h @ layer.weight[k] + layer.bias[k] if linear else h * torch.sigmoid(h)
        torch.testing.assert_close(stack(x)[k], h)
    first = stack[0].weight
    assert not torch.equal(first[0], first[1])
    assert 0.9 * np.sqrt(6 / (5 + 7)) < first.abs().max() <= np.sqrt(6 / (5 + 7))  # Xavier, of one member


@about("td3", "Critic")
def test_critics_take_one_action_or_one_for_each_of_them(setting):
    s = setting
    assert s.critic(s.obs, s.action).shape == (2, B)
    other = torch.stack([s.action, -s.action])
    expected = torch.stack([s.critic(s.obs, s.action)[0], s.critic(s.obs, -s.action)[1]])
    assert_same([s.critic(s.obs, other)], [expected])


@about("td3", "Critic", "mlp")
def test_layer_norm_bounds_what_a_critic_says_far_from_the_data():
    """Ten times as far off a swish network says ten times as much, and with layer_norm the same."""
    torch.manual_seed(0)
    norm, obs, action = td3.Normaliser(3), torch.randn(8, 3).double(), torch.zeros(8, 1).double()
    plain, bounded = (td3.Critic(norm, 1, 16, 2, layer_norm).double() for layer_norm in (False, True))
    near, far = (bounded(scale * obs, action) for scale in (1e6, 1e7))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bounded(obs, action), bounded(obs, action + 1), rtol=0.01)
    near, far = (plain(scale * obs, action) for scale in (1e6, 1e7))
    torch.testing.assert_close(far, 10 * near, rtol=1e-3, atol=1.0)
    hidden = plain.net[0](torch.cat([obs, action], -1).expand(2, -1, -1))
    layers = [layer for layer in bounded.net if isinstance(layer, torch.nn.LayerNorm)]
    assert len(layers) == 2 and not list(layers[0].parameters())  # the members share them
    torch.testing.assert_close(layers[0](hidden).mean(-1), torch.zeros(2, 8).double(), atol=1e-6, rtol=0)


@about("td3", "Normaliser")
def test_normaliser_has_the_mean_and_standard_deviation_of_what_it_saw():
    data = np.random.default_rng(0).normal([5, -1e4, 2, 3], [2, 1e-3, 0, 2e-6], (1000, 4))
    norm = td3.Normaliser(4)
    for row in data:
        norm.update(torch.tensor(row))
    np.testing.assert_allclose(norm.mean, data.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.std, data.std(0), rtol=1e-4, atol=1e-12)
    x = torch.tensor(data[:5], dtype=torch.float32)
    np.testing.assert_allclose(norm(x)[:, 0], (x[:, 0] - norm.mean[0]) / norm.std[0])
    assert (norm(x)[:, 1:].abs() < 4e-3).all()  # varied no more than by rounding: shifted, not blown up
    assert (norm.inverse(torch.randn(5, 4))[:, 2] == norm.mean[2]).all()


@about("mage_td3", "mage_loss", "ReplayBuffer", "polyak", "Normaliser")
def test_sampling_and_losses_never_wait_for_the_device(setting):
    """Reading a number from a tensor is the operation _local_scalar_dense: a GPU's queue would run empty."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    s, buffer = setting, td3.ReplayBuffer(8, 2, 1, "cpu")
    fill(buffer, 5)
    with NoReading():
        buffer.sample(100)
        sum(mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action)).backward()
        td3.polyak(s.critic_target, s.critic, 0.1)
        s.obs_norm.update(s.obs[0])
        with pytest.raises(AssertionError):
            s.obs.sum().item()


# --- buffer and optimisation --------------------------------------------------------------------------------
def fill(buffer, steps):
    for i in range(steps):
        buffer.add(np.full(2, i), np.full(1, -i), i / 2, np.full(2, i + 1), i % 5 == 0)


@about("td3", "ReplayBuffer")
def test_buffer_keeps_the_last_transitions_whole():
    buffer = td3.ReplayBuffer(8, 2, 1, "cpu")
    fill(buffer, 3)
    assert set(buffer.sample(200)[0][:, 0].tolist()) == {0, 1, 2}
    fill(buffer, 20)
    torch.manual_seed(0)
    obs, action, reward, next_obs, terminated = buffer.sample(4000, 2)
    assert obs.shape == (4000, 2, 2) and reward.shape == terminated.shape == (4000, 2)
    i = obs[..., 0]
    assert set(i.unique().tolist()) == set(range(12, 20))
    assert (action[..., 0] == -i).all() and (reward == i / 2).all() and (next_obs[..., 1] == i + 1).all()
    assert (terminated == (i % 5 == 0)).all()
    counts = torch.bincount(i.flatten().long())[12:]
    assert (counts - 1000).abs().max() < 5 * np.sqrt(1000)  # uniform


@about("td3", "ReplayBuffer")
def test_buffer_comes_back_from_its_state(tmp_path):
    old, new = td3.ReplayBuffer(8, 2, 1, "cpu"), td3.ReplayBuffer(8, 2, 1, "cpu")
    for steps in (5, 6):  # not yet full, wrapped
        fill(old, steps)
        torch.save(old.state_dict(), tmp_path / "state.pt")
        new.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(new.rows, old.rows) and new.added == old.added and new.size == old.size


@about("td3", "descend")
def test_descend_clips_by_value_and_leaves_other_networks_alone():
    mine, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = copy.deepcopy(mine)
    loss = (100 * mine(torch.ones(1, 2)) + other(torch.ones(1, 2))).sum()
    groups = [{"params": [parameter]} for parameter in mine.parameters()]  # as for weights without decay
    norm = td3.descend(torch.optim.SGD(groups, 1.0), loss)
    assert norm == pytest.approx(np.sqrt(3) * 100)
    assert all(torch.allclose(p, q - 5) for p, q in zip(mine.parameters(), before.parameters(), strict=True))
    assert all(p.grad is None for p in other.parameters())


@about("td3", "polyak")
def test_polyak_moves_the_target_by_tau():
    target, source = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = [0.9 * t + 0.1 * s for t, s in zip(target.parameters(), source.parameters(), strict=True)]
    td3.polyak(target, source, 0.1)
    assert_same(target.parameters(), expected, rtol=1e-6, atol=1e-7)


@about("td3", "radam")
def test_radam_decays_weights_apart_from_the_gradient():
    layer = torch.nn.Linear(1, 1)
    optimizer = td3.radam(layer, lr=0.1, weight_decay=0.5)
    weight = layer.weight.item()
    td3.descend(optimizer, 0.0 * layer.weight.sum() + 0.0 * layer.bias.sum())
    assert layer.weight.item() == pytest.approx(weight * (1 - 0.1 * 0.5))


# --- an update of the TD3 family ----------------------------------------------------------------------------
def parts_of(name):
    """The `update` of a script as its `train` makes it, and what it closes over: float64, full buffers."""
    argv = tiny(name, target_noise=2, noise_clip=0.3, lr=0.01, tau=0.1)
    found, inside = inner_functions.inner_functions(name, argv, torch.device("cpu"))
    inner_functions.fill(inside)
    for part in inside.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    inside["buffer"].rows = inside["buffer"].rows.double()
    return found["update"], inside


def spy(monkeypatch, module, name):
    """[(arguments, result)] of the calls of a function that are still to come."""
    calls, function = [], getattr(module, name)

    def called(*args):
        out = function(*args)
        calls.append((args, out))
        return out

    monkeypatch.setattr(module, name, called)
    return calls


@pytest.mark.parametrize("name", TD3)
def test_targets_are_of_the_target_networks_and_hold_no_parameter_that_is_trained(name, monkeypatch):
    calls = spy(monkeypatch, script(name), "td_target")
    update, inside = parts_of(name)
    update(False)
    ((actor, critic, *_, noise, gamma), y) = calls[0]
    assert actor is inside["actor_target"] and critic is inside["critic_target"] and gamma == 0.99
    assert noise.abs().max() == pytest.approx(0.3)  # it is drawn with a deviation of 2, and clipped
    trained = [*inside["actor"].parameters(), *inside["critic"].parameters()]
    if y.requires_grad:  # by the action, in MAGE
        assert set(torch.autograd.grad(y.sum(), trained, allow_unused=True)) == {None}


@pytest.mark.parametrize("name", TD3)
def test_target_networks_follow_the_trained_ones_by_tau(name):
    update, inside = parts_of(name)
    for with_actor in (False, True):
        before = {part: copy.deepcopy(inside[part]) for part in ("actor_target", "critic_target")}
        actor = [p.clone() for p in inside["actor"].parameters()]
        update(with_actor)
        for part, old in before.items():
            moves = with_actor or part == "critic_target"
            trained = inside[part.removesuffix("_target")]
            weights = zip(old.parameters(), inside[part].parameters(), trained.parameters(), strict=True)
            for was, now, source in weights:
                assert_same([now], [0.9 * was + 0.1 * source if moves else was])
        for was, now in zip(actor, inside["actor"].parameters(), strict=True):
            assert torch.equal(was, now) != with_actor


@pytest.mark.parametrize("name", TD3)
def test_an_actor_follows_the_critic_that_is_trained(name, monkeypatch):
    calls = spy(monkeypatch, script(name), "actor_loss")
    update, inside = parts_of(name)
    update(True)
    (((actor, critic, obs), _),) = calls
    assert actor is inside["actor"] and critic is inside["critic"] and obs.shape == (8, 3)


@pytest.mark.parametrize("name", DYNA)
def test_an_imagined_step_is_of_the_actors_own_action(name, monkeypatch):
    loss = spy(monkeypatch, script(name), "mage_loss" if name == "mage_td3" else "td_loss")
    update, inside = parts_of(name)
    expected = copy.deepcopy(inside["actor"])
    update(True)
    (args, _) = loss[0]
    obs, action = args[2:4] if name == "mage_td3" else args[1:3]
    assert_same([action], [expected(obs)])
    assert not action.requires_grad


@about("mage_td3", "mage_loss")
def test_the_target_of_mage_is_differentiated_through_all_that_an_action_changes(monkeypatch):
    """Its gradient with respect to the action is that of finite differences: nothing is detached."""
    loss = spy(monkeypatch, script("mage_td3"), "mage_loss")
    update, _ = parts_of("mage_td3")
    update(False)
    ((_, step_target, _, action, _), _) = loss[0]
    a = action.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(step_target(a).sum(), a)
    expected = (step_target(action + 1e-6) - step_target(action - 1e-6)) / 2e-6  # of one action
    torch.testing.assert_close(gradient[:, 0], expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().min() > 1e-6


# --- MAAC: what is known of the double integrator -----------------------------------------------------------
DISCOUNT = 0.9
DYNAMICS, REWARD = dynamics_fn("DoubleIntegrator-v1"), reward_fn("DoubleIntegrator-v1")


class LinearActor(torch.nn.Module):
    """a = gain . s + std * noise, without the tanh: what the linear-quadratic solution is for."""

    def __init__(self, std=1e-8):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([-0.6, -0.8], dtype=torch.float64))
        self.std = std

    def forward(self, obs):
        return obs @ self.gain[:, None]

    def gaussian(self, obs):
        return self(obs), torch.full_like(obs[:, :1], self.std)

    def sample(self, obs):
        mean, std = self.gaussian(obs)
        action = mean + std * torch.randn_like(mean)
        return action, Normal(mean, std).log_prob(action).sum(-1)


class ExactCritic(torch.nn.Module):
    """Q of a linear policy in the double integrator, twice."""

    def __init__(self, gain):
        super().__init__()
        self.cost = double_integrator_cost(gain.detach(), DISCOUNT)

    def forward(self, obs, action):
        next_obs = DYNAMICS(obs, action)
        value = -0.5 * (next_obs @ self.cost * next_obs).sum(-1)
        return (REWARD(obs, action, next_obs) + DISCOUNT * value).expand(2, -1)


def true_step(obs, action, limit=math.inf):
    next_obs = DYNAMICS(obs, action)
    return REWARD(obs, action, next_obs), next_obs, next_obs[:, 0] > limit


def networks(ds=3, da=2, members=K):
    norm = maac_sac.Normaliser(ds)
    norm.mean.normal_(), norm.std.uniform_(0.5, 2)
    actor, model = maac_sac.Actor(norm, da, 8), maac_sac.Dynamics(norm, da, 8, 1, members)
    return actor.double(), *(maac_sac.Critic(norm, da, 8, 2).double() for _ in range(2)), model.double()


def differences(loss, parameters, eps=1e-6):
    """Central differences of a function of no arguments by every entry of the parameters."""
    found = []
    for p in parameters:
        slope = torch.zeros_like(p)
        for i in range(p.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * eps
                    values.append(loss())
                    p.view(-1)[i] -= sign * eps
            slope.view(-1)[i] = (values[0] - values[1]) / (2 * eps)
        found.append(slope)
    return found


# --- MAAC: actor --------------------------------------------------------------------------------------------
@about("maac_sac", "actor_loss")
@pytest.mark.parametrize("limit", [math.inf, 0.4])
@pytest.mark.parametrize("horizon", [0, 1, 4])
def test_the_gradient_of_the_objective_is_that_of_finite_differences(horizon, limit):
    torch.manual_seed(1)
    actor, critic, *_ = networks(ds=2, da=1)
    obs = torch.randn(16, 2, dtype=torch.float64)
    ended = []

    def step(obs, action):
        out = true_step(obs, action, limit)
        ended.append(out[2])
        return out

    def loss():
        torch.manual_seed(0)  # the same noise every time
        return maac_sac.actor_loss(actor, critic, step, 0.2, obs, DISCOUNT, horizon, 3)[0]

    ours = torch.autograd.grad(loss(), list(actor.parameters()))
    for gradient, expected in zip(ours, differences(loss, actor.parameters()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    if horizon:
        some = torch.stack(ended[:horizon])
        assert some.any() == (limit < 1) and not some.all()


@about("maac_sac", "actor_loss")
def test_with_the_true_model_and_critic_the_objective_is_the_return_at_every_horizon():
    actor, obs = LinearActor(), torch.randn(64, 2, dtype=torch.float64)
    critic = ExactCritic(actor.gain)
    exact = 0.5 * (obs @ critic.cost * obs).sum(-1).mean()
    for horizon in (0, 1, 4, 20):
        loss, _ = maac_sac.actor_loss(actor, critic, true_step, 0.0, obs, DISCOUNT, horizon, 2)
        torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)


@about("maac_sac", "actor_loss")
def test_with_a_long_horizon_the_gradient_is_the_exact_policy_gradient():
    actor, obs = LinearActor(), torch.randn(64, 2, dtype=torch.float64)
    loss, _ = maac_sac.actor_loss(actor, ExactCritic(actor.gain), true_step, 0.0, obs, DISCOUNT, 200, 1)
    cost = double_integrator_cost(actor.gain, DISCOUNT)
    exact = 0.5 * (obs @ cost * obs).sum(-1).mean()
    ours, expected = (torch.autograd.grad(x, actor.gain)[0] for x in (loss, exact))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


@about("maac_sac", "actor_loss")
def test_nothing_is_paid_after_termination():
    actor, obs = LinearActor(), torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)
    critic = ExactCritic(actor.gain)
    loss, _ = maac_sac.actor_loss(actor, critic, partial(true_step, limit=0.0), 0.0, obs, DISCOUNT, 3, 1)
    first = REWARD(obs, actor(obs), None)[0]  # the first row ends at once, the second one never
    rest = -0.5 * (obs[1] @ critic.cost @ obs[1])
    torch.testing.assert_close(loss, -(first + rest) / 2, rtol=1e-6, atol=0)


@about("maac_sac", "actor_loss")
def test_the_entropy_is_that_of_the_first_actions_of_all_trajectories():
    """The n-th action of a trajectory has the log-probability n; nothing is paid."""
    asked = []

    class Counting(torch.nn.Module):
        def sample(self, obs):
            asked.append(obs[:, 0].tolist())
            return obs, torch.full((len(obs),), float(len(asked)))

    def step(obs, action):
        return torch.zeros(len(obs)), obs + 10, torch.zeros(len(obs), dtype=torch.bool)

    def critic(obs, action):
        return torch.zeros(2, len(obs))

    obs = torch.tensor([[1.0], [2.0]])
    loss, log_prob = maac_sac.actor_loss(Counting(), critic, step, 0.5, obs, DISCOUNT, 2, 3)
    assert loss == 0.5 and log_prob.tolist() == [1.0] * 6
    assert [sorted(states) for states in asked] == [[1 + x] * 3 + [2 + x] * 3 for x in (0, 10, 20)]


@about("maac_sac", "Actor")
@pytest.mark.parametrize("log_std", [-1.0, -12.0, -16.0, -20.0])
def test_log_probability_of_a_narrow_policy_is_exact_in_single_precision(log_std):
    """u - mean would cancel: a float32 next to a mean of 2 is farther away than such a standard deviation."""
    actor = maac_sac.Actor(maac_sac.Normaliser(3), 2, 4)
    last = actor.net[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([2.0, 2.0, log_std, log_std]).view(1, 1, 4))
    torch.manual_seed(0)
    noise = torch.randn(100, 2, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda mean: noise.to(mean.dtype))
        _, log_prob = actor.sample(torch.zeros(100, 3))
    u = 2 + math.exp(log_std) * noise
    expected = Normal(0.0, 1.0).log_prob(noise) - log_std - (1 - u.tanh() ** 2).log()
    torch.testing.assert_close(log_prob.double(), expected.sum(1), rtol=1e-5, atol=1e-4)


@about("maac_sac", "Actor")
def test_log_probability_is_that_of_the_squashed_gaussian():
    actor, *_ = networks()
    obs = 3 * torch.randn(200, 3, dtype=torch.float64)
    action, log_prob = actor.sample(obs)
    squashed = TransformedDistribution(Normal(*actor.gaussian(obs)), TanhTransform())
    inside = action.abs().amax(1) < 0.999  # there the library's atanh is exact
    assert inside.sum() > 100
    expected = squashed.log_prob(action).sum(1)
    torch.testing.assert_close(log_prob[inside], expected[inside], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actor(obs), actor.gaussian(obs)[0].tanh())
    far = maac_sac.Actor(maac_sac.Normaliser(3), 1, 4)
    with torch.no_grad():
        far.net[-1].bias[..., 0] = 40.0  # tanh is 1 in floating point, the log-probability still finite
    assert torch.isfinite(far.sample(torch.zeros(5, 3))[1]).all()


# --- MAAC: SAC is a setting ---------------------------------------------------------------------------------
@about("maac_sac", "actor_loss", "critic_loss", "steve_targets")
def test_horizon_zero_without_steve_is_sac():
    """A plain SAC, written down: the same losses, the same gradients, the same temperature loss."""
    actor, critic, critic_target, _ = networks()
    n, alpha, forbidden = 32, 0.3, None
    obs, next_obs = torch.randn(2, n, 3, dtype=torch.float64)
    action, reward = torch.randn(n, 2, dtype=torch.float64).tanh(), torch.randn(n, dtype=torch.float64)
    done = torch.rand(n) < 0.3

    torch.manual_seed(0)
    outcome = (reward, next_obs, done)
    y, weights = maac_sac.steve_targets(actor, critic_target, forbidden, alpha, *outcome, DISCOUNT, 0, 1)
    q_loss = maac_sac.critic_loss(critic, obs, action, y)
    pi_loss, log_prob = maac_sac.actor_loss(actor, critic, forbidden, alpha, obs, DISCOUNT, 0, 1)
    assert weights.tolist() == [1.0]

    torch.manual_seed(0)
    with torch.no_grad():
        next_action, next_log_prob = actor.sample(next_obs)
        q1, q2 = critic_target(next_obs, next_action)
        target = reward + DISCOUNT * (1 - done.double()) * (torch.minimum(q1, q2) - alpha * next_log_prob)
    q1, q2 = critic(obs, action)
    sac_q_loss = 0.5 * (((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean())
    new_action, new_log_prob = actor.sample(obs)
    q1, q2 = critic(obs, new_action)
    sac_pi_loss = (alpha * new_log_prob - torch.minimum(q1, q2)).mean()

    for ours, plain, net in ((q_loss, sac_q_loss, critic), (pi_loss, sac_pi_loss, actor)):
        torch.testing.assert_close(ours, plain)
        parameters = list(net.parameters())
        both = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (ours, plain)]
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(log_prob, new_log_prob)


@about("maac_sac", "temperature_loss")
def test_temperature_rises_while_entropy_is_below_its_target():
    log_alpha = torch.zeros((), requires_grad=True)
    for entropy, sign in ((-3.0, -1), (-1.0, 1)):
        loss = maac_sac.temperature_loss(log_alpha, torch.full((5,), -entropy), -2.0)
        assert torch.autograd.grad(loss, log_alpha)[0].sign() == sign


@about("maac_sac", "temperature_loss")
def test_the_temperature_loss_is_linear_in_alpha():
    """By log alpha its slope is alpha times (entropy - target): -2.5 is below -2, by half."""
    log_alpha = torch.tensor(math.log(0.2), requires_grad=True)
    loss = maac_sac.temperature_loss(log_alpha, torch.tensor([1.0, 4.0]), -2.0)
    (slope,) = torch.autograd.grad(loss, log_alpha)
    assert loss.item() == pytest.approx(-0.1) and slope.item() == pytest.approx(-0.1)


# --- MAAC: critic targets -----------------------------------------------------------------------------------
@about("maac_sac", "steve_targets")
def test_steve_targets_and_weights_are_those_of_a_hand_computation():
    """Two members, two critics, two rows, horizon 1: T_0 and T_1 one by one, then 1 / variance."""

    class Scripted(torch.nn.Module):
        def sample(self, obs):
            return obs[:, :1], 0.1 * obs[:, 0]  # log pi = s / 10

    def critic(obs, action):
        return torch.stack([obs[:, 0], obs[:, 0] + 0.5])

    def step(obs, action):  # member 0 adds 1, member 1 adds 3; reward s; row 1 ends in the first member
        add = torch.tensor([1.0, 1.0, 3.0, 3.0])
        return obs[:, 0], obs + add[:, None], torch.tensor([False, True, False, False])

    outcome = torch.tensor([1.0, 2.0]), torch.tensor([[10.0], [20.0]]), torch.tensor([False, False])
    y, weights = maac_sac.steve_targets(Scripted(), critic, step, 2.0, *outcome, 0.5, 1, 2)

    t0 = np.array([[[1 + 0.5 * (10 + c - 2), 2 + 0.5 * (20 + c - 4)]] * 2 for c in (0, 0.5)])  # (N, K, B)
    t1 = np.empty((2, 2, 2))
    for j, c in enumerate((0, 0.5)):
        for k, add in enumerate((1, 3)):
            for b, (r, s) in enumerate(((1, 10), (2, 20))):
                alive = 0 if (k, b) == (0, 1) else 1
                later = s + add
                t1[j, k, b] = r + 0.5 * (s - 2 * 0.1 * s) + 0.25 * alive * (later + c - 2 * 0.1 * later)
    inverse = np.array([1 / (t.var((0, 1)).mean() + 1e-8) for t in (t0, t1)])
    expected = inverse / inverse.sum()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    smaller = np.stack([t0.min(0).mean(0), t1.min(0).mean(0)])  # (H + 1, B)
    np.testing.assert_allclose(y, expected @ smaller, rtol=1e-5)
    assert 0.001 < weights.min()


@about("maac_sac", "steve_targets")
def test_the_smaller_critic_counts_on_each_trajectory():
    """Q_1 = s and Q_2 = -s: at -2 and 2, where members go, either is smaller once; their means: 0."""

    class Still(torch.nn.Module):
        def sample(self, obs):
            return torch.zeros_like(obs), torch.zeros(len(obs))

    def critic(obs, action):
        return torch.stack([obs[:, 0], -obs[:, 0]])

    def step(obs, action):
        return torch.zeros(2), torch.tensor([[-2.0], [2.0]]), torch.tensor([False, False])

    outcome = torch.tensor([0.0]), torch.tensor([[1.0]]), torch.tensor([False])
    y, weights = maac_sac.steve_targets(Still(), critic, step, 0.0, *outcome, 1.0, 1, 2)
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.2]))  # variances 1 and 4
    torch.testing.assert_close(y, torch.tensor([0.8 * -1 + 0.2 * -2]))


@about("maac_sac", "steve_targets")
def test_terminated_transitions_are_worth_their_reward():
    actor, _, critic_target, model = networks(ds=2, da=1)
    reward, obs = torch.randn(8).double(), torch.randn(8, 2).double()
    done = torch.ones(8, dtype=torch.bool)
    y, _ = maac_sac.steve_targets(actor, critic_target, true_step, 0.1, reward, obs, done, DISCOUNT, 2, K)
    torch.testing.assert_close(y, reward)


@about("maac_sac", "steve_targets")
def test_steve_combines_horizons_when_critics_disagree_as_much_as_members():
    """Random critics differ from one another, as those of a young run do: no horizon takes all the weight."""
    torch.manual_seed(0)
    actor, _, critic_target, model = networks(ds=2, da=1)
    model.delta_norm.std.fill_(0.05)

    def step(obs, action):
        next_obs = model.sample(obs, action, torch.randn_like(obs))
        return REWARD(obs, action, next_obs), next_obs, torch.zeros(len(obs), dtype=torch.bool)

    reward, obs = torch.randn(64).double(), torch.randn(64, 2).double()
    done = torch.zeros(64, dtype=torch.bool)
    _, weights = maac_sac.steve_targets(actor, critic_target, step, 0.1, reward, obs, done, 0.99, 2, K)
    assert weights.sum() == pytest.approx(1) and weights.min() > 0.05 and weights.max() < 0.9
