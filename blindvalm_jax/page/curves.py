"""The figure of a page: panels below each other that share an axis one can choose."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from blindvalm_jax.page.records import Run

# Okabe and Ito's colours, which the colour-blind can tell apart; black is for the text.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_DASHES = ("solid", "dash", "dot", "dashdot")  # with more runs than colours
MOST_POINTS = 2000  # of a curve; more are thinned, evenly
_PANEL_HEIGHT, _ABOVE, _GAP = 240, 110, 0.035  # pixels; share of the figure


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: title with its unit, metrics drawn in full and, broken, beside them."""

    title: str
    metrics: tuple[str, ...]
    beside: tuple[str, ...] = ()
    logarithmic: bool = False


PANELS = (
    Panel(
        "loss, nats a token or pair (broken line, circles: held-out)",
        ("train/loss",),
        ("eval/loss",),
    ),
    Panel(
        "speed, tokens or pairs a second",
        ("perf/tokens_per_second", "perf/pairs_per_second"),
    ),
    Panel("attention on the grounding, share", ("train/grounding_attention",)),
    Panel("gradient's norm", ("train/grad_norm",), logarithmic=True),
    Panel("learning rate", ("train/learning_rate",)),
    Panel("model FLOPs utilisation, share of the peak", ("perf/mfu",)),
    Panel("goodput, share of the time", ("perf/goodput",)),
)
EVENT_SYMBOLS: Mapping[str, str] = {
    "resume": "triangle-right",
    "skipped": "x",
    "clipped": "diamond",
    "replaced": "circle-open",
    "quarantined": "square",
    "save_failed": "square-open",
    "preempted": "triangle-down",
    "diverged": "star",
}


def axes(run: Run) -> dict[str, list[float]]:
    """What the lines of a run may be drawn over, by the name of the axis."""
    steps = [line["step"] for line in run.lines]
    units = int(run.settings["train.batch_size"]) * run.units_per_row
    seconds = dict.fromkeys(steps, 0.0)
    before = total = 0.0
    for line, each in run.series("perf/step_seconds"):
        total += (each or 0.0) * (line["step"] - before)
        before = line["step"]
        seconds[line["step"]] = total
    filled = itertools.accumulate((seconds[step] for step in steps), max)
    return {
        "updates": [float(step) for step in steps],
        run.unit: [float(step * units) for step in steps],
        "model FLOPs": [step * units * run.flops_per_unit for step in steps],
        "hours of updates": [spent / 3600 for spent in filled],
    }


def figure(runs: Sequence[Run]) -> dict[str, Any]:
    """The figure as Plotly's JSON: one panel for each metric that some run has."""
    panels = [
        panel
        for panel in PANELS
        if any(run.series(name) for run in runs for name in (*panel.metrics, *panel.beside))
    ]
    names = ["updates", *sorted({run.unit for run in runs}), "model FLOPs", "hours of updates"]
    traces: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        over = axes(run)
        style = {"color": COLORS[index % len(COLORS)]}
        dash = _DASHES[index // len(COLORS) % len(_DASHES)]
        shown = False
        for number, panel in enumerate(panels, start=1):
            for name in (*panel.metrics, *panel.beside):
                trace = _curve(run, name, over, names)
                if trace is None:
                    continue
                held_out = name in panel.beside
                traces.append(
                    trace
                    | _place(number, run, show=not shown)
                    | {
                        "mode": "lines+markers" if held_out or len(trace["y"]) < 2 else "lines",
                        "line": style | {"width": 1.5, "dash": "dash" if held_out else dash},
                        "marker": style | {"size": 6},
                    }
                )
                shown = True
        traces += _marks(run, over, names, style)
    return {"data": traces, "layout": _layout(panels, names, traces)}


def _place(number: int, run: Run, *, show: bool) -> dict[str, Any]:
    """Where a curve stands; one entry of the legend switches all of a run."""
    axis = "" if number == 1 else str(number)
    return {
        "xaxis": "x",
        "yaxis": f"y{axis}",
        "name": html.escape(run.name),
        "legendgroup": html.escape(run.name),
        "showlegend": show,
    }


def _curve(
    run: Run, metric: str, over: Mapping[str, Sequence[float]], names: Sequence[str]
) -> dict[str, Any] | None:
    """A metric over every axis; an axis that the run lacks leaves it undrawn there."""
    rows = [row for row, line in enumerate(run.lines) if metric in line]
    if not rows:
        return None
    rows = thinned(rows)
    choices = [[over[name][row] for row in rows] if name in over else [] for name in names]
    return {
        "type": "scatter",
        "x": choices[0],
        "y": [run.lines[row][metric] for row in rows],
        "choices": choices,
        "hovertemplate": f"%{{y:.5g}} at %{{x:,.6g}}<extra>{html.escape(run.name)}</extra>",
    }


def thinned(rows: Sequence[int]) -> list[int]:
    """At most `MOST_POINTS` of them, evenly, the last one among them."""
    every = -(-len(rows) // MOST_POINTS)
    return list(rows[::-1][::every][::-1])


def _marks(
    run: Run,
    over: Mapping[str, Sequence[float]],
    names: Sequence[str],
    style: Mapping[str, str],
) -> list[dict[str, Any]]:
    """What happened to a run, marked on its loss."""
    losses = [
        (row, line["train/loss"]) for row, line in enumerate(run.lines) if "train/loss" in line
    ]
    events = [event for event in run.events if event["event"] in EVENT_SYMBOLS]
    if not losses or not events:
        return []
    nearest = [
        min(losses, key=lambda at: abs(run.lines[at[0]]["step"] - e["step"])) for e in events
    ]
    choices = [[over[name][row] for row, _ in nearest] if name in over else [] for name in names]
    return [
        _place(1, run, show=False)
        | {
            "type": "scatter",
            "mode": "markers",
            "x": choices[0],
            "y": [loss for _, loss in nearest],
            "choices": choices,
            "text": [html.escape(told(event)) for event in events],
            "hovertemplate": f"%{{text}}<extra>{html.escape(run.name)}</extra>",
            "marker": {
                "symbol": [EVENT_SYMBOLS[event["event"]] for event in events],
                "size": 11,
                "color": style["color"],
                "line": {"color": "black", "width": 1},
            },
        }
    ]


def told(event: Mapping[str, Any]) -> str:
    """An event in words: what, at which step, and what else is known of it."""
    rest = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
    about = "".join(f", {name.replace('_', ' ')} {value}" for name, value in rest.items())
    return f"{event['event'].replace('_', ' ')} at step {event['step']:,}{about}"


def _layout(
    panels: Sequence[Panel], names: Sequence[str], traces: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Panels below each other over one axis, with buttons that choose what it is."""
    count = len(panels)
    height = (1 - _GAP * (count - 1)) / max(count, 1)
    layout: dict[str, Any] = {
        "template": "none",
        "height": _ABOVE + 50 + _PANEL_HEIGHT * count,
        "margin": {"l": 70, "r": 20, "t": _ABOVE, "b": 50},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "yanchor": "bottom", "y": 1.0},
        "xaxis": {"title": {"text": names[0]}, "anchor": f"y{count if count > 1 else ''}"},
        "annotations": [],
        "updatemenus": [
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
                "pad": {"b": 40},
                "showactive": True,
                "buttons": [
                    {
                        "label": name,
                        "method": "update",
                        "args": [
                            {"x": [trace["choices"][place] for trace in traces]},
                            {"xaxis.title.text": name, "xaxis.autorange": True},
                        ],
                    }
                    for place, name in enumerate(names)
                ],
            }
        ],
    }
    for number, panel in enumerate(panels, start=1):
        top = 1 - (number - 1) * (height + _GAP)
        layout[f"yaxis{'' if number == 1 else number}"] = {
            "domain": [max(top - height, 0.0), top - 0.1 * height],
            "type": "log" if panel.logarithmic else "linear",
            "exponentformat": "power",
            "gridcolor": "#e4e4e4",
            "zeroline": False,
        }
        layout["annotations"].append(
            {
                "text": f"<b>{panel.title}</b>",
                "x": 0,
                "y": top - 0.09 * height,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
    return layout
