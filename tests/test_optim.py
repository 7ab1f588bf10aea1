"""Schedules against their closed forms and the reference's trainer; decay; clipping."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blindvalm_jax import optim, trees
from blindvalm_jax.config import FusionConfig, OptimizerConfig
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.objectives.contrastive_model import Model
from tests import small_models, test_contrastive

GOLDEN = Path(__file__).parent / "golden" / "reference"
STEPS = 1000
PAPER = OptimizerConfig(warmup_steps=40)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def rates(config: OptimizerConfig, at: list[int], *, steps: int = STEPS) -> np.ndarray:
    return np.asarray(optim.schedule(config, steps=steps)(jnp.asarray(at)))


def warmup(step: int) -> float:
    return 1e-7 + (2e-3 - 1e-7) * step / 40


@pytest.mark.parametrize("name", ["inverse_sqrt", "cosine", "constant_cooldown"])
def test_warm_up_is_linear_from_its_first_rate_to_the_peak(name: str) -> None:
    found = rates(dataclasses.replace(PAPER, schedule=name), [0, 1, 10, 39, 40])
    np.testing.assert_allclose(found, [1e-7, *map(warmup, (1, 10, 39)), 2e-3], rtol=1e-5)


def test_inverse_sqrt_falls_with_the_root_of_the_step() -> None:
    at = [40, 41, 160, 999, 100_000]
    want = [2e-3 * math.sqrt(40 / step) for step in at]
    np.testing.assert_allclose(rates(PAPER, at), want, rtol=1e-6)


def test_cosine_falls_to_its_final_fraction_and_stays() -> None:
    config = dataclasses.replace(PAPER, schedule="cosine", final_fraction=0.25)
    at = [40, 280, 520, 760, 1000, 2000]
    done = [0, 0.25, 0.5, 0.75, 1, 1]
    want = [2e-3 * (0.25 + 0.75 * (1 + math.cos(math.pi * d)) / 2) for d in done]
    np.testing.assert_allclose(rates(config, at), want, rtol=1e-5)
    assert want[2] == pytest.approx(1.25e-3)


def test_constant_cooldown_is_flat_and_then_loses_a_root() -> None:
    config = dataclasses.replace(PAPER, schedule="constant_cooldown", cooldown_fraction=0.4)
    at = [40, 300, 600, 700, 900, 999, 1000, 1500]
    want = [2e-3, 2e-3, 2e-3, *(2e-3 * (1 - math.sqrt(x)) for x in (0.25, 0.75, 399 / 400)), 0, 0]
    np.testing.assert_allclose(rates(config, at), want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["inverse_sqrt", "cosine", "constant_cooldown"])
def test_without_warm_up_the_first_update_has_the_peak(name: str) -> None:
    config = dataclasses.replace(PAPER, schedule=name, warmup_steps=0)
    np.testing.assert_allclose(rates(config, [0]), [2e-3], rtol=1e-6)


def test_inverse_sqrt_gives_the_rates_of_the_reference_s_trainer() -> None:
    """Six updates as fairseq made them; 1e-9 is fp32's rounding of rates up to about 1e-2."""
    recipe = json.loads((GOLDEN / "end_to_end_valm_c.json").read_text())["train"]
    want = np.load(GOLDEN / "end_to_end_valm_c.npz")["train/lr"]
    config = OptimizerConfig(
        learning_rate=recipe["lr"],
        warmup_steps=recipe["warmup_updates"],
        warmup_init=recipe["warmup_init_lr"],
    )
    assert len(set(want.tolist())) > 4
    np.testing.assert_allclose(rates(config, list(range(6))), want, rtol=0, atol=1e-9)


def grounded_params() -> Any:
    """Parameters of every kind: learned positions, own projections, adapter, bias on the memory."""
    model = small_models.decoder(
        dataclasses.replace(small_models.CONFIG, positions="learned"),
        FusionConfig(grounding_kv="own", memory_bias="learned"),
        fusion_layers=(1,),
        memory_width=24,
    )
    return small_models.decoder_params(model)


# Kernels and biases, gains and biases: of all blocks, wherever the stack is cut.
BLOCK = {
    f"{part}/{name}"
    for part in ("attn/qkv", "attn/out", "c_fc", "c_proj")
    for name in ("kernel", "bias")
}
NORMS = {f"{part}/{name}" for part in ("ln_1", "ln_2") for name in ("scale", "bias")}
KERNELS = {name for name in BLOCK if name.endswith("/kernel")}


def within(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}/{name}" for name in names}


def decayed(config: OptimizerConfig, params: Any) -> set[str]:
    """Names of what an update without a gradient changes: AdamW then only decays, by rate x weight.

    To 1e-5 of each value: fp32's rounding of the product.
    """
    optimizer = optim.make(config, steps=STEPS)

    @jax.jit
    def update(params: Any) -> Any:
        zero = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zero, optimizer.init(params), params)[0]

    values, found = trees.flatten(params), set()
    for name, change in trees.flatten(update(params)).items():
        if np.asarray(change).any():
            found.add(name)
            expected = -config.warmup_init * config.weight_decay * values[name]
            np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-9)
    return found


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_of_a_decoder_takes_what_it_says(decay: str) -> None:
    params = grounded_params()
    memory = {"attn/memory/adapter/kernel", "attn/memory/kv_kernel"}
    plain = [f"h/{name}" for name in ("blocks_0_0", "blocks_2_2", "fusion_1")]
    matrices = {"wte", "wpe"} | within("h/fusion_1", memory)
    matrices = matrices.union(*(within(block, KERNELS) for block in plain))
    vectors = within("h/fusion_1/attn/memory", {"adapter/bias", "kv_bias", "logit_bias"})
    vectors |= within("h/fusion_1/attn/memory/norm", {"scale", "bias"})
    vectors |= within("ln_f", {"scale", "bias"})
    vectors = vectors.union(*(within(block, BLOCK - KERNELS | NORMS) for block in plain))
    assert set(trees.flatten(params)) == matrices | vectors
    config = dataclasses.replace(PAPER, decay=decay, weight_decay=0.5, warmup_init=1e-2)
    assert decayed(config, params) == (matrices | vectors if decay == "all" else matrices)


@pytest.mark.parametrize("decay", ["all", "matrices"])
@test_contrastive.BOTH
def test_decay_of_a_clip_takes_what_it_says_and_never_the_temperature(
    config: ClipConfig, decay: str
) -> None:
    params = small_models.random_params(Model(Clip(config)).init, seed=0)
    text = within("h/blocks_0_1", KERNELS)
    text |= {"token_embedding", "position_embedding", "text_projection"}
    vectors = within("h/blocks_0_1", BLOCK - KERNELS | NORMS) | {"ln_final/scale", "ln_final/bias"}
    matrices, vectors = within("text", text), within("text", vectors)
    layers = config.vision.layers
    if config.vision.kind == "vit":
        image = {"patch_embedding", "class_embedding", "position_embedding", "visual_projection"}
        image |= within(f"h/blocks_0_{layers - 1}", KERNELS)
        others = within(f"h/blocks_0_{layers - 1}", BLOCK - KERNELS | NORMS)
        others |= {f"{norm}/{name}" for norm in ("ln_pre", "ln_post") for name in ("scale", "bias")}
    else:
        parts = [*(f"conv_{n}" for n in range(len(config.vision.channels))), "hidden"]
        image = {"visual_projection", *(f"{part}/kernel" for part in parts)}
        others = {f"{part}/bias" for part in parts}
    matrices, vectors = matrices | within("vision", image), vectors | within("vision", others)
    assert set(trees.flatten(params)) == matrices | vectors | {"logit_scale"}
    assert params["logit_scale"] != 0
    given = dataclasses.replace(PAPER, decay=decay, weight_decay=0.5, warmup_init=1e-2)
    assert decayed(given, params) == (matrices | vectors if decay == "all" else matrices)


def first_update(config: OptimizerConfig, grads: Any, params: Any) -> Any:
    optimizer = optim.make(config, steps=STEPS)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def test_gradients_are_clipped_by_their_global_norm_before_adam_sees_them() -> None:
    """With a large epsilon Adam's first update is -rate * gradient / epsilon, nearly."""
    config = dataclasses.replace(
        PAPER,
        warmup_init=1.0,
        epsilon=1e6,
        epsilon_beside="corrected",
        weight_decay=0.0,
        clip_norm=2.0,
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0, 12.0], [0.0, 0.0]])}  # norm 13

    def seen(config: OptimizerConfig, grads: Any) -> Any:
        return jax.tree.map(lambda x: -1e6 * x, first_update(config, grads, params))

    def close(found: Any, factor: float) -> None:
        for name, gradient in grads.items():
            np.testing.assert_allclose(found[name], factor * gradient, rtol=1e-4)

    close(seen(config, grads), 2 / 13)
    close(seen(dataclasses.replace(config, clip_norm=0.0), grads), 1.0)
    small = jax.tree.map(lambda g: g / 13, grads)
    close(seen(config, small), 1 / 13)


@pytest.mark.parametrize("beside", ["uncorrected", "corrected"])
def test_updates_are_adamw_s(beside: str) -> None:
    """Two updates of Loshchilov and Hutter's algorithm 2, by hand in float64.

    Gradients of epsilon's size tell where it is added.
    """
    config = dataclasses.replace(
        PAPER, clip_norm=0.0, weight_decay=0.1, warmup_steps=2, epsilon_beside=beside
    )
    rng = np.random.default_rng(0)
    value, grads = rng.standard_normal(5), rng.standard_normal((2, 5))
    grads[:, 3:] *= 1e-8
    optimizer = optim.make(config, steps=STEPS)
    params: Any = {"kernel": jnp.asarray(value, jnp.float32)}
    state = optimizer.init(params)
    m, v = np.zeros(5), np.zeros(5)
    for index, gradient in enumerate(grads):
        rate = 1e-7 + (2e-3 - 1e-7) * index / 2
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        mean, unbiased = m / (1 - 0.9 ** (index + 1)), 1 - 0.98 ** (index + 1)
        root = np.sqrt(v / unbiased) + 1e-8
        if beside == "uncorrected":
            root = (np.sqrt(v) + 1e-8) / np.sqrt(unbiased)
        value = value - rate * (mean / root + 0.1 * value)
        tree = {"kernel": jnp.asarray(gradient, jnp.float32)}
        updates, state = jax.jit(optimizer.update)(tree, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], value, rtol=0, atol=1e-6)
