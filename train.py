"""Train a D3PM on binarized MNIST.

    python train.py                                  # 50 epochs with the defaults, into results_d3pm/
    python train.py --data offline --epochs 5        # a first look in two minutes, no download
    python train.py --resume                         # go on after Ctrl-C, a crash, or for more: --resume --epochs 80
    python train.py --lr 2e-3 --steps 4000           # good digits soon on full MNIST
    torchrun --nproc_per_node=2 train.py             # the same run, shared by two processes

Writes into --out-dir: checkpoints/model_epoch_N.pth and samples/sample_epoch_N.png every 5 epochs and at the end,
checkpoints/last.pth and metrics.csv every epoch, loss_curve.png.
"""

import argparse
import csv
import io
import math
import os
import shutil
import signal
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dataset import get_dataloader, image_grid, load_digits, restart, stream_seed, to_levels
from diffusion import (
    LOSSES,
    SCHEDULES,
    TRANSITIONS,
    DiscreteDiffusion,
    atomic_write,
    read_checkpoint,
    save_checkpoint,
)
from model import build_network, pick_device

DEFAULTS = {
    "epochs": 50,
    "steps": None,  # in place of epochs
    "batch_size": 128,
    "timesteps": 200,
    "transition": "uniform",
    "schedule": None,  # the transition family's own
    "loss": "cross_entropy",
    "hybrid_weight": 0.01,
    "levels": 2,
    "binarize": "threshold",
    "conditional": False,
    "label_dropout": 0.1,
    "lr": None,  # by the digits in use: see LEARNING_RATE
    "optimizer": "adamw",
    "network": "unet",
    "channels": None,  # the network's own
    "data": "auto",
    "data_root": "data",
    "limit": None,
    "seed": 0,
    "device": "auto",
    "compile": False,
    "amp": False,
    "out_dir": "results_d3pm",
}
LEARNING_RATE = {"mnist": 1e-4, "offline": 2e-3}  # 1,750 steps on the offline digits are too few for 1e-4
FREE_ON_RESUME = {
    "epochs",
    "steps",
    "data",
    "data_root",
    "device",
    "out_dir",
}  # what may differ from the run that goes on
WARMUP_STEPS = 100
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
EVERY = 5  # epochs between kept checkpoints and sample sheets
# Set by torchrun: this process's number among all and among those on this machine.
RANK, LOCAL_RANK, WORLD_SIZE = (
    int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Flags default to None so that --resume can tell what was asked for from what was not.
    add = parser.add_argument
    add("--epochs", type=int, help="passes over the training digits (default 50)")
    add("--steps", type=int, metavar="N", help="optimizer steps in all, in place of --epochs")
    add("--batch-size", type=int, help="images per step (default 128)")
    add("--timesteps", type=int, help="T, the length of the chain (default 200)")
    add("--transition", choices=TRANSITIONS, help="how noise acts: uniform (default) draws a level anew, absorbing "
        "masks, gaussian prefers near levels (--levels 3 or more)")  # fmt: skip
    add("--schedule", choices=SCHEDULES, help="noise schedule (default: cosine for uniform, mutual_info for absorbing, "
        "linear for gaussian; linear does not reach noise for uniform)")  # fmt: skip
    add("--loss", choices=LOSSES, help="objective (default cross_entropy)")
    add("--hybrid-weight", type=float, metavar="W", help="of the cross-entropy in the hybrid loss (default 0.01)")
    add("--levels", type=int, metavar="K", help="grey levels (default 2)")
    add("--binarize", choices=["threshold", "dynamic"], help="threshold (default), or dynamic: every epoch draws each "
        "pixel from Bernoulli(grey level) anew")  # fmt: skip
    add("--conditional", action="store_true", default=None, help="tell the network the digit's class, for most "
        "images: the model then draws with and without a class")  # fmt: skip
    add("--label-dropout", type=float, metavar="P", help="share of images whose class --conditional hides "
        "(default 0.1)")  # fmt: skip
    add("--optimizer", choices=["adamw", "muon"], help="adamw (default), or muon: worth twice the steps")
    add("--lr", type=float, help="peak learning rate (default 1e-4 on MNIST, 2e-3 on the offline digits); "
        f"{WARMUP_STEPS} warm-up steps (a tenth of shorter runs), then cosine decay to 0 at the last step")  # fmt: skip
    add("--network", choices=["unet", "plain"], help="unet (default), or plain: the common baseline, 10 times slower")
    add("--channels", type=int, nargs=3, metavar="C", help="widths of the unet, multiples of 8")
    add("--data", choices=["auto", "mnist", "offline"], help="auto (default): MNIST from --data-root or a download, "
        "else 5,000 offline digits; mnist: no fallback; offline: the 5,000 at once")  # fmt: skip
    add("--data-root", help="where MNIST is or goes (default data)")
    add("--limit", type=int, metavar="N", help="train on N digits only")
    add("--seed", type=int, help="of weights, batches and noise (default 0)")
    add("--device", help="cpu, cuda, mps, ... (default auto: the best there is)")
    add("--compile", action="store_true", default=None, help="compile the network first: takes a minute or more, so it "
        "pays in long runs")  # fmt: skip
    add("--amp", action="store_true", default=None, help="run the network in bfloat16: pays where the hardware has it "
        "(recent GPUs; few CPUs)")  # fmt: skip
    add("--out-dir", help="where everything is written (default results_d3pm)")
    add("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help="go on from the newest checkpoint in "
        "--out-dir, or from this one. With more --epochs the learning rate goes on as in a run of that length: after "
        "a finished run it jumps back up")  # fmt: skip
    add("--overwrite", action="store_true", help="delete the run that is in --out-dir and start anew")
    args = parser.parse_args()
    if args.epochs and args.steps:
        parser.error("--epochs and --steps exclude each other")
    for name in ("epochs", "steps", "batch_size", "timesteps", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error("--lr must be a positive number")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        parser.error("--seed must be in 0..2^32-1")
    if args.hybrid_weight is not None and not 0 <= args.hybrid_weight < math.inf:
        parser.error("--hybrid-weight must be at least 0")
    if args.label_dropout is not None and not 0 <= args.label_dropout <= 1:
        parser.error("--label-dropout must be in 0..1")
    if args.label_dropout is not None and not (args.conditional or args.resume):
        parser.error("--label-dropout goes with --conditional")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def find_run(args: argparse.Namespace) -> dict | None:
    """The checkpoint to go on from, or None for a fresh run. Raises ValueError if the directory is not as expected."""
    out_dir = Path(args.out_dir or DEFAULTS["out_dir"])
    folder = out_dir / "checkpoints"
    checkpoints = sorted(folder.glob("*.pth"), key=lambda path: (path.name == "last.pth", path.stat().st_mtime))
    path = Path(args.resume or "newest")
    if args.resume == "newest":
        if not checkpoints:
            raise ValueError(f"--resume: there is no checkpoint in {folder}")
        path = checkpoints[-1]
    own = args.resume and path.resolve().parent == folder.resolve()
    if (checkpoints or (out_dir / "metrics.csv").exists()) and not own and not args.overwrite:
        raise ValueError(
            f"{out_dir} holds another run: use --resume to go on, --out-dir for another place, "
            "or --overwrite to delete it"
        )
    if not args.resume:
        return None
    checkpoint = read_checkpoint(path)
    if not {"weights", "optimizer", "settings", "step", "loss_sum", "history", "data"} <= checkpoint.keys():
        raise ValueError(f"--resume: {path} is not a run that can go on (weights only, perhaps)")
    print(f"Resuming {path}")
    return checkpoint


def merge_settings(args: argparse.Namespace, checkpoint: dict | None) -> dict:
    """What this run uses: flags first, then the resumed run's settings, then the defaults."""
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    saved = DEFAULTS | checkpoint["settings"] if checkpoint else {}  # an older run may lack the newest
    for name in given.keys() & saved.keys() - FREE_ON_RESUME:
        if given[name] != saved[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {given[name]} disagrees with the run to resume: {saved[name]}"
            )
    fresh = {"out_dir": DEFAULTS["out_dir"]} if checkpoint else {}
    if "epochs" in given:
        fresh["steps"] = None
    return DEFAULTS | saved | fresh | given


def build_model(settings: dict) -> torch.nn.Module:
    """The network that the settings ask for, freshly initialised. Raises ValueError if they don't go together."""
    mask = settings["transition"] == "absorbing"  # a state more than there are levels
    config = {"name": settings["network"], "num_levels": settings["levels"], "num_states": settings["levels"] + mask}
    for flag, key, value in (
        ("--channels", "channels", settings["channels"]),
        ("--conditional", "num_labels", 10 if settings["conditional"] else None),
    ):
        if value and settings["network"] != "unet":
            raise ValueError(f"{flag} is for --network unet")
        if value:
            config[key] = value
    return build_network(config)


def build_diffusion(model: torch.nn.Module, settings: dict) -> DiscreteDiffusion:
    return DiscreteDiffusion(
        model,
        settings["levels"],
        settings["timesteps"],
        settings["transition"],
        settings["schedule"],
        settings["loss"],
        settings["hybrid_weight"],
    )


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices inside the UNet step along their orthogonalised momentum (Jordan et al. 2024).

    torch.optim.Muon takes no convolutions, and computes in bfloat16, which most CPUs only emulate. The update is scaled
    to AdamW's typical size, so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    MOMENTUM = 0.95
    EDGES = ("embed_t", "embed_y", "fold", "unfold", "own_state")  # these, norms and biases are left to AdamW

    def __init__(self, network: torch.nn.Module, *args, **kwargs):
        super().__init__(network.parameters(), *args, **kwargs)
        named = network.named_parameters()
        self.matrices = [p for name, p in named if p.ndim > 1 and name.split(".")[0] not in self.EDGES]

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in self.matrices:
            if p not in self.state:  # AdamW wants a step in every state that it loads
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - self.MOMENTUM)
            update = orthogonalized(p.grad.lerp(momentum, self.MOMENTUM).flatten(1))  # with Nesterov's look ahead
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))
            p.grad = None  # AdamW passes over it
        super().step()


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the matrix U S V^T, roughly: its singular values come out between 0.7 and 1.2 (Newton-Schulz)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrix else x.T


class Autocast(torch.nn.Module):
    """A network that computes in bfloat16 where that is safe. Its logits come out in float32: the probabilities that
    are made of them need all the digits."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, *args) -> torch.Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16):
            return self.network(x_t, *args).float()


def mean_over_processes(*values: float) -> list[float]:
    """The mean of each value over all processes, which wait here for each other."""
    if WORLD_SIZE == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return (sums / WORLD_SIZE).tolist()


def average(averaged: list[torch.Tensor], current: list[torch.Tensor], n: torch.Tensor) -> None:
    """Exponential moving average over about the last ninth of the steps so far, at most 1,000 of them."""
    decay = min(0.999, (1 + int(n)) / (10 + int(n)))
    for a, c in zip(averaged, current, strict=True):
        a.lerp_(c, 1 - decay) if a.is_floating_point() else a.copy_(c)


def learning_rate(peak: float, step: int, total: int) -> float:
    warmup = max(1, min(WARMUP_STEPS, total // 10))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def validation_bound(diffusion: DiscreteDiffusion, x_0: torch.Tensor, device: torch.device) -> float:
    """Estimate of the bound in nats per image, one t a digit; the same t and noise each time, to compare epochs."""
    generator = torch.Generator().manual_seed(0)
    bounds = [diffusion.variational_bound(batch.to(device), 1, generator) for batch in x_0.split(250)]
    return torch.cat(bounds).mean().item()


def write_metrics(history: list[dict], out_dir: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in history)
    with atomic_write(out_dir / "metrics.csv") as file:
        file.write(text.getvalue().encode())


def plot_history(history: list[dict], out_dir: Path) -> None:
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in history], marker=".")
    left.set(xlabel="epoch", ylabel="training loss, nats per pixel", yscale="log")
    right.plot(epochs, [row["validation_bound"] for row in history], marker=".", color="tab:orange")
    right.set(xlabel="epoch", ylabel="validation bound, nats per image", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    with atomic_write(out_dir / "loss_curve.png") as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> int:
    args = parse_arguments()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if RANK > 0:  # the first process speaks and writes for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    checkpoint = find_run(args)
    settings = merge_settings(args, checkpoint)
    device = pick_device(settings["device"])
    out_dir = Path(settings["out_dir"])
    seed, batch_size = settings["seed"], settings["batch_size"]
    if batch_size % WORLD_SIZE:
        raise ValueError(f"the batch of {batch_size} can't be shared equally by {WORLD_SIZE} processes")
    shard = slice(RANK * batch_size // WORLD_SIZE, (RANK + 1) * batch_size // WORLD_SIZE)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    # Data: the first process on a machine fetches what is missing, the others find it.
    if LOCAL_RANK > 0:
        mean_over_processes(0)
    loader = get_dataloader(
        batch_size,
        settings["data_root"],
        settings["data"],
        limit=settings["limit"],
        num_levels=settings["levels"],
        binarize=settings["binarize"],
    )
    if LOCAL_RANK == 0:
        mean_over_processes(0)
    source = loader.source
    if mean_over_processes(source == "mnist")[0] not in (0, 1):
        raise ValueError("some machines have MNIST and some only the offline digits: choose with --data")
    if checkpoint and checkpoint["data"] != source:
        raise ValueError(f"the run was trained on {checkpoint['data']} digits, but these are {source} digits")
    grey = load_digits("validation", source, settings["data_root"]).images
    validation = to_levels(grey, settings["levels"], settings["binarize"], torch.Generator().manual_seed(0))
    settings["lr"] = settings["lr"] or LEARNING_RATE[source]

    # Network, diffusion, optimizer, averaged copy
    torch.manual_seed(seed)
    network = build_model(settings).to(device)
    model = Autocast(network) if settings["amp"] else network
    model = torch.compile(model) if settings["compile"] else model
    model = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    diffusion = build_diffusion(model, settings)
    averaged = build_diffusion(AveragedModel(network, multi_avg_fn=average, use_buffers=True), settings)
    averaged.eval()
    if settings["optimizer"] == "muon" and settings["network"] != "unet":
        raise ValueError("--optimizer muon is for --network unet")
    Optimizer, which = (Muon, network) if settings["optimizer"] == "muon" else (torch.optim.AdamW, network.parameters())
    optimizer = Optimizer(which, settings["lr"], betas=BETAS, weight_decay=WEIGHT_DECAY)
    step, loss_sum, history = 0, 0.0, []
    if checkpoint:
        try:
            network.load_state_dict(checkpoint["weights"])
            averaged.model.module.load_state_dict(checkpoint["averaged_weights"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the run to resume does not fit this version of the repository: {reason}") from None
        averaged.model.n_averaged.fill_(checkpoint["step"])
        step, loss_sum, history = checkpoint["step"], checkpoint["loss_sum"], checkpoint["history"]
    settings["schedule"] = diffusion.config.get("schedule")
    settings["channels"] = network.config.get("channels")
    steps_per_epoch = len(loader)
    total = settings["steps"] or settings["epochs"] * steps_per_epoch
    epochs = -(-total // steps_per_epoch)
    if step >= total:
        raise ValueError(f"the run to resume has all its {total} steps: give more with --epochs or --steps")

    mean_over_processes(0)  # nobody looks for a run any more
    if args.overwrite and RANK == 0:
        for folder in ("checkpoints", "samples"):
            if (out_dir / folder).exists():
                shutil.rmtree(out_dir / folder)
        for name in ("metrics.csv", "loss_curve.png", "evaluation.json", "bound_terms.png", "nearest.png"):
            (out_dir / name).unlink(missing_ok=True)
    for leftover in out_dir.glob("checkpoints/.*.pth.*"):  # of a save that was killed
        leftover.unlink(missing_ok=True)  # another process may have been faster
    (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out_dir / "samples").mkdir(exist_ok=True)

    def save(name: str) -> None:
        state = {
            "network": network.config,
            "diffusion": diffusion.config,
            "averaged_weights": averaged.model.module.state_dict(),
            "weights": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "settings": settings,
            "data": source,
            "binarize": settings["binarize"],
            "epoch": step // steps_per_epoch,
            "step": step,
            "loss_sum": loss_sum,
            "history": history,
        }
        save_checkpoint(out_dir / "checkpoints" / name, state)

    weights = sum(p.numel() for p in network.parameters())
    processes = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    print(
        f"{len(loader.dataset):,} {source} digits for training, {len(validation):,} for validation\n"
        f"{settings['network']} with {weights:,} weights on {device}{processes}; T = {settings['timesteps']}\n"
        f"{total} steps of {batch_size}, {total / steps_per_epoch:.3g} epochs; "
        f"{settings['optimizer']} with peak learning rate {settings['lr']:g}"
    )

    # A first Ctrl-C or SIGTERM lets the step end and saves; a second one means it.
    stop = False
    received: list[int] = []

    def on_signal(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    while step < total and not stop:
        first_step = step
        epoch, done = divmod(step, steps_per_epoch)
        restart(loader, seed, epoch)
        start = time.perf_counter()
        bar = tqdm(total=steps_per_epoch * batch_size, initial=done * batch_size, desc=f"epoch {epoch + 1}/{epochs}",
                   unit="img", leave=False, disable=True if RANK > 0 else None)  # fmt: skip
        network.train()
        for x_0, label in islice(loader, done, None):
            # The noise depends on (seed, step) alone: a resumed run draws what the uninterrupted one would have drawn,
            # and processes that share a batch draw what one process would have drawn, and take their part of it.
            generator = torch.Generator().manual_seed(stream_seed(seed, 0, step))
            t = diffusion.draw_t(batch_size, generator)
            u = torch.rand(x_0.shape, generator=generator)
            y = None
            if settings["conditional"]:
                y = label.masked_fill(torch.rand(batch_size, generator=generator) < settings["label_dropout"], -1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings["lr"], step, total)
            loss = diffusion.loss(*(v if v is None else v[shard].to(device) for v in (x_0, t, u, y)))
            mean_loss, stop = mean_over_processes(loss.item(), bool(received))
            if not math.isfinite(mean_loss):
                raise ValueError(f"the loss is {mean_loss} at step {step}: try a smaller --lr (checkpoints are intact)")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            averaged.model.update_parameters(network)
            step += 1
            loss_sum += mean_loss
            bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            bar.update(batch_size)
            if stop or step == total:
                break
        bar.close()
        if step % steps_per_epoch and step < total:
            break

        if RANK > 0:
            continue
        epoch += 1
        seconds = time.perf_counter() - start
        history.append(
            {
                "epoch": epoch,
                "step": step,
                "train_loss": loss_sum / (step - (epoch - 1) * steps_per_epoch),
                "validation_bound": validation_bound(averaged, validation, device),
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": (step - first_step) * batch_size / seconds,
                "seconds": seconds,
            }
        )
        if step % steps_per_epoch == 0:
            loss_sum = 0.0
        row = history[-1]
        print(
            f"epoch {epoch:3d}/{epochs}  train loss {row['train_loss']:.4f} nats/pixel  "
            f"validation bound {row['validation_bound']:7.2f} nats/image  {row['images_per_second']:.0f} img/s",
            flush=True,
        )
        keep = epoch % EVERY == 0 or step == total
        if keep:
            save(f"model_epoch_{epoch}.pth")
        save("last.pth")
        write_metrics(history, out_dir)
        if keep:
            plot_history(history, out_dir)
            y = torch.arange(64) % 10 if settings["conditional"] else None
            with atomic_write(out_dir / "samples" / f"sample_epoch_{epoch}.png") as file:
                image_grid(averaged.sample(64, seed, y=y), settings["levels"], columns=8).save(file, format="png")

    if stop and step < total:
        number = received[0] if received else signal.SIGTERM  # perhaps only another process was told
        if RANK == 0:
            save("last.pth")
            print(f"Stopped by {signal.Signals(number).name} after step {step} of {total}, saved in "
                  f"{out_dir / 'checkpoints' / 'last.pth'}; go on with --resume", file=sys.stderr)  # fmt: skip
        return 128 + number
    print(f"Done. Draw digits: python sample.py {out_dir / 'checkpoints' / f'model_epoch_{epochs}.pth'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, RuntimeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        if WORLD_SIZE > 1:
            line = f"process {RANK}: {line}"
            if isinstance(error, RuntimeError):
                line = line.split(". ")[0] + " (has another ended? The last checkpoint is intact: go on with --resume)"
        sys.exit(f"train.py: error: {line}")
    except KeyboardInterrupt:
        sys.exit(130)
