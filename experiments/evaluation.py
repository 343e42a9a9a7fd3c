"""The table of one evaluation.json, as evaluate.py writes it."""

from experiments import common

GIVEN = {"bound": "no labels", "bound_with_labels": "the true label, ln 10 for it included"}


def table(report: dict) -> str:
    """The bound is the whole chain's without labels; the samples may be another chain's, with labels and guidance."""
    bounds = {
        key: f"{report['timesteps']} timesteps, {given}"
        for key, given in GIVEN.items()
        if key in report
    }
    rows = {key: {"row": row, "bound": report[key]} for key, row in bounds.items()}
    if "samples" in report:
        drawn = report["samples"]
        how = f"labels, guidance {drawn['guidance']:g}" if drawn["labels"] else "no labels"
        how += ", the last step's mode" * (
            drawn.get("last_step") == "mode"
        )  # older reports do not say
        row = f"{drawn['images']:,} samples in {drawn['timesteps']} timesteps, {how}"
        rows["samples"] = {key: value for key, value in report.items() if key != "bound"} | {
            "row": row
        }
    lines = [
        common.table(
            {"title": f"{report['digits']}, {report['binarization']} binarization", "rows": rows}
        )
    ]
    for key, of in bounds.items():
        for row in report[key].get("importance_weighted", {}).get("by_trajectories", [])[-1:]:
            lines.append(
                f"\nImportance-weighted, {row['trajectories']:,} trajectories, {of}: "
                f"**{row['nats_per_image']:.2f} ± {row['standard_error']:.2f} nats per image** (plain: "
                f"{report[key]['nats_per_image']:.2f}; gain {row['gain']:.2f} ± {row['gain_standard_error']:.2f}, from "
                f"{report[key]['importance_weighted']['images']} digits)"
            )
    return "\n".join(lines)
