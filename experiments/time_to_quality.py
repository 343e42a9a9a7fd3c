"""Bound and samples against minutes of training: this repository beside the plain network.

    python -m experiments.time_to_quality --data-root data

The plain network is trained twice: as usual, and with this repository's recipe. The contestants
train one after the other, on all cores of the CPU. The clock stops while they are judged, on
validation digits. Also draws time_to_quality.png.
"""

import statistics
import time
import warnings
from functools import partial
from itertools import islice

from cli import number, run

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from dataset import Dataset, load_dataset, to_levels
from diffusion import DiscreteDiffusion
from experiments.baseline import MostProbable, PlainUNet, usual_trainer
from experiments.common import collect, draw, endless, experiment_parser, table
from metrics import judge, load_classifier, quality, spread, summarize_bound
from model import UNet
from pictures import new_figure
from trainer import Trainer
from trajectories import respaced

USUAL = "PlainUNet, as usual"
CONTESTANTS = {"this repository": UNet, USUAL: PlainUNet, "PlainUNet, our recipe": PlainUNet}
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the training, after which it is judged
BATCH_SIZE, LR, BOUND_IMAGES, NUM_SAMPLES, TIMESTEPS, NORM_BATCHES = 128, 2e-3, 500, 500, 20, 20


def compete(name: str, minutes: float, digits: Dataset, x_0: Tensor) -> dict:
    """The curve of one contestant; its last point is the row of the table."""
    torch.manual_seed(0)
    if name == USUAL:
        trainer = usual_trainer(BATCH_SIZE)
    else:
        network = CONTESTANTS[name]().to(memory_format=torch.channels_last)
        diffusion = DiscreteDiffusion(network, loss_type="variational")
        trainer = Trainer(diffusion, 10**6, BATCH_SIZE, LR, "muon")
    stream, seconds, curve = endless(digits, BATCH_SIZE), [], []

    def train(steps: int) -> None:
        trainer.network.train()
        while trainer.steps < steps:
            start = time.perf_counter()
            trainer.step(*next(stream))
            seconds.append(time.perf_counter() - start)

    train(5)
    total = max(5, round(60 * minutes / statistics.median(seconds[1:])))  # the first one warms up
    trainer.total_steps = total  # for the course of the learning rate
    for share in SHARES:
        train(round(share * total))
        point = {"minutes": sum(seconds) / 60, "steps": trainer.steps}
        judged = trainer.diffusion.eval() if name == USUAL else trainer.averaged
        curve.append(point | judge_weights(judged, islice(stream, NORM_BATCHES), x_0, name))
    return curve[-1] | {"row": f"{name}, {total} steps", "curve": curve}


def judge_weights(judged: DiscreteDiffusion, some_batches, x_0: Tensor, name: str) -> dict:
    """Bound and quality of samples."""
    # The statistics of batch norm lag behind the weights. `update_bn` calls `forward`.
    judged.forward = judged.loss
    update_bn(some_batches, judged)
    generator = torch.Generator().manual_seed(0)
    bound = judged.bound_terms(spread(x_0, BOUND_IMAGES), 2, generator)
    # The argmax reverse step is part of the usual way. Its own bound is infinite.
    drawing = judged.around(MostProbable(judged.model)) if name == USUAL else judged
    samples = respaced(drawing, TIMESTEPS).sample(NUM_SAMPLES)
    classifier = load_classifier()
    reference, _ = judge(classifier, x_0, 2)
    report = quality(samples, reference, classifier, 2)
    return {"bound": summarize_bound(bound), "samples": report}


def figure(result: dict):
    plot = new_figure(10, 4)
    left, right = plot.subplots(1, 2)
    for name, one in result["rows"].items():
        minutes = [point["minutes"] for point in one["curve"]]
        bounds = [point["bound"]["nats_per_image"] for point in one["curve"]]
        distances = [point["samples"]["frechet_distance"] for point in one["curve"]]
        left.plot(minutes, bounds, marker="o", label=name)
        right.plot(minutes, distances, marker="o", label=name)
    left.set(ylabel="bound, nats per image")
    right.set(ylabel="Fréchet distance")
    for axis in (left, right):
        axis.set(xlabel="minutes of training", xscale="log", yscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    right.legend()
    return plot


def main() -> None:
    p = experiment_parser(__doc__)
    minutes = "of training for each (default 5)"
    p.add_argument("--minutes", type=number(0, above=True), default=5, help=minutes)
    args = p.parse_args()
    digits = load_dataset("train", args.data, args.data_root)
    x_0 = to_levels(load_dataset("validation", args.data, args.data_root).images)
    # The linear schedule is here on purpose.
    warnings.filterwarnings("ignore", "bar_Q.T. is far from stationary")
    flags, plan = f"--minutes {args.minutes:g} --data {args.data}", {}
    for name in CONTESTANTS:
        plan[name] = flags, partial(compete, name, args.minutes, digits, x_0)
    file = collect("time_to_quality", f"{args.minutes:g} minutes", plan, table)
    draw(figure, file)


if __name__ == "__main__":
    run(main)
