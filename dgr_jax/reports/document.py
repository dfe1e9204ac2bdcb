"""A report in two forms from the same sections: Markdown, and one HTML page that needs no other file.

Every table is a CSV and a LaTeX file beside them, too.
"""

import base64
import csv
import dataclasses
import io
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jinja2
from etils import epath

from dgr_jax import ASSETS
from dgr_jax.reports.palette import DARK
from dgr_jax.run.files import told_apart, write_text

_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)

_PAGES.filters["dark"] = DARK.__getitem__
_PAGES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}

_MOST_SHOWN = 14
"""Rows of a table beyond which it is folded."""


class Section(Protocol):
    """A part of a report. `folder` is where the report's files are."""

    @property
    def title(self) -> str: ...

    def markdown(self) -> str: ...

    def html(self, folder: epath.Path) -> str: ...


def render(template: str, values: Mapping[str, Any]) -> str:
    """An HTML template of the assets, filled in; what a model or a data set wrote stays text."""
    return _PAGES.get_template(template).render(values)


def write_document(title: str, sections: Sequence[Section], folder: epath.PathLike) -> epath.Path:
    """Writes FOLDER/report.md and FOLDER/report.html, and tables/ beside them.

    Returns:
      The path of the page.
    """
    place = epath.Path(folder)
    markdown = f"# {title}\n\n" + "\n\n".join(section.markdown() for section in sections) + "\n"
    write_text(place / "report.md", markdown)
    parts = [{"title": s.title, "slug": slug(s.title), "html": s.html(place)} for s in sections]
    write_text(place / "report.html", render("report.html", {"title": title, "sections": parts}))
    for section in sections:
        if isinstance(section, Table):
            write_text(place / "tables" / f"{slug(section.title)}.csv", section.csv())
            write_text(place / "tables" / f"{slug(section.title)}.tex", section.latex())
    return place / "report.html"


def slug(title: str) -> str:
    """A title as a file's name and an anchor."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def slugs(titles: Iterable[str]) -> dict[str, str]:
    """The same of several titles, told apart."""
    each = list(dict.fromkeys(titles))
    return dict(zip(each, told_apart(map(slug, each)), strict=True))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table as text for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


_MARKDOWN = str.maketrans({"\n": " ", "&": "&amp;", "<": "&lt;", "\\": "\\\\", "|": "\\|", "`": "\\`"})


def _markdown_text(text: str) -> str:
    """Text that a model or a data set wrote may be no tag, link or picture, and end no cell."""
    return text.translate(_MARKDOWN).replace("](", "]\\(")


_LATEX = str.maketrans(
    {
        "\n": " ", "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
        "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """Text and a table.

    Attributes:
      title, text: above it.
      lines: the first is the head.
      marks: a colour of the palette for each row below the head, shown before its first cell; none where empty.
      links: (row below the head, column) -> address of what the cell is about.
    """

    title: str
    text: str
    lines: Sequence[Sequence[str]]
    marks: Sequence[str | None] = ()
    links: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)

    @property
    def folded(self) -> bool:
        return len(self.lines) - 1 > _MOST_SHOWN

    def markdown(self) -> str:
        head, *body = ["| " + " | ".join(map(_markdown_text, line)) + " |" for line in self.lines]
        rule = "|" + " --- |" * len(self.lines[0])
        table = [head, rule, *body]
        if self.folded:
            table = ["<details>", f"<summary>{len(body)} rows</summary>", "", *table, "", "</details>"]
        return "\n".join([f"## {self.title}", "", self.text, "", *table])

    def html(self, folder: epath.Path) -> str:
        marks = self.marks or [None] * (len(self.lines) - 1)
        rows = [
            {"mark": mark, "cells": [(cell, self.links.get((number, column))) for column, cell in enumerate(line)]}
            for number, (line, mark) in enumerate(zip(self.lines[1:], marks, strict=True))
        ]
        files = {
            kind: f"data:{media};charset=utf-8,{urllib.parse.quote(text)}"
            for kind, media, text in (("csv", "text/csv", self.csv()), ("tex", "application/x-tex", self.latex()))
        }
        about = {"text": self.text, "head": self.lines[0], "rows": rows, "folded": self.folded, "files": files}
        return render("table.html", {**about, "slug": slug(self.title)})

    def csv(self) -> str:
        """As RFC 4180 has it, but with line feeds."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self.lines)
        return buffer.getvalue()

    def latex(self) -> str:
        """A tabular with the rules of booktabs."""
        head, *body = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in self.lines]
        columns = "l" * len(self.lines[0])
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures that are SVG files of the report's folder, beside each other where there is room.

    Attributes:
      title, caption: above them.
      files: name -> what it shows, for who cannot see it.
    """

    title: str
    caption: str
    files: Mapping[str, str]

    def markdown(self) -> str:
        shown = "\n".join(f"![{_markdown_text(what)}]({name})" for name, what in self.files.items())
        return f"## {self.title}\n\n{self.caption}\n\n{shown}"

    def html(self, folder: epath.Path) -> str:
        shown = [(what, base64.b64encode((folder / name).read_bytes()).decode()) for name, what in self.files.items()]
        return render("pictures.html", {"caption": self.caption, "pictures": shown})


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence that is true, false or in between, and what says so.

    Attributes:
      title: the sentence.
      verdict: about it.
      tone: "good", "bad" or "open", which colours the verdict.
      points: what bears on it, each with a sign: "+", "-" or "?".
      notes: further paragraphs.
    """

    title: str
    verdict: str
    tone: str
    points: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """As paragraphs."""
        points = "\n".join(f"- ({sign}) {_markdown_text(text)}" for sign, text in self.points)
        head = f"**{_markdown_text(self.title)}: {self.verdict}.**"
        return "\n\n".join([head, *([points] if points else []), *map(_markdown_text, self.notes)])


@dataclasses.dataclass(frozen=True)
class Conclusions:
    """What a report says first."""

    statements: Sequence[Statement]
    title: str = "Conclusions"

    def markdown(self) -> str:
        return "\n\n".join([f"## {self.title}", *(statement.markdown() for statement in self.statements)])

    def html(self, folder: epath.Path) -> str:
        return render("conclusions.html", {"statements": self.statements})
