"""What is free under the four documented numbers of train.py, 50 epochs, batch 128, T = 200, rate 1e-4: 10 epochs each.

python -m experiments.recipe --data-root data           # about 20 minutes on one core for each of three runs
"""

from cli import run

from experiments.common import compare_trainings, table  # noqa: F401 (the page's table)

ROWS = {
    "AdamW, late decay": "--optimizer adamw --decay late",
    "Muon, late decay": "--optimizer muon --decay late",
    "Muon, cosine": "--optimizer muon --decay cosine",
}


def main() -> None:
    compare_trainings("recipe", __doc__, ROWS, steps=4300, seeds=1, lr=1e-4)


if __name__ == "__main__":
    run(main)
