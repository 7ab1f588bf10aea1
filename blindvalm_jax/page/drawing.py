"""The page itself: tables, the figure, and the script that draws it, in one file."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from blindvalm_jax.errors import UserError
from blindvalm_jax.page import curves, tables
from blindvalm_jax.page.records import Run

_MARK = "<!-- blindvalm_jax: a page of runs -->"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 1.5em auto; max-width: 1240px;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 0.92em; }
th, td { text-align: left; padding: 0.25em 0.9em 0.25em 0; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .swatch { display: inline-block; width: 0.8em; height: 0.8em;
          margin-right: 0.45em; border-radius: 2px; } .quiet { color: #666; }
"""


def check_installed() -> None:
    """Refuses to start without what draws.

    Raises:
      UserError: plotly is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UserError("the page is drawn with plotly: pip install 'blindvalm_jax[page]'")


def is_page(path: Path) -> bool:
    """Whether a file is a page that was drawn before."""
    with path.open("rb") as stream:
        return _MARK.encode() in stream.read(200)


def page(runs: Sequence[Run]) -> str:
    """The HTML of a page; nothing in it is loaded from elsewhere."""
    from plotly.offline import get_plotlyjs

    figure = curves.figure(runs)
    for trace in figure["data"]:
        del trace["choices"]
    title = html.escape(", ".join(run.name for run in runs))
    # "</" would end the script, whatever a run is called.
    drawn = json.dumps(figure, allow_nan=False).replace("</", "<\\/")
    return "\n".join(
        [
            f"<!doctype html>\n{_MARK}",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
            *tables.all_of(runs),
            '<h2>Curves</h2><div id="curves"></div>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>const figure = {drawn};",
            "const options = {responsive: true, displaylogo: false};",
            'Plotly.newPlot("curves", figure.data, figure.layout, options);</script>',
            "</body></html>\n",
        ]
    )
