"""Fixtures. Each pytest process uses one thread (pyproject.toml): the tensors are small, and torch
then adds in one order, so that runs agree bit for bit with those in subprocesses on the same
machine (tests/scripts.py)."""

import functools
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import SIGNALS, TRAIN, succeed

import dataset
from checkpoint import atomic_write, read_checkpoint

torch.set_num_threads(1)
read_offline = functools.cache(dataset.load_offline)  # a quarter of a second each time
# nohup and background jobs ignore signals, which the tested programs would inherit.
for number in SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


@pytest.fixture
def fresh_directory(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run of four epochs. Read-only."""
    folder = tmp_path_factory.mktemp("run") / "run"
    succeed("train.py", *TRAIN, "--epochs", 4, "--out-dir", folder)
    return folder


@pytest.fixture
def my_run(run, tmp_path) -> Path:
    """A copy of that run that a test may change."""
    shutil.copytree(run, tmp_path / "run")
    return Path("run")


@pytest.fixture
def offline_once(monkeypatch):
    """Read the offline digits once for all tests."""
    monkeypatch.setattr("dataset.load_offline", lambda: tuple(v.clone() for v in read_offline()))


@pytest.fixture
def cheap(monkeypatch, offline_once):
    """Train in this process, with the same weights, but skip the slow parts: validation, samples,
    plots, and reading checkpoints back."""

    def save(path, checkpoint):
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    monkeypatch.setattr("train.save_checkpoint", save)
    monkeypatch.setattr("trainer.Trainer.validate", lambda self, x_0: 1.0)
    monkeypatch.setattr(
        "diffusion.DiscreteDiffusion.sample",
        lambda self, n, *_, **__: torch.zeros(n, 1, 32, 32, dtype=torch.uint8),
    )
    monkeypatch.setattr("train.save_figure", lambda figure, file: file.write(b"a figure"))


@pytest.fixture(scope="session")
def bad_files_once(run, tmp_path_factory) -> Path:
    """A folder with a good checkpoint and files that are not checkpoints."""
    folder = tmp_path_factory.mktemp("bad")
    good = (run / "checkpoints" / "last.pth").read_bytes()
    (folder / "good.pth").write_bytes(good)
    (folder / "cut.pth").write_bytes(good[: len(good) // 2])
    (folder / "noise.pth").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.pth").touch()
    (folder / "folder").mkdir()
    torch.save({"weights": torch.zeros(3)}, folder / "other.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    checkpoint = read_checkpoint(folder / "good.pth")
    checkpoint["network"]["channels"] = [16, 8, 8]
    torch.save(checkpoint, folder / "misfit.pth")
    return folder


@pytest.fixture
def bad_files(bad_files_once, tmp_path):
    """The same in the working directory."""
    shutil.copytree(bad_files_once, tmp_path, dirs_exist_ok=True)
