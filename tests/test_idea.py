"""The first picture of the README: the numbers behind it hold, and would not with another loss."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import mage_td3
from common.experiments import critic_slope
from common.experiments.critic_slope import Args, cosines, errors, learn, policy, true_value, value_and_slope

ARGS = Args(steps=400, critics=4)


@pytest.fixture(scope="module")
def critics():
    return learn(ARGS, False), learn(ARGS, True)


def test_the_td_error_alone_finds_the_value_and_leaves_the_slope_to_chance(critics):
    value, slope = errors(critics[0])
    assert value < 0.06 and slope > 0.7
    found = value_and_slope(critics[0], torch.zeros(1, 1))[1][:, 0]
    assert (found.max() - found.min()).abs() > 0.1


def test_mage_finds_value_and_slope(critics):
    value, slope = errors(critics[1])
    assert value < 0.15 and slope < 0.05


def wrong(loss, how):
    """mage_loss with a mistake: (critic, step_target, obs, action) -> its two terms."""

    def changed(critic, step_target, obs, action):
        if how == "slope of minus the target":
            terms = loss(critic, lambda a: 2 * step_target(a).detach() - step_target(a), obs, action)
        elif how == "target without slope":
            terms = loss(critic, lambda a: step_target(a).detach() + 0 * a[:, 0], obs, action)
        else:
            terms = loss(critic, step_target, obs, action)
        return (terms[0].detach(), terms[1]) if how == "gradient term detached" else terms

    return changed


MISTAKES = ["gradient term detached", "target without slope", "slope of minus the target"]


@pytest.mark.parametrize("how", MISTAKES)
def test_another_loss_does_not_find_the_slope(how, monkeypatch):
    monkeypatch.setattr(mage_td3, "mage_loss", wrong(mage_td3.mage_loss, how))
    assert errors(learn(ARGS, True))[1] > 0.5


def test_the_slope_is_that_of_differences_and_the_hill_is_where_the_actor_is_not():
    obs, eps = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None], 1e-6
    value, slope = value_and_slope(true_value, obs)
    ends = [true_value(obs, policy(obs) + sign * eps) for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * eps))
    torch.testing.assert_close(value, true_value(obs, policy(obs)))
    assert (slope > 0.4).all()
    critic = mage_td3.Critic(mage_td3.Normaliser(1), 1, 8, 3).double()
    value, slope = value_and_slope(critic, obs)
    ends = [critic(obs, policy(obs) + sign * eps) for sign in (1, -1)]
    assert slope.shape == value.shape == (3, 9)
    torch.testing.assert_close(slope, (ends[0] - ends[1]).detach() / (2 * eps))


def test_the_study_is_that_of_the_reference_and_its_ends_are_the_numbers_of_the_text():
    found = cosines(critic_slope.STUDY)
    ends = {run: values[-1] for run, (_, values) in found.items()}
    expected = {"frozen_mage_td3": 0.97, "frozen_td3": 0.96, "frozen_dyna_td3": -0.24}
    assert {run: round(end, 2) for run, end in ends.items()} == expected
    with open(critic_slope.STUDY, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["run"] == "frozen_td3" and r["step"] == "600"]
    steps, values = found["frozen_td3"]
    assert len(rows) == 4 and steps[0] == 0 and steps[-1] == 800
    assert values[steps == 400] == np.median([float(r["gradient_cosine"]) for r in rows])


def test_the_program_leaves_a_figure_and_the_numbers_of_its_curves(tmp_path, capsys):
    args = Args(tmp_path / "idea.png", steps=20, critics=2)
    critic_slope.main(args)
    assert (tmp_path / "idea.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "idea.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["action", "truth", "td_0", "td_1", "mage_0", "mage_1"] and len(rows) == 201
    critic = learn(args, True)(torch.zeros(1, 1), torch.full((1, 1), -1.0))[:, 0].tolist()
    assert [float(rows[0][f"mage_{k}"]) for k in range(2)] == pytest.approx(critic, abs=1e-4)
    assert re.search(r"\| both terms of mage_loss \| [\d.]+% \| [\d.]+% \|", capsys.readouterr().out)


@pytest.mark.parametrize("change, sentence", [
    (dict(steps=0), "--steps 0: give at least 1."),
    (dict(critics=0), "--critics 0: give at least 1."),
    (dict(study=Path("nowhere.csv")), "--study nowhere.csv is no file"),
    (dict(output=Path("idea.xyz")), "idea.xyz"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(change, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(critic_slope.BadInput, match=re.escape(sentence)):
        critic_slope.main(Args(**change))
    assert not list(tmp_path.iterdir())
