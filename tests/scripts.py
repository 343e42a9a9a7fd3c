"""Run the scripts, in this process or as real ones, and inspect their files."""

import csv
import importlib
import io
import os
import signal
import subprocess
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import cli

import pytest
import torch

from checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from diffusion import DiscreteDiffusion
from model import build_network

REPOSITORY = cli.REPOSITORY
TRAIN = "--data offline --limit 64 --batch-size 16 --channels 8 8 8 --timesteps 10 --device cpu"
TRAIN += " --loss cross_entropy --lr 2e-3"
TRAIN = TRAIN.split()  # 4 steps per epoch
# PYTHONUNBUFFERED would hide that a log is not written line by line.
ENVIRONMENT = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def call(script, *arguments, out=None) -> tuple[int, str, str]:
    """Run `python script arguments` in this process: exit code, stdout, stderr."""
    module = importlib.import_module(script.removesuffix(".py"))
    out, err = out or io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(REPOSITORY / script), *map(str, arguments)])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        try:
            cli.run(module.main)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc(file=err)
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, getattr(out, "getvalue", str)(), err.getvalue()


def succeed(script, *arguments) -> str:
    """stdout of a call that must succeed."""
    code, out, err = call(script, *arguments)
    assert code == 0, err
    return out


def fail(script, *arguments) -> str:
    """The last line of stderr of a call that must fail cleanly and leave the working directory
    unchanged."""
    before = snapshot(Path())
    code, _, err = call(script, *arguments)
    assert code in (1, 2)
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"{script}: error: ")
    after = snapshot(Path())
    # The lock of a run's folder is never deleted.
    locks = {path for path in after.keys() - before.keys() if path.name == ".lock"}
    assert {p: c for p, c in after.items() if p not in locks | {x.parent for x in locks}} == before
    return line


def trained(flags="", out="out") -> str:
    """stdout of a small run of train.py that must succeed."""
    return succeed("train.py", *TRAIN, *flags.split(), "--out-dir", out)


def resumed(flags="", out="out") -> str:
    return succeed("train.py", "--resume", *flags.split(), "--out-dir", out)


def start(script, *arguments, cwd, launcher=(), **options) -> subprocess.Popen:
    """Start a real process."""
    command = [sys.executable, *launcher, *map(str, [REPOSITORY / script, *arguments])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **{"env": ENVIRONMENT} | pipes | options)


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def files(folder: Path) -> set[str]:
    """The files under a folder, without a run's lock."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names - {".lock"}


def read_metrics(folder) -> list[dict]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint_of(folder, name="last") -> dict:
    return read_checkpoint(Path(folder) / "checkpoints" / f"{name}.pth")


def same_weights(a: Path | str, b: Path | str) -> bool:
    """Whether two checkpoints have the same step and agree bit for bit, optimizer state included.
    Only for runs on one machine and with as many threads, as others add in another order."""

    def tensors(c: dict) -> list[torch.Tensor]:
        states = [v for state in c["optimizer"]["state"].values() for v in state.values()]
        return [*c["weights"].values(), *c["averaged_weights"].values(), *states]

    a, b = read_checkpoint(a), read_checkpoint(b)
    return a["step"] == b["step"] and all(map(torch.equal, tensors(a), tensors(b)))


def same_run(a, b, name="last", but_for=()) -> bool:
    """Whether two runs have the same weights and history, apart from the timing."""
    but_for = dict.fromkeys(("images_per_second", "seconds", *but_for))
    rows = ([row | but_for for row in checkpoint_of(x, name)["history"]] for x in (a, b))
    path = f"checkpoints/{name}.pth"
    return next(rows) == next(rows) and same_weights(Path(a) / path, Path(b) / path)


def signal_at_step(monkeypatch, at, *signals):
    """Send these signals to this process while step `at` (from 0) computes its loss."""
    loss, calls = DiscreteDiffusion.loss, []

    def loss_with_signal(self, **inputs):
        if len(calls) == at:
            for number in signals:
                os.kill(os.getpid(), number)
        calls.append(at)
        return loss(self, **inputs)

    monkeypatch.setattr(DiscreteDiffusion, "loss", loss_with_signal)


def spy(monkeypatch, owner, name) -> list[tuple]:
    """Record the calls of owner.name as (arguments, keyword arguments); a method's arguments start
    with its object."""
    original, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls


def untrained(
    path: Path, timesteps: int = 60, config: dict | None = None, **entries
) -> DiscreteDiffusion:
    """Write a checkpoint of a small network with random weights, which depends on t and labels;
    return its diffusion."""
    torch.manual_seed(0)
    network = {"name": "unet", "num_levels": 2, "num_states": 2, "channels": [8, 8, 8]} | (
        config or {}
    )
    network = build_network(network)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    d = DiscreteDiffusion(network, network.config["num_levels"], timesteps)
    state = {
        "network": network.config,
        "diffusion": d.config,
        "averaged_weights": network.state_dict(),
    }
    save_checkpoint(path, state | {"data": "offline", "step": 1} | entries)
    return load_checkpoint(path)
