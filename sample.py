"""Draw digits from a trained checkpoint.

    python sample.py results_d3pm/checkpoints/last.pth --n 16
    python sample.py CHECKPOINT --n 10000 --save-tensor digits.pt
    python sample.py CHECKPOINT --n 5000 --first 5000        # the second half of that, on another machine

Image i of a seed is the same whatever --n, --batch-size and --first are.
"""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from dataset import image_grid
from diffusion import atomic_write, load_checkpoint
from model import pick_device


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="a .pth file written by train.py; it knows its network, T and schedule")
    add("--n", type=int, default=16, help="how many images (default 16)")
    add("--out", type=Path, help="the picture, .png (default d3pm_generated_samples_<checkpoint name>.png)")
    add("--save-tensor", type=Path, metavar="FILE.pt", help="also write the images as a uint8 tensor [n, 1, 32, 32]")
    add("--seed", type=int, default=0, help="which endless sheet of images to draw from (default 0)")
    add("--first", type=int, default=0, metavar="I", help="start at image number I of that sheet (default 0)")
    add("--batch-size", type=int, default=64, help="images at a time (default 64)")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")
    args = parser.parse_args()
    args.out = args.out or Path(f"d3pm_generated_samples_{Path(args.checkpoint).stem}.png")
    if args.n < 1 or args.batch_size < 1:
        parser.error("--n and --batch-size must be at least 1")
    if args.seed < 0 or args.first < 0:
        parser.error("--seed and --first must be at least 0")
    if args.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    if args.out == args.save_tensor:
        parser.error("--out and --save-tensor name the same file")
    return args


def main() -> None:
    args = parse_arguments()
    diffusion = load_checkpoint(args.checkpoint, pick_device(args.device))
    with ExitStack() as stack:  # opened before the work, so that a bad place is known at once
        picture = stack.enter_context(atomic_write(args.out))
        tensor = args.save_tensor and stack.enter_context(atomic_write(args.save_tensor))
        images = diffusion.sample(args.n, args.seed, args.first, args.batch_size, progress=True)
        image_grid(images, diffusion.num_classes).save(picture, format="png")
        if tensor:
            torch.save(images, tensor)
    for path in filter(None, (args.out, args.save_tensor)):
        print(f"Wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"sample.py: error: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
