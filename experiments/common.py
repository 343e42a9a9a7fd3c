"""What the experiments share: flags, results that are kept row by row, tables.

The result of an experiment is results_d3pm/experiments/NAME/NAME.json: a title and rows. A row is
stored as soon as it is measured, with its flags and its provenance. An experiment that was stopped
goes on with the missing rows.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

from cli import REPOSITORY, UserError, parser, path, provenance

from tqdm import tqdm

from checkpoint import write_json
from dataset import Dataset, batches
from pictures import save_figure, write_picture

OUT = REPOSITORY / "results_d3pm" / "experiments"
# The columns that are measured on samples, and their digits after the point
QUALITY = {
    "frechet_distance": ("Fréchet distance", 3),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "isolated_white": ("isolated white", 3),
    "ink": ("ink", 3),
    "label_accuracy": ("classified as asked", 3),
}
REAL = {
    "real_digits": "*real digits*",
    "real_digits_of_these_classes": "*real digits of the same classes*",
}


def experiment_parser(description: str | None) -> argparse.ArgumentParser:
    p = parser(description)
    p.add_argument("--data", choices=["mnist", "offline"], default="mnist", help="(default mnist)")
    root = REPOSITORY / "data"
    p.add_argument("--data-root", type=path(), default=root, help="folder of MNIST (default data)")
    return p


def output(name: str, suffix: str = ".json") -> Path:
    return OUT / name / f"{name}{suffix}"


def endless(digits: Dataset, batch_size: int) -> Iterator[tuple]:
    """The batches of one epoch after another."""
    return chain.from_iterable(batches(digits, batch_size, epoch=epoch) for epoch in count())


def collect(name: str, title: str, plan: dict, show: Callable[[dict], str], jobs: int = 1) -> Path:
    """Measure the missing rows of a result, `jobs` at a time, and print its table; the file.

    Args:
        plan: {name of a row: (its flags, the function that measures it)}.
        show: makes the table of a result.

    Raises:
        UserError: if the file is no such result, or holds one of these rows with other flags.
    """
    file, lock = output(name), Lock()
    result = {"title": title, "rows": {}}
    if file.exists():
        render(show, file)
        result = json.loads(file.read_text())
    rows, order = result["rows"], list(plan)
    for key, (flags, _) in plan.items():
        if key in rows and rows[key].get("flags") != flags:
            raise UserError(f"{file} holds {key!r} with other flags: move it away")

    def measure(key: str) -> None:
        flags, work = plan[key]
        row, ours = work(), provenance()
        # A script that measured the row names its own machine, with its own number of threads.
        source = ours | row.get("provenance", {}) | {"command": ours["command"]}
        with lock:
            rows[key] = row | {"flags": flags, "provenance": source}
            keys = sorted(rows, key=lambda key: order.index(key) if key in plan else -1)
            write_json(file, result | {"rows": {key: rows[key] for key in keys}})

    missing = [key for key in plan if key not in rows]
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(measure, missing), total=len(missing), desc=name, disable=None))
    print(render(show, file))
    return file


def render(make: Callable[[dict], Any], file: Path) -> Any:
    """What `make` makes of a JSON file. Raises UserError if the file holds something else."""
    try:
        return make(json.loads(file.read_text()))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is no result of this experiment ({reason})") from None


def draw(figure: Callable[[dict], Any], file: Path) -> None:
    """Draw what `figure` makes of a JSON file beside it."""
    write_picture(file.with_suffix(".png"), lambda png: save_figure(render(figure, file), png))


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table with text in the first column and numbers in the others, less its empty columns."""
    used = [i for i in range(len(heading)) if i == 0 or any(row[i] for row in rows)]
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)


def cell(values: list, digits: int) -> str:
    """The mean; of several values also the range. (JSON holds infinite values as strings.)"""
    if not values:
        return ""
    values = [float(value) for value in values]
    # + 0.0 turns -0.0 into 0.0
    text = [
        f"{round(v, digits) + 0.0:.{digits}f}" for v in (mean(values), min(values), max(values))
    ]
    return f"{text[0]} ({text[1]} to {text[2]})" if len(values) > 1 else text[0]


def share(samples: dict, key: str) -> str:
    """A share of images with its standard error."""
    error = math.sqrt(samples[key] * (1 - samples[key]) / samples["images"])
    return f"{samples[key]:.3f} ± {error:.3f}"


def nats(bound: dict, digits: int = 1) -> str:
    """A bound with its standard error."""
    value, error = float(bound["nats_per_image"]), float(bound["standard_error"])
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def table(result: dict) -> str:
    """What evaluate.py reports. Seeds share a row; real digits come last."""
    groups: dict[str, list[dict]] = {}
    for one in result["rows"].values():
        groups.setdefault(one["row"], []).append(one)
    for one in result["rows"].values():
        groups |= {name: [{"samples": one[key]}] for key, name in REAL.items() if key in one}
    lines = []
    for name, runs in groups.items():
        bounds = [one["bound"] for one in runs if "bound" in one]
        samples = [one["samples"] for one in runs if "samples" in one]
        line = [name, f"{len(runs)}" if len(runs) > 1 else ""]
        several = cell([bound["nats_per_image"] for bound in bounds], 1)
        line.append(nats(bounds[0]) if len(bounds) == 1 else several)
        for key, (_, digits) in QUALITY.items():
            line.append(cell([one[key] for one in samples if key in one], digits))
            if key == "isolated_white" and len(samples) == 1:
                line[-1] = share(samples[0], key)
        lines.append(line)
    heading = [result["title"], "seeds", "bound", *(name for name, _ in QUALITY.values())]
    return markdown(heading, lines)
