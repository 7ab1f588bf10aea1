"""How much attention went to the grounding where each token was predicted, shown in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.decoding.generation import Taken
from blindvalm_jax.decoding.streaming import text_of

# Least share, and a background of the 256 colours of terminals.
_SHADES = ((0.05, 230), (0.1, 229), (0.2, 222), (0.4, 215), (0.6, 208))


class Table:
    """A line for each token: what it says alone, and its share in each layer."""

    def __init__(self, tokenizer: Tokenizer, layers: Sequence[int]) -> None:
        """layers: which blocks the shares are of."""
        self._tokenizer, self._layers = tokenizer, layers

    def head(self) -> str:
        """The first line."""
        return f"{'token':24}" + "".join(f"{f'layer {layer}':>10}" for layer in self._layers)

    def line(self, taken: Taken) -> str:
        """That of a token; the share must be known."""
        ends = taken.token == self._tokenizer.eos_id
        piece = "(end)" if ends else repr(text_of(self._tokenizer, [taken.token]))
        return f"{piece:24}" + "".join(f"{share:10.4f}" for share in _known(taken))


class Shades:
    """A text on backgrounds that are the stronger the larger the share, mean over layers.

    A piece has the mean of the tokens since the piece before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """For one text."""
        self._eos_id = tokenizer.eos_id
        self._held: list[float] = []
        self._last = 0.0

    def add(self, taken: Taken) -> str:
        """What is shown with a token: the text that is certain by now; its share must be known."""
        share, ends = float(_known(taken).mean()), taken.token == self._eos_id
        if not ends:
            self._held.append(share)
            self._last = share
        shown = ""
        if taken.text:
            # Nothing is held where one token's text is released in two pieces.
            shown = shaded(taken.text, float(np.mean(self._held or [self._last])))
            self._held.clear()
        if ends:
            self._held.append(share)
        return shown

    def rest(self, ending: str) -> str:
        """The ending, with the share of the tokens that are no text: its own, or a stop string."""
        return shaded(f"({ending})", float(np.mean(self._held))) if self._held else ""


def legend() -> str:
    """All shades."""
    return "".join(shaded(f" {share:.2f} ", share) for share, _ in _SHADES)


def shaded(text: str, share: float) -> str:
    """The text on the background of a share, 0 to 1."""
    colours = [colour for least, colour in _SHADES if share >= least]
    return f"\x1b[30;48;5;{colours[-1]}m{text}\x1b[0m" if colours and text else text


def _known(taken: Taken) -> np.ndarray:
    if taken.share is None:
        raise ValueError("a token without its share: ask the generator for the probe")
    return taken.share
