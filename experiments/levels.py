"""Grey levels: uniform, absorbing and Gaussian transitions, and the logistic output, at 8, 32 and 256 levels.

    python -m experiments.levels --data-root data --levels 8     # minutes on one core for each row and seed
    python -m experiments.levels --data-root data --levels 256   # a quarter of an hour and 2 GB of memory for each

The loss is the bound, which is what the tables show: in bits per dimension, of validation digits. The joint form tells
the network's output what q(x_t | x_0) knows: that x_0 is near x_t. By the mixture, the default, it has to learn that.
"""

from statistics import mean

from cli import integer, run

from experiments.common import (
    LR,
    by_row,
    cell,
    collect,
    digits_of,
    experiment_parser,
    markdown,
    trainings,
)

ROWS = {
    "uniform": "--transition uniform",
    "absorbing": "--transition absorbing",
    "gaussian, joint form": "--transition gaussian --reverse joint",
    "gaussian, joint form, logistic": "--transition gaussian --reverse joint --output logistic",
}
# What explains these: one seed
ONCE = {
    "gaussian": "--transition gaussian",
    "gaussian, fitted, joint form": "--transition gaussian --schedule fitted --reverse joint",
    "uniform, joint form": "--transition uniform --reverse joint",
}
TRAIN = ["--loss", "variational", "--optimizer", "muon", "--lr", LR]
EVALUATE = ["--split", "validation", "--num-samples", 0]
PARTS = {"L_T": "of it L_T", "sum_L_t_minus_1": "sum of L_(t-1)", "L_0": "L_0"}


def table(result: dict) -> str:
    """Bits per dimension, the mean over seeds and the range, and the means of their parts and standard errors."""
    rows = []
    for name, runs in by_row(result).items():
        bounds = [one["bound"] for one in runs]
        cells = [cell([bound["bits_per_dimension"] for bound in bounds], 3)]
        for key in ("standard_error", *PARTS):  # which evaluate.py gives in nats per image
            bits = (
                bound[key] / bound["nats_per_image"] * bound["bits_per_dimension"]
                for bound in bounds
            )
            cells.append(cell([mean(bits)], 3))
        rows.append([name, str(len(runs)), *cells])
    heading = [result["title"], "seeds", "bits per dimension", "standard error", *PARTS.values()]
    return markdown(heading, rows)


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    p.add_argument("--levels", type=integer(3, 256), nargs="+", default=[8, 32, 256], metavar="K", help="which numbers "
                   "of grey levels (default 8 32 256)")  # fmt: skip
    p.add_argument(
        "--steps", type=integer(1), default=800, help="optimizer steps of each run (default 800)"
    )
    p.add_argument("--timesteps", type=integer(1), default=200, help="T (default 200)")
    p.add_argument(
        "--seeds", type=integer(1), default=3, help="runs of the first four rows (default 3)"
    )
    args = p.parse_args()
    digits = digits_of(args)
    for K in args.levels:
        name, plan, (batch_size, images) = f"levels-{K}", {}, (64, 1000) if K <= 32 else (16, 200)
        train = [
            *digits,
            *TRAIN,
            "--levels",
            K,
            "--batch-size",
            batch_size,
            "--timesteps",
            args.timesteps,
        ]
        evaluate = [*digits, *EVALUATE, "--images", images]
        for seed in range(args.seeds):  # every row once, before any twice
            plan |= trainings(
                name, ROWS if seed else ROWS | ONCE, [seed], args.steps, train, evaluate
            )
        what = {
            "title": f"{K} levels, {args.steps} steps of {batch_size}",
            "timesteps": args.timesteps,
        }
        collect(name, what | {"data": args.data}, plan, table, args.jobs)


if __name__ == "__main__":
    run(main)
