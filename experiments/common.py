"""Shared by the experiments: flags, files, tables."""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from statistics import mean

from cli import REPOSITORY, UserError, parser, path

from dataset import Dataset, batches

OUT = REPOSITORY / "results_d3pm" / "experiments"
# The columns that are measured on samples, and their decimals
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


def endless(data: Dataset, batch_size: int, seed: int = 0, **how) -> Iterator[tuple]:
    """The batches of one epoch after another; `how` as in `batches`."""
    epochs = (batches(data, batch_size, seed, epoch, **how) for epoch in count())
    return chain.from_iterable(epochs)


def read_result(file: Path) -> dict:
    """Raises OSError, or UserError if the file is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------
# Tables


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table of text in the first column and numbers in the others, without empty columns."""
    used = [i for i in range(len(heading)) if i == 0 or any(row[i] for row in rows)]
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)


def cell(values: list, digits: int) -> str:
    """The mean, and the range of several values. JSON holds infinite values as strings."""
    if not values:
        return ""
    values = [float(value) for value in values]
    # + 0.0 turns -0.0 into 0.0
    text = [f"{round(f(values), digits) + 0.0:.{digits}f}" for f in (mean, min, max)]
    return f"{text[0]} ({text[1]} to {text[2]})" if len(values) > 1 else text[0]


def nats(bounds: list[dict], digits: int = 2) -> str:
    """A bound with its standard error, or mean and range over several seeds."""
    if len(bounds) != 1:
        return cell([bound["nats_per_image"] for bound in bounds], 1)
    value, error = (float(bounds[0][key]) for key in ("nats_per_image", "standard_error"))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def weighted(bounds: list[dict]) -> list[dict]:
    """The importance-weighted bounds with the most trajectories, where there are any."""
    weights = [bound["importance_weighted"] for bound in bounds if "importance_weighted" in bound]
    return [one["by_trajectories"][-1] for one in weights]


def measured(samples: list[dict], key: str, digits: int = 3) -> str:
    """A metric of samples; `isolated_white` with its standard error."""
    values = [one[key] for one in samples if key in one]
    error = ""
    if key == "isolated_white" and len(values) == 1:
        error = f" ± {math.sqrt(values[0] * (1 - values[0]) / samples[0]['images']):.3f}"
    return cell(values, digits) + error


def by_label(result: dict) -> dict[str, list[dict]]:
    """The rows by label, which runs with different seeds share."""
    groups: dict[str, list[dict]] = {}
    for one in result["rows"].values():
        groups.setdefault(one["row"], []).append(one)
    return groups


def table(result: dict) -> str:
    """The reports of evaluate.py, a line per label, real digits last."""
    groups, lines = by_label(result), []
    for one in result["rows"].values():
        groups |= {name: [{"samples": one[key]}] for key, name in REAL.items() if key in one}
    for label, runs in groups.items():
        bounds = [one["bound"] for one in runs if "bound" in one]
        samples = [one["samples"] for one in runs if "samples" in one]
        seeds = f"{len(runs)}" if len(runs) > 1 else ""
        quality = [measured(samples, key, digits) for key, (_, digits) in QUALITY.items()]
        lines.append([label, seeds, nats(bounds), nats(weighted(bounds)), *quality])
    heading = [result["title"], "seeds", "bound", "importance-weighted bound"]
    return markdown([*heading, *(name for name, _ in QUALITY.values())], lines)
