"""Pictures of digits and of numbers."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cli import UserError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from checkpoint import atomic_write
from dataset import to_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKGROUND = 96  # the grey between images, also for masks and for unknown pixels


def image_grid(x: Tensor, num_levels: int = 2, columns: int | None = None) -> Image.Image:
    """One picture of the images [n, 1, H, W], integers, row by row; level 0 is black.

    States that are not levels (-1, or a mask) get the colour of the background.
    """
    n, _, H, W = x.shape
    columns = columns or math.isqrt(n - 1) + 1
    rows, gap = math.ceil(n / columns), 2
    grey = np.append(np.linspace(0, 255, num_levels).round(), BACKGROUND).astype(np.uint8)
    shape = rows * (H + gap) + gap, columns * (W + gap) + gap
    sheet = np.full(shape, BACKGROUND, dtype=np.uint8)
    states = x[:, 0].cpu().long().clamp(max=num_levels).numpy()
    for i, image in enumerate(states):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[top : top + H, left : left + W] = grey[image]  # grey[-1] is the background
    scale = 2 if n <= 1024 else 1
    size = shape[1] * scale, shape[0] * scale
    return Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST)


def read_partial_digit(path: str | Path, num_levels: int = 2) -> Tensor:
    """The known pixels of a digit, int64 [1, 1, 32, 32]: levels, or -1 where they are unknown.

    The file is a PNG, 28x28 or 32x32, white on black. Pixels are unknown where it is at least half
    transparent. Grey values become levels as in training. 28x28 is padded with known black pixels.

    Raises:
        OSError: if the file can't be read.
        UserError: if it is not such a PNG, or has no unknown pixel.
    """
    with open(path, "rb") as file:
        try:
            picture = Image.open(file, formats=["PNG"])
            fits = picture.size in ((28, 28), (32, 32))
            pixels = np.array(picture.convert("RGBA").convert("LA")) if fits else None
        except Exception as error:  # Pillow raises half a dozen types
            reason = type(error).__name__
            raise UserError(f"{path} is damaged or is not a PNG ({reason})") from None
    if pixels is None:
        raise UserError(f"{path} is {picture.width}x{picture.height} pixels: give 28x28 or 32x32")
    grey, alpha = torch.from_numpy(pixels).unbind(2)
    given = alpha >= 128
    if given.all():
        raise UserError(f"{path} has nothing to draw: make unknown pixels transparent")
    known = torch.where(given, to_levels(grey, num_levels).long(), -1)
    return F.pad(known, [(32 - len(known)) // 2] * 4)[None, None]


def titled_frame(x_t: Tensor, num_levels: int, title: str) -> Image.Image:
    """The image grid under a line of text."""
    grid = image_grid(x_t, num_levels)
    frame = ImageOps.expand(grid, (0, 24, 0, 0), "white")
    ImageDraw.Draw(frame).text((6, 4), title, fill="black", font=ImageFont.load_default(size=15))
    return frame


def write_picture(path: str | Path, draw: Callable[[BinaryIO], None]) -> bool:
    """Write what `draw` writes into a buffer. False after a failure, which is only a warning:
    a picture must not end a program that has trained or measured for hours."""
    try:
        with atomic_write(path) as file:
            draw(file)
        return True
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"warning: {path} was not written: {reason}", file=sys.stderr)
        return False


# --------------------------------------------------------------------------------------------------
# Figures


@contextmanager
def default_style() -> Iterator[None]:
    """Matplotlib's default settings, whatever a user's matplotlibrc says. Usable as a decorator."""
    # A notebook's shells inherit MPLBACKEND. Where that backend is missing, matplotlib can't be
    # imported. We need none: PNGs are always Agg's.
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib  # takes half a second, so only for figures

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@default_style()
def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@default_style()
def save_figure(figure: Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=120)


def subplots(*ylabels: str, **settings) -> tuple[Figure, list[Axes]]:
    figure = new_figure(3 + 4 * len(ylabels), 4)
    axes = [figure.add_subplot(1, len(ylabels), 1 + i) for i in range(len(ylabels))]
    for axis, ylabel in zip(axes, ylabels, strict=True):
        axis.set(ylabel=ylabel, **settings)
        axis.grid(alpha=0.3, which="both")
    return figure, axes


@default_style()
def plot_history(history: list[dict]) -> Figure:
    """Training loss and validation bound of a run by epoch."""
    ylabels = "training loss, nats per pixel", "validation bound, nats per image"
    figure, axes = subplots(*ylabels, xlabel="epoch", yscale="log")
    for axis, key in zip(axes, ("train_loss", "validation_bound"), strict=True):
        axis.plot([row["epoch"] for row in history], [row[key] for row in history], marker=".")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    return figure


@default_style()
def plot_terms(network_t: Tensor, t: Tensor, terms: Tensor) -> Figure:
    """The mean of the bound's terms by t: flat `t` and `terms`, of a chain with `network_t`."""
    sums = terms.new_zeros(len(network_t)).index_add_(0, t, terms)
    counts = t.bincount(minlength=len(network_t))
    seen, labels = counts > 0, {"title": "Where the bound comes from", "xlabel": "t"}
    figure, (axis,) = subplots("mean term of the bound, nats per image", yscale="log", **labels)
    axis.plot(network_t[seen], (sums / counts)[seen], marker=".", linewidth=0.8)
    return figure


@default_style()
def plot_gains(bounds: dict[str, tuple[float, list[dict]]]) -> Figure:
    """By name, the plain bound and the rows of `metrics.summarize_gain`."""
    labels = {"title": "Averaging weights before the logarithm", "xlabel": "trajectories"}
    figure, (axis,) = subplots("bound, nats per image", **labels)
    for i, (name, (plain, rows)) in enumerate(bounds.items()):
        axis.axhline(plain, label=f"plain bound, {name}: {plain:.2f}", color=f"C{i}", ls="--")
        x, y = [row["trajectories"] for row in rows], [plain - row["gain"] for row in rows]
        style = {"color": f"C{i}", "label": f"importance-weighted, {name}: {y[-1]:.2f}"}
        axis.errorbar(x, y, [row["gain_standard_error"] for row in rows], marker=".", **style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
