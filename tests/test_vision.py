"""The image towers: what they take, what each part does, and where their parameters live."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax import partitioning, trees
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.models import vision
from blindvalm_jax.models.attention import Dropout, Full, Memory
from blindvalm_jax.models.vision import VisionConfig, VisionTower
from tests import small_models

VIT = VisionConfig(
    kind="vit", image_size=12, patch=4, layers=2, width=32, heads=2, mlp_width=64, projection=24
)
CONV = VisionConfig(
    kind="conv", image_size=14, channels=(4, 8, 16), width=32, projection=24, activation="gelu_tanh"
)
BOTH = pytest.mark.parametrize("config", [VIT, CONV], ids=["vit", "conv"])


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def images_for(config: VisionConfig, *, rows: int = 3, seed: int = 0) -> np.ndarray:
    size = (rows, config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def params_of(config: VisionConfig, *, seed: int = 0) -> Any:
    def init(key: jax.Array) -> Any:
        return VisionTower(config).init(key, images_for(config, rows=1))["params"]

    return small_models.random_params(init, seed=seed)


def features(config: VisionConfig, params: Any, images: Any, **options: Any) -> np.ndarray:
    """Features [B, E]."""
    tower = VisionTower(config, **options)
    return np.asarray(jax.jit(tower.apply)({"params": params}, jnp.asarray(images)))


@BOTH
def test_bytes_and_floats_give_the_same_features(config: VisionConfig) -> None:
    params, images = params_of(config), images_for(config)
    bytes_ = features(config, params, images)
    floats = features(config, params, images.astype(np.float32) / 255)
    # The divisions may be compiled differently: fp32 rounding of unit vectors.
    np.testing.assert_allclose(floats, bytes_, rtol=0, atol=1e-6)
    assert bytes_.shape == (3, config.projection)


@BOTH
def test_features_are_unit_vectors_in_fp32_also_from_bf16(config: VisionConfig) -> None:
    """bf16 has 8 bits of mantissa; two or three layers leave a cosine within 2e-3 of 1."""
    params, images = params_of(config), images_for(config)
    exact = features(config, params, images)
    rough = features(config, params, images, dtype=jnp.bfloat16)
    assert exact.dtype == rough.dtype == np.float32
    for found in (exact, rough):
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, rtol=0, atol=1e-5)
    assert np.abs(rough - exact).max() > 1e-4
    assert ((rough * exact).sum(-1) > 1 - 2e-3).all()


@BOTH
def test_an_image_is_encoded_alone(config: VisionConfig) -> None:
    params, images = params_of(config), images_for(config, rows=4)
    together = features(config, params, images)
    other = np.concatenate([images[:1], images_for(config, seed=1)])
    # fp32: a product over other rows may sum in another order.
    np.testing.assert_allclose(features(config, params, other)[0], together[0], rtol=0, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


@BOTH
def test_mean_and_deviation_are_those_of_the_config(config: VisionConfig) -> None:
    """Colours moved and scaled together with the images change nothing."""
    params = params_of(config)
    images = np.random.default_rng(0).random((3, config.image_size, config.image_size, 3))
    mean, std, shift, factor = (np.array(x) for x in (config.mean, config.std, [0.1, 0, 0.2], 0.5))
    moved = dataclasses.replace(
        config, mean=tuple((mean * factor + shift).tolist()), std=tuple((std * factor).tolist())
    )
    want = features(config, params, images.astype(np.float32))
    got = features(moved, params, (images * factor + shift).astype(np.float32))
    # fp32 values near 1 rounded before the mean is taken off: 1e-6 of a pixel.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    other = features(dataclasses.replace(config, std=(0.2, 0.3, 0.4)), params, images)
    assert np.abs(other - want).max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 12, 11, 3), np.uint8, r"images must be \[B, 12, 12, 3\], got \[2, 12, 11, 3\]"),
        ((2, 3, 12, 12), np.uint8, r"got \[2, 3, 12, 12\]"),
        ((12, 12, 3), np.uint8, r"got \[12, 12, 3\]"),
        ((2, 12, 12, 3), np.int32, "must be uint8 or floats from 0 to 1, got int32"),
    ],
)
def test_other_images_are_refused(shape: tuple[int, ...], dtype: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTower(VIT).init(jax.random.key(0), np.zeros(shape, dtype))


def test_patches_are_squares_row_by_row() -> None:
    images = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    found = np.asarray(vision.patches(jnp.asarray(images), 2))
    assert found.shape == (2, 6, 12)
    for number, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2), (4, 0), (4, 2)]):
        square = images[:, row : row + 2, column : column + 2]
        np.testing.assert_array_equal(found[:, number], square.reshape(2, -1))


def test_full_attention_is_a_plain_softmax_over_all_positions() -> None:
    """To 1e-6: fp32 against float64 at values of size 1."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 3, 4)).astype(np.float32)
    scores = np.einsum("btnh,bsnh->bnts", *(x.astype(np.float64) for x in (q, k))) * 0.7
    scores = np.exp(scores)
    want = np.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), v)
    found = Full().attend(*(jnp.asarray(x) for x in (q, k, v)), scale=0.7)
    np.testing.assert_allclose(found.out_BTNH, want, rtol=0, atol=1e-6)
    assert found.memory_share_BT is None


def test_full_attention_refuses_what_it_would_ignore() -> None:
    q = jnp.zeros((1, 3, 1, 2))
    for ignored in (
        {"memory": Memory(q[:, :, None], q[:, :, None])},
        {"dropout": Dropout(jax.random.key(0), 0.5)},
    ):
        with pytest.raises(ValueError, match="neither a memory nor dropout"):
            Full().attend(q, q, q, scale=1.0, **ignored)


def test_the_convolutional_tower_against_sums_over_windows() -> None:
    """In float64, window by window; SAME padding of stride 2, odd and even sizes (14, 7, 4, 2)."""
    params, images = params_of(CONV), images_for(CONV, rows=2)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def act(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = (images / 255 - np.array(CONV.mean)) / np.array(CONV.std)
    for index in range(3):
        size = x.shape[1]
        out = -(-size // 2)
        before = max(2 * (out - 1) + 3 - size, 0) // 2
        padded = np.pad(x, ((0, 0), (before, 2), (before, 2), (0, 0)))
        kernel, bias = weights[f"conv_{index}"]["kernel"], weights[f"conv_{index}"]["bias"]
        y = np.empty((2, out, out, kernel.shape[-1]))
        for row in range(out):
            for column in range(out):
                window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                y[:, row, column] = np.einsum("bhwc,hwcd->bd", window, kernel) + bias
        x = act(y)
    hidden = act(x.reshape(2, -1) @ weights["hidden"]["kernel"] + weights["hidden"]["bias"])
    want = hidden @ weights["visual_projection"]
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    # fp32 sums on unit vectors, as for the other towers.
    np.testing.assert_allclose(features(CONV, params, images), want, rtol=0, atol=1e-5)


def assert_all_reached(gradients: Any) -> None:
    """Some entry of each parameter, in each block, has a gradient beyond rounding."""
    for path, value in trees.flatten(gradients).items():
        blocks = value if path.startswith(("h/", "text/h/", "vision/h/")) else value[None]
        for block in np.asarray(blocks):
            if path.endswith("attn/qkv/bias"):
                block = block[[0, 2]]  # a key's bias adds the same to all scores of a query
                assert np.abs(block).reshape(2, -1).max(axis=1).min() > 1e-6, path
            assert np.abs(block).max() > 1e-6, path


@BOTH
@pytest.mark.parametrize(
    "mesh_config",
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=4, tensor=2),
    ],
    ids=["all", "fsdp", "tensor"],
)
def test_parameters_are_split_on_every_mesh(config: VisionConfig, mesh_config: MeshConfig) -> None:
    """Without the axis names they are not, and that is refused."""
    mesh = partitioning.make_mesh(mesh_config)
    wide = dataclasses.replace(config, width=64, image_size=24)

    def init(key: jax.Array) -> Any:
        return VisionTower(wide).init(key, images_for(wide, rows=1))["params"]

    planned = partitioning.abstract(init, mesh)
    partitioning.check_sharded(planned, mesh)
    vit = wide.kind == "vit"
    big = planned["h"]["blocks_0_1"]["c_fc"]["kernel"] if vit else planned["hidden"]["kernel"]
    held = np.prod(big.sharding.shard_shape(big.shape))
    assert held * mesh.shape["fsdp"] * mesh.shape["tensor"] == big.size
    bare = partitioning.abstract(lambda key: nn.unbox(init(key)), mesh)
    with pytest.raises(UserError, match=r"of the matrices are on every device whole"):
        partitioning.check_sharded(bare, mesh)


def test_the_convolutional_tower_is_the_same_on_a_mesh() -> None:
    """Features and gradients to 1e-5: fp32, sums in another order.

    The transformer's are among those of both towers together.
    """
    images = images_for(CONV, rows=8)
    weight = np.random.default_rng(1).standard_normal((8, CONV.projection))

    def init(key: jax.Array) -> Any:
        return VisionTower(CONV).init(key, images)["params"]

    def loss(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found: Any = VisionTower(CONV).apply({"params": params}, images)
        return jnp.mean(found * weight), found

    def run(mesh_config: MeshConfig, devices: int) -> Any:
        mesh = partitioning.make_mesh(mesh_config, jax.devices()[:devices])
        placed = jax.tree.map(lambda x: x.sharding, partitioning.abstract(init, mesh))
        params = jax.device_put(params_of(CONV), placed)
        with partitioning.use(mesh):
            gradients = jax.jit(jax.grad(loss, has_aux=True))
            return jax.device_get(gradients(params, partitioning.put_rows(images, mesh)))

    one, split = run(MeshConfig(data=1), 1), run(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    assert_all_reached(one[0])
    assert max(np.abs(x).max() for x in jax.tree.leaves(one[0])) > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), split, one)


def test_the_transformer_starts_as_openai_s() -> None:
    """Deviations to 15 %: of at least 500 draws each."""
    config = dataclasses.replace(VIT, width=512, heads=8, mlp_width=1024, image_size=24)
    init = jax.jit(VisionTower(config).init)
    params: Any = nn.unbox(init(jax.random.key(0), images_for(config, rows=1))["params"])
    block = params["h"]["blocks_0_1"]
    for value, deviation in [
        (params["class_embedding"], 512**-0.5),
        (params["position_embedding"], 512**-0.5),
        (params["visual_projection"], 512**-0.5),
        (params["patch_embedding"], 48**-0.5 / 3**0.5),
        (block["attn"]["qkv"]["kernel"], 512**-0.5),
        (block["attn"]["out"]["kernel"], 512**-0.5 / 2),
        (block["c_fc"]["kernel"], 1024**-0.5),
        (block["c_proj"]["kernel"], 512**-0.5 / 2),
    ]:
        assert np.std(value) == pytest.approx(deviation, rel=0.15)
        assert abs(np.mean(value)) < 0.15 * deviation
    assert np.max(np.abs(params["patch_embedding"])) <= 48**-0.5


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (VIT, {"kind": "resnet"}, "kind must be vit or conv, got 'resnet'"),
        (VIT, {"image_size": 13}, "image_size 13 is not a multiple of patch 4"),
        (VIT, {"heads": 5}, "width 32 is not a multiple of 5 heads"),
        (VIT, {"layers": 0}, "layers of a vit image tower must be positive, got 0"),
        (VIT, {"patch": -4}, "patch of a vit image tower must be positive, got -4"),
        (VIT, {"channels": (3,)}, "channels are for kind conv"),
        (CONV, {"channels": ()}, "kind conv needs one or more positive channels"),
        (CONV, {"channels": (4, 0)}, "kind conv needs one or more positive channels"),
        (CONV, {"heads": 2}, "leaves patch, layers, heads, mlp_width out"),
        (CONV, {"projection": 0}, "projection of a conv image tower must be positive, got 0"),
        (VIT, {"activation": "relu"}, "activation must be one of gelu_erf, gelu_tanh, quick_gelu"),
        (VIT, {"mean": (0.5,)}, "mean and std must be three numbers each"),
        (VIT, {"std": (0.5, 0.5, 0.0)}, "mean and std must be three numbers each, std positive"),
        (VIT, {"mean": (0.5, 0.5, float("nan"))}, "mean and std must be three numbers each"),
    ],
    ids=str,
)
def test_shapes_of_no_tower_are_one_line(
    config: VisionConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(config, **changes)
    assert "\n" not in str(caught.value)
