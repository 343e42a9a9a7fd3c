"""Measure a model: its bound on test digits, the quality of its samples, and whether it memorized
the training set.

    python evaluate.py                                   # the released model
    python evaluate.py results_d3pm/checkpoints/last.pth
    python evaluate.py CHECKPOINT --exact --images 500   # every t for 500 digits
    python evaluate.py CHECKPOINT --trajectories 64      # also the importance-weighted bound
    python evaluate.py --train-classifier                # how the classifier was trained

Writes evaluation.json, bound_terms.png, nearest.png and, with --trajectories, gain.png. They go
into the folder of the checkpoint's run. Files of an earlier evaluation are kept: choose another
--out-dir, or delete them with --overwrite. Samples are drawn with the defaults of sample.py. The
bound uses all timesteps, unless --timesteps is given.
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
from dataset import Dataset, load_dataset, sha256, stream_seed, to_levels
from diffusion import LAST_STEPS, BoundTerms, DiscreteDiffusion
from metrics import load_classifier, spread, summarize_bound, summarize_gain
from model import accelerated
from pictures import image_grid, plot_gains, plot_terms, save_figure, write_picture
from trajectories import log_weights, respaced

OUTPUTS = ("evaluation.json", "bound_terms.png", "gain.png", "nearest.png")
OF_THE_BOUND = ("images", "repeats", "exact", "binarizations", "trajectories", "weighted_images")
OF_THE_SAMPLES = ("guidance", "last_step", "no_labels", "seed")
MIN_SAMPLES = 20
NO_BOUND = "the offline digits are in MNIST's training split, which this model was trained on"


def parse_arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    words = "a .pth file written by train.py (default: the released model)"
    add("checkpoint", nargs="?", type=path(), help=words)
    words = "the digits of MNIST to evaluate on (default test); choose settings on validation"
    add("--split", choices=["test", "validation"], default="test", help=words)
    words = "how many timesteps (default: for the bound all, for samples those of sample.py)"
    add("--timesteps", type=int, metavar="N", help=words)
    add("--images", type=integer(2), metavar="N", help="digits for the bound (default all)")
    words = "timesteps drawn for each digit of the bound (default 4)"
    add("--repeats", type=integer(1), help=words)
    words = "the bound from every timestep: T passes over the digits"
    add("--exact", action="store_true", help=words)
    words = """average the bound over N random binarizations of the digits (default 1), for
        checkpoints of train.py --binarize dynamic"""
    add("--binarizations", type=integer(1), metavar="N", help=words)
    words = """also the importance-weighted bound, with N weights inside the logarithm: N passes
        over each digit in every timestep"""
    add("--trajectories", type=integer(1), metavar="N", help=words)
    words = "digits for the weights (default 100): the gain varies little between digits"
    add("--weighted-images", type=integer(2), metavar="N", help=words)
    words = f"images to draw and judge (default 500, at least {MIN_SAMPLES}; 0: only the bound)"
    add("--num-samples", type=integer(0), default=500, help=words)
    words = "strength of classifier-free guidance for the samples (default 0)"
    add("--guidance", type=number(0), metavar="W", help=words)
    cli.add_last_step(add, LAST_STEPS)
    words = "draw samples without classes from a conditional checkpoint"
    add("--no-labels", action="store_true", help=words)
    add("--seed", type=cli.SEED, help="random seed of the samples (default 0)")
    cli.add_data(add)
    words = "default: the folder of the run; for the released models results_d3pm/evaluation"
    add("--out-dir", type=path(), help=words)
    add("--overwrite", action="store_true", help="replace an earlier evaluation in --out-dir")
    cli.add_device(add)
    cli.add_speed(add)
    words = "train the classifier that judges samples, on MNIST, and write OUT_DIR/classifier.pth"
    add("--train-classifier", action="store_true", help=words)
    args = p.parse_args()
    args.given = {key for key in vars(args) if getattr(args, key) != p.get_default(key)}
    try:
        check_arguments(args)
    except UserError as error:
        p.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in --out-dir. Raises UserError for flags that contradict each other or do nothing."""
    if args.train_classifier:
        useless = args.given - {"train_classifier", "data_root", "out_dir"}
        refuse(args, useless, "--train-classifier")
        args.out_dir = args.out_dir or Path("results_d3pm")
        return
    if 0 < args.num_samples < MIN_SAMPLES:
        raise UserError(f"--num-samples must be 0 or at least {MIN_SAMPLES}")
    if args.num_samples == 0:
        refuse(args, OF_THE_SAMPLES, "--num-samples 0")
    if args.exact:
        refuse(args, ["repeats"], "--exact")
    if not args.trajectories:
        refuse(args, ["weighted_images"], "no --trajectories")
    if args.no_labels:
        refuse(args, ["guidance"], "--no-labels")
    if args.out_dir is None:
        folder = (args.checkpoint or RELEASED).resolve().parent
        args.out_dir = folder.parent if folder.name == "checkpoints" else folder
        if folder == RELEASED.parent:  # part of the repository
            args.out_dir = Path("results_d3pm") / "evaluation"


def refuse(args: argparse.Namespace, names, reason: str) -> None:
    """Raise UserError if a flag was given that does nothing for this reason."""
    for name in sorted(args.given & set(names)):
        flag = f"--{name.replace('_', '-')}" if name != "checkpoint" else "a checkpoint"
        raise UserError(f"{flag} does nothing here: {reason}")


# --------------------------------------------------------------------------------------------------
# The digits


@dataclass
class RealDigits:
    """`test`: for the bound, and the reference for samples. `other`: real digits that are judged
    like samples, for comparison. `train`: where memorized digits would be found."""

    test: Dataset
    other: Dataset
    train: Dataset
    name: str  # of `test`
    seen: bool  # whether the model was trained on `test`


def real_digits(args: argparse.Namespace, trained_on: str) -> RealDigits:
    """Splits of MNIST, or the offline digits where MNIST can't be had."""
    train = load_dataset("train", args.data, args.data_root)
    if train.source == "mnist":
        other = "validation" if args.split == "test" else "test"  # new to the classifier, too
        splits = (args.split, other)
        test, other = (load_dataset(split, "mnist", args.data_root) for split in splits)
        if trained_on == "offline":
            train = load_dataset("train", "offline")
        return RealDigits(test, other, train, f"MNIST {args.split} split", seen=False)
    # The offline digits are part of MNIST's training split.
    name, seen = "offline validation digits (not the MNIST test split)", trained_on == "mnist"
    return RealDigits(load_dataset("validation", "offline"), train, train, name, seen)


# --------------------------------------------------------------------------------------------------
# The measurements


@dataclass
class Evaluation:
    """One model, the digits it is measured on, and the arguments."""

    diffusion: DiscreteDiffusion
    binarize: str
    digits: RealDigits
    args: argparse.Namespace

    def levels(self, grey: Tensor, seed: int) -> Tensor:
        # The bound draws its noise from `seed` itself. Binarizing needs a stream of its own.
        generator = torch.Generator().manual_seed(stream_seed(seed))
        return to_levels(grey, self.diffusion.num_levels, self.binarize, generator)

    def test_digits(self, rows: Tensor, seed: int, labelled: bool) -> tuple[Tensor, Tensor | None]:
        """x_0 and the labels of these rows, for a random binarization."""
        test = self.digits.test
        return self.levels(test.images, seed)[rows], test.labels[rows] if labelled else None

    def bound_terms(self, rows: Tensor, seed: int, labelled: bool) -> BoundTerms:
        x_0, y = self.test_digits(rows, seed, labelled)
        num_t = None if self.args.exact else self.args.repeats or 4
        generator = torch.Generator().manual_seed(seed)
        return self.diffusion.bound_terms(x_0, num_t, generator, y, progress=True)

    def log_weights(self, rows: Tensor, labelled: bool) -> Tensor:
        """[rows, --trajectories]. The rows are divided among the binarizations of the bound."""
        parts, n = [], self.args.binarizations or 1
        for seed in range(min(n, len(rows))):
            x_0, y = self.test_digits(rows[seed::n], seed, labelled)
            request = self.args.trajectories, torch.Generator().manual_seed(seed), y
            parts.append(log_weights(self.diffusion, x_0, *request, progress=True))
        return torch.cat(parts)

    def announce(self) -> None:
        """Print the expected minutes of whatever takes more than one, from short trials."""
        args, T, n = self.args, self.diffusion.timesteps, self.diffusion.suitable_batch()
        x_0 = self.levels(self.digits.test.images[:1], 0).repeat(n, 1, 1, 1)
        images = min(args.images or math.inf, len(self.digits.test.images))
        variants = 0 if self.digits.seen else 2 if self.diffusion.num_labels else 1
        bound = images * (T if args.exact else 1 + (args.repeats or 4)) * (args.binarizations or 1)
        weights = min(args.weighted_images or 100, images) * (args.trajectories or 0) * T
        steps = T if args.timesteps else min(TIMESTEPS, T)
        samples = args.num_samples * steps * (2 if args.guidance else 1)
        short = respaced(self.diffusion, min(2, T))
        for name, passes, trial in (
            ("bound", bound * variants, partial(short.bound_terms, x_0)),
            ("weights", weights * variants, partial(log_weights, short, x_0[:1], n)),
            ("samples", samples, partial(short.sample, n)),
        ):
            trial_passes = n * short.timesteps
            if passes > 4 * trial_passes:
                trial()  # the first call includes the warm-up
                start = time.perf_counter()
                trial()
                minutes = (time.perf_counter() - start) * passes / trial_passes / 60
                if minutes > 1:
                    print(f"The {name}: {passes:,} network passes, about {minutes:.3g} minutes")

    def likelihood(self, title: str) -> tuple[dict, dict]:
        """The bounds for the report, without labels and with them; figures by name."""
        report, gains, figures, args, diffusion = {}, {}, {}, self.args, self.diffusion
        rows = spread(torch.arange(len(self.digits.test.labels)), args.images)
        weighted_rows = spread(rows, args.weighted_images or 100)
        for labelled in [False, True] if diffusion.num_labels else [False]:
            name = "with the label" if labelled else "no labels"
            seeds = range(args.binarizations or 1)
            draws = [self.bound_terms(rows, seed, labelled) for seed in seeds]
            label_cost = math.log(diffusion.num_labels) if labelled else 0.0
            bound = summarize_bound(*draws, label_cost=label_cost)
            show_bound(bound, f"{title}, {name}")
            if not labelled:
                t = torch.cat([draw.t.flatten() for draw in draws])
                terms = torch.cat([draw.terms.flatten() for draw in draws])
                figures["bound_terms.png"] = partial(plot_terms, diffusion.network_t, t, terms)
            if args.trajectories:
                weighted = summarize_gain(self.log_weights(weighted_rows, labelled), bound)
                show_gain(weighted)
                bound["importance_weighted"] = weighted
                gains[name] = bound["nats_per_image"], weighted["by_trajectories"]
                figures["gain.png"] = partial(plot_gains, gains)
            report["bound_with_labels" if labelled else "bound"] = bound
        return report, figures

    def samples(self, classifier) -> tuple[dict, Tensor]:
        """The quality of samples and of as many real digits, for the report; and the samples."""
        args, n, diffusion, digits = self.args, self.args.num_samples, self.diffusion, self.digits
        if args.timesteps is None:
            diffusion = respaced(diffusion, min(TIMESTEPS, diffusion.timesteps))
        asked = None if args.no_labels else diffusion.labels(n)
        last_step = args.last_step or files.default_last_step(diffusion)
        how = {"guidance": args.guidance or 0.0, "last_step": last_step}
        x = diffusion.sample(n, args.seed or 0, progress=True, y=asked, **how)
        K, other = diffusion.num_levels, self.levels(digits.other.images, 1)
        reference, _ = metrics.judge(classifier, self.levels(digits.test.images, 0), K)
        how |= {"timesteps": diffusion.timesteps, "labels": asked is not None}
        report = {"samples": how | metrics.quality(x, reference, classifier, K, asked)}
        report["real_digits"] = metrics.quality(spread(other, n), reference, classifier, K)
        if asked is not None:  # the classes of MNIST are not equally frequent
            rows = metrics.rows_of_classes(digits.other.labels, asked.bincount(minlength=10))
            same_classes = metrics.quality(other[rows], reference, classifier, K)
            report["real_digits_of_these_classes"] = same_classes
        return report, x


# --------------------------------------------------------------------------------------------------
# The printout


def show_bound(bound: dict, title: str) -> None:
    nats = f"{bound['nats_per_image']:.2f} +- {bound['standard_error']:.2f} nats per image"
    print(f"Bound, {title}: {nats} = {bound['bits_per_dimension']:.4f} bits per dimension")
    label = f", the label {bound['label_cost']:.3f}" if "label_cost" in bound else ""
    middle = f"sum of L_(t-1) {bound['sum_L_t_minus_1']:.2f}"
    print(f"  L_T {bound['L_T']:.3f}, {middle}, L_0 {bound['L_0']:.3f}{label}")
    if "binarizations" in bound:
        error = bound["standard_error_over_binarizations"]
        print(f"  mean of {bound['binarizations']} binarizations, standard error {error:.3f}")


def show_gain(weighted: dict) -> None:
    print(f"  importance-weighted, gain from {weighted['images']} digits:")
    for row in weighted["by_trajectories"]:
        gain = f"gain {row['gain']:5.2f} +- {row['gain_standard_error']:.2f}"
        bound = f"bound {row['nats_per_image']:.2f} +- {row['standard_error']:.2f}"
        print(f"  {row['trajectories']:5} trajectories  {gain}   {bound}")


def show_samples(report: dict) -> None:
    names = ("samples", "real_digits", "real_digits_of_these_classes")
    headings = ("samples", "real digits", "of these classes")
    columns = [report[name] for name in names if name in report]
    print(" " * 18 + "".join(f"{heading:>17}" for heading in headings[: len(columns)]))
    keys = ["frechet_distance", "precision", "recall", "mean_confidence", "isolated_white"]
    for key in [*keys, "isolated_black", "ink_in_border", "ink", "label_accuracy"]:
        cells = [f"{column[key]:.3f}" for column in columns if key in column]
        if key == "isolated_white":
            errors = [f" +- {column[f'{key}_standard_error']:.3f}" for column in columns]
            cells = [cell + error for cell, error in zip(cells, errors, strict=True)]
        if cells:
            print(f"{key.replace('_', ' '):18}" + "".join(f"{cell:>17}" for cell in cells))
    for heading, column in zip(headings[:2], columns, strict=False):
        shares = " ".join(f"{share:.2f}" for share in column["class_histogram"])
        print(f"classes 0-9, {heading}: {shares}")


# --------------------------------------------------------------------------------------------------


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError if files of an earlier evaluation, or the checkpoint, would be lost."""
    for file in (args.out_dir / name for name in OUTPUTS):
        if file.exists() and args.checkpoint.exists() and file.samefile(args.checkpoint):
            raise UserError(f"can't write {file}: the same file is read by this command")
        if file.exists() and not file.is_file():
            raise UserError(f"can't write {file}: it is not a regular file")
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} exists: give --overwrite, or another --out-dir")


def load_evaluation(checkpoint: dict, args: argparse.Namespace, device) -> Evaluation:
    """Raises UserError for an unusable checkpoint, or flags that do nothing for it."""
    diffusion = files.build_diffusion(checkpoint, args.checkpoint, device, args.timesteps)
    diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
    trained_on, binarize = checkpoint.get("data"), checkpoint.get("binarize", "threshold")
    if trained_on not in ("mnist", "offline"):
        raise UserError(f"{args.checkpoint} does not say which digits it was trained on")
    if not diffusion.num_labels:
        refuse(args, ["no_labels", "guidance"], f"{args.checkpoint} was trained without classes")
    if binarize != "dynamic":
        reason = f"{args.checkpoint} was trained on digits that are not drawn at random"
        refuse(args, ["binarizations"], reason)
    digits = real_digits(args, trained_on)
    if digits.seen:
        refuse(args, OF_THE_BOUND, NO_BOUND)
        if not args.num_samples:
            raise UserError(f"there is nothing to measure: {NO_BOUND}")
    return Evaluation(diffusion, binarize, digits, args)


def evaluate(evaluation: Evaluation, classifier, title: str) -> tuple[dict, dict]:
    """The results for the report; functions that write the pictures into a file, by name."""
    report, pictures = {}, {}
    evaluation.announce()
    if evaluation.digits.seen:
        print(f"No bound: {NO_BOUND}")
    else:
        report, figures = evaluation.likelihood(title)
        for name, plot in figures.items():
            pictures[name] = lambda file, plot=plot: save_figure(plot(), file)
    if evaluation.args.num_samples:
        of_samples, x = evaluation.samples(classifier)
        show_samples(of_samples)
        train = evaluation.levels(evaluation.digits.train.images, 1)
        rows, distances = metrics.nearest_digits(x[:8], train)
        report |= of_samples
        report["nearest_training_digit"] = {"least_distances": distances.tolist()}
        grid = image_grid(rows, evaluation.diffusion.num_levels, columns=8)
        pictures["nearest.png"] = partial(grid.save, format="png")
    return report, pictures


def main() -> None:
    args = parse_arguments()
    if args.train_classifier:
        out = args.out_dir / "classifier.pth"
        metrics.train_classifier(args.data_root, out)
        print(f"Wrote {out} ({out.stat().st_size / 1000:.0f} kB)")
        return
    if args.checkpoint is None:
        args.checkpoint = RELEASED
        print(f"Using the released model, {RELEASED}")
    check_outputs(args)
    device = cli.pick_device(args.device)
    classifier = load_classifier(device)
    checkpoint = files.read_checkpoint(args.checkpoint)
    evaluation = load_evaluation(checkpoint, args, device)
    with files.atomic_write(args.out_dir / OUTPUTS[0]) as json_file:  # errors come before the work
        K, T = evaluation.diffusion.num_levels, evaluation.diffusion.timesteps
        trained_T = checkpoint["diffusion"]["timesteps"]
        report = {"checkpoint": str(args.checkpoint), "sha256": sha256(args.checkpoint)}
        report |= {"digits": evaluation.digits.name, "levels": K, "timesteps": T}
        report["binarization"] = evaluation.binarize
        report["digits_were_in_training"] = evaluation.digits.seen
        kind = f"{K} levels" if K > 2 else f"{evaluation.binarize} binarization"
        steps = f"{T}" if trained_T == T else f"{T} of {trained_T}"
        title = f"{evaluation.digits.name}, {kind}, {steps} timesteps"
        results, pictures = evaluate(evaluation, classifier, title)
        json_file.write(files.json_bytes(report | results))
    written = [OUTPUTS[0]]
    for name in OUTPUTS[1:]:
        (args.out_dir / name).unlink(missing_ok=True)  # of an earlier evaluation
        if name in pictures and write_picture(args.out_dir / name, pictures[name]):
            written.append(name)
    print(f"Wrote {', '.join(written)} in {args.out_dir}")


if __name__ == "__main__":
    cli.run(main)
