"""Draw digits from a trained checkpoint.

    python sample.py                                      # 16 digits from the released model
    python sample.py results_d3pm/checkpoints/last.pth --n 16
    python sample.py CHECKPOINT --n 64 --timesteps 200    # the default is 30
    python sample.py CHECKPOINT --n 10000 --save-tensor digits.pt
    python sample.py CHECKPOINT --n 5000 --first 5000     # images 5000 to 9999 of the same seed
    python sample.py CHECKPOINT --digit 0123456789        # a row of each class
    python sample.py --fill part.png --n 15               # complete a partly transparent digit

Image i of a seed is the same for any --n, --first and --batch-size.
"""

import argparse
import os
from pathlib import Path

import cli
from cli import UserError, integer, number, path

import torch
from torch import Tensor

import checkpoint
from checkpoint import PARTICLES, RELEASED, TIMESTEPS, atomic_writes
from diffusion import LAST_STEPS, DiscreteDiffusion
from pictures import image_grid, read_partial_digit
from trajectories import fill_in, respaced


def parse_arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    words = "a .pth file written by train.py (default: the released model)"
    add("checkpoint", nargs="?", type=path(), default=RELEASED, help=words)
    words = "how many images (default 16; with --digit 0123456789: 10 of each class)"
    add("--n", type=integer(1), help=words)
    words = f"how many steps, at most those of training (default {TIMESTEPS})"
    add("--timesteps", type=int, metavar="N", help=words)
    words = "the picture (default d3pm_generated_samples_CHECKPOINT.png, or d3pm_completions_...)"
    add("--out", type=path(".png"), help=words)
    words = "also write the images as a uint8 tensor [n, 1, 32, 32]"
    add("--save-tensor", type=path(), metavar="FILE.pt", help=words)
    add("--seed", type=cli.SEED, default=0, help="random seed (default 0)")
    words = "number of the first image (default 0)"
    add("--first", type=integer(0, 2**62), default=0, metavar="I", help=words)
    words = """draw --n images of class D; 0123456789: of each class; none: without a class. For
        checkpoints of train.py --conditional, where image i has class i mod 10 by default"""
    add("--digit", choices=[*"0123456789", "0123456789", "none"], metavar="D", help=words)
    words = "strength of classifier-free guidance (default 0)"
    add("--guidance", type=number(0), metavar="W", help=words)
    cli.add_last_step(add, LAST_STEPS)
    words = """draw the transparent pixels of this picture of a digit, white on black, 28x28 or
        32x32; without a class unless --digit gives one"""
    add("--fill", type=path(".png"), metavar="PART.png", help=words)
    words = f"""choose each --fill from N weighted trajectories (default {PARTICLES}): more take
        longer and are closer to the model's distribution; 1 is plain replacement"""
    add("--particles", type=integer(1), metavar="N", help=words)
    add("--batch-size", type=integer(1), help="images at a time (default 64; on CUDA up to 512)")
    cli.add_device(add)
    args = p.parse_args()
    args.n = args.n or (10 if args.digit == "0123456789" else 16)
    args.out = args.out or default_sheet(args)
    unlabelled = args.digit == "none" or (args.fill and args.digit is None)
    if args.guidance is not None and unlabelled:
        p.error("--guidance needs a class: --digit none has none, and --fill only with --digit")
    if args.particles and not args.fill:
        p.error("--particles needs --fill")
    return args


def default_sheet(args: argparse.Namespace) -> Path:
    """Completions have a name of their own. A file name has at most 255 bytes."""
    stem = os.fsencode(args.checkpoint.stem)[:200].decode(errors="ignore")
    return Path(f"d3pm_{'completions' if args.fill else 'generated_samples'}_{stem}.png")


def labels_to_draw(
    diffusion: DiscreteDiffusion, args: argparse.Namespace
) -> tuple[Tensor | None, int | None]:
    """The labels [n] or None, and the columns of the picture or None for a square."""
    if not diffusion.num_labels and (args.digit or args.guidance is not None):
        flag = "--digit" if args.digit else "--guidance"
        raise UserError(f"{flag}: {args.checkpoint} was trained without classes")
    if args.digit == "none" or (args.fill and args.digit is None):
        return None, None
    if args.digit is None:
        return diffusion.labels(args.n, args.first), None
    y = torch.tensor([int(digit) for digit in args.digit]).repeat_interleave(args.n)
    return y, args.n if len(args.digit) > 1 else None


def main() -> None:
    args = parse_arguments()
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    device = cli.pick_device(args.device)
    diffusion = checkpoint.load_checkpoint(args.checkpoint, device, args.timesteps)
    if args.timesteps is None:
        diffusion = respaced(diffusion, min(TIMESTEPS, diffusion.timesteps))
    y, columns = labels_to_draw(diffusion, args)
    known = read_partial_digit(args.fill, diffusion.num_levels) if args.fill else None
    n = args.n if y is None else len(y)
    last_step = args.last_step or checkpoint.default_last_step(diffusion)
    request = {"y": y, "guidance": args.guidance or 0.0, "last_step": last_step, "progress": True}
    request |= {"seed": args.seed, "first": args.first, "batch_size": args.batch_size}
    inputs = [file for file in (args.checkpoint, args.fill) if file]
    outputs = [file for file in (args.out, args.save_tensor) if file]
    with atomic_writes(*outputs, inputs=inputs) as files:  # errors come before the work
        if known is None:
            sheet = images = diffusion.sample(n, **request)
        else:  # the picture itself is in front of each row
            particles = args.particles or PARTICLES
            images = fill_in(diffusion, known, n, particles=particles, **request)
            rows = images.long().unflatten(0, (-1, columns or n))
            sheet = torch.cat([known.expand(len(rows), 1, -1, -1, -1), rows], dim=1).flatten(0, 1)
            columns = columns and columns + 1
        image_grid(sheet, diffusion.num_levels, columns).save(files[0], format="png")
        if args.save_tensor:
            torch.save(images, files[1])
    for out in outputs:
        print(f"Wrote {out}")


if __name__ == "__main__":
    cli.run(main)
