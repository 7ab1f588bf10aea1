"""Plans: tensors, memory and collectives are those of the program, on any topology."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from blindvalm_jax import (
    collectives,
    compiler_messages,
    config,
    ladder,
    partitioning,
    placement,
    planning,
    presets,
    system,
    trainer,
)
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.errors import UserError
from tests import small_images, small_models, small_text, test_contrastive_training

ROOT = Path(__file__).resolve().parents[1]
ONE, DATA, FSDP, ALL = (1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def mesh_of(sizes: tuple[int, int, int]) -> Mesh:
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    return partitioning.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def settings(sizes: tuple[int, int, int], variant: str = "blind", **changes: Any) -> config.Config:
    """The ladder's recipe, tiny: 3 blocks of width 64; changes: dotted names."""
    values = ladder.rung(config.default(), "10m", variant, 32)
    values.decoder.layers, values.decoder.width, values.decoder.heads = 3, 64, 8
    values.decoder.vocab_size = 500
    random = values.grounding.random
    random.layers, random.width, random.heads, random.projection = 2, 64, 8, 64
    values.mesh.data, values.mesh.fsdp, values.mesh.tensor = sizes
    values.train.batch_size, values.train.dtype = 16, "float32"
    values.train.loss_chunk = 8
    values.grounding.dtype = "float32"
    if variant.startswith("valm"):
        values.grounding.index = "vectors:1000"
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config.parse(values)


@functools.cache
def plan(sizes: tuple[int, int, int], variant: str = "blind") -> planning.Plan:
    count = int(np.prod(sizes))
    return planning.of_settings(settings(sizes, variant), devices=jax.devices()[:count])


def held(sizes: tuple[int, int, int], group: str) -> int:
    return {x.group: x.bytes_per_device for x in placement.sums(plan(sizes).tensors)}[group]


def test_collectives_of_a_known_program_are_counted_with_their_loops() -> None:
    mesh = mesh_of(ALL)
    part = PartitionSpec(("data", "fsdp", "tensor"))

    def local(x: jax.Array) -> jax.Array:
        def outer(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            def inner(_: int, y: jax.Array) -> jax.Array:
                everything = jax.lax.all_gather(y, ("data", "fsdp"), tiled=True)  # 4 x 8 floats
                return y + jnp.sum(everything)

            carry = jax.lax.fori_loop(0, 5, inner, carry)
            return jax.lax.psum(carry, "tensor"), None

        x, _ = jax.lax.scan(outer, x, None, length=3)
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    program = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    )
    compiled = program.lower(jax.ShapeDtypeStruct((64,), jnp.float32)).compile()
    found = {
        (x.kind, x.axes): (x.group, x.result_bytes, x.times, x.counted)
        for x in collectives.read(str(compiled.as_text()), mesh)
    }
    assert found == {
        ("all-gather", ("data", "fsdp")): (4, 4 * 8 * 4, 15, True),
        ("all-reduce", ("tensor",)): (2, 8 * 4, 3, True),
        ("collective-permute", ("data",)): (2, 8 * 4, 1, True),
    }


def other_warnings(found: planning.Plan) -> list[str]:
    """Those but that a program was in the cache already."""
    return [line for line in found.warnings if line != found.unheard]


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("replica_groups={}", ("data", "fsdp", "tensor"), 8),
        ("replica_groups=[4,2]<=[8]", ("tensor",), 2),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor"), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor"), 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",), 2),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ("fsdp",), 2),
    ],
)
def test_groups_are_read_in_every_spelling(groups: str, axes: tuple[str, ...], size: int) -> None:
    hlo = f"""
%body (x: f32[4]) -> f32[4] {{
  ROOT %r = (f32[4]{{0}}, /*index=1*/bf16[2,3]{{1,0}}) all-reduce(%a, %b), {groups}, to_apply=%add
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %w = f32[4] while(%x), condition=%cond, body=%body
}}
"""
    (found,) = collectives.read(hlo, mesh_of(ALL))
    assert (found.axes, found.group) == (axes, size)
    assert (found.result_bytes, found.times, found.counted) == (16 + 12, 1, False)
    assert found.bytes_sent == round(2 * 28 * (size - 1) / size)


def test_asynchronous_starts_count_their_results() -> None:
    hlo = """
%wrapped (x: f32[8]) -> f32[4] {
  ROOT %r = f32[4]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %h = f32[8]{0} all-gather-done(%g)
  %p = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,4}}
  %s = ((f32[8]), f32[4]) async-start(%x), calls=%wrapped
}
"""
    found = {
        x.kind: (x.axes, x.bytes_made, x.bytes_sent) for x in collectives.read(hlo, mesh_of(ALL))
    }
    assert found == {
        "all-gather": (("tensor",), 32, 16),
        "collective-permute": (("data",), 16, 16),
        "reduce-scatter": (("tensor",), 16, 16),
    }


@pytest.mark.parametrize("sizes", [FSDP, ALL], ids=["fsdp", "tensor"])
def test_parameters_and_moments_fall_with_the_devices_that_split_them(
    sizes: tuple[int, int, int],
) -> None:
    """All but vectors that nothing splits: under 3 % of this small model."""
    # the tower's embedding is split over fsdp alone
    assert held(sizes, "tower") < 1.2 * held(ONE, "tower") / sizes[1]
    parts = sizes[1] * sizes[2]
    for group in ("decoder", "optimizer"):
        whole = held(ONE, group)
        assert whole / parts <= held(sizes, group) < 1.2 * whole / parts
    assert held(sizes, "batch") == held(ONE, "batch") / (sizes[0] * sizes[1])
    assert plan(sizes).gradient_bytes == held(sizes, "decoder")
    assert held(ONE, "optimizer") == 2 * held(ONE, "decoder") + 8  # and two counters
    assert not placement.replicated(plan(sizes).tensors, plan(sizes).mesh, larger_than=4000)
    assert not other_warnings(plan(sizes))


def test_what_is_held_is_what_the_program_takes() -> None:
    for sizes in (ONE, DATA, FSDP, ALL):
        found = plan(sizes)
        assert found.memory is not None
        expected = sum(x.bytes_per_device for x in found.tensors)
        # a few scalars more or less: counters that nothing reads
        assert found.memory.held == pytest.approx(expected, abs=64)
        assert found.memory.total >= found.memory.held + found.memory.temporary > found.memory.held


def test_every_tensor_of_the_state_is_named() -> None:
    """Those of the guard as well, which every run has that does not refuse it."""
    names = {x.name for x in plan(ONE).tensors if x.group == "progress"}
    assert {"step", "guard/seen", "guard/log_norm", "guard/skipped/count"} <= names
    stopping = settings(ONE, train__on_nonfinite="stop")
    unguarded = planning.of_settings(stopping, devices=jax.devices()[:1])
    assert [x.name for x in unguarded.tensors if x.group == "progress"] == ["step"]


def sent(sizes: tuple[int, int, int]) -> dict[tuple[str, tuple[str, ...]], int]:
    return {(x.kind, x.axes): x.bytes_made for x in collectives.totals(plan(sizes).collectives)}


def test_replicas_reduce_their_gradients_and_nothing_else() -> None:
    assert plan(ONE).collectives == []
    found = sent(DATA)
    assert set(found) == {("all-reduce", ("data",))}
    gradients = held(DATA, "decoder")
    # The table's comes in five parts: what is looked up, and each of the loss's four chunks. That
    # of the fusion layer's keys and values in two: of the text's and of the memory's.
    expected = gradients + 4 * (512 * 64 * 4) + 64 * 2 * 64 * 4
    assert 0 <= found["all-reduce", ("data",)] - expected < 64  # sums of loss, weight, share


def test_fsdp_gathers_parameters_and_reduces_gradients() -> None:
    found = sent(FSDP)
    gathered = found["all-gather", ("fsdp",)]
    parameters = held(ONE, "decoder") + held(ONE, "tower")
    # forward, and again in the backward pass; with remat=dots some not
    assert parameters < gathered < 3 * parameters
    assert set(found) <= {("all-gather", ("fsdp",)), ("all-reduce", ("fsdp",))}


def test_tensor_parallelism_reduces_activations() -> None:
    found = sent(ALL)
    assert found["all-reduce", ("tensor",)] > 0
    # what is gathered over fsdp is the part of one of two shards
    parameters = held(ONE, "decoder") + held(ONE, "tower")
    assert found["all-gather", ("fsdp",)] < 3 * parameters / 2 * 1.2


@pytest.mark.parametrize("sizes", [FSDP, ALL], ids=["fsdp", "tensor"])
def test_a_chunked_loss_gathers_its_table_once(sizes: tuple[int, int, int]) -> None:
    table = 512 * 64 * 4 // sizes[2]
    gathers = [
        x.times
        for x in plan(sizes).collectives
        if x.kind == "all-gather" and x.result_bytes == table and "tower" not in x.op_name.lower()
    ]
    assert sum(gathers) <= 2  # to look up tokens, to predict them


def test_an_index_is_split_over_all_devices() -> None:
    found = plan(ALL, "valm")
    (index,) = [x for x in found.tensors if x.group == "index"]
    assert index.shape == (1000, 64)
    assert index.bytes_per_device == index.bytes / 8
    assert not other_warnings(found)


@pytest.mark.parametrize(
    ("index", "neighbours", "dry_run", "message"),
    [
        ("nowhere", 1, True, "nowhere holds no finished .*, or plan without one: grounding.index="),
        ("vectors:7", 8, True, "grounding.neighbours is 8, the index has 7 vectors"),
        ("vectors:7", 1, False, "grounding.index=vectors:7 is for --dry_run without data: build"),
    ],
    ids=["no index", "too few", "no dry run"],
)
def test_an_index_that_is_not_there_is_one_line(
    tmp_path: Path, index: str, neighbours: int, dry_run: bool, message: str
) -> None:
    changes = {"grounding__index": index, "grounding__neighbours": neighbours}
    with pytest.raises(UserError, match=message):
        trainer.train(settings(DATA, "valm", **changes), tmp_path, dry_run=dry_run)


def test_the_plan_of_clip_without_images_is_that_of_a_run_on_images(tmp_path: Path) -> None:
    images = small_images.write_toyworld(tmp_path / "images", count=40)
    values = test_contrastive_training.settings(images)
    for data, workdir in ((images, tmp_path / "with"), ("", tmp_path / "without")):
        values.data.images = str(data)
        assert trainer.train(config.parse(values), workdir, dry_run=True) == 0
    found = plan_of(tmp_path / "without")
    assert any(line.startswith("| batch     | `images_BHWC`") for line in found)
    assert found == plan_of(tmp_path / "with")


def test_messages_of_the_compiler_are_heard_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    line = "W0000 spmd.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot go"
    lines = []

    def compile_badly() -> None:
        with compiler_messages.heard() as heard:
            lines.append(heard)
            os.write(2, f"{line}\n".encode())
            subprocess.run([sys.executable, "-c", "raise SystemExit('of a child')"], check=True)

    with pytest.raises(subprocess.CalledProcessError):
        compile_badly()
    os.write(2, b"later\n")
    assert lines == [[line, "of a child"]]
    assert compiler_messages.rematerialized(lines[0]) == [line]
    assert capfd.readouterr().err.splitlines() == [line, "of a child", "later"]


_BAD = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
from blindvalm_jax import compiler_messages
mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
before = NamedSharding(mesh, P(("a", "b"), None, "c"))
after = NamedSharding(mesh, P("a", "b", None))
def bad(x):
    x = jax.lax.with_sharding_constraint(x * 2, before)
    x = jnp.sin(x).reshape(8, 4, 8, 8).transpose(1, 0, 3, 2).reshape(32, 8, 8)
    return jax.lax.with_sharding_constraint(x, after) + 1
with compiler_messages.heard() as said:
    shape = jax.ShapeDtypeStruct((8, 32, 8), jnp.float32, sharding=before)
    jax.jit(bad).lower(shape).compile()
print(len(compiler_messages.rematerialized(said)), compiler_messages.unheard(said))
"""


def run_bad(**environment: str) -> tuple[int, str, str]:
    """Lines on rematerialization of that program, why there are none, standard error."""
    done = subprocess.run(
        [sys.executable, "-c", _BAD],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    count, _, unheard = done.stdout.strip().partition(" ")
    return int(count), unheard, done.stderr


@pytest.mark.parametrize("level", ["1", "2"])
def test_what_xla_says_of_a_bad_program_is_known_or_known_to_be_missing(level: str) -> None:
    """XLA's own words, which may change with its version."""
    count, unheard, error = run_bad(TF_CPP_MIN_LOG_LEVEL=level, JAX_ENABLE_COMPILATION_CACHE="0")
    if level == "1":
        assert (count > 0, unheard) == (True, "None"), error
    else:
        assert (count, error) == (0, "")
        assert unheard.startswith("TF_CPP_MIN_LOG_LEVEL=2 turns XLA's messages off: whether it")


def test_a_program_that_was_compiled_before_is_known_to_say_nothing(tmp_path: Path) -> None:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    first, second = run_bad(**cache), run_bad(**cache)
    assert first[0] > 0
    assert first[1] == "None"
    assert second[0] == 0
    assert second[1].startswith("the step comes from JAX's compilation cache")


def test_a_plan_says_that_the_compiler_was_not_heard(tmp_path: Path) -> None:
    small = ["width=96", "heads=6", "layers=2", "vocab_size=500"]
    done = dry_run(
        *(tmp_path, "--config=configs/ladder.py:10m,gpt2,64", "--dry_run"),
        *(f"--config.decoder.{word}" for word in small),
        TF_CPP_MIN_LOG_LEVEL="2",
    )
    assert done.returncode == 0, done.stderr
    said = "warning: TF_CPP_MIN_LOG_LEVEL=2 turns XLA's messages off"
    for text in (done.stdout, (tmp_path / "placement.md").read_text()):
        assert [line[: len(said)] for line in text.splitlines()].count(said) == 1


def dry_run(workdir: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blindvalm_jax.train", f"--workdir={workdir}", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_dry_run_plans_devices_that_are_not_here_without_data(tmp_path: Path) -> None:
    small = ["--config.decoder.width=96", "--config.decoder.heads=6", "--config.decoder.layers=2"]
    small += ["--config.decoder.vocab_size=500", "--config.train.batch_size=24"]
    tower = ["layers=1", "width=96", "heads=6"]
    small += [f"--config.grounding.random.{word}" for word in tower]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=6"]
    done = dry_run(
        *(tmp_path / "run", "--config=configs/ladder.py:10m,blind,64", "--dry_run"),
        *("--simulated_devices=12", *small, *mesh),
    )
    assert done.returncode == 0, done.stderr
    assert "devices: 12 x cpu, mesh {'data': 2, 'fsdp': 6, 'tensor': 1}" in done.stdout
    assert "note: planned for one process: 12 devices usually are of several" in done.stdout
    assert "no data is named: shapes alone, a vocabulary of 500 (decoder.vocab_size)" in done.stdout
    page = (tmp_path / "run" / "placement.md").read_text()
    for text in ("`wte`", "`1/0/mu/wte`", "`tokens_BT`", "| tower ", "temporary in a step"):
        assert text in page
        assert text in done.stdout
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {
        *(".blindvalm_run", ".run.lock", "checkpoints", "placement.md")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulated_devices=4"], "--simulated_devices is for --dry_run"),
        (["--simulated_devices=0", "--dry_run"], "must be at least 1, got 0"),
        (
            ["--simulated_devices=6", "--dry_run", "--config.mesh.fsdp=4"],
            "mesh data=-1 fsdp=4 tensor=1 does not fit 6 devices",
        ),
        (["--simulated_processes=2", "--dry_run"], "goes with --simulated_devices"),
        (
            ["--simulated_devices=2", "--dry_run", "--distributed=auto"],
            "leave --distributed out, and say how many with --simulated_processes",
        ),
        (
            [
                *("--simulated_devices=256", "--simulated_processes=64", "--dry_run"),
                *("--config.mesh.data=4", "--config.mesh.fsdp=8", "--config.mesh.tensor=8"),
            ],
            "parts than there are processes (64): mesh.tensor must stay within the 4 devices of",
        ),
    ],
    ids=["no dry run", "none", "misfit", "processes alone", "both", "tensor"],
)
def test_simulated_devices_that_make_no_sense_are_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = dry_run(tmp_path, "--config=configs/ladder.py:10m,gpt2", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def plan_of(workdir: Path) -> list[str]:
    """The lines of placement.md, but that a program was in the cache already."""
    lines = (workdir / "placement.md").read_text().splitlines()
    return [line for line in lines if not line.startswith("warning: the step comes from JAX's")]


def test_a_dry_run_changes_nothing_of_the_run_after_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    small_text.write_text(text, small_text.documents(60))
    values = config.default()
    values.data.files, values.data.sequence_length = str(text), 16
    values.data.eval_fraction, values.eval.every_steps = 0.2, 0
    values.tokenizer.kind, values.tokenizer.train_vocab_size = "train", 300
    values.decoder.layers, values.decoder.width, values.decoder.heads = 1, 16, 2
    values.decoder.fusion_layers = (0,)
    values.grounding.tower = "random"
    values.grounding.random.layers, values.grounding.random.width = 1, 16
    values.train.steps, values.log.every_steps = 1, 1
    given = config.parse(values)
    first, second = tmp_path / "a", tmp_path / "b"
    assert trainer.train(given, first, dry_run=True) == 0
    planned = plan_of(first)
    assert any(line.startswith("| optimizer |") for line in planned)
    for workdir in (first, second):
        assert trainer.train(given, workdir) == 0
    losses = [json.loads((d / "metrics.jsonl").read_text())["train/loss"] for d in (first, second)]
    assert losses[0] == losses[1]
    for workdir in (first, second):
        assert plan_of(workdir) == planned, "a run has the plan as well"
    before = (second / "run.json").read_bytes()
    assert json.loads(before)["starts"][0]["step"] == 0
    assert trainer.train(given, second, dry_run=True) == 0  # of a finished run as of any other
    assert plan_of(second) == planned
    assert (second / "run.json").read_bytes() == before


@pytest.mark.parametrize("size", ladder.SIZES)
def test_sizes_of_the_ladder_have_the_parameters_they_say(size: str) -> None:
    shape = ladder.SIZES[size]
    values = config.parse(ladder.rung(config.default(), size, "gpt2"))
    model = system.build(values, vocab_size=50_257, tower=None, platform="cpu")
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    padding = (params["wte"].shape[0] - 50_257) * shape.width
    assert sum(x.size for x in jax.tree.leaves(params)) - padding == shape.parameters
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert shape.parameters == pytest.approx(named, rel=0.03)
    assert values.train.steps * shape.tokens == pytest.approx(20 * shape.parameters, rel=1e-3)
    assert 0 < values.optimizer.warmup_steps < values.train.steps / 10


@pytest.mark.parametrize("variant", presets.VARIANTS)
def test_every_system_climbs_the_ladder_at_any_length(variant: str) -> None:
    values = ladder.rung(config.default(), *ladder.parse(f"4096,{variant},355m"))
    if variant.startswith("valm"):
        values.grounding.index = "somewhere"
    found = config.parse(values)
    assert found.data.sequence_length == found.decoder.max_positions == 4096
    assert found.train.batch_size * 4096 == 2**19


@pytest.mark.parametrize(
    ("argument", "message"),
    [("4b", "expected a size"), ("10m,25m", "expected a size"), ("10m,8192", "length must be 2")],
)
def test_rungs_that_are_not_there_are_refused(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ladder.rung(config.default(), *ladder.parse(argument))


@pytest.mark.slow
def test_a_model_of_a_billion_is_split_on_16_and_64_devices(tmp_path: Path) -> None:
    """No parameter is made: host memory stays far below the 5 GB of its parameters."""
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "benchmarks.run", "placement", f"--json={out}"]
    meshes = "--meshes=2x8x1,4x8x2,1x64x1"
    done = subprocess.run(
        [*command, meshes, "--plan=1.3b,blind"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    few, mixed, many = json.loads(out.read_bytes())["meshes"]
    whole = 4 * (ladder.SIZES["1.3b"].parameters + 47 * 2048)
    for row, parts in ((few, 8), (mixed, 16), (many, 64)):
        assert row["warnings"] == []
        # beside the decoder of the table: the fusion layer's adapter and norm, whole vectors
        assert 1 <= row["bytes_a_device"]["decoder"] * parts / whole < 1.05
        kinds = {total["kind"] for total in row["collectives"]}
        assert {"all-gather", "all-reduce"} <= kinds <= {*collectives.KINDS}
        # never a gradient or parameter of all layers at once
        assert row["memory"]["temporary"] < 8 * 2**30
    along = {tuple(total["axes"]) for total in mixed["collectives"]}
    assert {("fsdp",), ("tensor",), ("data",)} <= along
