"""Tables of evaluate.py's reports. Each row has its own flags for training and evaluation.

    python -m experiments.tables choices --data-root data      # minutes a run
    python -m experiments.tables choices --data-root data --rows "the paper's configuration"
    python -m experiments.tables levels --data-root data       # 256 levels: up to 15 minutes, 2 GB
    python -m experiments.tables offline --data offline        # ten minutes a run
    python -m experiments.tables small --data offline          # half an hour a run
    python -m experiments.tables headline --data-root data --amp         # minutes on a GPU

Headline, likelihood and steps use test digits, the other tables validation digits. Each row is
saved to results_d3pm/experiments/NAME/NAME.json as soon as it is measured. An interrupted table
continues with the missing rows.
"""

import csv
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from cli import REPOSITORY, UserError, add_speed, provenance, run

from tqdm import tqdm

from checkpoint import RELEASED, write_json
from dataset import load_dataset, sha256
from experiments import common
from experiments.common import by_label, cell, markdown, measured, nats, weighted

DYNAMIC = RELEASED.with_name("d3pm_mnist_dynamic.pth")
BOUNDS = ("bound", "bound_with_labels")
KEPT = ("sha256", "levels", "timesteps", *BOUNDS, "samples", *common.REAL)
# evaluate.py always measures a bound. For samples alone, it is of two digits, and dropped.
NO_BOUND = "--images 2 --repeats 1"


class Row(NamedTuple):
    """Flags of train.py or a checkpoint, and the flags of each call of evaluate.py."""

    label: str
    evaluate: list[str]
    train: str = ""
    checkpoint: Path = RELEASED


# ------------------------------------------------------------------------------------------------
# Networks that are trained for the table

ADAMW = "--lr 2e-3 --optimizer adamw --loss cross_entropy --hybrid-weight 0.001"
ABSORBING = "--transition absorbing"
CHOICES = {
    "uniform, cosine, cross-entropy": ADAMW,
    "uniform, cosine, variational": f"{ADAMW} --loss variational",
    "uniform, cosine, hybrid": f"{ADAMW} --loss hybrid",
    "uniform, cosine, cross-entropy, joint form": f"{ADAMW} --reverse joint",
    "uniform, cosine, variational, joint form": f"{ADAMW} --loss variational --reverse joint",
    "uniform, cosine, hybrid, joint form": f"{ADAMW} --loss hybrid --reverse joint",
    "uniform, linear, cross-entropy": f"{ADAMW} --schedule linear",
    "absorbing, mutual_info, cross-entropy": f"{ADAMW} {ABSORBING}",
    "absorbing, mutual_info, variational": f"{ADAMW} {ABSORBING} --loss variational",
    "absorbing, mutual_info, hybrid": f"{ADAMW} {ABSORBING} --loss hybrid",
    "the paper's configuration": "--recipe paper",
}
OFFLINE = {
    "hybrid, rate 4e-3": "--loss hybrid --hybrid-weight 0.005 --lr 4e-3",
    "cross-entropy, rate 2e-3": "--loss cross_entropy --lr 2e-3",
    "hybrid, rate 4e-3, augment 0.5": "--loss hybrid --hybrid-weight 0.005 --lr 4e-3 --augment 0.5",
    "hybrid, rate 2e-3": "--loss hybrid --hybrid-weight 0.005 --lr 2e-3",
    "variational, rate 2e-3": "--loss variational --lr 2e-3",
    "cross-entropy, rate 4e-3": "--loss cross_entropy --lr 4e-3",
}
SHOWN = "frechet_distance", "recall", "isolated_white"
ON_THE_BOUND = "--loss variational --lr 2e-3 --amp --compile"
SMALL = {
    "none": "--augment 0",
    "augment 0.5": "--augment 0.5",
    "augment 0.8": "--augment 0.8",
    "dropout 0.1": "--augment 0 --dropout 0.1",
    "dropout 0.3": "--augment 0 --dropout 0.3",
    "dropout 0.5": "--augment 0 --dropout 0.5",
    "weight decay 0.1": "--augment 0 --weight-decay 0.1",
    "weight decay 0.3": "--augment 0 --weight-decay 0.3",
    "augment 0.5, weight decay 0.3": "--augment 0.5 --weight-decay 0.3",
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
        f"{label}, seed {seed}": Row(label, evaluate, f"--steps 650 {flags} --seed {seed}")
        for label, flags in CHOICES.items()
        for seed in range(3)
    }


def levels() -> dict[str, Row]:
    """Trained on the bound. Two seeds for the first four rows of 256 levels, else one."""
    rows, short = {}, "--steps 400 --batch-size 64"
    sizes = (8, short, 1000), (32, short, 1000), (256, "--steps 800 --batch-size 16", 200)
    for K, size, images in sizes:
        evaluate = [f"--split validation --num-samples 0 --images {images}"]
        for i, (label, flags) in enumerate(LEVELS.items()):
            for seed in range(2 if K == 256 and i < 4 else 1):
                train = f"--levels {K} {size} --timesteps 200 --loss variational --optimizer muon"
                train = f"{train} --lr 2e-3 {flags} --seed {seed}"
                rows[f"{K} levels, {label}, seed {seed}"] = Row(label, evaluate, train)
    return rows


def offline() -> dict[str, Row]:
    """Five epochs are a minute on one core. Three seeds of the longest runs of the first two."""
    evaluate, rows = ["--num-samples 1000 --repeats 8"], {}
    for i, (loss, flags) in enumerate(OFFLINE.items()):
        for epochs in (5, 10, 25, 50) if i < 2 else (50,):
            for seed in range(3 if i < 2 and epochs == 50 else 1):
                label = f"{epochs} epochs, {loss}"
                train = f"--epochs {epochs} {flags} --seed {seed}"
                rows[f"{label}, seed {seed}"] = Row(label, evaluate, train)
    return rows


def offline_table(result: dict) -> str:
    """Bound and Fréchet distance by loss and number of epochs."""
    cells: dict[str, dict[str, str]] = {}
    for label, runs in by_label(result).items():
        epochs, _, loss = label.partition(", ")
        bound = nats([one["bound"] for one in runs], 1)
        distance = measured([one["samples"] for one in runs], "frechet_distance", 2)
        cells.setdefault(loss, {})[epochs] = f"{bound}; {distance}"
    columns = sorted(
        {epochs for row in cells.values() for epochs in row}, key=lambda text: int(text.split()[0])
    )
    lines = [[loss, *(row.get(epochs, "") for epochs in columns)] for loss, row in cells.items()]
    return markdown([result["title"], *columns], lines)


def small() -> dict[str, Row]:
    """What keeps a network from learning few pictures by heart: 150 epochs."""
    evaluate = ["--split validation --num-samples 1000 --repeats 8"]
    every = f"--epochs 150 {ON_THE_BOUND}"
    return {name: Row(name, evaluate, f"{every} {flags}") for name, flags in SMALL.items()}


def augment() -> dict[str, Row]:
    """With how many digits augmentation stops helping: the same number of steps for all."""
    evaluate, rows = ["--split validation --num-samples 1000"], {}
    for n in (1_000, 4_500, 15_000, 55_000):
        every = f"--steps 2625 {ON_THE_BOUND} --validate-every {-(-525 * 128 // n)} --limit {n}"
        for share in (0, 0.5):
            label = f"{n:,} digits" + ", augmented" * (share > 0)
            rows[label] = Row(label, evaluate, f"{every} --augment {share}")
    return rows


def overfitting_table(result: dict) -> str:
    """The bound; what train.py saw: its best and last validation bound, its loss; the samples."""
    lines = []
    for one in result["rows"].values():
        best, last = one["best"], one["last"]
        seen = f"{best['validation_bound']:.1f} (epoch {best['epoch']:.0f})"
        seen += f"; {last['validation_bound']:.1f}"
        loss = f"{last['train_loss'] * 1024:.1f}"  # 32x32 pixels
        quality = [measured([one["samples"]], key) for key in SHOWN]
        lines.append([one["row"], nats([one["bound"]], 1), seen, loss, *quality])
    heading = [result["title"], "bound", "best and last on the way", "training loss"]
    return markdown([*heading, *(common.QUALITY[key][0] for key in SHOWN)], lines)


def levels_table(result: dict) -> str:
    """Bits per dimension by number of levels, and the part L_0 for the most levels."""
    every, lines = sorted({one["levels"] for one in result["rows"].values()}), []
    for label, runs in by_label(result).items():
        bounds = [[one["bound"] for one in runs if one["levels"] == K] for K in every]
        bits = [cell([bound["bits_per_dimension"] for bound in some], 3) for some in bounds]
        shares = [b["L_0"] / b["nats_per_image"] * b["bits_per_dimension"] for b in bounds[-1]]
        lines.append([label, *bits, cell(shares, 3)])
    return markdown([result["title"], *(f"{K} levels" for K in every), "L_0 alone"], lines)


# ------------------------------------------------------------------------------------------------
# The models that ship


def released(flags: dict[str, str]) -> dict[str, Row]:
    """One call of evaluate.py per label, whose first word selects the model."""
    models = {label: DYNAMIC if label.startswith("dynamic") else RELEASED for label in flags}
    return {label: Row(label, [flags[label]], checkpoint=models[label]) for label in flags}


def steps() -> dict[str, Row]:
    every = (5, 10, 20, 30, 50, 100, 200)
    return released({f"{n} timesteps": f"--num-samples 1000 --timesteps {n}" for n in every})


def guidance() -> dict[str, Row]:
    every = ["--no-labels", *(f"--guidance {w}" for w in ("0", "0.1", "0.25", "0.5", "1"))]
    evaluate = f"--split validation --num-samples 5000 {NO_BOUND}"
    return released({flag: f"{evaluate} {flag}" for flag in every})


def likelihood() -> dict[str, Row]:
    bound, many = "--num-samples 0", "--trajectories 1000 --weighted-images"
    two, few = f"{bound} --binarizations 2", "--trajectories 16 --weighted-images 32"
    flags = {
        "thresholded, 1,000 timesteps": bound,
        "thresholded, 100 timesteps, 1,000 trajectories": f"{bound} --timesteps 100 {many} 16",
        "dynamic, 1,000 timesteps, 16 trajectories": f"{two} {few}",
        "dynamic, 200 timesteps, 1,000 trajectories": f"{two} --timesteps 200 {many} 24",
    }
    return released(flags)


def headline() -> dict[str, Row]:
    """One row per way to sample. Rows with a bound sample from its chain (`--last-step draw`)."""
    draw, weighted = "--num-samples 5000", "--trajectories 64 --weighted-images 100"
    chain = f"{draw} --timesteps 100 --last-step draw"
    flags = {
        "thresholded, no class given": f"--no-labels {chain} {weighted}",
        "thresholded, class given": f"{chain} {NO_BOUND}",
        "thresholded, as sample.py draws": f"{draw} {NO_BOUND}",
        "dynamic, no class given": f"--binarizations 2 {chain} {weighted}",
    }
    return released(flags)


def headline_table(result: dict, small: bool = False) -> str:
    """In brackets: as many real digits of the same classes. `small`: for the front page."""
    every = ["frechet_distance", "precision", "recall", "isolated_white", "label_accuracy"]
    quality, rows, lines = every[::4] if small else every, result["rows"], []
    for label, one in rows.items():
        samples, real = one["samples"], one.get("real_digits_of_these_classes", one["real_digits"])
        source, key = one, "bound"
        if label == "thresholded, class given":  # measured with the row above
            source, key = rows.get("thresholded, no class given", {}), "bound_with_labels"
        bounds = [source[key]] if key in source else []
        line = [label, "" if small else f"{samples['timesteps']}"]
        line += [nats(bounds, 1), nats(weighted(bounds), 1)]
        for key in quality:
            of_real = f" ({measured([real], key)})" if key in real else ""
            line.append(measured([samples], key) + of_real)
        lines.append(line)
    heading = [result["title"], "timesteps", "bound", "importance-weighted bound"]
    return markdown([*heading, *(common.QUALITY[key][0] for key in quality)], lines)


# ------------------------------------------------------------------------------------------------

# name: (title, rows, table)
TABLES = {
    "headline": ("5,000 samples", headline, headline_table),
    "likelihood": ("nats per image", likelihood, common.table),
    "steps": ("1,000 samples", steps, common.table),
    "guidance": ("5,000 samples", guidance, common.table),
    "choices": ("650 steps", choices, common.table),
    "offline": ("bound; Fréchet distance", offline, offline_table),
    "small": ("150 epochs", small, overfitting_table),
    "augment": ("2,625 steps", augment, overfitting_table),
    "levels": ("bits per dimension", levels, levels_table),
}


def command(script: str, *flags) -> None:
    """Run a script of the repository. Raises UserError if it fails."""
    code = subprocess.run([sys.executable, REPOSITORY / script, *map(str, flags)]).returncode
    if code:
        raise UserError(f"{script} failed with code {code}; finished rows are kept")


def measure(row: Row, folder: Path, every: list) -> dict:
    """Train and evaluate in the folder, resuming an interrupted run."""
    checkpoint, result = row.checkpoint, {"row": row.label}
    if row.train:
        checkpoint = folder / "checkpoints" / "last.pth"
        if not checkpoint.with_name("weights.pth").exists():  # written last
            resume = ["--resume"] * checkpoint.exists()
            command("train.py", *row.train.split(), *every, "--out-dir", folder, *resume)
        with (folder / "metrics.csv").open(newline="") as file:
            history = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]
        result["last"] = history[-1]
        result["best"] = min(history, key=lambda line: line["validation_bound"])
    for flags in row.evaluate:
        where = ["--out-dir", folder, "--overwrite"]
        command("evaluate.py", checkpoint, *flags.split(), *every, *where)
        report = common.read_result(folder / "evaluation.json")
        dropped = BOUNDS if NO_BOUND in flags else ()
        kept = [key for key in KEPT if key in report and key not in dropped]
        result = {key: report[key] for key in kept} | result
    return result


def complete(name: str, rows: dict[str, Row], every: list, data_root: Path) -> dict:
    """Measure missing rows; return the result. Raises UserError if a row has other flags there."""
    file, flags = common.output(name), {}
    result = common.read_result(file) if file.exists() else {"title": TABLES[name][0], "rows": {}}
    done = result["rows"]
    for key, row in rows.items():
        start = f"train.py {row.train}" if row.train else f"checkpoint {sha256(row.checkpoint)}"
        evaluate = [f"evaluate.py {one}" for one in row.evaluate]
        flags[key] = "; ".join([start, *evaluate, " ".join(every)])
        if key in done and done[key].get("flags") != flags[key]:
            raise UserError(f"{file} holds {key!r} with other flags: move it away")
    for key in tqdm([key for key in rows if key not in done], desc=name, disable=None):
        # The folder is named by the flags, so a run with other flags is not reused.
        digest = hashlib.sha256(flags[key].encode()).hexdigest()[:8]
        folder = file.with_name(f"{rows[key].label.replace(' ', '_')}-{digest}")
        row = measure(rows[key], folder, [*every, "--data-root", data_root.resolve()])
        done[key] = row | {"flags": flags[key], "provenance": provenance()}
        write_json(file, result)
    return result


def main() -> None:
    p = common.experiment_parser(__doc__)
    p.add_argument("table", choices=TABLES)
    p.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (default all)")
    add_speed(p.add_argument)
    args = p.parse_args()
    _, make_rows, show = TABLES[args.table]
    rows = make_rows()
    labels = list(dict.fromkeys(row.label for row in rows.values()))
    if unknown := set(args.rows or ()) - set(labels):
        p.error(f"--rows: there is no row {min(unknown)!r}: choose from {'; '.join(labels)}")
    rows = {key: row for key, row in rows.items() if row.label in (args.rows or labels)}
    load_dataset("validation", args.data, args.data_root)  # fails now if there are none
    every = ["--data", args.data, *["--amp"] * args.amp, *["--compile"] * args.compile]
    print(show(complete(args.table, rows, every, args.data_root)))


if __name__ == "__main__":
    run(main)
