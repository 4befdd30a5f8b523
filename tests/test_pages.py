"""The generated pages of docs/ are up to date: `make docs` writes them."""

from pathlib import Path

import pytest

import write_tables
from halfbyte.pages import refusals_page, support_page
from halfbyte.plugins import available_kernels
from halfbyte.refusals import Code

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    ("name", "page"),
    [("refusals.md", refusals_page), ("support.md", lambda: support_page(available_kernels()))],
)
def test_a_page_is_what_the_code_says(name: str, page):
    assert (DOCS / name).read_text(encoding="utf-8") == page()


def test_every_refusal_code_is_documented():
    page = (DOCS / "refusals.md").read_text(encoding="utf-8")
    assert all(f"`{code}`" in page for code in Code)


@pytest.mark.parametrize("page", write_tables.PAGES, ids=lambda page: page.name)
def test_tables_hold_the_figures_that_were_measured(page: Path):
    text = page.read_text(encoding="utf-8")
    assert write_tables.filled(text) == text


@pytest.mark.parametrize("file", write_tables.LAYOUTS)
def test_all_figures_that_were_kept_are_in_a_page(file: str):
    assert any(f"<!-- figures: {file} " in page.read_text(encoding="utf-8") for page in write_tables.PAGES)
