"""The design choices compared: rows trained for as many steps, with several seeds, judged on validation digits.

python -m experiments.choices --data-root data      # about five minutes on one core for each row and seed
"""

from cli import run

from experiments.common import compare_trainings, table  # noqa: F401 (the page's table)

# What differs from train.py's defaults
ROWS = {
    "uniform, cosine, cross-entropy": "",
    "uniform, cosine, variational": "--loss variational",
    "uniform, cosine, hybrid": "--loss hybrid",
    "uniform, cosine, cross-entropy, joint form": "--reverse joint",
    "uniform, cosine, variational, joint form": "--loss variational --reverse joint",
    "uniform, cosine, hybrid, joint form": "--loss hybrid --reverse joint",
    "uniform, linear, cross-entropy": "--schedule linear",
    "absorbing, mutual_info, cross-entropy": "--transition absorbing",
    "absorbing, mutual_info, variational": "--transition absorbing --loss variational",
    "absorbing, mutual_info, hybrid": "--transition absorbing --loss hybrid",
}


def main() -> None:
    compare_trainings("choices", __doc__, ROWS)


if __name__ == "__main__":
    run(main)
