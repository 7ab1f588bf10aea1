"""The tables of a page: how far runs are, where their time went, what differs, what happened."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from blindvalm_jax.metrics import duration
from blindvalm_jax.page import controls, curves
from blindvalm_jax.page.records import Run

_MOST_EVENTS = 200  # of all runs; the newest are shown
_LOST = "perf/lost_"
_NOTHING = "–"
_SIDE_BY_SIDE = 6  # of more runs each is a row of settings


def details(runs: Sequence[Run]) -> list[str]:
    """All tables but the first, as lines of HTML."""
    return [*_settings(runs), *_time(runs), *_events(runs)]


def overview(runs: Sequence[Run]) -> list[str]:
    """How far each run is, as lines of HTML."""
    of: list[tuple[str, Callable[[Run], str]]] = [
        ("model", _model),
        ("parameters", _parameters),
        ("updates", lambda run: f"{run.step:,} of {run.settings['train.steps']:,}"),
        ("train loss", lambda run: _number(run.last("train/loss"), ".4f")),
        ("held-out loss", lambda run: _number(run.last("eval/loss"), ".4f")),
        ("a second", lambda run: _speed(run)),
        ("MFU", lambda run: _number(run.last("perf/mfu"), ".1%")),
        ("goodput", lambda run: _number(run.last("perf/goodput"), ".1%")),
        ("of all starts", lambda run: _number(run.last("perf/run_goodput"), ".1%")),
        ("memory", lambda run: _number(run.last("perf/peak_memory_mib"), ",.0f", " MiB")),
        ("starts", lambda run: _told(run, "starts", lambda starts: f"{len(starts):,}")),
        ("skipped", lambda run: _number(run.last("train/skipped_updates"), ",.0f")),
        ("devices", lambda run: _told(run, "devices", lambda both: "{1} x {0}".format(*both))),
        ("commit", lambda run: html.escape((run.record.get("commit") or _NOTHING)[:9])),
    ]
    rows = [[_named(run, runs), *(cell(run) for _, cell in of)] for run in runs]
    return _table(["run", *(name for name, _ in of)], rows)


def _model(run: Run) -> str:
    if run.settings["train.objective"] == "contrastive":
        return "CLIP"
    source, readout = run.settings["grounding.source"], run.settings["grounding.readout"]
    name = {"none": "GPT-2", "text": "BLIND-VALM", "images": "VALM"}[source]
    control = run.settings["grounding.control"]
    name += ", <eos>" if readout == "eos" and source != "none" else ""
    return html.escape(name + (f", {control}" if control != "none" and source != "none" else ""))


def _parameters(run: Run) -> str:
    def count(sizes: Mapping[str, int]) -> str:
        return f"{sum(size for name, size in sizes.items() if name != 'bytes_per_device'):,}"

    return _told(run, "parameters", count)


def _told(run: Run, name: str, form: Callable[[Any], str]) -> str:
    """What a record says of something, if it has it."""
    return html.escape(form(run.record[name])) if name in run.record else _NOTHING


def _speed(run: Run) -> str:
    return _number(run.last(f"perf/{run.unit}_per_second"), ",.0f", f" {run.unit}")


def _time(runs: Sequence[Run]) -> list[str]:
    """Where the time of each run went, as far as its metrics tell."""
    lost = sorted({k for run in runs for line in run.lines for k in line if k.startswith(_LOST)})
    if not lost:
        return []
    rows = [[_named(run, runs), *(_seconds(run.last(name)) for name in lost)] for run in runs]
    head = ["run", *(name.removeprefix(_LOST).removesuffix("_seconds") for name in lost)]
    about = "<p>Since the newest start; what is left went into updates. "
    about += "Under restart: of the whole run, updates done again and time between starts.</p>"
    return ["<h2>Where time went besides updates</h2>", about, *_table(head, rows)]


def _seconds(value: float | None) -> str:
    return _NOTHING if value is None else duration(value)


def _settings(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.settings})
    missing = object()
    differing = [
        name
        for name in names
        if any(
            run.settings.get(name, missing) != runs[0].settings.get(name, missing) for run in runs
        )
    ]
    if not differing:
        return []
    columns = [
        [html.escape(name), *(_setting(run.settings.get(name, _NOTHING)) for run in runs)]
        for name in differing
    ]
    names = ["setting", *(_named(run, runs) for run in runs)]
    if len(runs) > _SIDE_BY_SIDE:
        head, *rows = zip(*[["run", *names[1:]], *columns], strict=True)
    else:
        head, rows = tuple(names), [tuple(column) for column in columns]
    return ["<h2>Settings in which they differ</h2>", *_table(head, rows, numbers=False)]


def _setting(value: Any) -> str:
    return html.escape(f"{value:.12g}" if isinstance(value, float) else str(value))


def _events(runs: Sequence[Run]) -> list[str]:
    found = [(str(event.get("time", "")), run, event) for run in runs for event in run.events]
    found.sort(key=lambda one: one[0])
    if not found:
        return []
    rows = [
        [html.escape(time), _named(run, runs), html.escape(curves.told(event))]
        for time, run, event in found[-_MOST_EVENTS:]
    ]
    note = f"<p>The newest {_MOST_EVENTS} of {len(found):,}.</p>"
    shown = [note] if len(found) > _MOST_EVENTS else []
    return ["<h2>Events</h2>", *shown, *_table(["time", "run", "what"], rows, numbers=False)]


def _named(run: Run, runs: Sequence[Run]) -> str:
    return f"<span>{controls.stroke(list(runs).index(run))}{html.escape(run.name)}</span>"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _NOTHING if value is None else f"{value:{form}}{unit}"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True
) -> list[str]:
    """A table; with numbers, all columns but the first two stand to the right."""

    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = [
            "number" if numbers and place > 1 else "run" if "<svg" in cell else ""
            for place, cell in enumerate(cells)
        ]
        parts = [
            f"<{tag}{kind and f' class={kind}'}>{cell}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = [line(row, "td") for row in rows]
    kind = "scroll many" if len(body) > _SIDE_BY_SIDE else "scroll"
    return [f'<div class="{kind}"><table>', line(head, "th"), *body, "</table></div>"]
