"""Write an animated GIF of the reverse process: from noise at t = T to digits at t = 0.

    python visualize_denoising.py                    # with the model that ships with the repository
    python visualize_denoising.py results_d3pm/checkpoints/last.pth --timesteps 200 --out denoising_process.gif
    python visualize_denoising.py --fill part.png    # what is transparent in the picture of a digit, as for sample.py

The digits are the first of what sample.py draws with the same seed and as many timesteps.
"""

import argparse
from pathlib import Path

from cli import SEED, add_device, integer, number, parser, path, pick_device, run

from tqdm import tqdm

from checkpoint import LAST_STEP, PARTICLES, RELEASED, atomic_writes, load_checkpoint
from pictures import read_partial_digit, titled_frame

HOLD_MS = 3000  # how long the finished digits stay


def parse_arguments() -> argparse.Namespace:
    p = parser(__doc__)
    add = p.add_argument
    add("checkpoint", nargs="?", type=path(), default=RELEASED, help="a .pth file written by train.py; it knows its "
        "network, T and schedule (default: the released model)")  # fmt: skip
    add("--timesteps", type=int, metavar="N", help="from noise to digits (default: all that the checkpoint was "
        "trained with)")  # fmt: skip
    add("--out", type=path(".gif"), default=Path("denoising_process.gif"), help="the GIF (default "
        "denoising_process.gif)")  # fmt: skip
    add("--n", type=integer(1, 256), default=16, help="how many digits, 1 to 256 (default 16)")
    add("--fill", type=path(".png"), metavar="PART.png", help="draw what is transparent in this picture of a digit, "
        "as sample.py does; the given pixels come out of the noise, too")  # fmt: skip
    add("--particles", type=integer(1), metavar="N", help=f"choose each --fill from N walks by their weights (default "
        f"{PARTICLES})")  # fmt: skip
    add("--fps", type=number(1, 50), default=20, help="frames per second, 1 to 50 (default 20); a frame of a GIF lasts "
        "whole hundredths of a second, so the nearest rate that there is")  # fmt: skip
    add(
        "--seed",
        type=SEED,
        default=0,
        help="the digits are images 0 .. n-1 of sample.py with this seed (default 0)",
    )
    add_device(add)
    args = p.parse_args()
    if args.particles and not args.fill:
        p.error("--particles is for --fill")
    return args


def main() -> None:
    args = parse_arguments()
    centiseconds = round(100 / args.fps)
    if abs(100 / centiseconds - args.fps) > 0.005:
        print(
            f"{100 / centiseconds:.4g} frames per second: a frame of a GIF lasts whole hundredths of a second"
        )
    if args.checkpoint == RELEASED:
        print(f"Using the released model, {RELEASED}")
    diffusion = load_checkpoint(args.checkpoint, pick_device(args.device), args.timesteps)
    T, asked = diffusion.timesteps, {"last_step": LAST_STEP}
    if args.fill:
        known = read_partial_digit(args.fill, diffusion.num_levels)
        asked |= {"known": known, "particles": args.particles or PARTICLES, "progress": True}
    else:
        asked["y"] = diffusion.labels(args.n)
    with atomic_writes(args.out, inputs=[args.checkpoint, *([args.fill] if args.fill else [])]) as (
        file,
    ):
        chain = enumerate(diffusion.reverse_process(args.n, args.seed, **asked))
        frames = [
            titled_frame(x_t, diffusion.num_levels, f"t = {diffusion.network_t[T - i]}")
            for i, x_t in tqdm(chain, total=T + 1, desc="denoising", unit="step")
        ]
        durations = [10 * centiseconds] * T + [HOLD_MS]
        frames[0].save(
            file, format="gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    run(main)
