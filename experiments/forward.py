"""The picture of what noise does to a digit: the same one at t = 0, 25, ..., 200.

python -m experiments.forward --data offline
"""

from cli import integer, run

import torch

from checkpoint import atomic_write, write_json
from dataset import load_digits, to_levels
from diffusion import DiscreteDiffusion
from experiments.common import OUT, experiment_parser
from pictures import new_figure, save_figure


def main() -> None:
    p = experiment_parser(__doc__)
    p.add_argument("--digit", type=integer(0, 9), default=8, help="its class (default 8)")
    args = p.parse_args()
    digits = load_digits("validation", args.data, args.data_root)
    x_0 = to_levels(digits.images[digits.labels == args.digit][:1])
    diffusion = DiscreteDiffusion(torch.nn.Identity())
    u = torch.rand(
        x_0.shape, generator=torch.Generator().manual_seed(0)
    )  # the same for all t: a pixel flips once
    ts = list(range(0, diffusion.timesteps + 1, 25))
    figure, changed = new_figure(1.2 * len(ts), 1.5), []
    for t, axis in zip(ts, figure.subplots(1, len(ts)), strict=True):
        x_t = diffusion.q_sample(x_0, torch.tensor([t]), u)
        changed.append((x_t != x_0).double().mean().item())
        axis.imshow(x_t[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"t = {t}", fontsize=10)
        axis.axis("off")
    with atomic_write(OUT / "forward" / "forward.png") as file:
        save_figure(figure, file)
    result = {"data": args.data, "digit": args.digit, "t": ts, "share_of_pixels_changed": changed}
    write_json(OUT / "forward" / "forward.json", result)


if __name__ == "__main__":
    run(main)
