"""Golden cases from tokens to logits, gradients and the updates of the reference's trainer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blindvalm_jax import optim, step
from blindvalm_jax.config import OptimizerConfig
from blindvalm_jax.golden import parts
from blindvalm_jax.golden.case import FEATURE, GRADIENT, OUTPUT, RATE, Case, Check
from blindvalm_jax.grounding.retrieval import exact_search
from blindvalm_jax.interop import fairseq
from blindvalm_jax.objectives import language_model

_PAD = 1


def end_to_end(case: Case) -> Iterator[Check]:
    """Tokens to features, neighbours, logits, loss, gradients and updates."""
    arrays, meta = case.arrays, case.meta
    with case.building():
        lm, clip = meta["config"]["lm"], meta["config"]["clip"]
        tokens_BT, targets_BT = jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["targets"])
        vocab = lm["vocab"]
    decoder, params = parts.build_decoder(case, lm)
    tower, tower_params = parts.build_tower(case, clip)
    frozen = {"tower": tower_params}
    inputs = parts.tower_input(reference_clip_ids(arrays["tokens"]))
    yield parts.segment_check(case, inputs)
    z_BTKE = parts.features(tower, tower_params, inputs)
    yield case.check("features", z_BTKE[:, :, 0], arrays["out/features"], FEATURE)
    weights_BT = (targets_BT != _PAD).astype(jnp.float32)
    batch = language_model.Batch(tokens_BT, targets_BT, weights_BT, tower=inputs)
    if "dstore/keys" in arrays:
        with case.building():
            keys, neighbours = jnp.asarray(arrays["dstore/keys"]), lm["K"]
        scores, index = exact_search(z_BTKE[:, :, 0], keys, neighbours=neighbours)
        yield case.check("neighbours", index, arrays["out/knn_index"], 0.0)
        yield case.check("neighbours' scores", scores, arrays["out/knn_score"], FEATURE)
        z_BTKE = keys[index]
        batch = language_model.Batch(tokens_BT, targets_BT, weights_BT, z_BTKE=z_BTKE)

    model = language_model.Model(decoder, tower)
    logits_BTV = jax.jit(decoder.apply)({"params": params}, tokens_BT, z_BTKE, tokens_BT != _PAD)
    yield case.check("logits", logits_BTV[..., :vocab], arrays["out/logits"], OUTPUT)
    nll_BT = language_model.cross_entropy(logits_BTV, targets_BT)
    yield case.check("token losses", nll_BT * weights_BT, arrays["out/nll"] * weights_BT, OUTPUT)
    sums = jax.jit(model.loss)(params, frozen, batch)
    mean = sums.loss / sums.weight
    yield case.check("loss", mean, meta["loss_mean_nats"], OUTPUT)
    yield from _gradients(case, model, params, frozen, batch)
    yield from _updates(case, model, params, frozen, batch)


def reference_clip_ids(tokens: np.ndarray) -> np.ndarray:
    """The reference's map from its tokens to CLIP's: -4, </s> to <eos>, <pad> to 0."""
    return np.where(tokens == 2, 49407, np.where(tokens == _PAD, 0, tokens - 4))


def _gradients(
    case: Case, model: language_model.Model, params: Any, frozen: Any, batch: language_model.Batch
) -> Iterator[Check]:
    """Gradients of the summed loss, as tensors where stored and as norms for every tensor."""
    with case.building():
        stored = case.meta["grad_norms"].items()
        norms = {k.removeprefix("decoder."): float(v) for k, v in stored}
        expected = case.weights("grad/")
    grads = jax.jit(jax.grad(lambda p: model.loss(p, frozen, batch).loss))(params)
    config = model.decoder.config
    tensors = fairseq.save_decoder(
        grads,
        vocab_size=model.decoder.vocab_size,
        layers=config.layers,
        heads=config.heads,
        fusion_layers=model.decoder.fusion_layers,
    )
    yield case.check_names("gradients on one side only", set(tensors), set(norms))
    for name in expected:
        yield case.check_relative(f"gradient {name}", tensors[name], expected[name])
    names = sorted(set(norms) & set(tensors))
    got = np.array([np.linalg.norm(tensors[name]) for name in names], np.float64)
    want = np.array([norms[name] for name in names], np.float64)
    # The key biases of plain blocks have no gradient but rounding (the softmax does not see them).
    worst = largest_ratio(got - want, np.maximum(want, 1e-4 * np.max(want)))
    yield Check(case.name, f"norms of {len(norms)} gradients", worst, GRADIENT)


def largest_ratio(differences: np.ndarray, sizes: np.ndarray) -> float:
    """Largest difference over its size; not a number where any of them is none."""
    return float(np.max(np.abs(differences) / sizes))


def _updates(
    case: Case, model: language_model.Model, params: Any, frozen: Any, batch: language_model.Batch
) -> Iterator[Check]:
    """The reference trainer's updates on one batch, by the train step itself."""
    arrays = case.arrays
    with case.building():
        recipe = case.meta["train"]
        steps = int(recipe["steps"])
        config = OptimizerConfig(
            learning_rate=recipe["lr"],
            warmup_steps=recipe["warmup_updates"],
            warmup_init=recipe["warmup_init_lr"],
            beta1=recipe["betas"][0],
            beta2=recipe["betas"][1],
            epsilon=recipe["eps"],
            weight_decay=recipe["weight_decay"],
            clip_norm=recipe["clip_norm"],
        )
    optimizer = optim.make(config, steps=steps)
    update = jax.jit(
        functools.partial(
            step.train_step,
            model=model,
            optimizer=optimizer,
            rate=optim.schedule(config, steps=steps),
            seed=0,
        )
    )
    state = step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    history = []
    for _ in range(steps):
        state, metrics = update(state, frozen, batch)
        history.append(metrics)

    def series(name: str) -> np.ndarray:
        return np.array([float(metrics[name]) for metrics in history])

    yield case.check("learning rate", series("train/learning_rate"), arrays["train/lr"], RATE)
    losses = arrays["train/loss_mean_nats"]
    yield case.check("loss of the updates", series("train/loss"), losses, OUTPUT)
    norms = arrays["train/grad_norm_before_clip"]
    worst = largest_ratio(series("train/grad_norm") - norms, norms)
    yield Check(case.name, "gradient norm of the updates", worst, GRADIENT)
    final = arrays["train/final_logits_row0_last8"]
    z_BTKE = model.features(frozen, batch)
    logits_BTV = jax.jit(model.decoder.apply)({"params": state.params}, batch.tokens_BT, z_BTKE)
    yield case.check(
        "logits after the updates", logits_BTV[0, -8:, : final.shape[1]], final, OUTPUT
    )
