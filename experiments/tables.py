"""Tables of what evaluate.py reports, each row trained and evaluated with flags of its own.

    python -m experiments.tables choices --data-root data      # five minutes a run on one core
    python -m experiments.tables choices --data-root data --rows "the paper's configuration"
    python -m experiments.tables levels --data-root data       # 256 levels: up to 15 minutes, 2 GB
    python -m experiments.tables headline --data-root data --amp --jobs 4     # minutes on a GPU

Choices, levels and guidance are judged on validation digits, the other tables on test digits.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cli import REPOSITORY, UserError, add_speed, integer, run

from checkpoint import RELEASED, read_checkpoint
from dataset import load_dataset, sha256
from experiments import common
from experiments.common import cell, markdown, nats

DYNAMIC = RELEASED.with_name("d3pm_mnist_dynamic.pth")
BOUNDS = ("bound", "bound_with_labels")
KEPT = ("provenance", "sha256", "levels", "timesteps", *BOUNDS, "samples", *common.REAL)
# evaluate.py always measures a bound. Where only samples are wanted: of two digits, and dropped.
NO_BOUND = "--images 2 --repeats 1"


class Row(NamedTuple):
    """Flags of train.py, or a checkpoint; and flags for each call of evaluate.py."""

    label: str
    evaluate: list[str]
    train: str = ""
    checkpoint: Path = RELEASED


# ------------------------------------------------------------------------------------------------
# Networks that are trained for the table

ADAM = "--steps 650 --lr 2e-3 --optimizer adamw"
CHOICES = {
    "uniform, cosine, cross-entropy": ADAM,
    "uniform, cosine, variational": f"{ADAM} --loss variational",
    "uniform, cosine, hybrid": f"{ADAM} --loss hybrid",
    "uniform, cosine, cross-entropy, joint form": f"{ADAM} --reverse joint",
    "uniform, cosine, variational, joint form": f"{ADAM} --loss variational --reverse joint",
    "uniform, cosine, hybrid, joint form": f"{ADAM} --loss hybrid --reverse joint",
    "uniform, linear, cross-entropy": f"{ADAM} --schedule linear",
    "absorbing, mutual_info, cross-entropy": f"{ADAM} --transition absorbing",
    "absorbing, mutual_info, variational": f"{ADAM} --transition absorbing --loss variational",
    "absorbing, mutual_info, hybrid": f"{ADAM} --transition absorbing --loss hybrid",
    "the paper's configuration": "--steps 650 --recipe paper",
}
LEVELS = {
    "uniform": "--transition uniform",
    "absorbing": "--transition absorbing",
    "gaussian, joint form": "--transition gaussian --reverse joint",
    "gaussian, joint form, logistic": "--transition gaussian --reverse joint --output logistic",
    "gaussian": "--transition gaussian",
    "gaussian, fitted, joint form": "--transition gaussian --schedule fitted --reverse joint",
    "uniform, joint form": "--transition uniform --reverse joint",
}


def choices() -> dict[str, Row]:
    drawn = f"--num-samples 500 --timesteps 50 --last-step draw {NO_BOUND}"
    evaluate = [f"--split validation {flags}" for flags in ("--num-samples 0", drawn)]
    return {
        f"{label}, seed {seed}": Row(label, evaluate, f"{flags} --seed {seed}")
        for label, flags in CHOICES.items()
        for seed in range(3)
    }


def levels() -> dict[str, Row]:
    """The loss is the bound. Two seeds for the first four rows of 256 levels, else one."""
    rows, every = {}, "--timesteps 200 --loss variational --optimizer muon --lr 2e-3"
    for K in (8, 32, 256):
        size, images = ("--steps 400 --batch-size 64", 1000)
        if K == 256:
            size, images = ("--steps 800 --batch-size 16", 200)
        evaluate = [f"--split validation --num-samples 0 --images {images}"]
        for i, (label, flags) in enumerate(LEVELS.items()):
            for seed in range(2 if K == 256 and i < 4 else 1):
                train = f"--levels {K} {size} {every} {flags} --seed {seed}"
                rows[f"{K} levels, {label}, seed {seed}"] = Row(label, evaluate, train)
    return rows


def levels_table(result: dict) -> str:
    """Bits per dimension by the number of levels; their part L_0 for the last number."""
    bounds: dict[str, dict[int, list[dict]]] = {}
    for one in result["rows"].values():
        bounds.setdefault(one["row"], {}).setdefault(one["levels"], []).append(one["bound"])
    every = sorted({one["levels"] for one in result["rows"].values()})
    lines = []
    for label, by_levels in bounds.items():
        runs = [by_levels.get(K, []) for K in every]
        line = [label, *(cell([b["bits_per_dimension"] for b in some], 3) for some in runs)]
        bits = [b["L_0"] / b["nats_per_image"] * b["bits_per_dimension"] for b in runs[-1]]
        lines.append([*line, cell(bits, 3)])
    return markdown([result["title"], *(f"{K} levels" for K in every), "of it L_0"], lines)


# ------------------------------------------------------------------------------------------------
# The models that ship


def steps() -> dict[str, Row]:
    rows = {f"{n} timesteps": f"--timesteps {n}" for n in (5, 10, 20, 30, 50, 100, 200)}
    return {label: Row(label, [f"--num-samples 1000 {flags}"]) for label, flags in rows.items()}


def guidance() -> dict[str, Row]:
    labels = ["--no-labels", *(f"--guidance {w}" for w in ("0", "0.1", "0.25", "0.5", "1"))]
    evaluate = f"--split validation --num-samples 5000 {NO_BOUND}"
    return {label: Row(label, [f"{evaluate} {label}"]) for label in labels}


def likelihood() -> dict[str, Row]:
    dynamic = "--num-samples 0 --binarizations 2"
    many = "--num-samples 0 --timesteps 100 --trajectories 1000 --images 16"
    rows = [
        Row("thresholded, 1,000 timesteps", ["--num-samples 0"]),
        Row("thresholded, 100 timesteps", [many]),
        Row("dynamic, 1,000 timesteps", [f"{dynamic} --trajectories 16 --images 32"], "", DYNAMIC),
        Row(
            "dynamic, 200 timesteps",
            [f"{dynamic} --timesteps 200 --trajectories 1000 --images 24"],
            checkpoint=DYNAMIC,
        ),
    ]
    return {row.label: row for row in rows}


def likelihood_table(result: dict) -> str:
    lines = []
    for one in result["rows"].values():
        for key, label in zip(BOUNDS, (one["row"], f"{one['row']}, class given"), strict=True):
            if key in one:
                line = [label, nats(one[key], 2), "", "", ""]
                for last in one[key].get("importance_weighted", {}).get("by_trajectories", [])[-1:]:
                    gain = f"{last['gain']:.2f} ± {last['gain_standard_error']:.2f}"
                    line[2:] = [f"{last['trajectories']:,}", gain, nats(last, 2)]
                lines.append(line)
    heading = [result["title"], "bound", "trajectories", "gain", "importance-weighted bound"]
    return markdown(heading, lines)


def headline() -> dict[str, Row]:
    """Each way to draw. Bound and samples of a row are of the same chain (`--last-step draw`)."""
    draw, weighted = "--num-samples 5000", "--trajectories 64 --images 100"
    chain = f"{draw} --timesteps 100 --last-step draw"
    rows = {
        "thresholded, no class given": f"--no-labels {chain} {weighted}",
        "thresholded, class given": f"{chain} {NO_BOUND}",
        "thresholded, as sample.py draws": f"{draw} {NO_BOUND}",
        "dynamic, no class given": f"--binarizations 2 {chain} {weighted}",
    }
    return {
        label: Row(label, [flags], checkpoint=DYNAMIC if label.startswith("dynamic") else RELEASED)
        for label, flags in rows.items()
    }


def headline_table(result: dict, small: bool = False) -> str:
    """In brackets: as many real digits of the same classes. `small` is for the front page."""
    quality = {key: name for key, (name, _) in common.QUALITY.items() if key != "ink"}
    if small:
        quality = {key: quality[key] for key in ("frechet_distance", "label_accuracy")}
    lines = []
    for label, one in result["rows"].items():
        samples, real = one["samples"], one.get("real_digits_of_these_classes", one["real_digits"])
        line = [label, "" if small else f"{samples['timesteps']}", "", ""]
        source, key = one, "bound"
        if label == "thresholded, class given":  # measured with the row above
            source, key = result["rows"].get("thresholded, no class given", {}), BOUNDS[1]
        if key in source:
            last = source[key]["importance_weighted"]["by_trajectories"][-1]
            line[2:] = [nats(source[key]), nats(last)]
        for key in quality:
            text = common.share if key == "isolated_white" else lambda one, key: f"{one[key]:.3f}"
            of_real = f" ({text(real, key)})" if key in real else ""
            line.append(text(samples, key) + of_real if key in samples else "")
        lines.append(line)
    heading = [result["title"], "timesteps", "bound", "importance-weighted bound"]
    return markdown([*heading, *quality.values()], lines)


# ------------------------------------------------------------------------------------------------

# name: (title, rows, table)
TABLES = {
    "headline": ("5,000 samples", headline, headline_table),
    "likelihood": ("nats per image", likelihood, likelihood_table),
    "steps": ("1,000 samples", steps, common.table),
    "guidance": ("5,000 samples", guidance, common.table),
    "choices": ("650 steps", choices, common.table),
    "levels": ("bits per dimension", levels, levels_table),
}


def command(script: str, flags: list, log: Path) -> None:
    """Run a script of the repository on one thread and add its output to `log`.

    Raises UserError if it fails, with the last line that it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, str(REPOSITORY / script), *map(str, flags)]
    with open(log, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(line, stdout=file, stderr=file, env=environment).returncode
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise UserError(f"{last} ({script} ended with code {code}, see {log})")


def planned(name: str, row: Row, every: list[str], data_root: Path) -> tuple[str, Callable]:
    """The flags of a row as one text, and the function that measures it.

    The flags name the folder of the row's run, so a run with other flags is never used again.
    """
    start = f"train.py {row.train}" if row.train else f"checkpoint {sha256(row.checkpoint)}"
    flags = "; ".join([start, *(f"evaluate.py {one}" for one in row.evaluate), " ".join(every)])
    digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
    folder = common.OUT / name / f"{row.label.replace(' ', '_')}-{digest}"
    shared = [*every, "--data-root", data_root.resolve(), "--out-dir", folder]

    def measure() -> dict:
        checkpoint, result = row.checkpoint, {"row": row.label}
        if row.train:
            checkpoint = folder / "checkpoints" / "last.pth"
            saved = read_checkpoint(checkpoint) if checkpoint.exists() else None
            if not saved or saved["step"] < saved["settings"]["steps"]:
                resume = ["--resume"] if saved else []
                command("train.py", [*row.train.split(), *shared, *resume], folder / "log.txt")
        for one in row.evaluate:
            line = [checkpoint, *one.split(), *shared, "--overwrite"]
            command("evaluate.py", line, folder / "log.txt")
            report = json.loads((folder / "evaluation.json").read_text())
            kept = [
                key for key in KEPT if key in report and not (key in BOUNDS and NO_BOUND in one)
            ]
            result = {key: report[key] for key in kept} | result
        return result

    return flags, measure


def main() -> None:
    p = common.experiment_parser(__doc__)
    p.add_argument("table", choices=TABLES)
    p.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (default all)")
    jobs = "commands at a time, each on one thread (default: one for each core)"
    p.add_argument("--jobs", type=integer(1), default=os.cpu_count(), help=jobs)
    add_speed(p.add_argument)
    args = p.parse_args()
    title, rows, show = TABLES[args.table]
    labels = list(dict.fromkeys(row.label for row in rows().values()))
    if unknown := set(args.rows or ()) - set(labels):
        p.error(f"--rows: there is no row {min(unknown)!r}: choose from {'; '.join(labels)}")
    load_dataset("validation", args.data, args.data_root)  # if there are none, the error comes now
    every = ["--data", args.data, *["--amp"] * args.amp, *["--compile"] * args.compile]
    plan = {
        key: planned(args.table, row, every, args.data_root)
        for key, row in rows().items()
        if row.label in (args.rows or labels)
    }
    common.collect(args.table, title, plan, show, args.jobs)


if __name__ == "__main__":
    run(main)
