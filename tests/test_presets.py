"""What --help says that the laptop preset buys is what the runs in tests/reference took and returned."""

import csv
import re

import pytest

from tests.conftest import ROOT, SCRIPTS, script

REFERENCE = ROOT / "tests" / "reference"
HALFCHEETAH = "HalfCheetah-v4"
FOLDERS = {  # the runs that the table of a script is about
    "td3": [f"laptop/{env_id}/td3_10_updates" for env_id in ("Pendulum-v1", HALFCHEETAH, "Pusher-v4")],
    "dyna_td3": [f"laptop/{env_id}/dyna_td3" for env_id in ("Pendulum-v1", HALFCHEETAH, "Pusher-v4")],
    "mage_td3": [f"laptop/{env_id}/mage_td3" for env_id in ("Pendulum-v1", HALFCHEETAH, "Pusher-v4")],
    "maac_sac": [
        "laptop/Pendulum-v1/maac",
        f"random_5000/{HALFCHEETAH}/maac",
        f"random_5000/{HALFCHEETAH}/maac_soft",
        f"random_5000/{HALFCHEETAH}/maac_steve_soft",
    ],
}
FLAGS = {  # with which they were made
    **{folder: "--updates-per-step 10" for folder in FOLDERS["td3"]},
    f"laptop/{HALFCHEETAH}/dyna_td3": "--accelerate compile",
    f"laptop/{HALFCHEETAH}/mage_td3": "--accelerate compile",
    f"random_5000/{HALFCHEETAH}/maac_soft": "--soft-targets",
    f"random_5000/{HALFCHEETAH}/maac_steve_soft": "--soft-targets --steve",
}


def ends(folder):
    """The last rows of the runs in a folder of tests/reference, a row for each seed."""
    files = sorted((REFERENCE / folder).glob("seed-*.csv"))
    return [list(csv.DictReader(file.open(newline="")))[-1] for file in files]


def span(values):
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def row(folder):
    """What the table says of the runs in a folder: steps, minutes, returns, seeds."""
    last = ends(folder)
    (steps,) = {int(end["step"]) for end in last}
    minutes = span([float(end["seconds"]) / 60 for end in last])
    returns = span([float(end["return_mean"]) for end in last])
    env_id, seeds = folder.split("/")[1], f"{len(last)} seed{'s' * (len(last) > 1)}"
    return f"- {env_id}, {steps:,} steps: {minutes} minutes, {returns} ({seeds})"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_the_laptop_preset_takes_and_returns(name):
    text = " ".join(script(name).Args.__doc__.split())
    head, *_ = text.split(" - ")
    rows = [row(folder) for folder in FOLDERS[name]]
    assert " ".join(rows) == " ".join(re.findall(r"- \S+, [^-]* steps: .*? seeds?\)", text))
    for folder, line in zip(FOLDERS[name], rows, strict=True):
        env_id, flags = folder.split("/")[1], FLAGS.get(folder, "")
        assert flags in head or f"{line} with {flags} " in text
        preset = script(name).PRESETS["laptop"]
        assert int(ends(folder)[0]["step"]) == preset.get(env_id, preset["*"])["total_timesteps"]


@pytest.mark.parametrize("name, folder, said", [
    ("dyna_td3", "laptop/Pendulum-v1/dyna_td3", "Four seeds of the pendulum end above -150."),
    ("mage_td3", "ablations/Pendulum-v1/mage_lam_0.2", "one seed of the pendulum ended at -813."),
])  # fmt: skip
def test_help_names_the_pendulum_that_fell(name, folder, said):
    returns = sorted(float(end["return_mean"]) for end in ends(folder))
    assert len(returns) == 5 and returns[0] < -700 and returns[1] > -150
    assert said in " ".join(script(name).Args.__doc__.split())
    assert "-813" not in said or f"{returns[0]:.0f}" == "-813"
