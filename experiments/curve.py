"""The learning curve of a run, and where it tends; beside it others, or branches of it that bring the rate to 0.

    python -m experiments.curve results_d3pm/dynamic results_d3pm/dynamic_dropout results_d3pm/one_block
    python -m experiments.curve results_d3pm/thresholded

Of the `metrics.csv` of these folders. a + b / step^c is fitted to the validation bounds of the first run, but for its
first epochs and those in which its rate goes down, and prolonged.
"""

import csv
from pathlib import Path

from cli import parser, path, run

import torch

from checkpoint import atomic_write, write_json
from experiments.common import OUT, markdown, render
from pictures import new_figure, save_figure

COLUMNS = ("epoch", "step", "train_loss", "validation_bound", "lr", "seconds")
FROM_EPOCH = 6  # before, the curve is of another shape


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv. Raises OSError or ValueError in one line."""
    file = folder / "metrics.csv"
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        columns = {key: [float(row[key]) for row in rows] for key in COLUMNS}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no metrics.csv of train.py ({error!r})") from None
    if not rows:
        raise ValueError(f"{file} is of a run that has validated nothing")
    return columns


def constant_part(one: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Steps and bounds of a run at its peak rate, after the first epochs."""
    rows = zip(one["epoch"], one["lr"], one["step"], one["validation_bound"], strict=True)
    kept = [
        (step, bound)
        for epoch, rate, step, bound in rows
        if epoch > FROM_EPOCH and rate == max(one["lr"])
    ]
    return tuple(map(list, zip(*kept, strict=True))) if kept else ([], [])


def power_law(steps: list[float], bounds: list[float]) -> tuple[float, float, float]:
    """(a, b, c) of the a + b / step^c nearest to the bounds: least squares for each c of a grid, the best of them."""
    x, y, best = (
        torch.tensor(steps, dtype=torch.float64),
        torch.tensor(bounds, dtype=torch.float64),
        [],
    )
    for c in range(1, 301):
        columns = torch.stack([torch.ones_like(x), (x / x[0]) ** (-c / 100)], 1)
        a, b = torch.linalg.lstsq(columns, y).solution.tolist()
        residual = (columns @ torch.tensor([a, b], dtype=torch.float64) - y).square().sum().item()
        best.append((residual, (a, b * x[0].item() ** (c / 100), c / 100)))
    return min(best)[1]


def table(result: dict) -> str:
    a, b, c = result["fit"]
    lines, last = [], next(iter(result["rows"].values()))["step"][-1]
    for name, one in result["rows"].items():
        hours = sum(one["seconds"]) / 3600
        time = f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
        lines.append([name, f"{one['step'][-1]:,.0f}", time, f"{one['validation_bound'][-1]:.2f}"])
    for steps in (2 * last, 4 * last):
        lines.append(["*the first, prolonged*", f"{steps:,.0f}", "", f"{a + b / steps**c:.2f}"])
    return markdown(
        [f"{a:.1f} + {b:.0f} / step^{c:g}", "steps", "hours", "validation bound, nats per image"],
        lines,
    )


def figure(result: dict):
    """The first run and what was fitted to it; the others from where they left it, if they did."""
    plot = new_figure(8, 4.5)
    axis = plot.subplots()
    first = next(iter(result["rows"].values()))
    for i, (name, one) in enumerate(result["rows"].items()):
        shared = [
            a == b for a, b in zip(one["validation_bound"], first["validation_bound"], strict=False)
        ]
        start = i and max(0, [*shared, False].index(False) - 1)
        axis.plot(one["step"][start:], one["validation_bound"][start:], label=name)
    a, b, c = result["fit"]
    steps = torch.linspace(constant_part(first)[0][0], 4 * first["step"][-1], 200).tolist()
    fit = [a + b / step**c for step in steps]
    axis.plot(
        steps, fit, color="gray", linestyle="--", label=f"{a:.1f} + {b:.0f} / step$^{{{c:g}}}$"
    )
    axis.set(xscale="log", xlabel="optimizer steps", ylabel="validation bound, nats per image")
    axis.set_ylim(top=max(fit) + 2)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return plot


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "runs",
        nargs="+",
        type=path(),
        metavar="RUN",
        help="folders; after the first, to compare with it",
    )
    args = p.parse_args()
    rows = {folder.name: read_metrics(folder) for folder in args.runs}
    if len(rows) < len(args.runs):
        raise ValueError("two folders of one name")
    steps, bounds = constant_part(next(iter(rows.values())))
    if len(steps) < 3:
        found = f"{len(steps)} validations at a constant rate after epoch {FROM_EPOCH}"
        raise ValueError(f"{args.runs[0]} has {found}; 3 are needed")
    file = OUT / "curve" / "curve.json"
    write_json(file, {"fit": power_law(steps, bounds), "rows": rows})
    with atomic_write(file.with_suffix(".png")) as picture:
        save_figure(render(figure, file), picture)
    print(render(table, file))


if __name__ == "__main__":
    run(main)
