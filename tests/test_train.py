"""train.py end to end: what a run is made of, what it writes, how it stops and goes on, and what it
refuses."""

import csv
import errno
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    ENVIRONMENT,
    REPOSITORY,
    SIGNALS,
    TRAIN,
    call,
    fail,
    files,
    same_weights,
    snapshot,
    start,
    succeed,
)

import dataset
import model
import train
import trainer
from checkpoint import RELEASED, load_checkpoint, read_checkpoint, save_checkpoint
from dataset import Dataset, batches, load_dataset, take, to_levels
from diffusion import DiscreteDiffusion
from model import build_network
from pictures import image_grid
from trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_directory")
STEP = [*TRAIN, "--steps", "1", "--out-dir", "out"]


def read_metrics(folder) -> list[dict]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint_of(folder, name="last") -> dict:
    return read_checkpoint(Path(folder) / "checkpoints" / f"{name}.pth")


def same_history(a, b, but_for=()) -> bool:
    """Whether two runs tell the same of every epoch, but for the seconds."""
    but_for = dict.fromkeys(("images_per_second", "seconds", *but_for))
    a, b = ([row | but_for for row in checkpoint_of(x)["history"]] for x in (a, b))
    return a == b


def signal_at_step(monkeypatch, at, *signals):
    """Send these signals to this process while step `at` (from 0) computes its loss."""
    loss, calls = DiscreteDiffusion.loss, []

    def loss_with_signal(self, *arguments):
        if len(calls) == at:
            for number in signals:
                os.kill(os.getpid(), number)
        calls.append(at)
        return loss(self, *arguments)

    monkeypatch.setattr(DiscreteDiffusion, "loss", loss_with_signal)


def spy(monkeypatch, owner, name) -> list[tuple]:
    """The calls of owner.name from now on, as (arguments, keyword arguments); a method's start with
    its object."""
    original, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls


# --------------------------------------------------------------------------------------------------
# A run


def test_a_run_is_these_steps_on_these_batches(run):
    """The whole of a run, written out: network by seed, batches by epoch, steps, a mean loss and a
    bound each epoch."""
    digits = take(load_dataset("train", "offline"), 64)
    torch.manual_seed(0)
    network = build_network(
        {"name": "unet", "num_levels": 2, "num_states": 2, "channels": [8, 8, 8], "num_labels": 0}
    )
    t = Trainer(DiscreteDiffusion(network, timesteps=10), 16, 16, 2e-3, "muon")
    validation = to_levels(load_dataset("validation", "offline").images)
    history = []
    for epoch in range(4):
        losses = [t.step(*batch).item() for batch in batches(digits, 16, 0, epoch)]
        history.append(
            [
                epoch + 1,
                t.steps,
                sum(losses) / 4,
                t.validate(validation),
                t.optimizer.param_groups[0]["lr"],
            ]
        )
    last = checkpoint_of(run)
    for key in ("weights", "averaged_weights"):
        for name, weight in t.state_dict()[key].items():
            assert torch.equal(last[key][name], weight), name
    rows = [list(row.values())[:5] for row in last["history"]]
    assert np.allclose(rows, history, rtol=1e-12)
    assert all(
        row["seconds"] * row["images_per_second"] == pytest.approx(64) for row in last["history"]
    )


def test_train_writes_what_it_promises(run):
    """Checkpoints, one sheet of 8x8 samples, the metrics of every epoch, the loss curve; and
    nothing else."""
    assert files(run) == {
        "checkpoints/last.pth",
        "checkpoints/constant.pth",
        "checkpoints/model_epoch_4.pth",
        "checkpoints/weights.pth",
        "samples/sample_epoch_4.png",
        "metrics.csv",
        "loss_curve.png",
    }
    rows, history = read_metrics(run), checkpoint_of(run)["history"]
    columns = [
        "epoch",
        "step",
        "train_loss",
        "validation_bound",
        "lr",
        "images_per_second",
        "seconds",
    ]
    assert list(rows[0]) == columns
    for row, kept in zip(rows, history, strict=True):
        assert [float(row[column]) for column in columns] == pytest.approx(
            [kept[column] for column in columns], 1e-5
        )
    assert [(row["epoch"], row["step"]) for row in rows] == [
        ("1", "4"),
        ("2", "8"),
        ("3", "12"),
        ("4", "16"),
    ]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) < 1.0
    assert same_weights(run / "checkpoints" / "last.pth", run / "checkpoints" / "model_epoch_4.pth")
    samples = load_checkpoint(run / "checkpoints" / "last.pth").sample(64, last_step="mode")
    with Image.open(run / "samples" / "sample_epoch_4.png") as picture:
        assert picture.size == (2 * (8 * 34 + 2),) * 2
        assert np.array_equal(picture, image_grid(samples, columns=8))
    with Image.open(run / "loss_curve.png") as picture:
        picture.verify()


def test_what_a_checkpoint_holds(run):
    last, constant, weights = (checkpoint_of(run, name) for name in ("last", "constant", "weights"))
    assert (
        last.keys()
        == constant.keys()
        == {
            "network",
            "diffusion",
            "averaged_weights",
            "weights",
            "optimizer",
            "settings",
            "data",
            "binarize",
            "epoch",
            "step",
            "steps_per_epoch",
            "total_steps",
            "loss_sum",
            "history",
            "seconds",
        }
    )
    assert (last["epoch"], last["step"], last["steps_per_epoch"], last["total_steps"]) == (
        4,
        16,
        4,
        16,
    )
    assert last["data"] == "offline" and last["binarize"] == "threshold"
    assert (
        last["diffusion"] == DiscreteDiffusion(build_network(last["network"]), timesteps=10).config
    )
    assert last["loss_sum"] == pytest.approx(4 * last["history"][-1]["train_loss"])
    assert constant["step"] == 12  # 0.7 * 16 = 11.2
    assert weights.keys() == {
        "network",
        "diffusion",
        "averaged_weights",
        "data",
        "binarize",
        "step",
    }
    for name, weight in last["averaged_weights"].items():
        assert torch.equal(weights["averaged_weights"][name], weight.half())
    assert not all(
        torch.equal(last["weights"][name], w) for name, w in last["averaged_weights"].items()
    )
    whole, half = (
        load_checkpoint(run / "checkpoints" / f"{name}.pth") for name in ("last", "weights")
    )
    x, t = torch.ones(1, 1, 32, 32).long(), torch.tensor([5])
    assert next(half.parameters()).dtype == torch.float32
    assert torch.allclose(whole.x_0_logits(x, t), half.x_0_logits(x, t), atol=0.01)


def test_what_a_run_says():
    """What is trained, on what, for how long; a line an epoch; the command that comes next."""
    out = succeed("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out").splitlines()
    row = checkpoint_of("out")["history"][1]
    assert out[:3] == [
        "64 offline digits for training, 500 for validation",
        "15,300 weights on cpu; T = 10",
        "8 steps of 16, 2 epochs; muon with peak learning rate 0.002",
    ]
    assert out[4].startswith(
        f"epoch   2/2  train loss {row['train_loss']:.4f} nats/pixel  "
        f"validation bound {row['validation_bound']:7.2f} nats/image  "
        f"{row['images_per_second']:.0f} img/s"
    )
    assert out[5:] == [f"Done. Draw digits: python sample.py {Path('out/checkpoints/weights.pth')}"]


def test_what_is_kept(monkeypatch, cheap):
    """Every so many epochs and at the end a checkpoint and a sheet; weights only at the end."""
    assert train.EVERY == 5
    monkeypatch.setattr(train, "EVERY", 2)
    succeed("train.py", *TRAIN, "--epochs", 5, "--out-dir", "out")
    assert files(Path("out/checkpoints")) == {
        "last.pth",
        "constant.pth",
        "weights.pth",
        "model_epoch_2.pth",
        "model_epoch_4.pth",
        "model_epoch_5.pth",
    }
    assert files(Path("out/samples")) == {f"sample_epoch_{n}.png" for n in (2, 4, 5)}
    assert checkpoint_of("out", "model_epoch_2")["step"] == 8


def test_epochs_between_validations(cheap):
    """And the last one. Speed and loss: of all the epochs since the last row, and of the epoch that
    ends with it."""
    succeed("train.py", *TRAIN, "--epochs", 7, "--validate-every", 3, "--out-dir", "out")
    rows = checkpoint_of("out")["history"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(3, 12), (6, 24), (7, 28)]
    assert [row["images_per_second"] * row["seconds"] for row in rows] == pytest.approx(
        [192, 192, 64]
    )
    assert files(Path("out/checkpoints")) >= {
        "model_epoch_6.pth",
        "model_epoch_7.pth",
    }  # the fifth was not looked at
    assert "model_epoch_3.pth" not in files(Path("out/checkpoints"))
    succeed("train.py", *TRAIN, "--epochs", 7, "--out-dir", "each")
    assert [row["train_loss"] for row in rows] == [
        checkpoint_of("each")["history"][i]["train_loss"] for i in (2, 5, 6)
    ]


class Clock:
    """A clock on which every look takes so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0
        self.perf_counter = time.perf_counter

    def monotonic(self):
        self.now += self.seconds
        return self.now


def test_saves_by_the_clock(monkeypatch, cheap):
    """In the middle of a long epoch, when SAVE_SECONDS have gone by since the last save; then it
    can go on there."""
    assert train.SAVE_SECONDS == 600
    monkeypatch.setattr(train, "CHECK_STEPS", 1)
    monkeypatch.setattr(train, "time", Clock(250))  # a look at each step, and one at each save
    saves = []
    monkeypatch.setattr(
        train, "save_checkpoint", lambda path, state: saves.append((path.name, state["step"]))
    )
    flags = *TRAIN, "--batch-size", 4, "--epochs", 1, "--decay", "cosine"
    succeed("train.py", *flags, "--out-dir", "out")
    assert saves[:-3] == [("last.pth", step) for step in (3, 6, 9, 12, 15)]
    assert saves[-3:] == [("model_epoch_1.pth", 16), ("last.pth", 16), ("weights.pth", 16)]
    saves.clear()
    monkeypatch.setattr(train, "time", Clock(1))
    succeed("train.py", *flags, "--out-dir", "other")
    assert len(saves) == 3


def test_life_signs_in_a_log(monkeypatch, cheap):
    """Without a progress bar, a line when REPORT_SECONDS have gone by, with the mean loss of the
    epoch so far."""
    assert train.REPORT_SECONDS == 60
    monkeypatch.setattr(train, "CHECK_STEPS", 2)
    monkeypatch.setattr(train, "time", Clock(25))
    losses, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: losses.append(step(*args)) or losses[-1])
    flags = *TRAIN, "--batch-size", 4, "--epochs", 2, "--out-dir"
    out = succeed("train.py", *flags, "out").splitlines()
    lines = [line for line in out if line.startswith("epoch") and "step" in line]
    assert [line.split()[3] for line in lines[:2]] == ["6", "12"] and len(lines) > 3
    for line in lines:
        epoch, step = int(line.split()[1][:-1]), int(line.split()[3])
        mean = torch.stack(losses[16 * (epoch - 1) : step]).mean()
        assert line == f"epoch {epoch}, step {step} of 32, train loss {mean:.4f} nats/pixel"


def test_no_life_signs_beside_a_progress_bar(monkeypatch, cheap):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(train, "CHECK_STEPS", 2)
    monkeypatch.setattr(train, "time", Clock(25))
    monkeypatch.setattr(
        "scripts.redirect_stderr", lambda err: patched_stderr(monkeypatch, terminal)
    )
    terminal = Terminal()
    out = succeed("train.py", *TRAIN, "--batch-size", 4, "--epochs", 1, "--out-dir", "out")
    assert ", step" not in out and "epoch 1" in terminal.getvalue()


def patched_stderr(monkeypatch, stream):
    from contextlib import redirect_stderr

    return redirect_stderr(stream)


def test_progress_bar_starts_where_the_run_goes_on(monkeypatch, my_run, cheap):
    bars, tqdm = [], train.tqdm

    def bar(**kwargs):
        bars.append(tqdm(**kwargs | {"disable": False, "file": io.StringIO()}))
        assert kwargs["disable"] is None  # tqdm's word for: only on a terminal
        return bars[-1]

    monkeypatch.setattr(train, "tqdm", bar)
    shutil.copy(my_run / "checkpoints" / "model_epoch_4.pth", "x.pth")
    succeed("train.py", "--resume", "x.pth", "--steps", 18, "--out-dir", "a")
    succeed("train.py", "--resume", "--epochs", 5, "--out-dir", "a")
    assert [(bar.total, bar.initial, bar.n, bar.desc) for bar in bars] == [
        (64, 0, 32, "epoch 5"),
        (64, 32, 64, "epoch 5"),
    ]


# --------------------------------------------------------------------------------------------------
# Flags


def test_flags_reach_what_they_are_about(monkeypatch, cheap):
    """Every flag at once, none at its default: the network, the diffusion, the trainer, the
    batches, the checkpoint."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    made, loaded, served = (
        spy(monkeypatch, train, name) for name in ("Trainer", "load_dataset", "batches")
    )
    flags = """--steps 2 --batch-size 8 --timesteps 12 --transition absorbing --schedule cosine
        --loss hybrid --hybrid-weight 0.5 --levels 4 --conditional --label-dropout 0.3
        --optimizer muon --lr 0.003 --decay cosine --channels 8 16 24 --blocks 2 --dropout 0.2
        --data offline --data-root nowhere --limit 40 --seed 5 --device cpu --compile --amp
        --validate-every 3 --reverse joint --output logistic --network unet --out-dir here"""
    succeed("train.py", *flags.split())
    ((diffusion, total), options) = made[0]
    assert total == 2
    assert options.pop("processes") == trainer.Processes()
    assert options == {
        "batch_size": 8,
        "lr": 0.003,
        "optimizer": "muon",
        "decay": "cosine",
        "label_dropout": 0.3,
        "seed": 5,
        "amp": True,
        "compiled": True,
    }
    assert diffusion.config == {
        "num_levels": 4,
        "timesteps": 12,
        "image_shape": (1, 32, 32),
        "loss_type": "hybrid",
        "hybrid_weight": 0.5,
        "reverse": "joint",
        "transition": "absorbing",
        "schedule": "cosine",
    }
    assert diffusion.model.config == {
        "name": "unet",
        "num_levels": 4,
        "num_states": 5,
        "channels": [8, 16, 24],
        "blocks": 2,
        "num_labels": 10,
        "output": "logistic",
        "ordinal": True,
        "dropout": 0.2,
    }
    assert [args for args, _ in loaded] == [
        ("train", "offline", Path("nowhere")),
        ("validation", "offline", Path("nowhere")),
    ]
    digits, *rest = served[-1][0]
    assert rest == [8, 5, 0, 0, 4, "threshold"]
    everything = load_dataset("train", "offline")
    assert torch.equal(digits.images, take(everything, 40).images)
    assert torch.equal(digits.labels, take(everything, 40).labels)
    settings = checkpoint_of("here")["settings"]
    assert settings.pop("epochs") == 50
    assert settings == {
        "steps": 2,
        "batch_size": 8,
        "timesteps": 12,
        "transition": "absorbing",
        "schedule": "cosine",
        "loss": "hybrid",
        "hybrid_weight": 0.5,
        "reverse": "joint",
        "output": "logistic",
        "levels": 4,
        "binarize": "threshold",
        "conditional": True,
        "label_dropout": 0.3,
        "optimizer": "muon",
        "lr": 0.003,
        "decay": "cosine",
        "channels": [8, 16, 24],
        "blocks": 2,
        "dropout": 0.2,
        "data": "offline",
        "network": "unet",
        "data_root": "nowhere",
        "limit": 40,
        "seed": 5,
        "device": "cpu",
        "compile": True,
        "amp": True,
        "validate_every": 3,
        "out_dir": "here",
    }


def test_defaults(monkeypatch, cheap):
    """Without flags: README's run."""
    made = spy(monkeypatch, train, "Trainer")
    monkeypatch.setattr(train.Run, "train", lambda self, stop: False)
    out = succeed("train.py", "--data", "offline")
    assert f"python sample.py {Path('results_d3pm/checkpoints/weights.pth')}" in out
    ((diffusion, total), options) = made[0]
    assert total == 50 * (4500 // 128)
    options.pop("processes")
    assert options == {
        "batch_size": 128,
        "lr": 2e-3,
        "optimizer": "muon",
        "decay": "late",
        "label_dropout": 0.1,
        "seed": 0,
        "amp": False,
        "compiled": False,
    }
    assert diffusion.config == {
        "num_levels": 2,
        "timesteps": 200,
        "image_shape": (1, 32, 32),
        "loss_type": "cross_entropy",
        "hybrid_weight": 0.001,
        "reverse": "mixture",
        "transition": "uniform",
        "schedule": "cosine",
    }
    assert diffusion.model.config == {
        "name": "unet",
        "num_levels": 2,
        "num_states": 2,
        "channels": [24, 64, 96],
        "blocks": 1,
        "num_labels": 0,
        "output": "softmax",
        "ordinal": False,
        "dropout": 0.0,
    }


def fake_mnist(split, data="auto", data_root="data") -> Dataset:
    """Splits that can be told apart: all pixels of a split have one grey level."""
    grey = {"train": 10, "validation": 130, "test": 140}[split]
    return Dataset(
        torch.full((32, 1, 32, 32), grey, dtype=torch.uint8), torch.arange(32) % 10, "mnist"
    )


def test_a_recipe_is_several_flags(monkeypatch, cheap, my_run):
    """Those beside it win; a run that goes on with one was begun with it."""
    made = spy(monkeypatch, train, "Trainer")
    monkeypatch.setattr(train.Run, "train", lambda self, stop: False)
    succeed("train.py", "--data", "offline", "--recipe", "released", "--channels", 8, 8, 8)
    ((diffusion, _), options) = made[0]
    assert (options["lr"], options["optimizer"], options["batch_size"]) == (1e-3, "muon", 128)
    assert (diffusion.loss_type, diffusion.timesteps, diffusion.model.config["channels"]) == (
        "variational",
        1000,
        [8] * 3,
    )
    assert "disagrees with the run to resume" in fail(
        "train.py", "--resume", "--recipe", "released", "--out-dir", my_run
    )


def test_the_recipe_is_that_of_what_is_released():
    released = load_checkpoint(RELEASED)
    channels = " ".join(map(str, released.model.config["channels"]))
    assert f"--timesteps {released.timesteps} --channels {channels}" in train.RECIPES["bound"]


def test_on_mnist_the_rate_is_another(monkeypatch, cheap):
    """And validation digits come from where the training digits were found."""
    monkeypatch.setattr(train, "load_dataset", fake_mnist)
    made, loaded = spy(monkeypatch, train, "Trainer"), spy(monkeypatch, train, "load_dataset")
    succeed("train.py", *STEP, "--limit", 16, "--data", "auto")
    assert made[0][1]["lr"] == 1e-4 and checkpoint_of("out")["data"] == "mnist"
    assert [args for args, _ in loaded] == [
        ("train", "auto", Path("data")),
        ("validation", "mnist", Path("data")),
    ]


def test_a_run_stays_with_its_digits(monkeypatch, my_run):
    monkeypatch.setattr(train, "load_dataset", fake_mnist)
    line = fail("train.py", "--resume", "--epochs", 6, "--data", "mnist", "--out-dir", my_run)
    assert "trained on offline digits, but these are mnist digits" in line


@pytest.mark.parametrize(
    "protocol, levels", [("threshold", 2), ("dynamic", 2), ("threshold", 32), ("threshold", 33)]
)
def test_validation_is_on_validation_digits(protocol, levels, monkeypatch, cheap):
    """As levels, drawn once where they are drawn at random; and training batches are drawn by the
    same protocol. Of
    many levels, where each takes long, only 200."""
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: seen.append(x_0) or 1.0)
    served, seen = spy(monkeypatch, train, "batches"), []
    succeed(
        "train.py",
        *TRAIN,
        "--epochs",
        2,
        "--binarize",
        protocol,
        "--levels",
        levels,
        "--out-dir",
        "out",
    )
    grey = take(load_dataset("validation", "offline"), 200 if levels > 32 else 500).images
    expected = to_levels(grey, levels, protocol, torch.Generator().manual_seed(0))
    assert len(seen) == 2 and all(torch.equal(x_0, expected) for x_0 in seen)
    assert served[-1][0][-1] == protocol
    assert checkpoint_of("out")["binarize"] == protocol


@pytest.mark.parametrize(
    "arguments, states, levels",
    [
        ("--transition absorbing", 3, 2),
        ("--transition absorbing --levels 4 --loss variational --schedule cosine", 5, 4),
        ("--transition gaussian --levels 4 --timesteps 20", 4, 4),
        ("--loss variational --binarize dynamic --blocks 2", 2, 2),
    ],
)
def test_design_choices_end_to_end(arguments, states, levels):
    """One short epoch and its sheet, then digits and an animation from nothing but the
    checkpoint."""
    succeed("train.py", *TRAIN, *arguments.split(), "--epochs", 1, "--out-dir", "out")
    d = load_checkpoint("out/checkpoints/weights.pth")
    assert (d.num_states, d.num_levels) == (states, levels)
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        samples = load_checkpoint("out/checkpoints/last.pth").sample(64, last_step="mode")
        assert np.array_equal(picture, image_grid(samples, levels, columns=8))
    succeed(
        "sample.py",
        "out/checkpoints/weights.pth",
        "--n",
        2,
        "--out",
        "a.png",
        "--save-tensor",
        "a.pt",
    )
    assert torch.load("a.pt").max() < levels
    with Image.open("a.png") as picture:
        grey = set(np.linspace(0, 255, levels).round().astype(int))
        assert set(np.unique(picture)) <= grey | {96}
    succeed("visualize_denoising.py", "out/checkpoints/last.pth", "--n", 2, "--out", "a.gif")


def test_conditional_run(monkeypatch):
    """The network is told the labels, except one in ten; the sheet has each class in turn, in 30
    timesteps."""
    told, loss = [], DiscreteDiffusion.loss

    def watched(self, x_0, t, u, y):
        told.append(y)
        return loss(self, x_0, t, u, y)

    monkeypatch.setattr(DiscreteDiffusion, "loss", watched)
    succeed(
        "train.py",
        *TRAIN,
        "--limit",
        320,
        "--timesteps",
        60,
        "--conditional",
        "--epochs",
        1,
        "--out-dir",
        "out",
    )
    told = torch.cat(told)
    assert len(told) == 320 and set(told.tolist()) == set(range(-1, 10))
    assert 0.04 < (told == -1).double().mean() < 0.17
    d = load_checkpoint("out/checkpoints/last.pth", timesteps=30)
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        row = d.sample(8, y=d.labels(8), last_step="mode")
        row = np.asarray(image_grid(row, columns=8))[:-4]  # less the border below
        assert np.array_equal(np.asarray(picture)[: len(row)], row)


def test_seed_of_the_weights(monkeypatch, cheap):
    made = spy(monkeypatch, train, "Trainer")
    monkeypatch.setattr(train.Run, "train", lambda self, stop: False)
    for seed in (0, 1, 0):
        succeed("train.py", *STEP, "--seed", seed)
    a, b, c = (args[0].model.fold.weight for args, _ in made)
    assert torch.equal(a, c) and not torch.equal(a, b)


def test_seed_of_the_sheet(monkeypatch, cheap):
    drawn = spy(monkeypatch, DiscreteDiffusion, "sample")
    succeed("train.py", *STEP, "--seed", 3)
    ((_, n, seed), _) = drawn[0]
    assert (n, seed) == (64, 3)


# --------------------------------------------------------------------------------------------------
# Other weights to start from


@pytest.mark.parametrize("name", ["last", "weights"])
def test_init_starts_from_averaged_weights(name, run, monkeypatch, cheap):
    """A fresh run: step 0, no history, the average starts there, too; and it may be another seed,
    rate or schedule."""
    made = []

    class Watched(Trainer):
        def __init__(self, diffusion, *args, **kwargs):
            super().__init__(diffusion, *args, **kwargs)
            made.append(({k: v.clone() for k, v in self.network.state_dict().items()}, self.steps))

    monkeypatch.setattr(train, "Trainer", Watched)
    path = run / "checkpoints" / f"{name}.pth"
    flags = "--seed 9 --transition uniform --schedule linear --dropout 0.1"
    succeed("train.py", *STEP, "--init", path, *flags.split())
    weights, steps = made[0]
    assert (
        steps == 0
        and checkpoint_of("out")["step"] == 1
        and len(checkpoint_of("out")["history"]) == 1
    )
    for key, weight in read_checkpoint(path)["averaged_weights"].items():
        assert torch.equal(weights[key], weight.float())
    assert checkpoint_of("out")["network"]["dropout"] == 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_weights_made_on_a_gpu_load_anywhere(fresh_directory):
    succeed("train.py", *STEP, "--device", "cuda")
    weights = torch.load("out/checkpoints/weights.pth", weights_only=True)["averaged_weights"]
    assert {w.device.type for w in weights.values()} == {"cpu"}


def test_conditional_run_starts_from_a_network_without_classes(run):
    """Which it is at first, whatever the class; the other way round is an error."""
    path = run / "checkpoints" / "weights.pth"
    old, (_, free, fixed) = load_checkpoint(path), train.make_parser()
    settings = free | fixed | {"timesteps": 10, "channels": [8, 8, 8]}
    new = train.build(settings | {"conditional": True}, path).eval()
    x_t, t, y = (
        torch.randint(2, (4, 1, 32, 32)),
        torch.tensor([1, 4, 9, 10]),
        torch.tensor([-1, 0, 5, 9]),
    )
    assert torch.equal(new.x_0_logits(x_t, t, y), old.x_0_logits(x_t, t)) and new.num_labels == 10
    succeed("train.py", *STEP, "--conditional", "--init", path)
    line = fail("train.py", *STEP, "--out-dir", "other", "--init", "out/checkpoints/last.pth")
    assert "another network, by its num_labels" in line


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--channels 8 8 16", "channels"),
        ("--conditional --blocks 2", "blocks, num_labels"),
        ("--levels 4", "num_levels, num_states"),
        ("--transition absorbing", "num_states"),
        ("--blocks 2", "blocks"),
    ],
)
def test_init_of_another_network(flags, word, run):
    line = fail("train.py", *STEP, "--init", run / "checkpoints" / "last.pth", *flags.split())
    assert "another network" in line and f"by its {word}" in line


# --------------------------------------------------------------------------------------------------
# Stopping and going on


def test_interrupted_and_resumed_run_equals_the_straight_one(run, tmp_path):
    """Ctrl-C saves, says how to go on and exits with 130; --resume then ends in bit-identical
    weights."""
    process = start(
        "train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut", cwd=tmp_path
    )  # a real process, end to end
    for line in process.stdout:  # which comes when it is written, though nobody sits at a terminal
        if line.startswith("epoch   2/4"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=300)
    last = Path("cut") / "checkpoints" / "last.pth"
    if process.returncode == 130:  # else it was faster than the signal
        (message,) = err.splitlines()
        assert "SIGINT" in message and "--resume" in message and str(last) in message
        assert 8 <= read_checkpoint(last)["step"] < 16
        out = succeed(
            "train.py", "--resume", "--out-dir", "cut"
        )  # everything else comes from the checkpoint
        assert f"Resuming {last}" in out
    else:
        assert process.returncode == 0, err
    assert same_weights(last, run / "checkpoints" / "last.pth")
    assert same_history("cut", run)
    pictures = [folder / "samples" / "sample_epoch_4.png" for folder in (last.parent.parent, run)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize(
    "number, at",
    [
        (signal.SIGTERM, 5),
        (signal.SIGINT, 2),
        (signal.SIGHUP, 7),
        (signal.SIGTERM, 11),
        (signal.SIGTERM, 12),
    ],
)
def test_stop_anywhere_loses_nothing(number, at, run, monkeypatch, cheap):
    """In the middle of an epoch, at its end, and where the decay starts: the step ends and is
    saved; resuming is exact.

    The exit code is 128 and the signal's number. The history has one row an epoch.
    """
    with monkeypatch.context() as patch:
        signal_at_step(patch, at, number)
        code, _, err = call("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut")
    assert code == 128 + number
    (line,) = err.splitlines()
    last = Path("cut") / "checkpoints" / "last.pth"
    assert (
        line == f"Stopped by {number.name} after step {at + 1} of 16, "
        f"saved in {last}; go on with --resume"
    )
    assert checkpoint_of("cut")["step"] == at + 1
    assert len(read_metrics("cut")) if at >= 3 else not Path("cut/metrics.csv").exists()
    assert checkpoint_of("cut")["history"] == checkpoint_of("cut")["history"][: (at + 1) // 4]
    assert Path("cut/checkpoints/constant.pth").exists() == (at >= 11)
    succeed("train.py", "--resume", "--out-dir", "cut")
    assert same_weights(last, run / "checkpoints" / "last.pth")
    assert same_weights("cut/checkpoints/constant.pth", run / "checkpoints" / "constant.pth")
    assert same_history("cut", run, but_for=["validation_bound"])
    assert checkpoint_of("cut")["loss_sum"] == checkpoint_of(run)["loss_sum"]


def test_stop_where_the_decay_starts_within_an_epoch(monkeypatch, cheap):
    """That step makes constant.pth and last.pth."""
    succeed("train.py", *TRAIN, "--steps", 10, "--out-dir", "straight")  # constant until 7
    with monkeypatch.context() as patch:
        signal_at_step(patch, 6, signal.SIGTERM)
        assert call("train.py", *TRAIN, "--steps", 10, "--out-dir", "cut")[0] == 143
    assert checkpoint_of("cut")["step"] == checkpoint_of("cut", "constant")["step"] == 7
    steps = spy(monkeypatch, Trainer, "step")
    succeed("train.py", "--resume", "--out-dir", "cut")
    assert len(steps) == 3  # none is done again
    assert same_weights("cut/checkpoints/last.pth", "straight/checkpoints/last.pth")
    assert same_history("cut", "straight")


def test_stop_at_the_last_step_is_the_end(monkeypatch, cheap):
    signal_at_step(monkeypatch, 3, signal.SIGTERM)
    out = succeed("train.py", *TRAIN, "--epochs", 1, "--out-dir", "out")
    assert "Done" in out and Path("out/checkpoints/weights.pth").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer muon",
        "--decay cosine --conditional --binarize dynamic",
        "--amp --loss variational",
    ],
)
def test_other_runs_go_on_bit_for_bit(flags, monkeypatch, cheap):
    """Muon's momentum, hidden labels and random binarizations come back, too."""
    flags = *TRAIN, *flags.split(), "--epochs", 2
    succeed("train.py", *flags, "--out-dir", "straight")
    with monkeypatch.context() as patch:
        signal_at_step(patch, 5, signal.SIGTERM)
        call("train.py", *flags, "--out-dir", "cut")
    succeed("train.py", "--resume", "--out-dir", "cut")
    assert same_weights("cut/checkpoints/last.pth", "straight/checkpoints/last.pth")
    assert same_history("cut", "straight")


def test_second_ctrl_c_stops_at_once(monkeypatch):
    """Exit code 130 without a traceback and without waiting for the step or a save."""
    signal_at_step(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    code, _, err = call("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut")
    assert code == 130
    assert "Traceback" not in err
    assert not list(Path().rglob("*.pth"))


def test_finished_run_goes_on_from_where_the_rate_was_constant(my_run, cheap, monkeypatch):
    """More epochs give, bit for bit, what a run planned longer from the start would have given; no
    row is there twice.

    That is, if both warm up alike: in runs of less than a thousand steps the warm-up depends on
    their number.
    """
    monkeypatch.setattr(trainer, "WARMUP_STEPS", 1)  # what 16 steps have anyway
    leftover = my_run / "checkpoints" / ".last.pth.a1b2c3d4"  # of a save that was killed
    leftover.write_bytes(b"half a checkpoint")
    old = read_metrics(my_run)
    out = succeed("train.py", "--resume", "--epochs", 6, "--out-dir", my_run)
    assert f"Resuming {my_run / 'checkpoints' / 'constant.pth'} at step 12" in out
    succeed("train.py", *TRAIN, "--epochs", 6, "--out-dir", "longer")
    assert same_weights(my_run / "checkpoints" / "last.pth", "longer/checkpoints/last.pth")
    assert same_weights(my_run / "checkpoints" / "constant.pth", "longer/checkpoints/constant.pth")
    rows = read_metrics(my_run)
    assert rows[:3] == old[:3] and [row["epoch"] for row in rows] == list("123456")
    assert [row["lr"] for row in rows] == [row["lr"] for row in read_metrics("longer")]
    assert files(my_run / "checkpoints") == {
        "last.pth",
        "constant.pth",
        "weights.pth",
        *(f"model_epoch_{n}.pth" for n in (4, 5, 6)),
    }
    assert files(my_run / "samples") == {f"sample_epoch_{n}.png" for n in (4, 5, 6)}


def test_which_checkpoint_a_longer_run_goes_on_from(monkeypatch, my_run, cheap):
    """constant.pth only where the newest is past it and there is to be more than was planned."""
    rows = []
    monkeypatch.setattr(
        train.Run,
        "train",
        lambda self, stop: rows.append([r["step"] for r in self.history]) or False,
    )

    def resumed(*flags):
        (line,) = [
            x
            for x in succeed("train.py", "--resume", *flags).splitlines()
            if x.startswith("Resuming")
        ]
        return Path(line.split()[1]).name, int(line.split()[-1])

    folder = my_run / "checkpoints"
    assert resumed("--steps", 17, "--out-dir", my_run) == ("constant.pth", 12)
    assert rows == [[4, 8, 12]]  # what came after is no longer so
    assert resumed(folder / "last.pth", "--epochs", 6, "--out-dir", my_run)[0] == "constant.pth"
    shutil.move(folder / "constant.pth", "constant.pth")
    assert resumed("--epochs", 6, "--out-dir", my_run) == (
        "last.pth",
        16,
    )  # a run from before there was one
    shutil.copy("constant.pth", folder / "last.pth")
    shutil.move("constant.pth", folder / "constant.pth")
    assert resumed("--epochs", 6, "--out-dir", my_run) == (
        "last.pth",
        12,
    )  # the same, and it may hold more
    assert resumed("--epochs", 4, "--out-dir", my_run) == ("last.pth", 12)
    assert resumed("--out-dir", my_run) == ("last.pth", 12)
    save_checkpoint(folder / "last.pth", checkpoint_of(my_run) | {"step": 14})
    assert resumed("--epochs", 4, "--out-dir", my_run) == (
        "last.pth",
        14,
    )  # the decay goes on as it was planned
    assert resumed("--epochs", 5, "--out-dir", my_run) == ("constant.pth", 12)


def test_branch_within_an_epoch_that_decays(monkeypatch, cheap):
    """The decay starts in the middle of an epoch: its losses before and after the branch make one
    row."""
    monkeypatch.setattr(trainer, "WARMUP_STEPS", 1)
    succeed("train.py", *TRAIN, "--steps", 10, "--out-dir", "out")  # constant until 7
    assert checkpoint_of("out", "constant")["step"] == 7
    assert [row["step"] for row in checkpoint_of("out")["history"]] == [4, 8, 10]
    succeed("train.py", "--resume", "--epochs", 3, "--out-dir", "out")
    succeed("train.py", *TRAIN, "--epochs", 3, "--out-dir", "longer")
    assert same_weights("out/checkpoints/last.pth", "longer/checkpoints/last.pth")
    assert same_history("out", "longer")


def test_steps_in_place_of_epochs(cheap):
    """A run ends where it should, in the middle of an epoch, with all that a run leaves; more
    steps, no second row."""
    succeed("train.py", *TRAIN, "--steps", 6, "--decay", "cosine", "--out-dir", "out")
    assert (
        checkpoint_of("out", "model_epoch_2")["step"] == 6
        and Path("out/samples/sample_epoch_2.png").exists()
    )
    assert [(row["epoch"], row["step"]) for row in read_metrics("out")] == [("1", "4"), ("2", "6")]
    assert checkpoint_of("out")["history"][1]["train_loss"] == pytest.approx(
        checkpoint_of("out")["loss_sum"] / 2
    )
    assert "all its 6 steps" in fail("train.py", "--resume", "--steps", 6, "--out-dir", "out")
    assert "all its 6 steps" in fail("train.py", "--resume", "--out-dir", "out")
    succeed("train.py", "--resume", "--epochs", 2, "--out-dir", "out")
    assert checkpoint_of("out")["step"] == 8 and checkpoint_of("out")["settings"]["steps"] is None
    assert [(row["epoch"], row["step"]) for row in read_metrics("out")] == [("1", "4"), ("2", "8")]
    assert checkpoint_of("out")["history"][1]["train_loss"] == pytest.approx(
        checkpoint_of("out")["loss_sum"] / 4
    )


@pytest.mark.parametrize("decay", ["late", "cosine", "constant"])
def test_a_rate_that_rises_again_is_said(decay, cheap):
    """Where a longer run can't go on from before the decay: there is no constant.pth."""
    succeed("train.py", *TRAIN, "--decay", decay, "--epochs", 4, "--out-dir", "out")
    Path("out/checkpoints/constant.pth").unlink(missing_ok=True)
    last = Path("out/checkpoints/last.pth")
    out = succeed("train.py", "--resume", last, "--epochs", 6, "--out-dir", "out")
    first, then = (trainer.learning_rate(2e-3, *at, decay) for at in ((15, 16), (16, 24)))
    said = f"The learning rate rises again, from {first:.3g} to {then:.3g}"
    assert (said in out.splitlines()) == (decay != "constant")
    assert ("rises" in out) == (decay != "constant")


def test_a_longer_run_says_nothing_where_the_rate_stays(my_run, cheap):
    last = my_run / "checkpoints" / "last.pth"
    out = succeed("train.py", "--resume", last, "--epochs", 6, "--out-dir", my_run)
    assert "constant.pth at step 12" in out and "rises" not in out


def test_constant_of_another_run_is_not_used(my_run, cheap):
    """It is the named checkpoint's only if its history is the beginning of the checkpoint's."""
    constant = my_run / "checkpoints" / "constant.pth"
    other = read_checkpoint(constant)
    other["history"][0]["seconds"] += 1
    save_checkpoint(constant, other)
    out = succeed("train.py", "--resume", "--epochs", 6, "--out-dir", my_run)
    assert "last.pth at step 16" in out and "rises again" in out


def test_last_checkpoint_on_another_disk(my_run, cheap):
    """A link in the run's folder is the run's own, by either name."""
    last = my_run / "checkpoints" / "last.pth"
    disk = Path("disk.pth").resolve()
    shutil.move(last, disk)
    last.symlink_to(disk)
    for source, epochs in ((last, 5), (disk, 6)):
        succeed("train.py", "--resume", source, "--epochs", epochs, "--out-dir", my_run)
    assert last.is_symlink() and read_checkpoint(disk)["step"] == 24


def test_no_time_is_lost_when_a_run_stops(monkeypatch, cheap):
    """The seconds before a stop count in the row that comes after it."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: clock.now, now=0.0)
    monkeypatch.setattr(train, "time", clock)
    step = Trainer.step

    def timed(self, *given):
        clock.now += 10
        return step(self, *given)

    monkeypatch.setattr(Trainer, "step", timed)
    flags = *TRAIN, "--validate-every", 2, "--epochs", 2, "--out-dir", "out"
    for command in (flags, ["--resume", "--out-dir", "out"]):  # within the epoch, and at its end
        with monkeypatch.context() as patch:
            signal_at_step(patch, 1, signal.SIGTERM)
            assert call("train.py", *command)[0] == 128 + signal.SIGTERM
        clock.now += 1000  # nobody trains
    succeed("train.py", "--resume", "--out-dir", "out")
    (row,) = checkpoint_of("out")["history"]
    assert (row["seconds"], row["images_per_second"]) == (80, 128 / 80)


def test_time_of_a_row_that_is_made_anew(monkeypatch, cheap):
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: clock.now, now=0.0)
    monkeypatch.setattr(train, "time", clock)
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda *given: setattr(clock, "now", clock.now + 10) or step(*given)
    )
    flags = *TRAIN, "--decay", "constant"
    succeed("train.py", *flags, "--steps", 6, "--out-dir", "out")
    succeed("train.py", "--resume", "--steps", 8, "--out-dir", "out")
    rows = checkpoint_of("out")["history"]
    assert [(row["step"], row["seconds"]) for row in rows] == [(4, 40), (8, 40)]
    assert [row["images_per_second"] for row in rows] == [1.6, 1.6]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number, monkeypatch, cheap):
    """As SIGHUP is under nohup. `call` puts the handlers back."""
    signal_at_step(monkeypatch, 1, number)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert call("train.py", *TRAIN, "--epochs", 1, "--out-dir", "out")[0] == 0
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("part", ["plot_history", "save_figure", "image_grid"])
def test_a_picture_never_ends_a_run(part, monkeypatch):
    """Whatever its settings do to it: a warning of one line, after numbers and checkpoints."""
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: 1.0)

    def broken(*_, **__):
        assert len(read_metrics("out")) == 1 and Path("out/checkpoints/weights.pth").exists()
        raise RuntimeError("latex\ncould not be found")

    monkeypatch.setattr(train, part, broken)
    code, out, err = call("train.py", *TRAIN, "--epochs", 1, "--out-dir", "out")
    name = "samples/sample_epoch_1.png" if part == "image_grid" else "loss_curve.png"
    assert err == f"warning: {name} could not be written: latex could not be found\n"
    assert code == 0 and "Done" in out


@pytest.mark.parametrize("settings", ["MPLBACKEND", "usetex"])
def test_figure_settings_of_the_user(settings, monkeypatch, cheap):
    """Of a notebook's shell or a matplotlibrc."""
    import matplotlib

    if settings == "usetex":
        monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    else:
        monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert call("train.py", *TRAIN, "--epochs", 1, "--out-dir", "out")[0] == 0


def test_printed_commands_can_be_pasted(cheap):
    out = succeed("train.py", *TRAIN, "--steps", 1, "--out-dir", "my runs")
    assert "python sample.py 'my runs/checkpoints/weights.pth'" in out


def test_network_of_your_own(monkeypatch, cheap):
    """One class and one entry in NETWORKS: it trains, starts another run, goes on and loads."""

    class Plain(torch.nn.Module):
        def __init__(self, num_levels, num_states):
            super().__init__()
            self.config = {"name": "plain", "num_levels": num_levels, "num_states": num_states}
            self.layer = torch.nn.Conv2d(1, num_levels, 3, padding=1)

        def forward(self, x_t, t):
            return self.layer(x_t.float())

        def hidden_matrices(self):
            return [self.layer.weight]

    monkeypatch.setitem(model.NETWORKS, "plain", Plain)
    flags = "--data offline --limit 64 --batch-size 16 --timesteps 10 --device cpu --network plain"
    flags = flags.split()
    succeed("train.py", *flags, "--steps", 2, "--out-dir", "out")
    succeed("train.py", "--resume", "--steps", 3, "--out-dir", "out")
    assert checkpoint_of("out")["settings"]["blocks"] is None
    last = "out/checkpoints/last.pth"
    succeed("train.py", *flags, "--steps", 1, "--init", last, "--out-dir", "other")
    assert type(load_checkpoint(last).model) is Plain
    line = fail("train.py", *TRAIN, "--steps", 1, "--init", last, "--out-dir", "third")
    assert "another network, by its name" in line


def test_recipe_of_the_paper(monkeypatch, cheap):
    """The joint form, hybrid loss, Adam without decay of weights or rate; no mode at the end."""
    made, drawn = spy(monkeypatch, train, "Trainer"), spy(monkeypatch, DiscreteDiffusion, "sample")
    flags = "--recipe paper --batch-size 16 --timesteps 10"
    succeed("train.py", *TRAIN, *flags.split(), "--steps", 1, "--out-dir", "out")
    ((diffusion, _), options) = made[0]
    assert (diffusion.reverse, diffusion.loss_type, diffusion.hybrid_weight) == (
        "joint",
        "hybrid",
        0.001,
    )
    assert [options[name] for name in ("optimizer", "lr", "decay")] == ["adam", 2e-4, "constant"]
    assert diffusion.model.config["dropout"] == 0.1
    assert drawn[0][1]["last_step"] == "draw"
    args = train.parse_arguments
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "paper"])
    assert (args()[0].timesteps, args()[0].batch_size) == (1000, 128)


def test_old_name_of_a_recipe(monkeypatch):
    given = []
    for name in ("released", "bound"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", name])
        given.append(train.parse_arguments()[0])
    assert given[0] == given[1] and given[0].recipe == "bound"


def test_validation_is_the_same_whatever_the_seed(monkeypatch, cheap):
    seen = []
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: seen.append(x_0) or 1.0)
    for seed in (0, 1):
        flags = "--binarize", "dynamic", "--seed", seed, "--out-dir", seed
        succeed("train.py", *TRAIN, "--steps", 1, *flags)
    assert torch.equal(*seen)


def test_the_default_rate_is_that_of_the_digits_in_use(monkeypatch, cheap):
    """A fallback to the offline digits is trained at their rate."""
    monkeypatch.setattr(train, "load_dataset", lambda split, *_: load_dataset(split, "offline"))
    made = spy(monkeypatch, train, "Trainer")
    succeed("train.py", *TRAIN, "--steps", 1, "--data", "auto", "--out-dir", "out")
    assert made[0][1]["lr"] == 2e-3


def test_help_states_every_default(capsys):
    with pytest.raises(SystemExit):
        train.make_parser()[0].parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    _, free, fixed = train.make_parser()
    for name, value in (free | fixed).items():
        flag = "--" + name.replace("_", "-")
        assert flag in text
        if value and name not in ("data", "device", "data_root"):
            assert f"(default {value})" in text, name


def test_finished_run_has_nothing_to_resume(my_run):
    """One line that names --epochs; flags that repeat the saved settings are no other error."""
    line = fail("train.py", *TRAIN, "--lr", 0.002, "--resume", "--out-dir", my_run)
    assert "16 steps" in line and "--epochs" in line


@pytest.mark.parametrize(
    "flag, given, saved",
    [
        ("--lr", "0.1", "0.002"),
        ("--batch-size", "32", "16"),
        ("--timesteps", "20", "10"),
        ("--seed", "1", "0"),
        ("--channels", "16 16 16", "[8, 8, 8]"),
        ("--decay", "cosine", "late"),
        ("--schedule", "linear", "cosine"),
        ("--limit", "32", "64"),
        ("--conditional", "", "False"),
    ],
)
def test_resume_with_disagreeing_settings_is_an_error(flag, given, saved, my_run):
    """It names the flag and both values."""
    line = fail("train.py", "--resume", "--epochs", 6, "--out-dir", my_run, flag, *given.split())
    assert (
        flag in line and given.replace(" ", ", ") in line and line.endswith(f"to resume: {saved}")
    )


def test_what_may_differ_on_resume(my_run, cheap, monkeypatch):
    """Place, machine and length; the settings of the checkpoint are then the new ones, the default
    place among them."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    shutil.move(my_run, "results_d3pm")
    flags = "--epochs 5 --data auto --data-root elsewhere --device cpu --compile --amp "
    flags += "--validate-every 2"
    monkeypatch.setattr(train, "load_dataset", lambda split, *_: load_dataset(split, "offline"))
    succeed("train.py", "--resume", *flags.split())
    settings = checkpoint_of("results_d3pm")["settings"]
    assert (settings["data"], settings["data_root"], settings["out_dir"]) == (
        "auto",
        "elsewhere",
        "results_d3pm",
    )
    assert settings["compile"] is True and settings["amp"] is True and settings["batch_size"] == 16


def test_without_last_the_newest_is_the_one_with_most_steps(my_run, cheap):
    """Copying a run changes the times of its files, not its order."""
    folder = my_run / "checkpoints"
    (folder / "last.pth").unlink()
    for name, age in (("constant.pth", 0), ("model_epoch_4.pth", 10)):
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert "all its 16 steps" in fail("train.py", "--resume", "--out-dir", my_run)


def test_resume_of_an_older_run_knows_what_its_settings_meant(fresh_directory, cheap):
    """A run from before there was --optimizer was AdamW's, one from before --decay a cosine's; with
    its levels' old
    name and no steps per epoch it goes on."""
    my_run = Path("run")
    succeed("train.py", *TRAIN, "--optimizer", "adamw", "--epochs", 4, "--out-dir", my_run)
    last = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(last)
    for name in ("optimizer", "decay", "blocks", "dropout"):
        del checkpoint["settings"][name]
    for name in ("steps_per_epoch", "total_steps"):
        del checkpoint[name]
    del (
        checkpoint["network"]["blocks"],
        checkpoint["network"]["dropout"],
        checkpoint["diffusion"]["image_shape"],
    )
    checkpoint["settings"]["network"] = "unet"
    checkpoint["diffusion"]["num_classes"] = checkpoint["diffusion"].pop("num_levels")
    (my_run / "checkpoints" / "constant.pth").unlink()
    save_checkpoint(last, checkpoint)
    flags = "--epochs", 5, "--out-dir", my_run
    assert "--optimizer muon disagrees" in fail(
        "train.py", "--resume", "--optimizer", "muon", *flags
    )
    assert "--decay late disagrees" in fail("train.py", "--resume", "--decay", "late", *flags)
    assert fail("train.py", "--resume", "--blocks", 2, *flags).endswith("resume: the default")
    succeed("train.py", "--resume", *flags)
    new = checkpoint_of(my_run)
    assert (
        new["step"] == 20
        and new["settings"]["decay"] == "cosine"
        and new["settings"]["network"] == "unet"
    )
    assert new["history"][-1]["lr"] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_resume_does_not_write_into_another_run(my_run):
    """A checkpoint from elsewhere may go on in an empty folder, not in one that holds a run."""
    shutil.copytree(my_run, "other")
    line = fail(
        "train.py", "--resume", "other/checkpoints/last.pth", "--epochs", 6, "--out-dir", my_run
    )
    assert "holds another run" in line


def test_resume_from_elsewhere_and_through_a_link(my_run, cheap):
    """Into an empty folder; and into its own, called by another name."""
    succeed(
        "train.py",
        "--resume",
        my_run / "checkpoints" / "last.pth",
        "--epochs",
        5,
        "--out-dir",
        "new",
    )
    assert checkpoint_of("new")["step"] == 20 and [
        row["epoch"] for row in read_metrics("new")
    ] == list("12345")
    Path("link").symlink_to(my_run)
    succeed("train.py", "--resume", "link/checkpoints/last.pth", "--epochs", 5, "--out-dir", my_run)


def test_resume_of_weights_that_do_not_fit(my_run):
    path = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(path)
    checkpoint["weights"] = {"nonsense": torch.zeros(1)}
    save_checkpoint(path, checkpoint)
    path.with_name("constant.pth").unlink()
    assert "does not fit" in fail("train.py", "--resume", path, "--epochs", 6, "--out-dir", my_run)


@pytest.mark.parametrize(
    "key", ["weights", "optimizer", "settings", "step", "loss_sum", "history", "data"]
)
def test_resume_needs_a_whole_run(key, my_run):
    """A checkpoint without the optimizer's state, say, can be drawn from, not resumed."""
    path = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(path)
    del checkpoint[key]
    save_checkpoint(path, checkpoint)
    assert "weights only" in fail("train.py", "--resume", path, "--epochs", 6, "--out-dir", my_run)


# --------------------------------------------------------------------------------------------------
# A folder has an owner


@pytest.mark.parametrize("name", ["checkpoints", "metrics.csv"])
def test_used_directory_is_refused(name, my_run):
    """A fresh run does not mix with an old one; checkpoints or metrics alone are enough to tell."""
    for path in my_run.iterdir():
        if path.name not in (name, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run)
    for word in (str(my_run), "--resume", "--out-dir", "--overwrite"):
        assert word in line


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(my_run, cheap):
    """A stranger's files stay wherever they are; linked folders stay links."""
    strange = {f"{name}notes.txt" for name in ("", "samples/", "checkpoints/")} | {
        "checkpoints/best.pth",
        "samples/a.png",
    }
    for folder in ("samples", "checkpoints"):
        shutil.move(my_run / folder, f"elsewhere_{folder}")
        (my_run / folder).symlink_to(Path(f"elsewhere_{folder}").resolve())
    for name in strange:
        (my_run / name).write_text("keep me")
    for name in ("evaluation.json", "nearest.png", "bound_terms.png"):
        (my_run / name).write_text("of the old run")
    succeed("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run, "--overwrite")
    assert (my_run / "samples").is_symlink() and (my_run / "checkpoints").is_symlink()
    written = {"last.pth", "constant.pth", "weights.pth", "model_epoch_1.pth"}
    assert (
        files(my_run) | files(Path("elsewhere_checkpoints")) | files(Path("elsewhere_samples"))
        >= written
    )
    assert {path.name for path in Path("elsewhere_checkpoints").iterdir()} == written | {
        "notes.txt",
        "best.pth",
    }
    assert {path.name for path in Path("elsewhere_samples").iterdir()} == {
        "sample_epoch_1.png",
        "notes.txt",
        "a.png",
    }
    names = {path.name for path in my_run.iterdir() if path.is_file()}
    assert names == {"metrics.csv", "loss_curve.png", "notes.txt", ".lock"}
    assert all((my_run / name).read_text() == "keep me" for name in strange)
    assert [row["epoch"] for row in read_metrics(my_run)] == ["1"]


def test_overwrite_where_there_is_no_run(cheap):
    Path("samples").mkdir()
    Path("samples/notes.txt").write_text("keep me")
    succeed("train.py", *TRAIN, "--steps", 1, "--out-dir", ".", "--overwrite")
    assert Path("samples/notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    "mistake", ["--limit 8", "--channels 7 7 7", "--data-root nowhere --data mnist"]
)
def test_overwrite_with_a_mistake_keeps_the_old_run(mistake, my_run, monkeypatch):
    monkeypatch.setattr(dataset, "load_mnist", raise_data_error)
    fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run, "--overwrite", *mistake.split())


def raise_data_error(*_):
    raise dataset.DataError("no MNIST")


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_two_runs_at_once_in_one_folder(flags, my_run):
    """The second is refused in one line, whatever it wants, and has touched nothing."""
    with filelock.FileLock(my_run / ".lock"):
        line = fail("train.py", *TRAIN, "--epochs", 6, "--out-dir", my_run, *flags)
        assert "another run is alive" in line and "--out-dir" in line


def test_a_real_run_owns_its_folder_from_its_first_second(tmp_path):
    """Before there is a checkpoint; and a killed run owns nothing."""
    process = start("train.py", *TRAIN, "--epochs", 100000, "--out-dir", "out", cwd=tmp_path)
    assert "digits for training" in process.stdout.readline()
    assert "another run is alive in out" in call("train.py", *STEP)[2]
    assert "another run is alive in out" in call("train.py", *STEP, "--overwrite")[2]
    process.kill()
    process.communicate(timeout=60)
    succeed("train.py", *STEP, "--overwrite")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(number, monkeypatch, cheap):
    """A warning, and training goes on."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    code, _, err = call("train.py", *STEP)
    assert code == 0 and "warning: out can't be locked" in err
    assert checkpoint_of("out")["step"] == 1


# --------------------------------------------------------------------------------------------------
# Saves, reports, and what may fail


@pytest.mark.parametrize("at", [1, 6])
def test_loss_that_is_not_finite(at, monkeypatch, cheap):
    """Training ends within CHECK_STEPS with one line and saves none of it; the last checkpoint
    stays."""
    monkeypatch.setattr(train, "CHECK_STEPS", 2)
    calls, loss = [], DiscreteDiffusion.loss

    def diverging(self, *args):
        calls.append(1)
        return loss(self, *args) * (math.nan if len(calls) == at else 1)

    monkeypatch.setattr(DiscreteDiffusion, "loss", diverging)
    code, _, err = call("train.py", *TRAIN, "--epochs", 3, "--out-dir", "out")
    assert code == 1 and len(calls) == at + at % 2
    (line,) = err.splitlines()
    assert line.startswith(
        f"train.py: error: the loss is not finite before step {at + at % 2}: try a smaller --lr"
    )
    assert not Path("out/checkpoints").exists() if at == 1 else checkpoint_of("out")["step"] == 4


def test_loss_is_looked_at_before_a_stop_is_saved(monkeypatch, cheap):
    signal_at_step(monkeypatch, 1, signal.SIGTERM)
    monkeypatch.setattr(
        DiscreteDiffusion, "loss", lambda *args, loss=DiscreteDiffusion.loss: loss(*args) * math.nan
    )
    assert call("train.py", *TRAIN, "--epochs", 3, "--out-dir", "out")[0] == 1
    assert not Path("out/checkpoints").exists()


def test_losses_are_looked_at_often():
    assert train.CHECK_STEPS == 20  # a network of NaN wastes so many steps


def raise_no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_ends_training_with_one_line(monkeypatch, my_run, cheap):
    """A failing save is an error message, and the last good checkpoint is still there to resume."""
    before = snapshot(my_run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raise_no_space)
        code, _, err = call("train.py", "--resume", "--epochs", 5, "--out-dir", my_run)
    assert code == 1 and "Traceback" not in err
    assert "No space left" in err.splitlines()[-1] and "train.py: error" in err.splitlines()[-1]
    assert snapshot(my_run) == before


def test_reports_that_cannot_be_written_are_a_warning(cheap):
    """Metrics, curve and sheet: training goes on, and all checkpoints are there."""
    for name in ("metrics.csv", "loss_curve.png", "samples/sample_epoch_2.png"):
        (Path("out") / name).mkdir(parents=True)
    code, out, err = call("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out", "--overwrite")
    assert code == 0 and "Done" in out
    warnings = err.splitlines()
    assert len(warnings) == 4  # metrics after each epoch
    for name in ("metrics.csv", "loss_curve.png", "samples/sample_epoch_2.png"):
        assert any(line.startswith(f"warning: {name} could not be written: ") for line in warnings)
    assert files(Path("out/checkpoints")) == {
        "last.pth",
        "constant.pth",
        "weights.pth",
        "model_epoch_2.pth",
    }


def test_save_comes_before_the_report(monkeypatch, cheap):
    """Whoever reads an epoch's line finds its checkpoint, and the sheet's failure costs no
    epoch."""
    seen = []

    class Out(io.StringIO):
        def write(self, text):
            if text.startswith("epoch "):
                seen.append(checkpoint_of("out")["step"])
                assert Path("out/checkpoints/weights.pth").exists() == (len(seen) == 2)
            return super().write(text)

    monkeypatch.setattr("scripts.io.StringIO", Out)
    succeed("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out")
    assert seen == [4, 8]


def test_a_reader_that_goes_away_stops_nothing(tmp_path, run):
    """`python train.py | head -1`: no message, exit code 0, every save."""
    process = start("train.py", *TRAIN, "--epochs", 4, "--out-dir", "out", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 0 and err == ""
    assert same_weights("out/checkpoints/last.pth", run / "checkpoints" / "last.pth")
    assert files(Path("out")) == files(run)


def test_stdout_that_cannot_encode_a_letter(cheap):
    """A folder with an é in its name on an ASCII terminal: a question mark, and training goes
    on."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    code, _, err = call("train.py", *TRAIN, "--epochs", 1, "--out-dir", "é", out=out)
    assert code == 0, err
    out.seek(0)
    assert "python sample.py '?" in out.read() and checkpoint_of("é")["step"] == 4


# --------------------------------------------------------------------------------------------------
# Several processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_processes_train_what_one_does(tmp_path, cheap):
    """One step: the same digits, noise and hidden labels, so the same loss up to float32's
    rounding.

    Later steps, and weights, are not compared: an optimizer divides by gradients that may be all
    rounding. One process can go on with what two began.
    """
    flags = *TRAIN, "--conditional", "--steps", 1
    command = [*TORCHRUN, REPOSITORY / "train.py", *flags, "--out-dir", "two"]
    options = {"check": True, "capture_output": True, "text": True, "timeout": 240}
    command = list(map(str, command))
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, **options)
    assert done.stdout.count("epoch   1/1") == 1 and "on cpu, 2 processes" in done.stdout
    succeed("train.py", *flags, "--out-dir", "one")
    losses = [checkpoint_of(name)["history"][0]["train_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert files(Path("one")) == files(Path("two"))
    succeed("train.py", "--resume", "--steps", 2, "--out-dir", "two")
    assert checkpoint_of("two")["step"] == 2


def gradient_of_share(rank: int, folder: Path) -> None:
    """One of two processes: one step in float64; save the inputs of the loss and the gradient."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in environment.items()}
    # A file, not a port: two tests at once must not meet.
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2
    )
    torch.save(one_float64_step(trainer.Processes.from_environment()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_float64_step(processes: trainer.Processes) -> tuple[list, list]:
    """The loss's inputs and the gradient that the optimizer is given, before clipping."""
    torch.manual_seed(0)
    network = build_network(
        {"name": "unet", "num_levels": 2, "num_states": 2, "channels": [8, 8, 8], "num_labels": 10}
    ).double()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn_like(p)
    diffusion = DiscreteDiffusion(network, timesteps=10)
    t = Trainer(diffusion, 10, 8, label_dropout=0.3, processes=processes)
    inputs, loss = [], t.diffusion.loss
    t.diffusion.loss = lambda *given: inputs.extend(given) or loss(*given)
    t.optimizer.step = lambda: None
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(2, (8, 1, 32, 32), generator=generator, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MAX_GRAD_NORM", 1e9)
        t.step(x_0, torch.arange(8))
    return inputs, [p.grad.clone() for p in network.parameters()]


def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    """In float64, of one step; the images, timesteps, noise and labels exactly, halved by rank."""
    torch.multiprocessing.spawn(gradient_of_share, (tmp_path,), nprocs=2)
    inputs, gradient = one_float64_step(trainer.Processes())
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for whole, *parts in zip(inputs, *(half[0] for half in halves), strict=True):
        assert torch.equal(torch.cat(parts), whole)
    for _, part in halves:
        for a, b in zip(part, gradient, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)
    assert sum((g != 0).any() for g in gradient) > 40


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_end_of_one_of_two_processes(number, tmp_path):
    """A killed worker ends the run with a clear message; Ctrl-C on torchrun saves first. The
    checkpoint is whole."""
    command = [
        *TORCHRUN,
        str(REPOSITORY / "train.py"),
        *TRAIN,
        "--epochs",
        "100000",
        "--out-dir",
        "two",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "epoch " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]) if number == signal.SIGKILL else process.pid, number)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert "train.py: error: process 0:" in err or "Stopped by SIGTERM" in err
    else:
        assert err.count("Stopped by SIGINT") == 1
    assert checkpoint_of("two")["step"] > 0


def test_environment_of_processes_that_is_wrong(monkeypatch):
    """A batch that can't be shared, and variables that torchrun did not set, in one line."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert "process 0: the batch of 16 can't be shared equally by 3" in fail("train.py", *TRAIN)
    monkeypatch.setenv("WORLD_SIZE", "")
    assert "torchrun sets all three" in fail("train.py", *TRAIN)


def like_processes(mean, rank=0) -> SimpleNamespace:
    """As if there were others, who are asked by `mean`."""
    return SimpleNamespace(
        rank=rank, local_rank=0, size=1, start=lambda x: x, share=lambda n: slice(0, n), mean=mean
    )


def test_only_the_first_process_speaks_and_writes(monkeypatch, cheap):
    """The others neither print nor lock nor write; all train."""
    alone = like_processes(lambda *values: list(values), rank=1)
    monkeypatch.setattr(train.Processes, "from_environment", lambda: alone)
    steps, bars = spy(monkeypatch, Trainer, "step"), spy(monkeypatch, train, "tqdm")
    assert succeed("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out") == ""
    assert len(steps) == 8 and not Path("out").exists()
    assert all(options["disable"] is True for _, options in bars)
    signal_at_step(monkeypatch, 1, signal.SIGTERM)
    assert call("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out") == (
        128 + signal.SIGTERM,
        "",
        "",
    )
    assert not Path("out").exists()


def test_all_processes_stop_if_one_is_told_to(monkeypatch, cheap):
    """The mean over processes says so, whichever it was."""
    told = like_processes(lambda *values: [0.5 if value is False else value for value in values])
    monkeypatch.setattr(train.Processes, "from_environment", lambda: told)
    monkeypatch.setattr(
        train, "load_data", lambda *_: (take(load_dataset("train", "offline"), 64), torch.zeros(1))
    )
    code, _, err = call("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out")
    assert code == 128 + signal.SIGTERM and "Stopped by SIGTERM after step 1 of 8" in err


def test_losses_are_means_over_processes(monkeypatch, cheap):
    others = like_processes(
        lambda *values: [value + 1 if type(value) is float else value for value in values]
    )
    succeed("train.py", *TRAIN, "--epochs", 1, "--out-dir", "alone")
    monkeypatch.setattr(train.Processes, "from_environment", lambda: others)
    succeed("train.py", *TRAIN, "--epochs", 1, "--out-dir", "out")
    mine, all_of_us = (checkpoint_of(name)["history"][0]["train_loss"] for name in ("alone", "out"))
    assert all_of_us == pytest.approx(mine + 1)


def test_machines_with_different_digits(monkeypatch):
    mixed = like_processes(lambda *values: [0.5 for value in values])
    monkeypatch.setattr(train.Processes, "from_environment", lambda: mixed)
    assert "some machines have MNIST and some only the offline digits" in fail("train.py", *TRAIN)


# --------------------------------------------------------------------------------------------------
# Bad input: a non-zero exit, one line that says "error", no traceback, no file


@pytest.mark.parametrize(
    "name", ["nowhere", "folder", "cut.pth", "noise.pth", "empty.pth", "other.pth", "tensor.pth"]
)
@pytest.mark.parametrize("flag", ["--resume", "--init"])
def test_bad_checkpoint(flag, name, bad_files):
    """The message names the file."""
    assert name in fail("train.py", *TRAIN, "--epochs", 5, "--out-dir", "out", flag, name)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--epochs 0", "at least 1"),
        ("--epochs -1", "at least 1"),
        ("--epochs two", "invalid integer"),
        ("--steps 0", "at least 1"),
        ("--steps 5 --epochs 2", "exclude each other"),
        ("--batch-size 0", "at least 1"),
        ("--batch-size 65", "between 1 and 64"),
        ("--timesteps 0", "at least 1"),
        ("--timesteps 100000000000000000000", "at most 2147483647"),
        ("--timesteps 1000000000", "fit into memory"),
        ("--limit 0", "at least 1"),
        ("--limit 5000", "between 1 and 4500"),
        ("--lr -1", "above 0"),
        ("--lr 0", "above 0"),
        ("--lr nan", "above 0"),
        ("--lr inf", "above 0"),
        ("--seed -1", "at least 0"),
        ("--seed 5000000000", "at most 4294967295"),
        ("--device nonsense", "can't be used"),
        ("--channels 7 7 7", "multiples of 8"),
        ("--channels 8 8 12", "multiples of 8"),
        ("--channels 8 8", "3 arguments"),
        ("--blocks 0", "at least 1"),
        ("--blocks 17", "at most 16"),
        ("--label-dropout 0.5", "goes with --conditional"),
        ("--dropout 1", "below 1"),
        ("--conditional --label-dropout 1.5", "at most 1"),
        ("--optimizer sgd", "invalid choice"),
        ("--decay linear", "invalid choice"),
        ("--network plain", "invalid choice"),
        ("--schedule sine", "invalid choice"),
        ("--transition nonsense", "invalid choice"),
        ("--transition gaussian", "are uniform transitions"),
        ("--transition gaussian --levels 4 --timesteps 2", "take more"),
        ("--transition gaussian --levels 4 --schedule mutual_info", "cosine or fitted"),
        ("--transition absorbing --schedule linear", "mutual_info or cosine"),
        ("--loss nonsense", "invalid choice"),
        ("--loss hybrid --hybrid-weight -1", "at least 0"),
        ("--levels 1", "at least 2"),
        ("--levels 257", "at most 256"),
        ("--levels 4 --binarize dynamic", "makes 2 levels"),
        ("--binarize nonsense", "invalid choice"),
        ("--data fashion", "invalid choice"),
        ("--resume", "no checkpoint"),
        ("--resume good.pth --overwrite", "--overwrite exclude"),
        ("--resume good.pth --init good.pth", "--init exclude"),
        ("--out-dir good.pth", "can't write"),
        ("--out-dir good.pth/out", "can't write"),
        ("--nonsense", "unrecognized"),
        ("nonsense", "unrecognized"),
    ],
)
def test_bad_input(arguments, words, bad_files):
    first = [] if "--steps" in arguments else ["--epochs", 1]
    assert words in fail("train.py", *TRAIN, *first, "--out-dir", "out", *arguments.split())


@pytest.mark.parametrize("flag", ["--resume", "--init", "--out-dir", "--data-root"])
def test_empty_path(flag):
    """An empty shell variable starts nothing."""
    assert "is empty" in fail("train.py", *TRAIN, flag, "")


@pytest.mark.parametrize(
    "arguments",
    [
        "--levels 4 --binarize dynamic",
        "--transition gaussian",
        "--channels 7 7 7",
        "--resume",
        "--device nonsense",
    ],
)
def test_bad_flags_are_found_before_the_digits_are_fetched(arguments, monkeypatch):
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("fetched for nothing"))
    fail("train.py", *TRAIN, "--out-dir", "out", *arguments.split())


def test_home_folder(monkeypatch, tmp_path, cheap):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    succeed("train.py", *TRAIN, "--steps", 1, "--out-dir=~/out")
    assert checkpoint_of("home/out")["step"] == 1
