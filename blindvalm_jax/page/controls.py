"""What chooses on a page: the axis of all panels, the runs that are drawn, the order of tables."""

from __future__ import annotations

import html
from collections.abc import Sequence

from blindvalm_jax.page import curves
from blindvalm_jax.page.records import Run

STYLE = """
#controls { position: sticky; top: 0; z-index: 2; background: #fff; border-bottom: 1px solid #ddd;
            padding: 0.5em 0; }
#controls p { margin: 0 0 0.4em; }
#controls .apart { margin-left: 1.5em; }
#runs { display: grid; gap: 0.1em 1em; max-height: 24vh; overflow-y: auto; font-size: 0.82em; }
#runs label { overflow-wrap: anywhere; }
button { font: inherit; font-size: 0.9em; padding: 0.15em 0.7em; border: 1px solid #bbb;
         border-radius: 3px; background: #fff; cursor: pointer; }
button[aria-pressed=true] { background: #dcebf7; border-color: #0072B2; }
th { cursor: pointer; }
"""

# `figure`, `columns`, `choices` and `owners` are those of `drawing.page`.
SCRIPT = """
const plot = document.getElementById("curves");
const over = (axis) => choices[axis].map((column) => columns[column]);
over(0).forEach((x, trace) => { figure.data[trace].x = x; });
Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false});
const xAxes = Object.keys(figure.layout).filter((name) => name.startsWith("xaxis"));
const ofAll = (names, key, value) => Object.fromEntries(names.map((n) => [`${n}.${key}`, value]));

const buttons = document.querySelectorAll("[data-axis]");
buttons.forEach((button) => button.addEventListener("click", () => {
  buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
  const layout = ofAll(xAxes, "autorange", true);
  layout[`${xAxes[xAxes.length - 1]}.title.text`] = button.textContent;
  Plotly.update(plot, {x: over(button.dataset.axis)}, layout);
}));
document.querySelectorAll("[data-log]").forEach((box) => box.addEventListener("change", () => {
  const names = box.dataset.log === "x" ? xAxes : [box.dataset.log];
  const type = box.checked ? "log" : "linear";
  Plotly.relayout(plot, {...ofAll(names, "type", type), ...ofAll(names, "autorange", true)});
}));

const boxes = [...document.querySelectorAll("[data-run]")];
const show = () => Plotly.restyle(plot, {visible: owners.map((run) => boxes[run].checked)});
boxes.forEach((box) => box.addEventListener("change", show));
document.querySelectorAll("[data-every]").forEach((button) =>
  button.addEventListener("click", () => {
    boxes.forEach((box) => { box.checked = button.dataset.every === "shown"; });
    show();
  }));

const value = (row, column) => {
  const text = row.cells[column].textContent.replaceAll(",", "");
  const time = text.match(/^(\\d+):(\\d\\d):(\\d\\d)$/);
  if (time) return time[1] * 3600 + time[2] * 60 + Number(time[3]);
  return /^-?[\\d.]+(e[-+]?\\d+)?(%| .*)?$/i.test(text) ? parseFloat(text) : text;
};
document.querySelectorAll("table").forEach((table) => {
  const head = [...table.rows[0].cells];
  head.forEach((cell, column) => cell.addEventListener("click", () => {
    const sign = cell.dataset.sorted === "up" ? -1 : 1;
    head.forEach((other) => { delete other.dataset.sorted; });
    cell.dataset.sorted = sign > 0 ? "up" : "down";
    const rows = [...table.rows].slice(1).map((row) => [value(row, column), row]);
    const numbers = rows.filter(([found]) => typeof found === "number");
    const others = rows.filter(([found]) => typeof found !== "number");
    numbers.sort((a, b) => sign * (a[0] - b[0]));
    others.sort((a, b) => sign * String(a[0]).localeCompare(b[0], undefined, {numeric: true}));
    table.tBodies[0].append(...[...numbers, ...others].map(([, row]) => row));
  }));
});
"""

_LOGARITHMIC = (
    '<label class="apart"><input type="checkbox" data-log="x" autocomplete="off">'
    "logarithmic axis</label>",
    '<label><input type="checkbox" data-log="yaxis" autocomplete="off">logarithmic loss</label>',
)


def band(runs: Sequence[Run]) -> list[str]:
    """What stays above the panels while one scrolls: buttons, and the runs as a legend."""
    axes = "\n".join(
        f'<button data-axis="{place}" aria-pressed="{str(place == 0).lower()}">{name}</button>'
        for place, name in enumerate(curves.axis_names(runs))
    )
    if len(runs) < 2:
        return ['<div id="controls">', f"<p>{axes}", *_LOGARITHMIC, "</p></div>"]
    entries = [
        f'<label><input type="checkbox" data-run="{index}" autocomplete="off" checked>'
        f"{stroke(index)} {html.escape(run.name)}</label>"
        for index, run in enumerate(runs)
    ]
    width = min(max(len(run.name) for run in runs) * 0.56 + 6, 45)  # of an entry, in em
    return [
        '<div id="controls">',
        f"<p>{axes}",
        *_LOGARITHMIC,
        '<button class="apart" data-every="shown">all runs</button>',
        '<button data-every="hidden">none</button></p>',
        '<div id="runs" style="grid-template-columns: '
        f'repeat(auto-fill, minmax(min({width:.1f}em, 100%), 1fr))">',
        *entries,
        "</div></div>",
    ]


def stroke(index: int) -> str:
    """A piece of the line that a run is drawn with."""
    color, dash = curves.style(index)
    broken = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="stroke" width="26" height="8"><line x2="26" y1="4" y2="4" stroke-width="3" '
        f'stroke="{color}"{broken}></line></svg>'
    )
