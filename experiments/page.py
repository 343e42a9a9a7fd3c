"""Fill the tables of the results page from the JSON files beside it.

    python -m experiments.page > page.md            # the page with its tables written anew
    python -m experiments.page --check              # fails, in one line, if a table is not what its JSON file gives
    python -m experiments.page README.md --check    # the same for the front page

A table stands between <!-- table: NAME --> and <!-- end -->, made of NAME.json by the `table` of experiments/NAME.py;
evaluation-dynamic.json, say, is one more for experiments/evaluation.py. NAME may start with a folder, from the page's.
"""

import importlib
import re
from pathlib import Path

from cli import parser, path, run

from checkpoint import RELEASED
from experiments.common import render

MARKED = re.compile(r"(?<=<!-- table: )(\S+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def source(result: dict) -> str:
    """Where the numbers come from, as a line of Markdown."""
    p = result["provenance"]
    checkpoint = f", checkpoint {result['sha256'][:12]}" if "sha256" in result else ""
    return f"`{p['command']}`, {p['machine']}, torch {p['torch']}, commit {p['commit']}{checkpoint}"


def filled(name: str, folder: Path) -> str:
    """The table called `name` and its source. Raises OSError or ValueError in one line."""
    file = folder / f"{name}.json"
    module = file.stem.partition("-")[0]
    try:
        table = importlib.import_module(f"experiments.{module}").table
    except (ImportError, AttributeError):
        raise ValueError(f"there is no experiment {module!r} with a table") from None
    return f"{render(table, file)}\n\n{render(source, file)}\n"


def main() -> None:
    p = parser(__doc__)
    p.add_argument("page", nargs="?", type=path(".md"), default=RELEASED.with_name("README.md"), help="default: the "
                   "results page of the repository")  # fmt: skip
    p.add_argument("--check", action="store_true", help="compare only")
    args = p.parse_args()
    text = args.page.read_text()
    if len(MARKED.findall(text)) != text.count("<!-- table:") or text.count(
        "<!-- end -->"
    ) != text.count("<!-- table:"):
        raise ValueError(f"{args.page}: a table has no name of one word, or no end")
    page = MARKED.sub(lambda match: match[1] + match[2] + filled(match[1], args.page.parent), text)
    if not args.check:
        print(page, end="")
    for (name, _, old), (_, _, new) in zip(MARKED.findall(text), MARKED.findall(page), strict=True):
        if args.check and old != new:
            raise ValueError(f"{args.page}: the table {name} is not what {name}.json gives")


if __name__ == "__main__":
    run(main)
