"""The figures of the toy-world report, and the pictures of its world."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from blindvalm_jax.errors import UserError
from blindvalm_jax.family_colors import COLORS
from blindvalm_jax.markdown import table
from blindvalm_jax.toyworld import render
from blindvalm_jax.toyworld.findings import LABELS, WORDS, Conditions, half_width, mean, swept
from blindvalm_jax.toyworld.world import ATTRIBUTES, Object, WorldConfig, objects

_COLOR_OF = {**COLORS, "blind_valm": COLORS["blind"], "blind_valm_eos": COLORS["eos"]}
_RIGHT, _WRONG, _INK = "#0072B2", "#D55E00", "0.15"
_WIDTH = 8.6  # inches
_GRID: dict[str, Any] = {"color": "0.88", "linewidth": 0.7}
_CHANCE: dict[str, Any] = {"color": "0.35", "linestyle": "--", "linewidth": 1.0}
_ALONE: dict[str, Any] = {"color": "0.35", "linestyle": ":", "linewidth": 1.2}


class Gallery:
    """The objects of a world, and its training images."""

    def __init__(self, config: WorldConfig) -> None:
        """Draws the objects; pictures are drawn when asked for."""
        self.config, self.things = config, objects(config)

    def pictures(self, index: int) -> np.ndarray:
        """uint8[images_per_object, image_size, image_size, 3] of the object of an index."""
        count = self.config.images_per_object
        return render.pictures(self.config, "train", index, self.things[index], count=count)

    def find(self, image: str) -> tuple[int, int]:
        """Indices of the object and of its picture, of an image id such as train:123.

        Raises:
          UserError: there is no such image.
        """
        split, _, number = image.partition(":")
        count = self.config.images_per_object
        if split != "train" or not number.isdecimal() or int(number) >= count * len(self.things):
            raise UserError(
                f"neighbours: image {image!r} is none of this world; expected train:0 to "
                f"train:{count * len(self.things) - 1}"
            )
        return divmod(int(number), count)

    def shown(self, rows: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
        """Number of pictures of all rows of neighbours; shares like the row's object, by how."""
        pairs = [(row, self.things[self.find(image)[0]]) for row in rows for image in row["images"]]
        same = {"object": [thing.name == row["object"] for row, thing in pairs]}
        same |= {"look": [alike(thing, row) for row, thing in pairs]}
        same |= {a: [thing.value(a) == row[a] for row, thing in pairs] for a in ATTRIBUTES}
        return len(pairs), {what: float(np.mean(found)) for what, found in same.items()}


def alike(thing: Object, row: Mapping[str, Any]) -> bool:
    """Whether an object looks like the one of a row of neighbours: all attributes agree."""
    return thing.look == tuple(row[attribute] for attribute in ATTRIBUTES)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; the same figure gives the same bytes."""
    figure.savefig(path, dpi=100, metadata={"Software": None})


def sample(gallery: Gallery, indices: Sequence[int]) -> Figure:
    """Some objects in columns, four pictures of each."""
    rows = min(4, gallery.config.images_per_object)
    figure = Figure((_WIDTH, 0.7 + 1.05 * rows), layout="constrained")
    grid = figure.subplots(rows, len(indices), squeeze=False)
    for column, index in enumerate(indices):
        thing, pictures = gallery.things[index], gallery.pictures(index)
        title = f"{thing.name}\n{thing.size} {thing.color}\n{thing.shape}"
        grid[0, column].set_title(title, fontsize=10)
        split = "train" if thing.split == "train" else "held-out"
        grid[-1, column].set_xlabel(split, fontsize=9)
        for row in range(rows):
            _picture(grid[row, column], pictures[row])
    return figure


def accuracy(results: Mapping[str, Any]) -> Figure:
    """Held-out accuracy: one panel per attribute, two wordings beside each other per variant."""
    variants = results["variants"]
    figure = Figure((_WIDTH, 7.2), layout="constrained")
    panels = figure.subplots(len(ATTRIBUTES), 1, sharex=True)
    for panel, attribute in zip(panels, ATTRIBUTES, strict=True):
        for place, (name, variant) in enumerate(variants.items()):
            for offset, wording, alpha in ((-0.2, "seen", 1.0), (0.2, "new", 0.45)):
                values = variant["objects"]["heldout"][wording][attribute]
                x, color = place + offset, _COLOR_OF[name]
                panel.bar(x, np.mean(values), 0.38, color=color, alpha=alpha, zorder=2)
                _spread(panel, x, values, color=_INK, vertical=True, beside=0.09)
        panel.axhline(results["chance"][attribute], zorder=3, **_CHANCE)
        panel.set(ylim=(0, 1.04), ylabel="share right", title=WORDS[attribute])
        panel.grid(axis="y", zorder=0, **_GRID)
    margin = 0.6 + max(0, 4 - len(variants)) / 2  # few bars are not broader ones
    panels[-1].set_xlim(-margin, len(variants) - 1 + margin)
    titles = [LABELS[name].replace(" ", "\n").replace("D-V", "D-\nV") for name in variants]
    panels[-1].set_xticks(range(len(variants)), titles, fontsize=9)
    seen_and_new = (("wordings seen in sentences", 1.0), ("new wordings", 0.45))
    handles = [Patch(color="0.3", alpha=alpha, label=label) for label, alpha in seen_and_new]
    _legend(figure, handles, chance=True, seeds=len(results["seeds"]))
    return figure


def conditions(results: Mapping[str, Any], rows: Conditions) -> Figure:
    """Accuracy by condition: one panel per attribute, variants beside each other in a row."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    height = 1.2 + len(rows) * (0.25 + 0.13 * len(names))
    figure = Figure((_WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(ATTRIBUTES), sharey=True)
    step = 0.8 / len(names)
    for panel, attribute in zip(panels, ATTRIBUTES, strict=True):
        for place, row in enumerate(rows.values()):
            for name, of_attribute in row.items():
                values = of_attribute[attribute]
                at = place + step * (names.index(name) - (len(names) - 1) / 2)
                _spread(panel, at, values, color=_COLOR_OF[name], vertical=False, beside=step / 2)
        for edge in range(1, len(rows)):
            panel.axhline(edge - 0.5, **_GRID)
        panel.axvline(results["chance"][attribute], zorder=1, **_CHANCE)
        panel.set(xlim=(-0.04, 1.04), xlabel="share of answers", title=WORDS[attribute])
        panel.grid(axis="x", **_GRID)
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(figure, _names(names, marker="o", ls=""), chance=True, seeds=len(results["seeds"]))
    return figure


def losses(results: Mapping[str, Any]) -> Figure:
    """Training loss of one variant, and how far the others are from it, seed by seed.

    Both are means over seeds of a tenth of a run.
    """
    figure = Figure((_WIDTH, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    variants = results["variants"]
    base = next(iter(variants))
    smooth = {k: _smoothed(v["curves"]) for k, v in variants.items()}
    steps, values = smooth[base]
    panels[0].plot(steps, values.T, color=_COLOR_OF[base], linewidth=0.6, alpha=0.5)
    panels[0].plot(steps, values.mean(axis=0), color=_COLOR_OF[base], linewidth=1.8)
    panels[0].set(title=LABELS[base], ylabel="training loss (nats per token)")
    for name, (at, found) in smooth.items():
        shared = min(found.shape[1], values.shape[1])
        apart = (found[:, :shared] - values[:, :shared]).mean(axis=0)
        panels[1].plot(at[:shared], apart, color=_COLOR_OF[name], linewidth=1.4)
    panels[1].set(title=f"less that of {LABELS[base]}", ylabel="difference (nats per token)")
    for panel in panels:
        panel.set(xlabel="updates")
        panel.grid(**_GRID)
    _legend(figure, _names(variants), chance=False, seeds=None)
    return figure


def _smoothed(curves: Sequence[Mapping[str, Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Updates [n], and running means [seeds, n] of the loss over a tenth of the shortest run."""
    count = min(len(curve["step"]) for curve in curves)
    width = max(1, count // 10)
    kernel = np.full(width, 1 / width)
    steps = np.convolve(np.asarray(curves[0]["step"][:count], float), kernel, "valid")
    return steps, np.array([np.convolve(c["loss"][:count], kernel, "valid") for c in curves])


def bars(
    values: Mapping[str, Sequence[float]],
    label: str,
    *,
    marks: Mapping[str, float],
    marked: str,
    intervals: bool = True,
    line: float | None = None,
) -> Figure:
    """A bar per variant with every seed, and a mark beside it.

    intervals: bars are means over seeds, with theirs; else medians. line: a value to compare with.
    """
    figure = Figure((_WIDTH * 0.8, 1.3 + 0.36 * len(values)), layout="constrained")
    panel = figure.subplots()
    for place, (name, numbers) in enumerate(values.items()):
        middle = np.mean(numbers) if intervals else np.median(numbers)
        panel.barh(place, middle, 0.7, color=_COLOR_OF[name], alpha=0.85, zorder=2)
        _spread(panel, place, numbers, color=_INK, vertical=False, beside=0.18, interval=intervals)
    panel.set_yticks(range(len(values)), [LABELS[name] for name in values])
    panel.invert_yaxis()
    panel.grid(axis="x", zorder=0, **_GRID)
    panel.set_xlabel(label)
    style: dict[str, Any] = {"marker": "D", "color": "white", "markeredgecolor": "black"}
    panel.plot([marks[name] for name in values], range(len(values)), ls="", zorder=5, **style)
    if line is not None:
        panel.axvline(line, color="0.35", linewidth=1.0)
    handles = [Line2D([], [], ls="", label=marked, **style)]
    seeds = len(next(iter(values.values())))
    _legend(figure, handles, chance=False, seeds=seeds, intervals=intervals)
    return figure


def neighbours(gallery: Gallery, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Prompts, and the pictures that were found for them, each with what it shows."""
    width = max(len(row["images"]) for row in rows)
    figure = Figure((_WIDTH, 1.55 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), width + 1, squeeze=False, width_ratios=[1.9, *[1] * width])
    for axes, row in zip(grid, rows, strict=True):
        for panel in axes:
            panel.set_axis_off()
        prompt = textwrap.fill(f"“{row['prompt']} …”", 34)
        text = f"{prompt}\n\n{row['object']}: {row['size']} {row['color']} {row['shape']}"
        axes[0].text(0, 0.5, text, va="center", fontsize=9)
        for panel, image in zip(axes[1:], row["images"], strict=False):
            index, number = gallery.find(image)
            thing = gallery.things[index]
            right = alike(thing, row)
            panel.set_axis_on()
            _picture(panel, gallery.pictures(index)[number])
            color = _RIGHT if right else _WRONG
            panel.set_title(f"{'✓' if right else '✗'} {thing.name}", fontsize=9, color=color)
            panel.set_xlabel(f"{thing.size} {thing.color}\n{thing.shape}", fontsize=8)
            for spine in panel.spines.values():
                spine.set(edgecolor=color, linewidth=2)
    return figure


def bias(results: Mapping[str, Any], alone: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy against the share of held-out sentences that state an attribute.

    alone: by attribute, the accuracy at each share of who remembers the text and guesses the rest.
    """
    found = results["bias"]
    shares = found["stated_heldout"]
    names = swept(results)
    figure = Figure((_WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(ATTRIBUTES), sharey=True)
    places = np.arange(len(shares))  # equal distances: the shares of interest are close to none
    for panel, attribute in zip(panels, ATTRIBUTES, strict=True):
        for name in names:
            means = [np.mean(values) for values in found[name][attribute]]
            panel.plot(places, means, "-", color=_COLOR_OF[name], linewidth=1.4)
            for place, values in zip(places, found[name][attribute], strict=True):
                _spread(
                    panel, float(place), values, color=_COLOR_OF[name], vertical=True, beside=0.12
                )
        panel.plot(places, alone[attribute], **_ALONE)
        panel.axhline(results["chance"][attribute], **_CHANCE)
        panel.set_xticks(places, [f"{100 * share:g}" for share in shares])
        panel.set(title=WORDS[attribute], ylim=(0, 1.04))
        panel.grid(**_GRID)
    panels[0].set_ylabel("share right")
    panels[1].set_xlabel(
        "sentences about a held-out object that state an attribute (%), not to scale"
    )
    style: dict[str, Any] = {"marker": "o", "ls": ""}
    handles = [Line2D([], [], color=_COLOR_OF[k], label=names[k], **style) for k in names]
    handles.append(Line2D([], [], label="text alone", **_ALONE))
    _legend(figure, handles, chance=True, seeds=len(results["seeds"]))
    return figure


@dataclasses.dataclass(frozen=True)
class Page:
    """What a section of the page is made from, and the lines that show a figure."""

    results: Mapping[str, Any]
    out: Path
    gallery: Gallery

    @property
    def variants(self) -> Mapping[str, Any]:
        """Results by variant."""
        return cast(Mapping[str, Any], self.results["variants"])

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.results["seeds"])

    def title(self, attribute: str) -> str:
        """The head of a column of accuracies."""
        return f"{WORDS[attribute]} (chance {self.results['chance'][attribute]:.3f})"

    def figure(self, name: str, figure: Figure, caption: str) -> list[str]:
        """Draws a figure; the lines that show it."""
        save(figure, self.out / "figures" / f"{name}.png")
        return ["", f"![{caption}](figures/{name}.png)", "", f"*{caption}*", ""]

    def conditions(self, name: str, rows: Conditions, caption: str) -> list[str]:
        """A figure, and a table per attribute: conditions in rows, variants in columns."""
        lines = self.figure(name, conditions(self.results, rows), caption)
        names = list(next(iter(rows.values())))
        for a in ATTRIBUTES:
            head = [self.title(a), *(LABELS[k] for k in names)]
            body = [[title, *(mean(row[k][a]) for k in names)] for title, row in rows.items()]
            lines += table(head, body)
        return lines


def _spread(
    panel: Axes,
    place: float,
    values: Sequence[float],
    *,
    color: str,
    vertical: bool,
    beside: float,
    interval: bool = True,
) -> None:
    """The mean's interval, and `beside` it every seed as a dot; the mean too if in color."""
    half, mean = half_width(values) if interval else None, float(np.mean(values))
    dots = [(place + beside, value) for value in values]
    ends = [(place, mean - half), (place, mean + half)] if half is not None else []
    for points, style in (
        (dots, {"ls": "", "marker": "o", "ms": 2.6, "mew": 0, "alpha": 0.65}),
        (ends, {"linewidth": 1.4}),
        ([(place, mean)] if color != _INK else [], {"marker": "o", "ms": 5.5}),
    ):
        x, y = (
            zip(*(points if vertical else [p[::-1] for p in points]), strict=True)
            if points
            else ((), ())
        )
        panel.plot(x, y, color=color, zorder=4, **style)


def _picture(panel: Axes, image: np.ndarray) -> None:
    panel.imshow(image, interpolation="nearest")
    panel.set(xticks=[], yticks=[])


def _names(names: Iterable[str], **style: Any) -> list[Any]:
    return [Line2D([], [], color=_COLOR_OF[k], label=LABELS[k], **style) for k in names]


def _legend(
    figure: Figure,
    handles: list[Any],
    *,
    chance: bool,
    seeds: int | None,
    intervals: bool = True,
) -> None:
    """A legend under the panels; `seeds` None: no dots and intervals to explain."""
    handles = [*handles, *([Line2D([], [], label="chance", **_CHANCE)] if chance else [])]
    if seeds is not None:
        handles.append(Line2D([], [], marker=".", ls="", color="0.3", label="one seed"))
    if intervals and seeds is not None and seeds > 1:
        handles.append(Line2D([], [], color="black", label="95 % interval"))
    long = any(len(handle.get_label()) > 16 for handle in handles)
    columns = min(4 if long else 5, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
