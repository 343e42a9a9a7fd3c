"""Write an animated GIF of the reverse process, from noise at t = T to images at t = 0.

    python visualize_denoising.py                    # the released model
    python visualize_denoising.py results_d3pm/checkpoints/last.pth --timesteps 200 --out x.gif
    python visualize_denoising.py --fill part.png    # complete a partly transparent digit

sample.py draws the same images with the same seed and number of timesteps.
"""

import argparse
from pathlib import Path

import cli
from cli import integer, number, path

from tqdm import tqdm

import checkpoint as files
from checkpoint import PARTICLES, RELEASED
from pictures import read_partial_digit, style_of, titled_frame
from trajectories import filling_process

HOLD_MS = 3000  # how long the last frame stays


def parse_arguments() -> argparse.Namespace:
    p = cli.parser(__doc__)
    add = p.add_argument
    words = "a .pth file written by train.py (default: the released model)"
    add("checkpoint", nargs="?", type=path(), default=RELEASED, help=words)
    add("--timesteps", type=int, metavar="N", help="number of steps (default: as in training)")
    gif = Path("denoising_process.gif")
    add("--out", type=path(".gif"), default=gif, help=f"the GIF (default {gif})")
    add("--n", type=integer(1, 256), default=16, help="number of images, 1 to 256 (default 16)")
    words = "fill in the transparent pixels of this picture, as sample.py does"
    add("--fill", type=path(".png"), metavar="PART.png", help=words)
    words = f"for --fill: choose from N weighted trajectories (default {PARTICLES})"
    add("--particles", type=integer(1), metavar="N", help=words)
    words = "frames per second, 1 to 50 (default 20), rounded to GIF's hundredths of a second"
    add("--fps", type=number(1, 50), default=20, help=words)
    add("--seed", type=cli.SEED, default=0, help="random seed (default 0)")
    cli.add_device(add)
    args = p.parse_args()
    if args.particles and not args.fill:
        p.error("--particles needs --fill")
    return args


def main() -> None:
    args = parse_arguments()
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    device, checkpoint = cli.pick_device(args.device), files.read_checkpoint(args.checkpoint)
    diffusion = files.build_diffusion(checkpoint, args.checkpoint, device, args.timesteps)
    style = style_of(checkpoint)
    known = read_partial_digit(args.fill, **style) if args.fill else None
    request = {"n": args.n, "seed": args.seed, "last_step": files.default_last_step(diffusion)}
    inputs = [file for file in (args.checkpoint, args.fill) if file]
    with files.atomic_writes(args.out, inputs=inputs) as (file,):  # fails early
        if known is None:
            chain = diffusion.reverse_process(y=diffusion.labels(args.n), **request)
        else:
            request |= {"particles": args.particles or PARTICLES, "progress": True}
            chain = filling_process(diffusion, known, **request)
        times = diffusion.network_t.flip(0).tolist()  # T, ..., 0
        frames = [
            titled_frame(x_t, f"t = {t}", **style)
            for t, x_t in zip(tqdm(times, desc="denoising", unit="step"), chain, strict=True)
        ]
        durations = [10 * round(100 / args.fps)] * diffusion.timesteps + [HOLD_MS]
        animation = {"save_all": True, "append_images": frames[1:], "duration": durations}
        frames[0].save(file, format="gif", loop=0, **animation)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
