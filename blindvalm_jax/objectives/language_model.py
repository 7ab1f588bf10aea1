"""The language model and its grounding as pure functions: features, loss, gradients.

`Model` joins what the rest of the package keeps apart: the decoder and where its z comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.grounding import text
from blindvalm_jax.grounding.retrieval import Search
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.objectives import microbatches


@struct.dataclass
class Batch:
    """Rows of tokens; weights_BT is 0 where a target is a pad, 1 elsewhere.

    z_BTKE: grounding features made elsewhere; else `tower` says what the text tower reads.
    """

    tokens_BT: Array
    targets_BT: Array
    weights_BT: Array
    tower: text.TowerInput | None = None
    z_BTKE: Array | None = None


@struct.dataclass
class Sums:
    """Totals over the tokens of a batch; add them up, then divide by `weight`."""

    loss: Array
    weight: Array
    memory_share: Array

    def __add__(self, other: Sums) -> Sums:
        """Totals of two batches."""
        return jax.tree.map(jnp.add, self, other)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder and its grounding: everything that is the same at every step."""

    decoder: Decoder
    tower: TextTower | None = None
    readout: Readout = "token"
    search: Search | None = None
    shuffled: bool = False
    loss_chunk: int = 0
    microbatches: int = 1

    def init(self, key: Array) -> Any:
        """Boxed decoder parameters."""
        tokens_BT = jnp.zeros((1, 2), jnp.int32)
        z_BTKE = None
        if self.decoder.fusion_layers:
            z_BTKE = jnp.zeros((1, 2, 1, self.decoder.memory_width), jnp.float32)
        return self.decoder.clone(deterministic=True).init(key, tokens_BT, z_BTKE)["params"]

    def features(self, frozen: Mapping[str, Any], batch: Batch) -> Array | None:
        """Grounding features z [B, T, K, E], or None for a plain decoder.

        frozen: "tower", the text tower's parameters; with a search on the devices also
        "index", the image embeddings.
        """
        z_BTKE = batch.z_BTKE
        if z_BTKE is None and self.tower is not None and batch.tower is not None:
            z_BTKE = text.features(self.tower, frozen["tower"], batch.tower, readout=self.readout)
            if self.search is not None:
                z_BTKE = self.search(z_BTKE[:, :, 0], frozen.get("index"))
        if z_BTKE is not None and self.shuffled:
            z_BTKE = text.shuffled(z_BTKE)
        if z_BTKE is None:
            return None
        # A search leaves rows on all axes of the mesh; the fusion layers would be drawn there.
        return nn.with_logical_constraint(z_BTKE, ("batch", "length", None, None))

    def loss(
        self, params: Any, frozen: Mapping[str, Any], batch: Batch, key: Array | None = None
    ) -> Sums:
        """Summed cross-entropy in nats over the real targets; key: for dropout, None without."""
        decoder = self.decoder.clone(deterministic=key is None)
        rngs = None if key is None else {"dropout": key}
        hidden: Any = decoder.apply(
            {"params": params},
            batch.tokens_BT,
            self.features(frozen, batch),
            method="hidden",
            rngs=rngs,
        )
        weight = jnp.sum(batch.weights_BT)
        share = jnp.zeros(())
        if hidden.memory_share_LBT is not None:
            share = jnp.sum(jnp.mean(hidden.memory_share_LBT, axis=0) * batch.weights_BT)

        def nats(table_VD: Array, hidden_BTD: Array, targets_BT: Array, weights_BT: Array) -> Array:
            held = {"params": {**params, "wte": table_VD}}
            logits_BTV: Any = decoder.apply(held, hidden_BTD, method="logits")
            return jnp.sum(cross_entropy(logits_BTV, targets_BT) * weights_BT)

        if not self.loss_chunk:
            rows = (hidden.hidden_BTD, batch.targets_BT, batch.weights_BT)
            loss = nats(params["wte"], *rows)
            return Sums(loss, weight, share)

        # Here once, else the backward pass of every chunk would gather it again.
        table_VD = _gathered(params["wte"])

        def chunks(x: Array) -> Array:
            """[B, T, ...] to [T / chunk, B, chunk, ...]."""
            cut = x.reshape(x.shape[0], -1, self.loss_chunk, *x.shape[2:])
            return jnp.moveaxis(cut, 1, 0)

        parts = jax.lax.map(
            lambda part: jax.checkpoint(nats)(_gathered(table_VD), *part),
            (chunks(hidden.hidden_BTD), chunks(batch.targets_BT), chunks(batch.weights_BT)),
        )
        return Sums(jnp.sum(parts), weight, share)

    def gradients(
        self, params: Any, frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Gradients of the mean loss per real token over the whole batch, and its metrics.

        Microbatches are summed token by token, so the result is that of the one big batch also
        when their rows hold different numbers of real tokens.
        """

        def total(params: Any, part: Batch, key: Array) -> tuple[Array, Sums]:
            sums = self.loss(params, frozen, part, key)
            return sums.loss, sums

        gradient, count = jax.grad(total, has_aux=True), self.microbatches
        if count == 1:
            grads, sums = gradient(params, batch, key)
        else:
            parts = microbatches.split(batch, count)

            def accumulate(carry: tuple[Any, Sums], at: tuple[Batch, Array]) -> tuple[Any, None]:
                part, index = at
                grads, sums = gradient(params, part, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, carry, (grads, sums)), None

            zero = jnp.zeros(())
            start = (jax.tree.map(jnp.zeros_like, params), Sums(zero, zero, zero))
            (grads, sums), _ = jax.lax.scan(accumulate, start, (parts, jnp.arange(count)))
        metrics = {"train/loss": sums.loss / sums.weight}
        if self.decoder.fusion_layers:
            metrics["train/grounding_attention"] = sums.memory_share / sums.weight
        return jax.tree.map(lambda g: g / sums.weight, grads), metrics


@jax.custom_vjp
def _gathered(table_VD: Array) -> Array:
    """The table whole along the model's width; its gradient is split as the table was.

    A plain constraint would hold for the gradient too, which would then be added up whole.
    """
    return nn.with_logical_constraint(table_VD, ("vocab", None))


_gathered.defvjp(
    lambda table_VD: (_gathered(table_VD), None),
    lambda _, gradient_VD: (nn.with_logical_constraint(gradient_VD, ("vocab", "embed")),),
)


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> Array:
    """-log softmax(logits)[target] [B, T], in fp32 nats.

    The target's logit is picked by a mask: a gather's gradient is a scatter into [B, T, V], and
    needs all of a vocabulary that is split over devices.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    entry_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2)
    at_target_BTV = entry_BTV == targets_BT[..., None]
    picked_BT = jnp.sum(jnp.where(at_target_BTV, logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
