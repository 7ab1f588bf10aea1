"""The page itself: tables, the figure, and the script that draws it, in one file."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax.errors import UserError
from blindvalm_jax.page import controls, curves, tables
from blindvalm_jax.page.records import Run

_MARK = "<!-- blindvalm_jax: a page of runs -->"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 1.5em auto; max-width: 1240px;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 0.92em; }
th, td { text-align: left; padding: 0.25em 0.9em 0.25em 0; border-bottom: 1px solid #ddd;
         vertical-align: top; }
th { position: sticky; top: 0; z-index: 1; background: #fff; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.run, th.run { white-space: nowrap; }
.many td { white-space: nowrap; }
.many td.run { position: sticky; left: 0; background: #fff; white-space: normal; }
.many td.run span { display: inline-block; width: max-content; max-width: 26em;
                    overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 26em; } .stroke { margin-right: 0.3em; }
"""
_TITLED = 3  # so many runs are named at the top


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

    names = [run.name for run in runs]
    title = html.escape(", ".join(names) if len(runs) <= _TITLED else f"{len(runs)} runs")
    # "</" would end the script, whatever a run is called.
    constants = "".join(
        f"const {name} = {json.dumps(what, allow_nan=False, separators=(',', ':'))};\n"
        for name, what in data(runs).items()
    ).replace("</", "<\\/")
    return "\n".join(
        [
            f"<!doctype html>\n{_MARK}",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}{controls.STYLE}</style></head><body><h1>{title}</h1>",
            *tables.overview(runs),
            "<h2>Curves</h2><section>",
            *controls.band(runs),
            '<div id="curves"></div></section>',
            *tables.details(runs),
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{constants}{controls.SCRIPT}</script>",
            "</body></html>\n",
        ]
    )


def data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script draws.

    figure: without x; columns: all x there are, once each; choices: the column of each curve, by
    axis; owners: the run of each curve.
    """
    figure = curves.figure(runs)
    columns: dict[tuple[float, ...], int] = {}
    choices: list[list[int]] = [[] for _ in curves.axis_names(runs)]
    places = {html.escape(run.name): index for index, run in enumerate(runs)}
    for trace in figure["data"]:
        del trace["x"]
        for axis, x in zip(choices, trace.pop("choices"), strict=True):
            axis.append(columns.setdefault(tuple(x), len(columns)))
    owners = [places[trace["name"]] for trace in figure["data"]]
    return {"figure": figure, "columns": list(columns), "choices": choices, "owners": owners}
