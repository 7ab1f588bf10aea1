"""The table and the figure of an explanation."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blindvalm_jax import files
from blindvalm_jax.explain.probing import Reading
from blindvalm_jax.explain.words import Nearest
from blindvalm_jax.markdown import table

_GROUNDED, _UNGROUNDED, _INK = "#D55E00", "#666666", "0.15"  # Okabe and Ito's
_WIDTH = 8.6  # inches


def write(
    reading: Reading, near: Sequence[Nearest], *, other: str, at: int, out: Path
) -> list[str]:
    """Writes explain.json, explain.md and explain.png; gives the lines of the page.

    near: for each of the K grounding vectors of the token at place `at`; other: what the vectors
    are of that theirs are compared with, "another text" or "another image".
    """
    names = {"random direction": "directions", f"vector of {other}": "others"}
    lines = [
        *_scores(reading),
        *_attention(reading),
        *(
            line
            for number, one in enumerate(near)
            for line in _words(reading, at, number, one, names)
        ),
    ]
    out.mkdir(parents=True, exist_ok=True)
    page = ["![explanation](explain.png)", "", *lines]
    files.write_bytes(out / "explain.md", ("\n".join(page) + "\n").encode())
    text = json.dumps(_numbers(reading, near, at=at), ensure_ascii=False, indent=1)
    files.write_bytes(out / "explain.json", text.encode())
    with warnings.catch_warnings():
        # The figure shows a box for what its font lacks, such as emoji; the page has them.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        _figure(reading, near, names, at=at).savefig(out / "explain.png", dpi=150)
    return lines


def _scores(reading: Reading) -> list[str]:
    order = np.argsort(-reading.grounded, kind="stable")
    rows = [
        [
            _escaped(reading.candidates[place]),
            f"{reading.grounded[place]:.3f}",
            f"{reading.ungrounded[place]:.3f}",
            f"{reading.grounded[place] - reading.ungrounded[place]:+.3f}",
        ]
        for place in order
    ]
    head = ["candidate", "with grounding", "without", "difference"]
    return ["Log probability of each candidate behind the prompt (nats):", "", *table(head, rows)]


def _attention(reading: Reading) -> list[str]:
    mean_TL = reading.attention.mean(axis=2).T
    names = [f"layer {layer}" for layer in reading.layers]
    rows = [
        [_escaped(_named(token)), *(f"{100 * share:.1f} %" for share in shares)]
        for token, shares in zip(reading.tokens, mean_TL, strict=True)
    ]
    heads = [
        [name, *(f"{100 * share:.1f} %" for share in shares)]
        for name, shares in zip(names, reading.attention[:, -1], strict=True)
    ]
    return [
        "Attention to the grounding vectors, mean over heads; the rest goes to the text:",
        "",
        *table(["token", *names], rows),
        "The same of each head, at the last token:",
        "",
        *table(["", *(f"head {n}" for n in range(reading.attention.shape[2]))], heads),
    ]


def _words(
    reading: Reading, at: int, number: int, near: Nearest, names: Mapping[str, str]
) -> list[str]:
    """names: of the nulls, as they are called and as `Nearest` has them."""
    rows = [
        [
            _escaped(word),
            f"{cosine:.3f}",
            *(
                f"{null[0][rank]:.3f} ({null[1][rank]:.3f})"
                for null in (getattr(near, field) for field in names.values())
            ),
        ]
        for rank, (word, cosine) in enumerate(zip(near.words, near.cosines, strict=True))
    ]
    which = f" {number + 1}" if reading.vectors.shape[1] > 1 else ""
    return [
        f"Words nearest to grounding vector{which} of {_escaped(_named(reading.tokens[at]))}, and "
        "how near the word of that rank is by chance, mean (97.5 % quantile):",
        "",
        *table(["word", "cosine", *names], rows),
    ]


def _figure(
    reading: Reading, near: Sequence[Nearest], names: Mapping[str, str], *, at: int
) -> Figure:
    layers = len(reading.layers)
    heights = [
        0.32 * len(reading.candidates) + 0.6,
        *[1.6] * layers,
        0.3 * len(near[0].words) + 0.6,
    ]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights)
    _score_panel(panels[0], reading)
    for panel, layer, share_TN in zip(panels[1:-1], reading.layers, reading.attention, strict=True):
        _attention_panel(panel, layer, share_TN, reading.tokens)
    _word_panel(panels[-1], near, names, reading.tokens[at])
    return figure


def _score_panel(panel: Axes, reading: Reading) -> None:
    order = np.argsort(reading.grounded, kind="stable")
    places = np.arange(len(order))
    for values, color, label in (
        (reading.ungrounded, _UNGROUNDED, "without grounding"),
        (reading.grounded, _GROUNDED, "with grounding"),
    ):
        panel.plot(values[order], places, "o", color=color, label=label)
    panel.hlines(places, reading.ungrounded[order], reading.grounded[order], color="0.8", zorder=0)
    names = [reading.candidates[place] for place in order]
    panel.set_yticks(places, names, parse_math=False)
    panel.set_xlabel("log probability (nats)", color=_INK)
    panel.set_title("Candidates", loc="left", fontsize="medium")
    panel.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    panel.spines[["top", "right"]].set_visible(False)


def _attention_panel(panel: Axes, layer: int, share_TN: np.ndarray, tokens: Sequence[str]) -> None:
    picture = panel.imshow(share_TN.T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    names = [_named(token) for token in tokens]
    panel.set_xticks(range(len(tokens)), names, rotation=45, ha="right", parse_math=False)
    panel.set_ylabel(f"head, layer {layer}", color=_INK)
    panel.set_title("Attention to the grounding", loc="left", fontsize="medium")
    panel.figure.colorbar(picture, ax=panel, fraction=0.03)


def _word_panel(panel: Axes, near: Sequence[Nearest], names: Mapping[str, str], token: str) -> None:
    places = np.arange(len(near[0].words))[::-1]
    for number, one in enumerate(near):
        label = f"vector {number + 1}" if len(near) > 1 else "grounding vector"
        panel.plot(one.cosines, places, "o", label=label)
    for (name, field), style in zip(names.items(), (":", "--"), strict=True):
        null = getattr(near[0], field)
        panel.plot(null[1], places, style, color="0.35", label=f"{name},\n97.5 %")
    labels = [", ".join(words) for words in zip(*(one.words for one in near), strict=True)]
    panel.set_yticks(places, labels, parse_math=False)
    panel.set_xlabel("cosine", color=_INK)
    panel.set_title(
        f"Words nearest to the grounding of {_named(token)}",
        loc="left",
        fontsize="medium",
        parse_math=False,
    )
    panel.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    panel.spines[["top", "right"]].set_visible(False)


def _named(token: str) -> str:
    """A token as it can be seen."""
    return " ".join(token.split()) or repr(token)


def _escaped(text: str) -> str:
    """Text that Markdown leaves alone, in a table too."""
    return re.sub(r"([\\`*_<$|])", r"\\\1", text)


def _numbers(reading: Reading, near: Sequence[Nearest], *, at: int) -> dict[str, Any]:
    return {
        "tokens": reading.tokens,
        "candidates": {
            candidate: {"grounded": float(one), "ungrounded": float(other)}
            for candidate, one, other in zip(
                reading.candidates, reading.grounded, reading.ungrounded, strict=True
            )
        },
        "layers": reading.layers,
        "attention": reading.attention.tolist(),  # [layers, tokens, heads]
        "at": at,
        "nearest": [
            {
                "words": one.words,
                "cosines": one.cosines.tolist(),
                "random_directions": {
                    "mean": one.directions[0].tolist(),
                    "q97.5": one.directions[1].tolist(),
                },
                "other_grounding": {
                    "mean": one.others[0].tolist(),
                    "q97.5": one.others[1].tolist(),
                },
            }
            for one in near
        ],
    }
