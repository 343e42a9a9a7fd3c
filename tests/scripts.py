"""Running the scripts: inside this process, where a second is all that a run takes, or as real
processes."""

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
TRAIN = TRAIN.split()  # 4 steps per epoch
# PYTHONUNBUFFERED would hide that a log is not written line by line.
ENVIRONMENT = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def call(script, *arguments, out=None) -> tuple[int, str, str]:
    """What `python script arguments` does, inside this process: exit code, stdout, stderr."""
    module = importlib.import_module(script.removesuffix(".py"))
    out, err = out or io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(REPOSITORY / script), *map(str, arguments)])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        try:
            cli.run(module.main, getattr(module, "prefix", str)())
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
    """stdout of a call that has to succeed."""
    code, out, err = call(script, *arguments)
    assert code == 0, err
    return out


def fail(script, *arguments) -> str:
    """The last line of stderr of a call that has to fail cleanly and change nothing in the working
    directory."""
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


def start(script, *arguments, cwd, **options) -> subprocess.Popen:
    """A real process."""
    command = [sys.executable, REPOSITORY / script, *map(str, arguments)]
    options = {
        "env": ENVIRONMENT,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    } | options
    return subprocess.Popen(command, cwd=cwd, **options)


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def files(folder: Path) -> set[str]:
    """The files under a folder, less the lock that a run leaves."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names - {".lock"}


def same_weights(a: Path | str, b: Path | str) -> bool:
    """Whether two checkpoints are of the same step and agree bit for bit, the optimizer's state
    included."""
    a, b = read_checkpoint(a), read_checkpoint(b)
    a_tensors, b_tensors = (
        [*c["weights"].values(), *c["averaged_weights"].values()] for c in (a, b)
    )
    for tensors, c in ((a_tensors, a), (b_tensors, b)):
        tensors += [
            tensor for state in c["optimizer"]["state"].values() for tensor in state.values()
        ]
    return a["step"] == b["step"] and all(map(torch.equal, a_tensors, b_tensors))


def untrained(
    path: Path, timesteps: int = 60, config: dict | None = None, **entries
) -> DiscreteDiffusion:
    """Write the checkpoint of a small network of random weights, which answers to t and labels; its
    diffusion."""
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
