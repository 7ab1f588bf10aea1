"""The figures of evaluation: scores with intervals, answers to a task, differences of two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

# Of Okabe and Ito's colours, which the colour-blind can tell apart.
_MODEL, _GOLD, _OTHER = "#0072B2", "#999999", "#D55E00"
_WIDTH = 8.6  # inches
_GRID: dict[str, Any] = {"color": "0.88", "linewidth": 0.7}
_MAJORITY: dict[str, Any] = {"marker": "|", "color": _OTHER, "ms": 12, "mew": 2, "ls": ""}
_RANDOM: dict[str, Any] = {"marker": "x", "color": "0.35", "ms": 6, "mew": 1.4, "ls": ""}
_MOST_ANSWERS, _LONGEST = 20, 24  # bars of a figure, letters of a label
_UNITS = {"accuracy": 100.0, "perplexity": 1.0}


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Scores with 95 % intervals beside what one gets without a model; a panel for each metric."""
    by_metric = {
        metric: {name: entry for name, entry in tasks.items() if entry["metric"] == metric}
        for metric in _UNITS
    }
    shown = {metric: found for metric, found in by_metric.items() if found}
    heights = [1 + len(found) for found in shown.values()]
    figure = Figure((_WIDTH, 0.7 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (metric, found) in zip(panels, shown.items(), strict=True):
        for place, entry in enumerate(found.values()):
            _score(panel, place, entry, _UNITS[metric])
        _rows(panel, list(found))
        panel.set_xlabel("accuracy, %" if metric == "accuracy" else "perplexity, log scale")
        if metric == "perplexity":
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:,g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_xlim(left=0)
    handles = [
        Line2D([], [], color=_MODEL, marker="o", label="model, 95 % interval"),
        Line2D([], [], label="majority", **_MAJORITY),
        Line2D([], [], label="random", **_RANDOM),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _score(panel: Axes, place: int, entry: Mapping[str, Any], unit: float) -> None:
    ends = [value for value in entry["interval"] if value is not None]
    panel.plot([unit * x for x in ends], [place] * len(ends), color=_MODEL, lw=1.8, zorder=3)
    model: dict[str, Any] = {"marker": "o", "color": _MODEL, "ms": 5.5}
    for key, style, layer in (
        *(("majority", _MAJORITY, 2), ("random", _RANDOM, 2)),
        ("score", model, 4),
    ):
        if entry[key] is not None:
            panel.plot(unit * entry[key], place, zorder=layer, **style)


def answers(entry: Mapping[str, Any]) -> Figure:
    """Accuracy by template, and how often each answer is given and is right."""
    by_template, counts = entry["per_prompt"], dict(_largest(entry["answers"]))
    rows = max(2 * len(counts), len(by_template), 4)
    figure = Figure((_WIDTH, 1.1 + 0.19 * rows), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    left.barh(range(len(by_template)), [100 * x for x in by_template], 0.7, color=_MODEL, zorder=2)
    if entry["majority"] is not None:
        left.axvline(100 * entry["majority"], color=_OTHER, lw=1.6, label="majority", zorder=3)
    _rows(left, [f"{number}" for number in range(1, len(by_template) + 1)])
    left.set(xlabel="accuracy, %", ylabel="template", xlim=(0, None))
    for place, (said, gold) in enumerate(counts.values()):
        right.barh(place - 0.2, said, 0.38, color=_MODEL, zorder=2)
        right.barh(place + 0.2, gold, 0.38, color=_GOLD, zorder=2)
    _rows(right, [_short(word) for word in counts])
    right.set_xlabel("questions")
    handles = [
        Line2D([], [], color=_MODEL, lw=6, label="answered by the model"),
        Line2D([], [], color=_GOLD, lw=6, label="right answers"),
        Line2D([], [], color=_OTHER, lw=1.6, label="majority"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _largest(counts: Mapping[str, Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """Answers by how often they are right, then given, as many as a figure holds."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1][1], -pair[1][0], pair[0]))
    return ordered[:_MOST_ANSWERS]


def differences(tasks: Mapping[str, Mapping[str, Any]], *, first: str, second: str) -> Figure:
    """Differences of two runs with 95 % intervals, by task; a panel for each metric."""
    labels = {
        "accuracy": f"accuracy of {first} less that of {second}, points",
        "perplexity": f"nats per token of {first} less those of {second} (less is better)",
    }
    shown = {
        metric: found
        for metric in labels
        if (found := {k: v for k, v in tasks.items() if v["metric"] == metric})
    }
    heights = [1 + len(found) for found in shown.values()]
    figure = Figure((_WIDTH, 0.6 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (metric, found) in zip(panels, shown.items(), strict=True):
        unit = _UNITS[metric]
        for place, entry in enumerate(found.values()):
            color = _OTHER if entry["p_holm"] < 0.05 else _MODEL
            ends = [unit * x for x in entry["interval"] if x is not None]
            panel.plot(ends, [place] * len(ends), color=color, lw=1.8, zorder=3)
            panel.plot(unit * entry["difference"], place, "o", color=color, ms=5.5, zorder=4)
        panel.axvline(0, color="0.35", linewidth=1.0)
        _rows(panel, list(found))
        panel.set_xlabel(labels[metric])
    handles = [
        Line2D([], [], color=_OTHER, marker="o", label="p < 0.05 after Holm's correction"),
        Line2D([], [], color=_MODEL, marker="o", label="not"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _rows(panel: Axes, names: Sequence[str]) -> None:
    """Names of rows from top to bottom, and a grid."""
    panel.set_yticks(range(len(names)), list(names), fontsize=9, parse_math=False)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(axis="x", zorder=0, **_GRID)


def _short(word: str) -> str:
    return word if len(word) <= _LONGEST else f"{word[: _LONGEST - 1]}…"
