"""The table of one evaluation.json, as evaluate.py writes it."""

from experiments import common


def table(report: dict) -> str:
    """The bound is the whole chain's without labels; the samples may be another chain's, with labels and guidance."""
    rows = {}
    if "bound" in report:
        rows["bound"] = {"row": f"{report['timesteps']} timesteps, no labels", "bound": report["bound"]}
    if "bound_with_labels" in report:
        row = f"{report['timesteps']} timesteps, the true label, ln 10 for it included"
        rows["bound_with_labels"] = {"row": row, "bound": report["bound_with_labels"]}
    if "samples" in report:
        drawn = report["samples"]
        how = f"labels, guidance {drawn['guidance']:g}" if drawn["labels"] else "no labels"
        how += ", the last step's mode" * (drawn.get("last_step") == "mode")  # older reports do not say
        row = f"{drawn['images']:,} samples in {drawn['timesteps']} timesteps, {how}"
        rows["samples"] = {key: value for key, value in report.items() if key != "bound"} | {"row": row}
    lines = [common.table({"title": f"{report['digits']}, {report['binarization']} binarization", "rows": rows})]
    for key, given in (("bound", "no labels"), ("bound_with_labels", "the true label, ln 10 for it included")):
        for row in report.get(key, {}).get("importance_weighted", {}).get("by_trajectories", [])[-1:]:
            lines.append(
                f"\nImportance-weighted, {row['trajectories']:,} trajectories, {report['timesteps']} timesteps, "
                f"{given}: **{row['nats_per_image']:.2f} ± {row['standard_error']:.2f} nats per image** (plain: "
                f"{report[key]['nats_per_image']:.2f}; gain {row['gain']:.2f} ± {row['gain_standard_error']:.2f}, from "
                f"{report[key]['importance_weighted']['images']} digits)"
            )
    return "\n".join(lines)
