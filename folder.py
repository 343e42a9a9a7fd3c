"""Read a folder of pictures as bytes: grey values, or indices into a palette."""

import functools
import hashlib
import os
import sys
from pathlib import Path

from cli import UserError

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

SPLITS = ("train", "validation", "test")


def load_folder(folder: Path, split: str, size=None, palette: bool = False) -> tuple:
    """Images uint8 [N, h, w], labels int64 [N], class names, (h, w), palette or None.

    The images are grey or, with `palette`, indices into the palette: the colours of all pictures,
    sorted by RGB value. `size`: a side or (h, w) to resize to.

    Raises UserError if a picture can't be used, OSError for a broken link or a sub-folder that
    can't be read.
    """
    sides = (size, size) if isinstance(size, int) else size and tuple(size)
    if sides and (len(sides) != 2 or min(sides) < 1):
        raise UserError(f"the size must be one side or height and width, got {size}")
    files = find_pictures(folder)
    times = tuple(file.stat().st_mtime_ns for file in files)
    return read_all(folder, tuple(files), times, sides, palette)[split]


def find_pictures(folder: Path) -> list[Path]:
    """The files below `folder` with an extension that Pillow reads, sorted; follows links.

    Raises UserError if there are none or only some are in sub-folders; OSError.
    """

    def refuse(error: OSError):
        raise error

    known = Image.registered_extensions().items()
    endings = {ending for ending, kind in known if kind in Image.OPEN}
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        parent = Path(parent)
        above = {parent.resolve(), *parent.resolve().parents}  # links to these would never end
        shown = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        folders[:] = [name for name in shown if (parent / name).resolve() not in above]
        shown = [parent / name for name in names if not name.startswith(".")]
        files += [file for file in shown if file.suffix.lower() in endings]
    if not files:
        raise UserError(f"there are no pictures that Pillow can read in {folder}")
    outside = sorted(file.name for file in files if file.parent == folder)
    if 0 < len(outside) < len(files):
        message = "has pictures both in sub-folders, which are the classes, and outside of them"
        raise UserError(f"{folder} {message} ({outside[0]})")
    return sorted(files)


def open_picture(file: Path, palette: bool) -> Image.Image:
    """The picture in RGB, rotated by its EXIF tag, transparency over black.

    Raises ValueError if the picture is unsupported, and whatever Pillow raises.
    """
    with Image.open(file) as opened:
        # Pillow calls a camera's JPEG with a preview MPO.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":
            raise ValueError("it is animated or has several pages")
        picture = ImageOps.exif_transpose(opened)
    if picture.mode[0] in "IF":
        values = np.asarray(picture)
        if palette or picture.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("it has too many levels of grey: save it with 8 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture.convert("RGB")


@functools.lru_cache(maxsize=1)  # a run loads two splits; pictures are read once
def read_all(folder: Path, files: tuple, times: tuple, size: tuple | None, palette: bool) -> dict:
    """`load_folder` for every split. `times`, when the files changed, are for the cache only."""
    images, shares, colours = [], [], set()
    for file in tqdm(files, desc="reading", unit=" pictures", leave=False, disable=None):
        try:
            rgb = open_picture(file, palette)
        except Exception as error:  # Pillow raises many types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{file} can't be read: {reason}") from None
        if not images:
            h, w = size or (rgb.height, rgb.width)
            announce(len(files), h, w)
        if not size and rgb.size != (w, h):
            sides = f"{rgb.height}x{rgb.width} pixels, others {h}x{w}"
            raise UserError(f"{file} has {sides}: give a --size")
        digest = hashlib.sha256(rgb.tobytes()).digest()
        shares.append(int.from_bytes(digest[:6], "big") / 2**48)
        if not palette:
            grey = rgb.convert("L").resize((w, h), Image.Resampling.LANCZOS)
            images.append(np.asarray(grey))
            continue
        nearest = np.asarray(rgb.resize((w, h), Image.Resampling.NEAREST))
        images.append(nearest @ np.array([1 << 16, 1 << 8, 1], np.uint32))  # 0xRRGGBB
        colours.update(np.unique(images[-1]).tolist())
        if len(colours) > 256:
            problem = "the pictures have more than 256 colours"
            raise UserError(f"{problem}: use --levels K, which makes them grey")
    ordered = sorted(colours)
    if palette:
        if len(ordered) < 2:
            raise UserError("the pictures have only 1 colour: use --levels K for grey pictures")
        images = [np.searchsorted(ordered, image).astype(np.uint8) for image in images]
    images = np.stack(images)
    flat = files[0].parent == folder
    names = ["" if flat else file.relative_to(folder).parts[0] for file in files]
    classes, labels = np.unique(names, return_inverse=True)
    rgb_of = tuple((c >> 16, c >> 8 & 255, c & 255) for c in ordered) or None
    known = () if flat else tuple(classes.tolist()), (h, w), rgb_of
    part, splits = split_by(np.array(shares)), {}
    for i, split in enumerate(SPLITS):
        arrays = images[part == i], labels[part == i]
        splits[split] = *map(torch.from_numpy, arrays), *known
    return splits


def announce(n: int, h: int, w: int) -> None:
    text = f"Reading {n:,} pictures, {h}x{w}"
    if h * w > 128**2:
        text += f"\nTraining takes {h * w / 32**2:.0f} times as long as with 32x32: try --size"
    tqdm.write(text, file=sys.stderr)


def split_by(shares: np.ndarray) -> np.ndarray:
    """Each picture's index into SPLITS: 90, 5 and 5 %, at least one picture each.

    `shares` are hashes of the contents in [0, 1), so copies share a split and a new picture moves
    no other, unless there are only a few dozen. Raises UserError for fewer than 3 different ones.
    """
    distinct = np.unique(shares)
    if len(distinct) < 3:
        few = f"there are only {len(distinct)} different pictures"
        raise UserError(f"{few}, too few for three splits: a few hundred are a start")
    test = np.clip(0.95, distinct[2], distinct[-1])
    validation = np.clip(0.9, distinct[1], distinct[distinct < test][-1])
    return np.digitize(shares, [validation, test])
