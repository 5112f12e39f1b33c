"""HTML of a self-contained page: no scripts, nothing loaded from anywhere, every text escaped."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lightning_moe.reporting.table import Column

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #555; white-space: normal; vertical-align: bottom; }
tbody tr:nth-child(even) { background: #f5f5f5; }
th.left, td.left { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #444; max-width: 48rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; } details > :not(summary) { margin-left: 1rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of a page: the stem of its file, what it shows and how to read it, its PNG."""

    name: str
    caption: str
    png: bytes

    def html(self) -> str:
        """The figure with its bytes inside."""
        data, caption = b64encode(self.png).decode(), escape(self.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """One paragraph."""
    return f"<p>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def section(title: str, *, parts: Sequence[str]) -> str:
    """A headed section of parts that are HTML already; nothing when there are no parts."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if parts else ""


def folded(title: str, *, parts: Sequence[str], is_open: bool) -> str:
    """Parts that are HTML already, behind a title to click on."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def html_table(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[Column]) -> str:
    """The rows as a table that scrolls on narrow screens."""
    head = "".join(_cell("th", text=column.header, column=column) for column in columns)
    body = "".join(
        "<tr>" + "".join(_cell("td", text=column.cell(row), column=column) for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, *, text: str, column: Column) -> str:
    side = ' class="left"' if column.left else ""
    return f"<{tag}{side}>{escape(text)}</{tag}>"


def page(title: str, *, parts: Sequence[str]) -> str:
    """The whole document; its policy forbids the browser to load anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )
