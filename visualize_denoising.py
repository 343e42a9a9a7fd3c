"""Write an animated GIF of the reverse process: from noise at t = T to digits at t = 0.

    python visualize_denoising.py                    # with the model that ships with the repository
    python visualize_denoising.py results_d3pm/checkpoints/last.pth --timesteps 200 --out denoising_process.gif

The digits are the first of what sample.py draws with the same seed.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dataset import image_grid
from diffusion import RELEASED, atomic_write, load_checkpoint
from model import pick_device
from sample import GUIDANCE

HOLD_MS = 3000  # how long the finished digits stay


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=RELEASED, help="a .pth file written by train.py; it knows its "
        "network, T and schedule (default: the released model)")  # fmt: skip
    add("--timesteps", type=int, metavar="N", help="steps from noise to digits (default: all that the checkpoint was "
        "trained with)")  # fmt: skip
    add("--out", type=Path, default=Path("denoising_process.gif"), help="the GIF (default denoising_process.gif)")
    add("--n", type=int, default=16, help="how many digits (default 16)")
    add("--fps", type=float, default=20, help="frames per second, 1 to 50 (default 20)")
    add("--seed", type=int, default=0, help="the digits are images 0 .. n-1 of sample.py with this seed and "
        "as many steps (default 0)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")
    args = parser.parse_args()
    if not 1 <= args.n <= 256:
        parser.error("--n must be between 1 and 256")
    if not 1 <= args.fps <= 50:
        parser.error("--fps must be between 1 and 50, which is all that GIF viewers keep up with")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if args.out.suffix != ".gif":
        parser.error(f"--out must end in .gif, got {args.out}")
    return args


def titled_frame(x_t, num_levels: int, title: str) -> Image.Image:
    """The images as one picture with a line of text above."""
    grid = image_grid(x_t, num_levels)
    frame = Image.new("L", (grid.width, grid.height + 24), 255)
    frame.paste(grid, (0, 24))
    ImageDraw.Draw(frame).text((6, 4), title, fill=0, font=ImageFont.load_default(size=15))
    return frame


def main() -> None:
    args = parse_arguments()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    diffusion = load_checkpoint(args.checkpoint, pick_device(args.device), args.timesteps)
    T = diffusion.timesteps
    with atomic_write(args.out) as file:
        chain = enumerate(diffusion.reverse_process(args.n, args.seed, y=diffusion.classes(args.n), guidance=GUIDANCE))
        frames = [
            titled_frame(x_t, diffusion.num_classes, f"t = {diffusion.network_t[T - i]}")
            for i, x_t in tqdm(chain, total=T + 1, desc="denoising", unit="step")
        ]
        durations = [round(1000 / args.fps)] * T + [HOLD_MS]
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"visualize_denoising.py: error: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
