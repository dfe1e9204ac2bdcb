"""A report in two forms from the same sections: Markdown, and one HTML page that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jinja2
from etils import epath

from dgr_jax import ASSETS
from dgr_jax.run.files import write_text

_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)

_PAGES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}


class Section(Protocol):
    """A part of a report. `folder` is where the report's pictures are."""

    def markdown(self) -> str: ...

    def html(self, folder: epath.Path) -> str: ...


def render(template: str, values: Mapping[str, Any]) -> str:
    """An HTML template of the assets, filled in; what a model or a data set wrote stays text."""
    return _PAGES.get_template(template).render(values)


def write_document(title: str, sections: Sequence[Section], folder: epath.PathLike) -> epath.Path:
    """Writes FOLDER/report.md and FOLDER/report.html.

    Returns:
      The path of the page.
    """
    place = epath.Path(folder)
    markdown = f"# {title}\n\n" + "\n\n".join(section.markdown() for section in sections) + "\n"
    write_text(place / "report.md", markdown)
    page = render("report.html", {"title": title, "sections": [section.html(place) for section in sections]})
    write_text(place / "report.html", page)
    return place / "report.html"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table as text for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


_MARKDOWN = str.maketrans({"\n": " ", "&": "&amp;", "<": "&lt;", "\\": "\\\\", "|": "\\|", "`": "\\`"})


def _markdown_cell(text: str) -> str:
    """Text that a model or a data set wrote may be no tag, link or picture, and end no cell."""
    return text.translate(_MARKDOWN).replace("](", "]\\(")


class Table:
    """Text and a table; the first line is its head."""

    def __init__(self, title: str, text: str, lines: list[list[str]]):
        self.title, self.text, self.lines = title, text, lines

    def markdown(self) -> str:
        head, *body = ["| " + " | ".join(map(_markdown_cell, line)) + " |" for line in self.lines]
        rule = "|" + " --- |" * len(self.lines[0])
        return "\n".join([f"## {self.title}", "", self.text, "", head, rule, *body])

    def html(self, folder: epath.Path) -> str:
        return render("table.html", vars(self))


class Picture:
    """A picture that is a file of the report's folder."""

    def __init__(self, title: str, caption: str, file: str):
        self.title, self.caption, self.file = title, caption, file

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.caption}\n\n![{self.title}]({self.file})"

    def html(self, folder: epath.Path) -> str:
        data = base64.b64encode((folder / self.file).read_bytes()).decode()
        return render("picture.html", {**vars(self), "data": data})
