"""True derivatives of robots: against MuJoCo's own, against other step sizes; the environment goes on."""

import csv

import mujoco
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward

import mage_td3
from common import BadInput
from common.args import parse_args
from common.envs import make_env
from common.experiments import mage_in_mujoco
from common.experiments.mage_in_mujoco import World
from common.experiments.mujoco_derivatives import (
    SMOOTH,
    MuJoCoDerivatives,
    compared,
    stacked,
    through_world,
    trajectory,
)
from common.experiments.robot_runs import Agent
from common.experiments.true_derivatives import (
    Args,
    by_contact,
    critic_rows,
    horizon_gradients,
    main,
    model_jacobians,
    model_rows,
    target_gradient,
    target_rows,
)
from tests import values_of_critics
from tests.conftest import SCRIPTS, checkpoint, tiny, train
from tests.values_of_critics import look, look_at_ends, look_at_errors

WHOLE = [name for name, first in SMOOTH.items() if first is not None]


def walked(env_id, steps=30, seed=0):
    """An environment after some random steps, far enough for contacts."""
    env = make_env(env_id, seed)
    env.reset()
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        env.step(rng.uniform(-0.3, 0.3, env.action_space.shape).astype(np.float32))
    return env, rng.uniform(-0.5, 0.5, env.action_space.shape)


@pytest.mark.parametrize("name", WHOLE)
def test_derivatives_are_those_of_mujoco_where_the_frame_skip_is_one(name):
    env, action = walked(f"{name}-v4")
    env.unwrapped.frame_skip = 1
    env.unwrapped.model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER  # MuJoCo's own knows no Runge-Kutta
    with MuJoCoDerivatives(env) as true:
        by_action, by_obs = true.by_action(action), true.by_obs(action)
        true.step(action)  # leaves this action in data.ctrl
        mujoco.mj_setState(true.model, true.data, true.state, true.kind)
        space = env.unwrapped.action_space
        true.data.ctrl[:] = space.low + (space.high - space.low) * (action + 1) / 2
        nv, x = true.model.nv, true.x_first
        a, b = np.zeros((2 * nv, 2 * nv)), np.zeros((2 * nv, true.model.nu))
        mujoco.mjd_transitionFD(true.model, true.data, 1e-6, 1, a, b, None, None)
    half = (space.high - space.low) / 2
    keep = slice(true.first, None)
    np.testing.assert_allclose(by_action[x:], b[keep] * half, rtol=1e-4, atol=1e-4 * abs(b).max())
    np.testing.assert_allclose(by_obs[x:, x:], a[keep, keep], rtol=1e-4, atol=1e-4 * abs(a).max())
    assert np.abs(by_obs[:, :x]).sum() == 0  # the velocity of the last step changes nothing
    if x:  # position after the step minus position before, over its duration
        velocity = b[0] * half / true.model.opt.timestep
        np.testing.assert_allclose(by_action[0], velocity, rtol=1e-3, atol=1e-4 * abs(by_action).max())


@pytest.mark.parametrize("name", SMOOTH)
def test_the_step_size_does_not_matter(name):
    env, action = walked(f"{name}-v5")
    with MuJoCoDerivatives(env) as true:
        fine, usual = true.by_action(action, 1e-6), true.by_action(action)
        assert np.abs(usual).max() > 1e-3
        assert np.linalg.norm(fine - usual) < 1e-4 * np.linalg.norm(usual)
        if true.first is not None:
            fine, usual = true.by_obs(action, 1e-6), true.by_obs(action)
            # The solver of contacts stops at a tolerance, and a small step divides what it leaves.
            assert np.linalg.norm(fine - usual) < 5e-3 * np.linalg.norm(usual)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_step_is_that_of_the_environment_which_goes_on_bit_for_bit(name):
    def rest(measured):
        env, action = walked(f"{name}-v4")
        action = action.astype(np.float32)
        with MuJoCoDerivatives(env) as true:
            said = true.step(action) if measured else None
            if measured:
                true.by_action(action)
                if true.first is not None:
                    true.by_obs(action)
                    true.restore(np.zeros(env.observation_space.shape))
                    true.step(action)
        seen = [env.step(action) for _ in range(20)]
        return said, [(obs.tobytes(), reward, *ends) for obs, reward, *ends, _ in seen], seen[0][0]

    said, measured, first = rest(True)
    np.testing.assert_allclose(said, first, rtol=1e-5, atol=1e-5)
    assert measured == rest(False)[1]


@pytest.mark.parametrize("name", WHOLE)
def test_an_observation_tells_the_state(name):
    env, action = walked(f"{name}-v4")
    obs, *_ = env.step(action.astype(np.float32))
    with MuJoCoDerivatives(env) as true:
        truth = true.step(action), true.by_action(action)
        true.restore(obs)
        again = true.step(action), true.by_action(action)
    for one, other in zip(truth, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2 * np.abs(one).max())


def test_at_its_bound_an_action_has_the_derivative_of_one_side():
    env, action = walked("HalfCheetah-v4")
    bound, inside = np.array(action), np.array(action)
    bound[0], inside[0] = 1.0, 1 - 1e-4
    with MuJoCoDerivatives(env) as true:
        at, near = true.by_action(bound), true.by_action(inside)
    np.testing.assert_allclose(at[:, 0], near[:, 0], rtol=1e-2, atol=1e-2 * np.abs(near).max())


@pytest.mark.parametrize("env_id", ["Ant-v5", "Humanoid-v4", "Pendulum-v1", "mbbl/HalfCheetah-v0"])
def test_other_environments_are_refused(env_id):
    with pytest.raises(BadInput, match="smooth function"):
        MuJoCoDerivatives(make_env(env_id))


def test_what_does_not_show_its_whole_state_has_no_derivative_by_it():
    env, action = walked("Pusher-v5")
    with MuJoCoDerivatives(env) as true, pytest.raises(BadInput, match="whole state"):
        true.by_obs(action)
    with MuJoCoDerivatives(env) as true, pytest.raises(BadInput, match="whole state"):
        true.restore(np.zeros(23))


# --- runs ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny runs of the four scripts; trained far enough for a model."""
    made = {}
    for name, env_id in [(name, "HalfCheetah-v4") for name in SCRIPTS] + [("td3", "Pendulum-v1")]:
        folder = tmp_path_factory.mktemp("runs") / env_id / name
        train(name, folder, env_id=env_id, eval_episodes=0)
        made[name, env_id] = folder
    return made


@pytest.fixture
def agent(folders):
    return Agent(folders["mage_td3", "HalfCheetah-v4"])


def again(agent, obs, first, horizon):
    """The return of H steps in the world and the critic after them, for another first action."""
    total = 0.0
    with agent.true as true:
        true.restore(obs[0].numpy())
        for t in range(horizon + 1):
            action = torch.as_tensor(first)[None] if t == 0 else agent.actor(obs).detach()
            if t == horizon:
                return total + agent.gamma**t * agent.critic(obs, action).min().item()
            next_obs = torch.as_tensor(true.go_on(action[0].numpy())[0])[None]
            total += agent.gamma**t * agent.outcome(obs, action, next_obs)[0].item()
            obs = next_obs


@pytest.mark.parametrize("horizon", [0, 1, 2, 4])
def test_a_chained_gradient_is_that_of_the_return_in_the_world(agent, horizon):
    paths = []
    with agent.true as true:
        for obs in agent.rows[[40, 50], : agent.obs_dim].double().numpy():
            true.restore(obs)
            paths.append(trajectory(true, agent.actor, obs, 5))
    path = [stacked(steps) for steps in zip(*paths, strict=True)]
    found, _ = horizon_gradients(
        agent, path[0][0], lambda t, s, a: through_world(path[t], s, a), horizon)  # fmt: skip
    for obs, first, gradient in zip(*path[0][:2], found, strict=True):
        ends = [[again(agent, obs[None], first.numpy() + by, horizon) for by in (step, -step)]
                for step in 1e-5 * np.eye(6)]  # fmt: skip
        truth = [(up - down) / 2e-5 for up, down in ends]
        np.testing.assert_allclose(gradient, truth, rtol=1e-4, atol=1e-4 * np.abs(truth).max())


def test_the_gradient_of_the_target_is_that_of_the_world(agent):
    obs = agent.rows[40, : agent.obs_dim].double().numpy()
    with agent.true as true:
        true.restore(obs)
        step = stacked([trajectory(true, agent.actor, obs, 1)[0]])
        true.restore(obs)

        def target(action):  # in the world, with the script's own arithmetic written out
            next_obs = torch.as_tensor(true.step(action))[None]
            value = agent.critic_target(next_obs, agent.actor_target(next_obs)).min().item()
            return next_obs[0, 0].item() - 0.1 * np.square(action).sum() + agent.gamma * value

        first = step[1][0].numpy()
        truth = [(target(first + by) - target(first - by)) / 2e-5 for by in 1e-5 * np.eye(6)]
    found = target_gradient(agent, step[0], step[1], lambda a: through_world(step, step[0], a))
    np.testing.assert_allclose(found[0], truth, rtol=1e-4, atol=1e-4 * np.abs(truth).max())


def test_jacobians_of_a_model_are_those_of_its_mean(agent):
    rows = agent.rows[30:33].double()
    obs, action = rows[:, : agent.obs_dim], rows[:, agent.obs_dim : agent.obs_dim + 6]
    by_action, by_obs = model_jacobians(agent.model, obs, action)
    scale = agent.model.delta_norm.scale
    for jacobian, at in ((by_action, action), (by_obs, obs)):
        for i in (0, 3):
            step = torch.zeros_like(at)
            step[:, i] = 1e-6
            pair = [(obs, action + by) if at is action else (obs + by, action) for by in (step, -step)]
            ends = [(agent.imagined(*inputs) - inputs[0]) / scale for inputs in pair]
            torch.testing.assert_close(jacobian[..., i], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_where_the_world_is_the_model_its_jacobians_have_no_error(agent):
    rows = agent.rows[30:33].double()
    obs, action = rows[:, : agent.obs_dim], rows[:, agent.obs_dim : agent.obs_dim + 6]

    def mean(obs, action):  # (ds,), (da,) -> next_obs (ds,), the state itself in it
        return agent.imagined(obs[None], action[None]).mean(0)[0]

    pairs = [torch.autograd.functional.jacobian(mean, pair) for pair in zip(obs, action, strict=True)]
    by_obs, by_action = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    contact = torch.tensor([True, False, False])
    found = list(model_rows(agent, (obs, action, None, by_action, by_obs, contact)))
    ensemble = [row for row in found if row["what"] == "ensemble"]
    assert {(row["by"], row["kind"]) for row in ensemble} == {
        (by, kind) for by in ("action", "observation")
        for kind in ("all", "positions", "velocities", "x velocity")}  # fmt: skip
    assert all(row["error"] < 1e-5 for row in ensemble)
    assert all(row["error"] > 1e-3 for row in found if row["what"] == "member")


@pytest.mark.parametrize(("dim", "kind"), [(0, "x velocity"), (1, "positions"), (8, "positions"),
                                           (9, "velocities"), (17, "velocities")])  # fmt: skip
def test_each_quantity_counts_among_those_of_its_kind(agent, dim, kind):
    rows = agent.rows[30:33].double()
    obs, action = rows[:, : agent.obs_dim], rows[:, agent.obs_dim : agent.obs_dim + 6]
    scale = agent.model.delta_norm.scale[:, None]
    by_action, by_obs = (hat.mean(0) for hat in model_jacobians(agent.model, obs, action))
    by_action, by_obs = by_action * scale, by_obs * scale  # what a world has in which the model is right,
    by_action[:, dim] *= 2  # but for one number of the observation
    by_obs[:, dim] *= 2
    by_obs = by_obs + torch.eye(agent.obs_dim, dtype=torch.float64)
    step = (obs, action, None, by_action, by_obs, torch.zeros(3, dtype=torch.bool))
    wrong = [row for row in model_rows(agent, step) if row["what"] == "ensemble" and row["error"] > 1e-6]
    assert {row["kind"] for row in wrong} == {"all", kind} and len(wrong) == 2 * 3  # contact: "", "no"


def test_a_model_that_is_the_world_has_no_error(agent, monkeypatch):
    obs = agent.rows[40:44, : agent.obs_dim].double().numpy()
    steps = []
    with agent.true as true:
        for row in obs:
            true.restore(row)
            steps += trajectory(true, agent.actor, row, 1)
    step = stacked(steps)
    truth = target_gradient(agent, step[0], step[1], lambda a: through_world(step, step[0], a))

    def perfect(obs, action, noise=0.0):
        return through_world(step, obs, action).expand(agent.model.members, *obs.shape)

    assert all(row["error"] > 0.01 for row in target_rows(agent, step, truth))
    monkeypatch.setattr(agent, "imagined", perfect)
    for row in target_rows(agent, step, truth):
        assert row["error"] < 1e-9 and row["cosine"] > 1 - 1e-9


def test_a_critic_is_judged_with_its_residual_and_as_the_actor_sees_it(agent):
    row = agent.rows[40:44].double()
    obs, action = row[:, : agent.obs_dim], row[:, agent.obs_dim : agent.obs_dim + 6]
    at = action.clone().requires_grad_()
    q = agent.critic(obs, at)  # (2, 4)
    first, second, smaller = (torch.autograd.grad(y.sum(), at, retain_graph=True)[0]
                              for y in (q[0], q[1], q.min(0).values))  # fmt: skip
    step = obs, action, None, None, None, torch.zeros(4, dtype=torch.bool)
    rows = list(critic_rows(agent, step, smaller))  # the truth is what the critic says
    assert [row.get("what") for row in rows if row["contact"] == ""] == [None, "before the tanh"]
    assert all(row["error"] < 1e-9 for row in rows)
    residual = ((smaller - first).norm(dim=1) + (smaller - second).norm(dim=1)) / 2
    assert rows[0]["residual"] == pytest.approx(residual.quantile(0.5).item())
    slope = (1 - action**2).double()
    assert rows[2]["length"] == pytest.approx((slope * smaller).norm(dim=1).quantile(0.5).item())


def test_numbers_of_a_comparison():
    found = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    row = compared(found, truth)  # errors 2, 1, sqrt 2; cosines 1, 1, 0
    assert row["count"] == 3 and row["error"] == pytest.approx(2**0.5) and row["cosine"] == 1
    assert row["length"] == 2 and row["true_length"] == 1
    assert row["error_90"] == pytest.approx(2**0.5 + 0.8 * (2 - 2**0.5))
    rows = list(by_contact(found, truth, torch.tensor([True, False, False]), residual=torch.arange(3.0)))
    assert [(row["contact"], row["count"], row["residual"]) for row in rows] == [
        ("", 3, 1), ("yes", 1, 0), ("no", 2, 1.5)]  # fmt: skip
    assert rows[1]["error"] == 2


def test_the_program_writes_figure_and_table(folders, tmp_path, capsys):
    runs = tuple(folders[name, "HalfCheetah-v4"] for name in SCRIPTS)
    main(Args(runs, tmp_path / "f.png", states=8, every=3, horizon=3, starts=4))
    with (tmp_path / "f.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / "f.png").stat().st_size > 10_000
    parts = {name: set() for name in SCRIPTS}
    for row in rows:
        parts[row["run"].removeprefix("HalfCheetah-v4/")].add(row["part"])
    assert parts["td3"] == {"critic", "horizon"}
    for name in SCRIPTS[1:]:
        assert parts[name] == {"critic", "horizon", "model", "target"}
    exact = [row for row in rows if (row["part"], row["horizon"]) == ("horizon", "0")]
    assert len(exact) == 4 + 3 * 4  # of the critic; by action and by policy in the model, two ways
    assert all(float(row["error"]) < 1e-6 for row in exact)  # without a step there is no model
    lines = [line for line in capsys.readouterr().out.splitlines() if "a tenth of the difference" in line]
    for line in lines:  # a difference that is too small or too large for the numbers' precision shows here
        assert float(line.split("another by ")[1].split()[0]) < 1e-5, line
    assert [line.split("by the ")[1].split()[0] for line in lines] == ["action", "observation"] * len(runs)


def test_what_cannot_be_measured_is_refused_with_a_sentence(folders, tmp_path):
    good = folders["td3", "HalfCheetah-v4"]
    for runs, more, words in (((folders["td3", "Pendulum-v1"],), {}, "Pendulum-v1 has no true derivatives"),
                              ((), {}, "No run is named"), ((tmp_path,), {}, "args.json does not exist"),
                              ((good,), dict(states=0), "--states 0"),
                              ((good,), dict(output=tmp_path / "f.txt"), "--output")):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            main(Args(runs, **dict(output=tmp_path / "f.png") | more))
    assert not list(tmp_path.iterdir())


# --- MAGE in the world --------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v4"])
def test_the_world_as_a_function_is_the_robot_and_has_its_derivative(env_id):
    world, env = World(env_id), make_env(env_id, seed=3)
    rng, rows = np.random.default_rng(0), []
    obs, _ = env.reset(seed=3)
    for _ in range(12):
        action = rng.uniform(-0.9, 0.9, env.action_space.shape[0]).astype(np.float32)
        next_obs, *_ = env.step(action)
        rows.append((obs, action, next_obs))
        obs = next_obs
    obs, action, next_obs = (torch.as_tensor(np.stack(parts)).double() for parts in zip(*rows, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(world(obs, action), next_obs, rtol=0, atol=2e-3)  # of float32 states
    weights = torch.randn(obs.shape, dtype=torch.float64)
    at = action.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weights * world(obs, at)).sum(), at)
    for i in range(action.shape[1]):
        by = torch.zeros_like(action)
        by[:, i] = 1e-6
        ends = [(weights * world(obs, action + sign * by)).sum(1) for sign in (1, -1)]
        torch.testing.assert_close(gradient[:, i], (ends[0] - ends[1]) / 2e-6, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["graph", "compile"])
def test_no_acceleration_can_ask_the_simulator(how, tmp_path):
    argv = tiny("mage_td3", env_id="HalfCheetah-v4", run_dir=tmp_path / "run", accelerate=how)
    with pytest.raises(BadInput, match=f"--accelerate {how}: .* leave it out"):
        mage_in_mujoco.train(parse_args(mage_td3.Args, mage_td3.PRESETS, argv))
    assert not (tmp_path / "run").exists()


def test_mage_learns_in_the_world(tmp_path):
    """The critic moves, no model is trained, and afterwards the script has its own dynamics again."""
    steps = dict(learning_starts=8, total_timesteps=12, eval_every=12, eval_max_steps=5)
    argv = tiny("mage_td3", env_id="HalfCheetah-v4", run_dir=tmp_path / "run", **steps)
    args = parse_args(mage_td3.Args, mage_td3.PRESETS, argv)
    mage_in_mujoco.train(args)
    assert args.accelerate == "none"  # which auto would not be on a GPU
    state = checkpoint(tmp_path / "run")
    assert not state["model_opt"]["state"] and state["args"]["oracle_dynamics"]
    assert {int(s["step"]) for s in state["critic_opt"]["state"].values()} == {4 * args.updates_per_step}
    with pytest.raises(BadInput, match="--oracle-dynamics does not know"):
        mage_td3.train(args)  # the script itself has this world no longer
    with pytest.raises(BadInput, match="does not show its whole state"):
        World("Pusher-v4")


@pytest.mark.parametrize("name", ["mage_td3", "maac_sac"])
def test_a_critic_that_says_what_is_earned_is_found_to_be_right(folders, name, monkeypatch):
    """Every step pays 2: the discounted return is 2 / (1 - gamma), but for the time limit far away."""
    agent = Agent(folders[name, "HalfCheetah-v4"])
    agent.gamma, agent.env = 0.9, TransformReward(agent.env, lambda reward: 2.0)
    monkeypatch.setattr(agent, "critic", lambda obs, action: torch.tensor([[20.0], [21.0]]))
    found = look(agent, episodes=1)
    assert found["q"] == 20 and found["reward"] == 2 and found["discounted"] == pytest.approx(20, rel=1e-4)
    assert (agent.alpha is None) == np.isnan(found["entropy"]) == (name == "mage_td3")
    assert abs(found["imagined"]) < 20


@pytest.mark.parametrize("name", ["mage_td3", "maac_sac"])
def test_the_values_of_last_transitions(folders, name, monkeypatch):
    """Values of 20 and 24 where the target is 21: TD errors of 1 and -3, and of -18 and -22 where it is 2."""
    agent = Agent(folders[name, "HalfCheetah-v4"])
    assert not agent.rows[:, -1].any() and not look_at_ends(agent)
    agent.gamma, agent.rows = 0.9, agent.rows[:10].clone()
    agent.rows[3, -1], (_, action, _, next_obs, _) = 1, agent.transitions()
    reward = agent.obs_dim + action.shape[-1]
    agent.rows[:, reward] = 2.1
    agent.rows[3, reward] = 2.0
    seen = []

    def critic(obs, action):
        return torch.tensor([[20.0], [24.0]]).expand(2, len(obs))

    def critic_target(obs, action):
        seen.append(obs)
        return torch.tensor([[21.0], [30.0]]).expand(2, len(obs))

    monkeypatch.setattr(agent, "critic", critic)
    monkeypatch.setattr(agent, "critic_target", critic_target)
    found = look_at_ends(agent)
    assert torch.equal(seen[0], next_obs)
    assert found["share"] == 0.1 and found["reward"] == 2 and found["q"] == 22
    assert found["error"] == 18  # torch's median of two is the lower one
    assert found["other_error"] == pytest.approx(1, abs=1e-5)  # 2.1 + 0.9 * 21 = 21
    last, others = 17.5 + 21.5, 9 * (0.5 + 2.5)
    assert found["share_of_loss"] == pytest.approx(last / (last + others), rel=1e-4)


@pytest.mark.parametrize("name", ["mage_td3", "maac_sac"])
def test_the_td_errors_of_a_run(folders, name, monkeypatch):
    """Values of 20.5 and 23.5 where the target is 21: TD errors of 0.5 and -2.5, and one of -17.5."""
    agent = Agent(folders[name, "HalfCheetah-v4"])
    agent.gamma, agent.rows = 0.9, agent.rows[:10].clone()
    agent.rows[:, agent.obs_dim + agent.transitions()[1].shape[-1]] = 2.1
    q, seen = torch.tensor([[20.5], [23.5]]).repeat(1, 10), []
    q[0, 3] = 38.5
    monkeypatch.setattr(agent, "critic", lambda obs, action: q)

    def critic_target(obs, action):
        seen.append(action)
        return torch.tensor([[21.0], [30.0]]).expand(2, len(obs))

    monkeypatch.setattr(agent, "critic_target", critic_target)
    found = look_at_errors(agent)
    assert found["mean"] == pytest.approx((9 * 0.5 - 17.5 + 10 * -2.5) / 20, abs=1e-4)
    assert found["median"] == pytest.approx(-2.5, abs=1e-4)
    assert found["above_1"] == (1 + 10) / 20
    if name == "mage_td3":  # the target's action has noise, and stays in its bounds
        actions = agent.actor_target(agent.transitions()[3])
        assert agent.target_noise == (0.2, 0.5) and seen[0].abs().max() <= 1
        assert 0.1 < (seen[0] - actions).std() < 0.3


def test_runs_of_one_name_have_a_row_each(folders, monkeypatch, capsys):
    """And only those where an episode ended are in the third table."""
    found = iter([{"q": 1.0}, {}, {"q": 2.0}])
    names = ("q", "discounted", "reward", "imagined", "entropy")
    monkeypatch.setattr(values_of_critics, "look", lambda agent: dict.fromkeys(names, 0.0))
    monkeypatch.setattr(values_of_critics, "look_at_ends", lambda agent: next(found))
    values_of_critics.main([folders["mage_td3", "HalfCheetah-v4"]] * 3)
    first, second, third = capsys.readouterr().out.split("\n\n")
    assert len(first.splitlines()) == len(second.splitlines()) == 2 + 3
    assert [row.split("|")[2].strip() for row in third.splitlines()[2:]] == ["1", "2"]
    assert all(row.count("|") == third.splitlines()[0].count("|") for row in third.splitlines()[:2])
