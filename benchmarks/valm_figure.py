"""The figure of valm_cost: time of a step, and the share of retrieval in it, over M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks import palette

_STYLES: dict[str, dict[str, Any]] = {
    "valm": {"label": "VALM, exact search", "marker": "o"},
    "faiss": {"label": "VALM, FAISS", "marker": "v", "linestyle": ":"},
    "faiss_ranked": {"label": "VALM, FAISS, candidates ranked again", "marker": "^"},
    "prepared": {"label": "VALM, neighbours found ahead", "marker": "s"},
    "blind": {"label": "BLIND-VALM (token)", "marker": "D"},
}
_ASIDE = 1.06  # neighbouring systems stand apart by this factor, so that their bars do not hide


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Median ratios to GPT-2 and shares, with bars from the lowest to the highest round."""
    figure = Figure((10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    _curves(panels[0], rows, "ratio", factor=1)
    panels[0].axhline(1, color=palette.COLORS["gpt2"], linestyle="--", label="GPT-2")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("time of a training step, GPT-2 = 1 (log scale)")
    _curves(panels[1], rows, "share", factor=100)
    panels[1].set_ylim(bottom=0)
    panels[1].set_ylabel("share of retrieval in the step (%)")
    for panel in panels:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("vectors in the index (log scale)")
        panel.grid(color="0.88", linewidth=0.7)
        panel.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _curves(panel: Axes, rows: Sequence[Mapping[str, Any]], what: str, *, factor: float) -> None:
    """A curve for each system that has the quantity, at the sizes at which it was measured."""
    for number, (name, style) in enumerate(_STYLES.items()):
        there = [row for row in rows if what in row["systems"].get(name, {})]
        if not there:
            continue
        sizes = [row["vectors"] * _ASIDE ** (number - len(_STYLES) // 2) for row in there]
        middle, low, high = (
            [factor * row["systems"][name][f"{what}{end}"] for row in there]
            for end in ("", "_low", "_high")
        )
        bars = (
            [a - b for a, b in zip(middle, low, strict=True)],
            [a - b for a, b in zip(high, middle, strict=True)],
        )
        color = palette.COLORS[name.removesuffix("_ranked")]
        panel.errorbar(sizes, middle, yerr=bars, color=color, capsize=3, markersize=5, **style)
