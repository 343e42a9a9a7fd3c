"""Draw digits from a trained checkpoint.

    python sample.py                                         # 16 digits from the model that ships with the repository
    python sample.py results_d3pm/checkpoints/last.pth --n 16
    python sample.py CHECKPOINT --n 64 --timesteps 200       # the default is 30
    python sample.py CHECKPOINT --n 10000 --save-tensor digits.pt
    python sample.py CHECKPOINT --n 5000 --first 5000        # the second half of that, on another machine
    python sample.py CHECKPOINT --digit 0123456789           # one row a digit (checkpoints of train.py --conditional)
    python sample.py --fill part.png --n 15                  # draw what is transparent in the picture of a digit

Image i of a seed is the same whatever --n, --batch-size and --first are.
"""

import argparse

from cli import SEED, add_device, add_last_step, integer, number, parser, path, pick_device, run

import torch
from torch import Tensor

from checkpoint import LAST_STEP, PARTICLES, RELEASED, TIMESTEPS, atomic_writes, load_checkpoint
from diffusion import LAST_STEPS, DiscreteDiffusion
from pictures import image_grid, read_partial_digit


def parse_arguments() -> argparse.Namespace:
    p = parser(__doc__)
    add = p.add_argument
    add("checkpoint", nargs="?", type=path(), default=RELEASED, help="a .pth file written by train.py; it knows its "
        "network, T and schedule (default: the released model)")  # fmt: skip
    add(
        "--n",
        type=integer(1),
        help="how many images (default 16; 10 a class with --digit 0123456789)",
    )
    add("--timesteps", type=int, metavar="N", help=f"from noise to digits, at most those of training (default "
        f"{TIMESTEPS}: more hardly show)")  # fmt: skip
    add(
        "--out",
        type=path(".png"),
        help="the picture, .png (default d3pm_generated_samples_<checkpoint name>.png)",
    )
    add(
        "--save-tensor",
        type=path(),
        metavar="FILE.pt",
        help="also write the images as a uint8 tensor [n, 1, 32, 32]",
    )
    add("--seed", type=SEED, default=0, help="which sequence of images to draw from (default 0)")
    add(
        "--first",
        type=integer(0, 2**62),
        default=0,
        metavar="I",
        help="start at image number I of it (default 0)",
    )
    add("--digit", choices=[*"0123456789", "0123456789", "none"], metavar="D", help="draw --n images of class D; "
        "0123456789 draws a row of --n images of each class; none draws without a class. For checkpoints of train.py "
        "--conditional, where by default image i is of class i mod 10")  # fmt: skip
    add("--guidance", type=number(0), metavar="W", help="push the logits of x_0 away from those without a class, W "
        "times as far again (default 0)")  # fmt: skip
    add_last_step(add, LAST_STEPS, LAST_STEP)
    add("--fill", type=path(".png"), metavar="PART.png", help="draw what is transparent in this picture of a digit, "
        "white on black, 28x28 or 32x32, shown first; of any class unless --digit says which")  # fmt: skip
    add("--particles", type=integer(1), metavar="N", help=f"choose each --fill from N walks by their weights (default "
        f"{PARTICLES}; 1 is the usual overwriting): N times the work, nearer to what the model thinks")  # fmt: skip
    add(
        "--batch-size", type=integer(1), help="images at a time (default 64, and up to 512 on CUDA)"
    )
    add_device(add)
    args = p.parse_args()
    if args.n is None:
        args.n = 10 if args.digit == "0123456789" else 16
    args.out = args.out or path()(f"d3pm_generated_samples_{args.checkpoint.stem}.png")
    if args.guidance is not None and args.digit == "none":
        p.error("--guidance needs a class, --digit none has none")
    if args.guidance is not None and args.fill and args.digit is None:
        p.error("--guidance needs a class, and with --fill only --digit gives one")
    if args.particles and not args.fill:
        p.error("--particles is for --fill")
    return args


def labels_to_draw(
    diffusion: DiscreteDiffusion, args: argparse.Namespace
) -> tuple[Tensor | None, int | None]:
    """The labels [n] that the arguments ask for, or None, and the columns of the picture, or None for a square."""
    if not diffusion.num_labels and (args.digit or args.guidance is not None):
        flag = "--digit" if args.digit else "--guidance"
        raise ValueError(
            f"{flag}: {args.checkpoint} was trained without classes (train.py --conditional)"
        )
    if args.digit == "none" or (args.fill and args.digit is None):
        return None, None
    if args.digit is None:
        return diffusion.labels(args.n, args.first), None
    y = torch.tensor([int(digit) for digit in args.digit]).repeat_interleave(args.n)
    return y, args.n if len(args.digit) > 1 else None


def main() -> None:
    args = parse_arguments()
    outputs = [out for out in (args.out, args.save_tensor) if out]
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    diffusion = load_checkpoint(args.checkpoint, pick_device(args.device), args.timesteps)
    if args.timesteps is None:
        diffusion = diffusion.respaced(min(TIMESTEPS, diffusion.timesteps))
    y, columns = labels_to_draw(diffusion, args)
    known = read_partial_digit(args.fill, diffusion.num_levels) if args.fill else None
    how = {"y": y, "guidance": args.guidance or 0.0, "last_step": args.last_step}
    if known is not None:
        how |= {"known": known, "particles": args.particles or PARTICLES}
    with atomic_writes(
        *outputs, inputs=[args.checkpoint, *([args.fill] if args.fill else [])]
    ) as files:  # opened now
        n = args.n if y is None else len(y)
        images = diffusion.sample(n, args.seed, args.first, args.batch_size, progress=True, **how)
        sheet = images
        if known is not None:  # in front of each row of completions
            rows = images.long().unflatten(0, (-1, columns or n))
            sheet = torch.cat([known.expand(len(rows), 1, -1, -1, -1), rows], dim=1).flatten(0, 1)
            columns = columns and columns + 1
        image_grid(sheet, diffusion.num_levels, columns).save(files[0], format="png")
        if args.save_tensor:
            torch.save(images, files[1])
    for out in outputs:
        print(f"Wrote {out}")


if __name__ == "__main__":
    run(main)
