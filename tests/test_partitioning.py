"""Meshes: the same numbers on each, every parameter where it belongs, and refusals in one line."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blindvalm_jax import compilation, optim, partitioning, step
from blindvalm_jax.config import Config, DecoderConfig, MeshConfig, OptimizerConfig, TrainConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.models import initializers, transformer
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.objectives import language, language_model
from tests import small_models

ONE = MeshConfig(data=1)
DATA = MeshConfig(data=8)
FSDP = MeshConfig(data=2, fsdp=4)
ALL = MeshConfig(data=2, fsdp=2, tensor=2)
# Wide enough that what a mesh leaves whole is a small share; with dropout, which must not depend
# on the mesh either.
CONFIG = dataclasses.replace(
    small_models.CONFIG, width=64, dropout=0.1, attention_dropout=0.1, vocab_multiple=32
)
# Adam's usual epsilon would turn a gradient that is only rounding into a whole step.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, warmup_init=5e-3, epsilon=1e-3)
STEPS = 5


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def mesh_of(config: MeshConfig) -> jax.sharding.Mesh:
    size = config.data * config.fsdp * config.tensor
    return partitioning.make_mesh(config, jax.devices()[:size])


def placed_batch(mesh: jax.sharding.Mesh) -> Any:
    """16 rows over the devices."""
    batch = small_models.blind_batch(rows=16)
    return jax.tree.map(lambda x: partitioning.put_rows(np.asarray(x), mesh), batch)


@functools.cache
def sharded_parts(config: MeshConfig) -> tuple[Any, Any, Any]:
    """Model, and shardings of its state and of the frozen tower on a mesh."""
    model, mesh = small_models.blind_model(CONFIG), mesh_of(config)
    optimizer = optim.make(OPTIMIZER, steps=STEPS)

    def init(key: jax.Array) -> step.TrainState:
        params = model.init(key)
        return step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def init_tower(key: jax.Array) -> Any:
        tokens, starts = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
        assert model.tower is not None
        return {"tower": model.tower.init(key, tokens, starts, readout="token")["params"]}

    key = jax.random.key(0)
    state = partitioning.shardings(jax.eval_shape(init, key), mesh)
    return model, state, partitioning.shardings(jax.eval_shape(init_tower, key), mesh)


@functools.cache
def compiled(config: MeshConfig, microbatches: int) -> tuple[Any, Any, Any, Any]:
    """The compiled step on a mesh, and its arguments placed on it."""
    model, state_shardings, frozen_shardings = sharded_parts(config)
    mesh = mesh_of(config)
    optimizer = optim.make(OPTIMIZER, steps=STEPS)
    params = small_models.decoder_params(model.decoder)
    state = step.TrainState(np.zeros((), np.int32), params, optimizer.init(params))  # type: ignore[arg-type]
    state = jax.device_put(state, state_shardings)
    frozen = jax.device_put({"tower": small_models.tower_params()}, frozen_shardings)
    batch = placed_batch(mesh)
    run = functools.partial(
        step.train_step,
        model=dataclasses.replace(model, microbatches=microbatches),
        optimizer=optimizer,
        rate=optim.schedule(OPTIMIZER, steps=STEPS),
        seed=0,
    )
    rows = partitioning.batch_sharding(mesh)
    with partitioning.use(mesh):
        jitted = jax.jit(
            run,
            in_shardings=(state_shardings, frozen_shardings, rows),
            out_shardings=(state_shardings, partitioning.replicated(mesh)),
        )
        return jitted.lower(state, frozen, batch).compile(), state, frozen, batch


@functools.cache
def history(config: MeshConfig, microbatches: int) -> tuple[list[float], Any]:
    """Losses of the updates, and the state after them."""
    run, state, frozen, batch = compiled(config, microbatches)
    losses = []
    for _ in range(STEPS):
        state, metrics = run(state, frozen, batch)
        losses.append(float(metrics["train/loss"]))
    return losses, state


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("config", [DATA, FSDP, ALL], ids=["data", "fsdp", "tensor"])
def test_every_mesh_trains_as_one_device_does(config: MeshConfig, microbatches: int) -> None:
    """Losses of 5 updates with dropout to 1e-5, parameters to 1e-4: fp32, sums in another order."""
    want, want_state = history(ONE, microbatches)
    losses, state = history(config, microbatches)
    assert want[0] - want[-1] > 0.05
    np.testing.assert_allclose(losses, want, rtol=0, atol=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-4),
        jax.device_get(state.params),
        jax.device_get(want_state.params),
    )
    assert history(ONE, 1)[0] != history(ONE, 2)[0]  # dropout differs, so it is there


def unsharded_share(params: Any) -> float:
    """Share of the parameters (by count) that every device holds whole."""
    sizes = [(x.size, x.sharding.is_fully_replicated) for x in jax.tree.leaves(params)]
    return sum(size for size, whole in sizes if whole) / max(1, sum(size for size, _ in sizes))


@pytest.mark.parametrize("config", [FSDP, ALL], ids=["fsdp", "tensor"])
def test_parameters_moments_and_tower_are_split(config: MeshConfig) -> None:
    _, state, frozen, batch = compiled(config, 1)
    mesh = mesh_of(config)
    for tree in (state.params, state.opt_state, frozen):
        assert unsharded_share(tree) < partitioning.UNSHARDED_LIMIT
        partitioning.check_sharded(tree, mesh)
    parts = config.fsdp * config.tensor
    whole = sum(x.nbytes for x in jax.tree.leaves(state.params))
    held = partitioning.bytes_per_device(state.params)
    assert whole / parts <= held < 1.1 * whole / parts
    rows = {shard.data.shape[0] for shard in batch.tokens_BT.addressable_shards}
    assert rows == {16 // (config.data * config.fsdp)}
    _, after = history(config, 1)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert now.sharding.is_equivalent_to(before.sharding, now.ndim)


@pytest.mark.parametrize("config", [FSDP, ALL], ids=["fsdp", "tensor"])
def test_parameters_left_whole_are_refused_by_name(config: MeshConfig) -> None:
    mesh = mesh_of(config)
    _, state, _, _ = compiled(config, 1)
    whole = jax.device_put(state.params, partitioning.replicated(mesh))
    assert unsharded_share(whole) == 1
    with pytest.raises(UserError, match=r"100\.0% of the matrices are on every device") as error:
        partitioning.check_sharded(whole, mesh)
    assert "\n" not in str(error.value)
    table = jax.device_put(state.params["wte"], partitioning.replicated(mesh))
    with pytest.raises(UserError, match=r"largest: wte"):
        partitioning.check_sharded(state.params | {"wte": table}, mesh)


@pytest.mark.parametrize("config", [FSDP, ALL], ids=["fsdp", "tensor"])
def test_a_module_that_forgets_its_axis_names_is_refused(
    config: MeshConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shardings that the rules plan are whole then as well: they cannot be what is expected."""
    plain = initializers.partitioned
    monkeypatch.setattr(
        transformer, "partitioned", lambda init, names: plain(init, (None,) * len(names))
    )
    model = small_models.blind_model()
    planned = compilation.abstract_state(model, optim.make(OPTIMIZER, steps=5), mesh_of(config))
    with pytest.raises(UserError, match=r"of the matrices are on .*h/blocks_2_2/.*kernel"):
        partitioning.check_sharded(planned.params, mesh_of(config))


def test_what_only_fsdp_splits_may_stay_whole_without_it() -> None:
    """A learned position table of a small model is more than 2 % of it."""
    learned = dataclasses.replace(small_models.CONFIG, positions="learned", max_positions=512)
    mesh = mesh_of(MeshConfig(data=4, fsdp=1, tensor=2))
    optimizer = optim.make(OPTIMIZER, steps=5)
    planned = compilation.abstract_state(small_models.blind_model(learned), optimizer, mesh)
    tower = language.abstract_tower(small_models.TOWER, Config(), mesh)
    for tree in (planned.params, tower):
        assert unsharded_share(tree) > partitioning.UNSHARDED_LIMIT
        partitioning.check_sharded(tree, mesh)


def test_pure_data_parallelism_may_keep_parameters_whole() -> None:
    _, state, _, _ = compiled(DATA, 1)
    assert unsharded_share(state.params) == 1
    partitioning.check_sharded(state.params, mesh_of(DATA))


@pytest.mark.parametrize("config", [FSDP, ALL], ids=["fsdp", "tensor"])
def test_the_paper_s_model_is_split_on_every_mesh(config: MeshConfig) -> None:
    """At full size, by shapes alone."""
    decoder = Decoder(
        DecoderConfig(),
        small_models.PAPER_FUSION,
        vocab_size=49412,
        fusion_layers=(10,),
        memory_width=768,
    )
    boxed = jax.eval_shape(language_model.Model(decoder).init, jax.random.key(0))
    mesh = mesh_of(config)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        partitioning.shardings(boxed, mesh),
    )
    assert unsharded_share(placed) < 0.005
    partitioning.check_sharded(placed, mesh)


def test_init_is_born_sharded_and_the_same_on_every_mesh() -> None:
    model, key = small_models.blind_model(CONFIG), jax.random.key(3)
    one = partitioning.init_sharded(model.init, key, mesh_of(ONE))
    split = partitioning.init_sharded(model.init, key, mesh_of(ALL))
    partitioning.check_sharded(split, mesh_of(ALL))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(split), jax.device_get(one))


def test_constraints_reach_the_program_under_the_mesh_only() -> None:
    """flax drops them silently without a mesh or without rules."""
    model = small_models.blind_model(CONFIG)
    params = small_models.decoder_params(model.decoder)
    frozen = {"tower": small_models.tower_params()}
    batch = small_models.blind_batch(rows=16)

    def text() -> str:
        return str(jax.make_jaxpr(lambda p: model.loss(p, frozen, batch).loss)(params))

    assert "sharding_constraint" not in text()
    with partitioning.use(mesh_of(ALL)):
        found = text()
    assert re.findall(r"f32(\[.*\]) = sharding_constraint", found).count("[16,24,64]") == 7
    specs = collections.Counter(re.findall(r"spec=P(\(.*\))\)", found))
    # tower: two tables, 3 states; decoder: embedding, and two states of each of 3 runs of blocks
    assert specs["(('data', 'fsdp'), None, None)"] == 3 + 1 + 6
    # the MLPs' insides and the logits
    assert specs["(('data', 'fsdp'), None, 'tensor')"] == 1 + 3 + 1
    assert specs["('tensor', None)"] == 1  # the table whose rows are taken and predicted


def test_no_lookup_makes_a_device_hold_the_states_of_the_whole_batch() -> None:
    """The first half shows that it would be seen."""
    mesh = mesh_of(ALL)

    def careless(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(table[ids] + 1, partitioning.replicated(mesh))

    def program(compiled: Any) -> str:
        return str(compiled.as_text())

    shardings = (
        NamedSharding(mesh, PartitionSpec("tensor", "fsdp")),
        partitioning.batch_sharding(mesh),
    )
    table, ids = jnp.zeros((512, 64)), jnp.zeros((16, 24), jnp.int32)
    whole = re.compile(r"f32\[16,24,\d+\]")
    lowered = jax.jit(careless, in_shardings=shardings).lower(table, ids)
    assert whole.search(program(lowered.compile()))
    update, *_ = compiled(ALL, 1)
    assert "f32[4,24," in program(update)
    assert not whole.search(program(update))


def test_a_batch_is_split_by_rows_and_whole_again() -> None:
    batch = small_models.blind_batch(rows=16)
    placed = placed_batch(mesh_of(ALL))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), jax.device_get(batch))
    assert placed.tower.tokens_BS.sharding.spec == PartitionSpec(("data", "fsdp"))


def test_one_size_of_a_mesh_may_be_what_is_left() -> None:
    assert dict(partitioning.make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    left = partitioning.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(left.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=16), MeshConfig(data=4)],
    ids=str,
)
def test_a_mesh_that_does_not_fit_the_devices_is_one_line(config: MeshConfig) -> None:
    with pytest.raises(UserError, match="does not fit 8 devices") as error:
        partitioning.make_mesh(config)
    assert f"fsdp={config.fsdp}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "decoder", "tower", "train"),
    [
        ("decoder.width is 66, not a multiple of mesh.fsdp = 4", {"width": 66}, {}, {}),
        ("decoder.heads is 9, not a multiple of mesh.tensor = 2", {"heads": 9}, {}, {}),
        ("decoder.vocab_multiple is 1, not a multiple of mesh.ten", {"vocab_multiple": 1}, {}, {}),
        ("decoder.mlp_width is 33, not a multiple of mesh.tensor", {"mlp_width": 33}, {}, {}),
        ("the tower's width is 30, not a multiple of mesh.fsdp", {}, {"width": 30}, {}),
        ("the tower's heads is 3, not a multiple of mesh.tensor", {}, {"heads": 3}, {}),
        ("the tower's MLP width is 63, not a multiple of mesh.t", {}, {"mlp_width": 63}, {}),
        (
            "train.batch_size / train.microbatches is 6, not a multiple of mesh.data x mesh.fsdp",
            {},
            {},
            {"batch_size": 12, "microbatches": 2},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sizes_that_the_mesh_does_not_divide_are_one_line(
    message: str, decoder: dict[str, int], tower: dict[str, int], train: dict[str, int]
) -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shape = dataclasses.replace(small_models.TOWER, **tower)  # type: ignore[arg-type]
    config = Config(
        decoder=dataclasses.replace(CONFIG, **decoder),  # type: ignore[arg-type]
        train=dataclasses.replace(TrainConfig(batch_size=8), **train),  # type: ignore[arg-type]
    )
    with pytest.raises(UserError, match=message) as error:
        partitioning.check_divisible(config, mesh, shape)
    assert "\n" not in str(error.value)
    if tower:
        partitioning.check_divisible(config, mesh, None)
    partitioning.check_divisible(
        Config(decoder=CONFIG, train=TrainConfig(batch_size=8)), mesh, small_models.TOWER
    )
