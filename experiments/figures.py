"""The figures of the results page and their tables.

    python -m experiments.figures noise                   # the noise that the network sees
    python -m experiments.figures expect                  # samples after minutes of training
    python -m experiments.figures fill --amp --compile    # filling in: hours on a CPU
    python -m experiments.figures time_to_quality         # against a plain network: 15 minutes

They go to results_d3pm/experiments/NAME/.
"""

import argparse
import math
import statistics
import time
import warnings
from functools import partial
from itertools import islice

from cli import add_device, add_speed, integer, pick_device, run

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

import metrics
from checkpoint import PARTICLES, RELEASED, TIMESTEPS, load_checkpoint, save_checkpoint, write_json
from dataset import Dataset, load_dataset, sha256, to_levels
from diffusion import DiscreteDiffusion
from experiments.baseline import most_probable, usual_trainer
from experiments.common import endless, experiment_parser, markdown, output, table
from metrics import judge, load_classifier, rows_of_classes, spread, summarize_bound
from model import UNet, accelerated
from options import FEW_PICTURES, HYBRID_WEIGHT
from pictures import image_grid, new_figure, save_figure, subplots, write_report
from trainer import Trainer
from trajectories import fill_in, respaced
from transitions import FAMILIES

BATCH_SIZE = 128


def draw(figure, name: str) -> None:
    write_report(output(name, ".png"), partial(save_figure, figure))


def ours(total_steps: int, lr: float, loss_type: str = "cross_entropy") -> Trainer:
    network = UNet().to(memory_format=torch.channels_last)
    diffusion = DiscreteDiffusion(network, loss_type=loss_type, hybrid_weight=HYBRID_WEIGHT)
    return Trainer(diffusion, total_steps, BATCH_SIZE, lr, "muon")


# ------------------------------------------------------------------------------------------------
# Noise

LEVELS, DIGIT = 8, 8


def mutual_information(diffusion: DiscreteDiffusion) -> Tensor:
    """I(x_t; x_0) of a pixel with K equally likely levels, as a share of log K: float64 [T+1]."""
    q = diffusion.bar_Q[:, : diffusion.num_levels]  # q(x_t | x_0), [T+1, K, S]
    nats = torch.xlogy(q, q) - torch.xlogy(q, q.mean(1, keepdim=True))
    return nats.sum(2).mean(1) / math.log(diffusion.num_levels)


def changed(diffusion: DiscreteDiffusion) -> Tensor:
    """The share of pixels whose level differs from x_0: float64 [T+1]."""
    K = diffusion.num_levels
    return 1 - diffusion.bar_Q[:, :K].diagonal(dim1=1, dim2=2).mean(1)


def noise_figure():
    """The share of changed pixels and the mutual information of x_t and x_0, by t."""
    information = "mutual information of $x_t$ and $x_0$, of its maximum"
    figure, (left, right) = subplots("share of pixels changed", information, xlabel="t")
    for transition, family in FAMILIES.items():
        style = "--" if transition == "absorbing" else "-"
        for schedule in family.schedules:
            diffusion = DiscreteDiffusion(torch.nn.Identity(), LEVELS, 200, transition, schedule)
            left.plot(changed(diffusion), style, label=f"{transition}, {schedule}")
            right.plot(mutual_information(diffusion), style)
    figure.legend(loc="outside right upper")
    return figure


def noise(args: argparse.Namespace) -> None:
    digits = load_dataset("validation", args.data, args.data_root)
    x_0 = to_levels(digits.images[digits.labels == DIGIT][:1])
    diffusion = DiscreteDiffusion(torch.nn.Identity())
    u = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0))
    # The same noise at every t, so that a pixel changes once
    x_t = [diffusion.q_sample(x_0, torch.tensor([t]), u) for t in range(0, 201, 25)]
    sheet = image_grid(torch.cat(x_t), columns=len(x_t))
    forward = output("noise").with_name("forward.png")
    write_report(forward, partial(sheet.save, format="png"))
    draw(noise_figure(), "noise")


# ------------------------------------------------------------------------------------------------
# What to expect of `python train.py`. Minutes are counted in steps, at RATE images a second, so
# other load on the machine makes no difference.

RATE = 390  # on two cores
SAVED = 1_000  # steps between checkpoints
MINUTES = (1, 2, 5, 10, 30, 60, 120)
EPOCHS = 50
DIGITS = {
    "offline digits": ("offline", *FEW_PICTURES),
    "full MNIST": ("mnist", "cross_entropy", 1e-4),
}


def on_the_way(data: str, loss: str, lr: float, args: argparse.Namespace) -> list[dict]:
    """Loss, bound and samples at each of `args.minutes`, up to the end of the run.

    Continues an interrupted run, or one that ended before the last of the minutes.
    """
    digits = load_dataset("train", data, args.data_root)
    x_0 = to_levels(load_dataset("validation", data, args.data_root).images)
    total = EPOCHS * (len(digits.images) // BATCH_SIZE)
    marks = {min(total, round(m * 60 * RATE / BATCH_SIZE)) for m in args.minutes}
    torch.manual_seed(0)
    trainer, rows, losses = ours(total, lr, loss), [], []
    file = output("expect").with_name(f"{data}.pth")
    if file.exists():
        state = torch.load(file, weights_only=True)
        trainer.load_state_dict(state)
        rows, losses = state["rows"], state["losses"]
    for batch in islice(endless(digits, BATCH_SIZE), trainer.steps, max(marks)):
        losses = [*losses[-99:], trainer.step(*batch).item()]
        if trainer.steps in marks:
            row = {"minutes": trainer.steps * BATCH_SIZE / RATE / 60, "steps": trainer.steps}
            row |= {"train_loss": statistics.mean(losses), "bound": trainer.validate(x_0)}
            drawn = respaced(trainer.averaged, TIMESTEPS).sample(8, last_step="mode")
            rows.append(row | {"samples": drawn})
        if trainer.steps in marks or trainer.steps % SAVED == 0:
            save_checkpoint(file, trainer.state_dict() | {"rows": rows, "losses": losses})
    return rows


def expect(args: argparse.Namespace) -> None:
    """A panel for each data set, a row of samples for each time."""
    rows = {name: on_the_way(*how, args) for name, how in DIGITS.items()}
    figure = new_figure(13, 5)
    for axis, (name, points) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        picture = image_grid(torch.cat([point.pop("samples") for point in points]), columns=8)
        axis.imshow(picture, cmap="gray")
        labels = [
            f"{p['minutes']:.0f} min, {p['steps']:,} steps\n"
            f"loss {p['train_loss']:.3f}, bound {p['bound']:.1f}"
            for p in points
        ]
        height = picture.height / len(points)
        axis.set_yticks([(i + 0.5) * height for i in range(len(points))], labels)
        axis.set(title=name, xticks=[], anchor="N")
    write_json(output("expect"), {"images_per_second": RATE, "rows": rows})
    draw(figure, "expect")


# ------------------------------------------------------------------------------------------------
# Filling in

COMPLETIONS, NUM_DIGITS, TRAJECTORIES = 8, 250, (1, 4, 16)
NUMBERS = {"read_as_true_class": "true class", "frechet_distance": "Fréchet distance"}
row, column = torch.arange(32)[:, None], torch.arange(32)
GIVEN = {
    "upper half": row < 16,
    "left half": column < 16,
    "around a hole of 10x10": ((row - 15.5).abs() > 5) | ((column - 15.5).abs() > 5),
}


def measure_filling(diffusion: DiscreteDiffusion, digits: Dataset) -> dict:
    """How the classifier reads completions, the given part on black, and the real digits."""
    classifier, levels, parts = load_classifier(diffusion.device), to_levels(digits.images), {}
    reference, _ = judge(classifier, levels, 2)
    rows = rows_of_classes(digits.labels, torch.full((10,), NUM_DIGITS // 10))
    x, labels = levels[rows].long(), digits.labels[rows]
    for part, given in GIVEN.items():
        images, known = {"part alone": torch.where(given, x, 0)}, torch.where(given, x, -1)
        for N in TRAJECTORIES:
            images[f"N = {N}"] = fill_in(diffusion, known, len(x), particles=N, progress=True)
        images["real digits"], parts[part] = x, {}
        for name, image in images.items():
            features, logits = judge(classifier, image, 2)
            right = (logits.argmax(1) == labels).double().mean().item()
            distance = metrics.frechet_distance(features, reference)
            parts[part][name] = {"read_as_true_class": right, "frechet_distance": distance}
    return {"timesteps": diffusion.timesteps, "digits": len(x), "parts": parts}


def filling_table(result: dict) -> str:
    parts = result["parts"]
    heading = [f"{result['digits']} test digits, {result['timesteps']} timesteps"]
    heading += [f"{part}: {text}" for text in NUMBERS.values() for part in parts]
    lines = [
        [name, *(f"{rows[name][key]:.3f}" for key in NUMBERS for rows in parts.values())]
        for name in next(iter(parts.values()))
    ]
    return markdown(heading, lines)


def filling_figure(diffusion: DiscreteDiffusion, digits: Dataset):
    """A row for each digit: the digit, the given part, the completions."""
    rows = rows_of_classes(digits.labels, torch.ones(10, dtype=torch.long))
    x = to_levels(digits.images[rows]).long()
    figure = new_figure(15, 5.6)
    for axis, (part, given) in zip(figure.subplots(1, 3), GIVEN.items(), strict=True):
        known = torch.where(given, x, -1)
        each = known.repeat_interleave(COMPLETIONS, dim=0)
        filled = fill_in(diffusion, each, len(each), particles=PARTICLES, progress=True)
        filled = filled.long().unflatten(0, (10, COMPLETIONS))
        sheet = torch.cat([x[:, None], known[:, None], filled], dim=1).flatten(0, 1)
        axis.imshow(image_grid(sheet, columns=2 + COMPLETIONS), cmap="gray")
        axis.set(title=f"Digit, {part}, completions", xticks=[], yticks=[])
    return figure


def fill(args: argparse.Namespace) -> None:
    diffusion = load_checkpoint(RELEASED, pick_device(args.device), TIMESTEPS)
    diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
    split = "test" if args.data == "mnist" else "validation"
    digits = load_dataset(split, args.data, args.data_root)
    result = {"sha256": sha256(RELEASED)} | measure_filling(diffusion, digits)
    write_json(output("fill"), result)
    print(filling_table(result))
    draw(filling_figure(diffusion, digits), "fill")


# ------------------------------------------------------------------------------------------------
# Time to quality: this repository against the plain network, one after the other, on all cores of
# the CPU. The clock stops for the evaluation on validation digits.

RACE_MINUTES = 5
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the training, after which to evaluate
RACE_TIMESTEPS, RACE_SAMPLES = 20, 500


def compete(trainer: Trainer, usual: bool, digits: Dataset, x_0: Tensor) -> list[dict]:
    """Train one contestant; return its curve. The usual recipe has no averaged weights."""
    stream, seconds, curve = endless(digits, BATCH_SIZE), [], []

    def train(steps: int) -> None:
        trainer.network.train()
        while trainer.steps < steps:
            start = time.perf_counter()
            trainer.step(*next(stream))
            seconds.append(time.perf_counter() - start)

    train(5)
    total = max(5, round(60 * RACE_MINUTES / statistics.median(seconds[1:])))
    trainer.total_steps = total  # the length of the learning rate schedule
    for share in SHARES:
        train(round(share * total))
        point = {"minutes": sum(seconds) / 60, "steps": trainer.steps}
        judged = trainer.diffusion.eval() if usual else trainer.averaged
        # The statistics of batch norm lag behind the weights. `update_bn` calls `forward`.
        judged.forward = judged.loss
        update_bn(islice(stream, 20), judged)
        curve.append(point | judge_weights(judged, usual, x_0))
    return curve


def judge_weights(judged: DiscreteDiffusion, usual: bool, x_0: Tensor) -> dict:
    """Bound and quality of samples. The usual argmax step is for samples: its bound is infinite."""
    bound = judged.bound_terms(spread(x_0, RACE_SAMPLES), 2, torch.Generator().manual_seed(0))
    drawing = judged.around(most_probable(judged.model)) if usual else judged
    samples, classifier = respaced(drawing, RACE_TIMESTEPS).sample(RACE_SAMPLES), load_classifier()
    reference, _ = judge(classifier, x_0, 2)
    report = metrics.quality(samples, reference, classifier, 2)
    return {"bound": summarize_bound(bound), "samples": report}


def race_figure(rows: dict[str, dict]):
    ylabels = "bound, nats per image", "Fréchet distance"
    figure, axes = subplots(*ylabels, xlabel="minutes of training", yscale="log")
    keys = ("bound", "nats_per_image"), ("samples", "frechet_distance")
    for axis, (part, key) in zip(axes, keys, strict=True):
        for name, one in rows.items():
            points = [(point["minutes"], point[part][key]) for point in one["curve"]]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.yaxis.set_major_formatter("{x:g}")
    axes[1].legend()
    return figure


def time_to_quality(args: argparse.Namespace) -> None:
    digits = load_dataset("train", args.data, args.data_root)
    x_0 = to_levels(load_dataset("validation", args.data, args.data_root).images)
    rows = {}
    for name, usual in (("this repository", False), ("PlainUNet, as usual", True)):
        torch.manual_seed(0)
        trainer = usual_trainer(BATCH_SIZE) if usual else ours(10**6, 2e-3, "variational")
        curve = compete(trainer, usual, digits, x_0)
        rows[name] = curve[-1] | {"row": f"{name}, {curve[-1]['steps']} steps", "curve": curve}
    result = {"title": f"{RACE_MINUTES} minutes", "rows": rows}
    write_json(output("time_to_quality"), result)
    print(table(result))
    draw(race_figure(rows), "time_to_quality")


# ------------------------------------------------------------------------------------------------


def main() -> None:
    pictures = {"noise": noise, "expect": expect, "fill": fill, "time_to_quality": time_to_quality}
    p = experiment_parser(__doc__)
    p.add_argument("picture", choices=pictures)
    minutes = {"type": integer(1), "nargs": "+", "default": MINUTES, "metavar": "M"}
    p.add_argument("--minutes", **minutes, help=f"of training, for expect (default {MINUTES})")
    add_device(p.add_argument)
    add_speed(p.add_argument)
    args = p.parse_args()
    if args.picture != "fill" and (args.amp or args.compile or args.device != "auto"):
        p.error("--device, --amp and --compile are for fill")
    if args.picture != "expect" and args.minutes != MINUTES:
        p.error("--minutes is for expect")
    # The linear schedule is deliberate.
    warnings.filterwarnings("ignore", "bar_Q.T. is far from stationary")
    pictures[args.picture](args)


if __name__ == "__main__":
    run(main)
