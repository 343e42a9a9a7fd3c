"""How fast this repository trains and draws on this machine, beside the machine's own limit and the common baseline.

    python benchmark.py

Takes up to five minutes; prints a table and writes results_d3pm/benchmark.json. Whatever is compared takes turns in
this one run, so that all see the same machine, and medians are reported. The baseline is `PlainUNet` with its usual
data path, a DataLoader that transforms one image at a time. "extrapolated" marks what was not run to its end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks about GPUs that are not there

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from dataset import get_dataloader
from diffusion import IMAGE_SHAPE, DiscreteDiffusion, save_checkpoint
from evaluate import write_json
from model import build_network, pick_device
from train import BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, average

PARTS = ("data", "noising", "network", "loss", "optimizer")
WORKERS = 2  # of the baseline's DataLoader
OUT = Path("results_d3pm") / "benchmark.json"


class PerSample(Dataset):
    """The usual data path: every image by itself through torchvision's transforms, every epoch anew."""

    def __init__(self, grey: Tensor):
        from torchvision import transforms

        self.grey = grey
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.Pad(2),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, i: int) -> Tensor:
        return (self.transform(self.grey[i]) > 0.5).long()


def endless(loader: DataLoader):
    while True:
        for batch in loader:
            yield batch if torch.is_tensor(batch) else batch[0]


def mflop(network: torch.nn.Module) -> float:
    """Of one forward pass of one image; multiply and add counted as two. (The fused attention would not be counted.)"""
    device = next(network.parameters()).device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *IMAGE_SHAPE, dtype=torch.long, device=device), torch.ones(1, device=device).long())
    return counter.get_total_flops() / 1e6


class Trainer:
    """A network with all that a training step needs, and a clock between the parts of a step.

    The step is that of train.py; or, with `usual`, the common one: Adam at 1e-4, every t drawn on its own, no clipping
    of gradients, no averaged weights.
    """

    def __init__(self, diffusion: DiscreteDiffusion, batches, compiled: bool = False, usual: bool = False):
        self.network, self.batches = diffusion.model, batches
        self.device = next(self.network.parameters()).device
        self.diffusion = diffusion
        if compiled:
            self.diffusion = DiscreteDiffusion(torch.compile(self.network), **diffusion.config)
        self.usual, parameters = usual, self.network.parameters()
        self.optimizer = (
            torch.optim.Adam(parameters, 1e-4)
            if usual
            else torch.optim.AdamW(parameters, 1e-4, betas=BETAS, weight_decay=WEIGHT_DECAY)
        )
        self.averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def step(self) -> float:
        """Seconds of one step in all; those of its parts are kept in `seconds`."""
        d, clock = self.diffusion, [now(self.device)]
        x_0 = next(self.batches).to(self.device)
        clock.append(now(self.device))
        t = torch.randint(1, d.timesteps + 1, (len(x_0),)) if self.usual else d.draw_t(len(x_0))
        t = t.to(self.device)
        x_t = d.q_sample(x_0, t)
        clock.append(now(self.device))
        logits = d.x_0_logits(x_t, t)
        clock.append(now(self.device))
        leaf = logits.detach().requires_grad_()  # parts the loss's own backward pass from the network's
        d.loss_at(x_0, x_t, t, leaf).backward()
        clock.append(now(self.device))
        self.optimizer.zero_grad()
        logits.backward(leaf.grad)
        clock.append(now(self.device))
        if not self.usual:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        if not self.usual:
            self.averaged.update_parameters(self.network)
        clock.append(now(self.device))
        data, noising, forward, loss, backward, optimizer = (b - a for a, b in pairwise(clock))
        for part, seconds in zip(PARTS, (data, noising, forward + backward, loss, optimizer), strict=True):
            self.seconds[part].append(seconds)
        return clock[-1] - clock[0]


def now(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------


def matrix_product_gflops(device: torch.device, n: int = 2048) -> float:
    """GFLOP/s of one n^3 float32 matrix product: what this machine can do at best."""
    a = torch.rand(n, n, device=device)
    start = now(device)
    a @ a
    return 2 * n**3 / (now(device) - start) / 1e9


def training(args: argparse.Namespace, device: torch.device) -> dict:
    loader = get_dataloader(args.batch_size, args.data_root, args.data)
    grey = loader.dataset.tensors[0][:, 0, 2:-2, 2:-2].contiguous()  # back to 28x28: padding is the baseline's own work
    usual = DataLoader(PerSample(grey), args.batch_size, shuffle=True, num_workers=WORKERS, drop_last=True)

    def trainer(network: str, loss: str, loader: DataLoader, **kwargs) -> Trainer:
        diffusion = DiscreteDiffusion(build_network({"name": network}).to(device), loss_type=loss)
        return Trainer(diffusion, endless(loader), **kwargs)

    trainers = {
        "UNet": trainer("unet", "cross_entropy", loader),
        "UNet, variational": trainer("unet", "variational", loader),
        "PlainUNet": trainer("plain", "cross_entropy", usual, usual=True),
    }
    compiling = 0.0
    if args.compile:
        trainers["UNet, compiled"] = trainer("unet", "cross_entropy", loader, compiled=True)
        compiling = trainers["UNet, compiled"].step()
    steps: dict[str, list[float]] = {name: [] for name in trainers}
    peak = []
    for round in range(args.rounds + 1):
        for name, one in trainers.items():
            turns = [one.step() for _ in range(1 if name == "PlainUNet" else 4)]
            if round == 0:  # warms up
                one.seconds = {part: [] for part in PARTS}
            else:
                steps[name] += turns
        peak.append(matrix_product_gflops(device))
    result = {"matrix_product_gflops": statistics.median(peak[1:]), "seconds_to_compile": compiling}
    for name, one in trainers.items():
        seconds, forward = statistics.median(steps[name]), mflop(one.network)
        parts = {part: statistics.median(one.seconds[part]) for part in PARTS}
        result[name] = {
            "weights": sum(p.numel() for p in one.network.parameters()),
            "mflop_per_image": forward,
            "images_per_second": args.batch_size / seconds,
            "gflops": 3 * forward * args.batch_size / seconds / 1e3,  # backward counted as two forward passes
            "shares": {part: s / sum(parts.values()) for part, s in parts.items()},
        }
    if device.type == "cpu":
        result["profile"] = profile(trainers["UNet"])
    return result


def profile(trainer: Trainer, steps: int = 3, kinds: int = 8) -> dict[str, float]:
    """The operations that take the largest shares of a training step's time on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trainer.step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    top = sorted(times, key=times.get, reverse=True)[:kinds]
    return {name: times[name] / sum(times.values()) for name in top}


def drawing(args: argparse.Namespace, device: torch.device) -> dict:
    """Images per second, from a few steps of each chain: every step costs the same."""
    few = 5
    contestants = [("UNet", B) for B in (1, 16, 64, 256)] + [("PlainUNet", 64)]
    chains = {
        name: DiscreteDiffusion(build_network({"name": short}).to(device)).eval().respaced(few)
        for name, short in (("UNet", "unet"), ("PlainUNet", "plain"))
    }
    rates = {contestant: [] for contestant in contestants}
    for round in range(args.rounds + 1):
        for name, B in contestants:
            start = now(device)
            chains[name].sample(B, batch_size=B)
            if round:
                rates[name, B].append(B * few / (now(device) - start))
    medians = {contestant: statistics.median(r) for contestant, r in rates.items()}
    start = now(device)
    DiscreteDiffusion(chains["UNet"].model).eval().respaced(args.few).sample(1000)
    seconds = now(device) - start
    return {
        "network_passes_per_second": {f"{name}, batch {B}": rate for (name, B), rate in medians.items()},
        "thousand_images": {
            "steps": args.few,
            "seconds": seconds,
            "PlainUNet_200_steps_seconds_extrapolated": 1000 * 200 / medians["PlainUNet", 64],
        },
    }


PICTURE = """
import sys, time
clock = [time.perf_counter()]
import sample
from PIL import Image
clock.append(time.perf_counter())
diffusion = sample.load_checkpoint(sys.argv[1], sample.pick_device(sys.argv[2]))
clock.append(time.perf_counter())
images = diffusion.sample(16)
clock.append(time.perf_counter())
with sample.atomic_write(sys.argv[3]) as file:
    sample.image_grid(images).save(file, format="png")
clock.append(time.perf_counter())
print(*(b - a for a, b in zip(clock, clock[1:])))
"""

# VmHWM where there is one: on Linux, a young process has its parent's peak in ru_maxrss.
MEMORY = """
import resource, runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
try:
    peak = next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM"))
except (OSError, StopIteration):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(peak)
"""


def commands(args: argparse.Namespace, device: torch.device) -> dict:
    """The command sample.py as its user sees it: seconds from command to picture, and peak memory against n."""
    code = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, picture = Path(folder) / "untrained.pth", Path(folder) / "picture.png"
        diffusion = DiscreteDiffusion(build_network({"name": "unet"}))
        state = {"network": diffusion.model.config, "diffusion": diffusion.config}
        save_checkpoint(checkpoint, state | {"averaged_weights": diffusion.model.state_dict()})

        def run(*arguments) -> tuple[float, str]:
            """Seconds and last line of output of a Python process."""
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *map(str, arguments)], cwd=code, text=True, capture_output=True)
            if done.returncode:
                last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                raise RuntimeError(f"a process that was to be timed failed: {last}")
            return time.perf_counter() - start, done.stdout.splitlines()[-1]

        sample = ("sample.py", checkpoint, "--out", picture, "--device", device)
        totals, parts = [], []
        for _ in range(args.rounds):
            totals.append(run(*sample, "--n", 16, "--timesteps", 200)[0])
            parts.append([float(s) for s in run("-c", PICTURE, checkpoint, device, picture)[1].split()])
        names = ("imports", "loading", "sampling", "writing")
        split = {name: statistics.median(p) for name, p in zip(names, zip(*parts, strict=True), strict=True)}
        memory = {
            str(n): float(run("-c", MEMORY, *sample, "--n", n, "--timesteps", 1)[1]) for n in (100, 1_000, 10_000)
        }
    return {"seconds_to_16_digits": statistics.median(totals), "of_it": split, "peak_memory_mb": memory}


# ---------------------------------------------------------------------------------------------------------------------


def show(result: dict) -> None:
    train, draw, command = result["training"], result["drawing"], result["commands"]
    peak = train["matrix_product_gflops"]
    print(f"torch {result['torch']}, {result['device']}, {result['threads']} threads; a 2048^3 float32 matrix product: "
          f"{peak:.0f} GFLOP/s; medians\n\n"
          f"Training, batch {result['arguments']['batch_size']} (GFLOP/s: the network's operations over the time of "
          "the whole step, and as a share of the matrix product's)\n"
          f"{'':18}{'weights':>10}{'MFLOP/img':>10}{'img/s':>7}{'GFLOP/s':>8}{'share':>6} |"
          + "".join(f"{part:>10}" for part in PARTS))  # fmt: skip
    for name, row in train.items():
        if isinstance(row, dict) and "shares" in row:
            print(f"{name:18}{row['weights']:10,}{row['mflop_per_image']:10.1f}{row['images_per_second']:7.0f}"
                  f"{row['gflops']:8.1f}{row['gflops'] / peak:6.0%} |"
                  + "".join(f"{row['shares'][part]:10.1%}" for part in PARTS))  # fmt: skip
    rate = {name: train[name]["images_per_second"] for name in ("UNet", "PlainUNet")}
    print(f"UNet / PlainUNet: {rate['UNet'] / rate['PlainUNet']:.1f} (PlainUNet's images come from a DataLoader with "
          f"{WORKERS} workers and per-image transforms)")  # fmt: skip
    if train["seconds_to_compile"]:
        faster = train["UNet, compiled"]["images_per_second"] / rate["UNet"]
        print(f"compiled / eager: {faster:.2f}, for {train['seconds_to_compile']:.0f} s of compiling")
    if "profile" in train:
        print("Where a step's time goes: " + ", ".join(f"{name} {s:.0%}" for name, s in train["profile"].items()))

    print("\nDrawing, images per second (extrapolated from five steps)\n" + f"{'':22}{'passes/s':>10}"
          + "".join(f"{f'{n} steps':>11}" for n in (10, 20, 50, 200)))  # fmt: skip
    for name, rate in draw["network_passes_per_second"].items():
        print(f"{name:22}{rate:10.1f}" + "".join(f"{rate / n:11.2f}" for n in (10, 20, 50, 200)))
    thousand = draw["thousand_images"]
    plain = thousand["PlainUNet_200_steps_seconds_extrapolated"]
    print(f"1,000 images: UNet in {thousand['steps']} steps {thousand['seconds']:.1f} s (once); PlainUNet in 200 steps "
          f"{plain:.0f} s (extrapolated), {plain / thousand['seconds']:.0f} times as long")  # fmt: skip

    print(f"\npython sample.py CHECKPOINT --n 16 --timesteps 200: {command['seconds_to_16_digits']:.1f} s, of it "
          + ", ".join(f"{name} {s:.2f}" for name, s in command["of_it"].items())
          + "\npeak memory of sample.py: "
          + ", ".join(f"{mb:.0f} MB for n = {int(n):,}" for n, mb in command["peak_memory_mb"].items()))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="how often each takes its turn (default 3)")
    add("--batch-size", type=int, default=128, help="images per training step (default 128)")
    add("--few", type=int, default=15, help="steps in which 1,000 images are drawn (default 15)")
    add("--no-compile", dest="compile", action="store_false", help="leave the compiled network out")
    add("--data", choices=["auto", "mnist", "offline"], default="auto", help="as for train.py (default auto)")
    add("--data-root", default="data", help="where MNIST is or goes (default data)")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")
    args = parser.parse_args()
    if args.rounds < 1 or args.batch_size < 1 or not 1 <= args.few <= 200:
        parser.error("--rounds and --batch-size must be at least 1, --few in 1..200")
    device = pick_device(args.device)
    result = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads()}
    result["arguments"] = vars(args)
    for part in (commands, training, drawing):
        start = time.perf_counter()
        result[part.__name__] = part(args, device)
        print(f"{part.__name__}: measured in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    write_json(OUT, result)
    show(result)
    print(f"Wrote {OUT}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmark.py: error: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
