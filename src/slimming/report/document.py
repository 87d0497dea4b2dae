"""A report as a document: sections of paragraphs, tables and pictures; written as Markdown, HTML, plain text or CSV."""

import base64
import csv
import html
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.6rem; border-bottom: 2px solid #888; }
h3 { font-size: 1.1rem; margin-top: 1.8rem; } img { max-width: 100%; } nav li { margin: 0.3rem 0; }
.headline { font-size: 1.1rem; background: #eef2f8; border-left: 4px solid #1b3a6b; padding: 0.6rem 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 0.8rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 9px; text-align: right; } .left { text-align: left; }
th { border-bottom: 2px solid #888; } tr:nth-child(even) td { background: #f6f6f6; }
"""


@dataclass
class Table:
    """Rows of cells under a head; the first `left` columns hold words and are aligned to the left, the others numbers."""

    head: list[str]
    rows: list[list[Any]]
    left: int = 1

    def columns(self, names: Iterable[str]) -> "Table":
        """Return a table of some of the columns, in the given order."""
        chosen = [self.head.index(name) for name in names]
        rows = [[row[i] for i in chosen] for row in self.rows]
        return Table([self.head[i] for i in chosen], rows, sum(i < self.left for i in chosen))

    def markdown(self) -> str:
        head, *rows = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in [self.head, *self.rows])
        rule = "|---" * self.left + "|---:" * (len(self.head) - self.left) + "|"
        return "\n".join([f"| {head} |", rule, *(f"| {row} |" for row in rows)])

    def html(self) -> str:
        def row(cells: list, tag: str) -> str:
            mark = [' class="left"'] * self.left + [""] * (len(cells) - self.left)
            both = zip(cells, mark, strict=True)
            return f"<tr>{''.join(f'<{tag}{m}>{html.escape(str(c))}</{tag}>' for c, m in both)}</tr>"

        head, body = row(self.head, "th"), "".join(row(cells, "td") for cells in self.rows)
        return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'

    def text(self) -> str:
        """Return aligned columns for a terminal."""
        cells = [[str(cell) for cell in row] for row in [self.head, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        sides = ["<"] * self.left + [">"] * (len(widths) - self.left)
        lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text).writerows([self.head, *self.rows])
        return text.getvalue()


@dataclass
class Section:
    """A title with paragraphs, tables and pictures (paths of PNG files), and sections below it.

    Attributes:
        headline: the one sentence that a hurried reader is to take away, or "".
    """

    title: str
    parts: list[str | Table | Path] = field(default_factory=list)
    sections: list["Section"] = field(default_factory=list)
    headline: str = ""


def markdown(title: str, sections: list[Section], folder: Path) -> str:
    """Return a Markdown page that lies in `folder`; pictures are linked relative to it."""
    lines = [f"# {title}", ""]
    if sum(bool(section.headline) for section in sections) > 1:
        lines += [*(f"* {s.title}: {s.headline}" for s in sections if s.headline), ""]
    for section in sections:
        lines += _markdown_of(section, folder, 2)
    return "\n".join(lines)


def _markdown_of(section: Section, folder: Path, level: int, above: str = "") -> list[str]:
    lines = [f"{'#' * level} {section.title}", ""]
    if section.headline:
        lines += [f"**{section.headline}**", ""]
    for part in section.parts:
        if isinstance(part, Path):
            lines += [f"![{above}{section.title}]({part.relative_to(folder).as_posix()})", ""]
        else:
            lines += [part.markdown() if isinstance(part, Table) else part, ""]
    for below in section.sections:
        lines += _markdown_of(below, folder, level + 1, f"{section.title}: ")
    return lines


def page(title: str, sections: list[Section]) -> str:
    """Return one HTML page that needs no network: pictures are inside it."""
    entries = (f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections))
    headlines = (html.escape(f": {s.headline}" if s.headline else "") for s in sections)
    contents = "".join(f"<li>{a}{b}</li>" for a, b in zip(entries, headlines, strict=True))
    body = [f"<h1>{html.escape(title)}</h1>"] + [f"<nav><ul>{contents}</ul></nav>"] * (len(sections) > 1)
    for i, section in enumerate(sections):
        body += _html_of(section, 2, f' id="s{i}"')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html_of(section: Section, level: int, mark: str = "", above: str = "") -> list[str]:
    body = [f"<h{level}{mark}>{html.escape(section.title)}</h{level}>"]
    if section.headline:
        body.append(f'<p class="headline">{html.escape(section.headline)}</p>')
    for part in section.parts:
        if isinstance(part, Table):
            body.append(part.html())
        elif isinstance(part, Path):
            data = base64.b64encode(part.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(above + section.title)}" src="data:image/png;base64,{data}">')
        else:
            body.append(f"<p>{html.escape(part)}</p>")
    for below in section.sections:
        body += _html_of(below, level + 1, above=f"{section.title}: ")
    return body
