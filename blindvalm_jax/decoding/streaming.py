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


def check(stop: Sequence[str]) -> None:
    """Refuses what are no stop strings.

    Raises:
      UserError: they are no list, or one is empty.
    """
    if isinstance(stop, str):
        raise UserError("stop must be a list of strings, got one string: give [string]")
    if "" in stop:
        raise UserError("a stop string is empty: every text would end before its first token")


def sought(tokenizer: Tokenizer, stop: Sequence[str]) -> list[str]:
    """Stop strings in the form in which they are sought.

    CLIP's tokenizer reads cleaned text in lower case, and writes blanks between pieces and no line
    breaks: with it neither case nor white space counts, and both a string and what its cleaning
    makes of it are sought.

    Raises:
      UserError: see `check`; or nothing is left of a string.
    """
    check(stop)
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

    A token is decoded with those since the last whole character alone, so that long texts cost as
    much a token as short ones.

    tokens: ids so far, the end-of-text token among them. ending: why no more are taken, "" as long
    as they are: "end" of text, "stop" string or "length".
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: np.ndarray, *, stop: Sequence[str], most: int
    ) -> None:
        """prompt: its ids; most: tokens that are taken.

        Raises:
          UserError: see `sought`.
        """
        self._tokenizer, self._stop, self._most = tokenizer, sought(tokenizer, stop), most
        # Decoded together with what follows: what a tokenizer puts between words is known from both
        # sides, and the bytes of a character may come in several tokens.
        self._window = prompt.tolist()
        self._known = len(text_of(tokenizer, self._window))  # of its characters, those not new
        self._certain: list[str] = []
        self._open = ""  # may turn out to begin a stop string
        self._released = 0
        self.tokens: list[int] = []
        self.ending: Ending = ""

    @property
    def text(self) -> str:
        """The text so far, without what a stop string cut off.

        A character whose bytes are not all there is held back until the text ends.
        """
        return "".join([*self._certain, self._open])

    def add(self, token: int) -> None:
        """Takes a token, unless the text has ended."""
        if self.ending:
            return
        self.tokens.append(token)
        if token == self._tokenizer.eos_id:
            self.ending = "end"
        elif len(self.tokens) == self._most:
            self.ending = "length"
        self._open += self._new(token)
        form, places = self._form()
        found = self._first_stop(form)
        if found is not None:
            self._open, self.ending = self._open[: places[found]], "stop"
        begun = 0 if self.ending else self._begun(form)
        safe = places[len(form) - begun] if begun else len(self._open)
        self._certain.append(self._open[:safe])
        self._open = self._open[safe:]

    def release(self) -> str:
        """The text since the last call that no later token can take back."""
        new = "".join(self._certain[self._released :])
        self._released = len(self._certain)
        return new

    def _new(self, token: int) -> str:
        """The characters that are whole with this token, or the last ones as they are.

        What goes before a token that ends with a character has no part in what follows that token:
        the window begins anew with it.
        """
        self._window.append(token)
        new = text_of(self._tokenizer, self._window)[self._known :]
        whole = new.rstrip(_INCOMPLETE)
        if whole and whole == new:
            self._window, self._known = [token], len(text_of(self._tokenizer, [token]))
        else:
            self._known += len(whole)
        return new if self.ending else whole

    def _first_stop(self, form: str) -> int | None:
        """Where the stop string begins that ends first; of two the longer one."""
        found = [(form.find(stop), stop) for stop in self._stop]
        ends = [(at + len(stop), at) for at, stop in found if at >= 0]
        return min(ends)[1] if ends else None

    def _begun(self, form: str) -> int:
        """Length of the longest end with which a stop string begins."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if form.endswith(stop[:size])
            ),
            default=0,
        )

    def _form(self) -> tuple[str, Sequence[int]]:
        """What is open, as stop strings are sought in it, and the places of its characters."""
        if self._stop and self._tokenizer.kind == "clip":
            return _comparable(self._open)
        return self._open, range(len(self._open))
