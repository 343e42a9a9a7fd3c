"""Bound and samples against minutes of training: this repository beside the plain network, trained in two ways.

    python -m experiments.time_to_quality --data-root data

The plain network as it is usually trained, and with this repository's whole recipe: what the recipe brings, and what
the network does. They train one after the other on all cores of the CPU, with a clock that stands still while they are
judged on validation digits. Also draws time_to_quality.png.
"""

import contextlib
import math
import statistics
import time
import warnings
from functools import partial
from itertools import islice

from cli import integer, number, run

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from checkpoint import atomic_write
from dataset import Digits, load_digits, to_levels
from diffusion import DiscreteDiffusion
from experiments.baseline import PlainUNet, usual_trainer
from experiments.common import (
    LR,
    collect,
    endless,
    experiment_parser,
    quality_figure,
    render,
    table,
)
from metrics import judge, load_classifier, quality, spread, summarize_bound
from model import UNet
from pictures import save_figure
from trainer import Trainer

# The network, and the rates that are tried with this repository's recipe; None is the usual one
CONTESTANTS = {
    "this repository": (UNet, [LR]),
    "PlainUNet, as usual": (PlainUNet, [None]),
    "PlainUNet, our recipe": (PlainUNet, [LR / 4, LR / 2, LR]),
}
FRACTIONS = (
    1 / 16,
    1 / 8,
    1 / 4,
    1 / 2,
    1,
)  # of the training, at which it is judged; each rate is tried for the second
BATCH_SIZE, BOUND_IMAGES, NUM_SAMPLES, NORM_BATCHES = 128, 500, 500, 20


class Race:
    """One contestant at one rate: its training, and what it has come to so far."""

    def __init__(self, network: type[nn.Module], rate: float | None, total: int, digits: Digits):
        torch.manual_seed(0)
        self.usual, self.seconds, self.stream = rate is None, [], endless(digits, BATCH_SIZE)
        if self.usual:
            self.trainer = usual_trainer(BATCH_SIZE)
        else:
            diffusion = DiscreteDiffusion(
                network().to(memory_format=torch.channels_last), loss_type="variational"
            )
            self.trainer = Trainer(diffusion, total, BATCH_SIZE, rate, "muon")

    def train(self, steps: int) -> "Race":
        """Go on to so many steps in all, by the clock."""
        self.trainer.network.train()
        while self.trainer.steps < steps:
            start = time.perf_counter()
            self.trainer.step(*next(self.stream))
            self.seconds.append(time.perf_counter() - start)
        return self

    def bound(self, x_0: Tensor) -> dict:
        """By the mixture, after batch norm's statistics, which lag behind the weights, were brought up to date."""
        self.judged = self.trainer.diffusion.eval() if self.usual else self.trainer.averaged
        self.judged.forward = self.judged.loss  # what update_bn calls with x_0
        update_bn(islice(self.stream, NORM_BATCHES), self.judged)
        terms = self.judged.bound_terms(
            spread(x_0, BOUND_IMAGES), 2, torch.Generator().manual_seed(0)
        )
        return summarize_bound(terms)

    def samples(self, timesteps: int) -> Tensor:
        """Drawn from what `bound` has judged; of the usual way, by the argmax, whose own bound is infinite."""
        config = self.judged.config | ({"reverse": "argmax"} if self.usual else {})
        drawing = DiscreteDiffusion(self.judged.model, **config)
        return drawing.respaced(timesteps).sample(NUM_SAMPLES)


def compete(name: str, minutes: float, timesteps: int, train: Digits, x_0: Tensor) -> dict:
    """The curve of one contestant, at the best of its rates."""
    network, rates = CONTESTANTS[name]
    measured = Race(network, rates[0], 10**6, train).train(5).seconds
    total = max(
        len(FRACTIONS), round(60 * minutes / statistics.median(measured[1:]))
    )  # the first warms up
    tried = {}
    for rate in rates if len(rates) > 1 else ():
        tried[rate] = math.inf
        with contextlib.suppress(ValueError):  # a network that has diverged gives no probabilities
            short = math.ceil(FRACTIONS[1] * total)
            tried[rate] = (
                Race(network, rate, short, train).train(short).bound(x_0)["nats_per_image"]
            )
    rate = min(tried, key=tried.get) if tried else rates[0]
    race, classifier, curve = Race(network, rate, total, train), load_classifier(), []
    reference, _ = judge(classifier, x_0, 2)
    for fraction in FRACTIONS:
        race.train(round(fraction * total))
        point = {
            "minutes": sum(race.seconds) / 60,
            "steps": race.trainer.steps,
            "bound": race.bound(x_0),
        }
        curve.append(
            point | {"samples": quality(race.samples(timesteps), reference, classifier, 2)}
        )
    row = f"{name}, {total} steps" + (f", rate {rate:g}" if rate else "")
    return curve[-1] | {"row": row, "bounds_of_rates": tried, "curve": curve}


def plot(result: dict):
    curves = {name: one["curve"] for name, one in result["rows"].items()}
    return quality_figure(curves, "minutes", "minutes of training", result["samples"])


def main() -> None:
    p = experiment_parser(__doc__)
    p.add_argument("--minutes", type=number(0, above=True), default=10, help="of training for each (default 10; "
                   "judging, and trying rates, comes on top)")  # fmt: skip
    p.add_argument(
        "--timesteps",
        type=integer(1, 200),
        default=20,
        help="in which samples are drawn (default 20)",
    )
    args = p.parse_args()
    train, validation = (
        load_digits(split, args.data, args.data_root) for split in ("train", "validation")
    )
    warnings.filterwarnings(
        "ignore", "bar_Q.T. is far from stationary"
    )  # the linear schedule is here on purpose
    what = {"title": f"{args.minutes:g} minutes", "data": args.data}
    what |= {"samples": f"{NUM_SAMPLES} samples in {args.timesteps} timesteps"}
    work = partial(
        compete,
        minutes=args.minutes,
        timesteps=args.timesteps,
        train=train,
        x_0=to_levels(validation.images),
    )
    file = collect(
        "time_to_quality", what, {name: partial(work, name) for name in CONTESTANTS}, table
    )
    with atomic_write(file.with_suffix(".png")) as picture:
        save_figure(render(plot, file), picture)


if __name__ == "__main__":
    run(main)
