"""Grey levels: uniform, absorbing and Gaussian transitions, and the logistic output, at 8, 32 and 256 levels.

    python -m experiments.levels --data-root data --levels 8 32        # minutes on one core for each row and seed
    python -m experiments.levels --data-root data --jobs 1 --levels 256   # an hour and 3 GB of memory for each

The loss is the bound, which is what the table shows: in bits per dimension, of validation digits.
"""

from functools import partial

from cli import integer, run

from experiments.common import LR, OUT, cell, collect, digits_of, experiment_parser, markdown, trained_and_evaluated

ROWS = {
    "uniform": "--transition uniform",
    "absorbing": "--transition absorbing",
    "gaussian": "--transition gaussian",
    "gaussian, geometric": "--transition gaussian --schedule geometric",
    "gaussian, logistic": "--transition gaussian --output logistic",
    "gaussian, geometric, logistic": "--transition gaussian --schedule geometric --output logistic",
}
TRAIN = ["--loss", "variational", "--batch-size", 64, "--lr", LR]
EVALUATE = ["--split", "validation", "--images", 1000, "--num-samples", 200]
PARTS = {"L_T": "of it L_T", "sum_L_t_minus_1": "sum of L_(t-1)", "L_0": "L_0"}


def table(result: dict) -> str:
    """Bits per dimension and their parts, and the samples' Fréchet distance: means over seeds and ranges."""
    groups: dict[str, list[dict]] = {}
    for one in result["rows"].values():
        groups.setdefault(one["row"], []).append(one)
    rows = []
    for name, runs in groups.items():
        cells = [cell([one["bound"]["bits_per_dimension"] for one in runs], 3)]
        for key in PARTS:  # which evaluate.py gives in nats per image
            bits = [one["bound"]["bits_per_dimension"] / one["bound"]["nats_per_image"] for one in runs]
            cells.append(cell([one["bound"][key] * bit for one, bit in zip(runs, bits, strict=True)], 3))
        cells.append(cell([one["samples"]["frechet_distance"] for one in runs], 2))
        rows.append([name, str(len(runs)), *cells])
    heading = [result["title"], "seeds", "bits per dimension", *PARTS.values(), "Fréchet distance"]
    return markdown(heading, rows)


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    p.add_argument("--levels", type=integer(3, 256), nargs="+", default=[8, 32, 256], metavar="K", help="which numbers "
                   "of grey levels (default 8 32 256)")  # fmt: skip
    p.add_argument("--steps", type=integer(1), default=1300, help="optimizer steps of each run (default 1300)")
    p.add_argument("--timesteps", type=integer(1), default=200, help="T (default 200)")
    p.add_argument("--seeds", type=integer(1), default=3, help="runs of each row (default 3)")
    args = p.parse_args()
    digits, plan = digits_of(args), {}
    for K in args.levels:
        for name, flags in ROWS.items():
            for seed in range(args.seeds):
                row = f"{K} levels, {name}"
                folder = OUT / "levels" / f"{row.replace(', ', '-').replace(' ', '_')}-{seed}"
                train = [*digits, *TRAIN, *flags.split(), "--levels", K, "--timesteps", args.timesteps, "--seed", seed]
                work = partial(trained_and_evaluated, row, folder, args.steps, train, [*digits, *EVALUATE])
                plan[f"{row}, seed {seed}"] = work
    what = {"title": f"{args.steps} steps", "timesteps": args.timesteps, "data": args.data}
    collect("levels", what, plan, table, args.jobs)


if __name__ == "__main__":
    run(main)
