"""Texts that a trained model writes behind prompts."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from blindvalm_jax.decoding import sampling
from blindvalm_jax.decoding.rows import CachedRows, Draw, Drawn, Rows, WholeRows
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.decoding.streaming import Continuation
from blindvalm_jax.errors import UserError
from blindvalm_jax.trained import TrainedModel

BLOCK = 16  # tokens between two looks for stop strings

# Called for each token with its row, the text that is certain by now, and its shares [L'] or None.
OnToken = Callable[[int, str, np.ndarray | None], None]


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
    """All texts. prompt_seconds: compilation and first tokens; seconds: for `counted` others."""

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
          UserError: the model cannot write, see `whole_only`; or it has no grounding to probe.
        """
        if probe and not trained.model.decoder.fusion_layers:
            raise UserError("this model has no fusion layers, so no attention goes to a grounding")
        self._trained, self._start = trained, start
        draw = Draw(
            settings or Sampling(),
            sampling.never_text(trained.tokenizer),
            trained.tokenizer.eos_id,
            len(trained.model.decoder.fusion_layers) if probe else 0,
        )
        self._rows: Rows
        if whole_only(trained) or not cached:
            self._rows = WholeRows(trained, draw)
        else:
            self._rows = CachedRows(trained, draw, block=block)

    def generate(
        self,
        prompts: Sequence[str | np.ndarray],
        *,
        max_new_tokens: int,
        samples: int = 1,
        stop: Sequence[str] = (),
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> Generation:
        """`samples` texts behind each prompt, each up to a stop string or the end of text.

        prompts: texts, or ids [T] of the language model. What a row draws depends on the seed, its
        prompt and the number of its sample alone.

        Raises:
          UserError: a prompt has no tokens, or is too long for the model's positions.
        """
        _check(max_new_tokens, samples, stop)
        encoded = [self._encoded(prompt, max_new_tokens) for prompt in prompts]
        if not encoded:
            raise UserError("there is no prompt: give one or more")
        texts = [
            Continuation(
                self._trained.tokenizer, ids[int(self._start) :], stop=stop, most=max_new_tokens
            )
            for ids in encoded
            for _ in range(samples)
        ]
        shares: list[list[np.ndarray]] = [[] for _ in texts]

        def take(drawn: Drawn) -> np.ndarray:
            _add(drawn, texts, shares, on_token)
            return np.array([bool(text.ending) for text in texts])

        begin = time.perf_counter()
        keys = _keys(encoded, samples, seed)
        done = take(self._rows.begin(encoded, samples, keys, max_new_tokens))
        first = time.perf_counter()
        while not done.all():
            done = take(self._rows.go_on(done))
        return Generation(
            texts=[
                Written(
                    prompt=self._text(prompts[row // samples]),
                    sample=row % samples,
                    text=text.text,
                    tokens=text.tokens,
                    ending=text.ending,
                    shares=np.stack(own, axis=1) if own else None,
                )
                for row, (text, own) in enumerate(zip(texts, shares, strict=True))
            ],
            prompt_seconds=first - begin,
            seconds=time.perf_counter() - first,
            counted=sum(len(text.tokens) - 1 for text in texts),
        )

    def _text(self, prompt: str | np.ndarray) -> str:
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._trained.tokenizer
        return tokenizer.decode([int(token) - tokenizer.lm_offset for token in prompt])

    def _encoded(self, prompt: str | np.ndarray, new: int) -> np.ndarray:
        """int32 ids of a prompt, with the end-of-text token in front as in training."""
        tokenizer = self._trained.tokenizer
        front = np.full(int(self._start), tokenizer.eos_id, np.int32)
        ids = tokenizer.encode_lm(prompt) if isinstance(prompt, str) else prompt
        ids = np.append(front, ids).astype(np.int32)
        config = self._trained.model.decoder.config
        if not len(ids):
            raise UserError("an empty prompt without the end-of-text token in front has no tokens")
        if config.positions == "learned" and len(ids) + new - 1 > config.max_positions:
            room = max(config.max_positions - len(ids) + 1, 0)
            raise UserError(
                f"a prompt of {len(ids)} tokens and {new} new ones exceed the model's "
                f"{config.max_positions} learned positions: shorten the prompt, or ask for at most "
                f"{room}"
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


def whole_only(trained: TrainedModel) -> bool:
    """Whether every token has to read its whole row again: under the reference segment rule.

    That rule lets later tokens decide where a segment starts, so features of earlier ones change as
    the text grows: each token is predicted from the row as it then was.

    Raises:
      UserError: the model cannot write at all.
    """
    if trained.model.shuffled:
        raise UserError(
            "a model of grounding.control=shuffled takes the features of other rows: it cannot "
            "write a text of its own"
        )
    if trained.tower_tokenizer is not None:
        raise UserError(
            "a model whose tower has a tokenizer of its own cannot write yet: the tower's tokens "
            "are those of a whole text, and the end of a growing one is not known"
        )
    grounded = bool(trained.model.decoder.fusion_layers)
    return grounded and trained.settings.grounding.segments == "reference"


def _check(max_new_tokens: int, samples: int, stop: Sequence[str]) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    if "" in stop:
        raise UserError("a stop string is empty: every text would end before its first token")


def _add(
    drawn: Drawn,
    texts: Sequence[Continuation],
    shares: Sequence[list[np.ndarray]],
    on_token: OnToken | None,
) -> None:
    """Gives every text that goes on its tokens."""
    for row, text in enumerate(texts):
        for place, token in enumerate(drawn.tokens[row].tolist()):
            if text.ending:
                break
            text.add(token)
            share = None if drawn.shares is None else drawn.shares[:, row, place]
            if share is not None:
                shares[row].append(share)
            if on_token is not None:
                on_token(row, text.release(), share)


def _keys(prompts: Sequence[np.ndarray], samples: int, seed: int) -> Array:
    """A key for each row: of the seed, what its prompt says, and the number of its sample."""
    content = np.array([zlib.crc32(ids.astype("<i4").tobytes()) for ids in prompts], np.uint32)
    content_B = np.repeat(content, samples)
    sample_B = np.tile(np.arange(samples, dtype=np.uint32), len(prompts))
    key = jax.random.key(seed)
    return _folded(_folded(jax.numpy.broadcast_to(key, content_B.shape), content_B), sample_B)


_folded = jax.jit(jax.vmap(jax.random.fold_in))
