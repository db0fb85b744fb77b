"""True derivatives of robots: against MuJoCo's own, against other step sizes; the environment goes on."""

import mujoco
import numpy as np
import pytest

from common import BadInput
from common.dynamics import SMOOTH, MuJoCoDerivatives
from common.envs import make_env

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
