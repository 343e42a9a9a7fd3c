"""A folder of pictures as bytes: grey values, or the colours themselves as levels."""

import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import UserError

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

USUAL_SIDE = 128  # larger pictures: say first what they cost
MAX_COLOURS = 256


@dataclass
class Pictures:
    """Three splits (images uint8 [N, h, w], labels int64 [N]) by name, and what they share."""

    splits: dict[str, tuple[Tensor, Tensor]]
    classes: tuple[str, ...]
    size: tuple[int, int]
    palette: tuple[tuple[int, int, int], ...] | None


def find_pictures(folder: Path) -> list[Path]:
    """The files below `folder` with an ending that Pillow reads, sorted; links are followed.

    Raises UserError if there are none, or if only some of them are in sub-folders; OSError.
    """

    def refuse(error: OSError):
        raise error

    known = Image.registered_extensions().items()
    endings = {ending for ending, kind in known if kind in Image.OPEN}
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(parent)
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            # A link to a folder above would have no end.
            and not here.resolve().is_relative_to((here / name).resolve())
        ]
        shown = [here / name for name in names if not name.startswith(".")]
        files += [file for file in shown if file.suffix.lower() in endings]
    if not files:
        raise UserError(f"there are no pictures that Pillow can read in {folder}")
    outside = [file.name for file in sorted(files) if file.parent == folder]
    if 0 < len(outside) < len(files):
        message = "has pictures both in sub-folders, which are the classes, and outside of them"
        raise UserError(f"{folder} {message} ({outside[0]})")
    return sorted(files)


def open_picture(file: Path, palette: bool) -> Image.Image:
    """The picture as its EXIF data turn it, with 8 bits, without transparency.

    Raises ValueError if it is refused, and whatever Pillow raises.
    """
    if not file.is_file():  # opening a named pipe would wait
        raise ValueError("it is a broken link or not a regular file")
    with Image.open(file) as opened:
        # Cameras put a preview into the JPEG files that Pillow calls MPO.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":
            raise ValueError("it is animated or has several pages")
        picture = ImageOps.exif_transpose(opened)
    if picture.mode[0] in "IF":
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 0xFFFF or palette:
            wanted = "8 bits" if palette else "8 or 16 bits"
            raise ValueError(f"it has too many levels of grey: save it with {wanted}")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture


class Colours:
    """The colours of all pictures as states, in the order in which they turn up."""

    def __init__(self):
        self.states: dict[int, int] = {}  # by colour, as 0xRRGGBB
        self.indices: dict[int, int] = {}  # colours by index, while all pictures agree on them
        self.agree = True

    def add(self, picture: Image.Image, rgb: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """The states of a picture, uint8 [h, w]. Raises UserError if there are too many."""
        nearest = {"size": size[::-1], "resample": Image.Resampling.NEAREST}
        channels = np.asarray(rgb.resize(**nearest)).astype(np.int64)
        colours = channels @ [1 << 16, 1 << 8, 1]
        if picture.mode == "P" and self.agree:
            index = np.asarray(picture.resize(**nearest)).astype(np.int64)
            for pair in np.unique(index << 24 | colours).tolist():
                colour = pair & 0xFFFFFF
                self.agree &= self.indices.setdefault(pair >> 24, colour) == colour
        else:
            self.agree = False
        found, where = np.unique(colours.ravel(), return_inverse=True)
        states = [self.states.setdefault(colour, len(self.states)) for colour in found.tolist()]
        if len(self.states) > MAX_COLOURS:
            raise UserError(
                f"the pictures have more than {MAX_COLOURS} colours ({len(self.states)} so far): "
                "use --levels K, which makes them grey"
            )
        return np.array(states, np.uint8)[where].reshape(colours.shape)

    def in_order(self) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...]]:
        """The table from states as they turned up to states in order; the palette, in order.

        The order is that of the palette that all pictures share, else by red, green and blue.
        """
        if len(self.states) < 2:
            raise UserError("the pictures have only 1 colour: use --levels K for pictures in grey")
        first = {colour: i for i, colour in sorted(self.indices.items(), reverse=True)}
        ordered = sorted(self.states, key=first.get if self.agree else None)
        table = np.zeros(MAX_COLOURS, np.uint8)
        for state, colour in enumerate(ordered):
            table[self.states[colour]] = state
        return table, tuple((c >> 16, c >> 8 & 255, c & 255) for c in ordered)


@functools.lru_cache(maxsize=1)  # a run asks for two splits: its pictures are read once
def read_pictures(
    folder: Path,
    files: tuple[Path, ...],
    times: tuple[int, ...],
    size: tuple[int, int] | None,
    palette: bool,
) -> Pictures:
    """Read the files, which were changed at `times`. Raises UserError if one is refused."""
    if size and (len(size) != 2 or min(size) < 1):
        raise UserError(f"the size must be one side or height and width, got {size}")
    resize, colours, images, shares, refused = size is not None, Colours(), [], [], []
    for file in tqdm(files, desc="reading", unit=" pictures", leave=False, disable=None):
        try:
            picture = open_picture(file, palette)
            rgb = picture.convert("RGB")
        except Exception as error:  # Pillow raises many types
            reason = " ".join(str(error).split()) or type(error).__name__
            refused.append(f"{file} can't be read: {reason}")
            continue
        if not shares:
            size = size or rgb.size[::-1]
            announce(len(files), *size)
        if not resize and size != rgb.size[::-1]:
            sides = f"{rgb.height}x{rgb.width} pixels, others {size[0]}x{size[1]}"
            raise UserError(f"{file} has {sides}: give a --size")
        digest = hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).digest()
        shares.append(int.from_bytes(digest[:6], "big") / 2**48)
        if palette:
            images.append(colours.add(picture, rgb, size))
        else:
            grey = rgb.convert("L").resize(size[::-1], Image.Resampling.LANCZOS)
            images.append(np.asarray(grey))
    if refused:
        others = f" (nor can {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(refused[0] + others)
    names = [file.relative_to(folder).parts[0] for file in files if file.parent != folder]
    classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names] or [0] * len(files))
    table, levels = colours.in_order() if palette else (None, None)
    splits = {}
    for split, rows in split_rows(np.array(shares), folder).items():
        x = np.stack([images[i] for i in rows])
        x = x if table is None else table[x]
        splits[split] = torch.from_numpy(x), torch.from_numpy(labels[rows])
    return Pictures(splits, classes, size, levels)


def announce(n: int, h: int, w: int) -> None:
    """Say what the pictures will cost, before they are read."""
    memory = max(1, 2 * n * h * w / 1e6)  # twice, while they are divided into splits
    text = f"Reading {n:,} pictures, {h}x{w}, which takes {memory:,.0f} MB of memory"
    if h * w > USUAL_SIDE**2:
        text += f"\nTraining takes at least {h * w / 32**2:.0f} times the time and memory of 32x32"
        text += " pictures: --size makes them smaller"
    tqdm.write(text, file=sys.stderr)


def split_rows(shares: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Rows by split: 90, 5 and 5 %, but at least one picture each.

    `shares` are hashes of the contents in [0, 1): copies of a picture are in one split, and a new
    picture moves no other.
    """
    distinct = np.unique(shares)
    if len(distinct) < 3:
        message = f"{folder} has {len(distinct)} different pictures: too few for training"
        raise UserError(f"{message}, validation and test; a few hundred are a start")
    test = np.clip(0.95, distinct[2], distinct[-1])
    validation = np.clip(0.9, distinct[1], distinct[distinct < test][-1])
    held_out, tested = shares >= validation, shares >= test
    masks = {"train": ~held_out, "validation": held_out & ~tested, "test": tested}
    return {split: np.flatnonzero(mask) for split, mask in masks.items()}
