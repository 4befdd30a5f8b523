"""Write the generated pages of docs/ from the kernels that this environment has."""

from pathlib import Path

from halfbyte.pages import refusals_page, support_page
from halfbyte.plugins import available_kernels

DOCS = Path(__file__).parent.parent / "docs"

(DOCS / "refusals.md").write_text(refusals_page(), encoding="utf-8")
(DOCS / "support.md").write_text(support_page(available_kernels()), encoding="utf-8")
print(f"wrote refusals.md and support.md in {DOCS}")
