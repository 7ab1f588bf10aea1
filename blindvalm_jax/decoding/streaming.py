"""Text as its tokens come: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from blindvalm_jax.data.clip_cleaning import clean_words
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError

Ending = Literal["", "end", "stop", "length"]

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no UTF-8


def text_of(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of a language model's ids, without the end of a text and other ids that are no text."""
    offset, eos = tokenizer.lm_offset, tokenizer.eos_id
    return tokenizer.decode([index - offset for index in ids if index >= offset and index != eos])


def sought(tokenizer: Tokenizer, stop: Sequence[str]) -> list[str]:
    """Stop strings in the form in which they are sought.

    CLIP's tokenizer reads cleaned text in lower case, and writes blanks between pieces and no line
    breaks: with it neither case nor white space counts, and both a string and what its cleaning
    makes of it are sought.

    Raises:
      UserError: a string is empty, or nothing of it is left.
    """
    if "" in stop:
        raise UserError("a stop string is empty: every text would end before its first token")
    if tokenizer.kind != "clip":
        return list(stop)
    found: dict[str, None] = {}
    for one in stop:
        form = _comparable(one)[0]
        if not form:
            raise UserError(
                f"the stop string {one!r} is white space alone, which CLIP's tokenizer does not "
                "write: give one with other characters"
            )
        cleaned = _comparable("".join(clean_words(one)))[0]
        found |= dict.fromkeys([form, cleaned or form])
    return list(found)


def _comparable(text: str) -> tuple[str, list[int]]:
    """Lower case without white space, and where in the text each of its characters stands."""
    letters = [("" if letter.isspace() else letter.lower()) for letter in text]
    places = [at for at, letter in enumerate(letters) for _ in letter]
    return "".join(letters), places


class Continuation:
    """What a model adds to a prompt, token by token.

    text: so far, without what a stop string cut off; a character whose bytes are not all there is
    held back until the text ends. tokens: ids so far, the end-of-text token among them. ending: why
    no more are taken, "" as long as they are: "end" of text, "stop" string or "length".
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: np.ndarray, *, stop: Sequence[str], most: int
    ) -> None:
        """prompt: its ids; most: tokens that are taken.

        Raises:
          UserError: see `sought`.
        """
        self._tokenizer, self._stop, self._most = tokenizer, sought(tokenizer, stop), most
        # Decoded together: what a tokenizer puts between words is known from both sides.
        self._front = prompt.tolist()
        self._begin = len(text_of(tokenizer, self._front))
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
        safe = len(self.text) if self.ending else self._certain()
        new = self.text[self._released : safe]
        self._released = max(self._released, safe)
        return new

    def _finish(self, ending: Ending) -> None:
        self.text, self.ending = self._decoded(), ending
        found = self._first_stop()  # in characters that were held back
        if found is not None:
            self.text, self.ending = self.text[:found], "stop"

    def _decoded(self) -> str:
        return text_of(self._tokenizer, [*self._front, *self.tokens])[self._begin :]

    def _first_stop(self) -> int | None:
        """Where the stop string begins that ends first; of two the longer one."""
        text, places = self._form()
        found = [(text.find(stop), stop) for stop in self._stop]
        ends = [(at + len(stop), at) for at, stop in found if at >= 0]
        return places[min(ends)[1]] if ends else None

    def _certain(self) -> int:
        """Where in the text its longest end begins with which a stop string begins."""
        text, places = self._form()
        size = max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        return places[len(text) - size] if size else len(self.text)

    def _form(self) -> tuple[str, Sequence[int]]:
        """The text as stop strings are sought in it, and the places of its characters."""
        if self._stop and self._tokenizer.kind == "clip":
            return _comparable(self.text)
        return self.text, range(len(self.text))
