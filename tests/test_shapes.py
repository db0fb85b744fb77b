"""The shapes in the trailing comments, `# (N, B, da)`, are those of the tensors of a real update.

A letter has one meaning in a whole script. In a function that is called with different numbers of rows,
M and n are the rows that it was given; and H in `steve_targets` and `plan_action` is their own argument.
"""

import ast
import re
import sys
from collections import defaultdict

import pytest
import torch

from tests.conftest import ROOT, SCRIPTS, fields, script, words
from tests.inner_functions import fill, inner_functions

SETTINGS = dict(
    env_id="Hopper-v4", preset="laptop", ensemble_size=5, batch_size=35, buffer_size=600, learned_reward=True,
    model_hidden=9, critic_hidden=9, actor_hidden=9, reward_hidden=9, horizon=4, steve_horizon=6,
    num_samples=8, num_critics=2, real_ratio=0.5, model_buffer_size=600, steve=True,
)  # fmt: skip
OF_A_CALL = {  # function: what a letter means in a call of it, from its arguments and local variables
    "train_model": lambda here: dict(M=256),
    "model_loss": lambda here: dict(M=here["obs"].shape[1]),
    "model_losses": lambda here: dict(M=here["obs"].shape[1]),
    "sample": lambda here: dict(n=len(here["obs"])) if "obs" in here else {},
    "steve_targets": lambda here: dict(H=here["horizon"]),
    "plan_action": lambda here: dict(
        n=len(here["obs"]), C=here["candidates"], E=here["elites"], H=here["horizon"]
    ),
}


def comments(source):
    """{first line: (last line, assigned names, None for a return, comment)} where it is a shape."""
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Return):
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            names = None
            if not isinstance(node, ast.Return):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                names = [x.id for x in ast.walk(target) if isinstance(x, ast.Name)]
            if comment.startswith("("):
                found[node.lineno] = (node.end_lineno, names, comment)
    return found


def listed(comment):
    """The shapes with which a comment begins: '(B, ds), (B,): two of (3)' -> ['B, ds', 'B,']."""
    part = r"\(([^()]*)\)"
    return re.findall(part, re.match(rf"{part}(?:, {part}|, \.\.\.)*", comment)[0])


def shapes(comment, letters):
    """'(N, K B), (H + 1,)' -> [(2, 175), (7,)], an error where it is no shape or has an unknown letter."""
    found = []
    for inside in listed(comment):
        sizes = [re.sub(r"(?<=\w) (?=\w)", " * ", s.strip()).replace("/", "//") for s in inside.split(",")]
        found.append(tuple(eval(size, {"__builtins__": {}}, dict(letters)) for size in sizes if size))
    return found


def checked(name, source=None):
    """Runs the script's functions -> lines with a shape, lines that were reached, {line: what is wrong}."""
    module = script(name)
    path, argv = module.__file__, words({f: v for f, v in SETTINGS.items() if f in fields(name)})
    functions, inside = inner_functions(name, argv, torch.device("cpu"))
    fill(inside, 500)
    args, buffer = inside["args"], inside.get("buffer", inside.get("real"))
    letters = dict(B=args.batch_size, ds=buffer.widths[0], da=buffer.widths[1], N=args.num_critics)
    letters |= dict(K=getattr(args, "ensemble_size", 0), H=getattr(args, "horizon", 0))
    letters |= dict(S=getattr(args, "num_samples", 0))
    stated = comments(source or (ROOT / f"{name}.py").read_text())
    reached, wrong, at = set(), defaultdict(set), {}

    def verify(line, frame, result):
        end, names, comment = stated[line]
        here = frame.f_locals
        own = OF_A_CALL.get(frame.f_code.co_name, lambda here: {})(here)
        try:
            expected = shapes(comment, letters | own)
        except (SyntaxError, NameError, TypeError):
            wrong[line].add(f"not a shape: {comment}")
            return
        reached.add(line)
        values = [(name, here[name]) for name in names] if names is not None else [("returned", result)]
        if len(expected) == 1 and "..." not in comment:
            expected = expected * len(values)
        if len(expected) != len(values) and "..." not in comment:
            wrong[line].add(f"{len(values)} tensors: {comment}")
        for (name, value), shape in zip(values, expected, strict=False):
            if not torch.is_tensor(value) or tuple(value.shape) != shape:
                wrong[line].add(f"{name} is {tuple(getattr(value, 'shape', ()))}: {comment}, {shape}")

    def trace(frame, event, result):
        if frame.f_code.co_filename != path:
            return None
        line = at.get(id(frame))
        if line and (event == "return" or event == "line" and not line <= frame.f_lineno <= stated[line][0]):
            if event == "line" or result is not None or stated[line][1] is not None:
                verify(line, frame, result)
            line = None
        if event == "line":
            line = frame.f_lineno if frame.f_lineno in stated else line
        at[id(frame)] = line if event != "return" else None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for f in functions.values():
            f(True) if f.__name__ == "update" and name != "maac_sac" else f()
        if name == "maac_sac":
            the = {n: inside[n] for n in ("actor", "critic", "model", "real", "imagined", "step_shuffled")}
            mask = module.HeldOut(600, args.ensemble_size).mask
            module.fit_model(the["model"], module.adam(the["model"], 1e-3), the["real"], mask, max_epochs=2)
            module.imagine_data(the["actor"], the["step_shuffled"], the["real"], the["imagined"], 20, 2)
            obs = the["real"].sample(13)[0]
            module.plan_action(the["actor"], the["critic"], the["step_shuffled"], obs, 0.9, 3, 20, 2, 6)
    finally:
        sys.settrace(before)
    return set(stated), reached, dict(wrong)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_shape_is_that_of_the_tensor(name):
    stated, reached, wrong = checked(name)
    assert not wrong
    assert reached == stated and len(stated) >= {"td3": 4, "maac_sac": 14}.get(name, 9)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_letter_is_declared_in_the_header(name):
    """In the paragraph that begins with "Shapes:", as "B is", "K that" or "M the"."""
    source = (ROOT / f"{name}.py").read_text()
    paragraph = re.search(r"\nShapes: (.*?)\n\n", ast.get_docstring(ast.parse(source)), re.DOTALL)[1]
    declared = set(re.findall(r"\b([A-Zn]|ds|da) (?:is|the|that)\b", paragraph))
    found = [part for _, _, comment in comments(source).values() for part in listed(comment)]
    used = {letter for part in found for letter in re.findall(r"[A-Za-z]+", part)}
    assert used <= declared and {"B", "ds", "da", "N"} <= declared


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("change", ["(7, ", "(seven, ", "(7 +, ", "; ("])
def test_a_wrong_or_unreadable_shape_is_seen_at_every_line(name, change):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    stated = comments("\n".join(lines))
    for end, _, _ in stated.values():
        code, _, comment = lines[end - 1].partition("  # ")
        changed = change + comment[1:] if change != "; (" else comment.replace(")", " ?)", 1)
        lines[end - 1] = f"{code}  # {changed}"
    assert set(checked(name, "\n".join(lines))[2]) == set(stated)
