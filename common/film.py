"""One episode of a policy as a moving picture: `python -m common.evaluate RUN --video FILE.gif` draws it."""

import os
from pathlib import Path

import imageio
import numpy as np
from tqdm import tqdm

from common import BadInput, one_line
from common.envs import call, close, make_env
from common.evaluate import MAX_STEPS


def film(policy, env_id, path, seed=0, max_steps=MAX_STEPS):
    """Draws one episode into a GIF file, at most 25 frames a second -> return, length."""
    env, obs, frame = _begin_to_draw(env_id, seed)
    rate = env.metadata.get("render_fps") or 25  # frames a second
    frames, total, steps, done, every = [frame], 0.0, 0, False, int(np.ceil(rate / 25))
    length = min(env.spec.max_episode_steps or max_steps, max_steps)
    with tqdm(total=length, unit="step", desc="drawing", leave=False, disable=None) as bar:  # in a terminal
        while not done and steps < max_steps:
            obs, reward, terminated, truncated, _ = call(env_id, env.step, policy(obs))
            steps, total, done = steps + 1, total + float(reward), terminated or truncated
            bar.update()
            if steps % every == 0:
                try:
                    frames.append(_small(env.render()))
                except Exception as error:
                    raise _not_drawn(env_id, error, "leave --video out") from None
    close(env_id, env)
    shown = 1000 * every / rate  # milliseconds
    try:
        gif = imageio.mimwrite("<bytes>", frames, format="GIF", duration=shown, loop=0)  # for ever
    except Exception as error:  # no pictures, or of different sizes
        raise _not_drawn(env_id, error, "leave --video out") from None
    try:
        Path(path).write_bytes(gif)
    except OSError as error:
        raise BadInput(f"--video {path} cannot be written ({error}): give another file.") from None
    return total, steps


def _small(frame):
    return frame[::2, ::2].copy()  # a view would keep the whole frame


def _follow(env):
    """MuJoCo's runners come with a camera "track" that goes with them; the usual one stays where it is."""
    if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
        names = [renderer.model.camera(i).name for i in range(renderer.model.ncam)]
        renderer.camera_id = names.index("track") if "track" in names else renderer.camera_id


def _begin_to_draw(env_id, seed):
    """An environment that draws, its first observation and picture; BadInput if it cannot draw here."""
    by_default = "MUJOCO_GL" not in os.environ
    try:
        env = make_env(env_id, render_mode="rgb_array")
        _follow(env)
        obs, _ = env.reset(seed=seed)
        frame = env.render()
        if frame is None:
            raise ValueError("it draws nothing")
        return env, obs, _small(frame)
    except Exception as error:  # each library that draws fails in its own way
        cause = error.__cause__ or error  # make_env's own words are about --env-id
        drawn = not isinstance(cause, (TypeError, ValueError))
        if drawn and by_default and os.environ.get("MUJOCO_GL") == "egl" and os.environ.get("DISPLAY"):
            os.environ["MUJOCO_GL"] = "glfw"  # EGL is not installed, but there may be a screen
            return _begin_to_draw(env_id, seed)
        fix = "leave --video out"  # it takes no render_mode, or draws nothing
        if drawn:
            fix = "install gymnasium[classic-control] or [mujoco], and EGL or OSMesa where there is no screen"
        raise _not_drawn(env_id, cause, fix) from None


def _not_drawn(env_id, error, fix):
    return BadInput(f"--video: {env_id} cannot be drawn here ({one_line(error)}): {fix}.")
