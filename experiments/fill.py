"""Filling in test digits: a picture, and numbers for several numbers N of trajectories.

    python -m experiments.fill --data-root data --amp --compile       # hours on one core

Writes fill.png (ten digits, the given part and eight completions of each) and fill.json. Digits are
drawn without classes, in the default number of timesteps.
"""

from functools import partial

from cli import add_device, add_speed, pick_device, run

import torch
from torch import Tensor

from checkpoint import PARTICLES, RELEASED, TIMESTEPS, load_checkpoint, write_json
from dataset import Dataset, load_dataset, sha256, to_levels
from diffusion import DiscreteDiffusion
from experiments.common import experiment_parser, markdown, output, render
from metrics import frechet_distance, judge, load_classifier, rows_of_classes
from model import accelerated
from pictures import image_grid, new_figure, save_figure, write_picture
from trajectories import fill_in

COMPLETIONS, NUM_DIGITS, TRAJECTORIES = 8, 250, (1, 4, 16)
NUMBERS = {"read_as_true_class": "true class", "frechet_distance": "Fréchet distance"}


def given_parts() -> dict[str, Tensor]:
    """The pixels that are given, bool [32, 32]. Digits are 28x28, in a border of 2."""
    upper, left, around = (torch.zeros(32, 32, dtype=torch.bool) for _ in range(3))
    upper[:16] = left[:, :16] = around[:] = True
    around[11:21, 11:21] = False
    return {"upper half": upper, "left half": left, "around a hole of 10x10": around}


def measure(diffusion: DiscreteDiffusion, digits: Dataset) -> dict:
    """How the classifier reads completions, the given part on black, and the real digits."""
    classifier, K, parts = load_classifier(diffusion.bar_Q.device), diffusion.num_levels, {}
    levels = to_levels(digits.images, K)
    reference, _ = judge(classifier, levels, K)
    rows = rows_of_classes(digits.labels, torch.full((10,), NUM_DIGITS // 10))
    x, labels = levels[rows].long(), digits.labels[rows]
    for part, given in given_parts().items():
        images = {"part alone": torch.where(given, x, 0), "real digits": x}
        for N in TRAJECTORIES:
            known = torch.where(given, x, -1)
            images[f"N = {N}"] = fill_in(diffusion, known, len(x), particles=N, progress=True)
        parts[part] = {}
        for name, image in images.items():
            features, logits = judge(classifier, image, K)
            right = (logits.argmax(1) == labels).double().mean().item()
            distance = frechet_distance(features, reference)
            parts[part][name] = {"read_as_true_class": right, "frechet_distance": distance}
    return {"timesteps": diffusion.timesteps, "digits": len(x), "parts": parts}


def table(result: dict) -> str:
    parts = result["parts"]
    heading = [f"{result['digits']} test digits, {result['timesteps']} timesteps"]
    heading += [f"{part}: {text}" for text in NUMBERS.values() for part in parts]
    lines = [
        [name, *(f"{rows[name][key]:.3f}" for key in NUMBERS for rows in parts.values())]
        for name in next(iter(parts.values()))
    ]
    return markdown(heading, lines)


def draw_figure(diffusion: DiscreteDiffusion, digits: Dataset):
    """A row for each digit: the digit, the given part, the completions."""
    rows = rows_of_classes(digits.labels, torch.ones(10, dtype=torch.long))
    x = to_levels(digits.images[rows], diffusion.num_levels).long()
    figure = new_figure(15, 5.6)
    for axis, (part, given) in zip(figure.subplots(1, 3), given_parts().items(), strict=True):
        known = torch.where(given, x, -1)
        each = known.repeat_interleave(COMPLETIONS, dim=0)
        filled = fill_in(diffusion, each, len(each), particles=PARTICLES, progress=True)
        filled = filled.long().unflatten(0, (10, COMPLETIONS))
        sheet = torch.cat([x[:, None], known[:, None], filled], dim=1).flatten(0, 1)
        axis.imshow(image_grid(sheet, diffusion.num_levels, 2 + COMPLETIONS), cmap="gray")
        axis.set(title=f"Digit, {part}, completions", xticks=[], yticks=[])
    return figure


def main() -> None:
    p = experiment_parser(__doc__)
    add_device(p.add_argument)
    add_speed(p.add_argument)
    args = p.parse_args()
    diffusion = load_checkpoint(RELEASED, pick_device(args.device), TIMESTEPS)
    diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
    split = "test" if args.data == "mnist" else "validation"
    digits = load_dataset(split, args.data, args.data_root)
    result = measure(diffusion, digits)
    write_json(output("fill"), {"sha256": sha256(RELEASED)} | result)
    print(render(table, output("fill")))
    draw_digits = partial(save_figure, draw_figure(diffusion, digits))
    write_picture(output("fill", ".png"), draw_digits)


if __name__ == "__main__":
    run(main)
