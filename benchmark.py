"""How fast the default network trains and draws, beside the common plain network, in one run.

    python benchmark.py

The two take turns, so that both see the same machine; medians over the rounds, and their ratio.
"""

import argparse
import os
import statistics
import sys
import time

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion import IMAGE_SHAPE, DiscreteDiffusion
from model import build_network, pick_device


def mflop(network: torch.nn.Module) -> float:
    """Of one forward pass of one image; multiply and add counted as two."""
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *IMAGE_SHAPE, dtype=torch.long, device=device), torch.ones(1, device=device).long())
    return counter.get_total_flops() / 1e6


def training_step(diffusion: DiscreteDiffusion, optimizer: torch.optim.Optimizer, x_0: torch.Tensor) -> None:
    loss = diffusion.loss(x_0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def sampling_step(diffusion: DiscreteDiffusion, x_t: torch.Tensor) -> None:
    diffusion.p_sample(x_t, torch.full((len(x_t),), diffusion.timesteps // 2, device=x_t.device))


def images_per_second(work, images: int, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn (default 5)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step (default 128)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")
    args = parser.parse_args()
    if args.rounds < 1 or args.batch_size < 1:
        parser.error("--rounds and --batch-size must be at least 1")
    device = pick_device(args.device)
    torch.manual_seed(0)
    x_0 = torch.randint(0, 2, (args.batch_size, *IMAGE_SHAPE), device=device)
    x_t = torch.randint(0, 2, (64, *IMAGE_SHAPE), device=device)

    contestants, rates = {}, {}
    for name in ("unet", "plain"):
        diffusion = DiscreteDiffusion(build_network({"name": name}).to(device))
        contestants[name] = diffusion, torch.optim.AdamW(diffusion.parameters(), 1e-4)
        rates[name] = {"train": [], "draw": []}
        training_step(*contestants[name], x_0)  # warm up
    for _ in range(args.rounds):
        for name, (diffusion, optimizer) in contestants.items():
            repeats = 5 if name == "unet" else 1  # turns of about equal length
            train, draw = rates[name]["train"], rates[name]["draw"]
            for _ in range(repeats):
                train.append(
                    images_per_second(lambda d=diffusion, o=optimizer: training_step(d, o, x_0), len(x_0), device)
                )
            diffusion.eval()
            for _ in range(repeats):
                draw.append(images_per_second(lambda d=diffusion: sampling_step(d, x_t), len(x_t), device))
            diffusion.train()

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}, batch {args.batch_size}; medians")
    print(f"{'network':8}{'weights':>12}{'MFLOP/image':>13}{'training img/s':>16}{'200-step digits/s':>19}")
    for name, (diffusion, _) in contestants.items():
        weights = sum(p.numel() for p in diffusion.parameters())
        train, draw = (statistics.median(rates[name][key]) for key in ("train", "draw"))
        print(f"{name:8}{weights:12,}{mflop(diffusion.model):13.1f}{train:16.1f}{draw / diffusion.timesteps:19.2f}")
    ratio = {
        key: statistics.median(rates["unet"][key]) / statistics.median(rates["plain"][key]) for key in rates["unet"]
    }
    print(f"unet / plain: training {ratio['train']:.1f}, drawing {ratio['draw']:.1f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmark.py: error: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
