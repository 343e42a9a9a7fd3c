"""train.py end to end: what a run is made of, its flags, what it writes and says, its processes,
and what it refuses. How a run stops and goes on is in test_resume.py."""

import io
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    TRAIN,
    call,
    checkpoint_of,
    fail,
    files,
    read_metrics,
    resumed,
    same_weights,
    signal_at_step,
    spy,
    start,
    succeed,
    trained,
)

import model
import train
import trainer
from checkpoint import RELEASED, load_checkpoint, read_checkpoint
from dataset import Dataset, batches, load_dataset, take, to_levels
from diffusion import DiscreteDiffusion
from model import build_network
from options import RECIPES, make_parser, parse_arguments
from pictures import image_grid
from trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_directory", "offline_once")
SMALL = {"name": "unet", "num_levels": 2, "num_states": 2, "channels": [8, 8, 8]}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


# --------------------------------------------------------------------------------------------------
# A run


def test_a_run_is_these_steps_on_these_batches(run):
    """The whole of a run, written out: network by seed, batches by epoch, steps, a mean loss and a
    bound each epoch. To the bit, as both run in one process."""
    digits = take(load_dataset("train", "offline"), 64)
    torch.manual_seed(0)
    network = build_network(SMALL | {"num_labels": 0})
    t = Trainer(DiscreteDiffusion(network, timesteps=10), 16, 16, 2e-3, "muon")
    validation = to_levels(load_dataset("validation", "offline").images)
    history = []
    for epoch in range(4):
        losses = [t.step(*batch).item() for batch in batches(digits, 16, 0, epoch)]
        rate = t.optimizer.param_groups[0]["lr"]
        history.append([epoch + 1, t.steps, sum(losses) / 4, t.validate(validation), rate])
    last = checkpoint_of(run)
    for key in ("weights", "averaged_weights"):
        for name, weight in t.state_dict()[key].items():
            assert torch.equal(last[key][name], weight), name
    rows = [list(row.values())[:5] for row in last["history"]]
    assert np.allclose(rows, history, rtol=1e-12)
    assert all(r["seconds"] * r["images_per_second"] == pytest.approx(64) for r in last["history"])


def test_train_writes_what_it_promises(run):
    """Checkpoints, one sheet of 8x8 samples, the metrics of every epoch, the loss curve; and
    nothing else."""
    names = {f"checkpoints/{name}.pth" for name in ("last", "constant", "model_epoch_4", "weights")}
    assert files(run) == names | {"samples/sample_epoch_4.png", "metrics.csv", "loss_curve.png"}
    rows, history = read_metrics(run), checkpoint_of(run)["history"]
    columns = ["epoch", "step", "train_loss", "validation_bound", "lr"]
    columns += ["images_per_second", "seconds"]
    assert list(rows[0]) == columns
    for row, kept in zip(rows, history, strict=True):
        assert [float(row[c]) for c in columns] == pytest.approx([kept[c] for c in columns], 1e-5)
    at = [(row["epoch"], row["step"]) for row in rows]
    assert at == [("1", "4"), ("2", "8"), ("3", "12"), ("4", "16")]
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
    shared = {"network", "diffusion", "averaged_weights", "data", "dataset", "binarize", "step"}
    whole = shared | {"weights", "optimizer", "settings", "steps_per_epoch"}
    whole |= {"total_steps", "loss_sum", "history", "seconds"}
    assert last.keys() == constant.keys() == whole
    assert weights.keys() == shared
    counts = [last[key] for key in ("step", "steps_per_epoch", "total_steps")]
    assert counts == [16, 4, 16]
    digits = load_dataset("train", "offline")
    assert last["dataset"] == weights["dataset"] == digits.description
    assert last["data"] == "offline" and last["binarize"] == "threshold"
    d = DiscreteDiffusion(build_network(last["network"]), timesteps=10, hybrid_weight=0.005)
    assert last["diffusion"] == d.config
    assert last["loss_sum"] == pytest.approx(4 * last["history"][-1]["train_loss"])
    assert constant["step"] == 12  # 0.7 * 16 = 11.2
    for name, weight in last["averaged_weights"].items():
        assert torch.equal(weights["averaged_weights"][name], weight.half())
    averaged = last["averaged_weights"].items()
    assert not all(torch.equal(last["weights"][name], w) for name, w in averaged)
    last, half = (load_checkpoint(run / "checkpoints" / f"{n}.pth") for n in ("last", "weights"))
    x, t = torch.ones(1, 1, 32, 32).long(), torch.tensor([5])
    assert next(half.parameters()).dtype == torch.float32
    assert torch.allclose(last.x_0_logits(x, t), half.x_0_logits(x, t), atol=0.01)


def test_what_a_run_says(cheap):
    """What is trained, on what, for how long; a line an epoch; a command that can be pasted."""
    out = trained("--epochs 2", "my runs").splitlines()
    row = checkpoint_of("my runs")["history"][1]
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
    weights = Path("my runs/checkpoints/weights.pth")
    assert out[5:] == [f"Done. Draw digits: python sample.py '{weights}'"]


def test_what_is_kept(monkeypatch, cheap):
    """Every so many epochs and at the end a checkpoint and a sheet; weights only at the end."""
    assert train.EVERY == 5
    monkeypatch.setattr(train, "EVERY", 2)
    trained("--epochs 5 --limit 16")
    kept = {f"model_epoch_{n}.pth" for n in (2, 4, 5)}
    assert files(Path("out/checkpoints")) == kept | {"last.pth", "constant.pth", "weights.pth"}
    assert files(Path("out/samples")) == {f"sample_epoch_{n}.png" for n in (2, 4, 5)}
    assert checkpoint_of("out", "model_epoch_2")["step"] == 2


def test_a_run_that_overfits_says_so(monkeypatch, cheap):
    """The last line: the best epoch, how much worse the last is, the kept checkpoint nearest to
    the best. Nothing where the last is as good."""
    bounds = iter([9, 8, 7, 7.5, 7.25, 9, 8, 8])
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: next(bounds))
    monkeypatch.setattr(train, "EVERY", 2)
    last = trained("--epochs 5 --limit 16").splitlines()[-1]
    assert "best after epoch 3 and is now 0.25 nats worse" in last
    assert last.endswith(f"checkpoint is {Path('out/checkpoints/model_epoch_2.pth')}")
    assert trained("--epochs 3 --limit 16", "good").splitlines()[-1].startswith("Done.")


def test_epochs_between_validations(cheap):
    """And the last one. Speed and loss: of all the epochs since the last row, and of the epoch that
    ends with it."""
    trained("--epochs 7 --limit 32 --validate-every 3")
    rows = checkpoint_of("out")["history"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(3, 6), (6, 12), (7, 14)]
    images = [row["images_per_second"] * row["seconds"] for row in rows]
    assert images == pytest.approx([96, 96, 32])
    kept = {name for name in files(Path("out/checkpoints")) if name.startswith("model")}
    assert kept == {"model_epoch_6.pth", "model_epoch_7.pth"}  # the fifth was not looked at
    trained("--epochs 7 --limit 32", "each")
    each = checkpoint_of("each")["history"]
    assert [row["train_loss"] for row in rows] == [each[i]["train_loss"] for i in (2, 5, 6)]


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
    save = lambda path, state: saves.append((path.name, state["step"]))  # noqa: E731
    monkeypatch.setattr(train, "save_checkpoint", save)
    trained("--batch-size 4 --epochs 1 --decay cosine")
    assert saves[:-3] == [("last.pth", step) for step in (3, 6, 9, 12, 15)]
    assert saves[-3:] == [("model_epoch_1.pth", 16), ("last.pth", 16), ("weights.pth", 16)]
    saves.clear()
    monkeypatch.setattr(train, "time", Clock(1))
    trained("--batch-size 4 --epochs 1 --decay cosine", "other")
    assert len(saves) == 3


def test_life_signs_in_a_log(monkeypatch, cheap):
    """Without a progress bar, a line when REPORT_SECONDS have gone by, with the mean loss of the
    epoch so far. None beside a progress bar."""
    assert train.REPORT_SECONDS == 60
    monkeypatch.setattr(train, "CHECK_STEPS", 2)
    monkeypatch.setattr(train, "time", Clock(25))
    losses, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: losses.append(step(*args)) or losses[-1])
    lines = trained("--batch-size 4 --epochs 2").splitlines()
    lines = [line for line in lines if line.startswith("epoch") and "step" in line]
    assert [line.split()[3] for line in lines[:2]] == ["6", "12"] and len(lines) > 3
    for line in lines:
        epoch, step_ = int(line.split()[1][:-1]), int(line.split()[3])
        mean = torch.stack(losses[16 * (epoch - 1) : step_]).mean()
        assert line == f"epoch {epoch}, step {step_} of 32, train loss {mean:.4f} nats/pixel"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("scripts.io.StringIO", Terminal)
    _, out, err = call("train.py", *TRAIN, "--batch-size", 4, "--epochs", 1, "--out-dir", "bar")
    assert ", step" not in out and "epoch 1" in err


# --------------------------------------------------------------------------------------------------
# Flags


def test_flags_reach_what_they_are_about(monkeypatch, cheap):
    """Every flag at once, none at its default: the network, the diffusion, the trainer, the
    batches, the checkpoint."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    names = ("Trainer", "load_dataset", "batches")
    made, loaded, served = (spy(monkeypatch, train, name) for name in names)
    flags = """--steps 2 --batch-size 8 --timesteps 12 --transition absorbing --schedule cosine
        --loss hybrid --hybrid-weight 0.5 --levels 4 --conditional --label-dropout 0.3
        --optimizer muon --lr 0.003 --decay cosine --channels 8 16 24 --blocks 2 --dropout 0.2
        --data offline --data-root nowhere --limit 40 --seed 5 --device cpu --compile --amp
        --validate-every 3 --reverse joint --output logistic --network unet --out-dir here
        --augment 0.4 --weight-decay 0.2"""
    succeed("train.py", *flags.split())
    ((diffusion, total), options) = made[0]
    assert total == 2
    assert options.pop("processes") == trainer.Processes()
    settings = {"batch_size": 8, "lr": 0.003, "optimizer": "muon", "decay": "cosine", "seed": 5}
    settings |= {"label_dropout": 0.3, "weight_decay": 0.2, "amp": True}
    assert options == settings | {"compiled": True}
    chain = {"timesteps": 12, "hybrid_weight": 0.5, "reverse": "joint"}
    chain |= {"transition": "absorbing", "schedule": "cosine"}
    other = {"num_levels": 4, "image_shape": (1, 32, 32), "loss_type": "hybrid"}
    assert diffusion.config == chain | other
    network = {"channels": [8, 16, 24], "blocks": 2, "output": "logistic", "dropout": 0.2}
    other = {"name": "unet", "num_levels": 4, "num_states": 5, "num_labels": 10, "ordinal": True}
    other |= {"augmented": True}
    assert diffusion.model.config == network | other
    root = Path("nowhere")
    splits = [(split, "offline", root, None, False) for split in ("train", "validation")]
    assert [args for args, _ in loaded] == splits
    digits, *rest = served[-1][0]
    assert rest == [8, 5, 0, 0, 4, "threshold", 0.4]
    everything = load_dataset("train", "offline")
    assert torch.equal(digits.images, take(everything, 40).images)
    assert torch.equal(digits.labels, take(everything, 40).labels)
    settings |= chain | network | {"loss": "hybrid", "levels": 4, "binarize": "threshold"}
    settings |= {"epochs": 50, "steps": 2, "conditional": True, "network": "unet", "limit": 40}
    settings |= {"data": "offline", "data_root": "nowhere", "device": "cpu", "compile": True}
    settings |= {"validate_every": 3, "out_dir": "here", "size": None, "augment": 0.4}
    assert checkpoint_of("here")["settings"] == settings


@pytest.fixture
def made(monkeypatch, cheap) -> list[tuple]:
    """Nothing is trained; the arguments of each Trainer that was made."""
    monkeypatch.setattr(train.Run, "train", lambda self, stop: False)
    return spy(monkeypatch, train, "Trainer")


def test_defaults(made):
    """Without flags: README's run."""
    out = succeed("train.py", "--data", "offline")
    assert f"python sample.py {Path('results_d3pm/checkpoints/weights.pth')}" in out
    ((diffusion, total), options) = made[0]
    assert total == 50 * (4500 // 128)
    options.pop("processes")
    settings = {"batch_size": 128, "lr": 4e-3, "optimizer": "muon", "decay": "late", "seed": 0}
    settings |= {"weight_decay": 0.01}
    assert options == settings | {"label_dropout": 0.1, "amp": False, "compiled": False}
    chain = {"num_levels": 2, "timesteps": 200, "image_shape": (1, 32, 32)}
    chain |= {"loss_type": "hybrid", "hybrid_weight": 0.005, "reverse": "mixture"}
    assert diffusion.config == chain | {"transition": "uniform", "schedule": "cosine"}
    network = SMALL | {"channels": [24, 64, 96], "blocks": 1, "num_labels": 0}
    network |= {"output": "softmax", "ordinal": False, "dropout": 0.0, "augmented": False}
    assert diffusion.model.config == network


def test_few_pictures_are_augmented_in_a_long_run(made, monkeypatch):
    """Of two levels, for the network that can be told, unless a flag or a recipe says no."""
    monkeypatch.setattr(train, "MANY", 5_000)
    few = *TRAIN, "--batch-size", 30, "--steps"

    def share(*flags):
        out = succeed("train.py", *flags, "--out-dir", "out", "--overwrite")
        network = made.pop()[0][0].model
        assert ("50% of them augmented" in out) == network.config["augmented"]
        return network.config["augmented"]

    assert share(*few, 150) and share(*few[:-1], "--epochs", 75)
    assert not share(*few, 149) and not share(*few[:-1], "--epochs", 74)
    assert not share(*few, 150, "--levels", 3) and not share(*few, 150, "--augment", 0)
    assert not share(*few, 150, "--recipe", "paper")
    monkeypatch.setattr(train, "MANY", 4_500)
    assert not share(*few, 150)


def test_a_recipe_is_several_flags(made, my_run):
    """Those beside it win; a run that goes on with one was begun with it. Its old name works."""
    for name in ("bound", "released"):
        flags = ("--data", "offline", "--recipe", name, "--channels", 8, 8, 8)
        succeed("train.py", *flags, "--out-dir", name)
        ((diffusion, _), options) = made.pop()
        assert (options["lr"], options["optimizer"], options["batch_size"]) == (1e-3, "muon", 128)
        assert (diffusion.loss_type, diffusion.timesteps) == ("variational", 1000)
        assert diffusion.model.config["channels"] == [8, 8, 8]
    line = fail("train.py", "--resume", "--recipe", "released", "--out-dir", my_run)
    assert "disagrees with the run to resume" in line


def test_the_recipe_is_that_of_what_is_released():
    released = load_checkpoint(RELEASED)
    channels = " ".join(map(str, released.model.config["channels"]))
    assert f"--timesteps {released.timesteps} --channels {channels}" in RECIPES["bound"]


def test_recipe_of_the_paper(monkeypatch, cheap):
    """The joint form, hybrid loss, Adam without decay of weights or rate; no mode at the end."""
    made, drawn = spy(monkeypatch, train, "Trainer"), spy(monkeypatch, DiscreteDiffusion, "sample")
    flags = [flag for flag in TRAIN if flag not in ("--loss", "cross_entropy", "--lr", "2e-3")]
    succeed("train.py", *flags, "--recipe", "paper", "--steps", 1)
    ((d, _), options) = made[0]
    assert (d.reverse, d.loss_type, d.hybrid_weight) == ("joint", "hybrid", 0.001)
    assert [options[name] for name in ("optimizer", "lr", "decay")] == ["adam", 2e-4, "constant"]
    assert d.model.config["dropout"] == 0.1
    assert drawn[0][1]["last_step"] == "draw"
    monkeypatch.setattr("sys.argv", ["train.py", "--recipe", "paper"])
    args, *_ = parse_arguments(None)
    assert (args.timesteps, args.batch_size) == (1000, 128)


@pytest.mark.parametrize(
    "n, levels, rate, loss",
    [
        (32, 2, 1e-4, "cross_entropy"),
        (31, 2, 4e-3, "hybrid"),
        (31, 3, 2e-3, "cross_entropy"),
        (32, 3, 1e-4, "cross_entropy"),
    ],
)
def test_loss_and_rate_depend_on_the_number_of_images(n, levels, rate, loss, monkeypatch, cheap):
    """However few --limit leaves of them. Validation digits come from where the training digits
    were found: `auto` found MNIST."""
    assert train.MANY == 20_000
    monkeypatch.setattr(train, "MANY", 32)
    few = Dataset(torch.zeros(n, 1, 32, 32).byte(), torch.arange(n) % 10, "mnist")
    monkeypatch.setattr(train, "load_dataset", lambda *_: few)
    made, loaded = spy(monkeypatch, train, "Trainer"), spy(monkeypatch, train, "load_dataset")
    flags = f"--steps 1 --limit 16 --batch-size 16 --channels 8 8 8 --levels {levels} --device cpu"
    succeed("train.py", *flags.split(), "--out-dir", "out")
    ((diffusion, _), options) = made[0]
    assert (diffusion.loss_type, options["lr"]) == (loss, rate)
    flags += " --loss variational --lr 3e-3 --out-dir other"
    succeed("train.py", *flags.split())
    ((diffusion, _), options) = made[1]
    assert (diffusion.loss_type, options["lr"]) == ("variational", 3e-3)
    flags = flags.replace("--lr 3e-3 --out-dir other", "--optimizer adamw --out-dir third")
    succeed("train.py", *flags.split())
    assert made[2][1]["lr"] == min(rate, 2e-3)  # the higher rate is Muon's
    del loaded[2:]
    assert [args[:2] for args, _ in loaded] == [("train", "auto"), ("validation", "mnist")]


@pytest.mark.parametrize(
    "protocol, levels, seed",
    [("threshold", 2, 0), ("dynamic", 2, 0), ("dynamic", 2, 7), ("threshold", 33, 0)],
)
def test_validation_is_on_validation_digits(protocol, levels, seed, monkeypatch, cheap):
    """As levels, drawn once where they are drawn at random, and alike whatever the seed; training
    batches are drawn by the same protocol. Of many levels, where each takes long, only 200."""
    seen = []
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: seen.append(x_0) or 1.0)
    served = spy(monkeypatch, train, "batches")
    flags = f"--binarize {protocol} --levels {levels} --seed {seed}"
    trained(f"--epochs 2 --limit 16 {flags}")
    grey = take(load_dataset("validation", "offline"), 200 if levels > 32 else 500).images
    expected = to_levels(grey, levels, protocol, torch.Generator().manual_seed(0))
    assert len(seen) == 2 and all(torch.equal(x_0, expected) for x_0 in seen)
    assert served[-1][0][-2:] == (protocol, 0)
    assert checkpoint_of("out")["binarize"] == protocol


def test_of_32_levels_all_validation_digits_are_used(made):
    settings = {"data": "offline", "data_root": "data", "levels": 32, "binarize": "threshold"}
    settings |= dict.fromkeys(["lr", "loss", "size", "conditional", "optimizer"])
    settings |= {"limit": 16, "batch_size": 16, "steps": 1, "augment": 0.0}
    assert len(train.load_data(settings, None, trainer.Processes())[1]) == 500


@pytest.mark.parametrize(
    "flags, states, levels",
    [
        ("--transition absorbing", 3, 2),
        ("--transition absorbing --levels 4 --loss variational --schedule cosine", 5, 4),
        ("--transition gaussian --levels 4 --timesteps 20", 4, 4),
        ("--loss variational --binarize dynamic --blocks 2", 2, 2),
    ],
)
def test_design_choices_end_to_end(flags, states, levels, monkeypatch):
    """One short epoch and its sheet, then digits and an animation from nothing but the
    checkpoint."""
    validate = Trainer.validate
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: validate(self, x_0[:32]))
    monkeypatch.setattr(train, "save_figure", lambda figure, file: file.write(b"a figure"))
    trained(f"{flags} --epochs 1 --limit 16")
    d = load_checkpoint("out/checkpoints/weights.pth")
    assert (d.num_states, d.num_levels) == (states, levels)
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        samples = load_checkpoint("out/checkpoints/last.pth").sample(64, last_step="mode")
        assert np.array_equal(picture, image_grid(samples, levels, columns=8))
    arguments = "out/checkpoints/weights.pth --n 2 --out a.png --save-tensor a.pt"
    succeed("sample.py", *arguments.split())
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
    trained("--limit 320 --batch-size 64 --timesteps 60 --conditional --epochs 1")
    told = torch.cat(told)
    assert len(told) == 320 and set(told.tolist()) == set(range(-1, 10))
    assert 0.04 < (told == -1).double().mean() < 0.17
    d = load_checkpoint("out/checkpoints/last.pth", timesteps=30)
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        row = d.sample(8, y=d.labels(8), last_step="mode")
        row = np.asarray(image_grid(row, columns=8))[:-4]  # less the border below
        assert np.array_equal(np.asarray(picture)[: len(row)], row)


def test_seed_of_the_weights_and_of_the_sheet(monkeypatch, cheap):
    made, drawn = spy(monkeypatch, train, "Trainer"), spy(monkeypatch, DiscreteDiffusion, "sample")
    for i, seed in enumerate((0, 3, 0)):
        trained(f"--steps 1 --limit 16 --lr 1e-9 --seed {seed}", f"out{i}")
        ((_, n, given), _) = drawn[-1]
        assert (n, given) == (64, seed)
    a, b, c = (args[0].model.fold.weight for args, _ in made)
    assert torch.equal(a, c) and not torch.allclose(a, b, atol=1e-3)


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
    monkeypatch.setattr(train, "LONG", 0)  # it takes no maps, so it is not augmented
    flags = "--data offline --limit 64 --batch-size 16 --timesteps 10 --device cpu --network plain"
    succeed("train.py", *flags.split(), "--steps", 2, "--out-dir", "out")
    resumed("--steps 3")
    assert checkpoint_of("out")["settings"]["blocks"] is None
    last = "out/checkpoints/last.pth"
    succeed("train.py", *flags.split(), "--steps", 1, "--init", last, "--out-dir", "other")
    assert type(load_checkpoint(last).model) is Plain
    line = fail("train.py", *TRAIN, "--steps", 1, "--init", last, "--out-dir", "third")
    assert "another network, by its name" in line


def test_help_states_every_default(capsys):
    p, free, fixed = make_parser(None)
    with pytest.raises(SystemExit):
        p.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in (free | fixed).items():
        flag = "--" + name.replace("_", "-")
        assert flag in text
        if value and name not in ("data", "device", "data_root"):
            assert f"(default {value})" in text, name


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
    flags = "--seed 9 --transition uniform --schedule cosine --timesteps 20 --dropout 0.1"
    trained(f"--steps 1 --init {path} {flags}")
    weights, steps = made[0]
    last = checkpoint_of("out")
    assert (steps, last["step"], len(last["history"])) == (0, 1, 1)
    for key, weight in read_checkpoint(path)["averaged_weights"].items():
        assert torch.equal(weights[key], weight.float())
    assert last["network"]["dropout"] == 0.1


def test_conditional_run_starts_from_a_network_without_classes(run, cheap):
    """Which it is at first, whatever the class; the other way round is an error."""
    path = run / "checkpoints" / "weights.pth"
    old, (_, free, fixed) = load_checkpoint(path), make_parser(None)
    settings = free | fixed | {"timesteps": 10, "channels": [8, 8, 8]}
    digits = load_dataset("train", "offline")
    new = train.build(settings | {"conditional": True}, path, digits).eval()
    x_t, t = torch.randint(2, (4, 1, 32, 32)), torch.tensor([1, 4, 9, 10])
    y = torch.tensor([-1, 0, 5, 9])
    assert torch.equal(new.x_0_logits(x_t, t, y), old.x_0_logits(x_t, t)) and new.num_labels == 10
    trained(f"--steps 1 --conditional --init {path}")
    flags = *TRAIN, "--steps", 1, "--out-dir", "other", "--init", "out/checkpoints/last.pth"
    assert "another network, by its num_labels" in fail("train.py", *flags)


def test_augmented_run(run, monkeypatch, cheap):
    """It starts from a network that was not augmented, and predicts the same at first. Its step
    gets the maps of the run's own seed; `--init` the other way round works, too."""
    told = []

    class Watched(Trainer):
        def step(self, x_0, y, *maps):
            told.extend(maps)
            return super().step(x_0, y, *maps)

    monkeypatch.setattr(train, "Trainer", Watched)
    path = run / "checkpoints" / "weights.pth"
    old, (_, free, fixed) = load_checkpoint(path), make_parser(None)
    settings = free | fixed | {"timesteps": 10, "channels": [8, 8, 8], "augment": 0.5}
    digits = load_dataset("train", "offline")
    new = train.build(settings, path, digits).eval()
    x_t, t = torch.randint(2, (4, 1, 32, 32)), torch.tensor([1, 4, 9, 10])
    assert torch.equal(new.x_0_logits(x_t, t, maps=torch.ones(4, 6)), old.x_0_logits(x_t, t))
    trained(f"--steps 3 --augment 0.5 --seed 3 --init {path}")
    assert checkpoint_of("out")["network"]["augmented"]
    expected = batches(take(digits, 64), 16, 3, augment=0.5)
    assert all(torch.equal(maps, batch[2]) for maps, batch in zip(told, expected, strict=False))
    assert len(told) == 3
    trained("--steps 1 --init out/checkpoints/weights.pth", "other")
    assert len(told) == 3 and not checkpoint_of("other")["network"]["augmented"]
    line = fail("train.py", "--resume", "--augment", 0.8, "--out-dir", "out")
    assert "--augment 0.8 disagrees with the run to resume: 0.5" in line


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
    last = run / "checkpoints" / "last.pth"
    line = fail("train.py", *TRAIN, "--out-dir", "out", "--init", last, *flags.split())
    assert "another network" in line and f"by its {word}" in line


# --------------------------------------------------------------------------------------------------
# On a GPU


@needs_cuda
@pytest.mark.parametrize("flags", ["", "--amp", "--compile", "--amp --compile"])
def test_training_on_a_gpu(flags):
    """The loss falls, the digits are levels, and the small weights load anywhere."""
    out = trained(f"--device cuda --epochs 4 {flags}")
    assert "weights on cuda" in out
    rows = checkpoint_of("out")["history"]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 1.0
    assert math.isfinite(rows[-1]["validation_bound"])
    weights = torch.load("out/checkpoints/weights.pth", weights_only=True)["averaged_weights"]
    assert {w.device.type for w in weights.values()} == {"cpu"}
    images = load_checkpoint("out/checkpoints/last.pth", "cuda").sample(4)
    assert images.unique().tolist() in ([0], [1], [0, 1])


@needs_cuda
@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_resume_across_devices(first, then):
    """A run goes on elsewhere where it was, optimizer and history included."""
    trained(f"--device {first} --decay constant --epochs 2")
    before = checkpoint_of("out")
    resumed(f"--device {then} --epochs 4")
    after = checkpoint_of("out")
    assert after["step"] == 16 and after["settings"]["device"] == then
    assert after["history"][:2] == before["history"] and len(after["history"]) == 4
    assert after["history"][3]["train_loss"] < before["history"][0]["train_loss"]
    moved = [w - before["weights"][name] for name, w in after["weights"].items()]
    assert 0 < max(change.abs().max() for change in moved) < 0.5
    steps = {float(state["step"]) for state in after["optimizer"]["state"].values()}
    assert max(steps) == 16


# --------------------------------------------------------------------------------------------------
# Reports, and what may fail


@pytest.mark.parametrize("part", ["plot_history", "save_figure", "image_grid"])
def test_a_picture_never_ends_a_run(part, monkeypatch, cheap):
    """Whatever its settings do to it: a warning of one line, after numbers and checkpoints."""

    def broken(*_, **__):
        assert len(read_metrics("out")) == 1 and Path("out/checkpoints/weights.pth").exists()
        raise RuntimeError("latex could not be found\nat all")

    monkeypatch.setattr(train, part, broken)
    code, out, err = call("train.py", *TRAIN, "--limit", 16, "--epochs", 1, "--out-dir", "out")
    name = "samples/sample_epoch_1.png" if part == "image_grid" else "loss_curve.png"
    assert err == f"warning: {Path('out') / name} was not written: latex could not be found\n"
    assert code == 0 and "Done" in out


def test_reports_that_cannot_be_written_are_a_warning(cheap):
    """Metrics, curve and sheet: training goes on, and all checkpoints are there."""
    names = ("metrics.csv", "loss_curve.png", "samples/sample_epoch_2.png")
    for name in names:
        (Path("out") / name).mkdir(parents=True)
    code, out, err = call("train.py", *TRAIN, "--epochs", 2, "--out-dir", "out", "--overwrite")
    assert code == 0 and "Done" in out
    warnings = err.splitlines()
    assert len(warnings) == 4  # metrics after each epoch
    for name in names:
        start = f"warning: {Path('out') / name} was not written: "
        assert any(line.startswith(start) for line in warnings)
    saved = {f"{name}.pth" for name in ("last", "constant", "weights", "model_epoch_2")}
    assert files(Path("out/checkpoints")) == saved


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
    trained("--epochs 2")
    assert seen == [4, 8]


@pytest.mark.parametrize("at", [1, 6])
def test_loss_that_is_not_finite(at, monkeypatch, cheap):
    """Training ends within CHECK_STEPS with one line and saves none of it; the last checkpoint
    stays."""
    assert train.CHECK_STEPS == 20  # a network of NaN wastes so many steps
    monkeypatch.setattr(train, "CHECK_STEPS", 2)
    calls, loss = [], DiscreteDiffusion.loss

    def diverging(self, **inputs):
        calls.append(1)
        return loss(self, **inputs) * (math.nan if len(calls) == at else 1)

    monkeypatch.setattr(DiscreteDiffusion, "loss", diverging)
    code, _, err = call("train.py", *TRAIN, "--epochs", 3, "--out-dir", "out")
    assert code == 1 and len(calls) == at + at % 2
    (line,) = err.splitlines()
    where = f"before step {at + at % 2}"
    assert line.startswith(f"train.py: error: the loss is not finite {where}: try a smaller --lr")
    assert not Path("out/checkpoints").exists() if at == 1 else checkpoint_of("out")["step"] == 4


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

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_two_processes(number, tmp_path, cheap):
    """They train what one does: in the first step the same digits, noise and hidden labels, so the
    same loss up to float32's rounding. (Later steps, and weights, are not compared: an optimizer
    divides by gradients that may be all rounding.) A killed one ends the run with a clear message;
    Ctrl-C on torchrun saves first. One process can go on with what two began."""
    flags = "--conditional --limit 16 --decay constant"  # an epoch is a step
    arguments = [*TRAIN, *flags.split(), "--epochs", "100000", "--out-dir", "two"]
    process = start("train.py", *arguments, cwd=tmp_path, launcher=TORCHRUN)
    lines = []
    while not lines or not lines[-1].startswith("epoch "):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]) if number == signal.SIGKILL else process.pid, number)
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert "train.py: error: process 0:" in err or "Stopped by SIGTERM" in err
    else:
        assert err.count("Stopped by SIGINT") == 1
    assert any("on cpu, 2 processes" in line for line in lines)
    assert sum(line.startswith("epoch   1/") for line in [*lines, *out.splitlines()]) == 1
    trained(f"{flags} --epochs 1", "one")
    losses = [checkpoint_of(name)["history"][0]["train_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    step = checkpoint_of("two")["step"]
    resumed(f"--steps {step + 1}", "two")
    assert checkpoint_of("two")["step"] == step + 1 > 1


def gradient_of_share(rank: int, folder: Path) -> None:
    """One of two processes: one step in float64; save the inputs of the loss and the gradient."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in environment.items()}
    # A file, not a port: two tests at once must not meet.
    meet = (folder / "meet").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    torch.save(one_float64_step(trainer.Processes.from_environment()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_float64_step(processes: trainer.Processes) -> tuple[list, list]:
    """The loss's inputs and the gradient that the optimizer is given, before clipping."""
    torch.manual_seed(0)
    network = build_network(SMALL | {"num_labels": 10}).double()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn_like(p)
    diffusion = DiscreteDiffusion(network, timesteps=10)
    t = Trainer(diffusion, 10, 8, label_dropout=0.3, processes=processes)
    inputs, loss = [], t.diffusion.loss
    t.diffusion.loss = lambda **given: inputs.extend(given.values()) or loss(**given)
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


def test_environment_of_processes_that_is_wrong(monkeypatch):
    """A batch that can't be shared, and variables that torchrun did not set, in one line."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    assert "process 0: the batch of 16 can't be shared equally by 3" in fail("train.py", *TRAIN)
    monkeypatch.setenv("WORLD_SIZE", "")
    assert "torchrun sets all three" in fail("train.py", *TRAIN)


def like_processes(monkeypatch, mean, rank=0) -> None:
    """As if there were others, who are asked by `mean`."""
    options = {"start": lambda device: device, "share": lambda n: slice(0, n)}
    options |= {"average_gradients": lambda network: None}
    others = SimpleNamespace(rank=rank, local_rank=0, size=1, mean=mean, **options)
    monkeypatch.setattr(train.Processes, "from_environment", lambda: others)


def test_only_the_first_process_speaks_and_writes(monkeypatch, cheap):
    """The others neither print nor lock nor write; all train."""
    like_processes(monkeypatch, lambda *values: list(values), rank=1)
    steps, bars = spy(monkeypatch, Trainer, "step"), spy(monkeypatch, train, "tqdm")
    assert trained("--epochs 2") == ""
    assert len(steps) == 8 and not Path("out").exists()
    assert all(options["disable"] is True for _, options in bars)
    signal_at_step(monkeypatch, 1, signal.SIGTERM)
    arguments = *TRAIN, "--epochs", 2, "--out-dir", "out"
    assert call("train.py", *arguments) == (128 + signal.SIGTERM, "", "")
    assert not Path("out").exists()


def test_all_processes_stop_if_one_is_told_to(monkeypatch, cheap):
    """The mean over processes says so, whichever it was."""
    like_processes(monkeypatch, lambda *values: [0.5 if v is False else v for v in values])
    digits = take(load_dataset("train", "offline"), 64)
    monkeypatch.setattr(train, "load_data", lambda *_: (digits, torch.zeros(1)))
    code, _, err = call("train.py", *TRAIN, "--steps", 8, "--lr", 1, "--out-dir", "out")
    assert code == 128 + signal.SIGTERM and "Stopped by SIGTERM after step 1 of 8" in err


def test_losses_are_means_over_processes(monkeypatch, cheap):
    trained("--epochs 1 --decay constant", "alone")
    like_processes(monkeypatch, lambda *vs: [v + 1 if type(v) is float else v for v in vs])
    trained("--epochs 1 --decay constant")
    mine, all_of_us = (checkpoint_of(name)["history"][0]["train_loss"] for name in ("alone", "out"))
    assert all_of_us == pytest.approx(mine + 1 / 4)  # of the sum of four steps


def test_machines_with_different_digits(monkeypatch):
    like_processes(monkeypatch, lambda *values: [0.5 for value in values])
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
        ("--optimizer adam --weight-decay 0.1", "goes with --optimizer muon or adamw"),
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
        ("--data fashio", "neither a folder nor one of auto, mnist, offline, fashion, kmnist"),
        ("--size 28", "for a folder of pictures, not for offline"),
        ("--size 0", "at least 1"),
        ("--levels palette", "for a folder of pictures, not for offline"),
        ("--levels palette --binarize dynamic", "makes 2 levels, not --levels palette"),
        ("--levels colours", "invalid levels value"),
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


@pytest.mark.parametrize("flag", ["--resume", "--init", "--out-dir", "--data", "--data-root"])
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
