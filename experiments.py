"""The README's tables and figures, one subcommand each. All but forward and release need full MNIST.

    python experiments.py table                    # the design choices, each trained for the same time
    python experiments.py steps [CHECKPOINT]       # quality against the number of sampling steps
    python experiments.py time                     # quality against training time, beside the common baseline
    python experiments.py forward                  # a digit at t = 0, 25, ..., 200
    python experiments.py release CHECKPOINT       # what a checkpoint needs for drawing: the file that ships

Results are kept, run by run, in results_d3pm/experiments/: a command that was stopped goes on where it was.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmark import Trainer, endless
from dataset import get_dataloader, load_digits, sha256, to_levels
from diffusion import (
    IMAGE_SHAPE,
    RELEASED,
    DiscreteDiffusion,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    take_columns,
)
from evaluate import bound_terms, judge, load_classifier, quality, save_figure, spread, summarize_bound, write_json
from model import build_network, pick_device
from train import DEFAULTS, build_diffusion, build_model, learning_rate

OUT_DIR = Path("results_d3pm") / "experiments"
warnings.filterwarnings("ignore", "bar_Q.T. is far from stationary")  # the linear schedule is here on purpose


def kept_results(path: Path, what: dict) -> dict:
    """What a stopped command has left in `path`, or no rows yet. Raises ValueError if it is of something else."""
    done = json.loads(path.read_text()) if path.exists() else what | {"rows": {}}
    if any(done.get(key) != value for key, value in what.items()):
        raise ValueError(f"{path} holds results for another checkpoint or other arguments: move it away")
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Reverse steps that are here only to be compared with


class JointForm(DiscreteDiffusion):
    """Equation 4 with the network's output taken as p(x_0 | x_t): counts the likelihood q(x_t | x_0) twice."""

    def q_posterior(self, x_t, x_0_probs, t):
        likelihood = take_columns(self._at(self.bar_Q, t, x_0_probs)[:, : self.num_classes], x_t)
        joint = x_0_probs * likelihood
        return super().q_posterior(x_t, joint / joint.sum(1, keepdim=True), t)


class Argmax(DiscreteDiffusion):
    """The single most probable x_0, and its posterior: the model's uncertainty is thrown away."""

    def p_theta(self, x_t, t, logits=None):
        logits = self.x_0_logits(x_t, t) if logits is None else logits
        best = F.one_hot(logits.argmax(1), self.num_classes).movedim(-1, 1)
        return self.q_posterior(x_t, best.to(logits), t)


# ---------------------------------------------------------------------------------------------------------------------
# table: what each design choice is worth

# What differs from train.py's defaults, and the reverse step.
ROWS = {
    "uniform, cosine, cross-entropy": ({}, DiscreteDiffusion),
    "the same, seed 1": ({"seed": 1}, DiscreteDiffusion),
    "the same, seed 2": ({"seed": 2}, DiscreteDiffusion),
    "the same network as seed 0, joint form": ({}, JointForm),
    "the same network as seed 0, argmax": ({}, Argmax),
    "uniform, linear, cross-entropy": ({"schedule": "linear"}, DiscreteDiffusion),
    "uniform, cosine, variational": ({"loss": "variational"}, DiscreteDiffusion),
    "uniform, cosine, hybrid": ({"loss": "hybrid"}, DiscreteDiffusion),
    "absorbing, mutual_info, cross-entropy": ({"transition": "absorbing"}, DiscreteDiffusion),
    "absorbing, mutual_info, variational": ({"transition": "absorbing", "loss": "variational"}, DiscreteDiffusion),
    "absorbing, mutual_info, hybrid": ({"transition": "absorbing", "loss": "hybrid"}, DiscreteDiffusion),
    "8 levels, uniform, cosine, cross-entropy": ({"levels": 8}, DiscreteDiffusion),
    "8 levels, absorbing, mutual_info, cross-entropy": ({"levels": 8, "transition": "absorbing"}, DiscreteDiffusion),
    "8 levels, gaussian, linear, cross-entropy": ({"levels": 8, "transition": "gaussian"}, DiscreteDiffusion),
}
LR = 2e-3
NUM_SAMPLES = 500


def run_name(changes: dict) -> str:
    """The folder of a training: rows with the same changes share it."""
    return "-".join(f"{key}_{value}" for key, value in changes.items()) or "default"


def seconds_per_step(all_changes: list[dict], rounds: int = 6) -> list[float]:
    """Of one training step with each of the changes on one thread, taking turns: the medians."""
    torch.set_num_threads(1)
    trainers = []
    for changes in all_changes:
        diffusion = build_diffusion(build_model(DEFAULTS | changes), DEFAULTS | changes)
        x_0 = torch.randint(0, diffusion.num_classes, (DEFAULTS["batch_size"], *IMAGE_SHAPE))
        trainers.append(Trainer(diffusion, repeat(x_0)))
    seconds = [[] for _ in trainers]
    for _ in tqdm(range(rounds), desc="timing a step of each", disable=None):
        for trainer, turns in zip(trainers, seconds, strict=True):
            start = time.process_time()
            trainer.step()
            turns.append(time.process_time() - start)
    return [statistics.median(turns[1:]) for turns in seconds]  # the first warms up


def train_run(changes: dict, steps: int, data_root: str) -> Path:
    """Train with the changes for so many steps, or go on with it, in a process of one thread. The last checkpoint."""
    out_dir = OUT_DIR / "table" / run_name(changes)
    last = out_dir / "checkpoints" / "last.pth"
    if last.exists() and read_checkpoint(last)["step"] >= steps:
        return last
    command = ["train.py", "--data", "mnist", "--data-root", data_root, "--lr", LR, "--steps", steps]
    command += ["--out-dir", out_dir, *(["--resume"] if last.exists() else [])]
    for key, value in changes.items():
        command += ["--" + key.replace("_", "-"), value]
    with open(OUT_DIR / "table" / f"{out_dir.name}.log", "a") as log:
        done = subprocess.run(
            [sys.executable, *map(str, command)], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    if done.returncode:
        raise RuntimeError(f"training {out_dir.name} ended with code {done.returncode}: see {log.name}")
    return last


def table_row(name: str, steps: int, data_root: str) -> dict:
    """Train the row's network and judge it on the validation digits; in a process of its own, on one thread."""
    torch.set_num_threads(1)
    changes, reverse_step = ROWS[name]
    diffusion = load_checkpoint(train_run(changes, steps, data_root))
    diffusion = reverse_step(diffusion.model, **diffusion.config).eval()
    K, classifier = diffusion.num_classes, load_classifier("cpu")
    grey = load_digits("validation", "mnist", data_root).images
    x_0 = to_levels(grey, K, "threshold", torch.Generator().manual_seed(0))
    bound = None
    if reverse_step is not Argmax:  # whose bound is infinite
        bound = summarize_bound(bound_terms(diffusion, x_0, 4, "cpu"))
    reference, _ = judge(classifier, x_0, K, "cpu")
    samples = diffusion.sample(NUM_SAMPLES)
    train = load_digits("train", "mnist", data_root).images
    x_train = to_levels(spread(train, NUM_SAMPLES), K, "threshold")
    return {
        "row": name,
        "steps": steps,
        "bound": bound,
        "samples": quality(samples, reference, classifier, K, "cpu"),
        "training_digits": quality(x_train, reference, classifier, K, "cpu"),
    }


def table(args: argparse.Namespace) -> None:
    folder = OUT_DIR / "table"
    folder.mkdir(parents=True, exist_ok=True)
    load_digits("train", "mnist", args.data_root)  # fails here, in one line, if there is no MNIST
    plan = folder / "plan.json"
    if plan.exists() and json.loads(plan.read_text())["minutes"] != args.minutes:
        raise ValueError(f"{folder} holds the same table with other --minutes: move it away")
    if not plan.exists():
        unseeded = {run_name(changes): changes for changes, _ in ROWS.values() if "seed" not in changes}
        seconds = dict(zip(unseeded, seconds_per_step(list(unseeded.values())), strict=True))
        write_json(plan, {"minutes": args.minutes, "seconds_per_step": seconds})
    seconds = json.loads(plan.read_text())["seconds_per_step"]

    def steps_of(name: str) -> int:
        changes = {key: value for key, value in ROWS[name][0].items() if key != "seed"}
        return round(60 * args.minutes / seconds[run_name(changes)])

    result = folder / "table.json"
    done = json.loads(result.read_text()) if result.exists() else {}
    # Rows that share a training wait for the row that makes it.
    for wave in (
        [name for name, (_, reverse_step) in ROWS.items() if reverse_step is DiscreteDiffusion],
        [name for name, (_, reverse_step) in ROWS.items() if reverse_step is not DiscreteDiffusion],
    ):
        todo = [name for name in wave if name not in done]
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            rows = [pool.submit(table_row, name, steps_of(name), args.data_root) for name in todo]
            for row in tqdm(as_completed(rows), total=len(rows), desc="rows", disable=None):
                done[row.result()["row"]] = row.result()
                write_json(result, done)

    floor = {K: done[name]["training_digits"] for name, K in ((next(iter(ROWS)), 2), (list(ROWS)[-1], 8))}
    print("| | steps | bound | Fréchet distance | precision | recall | ink |\n| --- " + "| ---: " * 6 + "|")
    for name in ROWS:
        row = done[name]
        print(f"| {name} | {row['steps']} | {bound_cell(row['bound'])} | {quality_cells(row['samples'])} |")
    for K, digits in floor.items():
        print(f"| *training digits, {K} levels* | | | {quality_cells(digits)} |")


def bound_cell(bound: dict | None) -> str:
    return "infinite" if bound is None else f"{bound['nats_per_image']:.1f} ± {bound['standard_error']:.1f}"


def quality_cells(q: dict) -> str:
    fd = q["frechet_distance"]
    return f"{fd:.{2 if fd >= 0.1 else 3}f} | {q['precision']:.2f} | {q['recall']:.2f} | {q['ink']:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# steps: what fewer steps cost

STEPS = (5, 10, 15, 20, 50, 100, 200)


def steps(args: argparse.Namespace) -> None:
    device = pick_device("auto")
    checkpoint = read_checkpoint(args.checkpoint)
    result = OUT_DIR / "steps.json"
    what = {"checkpoint": sha256(Path(args.checkpoint)), "num_samples": args.num_samples}
    done = kept_results(result, what)
    test, train = (load_digits(split, "mnist", args.data_root).images for split in ("test", "train"))
    full, classifier = load_checkpoint(args.checkpoint, device), load_classifier(device)

    K, binarize = full.num_classes, checkpoint.get("binarize", "threshold")

    def levels(grey):
        return to_levels(grey, K, binarize, torch.Generator().manual_seed(0))

    x_test = levels(test)
    reference, _ = judge(classifier, x_test, K, device)
    for n in tqdm([n for n in STEPS if n <= full.timesteps and str(n) not in done["rows"]], disable=None):
        diffusion = full.respaced(n)
        terms = bound_terms(diffusion, x_test, 4, device)
        samples = diffusion.sample(args.num_samples, y=diffusion.classes(args.num_samples))
        done["rows"][str(n)] = {
            "bound": summarize_bound(terms),
            "samples": quality(samples, reference, classifier, K, device),
        }
        write_json(result, done)
    x_train = levels(spread(train, args.num_samples))
    done["training_digits"] = quality(x_train, reference, classifier, K, device)
    write_json(result, done)

    print("| steps | bound | Fréchet distance | precision | recall | ink |\n" + "| ---: " * 6 + "|")
    for n, row in done["rows"].items():
        print(f"| {n} | {bound_cell(row['bound'])} | {quality_cells(row['samples'])} |")
    print(f"| *training digits* | | {quality_cells(done['training_digits'])} |")
    plot_steps(done, args.out)
    print(f"Wrote {args.out}")


def plot_steps(done: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    n = [int(key) for key in done["rows"]]
    rows = done["rows"].values()
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(
        n,
        [row["bound"]["nats_per_image"] for row in rows],
        [row["bound"]["standard_error"] for row in rows],
        marker="o",
        capsize=3,
    )
    left.set(ylabel="test bound, nats per image")
    right.plot(n, [row["samples"]["frechet_distance"] for row in rows], marker="o", color="tab:orange")
    right.axhline(done["training_digits"]["frechet_distance"], color="gray", linestyle="--", label="training digits")
    right.set(ylabel=f"Fréchet distance of {done['num_samples']:,} samples", ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.set(xlabel="steps from noise to digits", xscale="log")
        axis.set_xticks(n, labels=map(str, n))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# time: what a minute of training is worth

CONTESTANTS = {
    # network, schedule, whether trained as by train.py or as usual, reverse step
    f"this repository (--lr {LR:g})": ("unet", "cosine", False, DiscreteDiffusion),
    "PlainUNet, linear schedule, Adam 1e-4, argmax": ("plain", "linear", True, Argmax),
}
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the training at which the network is judged


def train_and_judge(name: str, args: argparse.Namespace) -> list[dict]:
    """Train one contestant on all cores, with a clock that stands still while it is judged."""
    network, schedule, usual, reverse_step = CONTESTANTS[name]
    torch.manual_seed(0)
    diffusion = DiscreteDiffusion(build_network({"name": network}), schedule=schedule)
    trainer = Trainer(diffusion, endless(get_dataloader(128, args.data_root, "mnist")), usual=usual)
    judged = DiscreteDiffusion(trainer.network if usual else trainer.averaged.module, **diffusion.config)
    grey = load_digits("validation", "mnist", args.data_root).images
    x_0, classifier = to_levels(grey), load_classifier("cpu")
    reference, _ = judge(classifier, x_0, 2, "cpu")
    total, turns, step, rows = None, [], 0, []
    for fraction in FRACTIONS:
        trainer.network.train()
        while total is None or step < fraction * total:
            if not usual:
                trainer.optimizer.param_groups[0]["lr"] = learning_rate(LR, step, total or 10**6)
            turns.append(trainer.step())
            step += 1
            if step == 5:  # what fits
                total = round(60 * args.minutes / statistics.median(turns))
        judged.eval()
        terms = bound_terms(judged, spread(x_0, 500), 2, "cpu")  # by the mixture: that of argmax is infinite
        drawn = reverse_step(judged.model, **judged.config).respaced(args.timesteps).sample(NUM_SAMPLES)
        rows.append(
            {
                "minutes": sum(turns) / 60,
                "steps": step,
                "bound": summarize_bound(terms),
                "samples": quality(drawn, reference, classifier, 2, "cpu"),
            }
        )
        row = rows[-1]
        print(f"{name}: {row['minutes']:.1f} minutes, {step} steps: {row['bound']['nats_per_image']:.1f} nats, "
              f"Fréchet distance {row['samples']['frechet_distance']:.2f}", flush=True)  # fmt: skip
    return rows


def time_to_quality(args: argparse.Namespace) -> None:
    result = OUT_DIR / "time.json"
    what = {"minutes": args.minutes, "timesteps": args.timesteps}
    done = kept_results(result, what)
    for name in CONTESTANTS:
        if name not in done["rows"]:
            done["rows"][name] = train_and_judge(name, args)
            write_json(result, done)
    plot_time(done, args.out)
    print(f"Wrote {args.out}")


def plot_time(done: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in done["rows"].items():
        minutes = [row["minutes"] for row in rows]
        left.plot(minutes, [row["bound"]["nats_per_image"] for row in rows], marker="o", label=name)
        right.plot(minutes, [row["samples"]["frechet_distance"] for row in rows], marker="o", label=name)
    left.set(ylabel="bound on validation digits, nats per image")
    right.set(ylabel=f"Fréchet distance of {NUM_SAMPLES} samples in {done['timesteps']} steps")
    for axis in (left, right):
        axis.set(xlabel="minutes of training", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    left.legend()
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# forward: what noise does to a digit


def forward(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    digits = load_digits("validation", "auto", args.data_root)
    x_0 = to_levels(digits.images[digits.labels == args.digit][:1])
    diffusion = DiscreteDiffusion(torch.nn.Identity())
    ts = range(0, diffusion.timesteps + 1, 25)
    torch.manual_seed(0)
    u = torch.rand(x_0.shape)  # the same for all t: once flipped, nearly always flipped
    figure = Figure(figsize=(1.2 * len(ts), 1.5), layout="constrained")
    axes = figure.subplots(1, len(ts))
    for t, axis in zip(ts, axes, strict=True):
        axis.imshow(diffusion.q_sample(x_0, torch.tensor([t]), u)[0, 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"t = {t}", fontsize=10)
        axis.axis("off")
    save_figure(figure, args.out)
    print(f"Wrote {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# release: the checkpoint that ships


def release(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.checkpoint)
    keys = ("network", "diffusion", "averaged_weights", "data", "binarize", "step")
    if not set(keys) <= checkpoint.keys():
        raise ValueError(f"{args.checkpoint} was not written by train.py")
    save_checkpoint(args.out, {key: checkpoint[key] for key in keys})
    size = args.out.stat().st_size / 1e6
    print(f"Wrote {args.out}: the averaged weights after step {checkpoint['step']}, {size:.2f} MB")


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("table", help="what each design choice is worth, trained for the same time").add_argument
    commands.choices["table"].set_defaults(run=table)
    add("--minutes", type=float, default=10, help="training time of each row on one core (default 10)")
    add("--jobs", type=int, default=os.cpu_count(), help="rows at a time, each on one thread (default: all cores)")
    add = commands.add_parser("steps", help="bound and samples of one model against the number of steps").add_argument
    commands.choices["steps"].set_defaults(run=steps)
    add("checkpoint", nargs="?", default=RELEASED, help="a .pth file written by train.py (default: the released model)")
    add("--num-samples", type=int, default=1000, help="images drawn to judge each number of steps (default 1000)")
    add("--out", type=Path, default=OUT_DIR / "steps.png", help=f"the plot (default {OUT_DIR}/steps.png)")
    add = commands.add_parser("time", help="bound and samples against minutes of training").add_argument
    commands.choices["time"].set_defaults(run=time_to_quality)
    add("--minutes", type=float, default=10, help="training time of each network (default 10; judging them comes "
        "on top)")  # fmt: skip
    add("--timesteps", type=int, default=20, metavar="N", help="sampling steps to judge with (default 20)")
    add("--out", type=Path, default=OUT_DIR / "time.png", help=f"the plot (default {OUT_DIR}/time.png)")
    add = commands.add_parser("forward", help="a digit at t = 0, 25, ..., 200").add_argument
    commands.choices["forward"].set_defaults(run=forward)
    add("--digit", type=int, choices=range(10), default=8, metavar="D", help="its class (default 8)")
    add("--out", type=Path, default=OUT_DIR / "forward.png", help=f"the picture (default {OUT_DIR}/forward.png)")
    add = commands.add_parser("release", help="keep what drawing needs of a checkpoint").add_argument
    commands.choices["release"].set_defaults(run=release)
    add("checkpoint", help="a .pth file written by train.py")
    add("--out", type=Path, default=RELEASED, help=f"where to (default {RELEASED.name} in results_d3pm/released/)")
    for name in commands.choices.keys() - {"release"}:
        commands.choices[name].add_argument("--data-root", default="data", help="where MNIST is or goes (default data)")
    args = parser.parse_args()
    if args.run in (table, time_to_quality) and not 0 < args.minutes < math.inf:
        parser.error("--minutes must be a positive number")
    if args.run is table and args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.run is time_to_quality and not 1 <= args.timesteps <= 200:
        parser.error("--timesteps must be in 1..200")
    if args.run is steps and args.num_samples < 20:
        parser.error("--num-samples must be at least 20")
    if args.run in (steps, forward, time_to_quality) and args.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    return args


def main() -> None:
    args = parse_arguments()
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"experiments.py: error: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
