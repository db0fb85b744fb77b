"""The tables of results in tests/reference/README.md say what the files in tests/reference say.

A table below a comment <!-- laptop/Pendulum-v1 --> is about the runs in that folder, or that file: a row for
each, a number for each seed. `python -m tests.test_reference --fix` writes the numbers anew.
"""

import csv
import re
import sys

import pytest

from tests.conftest import ROOT

REFERENCE = ROOT / "tests" / "reference"
TEXT = REFERENCE / "README.md"
REPAIR = "python -m tests.test_reference --fix"
TABLE = re.compile(r"<!-- (\S+/\S+) -->\n\n((?:\|.*\n)+)")
FOLDERS = {  # the first cell of a row, where it is not what its folder is called
    "td3.py --updates-per-step 10": "td3_10_updates",
    "STEVE on SAC": "steve",
    "mage_td3.py --lam 0.05 --learned-reward": "mage_learned_reward",
    "mage_td3.py --lam 0.05 --ensemble-size 2 --model-hidden 64": "mage_small",
    "mage_td3.py --lam 0.05 --ensemble-size 1 --model-layers 1 --model-hidden 64": "mage_smaller",
    "mage_td3.py --lam 0.05 --ensemble-size 2 --model-hidden 128": "mage_small",
    "mage_td3.py --lam 0.05 --ensemble-size 1 --model-layers 2 --model-hidden 128": "mage_smaller",
    "dyna_td3.py --learned-reward": "dyna_learned_reward",
    "dyna_td3.py --ensemble-size 2 --model-hidden 128": "dyna_small",
    "dyna_td3.py --ensemble-size 1 --model-layers 2 --model-hidden 128": "dyna_smaller",
    "mage_td3.py --lam 0.05 --tau 0.02": "mage_tau_0.02",
    **{f"mage_td3.py --lam {lam}": f"mage_lam_{lam}" for lam in (0, 0.05, 0.2, 0.5, 1)},
    "td3.py --updates-per-step 10 --layer-norm": "td3_10_layer_norm",
    "mage_td3.py --layer-norm": "mage_layer_norm",
    "maac_sac.py": "maac",
    "maac_sac.py --horizon 0": "maac_horizon_0",
    "maac_sac.py --no-steve": "maac_no_steve",
    "maac_sac.py --layer-norm": "maac_layer_norm",
    "maac_sac.py --soft-targets": "maac_soft",
    "maac_sac.py --soft-targets --steve": "maac_steve_soft",
    "maac_sac.py --num-samples 1": "maac_one_sample",
}


COLUMNS = {  # of a table, and of the file it is from
    "cosine": "gradient_cosine", "relative error": "gradient_error",
    "length of ∇ₐQ": "gradient_norm", "true length": "true_norm",
}  # fmt: skip


WAYS = {"plain": "none", "`--accelerate graph`": "graph", "`--accelerate compile`": "compile"}  # on a GPU


def read(file):
    return list(csv.DictReader(file.open(newline="")))


def runs(folder, cell):
    """The rows for every seed of the run that a cell names: those of its eval.csv, or its one in a file."""
    name = cell.replace("`", "")
    if not folder.startswith("gpu/"):  # where a script is meant, and not a run
        name = FOLDERS.get(name, name.lower())
    name = name.removesuffix(".py")
    if folder.endswith(".csv"):
        return [[row] for row in read(REFERENCE / folder) if row.get("run", row.get("script")) == name]
    return [read(file) for file in sorted((REFERENCE / folder / name).glob("seed-*.csv"))]


def span(values):
    low, high = (f"{value:.0f}" if value >= 1 else f"{value:.1f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def numbers(folder, column, seeds):
    """What a column of the table says of the runs, or None where the files do not have it."""
    if folder.startswith("gpu/"):
        steps = {row["accelerate"]: row for (row,) in seeds}
        if column in WAYS:
            return f"{float(steps[WAYS[column]]['learning_ms']):.1f}"
        if column == "memory, MB":
            return ", ".join(f"{float(steps[how]['memory_mb']):.0f}" for how in WAYS.values())
        return f"{float(steps['none']['all_else_ms']):.1f}" if column == "all else" else None
    if column in COLUMNS:
        values = [float(row[COLUMNS[column]]) for (row,) in seeds]
        return ", ".join(f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}" for value in values)
    if column == "minutes":
        return span([float(rows[-1]["seconds"]) / 60 for rows in seeds])
    returns = [[float(row["return_mean"]) for row in rows] for rows in seeds]
    digits = 1 if folder.endswith("Pusher-v4") else 0

    def short(value):
        return f"{round(value, digits) + 0:.{digits}f}"  # + 0: no minus before a zero

    if found := re.fullmatch(r"at step ([\d,]+)", column):
        ends = {rows[-1]["step"] for rows in seeds}
        if ends != {found[1].replace(",", "")}:
            raise ValueError(f"{folder}: runs end at {ends}")
        values = [short(values[-1]) for values in returns]
    elif found := re.fullmatch(r"mean after step ([\d,]+)", column):
        first = int(found[1].replace(",", ""))
        after = [[float(row["return_mean"]) for row in rows if int(row["step"]) > first] for rows in seeds]
        values = [short(sum(values) / len(values)) for values in after]
    elif found := re.fullmatch(r"mean from ([\d,]+) to ([\d,]+)", column):
        first, last = (int(step.replace(",", "")) for step in found.groups())
        part = range(first + 1, last + 1)
        part = [[float(row["return_mean"]) for row in rows if int(row["step"]) in part] for rows in seeds]
        values = [short(sum(values) / len(values)) if values else "-" for values in part]
    elif column == "last step":
        values = [f"{int(rows[-1]['step']):,}" for rows in seeds]
    elif found := re.fullmatch(r"mean of the last ([\d,]+) steps", column):
        last = int(found[1].replace(",", ""))
        late = [[float(row["return_mean"]) for row in rows if int(row["step"]) > int(rows[-1]["step"]) - last]
                for rows in seeds]  # fmt: skip
        values = [short(sum(values) / len(values)) for values in late]
    elif column == "best evaluation":
        values = [short(max(values)) for values in returns]
    elif found := re.fullmatch(r"(-?\d+) reached at", column):
        enough = int(found[1])
        steps = ([row["step"] for row in rows if float(row["return_mean"]) >= enough] for rows in seeds)
        values = [reached[0] if reached else "not" for reached in steps]
    else:
        return None
    return ", ".join(values)


def filled(text):
    """The text with the numbers of the files."""

    def fill(match):
        folder, table = match.groups()
        lines = [line.strip("|").split("|") for line in table.splitlines()]
        head, _, *rows = [[cell.strip() for cell in line] for line in lines]
        for row in rows:
            if not (seeds := runs(folder, row[0])):
                raise ValueError(f"{folder}: no file of {row[0]}")
            row[:] = [numbers(folder, column, seeds) or cell for column, cell in zip(head, row, strict=True)]
        lines = ["| " + " | ".join(row) + " |\n" for row in (head, *rows)]
        return f"<!-- {folder} -->\n\n{lines[0]}|{'---|' * len(head)}\n{''.join(lines[1:])}"

    return TABLE.sub(fill, text)


def test_the_tables_are_those_of_the_files():
    text = TEXT.read_text()
    assert len(TABLE.findall(text)) >= 5 and filled(text) == text, f"run {REPAIR}"


def test_what_is_wrong_in_a_table_is_found():
    text = TEXT.read_text()
    for right, wrong in (("| -722,", "| -723,"), (" 1250,", " 1500,"), ("| 41-89 |", "| 41-90 |")):
        assert text.count(right) and filled(text.replace(right, wrong)) == text
    for right, wrong in (("| `td3.py` | -", "| `td2.py` | -"), ("at step 3000 |", "at step 2000 |")):
        with pytest.raises(ValueError):
            filled(text.replace(right, wrong))


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(f"usage: {REPAIR}")
    text = TEXT.read_text()
    TEXT.write_text(filled(text))
