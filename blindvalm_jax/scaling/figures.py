"""The figures of a report on families at equal budget."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from blindvalm_jax.family_colors import COLORS
from blindvalm_jax.scaling.analysis import Analysis, Reached, names_of
from blindvalm_jax.scaling.families import Estimate, Multiplier
from blindvalm_jax.scaling.family_fits import UNITS, FamilyFit
from blindvalm_jax.scaling.results import FLOPS, Result, usable
from blindvalm_jax.scaling.wording import budget as said
from blindvalm_jax.scaling.wording import count, label

_OTHERS = ("#000000", "#8C6D1F", "#8F8FD0")
_MARKERS = "osD^vPpX*"
_WIDTH = 8.6  # inches
_GRID: dict[str, Any] = {"color": "0.9", "linewidth": 0.7}
_MOST_BYTES = 120_000
_CAPTIONS = {
    "loss": "Loss of the compute-optimal model of each family against what its training cost: line"
    " and 95 % band of its law; runs as points, those far above the lines cut off.",
    "isoflop": "Loss against size at equal model FLOPs: runs as points, the family's law as lines."
    " Diamonds: the best size by the law; crosses: by a parabola through the runs of a budget."
    " Each family has a scale of its own.",
    "optimal": "Best size, among those between the least and the largest trained, and length for a"
    " budget of model FLOPs, by the laws, with 95 % bands.",
    "multipliers": "Compute multipliers with 95 % intervals: how many times the budget a family"
    " needs for the loss of {}. Below 1 it needs less. Arrows: it goes on beyond.",
    "accuracy": "Accuracy in the task {} against what training cost: lines and 95 % bands of the"
    " compute-optimal models, every run as a point. Dashed: chance.",
}
# Ticks within a power of ten, the fewest first.
_STEPS: tuple[Sequence[float], ...] = (
    *((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)),
    *((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), tuple(x / 10 for x in range(10, 100))),
    tuple(x / 100 for x in range(100, 1000)),
)
_MOST_NAMED = 8  # budgets in a legend
_MULTIPLIERS = (1 / 30, 30.0)  # that are drawn; arrows point to those beyond


def all_of(analysis: Analysis) -> dict[str, tuple[bytes, str]]:
    """Every figure that there is something for: PNG and caption, by name."""
    made: dict[str, tuple[Figure, str]] = {}
    if usable(analysis.results):
        made["loss"] = loss(analysis), _CAPTIONS["loss"]
    if analysis.families:
        for name, draw in (("isoflop", isoflop), ("optimal", optimal)):
            made[name] = draw(analysis), _CAPTIONS[name]
    if any(one.versus for unit in UNITS for one in analysis.at[unit]):
        caption = _CAPTIONS["multipliers"].format(label(analysis.reference or ""))
        made["multipliers"] = multipliers(analysis), caption
    for task in analysis.tasks():
        made[accuracy_name(task)] = accuracy(analysis, task), _CAPTIONS["accuracy"].format(task)
    return {name: (png(figure), caption) for name, (figure, caption) in made.items()}


def accuracy_name(task: str) -> str:
    """The file of a task's figure, without .png."""
    return f"accuracy_{re.sub(r'[^A-Za-z0-9_-]', '_', task)}"


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    for dpi in (110, 90, 70):
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
        if len(stream.getvalue()) < _MOST_BYTES:
            break
    return stream.getvalue()


def loss(analysis: Analysis) -> Figure:
    """Loss of the compute-optimal model against both budgets, side by side."""
    figure, panels = _two()
    shown = [one for of in analysis.tracks.values() for track in of.values() for one in track]
    for panel, unit in zip(panels, UNITS, strict=True):
        _runs(panel, analysis, unit, lambda run: run.loss)
        for name, track in analysis.tracks[unit].items():
            _band(panel, name, track, lambda one: one.loss)
        _budget_axis(panel, unit)
    if shown:
        high = max(one.loss.value for one in shown)
        low = min(run.held_out for run in usable(analysis.results))
        low = min(low, *(one.loss.low for one in shown))
        panels[0].set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    panels[0].set_ylabel("held-out loss (nats a token)")
    _legend(figure, names_of(usable(analysis.results)))
    return figure


def optimal(analysis: Analysis) -> Figure:
    """N* and D* against model FLOPs."""
    figure = Figure((_WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    what: list[tuple[str, Callable[[Reached], Estimate]]] = [
        ("best size N* (parameters)", lambda one: one.n),
        ("best length D* (tokens)", lambda one: one.d),
    ]
    for panel, (title, value) in zip(panels, what, strict=True):
        for name, track in analysis.tracks[FLOPS].items():
            _band(panel, name, track, value)
        panel.set(yscale="log", ylabel=title)
        _budget_axis(panel, FLOPS)
        _log_ticks(panel.yaxis, *panel.get_ylim(), form=count)
    _legend(figure, analysis.families)
    return figure


def multipliers(analysis: Analysis) -> Figure:
    """Compute multipliers against the reference, on both budgets."""
    figure, panels = _two()
    others = [name for name in analysis.families if name != analysis.reference]
    for panel, unit in zip(panels, UNITS, strict=True):
        seen = analysis.seen(unit)
        for place, name in enumerate(others):
            shift = 1.04 ** (place - (len(others) - 1) / 2)
            found = [
                (one.budget * shift, one.versus[name].comparison.multiplier)
                for one in seen
                if name in one.versus
            ]
            for x, times in found:
                _multiplier(panel, x, times, name)
            shown = [(x, t.value) for x, t in found if _drawn(t.value)]
            if shown:
                panel.plot(*np.array(shown).T, color=_color(name), linewidth=0.8, alpha=0.6)
        panel.axhline(1.0, color=_color(analysis.reference or ""), linewidth=1.2, zorder=1)
        panel.set_yscale("log")
        _budget_axis(panel, unit)
    _log_ticks(panels[0].yaxis, *panels[0].get_ylim(), form=lambda value: f"{value:.3g}")
    panels[0].set_ylabel(f"times the budget of {label(analysis.reference or '')}\nfor its loss")
    handles = [Line2D([], [], label=label(k), **_line(k)) for k in others]
    base = label(analysis.reference or "")
    handles.append(Line2D([], [], color=_color(analysis.reference or ""), label=f"{base}: 1"))
    handles.append(Line2D([], [], color="0.4", marker="|", ms=9, ls="", label="95 % interval"))
    _below(figure, handles)
    return figure


def _multiplier(panel: Axes, x: float, times: Multiplier, name: str) -> None:
    low, high = np.clip([times.low, times.high], *_MULTIPLIERS)
    panel.plot([x, x], [low, high], color=_color(name), linewidth=1.6)
    for end, place in ((times.low, low), (times.high, high)):
        if not _drawn(end):
            marker = "v" if end <= _MULTIPLIERS[0] else "^"
            panel.plot(x, place, marker=marker, color=_color(name), markersize=5.0)
    if _drawn(times.value):
        panel.plot(x, times.value, **_point(name, size=6.0))


def _drawn(times: float) -> bool:
    return _MULTIPLIERS[0] < times < _MULTIPLIERS[1]


def accuracy(analysis: Analysis, task: str) -> Figure:
    """Accuracy in a task against both budgets."""
    figure, panels = _two()
    asked = [run for run in usable(analysis.results) if task in run.scores]
    for panel, unit in zip(panels, UNITS, strict=True):
        _runs(panel, analysis, unit, lambda run: _percent(run, task))
        for name, track in analysis.tracks[unit].items():
            if task in track[0].accuracy:
                _band(panel, name, track, lambda one: _scaled(one.accuracy[task]))
        for chance in {run.scores[task].chance for run in asked}:
            panel.axhline(100 * chance, color="0.35", linestyle="--", linewidth=1.0)
        _budget_axis(panel, unit)
    panels[0].set_ylabel(f"{task}: accuracy (%)")
    _legend(figure, names_of(asked), chance=True)
    return figure


def isoflop(analysis: Analysis) -> Figure:
    """Loss against size for each budget, a panel for each family."""
    names = list(analysis.families)
    columns = len(names) if len(names) < 4 else 2 if len(names) == 4 else 3
    rows = math.ceil(len(names) / columns)
    figure = Figure((_WIDTH, 0.8 + 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    budgets = sorted({run.budget for fit in analysis.families.values() for run in fit.runs})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(budgets), 2)))
    colors = dict(zip(budgets, shades, strict=False))
    for panel, name in itertools.zip_longest(panels.ravel(), names):
        if name is None:
            panel.set_visible(False)
            continue
        _isoflop(panel, analysis.families[name], colors)
        panel.set_title(label(name), fontsize=11)
    sizes = [run.n for fit in analysis.families.values() for run in fit.runs]
    for panel in panels[:, 0]:
        panel.set_ylabel("held-out loss (nats a token)")
    for place, _ in enumerate(names):
        panel = panels.ravel()[place]
        panel.set(xscale="log")
        _log_ticks(panel.xaxis, min(sizes), max(sizes), form=count)
        if place + columns >= len(names):
            panel.set_xlabel("size N (parameters)")
            panel.tick_params(labelbottom=True)
    handles = [
        Line2D([], [], color=color, marker="o", ms=4, label=f"{said(budget, FLOPS)} FLOPs")
        for budget, color in list(colors.items())[:: math.ceil(len(colors) / _MOST_NAMED)]
    ]
    handles += [
        Line2D([], [], ls="", marker="D", mfc="white", mec="black", label="best by the law"),
        Line2D([], [], ls="", marker="x", color="black", label="best by a parabola"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _isoflop(panel: Axes, fit: FamilyFit, colors: dict[float, Any]) -> None:
    law, cost = fit.draws.fit, fit.costs[FLOPS].cost
    for budget, color in colors.items():
        runs = [run for run in fit.runs if run.budget == budget]
        if not runs:
            continue
        sizes = [run.n for run in runs]
        panel.plot(sizes, [run.held_out for run in runs], "o", ms=4, color=color, zorder=3)
        if len(set(sizes)) < 2:
            continue
        n = np.geomspace(min(sizes), max(sizes), 60)
        losses = np.asarray(law.loss(n, budget / cost(n)))
        panel.plot(n, losses, color=color, linewidth=1.2)
        at = int(np.argmin(losses))
        if 0 < at < len(n) - 1:
            panel.plot(n[at], losses[at], "D", mfc="white", mec=color, ms=5.5, zorder=4)
        for parabola in fit.parabolas.parabolas:
            if abs(math.log(parabola.budget / budget)) < math.log(1.05) and (
                min(sizes) <= parabola.n <= max(sizes)
            ):
                panel.plot(parabola.n, parabola.loss, "x", color=color, ms=6, mew=1.6, zorder=5)
    panel.grid(**_GRID)


def _two() -> tuple[Figure, Any]:
    figure = Figure((_WIDTH, 3.9), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def _runs(
    panel: Axes, analysis: Analysis, unit: str, value: Callable[[Result], float | None]
) -> None:
    for run in usable(analysis.results):
        cost, y = None if unit in analysis.silent else run.cost(unit), value(run)
        if cost is not None and y is not None:
            panel.plot(cost, y, **_point(run.family, size=3.5), alpha=0.55, zorder=2)


def _band(
    panel: Axes, name: str, track: Sequence[Reached], value: Callable[[Reached], Estimate]
) -> None:
    x, found = [one.budget for one in track], [value(one) for one in track]
    low, high = [one.low for one in found], [one.high for one in found]
    panel.fill_between(x, low, high, color=_color(name), alpha=0.2, linewidth=0, zorder=2)
    panel.plot(x, [one.value for one in found], color=_color(name), linewidth=1.6, zorder=3)


def _budget_axis(panel: Axes, unit: str) -> None:
    panel.set_xscale("log")
    panel.set_xlabel(unit)
    form = _power if unit == FLOPS else lambda value: f"{value:,.4g}"
    _log_ticks(panel.xaxis, *panel.get_xlim(), form=form)
    panel.grid(**_GRID)


def _log_ticks(axis: Any, low: float, high: float, *, form: Callable[[float], str]) -> None:
    """At least three, of round numbers: matplotlib's own may be one, or crowd."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in _STEPS:
        found = (float(f"{step}e{power}") for power in powers for step in steps)
        ticks = [value for value in found if low <= value <= high]
        if len(ticks) >= 3:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    step, power = f"{value:.3e}".split("e")
    ten = f"10^{{{int(power)}}}"
    return f"${ten}$" if float(step) == 1 else f"${float(step):g}\\times{ten}$"


def _color(name: str) -> str:
    known = COLORS.get(name)
    return known or _OTHERS[sum(name.encode()) % len(_OTHERS)]


def _point(name: str, *, size: float) -> dict[str, Any]:
    known = list(COLORS)
    place = known.index(name) if name in known else sum(name.encode())
    marker = _MARKERS[place % len(_MARKERS)]
    return {"color": _color(name), "marker": marker, "ms": size, "mew": 0, "ls": ""}


def _percent(run: Result, task: str) -> float | None:
    return 100 * run.scores[task].accuracy if task in run.scores else None


def _scaled(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def _line(name: str) -> dict[str, Any]:
    return _point(name, size=5.0) | {"ls": "-", "lw": 1.6}


def _legend(figure: Figure, names: Iterable[str], *, chance: bool = False) -> None:
    handles: list[Any] = [Line2D([], [], label=label(name), **_line(name)) for name in names]
    handles.append(Patch(color="0.5", alpha=0.3, lw=0, label="95 % interval"))
    if chance:
        handles.append(Line2D([], [], color="0.35", ls="--", lw=1.0, label="chance"))
    _below(figure, handles)


def _below(figure: Figure, handles: Sequence[Any]) -> None:
    columns = math.ceil(len(handles) / math.ceil(len(handles) / 5))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
