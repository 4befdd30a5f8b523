"""Write the tables of docs/performance.md, which hold the figures in results/; `make docs` runs it.

A table stands between `<!-- figures: FILE TITLE -->`, such as `h200_linear nvfp4`, and `<!-- end of figures -->`.
"""

import json
import re
from pathlib import Path

import h200_experts
import h200_linear

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/performance.md"
LAYOUTS = {
    "h200_linear": h200_linear.LAYOUT,
    "h200_experts": h200_experts.LAYOUT,
    "h200_cutile": h200_experts.LAYOUT,
}
PLACE = re.compile(r"(<!-- figures: (\S+) (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with the tables as the figures have them."""
    return PLACE.sub(lambda place: f"{place[1]}\n{_table(place[2], place[3])}\n\n{place[4]}", page)


def _table(file: str, title: str) -> str:
    return LAYOUTS[file].shown(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8")))[title]


def main() -> None:
    """Write the page anew."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
