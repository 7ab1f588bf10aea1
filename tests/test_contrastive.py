"""Both towers together: features, loss and scale against plain numpy, the same on every mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax import memory, partitioning, trees
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.models import contrastive
from blindvalm_jax.models.clip import TextTower
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.vision import VisionTower
from blindvalm_jax.objectives import contrastive_model
from blindvalm_jax.objectives.contrastive import recall
from tests import small_models, test_step, test_vision

CONFIG = ClipConfig(
    text=small_models.TOWER, vision=test_vision.VIT, temperature_start=10.0, temperature_cap=50.0
)
CONV = dataclasses.replace(CONFIG, vision=test_vision.CONV)
BOTH = pytest.mark.parametrize("config", [CONFIG, CONV], ids=["vit", "conv"])


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def captions(
    config: ClipConfig, *, rows: int = 4, size: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, S] with the end id behind each caption and other ids after it, and lengths [B].

    The first caption is empty, the last as long as it can be.
    """
    rng = np.random.default_rng(seed)
    size = config.text.context - 1 if size is None else size
    tokens = rng.integers(0, config.text.start_id, (rows, size)).astype(np.int32)
    length = rng.integers(1, size, rows)
    length[0], length[-1] = 0, size - 1
    tokens[np.arange(rows), length] = config.text.end_id
    return tokens, length.astype(np.int32)


def images_for(config: ClipConfig, *, rows: int = 4) -> np.ndarray:
    return test_vision.images_for(config.vision, rows=rows)


@functools.cache
def params_of(config: ClipConfig) -> Any:
    def init(key: jax.Array) -> Any:
        return Clip(config).init(key, images_for(config), *captions(config))["params"]

    params = small_models.random_params(init, seed=0)
    return params | {"logit_scale": np.float32(np.log(12.0))}


@functools.cache
def compiled(config: ClipConfig, method: str) -> Any:
    return jax.jit(functools.partial(Clip(config).apply, method=method))


def encode(config: ClipConfig, method: str, *inputs: np.ndarray) -> Any:
    arrays = [jnp.asarray(x) for x in inputs]
    return compiled(config, method)({"params": params_of(config)}, *arrays)


@BOTH
def test_parameters_are_those_of_the_towers_and_the_scale(config: ClipConfig) -> None:
    params = params_of(config)
    assert sorted(params) == ["logit_scale", "text", "vision"]
    tokens, length = captions(config)
    images = images_for(config)
    found = encode(config, "__call__", images, tokens, length)
    assert float(found.scale) == pytest.approx(12.0, rel=1e-6)
    alone = test_vision.features(config.vision, params["vision"], images)
    # Compiled on its own: fp32 sums in another order.
    np.testing.assert_allclose(found.image_BE, alone, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(encode(config, "encode_image", images), found.image_BE)
    np.testing.assert_array_equal(encode(config, "encode_text", tokens, length), found.text_BE)
    text = functools.partial(TextTower(config.text).init, readout="token")
    for side, init, inputs in (
        ("text", text, (tokens, tokens == 0)),
        ("vision", VisionTower(config.vision).init, (images,)),
    ):
        own: Any = jax.eval_shape(init, jax.random.key(0), *inputs)
        shapes = {path: x.shape for path, x in trees.flatten(params[side]).items()}
        assert shapes == {path: x.value.shape for path, x in trees.flatten(own["params"]).items()}


@pytest.mark.parametrize("context", [18, 16])
def test_the_end_token_says_what_the_tower_says_if_the_text_ended_there(context: int) -> None:
    """Against the readout over all prefixes, of the texts packed into one row, to 1e-5 in fp32.

    With context 18 the longest caption and its end token are one more than a block of keys.
    """
    text = dataclasses.replace(CONFIG.text, context=context)
    config = dataclasses.replace(CONFIG, text=text)
    tokens, length = captions(config, rows=5, seed=context)
    found = encode(config, "encode_text", tokens, length)

    texts = [row[:size] for row, size in zip(tokens, length, strict=True)]
    starts = np.concatenate([np.arange(len(one)) == 0 for one in texts])
    tower, params = TextTower(text), params_of(config)["text"]
    packed = np.asarray(
        jax.jit(functools.partial(tower.apply, readout="eos"))(
            {"params": params}, jnp.asarray(np.concatenate(texts))[None], jnp.asarray(starts)[None]
        )
    )[0]
    # Index 0 is the empty text; each text's last token stands at the sum of lengths so far.
    want = packed[np.where(length == 0, 0, np.cumsum(length))]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    assert length.max() == text.longest_segment
    assert np.abs(want[1] - want[2]).max() > 0.01


def test_nothing_behind_the_end_token_counts() -> None:
    """Exactly, and short rows give what long ones give, to the rounding of sums of other length."""
    tokens, length = captions(CONFIG, size=10)
    found = encode(CONFIG, "encode_text", tokens, length)
    behind = np.arange(10)[None] > length[:, None]
    other = np.where(behind, CONFIG.text.end_id, tokens)
    assert (other != tokens).any()
    np.testing.assert_array_equal(encode(CONFIG, "encode_text", other, length), found)
    longer = np.pad(tokens, ((0, 0), (0, 7)))
    np.testing.assert_allclose(
        encode(CONFIG, "encode_text", longer, length), found, rtol=0, atol=1e-6
    )
    before = np.where(behind | (tokens == CONFIG.text.end_id), tokens, (tokens + 1) % 60)
    changed = np.abs(encode(CONFIG, "encode_text", before, length) - found).max(axis=1)
    assert (changed[1:] > 0.01).all()


def test_a_length_outside_the_row_gives_no_number() -> None:
    tokens, _ = captions(CONFIG, size=10)
    found = encode(CONFIG, "encode_text", tokens, np.array([-1, 10, 9, 0], np.int32))
    assert np.isnan(found).all(axis=1).tolist() == [True, True, False, False]


def test_captions_beyond_the_context_are_refused() -> None:
    tokens, length = captions(CONFIG, size=18)
    with pytest.raises(ValueError, match="with their end token must fit in 17 places, got 18"):
        Clip(CONFIG).apply({"params": params_of(CONFIG)}, tokens, length, method="encode_text")


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_product_is_computed_in_the_dtype_of_the_towers(
    config: ClipConfig, dtype: str
) -> None:
    """Forward and backward, in both towers; the cosines of the loss are left out, they are fp32."""
    inputs = images_for(config), *captions(config)

    def total(params: Any) -> jax.Array:
        found: Any = Clip(config, dtype=jnp.dtype(dtype)).apply({"params": params}, *inputs)
        return jnp.sum(found.image_BE) + jnp.sum(found.text_BE)

    jaxpr = jax.make_jaxpr(jax.grad(total))(params_of(config))
    assert set(test_step.operand_dtypes(jaxpr.jaxpr)) == {(dtype, dtype)}


def unit_rows(rows: int, width: int, *, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, width))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_the_loss_is_the_mean_of_two_cross_entropies() -> None:
    """Row by row in float64; fp32 logits up to 100 are exact to 1e-5."""
    image, text = unit_rows(6, 8, seed=0), unit_rows(6, 8, seed=1)
    for scale in (1.0, 14.3, 100.0):
        logits = scale * image.astype(np.float64) @ text.astype(np.float64).T
        terms = []
        for row in range(6):
            for options in (logits[row], logits[:, row]):
                terms.append(-np.log(np.exp(options[row]) / np.exp(options).sum()))
        found = contrastive.contrastive_loss(
            jnp.asarray(image), jnp.asarray(text), jnp.float32(scale)
        )
        assert found == pytest.approx(np.mean(terms), rel=1e-6, abs=2e-5)


def test_the_loss_of_no_knowledge_and_of_all() -> None:
    same = jnp.asarray(np.repeat(unit_rows(1, 8, seed=0), 6, axis=0))
    apart = jnp.eye(6, 8)
    assert contrastive.contrastive_loss(same, same, jnp.float32(50)) == pytest.approx(
        np.log(6), abs=1e-5
    )
    assert contrastive.contrastive_loss(apart, apart, jnp.float32(50)) == pytest.approx(0, abs=1e-6)


def test_the_scale_below_its_cap_is_exp_with_its_gradient() -> None:
    for value in (0.0, 2.3, 3.9):
        for cotangent in (1.0, -1.0):
            scale, pull = jax.vjp(lambda s: contrastive.capped_scale(s, 50.0), jnp.float32(value))
            assert scale == pytest.approx(np.exp(value), rel=1e-6)
            assert pull(jnp.float32(cotangent))[0] == pytest.approx(
                cotangent * np.exp(value), rel=1e-6
            )


@pytest.mark.parametrize("past", [0.0, 0.02])
def test_the_scale_stays_at_its_cap_and_can_come_down(past: float) -> None:
    """As with CLIP's clamp; 50 as fp32, whose exp(log) may be a rounding below."""
    start = jnp.float32(np.nextafter(np.float32(np.log(50.0)), np.float32(9)) + np.float32(past))

    def scale(value: jax.Array) -> jax.Array:
        return contrastive.capped_scale(value, 50.0)

    assert scale(start) == 50.0
    assert jax.grad(lambda s: -scale(s))(start) == 0.0  # descent would raise it
    assert jax.grad(scale)(start) == 50.0
    value = start
    for _ in range(5):
        value = value - 1e-3 * jax.grad(scale)(value)
    assert scale(value) < 45.0


def test_training_against_the_cap_does_not_run_away_from_it() -> None:
    """Perfect features ask for an ever larger scale: descent stops within one update of the cap."""
    features = jnp.asarray(unit_rows(4, 8, seed=0))

    @jax.jit
    def update(value: jax.Array) -> jax.Array:
        def loss(value: jax.Array) -> jax.Array:
            scale = contrastive.capped_scale(value, 5.0)
            return contrastive.contrastive_loss(features, features, scale)

        return value - 0.3 * jax.grad(loss)(value)

    values = [jnp.float32(1.0)]
    for _ in range(30):
        values.append(update(values[-1]))
    largest_update = max(float(b - a) for a, b in zip(values, values[1:], strict=False))
    assert values[1] > values[0]
    assert np.log(5.0) <= values[-1] <= np.log(5.0) + largest_update
    assert values[-1] == values[-2]


def test_recall_counts_partners_among_the_nearest() -> None:
    image, text = unit_rows(9, 4, seed=0), unit_rows(9, 4, seed=1)
    apart = np.arange(9)[:, None]
    cosine = image.astype(np.float64) @ text.astype(np.float64).T
    for rank in (1, 3, 9):
        rows = [i in np.argsort(-cosine[i])[:rank] for i in range(9)]
        columns = [i in np.argsort(-cosine[:, i])[:rank] for i in range(9)]
        found = recall(image, text, apart, rank=rank)
        assert found == (float(np.mean(rows)), float(np.mean(columns)))
    assert recall(image, text, apart, rank=3) != recall(text[::-1], text, apart, rank=3)
    assert recall(image, image, apart, rank=1) == (1.0, 1.0)


def test_recall_takes_equal_captions_for_one_text() -> None:
    """Two images swapped among pairs of one caption are found, among pairs of two they are not."""
    text = unit_rows(6, 4, seed=0)
    image = text[[1, 0, 2, 3, 4, 5]]
    assert recall(image, text, np.array([[7], [7], [1], [2], [3], [4]]), rank=1) == (1.0, 1.0)
    apart = recall(image, text, np.array([[7], [8], [1], [2], [3], [4]]), rank=1)
    assert apart.image_to_text == apart.text_to_image == pytest.approx(4 / 6)


def test_recall_in_blocks_of_queries_is_that_of_all_at_once() -> None:
    """Whole numbers, so that no sum is rounded and many rivals are exactly as near."""
    rng = np.random.default_rng(0)
    image, text = rng.integers(-2, 3, (2, 101, 6)).astype(np.float32)
    text[:60] = image[:60] + rng.integers(-1, 2, (60, 6))
    tokens = rng.integers(0, 40, (101, 1))
    cosine = image @ text.T
    right = tokens == tokens.T
    for rank in (1, 5):
        whole = []
        for scores in (cosine, cosine.T):
            best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
            whole.append(float(np.mean(np.sum(~right & (scores >= best), axis=1) < rank)))
        assert 0.05 < min(whole) <= max(whole) < 0.95
        for block in (1, 25, 100, 101, 1000):
            assert recall(image, text, tokens, rank=rank, block=block) == tuple(whole)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_recall_of_equal_features_is_zero(value: float) -> None:
    equal = np.full((5, 4), value)
    assert recall(equal, equal, np.arange(5)[:, None], rank=4) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision": dataclasses.replace(test_vision.VIT, projection=16)},
            "must have one projection, got text 24 and vision 16",
        ),
        (
            {"temperature_start": 60.0},
            "0 < temperature_start <= temperature_cap, got 60.0 and 50.0",
        ),
        ({"temperature_start": 0.0}, "0 < temperature_start <= temperature_cap"),
        ({"temperature_cap": float("inf")}, "0 < temperature_start <= temperature_cap"),
    ],
)
def test_what_does_not_fit_together_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert "\n" not in str(caught.value)


ONE = MeshConfig(data=1)


@functools.cache
def loss_and_gradients(mesh_config: MeshConfig, microbatches: int = 1) -> tuple[float, Any, Any]:
    """Loss, gradients, features; parameters where the rules put them, 16 rows over the devices."""
    size = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
    mesh = partitioning.make_mesh(mesh_config, jax.devices()[:size])
    inputs = images_for(CONFIG, rows=16), *captions(CONFIG, rows=16)
    model = contrastive_model.Model(Clip(CONFIG), microbatches=microbatches)

    def run(params: Any, batch: contrastive_model.Batch) -> tuple[Any, Any, Any]:
        gradients, metrics = model.gradients(params, {}, batch, jax.random.key(0))
        return metrics["train/loss"], gradients, model.encode(params, batch)

    def init(key: jax.Array) -> Any:
        return Clip(CONFIG).init(key, *inputs)["params"]

    placed = jax.tree.map(lambda x: x.sharding, partitioning.abstract(init, mesh))
    params = jax.device_put(params_of(CONFIG), placed)
    partitioning.check_sharded(params, mesh)
    batch = contrastive_model.Batch(*(partitioning.put_rows(x, mesh) for x in inputs))
    whole = partitioning.replicated(mesh)
    with partitioning.use(mesh):
        found = jax.jit(run, out_shardings=(whole, placed, whole))(params, batch)
    loss, gradients, features = jax.device_get(found)
    return float(loss), gradients, features


def test_gradients_reach_every_parameter() -> None:
    _, gradients, _ = loss_and_gradients(ONE)
    assert sorted(gradients) == ["logit_scale", "text", "vision"]
    test_vision.assert_all_reached(gradients)


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        pytest.param(MeshConfig(data=8), 1, id="data"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), 1, id="all"),
        pytest.param(ONE, 8, id="one-microbatches"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), 4, id="all-microbatches"),
    ],
)
def test_loss_and_gradients_are_the_same_on_every_mesh_and_in_parts(
    mesh: MeshConfig, microbatches: int
) -> None:
    """To 1e-5 in fp32, sums in another order; the loss is over all 16 rows, not a part's."""
    want, want_gradients, want_found = loss_and_gradients(ONE)
    loss, gradients, found = loss_and_gradients(mesh, microbatches)
    np.testing.assert_allclose(found.image_BE, want_found.image_BE, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.text_BE, want_found.text_BE, rtol=0, atol=1e-5)
    assert loss == pytest.approx(want, abs=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-5),
        gradients,
        want_gradients,
    )
    assert max(np.abs(x).max() for x in jax.tree.leaves(want_gradients)) > 0.1
    halves = [
        contrastive.contrastive_loss(
            found.image_BE[i : i + 8], found.text_BE[i : i + 8], found.scale
        )
        for i in (0, 8)
    ]
    assert abs(float(sum(halves)) / 2 - want) > 0.1


def test_parts_need_less_memory() -> None:
    """What a backward pass needs is kept of one part at a time, by the plan of the compiler."""
    inputs = images_for(CONFIG, rows=64), *captions(CONFIG, rows=64)
    batch = contrastive_model.Batch(*(jnp.asarray(x) for x in inputs))

    def needed(microbatches: int) -> int:
        model = contrastive_model.Model(Clip(CONFIG), microbatches=microbatches)
        step = jax.jit(model.gradients).lower(params_of(CONFIG), {}, batch, jax.random.key(0))
        plan = memory.plan(step.compile())
        assert plan is not None
        return plan.temporary

    assert needed(16) < needed(1) / 4
