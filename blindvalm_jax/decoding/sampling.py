"""Which token comes next: logits to scores under the usual rules, and draws from them.

Pure functions, in the order in which transformers applies the same rules: repetition penalty,
tokens that are never text, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blindvalm_jax.data import tokenizer_files
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError

_LARGEST = 1e37  # in fp32 its inverse is a number too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults take the likeliest.

    temperature: divides logits; 0: the likeliest token, without a draw. top_k: only the k likeliest
    (ties with the last of them too), 0: all. top_p: only the smallest set of likeliest tokens with
    at least this probability (nucleus, Holtzman et al. 2020), 1: all. min_p: only tokens at least
    this share of the likeliest one's probability (Nguyen et al. 2024), 0: all. repetition_penalty:
    positive logits of tokens that the row holds, prompt included, are divided by it and negative
    ones multiplied (CTRL, Keskar et al. 2019), 1: none.

    Raises:
      UserError: a value is out of its range, or would have no effect at temperature 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0"),
        ):
            if not good:
                raise UserError(f"{name} must be {wanted}, got {getattr(self, name)}")
        cut = [name for name in ("top_k", "top_p", "min_p") if not self._neutral(name)]
        if cut and not self.temperature:
            raise UserError(
                f"{cut[0]} has no effect at temperature 0, which takes the likeliest token: give "
                f"a temperature, or leave {cut[0]} out"
            )

    def _neutral(self, name: str) -> bool:
        default: object = type(self).__dataclass_fields__[name].default
        return bool(getattr(self, name) == default)


def never_text(tokenizer: Tokenizer) -> np.ndarray:
    """bool [V]: ids that stand for no text and do not end one: the pad and other specials."""
    never = np.zeros(tokenizer.vocab_size, bool)
    never[: tokenizer.lm_offset] = True
    never[tokenizer.pad_id] = True
    if tokenizer.kind == "clip":
        for piece in tokenizer_files.CLIP_SPECIALS:
            index = tokenizer.token_to_id(piece)
            if index is not None:
                never[index + tokenizer.lm_offset] = True
    never[tokenizer.eos_id] = False
    return never


def scores(
    logits_BV: Array, *, sampling: Sampling, never_V: np.ndarray, seen_BV: Array | None = None
) -> Array:
    """Logits after all rules but the draw, [B, V], -inf where a token is out of the question.

    never_V: bool, at most V entries: tokens that are not drawn; nor are those behind its end.
    seen_BV: tokens that each row holds, needed for a repetition penalty.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        if seen_BV is None:
            raise ValueError("a repetition penalty needs the tokens that were seen")
        logits_BV = penalised(logits_BV, seen_BV, sampling.repetition_penalty)
    never_V = np.pad(never_V, (0, logits_BV.shape[1] - len(never_V)), constant_values=True)
    logits_BV = jnp.where(never_V[None], -jnp.inf, logits_BV)
    if not sampling.temperature:
        return logits_BV
    # The largest becomes 0 first: a very small temperature must not make it infinite.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
    logits_BV = logits_BV / _in_fp32(sampling.temperature)
    if sampling.top_k:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def penalised(logits_BV: Array, seen_BV: Array, penalty: float) -> Array:
    """Seen tokens made less likely: l / penalty where l > 0, else l * penalty; always finite."""
    penalty = _in_fp32(penalty)
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, jnp.clip(less_BV, -_LARGEST, _LARGEST), logits_BV)


def _in_fp32(value: float) -> float:
    """The nearest number above 0 that fp32 can multiply with and divide by."""
    return min(max(value, 1 / _LARGEST), _LARGEST)


def top_k(logits_BV: Array, k: int) -> Array:
    """The k largest of each row and ties with the last of them; -inf elsewhere."""
    least_B = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[1]))[0][:, -1]
    return jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)


def top_p(logits_BV: Array, p: float) -> Array:
    """Of each row the smallest set of likeliest tokens whose probability reaches p.

    Of equally likely ones those with the larger ids go in first.
    """
    order_BV = jnp.argsort(logits_BV, axis=1)  # ascending, and stable
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=1)
    below_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=1) <= 1 - p
    below_BV = below_BV.at[:, -1].set(False)
    row_B1 = jnp.arange(len(order_BV))[:, None]
    out_BV = jnp.zeros(below_BV.shape, bool).at[row_B1, order_BV].set(below_BV)
    return jnp.where(out_BV, -jnp.inf, logits_BV)


def min_p(logits_BV: Array, p: float) -> Array:
    """Tokens whose probability is at least p times the likeliest one's; -inf elsewhere."""
    least_B = jnp.max(logits_BV, axis=1) + math.log(p)
    return jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)


def draw(scores_BV: Array, keys_B: Array, *, sampling: Sampling) -> Array:
    """A token of each row, int32 [B]; keys_B: a key for each row, so that rows do not depend."""
    if not sampling.temperature:
        return jnp.argmax(scores_BV, axis=1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)
