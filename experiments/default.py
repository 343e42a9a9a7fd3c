"""`python train.py` on full MNIST to its end, and the recipe of the released models for as long, at T = 1000.

    python -m experiments.default --data-root data --jobs 2     # two hours, each run on a core of its own

Bound and samples are those that evaluate.py gives on test digits.
"""

import csv
from functools import partial
from pathlib import Path

from cli import integer, run

from experiments.common import (
    OUT,
    collect,
    digits_of,
    experiment_parser,
    table,
    trained_and_evaluated,
)

DEFAULT = "python train.py"
RELEASED = "python train.py --recipe released --amp --compile"
# 50 epochs, and what takes as long on one core with AMX
STEPS = {DEFAULT: 21_450, RELEASED: 12_400}


def trained(line: str, steps: int, digits: list) -> dict:
    """A row: train as the line says, evaluate, and name the hours that training took."""
    folder = OUT / "default" / ("released" if line == RELEASED else "default")
    one = trained_and_evaluated(line, folder, steps, [*digits, *line.split()[2:]], digits)
    return one | {"row": f"`{line}`, {steps:,} steps, {hours(folder):.1f} hours"}


def hours(folder: Path) -> float:
    """Of training, by metrics.csv: sheets of samples and looks at validation digits come on top."""
    with open(folder / "metrics.csv", newline="") as lines:
        return sum(float(epoch["seconds"]) for epoch in csv.DictReader(lines)) / 3600


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    p.add_argument("--steps", type=integer(1), nargs=2, default=[*STEPS.values()], metavar="N", help="of the two runs "
                   f"(default {' '.join(map(str, STEPS.values()))})")  # fmt: skip
    args = p.parse_args()
    digits = digits_of(args)
    plan = {
        line: partial(trained, line, steps, digits)
        for line, steps in zip(STEPS, args.steps, strict=True)
    }
    collect(
        "default",
        {"title": "trained by", "data": args.data, "steps": args.steps},
        plan,
        table,
        args.jobs,
    )


if __name__ == "__main__":
    run(main)
