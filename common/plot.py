"""Learning curves over seeds, as a figure and as a table.

    python -m common.plot runs tests/reference/laptop/Pendulum-v1 -o pendulum.png

RUNS are folders (of one run, or above many) or CSV files; <env-id>/<name>/seed-<n> in their paths, or a run's
args.json, says what belongs together: a panel for each environment, in it a line for each name with a 95%
confidence interval over the seeds, or with each seed as a thin line where they are fewer than five. Runs
from different folders or with different settings are never averaged: the lines are then named after that too.
`--labels mage_td3 MAGE mine "mine, cosine"` gives lines another name, and the order in which they are named.
Links are followed; a run that has no args.json is called what its link is called. Where a value of any seed
is not finite the line has a gap. Grey dashed lines are published curves of the same environment
(tests/reference).
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from textwrap import wrap
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro

from common import BadInput
from common.args import one_sentence
from common.curves import align_seeds, apart, centre_and_interval, published, read, renamed
from common.files import figure_path, write_whole

plt.switch_backend("Agg")  # no screen is needed

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
STYLES, MARKERS = ["-", (0, (4, 1)), (0, (1, 1))], "osD^v<>PX*"


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # These are folders with runs in them, or CSV files.
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "curves.png"  # The figure goes here.
    labels: dict[str, str] = field(default_factory=dict)  # Lines are renamed and ordered: old new old new ...
    column: str = "return_mean"  # This column of eval.csv or train.csv is drawn, such as gradient_cosine.
    log: bool = False  # The axis of that column is logarithmic.
    statistic: Literal["mean", "median"] = "mean"  # Seeds are combined so; MAGE's figure 8 has the median.
    smooth: int = 1  # Each point is the mean of the last so many evaluations; MAGE's figures have 25.
    time: bool = False  # The other axis has minutes, in the place of environment steps.
    published: bool = True  # Published curves are drawn beside ours, where there are any.
    apart: bool = False  # Each of RUNS has a panel of its own, in the place of each environment.
    last_step: int | None = None  # The curves are cut after this step.


def printable(text):
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shown(text, width=60):
    """A name for matplotlib, in lines: $ would begin mathematics, and it hides labels that begin with _."""
    text = "\n".join(wrap(printable(text), width)).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def main(args):
    if not args.runs:
        raise BadInput("RUNS: name folders with runs in them, such as the folder runs.")
    if args.smooth < 1:
        raise BadInput(f"--smooth {args.smooth}: give at least 1, which leaves the curves as they are.")
    output = figure_path(args.output)
    found = apart(args.runs, args.column) if args.apart else read(args.runs, args.column)
    found, names = renamed(found, args.labels)
    least = max(1, *(seed[0][0] for runs in found.values() for seeds in runs.values() for seed in seeds))
    if args.last_step is not None and args.last_step < least:
        raise BadInput(f"--last-step {args.last_step}: give at least {least:.0f}, where all curves are.")
    found = {e: {name: align_seeds(s, args, name) for name, s in runs.items()} for e, runs in found.items()}
    lowest = min(np.nanmin(values) for runs in found.values() for _, values in runs.values())
    if args.log and lowest <= 0:
        raise BadInput(f"--log: {args.column} goes down to {lowest:.4g}: leave it out.")
    look = {name: dict(color=COLOURS[i % 7], ls=STYLES[i // 7 % 3], ms=4) for i, name in enumerate(names)}
    columns = min(len(found), 3)
    figure, panels = plt.subplots(-(-len(found) // columns), columns, squeeze=False, layout="constrained")
    entries = 1  # lines of the longest legend
    print(f"| environment | run | seeds | {args.statistic} at the end, with its 95% interval "
          "| highest evaluation of the mean, +- std over seeds |")
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
            for name, (steps, returns) in published(env_id.split(" (")[0]).items():
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
    with one_sentence():
        main(tyro.cli(Args, prog="python -m common.plot", description=__doc__))
