"""The table of the front page: each way to draw from the models that ship, with bound and samples of the same chain.

    python -m experiments.headline --data-root data --amp --compile     # hours on one core
    python -m experiments.headline --data-root data --amp --jobs 4      # minutes on a GPU

On test digits. With classes given, the bound is that given the true one, plus ln 10 for it. What sample.py draws by
default has no bound: the mode of the last step is no draw from the model.
"""

from functools import partial

from cli import add_speed, integer, run

from checkpoint import RELEASED
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

FEW = ["--images", 2, "--repeats", 1]  # where only the samples are wanted
# The bound of each row: the evaluation that has it, and its name there
ROWS = {
    "thresholded, no class given": ("thresholded, no class given", "bound"),
    "thresholded, class given": ("thresholded, no class given", "bound_with_labels"),
    "thresholded, as sample.py draws": None,
    "dynamic, no class given": ("dynamic, no class given", "bound"),
}
SAMPLES = {
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "isolated_white": "isolated white pixels",
    "ink_in_border": "ink in the border",
    "label_accuracy": "classified as asked",
}


def table(result: dict) -> str:
    """In brackets behind a number of the samples is that of as many real digits of the same classes."""
    lines = []
    for name, one in result["rows"].items():
        bounds = ["", ""]
        evaluation, key = ROWS[name] or (None, None)
        if evaluation in result["rows"]:
            bound = result["rows"][evaluation][key]
            both = bound, bound["importance_weighted"]["by_trajectories"][-1]
            bounds = [f"{b['nats_per_image']:.1f} ± {b['standard_error']:.1f}" for b in both]
        real, cells = one.get("real_digits_of_these_classes", one["real_digits"]), []
        for key in SAMPLES:
            of_real = f" ({real[key]:.3f})" if key in real else ""
            cells.append(f"{one['samples'][key]:.3f}{of_real}" if key in one["samples"] else "")
        lines.append([name, f"{one['samples']['timesteps']}", *bounds, *cells])
    heading = [
        result["title"],
        "timesteps",
        "bound, nats per image",
        f"importance-weighted, {result['trajectories']:,} trajectories",
    ]
    return markdown([*heading, *SAMPLES.values()], lines)


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    add = p.add_argument
    add("--timesteps", type=integer(1), default=100, help="from noise to digits, but for the defaults of sample.py "
        "(default 100)")  # fmt: skip
    add("--num-samples", type=integer(20), default=5000, help="drawn for each row (default 5,000)")
    add(
        "--trajectories",
        type=integer(1),
        default=64,
        help="K of the importance-weighted bound (default 64)",
    )
    add(
        "--images",
        type=integer(2),
        default=100,
        help="digits that the gain of these is of (default 100)",
    )
    add_speed(add)
    args = p.parse_args()
    weighed = ["--trajectories", args.trajectories, "--images", args.images]
    own = ["--timesteps", args.timesteps, "--last-step", "draw"]  # the model that the bound is of
    flags = [
        ["--no-labels", *own, *weighed],
        [*own, *FEW],
        FEW,
        ["--binarizations", 2, *own, *weighed],
    ]
    every, plan = [*digits_of(args), *speed_of(args), "--num-samples", args.num_samples], {}
    for row, added in zip(ROWS, flags, strict=True):
        folder = OUT / "headline" / row.replace(", ", "-").replace(" ", "_")
        checkpoint = DYNAMIC if row.startswith("dynamic") else RELEASED
        plan[row] = partial(
            evaluated, row, checkpoint, folder, [*every, *added], "--trajectories" in added
        )
    what = {
        "title": f"{args.num_samples:,} samples",
        "timesteps": args.timesteps,
        "trajectories": args.trajectories,
    }
    collect("headline", what | {"images": args.images, "data": args.data}, plan, table, args.jobs)


if __name__ == "__main__":
    run(main)
