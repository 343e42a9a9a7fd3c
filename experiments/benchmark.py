"""How fast this repository trains and draws on this machine, beside the plain network.

    python -m experiments.benchmark --data-root data

All contestants take turns in one run, so all of them see the same machine; medians of five rounds.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

from cli import add_device, pick_device, run

import torch

from checkpoint import TIMESTEPS, write_json
from dataset import Dataset, load_dataset
from diffusion import DiscreteDiffusion
from experiments.baseline import PlainUNet, usual_trainer
from experiments.common import endless, experiment_parser, markdown, output, render
from model import UNet
from trainer import Trainer
from trajectories import respaced

BATCH_SIZE = 128
DRAWN = (1, 16, 64, 256)  # batches
FEW = 5  # timesteps to draw in: all of them cost the same
ROUNDS = 5


def take_turns(contestants: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """The median seconds of each, without the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    warm_up = 1 if device.type == "cpu" else 5  # a step on CUDA is recorded in its first calls
    for _ in range(warm_up + ROUNDS):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            if device.type != "cpu":  # which may still be working
                getattr(torch, device.type).synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(turns[warm_up:]) for name, turns in seconds.items()}


def training(digits: Dataset, device: torch.device, compiled: bool) -> dict[str, dict]:
    """Weights, operations and images per second of each network and way to train it."""

    def ours(loss: str = "cross_entropy", **options) -> Trainer:
        diffusion = DiscreteDiffusion(UNet().to(device), loss_type=loss)
        return Trainer(diffusion, 10**6, BATCH_SIZE, optimizer="muon", **options)

    trainers = {"UNet": ours(), "UNet, variational": ours("variational")}
    trainers["UNet, --amp"] = ours(amp=True)
    if compiled:
        trainers["UNet, --compile"] = ours(compiled=True)
    trainers["PlainUNet"] = usual_trainer(BATCH_SIZE, device)
    stream = endless(digits, BATCH_SIZE)
    work = {name: lambda t=trainer: t.step(*next(stream)) for name, trainer in trainers.items()}
    seconds = take_turns(work, device)
    return {
        name: {
            "weights": sum(p.numel() for p in trainer.network.parameters()),
            "images_per_second": BATCH_SIZE / seconds[name],
        }
        for name, trainer in trainers.items()
    }


def drawing(device: torch.device) -> dict[str, float]:
    """Network passes per second, which are images times timesteps."""
    networks = {f"UNet, batch {B}": (UNet(), B) for B in DRAWN}
    networks[f"PlainUNet, batch {DRAWN[2]}"] = (PlainUNet(), DRAWN[2])
    work, passes = {}, {}
    for name, (network, B) in networks.items():
        network = network.to(device, memory_format=torch.channels_last)
        diffusion = respaced(DiscreteDiffusion(network).eval(), FEW)
        work[name], passes[name] = partial(diffusion.sample, B, batch_size=B), B * FEW
    return {name: passes[name] / seconds for name, seconds in take_turns(work, device).items()}


def table(result: dict) -> str:
    networks, lines = result["training"]["networks"], []
    for name, one in networks.items():
        rate, plain = one["images_per_second"], networks["PlainUNet"]["images_per_second"]
        lines.append([name, f"{one['weights']:,}", f"{rate:.0f}", f"{rate / plain:.1f}"])
    heading = [f"training, batch {result['batch_size']}", "weights"]
    train = markdown([*heading, "images per second", "PlainUNet = 1"], lines)
    lines = [[k, f"{v:.0f}", f"{v / TIMESTEPS:.1f}"] for k, v in result["drawing"].items()]
    per_second = f"images per second, {TIMESTEPS} timesteps"
    return f"{train}\n\n" + markdown(["drawing", "network passes per second", per_second], lines)


def main() -> None:
    p = experiment_parser(__doc__)
    p.add_argument("--no-compile", action="store_true", help="without the compiled network")
    add_device(p.add_argument)
    args = p.parse_args()
    device, digits = pick_device(args.device), load_dataset("train", args.data, args.data_root)
    result = {"device": str(device), "batch_size": BATCH_SIZE}
    result["drawing"] = drawing(device)
    result["training"] = {"networks": training(digits, device, not args.no_compile)}
    write_json(output("benchmark"), result)
    print(render(table, output("benchmark")))


if __name__ == "__main__":
    run(main)
