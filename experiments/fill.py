"""Filling in test digits of which a part is given: a figure, and what the number N of walks buys.

    python -m experiments.fill --data-root data                      # 500 digits, N = 1, 4, 16, 64: hours on one core
    python -m experiments.fill --digits 50 --particles 1 4 16 --timesteps 20

Writes fill.png (ten digits and eight completions of each, for three shapes of what is given), fill.json and fill.txt,
the table of it, into --out-dir. Digits are drawn without classes, in the default number of timesteps.
"""

import argparse
import sys

from cli import REPOSITORY, SEED, add_device, add_speed, integer, parser, path, pick_device, run

import torch
from torch import Tensor

from checkpoint import PARTICLES, RELEASED, TIMESTEPS, atomic_writes, json_bytes, load_checkpoint
from dataset import Digits, load_digits, sha256, to_levels
from diffusion import DiscreteDiffusion
from experiments.common import OUT
from metrics import frechet_distance, judge, load_classifier, rows_of_classes
from model import accelerated
from pictures import image_grid, new_figure, save_figure

COMPLETIONS = 8


def given_parts() -> dict[str, Tensor]:
    """What is given, bool [32, 32]: of digits of 28x28 in a border of 2."""
    upper, left, around = (torch.zeros(32, 32, dtype=torch.bool) for _ in range(3))
    upper[:16] = left[:, :16] = around[:] = True
    around[11:21, 11:21] = False
    return {"upper half": upper, "left half": left, "around a hole of 10x10": around}


def scores(read: tuple[Tensor, Tensor], labels: Tensor, reference: Tensor) -> dict[str, float]:
    """From the classifier's features and logits of images: how it reads them, how like real digits they are."""
    features, logits = read
    return {
        "read_as_true_class": (logits.argmax(1) == labels).double().mean().item(),
        "mean_confidence": logits.softmax(1).amax(1).mean().item(),
        "frechet_distance": frechet_distance(features, reference),
    }


def measure(diffusion: DiscreteDiffusion, digits: Digits, args: argparse.Namespace) -> dict:
    """The scores of each part alone, the rest black, of its completions for each N, and of the real digits."""
    classifier, K, parts = load_classifier(pick_device(args.device)), diffusion.num_levels, {}
    levels = to_levels(digits.images, K)
    reference, _ = judge(classifier, levels, K)
    rows = rows_of_classes(digits.labels, torch.full((10,), args.digits // 10))
    x, labels = levels[rows].long(), digits.labels[rows]
    for part, given in given_parts().items():
        images = {"part alone": torch.where(given, x, 0)}
        for N in args.particles:
            print(f"{part}, N = {N}", file=sys.stderr)
            known = torch.where(given, x, -1)
            images[f"N = {N}"] = diffusion.sample(
                len(x), args.seed, progress=True, known=known, particles=N
            )
        images["real digits"] = x
        parts[part] = {
            name: scores(judge(classifier, y, K), labels, reference) for name, y in images.items()
        }
    return {
        "sha256": sha256(args.checkpoint),
        "timesteps": diffusion.timesteps,
        "digits": len(x),
        "parts": parts,
    }


def table(result: dict) -> str:
    """The result of `measure` as a table in Markdown."""
    lines = [
        f"{result['digits']} test digits, {result['timesteps']} timesteps, no classes given",
        "",
        "| given | completed by | classified as the true class | mean confidence | Fréchet distance |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part, rows in result["parts"].items():
        for name, row in rows.items():
            numbers = (
                f"{row[key]:.3f}"
                for key in ("read_as_true_class", "mean_confidence", "frechet_distance")
            )
            lines.append(f"| {part} | {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw_figure(diffusion: DiscreteDiffusion, digits: Digits, args: argparse.Namespace):
    """A row a digit: as it is, what is given of it, its completions."""
    rows = rows_of_classes(digits.labels, torch.ones(10, dtype=torch.long))
    x = to_levels(digits.images[rows], diffusion.num_levels).long()
    figure = new_figure(15, 5.6)
    for axis, (part, given) in zip(figure.subplots(1, 3), given_parts().items(), strict=True):
        print(f"figure, {part}", file=sys.stderr)
        known = torch.where(given, x, -1)
        each = known.repeat_interleave(COMPLETIONS, dim=0)
        filled = diffusion.sample(
            len(each), args.seed, progress=True, known=each, particles=PARTICLES
        )
        sheet = torch.cat(
            [x[:, None], known[:, None], filled.long().unflatten(0, (10, COMPLETIONS))], dim=1
        )
        axis.imshow(
            image_grid(sheet.flatten(0, 1), diffusion.num_levels, 2 + COMPLETIONS), cmap="gray"
        )
        axis.set(title=f"Digit, {part}, completions", xticks=[], yticks=[])
    return figure


def main() -> None:
    p = parser(__doc__)
    add = p.add_argument
    add(
        "checkpoint", nargs="?", type=path(), default=RELEASED, help="(default: the released model)"
    )
    add("--timesteps", type=int, default=TIMESTEPS, metavar="N", help=f"(default {TIMESTEPS})")
    add(
        "--digits",
        type=integer(20, 5000),
        default=500,
        help="how many, as many of each class (default 500)",
    )
    add(
        "--particles",
        type=integer(1),
        nargs="+",
        default=[1, 4, 16, 64],
        metavar="N",
        help="(default 1 4 16 64)",
    )
    add("--seed", type=SEED, default=0, help="(default 0)")
    add("--data-root", type=path(), default=REPOSITORY / "data", help="where MNIST is or goes (default: data in the "
        "repository)")  # fmt: skip
    add(
        "--out-dir",
        type=path(),
        default=OUT / "fill",
        help="(default results_d3pm/experiments/fill)",
    )
    add_device(add)
    add_speed(add)
    args = p.parse_args()
    diffusion = load_checkpoint(args.checkpoint, pick_device(args.device), args.timesteps)
    diffusion = diffusion.around(accelerated(diffusion.model, args.amp, args.compile))
    outputs = [args.out_dir / name for name in ("fill.png", "fill.json", "fill.txt")]
    with atomic_writes(*outputs, inputs=[args.checkpoint]) as (picture, numbers, text):
        digits = load_digits("test", "mnist", args.data_root)
        save_figure(draw_figure(diffusion, digits, args), picture)
        result = measure(diffusion, digits, args)
        numbers.write(json_bytes(result))
        text.write(f"{table(result)}\n".encode())
    print(table(result))
    print(f"Wrote {', '.join(out.name for out in outputs)} in {args.out_dir}")


if __name__ == "__main__":
    run(main)
