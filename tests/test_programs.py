"""Every command that a README, a header or a program's docstring prints is run, at a tiny size.

What stands there is taken as it is, but for its sizes: flags of the tests are added behind, so that they win.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import BadInput
from tests.conftest import ROOT, SCRIPTS, fields, train, words
from tests.conftest import TINY as SIZES

TINY = {name: value for name, value in SIZES.items() if name != "env_id"} | {"eval_max_steps": 20}
# What a reader fills in.
PLACES = {"ENV": "Pendulum-v1", "N": "0", "L": "0.2", "ADDRESS": "local", "mine": "dyna_td3"}
# They change files, or are run by a test of their own, or are this.
NOT_HERE = ("-m pytest", "-m tests.test_", "-m tests.gpu", "tests/record_pusher.py", "-O",
            "experiments.mage_gradients")  # fmt: skip
# Programs that look at a run.
LOOKS = ("cheetah_on_its_back", "pusher_at_its_limits", "final_critics", "values_of_critics")
SOURCES = ["README.md", "tests/README.md", "tests/reference/README.md", *(f"{name}.py" for name in SCRIPTS)]
SOURCES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "common").rglob("*.py"))
SOURCES += ["tests/speed.py", *(f"tests/{name}.py" for name in LOOKS)]


def commands(text):
    """The commands in a text: lines of blocks and docstrings, and what stands between backquotes."""
    inline = [" ".join(found.split()) for found in re.findall(r"`(python [^`]+)`", text)]
    lines = [re.sub(r"^.*?(?=python -m)|  +#.*$", "", line).strip() for line in text.splitlines()
             if re.match(r"( *|\"\"\".*: )python (-m )?[\w./]+", line)]  # fmt: skip
    return [line for line in dict.fromkeys(inline + lines) if re.match(r"python (-m )?[\w./]+", line)]


FOUND = {command for source in SOURCES for command in commands((ROOT / source).read_text())}
ALL = sorted(command for command in FOUND if not any(part in command for part in NOT_HERE))


def test_commands_are_found():
    assert len(ALL) > 25
    for part in ("mage_td3.py", "maac_sac.py --soft-targets --horizon 0", "common.plot", "common.benchmark",
                 "common.evaluate", "common.experiments.maac_horizon", "tests.speed",
                 "tests.cheetah_on_its_back"):  # fmt: skip
        assert any(part in command for command in ALL), part


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs/ in it, as it lies beside the scripts after some use."""
    folder = tmp_path_factory.mktemp("programs")
    made = {"mage_td3": ("Pendulum-v1", "Pusher-v4"), "maac_sac": ("Pendulum-v1", "HalfCheetah-v4")}
    for name, env_id in [(name, env_id) for name, env_ids in made.items() for env_id in env_ids]:
        train(name, folder / "runs" / env_id / name / "seed-0", env_id=env_id, eval_max_steps=20)
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / ".github").mkdir()
    return folder


def small(argv):
    """The command at a tiny size."""
    name = argv[1] if argv[0] == "-m" else argv[0]
    argv = [PLACES.get(word, word) for word in argv]
    robot = "runs/HalfCheetah-v4/maac_sac/seed-0"
    runs = {"cheetah_on_its_back": robot, "true_derivatives": robot, "values_of_critics": robot,
            "pusher_at_its_limits": "runs/Pusher-v4/mage_td3/seed-0"}  # fmt: skip
    run = runs.get(name.rpartition(".")[2], "runs/Pendulum-v1/maac_sac/seed-0")
    argv = [run if word in ("RUN", "RUN_FOLDER", "RUN_FOLDERS") else word for word in argv]
    if name.removeprefix("tests.") in LOOKS:
        last = "runs/Pendulum-v1/mage_td3/seed-0" if name.endswith("final_critics") else run
        return argv[:2] + [last]
    script = "mage_td3" if name.endswith("mage_in_mujoco") else name.removesuffix(".py")
    if script in SCRIPTS:
        return argv + words({field: value for field, value in TINY.items() if field in fields(script)})
    if name == "common.benchmark":
        scripts = [word for word in argv if word in SCRIPTS]
        sizes = {k: v for k, v in TINY.items() if all(k in fields(script) for script in scripts)}
        argv += ["--"] * ("--" not in argv)
        argv[argv.index("--") : argv.index("--")] = ["--seeds", "1"]  # the last one counts
        return argv + words(sizes)
    if name == "tests.speed":
        return [*argv[:2], "--tiny"]
    more = {"common.evaluate": "--episodes 2 --max-steps 20",
            "common.experiments.maac_horizon":
                "--seeds 1 --steps 30 --horizon 3 --critic-updates 5"}  # fmt: skip
    return argv + more.get(name, "").split()


def prepared(command):
    """The words of the command as bash makes them, at a tiny size; the same ones run once."""
    words = shlex.split(command.removeprefix("python ").replace("$lam", "0.2").translate(BRACKETS))
    figure = words.index("-o") if "-o" in words else len(words)  # one figure is as good as another
    return tuple(small(words[:figure] + words[figure + 2 :]))


BRACKETS = str.maketrans("", "", "[]")
ONCE = sorted({prepared(command): command for command in ALL}.values())


@pytest.mark.parametrize("command", ONCE)
def test_a_printed_command_works(command, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "here", symlinks=True)
    if re.match(r"python \w+.py|python -m common.benchmark", command):  # it has the folder for itself
        shutil.rmtree(tmp_path / "here/runs")
    line = command.removeprefix("python ").translate(BRACKETS)
    shell = ["bash", "-c", f"lam=0.2; printf '%s\\n' {line}"]
    bash = subprocess.run(shell, text=True, cwd=tmp_path / "here", capture_output=True)
    argv = small(bash.stdout.splitlines())
    argv[0] = argv[0] if argv[0] == "-m" else str(ROOT / argv[0])
    surroundings = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=tmp_path / "here", env=surroundings,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"
    if argv[:2] == ["-m", "tests.speed"]:
        for part in ("mage_td3   none", "naive", "MAGE / Dyna-TD3", "--num-samples", "steps/s"):
            assert part in done.stdout


@pytest.mark.parametrize("name", LOOKS)
def test_a_program_that_looks_at_a_run_refuses_another_in_one_sentence(name, runs):
    """Each is for runs on certain environments, and none is for those of maac_sac.py on the pendulum."""
    surroundings = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", f"tests.{name}", "runs/Pendulum-v1/maac_sac/seed-0"]
    done = subprocess.run(argv, cwd=runs, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*Pendulum-v1.*\.\n", done.stderr)


@pytest.mark.parametrize("name", LOOKS)
def test_a_program_that_looks_at_a_run_needs_one(name):
    main = importlib.import_module(f"tests.{name}").main
    several = name in ("final_critics", "values_of_critics")
    with pytest.raises(BadInput, match="nowhere"):
        main(["nowhere"] if several else "nowhere")
    if several:
        with pytest.raises(BadInput, match="at least one run"):
            main([])


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "common/experiments").glob("*.py")
                                        if "needs(" in p.read_text() and p.stem != "__init__"))  # fmt: skip
def test_an_experiment_without_its_scripts_says_which_it_needs(name, tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "common")
    command = [sys.executable, "-m", f"common.experiments.{name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: this experiment needs .*\w+\.py beside common/\.\n", done.stderr)
