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


def test_tables_hold_the_figures_that_were_measured():
    text = write_tables.PAGE.read_text(encoding="utf-8")
    assert write_tables.filled(text) == text
    assert len(write_tables.PLACE.findall(text)) == text.count("<!-- figures")


def test_all_figures_that_were_kept_are_in_the_page():
    text, kept = write_tables.PAGE.read_text(encoding="utf-8"), {file.stem for file in write_tables.RESULTS.iterdir()}
    assert kept
    assert {file for file in kept if f"<!-- figures: {file} " in text} == kept
