"""The noise that the network sees: how many pixels are changed at t, and how much they still say about the digit.

python -m experiments.noise
"""

import math

from cli import integer, parser, run

import torch
from torch import Tensor

from checkpoint import atomic_write, write_json
from diffusion import DiscreteDiffusion, kl_divergence
from experiments.common import OUT, markdown, render
from pictures import new_figure, save_figure
from transitions import FAMILIES


def mutual_information(diffusion: DiscreteDiffusion) -> Tensor:
    """I(x_t; x_0) of a pixel whose K levels are equally likely, as a share of log K: float64 [T+1], 1 at t = 0."""
    q = diffusion.bar_Q[:, : diffusion.num_levels]  # q(x_t | x_0), [T+1, K, S]
    return kl_divergence(q, q.mean(1, keepdim=True).expand_as(q), dim=2).mean(1) / math.log(
        diffusion.num_levels
    )


def changed(diffusion: DiscreteDiffusion) -> Tensor:
    """The share of pixels whose level is no longer that of x_0, under the same levels: float64 [T+1]."""
    K = diffusion.num_levels
    return 1 - diffusion.bar_Q[:, :K, :K].diagonal(dim1=1, dim2=2).mean(1)


def table(result: dict) -> str:
    """The mutual information at some t, in per cent."""
    T = result["timesteps"]
    ts = [round(T * share) for share in (0.02, 0.1, 0.25, 0.5, 0.75, 1)]
    rows = []
    for name, curve in result["curves"].items():
        rows.append([name, *(f"{100 * curve['mutual_information'][t]:.0f}" for t in ts)])
    return markdown(
        [f"information left, %, {result['levels']} levels, t of {T}", *map(str, ts)], rows
    )


def figure(result: dict):
    plot = new_figure(12.5, 4)
    labels = ("share of pixels changed", "mutual information of $x_t$ and $x_0$, of its maximum")
    for axis, key, label in zip(
        plot.subplots(1, 2), ("changed", "mutual_information"), labels, strict=True
    ):
        for name, curve in result["curves"].items():
            axis.plot(
                curve[key], label=name, linestyle="--" if name.startswith("absorbing") else "-"
            )
        axis.set(xlabel="t", ylabel=label)
        axis.grid(alpha=0.3)
    plot.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return plot


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "--levels", type=integer(3, 256), default=8, metavar="K", help="grey levels (default 8)"
    )
    p.add_argument("--timesteps", type=integer(2), default=200, help="T (default 200)")
    args = p.parse_args()
    curves = {}
    for transition, family in FAMILIES.items():
        for schedule in family.schedules:
            diffusion = DiscreteDiffusion(
                torch.nn.Identity(), args.levels, args.timesteps, transition, schedule
            )
            curves[f"{transition}, {schedule}"] = {
                "changed": changed(diffusion).tolist(),
                "mutual_information": mutual_information(diffusion).tolist(),
            }
    file = OUT / "noise" / "noise.json"
    write_json(file, {"levels": args.levels, "timesteps": args.timesteps, "curves": curves})
    with atomic_write(OUT / "noise" / "noise.png") as picture:
        save_figure(render(figure, file), picture)
    print(render(table, file))


if __name__ == "__main__":
    run(main)
