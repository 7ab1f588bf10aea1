"""The figure of a page: panels below each other that share an axis one can choose."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blindvalm_jax.page.records import Run

# Okabe and Ito's colours, which the colour-blind can tell apart; black is for the text.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# lengths of dashes and gaps, with more runs than colours; 42 runs can be told apart
_DASHES = ("", "8,4", "2,3", "8,3,2,3", "16,4", "16,3,2,3")
MOST_POINTS = 2000  # of a curve; more are thinned, evenly
_FEWEST_POINTS, _POINTS = 300, 20_000  # with many runs: of a curve, of all curves of a panel
_PANEL_HEIGHT, _ABOVE, _BELOW, _BETWEEN = 200, 40, 50, 60  # pixels


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


def style(index: int) -> tuple[str, str]:
    """Colour of a run, and its dashes: empty for an unbroken line."""
    return COLORS[index % len(COLORS)], _DASHES[index // len(COLORS) % len(_DASHES)]


def axis_names(runs: Sequence[Run]) -> list[str]:
    """What curves may be drawn over."""
    return ["updates", *sorted({run.unit for run in runs}), "model FLOPs", "hours of updates"]


def axes(run: Run) -> dict[str, list[float]]:
    """What the lines of a run may be drawn over, by the name of the axis, as far as it is known."""
    steps = [line["step"] for line in run.lines]
    units = int(run.settings["train.batch_size"]) * run.units_per_row
    seconds = dict.fromkeys(steps, 0.0)
    before = total = 0.0
    for line, each in run.series("perf/step_seconds"):
        total += (each or 0.0) * (line["step"] - before)
        before = line["step"]
        seconds[line["step"]] = total
    filled = itertools.accumulate((seconds[step] for step in steps), max)
    flops = run.flops_per_unit
    return {
        "updates": [float(step) for step in steps],
        run.unit: [float(step * units) for step in steps],
        **({} if flops is None else {"model FLOPs": [step * units * flops for step in steps]}),
        "hours of updates": [spent / 3600 for spent in filled],
    }


def figure(runs: Sequence[Run]) -> dict[str, Any]:
    """The figure as Plotly's JSON: one panel for each metric that some run has."""
    panels = [
        panel
        for panel in PANELS
        if any(run.series(name) for run in runs for name in (*panel.metrics, *panel.beside))
    ]
    names = axis_names(runs)
    most = min(MOST_POINTS, max(_FEWEST_POINTS, _POINTS // max(len(runs), 1)))
    traces: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        over = axes(run)
        color, dashes = style(index)
        dash = ",".join(f"{length}px" for length in dashes.split(",")) if dashes else "solid"
        for number, panel in enumerate(panels, start=1):
            for name in (*panel.metrics, *panel.beside):
                trace = _curve(run, name, over, names, most=most)
                if trace is None:
                    continue
                held_out = name in panel.beside
                traces.append(
                    trace
                    | _place(number, run)
                    | {
                        "mode": "lines+markers" if held_out or len(trace["y"]) < 2 else "lines",
                        "line": {
                            "color": color,
                            "width": 1.5,
                            "dash": "dash" if held_out else dash,
                        },
                        "marker": {"color": color, "size": 6},
                    }
                )
        traces += _marks(run, over, names, color)
    return {"data": traces, "layout": _layout(panels, names[0])}


def _place(number: int, run: Run) -> dict[str, Any]:
    """Where a curve stands, and whose it is."""
    axis = "" if number == 1 else str(number)
    return {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "name": html.escape(run.name)}


def _curve(
    run: Run,
    metric: str,
    over: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    most: int,
) -> dict[str, Any] | None:
    """A metric over every axis; an axis that the run lacks leaves it undrawn there."""
    rows = [row for row, line in enumerate(run.lines) if metric in line]
    if not rows:
        return None
    rows = thinned(rows, most)
    choices = [_rounded(over[name][row] for row in rows) if name in over else [] for name in names]
    return {
        "type": "scatter",
        "x": choices[0],
        "y": _rounded(run.lines[row][metric] for row in rows),
        "choices": choices,
        "hovertemplate": f"%{{y:.5g}} at %{{x:,.6g}}<extra>{html.escape(run.name)}</extra>",
    }


def thinned(rows: Sequence[int], most: int = MOST_POINTS) -> list[int]:
    """At most so many of them, evenly, the last one among them."""
    every = -(-len(rows) // most)
    return list(rows[::-1][::every][::-1])


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    """Seven digits, which is more than one sees: the rest is half of the page's size."""
    return [None if value is None else float(f"{value:.7g}") for value in values]


def _marks(
    run: Run,
    over: Mapping[str, Sequence[float]],
    names: Sequence[str],
    color: str,
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
        _place(1, run)
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
                "color": color,
                "line": {"color": "black", "width": 1},
            },
        }
    ]


def told(event: Mapping[str, Any]) -> str:
    """An event in words: what, at which step, and what else is known of it."""
    rest = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
    about = "".join(f", {name.replace('_', ' ')} {value}" for name, value in rest.items())
    return f"{event['event'].replace('_', ' ')} at step {event['step']:,}{about}"


def _layout(panels: Sequence[Panel], axis: str) -> dict[str, Any]:
    """Panels below each other that are zoomed together, the axis named below the last one."""
    count = max(len(panels), 1)
    inner = _PANEL_HEIGHT * count + _BETWEEN * (count - 1)
    height, gap = _PANEL_HEIGHT / inner, _BETWEEN / inner
    layout: dict[str, Any] = {
        "template": "none",
        "height": _ABOVE + inner + _BELOW,
        "margin": {"l": 70, "r": 20, "t": _ABOVE, "b": _BELOW},
        "hovermode": "closest",
        "showlegend": False,
        "annotations": [],
    }
    for number, panel in enumerate(panels, start=1):
        top = 1 - (number - 1) * (height + gap)
        which = "" if number == 1 else str(number)
        layout[f"xaxis{which}"] = {
            "anchor": f"y{which}",
            "gridcolor": "#e4e4e4",
            "zeroline": False,
            **({"matches": "x"} if which else {}),
            **({"title": {"text": axis}} if number == count else {}),
        }
        layout[f"yaxis{which}"] = {
            "anchor": f"x{which}",
            "domain": [max(top - height, 0.0), top],
            "gridcolor": "#e4e4e4",
            "zeroline": False,
            **(
                {"type": "log", "exponentformat": "power"}
                if panel.logarithmic
                else {"type": "linear", "tickformat": ",.6~g"}
            ),
        }
        layout["annotations"].append(
            {
                "text": f"<b>{panel.title}</b>",
                "x": 0,
                "y": top,
                "yshift": 4,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
    return layout
