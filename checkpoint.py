"""Files: atomic writes, self-describing checkpoints, the folder of a training run.

A checkpoint is a dict of plain values and tensors. Sampling needs the configurations `network` and
`diffusion`, and `averaged_weights`. train.py adds `dataset` (Dataset.description), `binarize`,
`step`, and the run's state.
"""

import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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


# -- outputs ---------------------------------------------------------------------------------------


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
            with naming(target), open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        for target, temporary, _ in files:
            with naming(target):
                with suppress(OSError):  # no older file, or no modes on this file system
                    shutil.copymode(target, temporary)
                os.replace(temporary, target)
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


# -- checkpoints -----------------------------------------------------------------------------------


def sampling_state(diffusion: DiscreteDiffusion, data: Dataset, binarize: str, step: int) -> dict:
    """All that sampling needs, for `save_checkpoint`; the weights in half precision."""
    state = {"network": diffusion.model.config, "diffusion": diffusion.config, "step": step}
    state |= {"data": data.source, "dataset": data.description, "binarize": binarize}
    weights = diffusion.model.state_dict().items()
    return state | {"averaged_weights": {key: w.half().cpu() for key, w in weights}}


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Raises OSError, or ValueError if it can't be read back (a NumPy number in it, say)."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)
        file.seek(0)
        try:
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types
            reason = f"could not be read back ({type(error).__name__})"
            raise ValueError(f"{path}: this checkpoint {reason}") from error


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
    needed = ("network", "diffusion", "averaged_weights")
    if not all(isinstance(described.get(part), dict) for part in needed):
        raise UserError(f"{path} is not a checkpoint of this repository")
    diffusion = checkpoint["diffusion"]
    if "num_classes" in diffusion:  # the name in the first released models
        diffusion["num_levels"] = diffusion.pop("num_classes")
    if "dataset" not in checkpoint:  # as in all released models, from when there were only digits
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
    weights = checkpoint["averaged_weights"]
    try:
        network = build_network(checkpoint["network"])
        diffusion = DiscreteDiffusion(network, **checkpoint["diffusion"])
        network.load_state_dict(weights)
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


# -- the folder of a training run ------------------------------------------------------------------


class RunFolder:
    """The checkpoints, samples and reports of one run. One process owns it."""

    RUN = ("checkpoints/last.pth", "checkpoints/constant.pth", "checkpoints/model_epoch_*.pth")
    RUN += ("checkpoints/weights.pth", "metrics.csv")
    REPORTS = ("samples/sample_epoch_*.png", "loss_curve.png", "evaluation.json")
    REPORTS += ("bound_terms.png", "gain.png", "nearest.png")

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Lock the folder until the block ends or the process dies.

        Raises UserError if another process holds the lock, OSError if the folder can't be written.
        Only warns if it can't be locked, as on some network disks.
        """
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a") as lock:  # never deleted: all must lock the same file
            try:
                if os.name == "nt":
                    msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                advice = "wait for it, or take another --out-dir"
                raise UserError(f"another run is alive in {self.path}: {advice}") from None
            except OSError as error:
                problem = f"{self.path} can't be locked ({error.strerror})"
                print(f"warning: {problem}: don't start a second run there", file=sys.stderr)
            yield

    def holds_a_run(self) -> bool:
        return bool(self._files(*self.RUN))

    def newest(self) -> Path:
        """last.pth, which --resume takes. Raises UserError if there is none."""
        last = self.checkpoints / "last.pth"
        if not last.exists():
            raise UserError(f"--resume: there is no checkpoint {last}")
        return last

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
