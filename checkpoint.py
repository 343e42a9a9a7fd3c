"""Files: atomic writes, self-describing checkpoints, the folder of a training run.

A checkpoint is a dict of plain values and tensors. Sampling needs the configurations `network` and
`diffusion`, and `averaged_weights`. train.py adds `dataset` (Dataset.description), `binarize`,
`step`, and the run's state.
"""

import errno
import io
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cli import REPOSITORY, UserError, provenance, user_errors

import torch

from dataset import Dataset
from diffusion import DiscreteDiffusion
from model import build_network
from trajectories import respaced

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

# Defaults of the scripts; the results page explains them
RELEASED = REPOSITORY / "results_d3pm" / "released" / "d3pm_mnist.pth"
TIMESTEPS = 30  # or fewer, if training had fewer
PARTICLES = 16  # trajectories to choose from when filling in


def default_last_step(diffusion: DiscreteDiffusion) -> str:
    """The default of --last-step: "draw" for the joint form, as in the paper."""
    return "mode" if diffusion.reverse == "mixture" else "draw"


# --------------------------------------------------------------------------------------------------
# Outputs

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # on some network disks


@contextmanager
def atomic_writes(*paths: str | Path, inputs: Iterable = ()) -> Iterator[list[io.BytesIO]]:
    """Yield buffers that become the files `paths` if the block ends without an error.

    After an error, older files are unchanged. Creates folders, follows links, keeps modes. Raises
    OSError before the block if a path can't be written, or after it (a full disk, say); UserError
    before the block if two of `paths` and `inputs` are the same file.
    """
    targets = [Path(path).expanduser().resolve() for path in paths]
    taken = [(Path(path).resolve(), "read") for path in inputs]
    for target in targets:
        for other, use in taken:
            if target == other or (target.exists() and other.exists() and target.samefile(other)):
                raise UserError(f"can't write {target}: the same file is {use} by this command")
        taken.append((target, "written"))
    # Shortened, as the target's name may already have the maximum of 255 bytes.
    names = [f".{target.name[:32]}.{secrets.token_hex(4)}" for target in targets]
    files = [(t, t.parent / name, io.BytesIO()) for t, name in zip(targets, names, strict=True)]
    try:
        for target, temporary, _ in files:
            with naming(target):
                if target.exists() and not target.is_file():
                    raise OSError("it is not a regular file")
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary.touch(exist_ok=False)
        yield [buffer for _, _, buffer in files]
        for target, temporary, buffer in files:
            with naming(target):
                write_to_disk(temporary, buffer)
        for target, temporary, _ in files:
            with naming(target):
                replace(temporary, target)
    finally:
        for _, temporary, _ in files:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[io.BytesIO]:
    with atomic_writes(path) as (file,):
        yield file


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Name `target` in an OSError; the system names the temporary file or none."""
    try:
        yield
    except OSError as error:
        raise OSError(f"can't write {target}: {error.strerror or error}") from error


def write_to_disk(path: Path, buffer: io.BytesIO) -> None:
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def replace(temporary: Path, target: Path) -> None:
    """os.replace that keeps the mode, and retries while a virus scanner blocks it on Windows."""
    with suppress(OSError):  # no older file, or no modes on this file system
        shutil.copymode(target, temporary)
    for seconds in (0.1, 0.2, 0.4, 0.8):
        try:
            return os.replace(temporary, target)
        except PermissionError:
            time.sleep(seconds)
    os.replace(temporary, target)


def json_bytes(value: dict) -> bytes:
    """The dict as JSON, `provenance` first; infinities, NaN and paths become strings."""
    text = json.dumps({"provenance": provenance()} | value, default=os.fspath)
    finite = json.loads(text, parse_constant=lambda constant: str(float(constant)))
    return json.dumps(finite, indent=2).encode() + b"\n"


def write_json(path: str | Path, value: dict) -> None:
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def write_csv(history: list[dict], file: io.BytesIO) -> None:
    """Rows as CSV, numbers with six digits."""
    rows = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in r.values()] for r in history]
    file.write("".join(",".join(row) + "\n" for row in [history[0], *rows]).encode())


# --------------------------------------------------------------------------------------------------
# Checkpoints


def sampling_state(diffusion: DiscreteDiffusion, data: Dataset, binarize: str, step: int) -> dict:
    """All that sampling needs, for `save_checkpoint`; the weights in half precision."""
    state = {"network": diffusion.model.config, "diffusion": diffusion.config, "step": step}
    state |= {"data": data.source, "dataset": data.description, "binarize": binarize}
    weights = diffusion.model.state_dict().items()
    return state | {"averaged_weights": {key: w.half().cpu() for key, w in weights}}


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically.

    Raises OSError, or ValueError if it can't be read back (a NumPy number in it, say).
    """
    with atomic_write(path) as file:
        torch.save(checkpoint, file)
        file.seek(0)
        try:
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types
            name = type(error).__name__
            raise ValueError(f"{path}: this checkpoint could not be read back ({name})") from error


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU with `weights_only=True`; older layouts are converted.

    Raises OSError, or UserError if it is damaged or not a checkpoint of this repository.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file")  # opening a named pipe would hang
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types, with pages of text
            reason = f"torch.load: {type(error).__name__}"
            raise UserError(f"{path} is damaged or is not a checkpoint ({reason})") from None
    described = checkpoint if isinstance(checkpoint, dict) else {}
    parts = [described.get(part) for part in ("network", "diffusion", "averaged_weights")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} is not a checkpoint of this repository")
    if "num_classes" in parts[1]:  # the name in the first released models
        parts[1]["num_levels"] = parts[1].pop("num_classes")
    if "dataset" not in checkpoint:  # from when there were only digits
        known = {"classes": [*"0123456789"], "size": [28, 28], "palette": None}
        checkpoint["dataset"] = {"source": checkpoint.get("data", "mnist")} | known
    return checkpoint


def load_checkpoint(path: str | Path, device="cpu", timesteps=None) -> DiscreteDiffusion:
    """A `DiscreteDiffusion` in eval mode with the averaged weights, respaced to `timesteps`.

    Raises UserError, or OSError as `read_checkpoint` does.
    """
    return build_diffusion(read_checkpoint(path), path, device, timesteps)


def build_diffusion(checkpoint: dict, path, device="cpu", timesteps=None) -> DiscreteDiffusion:
    """`load_checkpoint` for the dict of `read_checkpoint`; `path` is for messages."""
    config, weights = checkpoint["network"], checkpoint["averaged_weights"]
    try:
        sizes = [n for v in config.values() for n in (v if isinstance(v, list | tuple) else [v])]
        limit = max(len(weights), *(n for p in weights.values() for n in p.shape))
        if any(isinstance(n, int) and n > limit for n in sizes):
            raise ValueError("it describes a larger network than its weights")
        diffusion = DiscreteDiffusion(build_network(config), **checkpoint["diffusion"])
        diffusion.model.load_state_dict(weights)
    except Exception as error:  # a broken configuration may raise anything
        reason = " ".join(str(error).split())[:300]
        message = f"{path} does not fit this version of the repository: {reason}"
        raise UserError(message) from error
    if not all(p.isfinite().all() for p in weights.values()):
        raise UserError(f"{path} has weights that are not finite: its training diverged")
    if timesteps is not None:
        with user_errors():
            diffusion = respaced(diffusion, timesteps)
    return diffusion.eval().to(device)


# --------------------------------------------------------------------------------------------------
# The folder of a training run


class RunFolder:
    """The checkpoints, samples and reports of one run. One process owns it."""

    RESUMABLE = tuple(f"checkpoints/{x}.pth" for x in ("last", "constant", "model_epoch_*"))
    RUN = (*RESUMABLE, "checkpoints/weights.pth", "metrics.csv")
    REPORTS = ("samples/sample_epoch_*.png", "loss_curve.png", "evaluation.json")
    REPORTS += ("bound_terms.png", "gain.png", "nearest.png")

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Lock the folder until the block ends or the process dies.

        Raises UserError if another process holds the lock, OSError if the folder can't be written.
        Only warns if the disk has no locks.
        """
        with ExitStack() as stack:
            with naming(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                # Never deleted, so that all processes lock the same file.
                file = stack.enter_context(open(self.path / ".lock", "a"))
                self._lock(file.fileno())
            yield

    def _lock(self, descriptor: int) -> None:
        try:
            if os.name == "nt":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            advice = "wait for it, or take another --out-dir"
            raise UserError(f"another run is alive in {self.path}: {advice}") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warning = f"warning: {self.path} can't be locked: don't start a second run there"
            print(warning, file=sys.stderr)

    def holds_a_run(self) -> bool:
        return bool(self._files(*self.RUN))

    def newest(self) -> Path:
        """last.pth, else the checkpoint with the highest step.

        Raises UserError if there is none, or if one that may be the newest is damaged.
        """
        steps, message = {}, ""
        for path in self._files(*self.RESUMABLE):
            try:
                steps[path] = read_checkpoint(path).get("step", 0)
            except UserError as error:
                message = message or str(error)
            if path.name == "last.pth" and path in steps:
                return path
        newest = max(steps, key=steps.get, default=None)
        if newest and not message:
            return newest
        if newest:
            message += f"; continue from the next newest with --resume {shlex.quote(str(newest))}"
        raise UserError(message or f"--resume: there is no checkpoint in {self.checkpoints}")

    def clear(self) -> None:
        """Delete the files of a run, and nothing else."""
        for path in self._files(*self.RUN, *self.REPORTS):
            path.unlink()

    def tidy(self) -> None:
        """Delete the temporary files of a killed save. For the folder's owner only."""
        for path in self._files("checkpoints/.*.pth.????????"):
            path.unlink(missing_ok=True)

    def _files(self, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in self.path.glob(pattern) if path.is_file()]
