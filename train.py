"""Train a D3PM on binarized MNIST, or on your own pictures.

    python train.py                                  # 50 epochs, into results_d3pm/
    python train.py --data offline --epochs 5        # a first look in a minute or two
    python train.py --data FOLDER --conditional      # your pictures; sub-folders are the classes
    python train.py --resume --epochs 80             # go on after Ctrl-C, or for longer
    python train.py --lr 2e-3 --steps 4000           # good digits soon on full MNIST
    python train.py --recipe bound --amp --compile --steps 12400    # the same time, 4 nats better
    python train.py --init other.pth --out-dir new   # a new run from another one's weights
    torchrun --nproc_per_node=2 train.py             # two processes share each batch

Writes into --out-dir: checkpoints/last.pth every epoch and every 10 minutes;
checkpoints/model_epoch_N.pth and samples/sample_epoch_N.png every 5 epochs and at the end;
checkpoints/constant.pth when the late decay begins, for --resume to a longer run;
checkpoints/weights.pth at the end, all that sampling needs; metrics.csv and loss_curve.png.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cli
from cli import UserError, user_errors

import torch
from tqdm import tqdm

from checkpoint import (
    TIMESTEPS,
    RunFolder,
    build_diffusion,
    default_last_step,
    read_checkpoint,
    sampling_state,
    save_checkpoint,
    write_csv,
)
from dataset import DIGITS, NAMES, Dataset, batches, load_dataset, spread, take, to_levels
from diffusion import LOSSES, DiscreteDiffusion
from model import build_network
from options import AUGMENT, FEW_PICTURES, LONG, MANY, merge_settings, parse_arguments
from pictures import image_grid, plot_history, save_figure, style_of, write_report
from trainer import Processes, Trainer, decay_start, learning_rate
from trajectories import respaced
from transitions import FAMILIES

NETWORK_OPTIONS = ("channels", "blocks", "output", "dropout")  # default: the network's own
LIKE_MNIST = Dataset(torch.zeros(1, 1, 32, 32), torch.zeros(1), "mnist")
EVERY = 5  # epochs between kept checkpoints and their samples
FEW = 1_000  # steps
SAVE_SECONDS = 600  # between saves
REPORT_SECONDS = 60  # between lines in a log without a progress bar
CHECK_STEPS = 20  # between checks of the loss: each is a device sync

# --------------------------------------------------------------------------------------------------
# Building a run


def find_checkpoint(args: argparse.Namespace, folder: RunFolder) -> dict | None:
    """The checkpoint to go on from, or None for a new run. Raises UserError."""
    source = folder.newest() if args.resume is True else args.resume
    own = source and source.resolve() in map(Path.resolve, folder.checkpoints.glob("*"))
    if folder.holds_a_run() and not own and not args.overwrite:
        choices = "--resume to go on, --out-dir for another place, or --overwrite to delete it"
        raise UserError(f"{folder.path} holds another run: use {choices}")
    if source is None:
        return None
    checkpoint = read_checkpoint(source)
    needed = {"weights", "optimizer", "settings", "step", "loss_sum", "history", "data"}
    if not needed <= checkpoint.keys():
        raise UserError(f"--resume: {source} is not a run that can go on (weights only, perhaps)")
    planned, constant = checkpoint.get("total_steps", 0), source.with_name("constant.pth")
    total = args.steps or (args.epochs or 0) * checkpoint.get("steps_per_epoch", 0)
    if total > planned and checkpoint["step"] > decay_start(planned) and constant.exists():
        earlier, rows = read_checkpoint(constant), checkpoint["history"]
        if earlier["history"] == rows[: len(earlier["history"])]:  # it is of the same run
            source, checkpoint = constant, earlier
            checkpoint["history"] = [row for row in rows if row["step"] <= earlier["step"]]
    print(f"Resuming {source} at step {checkpoint['step']}")
    return checkpoint


def build(settings: dict, init: Path | None, data: Dataset) -> DiscreteDiffusion:
    """The diffusion around a new network for `data`, or one with the weights of `init`.

    Where a setting is None, it becomes the default of the network or the transition. Raises
    ValueError.
    """
    K, transition = data.num_levels(settings["levels"]), settings["transition"]
    states = K + FAMILIES[transition].extra_states
    config = {"name": settings["network"], "num_levels": K, "num_states": states}
    config |= {name: v for name in NETWORK_OPTIONS if (v := settings[name]) is not None}
    config |= {"num_labels": len(data.classes)} if settings["conditional"] else {}
    config |= {"ordinal": True} if K > 2 and not data.palette else {}
    config |= {"augmented": True} if settings["augment"] else {}
    torch.manual_seed(settings["seed"])
    network = build_network(config)
    names = ("timesteps", "transition", "schedule", "hybrid_weight", "reverse")
    options = {name: settings[name] for name in names} | {"image_shape": data.images.shape[1:]}
    diffusion = DiscreteDiffusion(network, K, loss_type=settings["loss"] or LOSSES[0], **options)
    settings["schedule"] = diffusion.config["schedule"]
    settings |= {name: network.config.get(name) for name in NETWORK_OPTIONS}
    if init:
        source = build_diffusion(read_checkpoint(init), init).model
        names = [name for name in network.config if name not in ("dropout", "augmented")]
        differing = [n for n in names if network.config[n] != source.config.get(n)]
        if differing == ["num_labels"] and not source.num_labels:
            torch.nn.init.zeros_(network.embed_y.weight)  # classes make no difference at first
        elif differing:
            what = ", ".join(differing)
            raise UserError(f"--init: {init} is another network, by its {what}: {source.config}")
        network.load_state_dict(source.state_dict(), strict=False)
    return diffusion


def load_data(
    settings: dict, checkpoint: dict | None, processes: Processes
) -> tuple[Dataset, torch.Tensor]:
    """Training images, and validation images as levels. Fills in `settings`. Raises UserError."""
    if processes.local_rank > 0:  # one process of each machine downloads, the others wait
        processes.mean(0)
    options = settings["data_root"], settings["size"], settings["levels"] == "palette"
    data = load_dataset("train", settings["data"], *options)
    if processes.local_rank == 0:
        processes.mean(0)
    if processes.mean(data.source == "mnist")[0] not in (0, 1):
        raise UserError("some machines have MNIST and some only the offline digits: use --data")
    trained_on = checkpoint["dataset"] if checkpoint else data.description
    for key in (key for key, value in data.description.items() if value != trained_on[key]):
        these = f"these images ({data.source}) differ in {key} from those"
        raise UserError(f"{these} that the run was trained on ({trained_on['source']})")
    if settings["data"] not in NAMES:
        settings["data"] = data.source  # the full path, for --resume from elsewhere
    few, K = len(data.images) < MANY, data.num_levels(settings["levels"])
    loss, lr = FEW_PICTURES if few and K == 2 else ("cross_entropy", 2e-3 if few else 1e-4)
    lr = lr if settings["optimizer"] == "muon" else min(lr, 2e-3)
    settings |= {"loss": settings["loss"] or loss, "lr": settings["lr"] or lr}
    if settings["conditional"] and len(data.classes) < 2:
        needed = f"two sub-folders, which are the classes; {data.source} has {len(data.classes)}"
        raise UserError(f"--conditional needs at least {needed}")
    limit = 200 if K > 32 else None  # one image of 256 levels takes 0.1 seconds
    grey = spread(load_dataset("validation", data.source, *options).images, limit)
    generator = torch.Generator().manual_seed(0)  # whatever --seed, so that bounds compare
    validation = to_levels(grey, K, settings["binarize"], generator)
    data = take(data, settings["limit"])
    next(batches(data, settings["batch_size"]))  # fails now if the batch is too large
    per_epoch = len(data.images) // settings["batch_size"]
    if checkpoint and checkpoint.get("steps_per_epoch", per_epoch) != per_epoch:
        raise UserError(f"{data.source} has other pictures than when the run began: see --init")
    settings["steps"] = settings["steps"] or settings["epochs"] * per_epoch
    if settings["augment"] is None:
        long = settings["steps"] >= LONG * per_epoch
        fits = few and K == 2 and settings["network"] == "unet"  # another may take no maps
        settings["augment"] = AUGMENT if long and fits else 0.0
    return data, validation


# --------------------------------------------------------------------------------------------------
# The run


class Run:
    """The loop over epochs, with validation, checkpoints and reports."""

    def __init__(self, trainer: Trainer, data: Dataset, validation: torch.Tensor, settings: dict):
        self.trainer, self.data, self.validation = trainer, data, validation
        self.settings, self.folder = settings, RunFolder(settings["out_dir"])
        self.steps_per_epoch = len(data.images) // settings["batch_size"]
        self.losses: list[torch.Tensor] = []  # since the last check
        self.history: list[dict] = []  # the rows of metrics.csv
        self.loss_sum = 0.0  # of the epoch
        self.started = time.perf_counter()  # less the seconds that a resumed row has taken already
        self.saved = self.reported = time.monotonic()

    def load_state_dict(self, checkpoint: dict) -> None:
        """Go on from a checkpoint. Raises ValueError if its weights don't fit."""
        self.trainer.load_state_dict(checkpoint)
        self.loss_sum, self.history = checkpoint["loss_sum"], checkpoint["history"]
        if not self.history or self.history[-1]["step"] < self.trainer.steps:
            self.started -= checkpoint.get("seconds", 0.0)

    def train(self, stop_requested: Callable[[], bool]) -> bool:
        """Train to the last step, or until `stop_requested()`. Returns whether steps are left."""
        trainer, s, size, stop = self.trainer, self.settings, self.settings["batch_size"], False
        K, how = trainer.averaged.num_levels, (s["binarize"], s["augment"])
        while trainer.steps < trainer.total_steps and not stop:
            epoch, done = divmod(trainer.steps, self.steps_per_epoch)
            self.loss_sum = self.loss_sum if done else 0.0
            data = batches(self.data, size, s["seed"], epoch, done, K, *how)
            bar = {"total": self.steps_per_epoch, "initial": done, "unit": "img", "leave": False}
            bar["disable"] = True if trainer.processes.rank else None  # None: only on a terminal
            for batch in tqdm(data, desc=f"epoch {epoch + 1}", unit_scale=size, **bar):
                self.losses.append(trainer.step(*batch))
                stop = stop_requested()
                self.check(stop)
                if stop or trainer.steps == trainer.total_steps:
                    break
            row_is_due = trainer.steps % (self.steps_per_epoch * s["validate_every"]) == 0
            if row_is_due or trainer.steps == trainer.total_steps:
                self.end_epoch()
        return trainer.steps < trainer.total_steps

    def epoch(self) -> tuple[int, float]:
        """The epoch of the last step, from 1, and its mean loss."""
        epoch = -(-self.trainer.steps // self.steps_per_epoch)
        return epoch, self.loss_sum / (self.trainer.steps - (epoch - 1) * self.steps_per_epoch)

    def check(self, stop: bool) -> None:
        """Every CHECK_STEPS steps, or now if it matters: check the losses, save, show progress."""
        trainer, total = self.trainer, self.trainer.total_steps
        decays = trainer.decay == "late" and trainer.steps == decay_start(total)
        ends = trainer.steps == total or trainer.steps % self.steps_per_epoch == 0
        if not (stop or decays or ends or len(self.losses) == CHECK_STEPS):
            return
        (loss,) = trainer.processes.mean(sum(torch.stack(self.losses).tolist()))
        self.losses.clear()
        if not math.isfinite(loss):
            advice = "try a smaller --lr (checkpoints are intact)"
            raise UserError(f"the loss is not finite before step {trainer.steps}: {advice}")
        self.loss_sum += loss
        now = time.monotonic()
        if decays:
            self.save("constant.pth")
        if stop or now - self.saved > SAVE_SECONDS:
            self.save("last.pth")
        if now - self.reported > REPORT_SECONDS and not sys.stderr.isatty():
            self.reported = now
            epoch, mean = self.epoch()
            where = f"epoch {epoch}, step {trainer.steps} of {total}"
            print(f"{where}, train loss {mean:.4f} nats/pixel")

    def end_epoch(self) -> None:
        """Validate, save, then report: numbers before pictures."""
        trainer, (epoch, loss) = self.trainer, self.epoch()
        seconds = time.perf_counter() - self.started
        # A shorter run may have ended within this epoch. Its row is written anew.
        rows = [row for row in self.history if row["epoch"] < epoch]
        seconds += sum(row["seconds"] for row in self.history[len(rows) :])
        before = rows[-1] if rows else {"epoch": 0, "step": 0}
        if trainer.processes.rank == 0:
            row = {"epoch": epoch, "step": trainer.steps, "train_loss": loss}
            row["validation_bound"] = trainer.validate(self.validation)
            row["lr"] = float(trainer.optimizer.param_groups[0]["lr"])
            images = (trainer.steps - before["step"]) * self.settings["batch_size"]
            row |= {"images_per_second": images / seconds, "seconds": seconds}
            self.history = [*rows, row]
            ends = trainer.steps == trainer.total_steps
            keep = ends or epoch // EVERY > before["epoch"] // EVERY
            for name in [f"model_epoch_{epoch}.pth"] * keep + ["last.pth"] + ["weights.pth"] * ends:
                self.save(name)
            self.report(row, keep)
        self.started = time.perf_counter()

    def report(self, row: dict, with_pictures: bool) -> None:
        """Print the row and write metrics.csv, the loss curve and samples."""
        epochs = -(-self.trainer.total_steps // self.steps_per_epoch)
        print(
            f"epoch {row['epoch']:3d}/{epochs}  train loss {row['train_loss']:.4f} nats/pixel  "
            f"validation bound {row['validation_bound']:7.2f} nats/image  "
            f"{row['images_per_second']:.0f} img/s"
        )
        write_report(self.folder.path / "metrics.csv", lambda file: write_csv(self.history, file))
        if with_pictures:
            averaged = self.trainer.averaged
            model = respaced(averaged, min(TIMESTEPS, averaged.timesteps))
            options = {"y": model.labels(64), "last_step": default_last_step(model)}
            images = model.sample(64, self.settings["seed"], **options)
            known = {"diffusion": averaged.config, "dataset": self.data.description}
            options = {"columns": 8} | style_of(known)
            path = self.folder.path / "samples" / f"sample_epoch_{row['epoch']}.png"
            write_report(path, lambda file: image_grid(images, **options).save(file, format="png"))
            path = self.folder.path / "loss_curve.png"
            write_report(path, lambda file: save_figure(plot_history(self.history), file))

    def save(self, name: str) -> None:
        """Write a checkpoint; weights.pth holds what sampling needs."""
        trainer, settings = self.trainer, self.settings
        if trainer.processes.rank:
            return
        state = sampling_state(trainer.averaged, self.data, settings["binarize"], trainer.steps)
        if name != "weights.pth":
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
            state |= trainer.state_dict() | {"settings": plain}
            state |= {"steps_per_epoch": self.steps_per_epoch, "total_steps": trainer.total_steps}
            state |= {"loss_sum": self.loss_sum, "history": self.history}
            state["seconds"] = time.perf_counter() - self.started
        save_checkpoint(self.folder.checkpoints / name, state)
        self.saved = time.monotonic()

    def say_if_overfit(self) -> None:
        """Where an earlier validation bound was better: when, by how much, what was kept."""
        best = min(self.history[::-1], key=lambda row: row["validation_bound"], default=None)
        if best and best is not self.history[-1]:
            worse = self.history[-1]["validation_bound"] - best["validation_bound"]
            kept = sorted(self.folder.checkpoints.glob("model_epoch_*.pth"))
            kept = [path for path in kept if path.stem[12:].isdecimal()]
            nearest = min(kept, key=lambda path: abs(int(path.stem[12:]) - best["epoch"]))
            print(
                f"It overfits: the validation bound was best after epoch {best['epoch']} and is "
                f"now {worse:.2f} nats worse; the nearest checkpoint is {nearest}"
            )


def main() -> int:
    args, free, fixed = parse_arguments(__doc__)
    with user_errors():
        processes = Processes.from_environment()
    folder = RunFolder(args.out_dir or free["out_dir"])
    # The first process writes and prints for all.
    first = processes.rank == 0
    with folder.owned() if first else contextlib.redirect_stdout(None):
        checkpoint = find_checkpoint(args, folder)
        settings = merge_settings(args, free, fixed, checkpoint)
        run = make_run(settings, args.init, checkpoint, processes)
        processes.mean(0)  # all have read the folder
        if first:
            folder.clear() if args.overwrite else folder.tidy()
        return train(run)


def make_run(
    settings: dict, init: Path | None, checkpoint: dict | None, processes: Processes
) -> Run:
    """Build everything, and go on from the checkpoint if there is one. Raises UserError."""
    with user_errors():
        processes.share(settings["batch_size"])
        if settings["data"] in NAMES and settings["levels"] != "palette":
            build(dict(settings), init, LIKE_MNIST)  # so that bad flags fail before a download
    device = processes.start(cli.pick_device(settings["device"]))
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    data, validation = load_data(settings, checkpoint, processes)
    step, total = checkpoint["step"] if checkpoint else 0, settings["steps"]
    if step >= total:
        advice = "give more with --epochs or --steps"
        raise UserError(f"the run to resume has all its {total} steps: {advice}")
    names = ("batch_size", "lr", "optimizer", "decay", "weight_decay", "label_dropout", "seed")
    options = {name: settings[name] for name in names}
    options |= {"amp": settings["amp"], "compiled": settings["compile"]}
    with user_errors():
        diffusion = build(settings, init, data)
        trainer = Trainer(diffusion.to(device), total, **options, processes=processes)
        run = Run(trainer, data.to(trainer.source), validation, settings)
        if checkpoint:
            run.load_state_dict(checkpoint)
            planned = checkpoint.get("total_steps", total)
            points = (step - 1, planned), (step, planned), (step, total)
            *old, new = (learning_rate(trainer.lr, *point, trainer.decay) for point in points)
            if new > max(old):
                print(f"The learning rate rises again, to {new:.3g}")
    return run


def train(run: Run) -> int:
    """Train, and print what and where. Returns the exit code."""
    trainer, s = run.trainer, run.settings
    processes, total = trainer.processes, trainer.total_steps
    weights = sum(p.numel() for p in trainer.network.parameters())
    shared = f", {processes.size} processes" if processes.size > 1 else ""
    images, held_out, source = len(run.data.images), len(run.validation), run.data.source
    noun = "digits" if source in DIGITS else "pictures"
    name = f"{source} {noun}" if source in DIGITS else f"{noun} of {source}"
    share = f" ({s['augment']:.0%} of them augmented)" if s["augment"] else ""
    print(
        f"{images:,} {name} for training{share}, {held_out:,} for validation\n"
        f"{weights:,} weights on {trainer.device}{shared}; T = {s['timesteps']}\n"
        f"{total} steps of {s['batch_size']}, {total / run.steps_per_epoch:.3g} epochs; "
        f"{s['optimizer']} with peak learning rate {s['lr']:g}"
    )
    if source not in NAMES and total < FEW:
        print(f"{total} steps are few: samples may be noise (give more with --steps)")
    received = cli.catch_signals()
    try:
        stopped = run.train(lambda: processes.mean(bool(received))[0] > 0)
    except RuntimeError as error:
        if processes.size > 1 and "onnection" in str(error):
            raise ConnectionError("lost the connection to another process") from error
        raise
    if stopped:
        number = received[0] if received else signal.SIGTERM  # perhaps of another process
        if processes.rank == 0:
            where = f"after step {trainer.steps} of {total}, saved in {run.folder.checkpoints}"
            line = f"Stopped by {signal.Signals(number).name} {where}{os.sep}last.pth"
            print(f"{line}; go on with --resume", file=sys.stderr)
        return 128 + number
    command = shlex.join(["python", "sample.py", str(run.folder.checkpoints / "weights.pth")])
    print(f"Done. Draw {noun}: {command}")
    if processes.rank == 0:
        run.say_if_overfit()
    return 0


if __name__ == "__main__":
    cli.run(main)
