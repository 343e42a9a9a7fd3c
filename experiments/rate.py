"""The course of the learning rate: constant with a late decay, or a cosine from the first step on, at equal steps.

    python -m experiments.rate --data-root data         # about ten minutes on one core for each of six runs

A constant rate needs no plan: a run can be prolonged, and every checkpoint of it is a place to decay from.
"""

from cli import run

from experiments.common import compare_trainings, table  # noqa: F401 (the page's table)

COMMON = "--loss variational --optimizer muon --binarize dynamic"
ROWS = {"late decay": f"{COMMON} --decay late", "cosine": f"{COMMON} --decay cosine"}


def main() -> None:
    compare_trainings("rate", __doc__, ROWS)


if __name__ == "__main__":
    run(main)
