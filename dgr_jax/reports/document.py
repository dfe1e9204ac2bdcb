"""A report in two forms from the same sections: Markdown, and one HTML page that needs no other file."""

import base64
import html
from collections.abc import Sequence
from typing import Protocol

from etils import epath

from dgr_jax.run.stage import write_atomically


class Section(Protocol):
    """A part of a report. `folder` is where the report's pictures are."""

    def markdown(self) -> str: ...

    def html(self, folder: epath.Path) -> str: ...


def write_document(title: str, sections: Sequence[Section], folder: epath.PathLike) -> epath.Path:
    """Writes FOLDER/report.md and FOLDER/report.html.

    Returns:
      The path of the page.
    """
    place = epath.Path(folder)
    markdown = f"# {title}\n\n" + "\n\n".join(section.markdown() for section in sections) + "\n"
    write_atomically(place / "report.md", markdown)
    body = "\n".join(section.html(place) for section in sections)
    page = _PAGE.format(title=html.escape(title), body=body)
    write_atomically(place / "report.html", page)
    return place / "report.html"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


_MARKDOWN = str.maketrans({"\n": " ", "&": "&amp;", "<": "&lt;", "\\": "\\\\", "|": "\\|", "`": "\\`"})


def _markdown_cell(text: str) -> str:
    """Text that a model or a data set wrote may be no tag, link or picture, and end no cell."""
    return text.translate(_MARKDOWN).replace("](", "]\\(")


class Table:
    """Text and a table; the first row is its head."""

    def __init__(self, title: str, text: str, rows: list[list[str]]):
        self.title, self.text, self.rows = title, text, rows

    def markdown(self) -> str:
        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(map(_markdown_cell, row)) + " |"

        head = [line(self.rows[0]), "|" + " --- |" * len(self.rows[0])]
        return "\n".join([f"## {self.title}", "", self.text, "", *head, *map(line, self.rows[1:])])

    def html(self, folder: epath.Path) -> str:
        def line(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "\n".join([line(self.rows[0], "th"), *(line(row, "td") for row in self.rows[1:])])
        text = f"<h2>{html.escape(self.title)}</h2><p>{html.escape(self.text)}</p>"
        return f'{text}<div class="table"><table>{body}</table></div>'


class Picture:
    """A picture that is a file of the report's folder."""

    def __init__(self, title: str, caption: str, file: str):
        self.title, self.caption, self.file = title, caption, file

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.caption}\n\n![{self.title}]({self.file})"

    def html(self, folder: epath.Path) -> str:
        data = base64.b64encode((folder / self.file).read_bytes()).decode()
        picture = f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{data}">'
        return f"<h2>{html.escape(self.title)}</h2><p>{html.escape(self.caption)}</p>{picture}"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #ddd; }}
th {{ border-bottom: 2px solid #888; }} img {{ max-width: 100%; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
