"""CLIP trained by the trainer: it learns, resumes bit for bit, and becomes the tower of a model."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh

from blindvalm_jax import (
    compilation,
    config,
    flops,
    optim,
    partitioning,
    runs,
    trained,
    trainer,
    trees,
)
from blindvalm_jax.costs import clips, of_settings
from blindvalm_jax.data import pipeline, tokenizers
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_model, clip_text, weights
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.vision import VisionConfig
from blindvalm_jax.objectives.contrastive import Contrastive
from blindvalm_jax.objectives.contrastive_model import Batch, Model
from blindvalm_jax.objectives.language import Language
from tests import small_images, small_models, test_images, test_train, tiny_tokenizers

STEPS, ROWS = 60, 32


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 pictures of 16 kinds, two captions each."""
    return small_images.write_toyworld(tmp_path_factory.mktemp("world"), count=160)


def settings(images: Path, **changes: Any) -> ml_collections.ConfigDict:
    """A run of seconds: towers of 10,000 parameters on images of 16 pixels; changes: dotted."""
    values = config.default()
    values.train.objective = "contrastive"
    values.data.images = str(images)
    values.data.eval_fraction = 0.25
    values.tokenizer.kind = "train"
    values.tokenizer.train_vocab_size = 300
    text, image = values.clip.text, values.clip.image
    text.layers, text.width, text.heads, text.projection, text.context = 1, 32, 2, 16, 16
    image.kind, image.size, image.width, image.channels = "conv", small_images.SIDE, 32, (8, 16)
    image.layers, image.patch, image.heads = 1, 8, 2
    values.train.dtype = "float32"
    values.train.steps, values.train.batch_size = STEPS, ROWS
    values.optimizer.learning_rate = 5e-3
    values.optimizer.schedule, values.optimizer.warmup_steps = "cosine", 5
    values.optimizer.epsilon_beside = "corrected"
    values.checkpoint.every_steps = values.eval.every_steps = STEPS // 2
    values.log.every_steps = 1
    values.mesh.data = 8
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return values


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    test_train.run(settings(world), workdir)
    return workdir


def test_learns_to_tell_pictures_apart(finished: Path) -> None:
    """16 kinds: who guesses finds 1 in 16 at rank 1, and has a loss of log 32 or so."""
    metrics = test_train.read_metrics(finished)
    assert metrics["train/loss"][1] > np.log(ROWS) - 0.5
    # Each pair has another one of its kind in the batch: what is left is near log 2.
    assert metrics["train/loss"][STEPS] < metrics["train/loss"][1] - 1
    assert metrics["eval/loss"][STEPS] < np.log(ROWS) - 1
    for way in ("image_to_text", "text_to_image"):
        assert metrics[f"eval/{way}_recall_at_1"][STEPS] > 5 / 16
        at_one, at_five = (metrics[f"eval/{way}_recall_at_{rank}"][STEPS] for rank in (1, 5))
        assert at_one <= at_five


def test_run_leaves_the_record_that_checks_rely_on(finished: Path) -> None:
    metrics = test_train.read_metrics(finished)
    every = {"train/loss", "train/temperature", "train/grad_norm", "train/pairs"}
    every |= {"perf/pairs_per_second", "perf/pairs_per_second_per_device", "perf/step_seconds"}
    for name in every:
        assert sorted(metrics[name]) == list(range(1, STEPS + 1)), name
    assert metrics["train/pairs"][STEPS] == STEPS * ROWS
    assert metrics["train/temperature"][1] == pytest.approx(1 / 0.07, rel=1e-6)
    assert not {name for name in metrics if "perplexity" in name or "tokens" in name}
    record = json.loads((finished / "run.json").read_text())
    shape = weights.rebuild(ClipConfig, record["clip"], "clip")
    assert isinstance(shape, ClipConfig)
    assert record["flops_per_pair"]["total"] == flops.per_pair(shape)
    assert record["data"]["train_images"] == 120
    assert record["kernels"] == {"attention": "xla"}
    assert shape.vision.channels == (8, 16)
    assert shape.text.vocab_size == record["tokenizer"]["vocab_size"] + 1  # the start token
    assert shape.text.end_id == record["tokenizer"]["eos_id"]
    count = sum(x.size for x in weights.abstract_params(shape).values())
    assert record["parameters"]["clip"] == count
    kept = tokenizers.load("train", str(Path(record["data"]["directory"]) / "tokenizer"))
    assert kept.fingerprint == record["tokenizer"]["fingerprint"]
    resolved = config.from_dict(json.loads((finished / "config.json").read_text()))
    assert resolved.mesh == config.MeshConfig(data=8, fsdp=1, tensor=1)
    assert "logit_scale" in (finished / "parameters.txt").read_text()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_update_that_is_not_finite_leaves_both_towers_as_they_are(
    microbatches: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch whose first picture is black: no input of this model can be infinite."""
    encode, following, read = Model.encode, pipeline.Batches.__next__, []

    def breaks(model: Model, params: Any, batch: Batch) -> Any:
        found = encode(model, params, batch)
        black = jnp.all(batch.images_BHWC[0] == 0)
        return dataclasses.replace(found, scale=jnp.where(black, jnp.nan, found.scale))

    def blackened(batches: pipeline.Batches) -> pipeline.Batch:
        rows = following(batches)
        read.append(rows)
        if len(read) == 3:
            rows["images"] = rows["images"].copy()
            rows["images"][0] = 0
        return rows

    monkeypatch.setattr(Model, "encode", breaks)
    monkeypatch.setattr(pipeline.Batches, "__next__", blackened)
    values = settings(world, train__steps=5, eval__every_steps=0)
    values.train.microbatches = microbatches
    metrics = test_train.run(values, tmp_path)
    assert list(metrics["train/skipped_updates"].values()) == [0, 0, 1, 1, 1]
    assert metrics["train/loss"][3] is None
    assert metrics["train/param_norm"][3] == metrics["train/param_norm"][2]
    assert metrics["train/param_norm"][4] != metrics["train/param_norm"][3]


def cut(finished: Path, workdir: Path) -> Path:
    """A copy of the run as if it had ended after its first checkpoint."""
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    return workdir


def test_a_cut_run_ends_bit_identical_also_when_its_images_have_moved(
    finished: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = cut(finished, tmp_path / "run")
    shutil.copytree(world, tmp_path / "moved")
    found = test_train.computed(test_train.run(settings(tmp_path / "moved"), workdir))
    assert f"resumed at step {STEPS // 2}" in capsys.readouterr().out
    assert found == test_train.computed(test_train.read_metrics(finished))
    assert clip_model.load_clip(workdir).sha256 == clip_model.load_clip(finished).sha256


def test_resume_on_other_images_is_refused(finished: Path, world: Path, tmp_path: Path) -> None:
    """One image is another one; then also the captions, and with them the tokenizer."""
    workdir = cut(finished, tmp_path / "run")
    shutil.copytree(world, tmp_path / "images")
    names = sorted(path.name for path in world.glob("*.png"))
    shutil.copy(world / names[0], tmp_path / "images" / names[1])
    with pytest.raises(UserError, match="was trained with other data: ") as error:
        trainer.train(config.parse(settings(tmp_path / "images")), workdir)
    assert "\n" not in str(error.value)
    captions = tmp_path / "images" / "captions.jsonl"
    captions.write_text(captions.read_text().replace("photo", "view"))
    with pytest.raises(UserError, match="was trained with another tokenizer: "):
        trainer.train(config.parse(settings(tmp_path / "images")), workdir)
    with pytest.raises(UserError, match=r"clip\.image\.width: 32 -> 64"):
        runs.check_resume(workdir, config.parse(settings(world, clip__image__width=64)))


def test_microbatches_may_change(
    finished: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is drawn in them: they change rounding only."""
    values = config.parse(settings(world))
    parts = dataclasses.replace(values.train, microbatches=4)
    assert runs.check_resume(finished, dataclasses.replace(values, train=parts)) == STEPS
    assert "train.microbatches: 1 -> 4" in capsys.readouterr().out


def test_a_finished_run_that_has_moved_knows_where_its_data_are(
    finished: Path, world: Path, tmp_path: Path
) -> None:
    """And keeps the record of what trained it. A dry run, and one in place, write nothing."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = json.loads((workdir / "run.json").read_text())
    assert before["data"]["directory"].startswith(str(finished))
    trainer.train(config.parse(settings(world)), workdir, dry_run=True)
    assert json.loads((workdir / "run.json").read_text()) == before
    test_train.run(settings(world), workdir)
    after = json.loads((workdir / "run.json").read_text())
    directory = before["data"]["directory"].replace(str(finished), str(workdir))
    assert after == {**before, "data": {**before["data"], "directory": directory}}
    times = [(workdir / name).stat().st_mtime_ns for name in ("run.json", "config.json")]
    test_train.run(settings(world), workdir)
    assert times == [(workdir / name).stat().st_mtime_ns for name in ("run.json", "config.json")]


def test_cache_is_shared_and_a_tokenizer_left_half_written_is_made_whole(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config.parse(settings(world, data__cache=str(tmp_path / "cache")))
    mesh = partitioning.make_mesh(values.mesh)
    first = described(values, tmp_path / "a", mesh)
    kept = Path(first["data"]["directory"]) / "tokenizer"
    assert kept.is_relative_to(tmp_path / "cache")
    assert not (tmp_path / "a").exists()
    assert "learn the BPE" in capsys.readouterr().err
    whole = {path.name: path.read_bytes() for path in kept.iterdir()}
    partial = kept.with_suffix(".partial")
    kept.rename(partial)
    next(partial.iterdir()).write_bytes(b"")
    again = described(values, tmp_path / "b", mesh)
    assert again == first
    assert "learn the BPE" not in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == whole
    assert not partial.exists()


def described(values: config.Config, workdir: Path, mesh: Mesh) -> dict[str, Any]:
    """What run.json would say of the data and the towers."""
    objective = Contrastive(values, workdir, mesh, resuming=False)
    return objective.describe(objective.abstract_batch())


MESHES = {
    "one": config.MeshConfig(data=1),
    "data": config.MeshConfig(data=8),
    "all": config.MeshConfig(data=2, fsdp=2, tensor=2),
}


def few_updates(
    values: config.Config, workdir: Path, state: Any
) -> tuple[list[float], Any, dict[str, float]]:
    """Losses of three updates of a state, the state after them, and an evaluation."""
    mesh = mesh_of(values)
    objective = Contrastive(values, workdir, mesh, resuming=False)
    optimizer = optim.make(values.optimizer, steps=values.train.steps)
    planned = compilation.abstract_state(objective.model, optimizer, mesh)
    partitioning.check_sharded(planned.params, mesh)
    update = compilation.make_update(values, objective.model, optimizer)
    compiled = compilation.compile_step(update, planned, {}, objective.abstract_batch(), mesh)
    placed = jax.tree.map(lambda x: x.sharding, planned)
    state = jax.device_put(state, placed)
    losses = []
    with objective.batches(0) as batches:
        for _ in range(3):
            state, metrics = compiled(state, {}, objective.to_device(next(batches)))
            losses.append(float(metrics["train/loss"]))
    return losses, jax.device_get(state.params), objective.evaluate(state.params, {})


def mesh_of(values: config.Config) -> Mesh:
    """The mesh of the settings, on as many devices as it takes."""
    sizes = values.mesh
    return partitioning.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])


def test_updates_and_evaluation_are_the_same_on_every_mesh(world: Path, tmp_path: Path) -> None:
    """To 1e-5 in fp32, sums in another order.

    Adam's epsilon is so large that gradients that are all rounding make no update.
    """
    changes = {"clip__image__kind": "vit", "optimizer__epsilon": 1e-3}
    values = settings(world, **changes, data__cache=str(tmp_path))
    found, start = {}, None
    for name, sizes in MESHES.items():
        values.mesh.update(vars(sizes))
        parsed = config.parse(values)
        if start is None:
            mesh = mesh_of(parsed)
            model = Contrastive(parsed, tmp_path, mesh, resuming=False).model
            optimizer = optim.make(parsed.optimizer, steps=STEPS)
            start = jax.device_get(
                compilation.init_state(model, optimizer, seed=parsed.seed, mesh=mesh)
            )
        found[name] = few_updates(parsed, tmp_path, start)
    losses, params, scores = found["one"]
    assert losses[2] != pytest.approx(losses[0], abs=0.05)
    for name in ("data", "all"):
        assert found[name][0] == pytest.approx(losses, abs=1e-5)
        assert found[name][2] == pytest.approx(scores, abs=1e-5)
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-5),
            found[name][1],
            params,
        )


@pytest.fixture(scope="module")
def text(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The captions as a text."""
    lines = (world / "captions.jsonl").read_text().splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{number} {text}" for number, text in enumerate(captions)))
    return path


def tokenizer_of(run: Path) -> Path:
    record = json.loads((run / "run.json").read_text())
    return Path(record["data"]["directory"]) / "tokenizer"


@pytest.fixture(scope="module")
def grounded(finished: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of one update, grounded in the text tower of `finished`."""
    workdir = tmp_path_factory.mktemp("grounded")
    changes = {"train__steps": 1, "decoder__layers": 1, "decoder__fusion_layers": (0,)}
    values = test_train.settings(
        text, grounding__tower=str(finished), eval__every_steps=0, **changes
    )
    values.tokenizer.path = str(tokenizer_of(finished))
    metrics = test_train.run(values, workdir)
    assert metrics["train/grounding_attention"][1] > 0
    return workdir


def test_the_tower_of_a_language_model_says_what_its_clip_says(
    finished: Path, grounded: Path
) -> None:
    """To 1e-5 for unit vectors in fp32: packed with an <eos> at the side, and one by one."""
    clip = clip_model.load_clip(finished)
    tower = weights.load(grounded / "tower", kind="clip_text")
    assert tower.sha256 == clip.text_sha256 == clip_text.load_tower(finished).sha256
    assert tower.source == f"{finished}, step {STEPS}"
    assert tower.tokenizer == clip.tokenizer
    tokenizer = tokenizers.load("train", str(tokenizer_of(finished)))
    ids = [tokenizer.encode(text) for text in ("a red ring", "this is a cross", "blue")]
    size = clip.config.text.context - 1
    tokens = np.full((3, size), clip.config.text.end_id, np.int32)
    starts = np.zeros((1, sum(map(len, ids))), bool)
    for row, own in zip(tokens, ids, strict=True):
        row[: len(own)] = own
    ends = np.cumsum([len(own) for own in ids])
    starts[0, [0, *ends[:-1]]] = True
    length = np.array([len(own) for own in ids], np.int32)
    one_by_one = jax.jit(functools.partial(Clip(clip.config).apply, method="encode_text"))
    expected: Any = one_by_one({"params": clip.params}, tokens, length)
    inputs = jnp.asarray(np.concatenate(ids)[None]), jnp.asarray(starts)
    side_by_side = jax.jit(functools.partial(TextTower(tower.tower).apply, readout="eos"))
    packed: Any = side_by_side({"params": tower.params}, *inputs)
    np.testing.assert_allclose(packed[0, ends], expected, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(expected[0] - expected[1])).max() > 1e-2


def test_what_it_took_is_known_of_the_run(finished: Path, world: Path) -> None:
    account = of_settings.account(config.parse(settings(world)))
    assert clips.training(str(finished)) == pytest.approx(account.budget)
    assert clip_model.vision_shape(finished) == clip_model.load_vision(finished).config


def test_another_tokenizer_than_the_tower_s_is_refused_before_compilation(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = test_train.settings(text, grounding__tower=str(finished))
    with pytest.raises(UserError, match="was trained on another train tokenizer than the") as error:
        trainer.train(config.parse(values), tmp_path)
    assert "\n" not in str(error.value)
    assert "compiled" not in capsys.readouterr().out


def test_a_tower_of_another_bpe_than_clip_s_reads_the_language_model_s_tokens(
    text: Path, tmp_path: Path
) -> None:
    """Also where it was trained on GPT-2's: windows hold no tokens of its own."""
    path = tiny_tokenizers.write_pair(tmp_path / "gpt2", *tiny_tokenizers.gpt2_parts())
    tokenizer = tokenizers.load("gpt2", str(path))
    shape = dataclasses.replace(
        small_models.TOWER,
        vocab_size=tokenizer.vocab_size + 1,
        start_id=tokenizer.vocab_size,
        end_id=tokenizer.eos_id,
    )
    weights.save(
        tmp_path / "tower",
        small_models.tower_params(shape),
        config=shape,
        source="made for a test",
        tokenizer={"kind": "gpt2", "fingerprint": tokenizer.fingerprint},
    )
    changes = {"tokenizer__kind": "gpt2", "tokenizer__path": str(path)}
    values = config.parse(
        test_train.settings(text, grounding__tower=str(tmp_path / "tower"), **changes)
    )
    mesh = partitioning.make_mesh(values.mesh)
    objective = Language(values, tmp_path / "run", mesh, resuming=False)
    about = objective.describe(objective.abstract_batch())
    manifest = Windows(about["data"]["directory"], "train").manifest
    assert not manifest.aligned
    assert manifest.tower_record.fingerprint == tokenizer.fingerprint


def test_a_language_model_is_no_tower_and_a_clip_no_language_model(
    finished: Path, grounded: Path, text: Path, tmp_path: Path
) -> None:
    values = test_train.settings(text, grounding__tower=str(grounded))
    values.tokenizer.path = str(tokenizer_of(finished))
    with pytest.raises(UserError, match="is a decoder, expected a CLIP or its text tower"):
        trainer.train(config.parse(values), tmp_path)
    for load in (clip_model.load_clip, clip_model.load_vision):
        with pytest.raises(UserError, match="is a decoder, expected a CLIP"):
            load(grounded)
    with pytest.raises(UserError, match="is a run of a clip, not of a decoder"):
        trained.load(finished)


def test_converted_weights_are_the_clip_of_the_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    command = ["-m", "blindvalm_jax.convert", f"--input={finished}", f"--out={out}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    run, stored = clip_model.load_clip(finished), clip_model.load_clip(out)
    assert done.stdout.splitlines()[-1] == f"sha256 {run.sha256}"
    assert weights.load(out).kind == "clip"
    assert run.sha256 == stored.sha256
    assert run.config == stored.config
    assert (run.text_sha256, run.vision_sha256) == (stored.text_sha256, stored.vision_sha256)
    assert run.tokenizer == stored.tokenizer
    assert stored.tokenizer_directory == out
    assert clip_text.load_tower(out).sha256 == run.text_sha256
    assert clip_model.load_vision(out).sha256 == run.vision_sha256
    assert clip_model.load_vision(finished).sha256 == run.vision_sha256


WIDE: dict[str, Any] = {"width": 1024, "projection": 256}
VISION = {
    "vit": VisionConfig(
        kind="vit", image_size=32, patch=8, layers=1, heads=2, mlp_width=4096, **WIDE
    ),
    "conv": VisionConfig(kind="conv", image_size=64, channels=(128, 256, 512), **WIDE),
}


@pytest.mark.parametrize("kind", VISION)
def test_flops_are_those_that_xla_counts(kind: str) -> None:
    """To 3 %: XLA counts norms and softmax too, keys that are masked, and no padding of images.

    One block a tower, since XLA counts the body of a loop once.
    """
    text = TowerConfig(layers=1, heads=2, mlp_width=4096, vocab_size=64, context=18, **WIDE)
    shape = ClipConfig(text=text, vision=VISION[kind], temperature_start=1.0, temperature_cap=9.0)
    model, rows, size = Model(Clip(shape)), 8, VISION[kind].image_size
    batch = Batch(
        jnp.zeros((rows, size, size, 3), jnp.uint8),
        jnp.zeros((rows, text.context - 1), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
    )
    params = trees.unflatten(weights.abstract_params(shape))
    cost: Any = jax.jit(model.encode).lower(params, batch).compile().cost_analysis()
    assert 3 * cost["flops"] / rows == pytest.approx(flops.per_pair(shape), rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "mesh data=3 fsdp=1 tensor=1 does not fit 8 devices"),
        (
            {"train__batch_size": 12},
            "train.batch_size / train.microbatches is 12, not a multiple of",
        ),
        (
            {
                "mesh__data": 1,
                "mesh__tensor": 8,
                "clip__text__heads": 8,
                "clip__image__channels": [8, 12],
            },
            "clip.image.channels is 12, not a multiple of mesh.tensor = 8",
        ),
        (
            {"mesh__data": 1, "mesh__fsdp": 8, "clip__image__width": 36},
            "clip.image.width is 36, not a multiple of mesh.fsdp = 8",
        ),
        ({"data__images": "nowhere"}, "nowhere/captions.jsonl is missing"),
        ({"data__images": ""}, "set data.images or data.tfds"),
        ({"data__eval_fraction": 0.0}, "no images are held out"),
        ({"tokenizer__kind": "clip"}, "tokenizer.kind=clip needs tokenizer.path"),
        ({"clip__text__heads": 3}, "clip.text.width 32 is not a multiple of clip.text.heads 3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_misfits_are_refused_before_compilation(
    world: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = config.parse(settings(world, **changes))
    with pytest.raises(UserError) as caught:
        # a dry run without images plans from shapes
        trainer.train(given, tmp_path, dry_run=bool(given.data.images))
    assert "compiled" not in capsys.readouterr().out
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_blank_caption_of_a_dataset_is_refused_at_the_start(
    finished: Path, tmp_path: Path
) -> None:
    """Also where the tokenizer is a file, so that nothing is learned from captions."""
    test_images.TinyPictures(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    named = {"data__tfds": "tiny_pictures", "data__tfds_dir": str(tmp_path)}
    values = settings(Path(), **named, data__images="", data__caption_field="spaces")
    values.tokenizer.path = str(tokenizer_of(finished))
    with pytest.raises(UserError, match=r"train:\d: field 'spaces' .*; none may be blank"):
        trainer.train(config.parse(values), tmp_path / "run", dry_run=True)


def test_nothing_need_be_held_out(world: Path, tmp_path: Path) -> None:
    changes = {"data__eval_fraction": 0.0, "eval__every_steps": 0, "train__batch_size": 200}
    values = config.parse(settings(world, **changes))
    mesh = partitioning.make_mesh(values.mesh)
    objective = Contrastive(values, tmp_path, mesh, resuming=False)
    assert objective.describe(objective.abstract_batch())["data"]["train_images"] == 160
    with pytest.raises(ValueError, match="without held-out images"):
        objective.evaluate({}, {})
