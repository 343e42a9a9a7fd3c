"""Image grids, partly transparent images, and figures."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from unittest import mock

from cli import UserError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from checkpoint import atomic_write
from dataset import NAMES, padded, to_levels, unpadded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKGROUND = 96  # the grey between images, also for masks and for unknown pixels


def style_of(checkpoint: dict) -> dict:
    """How to show a checkpoint's images: keyword arguments of the functions below."""
    dataset, num_levels = checkpoint["dataset"], checkpoint["diffusion"]["num_levels"]
    size = None if dataset["source"] in NAMES else tuple(dataset["size"])
    return {"num_levels": num_levels, "palette": dataset["palette"], "size": size}


def without_padding(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """[n, 1, H, W] -> a copy [n, 1, h, w], or x itself if `size` is None."""
    return x if size is None else unpadded(x, size).contiguous()


def image_grid(
    x: Tensor, num_levels: int = 2, columns: int | None = None, palette=None, size=None
) -> Image.Image:
    """Tile integer images [n, 1, H, W] row by row; level 0 is black.

    States that are not levels (-1 or a mask) get the background colour. `palette` has the (r, g, b)
    of each level. `size`, (h, w), crops the padding.
    """
    x = without_padding(x, size)
    n, _, H, _ = x.shape
    columns = columns or math.isqrt(n - 1) + 1
    rows, gap = math.ceil(n / columns), 2
    colours = np.array(palette or np.linspace(0, 255, num_levels).round()[:, None])
    colours = np.append(colours, np.full_like(colours[:1], BACKGROUND), axis=0).astype(np.uint8)
    states = x[:, 0].cpu().long().clamp(max=num_levels)
    # colours[-1] is the background
    states = F.pad(states, (gap, 0, gap, 0, 0, rows * columns - n), value=-1)
    sheet = states.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * (H + gap), -1)
    picture = Image.fromarray(colours[F.pad(sheet, (0, gap, 0, gap), value=-1)].squeeze())
    return ImageOps.scale(picture, 2 if n <= 1024 else 1, Image.Resampling.NEAREST)


def read_partial_digit(path: str | Path, num_levels: int = 2, palette=None, size=None) -> Tensor:
    """The known pixels of an image, int64 [1, 1, H, W]: levels, or -1 where they are unknown.

    The file is an 8-bit PNG of the model's image size: `size`, or 28x28 or 32x32 for MNIST. Pixels
    that are at least half transparent are unknown. Padding is known. Raises OSError, or UserError
    if it is not such a PNG, has no unknown pixel or a colour not in the palette.
    """
    sizes = ((28, 28), (32, 32)) if size is None else (size,)
    with open(path, "rb") as file:
        try:
            picture = Image.open(file, formats=["PNG"]).convert("RGBA")
        except Exception as error:  # Pillow raises many types
            reason = type(error).__name__
            raise UserError(f"{path} is damaged or is not a PNG ({reason})") from None
    if (picture.height, picture.width) not in sizes:
        wanted = " or ".join(f"{w}x{h}" for h, w in sizes)
        raise UserError(f"{path} is {picture.width}x{picture.height} pixels: give {wanted}")
    rgba, grey = (torch.from_numpy(np.array(one)) for one in (picture, picture.convert("L")))
    given, levels = rgba[..., 3] >= 128, to_levels(grey, num_levels).long()
    if given.all():
        raise UserError(f"{path} has nothing to draw: make unknown pixels transparent")
    if palette is not None:
        same = (rgba[..., None, :3] == torch.tensor(palette)).all(-1)  # [h, w, K]
        levels, foreign = same.byte().argmax(-1), rgba[given & ~same.any(-1), :3].tolist()
        if foreign:
            colour = tuple(foreign[0])
            raise UserError(f"{path} has the colour {colour}, which no training picture has")
    return padded(torch.where(given, levels, -1)[None])


def titled_frame(x_t: Tensor, title: str, **style) -> Image.Image:
    """The image grid under a line of text."""
    frame = ImageOps.expand(image_grid(x_t, **style), (0, 24, 0, 0), "white")
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(frame).text((6, 4), title, fill="black", font=font)
    return frame


def write_report(path: str | Path, draw: Callable[[BinaryIO], None]) -> bool:
    """Write a picture or a table; `draw` writes it to a buffer. A failure is only a warning, and
    returns False: it must not end a program that has trained or measured for hours."""
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
    """Use Matplotlib's defaults and ignore the user's matplotlibrc. Also a decorator."""
    with mock.patch.dict(os.environ):
        # Shells in notebooks inherit MPLBACKEND. If that backend is missing, matplotlib can't be
        # imported. PNGs don't need it.
        os.environ.pop("MPLBACKEND", None)
        import matplotlib  # takes half a second, and only figures need it
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
    axes = figure.subplots(1, len(ylabels), squeeze=False)[0]
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
    """The mean bound term at each t, from flat `t` and `terms` of a chain with `network_t`."""
    t, group = t.unique(return_inverse=True)
    means = terms.new_zeros(len(t)).scatter_reduce(0, group, terms, "mean", include_self=False)
    labels = {"title": "Where the bound comes from", "xlabel": "t"}
    figure, (axis,) = subplots("mean term of the bound, nats per image", yscale="log", **labels)
    axis.plot(network_t[t], means, marker=".", linewidth=0.8)
    return figure


@default_style()
def plot_gains(bounds: dict[str, dict]) -> Figure:
    """The bounds of evaluate.py's report by name, and their gains by number of trajectories."""
    labels = {"title": "Averaging weights before the logarithm", "xlabel": "trajectories"}
    figure, (axis,) = subplots("bound, nats per image", **labels)
    for colour, (name, bound) in zip(("C0", "C1"), bounds.items(), strict=False):
        plain, rows = bound["nats_per_image"], bound["importance_weighted"]["by_trajectories"]
        axis.axhline(plain, label=f"plain bound, {name}: {plain:.2f}", color=colour, ls="--")
        keys = "trajectories", "nats_per_image", "gain_standard_error"
        x, y, error = ([row[key] for row in rows] for key in keys)
        label = f"importance-weighted, {name}: {y[-1]:.2f}"
        axis.errorbar(x, y, error, marker=".", color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
