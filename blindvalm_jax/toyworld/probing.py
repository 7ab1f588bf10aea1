"""Zero-shot probes of a trained model: which attribute word comes next, and why it says so."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blindvalm_jax.errors import UserError
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.toyworld.language import Probe
from blindvalm_jax.trained import TrainedModel

_ROWS = 256
WHERE = ("everywhere", "last", "not_last", "nowhere")


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says to each probe.

    said: the candidate it finds likeliest; nats: -log p of the right one, among all tokens; share:
    attention on the grounding at the last position, mean over heads and fusion layers, 0 without
    any.
    """

    said: np.ndarray
    nats: np.ndarray
    share: np.ndarray


def ask(
    trained: TrainedModel,
    probes: Sequence[Probe],
    *,
    grounded: str = "everywhere",
    tower_reads: Sequence[str] | None = None,
    given: np.ndarray | None = None,
) -> Answers:
    """Asks every probe, scored over its candidates' next-token probabilities.

    grounded: at which positions the model sees its grounding, one of `WHERE`. tower_reads: texts
    that the tower is given instead of the prompts, of as many tokens each. given: vectors
    float [n, K, E] in the place of every feature of a prompt.

    Raises:
      UserError: a candidate is not one token, or a text for the tower is of another length.
    """
    # A control borrows the features of the row before: in a random order that is another object's,
    # and longest first it is no shorter, so that there is text where this row ends.
    order = np.random.default_rng(0).permutation(len(probes))
    sizes = np.array([len(trained.tokenizer.encode_lm(probe.prompt)) for probe in probes])
    order = order[np.argsort(-sizes[order], kind="stable")]
    back = np.argsort(order)
    probes = [probes[n] for n in order]
    tower_reads = None if tower_reads is None else [tower_reads[n] for n in order]
    given = None if given is None else given[order]
    prompts = [probe.prompt for probe in probes]
    words = sorted({word for probe in probes for word in probe.candidates})
    token_of = {word: _token(trained, word) for word in words}
    length = trained.batch(prompts).tokens_BT.shape[1]
    said, nats, shares = [], [], []
    for first in range(0, len(probes), _ROWS):
        part = probes[first : first + _ROWS]
        rows = _filled(prompts[first : first + _ROWS])
        batch = trained.batch(rows, length=length)
        if tower_reads is not None:
            other = trained.batch(_filled(tower_reads[first : first + _ROWS]), length=length)
            if not np.array_equal(batch.weights_BT, other.weights_BT):
                raise UserError("a text for the tower has another number of tokens than its prompt")
            batch = dataclasses.replace(batch, tower=other.tower)
        if given is not None:
            z_BKE = _filled(given[first : first + _ROWS])
            z_BTKE = np.broadcast_to(z_BKE[:, None], (_ROWS, length, *z_BKE.shape[1:]))
            batch = dataclasses.replace(batch, z_BTKE=jnp.asarray(z_BTKE))
        with trained.computing():
            logits_BV, share_B = _last(trained.model)(
                trained.params, trained.frozen, batch, grounded=grounded
            )
        log_p, share = np.asarray(jax.nn.log_softmax(logits_BV)), np.asarray(share_B)
        for row, probe in enumerate(part):
            scores = log_p[row, [token_of[word] for word in probe.candidates]]
            said.append(probe.candidates[int(np.argmax(scores))])
            nats.append(-log_p[row, token_of[probe.answer]])
            shares.append(share[row])
    return Answers(np.array(said)[back], np.array(nats)[back], np.array(shares)[back])


def features(trained: TrainedModel, prompts: Sequence[str]) -> np.ndarray:
    """The grounding vector [n, E] at the last position of each prompt, before any search."""
    model = dataclasses.replace(trained.model, search=None)
    batch = trained.batch(prompts)
    with trained.computing():
        z_BTKE = jax.jit(model.features)(trained.frozen, batch)
    if z_BTKE is None:
        raise ValueError("a model without grounding has no features")
    last = np.asarray(jnp.sum(batch.weights_BT, axis=1), int)
    return np.asarray(z_BTKE)[np.arange(len(prompts)), last, 0]


@functools.cache
def _last(model: Model) -> Callable[..., tuple[Array, Array]]:
    """The compiled function that gives next-token logits behind each prompt."""

    def run(
        params: Any, frozen: Mapping[str, Any], batch: Batch, *, grounded: str
    ) -> tuple[Array, Array]:
        last_B = jnp.sum(batch.weights_BT, axis=1).astype(jnp.int32)
        at_BT = jnp.arange(batch.tokens_BT.shape[1])[None, :] == last_B[:, None]
        seen_BT = {
            "everywhere": jnp.ones_like(at_BT),
            "last": at_BT,
            "not_last": ~at_BT,
            "nowhere": jnp.zeros_like(at_BT),
        }[grounded]
        hidden: Any = model.decoder.apply(
            {"params": params},
            batch.tokens_BT,
            model.features(frozen, batch),
            None,
            seen_BT if model.decoder.fusion_layers else None,
            method="hidden",
        )
        rows_B = jnp.arange(len(last_B))
        logits: Any = model.decoder.apply(
            {"params": params}, hidden.hidden_BTD[rows_B, last_B][:, None], method="logits"
        )
        share_B = jnp.zeros(len(last_B))
        if hidden.memory_share_LBT is not None:
            share_B = jnp.mean(hidden.memory_share_LBT, axis=0)[rows_B, last_B]
        return logits[:, 0], share_B

    return jax.jit(run, static_argnames="grounded")


def _token(trained: TrainedModel, word: str) -> int:
    ids = trained.tokenizer.encode_lm(f" {word}")
    if len(ids) != 1:
        raise UserError(f"the word {word!r} is {len(ids)} tokens of this tokenizer, expected one")
    return int(ids[0])


def _filled(rows: Any) -> Any:
    """Rows of a part, the last one repeated to the full number: one compilation serves all."""
    if len(rows) == _ROWS:
        return rows
    if isinstance(rows, np.ndarray):
        return np.concatenate([rows, np.repeat(rows[-1:], _ROWS - len(rows), axis=0)])
    return [*rows, *[rows[-1]] * (_ROWS - len(rows))]
