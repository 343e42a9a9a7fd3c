"""Two pictures of noise: a digit at t = 0, 25, ..., 200, and the information that is left at t.

    python -m experiments.noise --data offline

Writes forward.png and noise.png.
"""

import math
from functools import partial

from cli import run

import torch
from torch import Tensor

from dataset import load_dataset, to_levels
from diffusion import DiscreteDiffusion
from experiments.common import experiment_parser, output
from pictures import new_figure, save_figure, write_picture
from transitions import FAMILIES

LEVELS, DIGIT = 8, 8


def mutual_information(diffusion: DiscreteDiffusion) -> Tensor:
    """I(x_t; x_0) of a pixel with K equally likely levels, as a share of log K: float64 [T+1]."""
    q = diffusion.bar_Q[:, : diffusion.num_levels]  # q(x_t | x_0), [T+1, K, S]
    logs = torch.where(q > 0, (q / q.mean(1, keepdim=True)).log(), 0.0)
    return (q * logs).sum(2).mean(1) / math.log(diffusion.num_levels)


def changed(diffusion: DiscreteDiffusion) -> Tensor:
    """The share of pixels that no longer have the level of x_0: float64 [T+1]."""
    K = diffusion.num_levels
    return 1 - diffusion.bar_Q[:, :K, :K].diagonal(dim1=1, dim2=2).mean(1)


def forward_figure(x_0: Tensor):
    """The same noise at every t, so that a pixel changes once."""
    diffusion = DiscreteDiffusion(torch.nn.Identity())
    u = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0))
    ts = range(0, diffusion.timesteps + 1, 25)
    figure = new_figure(1.2 * len(ts), 1.5)
    for t, axis in zip(ts, figure.subplots(1, len(ts)), strict=True):
        x_t = diffusion.q_sample(x_0, torch.tensor([t]), u)
        axis.imshow(x_t[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"t = {t}", fontsize=10)
        axis.axis("off")
    return figure


def noise_figure():
    figure = new_figure(12.5, 4)
    left, right = figure.subplots(1, 2)
    for transition, family in FAMILIES.items():
        style = "--" if transition == "absorbing" else "-"
        for schedule in family.schedules:
            diffusion = DiscreteDiffusion(torch.nn.Identity(), LEVELS, 200, transition, schedule)
            label = f"{transition}, {schedule}"
            left.plot(changed(diffusion), style, label=label)
            right.plot(mutual_information(diffusion), style)
    left.set(ylabel="share of pixels changed")
    right.set(ylabel="mutual information of $x_t$ and $x_0$, of its maximum")
    for axis in (left, right):
        axis.set(xlabel="t")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def main() -> None:
    args = experiment_parser(__doc__).parse_args()
    digits = load_dataset("validation", args.data, args.data_root)
    x_0 = to_levels(digits.images[digits.labels == DIGIT][:1])
    for name, figure in (("forward", forward_figure(x_0)), ("noise", noise_figure())):
        file = output("noise").with_name(f"{name}.png")
        write_picture(file, partial(save_figure, figure))


if __name__ == "__main__":
    run(main)
