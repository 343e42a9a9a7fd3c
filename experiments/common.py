"""What several experiments need: commands that are run a few at a time, results that are kept, tables in Markdown.

Everything of an experiment is in results_d3pm/experiments/NAME/, its result in NAME.json there: a dict of the arguments
that matter and of `rows`. A stopped experiment goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

from cli import REPOSITORY, integer, parser, path

from torch import Tensor
from tqdm import tqdm

from checkpoint import RELEASED, read_checkpoint, write_json
from dataset import Digits, batches, load_digits, sha256
from pictures import new_figure

OUT = REPOSITORY / "results_d3pm" / "experiments"
DYNAMIC = RELEASED.with_name("d3pm_mnist_dynamic.pth")
LR = 2e-3
# Of evaluation.json
BOUNDS = ("bound", "bound_with_labels")
KEPT = (
    "sha256",
    "levels",
    "timesteps",
    *BOUNDS,
    "samples",
    "real_digits",
    "real_digits_of_these_classes",
)
# What tables show of `metrics.quality`, with so many digits after the point
QUALITY = {
    "frechet_distance": 3,
    "precision": 2,
    "recall": 2,
    "isolated_white": 3,
    "ink": 3,
    "label_accuracy": 3,
}


def experiment_parser(description: str | None, jobs: bool = False) -> argparse.ArgumentParser:
    p = parser(description)
    p.add_argument("--data", choices=["mnist", "offline"], default="mnist", help="the digits (default mnist; offline: "
                   "a trial on 5,000 of them)")  # fmt: skip
    p.add_argument("--data-root", type=path(), default=REPOSITORY / "data", help="where MNIST is or goes (default: "
                   "data in the repository)")  # fmt: skip
    if jobs:
        p.add_argument("--jobs", type=integer(1), default=os.cpu_count(), help="commands at a time, each on one thread "
                       "(default: as many as there are cores)")  # fmt: skip
    return p


def endless(digits: Digits, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other. Raises DataError, at the first, if the digits are fewer than a batch."""
    return chain.from_iterable(batches(digits, batch_size, epoch=epoch) for epoch in count())


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def command(script: str, arguments: list, log: Path) -> None:
    """Run a script of the repository on one thread; what it prints is added to `log`. RuntimeError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    with open(log, "a") as file:
        code = subprocess.run(
            line, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise RuntimeError(f"{last} ({script} ended with code {code}, see {log})")


def evaluated(
    row: str, checkpoint: Path, folder: Path, arguments: list, bounded: bool = True
) -> dict:
    """What evaluate.py says of the checkpoint with these arguments, for a row of a table; its bounds if `bounded`."""
    command("evaluate.py", [checkpoint, *arguments, "--out-dir", folder], folder / "log.txt")
    report = json.loads((folder / "evaluation.json").read_text())
    return {"row": row} | {
        key: report[key] for key in KEPT if key in report and (bounded or key not in BOUNDS)
    }


def trained_and_evaluated(row: str, folder: Path, steps: int, train: list, evaluate: list) -> dict:
    """The same of a run of so many steps in `folder`, which is begun, or gone on with, if it isn't at its end."""
    last = folder / "checkpoints" / "last.pth"
    if not last.exists() or read_checkpoint(last)["step"] != steps:
        resume = ["--resume"] if last.exists() else []
        command(
            "train.py", [*train, "--steps", steps, "--out-dir", folder, *resume], folder / "log.txt"
        )
    return evaluated(row, last, folder, evaluate)


def digits_of(args: argparse.Namespace) -> list:
    """The flags that choose the digits. Raises DataError, in one line, if there are none."""
    load_digits("validation", args.data, args.data_root)
    return ["--data", args.data, "--data-root", args.data_root.resolve()]


def speed_of(args: argparse.Namespace) -> list:
    """The flags of `cli.add_speed` as they were given."""
    return ["--amp"] * args.amp + ["--compile"] * args.compile


def trainings(
    name: str, rows: dict[str, str], seeds: Iterable[int], steps: int, train: list, evaluate: list
) -> dict[str, Callable[[], dict]]:
    """For `collect`: a run with the flags of each of the rows, beside those of `train`, and each of the seeds."""
    plan = {}
    for row, flags in rows.items():
        for seed in seeds:
            folder = OUT / name / f"{row.replace(', ', '-').replace(' ', '_')}-{seed}"
            arguments = [*train, *flags.split(), "--seed", seed]
            plan[f"{row}, seed {seed}"] = partial(
                trained_and_evaluated, row, folder, steps, arguments, evaluate
            )
    return plan


def compare_trainings(
    name: str,
    description: str | None,
    rows: dict[str, str],
    steps: int = 650,
    seeds: int = 3,
    lr: float = LR,
) -> None:
    """The main of an experiment that trains with the flags of each of the rows, with several seeds."""
    p = experiment_parser(description, jobs=True)
    p.add_argument(
        "--steps",
        type=integer(1),
        default=steps,
        help=f"optimizer steps of each run (default {steps})",
    )
    p.add_argument(
        "--seeds", type=integer(1), default=seeds, help=f"runs of each row (default {seeds})"
    )
    args = p.parse_args()
    digits = digits_of(args)
    evaluate = [
        *digits,
        "--split",
        "validation",
        "--last-step",
        "draw",
    ]  # of the model that is judged
    train = [*digits, "--lr", lr, "--optimizer", "adamw"]  # but where a row says otherwise
    plan = trainings(name, rows, range(args.seeds), args.steps, train, evaluate)
    collect(name, {"title": f"{args.steps} steps", "data": args.data}, plan, table, args.jobs)


def compare_evaluations(
    name: str, rows: dict, args: argparse.Namespace, num_samples: int, bounded: bool = True
) -> Path:
    """Evaluate args.checkpoint with the flags of each of the rows, {name: flags}; the file of the result."""
    digits, plan = [*digits_of(args), *speed_of(args), "--num-samples", num_samples], {}
    for row, flags in rows.items():
        folder = OUT / name / row.replace(" ", "_")
        plan[row] = partial(
            evaluated, row, args.checkpoint, folder, [*digits, *flags.split()], bounded
        )
    what = {
        "title": f"{num_samples:,} samples",
        "sha256": sha256(args.checkpoint),
        "data": args.data,
    }
    return collect(name, what, plan, table, args.jobs)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def collect(
    name: str, what: dict, plan: dict[str, Callable[[], dict]], table: Callable, jobs: int = 1
) -> Path:
    """Do the work of each row that isn't there yet, `jobs` at a time; print the table; the file that holds them all.

    Raises ValueError, in one line, if the file is there with other arguments, `what`, or is nothing for `table`.
    """
    file = OUT / name / f"{name}.json"
    if not file.exists():
        write_json(file, what | {"rows": {}})
    render(table, file)
    result = json.loads(file.read_text())
    if any(result.get(key) != value for key, value in what.items()):
        raise ValueError(f"{file} is of other arguments: move {file.parent} away")
    rows, lock = result["rows"], Lock()

    def keep(key: str, work: Callable[[], dict]) -> None:
        one = work()
        with lock:
            rows[key] = one
            write_json(
                file, what | {"rows": {key: rows[key] for key in [*plan, *rows] if key in rows}}
            )

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(keep, key, work) for key, work in plan.items() if key not in rows]
        try:
            for done in tqdm(as_completed(running), total=len(running), desc=name, disable=None):
                done.result()
        except BaseException:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # those that run are waited for, and kept
            raise
    print(render(table, file))
    return file


def render(make: Callable[[dict], Any], file: Path) -> Any:
    """The table or figure that `make` makes of a JSON file. Raises ValueError, in one line, if it can't."""
    try:
        return make(json.loads(file.read_text()))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{file} is no result of this experiment ({type(error).__name__}: {error})"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers; columns without any are left out."""
    used = [i for i in range(len(heading)) if i == 0 or any(row[i] for row in rows)]
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)


def cell(values: list, digits: int) -> str:
    """The mean and, of several values, the range. Infinite ones are strings in JSON."""
    values = [float(value) for value in values]
    if not values:
        return ""
    middle, low, high = (
        f"{round(v, digits) + 0.0:.{digits}f}" for v in (mean(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle  # + 0.0: no -0.0


def by_row(result: dict) -> dict[str, list[dict]]:
    """The runs of each row, with one seed or several."""
    groups: dict[str, list[dict]] = {}
    for one in result["rows"].values():
        groups.setdefault(one["row"], []).append(one)
    return groups


def table(result: dict) -> str:
    """What evaluate.py said, row by row; runs of one row, with other seeds, become one. Real digits come last."""
    groups = by_row(result)
    for one in result["rows"].values():
        for key, name in (
            ("real_digits", "real digits"),
            ("real_digits_of_these_classes", "real digits of the same classes"),
        ):
            if key in one:
                groups[f"*{name}, {one['levels']} levels*"] = [{"samples": one[key]}]
    rows = []
    for name, runs in sorted(groups.items(), key=lambda group: group[0].startswith("*")):  # stable
        bounds = [one["bound"] for one in runs if "bound" in one]
        error = f" ± {float(bounds[0]['standard_error']):.1f}" if len(bounds) == 1 else ""
        cells = [
            name,
            f"{len(runs)}" if len(runs) > 1 else "",
            cell([b["nats_per_image"] for b in bounds], 1) + error,
        ]
        for key, digits in QUALITY.items():
            cells.append(
                cell([one["samples"][key] for one in runs if key in one.get("samples", {})], digits)
            )
        rows.append(cells)
    return markdown(
        [result["title"], "seeds", "bound", *(key.replace("_", " ") for key in QUALITY)], rows
    )


def quality_figure(
    curves: dict[str, list[dict]], x: str, xlabel: str, samples: str, real: dict | None = None
):
    """Bound and Fréchet distance, that of real digits dashed, against the entry `x` of rows; a curve for each name."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for name, rows in curves.items():
        bounds = [(one[x], one["bound"]["nats_per_image"]) for one in rows if "bound" in one]
        if bounds:
            left.plot(*zip(*bounds, strict=True), marker="o", label=name)
        distances = [one["samples"]["frechet_distance"] for one in rows]
        right.plot([one[x] for one in rows], distances, marker="o", label=name)
    if real:
        right.axhline(real["frechet_distance"], color="gray", linestyle="--", label="real digits")
    left.set(ylabel="bound, nats per image")
    right.set(ylabel=f"Fréchet distance of {samples}")
    ticks = [one[x] for one in next(iter(curves.values()), [])]
    for axis in (left, right):
        low, high = axis.dataLim.intervaly
        wide = high > 10 * low  # no data: -inf > inf
        axis.set(
            xlabel=xlabel,
            xscale="log" if axis.has_data() else "linear",
            yscale="log" if wide else "linear",
        )
        axis.set_xticks(ticks, [f"{round(tick, 2):g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    if right.get_yscale() == "linear":
        right.set_ylim(bottom=0)  # so that noise looks like noise
    right.legend()
    return figure
