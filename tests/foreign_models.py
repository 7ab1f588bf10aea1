"""Random models of ours, and directories in the formats of others, that the interop tests share."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from blindvalm_jax import trees
from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.interop import weights
from blindvalm_jax.models.clip import TextTower, TowerConfig

GOLDEN = Path(__file__).parent / "golden"

TOWER = TowerConfig(
    layers=2,
    width=16,
    heads=4,
    mlp_width=24,
    projection=12,
    vocab_size=50,
    context=14,
    start_id=48,
    end_id=49,
)

GPT2 = weights.DecoderSpec(
    decoder=DecoderConfig(
        layers=3,
        width=16,
        heads=2,
        mlp_width=40,
        vocab_size=50,
        vocab_multiple=16,
        positions="learned",
        max_positions=10,
        embedding_scale="none",
        activation="gelu_tanh",
        init="gpt2",
        fusion_layers=(),
    ),
    fusion=FusionConfig(),
    vocab_size=50,
)

BLIND = weights.DecoderSpec(
    decoder=DecoderConfig(
        layers=4,
        width=16,
        heads=2,
        mlp_width=40,
        vocab_size=50,
        vocab_multiple=16,
        fusion_layers=(2,),
    ),
    fusion=FusionConfig(),
    vocab_size=50,
    fusion_layers=(2,),
    memory_width=16,
)


def random_params(config: weights.Spec, *, seed: int = 0) -> dict[str, Any]:
    """Parameters N(0, 0.3^2) of a module; padded rows of the vocabulary are zero, as always."""
    generator = np.random.default_rng(seed)
    flat = {
        path: (0.3 * generator.standard_normal(value.shape)).astype(np.float32)
        for path, value in weights.abstract_params(config).items()
    }
    if isinstance(config, weights.DecoderSpec):
        flat["wte"][config.vocab_size :] = 0.0
    return trees.unflatten(flat)


def assert_equal(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Equal paths, dtypes and bits."""
    assert weights.params_sha256(got) == weights.params_sha256(expected)


def write_hugging_face(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    """A model directory with config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory / "model.safetensors", tensors)
    return directory


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A safetensors file."""
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return path


@functools.partial(jax.jit, static_argnames=("module", "readout"))
def _apply(module: nn.Module, params: Any, *inputs: jax.Array | None, **readout: Any) -> Any:
    return module.apply({"params": params}, *inputs, **readout)


def logits(
    spec: weights.DecoderSpec,
    params: Any,
    ids: np.ndarray,
    z: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [B, T, V] of a decoder, padded entries left out."""
    inputs = [None if x is None else jnp.asarray(x) for x in (ids, z, valid)]
    return np.asarray(_apply(spec.module(), params, *inputs))[..., : spec.vocab_size]


def features(config: TowerConfig, params: Any, ids: np.ndarray) -> np.ndarray:
    """Features [B, T, E] of texts between a start and an end token.

    The last one is what the tower's <eos> readout says after the last token.
    """
    tokens, tower = jnp.asarray(ids[:, 1:-1]), TextTower(config)
    starts = jnp.zeros(tokens.shape, bool)
    own = _apply(tower, params, tokens, starts, readout="token")
    pooled = _apply(tower, params, tokens, starts, readout="eos")[:, -1:]
    return np.concatenate([own, pooled], axis=1)


def golden(
    name: str, *, inputs: str = "ids"
) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """config.json, tensors, inputs and expected output of a file of make_golden.py."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    tensors = {n.removeprefix("tensor/"): x for n, x in arrays.items() if n.startswith("tensor/")}
    return json.loads(str(arrays["config"])), tensors, arrays[inputs], arrays["expected"]
