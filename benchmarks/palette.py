"""The colours of the systems in the figures of all benchmarks.

Okabe and Ito's, which the colour-blind can tell apart; the toy world's figures have the same.
"""

from __future__ import annotations

from collections.abc import Iterable

COLORS = {
    "gpt2": "#666666",
    "blind": "#E69F00",
    "eos": "#D55E00",
    "valm": "#56B4E9",
    "prepared": "#0072B2",
    "faiss": "#009E73",
}
_OTHERS = ("#CC79A7", "#7A2F5B", "#00503A", "#A6761D")


def colors(names: Iterable[str]) -> dict[str, str]:
    """Colours by name; what is none of the known systems gets one that none of them has."""
    names = list(names)
    others = [name for name in names if name not in COLORS]
    free = {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(others)}
    return {name: COLORS[name] if name in COLORS else free[name] for name in names}
