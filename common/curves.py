"""Learning curves of runs: which files there are, which of them are seeds of one run, what their mean is."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from common import BadInput, say
from common.args import MAY_CHANGE
from common.evaluate import half_width

PUBLISHED = Path(__file__).parent.parent / "tests/reference/published_curves.csv"


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


def recorded(rows, file, column):
    """The rows of an eval.csv that have a column, also one of the train.csv beside it; all columns."""
    beside = file.with_name("train.csv")
    if column in rows[0] or file.name != "eval.csv" or not beside.is_file():
        return rows, list(rows[0])
    try:
        means = {row["step"]: row for row in csv.DictReader(beside.read_text().splitlines())}
    except (OSError, ValueError, LookupError, csv.Error):
        raise BadInput(f"{beside} is not the train.csv of a run: leave its folder out.") from None
    names = list(dict.fromkeys([*rows[0], *(name for row in means.values() for name in row)]))
    # Nothing is recorded at step 0, and little while actions are random.
    both = [row | {column: cell} for row in rows if (cell := means.get(row["step"], {}).get(column))]
    return (both or rows), names


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
        rows, names = recorded(rows, file, column)
        try:
            columns = [np.array([float(row[c]) for row in rows]) for c in ("step", column, "seconds")]
        except (ValueError, TypeError, LookupError):
            fix = f"it has {', '.join(names)}: choose one of them, or leave the file out"
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


def renamed(found, labels):
    """`found` with other names, {old: new}, and all names in order: those that have been given come first."""
    names = {name for runs in found.values() for name in runs}
    for name in labels.keys() - names:
        raise BadInput(f"--labels {name}: no line has this name; there are {', '.join(sorted(names))}.")
    order = {name: labels.get(name, name) for name in [*labels, *sorted(names - labels.keys())]}
    if twice := [label for label, times in Counter(order.values()).items() if times > 1]:
        raise BadInput(f"--labels: two lines would be called {twice[0]}: give each its own label.")
    return {env_id: {label: runs[name] for name, label in order.items() if name in runs}
            for env_id, runs in found.items()}, [*order.values()]  # fmt: skip


def smoothed(values, window):
    """Mean over the last `window` evaluations, of fewer at the beginning and after a NaN, which stays one."""
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.insert(x, 0, 0.0)) for x in (np.where(finite, values, 0), finite))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return np.where(finite, sums[index] - sums[start], np.nan) / np.maximum(counts[index] - counts[start], 1)


def apart(paths, column):
    """What `read` finds, each path by itself; where two have one environment, its name and theirs."""
    parts = [(path, read([path], column)) for path in paths]
    alone = [(path, env_id, runs) for path, found in parts for env_id, runs in found.items()]
    above = os.path.commonpath([os.path.abspath(path) for path in paths])
    often, names = Counter(env_id for _, env_id, _ in alone), []
    for path, env_id, _ in alone:
        where = os.path.relpath(path, above).removesuffix(f"/{env_id}")
        names.append(f"{env_id} ({where})" if often[env_id] > 1 else env_id)
    return {name: runs for name, (_, _, runs) in zip(names, alone, strict=True)}


def align_seeds(seeds, args, name):
    """Curves of several seeds at common places -> x (n,), returns (seeds, n)."""
    cut = [s[0] <= (args.last_step or np.inf) for s in seeds]
    curves = [(s[2] / 60 if args.time else s[0], smoothed(s[1], args.smooth)) for s in seeds]
    curves = [(x[c], y[c]) for (x, y), c in zip(curves, cut, strict=True)]
    last = min(x[-1] for x, _ in curves)  # as far as every seed has come
    places = curves[0][0] if not args.time else np.linspace(0, last, 200)
    places = places[places <= last]
    longest = max(x[-1] for x, _ in curves)
    if args.time and last < 0.99 * longest:  # seeds never take exactly as long
        say(f"{name}: drawn until minute {last:.1f}, where one seed ends, not {longest:.1f}")
    elif not args.time and places[-1] < longest:
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
    half = half_width(values)
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
