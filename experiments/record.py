"""One attempt at dynamically binarized MNIST: the largest network that a GPU trains in ten minutes.

    python -m experiments.record --data-root data
    python -m experiments.record --data-root data --init record.pth

A few networks are timed first. The largest one that sees IMAGES in the time left is trained from
scratch, with dropout and augmentation. The learning rate follows the clock, down to 0. Every
minute, weights.pth and record.json are written to results_d3pm/experiments/record/. `evaluate.py`
takes the weights. Another run can continue from a copy of them, record.pth.
"""

import itertools
import math
import time
from collections.abc import Iterator

from cli import UserError, add_device, number, path, pick_device, provenance, run

import torch

from checkpoint import build_diffusion, read_checkpoint, sampling_state, save_checkpoint, write_json
from dataset import Dataset, load_dataset, to_levels
from diffusion import DiscreteDiffusion
from experiments.common import endless, experiment_parser, output
from model import build_network
from trainer import Trainer

NETWORKS = {  # the largest first
    "28 M": {"channels": [192, 384, 576], "blocks": 1},
    "14 M": {"channels": [96, 192, 288], "blocks": 2},
    "7 M": {"channels": [96, 192, 288], "blocks": 1},
}
BATCH_SIZES = (1024, 512)
TOLD = {"dropout": 0.1, "augmented": True}
IMAGES = 15_000_000
SECONDS = 10  # of timing each network
CHECK_STEPS = 20  # between looks at the clock, each of which is a device sync
LONG = 10**6  # steps, until the clock tells how many there will be


class Contestant:
    """A network in training on the bound in bfloat16, and its batches."""

    def __init__(self, diffusion, data: Dataset, size: int, compiled=False, seed=0):
        options = {"optimizer": "muon", "amp": True, "compiled": compiled, "seed": seed}
        self.trainer = Trainer(diffusion, LONG, size, 2e-3, **options)
        data, how = data.to(self.trainer.source), {"binarize": "dynamic", "augment": 0.5}
        self.batches, self.size = endless(data, size, seed, **how), size

    def train(self, n: int) -> float:
        """Train n steps. Returns the mean loss, in nats per pixel, after a device sync."""
        losses = [self.trainer.step(*batch) for batch in itertools.islice(self.batches, n)]
        return torch.stack(losses).mean().item()

    def images_per_second(self) -> float:
        self.train(5)  # allocates, compiles, captures
        start, before = time.monotonic(), self.trainer.steps
        while time.monotonic() < start + SECONDS:
            self.train(CHECK_STEPS)
        return (self.trainer.steps - before) * self.size / (time.monotonic() - start)

    def train_until(self, deadline: float) -> Iterator[dict]:
        """Train, and yield a row of the learning curve every minute and at the end."""
        self.train(5)
        trainer, losses, marks = self.trainer, [], 1
        start = now = time.monotonic()
        while now < deadline:
            losses.append(self.train(CHECK_STEPS))
            now = time.monotonic()
            if not math.isfinite(losses[-1]):
                raise UserError(f"the loss is not finite at step {trainer.steps}")
            # So steps / total_steps, which sets the learning rate, is the share of time used up.
            trainer.total_steps = math.ceil(trainer.steps * (deadline - start) / (now - start))
            if now >= min(deadline, start + 60 * marks):
                marks += 1
                row = {"minutes": (now - start) / 60, "images": trainer.steps * self.size}
                yield row | {"train_loss": sum(losses) / len(losses)}
                losses.clear()


def new_diffusion(name: str) -> DiscreteDiffusion:
    torch.manual_seed(0)
    network = build_network({"name": "unet", "num_levels": 2} | TOLD | NETWORKS[name])
    return DiscreteDiffusion(network, timesteps=1_000, loss_type="variational")


def choose(data: Dataset, device: torch.device, deadline: float) -> tuple[list[dict], dict]:
    """The speed of each network, and the row of the largest that sees IMAGES by the deadline."""
    rows = []
    for name, size in itertools.product(NETWORKS, BATCH_SIZES):
        speed = Contestant(new_diffusion(name).to(device), data, size).images_per_second()
        rows.append({"network": name, "batch_size": size, "images_per_second": speed})
        print(f"{name} weights, batches of {size}: {speed:,.0f} images/s")
    needed = IMAGES / max(1, deadline - time.monotonic())
    fastest = max(rows, key=lambda row: row["images_per_second"])
    return rows, next((row for row in rows if row["images_per_second"] >= needed), fastest)


def main() -> None:
    p = experiment_parser(__doc__)
    minutes = {"type": number(0, above=True), "default": 9.0, "metavar": "M"}
    p.add_argument("--minutes", **minutes, help="from start to end (default 9)")
    words = "continue from these weights, made by this script"
    p.add_argument("--init", type=path(), metavar="CHECKPOINT", help=words)
    add_device(p.add_argument)
    args = p.parse_args()
    deadline, device = time.monotonic() + 60 * args.minutes, pick_device(args.device)
    weights = output("record").with_name("weights.pth")
    data = load_dataset("train", args.data, args.data_root)
    grey = load_dataset("validation", args.data, args.data_root).images
    validation = to_levels(grey, 2, "dynamic", torch.Generator().manual_seed(0))
    if args.init:
        timed, size = [], max(BATCH_SIZES)
        diffusion = build_diffusion(read_checkpoint(args.init), args.init, device)
        if not diffusion.model.config.get("augmented") or diffusion.loss_type != "variational":
            p.error(f"--init: {args.init} was not trained by this script")
        if args.init.resolve() == weights.resolve():
            p.error(f"--init: copy {args.init} first, as it would be overwritten")
    else:
        timed, chosen = choose(data, device, deadline)
        if time.monotonic() >= deadline:
            raise UserError("timing the networks took all the time: give more --minutes")
        diffusion, size = new_diffusion(chosen["network"]).to(device), chosen["batch_size"]
    contestant = Contestant(diffusion, data, size, compiled=True, seed=1 if args.init else 0)
    averaged, curve = contestant.trainer.averaged, []
    for row in contestant.train_until(deadline):
        curve.append(row | {"validation_bound": contestant.trainer.validate(validation)})
        print(", ".join(f"{name} {value:,.4g}" for name, value in curve[-1].items()))
        state = sampling_state(averaged, data, "dynamic", contestant.trainer.steps)
        save_checkpoint(weights, state)
        result = {
            "init": args.init,
            "network": averaged.model.config,
            "batch_size": size,
            "timed": timed,
        }
        write_json(output("record"), result | {"curve": curve, "provenance": provenance()})


if __name__ == "__main__":
    run(main)
