"""Reports: text that models and data sets wrote stays text, in Markdown and in HTML."""

import pytest
from etils import epath

from dgr_jax.reports.document import Table, aligned, write_document


@pytest.mark.parametrize(
    ("cell", "markdown", "page"),
    [
        ("<img src=x onerror=a>", "&lt;img src=x onerror=a>", "&lt;img src=x onerror=a&gt;"),
        ("&lt;b>", "&amp;lt;b>", "&amp;lt;b&gt;"),
        ("a|b", "a\\|b", "a|b"),
        ("a\\|b", "a\\\\\\|b", "a\\|b"),
        ("![x](http://there/x.png)", "![x]\\(http://there/x.png)", "![x](http://there/x.png)"),
        ("`", "\\`", "`"),
        ("two\nlines", "two lines", "two\nlines"),
    ],
)
def test_a_cell_is_text(tmp_path, cell: str, markdown: str, page: str):
    path = write_document("A & B", [Table("T", "words", [["head", "next"], [cell, "1"]])], tmp_path)
    assert f"\n| {markdown} | 1 |\n" in (tmp_path / "report.md").read_text()
    text = epath.Path(path).read_text()
    assert f"<td>{page}</td><td>1</td>" in text and "<h1>A &amp; B</h1>" in text


def test_columns_of_a_terminal_are_aligned():
    assert aligned([["a", "bb", "c"], ["aaa", "b", ""]]) == "a    bb  c\naaa  b"
