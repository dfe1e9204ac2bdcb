"""Reports: text that models and data sets wrote stays text, in Markdown and in HTML."""

import csv

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from dgr_jax.reports.document import Table, aligned, slugs, write_document
from dgr_jax.reports.figures import label_lines, logarithmic, panel, save
from dgr_jax.reports.palette import COLOURS, DARK, INK


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
    assert f'<th scope="row">{page}</th><td>1</td>' in text and "<h1>A &amp; B</h1>" in text


def test_tables_are_files_that_others_can_read(tmp_path):
    cells = ['a "quoted", 50 % of $x_1$ & {y}\\z', "1"]
    write_document("T", [Table("The First: one", "", [["head", "n"], cells])], tmp_path)
    with (tmp_path / "tables" / "the_first_one.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["head", "n"], cells]
    assert (tmp_path / "tables" / "the_first_one.tex").read_text().splitlines() == [
        r"\begin{tabular}{ll}", r"\toprule", r"head & n \\", r"\midrule",
        r"""a "quoted", 50 \% of \$x\_1\$ \& \{y\}\textbackslash{}z & 1 \\""", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "folded"), [(14, False), (15, True)])
def test_a_long_table_is_folded(tmp_path, rows: int, folded: bool):
    page = write_document("T", [Table("T", "", [["head"], *[["x"]] * rows])], tmp_path).read_text()
    assert ('<details class="table" open>' in page) != folded and f"<summary>{rows} rows" in page
    assert ("<details>" in (tmp_path / "report.md").read_text()) == folded


def test_titles_that_become_one_name_are_told_apart():
    assert slugs(["a.b", "A b", "c", "a_b"]) == {"a.b": "a_b", "A b": "a_b_2", "c": "c", "a_b": "a_b_3"}


def test_colours_follow_the_scheme(tmp_path):
    figure, axis = panel()
    axis.plot([0, 1], [0, 1], color=COLOURS[0])
    label_lines(axis, {"a line": (1, 1, COLOURS[0])})
    axis.set_title("$not{ a formula$ <b>")
    drawn = (epath.Path(tmp_path) / save(figure, epath.Path(tmp_path), "f.svg")).read_text()
    assert f"{{:root{{--c0:{DARK[INK]};" in drawn and COLOURS[0] not in drawn.split("</style>")[1]
    assert ">a line</text>" in drawn and ">$not{ a formula$ &lt;b&gt;</text>" in drawn and "<date>" not in drawn


def test_logarithmic_axes_have_plain_numbers(tmp_path):
    figure, axis = panel()
    axis.plot([1, 1000], [0.01, 10])
    logarithmic(axis.xaxis, axis.yaxis)
    drawn = (tmp_path / save(figure, epath.Path(tmp_path), "f.svg")).read_text()
    assert all(f">{number}</text>" in drawn for number in ("1", "10", "100", "0.01", "0.1")) and "$" not in drawn


@settings(deadline=None)  # drawing takes its time
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_at_lines_have_room_and_stay_in_the_picture(heights):
    figure, axis = panel()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    label_lines(axis, {str(n): (1.0, height, INK) for n, height in enumerate(heights)})
    figure.canvas.draw()
    middles = sorted(text.get_window_extent().get_points()[:, 1].mean() for text in axis.texts)
    low, high = axis.bbox.get_points()[:, 1]
    assert low - 1 <= middles[0] and middles[-1] <= high + 1
    gaps = np.diff(middles)
    assert not len(gaps) or gaps.min() >= (high - low) / 14 - 1
    plt.close(figure)


def test_columns_of_a_terminal_are_aligned():
    assert aligned([["a", "bb", "c"], ["aaa", "b", ""]]) == "a    bb  c\naaa  b"
