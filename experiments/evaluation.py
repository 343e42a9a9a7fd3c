"""The table of one evaluation.json, as evaluate.py writes it."""

from experiments import common


def table(report: dict) -> str:
    """The bound is the whole chain's without labels; the samples may be another chain's, with labels and guidance."""
    drawn = report["samples"]
    how = f"labels, guidance {drawn['guidance']:g}" if drawn["labels"] else "no labels"
    samples = report | {"row": f"{drawn['images']:,} samples in {drawn['timesteps']} timesteps, {how}"}
    rows = {"samples": {key: value for key, value in samples.items() if key != "bound"}}
    if "bound" in report:
        rows = {"bound": {"row": f"{report['timesteps']} timesteps, no labels", "bound": report["bound"]}} | rows
    return common.table({"title": report["digits"], "rows": rows})
