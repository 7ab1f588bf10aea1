"""Models small enough to compile in seconds, and rows for them, that several tests share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.grounding.text import TowerInput
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.objectives import language_model

VOCAB = 90  # of a table padded to 96 rows
CONFIG = DecoderConfig(
    layers=3, width=32, heads=4, vocab_multiple=32, dropout=0.0, attention_dropout=0.0
)
PAPER_FUSION = FusionConfig()
TOWER = TowerConfig(
    layers=2,
    width=32,
    heads=2,
    mlp_width=64,
    projection=24,
    vocab_size=64,
    context=18,
    start_id=62,
    end_id=63,
)


def decoder(
    config: DecoderConfig = CONFIG, fusion: FusionConfig = PAPER_FUSION, **fields: Any
) -> Decoder:
    """A decoder over `VOCAB` entries; fields: the other fields of `Decoder`."""
    return Decoder(config, fusion, vocab_size=VOCAB, **fields)


def decoder_params(model: Decoder, *, seed: int = 0) -> Any:
    """Parameters of a decoder, see `random_params`."""
    return random_params(language_model.Model(model).init, seed=seed)


def tower_params(config: TowerConfig = TOWER, *, seed: int = 0) -> Any:
    """Parameters of a tower, see `random_params`."""
    tokens, starts = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)

    def init(key: jax.Array) -> Any:
        return TextTower(config).init(key, tokens, starts, readout="token")["params"]

    return random_params(init, seed=seed)


def random_params(init: Callable[[jax.Array], Any], *, seed: int) -> Any:
    """Unboxed parameters as `init` shapes them, none at a value (0, 1) that could hide its part.

    Made with numpy, without compiling the initializers: matrices N(0, 0.2), biases N(0, 0.1), norms
    around 1, the bias on the memory -10.
    """
    rng = np.random.default_rng(seed)

    def value(path: Any, x: Any) -> np.ndarray:
        name = path[-1].key
        center = {"scale": 1.0, "logit_bias": -10.0}.get(name, 0.0)
        spread = 0.1 if name in ("scale", "bias", "kv_bias", "logit_bias") else 0.2
        return (center + spread * rng.standard_normal(x.shape)).astype(np.float32)

    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(value, shapes)


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Asks XLA for little: what is compiled here runs once, on small arrays.

    `make test-all` sets OPTIMIZED_TESTS=1: then everything is compiled as users run it.
    """
    jax.config.update("jax_disable_most_optimizations", "OPTIMIZED_TESTS" not in os.environ)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def blind_model(config: DecoderConfig = CONFIG, **fields: Any) -> language_model.Model:
    """BLIND-VALM with the tower `TOWER`, fused in block 1; fields: those of the `Model`."""
    fused = decoder(config, fusion_layers=(1,), memory_width=TOWER.projection)
    return language_model.Model(fused, TextTower(TOWER), **fields)


def blind_batch(*, rows: int = 8, length: int = 24, seed: int = 0) -> language_model.Batch:
    """Random rows, cut at random for the tower, with another number of real targets in each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    real = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    starts = rng.random((rows, length)) < 0.2
    starts[:, :: TOWER.longest_segment] = True
    tower = TowerInput(jnp.asarray(tokens[:, :-1] % 60), jnp.asarray(starts))
    return language_model.Batch(
        jnp.asarray(tokens[:, :-1]),
        jnp.asarray(tokens[:, 1:]),
        jnp.asarray(real, jnp.float32),
        tower=tower,
    )
