"""Pictures of images and of numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dataset import to_levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUND = 96  # the grey between images, and of states that are no level


def image_grid(x: Tensor, num_levels: int = 2, columns: int | None = None) -> Image.Image:
    """Images [n, 1, H, W] of integer levels as one picture, black to white, row by row on a grey ground.

    Where nothing is yet, in a state beyond the levels, the mask of absorbing transitions, and at -1, the ground shows.
    """
    n, _, H, W = x.shape
    columns = columns or math.isqrt(n - 1) + 1
    rows, gap = -(-n // columns), 2
    grey = np.append(np.linspace(0, 255, num_levels).round(), GROUND).astype(np.uint8)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap), GROUND, dtype=np.uint8)
    for i, image in enumerate(
        x[:, 0].cpu().long().clamp(max=num_levels).numpy()
    ):  # -1 is the ground, too
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[top : top + H, left : left + W] = grey[image]
    scale = 2 if n <= 1024 else 1
    return Image.fromarray(sheet).resize(
        (sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST
    )


def read_partial_digit(path: str | Path, num_levels: int = 2) -> Tensor:
    """What a picture gives of a digit, int64 [1, 1, 32, 32]: levels, or -1 where it is (at least half) transparent.

    The picture is a PNG of any kind, the digit white on black; its grey values become levels as in training. Pictures
    of 28x28 are padded as MNIST is, and that border is given: it is black.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is no PNG, of another size, or without a transparent pixel.
    """
    with open(path, "rb") as file:
        try:
            picture = Image.open(file, formats=["PNG"])
            if fits := picture.size in ((28, 28), (32, 32)):  # before it is unpacked
                pixels = np.array(picture.convert("RGBA").convert("LA"))
        except Exception as error:  # Pillow raises half a dozen types here
            raise ValueError(
                f"{path} is damaged or is not a PNG ({type(error).__name__})"
            ) from None
    if not fits:
        raise ValueError(f"{path} is {picture.width}x{picture.height} pixels: give 28x28 or 32x32")
    grey, alpha = torch.from_numpy(pixels).unbind(2)
    if (alpha >= 128).all():
        raise ValueError(f"{path} has nothing to draw: make transparent what is unknown")
    known = torch.where(alpha >= 128, to_levels(grey, num_levels).long(), -1)
    return F.pad(known, [(32 - len(known)) // 2] * 4)[None, None]


def titled_frame(x_t: Tensor, num_levels: int, title: str) -> Image.Image:
    """The images as one picture with a line of text above."""
    grid = image_grid(x_t, num_levels)
    frame = Image.new("L", (grid.width, grid.height + 24), 255)
    frame.paste(grid, (0, 24))
    ImageDraw.Draw(frame).text((6, 4), title, fill=0, font=ImageFont.load_default(size=15))
    return frame


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # half a second that drawing digits does not need

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=120)


def plot_history(history: list[dict]) -> Figure:
    """Training loss and validation bound of a run, epoch by epoch."""
    epochs = [row["epoch"] for row in history]
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in history], marker=".")
    left.set(xlabel="epoch", ylabel="training loss, nats per pixel", yscale="log")
    right.plot(epochs, [row["validation_bound"] for row in history], marker=".", color="tab:orange")
    right.set(xlabel="epoch", ylabel="validation bound, nats per image", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    return figure


def plot_terms(network_t: Tensor, t: Tensor, terms: Tensor) -> Figure:
    """The mean of the bound's terms by t: t and terms are flat, t counts the timesteps of a chain with `network_t`."""
    sums = terms.new_zeros(len(network_t)).index_add_(0, t, terms)
    counts = t.bincount(minlength=len(network_t))
    seen = counts > 0
    figure = new_figure(7, 4)
    axis = figure.subplots()
    axis.plot(network_t[seen], (sums / counts)[seen], marker=".", linewidth=0.8)
    axis.set(
        xlabel="t",
        ylabel="mean term of the bound, nats per image",
        yscale="log",
        title="Where the bound comes from",
    )
    axis.grid(alpha=0.3, which="both")
    return figure


def plot_gains(bounds: dict[str, tuple[float, list[dict]]]) -> Figure:
    """Importance-weighted bounds against the number of trajectories, by name: the plain bound and its rows of
    `metrics.summarize_gain`."""
    figure = new_figure(7, 4)
    axis = figure.subplots()
    for i, (name, (plain, rows)) in enumerate(bounds.items()):
        axis.axhline(
            plain,
            color=f"C{i}",
            linestyle="--",
            linewidth=0.8,
            label=f"plain bound, {name}: {plain:.2f}",
        )
        values = [
            [row[key] for row in rows] for key in ("trajectories", "gain", "gain_standard_error")
        ]
        axis.errorbar(
            values[0], [plain - gain for gain in values[1]], values[2], marker=".", color=f"C{i}",
            label=f"importance-weighted, {name}: {plain - values[1][-1]:.2f}",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(
        xlabel="trajectories",
        ylabel="bound, nats per image",
        title="Averaging weights before the logarithm",
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
