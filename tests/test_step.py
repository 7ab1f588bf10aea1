"""The update: losses, accumulation, chunks, dropout, the padded table, controls, evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blindvalm_jax import optim, step
from blindvalm_jax.config import OptimizerConfig
from blindvalm_jax.grounding import text
from blindvalm_jax.models.clip import TextTower
from blindvalm_jax.objectives import language_model
from tests import small_models

# A rate and an epsilon at which a rounding error of a gradient stays one in the parameters: with
# Adam's usual epsilon, an entry that is nothing but rounding moves by the whole rate.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=2, warmup_init=5e-3, epsilon=1e-3, clip_norm=1.0
)
DROPOUT = dataclasses.replace(small_models.CONFIG, dropout=0.1, attention_dropout=0.1)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def frozen() -> Any:
    return {"tower": small_models.tower_params()}


@functools.cache
def updater(model: language_model.Model, *, microbatches: int = 1, seed: int = 0) -> Any:
    return jax.jit(
        functools.partial(
            step.train_step,
            model=dataclasses.replace(model, microbatches=microbatches),
            optimizer=optim.make(OPTIMIZER, steps=10),
            rate=optim.schedule(OPTIMIZER, steps=10),
            seed=seed,
        )
    )


def state_of(params: Any) -> step.TrainState:
    optimizer = optim.make(OPTIMIZER, steps=10)
    return step.TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def params_of(model: language_model.Model) -> Any:
    return small_models.decoder_params(model.decoder)


def assert_close(got: Any, want: Any, *, atol: float) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=atol), got, want)


def test_the_loss_is_the_summed_cross_entropy_of_the_real_targets(frozen: Any) -> None:
    model, batch = small_models.blind_model(), small_models.blind_batch()
    params = params_of(model)
    sums = jax.jit(model.loss)(params, frozen, batch)
    z = jax.jit(model.features)(frozen, batch)
    logits: Any = jax.jit(model.decoder.apply)({"params": params}, batch.tokens_BT, z)
    scores = np.asarray(logits, np.float64)[..., : small_models.VOCAB]
    log_sum = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    picked = np.take_along_axis(scores, np.asarray(batch.targets_BT)[..., None], -1)[..., 0]
    weights = np.asarray(batch.weights_BT)
    assert 0 < weights.mean() < 1
    assert float(sums.weight) == weights.sum()
    assert float(sums.loss) == pytest.approx(((log_sum - picked) * weights).sum(), rel=1e-5)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_of_unequal_weight_make_the_update_of_the_one_batch(
    frozen: Any, microbatches: int
) -> None:
    """Three updates; 1e-6 is fp32's rounding of sums in another order. Without dropout."""
    model, batch = small_models.blind_model(), small_models.blind_batch()
    parts = np.asarray(batch.weights_BT).reshape(-1, microbatches, 24).sum(axis=(0, 2))
    assert len(set(parts.tolist())) == microbatches
    whole = split = state_of(params_of(model))
    for _ in range(3):
        whole, want = updater(model)(whole, frozen, batch)
        split, got = updater(model, microbatches=microbatches)(split, frozen, batch)
        assert_close(split.params, whole.params, atol=1e-6)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    assert int(whole.step) == int(split.step) == 3


def test_a_mean_over_microbatches_would_be_seen(frozen: Any) -> None:
    """Guards the test above: the parts' own means differ from the mean of the whole."""
    model, batch = small_models.blind_model(), small_models.blind_batch()
    loss = jax.jit(model.loss)
    params = params_of(model)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    sums = [loss(params, frozen, part) for part in parts]
    mean_of_means = sum(float(s.loss / s.weight) for s in sums) / 2
    whole = loss(params, frozen, batch)
    assert abs(mean_of_means - float(whole.loss / whole.weight)) > 1e-3
    together = sums[0] + sums[1]
    assert_close(together, whole, atol=2e-3)  # a sum of about 800 nats in fp32


@pytest.mark.parametrize("chunk", [1, 8, 24])
def test_chunks_of_the_loss_change_neither_value_nor_gradient(frozen: Any, chunk: int) -> None:
    batch = small_models.blind_batch()
    plain = small_models.blind_model()
    params = params_of(plain)

    def run(model: language_model.Model) -> Any:
        def mean(params: Any) -> Any:
            sums = model.loss(params, frozen, batch)
            return sums.loss / sums.weight

        return jax.jit(jax.value_and_grad(mean))(params)

    assert_close(run(dataclasses.replace(plain, loss_chunk=chunk)), run(plain), atol=1e-5)


def test_padded_rows_of_the_table_stay_zero_through_updates(frozen: Any) -> None:
    model, batch = small_models.blind_model(loss_chunk=8), small_models.blind_batch()
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0)))
    state = state_of(params)
    for _ in range(3):
        state, _ = updater(model)(state, frozen, batch)
    table = np.asarray(state.params["wte"])
    assert (table[small_models.VOCAB :] == 0).all()
    moved = table[: small_models.VOCAB] != np.asarray(params["wte"])[: small_models.VOCAB]
    assert moved.any(axis=1).all()


def test_updates_lower_the_loss_and_report_their_norms(frozen: Any) -> None:
    model, batch = small_models.blind_model(), small_models.blind_batch()
    first = state = state_of(params_of(model))
    losses = []
    for index in range(5):
        before = state
        state, metrics = updater(model)(state, frozen, batch)
        losses.append(float(metrics["train/loss"]))
        rate = optim.schedule(OPTIMIZER, steps=10)(index)
        assert float(metrics["train/learning_rate"]) == pytest.approx(float(rate))
    assert losses == sorted(losses, reverse=True)
    change = jax.tree.map(jnp.subtract, state.params, before.params)
    assert float(metrics["train/update_norm"]) == pytest.approx(
        float(optax.tree.norm(change)), rel=1e-3
    )
    assert float(metrics["train/param_norm"]) == pytest.approx(
        float(optax.tree.norm(state.params)), rel=1e-5
    )
    assert 0 < float(metrics["train/grounding_attention"]) < 1

    def mean(params: Any) -> Any:
        sums = model.loss(params, frozen, batch)
        return sums.loss / sums.weight

    _, metrics = updater(model)(first, frozen, batch)
    norm = float(optax.tree.norm(jax.jit(jax.grad(mean))(first.params)))
    assert norm > OPTIMIZER.clip_norm  # so that a norm after clipping would be seen
    assert float(metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_a_plain_decoder_reports_no_grounding() -> None:
    model = language_model.Model(small_models.decoder())
    batch = dataclasses.replace(small_models.blind_batch(), tower=None)
    assert model.features({}, batch) is None
    state = state_of(params_of(model))
    _, metrics = jax.eval_shape(updater(model), state, None, batch)
    assert "train/grounding_attention" not in metrics


def test_dropout_is_a_function_of_seed_and_step_alone(frozen: Any) -> None:
    model, batch = small_models.blind_model(DROPOUT), small_models.blind_batch()
    state = state_of(params_of(model))

    def loss(state: step.TrainState, seed: int = 0) -> float:
        return float(
            updater(model, microbatches=2, seed=seed)(state, frozen, batch)[1]["train/loss"]
        )

    later = dataclasses.replace(state, step=state.step + 1)
    assert loss(state) == loss(state)
    assert len({loss(state), loss(later), loss(state, seed=1)}) == 3


def test_microbatches_drop_different_entries(frozen: Any) -> None:
    """Two microbatches of the same rows: the step's loss is the mean of two different ones."""
    model, batch = small_models.blind_model(DROPOUT), small_models.blind_batch(rows=4)
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)  # row i goes to i mod 2
    state = state_of(params_of(model))
    _, metrics = updater(model, microbatches=2)(state, frozen, twice)
    key = jax.random.fold_in(jax.random.key(0), 0)
    loss = jax.jit(model.loss)
    parts = [loss(state.params, frozen, batch, jax.random.fold_in(key, i)) for i in range(2)]
    assert abs(float(parts[0].loss - parts[1].loss)) > 0.01
    want = float((parts[0].loss + parts[1].loss) / (2 * parts[0].weight))
    assert float(metrics["train/loss"]) == pytest.approx(want, rel=1e-5)


def test_evaluation_has_no_dropout_and_adds_up(frozen: Any) -> None:
    still, wild = small_models.blind_model(), small_models.blind_model(DROPOUT)
    batch, params = small_models.blind_batch(), params_of(still)

    @functools.partial(jax.jit, static_argnames="model")
    def evaluate(
        batch: language_model.Batch, *, model: language_model.Model
    ) -> language_model.Sums:
        return model.loss(params, frozen, batch)

    whole = evaluate(batch, model=wild)
    assert_close(whole, evaluate(batch, model=still), atol=0)
    halves = [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in (slice(4), slice(4, 8))]
    total = evaluate(halves[0], model=wild) + evaluate(halves[1], model=wild)
    assert_close(total, whole, atol=2e-3)  # a sum of about 800 nats in fp32
    nothing = dataclasses.replace(batch, weights_BT=jnp.zeros_like(batch.weights_BT))
    assert [float(x) for x in jax.tree.leaves(evaluate(nothing, model=wild))] == [0, 0, 0]


def test_the_shuffled_control_sees_another_row_s_text_only(frozen: Any) -> None:
    honest = small_models.blind_model()
    control = small_models.blind_model(shuffled=True)
    batch = small_models.blind_batch(rows=4)
    features = jax.jit(lambda batch: honest.features(frozen, batch))
    shuffled = jax.jit(lambda batch: control.features(frozen, batch))
    z, other = np.asarray(features(batch)), np.asarray(shuffled(batch))
    for row in range(4):
        np.testing.assert_array_equal(other[row], z[row - 1])
        assert (np.abs(other[row] - z[row]).max(axis=-1) > 0.01).any()
    tower = batch.tower
    assert tower is not None
    changed = tower.tokens_BS.at[2].set((tower.tokens_BS[2] + 7) % 60)
    batch = dataclasses.replace(batch, tower=dataclasses.replace(tower, tokens_BS=changed))
    moved = (np.asarray(shuffled(batch)) != other).any(axis=(1, 2, 3))
    assert moved.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(text.shuffled(jnp.asarray(z)), other)


def test_features_given_with_the_batch_are_used_as_they_are(frozen: Any) -> None:
    """What retrieval brings: K vectors a token, and no tower."""
    model = small_models.blind_model()
    batch, params = small_models.blind_batch(rows=2), params_of(small_models.blind_model())
    z = jax.jit(model.features)(frozen, batch)
    given = dataclasses.replace(batch, tower=None, z_BTKE=z)
    loss = jax.jit(model.loss)
    assert_close(loss(params, None, given), loss(params, frozen, batch), atol=1e-4)
    four = dataclasses.replace(given, z_BTKE=jnp.concatenate([z, -z, z, 0.5 * z], axis=2))
    assert abs(float(loss(params, None, four).loss) - float(loss(params, None, given).loss)) > 0.1


def operand_dtypes(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Operand dtypes of every matrix product in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (str(x.aval.dtype) for x in equation.invars)
            yield left, right
        for inside in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inside, "eqns"):
                yield from operand_dtypes(inside)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chunk", [0, 8])
def test_every_product_of_an_update_is_computed_in_its_dtype(
    frozen: Any, dtype: str, chunk: int
) -> None:
    """Forward and backward; one fp32 cotangent would make its two products fp32 ones."""
    decoder = small_models.decoder(
        DROPOUT,
        fusion_layers=(1,),
        memory_width=small_models.TOWER.projection,
        dtype=jnp.dtype(dtype),
    )
    tower = TextTower(small_models.TOWER, dtype=jnp.dtype(dtype))
    model = language_model.Model(decoder, tower, loss_chunk=chunk)
    state = state_of(params_of(model))
    update = updater(model, microbatches=2)
    found = list(operand_dtypes(jax.make_jaxpr(update)(state, frozen, small_models.blind_batch())))
    # 3 blocks, the logits and the projection of the memory, each forward and twice backward
    assert len(found) > 3 * 8
    assert set(found) == {(dtype, dtype)}
