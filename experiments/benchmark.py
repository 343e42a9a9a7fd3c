"""How fast this repository trains and draws on this machine, beside the machine's own limit and the plain network.

    python -m experiments.benchmark --data-root data

What is compared takes turns in one run, so that all see the same machine; medians. The baseline is PlainUNet, trained
as usual on images from a DataLoader that transforms them one by one.
"""

import contextlib
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path

from cli import REPOSITORY, add_device, integer, pick_device, run

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # the profiler's remarks about GPUs that are not there

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import TIMESTEPS, write_json
from dataset import Digits, load_digits
from diffusion import DiscreteDiffusion
from experiments.baseline import PerSample, PlainUNet, usual_trainer
from experiments.common import OUT, endless, experiment_parser, markdown, render
from model import build_network
from trainer import Recorded, Trainer

PARTS = (
    "data",
    "noise",
    "forward",
    "backward",
    "optimizer",
    "average",
)  # labels: the first here, others in Trainer
PRODUCT = 2048  # the side of the matrices whose product shows what the machine can do at best
BATCHES = (1, 16, 64, 256)  # of drawing
FEW = 5  # timesteps to draw in: all cost the same
WORKERS = 2  # of the baseline's DataLoader


def mflop(network: torch.nn.Module) -> float:
    """Of one forward pass of one image; multiply and add counted as two. (The fused attention would not be counted.)"""
    x_t = torch.zeros(1, 1, 32, 32, dtype=torch.long, device=next(network.parameters()).device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x_t, torch.ones(1, dtype=torch.long, device=x_t.device))
    return counter.get_total_flops() / 1e6


def take_turns(
    contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The median seconds of each over so many rounds, after those that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    warm_up = 1 if device.type == "cpu" else Recorded.USUAL + 1
    for _ in range(rounds + warm_up):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            if device.type != "cpu":  # which may still be at work
                getattr(torch, device.type).synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(turns[warm_up:]) for name, turns in seconds.items()}


def step(trainer: Trainer, stream: Iterator) -> None:
    with record_function("data"):
        x_0, y = next(stream)
    trainer.step(x_0, y)


def shares(trainer: Trainer, stream: Iterator, steps: int = 3) -> dict[str, float]:
    """Of the parts of a training step, by the profiler's time on the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step(trainer, stream)
    times = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    return {part: times[part] / sum(times[part] for part in PARTS) for part in PARTS}


def training(
    digits: Digits, device: torch.device, rounds: int, batch_size: int, compiled: bool
) -> dict:
    """Images per second, operations and shares, for each network and way of training it."""

    def ours(loss: str = "cross_entropy", **options) -> tuple[Trainer, Iterator]:
        diffusion = DiscreteDiffusion(build_network({"name": "unet"}).to(device), loss_type=loss)
        return Trainer(diffusion, 10**6, batch_size, optimizer="muon", **options), endless(
            digits, batch_size
        )

    loader = DataLoader(
        PerSample(digits), batch_size, shuffle=True, num_workers=WORKERS, drop_last=True
    )
    pairs = {
        "UNet": ours(),
        "UNet, variational": ours("variational"),
        "UNet, --amp": ours(amp=True),
        **({"UNet, --compile": ours(compiled=True)} if compiled else {}),
        "PlainUNet": (usual_trainer(batch_size, device), chain.from_iterable(repeat(loader))),
    }
    matrix = torch.rand(PRODUCT, PRODUCT, device=device)
    work = {name: partial(step, *pair) for name, pair in pairs.items()}
    seconds = take_turns(work | {"product": lambda: matrix @ matrix}, rounds, device)
    networks = {}
    for name, (trainer, stream) in pairs.items():
        rate, forward = batch_size / seconds[name], mflop(trainer.network)
        networks[name] = {
            "weights": sum(p.numel() for p in trainer.network.parameters()),
            "mflop_per_image": forward,
            "images_per_second": rate,
            "gflops": 3 * forward * rate / 1e3,  # backward counted as two forward passes
            "shares": shares(trainer, stream) if device.type == "cpu" else {},
        }
    return {
        "matrix_product_gflops": 2 * PRODUCT**3 / seconds["product"] / 1e9,
        "networks": networks,
    }


def drawing(device: torch.device, rounds: int) -> dict[str, float]:
    """Network passes, images times timesteps, per second: {network and batch: rate}."""
    unet, plain = build_network({"name": "unet"}), PlainUNet().to(memory_format=torch.channels_last)
    unet, plain = (
        DiscreteDiffusion(network.to(device)).eval().respaced(FEW) for network in (unet, plain)
    )
    pairs = {f"UNet, batch {B}": (unet, B) for B in BATCHES} | {
        f"PlainUNet, batch {BATCHES[2]}": (plain, BATCHES[2])
    }
    work = {
        name: partial(diffusion.sample, B, batch_size=B) for name, (diffusion, B) in pairs.items()
    }
    return {
        name: pairs[name][1] * FEW / seconds
        for name, seconds in take_turns(work, rounds, device).items()
    }


def peak_memory_mb(command: list) -> float | None:
    """Of a process, from Linux's own record while it lives; None elsewhere. Raises RuntimeError if it fails.

    getrusage would not do: a young process has its parent's peak in there.
    """
    peak = None
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = next(
                    int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")
                )
            time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))} ended with code {process.returncode}")
    return peak


def sixteen_digits(device: torch.device, rounds: int) -> dict:
    """sample.py as its user meets it, beside a process that only imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        sample = [
            sys.executable,
            REPOSITORY / "sample.py",
            "--out",
            Path(folder) / "16.png",
            "--device",
            str(device),
        ]
        commands = {"sample": sample, "import torch": [sys.executable, "-c", "import torch"]}
        result = {"peak_memory_mb": peak_memory_mb(sample)}
        work = {
            name: partial(subprocess.run, line, capture_output=True)
            for name, line in commands.items()
        }
        return result | {"seconds": take_turns(work, rounds, torch.device("cpu"))}


def table(result: dict) -> str:
    networks, peak = result["training"]["networks"], result["training"]["matrix_product_gflops"]
    plain = networks["PlainUNet"]["images_per_second"]
    rows = [
        [name, f"{one['weights']:,}", f"{one['mflop_per_image']:.0f}", f"{one['images_per_second']:.0f}",
         f"{one['images_per_second'] / plain:.1f}", f"{one['gflops'] / peak:.0%}",
         *(f"{one['shares'][part]:.1%}" if one["shares"] else "" for part in PARTS)]
        for name, one in networks.items()
    ]  # fmt: skip
    heading = [f"training, batch {result['batch_size']}", "weights", "MFLOP per image", "images per second",
               "PlainUNet = 1", f"of {peak:.0f} GFLOP/s", *PARTS]  # fmt: skip
    draw = [
        [name, f"{rate:.0f}", f"{rate / TIMESTEPS:.1f}"] for name, rate in result["drawing"].items()
    ]
    seconds, memory = (
        result["sixteen_digits"]["seconds"],
        result["sixteen_digits"]["peak_memory_mb"],
    )
    command = [
        f"{seconds['sample']:.2f}",
        f"{seconds['sample'] / seconds['import torch']:.2f}",
        f"{memory:.0f}" if memory else "",
    ]
    return "\n\n".join(
        [
            markdown(heading, rows),
            markdown(
                [
                    "drawing",
                    "network passes per second",
                    f"images per second, {TIMESTEPS} timesteps",
                ],
                draw,
            ),
            markdown(
                ["16 digits", "seconds", "`import torch` = 1", "peak MB"],
                [["`python sample.py`", *command]],
            ),
        ]
    )


def main() -> None:
    p = experiment_parser(__doc__)
    p.add_argument(
        "--rounds", type=integer(1), default=5, help="how often each takes its turn (default 5)"
    )
    p.add_argument(
        "--batch-size", type=integer(1), default=128, help="images per training step (default 128)"
    )
    p.add_argument("--no-compile", action="store_true", help="leave the compiled network out")
    add_device(p.add_argument)
    args = p.parse_args()
    device, digits = pick_device(args.device), load_digits("train", args.data, args.data_root)
    next(endless(digits, args.batch_size))  # raises now if the batch is too large
    result = {"device": str(device), "batch_size": args.batch_size, "rounds": args.rounds}
    result["sixteen_digits"] = sixteen_digits(device, args.rounds)
    result["drawing"] = drawing(device, args.rounds)
    result["training"] = training(digits, device, args.rounds, args.batch_size, not args.no_compile)
    file = OUT / "benchmark" / "benchmark.json"
    write_json(file, result)
    print(render(table, file))


if __name__ == "__main__":
    run(main)
