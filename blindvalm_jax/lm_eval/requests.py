"""What the harness's requests ask of a model of ours: rows of tokens, and ways to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.models import utils

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks.scoring import Texts

# Texts, ids of the context, ids of the continuation: what the harness calls a request.
Tokens = tuple[tuple[str, str] | None, list[int], list[int]]

_RULES = ("top_k", "top_p", "min_p", "repetition_penalty")
# What a generation is asked with, and what holds where nothing is said.
_GENERATION: dict[str, Any] = {
    "until": (),
    "max_gen_toks": 256,  # the harness's own number
    "do_sample": False,
    "temperature": 1.0,
    "num_beams": 1,
    **{name: Sampling.__dataclass_fields__[name].default for name in _RULES},
}


class Asked(NamedTuple):
    """How texts are to be continued: `new` tokens at most, up to one of the strings of `stop`."""

    sampling: Sampling
    new: int
    stop: list[str]


def asked(arguments: Mapping[str, Any], tokenizer: Tokenizer) -> Asked:
    """The harness's arguments of a generation, which are those of transformers.

    CLIP's tokenizer writes no line breaks: with it stop strings of white space alone are left out.

    Raises:
      UserError: an argument is unknown, or asks for what we do not do.
    """
    # Its max_gen_toks has three other names, and what is sampled follows from the temperature.
    given = utils.normalize_gen_kwargs(dict(arguments), _GENERATION["max_gen_toks"])
    unknown = sorted(given.keys() - _GENERATION.keys())
    if unknown:
        raise UserError(
            f"generation with {', '.join(unknown)} is asked for; blindvalm knows "
            f"{', '.join(_GENERATION)}, and max_new_tokens, max_tokens, max_completion_tokens for "
            "max_gen_toks"
        )
    values = {**_GENERATION, **given}
    if values["num_beams"] != 1:
        raise UserError(
            f"generation with num_beams={values['num_beams']} is asked for: blindvalm has no beam "
            "search, expected 1"
        )
    # Every text holds the empty string; the harness cuts nothing off at it either.
    blank = tokenizer.kind == "clip"
    stop = [text for text in values["until"] if (text.strip() if blank else text)]
    if values["do_sample"]:
        rules = {name: values[name] for name in ("temperature", *_RULES)}
        return Asked(Sampling(**rules), values["max_gen_toks"], stop)
    # As transformers does, which leaves out what only matters to draws.
    greedy = Sampling(repetition_penalty=values["repetition_penalty"])
    return Asked(greedy, values["max_gen_toks"], stop)


class Prompt(NamedTuple):
    """A context and its continuations: ids, and the text they are where texts are read.

    places: of the request for each continuation.
    """

    ids: np.ndarray
    text: str
    continuations: list[np.ndarray]
    behind: list[str]
    places: list[int]

    @property
    def texts(self) -> Texts:
        """What the ids spell."""
        return Texts(self.text, self.behind)


def prompts(
    requests: Sequence[Tokens], *, longest: int, tokenizer: Tokenizer, reads_texts: bool
) -> list[Prompt]:
    """Requests with the same context together.

    longest: tokens of a row, the last of a continuation not counted. What is too long loses its
    beginning: tokens, or whole words where `reads_texts`.

    Raises:
      UserError: a continuation is empty or too long, or its context has a word that is.
    """
    alike: dict[tuple[str, tuple[int, ...]], Prompt] = {}
    for place, (texts, context, continuation) in enumerate(requests):
        count = len(continuation)
        if not 0 < count <= longest:
            raise UserError(f"a continuation of {count} tokens: expected 1 to {longest}")
        room, before, behind = longest + 1 - count, "", ""
        if reads_texts and texts is not None:
            before, behind = _split(*texts)
            before, context = _last_words(before, context, tokenizer=tokenizer, room=room)
        ids = context[-room:]
        found = alike.setdefault(
            (before, tuple(ids)), Prompt(np.array(ids, np.int32), before, [], [], [])
        )
        found.continuations.append(np.array(continuation, np.int32))
        found.behind.append(behind)
        found.places.append(place)
    return list(alike.values())


def _split(context: str, continuation: str) -> tuple[str, str]:
    """Blanks at the end of a context are the continuation's, as `TemplateLM._encode_pair` does."""
    before = context.rstrip()
    return before, context[len(before) :] + continuation


def _last_words(
    text: str, ids: list[int], *, tokenizer: Tokenizer, room: int
) -> tuple[str, list[int]]:
    """A text and its ids without the start token and the words in front that do not fit.

    Raises:
      UserError: the last word alone does not fit.
    """
    if len(ids) > room:
        ids = tokenizer.encode_lm(text).tolist()
    while len(ids) > room:
        if " " not in text:
            raise UserError(f"the word {text[:40]!r} of a context exceeds {room} tokens: cut it")
        text = text.split(" ", 1)[1]
        ids = tokenizer.encode_lm(text).tolist()
    return text, ids
