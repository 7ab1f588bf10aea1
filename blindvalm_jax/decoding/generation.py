"""Texts that a trained model writes behind prompts."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from blindvalm_jax import partitioning
from blindvalm_jax.decoding import sampling, streaming, tower_text
from blindvalm_jax.decoding.rows import CachedRows, Draw, Drawn, Rows, WholeRows
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.decoding.streaming import Continuation
from blindvalm_jax.errors import UserError
from blindvalm_jax.trained import TrainedModel

BLOCK = 16  # tokens between two looks for stop strings
LONGEST = 1_000_000  # new tokens of a text at most
_TOGETHER = 32  # rows of a device that are written at once


class Taken(NamedTuple):
    """A token of a row.

    text: what is certain with it and was not before. share: [L'], weight on the grounding vectors
    where it was predicted, mean over heads; None: not asked for.
    """

    row: int
    token: int
    text: str
    share: np.ndarray | None


OnToken = Callable[[Taken], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What stands behind a prompt; rows are numbered prompt by prompt, sample by sample.

    tokens: with the end-of-text token, if that came. ending: "end" of text, "stop" string or
    "length". shares: [L', tokens], weight on the grounding vectors where each token was predicted,
    mean over heads; None: not asked for.
    """

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    ending: str
    shares: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """All texts.

    prompt_seconds: compilation and first tokens. seconds: for `counted` others, with compilation
    where caches were doubled for them.
    """

    texts: list[Written]
    prompt_seconds: float
    seconds: float
    counted: int


class Generator:
    """A model that writes; what it compiles is kept for the next prompts."""

    def __init__(
        self,
        trained: TrainedModel,
        *,
        settings: Sampling | None = None,
        start: bool = True,
        probe: bool = False,
        block: int = BLOCK,
        cached: bool = True,
    ) -> None:
        """settings: None: the likeliest token always. start: each prompt begins a document.

        probe: also how much attention went to the grounding. block: tokens that are drawn before
        the host looks at them. cached: False: each token reads its whole row again.

        Raises:
          UserError: the model reads other rows, or it has no grounding to probe.
        """
        if trained.model.shuffled:
            raise UserError(
                "a model of grounding.control=shuffled takes the features of other rows: it cannot "
                "write a text of its own"
            )
        if probe and not trained.model.decoder.fusion_layers:
            raise UserError("this model has no fusion layers, so no attention goes to a grounding")
        self._trained, self._start = trained, start
        self._settings = settings or Sampling()
        draw = Draw(
            self._settings,
            sampling.never_text(trained.tokenizer),
            trained.tokenizer.eos_id,
            len(trained.model.decoder.fusion_layers) if probe else 0,
        )
        self._rows: Rows
        if tower_text.whole_only(trained) or not cached:
            self._rows = WholeRows(trained, draw)
        else:
            self._rows = CachedRows(trained, draw, block=block)

    def generate(
        self,
        prompts: Sequence[str | np.ndarray],
        *,
        max_new_tokens: int,
        samples: int = 1,
        numbers: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        on_token: OnToken | None = None,
        on_texts: Callable[[Sequence[Written]], None] | None = None,
    ) -> Generation:
        """`samples` texts behind each prompt, each up to a stop string or the end of text.

        numbers: of the first sample of each prompt, for one that is asked again; None: 0.
        prompts: texts, or ids [T] of the language model. What a row draws depends on the seed, its
        prompt and the number of its sample alone, and not on the rows that are written with it.
        on_texts: called with the texts that are written at once when these are done; in order where
        rows are not split over devices.

        Raises:
          UserError: see `check`; a prompt has no tokens, or is too long for the model's positions.
        """
        self.check(max_new_tokens, samples=samples, stop=stop)
        encoded = self._all_encoded(prompts, max_new_tokens)
        sample_PS = np.add.outer(
            np.zeros(len(encoded), np.uint32) if numbers is None else np.array(numbers, np.uint32),
            np.arange(samples, dtype=np.uint32),
        )
        keys_PS = _keys(encoded, sample_PS, seed)
        done: dict[int, Written] = {}
        prompt_seconds = seconds = 0.0
        split = partitioning.row_shards(self._trained.mesh)
        for part, own in _parts(len(encoded), samples, split=split):
            texts = [
                _Text(
                    self._grown(encoded[place], stop=stop, most=max_new_tokens),
                    self._text(prompts[place]),
                    int(sample_PS[place, sample]),
                    place * samples + sample,
                    [],
                )
                for place in part
                for sample in own
            ]
            keys_B = keys_PS[part.start : part.stop, own.start : own.stop].reshape(-1)
            rows = [encoded[place] for place in part]
            spent = self._write(rows, texts, keys_B, most=max_new_tokens, on_token=on_token)
            prompt_seconds, seconds = prompt_seconds + spent[0], seconds + spent[1]
            written = {text.row: text.written() for text in texts}
            done |= written
            if on_texts is not None:
                on_texts([*written.values()])
        return Generation(
            texts=[done[row] for row in sorted(done)],
            prompt_seconds=prompt_seconds,
            seconds=seconds,
            counted=sum(len(text.tokens) - 1 for text in done.values()),
        )

    def check(self, max_new_tokens: int, *, samples: int = 1, stop: Sequence[str] = ()) -> None:
        """Refuses what `generate` would, whatever the prompts.

        Raises:
          UserError: see the function `check`, and `streaming.sought` for the model's tokenizer.
        """
        check(self._settings, max_new_tokens, samples=samples, stop=stop)
        streaming.sought(self._trained.tokenizer, stop)

    def _write(
        self,
        rows: Sequence[np.ndarray],
        texts: Sequence[_Text],
        keys_B: Array,
        *,
        most: int,
        on_token: OnToken | None,
    ) -> tuple[float, float]:
        """Writes texts at once, as many behind each row; seconds of first tokens, and of others."""
        begin = time.perf_counter()
        drawn = self._rows.begin(rows, len(texts) // len(rows), keys_B, most)
        stopped_B = _add(drawn, texts, on_token)
        first = time.perf_counter()
        while not stopped_B.all():
            drawn = self._rows.go_on(stopped_B)
            stopped_B = _add(drawn, texts, on_token)
        return first - begin, time.perf_counter() - first

    def _grown(self, ids: np.ndarray, *, stop: Sequence[str], most: int) -> Continuation:
        """What is added to a prompt of ids, of which the first may be the one in front."""
        prompt = ids[int(self._start) :]
        return Continuation(self._trained.tokenizer, prompt, stop=stop, most=most)

    def _text(self, prompt: str | np.ndarray) -> str:
        if isinstance(prompt, str):
            return prompt
        return streaming.text_of(self._trained.tokenizer, np.asarray(prompt).tolist())

    def _all_encoded(self, prompts: Sequence[str | np.ndarray], new: int) -> list[np.ndarray]:
        """Ids of the prompts, each with room for `new` tokens."""
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of texts, got one text: give [text]")
        if not len(prompts):
            raise UserError("there is no prompt: give one or more")
        return [
            self._encoded(prompt, new, name=f"prompt {number}")
            for number, prompt in enumerate(prompts, start=1)
        ]

    def _encoded(self, prompt: str | np.ndarray, new: int, *, name: str) -> np.ndarray:
        """int32 ids of a prompt, with the end-of-text token in front as in training."""
        tokenizer = self._trained.tokenizer
        front = np.full(int(self._start), tokenizer.eos_id, np.int32)
        if isinstance(prompt, str):
            ids = tokenizer.encode_lm(prompt)
        else:
            ids = _checked(prompt, tokenizer.vocab_size, name=name)
        ids = np.append(front, ids).astype(np.int32)
        config = self._trained.model.decoder.config
        if not len(ids):
            raise UserError(f"{name} is empty, and has no end-of-text token in front: no tokens")
        if config.positions == "learned" and len(ids) + new - 1 > config.max_positions:
            room = config.max_positions - len(ids) + 1
            fewer = f", or ask for at most {room}" if room > 0 else ""
            raise UserError(
                f"{name} of {len(ids)} tokens and {new} new ones exceed the model's "
                f"{config.max_positions} learned positions: shorten the prompt{fewer}"
            )
        return ids


def generate(
    trained: TrainedModel,
    prompts: Sequence[str],
    *,
    settings: Sampling | None = None,
    max_new_tokens: int = 64,
    samples: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[Written]:
    """Texts behind prompts, see `Generator`.

    Raises:
      UserError: see `Generator`.
    """
    asked = Generator(trained, settings=settings).generate(
        prompts, max_new_tokens=max_new_tokens, samples=samples, stop=stop, seed=seed
    )
    return asked.texts


def check(
    settings: Sampling, max_new_tokens: int, *, samples: int = 1, stop: Sequence[str] = ()
) -> None:
    """Refuses what no model can do.

    Raises:
      UserError: a number is out of its range, a stop string is empty or they are no list, or all
        samples of a prompt would be alike.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples)):
        if not 1 <= value <= LONGEST:
            raise UserError(f"{name} must be 1 or more and at most {LONGEST}, got {value}")
    if samples > 1 and not settings.temperature:
        raise UserError(
            f"{samples} samples at temperature 0 would be the same text: give a temperature, or "
            "ask for one"
        )
    streaming.check(stop)


def _checked(prompt: np.ndarray, size: int, *, name: str) -> np.ndarray:
    """A prompt of ids."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"{name} is {ids.dtype} {list(ids.shape)}: give a text, or a row of integer ids [T]"
        )
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise UserError(f"{name} holds the id {wrong[0]}, the model's are 0 to {size - 1}")
    return ids


class _Text(NamedTuple):
    """A text that grows, and the shares [L'] of its tokens."""

    grown: Continuation
    prompt: str
    sample: int
    row: int
    shares: list[np.ndarray]

    def written(self) -> Written:
        return Written(
            prompt=self.prompt,
            sample=self.sample,
            text=self.grown.text,
            tokens=self.grown.tokens,
            ending=self.grown.ending,
            shares=np.stack(self.shares, axis=1) if self.shares else None,
        )


def _add(drawn: Drawn, texts: Sequence[_Text], on_token: OnToken | None) -> np.ndarray:
    """Gives every text that goes on its tokens; returns which have ended."""
    for row, text in enumerate(texts):
        for place, token in enumerate(drawn.tokens[row].tolist()):
            if text.grown.ending:
                break
            text.grown.add(token)
            share = None if drawn.shares is None else drawn.shares[:, row, place]
            if share is not None:
                text.shares.append(share)
            if on_token is not None:
                on_token(Taken(text.row, token, text.grown.release(), share))
    return np.array([bool(text.grown.ending) for text in texts])


def _parts(prompts: int, samples: int, *, split: int) -> Iterator[tuple[range, range]]:
    """Which prompts, and which samples of them, are written at once.

    Prompts in multiples of `split`, the devices that rows are over; either several prompts with all
    their samples, or the fewest prompts with some.
    """
    most = _TOGETHER * split
    wide = max(most // samples // split * split, split)
    deep = max(most // wide, 1)
    for first in range(0, prompts, wide):
        for sample in range(0, samples, deep):
            yield (
                range(first, min(first + wide, prompts)),
                range(sample, min(sample + deep, samples)),
            )


def _keys(prompts: Sequence[np.ndarray], sample_PS: np.ndarray, seed: int) -> Array:
    """A key [P, S] for each row: of the seed, what its prompt says, and its sample's number."""
    content = np.array([zlib.crc32(ids.astype("<i4").tobytes()) for ids in prompts], np.uint32)
    content_B = np.repeat(content, sample_PS.shape[1])
    key = jax.random.key(seed)
    keys_B = _folded(jax.numpy.broadcast_to(key, content_B.shape), content_B)
    return _folded(keys_B, sample_PS.reshape(-1)).reshape(sample_PS.shape)


_folded = jax.jit(jax.vmap(jax.random.fold_in))
