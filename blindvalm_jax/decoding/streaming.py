"""Text as its tokens come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from blindvalm_jax.data.tokenizers import Tokenizer

Ending = Literal["", "end", "stop", "length"]

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no UTF-8


class Continuation:
    """What a model adds to a prompt, token by token.

    text: so far, without what a stop string cut off; a character whose bytes are not all there is
    held back until the text ends. tokens: ids so far, the end-of-text token among them. ending: why
    no more are taken, "" as long as they are: "end" of text, "stop" string or "length".
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: np.ndarray, *, stop: Sequence[str], most: int
    ) -> None:
        """prompt: its ids; most: tokens that are taken."""
        self._tokenizer, self._stop, self._most = tokenizer, tuple(stop), most
        # Decoded together: what a tokenizer puts between words is known from both sides.
        self._front = [index - tokenizer.lm_offset for index in prompt.tolist()]
        self._begin = len(tokenizer.decode(self._front)) if self._front else 0
        self._released = 0
        self.tokens: list[int] = []
        self.text = ""
        self.ending: Ending = ""

    def add(self, token: int) -> None:
        """Takes a token, unless the text has ended."""
        if self.ending:
            return
        self.tokens.append(token)
        if token == self._tokenizer.eos_id:
            self._finish("end")
            return
        self.text = self._decoded().rstrip(_INCOMPLETE)
        found = self._first_stop()
        if found is not None:
            self.text, self.ending = self.text[:found], "stop"
        elif len(self.tokens) == self._most:
            self._finish("length")

    def release(self) -> str:
        """The text since the last call that no later token can take back."""
        safe = len(self.text) if self.ending else len(self.text) - self._beginning_of_stop()
        new = self.text[self._released : safe]
        self._released = max(self._released, safe)
        return new

    def _finish(self, ending: Ending) -> None:
        self.text, self.ending = self._decoded(), ending
        found = self._first_stop()  # in characters that were held back
        if found is not None:
            self.text, self.ending = self.text[:found], "stop"

    def _decoded(self) -> str:
        eos, offset = self._tokenizer.eos_id, self._tokenizer.lm_offset
        own = [index - offset for index in self.tokens if index != eos]
        return self._tokenizer.decode([*self._front, *own])[self._begin :]

    def _first_stop(self) -> int | None:
        """Where the stop string begins that ends first; of two the longer one."""
        places = [(self.text.find(stop), stop) for stop in self._stop]
        ends = [(at + len(stop), at) for at, stop in places if at >= 0]
        return min(ends)[1] if ends else None

    def _beginning_of_stop(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
