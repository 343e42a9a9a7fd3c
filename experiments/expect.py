"""What `python train.py` draws on the way: eight digits after 1, 2, 5, ... minutes on two cores.

    python -m experiments.expect --data-root data

Trains with the defaults of train.py, on the offline digits and on full MNIST. A minute is as many
steps as `RATE` images a second make, so other work on the machine does not change the result.
A stopped experiment goes on where it was. Also draws expect.png.
"""

from itertools import count
from pathlib import Path

from cli import REPOSITORY, integer, parser, path, run

import torch

from checkpoint import (
    TIMESTEPS,
    read_checkpoint,
    save_checkpoint,
    write_json,
)
from dataset import batches, load_dataset, to_levels
from diffusion import DiscreteDiffusion
from experiments.common import draw, output
from model import UNet
from pictures import image_grid, new_figure
from trainer import Trainer
from trajectories import respaced

RATE = 390  # of `python train.py` on two cores
MINUTES = (1, 2, 5, 10, 30, 60, 120)
EPOCHS, BATCH_SIZE, SAVE_STEPS = 50, 128, 200
DIGITS = {"offline": ("offline digits", 2e-3), "mnist": ("full MNIST", 1e-4)}


def train(data: str, data_root: Path, minutes: list[int]) -> list[dict]:
    """Loss, bound and samples after each of the minutes, up to the end of the run."""
    digits = load_dataset("train", data, data_root)
    x_0 = to_levels(load_dataset("validation", data, data_root).images)
    epoch_steps = len(digits.images) // BATCH_SIZE
    total = EPOCHS * epoch_steps
    marks = {min(total, round(m * 60 * RATE / BATCH_SIZE)) for m in minutes}
    torch.manual_seed(0)
    network = UNet().to(memory_format=torch.channels_last)
    trainer = Trainer(DiscreteDiffusion(network), total, BATCH_SIZE, DIGITS[data][1], "muon")
    state = {"network": network.config, "diffusion": trainer.averaged.config}
    file, rows, losses = output("expect").with_name(f"{data}.pth"), [], []
    if file.exists():
        saved = read_checkpoint(file)
        trainer.load_state_dict(saved)
        rows, losses = saved["rows"], saved["losses"]
    stream = (
        batch
        for epoch in count(trainer.steps // epoch_steps)
        for batch in batches(digits, BATCH_SIZE, 0, epoch, trainer.steps % epoch_steps)
    )
    while trainer.steps < max(marks):
        losses = [*losses[-99:], trainer.step(*next(stream)).item()]
        if trainer.steps in marks:
            drawn = respaced(trainer.averaged, TIMESTEPS).sample(8, last_step="mode")
            row = {"minutes": trainer.steps * BATCH_SIZE / RATE / 60, "steps": trainer.steps}
            row |= {"train_loss": sum(losses) / len(losses), "bound": trainer.validate(x_0)}
            rows.append(row | {"samples": drawn.flatten(1).tolist()})
        if trainer.steps in marks or trainer.steps % SAVE_STEPS == 0:
            save_checkpoint(file, {**state, "rows": rows, "losses": losses, **trainer.state_dict()})
    rows = [row for row in rows if row["steps"] in marks]
    return [row | {"samples": packed(row["samples"])} for row in rows]


def packed(samples: list[list[int]]) -> list[str]:
    """Each flat image of 0 and 1 as a hexadecimal number."""
    return [f"{int(''.join(map(str, image)), 2):0256x}" for image in samples]


def unpacked(samples: list[str]) -> torch.Tensor:
    """The images of `packed`, [n, 1, 32, 32]."""
    bits = [[int(bit) for bit in f"{int(image, 16):01024b}"] for image in samples]
    return torch.tensor(bits).view(-1, 1, 32, 32)


def figure(result: dict):
    """A panel for each kind of digits, a row of samples for each time."""
    plot, rows = new_figure(13, 5), result["rows"]
    for axis, (name, points) in zip(plot.subplots(1, len(rows)), rows.items(), strict=True):
        picture = image_grid(torch.cat([unpacked(p["samples"]) for p in points]), columns=8)
        axis.imshow(picture, cmap="gray")
        labels = [
            f"{p['minutes']:.0f} min, {p['steps']:,} steps\n"
            f"loss {p['train_loss']:.3f}, bound {p['bound']:.1f}"
            for p in points
        ]
        height = picture.height / len(points)
        axis.set_yticks([(i + 0.5) * height for i in range(len(points))], labels)
        axis.set(title=name, xticks=[], anchor="N")
    return plot


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--data-root", type=path(), default=REPOSITORY / "data", help="folder of MNIST")
    p.add_argument(
        "--minutes", type=integer(1), nargs="+", default=MINUTES, metavar="M", help="of training"
    )
    args = p.parse_args()
    rows = {name: train(data, args.data_root, args.minutes) for data, (name, _) in DIGITS.items()}
    write_json(output("expect"), {"images_per_second": RATE, "rows": rows})
    draw(figure, output("expect"))


if __name__ == "__main__":
    run(main)
