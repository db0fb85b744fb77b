"""python -m tests.gpu: it works at tiny sizes on a CPU, keeps to its minutes, and loses nothing it found."""

import csv
import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from common.acceleration import Graphed
from tests import agreement, conftest, gpu, speed
from tests.conftest import ROOT, SCRIPTS, tiny
from tests.test_emulated_graph import tapes  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", [True])


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_measured(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--minutes", "10", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(not found[part]["errors"] for part in gpu.SHARES)
    assert found["card"]["rows"][0]["versions"]["torch"] == torch.__version__
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in found["tests"]["rows"]}
    for name in SCRIPTS:
        outcome = outcomes[f"test_a_graph_gives_the_numbers_of_the_plain_run[{name}]"]
        assert outcome == ("passed" if torch.cuda.is_available() else "skipped")
    agreed = table(tmp_path / "agreement.csv")
    assert [(row["script"], row["accelerate"], float(row["weights_apart"])) for row in agreed] == [
        (name, "again", 0) for name in SCRIPTS
    ]
    updates = table(tmp_path / "updates.csv")
    assert {row["script"] for row in updates} == set(SCRIPTS) and len(updates) == 2 + 3 + 3 + 2
    assert all(float(row["ms"]) > 0 and int(row["launches"]) > 50 for row in updates)
    steps = table(tmp_path / "steps.csv")
    assert [row["script"] for row in steps] == SCRIPTS
    assert all(float(row["memory_mb"]) > 50 for row in steps)
    for name in gpu.TRAINED:
        curve = table(tmp_path / f"{name}/seed-0.csv")
        assert [row["step"] for row in curve] == ["0", "20", "40", "60"]
        assert [row["script"] for row in found["training"]["rows"]].count(name) == 4

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # there is little left to do
    assert again.returncode == 0 and again.stdout.count("is in gpu.json already") == 4
    assert "2 of them finished before" in (tmp_path / "training.log").read_text()
    later = json.loads((tmp_path / "gpu.json").read_text())
    assert later["speed"] == found["speed"] and table(tmp_path / "updates.csv") == updates


def test_training_is_stopped_in_time_and_saved(tmp_path, monkeypatch):
    endless = partial(tiny, total_timesteps=10**6)
    monkeypatch.setattr(conftest, "tiny", endless)
    measurement = gpu.Measurement("cpu", 1, tmp_path)
    measurement.result["agreement"] = {"rows": []}
    found, began = {"rows": [], "errors": []}, time.monotonic()
    measurement.train(found, began + 40)  # of which it gets 25 until the runs are told to end
    assert time.monotonic() < began + 40 and not found["errors"]
    for name in gpu.TRAINED:
        folder = tmp_path / f"runs/HalfCheetah-v4/{name}/seed-0"
        assert json.loads((folder / "args.json").read_text())["step"] > 0
        assert "saved at step" in folder.with_name("seed-0.log").read_text()
        assert table(tmp_path / f"{name}/seed-0.csv") == table(folder / "eval.csv")


# --- what goes wrong ----------------------------------------------------------------------------------------
@pytest.fixture
def play(monkeypatch):
    """A function that puts lines of Python in the place of the program that each part runs, and returns the
    list of what would have been run."""
    asked = []

    def put(**programs):
        def started(words, out, err, folder):
            asked.append(words)
            part = words[words.index("--part") + 1] if "--part" in words else "training"
            with open(out, "ab") as out, open(err, "ab") as err:
                program = [sys.executable, "-c", programs.get(part, "")]
                return subprocess.Popen(program, stdout=out, stderr=err, start_new_session=True)

        monkeypatch.setattr(gpu, "started", started)
        return asked

    return put


def run(folder, *words):
    """The command in this process -> its exit code, gpu.json."""
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--out", str(folder), *words])
    return end.value.code, json.loads((folder / "gpu.json").read_text())


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tmp_path, play, capsys):
    row = """print('{"script": "td3", "accelerate": "graph", "ms": 1}', flush=True); """
    print_json = f"import json; print(json.dumps(json.load(open('{tmp_path}/gpu.json'))))"
    play(tests="raise SystemExit('it is broken')", speed=print_json, agreement=row + "1 / 0",
         training="print('failed  seed-0: no memory'); raise SystemExit(1)")  # fmt: skip
    code, found = run(tmp_path)
    errors = {part: found[part]["errors"] for part in gpu.SHARES}
    assert code == 1 and not errors["card"] and not errors["speed"]
    assert errors["tests"] == ["ended with exit code 1: it is broken"]
    assert "ZeroDivisionError" in errors["agreement"][0] and found["agreement"]["rows"][0]["ms"] == 1
    assert errors["training"] == ["failed  seed-0: no memory"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[0] == "error: tests: ended with exit code 1: it is broken"
    # While a part runs, the file has those before it.
    (seen,) = found["speed"]["rows"]
    assert list(seen) == ["device", "minutes", "card", "tests", "agreement"]
    assert all(seen[part] == found[part] for part in ("card", "tests", "agreement"))


@pytest.mark.parametrize("apart, how", [
    ([], "compile"), (["mage_td3 compile"], "graph"), (["dyna_td3 compile"], "graph"),
    (["mage_td3 graph", "mage_td3 compile"], "none"), (["td3 compile", "maac_sac graph"], "compile"),
])  # fmt: skip
def test_what_is_asked_of_a_gpu(apart, how, tmp_path, play):
    pairs = [(name, way) for name in SCRIPTS for way in ("graph", "compile")]
    rows = [dict(script=name, accelerate=way, agrees=f"{name} {way}" not in apart) for name, way in pairs]
    asked = play(agreement=f"import json; [print(json.dumps(row)) for row in {rows}]")
    assert gpu.Measurement("cuda", 9, tmp_path).all()
    parts = [(words[-2], words[-1]) for words in asked[:-1]]
    assert parts[:2] == [("card", ""), ("tests", "")] and parts[2:6] == [("agreement", n) for n in SCRIPTS]
    ways = [f"{name}:{ways}" for ways in ("none graph", "compile") for name in SCRIPTS]
    assert [what.rpartition(":")[0] for _, what in parts[6:]] == ways  # what may take all the time comes last
    assert len({what.rpartition(":")[2] for _, what in parts[6:]}) == 1  # the file by which they wait
    *_, device, flag, value, _, _ = asked[-1]
    assert (device, flag, value) == ("cuda", "--accelerate", how)
    words = "common.benchmark --scripts dyna_td3 mage_td3 --env-ids HalfCheetah-v4 --seeds 1 --".split()
    assert asked[-1][: len(words)] == words


def test_a_part_that_hangs_is_stopped_and_what_it_found_is_kept(tmp_path, play):
    play(tests="""print('{"test": "one"}', flush=True); import time; time.sleep(60)""")
    began = time.monotonic()
    code, found = run(tmp_path, "--minutes", "0.25")
    assert code == 1 and time.monotonic() - began < 15
    assert found["tests"]["rows"] == [{"test": "one"}] and found["tests"]["seconds"] < 4
    assert found["tests"]["errors"] == ["was stopped, the time of this part was over"]
    assert not found["agreement"]["errors"]


def test_no_part_begins_when_the_time_is_over(tmp_path, play):
    play(card="import time; time.sleep(60)", tests="print('{\"test\": 1}')")
    measurement = gpu.Measurement("cpu", 9, tmp_path)
    measurement.began -= 9 * 60
    assert not measurement.all()
    for part in gpu.SHARES:
        assert measurement.result[part]["errors"] == ["no time was left for it: give more --minutes"]
        assert not measurement.result[part]["rows"]


def test_a_missing_package_is_named_with_what_to_do(tmp_path, play, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    play(card="print('{\"name\": \"a card\"}')", tests="print('{\"test\": 1}')")
    code, found = run(tmp_path)
    assert code == 1 and found["card"]["rows"] == [{"name": "a card"}] and not found["card"]["errors"]
    for part in ("tests", "agreement", "speed", "training"):
        (error,) = found[part]["errors"]
        assert error == "no_such_package is missing here: pip install -r requirements.txt"


@pytest.mark.parametrize("words, sentence", [
    (["--device", "cuda"], "PyTorch sees no CUDA device here"), (["--out", "FILE/folder"], "cannot be made"),
    (["--minutes", "0"], "give a number of minutes"), (["--minutes", "nan"], "give a number of minutes"),
])  # fmt: skip
def test_bad_input_is_one_sentence(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "out"), *words])
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and sentence in last and not (tmp_path / "out").exists()


# --- agreement and launches ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_ways_that_differ_in_one_update_do_not_agree(name, small, monkeypatch):
    def accelerate(function, how, device, optimizers):
        """Leaves out the last of the updates, the second time."""
        calls.append(0)
        mine, first = len(calls) - 1, len(calls) <= blocks

        def changed(*flags):
            calls[mine] += 1
            if first or calls[mine] < agreement.UPDATES:
                logs[mine % blocks] = function(*flags)
            return logs[mine % blocks]

        return changed

    calls, logs, blocks = [], {}, 2 if name in ("dyna_td3", "mage_td3") else 1
    assert all("error" not in row and row["agrees"] for row in agreement.compare(name, CPU))
    monkeypatch.setattr(agreement, "accelerate", accelerate)
    row, error = agreement.compare(name, CPU)
    assert row["weights_apart"] > 1.5 * max(agreement.FAR.values()) and not row["agrees"]
    assert f"{name}: again is" in error["error"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_graph_agrees_with_plain_functions_that_count_alike(name, small, tapes, monkeypatch):  # noqa: F811
    """With the emulated graph."""

    def accelerate(function, how, device, optimizers):
        for optimizer in optimizers if how == "graph" else ():
            optimizer.param_groups[0]["capturable"] = True
        return Graphed(function) if how == "graph" else function

    monkeypatch.setattr(agreement, "accelerate", accelerate)
    plain, graph = (agreement.learned(name, how, CPU) for how in ("capturable", "graph"))
    assert agreement.apart(graph[0], plain[0]) == 0 and graph[1] == plain[1]
    assert min(tape.replays for tape in tapes) > 2


def test_a_way_that_fails_is_said_and_the_others_are_compared(small, monkeypatch):
    monkeypatch.setattr(agreement, "learned", lambda name, how, device: 1 / 0)
    said = [row["error"] for row in agreement.compare("td3", CPU)]
    assert [error.split(":")[0] for error in said] == ["td3, none", "td3, again"]


X = torch.ones(4, 6)


@pytest.mark.parametrize("job, launches, flop", [
    (lambda: X + 1, 1, 0), (lambda: X @ X.T, 1, 192), (lambda: X.view(6, 4)[1:].T.detach(), 0, 0),
    (lambda: torch.empty_like(X), 0, 0), (lambda: X.sum().item(), 1, 0), (lambda: X.exp().add_(1), 2, 0),
    (lambda: torch._foreach_add([X, X], 1), 1, 0), (lambda: X.meta + 1, 0, 0),
    (lambda: torch.nn.functional.silu(X.clone().requires_grad_()).sum().backward(), 5, 0),
])  # fmt: skip
def test_launches_are_counted(job, launches, flop, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "meta", torch.ones(3, device="meta"), raising=False)
    gflop, found = speed.counted(job, CPU)
    assert (found, round(1e9 * gflop)) == (launches, flop)
