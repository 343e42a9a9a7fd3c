"""Fill the tables of the results page from the JSON files beside it.

    python -m experiments.page > page.md            # the page with new tables
    python -m experiments.page --check              # fail if a table differs from its JSON file
    python -m experiments.page README.md --check    # the same for the front page

A table stands between <!-- table: NAME --> and <!-- end -->. It is made from NAME.json, where NAME
may start with a folder. Its command and its source follow.
"""

import re
from pathlib import Path

from cli import UserError, parser, path, run

from checkpoint import RELEASED
from experiments import benchmark, common, figures, tables

MARKED = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
MAKERS = {name: (f"tables {name}", show) for name, (_, _, show) in tables.TABLES.items()}
for name in ("offline", "small"):
    MAKERS[name] = f"tables {name} --data offline", MAKERS[name][1]
MAKERS["benchmark"] = "benchmark", benchmark.table
MAKERS["fill"] = "figures fill", figures.filling_table


def source(result: dict) -> str:
    """Where the numbers were measured; rows that were measured elsewhere are named."""
    labels: dict[str, list[str]] = {}
    for one in result.get("rows", {"": {"row": ""}}).values():
        origin = one.get("provenance") or result["provenance"]
        text = f"{origin['machine']}, torch {origin['torch']}, commit {origin['commit']}"
        labels.setdefault(text, []).append(one["row"])
    first, *others = labels
    named = [f"; {', '.join(dict.fromkeys(labels[text]))}: {text}" for text in others]
    return first + "".join(named)


def filled(name: str, folder: Path) -> str:
    """The table called `name` and its source. Raises OSError or UserError."""
    file = folder / f"{name}.json"
    if file.stem not in MAKERS:
        raise UserError(f"there is no experiment {file.stem!r} with a table")
    command, make = MAKERS[file.stem]
    result = common.read_result(file)
    if "/" in name:  # on the front page, which shows less
        return make(result, small=True) + "\n"
    return f"{make(result)}\n\n`python -m experiments.{command}`: {source(result)} "


def main() -> None:
    p, results = parser(__doc__), RELEASED.with_name("README.md")
    p.add_argument("page", nargs="?", type=path(".md"), default=results, help="(default: results)")
    p.add_argument("--check", action="store_true", help="compare only")
    args = p.parse_args()
    text = args.page.read_text()
    if not len(MARKED.findall(text)) == text.count("<!-- table:") == text.count("<!-- end -->"):
        raise UserError(f"{args.page}: a table has no one-word name or no end")
    for name, old in MARKED.findall(text):
        new = filled(name, args.page.parent)
        if args.check and new != old:
            raise UserError(f"{args.page}: the table {name} differs from {name}.json")
        text = text.replace(f"<!-- table: {name} -->\n{old}", f"<!-- table: {name} -->\n{new}")
    if not args.check:
        print(text, end="")


if __name__ == "__main__":
    run(main)
