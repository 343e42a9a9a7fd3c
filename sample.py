"""Draw images from a trained checkpoint.

    python sample.py                                      # 16 digits from the released model
    python sample.py results_d3pm/checkpoints/last.pth --n 16
    python sample.py CHECKPOINT --n 64 --timesteps 200    # the default is 30
    python sample.py CHECKPOINT --n 10000 --save-tensor digits.pt
    python sample.py CHECKPOINT --n 5000 --first 5000     # images 5000 to 9999 of the same seed
    python sample.py CHECKPOINT --class all               # a row of each class
    python sample.py --fill part.png --n 15               # complete a partly transparent digit

Image i of a seed does not depend on --n, --first or --batch-size.
"""

import argparse
from pathlib import Path

import cli
from cli import UserError, integer, number, path

import torch
from torch import Tensor

import checkpoint as files
from checkpoint import PARTICLES, RELEASED, TIMESTEPS
from diffusion import LAST_STEPS, DiscreteDiffusion
from pictures import image_grid, read_partial_digit, style_of, without_padding
from trajectories import fill_in, respaced

DIGITS = "0123456789"


def parse_arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    words = "a .pth file written by train.py (default: the released model)"
    add("checkpoint", nargs="?", type=path(), default=RELEASED, help=words)
    add("--n", type=integer(1), help="number of images (default 16; 10 per class for --class all)")
    words = f"number of steps, at most as many as in training (default {TIMESTEPS})"
    add("--timesteps", type=int, metavar="N", help=words)
    words = "the picture (default d3pm_generated_samples_CHECKPOINT.png, or d3pm_completions_...)"
    add("--out", type=path(".png"), help=words)
    words = "also write the images as a uint8 tensor [n, 1, H, W]"
    add("--save-tensor", type=path(), metavar="FILE.pt", help=words)
    add("--seed", type=cli.SEED, default=0, help="random seed (default 0)")
    words = "index of the first image (default 0)"
    add("--first", type=integer(0, 2**61), default=0, metavar="I", help=words)
    group = p.add_mutually_exclusive_group()
    words = """draw --n images of this class, of every class (all) or without a class (none), if the
        model was trained with --conditional; by default image i has class i mod their number"""
    group.add_argument("--class", dest="label", metavar="NAME|NUMBER", help=words)
    words = f"the same for digits; {DIGITS}: all"
    group.add_argument("--digit", choices=[*DIGITS, DIGITS, "none"], metavar="D", help=words)
    words = "strength of classifier-free guidance (default 0)"
    add("--guidance", type=number(0), metavar="W", help=words)
    cli.add_last_step(add, LAST_STEPS)
    words = """fill in the transparent pixels of this picture of the model's image size (digits:
        28x28 or 32x32, white on black); without a class unless --class gives one"""
    add("--fill", type=path(".png"), metavar="PART.png", help=words)
    words = f"""for --fill: choose each image from N weighted trajectories (default {PARTICLES}).
        More are slower and closer to the model's distribution; 1 is plain replacement"""
    add("--particles", type=integer(1), metavar="N", help=words)
    add("--batch-size", type=integer(1), help="images at a time (default 64; on CUDA up to 512)")
    cli.add_device(add)
    args = p.parse_args()
    args.label = "all" if args.digit == DIGITS else args.digit or args.label
    args.n = args.n or (10 if args.label == "all" else 16)
    name = f"d3pm_{'completions' if args.fill else 'generated_samples'}_{args.checkpoint.stem}.png"
    args.out = args.out or Path(name)
    unlabelled = args.label == "none" or (args.fill and args.label is None)
    if args.guidance is not None and unlabelled:
        p.error("--guidance needs a class: give --class, and not none")
    if args.particles and not args.fill:
        p.error("--particles needs --fill")
    return args


def labels_to_draw(
    diffusion: DiscreteDiffusion, names: list[str], args: argparse.Namespace
) -> tuple[Tensor | None, int | None]:
    """The labels, int64 [n] or None, and the columns of the picture (None: a square)."""
    K, label = diffusion.num_labels, args.label
    if not K and (label is not None or args.guidance is not None):
        flag = "--digit" if args.digit else "--guidance" if label is None else "--class"
        raise UserError(f"{flag}: {args.checkpoint} was trained without classes")
    if label == "none" or (args.fill and label is None):
        return None, None
    if label is None:
        return diffusion.labels(args.n, args.first), None
    if label == "all":
        return torch.arange(K).repeat_interleave(args.n), args.n
    known = {str(i): i for i in range(K)} | {name: i for i, name in enumerate(names)}
    if label not in known:
        some = ", ".join(names[:20]) + (", ..." if K > 20 else "")
        raise UserError(f"unknown class {label!r}: choose from {some}; 0 to {K - 1}; all; none")
    return torch.full((args.n,), known[label]), None


def main() -> None:
    args = parse_arguments()
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    device, checkpoint = cli.pick_device(args.device), files.read_checkpoint(args.checkpoint)
    diffusion = files.build_diffusion(checkpoint, args.checkpoint, device, args.timesteps)
    if args.timesteps is None:
        diffusion = respaced(diffusion, min(TIMESTEPS, diffusion.timesteps))
    y, columns = labels_to_draw(diffusion, checkpoint["dataset"]["classes"], args)
    style = style_of(checkpoint)
    known = read_partial_digit(args.fill, **style) if args.fill else None
    n = args.n if y is None else len(y)
    last_step = args.last_step or files.default_last_step(diffusion)
    request = {"y": y, "guidance": args.guidance or 0.0, "last_step": last_step, "progress": True}
    request |= {"seed": args.seed, "first": args.first, "batch_size": args.batch_size}
    inputs = [file for file in (args.checkpoint, args.fill) if file]
    outputs = [file for file in (args.out, args.save_tensor) if file]
    with files.atomic_writes(*outputs, inputs=inputs) as opened:  # fails early
        if known is None:
            sheet = images = diffusion.sample(n, **request)
        else:  # each row starts with the given picture
            request["particles"] = args.particles or PARTICLES
            images = fill_in(diffusion, known, n, **request)
            rows = images.long().unflatten(0, (-1, columns or n))
            sheet = torch.cat([known.expand(len(rows), 1, -1, -1, -1), rows], dim=1).flatten(0, 1)
            columns = columns and columns + 1
        image_grid(sheet, columns=columns, **style).save(opened[0], format="png")
        if args.save_tensor:
            torch.save(without_padding(images, style["size"]), opened[1])
    for out in outputs:
        print(f"Wrote {out}")


if __name__ == "__main__":
    cli.run(main)
