"""Learning curves over seeds, as a figure and as a table.

    python -m common.plot runs tests/reference/laptop/Pendulum-v1 -o pendulum.png

RUNS are folders (of one run, or above many) or CSV files; <env-id>/<name>/seed-<n> in their paths, or a run's
args.json, says what belongs together: a panel for each environment, in it a line for each name with a 95%
confidence interval over the seeds, or with each seed as a thin line where they are fewer than five. Runs
from different folders or with different settings are never averaged: the lines are then named after that too.
Links are followed, and a run is called what its link is called. Where a value of any seed is not finite the
line has a gap. Grey dashed lines are published curves of the same environment (tests/reference).
"""

import csv
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro

from common import BadInput, Fault, say
from common.files import figure_path, write_whole
from common.run import MAY_CHANGE

plt.switch_backend("Agg")  # no screen is needed

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


def find(paths):
    """The CSV files that RUNS name, each once: by the path with the fewest links, for `latest` may be one."""
    files = []
    for given in paths:
        path = Path(os.path.abspath(os.path.expanduser(given)))
        inside = [path] * os.path.isfile(path)
        for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
            real = Path(folder).resolve()  # a link to a folder above it would lead in a circle
            folders[:] = [f for f in sorted(folders) if not real.is_relative_to(Path(folder, f).resolve())]
            for file in [Path(folder, name) for name in sorted(names)]:
                if not os.path.exists(file):
                    say(f"{file}: left out, it is a link to nothing that can be read")
                elif file.name == "eval.csv" or file.match("seed-*.csv"):
                    inside.append(file)
        if not inside:
            raise BadInput(f"{given}: no eval.csv and no seed-*.csv there; name folders of runs.")
        files += inside
    files.sort(key=lambda file: sum(path.is_symlink() for path in (file, *file.parents)))
    return list({file.resolve(): file for file in reversed(files)}.values())[::-1]


def refuse(error):
    """What os.walk cannot list is not passed by in silence; but a file is no folder, which is no matter."""
    if isinstance(error, PermissionError):
        raise BadInput(f"{error.filename} cannot be read ({error.strerror}): name other folders.")


def identity(run):
    """Of a run's folder or CSV file: environment; name, the folder above both, and what else seeds share.

    The last of them are settings, (name, value) pairs; () where no args.json tells.
    """
    usual, path = run.parts[1:][-3:-1], run / "args.json"
    if not path.is_file():
        return usual[0], (usual[1], str(run.parents[2]), ())
    told = json.loads(path.read_text())
    pairs = {"script": told["script"], **told["args"]}
    env_id, name = pairs["env_id"].replace("/", "_"), pairs["exp_name"] or Path(told["script"]).stem
    folder = run.parents[2] if (env_id, name) == usual else run.parent  # --run-dir may name any folder
    made = tuple((n, str(value)) for n, value in pairs.items() if n not in (*MAY_CHANGE, "seed"))
    return env_id, (name, str(folder), made)


def read(paths, column="return_mean"):
    """-> {env_id: {name: [(steps, values, seconds) of each seed]}}, arrays (evaluations,), NaN: a gap."""
    found = {}
    for file in find(paths):
        try:
            table = csv.DictReader(file.read_text().splitlines())
            rows = list(table)
            columns = [np.array([float(row[c]) for row in rows]) for c in ("step", "return_mean", "seconds")]
            if not (rows and np.isfinite(columns[::2]).all() and (np.diff(columns[0]) > 0).all()):
                raise ValueError
            env_id, line = identity(file.parent if file.name == "eval.csv" else file)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error):
            what = "the eval.csv of a run, beside its args.json or in <env-id>/<name>/seed-<n>"
            raise BadInput(f"{file} is not {what}: leave it out.") from None
        try:
            columns[1] = np.array([float(row[column]) for row in rows])
        except (ValueError, TypeError, LookupError):
            fix = f"it has {', '.join(table.fieldnames)}: choose one of them, or leave the file out"
            raise BadInput(f"--column {column}: not in {file}; {fix}.") from None
        if len(rows) < 2:
            say(f"{file}: left out, it has one evaluation so far")
            continue
        if (gaps := ~np.isfinite(columns[1])).any():
            columns[1][gaps] = np.nan
            say(f"{file}: {gaps.sum()} of {len(rows)} values of {column} are not finite and leave gaps")
        found.setdefault(env_id, {}).setdefault(line, []).append(columns)
    if not found:
        raise BadInput("RUNS: no run there has two evaluations yet: wait a little, or name other folders.")
    above = os.path.commonpath([folder for runs in found.values() for _, folder, _ in runs])
    for env_id, runs in found.items():
        names = Counter(name for name, _ in {line[:2] for line in runs})
        found[env_id] = {}
        for (name, folder, made), seeds in runs.items():
            label = name if names[name] == 1 else os.path.join(os.path.relpath(folder, above), name)
            others = [dict(other[2]) for other in runs if other[:2] == (name, folder) and other[2]]
            if made and len({other["script"] for other in others}) > 1:
                label += f", {dict(made)['script']}"
            others = [other for other in others if other["script"] == dict(made).get("script")]
            differ = [f"{n} {value}" for n, value in made if any(other.get(n) != value for other in others)]
            found[env_id].setdefault(", ".join([label, *differ]), []).extend(seeds)
    return found


def smoothed(values, window):
    """Mean over the last `window` evaluations, of fewer at the beginning and after a NaN, which stays one."""
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.insert(x, 0, 0.0)) for x in (np.where(finite, values, 0), finite))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return np.where(finite, sums[index] - sums[start], np.nan) / np.maximum(counts[index] - counts[start], 1)


def align_seeds(seeds, args, name):
    """Curves of several seeds at common places -> x (n,), returns (seeds, n)."""
    cut = [s[0] <= (args.last_step or np.inf) for s in seeds]
    curves = [(s[2] / 60 if args.time else s[0], smoothed(s[1], args.smooth)) for s in seeds]
    curves = [(x[c], y[c]) for (x, y), c in zip(curves, cut, strict=True)]
    last = min(x[-1] for x, _ in curves)  # as far as every seed has come
    places = curves[0][0] if not args.time else np.linspace(0, last, 200)
    places = places[places <= last]
    if not args.time and places[-1] < (longest := max(x[-1] for x, _ in curves)):
        say(f"{name}: drawn until step {last:.0f}, where one seed ends, not {longest:.0f}")
    values = np.stack([np.interp(places, x, y) for x, y in curves])
    if np.isnan(values).any(0).all():
        raise BadInput(f"--column {args.column}: nowhere is it finite for all seeds of {name}: give another.")
    return places, values


def centre_and_interval(values, statistic):
    """(seeds, n) -> mean or median (n,) and its 95% confidence interval (2, n); NaN with one seed.

    Student's t for the mean, 2000 bootstrap samples for the median.
    """
    n, mean = len(values), values.mean(0)
    if n == 1:
        return mean, np.full((2, len(mean)), np.nan)
    if statistic == "median":
        draws = np.random.default_rng(0).integers(n, size=(2000, n))
        parts = np.array_split(values, -(-values.size // 1000), 1)  # all at once would be gigabytes
        bounds = [np.quantile(np.median(part[draws], 1), [0.025, 0.975], 0) for part in parts]
        return np.median(values, 0), np.hstack(bounds)
    t = STUDENT[n - 1] if n <= len(STUDENT) else 1.96 + 2.4 / (n - 1)
    half = t * values.std(0, ddof=1) / np.sqrt(n)
    return mean, np.stack([mean - half, mean + half])


def published(env_id):
    """{algorithm: (steps, returns)} of any version of an environment; of none without the tests' folder."""
    found = {}
    for row in csv.DictReader(PUBLISHED.read_text().splitlines()) if PUBLISHED.exists() else ():
        if row["env"].rsplit("-", 1)[0] == env_id.rsplit("-", 1)[0]:
            other = f", {row['env'].rsplit('-', 1)[1]}" * (row["env"] != env_id)
            points = found.setdefault(row["algorithm"] + other, [])
            points.append((float(row["step"]), float(row["return_mean"])))
    return {name: np.array(points).T for name, points in found.items()}


def printable(text):
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shown(text, width=60):
    """A name for matplotlib, in lines: $ would begin mathematics, and it hides labels that begin with _."""
    text = "\n".join(wrap(printable(text), width)).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def main(args):
    if args.smooth < 1:
        raise BadInput(f"--smooth {args.smooth}: give at least 1, which leaves the curves as they are.")
    output = figure_path(args.output)
    found = read(args.runs, args.column)
    least = max(1, *(seed[0][0] for runs in found.values() for seeds in runs.values() for seed in seeds))
    if args.last_step is not None and args.last_step < least:
        raise BadInput(f"--last-step {args.last_step}: give at least {least:.0f}, where all curves are.")
    found = {e: {name: align_seeds(s, args, name) for name, s in runs.items()} for e, runs in found.items()}
    lowest = min(np.nanmin(values) for runs in found.values() for _, values in runs.values())
    if args.log and lowest <= 0:
        raise BadInput(f"--log: {args.column} goes down to {lowest:.4g}: leave it out.")
    names = sorted({name for runs in found.values() for name in runs})
    look = {name: dict(color=COLOURS[i % 7], ls=STYLES[i // 7 % 3], ms=4) for i, name in enumerate(names)}
    columns = min(len(found), 3)
    figure, panels = plt.subplots(-(-len(found) // columns), columns, squeeze=False, layout="constrained")
    entries = 1  # lines of the longest legend
    print("| environment | run | seeds | at the end | highest evaluation of the mean, +- std over seeds |")
    print("|---|---|---|---|---|")
    for panel, (env_id, runs) in zip(panels.flat, found.items(), strict=False):
        far, floor, ceiling = 0.0, np.inf, -np.inf
        for name, (x, values) in runs.items():
            line, (low, high) = centre_and_interval(values, args.statistic)
            far, n, mean = max(far, x[-1]), len(values), values.mean(0)
            floor, ceiling = min(floor, np.nanmin(values)), max(ceiling, np.nanmax(values))
            # A value between two gaps makes no line.
            look[name]["marker"] = "." if np.isnan(values).any() or len(x) == 1 else None
            panel.plot(x, line, **look[name], label=shown(f"{name}, {n} seed{'s' * (n > 1)}"), lw=1.8)
            if n < 5:  # their interval, several deviations wide, would say less than they do
                panel.plot(x, values.T, **look[name], lw=0.6, alpha=0.6)
            else:
                panel.fill_between(x, low, high, color=look[name]["color"], alpha=0.15, lw=0)
            best = np.nanargmax(mean)  # the maximum average return of MAGE's table 1
            # A median is not in the middle of its interval.
            half = " +- {2:.4g}" if args.statistic == "mean" else " [{0:.4g}, {1:.4g}]"
            half = half.format(low[-1], high[-1], (high - low)[-1] / 2)
            end = f"{line[-1]:.4g}" + half * bool(np.isfinite(high[-1]))
            top = f"{mean[best]:.4g}" + (f" +- {values.std(0, ddof=1)[best]:.4g}" if n > 1 else "")
            at = f"{x[best]:.1f} min" if args.time else f"step {x[best]:.0f}"
            first, second = (printable(cell).replace("|", r"\|") for cell in (env_id, name))
            print(f"| {first} | {second} | {n} | {end} | {top} at {at} |")
        if args.published and not args.time and args.column == "return_mean":
            markers = cycle(MARKERS)
            for name, (steps, returns) in published(env_id).items():
                within = (steps <= far) & ((returns > 0) | (not args.log))
                if within.sum() > 1:
                    thin = dict(color="0.45", marker=next(markers), ms=3.5, mfc="none", lw=0.7, ls="--")
                    panel.plot(steps[within], returns[within], **thin, label=f"{name}, published")
                    floor, ceiling = min(floor, *returns[within]), max(ceiling, *returns[within])
        room = 0.05 * (ceiling - floor) or 1.0  # intervals over few seeds may go far beyond
        panel.set_ylim(*((floor / 1.2, ceiling * 1.2) if args.log else (floor - room, ceiling + room)))
        ylabel = shown(f"{args.statistic} {args.column.removesuffix('_mean').replace('_', ' ')}", 40)
        xlabel = "minutes" if args.time else "environment steps"
        panel.set(title=shown(env_id, 40), xlabel=xlabel, ylabel=ylabel)
        panel.set_yscale("log" if args.log else "linear")
        panel.grid(alpha=0.25)
        labels = panel.get_legend_handles_labels()[1]
        lines = [line for label in labels for line in label.splitlines()]
        beside = max(1, 80 // (8 + max(map(len, lines))))  # columns: some 80 letters fit below a panel
        entries = max(entries, -(-len(lines) // beside))
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        panel.legend(fontsize=8, ncols=beside, **below)
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    figure.set_size_inches(5.2 * columns, (3.8 + 0.17 * entries) * len(panels))
    write_whole(output, partial(figure.savefig, format=output.suffix[1:], dpi=150))
    plt.close(figure)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal has not
    try:
        main(tyro.cli(Args, prog="python -m common.plot"))
    except (BadInput, Fault) as error:
        print(f"error: {str(error).removesuffix('.')}.", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
