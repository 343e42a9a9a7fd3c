"""Measure a model: its bound on test images, the quality of its samples if they are digits, and
whether it memorized the training set.

    python evaluate.py                                   # the released model
    python evaluate.py results_d3pm/checkpoints/last.pth
    python evaluate.py CHECKPOINT --exact --images 500   # every t for 500 digits
    python evaluate.py CHECKPOINT --trajectories 64      # also the importance-weighted bound
    python evaluate.py --train-classifier                # retrain the classifier

Writes evaluation.json, bound_terms.png, nearest.png and, with --trajectories, gain.png to the
run's folder, over an earlier evaluation only with --overwrite. Samples are drawn with the defaults
of sample.py. The bound uses all timesteps.
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cli
from cli import UserError, integer, number, path

import torch
from torch import Tensor

import checkpoint as files
import metrics
from checkpoint import RELEASED, TIMESTEPS
from dataset import DIGITS, NAMES, Dataset, load_dataset, sha256, stream_seed, to_levels
from diffusion import LAST_STEPS, DiscreteDiffusion
from metrics import load_classifier, spread, summarize_bound, summarize_gain
from model import accelerated
from pictures import image_grid, plot_gains, plot_terms, save_figure, style_of, write_report
from trajectories import log_weights, respaced

OUTPUTS = ("evaluation.json", "bound_terms.png", "gain.png", "nearest.png")
OF_THE_BOUND = ("images", "repeats", "exact", "binarizations", "trajectories", "weighted_images")
OF_THE_SAMPLES = ("guidance", "last_step", "no_labels", "seed")
MIN_SAMPLES = 20
NOT_JUDGED = "the classifier that judges samples knows only MNIST's digits"
NO_BOUND = "the offline digits are in MNIST's training split, which this model was trained on"


def parse_arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("checkpoint", nargs="?", type=path(), help="a .pth file (default: the released model)")
    words = "of the images (default test); choose settings on validation"
    add("--split", choices=["test", "validation"], default="test", help=words)
    words = "number of timesteps (default: all for the bound, as in sample.py for samples)"
    add("--timesteps", type=int, metavar="N", help=words)
    add("--images", type=integer(2), metavar="N", help="images for the bound (default all)")
    add("--repeats", type=integer(1), metavar="N", help="timesteps drawn per image (default 4)")
    add("--exact", action="store_true", help="use every timestep: T passes over the images")
    words = "random binarizations to average over (default 1), for --binarize dynamic models"
    add("--binarizations", type=integer(1), metavar="N", help=words)
    words = "also the importance-weighted bound: N passes per image and timestep"
    add("--trajectories", type=integer(1), metavar="N", help=words)
    words = "images for --trajectories (default 100: the gain varies little between images)"
    add("--weighted-images", type=integer(2), metavar="N", help=words)
    words = f"images to draw and judge (default 500, at least {MIN_SAMPLES}; 0: only the bound)"
    add("--num-samples", type=integer(0), default=500, metavar="N", help=words)
    words = "strength of classifier-free guidance for the samples (default 0)"
    add("--guidance", type=number(0), metavar="W", help=words)
    cli.add_last_step(add, LAST_STEPS)
    add("--no-labels", action="store_true", help="draw samples without class labels")
    add("--seed", type=cli.SEED, help="random seed of the samples (default 0)")
    cli.add_data(add, default=None)
    words = "default: the run's folder, or results_d3pm/evaluation for the released models"
    add("--out-dir", type=path(), help=words)
    add("--overwrite", action="store_true", help="replace an earlier evaluation in --out-dir")
    cli.add_device(add)
    cli.add_speed(add)
    words = "train the classifier that judges samples, on MNIST, and write OUT_DIR/classifier.pth"
    add("--train-classifier", action="store_true", help=words)
    args = p.parse_args()
    args.given = {key for key in vars(args) if getattr(args, key) != p.get_default(key)}
    if 0 < args.num_samples < MIN_SAMPLES:
        p.error(f"--num-samples must be 0 or at least {MIN_SAMPLES}")
    return args


def refuse(args: argparse.Namespace, names, reason: str) -> None:
    """Raise UserError if one of the flags `names` was given: `reason` makes it useless."""
    for name in sorted(args.given & set(names)):
        flag = f"--{name.replace('_', '-')}" if name != "checkpoint" else "a checkpoint"
        raise UserError(f"{flag} does nothing here: {reason}")


def check_flags(args: argparse.Namespace, num_labels: int, binarize: str) -> None:
    """Raise UserError for a flag that has no effect."""
    trained = f"{args.checkpoint} was trained"
    for applies, names, reason in (
        (args.num_samples == 0, OF_THE_SAMPLES, "--num-samples 0"),
        (args.exact, ["repeats"], "--exact"),
        (not args.trajectories, ["weighted_images"], "no --trajectories"),
        (args.no_labels, ["guidance"], "--no-labels"),
        (not num_labels, ["no_labels", "guidance"], f"{trained} without classes"),
        (binarize != "dynamic", ["binarizations"], f"{trained} without random binarization"),
    ):
        if applies:
            refuse(args, names, reason)


def prepare_outputs(args: argparse.Namespace) -> None:
    """Set --out-dir. Raises UserError if the checkpoint or an earlier report would be lost."""
    if args.out_dir is None:
        folder = args.checkpoint.resolve().parent
        args.out_dir = folder.parent if folder.name == "checkpoints" else folder
        if folder == RELEASED.parent:  # part of the repository
            args.out_dir = Path("results_d3pm") / "evaluation"
    for file in filter(Path.exists, (args.out_dir / name for name in OUTPUTS)):
        if file.samefile(args.checkpoint):
            raise UserError(f"can't write {file}: the same file is read by this command")
        if not file.is_file():
            raise UserError(f"can't write {file}: it is not a regular file")
        if not args.overwrite:
            raise UserError(f"{file} exists: give --overwrite, or another --out-dir")


# --------------------------------------------------------------------------------------------------
# The measurements


@dataclass
class Evaluation:
    """One model, the images it is measured on, and the arguments."""

    args: argparse.Namespace
    diffusion: DiscreteDiffusion
    binarize: str
    style: dict  # of pictures, from `style_of`
    test: Dataset  # for the bound, and as reference for samples
    other: Dataset | None  # real digits to compare with samples; None if not digits
    train: Dataset  # searched for the nearest neighbours of samples
    name: str  # of `test`
    seen: bool = False  # whether the model was trained on `test`

    def levels(self, grey: Tensor, seed: int) -> Tensor:
        # The bound draws its noise from `seed` itself, so binarization needs another stream.
        generator = torch.Generator().manual_seed(stream_seed(seed))
        return to_levels(grey, self.diffusion.num_levels, self.binarize, generator)

    def inputs(self, rows: Tensor, seed: int, labelled: bool) -> tuple:
        """These rows in one random binarization: x_0, a generator for the noise, labels or None."""
        x_0 = self.levels(self.test.images, seed)[rows]
        y = self.test.labels[rows] if labelled else None
        return x_0, torch.Generator().manual_seed(seed), y

    def announce(self) -> None:
        """Time a few network passes and print the expected duration if it exceeds a minute."""
        args, T = self.args, self.diffusion.timesteps
        images = min(args.images or math.inf, len(self.test.images))
        passes = images * (T if args.exact else 1 + (args.repeats or 4)) * (args.binarizations or 1)
        passes += min(args.weighted_images or 100, images) * (args.trajectories or 0) * T
        passes *= 0 if self.seen else 2 if self.diffusion.num_labels else 1
        steps = T if args.timesteps else min(TIMESTEPS, T)
        passes += args.num_samples * steps * (2 if args.guidance else 1)
        x_0 = self.levels(self.test.images[: self.diffusion.suitable_batch()], 0)
        for _ in range(2):  # the first is the warm-up
            start = time.perf_counter()
            tried = self.diffusion.bound_terms(x_0, 1).t.numel()
            seconds = time.perf_counter() - start
        minutes = seconds * passes / tried / 60
        if minutes > 1:
            print(f"{passes:,} network passes: about {minutes:.3g} minutes")

    def likelihood(self) -> tuple[dict, dict]:
        """The report's bounds without and with labels; functions that plot, by file name."""
        report, gains, plots, args, diffusion = {}, {}, {}, self.args, self.diffusion
        rows = spread(torch.arange(len(self.test.labels)), args.images)
        weighted_rows = spread(rows, args.weighted_images or 100)
        n, num_t = args.binarizations or 1, None if args.exact else args.repeats or 4
        for labelled in [False, True] if diffusion.num_labels else [False]:
            name = "with the label" if labelled else "no labels"
            draws, log_w = [], []
            for seed in range(n):
                x_0, generator, y = self.inputs(rows, seed, labelled)
                draws.append(diffusion.bound_terms(x_0, num_t, generator, y, progress=True))
            label_cost = math.log(diffusion.num_labels) if labelled else 0.0
            pixels = math.prod(self.test.size)
            bound = summarize_bound(*draws, label_cost=label_cost, pixels=pixels)
            show(f"bound, {name}", {"nats": bound})
            if not labelled:
                t = torch.cat([draw.t.flatten() for draw in draws])
                terms = torch.cat([draw.terms.flatten() for draw in draws])
                plots["bound_terms.png"] = partial(plot_terms, diffusion.network_t, t, terms)
            if args.trajectories:
                for seed in range(min(n, len(weighted_rows))):
                    x_0, generator, y = self.inputs(weighted_rows[seed::n], seed, labelled)
                    request = args.trajectories, generator, y
                    log_w.append(log_weights(diffusion, x_0, *request, progress=True))
                weighted = summarize_gain(torch.cat(log_w), bound)
                gains[name] = bound["nats_per_image"], weighted["by_trajectories"]
                title = f"importance-weighted bound, {name}"
                show(title, {str(row["trajectories"]): row for row in weighted["by_trajectories"]})
                bound["importance_weighted"] = weighted
                plots["gain.png"] = partial(plot_gains, gains)
            report["bound_with_labels" if labelled else "bound"] = bound
        return report, plots

    def samples(self, classifier) -> tuple[dict, Tensor]:
        """The report's quality of samples and of as many real digits; and the samples."""
        args, n, diffusion = self.args, self.args.num_samples, self.diffusion
        if args.timesteps is None:
            diffusion = respaced(diffusion, min(TIMESTEPS, diffusion.timesteps))
        asked = None if args.no_labels else diffusion.labels(n)
        last_step = args.last_step or files.default_last_step(diffusion)
        how = {"guidance": args.guidance or 0.0, "last_step": last_step}
        x = diffusion.sample(n, args.seed or 0, progress=True, y=asked, **how)
        if self.other is None:
            print(f"Samples are not judged: {NOT_JUDGED}")
            return {"not_judged": NOT_JUDGED}, x
        how |= {"timesteps": diffusion.timesteps, "labels": asked is not None}
        K, other = diffusion.num_levels, self.levels(self.other.images, 1)
        reference, _ = metrics.judge(classifier, self.levels(self.test.images, 0), K)
        judged = partial(metrics.quality, reference=reference, classifier=classifier, num_levels=K)
        report = {"samples": how | judged(x, asked=asked), "real_digits": judged(spread(other, n))}
        if asked is not None:  # MNIST's classes are not balanced
            rows = metrics.rows_of_classes(self.other.labels, asked.bincount(minlength=10))
            report["real_digits_of_these_classes"] = judged(other[rows])
        show("quality", report)
        return report, x

    def report(self, classifier) -> tuple[dict, dict]:
        """The contents of evaluation.json; functions that write the pictures, by file name."""
        report = {"checkpoint": str(self.args.checkpoint), "sha256": sha256(self.args.checkpoint)}
        report |= {"digits": self.name, "digits_were_in_training": self.seen}
        report |= {"levels": self.diffusion.num_levels, "binarization": self.binarize}
        report["timesteps"], trained = self.diffusion.timesteps, int(self.diffusion.network_t[-1])
        kind = f"{self.diffusion.num_levels} levels, {self.binarize}"
        print(f"{self.name}, {kind}, {self.diffusion.timesteps} of {trained} timesteps")
        self.announce()
        if self.seen:
            print(f"No bound: {NO_BOUND}")
        bounds, plots = ({}, {}) if self.seen else self.likelihood()
        report |= bounds
        pictures = {
            name: lambda file, plot=plot: save_figure(plot(), file) for name, plot in plots.items()
        }
        if self.args.num_samples:
            quality, x = self.samples(classifier)
            train = self.levels(self.train.images, 1)
            p = 1 if self.style["palette"] is None else 0  # p = 0 counts differing pixels
            rows, distances = metrics.nearest_digits(x[:8], train, p=p)
            report |= quality | {"nearest_training_digit": {"least_distances": distances.tolist()}}
            grid = image_grid(rows, columns=len(rows) // 8, **self.style)
            pictures["nearest.png"] = partial(grid.save, format="png")
        return report, pictures


def show(title: str, columns: dict[str, dict]) -> None:
    """Print a table: a column for each dict, a row for each key."""
    width = max(13, *(len(name) + 2 for name in columns))
    print(f"{title:35}" + "".join(f"{name:>{width}}" for name in columns))
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        cells = [column.get(key, "") for column in columns.values()]
        text = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        if not isinstance(cells[0], list):
            print(f"  {key:33}" + "".join(f"{cell:>{width}}" for cell in text))


# --------------------------------------------------------------------------------------------------


def real_digits(args: argparse.Namespace, trained_on: str) -> dict:
    """The data fields of `Evaluation` for digits: splits of MNIST, or the offline digits."""
    train = load_dataset("train", args.data or "auto", args.data_root)
    if train.source == "mnist":
        other = "validation" if args.split == "test" else "test"  # also unseen by the classifier
        splits = (args.split, other)
        test, other = (load_dataset(split, "mnist", args.data_root) for split in splits)
        if trained_on == "offline":
            train = load_dataset("train", "offline")
        name, seen = f"MNIST {args.split} split", False
    else:  # part of MNIST's training split
        test, other = load_dataset("validation", "offline"), train
        name, seen = "offline validation digits (not the MNIST test split)", trained_on == "mnist"
    return {"test": test, "other": other, "train": train, "name": name, "seen": seen}


def other_images(args: argparse.Namespace, trained_on: dict, labelled: bool) -> dict:
    """The same for other images. Raises UserError if they differ from the training images."""
    data, options = args.data or trained_on["source"], {}
    if data not in NAMES:
        if not args.data and not Path(data).is_dir():
            raise UserError(f"the training images' folder, {data}, is gone: give --data")
        options = {"size": tuple(trained_on["size"]), "palette": bool(trained_on["palette"])}
    splits = (args.split, "train")
    test, train = (load_dataset(split, data, args.data_root, **options) for split in splits)
    for key in ("size", "palette", "classes") if labelled else ("size", "palette"):
        if test.description[key] != trained_on[key]:
            raise UserError(f"{data} differs in {key} from the images of {args.checkpoint}")
    if args.num_samples:
        refuse(args, ["num_samples"], NOT_JUDGED)
        args.num_samples = 8  # beside their nearest neighbours
    return {"test": test, "other": None, "train": train, "name": f"{data}, {args.split} split"}


def load_evaluation(checkpoint: dict, args: argparse.Namespace, device) -> Evaluation:
    """Raises UserError for an unusable checkpoint, or flags without effect on it."""
    diffusion = files.build_diffusion(checkpoint, args.checkpoint, device, args.timesteps)
    diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
    trained_on, binarize = checkpoint["dataset"], checkpoint.get("binarize", "threshold")
    if not isinstance(trained_on["source"], str):
        raise UserError(f"{args.checkpoint} does not say which images it was trained on")
    check_flags(args, diffusion.num_labels, binarize)
    if trained_on["source"] in DIGITS and args.data in (None, "auto", *DIGITS):
        data = real_digits(args, trained_on["source"])
    else:
        data = other_images(args, trained_on, diffusion.num_labels > 0)
    evaluation = Evaluation(args, diffusion, binarize, style_of(checkpoint), **data)
    if evaluation.seen:
        refuse(args, OF_THE_BOUND, NO_BOUND)
        if not args.num_samples:
            raise UserError(f"there is nothing to measure: {NO_BOUND}")
    return evaluation


def main() -> None:
    args = parse_arguments()
    if args.train_classifier:
        useless = args.given - {"train_classifier", "data_root", "out_dir"}
        refuse(args, useless, "--train-classifier")
        out = (args.out_dir or Path("results_d3pm")) / "classifier.pth"
        metrics.train_classifier(args.data_root, out)
        print(f"Wrote {out} ({out.stat().st_size / 1000:.0f} kB)")
        return
    if args.checkpoint is None:
        args.checkpoint = RELEASED
        print(f"Using the released model, {RELEASED}")
    checkpoint = files.read_checkpoint(args.checkpoint)
    prepare_outputs(args)
    device = cli.pick_device(args.device)
    evaluation = load_evaluation(checkpoint, args, device)
    classifier = load_classifier(device) if evaluation.other and args.num_samples else None
    with files.atomic_write(args.out_dir / OUTPUTS[0]) as file:  # fails early
        report, pictures = evaluation.report(classifier)
        file.write(files.json_bytes(report))
    written = [OUTPUTS[0]]
    for name in OUTPUTS[1:]:
        (args.out_dir / name).unlink(missing_ok=True)  # from an earlier evaluation
        if name in pictures and write_report(args.out_dir / name, pictures[name]):
            written.append(name)
    print(f"Wrote {', '.join(written)} in {args.out_dir}")


if __name__ == "__main__":
    cli.run(main)
