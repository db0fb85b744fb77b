"""How long a run will take: the arithmetic of the sentence, with a clock of the test, and the sentence."""

import re
from types import SimpleNamespace

import pytest
import torch

import common.run
from common import forecast
from common.args import parse_args
from common.envs import ReplayableEnv
from common.evaluate import evaluate
from common.forecast import Forecast, duration
from tests.conftest import SCRIPTS, script, train, words

CPU = torch.device("cpu")
SENTENCE = r"step (\d+): at (\S+) steps a second the remaining (\S+) steps take about (.*)"
UNITS = {"minutes": 60, "hours": 3600, "days": 86_400}


def settings(name, **changes):
    module = script(name)
    return parse_args(module.Args, module.PRESETS, words(changes))


def sentences(capsys):
    return capsys.readouterr().err.splitlines()


class Simulated:
    """A run of which every part takes a known time: random steps, learning, bursts, evaluations."""

    def __init__(self, args, resumed=0, burst=2.5, slow=20.0, evaluation=3.0, accelerated=0.0, device=CPU):
        self.args, self.now, self.ends = args, 1000.0, {}
        told, period = Forecast(args, device, resumed), getattr(args, "model_train_every", 10**9)
        if not resumed:
            told.evaluated(evaluation)
        for step in range(resumed + 1, args.total_timesteps + 1):
            learning = step - max(args.learning_starts, resumed)
            self.now += 0.01 if step <= args.learning_starts else 0.12 + slow * (learning <= forecast.WARM_UP)
            self.now += (burst + accelerated) * (step % period == 0)
            accelerated *= step % period != 0  # the first burst compiles
            if step % args.eval_every == 0:
                self.now += evaluation
                told.evaluated(evaluation)
            told.after(step, self.now)
            self.ends[step] = self.now

    def agrees_with(self, line):
        """Whether the numbers of the sentence are those of this run; returns its step."""
        step, rate, left, time = re.match(SENTENCE, line).groups()
        step, left = int(step), int(left.replace(",", ""))
        seconds = self.now - self.ends[step]
        value, unit = re.match(r"(\S+) (\w+)", time).groups()
        assert left == self.args.total_timesteps - step
        assert float(rate) == pytest.approx(left / seconds, rel=0.06)  # two digits
        assert float(value.replace(",", "")) * UNITS[unit] == pytest.approx(seconds, rel=0.06)
        return step


# --- the arithmetic -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("resumed", [0, 3010])
def test_the_sentence_says_once_how_long_the_rest_takes(name, resumed, capsys):
    """Also where the bursts of the model and the evaluations take most of the time, and the start is slow.
    A run that goes on has not evaluated yet when it says so."""
    args = settings(name, preset="laptop", eval_every=100, learning_starts=1000)
    run = Simulated(args, resumed, burst=30.0, evaluation=0.0 if resumed else 40.0)
    (line,) = sentences(capsys)
    period = getattr(args, "model_train_every", 42)  # td3.py: 42 steps are the 5 seconds that are measured
    assert run.agrees_with(line) == max(1000, resumed) + forecast.WARM_UP + period


@pytest.mark.parametrize("how, device, first", [
    ("none", "cpu", False), ("auto", "cpu", False), ("compile", "cpu", True), ("auto", "cuda", True),
])  # fmt: skip
def test_compiling_is_not_measured(how, device, first, capsys):
    args = settings("mage_td3", preset="laptop", accelerate=how, learning_starts=10)
    run = Simulated(args, accelerated=500.0, device=torch.device(device))
    (line,) = sentences(capsys)
    if first:
        run.agrees_with(line)
    else:  # a plain function has no slow first burst: here the clock has seen it
        with pytest.raises(AssertionError):
            run.agrees_with(line)


@pytest.mark.parametrize("changes", [
    dict(total_timesteps=1700),  # 81 seconds are left
    dict(learning_starts=10_000),  # it never learns
    dict(total_timesteps=1020),  # it ends while the clock runs
])  # fmt: skip
def test_a_run_that_soon_ends_says_nothing(changes, capsys):
    args = settings("td3", **dict(preset="laptop", env_id="Pusher-v4") | changes)
    Simulated(args, slow=0.0)
    assert not sentences(capsys)


@pytest.mark.parametrize("seconds, text", [
    (90, "1.5 minutes"), (25 * 60, "25 minutes"), (100 * 60, "100 minutes"), (8.3 * 3600, "8.3 hours"),
    (40 * 3600, "40 hours"), (56 * 3600, "2.3 days"), (300 * 86_400, "300 days"),
])  # fmt: skip
def test_a_time_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == f"about {text}"


# --- the preset ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, device, named", [
    ("paper", "cpu", True), ("laptop", "cpu", False), ("paper", "cuda", False), ("laptop", "cuda", False),
])  # fmt: skip
def test_only_the_papers_settings_on_a_cpu_name_the_laptop_preset(preset, device, named, capsys):
    args = settings("mage_td3", preset=preset, accelerate="none")
    told = Forecast(args, torch.device(device), 0)
    told.warn()
    before = sentences(capsys)
    for step in range(1, 1036):
        told.after(step, 2.0 * step)
    (line,) = sentences(capsys)
    assert len(before) == named and all("--preset laptop" in text for text in before)
    assert ("--preset laptop" in line) == named and line.endswith(".")
    seconds = 2.0 * (args.total_timesteps - 1035)
    assert duration(seconds) in line


@pytest.mark.parametrize("changes, step", [
    (dict(total_timesteps=1500), 0), ({}, 1), (dict(preset="laptop"), 0),
])  # fmt: skip
def test_no_warning_where_none_is_needed(changes, step, capsys):
    """A short run; one that goes on, whose user has seen it; one with the other preset."""
    Forecast(settings("mage_td3", **changes), CPU, step).warn()
    assert not sentences(capsys)


# --- a run --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["td3", "mage_td3"])  # without a model and with one
def test_a_run_says_how_long_it_will_take(name, tmp_path, monkeypatch, capsys):
    """A real run beside a clock on which a step of training takes a second, and an evaluation fifty."""
    clock = SimpleNamespace(now=0.0)

    def takes(seconds, function):
        def slow(*args, **how):
            clock.now += seconds
            return function(*args, **how)

        return slow

    monkeypatch.setattr(common.run, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(common.run, "evaluate", takes(50, evaluate))
    monkeypatch.setattr(ReplayableEnv, "step", takes(1, ReplayableEnv.step))

    def lines(total, **changes):
        train(name, tmp_path / "run", total_timesteps=total, eval_max_steps=5, **changes)
        return [line for line in sentences(capsys) if "steps a second" in line]

    # The clock runs from step 30, over 20 steps or over five seconds, and without the evaluation at step 40.
    # 165 steps and 9 evaluations take 615 seconds, 150 steps and 8 evaluations take 550.
    step, left, time = (35, 165, "10 minutes") if name == "td3" else (50, 150, "9.2 minutes")
    assert lines(200, checkpoint_every=10**6) == [
        f"step {step}: at 0.27 steps a second the remaining "
        f"{left} steps take about {time} (--preset paper on a CPU); {forecast.INSTEAD}"
    ]
    assert not lines(220, resume=True)  # the 20 steps that are left are over before the clock is read
    (line,) = lines(340, resume=True)
    assert line.startswith("step 235: at " if name == "td3" else "step 250: at ")


@pytest.mark.parametrize("total, said", [(1000, True), (1001, False)])
def test_a_run_that_ends_before_anything_is_learned_says_so(total, said, capsys):
    Forecast(settings("mage_td3", total_timesteps=total, learning_starts=1000), CPU, 0).warn()
    expected = f"--total-timesteps {total}: nothing is learned, as the first 1000 steps are random"
    assert (expected in capsys.readouterr().err) == said
