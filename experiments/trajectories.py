"""In how many timesteps the importance-weighted bound is best spent: as many network passes for each digit, split anew.

    python -m experiments.trajectories [CHECKPOINT] --data-root data --amp --compile    # an hour on one core with AMX

On validation digits. Few timesteps leave passes for many trajectories; with many, the plain bound is better.
"""

from functools import partial

from cli import add_speed, integer, path, run

from checkpoint import load_checkpoint
from dataset import sha256
from experiments.common import (
    DYNAMIC,
    OUT,
    collect,
    digits_of,
    evaluated,
    experiment_parser,
    markdown,
    speed_of,
)

TIMESTEPS = (20, 50, 100, 200, 500, 1000)


def table(result: dict) -> str:
    lines = []
    for one in result["rows"].values():
        bound, weighted = one["bound"], one["bound"]["importance_weighted"]["by_trajectories"][-1]
        plain = f"{bound['nats_per_image']:.2f} ± {bound['standard_error']:.2f}"
        gain = f"{weighted['gain']:.2f} ± {weighted['gain_standard_error']:.2f}"
        total = f"{weighted['nats_per_image']:.2f} ± {weighted['standard_error']:.2f}"
        lines.append([f"{one['timesteps']}", f"{weighted['trajectories']:,}", plain, gain, total])
    return markdown(
        [result["title"], "trajectories", "plain bound", "gain", "importance-weighted"], lines
    )


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    add = p.add_argument
    add("checkpoint", nargs="?", type=path(), default=DYNAMIC, help="default: the released model of dynamically "
        "binarized MNIST")  # fmt: skip
    add(
        "--passes",
        type=integer(1000),
        default=16_000,
        help="of the network for each digit (default 16,000)",
    )
    add("--images", type=integer(2), default=24, help="digits that the gain is of (default 24)")
    add_speed(add)
    args = p.parse_args()
    T, plan = load_checkpoint(args.checkpoint).timesteps, {}
    every = [
        *digits_of(args),
        *speed_of(args),
        "--split",
        "validation",
        "--images",
        args.images,
        "--num-samples",
        0,
    ]
    for n in (n for n in TIMESTEPS if n <= T):
        row, flags = (
            f"{n} timesteps",
            [*every, "--timesteps", n, "--trajectories", args.passes // n],
        )
        plan[row] = partial(evaluated, row, args.checkpoint, OUT / "trajectories" / f"{n}", flags)
    what = {"title": f"timesteps, {args.passes:,} passes", "images": args.images}
    what |= {"sha256": sha256(args.checkpoint), "data": args.data}
    collect("trajectories", what, plan, table, args.jobs)


if __name__ == "__main__":
    run(main)
