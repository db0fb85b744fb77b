"""Learning curves over seeds, as a figure and as a table.

    python -m common.plot runs tests/reference/laptop/Pendulum-v1 -o pendulum.png

RUNS are folders (of one run, or above many) or CSV files; <env-id>/<name>/seed-<n> in their paths, or a run's
args.json, says what belongs together: a panel for each environment, in it a line for each name with a 95%
confidence interval over the seeds, or with each seed as a thin line where they are fewer than five. Runs
from different folders or with different settings are never averaged: the lines are then named after that too.
Grey dashed lines are published curves of the same environment (tests/reference).
"""

import csv
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import tyro

from common import BadInput, Fault
from common.files import figure_path, write_whole
from common.run import MAY_CHANGE

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

PUBLISHED = Path(__file__).parent.parent / "tests/reference/published_curves.csv"
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
STYLES, MARKERS = ["-", (0, (4, 1)), (0, (1, 1))], "osD^v<>PX*"
STUDENT = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # 97.5%, by degrees of freedom


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # folders or CSV files
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "curves.png"  # the figure
    column: str = "return_mean"  # of eval.csv; gradient_cosine and others where the true dynamics are known
    log: bool = False  # a logarithmic axis for it
    statistic: Literal["mean", "median"] = "mean"  # over seeds; MAGE's figure 8 has the median
    smooth: int = 1  # evaluations in a running mean; 25 in MAGE's figures
    time: bool = False  # against wall-clock minutes, not environment steps
    published: bool = True  # with the published curves that there are
    last_step: int | None = None  # cut the curves there


def place(run):
    """Environment, name, and the folder above both, of a run's folder or its CSV file."""
    *above, env_id, name, _ = run.absolute().parts
    if (run / "args.json").is_file():  # a folder that --run-dir named may be called anything
        told = json.loads((run / "args.json").read_text())
        given = told["args"]
        chosen = given["env_id"].replace("/", "_"), given["exp_name"] or Path(told["script"]).stem
        if chosen != (env_id, name):
            return *chosen, str(run.absolute().parent)
    return env_id, name, str(Path(*above))


def settings(run):
    """What all seeds of a line have in common, as (name, value) pairs; () where no args.json tells."""
    if not (run / "args.json").is_file():
        return ()
    told = json.loads((run / "args.json").read_text())
    free = {*MAY_CHANGE, "seed", "threads", "accelerate", "eval_every", "eval_episodes"}
    pairs = {"script": told["script"], **told["args"]}.items()
    return tuple((name, str(value)) for name, value in pairs if name not in free)


def read(paths, column="return_mean"):
    """-> {env_id: {name: [(steps, values, seconds) of each seed]}}, arrays (evaluations,)."""
    found = {}
    files = []
    for path in map(Path, paths):
        inside = [*path.rglob("eval.csv"), *path.rglob("seed-*.csv")] if path.is_dir() else [path]
        if not any(file.is_file() for file in inside):
            raise BadInput(f"{path}: no eval.csv and no seed-*.csv there; name folders of runs.")
        files += sorted(file.resolve() for file in inside if file.is_file())
    if not files:
        raise BadInput("RUNS: name at least one folder, such as runs.")
    for file in dict.fromkeys(files):  # a run that two folders have in common counts once
        run = file.parent if file.name == "eval.csv" else file
        try:
            rows = list(csv.DictReader(file.open(newline="")))
            head = list(rows[0])
            columns = [np.array([float(row[c]) for row in rows]) for c in ("step", "return_mean", "seconds")]
            env_id, name, folder = place(run)
            made = settings(run)
        except (ValueError, TypeError, LookupError, AttributeError, csv.Error):
            name = "<env-id>/<name>/seed-<n>"
            raise BadInput(f"{file} is not the eval.csv of a run {name}: leave it out.") from None
        try:
            columns[1] = np.array([float(row[column]) for row in rows])
        except (ValueError, TypeError, LookupError):
            fix = f"it has {', '.join(head)}: choose one of them, or leave the file out"
            raise BadInput(f"--column {column}: not in {file}; {fix}.") from None
        if len(rows) < 2:
            print(f"{file}: left out, it has one evaluation so far", file=sys.stderr)
            continue
        found.setdefault(env_id, {}).setdefault((name, folder, made), []).append(columns)
    if not found:
        raise BadInput("RUNS: no run there has two evaluations yet, wait a little.")
    above = os.path.commonpath([folder for runs in found.values() for _, folder, _ in runs])
    for env_id, runs in found.items():
        places = {(name, folder) for name, folder, _ in runs}
        names = [name for name, _ in places]
        found[env_id] = {}
        for (name, folder, made), seeds in runs.items():
            label = name if names.count(name) == 1 else os.path.join(os.path.relpath(folder, above), name)
            others = [dict(other[2]) for other in runs if other[:2] == (name, folder) and other[2]]
            if made and len({other["script"] for other in others}) > 1:
                label += f", {dict(made)['script']}"
            others = [other for other in others if other["script"] == dict(made).get("script")]
            differ = [f"{n} {value}" for n, value in made if any(other.get(n) != value for other in others)]
            found[env_id].setdefault(", ".join([label, *differ]), []).extend(seeds)
    return found


def smoothed(values, window):
    """Mean over the last `window` evaluations, of fewer at the beginning."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return (sums[index] - sums[start]) / (index - start)


def together(seeds, args, name):
    """Curves of several seeds at common places -> x (n,), returns (seeds, n)."""
    cut = [s[0] <= (args.last_step or np.inf) for s in seeds]
    curves = [(s[2] / 60 if args.time else s[0], smoothed(s[1], args.smooth)) for s in seeds]
    curves = [(x[c], y[c]) for (x, y), c in zip(curves, cut, strict=True)]
    last = min(x[-1] for x, _ in curves)  # as far as every seed has come
    places = curves[0][0] if not args.time else np.linspace(0, last, 200)
    places = places[places <= last]
    if not args.time and places[-1] < (longest := max(x[-1] for x, _ in curves)):
        print(f"{name}: drawn until step {last:.0f}, where one seed ends, not {longest:.0f}", file=sys.stderr)
    return places, np.stack([np.interp(places, x, y) for x, y in curves])


def middle(values, statistic):
    """(seeds, n) -> mean or median (n,) and its 95% confidence interval (2, n); NaN with one seed.

    Student's t for the mean, 2000 bootstrap samples for the median.
    """
    n = len(values)
    if statistic == "median":
        draws = np.random.default_rng(0).integers(n, size=(2000, n))
        medians = np.median(values[draws], 1)
        return np.median(values, 0), np.quantile(medians, [0.025, 0.975], 0)
    mean = values.mean(0)
    if n == 1:
        return mean, np.full((2, len(mean)), np.nan)
    t = STUDENT[n - 1] if n <= len(STUDENT) else 1.96 + 2.4 / (n - 1)
    half = t * values.std(0, ddof=1) / np.sqrt(n)
    return mean, np.stack([mean - half, mean + half])


def published(env_id):
    """{algorithm: (steps, returns)} of any version of an environment; of none without the tests' folder."""
    found = {}
    if not PUBLISHED.exists():
        return found
    for row in csv.DictReader(PUBLISHED.open(newline="")):
        if row["env"].rsplit("-", 1)[0] == env_id.rsplit("-", 1)[0]:
            other = f", {row['env'].rsplit('-', 1)[1]}" * (row["env"] != env_id)
            points = found.setdefault(row["algorithm"] + other, [])
            points.append((float(row["step"]), float(row["return_mean"])))
    return {name: np.array(points).T for name, points in found.items()}


def main(args):
    if args.smooth < 1:
        raise BadInput(f"--smooth {args.smooth}: give at least 1, which leaves the curves as they are.")
    output = figure_path(args.output)
    found = read(args.runs, args.column)
    curves = [curve for runs in found.values() for seeds in runs.values() for curve in seeds]
    least = max(1, *(steps[0] for steps, *_ in curves))
    if args.last_step is not None and args.last_step < least:
        raise BadInput(f"--last-step {args.last_step}: give at least {least:.0f}, where all curves are.")
    lowest = min(values.min() for _, values, _ in curves)
    if args.log and lowest <= 0:
        raise BadInput(f"--log: {args.column} goes down to {lowest:.4g}: leave it out.")
    names = sorted({name for runs in found.values() for name in runs})
    look = {name: dict(color=COLOURS[i % 7], ls=STYLES[i // 7 % 3]) for i, name in enumerate(names)}
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    entries = 1  # lines of the longest legend
    print("| environment | run | seeds | at the end | highest evaluation of the mean, +- std over seeds |")
    print("|---|---|---|---|---|")
    for panel, (env_id, runs) in zip(panels.flat, found.items(), strict=False):
        far, floor, ceiling = 0.0, np.inf, -np.inf
        for name, seeds in runs.items():
            x, values = together(seeds, args, name)
            line, (low, high) = middle(values, args.statistic)
            far, floor, ceiling = max(far, x[-1]), min(floor, values.min()), max(ceiling, values.max())
            count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
            panel.plot(x, line, **look[name], label=f"{name}, {count}", lw=1.8)
            if len(seeds) < 5:  # their interval, several deviations wide, would say less than they do
                panel.plot(x, values.T, **look[name], lw=0.6, alpha=0.6)
            else:
                panel.fill_between(x, low, high, color=look[name]["color"], alpha=0.15, lw=0)
            best = values.mean(0).argmax()  # the maximum average return of MAGE's table 1
            half = f" +- {(high - low)[-1] / 2:.4g}" if len(seeds) > 1 else ""
            top = f"{values.mean(0)[best]:.4g} +- {values.std(0, ddof=min(1, len(seeds) - 1))[best]:.4g}"
            at = f"{x[best]:.1f} min" if args.time else f"step {x[best]:.0f}"
            print(f"| {env_id} | {name} | {len(seeds)} | {line[-1]:.4g}{half} | {top} at {at} |")
        if args.published and not args.time and args.column == "return_mean":
            markers = cycle(MARKERS)
            for name, (steps, returns) in published(env_id).items():
                within = steps <= far
                if within.sum() > 1:
                    thin = dict(color="0.45", marker=next(markers), ms=3.5, mfc="none", lw=0.7, ls="--")
                    panel.plot(steps[within], returns[within], **thin, label=f"{name}, published")
                    floor, ceiling = min(floor, *returns[within]), max(ceiling, *returns[within])
        room = 0.05 * (ceiling - floor) or 1.0  # intervals over few seeds may go far beyond
        panel.set_ylim(*((floor / 1.2, ceiling * 1.2) if args.log else (floor - room, ceiling + room)))
        ylabel = f"{args.statistic} {args.column.removesuffix('_mean').replace('_', ' ')}"
        panel.set(title=env_id, xlabel="minutes" if args.time else "environment steps", ylabel=ylabel)
        panel.set_yscale("log" if args.log else "linear")
        panel.grid(alpha=0.25)
        labels = panel.get_legend_handles_labels()[1]
        beside = max(1, 80 // (8 + max(map(len, labels))))  # columns: some 80 letters fit below a panel
        entries = max(entries, -(-len(labels) // beside))
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        panel.legend(fontsize=8, ncols=beside, **below)
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    figure.set_size_inches(5.2 * columns, (3.8 + 0.17 * entries) * rows)
    write_whole(output, partial(figure.savefig, format=output.suffix[1:], dpi=150))
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, prog="python -m common.plot"))
    except (BadInput, Fault) as error:
        print(f"error: {str(error).removesuffix('.')}.", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
