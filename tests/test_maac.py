"""MAAC's model, data and planning, and what an update is given; its losses are in test_losses.py."""

import copy
import inspect
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import maac_sac
from common import BadInput
from tests.conftest import checkpoint, stored, train
from tests.test_losses import DISCOUNT, DYNAMICS, ExactCritic, LinearActor, networks, true_step

K = 4
pytestmark = pytest.mark.about("maac_sac")


# --- model --------------------------------------------------------------------------------------------------
def test_shuffled_shares_are_a_member_for_each_row_and_unshuffled_ones_stay():
    torch.manual_seed(0)
    *_, model = networks(ds=2, da=1)
    with torch.no_grad():
        model.net[-1].weight.zero_(), model.net[-1].bias.zero_()
        model.net[-1].bias[:, 0, :2] = torch.arange(K)[:, None].double()  # member k moves by k
        model.net[-1].bias[:, 0, 2:] = -1e3
    model.delta_norm.std.fill_(1.0), model.delta_norm.mean.zero_()
    obs, action = torch.arange(40.0).double()[:, None].expand(40, 2), torch.zeros(40, 1).double()
    ones = (lambda o, a, n: n[:, 0], lambda n: n[:, 0] > 1e9)
    _, fixed, _ = maac_sac.imagine(model, *ones, obs, action, shuffle=False)
    members = (fixed - obs)[:, 0].round()
    assert members.tolist() == [k for k in range(K) for _ in range(10)]
    shuffled = [maac_sac.imagine(model, *ones, obs, action)[1] for _ in range(200)]
    draws = (torch.stack(shuffled) - obs)[..., 0].round()
    assert ((draws[:, None, :] == torch.arange(K)[:, None]).sum(2) == 10).all()  # equal shares every time
    assert ((draws == 0).double().mean(0) - 0.25).abs().max() < 0.15  # and every row gets every member


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_of_imagination_keeps_what_belongs_to_a_row_together(shuffle):
    torch.manual_seed(0)
    model = SimpleNamespace(sample=lambda obs, action, noise: obs + action + 0.1 * noise)
    known = (lambda *of: torch.cat(of, 1), lambda next_obs: next_obs[:, 0] > 0)
    obs, action = torch.randn(2, 2000, 2)
    reward, next_obs, terminated = maac_sac.imagine(model, *known, obs, action, shuffle)
    assert torch.equal(reward, torch.cat([obs, action, next_obs], 1))
    assert torch.equal(terminated, next_obs[:, 0] > 0)
    noise = (next_obs - obs - action) / 0.1
    assert noise.mean().abs() < 0.07 and (noise.std() - 1).abs() < 0.05


def test_the_loss_of_a_member_is_its_gaussian_log_likelihood():
    *_, model = networks()
    model.delta_norm.mean.normal_(), model.delta_norm.scale.copy_(model.delta_norm.std.uniform_(0.3, 1))
    obs, action = torch.randn(K, 16, 3).double(), torch.randn(K, 16, 2).double()
    next_obs = obs + 0.3 * torch.randn_like(obs)
    mean, logvar = model(obs, action)
    target = (next_obs - obs - model.delta_norm.mean) / model.delta_norm.std
    log_prob = Normal(mean, (logvar / 2).exp()).log_prob(target)
    expected = (-2 * log_prob - math.log(2 * math.pi)).mean((1, 2))  # (K,)
    torch.testing.assert_close(maac_sac.model_losses(model, obs, action, next_obs), expected)


def fit(seed=0, rows=400, noise=0.0, max_epochs=200, capacity=400):
    """A model fitted to s' = s + a (+ noise), its buffer and which rows were held out."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    buffer = maac_sac.ReplayBuffer(capacity, 2, 1, "cpu")
    norm = maac_sac.Normaliser(2)
    model = maac_sac.Dynamics(norm, 1, 64, 2, K)
    for _ in range(rows):
        obs, action = rng.normal(size=2), rng.uniform(-1, 1, 1)
        next_obs = obs + action + noise * rng.normal(size=2)
        buffer.add(obs, action, 0.0, next_obs, False)
        norm.update(obs), model.action_norm.update(action), model.delta_norm.update(next_obs - obs, norm)
    held_out = maac_sac.HeldOut(capacity, K).mask
    before = copy.deepcopy(model)
    optimizer = maac_sac.adam(model, 3e-3)
    return model, before, buffer, held_out, maac_sac.fit_model(model, optimizer, buffer, held_out, max_epochs)


def held_out_losses(model, buffer, held_out):
    obs, action, _, next_obs, _ = buffer.rows[: buffer.added].split(buffer.widths, -1)
    losses = []
    for k in range(K):
        rows = held_out[: buffer.added, k]
        batch = [x[rows].expand(K, -1, -1) for x in (obs, action, next_obs)]
        losses.append(maac_sac.model_losses(model, *batch)[k].detach())
    return torch.stack(losses)


def test_the_model_learns_and_its_members_differ():
    model, before, buffer, held_out, (losses, epochs) = fit()
    assert (held_out_losses(model, buffer, held_out) < held_out_losses(before, buffer, held_out) - 2).all()
    obs, action = torch.randn(8, 2), torch.rand(8, 1)
    mean, _ = model(obs.expand(K, -1, -1), action.expand(K, -1, -1))
    error = (model.delta_norm.inverse(mean) - action).abs()
    assert error.mean() < 0.1 and not torch.equal(mean[0], mean[1])


def test_members_that_overfit_stop_early_and_get_their_best_weights_back():
    """Pure noise: what is learned of the training rows is lost on the held-out ones."""
    model, _, buffer, held_out, (losses, epochs) = fit(noise=3.0, rows=60, max_epochs=500)
    assert epochs < 500
    after = held_out_losses(model, buffer, held_out)
    overfitted = copy.deepcopy(model)
    optimizer = maac_sac.adam(overfitted, 3e-3)
    obs, action, _, next_obs, _ = buffer.rows[:60].split(buffer.widths, -1)
    for _ in range(150):
        rows = torch.stack([(~held_out[:60, k]).nonzero()[:30, 0] for k in range(K)])
        losses = maac_sac.model_losses(overfitted, obs[rows], action[rows], next_obs[rows])
        maac_sac.descend(optimizer, losses.mean())
    assert (held_out_losses(overfitted, buffer, held_out) > after + 0.1).all()


def test_each_member_is_given_back_the_weights_of_its_own_best_epoch(monkeypatch):
    """Held-out losses by script: member 0 is best after epoch 1, member 1 after epoch 5.

    The gain of 0.05 in epoch 4 renews the patience of 100 epochs, that of 0.005 does not. When member 0 gets
    its lowest loss of all, in epoch 102, it has been done for one epoch.
    """
    script = [[9.0, 9], [5, 8], [6, 7], [7, 4], [7, 3.95], [7, 3.945]] + [[8, 8]] * 150
    script[102] = [1, 8]
    losses_of = iter(script)
    *_, model = networks(ds=2, da=1, members=2)
    model.float()
    real, seen = maac_sac.model_losses, []

    def scripted(model, *batch):
        if torch.is_grad_enabled():
            return real(model, *batch)
        seen.append([p.detach().clone() for p in model.parameters()])
        return torch.tensor(next(losses_of))

    monkeypatch.setattr(maac_sac, "model_losses", scripted)
    buffer = maac_sac.ReplayBuffer(100, 2, 1, "cpu")
    for _ in range(100):
        buffer.add(*(np.random.randn(n) for n in (2, 1, 1, 2)), False)
    held_out = maac_sac.HeldOut(100, 2).mask
    losses, epochs = maac_sac.fit_model(model, maac_sac.adam(model, 1e-2), buffer, held_out)
    assert torch.equal(losses, torch.tensor([5, 3.945])) and epochs == 4 + 100  # epochs of one step
    for p, first, fifth in zip(model.parameters(), seen[1], seen[5], strict=True):
        assert torch.equal(p[0], first[0]) and torch.equal(p[1], fifth[1])


def test_a_fit_begins_with_an_optimiser_that_remembers_nothing():
    """Its moments belong to weights that the fit before gave up for better ones."""
    model, _, buffer, held_out, _ = fit(max_epochs=2)
    fitted = []
    for moments in (None, 100.0):
        again = copy.deepcopy(model)
        optimizer = maac_sac.adam(again, 3e-3)
        if moments:
            maac_sac.descend(optimizer, moments * sum(p.sum() for p in again.parameters()))
            again.load_state_dict(model.state_dict())
            assert optimizer.state
        torch.manual_seed(1)
        maac_sac.fit_model(again, optimizer, buffer, held_out, max_epochs=3)
        fitted.append(again.state_dict())
    assert all(torch.equal(fitted[0][name], fitted[1][name]) for name in fitted[0])
    assert not all(torch.equal(fitted[0][name], model.state_dict()[name]) for name in fitted[0])


@pytest.mark.parametrize("rows, judging", [(100, 20), (5000, 1000), (20_000, 2000)])
def test_all_held_out_rows_judge_a_member_up_to_two_thousand(rows, judging, monkeypatch):
    shapes = set()

    def watch(model, obs, action, next_obs):
        if not torch.is_grad_enabled():
            shapes.update(tuple(x.shape) for x in (obs, action, next_obs))
        return torch.zeros(2)

    monkeypatch.setattr(maac_sac, "model_losses", watch)
    monkeypatch.setattr(maac_sac, "descend", lambda *args: None)
    *_, model = networks(ds=2, da=1, members=2)
    buffer = maac_sac.ReplayBuffer(rows, 2, 1, "cpu")
    buffer.size.fill_(rows)
    maac_sac.fit_model(model, maac_sac.adam(model, 1e-2), buffer, maac_sac.HeldOut(rows, 2).mask)
    assert shapes == {(2, judging, 2), (2, judging, 1)}


@pytest.mark.parametrize("rows, epochs", [(100, 100), (1000, 25), (5000, 7), (10_000, 5)])
def test_a_fit_ends_after_five_epochs_and_a_hundred_steps_without_progress(rows, epochs, monkeypatch):
    """Epochs of 1, 4, 16 and 32 steps. (A fit of 1000 rows of HalfCheetah needs some 700 steps.)"""
    steps = []
    monkeypatch.setattr(maac_sac, "model_losses", lambda model, *batch: torch.zeros(2))
    monkeypatch.setattr(maac_sac, "descend", lambda *args: steps.append(1))
    *_, model = networks(ds=2, da=1, members=2)
    buffer = maac_sac.ReplayBuffer(rows, 2, 1, "cpu")
    buffer.added = rows
    buffer.size.fill_(rows)
    _, made = maac_sac.fit_model(model, maac_sac.adam(model, 1e-2), buffer, maac_sac.HeldOut(rows, 2).mask)
    assert made == epochs and len(steps) == epochs * round(0.8 * rows / 256 + 0.5)


def test_held_out_rows_stay_held_out_when_a_run_goes_on(tmp_path):
    """They are part of what the run is: another PyTorch might draw others."""
    train("maac_sac", tmp_path, total_timesteps=30)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["held_out"]["mask"] = kept = ~state["held_out"]["mask"]
    torch.save(state, path)
    train("maac_sac", tmp_path, total_timesteps=40, resume=True)
    assert torch.equal(checkpoint(tmp_path)["held_out"]["mask"], kept)


def test_every_member_holds_out_a_fifth_of_the_rows_and_another_one():
    held_out = maac_sac.HeldOut(1002, K).mask
    assert held_out.shape == (1002, K) and (held_out[:1000].view(200, 5, K).sum(1) == 1).all()
    assert (held_out[:, 0] & held_out[:, 1]).sum() < 100  # independent: 40 of 1000 expected


def test_held_out_rows_are_never_trained_on(monkeypatch):
    trained, real = [set() for _ in range(K)], maac_sac.model_losses

    def watch(model, obs, action, next_obs):
        if torch.is_grad_enabled():
            for k in range(K):
                trained[k] |= set(obs[k, :, 0].tolist())
        return real(model, obs, action, next_obs)

    monkeypatch.setattr(maac_sac, "model_losses", watch)
    _, _, buffer, held_out, _ = fit(rows=300, max_epochs=4)
    for k in range(K):
        kept = buffer.rows[:300][held_out[:300, k], 0].tolist()
        assert kept and not trained[k] & set(kept) and len(trained[k]) > 200


def test_an_epoch_shows_every_member_all_its_rows_once_in_a_new_order(monkeypatch):
    epochs, real = [], maac_sac.model_losses

    def watch(model, obs, action, next_obs):
        if torch.is_grad_enabled():
            epochs.append(obs[..., 0].tolist())  # an epoch of fewer than 256 rows is one step
        return real(model, obs, action, next_obs)

    monkeypatch.setattr(maac_sac, "model_losses", watch)
    _, _, buffer, held_out, _ = fit(rows=300, max_epochs=3)
    for k in range(K):
        expected = sorted(buffer.rows[:300][~held_out[:300, k], 0].tolist())
        assert [sorted(rows[k]) for rows in epochs] == [expected] * 3
        assert epochs[0][k] != epochs[1][k] != epochs[2][k]


def test_a_fit_ends_as_soon_as_one_member_is_not_finite(monkeypatch):
    script = iter([[9.0, 9], [5, 8], [4, math.nan]])

    def scripted(*args):
        return torch.zeros(2) if torch.is_grad_enabled() else torch.tensor(next(script))

    monkeypatch.setattr(maac_sac, "model_losses", scripted)
    monkeypatch.setattr(maac_sac, "descend", lambda *args: None)
    *_, model = networks(ds=2, da=1, members=2)
    buffer = maac_sac.ReplayBuffer(100, 2, 1, "cpu")
    buffer.size.fill_(100)
    held_out = maac_sac.HeldOut(100, 2).mask
    losses, epochs = maac_sac.fit_model(model, maac_sac.adam(model, 1e-2), buffer, held_out)
    assert epochs == 2 and losses.isnan().tolist() == [False, True]


# --- data ---------------------------------------------------------------------------------------------------
def test_imagined_data_continue_until_they_end_and_wrap_round():
    torch.manual_seed(0)
    real, imagined = (maac_sac.ReplayBuffer(n, 2, 1, "cpu") for n in (10, 25))
    for i in range(10):
        real.add([i, 0], [0], 0.0, [0, 0], False)

    class Push(torch.nn.Module):
        def sample(self, obs):
            return torch.full((len(obs), 1), 0.5), None

    def step(obs, action):  # moves by 100; ends beyond 250, that is in the third step
        return obs[:, 0], obs + 100, obs[:, 0] + 100 > 250

    maac_sac.imagine_data(Push(), step, real, imagined, 5, 4)
    obs, action, reward, next_obs, terminated = imagined.rows[:20].split(imagined.widths, -1)
    assert imagined.added == imagined.size == 20
    assert (next_obs == obs + 100).all() and (reward == obs[:, :1]).all() and (action == 0.5).all()
    starts, expected = obs[:, 0].view(4, 5), torch.tensor([0.0, 100, 200, 0])
    assert ((starts // 100 * 100) == expected[:, None]).all()
    assert starts[0].max() > 0 and starts[3].max() > 0  # states of D_env, before and after an end
    assert terminated.view(4, 5).sum(1).tolist() == [0, 0, 5, 0]
    maac_sac.imagine_data(Push(), step, real, imagined, 5, 2)
    assert imagined.added == 30 and imagined.size == 25
    assert (imagined.rows[:5, 0] >= 100).all()  # the last five rows went round to the start


# --- planning -----------------------------------------------------------------------------------------------
def test_planning_finds_the_best_actions_of_a_linear_quadratic_problem():
    """With the critic of a poor policy the plan's first action is close to the best one for that horizon."""
    torch.manual_seed(0)
    actor, obs = LinearActor(std=0.5), torch.tensor([[0.3, -0.2], [-0.5, 0.4]], dtype=torch.float64)
    critic = ExactCritic(actor.gain)
    horizon = 3
    best = torch.zeros(horizon, 2, 1, dtype=torch.float64, requires_grad=True)  # before the tanh

    def cost():
        state, total = obs, 0.0
        for t in range(horizon):
            reward, state, _ = true_step(state, best[t].tanh())
            total = total + DISCOUNT**t * reward
        return -(total + DISCOUNT**horizon * critic(state, actor(state)).min(0).values).sum()

    optimizer = torch.optim.LBFGS([best], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)
    optimizer.step(lambda: (optimizer.zero_grad(), cost(), )[1].backward() or cost())
    both = (actor, critic, true_step, obs)  # states at once
    plan = maac_sac.plan_action(*both, DISCOUNT, horizon, 2000, 20, 100)
    torch.testing.assert_close(plan, best[0].detach().tanh(), atol=0.02, rtol=0)
    assert (abs(best[0].tanh() - actor(obs)) > 0.005).all()  # which are not the policy's actions


def test_a_search_starts_with_the_trajectory_of_the_policy():
    """Without noise all candidates are the policy's actions, in the states these lead to."""
    actor, obs, seen = LinearActor(), torch.randn(2, 2, dtype=torch.float64), []

    def step(obs, action):
        seen.append((obs, action))
        return true_step(obs, action)

    plan = maac_sac.plan_action(actor, ExactCritic(actor.gain), step, obs, DISCOUNT, 3, 4, 1, 2)
    torch.testing.assert_close(plan, actor(obs).tanh())
    state = obs.repeat_interleave(4, 0)
    for found in (seen[:3], seen[3:]):  # the policy's, those of the candidates
        expected = state
        for obs_t, action in found:
            torch.testing.assert_close(obs_t, expected)
            torch.testing.assert_close(action, actor(expected).tanh())
            expected = DYNAMICS(expected, action)
    assert len(seen) == 6


def test_a_search_moves_nine_tenths_of_the_way_to_its_elites(monkeypatch):
    """Two candidates with noise of 0.5 and 1, of which the larger action is better, and one elite.

    The mean is 0 and becomes 1.8, the deviation 2 and becomes sqrt(0.4): an elite alone has none. In the
    second round the better one is 1.8 + sqrt(0.4), of which nine tenths and a tenth of 1.8 make the plan.
    """
    noise = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1)
    monkeypatch.setattr(torch, "randn", lambda *size, device: noise)
    def step(obs, action):
        return action[:, 0], obs, torch.zeros(len(obs), dtype=torch.bool)

    def nothing(*args):
        return torch.zeros(2, 2)

    class Policy:
        def gaussian(self, obs):
            return torch.zeros(len(obs), 1), torch.full((len(obs), 1), 2.0)

        def __call__(self, obs):
            return torch.zeros(len(obs), 1)

    plan = maac_sac.plan_action(Policy(), nothing, step, torch.zeros(1, 2), DISCOUNT, 1, 2, 2, 1)
    expected = 0.1 * 1.8 + 0.9 * (1.8 + math.sqrt(0.4))
    torch.testing.assert_close(plan, torch.tensor([[expected]]).tanh())


def test_a_plan_ends_with_the_smaller_critic_and_gets_nothing_after_termination():
    """From 0 the next state is the action, and then half the state as well.

    Where the first step ends the episode, for -(a - 0.2)^2, what would be paid later counts for nothing.
    Where it does not, the smaller of s and 1 - s counts.
    """
    actor, obs = LinearActor(std=0.7), torch.zeros(1, 2, dtype=torch.float64)

    def critic(obs, action):
        return torch.stack([obs[:, 0], 1 - obs[:, 0]])

    for ends, horizon, best in ((True, 1, 0.2), (True, 2, 0.2), (True, 3, 0.2), (False, 1, 0.5)):
        seen = []

        def step(obs, action, ends=ends, seen=seen):
            seen.append(action)
            first = (obs[:, :1] == 0) * -((action - 0.2) ** 2) + 100 * obs[:, :1]
            ended = ends & (obs[:, 0] == 0)  # in the first step only
            return first[:, 0] * ends, action + obs / 2, ended

        plan = maac_sac.plan_action(actor, critic, step, obs, DISCOUNT, horizon, 500, 10, 25)
        assert plan.item() == pytest.approx(best, abs=0.02)
        first, last = seen[horizon], seen[-horizon]  # candidates, after the policy's own trajectory
        assert last.std() < 0.1 * first.std()


# --- settings of a run --------------------------------------------------------------------------------------
SETTINGS = {  # name: flags, whether it fits a model, whether it learns from imagined data
    "SAC": (dict(soft_targets=True, horizon=0, no_steve=True, real_ratio=1), False, False),
    "MBPO": (dict(soft_targets=True, horizon=0, no_steve=True), True, True),
    "STEVE": (dict(soft_targets=True, horizon=0, real_ratio=1), True, False),
    "MAAC": (dict(), True, True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_uses_the_parts_it_is_made_of(name, tmp_path):
    flags, fits, imagines = SETTINGS[name]
    state = checkpoint(train("maac_sac", tmp_path, rollouts=16, model_buffer_size=64, **flags))
    assert bool(state["model_opt"]["state"]) == fits
    assert (state["imagined"]["added"] > 0) == imagines
    log = (tmp_path / "train.csv").read_text().splitlines()[0].split(",")
    assert ("weight_1" in log) == (name in ("STEVE", "MAAC"))


def test_a_policy_can_be_loaded_with_planning_where_there_is_a_model(tmp_path):
    maac = train("maac_sac", tmp_path / "maac", rollouts=16, model_buffer_size=64)
    sac = train("maac_sac", tmp_path / "sac", **SETTINGS["SAC"][0])
    obs = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    planned, plain = maac_sac.load_policy(maac, plan=True)(obs), maac_sac.load_policy(maac)(obs)
    assert planned.shape == plain.shape == (3, 1) and (abs(planned) <= 1).all() and (planned != plain).any()
    with pytest.raises(BadInput, match="--plan"):
        maac_sac.load_policy(sac, plan=True)
    sizes = dict(ensemble_size=3, batch_size=9, rollouts=16, model_buffer_size=64)
    three = train("maac_sac", tmp_path / "three", **sizes)
    assert maac_sac.load_policy(three, plan=True)(obs).shape == (3, 1)  # 256 candidates are no multiple of 3


# --- what an update is given --------------------------------------------------------------------------------
@pytest.fixture
def given(monkeypatch):
    """A function that trains for 24 steps -> {function of the script: its calls' arguments by name}."""
    calls = {}

    def spy(name, function):
        def called(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs).arguments
            calls.setdefault(name, []).append(bound)
            return function(*args, **kwargs)

        return called

    def run(run_dir, **changes):
        calls.clear()
        settings = dict(total_timesteps=24, rollouts=16, model_buffer_size=64) | changes
        return train("maac_sac", run_dir, **settings), calls

    monkeypatch.setattr(maac_sac, "fit_model", partial(maac_sac.fit_model, max_epochs=1))
    for name in ("steve_targets", "critic_loss", "actor_loss", "temperature_loss", "imagine_data", "polyak"):
        monkeypatch.setattr(maac_sac, name, spy(name, getattr(maac_sac, name)))
    monkeypatch.setattr(maac_sac.ReplayBuffer, "sample", spy("sample", maac_sac.ReplayBuffer.sample))
    return run


def test_targets_are_of_the_target_critic_and_the_actor_follows_the_live_one(given, tmp_path):
    """A row of a target stays with its member; the actor's trajectories are shuffled at every step."""
    _, calls = given(tmp_path)
    every = zip(calls["steve_targets"], calls["critic_loss"], calls["actor_loss"], strict=True)
    for target, critic, actor in every:
        assert actor["critic"] is critic["critic"] is not target["critic_target"]
        assert [x["step"].keywords["shuffle"] for x in (target, actor)] == [False, True]


def test_every_part_of_an_update_has_the_settings_of_the_run(given, tmp_path):
    changes = dict(gamma=0.9, horizon=3, num_samples=5, steve_horizon=1, lr=0.1, tau=0.02, model_lr=2e-3)
    run, calls = given(tmp_path / "maac", **changes)
    parts = ("actor_opt", "critic_opt", "alpha_opt", "model_opt")
    rates = [checkpoint(run)[part]["param_groups"][0]["lr"] for part in parts]
    assert rates == [0.1, 0.1, 0.1, 2e-3] and {x["tau"] for x in calls["polyak"]} == {0.02}
    assert {(x["gamma"], x["horizon"], x["members"]) for x in calls["steve_targets"]} == {(0.9, 1, 2)}
    assert {(x["gamma"], x["horizon"], x["samples"]) for x in calls["actor_loss"]} == {(0.9, 3, 5)}
    assert {x["target_entropy"] for x in calls["temperature_loss"]} == {-1}  # -da
    alphas = [[x["alpha"].item() for x in calls[name]] for name in ("steve_targets", "actor_loss")]
    assert set(alphas[0]) == {0}  # no entropy in the target
    assert alphas[1][0] == 1 and len(set(alphas[1])) == 8  # it is learned
    _, calls = given(tmp_path / "sac", **SETTINGS["SAC"][0], num_samples=5, target_entropy=-0.5)
    assert {(x["horizon"], x["members"]) for x in calls["steve_targets"]} == {(0, 1)}
    assert {(x["horizon"], x["samples"]) for x in calls["actor_loss"]} == {(0, 1)}  # one action in a state
    assert {x["target_entropy"] for x in calls["temperature_loss"]} == {-0.5}
    alphas = [[x["alpha"].item() for x in calls[name]] for name in ("steve_targets", "actor_loss")]
    assert alphas[0] == alphas[1] and alphas[0][0] == 1 and len(set(alphas[0])) == 8


SHARES = [(0.25, [(500, 2), (64, 6)]), (0, [(500, 0), (64, 8)]), (1, [(500, 8)])]


@pytest.mark.parametrize("ratio, parts", SHARES)
def test_real_ratio_is_the_share_of_real_rows_in_a_batch(ratio, parts, given, tmp_path):
    """D_env holds 500 rows, D_model 64."""
    _, calls = given(tmp_path, real_ratio=ratio)
    batches = [(len(x["self"].rows), x["shape"][0]) for x in calls["sample"] if x["shape"] != (16,)]
    assert batches == parts * 8


def test_imagined_data_start_in_replayed_states_after_every_fit(given, tmp_path):
    run, calls = given(tmp_path, rollout_length=3, model_train_every=2)
    for found in calls["imagine_data"]:
        assert (len(found["source"].rows), len(found["target"].rows)) == (500, 64)
        assert found["n"] == 16 and found["step"].keywords["shuffle"]
    assert checkpoint(run)["imagined"]["added"] == 3 * 16 * 3  # after 20, 22 and 24 steps


def test_actions_after_the_warm_up_are_drawn_from_the_policy(planned, tmp_path, monkeypatch):
    def gaussian(self, obs):
        return torch.full((len(obs), 2), 0.3), torch.full((len(obs), 2), 0.5)

    monkeypatch.setattr(maac_sac.Actor, "gaussian", gaussian)
    steps = dict.fromkeys(("total_timesteps", "buffer_size", "eval_every"), 400)
    settings = dict(env_id=planned, learning_starts=0, updates_per_step=0) | SETTINGS["SAC"][0]
    run = train("maac_sac", tmp_path, **steps, **settings)
    u = stored(checkpoint(run))[:, 2:4].atanh()
    assert (u.mean(0) - 0.3).abs().max() < 0.1 and (u.std(0) - 0.5).abs().max() < 0.07  # 4 deviations


def test_a_loaded_planner_searches_with_the_settings_of_its_run(given, tmp_path, monkeypatch):
    run, _ = given(tmp_path, gamma=0.8, ensemble_size=3, batch_size=9)
    seen, plan_action = [], maac_sac.plan_action

    def spy(*args, **kwargs):
        seen.append(inspect.signature(plan_action).bind(*args, **kwargs).arguments)
        return plan_action(*args, **kwargs)

    monkeypatch.setattr(maac_sac, "plan_action", spy)
    maac_sac.load_policy(run, plan=True)(np.ones((2, 3), np.float32))
    (found,) = seen
    assert found["gamma"] == 0.8 and found["candidates"] == 255
    state = checkpoint(run)
    for name, net in dict(actor=found["actor"], critic=found["critic"], model=found["step"].args[0]).items():
        assert all(torch.equal(state[name][part], value) for part, value in net.state_dict().items())


def test_imagined_trajectories_become_more_as_the_authors_have_it(given, tmp_path, monkeypatch):
    """Fits at steps 20 to 50, and growth between 30 and 40, to three times as many."""
    monkeypatch.setattr(maac_sac, "GROWTH", (30, 40))
    changes = dict(total_timesteps=50, model_train_every=5, rollout_growth=3, model_buffer_size=16)
    run, calls = given(tmp_path, **changes)
    assert [len(calls["imagine_data"])] == [1 + 1 + 1 + 2 + 3 + 3 + 3]
    assert checkpoint(run)["imagined"]["added"] == 14 * 16
    grown = {env_id: preset.get("rollout_growth", 1) for env_id, preset in maac_sac.PRESETS["paper"].items()}
    assert (grown["mbbl/Hopper-v0"], grown["mbbl/Ant-v0"], grown["*"]) == (15, 25, 1)
