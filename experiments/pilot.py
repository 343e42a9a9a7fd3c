"""Networks and rates for the long run on dynamically binarized MNIST, compared at equal time on one core.

    python -m experiments.pilot --data-root data        # about ten minutes on one core for each of seven runs

What a row costs is given as steps a minute, with --amp on one core with AMX, so the table is the same wherever it is
made: measured once for the three networks of about 3.3 million weights, and guessed in proportion for the other rows.
"""

from cli import integer, run

from experiments.common import collect, digits_of, experiment_parser, table, trainings

# Steps a minute, and what differs from COMMON
ROWS = {
    "64 128 192": (117, ""),
    "64 128 192, rate 1e-3": (117, "--lr 1e-3"),
    "64 128 192, batch 64": (234, "--batch-size 64"),
    "64 128 192, absorbing": (115, "--transition absorbing"),
    "128 128 128": (109, "--channels 128 128 128"),
    "96 128 160": (104, "--channels 96 128 160"),
    "48 96 128": (234, "--channels 48 96 128"),
}
COMMON = "--loss variational --binarize dynamic --timesteps 1000 --optimizer muon --lr 2e-3 --amp --channels 64 128 192"
EVALUATE = ["--split", "validation", "--num-samples", 100]


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    p.add_argument("--minutes", type=integer(1), default=7, help="of training (default 7)")
    args = p.parse_args()
    digits, plan = digits_of(args), {}
    train, evaluate = [*digits, *COMMON.split()], [*digits, *EVALUATE]
    for row, (steps, flags) in ROWS.items():
        plan |= trainings("pilot", {row: flags}, [0], steps * args.minutes, train, evaluate)
    collect(
        "pilot", {"title": f"{args.minutes} minutes", "data": args.data}, plan, table, args.jobs
    )


if __name__ == "__main__":
    run(main)
