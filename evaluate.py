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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cli
from cli import UserError, integer, number, path

import torch
from torch import Tensor

import checkpoint as files
import metrics
from checkpoint import RELEASED, TIMESTEPS
from dataset import DIGITS, NAMES, Dataset, load_dataset, sha256, stream_seed, to_levels
from diffusion import LAST_STEPS, BoundTerms
from metrics import load_classifier, spread, summarize_bound, summarize_gain
from model import accelerated
from pictures import image_grid, plot_gains, plot_terms, save_figure, style_of, write_report
from trajectories import log_weights, respaced

OUTPUTS = ("evaluation.json", "bound_terms.png", "gain.png", "nearest.png")
BOUNDS = {"bound": "no labels", "bound_with_labels": "with the label"}
OF_THE_BOUND = ("images", "repeats", "exact", "binarizations", "trajectories", "weighted_images")
OF_THE_SAMPLES = ("guidance", "last_step", "no_labels", "seed")
MIN_SAMPLES = 20
NOT_JUDGED = "the classifier that judges samples knows only MNIST's digits"
NO_BOUND = "the offline digits are in MNIST's training split, which this model was trained on"


def parse_arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    add, count = p.add_argument, {"type": integer(1), "metavar": "N"}
    add("checkpoint", nargs="?", type=path(), help="a .pth file (default: the released model)")
    words = "of the images (default test); choose settings on validation"
    add("--split", choices=["test", "validation"], default="test", help=words)
    words = "number of timesteps (default: all for the bound, as in sample.py for samples)"
    add("--timesteps", type=int, metavar="N", help=words)
    add("--images", type=integer(2), metavar="N", help="images for the bound (default all)")
    one_of = p.add_mutually_exclusive_group().add_argument
    one_of("--repeats", **count, help="timesteps drawn per image (default 4)")
    one_of("--exact", action="store_true", help="use every timestep: T passes over the images")
    words = "random binarizations to average over (default 1), for --binarize dynamic models"
    add("--binarizations", **count, help=words)
    words = "also the importance-weighted bound: N passes per image and timestep"
    add("--trajectories", **count, help=words)
    words = "images for --trajectories (default 100: the gain varies little between images)"
    add("--weighted-images", type=integer(2), metavar="N", help=words)
    words = f"images to draw and judge (default 500, at least {MIN_SAMPLES}; 0: only the bound)"
    add("--num-samples", type=integer(0), default=500, metavar="N", help=words)
    one_of = p.add_mutually_exclusive_group().add_argument
    words = "strength of classifier-free guidance for the samples (default 0)"
    one_of("--guidance", type=number(0), metavar="W", help=words)
    one_of("--no-labels", action="store_true", help="draw samples without class labels")
    cli.add_last_step(add, LAST_STEPS)
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
# The images


class Images(NamedTuple):
    """What a model is measured on."""

    name: str  # of `test`
    test: Dataset  # for the bound, and as reference for samples
    train: Dataset  # searched for the nearest neighbours of samples
    other: Dataset | None = None  # real digits to compare with samples; None if not digits
    seen: bool = False  # whether the model was trained on `test`


def real_digits(args: argparse.Namespace, trained_on: str) -> Images:
    """Splits of MNIST, or the offline digits."""
    train = load_dataset("train", args.data or "auto", args.data_root)
    if train.source == "offline":  # part of MNIST's training split
        name = "offline validation digits (not the MNIST test split)"
        test, seen = load_dataset("validation", "offline"), trained_on == "mnist"
        return Images(name, test, train, train, seen)
    other = "validation" if args.split == "test" else "test"  # also unseen by the classifier
    test, other = (load_dataset(split, "mnist", args.data_root) for split in (args.split, other))
    if trained_on == "offline":
        train = load_dataset("train", "offline")
    return Images(f"MNIST {args.split} split", test, train, other)


def other_images(args: argparse.Namespace, trained_on: dict, labelled: bool) -> Images:
    """Raises UserError if they differ from the training images."""
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
    return Images(f"{data}, {args.split} split", test, train)


# --------------------------------------------------------------------------------------------------
# The measurements


class Evaluation:
    """One model and its images. Raises UserError for unusable ones, or flags without effect."""

    def __init__(self, checkpoint: dict, args: argparse.Namespace, device: torch.device):
        diffusion = files.build_diffusion(checkpoint, args.checkpoint, device, args.timesteps)
        self.diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
        self.args, self.style, trained_on = args, style_of(checkpoint), checkpoint["dataset"]
        self.binarize = checkpoint.get("binarize", "threshold")
        without = f"{args.checkpoint} was trained without"
        if args.num_samples == 0:
            refuse(args, OF_THE_SAMPLES, "--num-samples 0")
        if not args.trajectories:
            refuse(args, ["weighted_images"], "no --trajectories")
        if not diffusion.num_labels:
            refuse(args, ["no_labels", "guidance"], f"{without} classes")
        if self.binarize != "dynamic":
            refuse(args, ["binarizations"], f"{without} random binarization")
        if not isinstance(trained_on["source"], str):
            raise UserError(f"{args.checkpoint} does not say which images it was trained on")
        if trained_on["source"] in DIGITS and args.data in (None, "auto", *DIGITS):
            self.images = real_digits(args, trained_on["source"])
        else:
            self.images = other_images(args, trained_on, diffusion.num_labels > 0)
        if self.images.seen:
            refuse(args, OF_THE_BOUND, NO_BOUND)
            if not args.num_samples:
                raise UserError(f"there is nothing to measure: {NO_BOUND}")

    def levels(self, grey: Tensor, seed: int) -> Tensor:
        # The bound draws its noise from `seed` itself, so binarization needs another stream.
        generator = torch.Generator().manual_seed(stream_seed(seed))
        return to_levels(grey, self.diffusion.num_levels, self.binarize, generator)

    def binarized(self, parts: list[Tensor], labelled: bool) -> Iterator[tuple]:
        """x_0 of test images, one part of the rows at a time, each in its own binarization; with a
        generator for the noise, and labels or None."""
        test = self.images.test
        for seed, rows in enumerate(parts):
            x_0, y = self.levels(test.images, seed)[rows], test.labels[rows] if labelled else None
            yield x_0, torch.Generator().manual_seed(seed), y

    def bound(self, labelled: bool) -> tuple[dict, list[BoundTerms]]:
        """A bound of the report; its terms, for each binarization."""
        args, d, name = self.args, self.diffusion, list(BOUNDS.values())[labelled]
        n, num_t = args.binarizations or 1, None if args.exact else args.repeats or 4
        rows = spread(torch.arange(len(self.images.test.labels)), args.images)
        inputs = self.binarized([rows] * n, labelled)
        draws = [d.bound_terms(x_0, num_t, noise, y, progress=True) for x_0, noise, y in inputs]
        label_cost = math.log(d.num_labels) if labelled else 0.0
        pixels = math.prod(self.images.test.size)
        bound = summarize_bound(*draws, label_cost=label_cost, pixels=pixels)
        show(f"bound, {name}", {"nats": bound})
        if args.trajectories:
            rows, N = spread(rows, args.weighted_images or 100), args.trajectories
            inputs = self.binarized([rows[i::n] for i in range(min(n, len(rows)))], labelled)
            log_w = [log_weights(d, x_0, N, noise, y, progress=True) for x_0, noise, y in inputs]
            bound["importance_weighted"] = summarize_gain(torch.cat(log_w), bound)
            columns = bound["importance_weighted"]["by_trajectories"]
            columns = {str(column["trajectories"]): column for column in columns}
            show(f"importance-weighted bound, {name}", columns)
        return bound, draws

    def samples(self, classifier) -> tuple[dict, Tensor]:
        """The report's quality of samples and of as many real digits; and the samples."""
        args, n, diffusion = self.args, self.args.num_samples, self.diffusion
        if args.timesteps is None:
            diffusion = respaced(diffusion, min(TIMESTEPS, diffusion.timesteps))
        asked = None if args.no_labels else diffusion.labels(n)
        last_step = args.last_step or files.default_last_step(diffusion)
        how = {"guidance": args.guidance or 0.0, "last_step": last_step}
        x = diffusion.sample(n, args.seed or 0, progress=True, y=asked, **how)
        if self.images.other is None:
            print(f"Samples are not judged: {NOT_JUDGED}")
            return {"not_judged": NOT_JUDGED}, x
        how |= {"timesteps": diffusion.timesteps, "labels": asked is not None}
        K, real = diffusion.num_levels, self.levels(self.images.other.images, 1)
        reference, _ = metrics.judge(classifier, self.levels(self.images.test.images, 0), K)
        judged = partial(metrics.quality, reference=reference, classifier=classifier, num_levels=K)
        report = {"samples": how | judged(x, asked=asked), "real_digits": judged(spread(real, n))}
        if asked is not None:  # MNIST's classes are not balanced
            counts = asked.bincount(minlength=10)
            rows = metrics.rows_of_classes(self.images.other.labels, counts)
            report["real_digits_of_these_classes"] = judged(real[rows])
        show("quality", report)
        return report, x

    def report(self, classifier) -> tuple[dict, dict[str, Callable]]:
        """The contents of evaluation.json; functions that write the pictures, by file name."""
        args, d, images, pictures = self.args, self.diffusion, self.images, {}
        steps = f"{d.timesteps} of {d.network_t[-1]} timesteps"
        print(f"{images.name}, {d.num_levels} levels, {self.binarize}, {steps}")
        report = {"checkpoint": str(args.checkpoint), "sha256": sha256(args.checkpoint)}
        report |= {"digits": images.name, "digits_were_in_training": images.seen}
        report |= {"levels": d.num_levels, "binarization": self.binarize, "timesteps": d.timesteps}
        if images.seen:
            print(f"No bound: {NO_BOUND}")
        else:
            report["bound"], draws = self.bound(labelled=False)
            t = torch.cat([draw.t.flatten() for draw in draws])
            terms = d.network_t, t, torch.cat([draw.terms.flatten() for draw in draws])
            pictures["bound_terms.png"] = lambda file: save_figure(plot_terms(*terms), file)
            if d.num_labels:
                report["bound_with_labels"], _ = self.bound(labelled=True)
            if args.trajectories:
                bounds = {name: report[key] for key, name in BOUNDS.items() if key in report}
                pictures["gain.png"] = lambda file: save_figure(plot_gains(bounds), file)
        if args.num_samples:
            quality, x = self.samples(classifier)
            p = 1 if self.style["palette"] is None else 0  # p = 0 counts differing pixels
            train = self.levels(images.train.images, 1)
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
        print(f"  {key:33}" + "".join(f"{cell:>{width}}" for cell in text))


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
    evaluation = Evaluation(checkpoint, args, device)
    judged = evaluation.images.other and args.num_samples
    classifier = load_classifier(device) if judged else None
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
