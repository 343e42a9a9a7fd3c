"""Compare the speed of training and sampling with the plain network on this machine.

    python -m experiments.benchmark
    python -m experiments.benchmark --before FOLDER     # also with another clone

Contestants take turns, so that all see the same machine; results are medians of nine rounds. Each
clone runs in its own process. So does the plain network, with torch's default thread settings.
"""

import inspect
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from cli import REPOSITORY, WAITING, UserError, add_device, parser, path, pick_device, run

from checkpoint import TIMESTEPS, write_json
from experiments.common import markdown, output

BATCH_SIZE = 128
DRAWN = (1, 16, 64, 256)  # batch sizes
FEW = 5  # timesteps of sampling; all cost the same
ROUNDS = 9
TRAINED = ("UNet", "UNet, variational", "UNet, --amp", "UNet, --compile")


def worker(script: str, device: str, batch_size: int, few: int) -> None:
    """The program of a process in a clone: reads names of tasks, prints the seconds of each.

    Names are such as "UNet, --amp" (a training step) or "UNet, batch 64" (sampling). The first
    calls are the warm-up. If `script` is one of the clone, cli.py adjusts the threads for it.
    """
    import sys
    import time

    sys.modules["__main__"].__file__ = script
    from cli import pick_device

    import torch

    from diffusion import DiscreteDiffusion
    from experiments.baseline import usual_trainer
    from model import build_network
    from trainer import Trainer

    place, works = pick_device(device), {}
    x_0 = torch.randint(0, 2, (batch_size, 1, 32, 32), dtype=torch.uint8).to(place)

    def prepare(name: str):
        kind, _, option = name.partition(", ")
        if kind == "PlainUNet":
            trainer = usual_trainer(batch_size, place)
        else:
            network = build_network({"name": "unet"}).to(place, memory_format=torch.channels_last)
            loss = option if option == "variational" else "cross_entropy"
            options = {"amp": option == "--amp", "compiled": option == "--compile"}
            diffusion = DiscreteDiffusion(network, loss_type=loss)
            trainer = Trainer(diffusion, 10**6, batch_size, optimizer="muon", **options)
        if not option.startswith("batch"):
            return trainer.network, lambda: trainer.step(x_0)
        n, drawn = int(option[6:]), DiscreteDiffusion(trainer.network, timesteps=few).eval()
        return trainer.network, lambda: drawn.sample(n, batch_size=n)

    for name in map(str.strip, sys.stdin):
        new = name not in works
        network, work = works[name] = prepare(name) if new else works[name]
        for _ in range(6 if new else 1):  # the first calls on CUDA capture a graph
            start = time.perf_counter()
            work()
            if place.type != "cpu":  # it may still be running
                getattr(torch, place.type).synchronize()
            seconds = time.perf_counter() - start
        print(sum(p.numel() for p in network.parameters()), seconds, flush=True)


def start(folder: Path, device: str, script: str = "") -> subprocess.Popen:
    """A process that runs `worker`, without the environment variables that cli.py has set here."""
    env = {name: value for name, value in os.environ.items() if WAITING.get(name) != value}
    call = f"worker({str(folder / script)!r}, {device!r}, {BATCH_SIZE}, {FEW})"
    command = [sys.executable, "-W", "ignore", "-c", f"{inspect.getsource(worker)}\n{call}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def take_turns(contestants: list[tuple]) -> dict[str, dict[str, tuple[int, float]]]:
    """{whose: {task: (weights, images or network passes per second)}}.

    `contestants`: (whose, process, task) of each. Raises UserError if a process fails.
    """
    seconds, rates = defaultdict(list), defaultdict(dict)
    for whose, process, name in contestants * ROUNDS:
        try:
            print(name, file=process.stdin, flush=True)
            weights, time = process.stdout.readline().split()
        except (BrokenPipeError, ValueError):
            raise UserError(f"{name!r} failed in {whose}: see above") from None
        seconds[whose, name].append(float(time))
        images = int(name.split()[-1]) * FEW if "batch" in name else BATCH_SIZE
        rates[whose][name] = int(weights), images / statistics.median(seconds[whose, name])
    return rates


def table(result: dict) -> str:
    networks, before = result["training"]["networks"], result.get("before", {})

    def compared(name: str, rate: float) -> list[str]:
        old = before.get(name)
        return [f"{rate:.0f}", f"{old:.0f}" if old else "", f"{rate / old:.2f}" if old else ""]

    plain, lines = networks["PlainUNet"]["images_per_second"], []
    for name, one in networks.items():
        rate = one["images_per_second"]
        lines.append([name, f"{one['weights']:,}", *compared(name, rate), f"{rate / plain:.1f}"])
    heading = [f"training, batch {result['batch_size']}", "weights", "images per second"]
    train = markdown([*heading, "before", "ratio", "PlainUNet = 1"], lines)
    drawing = result["drawing"].items()
    lines = [[name, *compared(name, rate), f"{rate / TIMESTEPS:.1f}"] for name, rate in drawing]
    heading = ["drawing", "network passes per second", "before", "ratio"]
    return f"{train}\n\n" + markdown([*heading, f"images per second, {TIMESTEPS} timesteps"], lines)


def main() -> None:
    p = parser(__doc__)
    words = "another clone of this repository to compare with"
    p.add_argument("--before", type=path(), metavar="FOLDER", help=words)
    p.add_argument("--no-compile", action="store_true", help="skip the compiled network")
    add_device(p.add_argument)
    args = p.parse_args()
    device = str(pick_device(args.device))
    names = [*TRAINED[: 3 if args.no_compile else 4], *(f"UNet, batch {n}" for n in DRAWN)]
    ours, plain = start(REPOSITORY, device, "train.py"), start(REPOSITORY, device)
    turns = [("this clone", ours, name) for name in names]
    turns += [("this clone", plain, name) for name in ("PlainUNet", f"PlainUNet, batch {DRAWN[2]}")]
    if args.before:
        before = start(args.before.resolve(), device, "train.py")
        turns += [("--before", before, name) for name in names]
    rates = take_turns(turns)
    result = {
        "device": device,
        "batch_size": BATCH_SIZE,
        "drawing": {},
        "training": {"networks": {}},
    }
    result["before"] = {name: rate for name, (_, rate) in rates["--before"].items()}
    for name, (weights, rate) in rates["this clone"].items():
        if "batch" in name:
            result["drawing"][name] = rate
        else:
            one = {"weights": weights, "images_per_second": rate}
            result["training"]["networks"][name] = one
    write_json(output("benchmark"), result)
    print(table(result))


if __name__ == "__main__":
    run(main)
