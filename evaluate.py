"""Measure a model: its bound on test digits, the quality of its samples, and whether it only remembers.

    python evaluate.py                                        # the model that ships with the repository
    python evaluate.py results_d3pm/checkpoints/last.pth
    python evaluate.py CHECKPOINT --exact --images 500        # every t for 500 digits, instead of a few t for all
    python evaluate.py CHECKPOINT --trajectories 64           # and the importance-weighted bound, from 100 digits
    python evaluate.py --train-classifier                     # how the judge of the samples was made

Writes evaluation.json, bound_terms.png, nearest.png and, with --trajectories, gain.png into the folder of the
checkpoint's run (or --out-dir). Samples are those of sample.py's defaults; the bound is that of the whole chain.
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cli import (
    SEED,
    add_data,
    add_device,
    add_last_step,
    add_speed,
    integer,
    number,
    parser,
    path,
    pick_device,
    run,
)

import torch
from torch import Tensor

from checkpoint import (
    LAST_STEP,
    RELEASED,
    TIMESTEPS,
    atomic_writes,
    build_diffusion,
    json_bytes,
    read_checkpoint,
)
from dataset import Digits, load_digits, sha256, to_levels
from diffusion import LAST_STEPS, BoundTerms, DiscreteDiffusion
from metrics import (
    Classifier,
    judge,
    load_classifier,
    nearest_digits,
    quality,
    rows_of_classes,
    spread,
    summarize_bound,
    summarize_gain,
    train_classifier,
)
from model import accelerated
from pictures import image_grid, plot_gains, plot_terms, save_figure

WEIGHED = 100  # digits whose trajectories are weighed: the gain hardly varies between digits
FEWEST = 20  # samples that are judged


def parse_arguments() -> argparse.Namespace:
    p = parser(__doc__)
    add = p.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=path(),
        help="a .pth file written by train.py (default: the released model)",
    )
    add("--split", choices=["test", "validation"], default="test", help="of MNIST, to judge by (default test); choices "
        "are made on validation digits. The offline digits have no test split")  # fmt: skip
    add("--timesteps", type=int, metavar="N", help="from noise to digits (default: those of sample.py for the "
        "samples, all for the bound); the bound becomes that of the shorter chain")  # fmt: skip
    add("--binarizations", type=integer(1), default=1, metavar="N", help="average the bound over N random "
        "binarizations of the digits (default 1); for checkpoints of train.py --binarize dynamic")  # fmt: skip
    add("--images", type=integer(2), metavar="N", help="bound on N of the digits only (default all); with "
        f"--trajectories, the bound is on all and the weights are of N (default {WEIGHED})")  # fmt: skip
    add("--trajectories", type=integer(1), metavar="N", help="also the importance-weighted bound, the average of N "
        "weights inside the logarithm: N passes for every timestep and digit")  # fmt: skip
    add(
        "--repeats",
        type=integer(1),
        default=4,
        help="timesteps drawn per digit for the bound (default 4)",
    )
    add(
        "--exact",
        action="store_true",
        help="every timestep for the bound: T passes over the digits",
    )
    add("--num-samples", type=integer(0), default=500, help=f"images drawn to judge (default 500; at least {FEWEST}: "
        "fewer say nothing about a distribution; 0: the bound alone)")  # fmt: skip
    add("--guidance", type=number(0), metavar="W", help="of the samples (default 0)")
    add_last_step(add, LAST_STEPS, LAST_STEP)
    add(
        "--no-labels",
        action="store_true",
        help="draw them without classes from a conditional checkpoint",
    )
    add("--seed", type=SEED, default=0, help="of the samples, as for sample.py (default 0)")
    add_data(add)
    add("--out-dir", type=path(), help="where to write (default: the folder of the run; results_d3pm/evaluation for "
        "the released models)")  # fmt: skip
    add_device(add)
    add_speed(add)
    add("--train-classifier", action="store_true", help="make the classifier that judges samples, classifier.pth in "
        "--out-dir (default results_d3pm); needs MNIST")  # fmt: skip
    args = p.parse_args()
    if args.checkpoint and args.train_classifier:
        p.error("give a checkpoint or --train-classifier")
    if 0 < args.num_samples < FEWEST:
        p.error(
            f"--num-samples must be at least {FEWEST}, or 0 to draw none, got {args.num_samples}"
        )
    if args.guidance is not None and args.no_labels:
        p.error("--guidance needs labels, --no-labels has none")
    if args.out_dir is None and not args.train_classifier:
        folder = (args.checkpoint or RELEASED).resolve().parent
        args.out_dir = folder.parent if folder.name == "checkpoints" else folder
        if folder == RELEASED.parent:  # part of the repository
            args.out_dir = Path("results_d3pm") / "evaluation"
    return args


@dataclass
class RealDigits:
    """What a model is held against: `test`, for bound and samples; `other` real digits, which show how near to the
    test digits samples can come; `train`, where memorized digits would be found."""

    test: Digits
    other: Digits
    train: Digits
    name: str  # of `test`
    seen: bool  # whether the model was trained on `test`


def real_digits(args: argparse.Namespace, trained_on: str) -> RealDigits:
    """A split of MNIST where MNIST is at hand; else the offline digits that are kept out of training."""
    train = load_digits("train", args.data, args.data_root)
    if train.source == "mnist":
        test, name = load_digits(args.split, "mnist", args.data_root), f"MNIST {args.split} split"
        other = "validation" if args.split == "test" else "test"  # the classifier never saw either
        other = load_digits(other, "mnist", args.data_root)
        if trained_on == "offline":
            train = load_digits("train", "offline")
        return RealDigits(test, other, train, name, seen=False)
    name = "offline validation digits (not the MNIST test split)"
    seen = trained_on == "mnist"  # all offline digits are from MNIST's training split
    return RealDigits(load_digits("validation", "offline"), train, train, name, seen)


def measure_bound(
    diffusion: DiscreteDiffusion, levels, digits: Digits, labelled: bool, args: argparse.Namespace
) -> list[BoundTerms]:
    """The bound's terms for each random binarization of the digits, given their labels or without."""
    n, num_t = None if args.trajectories else args.images, None if args.exact else args.repeats
    grey, y = spread(digits.images, n), spread(digits.labels, n) if labelled else None
    return [
        diffusion.bound_terms(
            levels(grey, seed), num_t, torch.Generator().manual_seed(seed), y, progress=True
        )
        for seed in range(args.binarizations)
    ]


def measure_weights(
    diffusion: DiscreteDiffusion, levels, digits: Digits, labelled: bool, args: argparse.Namespace
) -> Tensor:
    """log-weights [images, N] of --images digits; these are divided among the binarizations of `measure_bound`."""
    rows = spread(torch.arange(len(digits.labels)), args.images or WEIGHED)
    parts = []
    for seed in range(min(args.binarizations, len(rows))):
        some = rows[seed :: args.binarizations]
        x_0, y = levels(digits.images, seed)[some], digits.labels[some] if labelled else None
        generator = torch.Generator().manual_seed(seed)
        parts.append(diffusion.log_weights(x_0, args.trajectories, generator, y, progress=True))
    return torch.cat(parts)


def announce_cost(diffusion: DiscreteDiffusion, x_0: Tensor, args: argparse.Namespace) -> None:
    """Say what the weights will cost, going by a few passes."""
    short, seconds = diffusion.respaced(min(4, diffusion.timesteps)), 0.0
    n = diffusion.suitable_batch()
    for _ in range(2):  # the first time is slower
        start = time.perf_counter()
        short.log_weights(x_0[:1], n)
        seconds = time.perf_counter() - start
    each = (
        min(args.images or WEIGHED, len(x_0))
        * args.trajectories
        * (2 if diffusion.num_labels else 1)
    )
    passes = each * diffusion.timesteps
    minutes = passes * seconds / (n * short.timesteps) / 60
    print(
        f"Weights of {each:,} trajectories: {passes:,} network passes, about {minutes:.3g} minutes"
    )


def measure_likelihood(
    diffusion: DiscreteDiffusion, levels, digits: Digits, of: str, args: argparse.Namespace
) -> tuple[dict, dict]:
    """The bounds, also given the labels where the network takes them, for the report; the figures of them by name."""
    report, gains, figures = {}, {}, {}
    if args.trajectories:
        announce_cost(diffusion, levels(digits.images, 0), args)
    for labelled in [False, True] if diffusion.num_labels else [False]:
        name = "with the label" if labelled else "no labels"
        draws = measure_bound(diffusion, levels, digits, labelled, args)
        bound = summarize_bound(
            *draws, label_cost=math.log(diffusion.num_labels) if labelled else 0.0
        )
        show_bound(bound, f"{of}, {name}")
        if not labelled:
            t, terms = (
                torch.cat([getattr(draw, key).flatten() for draw in draws])
                for key in ("t", "terms")
            )
            figures["bound_terms.png"] = plot_terms(diffusion.network_t, t, terms)
        if args.trajectories:
            log_w = measure_weights(diffusion, levels, digits, labelled, args)
            bound["importance_weighted"] = summarize_gain(log_w, bound)
            show_gain(bound["importance_weighted"])
            gains[name] = bound["nats_per_image"], bound["importance_weighted"]["by_trajectories"]
        report["bound_with_labels" if labelled else "bound"] = bound
    if gains:
        figures["gain.png"] = plot_gains(gains)
    return report, figures


def measure_samples(
    diffusion: DiscreteDiffusion,
    levels,
    digits: RealDigits,
    classifier: Classifier,
    args: argparse.Namespace,
) -> tuple[dict, Tensor]:
    """The quality of samples beside that of as many real digits, at random and of the samples' classes; the samples."""
    K, n = diffusion.num_levels, args.num_samples
    asked = None if args.no_labels else diffusion.labels(n)
    guidance = args.guidance or 0.0
    if args.timesteps is None:
        diffusion = diffusion.respaced(min(TIMESTEPS, diffusion.timesteps))
    samples = diffusion.sample(
        n, args.seed, progress=True, y=asked, guidance=guidance, last_step=args.last_step
    )
    reference, _ = judge(classifier, levels(digits.test.images, 0), K)
    other = levels(digits.other.images, 1)
    how = {"timesteps": diffusion.timesteps, "guidance": guidance}
    how |= {"last_step": args.last_step, "labels": asked is not None}
    report = {"samples": how | quality(samples, reference, classifier, K, asked)}
    report["real_digits"] = quality(spread(other, n), reference, classifier, K)
    if (
        asked is not None
    ):  # MNIST has not as many of each class: real digits with the samples' classes
        rows = rows_of_classes(digits.other.labels, asked.bincount(minlength=10))
        report["real_digits_of_these_classes"] = quality(other[rows], reference, classifier, K)
    return report, samples


def show_bound(bound: dict, of: str) -> None:
    print(
        f"Bound, {of}: {bound['nats_per_image']:.2f} +- {bound['standard_error']:.2f} nats per image = "
        f"{bound['bits_per_dimension']:.4f} bits per dimension\n"
        f"  L_T {bound['L_T']:.3f}, sum of L_(t-1) {bound['sum_L_t_minus_1']:.2f}, L_0 {bound['L_0']:.3f}"
        + (f", the label {bound['label_cost']:.3f}" if "label_cost" in bound else "")
    )
    if "binarizations" in bound:
        print(
            f"  mean of {bound['binarizations']} binarizations, whose standard error is "
            f"{bound['standard_error_over_binarizations']:.3f}"
        )


def show_gain(weighted: dict) -> None:
    print(f"  importance-weighted, gain from {weighted['images']} digits:")
    for row in weighted["by_trajectories"]:
        print(
            f"  {row['trajectories']:5} trajectories  gain {row['gain']:5.2f} +- {row['gain_standard_error']:.2f}   "
            f"bound {row['nats_per_image']:.2f} +- {row['standard_error']:.2f}"
        )


def show_samples(report: dict) -> None:
    columns = {
        "samples": "samples",
        "real_digits": "real digits",
        "real_digits_of_these_classes": "of these classes",
    }
    columns = {column: heading for column, heading in columns.items() if column in report}
    print(" " * 18 + "".join(f"{heading:>17}" for heading in columns.values()))
    for key in ("frechet_distance", "precision", "recall", "mean_confidence", "isolated_white", "isolated_black",
                "ink_in_border", "ink", "label_accuracy"):  # fmt: skip
        shown = "".join(
            f"{report[column][key]:17.3f}" for column in columns if key in report[column]
        )
        if shown:
            print(f"{key.replace('_', ' '):18}{shown}")
    for column in ("samples", "real_digits"):
        shares = " ".join(f"{share:.2f}" for share in report[column]["class_histogram"])
        print(f"classes 0-9, {columns[column]}: {shares}")


def main() -> None:
    args = parse_arguments()
    if args.train_classifier:
        out = (args.out_dir or Path("results_d3pm")) / "classifier.pth"
        train_classifier(args.data_root, out)
        print(f"Wrote {out} ({out.stat().st_size / 1000:.0f} kB)")
        return
    if args.checkpoint is None:
        args.checkpoint = RELEASED
        print(f"Using the released model, {RELEASED}")
    checkpoint = read_checkpoint(args.checkpoint)
    device = pick_device(args.device)
    diffusion = build_diffusion(checkpoint, args.checkpoint, device, args.timesteps)
    diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
    classifier = load_classifier(device)
    K, protocol, trained_on = (
        diffusion.num_levels,
        checkpoint.get("binarize", "threshold"),
        checkpoint.get("data"),
    )
    if trained_on not in ("mnist", "offline"):
        raise ValueError(f"{args.checkpoint} does not say which digits it was trained on")
    if not diffusion.num_labels and (args.no_labels or args.guidance is not None):
        flag = "--no-labels" if args.no_labels else "--guidance"
        raise ValueError(f"{flag}: {args.checkpoint} was trained without classes")
    if args.binarizations > 1 and protocol != "dynamic":
        raise ValueError(
            f"--binarizations: {args.checkpoint} was trained on digits that are not drawn at random"
        )

    def levels(grey: Tensor, seed: int) -> Tensor:
        return to_levels(grey, K, protocol, torch.Generator().manual_seed(seed))

    names = ["evaluation.json", "nearest.png", "bound_terms.png", "gain.png"]
    outputs, pictures = [args.out_dir / name for name in names], {}
    with atomic_writes(*outputs, inputs=[args.checkpoint]) as (json_file, *picture_files):
        digits = real_digits(args, trained_on)
        report = {
            "checkpoint": str(args.checkpoint),
            "sha256": sha256(args.checkpoint),
            "digits": digits.name,
        }
        report |= {"levels": K, "binarization": protocol, "timesteps": diffusion.timesteps}
        report["digits_were_in_training"] = digits.seen
        if digits.seen:
            print(
                "No bound: the offline digits are part of MNIST's training split, which this model was trained on."
            )
        else:
            whole = checkpoint["diffusion"]["timesteps"]
            steps = (
                f"{whole}" if diffusion.timesteps == whole else f"{diffusion.timesteps} of {whole}"
            )
            of = f"{digits.name}, {f'{K} levels' if K > 2 else f'{protocol} binarization'}, {steps} timesteps"
            bounds, figures = measure_likelihood(diffusion, levels, digits.test, of, args)
            report |= bounds
            pictures = {name: partial(save_figure, figure) for name, figure in figures.items()}
        if args.num_samples:
            quality_report, samples = measure_samples(diffusion, levels, digits, classifier, args)
            report |= quality_report
            show_samples(report)
            rows, least = nearest_digits(samples[:8], levels(digits.train.images, 1))
            report["nearest_training_digit"] = {"least_distances": least.tolist()}
            pictures["nearest.png"] = partial(image_grid(rows, K, columns=8).save, format="png")
        for name, file in zip(names[1:], picture_files, strict=True):
            if name in pictures:
                pictures[name](file)
        json_file.write(json_bytes(report))
    for out in [out for out in outputs[1:] if out.name not in pictures]:  # nor is an older one left
        outputs.remove(out)
        out.unlink()
    print(f"Wrote {', '.join(out.name for out in outputs)} in {args.out_dir}")


if __name__ == "__main__":
    run(main)
