"""Every equation against something written down differently, in float64: a transcription, Jacobians, sums."""

import copy

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import dyna_td3
import mage_td3
import td3
from common.dynamics import dynamics_fn
from common.envs import make_env
from common.rewards import reward_fn, termination_fn
from tests.transcription import mage_terms

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
        self.obs_norm = mage_td3.Normaliser(ds).double()
        self.actor, self.actor_target = (self.net(mage_td3.Actor(self.obs_norm, da, 16)) for _ in range(2))
        self.critic, self.critic_target = (
            self.net(mage_td3.Critic(self.obs_norm, da, 16, critics)) for _ in range(2)
        )
        self.model = self.net(mage_td3.Dynamics(self.obs_norm, da, 16, 2, K))
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
        return mage_td3.td_target(self.actor_target, self.critic_target, *step, self.target_noise, GAMMA)

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


@pytest.fixture(params=["Pendulum-v1", "Hopper-v4"])
def setting(request):
    return Setting(request.param)


# --- MAGE ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v4"])
def test_mage_loss_is_the_naive_transcription(env_id, critics):
    s = Setting(env_id, critics)
    ours, theirs = mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action), s.naive_terms()
    assert_same(ours, theirs)
    for term, expected in zip(ours, theirs, strict=True):
        assert_same(gradients(term, s.critic), gradients(expected, s.critic))
        assert max(g.abs().max() for g in gradients(term, s.critic) if g is not None) > 1e-3


def test_some_of_the_imagined_states_are_terminal_and_some_are_not():
    s = Setting("Hopper-v4")
    terminated = s.terminated_at(s.model.sample(s.obs, s.action, s.model_noise))
    assert terminated.any() and not terminated.all()


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


def test_the_td_term_of_mage_is_the_loss_of_dyna(setting):
    s = setting
    td_term = mage_td3.mage_loss(s.critic, s.step_target, s.obs, s.action)[1]
    with torch.no_grad():
        y = s.step_target(s.action)
    dyna = dyna_td3.td_loss(s.critic, s.obs, s.action, y)
    assert_same([td_term], [dyna])
    assert_same(gradients(td_term, s.critic), gradients(dyna, s.critic))


def test_a_critic_with_the_right_action_gradient_has_no_gradient_term():
    """Degenerate case: a linear system in which Q(s, a) = y(a) + constant leaves the TD term alone."""

    class Shifted(torch.nn.Module):
        members = 2

        def forward(self, obs, action):
            return (3 * action.sum(-1) + 0.7).expand(2, len(obs))

    obs, action = torch.zeros(5, 3), torch.randn(5, 2)
    gradient_term, td_term = mage_td3.mage_loss(Shifted(), lambda a: 3 * a.sum(-1), obs, action)
    assert gradient_term == 0 and abs(td_term - 0.5 * 0.7**2) < 1e-6


# --- TD target ----------------------------------------------------------------------------------------------
def test_td_target_takes_the_smaller_critic_and_stops_at_termination(setting):
    s = setting
    reward, terminated = torch.randn(B).double(), torch.arange(B) % 3 == 0
    y = td3.td_target(s.actor_target, s.critic_target, reward, s.obs, terminated, s.target_noise, GAMMA)
    next_action = torch.clamp(s.actor_target(s.obs) + s.target_noise, -1, 1)
    q1, q2 = s.critic_target(s.obs, next_action)
    assert (q1 < q2).any() and (q2 < q1).any()
    assert_same([y[terminated]], [reward[terminated]])
    assert_same([y[~terminated]], [(reward + GAMMA * torch.minimum(q1, q2))[~terminated]])


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


def test_each_share_of_the_rows_goes_through_its_own_member(setting):
    s = setting
    sample = s.model.sample(s.obs, s.action, s.model_noise)
    mean, logvar = s.model(s.obs.expand(K, -1, -1), s.action.expand(K, -1, -1))
    for row, k in enumerate(s.member):
        change = mean[k, row] + torch.exp(logvar[k, row] / 2) * s.model_noise[row]
        expected = s.obs[row] + change * s.model.delta_norm.std + s.model.delta_norm.mean
        assert_same([sample[row]], [expected])
    assert len({tuple(m[0].tolist()) for m in mean}) == K  # the members do differ


def test_a_dimension_that_never_varied_stays_where_it_was(setting):
    s = setting
    s.model.delta_norm.std[0], s.model.delta_norm.mean[0] = 0.0, 0.0
    sample = s.model.sample(s.obs, s.action.requires_grad_(), s.model_noise)
    assert (sample[:, 0] == s.obs[:, 0]).all() and (sample[:, 1] != s.obs[:, 1]).all()
    assert (torch.autograd.grad(sample[:, 0].sum(), s.action)[0] == 0).all()


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


def test_learned_reward_sees_all_three_of_its_inputs(setting):
    s = setting
    reward = Setting.net(dyna_td3.RewardModel(s.obs_norm, s.model.action_norm, 16, 2))
    reward.reward_norm.mean.fill_(3.0), reward.reward_norm.std.fill_(5.0)
    inputs = [x.clone().requires_grad_() for x in (s.obs, s.action, s.obs + 0.1)]
    out = reward(*inputs)
    assert out.shape == (B,)
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert (gradient.abs().sum(1) > 0).all()


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


def test_critics_take_one_action_or_one_for_each_of_them(setting):
    s = setting
    other = torch.stack([s.action, -s.action])
    expected = torch.stack([s.critic(s.obs, s.action)[0], s.critic(s.obs, -s.action)[1]])
    assert_same([s.critic(s.obs, other)], [expected])


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
        mage_td3.polyak(s.critic_target, s.critic, 0.1)
        s.obs_norm.update(s.obs[0])
        with pytest.raises(AssertionError):
            s.obs.sum().item()


# --- buffer and optimisation --------------------------------------------------------------------------------
def fill(buffer, steps):
    for i in range(steps):
        buffer.add(np.full(2, i), np.full(1, -i), i / 2, np.full(2, i + 1), i % 5 == 0)


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


def test_buffer_comes_back_from_its_state(tmp_path):
    old, new = td3.ReplayBuffer(8, 2, 1, "cpu"), td3.ReplayBuffer(8, 2, 1, "cpu")
    for steps in (5, 6):  # not yet full, wrapped
        fill(old, steps)
        torch.save(old.state_dict(), tmp_path / "state.pt")
        new.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(new.rows, old.rows) and new.added == old.added and new.size == old.size


def test_descend_clips_by_value_and_leaves_other_networks_alone():
    mine, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = copy.deepcopy(mine)
    loss = (100 * mine(torch.ones(1, 2)) + other(torch.ones(1, 2))).sum()
    norm = td3.descend(torch.optim.SGD(mine.parameters(), 1.0), loss)
    assert norm == pytest.approx(np.sqrt(3) * 100)
    assert all(torch.allclose(p, q - 5) for p, q in zip(mine.parameters(), before.parameters(), strict=True))
    assert all(p.grad is None for p in other.parameters())


def test_polyak_moves_the_target_by_tau():
    target, source = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = [0.9 * t + 0.1 * s for t, s in zip(target.parameters(), source.parameters(), strict=True)]
    td3.polyak(target, source, 0.1)
    assert_same(target.parameters(), expected, rtol=1e-6, atol=1e-7)


def test_radam_decays_weights_apart_from_the_gradient():
    layer = torch.nn.Linear(1, 1)
    optimizer = td3.radam(layer, lr=0.1, weight_decay=0.5)
    weight = layer.weight.item()
    td3.descend(optimizer, 0.0 * layer.weight.sum() + 0.0 * layer.bias.sum())
    assert layer.weight.item() == pytest.approx(weight * (1 - 0.1 * 0.5))
