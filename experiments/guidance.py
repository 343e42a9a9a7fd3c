"""What guidance does to the samples of a class-conditional model, judged on validation digits, where it is chosen.

python -m experiments.guidance [CHECKPOINT] --data-root data
"""

from cli import add_speed, path, run

from checkpoint import RELEASED
from experiments.common import compare_evaluations, experiment_parser, table  # noqa: F401 (the page's table)

ROWS = (
    "--no-labels",
    "--guidance 0",
    "--guidance 0.1",
    "--guidance 0.25",
    "--guidance 0.5",
    "--guidance 1",
)
NUM_SAMPLES = 5_000


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    p.add_argument(
        "checkpoint", nargs="?", type=path(), default=RELEASED, help="default: the released model"
    )
    add_speed(p.add_argument)
    # The bound, of two digits to save time, is that of the network without labels in every row.
    rows = {row: f"--split validation --images 2 --repeats 1 {row}" for row in ROWS}
    compare_evaluations("guidance", rows, p.parse_args(), NUM_SAMPLES, bounded=False)


if __name__ == "__main__":
    run(main)
