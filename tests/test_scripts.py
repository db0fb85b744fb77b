"""The scripts are one text: what two of them share is the same character for character, and all stay short.

`python -m tests.test_scripts --fix` copies the text of the lowest script on the ladder over the others'.
"""

import ast
import difflib
import importlib
import io
import re
import shutil
import sys
import tokenize
from functools import cache

import pytest

from common.args import LIMITS
from tests.conftest import DYNA, LADDER, ROOT, SCRIPTS, TD3, fields, script

REPAIR = "python -m tests.test_scripts --fix"
BUDGETS = {"td3": 210, "dyna_td3": 285, "mage_td3": 300, "maac_sac": 400}  # lines of code
REASONS = {  # why a script has a text of its own: what the others share still agrees
    "td3": {
        "PAPER_CLASSIC LAPTOP LAPTOP_CLASSIC": "there is no model to set",
        "Args.updates_per_step": "the model-free baseline learns once for each step",
        "train.update": "the batch is replayed, not imagined",
        "networks": "there is no model",
    },
    "mage_td3": {"train.update": "the critic's loss is what MAGE is"},
    "maac_sac": {
        """Args.learning_starts Args.updates_per_step Args.batch_size Args.tau Args.lr Args.actor_hidden
        Args.critic_hidden Args.model_hidden Args.model_lr Args.model_train_every
        LAPTOP LAPTOP_CLASSIC PRESETS LOGVAR""": "another paper has other values",
        "Actor actor_loss train.update load_policy": "the actor is stochastic and can plan with the model",
        "descend": "no gradient is clipped",
        "networks": "the target has no actor, and no reward is learned",
    },
}
OWN = {(name, part) for name, parts in REASONS.items() for group in parts for part in group.split()}
PATHS = {name: ROOT / f"{name}.py" for name in SCRIPTS}
COMMON = sorted((ROOT / "common").rglob("*.py"))


# --- what a script consists of ------------------------------------------------------------------------------
def named(tree):
    """(name, node) of what is compared: top-level names, the fields of Args, the functions inside train."""
    for node in tree.body:
        name = getattr(node, "name", None)
        if name == "Args":
            yield from ((f"Args.{x.target.id}", x) for x in node.body if isinstance(x, ast.AnnAssign))
        elif name == "train":
            yield from ((f"train.{x.name}", x) for x in node.body if isinstance(x, ast.FunctionDef))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield name, node
        elif isinstance(node, ast.Assign):
            yield ast.unparse(node.targets), node
        elif isinstance(node, ast.If):
            yield ast.unparse(node.test), node


def blocks(path):
    """{name: (first line, line after the last one)} of a script; its section comments are names as well."""
    return blocks_of(path.read_text())


@cache
def blocks_of(source):
    lines, found = source.splitlines(), []
    for name, node in named(ast.parse(source)):
        start = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1
        while re.match(r" *#(?! ---)", lines[start - 1]):  # the comments above belong to it
            start -= 1
        found.append((name, (start, node.end_lineno)))
    for number, line in enumerate(lines):
        if match := re.match(r"( *# --- .*?)[ -]*$", line):
            found.append((match[1], (number, number + 1)))
    assert len(found) == len(dict(found)), f"two parts have one name: {sorted(name for name, _ in found)}"
    return dict(sorted(found, key=lambda part: part[1]))


def text(path, name):
    return path.read_text().splitlines(keepends=True)[slice(*blocks(path)[name])]


def differences(folder=ROOT):
    """[(name, path that is right, path that differs)]; right is the script lowest on the ladder."""
    parts = {path: blocks(path) for path in (folder / f"{name}.py" for name in SCRIPTS)}
    found = []
    for name in dict.fromkeys(name for names in parts.values() for name in names):
        sharing = [path for path in parts if name in parts[path] and (path.stem, name) not in OWN]
        found += [(name, sharing[0], p) for p in sharing[1:] if text(p, name) != text(sharing[0], name)]
    return found


def report(found):
    """The differing lines of each name, and the command that repairs them."""
    lines = []
    for name, right, path in found:
        diff = difflib.unified_diff(text(right, name), text(path, name), right.name, path.name)
        lines += [f"\n{name}\n", *diff]
    return "".join([*lines, f"\n`{REPAIR}` copies the first of each pair over the second.\n"])


def fix(folder=ROOT):
    """Copies the right text over each one that differs."""
    found = [(blocks(path)[name], path, text(right, name)) for name, right, path in differences(folder)]
    for span, path, wanted in sorted(found, reverse=True):  # from below, so that no span moves
        lines = path.read_text().splitlines(keepends=True)
        lines[slice(*span)] = wanted
        path.write_text("".join(lines))


# --- shared text --------------------------------------------------------------------------------------------
def test_shared_text_is_the_same_text():
    found = differences()
    assert not found, report(found)


@pytest.mark.parametrize("changed", SCRIPTS[1:])
def test_every_difference_is_found_shown_and_repaired(changed, tmp_path):
    """A mark at the end of every block that a script shares with a lower one, and nowhere else."""
    for path in PATHS.values():
        shutil.copy(path, tmp_path)
    fix(tmp_path)
    path = tmp_path / f"{changed}.py"
    before, parts = path.read_text(), blocks(path)
    lower = {(rung, name) for rung in SCRIPTS[: SCRIPTS.index(changed)] for name in blocks(PATHS[rung])}
    shared = {name for _, name in lower - OWN} & {name for name in parts if (changed, name) not in OWN}
    lines = before.splitlines()
    for name in shared:
        lines[parts[name][1] - 1] += "-" if "# ---" in name else "  # changed"
    path.write_text("\n".join(lines) + "\n")

    found = differences(tmp_path)
    assert {name for name, _, _ in found} == shared and len(shared) > 30
    shown = report(found)
    assert shown.count("  # changed\n") == sum("# ---" not in name for name in shared) and REPAIR in shown
    fix(tmp_path)
    assert path.read_text() == before


@pytest.mark.parametrize("name, part", sorted(key for key in OWN if key[0] in SCRIPTS))
def test_an_exception_is_needed(name, part):
    others = [path for other, path in PATHS.items() if other != name and part in blocks(path)]
    assert others and text(PATHS[name], part) not in [text(path, part) for path in others]


def test_mage_is_at_most_40_lines_of_code_away_from_dyna():
    bodies = code(PATHS["dyna_td3"]), code(PATHS["mage_td3"])
    changed = [line for line in difflib.ndiff(*bodies) if line[0] in "+-"]
    assert 0 < len(changed) <= 40, "\n".join(changed)


# --- size and structure -------------------------------------------------------------------------------------
def imports(node, in_functions):
    """Names of the modules, and of what is taken from them, imported below a node of the syntax tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module
            yield from (f"{child.module}.{name.name}" for name in child.names)
        elif in_functions or not isinstance(child, ast.FunctionDef):
            yield from imports(child, in_functions)


def loaded_by_scripts():
    """The files of common/ that a script loads when it starts, and what its environment loads by name."""
    found, queue = {ROOT / "common/tasks.py"}, [*PATHS.values(), ROOT / "common/tasks.py"]
    while queue:
        named = imports(ast.parse(queue.pop().read_text()), in_functions=False)
        files = {ROOT / name.replace(".", "/") for name in named if name.split(".")[0] == "common"}
        paths = {path for file in files for path in (file / "__init__.py", file.with_suffix(".py"))}
        queue += [path for path in paths & set(COMMON) - found]
        found |= paths & set(COMMON)
    return found


NEEDED = loaded_by_scripts()


def code(path):
    """The lines of code of a file: explanation, that is comments, docstrings and blank lines, is free."""
    source, documented, lines = path.read_text(), set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        free = token.type == tokenize.COMMENT or not token.string.strip()
        for number in range(token.start[0], token.end[0] + 1) if not free else ():
            if number not in documented:
                lines.setdefault(number, []).append(token.string)
    return [" ".join(lines[number]) for number in sorted(lines)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_to_its_budget_of_code(name):
    assert len(code(PATHS[name])) <= BUDGETS[name]


def test_common_keeps_to_its_budget_of_lines():
    """What the scripts load of it is to stay smaller than they are, apart from what environments are."""
    sizes = {path: len(code(path)) for path in COMMON}
    assert not {path: lines for path, lines in sizes.items() if lines > 220}
    needed = {path: lines for path, lines in sizes.items() if path in NEEDED}
    assert sum(needed.values()) <= 1500
    machinery = sum(lines for path, lines in needed.items() if path.stem not in ("rewards", "tasks"))
    assert machinery < sum(len(code(path)) for path in PATHS.values()), needed


@pytest.mark.parametrize("path", [*PATHS.values(), *COMMON], ids=lambda path: path.stem)
def test_lines_fit_into_110_columns(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not {number: len(line) for number, line in lines if len(line) > 110}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loss_has_at_most_40_lines(name):
    section, lengths = None, {}
    for part, (start, end) in blocks(PATHS[name]).items():
        section = part if part.startswith("# ---") else section
        if section == "# --- losses" and part != section:
            lengths[part] = end - start
    assert any(part.endswith("_loss") for part in lengths)
    assert not {part: lines for part, lines in lengths.items() if lines > 40}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_no_other_script(name):
    imported = set(imports(ast.parse(PATHS[name].read_text()), in_functions=True))
    assert "torch" in imported and not imported & {*LADDER, "tests"}


def test_importing_common_imports_no_script():
    imported = {x for path in NEEDED for x in imports(ast.parse(path.read_text()), in_functions=False)}
    assert "torch" in imported and not imported & {*LADDER, "tests"}


@pytest.mark.parametrize("path", [*PATHS.values(), *COMMON], ids=lambda path: path.stem)
def test_no_check_is_an_assert(path):
    """`python -O` drops them."""
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]


# --- names that users rely on -------------------------------------------------------------------------------
FLAGS = [  # (scripts, flags of all of them)
    (SCRIPTS, """env_id seed total_timesteps preset device threads exp_name run_dir resume checkpoint_every
        eval_every eval_episodes learning_starts buffer_size batch_size gamma tau lr actor_hidden
        critic_hidden num_critics layer_norm updates_per_step"""),
    (TD3, "policy_delay target_noise noise_clip exploration_noise huber_threshold"),
    (SCRIPTS[1:], "ensemble_size model_hidden model_layers model_lr model_train_every"),
    (DYNA, "model_batches learned_reward oracle_dynamics"),
    (["mage_td3"], "lam"),
    (["maac_sac"], "horizon num_samples steve steve_horizon real_ratio rollout_length target_entropy"),
]  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_its_flags(name):
    promised = {flag for scripts, flags in FLAGS if name in scripts for flag in flags.split()}
    assert len(promised) > 20 and not promised - set(fields(name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_used_from_python(name):
    module = script(name)
    assert callable(module.train) and callable(module.load_policy)
    assert {"paper", "laptop"} <= set(module.PRESETS)


def test_every_limit_is_that_of_a_flag():
    assert not set(LIMITS) - {field for name in SCRIPTS for field in fields(name)}


# --- the READMEs --------------------------------------------------------------------------------------------
LINK = re.compile(r"\[(\w+)\]\((\S+\.py)#L(\d+)\)")
READMES = [ROOT / folder / "README.md" for folder in (".", "tests", "tests/reference")]


def linked(path):
    """A README with the numbers of the lines where what it links to begins."""

    def line_of(match):
        name, file, _ = match.groups()
        starts = [f"def {name}(", f"class {name}(", f"class {name}:"]
        lines = (path.parent / file).read_text().splitlines()
        (number,) = (n for n, line in enumerate(lines, 1) if any(map(line.startswith, starts)))
        return f"[{name}]({file}#L{number})"

    return LINK.sub(line_of, path.read_text())


def test_the_readmes_link_to_the_right_lines():
    found = {path: len(LINK.findall(path.read_text())) for path in READMES}
    assert found[READMES[0]] >= 8 and found[READMES[2]] >= 1
    for path in READMES:
        assert linked(path) == path.read_text(), f"run {REPAIR}"


def test_the_readmes_link_to_files_and_headings_that_exist():
    """A heading's anchor is its words in small letters with hyphens, as GitHub makes it."""
    links = 0
    for path in READMES:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            other = (path.parent / file).resolve() if file else path
            assert other.exists(), f"{path}: {target}"
            if anchor and other.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in anchors, f"{path}: {target}"
            links += 1
    assert links > 20


def test_no_line_of_a_paragraph_begins_like_a_list():
    """Our lists have hyphens and small numbers; "* log_prob" or "8000." at the start of a line is text."""
    for path in READMES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(r"^(?:[*+] |\d\d+\. ).*$", text, re.MULTILINE), path


TOOLS_OF_TESTS = ("cheetah_on_its_back", "final_critics", "pusher_at_its_limits", "record_pusher", "speed",
                  "values_of_critics")  # fmt: skip


@pytest.mark.parametrize("name", TOOLS_OF_TESTS)
def test_the_programs_beside_the_tests_still_start(name):
    assert importlib.import_module(f"tests.{name}").__doc__


def test_the_readme_names_tests_that_exist():
    text, file, names = (ROOT / "tests/README.md").read_text(), None, 0
    for found in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = found[0] or file
        if file and found[1]:
            names += 1
            assert f"def {found[1]}(" in (ROOT / "tests" / file).read_text(), found[1]
    assert names > 20


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(f"usage: {REPAIR}")
    print(report(differences()))
    fix()
    for path in READMES:
        path.write_text(linked(path))
