"""The table of one evaluation.json, as evaluate.py writes it."""

from experiments import common


def table(report: dict) -> str:
    """The bound is the whole chain's without labels; the samples may be another chain's, with labels and guidance."""
    drawn = report["samples"]
    how = f"labels, guidance {drawn['guidance']:g}" if drawn["labels"] else "no labels"
    how += ", the last step's mode" * (drawn.get("last_step") == "mode")  # older reports do not say
    samples = report | {"row": f"{drawn['images']:,} samples in {drawn['timesteps']} timesteps, {how}"}
    rows = {"samples": {key: value for key, value in samples.items() if key != "bound"}}
    if "bound" in report:
        rows = {"bound": {"row": f"{report['timesteps']} timesteps, no labels", "bound": report["bound"]}} | rows
    lines = [common.table({"title": f"{report['digits']}, {report['binarization']} binarization", "rows": rows})]
    for key, given in (("bound", "no labels"), ("bound_with_labels", "the true label, ln 10 for it included")):
        for row in report.get(key, {}).get("importance_weighted", {}).get("by_trajectories", [])[-1:]:
            lines.append(
                f"\nImportance-weighted, K = {row['trajectories']}, {report['timesteps']} timesteps, {given}: "
                f"**{row['nats_per_image']:.2f} ± {row['standard_error']:.2f} nats per image** (plain: "
                f"{report[key]['nats_per_image']:.2f}; gain {row['gain']:.2f} ± {row['gain_standard_error']:.2f}, from "
                f"{report[key]['importance_weighted']['images']} digits)"
            )
    return "\n".join(lines)
