"""Train a D3PM on binarized MNIST.

    python train.py                                  # 50 epochs with the defaults, into results_d3pm/
    python train.py --data offline --epochs 5        # a first look in two minutes, no download
    python train.py --resume                         # go on after Ctrl-C, a crash, or for more: --resume --epochs 80
    python train.py --lr 2e-3 --steps 4000           # good digits soon on full MNIST
    python train.py --recipe released --amp --compile --steps 12400    # as long as the defaults take, and 4 nats better
    python train.py --init other.pth --out-dir new   # a fresh run that starts from another one's weights
    torchrun --nproc_per_node=2 train.py             # the same run, shared by two processes

Writes into --out-dir: checkpoints/model_epoch_N.pth and samples/sample_epoch_N.png every 5 epochs and at the end,
checkpoints/last.pth every epoch and every 10 minutes, metrics.csv, loss_curve.png; checkpoints/constant.pth when the
learning rate begins to go down, which is where a longer run goes on; at the end checkpoints/weights.pth, all that
drawing needs.
"""

import argparse
import csv
import io
import math
import os
import signal
import sys
import time
from pathlib import Path

from cli import (
    SEED,
    add_data,
    add_device,
    add_speed,
    integer,
    number,
    parser,
    path,
    pick_device,
    run,
)

import torch
from tqdm import tqdm

from checkpoint import (
    LAST_STEP,
    TIMESTEPS,
    RunFolder,
    atomic_write,
    build_diffusion,
    read_checkpoint,
    save_checkpoint,
)
from dataset import Digits, batches, load_digits, take, to_levels
from diffusion import LOSSES, REVERSES, DiscreteDiffusion
from model import OUTPUTS, build_network
from pictures import image_grid, plot_history, save_figure
from trainer import DECAYS, OPTIMIZERS, WARMUP_STEPS, Processes, Trainer, decay_start
from transitions import FAMILIES, SCHEDULES

DEFAULTS = {
    "epochs": 50,
    "steps": None,  # in place of epochs
    "batch_size": 128,
    "timesteps": 200,
    "transition": "uniform",
    "schedule": None,  # the transition family's own
    "loss": "cross_entropy",
    "hybrid_weight": 0.001,
    "reverse": "mixture",
    "levels": 2,
    "binarize": "threshold",
    "conditional": False,
    "label_dropout": 0.1,
    "lr": None,  # by the digits in use: see LEARNING_RATE
    "decay": "late",
    "optimizer": "muon",
    "output": "softmax",
    "channels": None,  # the network's own
    "blocks": 1,
    "dropout": 0.0,
    "data": "auto",
    "data_root": Path("data"),
    "limit": None,
    "seed": 0,
    "device": "auto",
    "compile": False,
    "amp": False,
    "validate_every": 1,
    "out_dir": Path("results_d3pm"),
}
# What d3pm_mnist.pth was trained with, beside its data and classes; but in batches of 512, at twice the rate, and from
# another model's weights
RECIPES = {
    "released": {
        "loss": "variational",
        "optimizer": "muon",
        "lr": 1e-3,
        "timesteps": 1000,
        "channels": [64, 128, 192],
    },
}
LEARNING_RATE = {
    "mnist": 1e-4,
    "offline": 2e-3,
}  # 1,750 steps on the offline digits are too few for 1e-4
# What may differ from the run that goes on
FREE_ON_RESUME = {
    "epochs",
    "steps",
    "data",
    "data_root",
    "device",
    "compile",
    "amp",
    "validate_every",
    "out_dir",
}
EVERY = 5  # epochs, at least, between kept checkpoints and sample sheets
SAVE_SECONDS = 600  # at most so much work is lost
TELL_SECONDS = 60  # a log without a progress bar shows life this often
CHECK_STEPS = 20  # steps between looks at the loss


def parse_arguments() -> argparse.Namespace:
    p = parser(__doc__)
    # Flags default to None so that --resume can tell what was asked for from what was not.
    add = p.add_argument
    add("--recipe", choices=RECIPES, help="several of these at once; others beside it win. released: --loss "
        "variational --optimizer muon --lr 1e-3 --timesteps 1000 --channels 64 128 192, as the released model that "
        "sample.py uses, but for its larger batches, its rate, and where it started")  # fmt: skip
    add("--epochs", type=integer(1), help="passes over the training digits (default 50)")
    add(
        "--steps", type=integer(1), metavar="N", help="optimizer steps in all, in place of --epochs"
    )
    add("--batch-size", type=integer(1), help="images per step (default 128)")
    add("--timesteps", type=integer(1), help="T, the length of the chain (default 200)")
    add("--transition", choices=FAMILIES, help="how noise acts: uniform (default) draws a level anew, absorbing masks, "
        "gaussian prefers near levels (--levels 3 or more)")  # fmt: skip
    add("--schedule", choices=SCHEDULES, help="noise schedule (default: the first of " + "; ".join(
        f"{name}: {', '.join(family.schedules)}" for name, family in FAMILIES.items()) + ")")  # fmt: skip
    add("--loss", choices=LOSSES, help="objective (default cross_entropy)")
    add("--hybrid-weight", type=number(0), metavar="W", help="of the cross-entropy in the hybrid loss, as the "
        "authors count it: beside one term of the bound (default 0.001)")  # fmt: skip
    add("--reverse", choices=REVERSES, help="p(x_(t-1) | x_t) as the mixture of posteriors (default), the paper's "
        "joint form, or the posterior of the most probable x_0")  # fmt: skip
    add("--levels", type=integer(2, 256), metavar="K", help="grey levels (default 2)")
    add("--binarize", choices=["threshold", "dynamic"], help="threshold (default), or dynamic: every epoch draws each "
        "pixel from Bernoulli(grey level) anew")  # fmt: skip
    add("--conditional", action="store_true", default=None, help="tell the network the digit's class, for most "
        "images: the model then draws with and without a class")  # fmt: skip
    add("--label-dropout", type=number(0, 1), metavar="P", help="share of images whose class --conditional hides "
        "(default 0.1)")  # fmt: skip
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        help="muon (default), or adamw, which needs about twice the steps",
    )
    add("--lr", type=number(0, above=True), help="peak learning rate (default 1e-4 on MNIST, 2e-3 on the offline "
        f"digits), after {WARMUP_STEPS} steps of warm-up (a tenth of shorter runs)")  # fmt: skip
    add("--decay", choices=DECAYS, help="late (default): the rate stays at its peak until the last 30 %% of the steps, "
        "which bring it to 0; or cosine")  # fmt: skip
    add("--output", choices=OUTPUTS, help="of the network, for each pixel: softmax (default), or logistic, a mean and "
        "a scale, for many grey levels")  # fmt: skip
    add(
        "--channels",
        type=integer(1),
        nargs=3,
        metavar="C",
        help="widths of the network, multiples of 8",
    )
    add("--blocks", type=integer(1, 16), help="residual blocks at each resolution (default 1)")
    add("--dropout", type=number(0, 1), metavar="P", help="share of each block's activations that training hides, "
        "against overfitting (default 0)")  # fmt: skip
    add_data(add, (None, None))
    add("--limit", type=integer(1), metavar="N", help="train on N digits only")
    add("--seed", type=SEED, help="of weights, batches and noise (default 0)")
    add_device(add)
    p.set_defaults(device=None)
    add_speed(add, None)
    add("--validate-every", type=integer(1), metavar="N", help="epochs between validations, each with a row in "
        "metrics.csv and last.pth (default 1; for GPUs, on which an epoch takes less time)")  # fmt: skip
    add("--out-dir", type=path(), help="where everything is written (default results_d3pm)")
    add("--init", type=path(), metavar="CHECKPOINT", help="start from this checkpoint's averaged weights; a "
        "--conditional run may start from one without classes")  # fmt: skip
    add("--resume", nargs="?", type=path(), const=True, metavar="CHECKPOINT", help="go on from the newest "
        "checkpoint in --out-dir, or this one; with more --epochs, from where the rate was still constant")  # fmt: skip
    add(
        "--overwrite",
        action="store_true",
        help="delete the run that is in --out-dir and start anew",
    )
    args = p.parse_args()
    if args.epochs and args.steps:
        p.error("--epochs and --steps exclude each other")
    if args.label_dropout is not None and not (args.conditional or args.resume):
        p.error("--label-dropout goes with --conditional")
    if args.resume and (args.overwrite or args.init):
        p.error(f"--resume and {'--overwrite' if args.overwrite else '--init'} exclude each other")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Building a run


def find_run(args: argparse.Namespace, folder: RunFolder) -> dict | None:
    """The checkpoint to go on from, or None for a fresh run. Raises ValueError if the folder is not as expected."""
    source = folder.newest() if args.resume is True else args.resume
    own = source is not None and source.resolve().parent == folder.checkpoints.resolve()
    if folder.holds_a_run() and not own and not args.overwrite:
        raise ValueError(
            f"{folder.path} holds another run: use --resume to go on, --out-dir for another place, "
            "or --overwrite to delete it"
        )
    if source is None:
        return None
    checkpoint = read_checkpoint(source)
    if (
        not {"weights", "optimizer", "settings", "step", "loss_sum", "history", "data"}
        <= checkpoint.keys()
    ):
        raise ValueError(f"--resume: {source} is not a run that can go on (weights only, perhaps)")
    constant = folder.checkpoints / "constant.pth"
    if args.resume is True and (args.epochs or args.steps) and constant.exists():
        per_epoch = checkpoint["steps_per_epoch"]
        longer = (args.steps or args.epochs * per_epoch) > checkpoint["total_steps"]
        if longer and checkpoint["step"] > decay_start(checkpoint["total_steps"]):
            rows, source, checkpoint = checkpoint["history"], constant, read_checkpoint(constant)
            checkpoint["history"] = [row for row in rows if row["step"] <= checkpoint["step"]]
    print(f"Resuming {source} at step {checkpoint['step']}")
    return checkpoint


def merge_settings(args: argparse.Namespace, checkpoint: dict | None) -> dict:
    """What this run uses: flags first, then the recipe, the resumed run's settings, the defaults."""
    given = RECIPES.get(args.recipe, {}) | {
        name: v for name in DEFAULTS if (v := getattr(args, name)) is not None
    }
    saved = {}
    if checkpoint:  # an older run may lack the newest settings: it was AdamW's, with a cosine
        saved = DEFAULTS | {"optimizer": "adamw", "decay": "cosine"} | checkpoint["settings"]
    for name in given.keys() & saved.keys() - FREE_ON_RESUME:
        if given[name] != saved[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {given[name]} disagrees with the run to resume: {saved[name]}"
            )
    fresh = {"out_dir": DEFAULTS["out_dir"]} if checkpoint else {}
    if "epochs" in given:
        fresh["steps"] = None
    merged = DEFAULTS | saved | fresh | given
    return {name: merged[name] for name in DEFAULTS}


def build(settings: dict, init: Path | None) -> DiscreteDiffusion:
    """The diffusion around a fresh network, or one with the weights of `init`. ValueError if they don't go together."""
    K = settings["levels"]
    to_levels(torch.zeros(1, dtype=torch.uint8), K, settings["binarize"])
    config = {
        "name": "unet",
        "num_levels": K,
        "num_states": K + FAMILIES[settings["transition"]].extra_states,
    }
    config |= {"channels": settings["channels"]} if settings["channels"] else {}
    config |= {"blocks": settings["blocks"], "num_labels": 10 if settings["conditional"] else 0}
    config |= {"output": settings["output"], "ordinal": K > 2, "dropout": settings["dropout"]}
    torch.manual_seed(settings["seed"])
    network = build_network(config)
    diffusion = DiscreteDiffusion(
        network,
        K,
        settings["timesteps"],
        settings["transition"],
        settings["schedule"],
        settings["loss"],
        settings["hybrid_weight"],
        reverse=settings["reverse"],
    )
    if init:
        source = build_diffusion(read_checkpoint(init), init).model
        differing = [
            key for key, v in network.config.items() if key != "dropout" and source.config[key] != v
        ]
        if differing == ["num_labels"] and not source.num_labels:
            torch.nn.init.zeros_(
                network.embed_y.weight
            )  # which such a network does without: they say nothing at first
        elif differing:
            raise ValueError(
                f"--init: {init} is another network, by its {', '.join(differing)}: {source.config}"
            )
        network.load_state_dict(source.state_dict(), strict=False)
    return diffusion


def load_data(
    settings: dict, checkpoint: dict | None, processes: Processes
) -> tuple[Digits, torch.Tensor]:
    """The training digits, and the validation images as levels. The first process on a machine fetches them for all."""
    if processes.local_rank > 0:
        processes.mean(0)
    digits = load_digits("train", settings["data"], settings["data_root"])
    if processes.local_rank == 0:
        processes.mean(0)
    if processes.mean(digits.source == "mnist")[0] not in (0, 1):
        raise ValueError(
            "some machines have MNIST and some only the offline digits: choose with --data"
        )
    if checkpoint and checkpoint["data"] != digits.source:
        raise ValueError(
            f"the run was trained on {checkpoint['data']} digits, but these are {digits.source} digits"
        )
    most = (
        200 if settings["levels"] > 32 else None
    )  # a digit of 256 levels takes a tenth of a second
    grey = take(load_digits("validation", digits.source, settings["data_root"]), most).images
    validation = to_levels(
        grey, settings["levels"], settings["binarize"], torch.Generator().manual_seed(0)
    )
    digits = take(digits, settings["limit"])
    next(batches(digits, settings["batch_size"]))  # raises now if the batch is too large
    return digits, validation


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """A trainer, its digits and its folder: the loop over epochs, validation, saving, reporting."""

    def __init__(self, trainer: Trainer, digits: Digits, validation: torch.Tensor, settings: dict, folder: RunFolder,
                 processes: Processes):  # fmt: skip
        self.trainer, self.digits, self.validation = trainer, digits, validation
        self.settings, self.folder, self.processes = settings, folder, processes
        self.writes = processes.rank == 0
        self.steps_per_epoch = len(digits.images) // settings["batch_size"]
        self.loss_sum, self.history, self.losses = 0.0, [], []
        self.saved = self.told = time.monotonic()

    def train(self, stop) -> bool:
        """Go on to the last step, or until stop() is true; whether it was stopped before its time."""
        trainer, s = self.trainer, self.settings
        size, stopped = s["batch_size"], False
        start, first_step = time.perf_counter(), trainer.steps
        while trainer.steps < trainer.total_steps and not stopped:
            epoch, done = divmod(trainer.steps, self.steps_per_epoch)
            self.loss_sum = self.loss_sum if done else 0.0
            with tqdm(total=self.steps_per_epoch * size, initial=done * size, desc=f"epoch {epoch + 1}", unit="img",
                      leave=False, disable=None if self.writes else True) as bar:  # fmt: skip
                for x_0, y in batches(
                    self.digits, size, s["seed"], epoch, done, s["levels"], s["binarize"]
                ):
                    self.losses.append(trainer.step(x_0, y))
                    bar.update(size)
                    stopped = stop()
                    decays = trainer.decay == "late" and trainer.steps == decay_start(
                        trainer.total_steps
                    )
                    if (
                        stopped
                        or decays
                        or trainer.steps == trainer.total_steps
                        or len(self.losses) == CHECK_STEPS
                    ):
                        self.settle(epoch, *["constant.pth"] * decays, *["last.pth"] * stopped)
                    if stopped or trainer.steps == trainer.total_steps:
                        break
            self.settle(epoch)
            in_turn = trainer.steps % (self.steps_per_epoch * s["validate_every"]) == 0
            if in_turn or trainer.steps == trainer.total_steps:
                seconds = time.perf_counter() - start
                self.end_epoch(epoch + 1, (trainer.steps - first_step) * size / seconds, seconds)
                start, first_step = time.perf_counter(), trainer.steps
        return stopped and trainer.steps < trainer.total_steps

    def settle(self, epoch: int, *names: str) -> None:
        """Look at the losses since the last look; save under these names, or if it is time; show that the run lives."""
        losses = torch.stack(self.losses).tolist() if self.losses else []
        losses = self.processes.mean(*losses) if losses else []
        self.losses.clear()
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"the loss is not finite before step {self.trainer.steps}: try a smaller --lr "
                             "(checkpoints are intact)")  # fmt: skip
        self.loss_sum += sum(losses)
        now = time.monotonic()
        for name in names or ["last.pth"] * (now - self.saved > SAVE_SECONDS):
            self.save(name)
        if now - self.told > TELL_SECONDS and not sys.stderr.isatty():
            self.told = now
            mean = self.loss_sum / (self.trainer.steps - epoch * self.steps_per_epoch)
            print(f"epoch {epoch + 1}, step {self.trainer.steps} of {self.trainer.total_steps}, "
                  f"train loss {mean:.4f} nats/pixel")  # fmt: skip

    def end_epoch(self, epoch: int, images_per_second: float, seconds: float) -> None:
        """Validate, save, and only then report."""
        if not self.writes:
            return
        trainer = self.trainer
        row = {
            "epoch": epoch,
            "step": trainer.steps,
            "train_loss": self.loss_sum / (trainer.steps - (epoch - 1) * self.steps_per_epoch),
            "validation_bound": trainer.validate(self.validation),
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "images_per_second": images_per_second,
            "seconds": seconds,
        }
        self.history = [earlier for earlier in self.history if earlier["epoch"] < epoch] + [row]
        at_end = trainer.steps == trainer.total_steps
        before = self.history[-2]["epoch"] if len(self.history) > 1 else 0
        if keep := epoch // EVERY > before // EVERY or at_end:
            self.save(f"model_epoch_{epoch}.pth")
        self.save("last.pth")
        if at_end:
            self.save("weights.pth")
        print(
            f"epoch {epoch:3d}/{-(-trainer.total_steps // self.steps_per_epoch)}  "
            f"train loss {row['train_loss']:.4f} nats/pixel  "
            f"validation bound {row['validation_bound']:7.2f} nats/image  {images_per_second:.0f} img/s"
        )
        self.report("metrics.csv", lambda file: file.write(metrics_csv(self.history)))
        if keep:
            self.report(
                "loss_curve.png", lambda file: save_figure(plot_history(self.history), file)
            )
            drawn = trainer.averaged.respaced(
                min(TIMESTEPS, trainer.averaged.timesteps)
            )  # as sample.py does
            images = drawn.sample(
                64, self.settings["seed"], y=drawn.labels(64), last_step=LAST_STEP
            )
            sheet = image_grid(images, self.settings["levels"], columns=8)
            self.report(
                f"samples/sample_epoch_{epoch}.png", lambda file: sheet.save(file, format="png")
            )

    def report(self, name: str, write) -> None:
        """Write a file that training can do without."""
        try:
            with atomic_write(self.folder.path / name) as file:
                write(file)
        except OSError as error:
            print(f"warning: {name} could not be written: {error}", file=sys.stderr)

    def save(self, name: str) -> None:
        """Write a checkpoint; weights.pth holds what drawing needs, in half precision."""
        if not self.writes:
            return
        state = {"network": self.trainer.network.config, "diffusion": self.trainer.averaged.config}
        state |= {
            "data": self.digits.source,
            "binarize": self.settings["binarize"],
        } | self.trainer.state_dict()
        if name == "weights.pth":
            state = {
                key: value for key, value in state.items() if key not in ("weights", "optimizer")
            }
            state["averaged_weights"] = {
                key: w.half().cpu() for key, w in state["averaged_weights"].items()
            }
        else:
            state |= {
                "settings": {
                    key: str(v) if isinstance(v, Path) else v for key, v in self.settings.items()
                },
                "epoch": self.trainer.steps // self.steps_per_epoch,
                "steps_per_epoch": self.steps_per_epoch,
                "total_steps": self.trainer.total_steps,
                "loss_sum": self.loss_sum,
                "history": self.history,
            }
        save_checkpoint(self.folder.checkpoints / name, state)
        self.saved = time.monotonic()


def metrics_csv(history: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in history
    )
    return text.getvalue().encode()


def catch_signals() -> list[int]:
    """The signals received so far: a first one lets the step end and saves, a second one means it."""
    received: list[int] = []

    def on_signal(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no terminals that hang up
            signal.signal(getattr(signal, name), on_signal)
    return received


def plan(settings: dict, steps_per_epoch: int, done: int) -> int:
    """How many steps there are to be in all. Raises ValueError if they are done already."""
    total = settings["steps"] or settings["epochs"] * steps_per_epoch
    if done >= total:
        raise ValueError(
            f"the run to resume has all its {total} steps: give more with --epochs or --steps"
        )
    return total


def main() -> int:
    args = parse_arguments()
    processes = Processes.from_environment()
    folder = RunFolder(args.out_dir or DEFAULTS["out_dir"])
    if processes.rank == 0:
        with folder.owned():
            return train(args, processes, folder)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end: the first process speaks and writes for all)
    return train(args, processes, folder)


def train(args: argparse.Namespace, processes: Processes, folder: RunFolder) -> int:
    """Find what there is to go on from, build, train; the exit code."""
    checkpoint = find_run(args, folder)
    settings = merge_settings(args, checkpoint)
    processes.share(settings["batch_size"])
    diffusion = build(settings, args.init)
    device = processes.start(pick_device(settings["device"]))
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    digits, validation = load_data(settings, checkpoint, processes)
    settings["lr"] = settings["lr"] or LEARNING_RATE[digits.source]
    settings |= {
        "schedule": diffusion.config["schedule"],
        "channels": diffusion.model.config["channels"],
    }
    steps_per_epoch = len(digits.images) // settings["batch_size"]
    total = plan(settings, steps_per_epoch, checkpoint["step"] if checkpoint else 0)
    names = ("batch_size", "lr", "optimizer", "decay", "label_dropout", "seed", "amp")
    options = {name: settings[name] for name in names} | {
        "compiled": settings["compile"],
        "processes": processes,
    }
    trainer = Trainer(diffusion.to(device), total, **options)
    run = Run(trainer, digits.to(trainer.source), validation, settings, folder, processes)
    if checkpoint:
        trainer.load_state_dict(checkpoint)
        run.loss_sum, run.history = checkpoint["loss_sum"], checkpoint["history"]

    processes.mean(0)  # nobody looks for a run any more
    if processes.rank == 0:
        folder.clear() if args.overwrite else folder.tidy()
    weights = sum(p.numel() for p in trainer.network.parameters())
    print(
        f"{len(digits.images):,} {digits.source} digits for training, {len(validation):,} for validation\n"
        f"{weights:,} weights on {device}{f', {processes.size} processes' if processes.size > 1 else ''}; "
        f"T = {settings['timesteps']}\n{total} steps of {settings['batch_size']}, {total / steps_per_epoch:.3g} "
        f"epochs; {settings['optimizer']} with peak learning rate {settings['lr']:g}"
    )
    received = catch_signals()
    if run.train(lambda: processes.mean(bool(received))[0] > 0):
        number = (
            received[0] if received else signal.SIGTERM
        )  # perhaps only another process was told
        if processes.rank == 0:
            print(f"Stopped by {signal.Signals(number).name} after step {trainer.steps} of {total}, saved in "
                  f"{folder.checkpoints / 'last.pth'}; go on with --resume", file=sys.stderr)  # fmt: skip
        return 128 + number
    print(f"Done. Draw digits: python sample.py {folder.checkpoints / 'weights.pth'}")
    return 0


def who() -> str:
    """In front of an error's text, where there are several processes."""
    return f"process {os.environ['RANK']}: " if os.environ.get("RANK") else ""


if __name__ == "__main__":
    run(main, who())
