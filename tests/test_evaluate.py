"""The command line of common/evaluate.py (what `evaluate` promises is in test_training.py), and devices."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import common.evaluate
import common.film
from common import BadInput
from common.evaluate import Args, evaluate, load_networks, main
from common.files import read_checkpoint
from tests.conftest import ROOT, SCRIPTS, script, train


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_prints_the_return_of_the_policy_of_any_script(name, tmp_path, capsys):
    run = train(name, tmp_path, **({"rollouts": 16, "model_buffer_size": 64} if name == "maac_sac" else {}))
    capsys.readouterr()
    main(Args(str(run), episodes=3))
    printed = [float(x) for x in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    returns = evaluate(script(name).load_policy(run), "Pendulum-v1", 3, seed=10**6).returns
    half = 4.3027 * returns.std(ddof=1) / 3**0.5  # Student's t, 97.5%, two degrees of freedom
    assert printed == pytest.approx([returns.mean(), half], rel=1e-3, abs=0.006)


def test_a_video_without_a_screen_prints_no_error(tmp_path):
    run, screen = train("td3", tmp_path, total_timesteps=0), ("DISPLAY", "SDL_VIDEODRIVER", "XDG_RUNTIME_DIR")
    argv = ["-m", "common.evaluate", run, "--episodes", "2", "--video", tmp_path / "video.gif"]
    environment = {name: value for name, value in os.environ.items() if name not in screen}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "video.gif").exists()


def test_a_video_goes_with_the_robot():
    env, _, _ = common.film._begin_to_draw("HalfCheetah-v4", 0)
    parts = []
    for x in (0, 20):  # metres
        env.unwrapped.data.qpos[0] = x
        env.unwrapped.do_simulation(np.zeros(6), 5)
        red, _, blue = env.render().astype(int).transpose(2, 0, 1)
        parts.append((red > blue + 40).sum())  # it is brown, the floor and the sky are not
    env.close()
    assert min(parts) > 1000 and parts[1] > parts[0] / 2


@pytest.mark.parametrize("args", [Args("nowhere"), Args("nowhere", episodes=1)], ids=["folder", "episodes"])
def test_bad_input_is_one_sentence(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput):
        main(args)


@pytest.mark.parametrize("name, other", [("td3", "mage_td3"), ("dyna_td3", "mage_td3"), ("mage_td3", "td3")])
def test_a_run_is_loaded_by_its_own_script(name, other, tmp_path):
    run = train(name, tmp_path, total_timesteps=0)
    with pytest.raises(BadInput, match="not made by this script .*lam"):
        script(other).load_policy(run)


def test_a_policy_takes_float64_too(tmp_path):
    policy = script("td3").load_policy(train("td3", tmp_path, total_timesteps=0))
    obs = np.random.default_rng(0).normal(size=(4, 3))
    assert policy(obs).dtype == np.float32 and (policy(obs) == policy(obs.astype(np.float32))).all()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_networks_of_a_run_can_be_used(name, tmp_path):
    """The critic that is loaded is the run's, and the lines of the docstring do what they say."""
    run, module = train(name, tmp_path / "run"), script(name)
    args, nets = load_networks(run, module.Args, module.networks)
    saved = read_checkpoint(run / "checkpoint.pt")
    assert args.seed == saved["args"]["seed"] and {"actor", "critic", "critic_target"} <= nets.keys()
    for part, net in nets.items():
        assert all(torch.equal(value, saved[part][key]) for key, value in net.state_dict().items())
    example = re.search(r"action = (.|\n)*?randn_like.*", load_networks.__doc__).group()
    lines = [line.strip() for line in example.splitlines() if "model" in nets or "model" not in line]
    found = dict(torch=torch, nets=nets, obs=torch.randn(4, 3))
    exec("\n".join(lines), found)
    assert found["q"].shape == (4,) and found["slope"].shape == (4, 1) and found["slope"].any()
    if "model" in nets:
        assert found["next_obs"].shape == (4, 3)


def test_planning_is_refused_where_the_algorithm_has_no_plan(tmp_path):
    with pytest.raises(BadInput, match="--plan"):
        main(Args(str(train("td3", tmp_path)), plan=True))


def test_a_run_is_not_resumed_on_another_kind_of_device(tmp_path):
    run = train("td3", tmp_path, total_timesteps=30)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["device"] == "cpu"
    torch.save(state | {"device": "cuda"}, run / "checkpoint.pt")
    with pytest.raises(BadInput, match="--device cuda"):
        train("td3", tmp_path, resume=True)
    torch.save(state, run / "checkpoint.pt")
    train("td3", tmp_path, resume=True, device="cpu")  # which auto was
