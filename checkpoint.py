"""Files: outputs that are whole or not there, the folder of a training run, checkpoints that describe themselves.

A checkpoint is a dict of plain values and tensors. What drawing needs: `network` and `diffusion`, the configurations,
and `averaged_weights`; train.py adds `data`, `binarize` and `step`, and what a run needs to go on.
"""

import contextlib
import errno
import io
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cli import REPOSITORY, provenance

import filelock
import torch

from diffusion import DiscreteDiffusion
from model import build_network

# What the scripts use where no checkpoint is named, and how they draw from any
RELEASED = REPOSITORY / "results_d3pm" / "released" / "d3pm_mnist.pth"
TIMESTEPS = 30  # unless training had fewer; see the results page
PARTICLES = 16  # walks to choose from where a digit is filled in; see the results page
LAST_STEP = "mode"  # as in the authors' code; see `DiscreteDiffusion.reverse_process`

# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@contextmanager
def atomic_writes(
    *paths: str | Path, inputs: Iterable[str | Path] = ()
) -> Iterator[list[BinaryIO]]:
    """Yield binary files that become `paths`, all together, when the block ends well; a failure leaves what was there.

    Folders are made as needed and symbolic links followed; a new file has the mode that the umask gives, a replaced one
    keeps its own where the file system knows modes.

    Raises:
        OSError: before the block if one of the paths can't be written.
        ValueError: before the block if two of them, or one and one of the `inputs`, are the same file.
    """
    targets = [Path(path).expanduser().resolve() for path in paths]
    taken = [(Path(path).resolve(), "read") for path in inputs]
    for path, target in zip(paths, targets, strict=True):
        for other, done in taken:
            if target == other or (target.exists() and other.exists() and target.samefile(other)):
                raise ValueError(
                    f"{path} can't be written: the same file is {done} by this command"
                )
        taken.append((target, "written"))
    opened: list[tuple[BinaryIO, Path]] = []
    try:
        for target in targets:
            opened.append(open_temporary(target))
        yield [file for file, _ in opened]
        for file, _ in opened:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for (_, temporary), target in zip(opened, targets, strict=True):
            if target.exists():
                with contextlib.suppress(OSError):  # not every file system has modes
                    os.chmod(temporary, target.stat().st_mode & 0o777)
            os.replace(temporary, target)
    finally:
        for file, temporary in opened:
            with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                file.close()
            temporary.unlink(missing_ok=True)


def open_temporary(target: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `target`. Raises OSError in words if there can't be one."""
    if target.exists() and not target.is_file():
        raise OSError(f"{target} is not a regular file")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return open(temporary, "xb"), temporary
    except OSError as error:
        raise OSError(f"can't write {target}: {error.strerror}") from None


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """`atomic_writes` of one file."""
    with atomic_writes(path) as (file,):
        yield file


def json_bytes(value: dict) -> bytes:
    """The dict as JSON with `provenance` in front; what is infinite or not a number becomes a string."""

    def plain(x):
        if isinstance(x, dict):
            return {str(key): plain(item) for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [plain(item) for item in x]
        return (
            str(x) if isinstance(x, Path) or (isinstance(x, float) and not math.isfinite(x)) else x
        )

    return (
        json.dumps(plain({"provenance": provenance()} | value), indent=2, allow_nan=False).encode()
        + b"\n"
    )


def write_json(path: str | Path, value: dict) -> None:
    with atomic_write(path) as file:
        file.write(json_bytes(value))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically.

    Raises:
        OSError: a full disk, no permission; any older file stays.
        ValueError: if it holds what could not be read back, numbers of numpy, say; the older file stays, too.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    try:
        torch.load(io.BytesIO(buffer.getbuffer()), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here, with pages of text
        raise ValueError(
            f"{path}: this checkpoint could not be read back ({type(error).__name__})"
        ) from None
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict:
    """The dict that `save_checkpoint` wrote, on the CPU, read with `weights_only=True`.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the file system says.
        ValueError: if the file is damaged or is not a checkpoint of this repository.
    """
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types here, with pages of text
            raise ValueError(
                f"{path} is damaged or is not a checkpoint (torch.load: {type(error).__name__})"
            ) from None
    if (
        not isinstance(checkpoint, dict)
        or not {"network", "diffusion", "averaged_weights"} <= checkpoint.keys()
    ):
        raise ValueError(f"{path} is not a checkpoint of this repository")
    if not all(
        isinstance(checkpoint[key], dict) for key in ("network", "diffusion", "averaged_weights")
    ):
        raise ValueError(f"{path} is not a checkpoint of this repository")
    config = checkpoint["diffusion"]
    if "num_classes" in config:  # written before num_levels had its name
        config["num_levels"] = config.pop("num_classes")
        for values in (config, checkpoint.get("settings") or {}):
            if config.get("transition") == "gaussian":
                values["schedule"] = "fitted"  # then called linear
            if "hybrid_weight" in values:  # then beside T times L_{t-1}
                values["hybrid_weight"] /= config["timesteps"]
    return checkpoint


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", timesteps: int | None = None
) -> DiscreteDiffusion:
    """A ready `DiscreteDiffusion` in eval mode with the averaged weights, respaced to so many timesteps if given.

    Raises what `read_checkpoint` and `DiscreteDiffusion.respaced` raise.
    """
    return build_diffusion(read_checkpoint(path), path, device, timesteps)


def build_diffusion(
    checkpoint: dict, path: str | Path, device="cpu", timesteps=None
) -> DiscreteDiffusion:
    """`load_checkpoint` of what `read_checkpoint` gave; `path` is for messages."""
    weights = checkpoint["averaged_weights"]
    try:
        claimed = [
            n
            for v in checkpoint["network"].values()
            for n in (v if isinstance(v, list | tuple) else [v])
        ]
        held = max([len(weights), *(n for p in weights.values() for n in p.shape)])
        if any(isinstance(n, int) and n > held for n in claimed):  # before memory is asked for
            raise ValueError("it describes a larger network than its weights are of")
        diffusion = DiscreteDiffusion(
            build_network(checkpoint["network"]), **checkpoint["diffusion"]
        )
        diffusion.model.load_state_dict(weights)
    except (
        RuntimeError,
        TypeError,
        KeyError,
        ValueError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of the repository: {reason}") from None
    if not all(p.isfinite().all() for p in weights.values()):
        raise ValueError(f"{path} holds weights that are not finite: its training has diverged")
    if timesteps is not None:
        diffusion = diffusion.respaced(timesteps)
    return diffusion.eval().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a training run


class RunFolder:
    """checkpoints/, samples/ and the reports of one run, by their names; one live process owns it."""

    CHECKPOINTS = ("last.pth", "constant.pth", "weights.pth", "model_epoch_*.pth")
    NO_LOCKS = (
        errno.ENOSYS,
        errno.ENOLCK,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
    )  # what some network shares answer
    REPORTS = (
        "metrics.csv",
        "loss_curve.png",
        "evaluation.json",
        "bound_terms.png",
        "gain.png",
        "nearest.png",
    )

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """The folder is this process's until the block ends, however it ends: the system frees a dead process's lock.

        Raises:
            ValueError: if another process owns it.
            OSError: if it can't be written.
        """
        new = not self.path.exists()
        lock = filelock.FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"another run is alive in {self.path}: wait for it, or take another --out-dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in self.NO_LOCKS:
                raise OSError(f"can't write {self.path}: {error.strerror}") from None
            print(
                f"warning: {self.path} can't be locked: start no second run there", file=sys.stderr
            )
        try:
            yield
        finally:
            lock.release()
            if not self.holds_a_run():  # an error that came first leaves nothing
                (self.path / ".lock").unlink(missing_ok=True)
                if new:
                    with contextlib.suppress(OSError):
                        self.path.rmdir()

    def holds_a_run(self) -> bool:
        return (self.path / "metrics.csv").exists() or bool(
            self._own(self.checkpoints, self.CHECKPOINTS)
        )

    def newest(self) -> Path:
        """last.pth, or the youngest of the others. Raises ValueError if there is none."""
        found = [
            path
            for path in self._own(self.checkpoints, self.CHECKPOINTS)
            if path.name != "weights.pth"
        ]
        if not found:
            raise ValueError(f"--resume: there is no checkpoint in {self.checkpoints}")
        return max(found, key=lambda path: (path.name == "last.pth", path.stat().st_mtime))

    def clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for path in [
            *self._own(self.checkpoints, self.CHECKPOINTS),
            *self._own(self.samples, ("sample_epoch_*.png",)),
            *self._own(self.path, self.REPORTS),
        ]:
            path.unlink()

    def tidy(self) -> None:
        """Delete what a killed save has left behind; with the lock held, nobody else is saving under these names."""
        for path in self._own(self.checkpoints, [f".{name}.????????" for name in self.CHECKPOINTS]):
            path.unlink(missing_ok=True)

    @staticmethod
    def _own(folder: Path, patterns: Iterable[str]) -> list[Path]:
        return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
