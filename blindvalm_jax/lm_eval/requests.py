"""What the harness's requests ask of a model of ours: rows of tokens, and ways to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.models import utils

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.errors import UserError

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
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KINDS = {
    "until": "a text, or a list of texts",
    "do_sample": "true or false",
    **dict.fromkeys((*_LENGTHS, "top_k", "num_beams"), "a whole number"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), "a number"),
}


class Asked(NamedTuple):
    """How texts are to be continued: `new` tokens at most, up to one of the strings of `stop`."""

    sampling: Sampling
    new: int
    stop: list[str]


def asked(arguments: Mapping[str, Any], tokenizer: Tokenizer) -> Asked:
    """The harness's arguments of a generation, which are those of transformers; None: not said.

    CLIP's tokenizer writes no line breaks: with it stop strings of white space alone are left out.

    Raises:
      UserError: an argument is unknown, not of its kind, or asks for what we do not do.
    """
    said = {name: value for name, value in arguments.items() if value is not None}
    for name, kind in _KINDS.items():
        if name in said:
            _check(name, said[name], kind)
    if isinstance(said.get("until"), tuple):
        said["until"] = [*said["until"]]
    # Its max_gen_toks has three other names, and what is sampled follows from the temperature.
    given = utils.normalize_gen_kwargs(said, _GENERATION["max_gen_toks"])
    unknown = sorted(given.keys() - _GENERATION.keys())
    if unknown:
        raise UserError(
            f"generation with {', '.join(unknown)} is asked for; blindvalm knows "
            f"{', '.join(_GENERATION)}, and {', '.join(_LENGTHS[1:])} for {_LENGTHS[0]}"
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
    if values["do_sample"] and values["temperature"]:
        rules = {name: values[name] for name in ("temperature", *_RULES)}
        return Asked(Sampling(**rules), values["max_gen_toks"], stop)
    # As transformers does, which leaves out what only matters to draws.
    greedy = Sampling(repetition_penalty=values["repetition_penalty"])
    return Asked(greedy, values["max_gen_toks"], stop)


def _check(name: str, value: object, kind: str) -> None:
    """Refuses a value that is not of its kind; to Python true and false are numbers too."""
    if name == "until":
        texts = value if isinstance(value, list | tuple) else [value]
        good = all(isinstance(text, str) for text in texts)
    elif name == "do_sample":
        good = isinstance(value, bool)
    else:
        number = int if kind == "a whole number" else int | float
        good = isinstance(value, number) and not isinstance(value, bool)
    if not good:
        raise UserError(f"generation with {name}={value!r} is asked for: expected {kind}")


class Prompt(NamedTuple):
    """Ids of a context and of its continuations; places: of the request for each of these."""

    ids: np.ndarray
    continuations: list[np.ndarray]
    places: list[int]


def prompts(requests: Sequence[Tokens], *, longest: int | None) -> list[Prompt]:
    """Requests with the same context together.

    longest: tokens of a row, the last of a continuation not counted; None: any number. What is too
    long loses its beginning.

    Raises:
      UserError: a continuation is empty or too long.
    """
    alike: dict[tuple[int, ...], Prompt] = {}
    for place, (_texts, context, continuation) in enumerate(requests):
        count = len(continuation)
        if not 0 < count <= (longest or count):
            raise UserError(
                f"a continuation of {count} tokens: expected 1 to {longest or 'any number'}"
            )
        ids = context if longest is None else context[-(longest + 1 - count) :]
        found = alike.setdefault(tuple(ids), Prompt(np.array(ids, np.int32), [], []))
        found.continuations.append(np.array(continuation, np.int32))
        found.places.append(place)
    return list(alike.values())
