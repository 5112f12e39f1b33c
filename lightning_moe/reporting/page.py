"""HTML of a self-contained page: no scripts, nothing loaded from anywhere, every text escaped."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Self

from matplotlib.figure import Figure

from lightning_moe.reporting.figures.style import png_bytes
from lightning_moe.reporting.table import Column

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --paper: #fff; --quiet: #4a4a4a; --line: #ccc; --stripe: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --paper: #16181b; --quiet: #b4b4b4; --line: #444; --stripe: #1f2226; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h2 { padding-bottom: .25rem; } a { color: inherit; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; list-style: none; padding: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--quiet); white-space: normal; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--stripe); }
th.left, td.left { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { color: var(--quiet); max-width: 52rem; }
img { max-width: 100%; height: auto; background: #fff; padding: .5rem; border-radius: .4rem; box-sizing: border-box; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; } details > :not(summary) { margin-left: 1rem; }
"""


# On the page: text in figures is as large as the page's own.
_PIXELS_PER_INCH = 94


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of a page: the stem of its file, what it shows and how to read it, its PNG, its width in pixels."""

    name: str
    caption: str
    png: bytes
    width: int

    @classmethod
    def of(cls, name: str, *, figure: Figure, caption: str) -> Self:
        """The picture of a figure."""
        width = round(_PIXELS_PER_INCH * figure.get_figwidth())
        return cls(name=name, caption=caption, png=png_bytes(figure), width=width)

    def html(self) -> str:
        """The figure with its bytes inside."""
        data, caption = b64encode(self.png).decode(), escape(self.caption)
        image = f'<img alt="{caption}" width="{self.width}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One section of a page: its title, its parts (HTML already) and the pictures among them."""

    title: str
    parts: Sequence[str]
    pictures: Sequence[Picture] = ()

    @property
    def anchor(self) -> str:
        """Where the table of contents leads."""
        return "-".join(self.title.lower().split())

    def html(self) -> str:
        """The headed section."""
        return f'<section id="{escape(self.anchor)}"><h2>{escape(self.title)}</h2>{"".join(self.parts)}</section>'


def contents(blocks: Sequence[Block]) -> str:
    """A table of contents."""
    links = [f'<li><a href="#{escape(block.anchor)}">{escape(block.title)}</a></li>' for block in blocks]
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """One paragraph."""
    return f"<p>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list of sentences; nothing where there are none."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else ""


def folded(title: str, *, parts: Sequence[str], is_open: bool = False) -> str:
    """Parts that are HTML already, behind a title to click on."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def html_table(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[Column]) -> str:
    """The rows as a table that scrolls on narrow screens, without the columns of which no row has a value."""
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    head = "".join(_cell("th", text=column.header, column=column) for column in columns)
    body = "".join(
        "<tr>" + "".join(_cell("td", text=column.cell(row), column=column) for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, *, text: str, column: Column) -> str:
    side = ' class="left"' if column.left else ""
    return f"<{tag}{side}>{escape(text)}</{tag}>"


def page(title: str, *, blocks: Sequence[Block]) -> str:
    """The whole document; its policy forbids the browser to load anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [contents(blocks), *(block.html() for block in blocks)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
