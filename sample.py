"""Draw digits from a trained checkpoint.

    python sample.py                                         # 16 digits from the model that ships with the repository
    python sample.py results_d3pm/checkpoints/last.pth --n 16
    python sample.py CHECKPOINT --n 64 --timesteps 200       # every step of training: four times the default's
    python sample.py CHECKPOINT --n 10000 --save-tensor digits.pt
    python sample.py CHECKPOINT --n 5000 --first 5000        # the second half of that, on another machine
    python sample.py CHECKPOINT --digit 0123456789           # one row a digit (checkpoints of train.py --conditional)

Image i of a seed is the same whatever --n, --batch-size and --first are.
"""

import argparse
import math
import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from dataset import image_grid
from diffusion import RELEASED, atomic_write, load_checkpoint
from model import pick_device

TIMESTEPS = 50  # unless training had fewer; see "Fewer steps" in README
GUIDANCE = 0.25  # where a class is given; see "The released model" in README


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=RELEASED, help="a .pth file written by train.py; it knows its "
        "network, T and schedule (default: the released model)")  # fmt: skip
    add("--n", type=int, help="how many images (default 16; 10 a class with --digit 0123456789)")
    add("--timesteps", type=int, metavar="N", help=f"steps from noise to digits, at most those of training (default "
        f"{TIMESTEPS}: more hardly show)")  # fmt: skip
    add("--out", type=Path, help="the picture, .png (default d3pm_generated_samples_<checkpoint name>.png)")
    add("--save-tensor", type=Path, metavar="FILE.pt", help="also write the images as a uint8 tensor [n, 1, 32, 32]")
    add("--seed", type=int, default=0, help="which endless sheet of images to draw from (default 0)")
    add("--first", type=int, default=0, metavar="I", help="start at image number I of that sheet (default 0)")
    add("--digit", metavar="D", help="draw --n images of class D; 0123456789 draws a row of --n images of each class; "
        "none draws without a class. For checkpoints of train.py --conditional, where by default image i is of class "
        "i mod 10")  # fmt: skip
    add("--guidance", type=float, metavar="W", help="push the logits of x_0 away from those without a class, W "
        f"times as far again; 0 draws from the model as it is (default {GUIDANCE} if there is a class)")  # fmt: skip
    add("--batch-size", type=int, default=64, help="images at a time (default 64)")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")
    args = parser.parse_args()
    if args.n is None:
        args.n = 10 if args.digit == "0123456789" else 16
    args.out = args.out or Path(f"d3pm_generated_samples_{args.checkpoint.stem}.png")
    if args.n < 1 or args.batch_size < 1:
        parser.error("--n and --batch-size must be at least 1")
    if args.seed < 0 or args.first < 0:
        parser.error("--seed and --first must be at least 0")
    if args.digit is not None and args.digit not in (*"0123456789", "0123456789", "none"):
        parser.error(f"--digit takes one digit from 0 to 9, 0123456789 for a row of each, or none; got {args.digit!r}")
    if args.guidance is not None and args.digit == "none":
        parser.error("--guidance needs a class, --digit none has none")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        parser.error("--guidance must be at least 0")
    if args.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    if args.out == args.save_tensor:
        parser.error("--out and --save-tensor name the same file")
    return args


def main() -> None:
    args = parse_arguments()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    diffusion = load_checkpoint(args.checkpoint, pick_device(args.device), args.timesteps)
    y, columns = diffusion.classes(args.n, args.first), None
    if args.timesteps is None:
        diffusion = diffusion.respaced(min(TIMESTEPS, diffusion.timesteps))
    if y is None and (args.digit or args.guidance is not None):
        flag = "--digit" if args.digit else "--guidance"
        raise ValueError(f"{flag}: {args.checkpoint} was trained without classes (train.py --conditional)")
    if args.digit == "none":
        y = None
    elif args.digit:
        y = torch.tensor([int(digit) for digit in args.digit]).repeat_interleave(args.n)
        columns = args.n if len(args.digit) > 1 else None
    n = args.n if y is None else len(y)
    guidance = GUIDANCE if args.guidance is None else args.guidance
    with ExitStack() as stack:  # opened before the work, so that a bad place is known at once
        picture = stack.enter_context(atomic_write(args.out))
        tensor = args.save_tensor and stack.enter_context(atomic_write(args.save_tensor))
        images = diffusion.sample(n, args.seed, args.first, args.batch_size, progress=True, y=y, guidance=guidance)
        image_grid(images, diffusion.num_classes, columns).save(picture, format="png")
        if tensor:
            torch.save(images, tensor)
    for path in filter(None, (args.out, args.save_tensor)):
        print(f"Wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"sample.py: error: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
