"""What fewer timesteps cost: bound and samples of one model against the number of timesteps from noise to digits.

    python -m experiments.steps [CHECKPOINT] --data-root data

Also draws steps.png.
"""

from cli import add_speed, path, run

from checkpoint import RELEASED, atomic_write, load_checkpoint
from experiments.common import compare_evaluations, experiment_parser, quality_figure, render, table  # noqa: F401
from pictures import save_figure

TIMESTEPS = (5, 10, 20, 30, 50, 100, 200)
NUM_SAMPLES = 1_000


def plot(result: dict):
    rows = list(result["rows"].values())
    real = rows[-1].get("real_digits_of_these_classes", rows[-1]["real_digits"])
    return quality_figure(
        {"samples": rows}, "timesteps", "timesteps from noise to digits", result["title"], real
    )


def main() -> None:
    p = experiment_parser(__doc__, jobs=True)
    p.add_argument(
        "checkpoint", nargs="?", type=path(), default=RELEASED, help="default: the released model"
    )
    add_speed(p.add_argument)
    args = p.parse_args()
    T = load_checkpoint(args.checkpoint).timesteps
    rows = {f"{n} timesteps": f"--timesteps {n}" for n in TIMESTEPS if n <= T}
    file = compare_evaluations("steps", rows, args, NUM_SAMPLES)
    with atomic_write(file.with_suffix(".png")) as picture:
        save_figure(render(plot, file), picture)


if __name__ == "__main__":
    run(main)
