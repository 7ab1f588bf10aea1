"""A page of headings, paragraphs, tables and figures, as Markdown and as one file of HTML."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence

from blindvalm_jax import markdown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 1.5em auto; max-width: 960px;
       padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; } h3 { font-size: 1.05em; }
table { border-collapse: collapse; font-size: 0.88em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25em 0.9em 0.25em 0; border-bottom: 1px solid #ddd;
         vertical-align: top; }
.scroll { overflow: auto; max-height: 40em; margin: 1em 0; } th { position: sticky; top: 0;
         background: #fff; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption { font-size: 0.92em; color: #444; }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
    """level: 1 is the page's."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows as long as the head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """name: of its file, without .png."""

    name: str
    caption: str


Block = Heading | Text | Items | Table | Figure


def as_markdown(blocks: Sequence[Block]) -> str:
    """The page; figures are files in figures/."""
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading():
                lines += ["", f"{'#' * block.level} {_plain(block.text)}", ""]
            case Text():
                lines += ["", _plain(block.text), ""]
            case Items():
                lines += ["", *(f"- {_plain(text)}" for text in block.texts), ""]
            case Table():
                rows = [[_plain(cell) for cell in row] for row in block.rows]
                lines += markdown.table([_plain(cell) for cell in block.head], rows)
            case Figure():
                caption = _plain(block.caption)
                lines += ["", f"![{caption}](figures/{block.name}.png)", "", f"*{caption}*", ""]
    once = [x for place, x in enumerate(lines) if x or (place and lines[place - 1])]
    return "\n".join(once).strip() + "\n"


def as_html(blocks: Sequence[Block], figures: Mapping[str, bytes]) -> str:
    """The page with its figures in it: nothing is loaded from elsewhere. figures: PNG by name."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = [line for block in blocks for line in _html(block, figures)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _html(block: Block, figures: Mapping[str, bytes]) -> list[str]:
    match block:
        case Heading():
            return [f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"]
        case Text():
            return [f"<p>{html.escape(block.text)}</p>"]
        case Items():
            return ["<ul>", *(f"<li>{html.escape(text)}</li>" for text in block.texts), "</ul>"]
        case Table():
            rows = [_row(block.head, "th"), *(_row(row, "td") for row in block.rows)]
            return ['<div class="scroll"><table>', *rows, "</table></div>"]
        case Figure():
            coded = base64.b64encode(figures[block.name]).decode()
            caption = html.escape(block.caption)
            image = f'<img src="data:image/png;base64,{coded}" alt="{caption}">'
            return [f"<figure>{image}<figcaption>{caption}</figcaption></figure>"]


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _plain(text: str) -> str:
    """What Markdown takes for nothing but text, on one line."""
    for letter in "\\|<*_`":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())
