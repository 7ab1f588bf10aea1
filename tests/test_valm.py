"""VALM in the trainer: every search gives the same run, on every mesh, and misfits are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh

from blindvalm_jax import config, files, indexing, partitioning, runs, trained, trainer
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data import images
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import retrieval
from blindvalm_jax.grounding.faiss_engine import INDEX_FILE, RECORD_FILE, FaissEngine
from blindvalm_jax.grounding.images import on_devices
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.grounding.retrieval import Engine, ExactEngine
from blindvalm_jax.interop import clip_model, clip_text
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.objectives import language_model
from blindvalm_jax.objectives.language import Language
from tests import small_models, small_valm, test_fusion, test_train

K = 3


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("valm"))


def write_inputs(directory: Path) -> Path:
    """Writes clip/, images/, index/ and windows/; the directory."""
    clip = small_valm.write_clip(directory / "clip")
    small_valm.write_images(directory / "images")
    build_index(directory / "index", directory / "images", clip)
    small_valm.write_windows(directory / "windows", clip)
    return directory


def build_index(out: Path, folder: Path, clip: Path) -> None:
    indexing.build(
        out, images.FolderImages(folder), clip_model.load_clip(clip), name="test", batch_size=16
    )


def find_neighbours(inputs: Path, out: Path, *, readout: Readout = "token") -> Path:
    index = ImageIndex.open(inputs / "index")

    def engine(mesh: Mesh) -> Engine:
        key = index.manifest.key
        return ExactEngine(index.vectors, neighbours=K, mesh=mesh, index_key=key)

    tower = clip_text.load_tower(inputs / "clip")
    indexing.find_neighbours(
        out, inputs / "windows", index, tower, readout=readout, batch_size=8, engine=engine
    )
    return out


@pytest.fixture(scope="module")
def prepared(inputs: Path) -> Path:
    return find_neighbours(inputs, inputs / "prepared")


def settings(inputs: Path, **changes: Any) -> ml_collections.ConfigDict:
    """A VALM that searches exactly, on rows of 32 tokens."""
    values: dict[str, Any] = {
        "data__files": "",
        "data__windows": str(inputs / "windows"),
        "tokenizer__kind": "clip",
        "tokenizer__path": str(inputs / "clip"),
        "grounding__source": "images",
        "grounding__tower": str(inputs / "clip"),
        "grounding__index": str(inputs / "index"),
        "grounding__neighbours": K,
        "train__steps": 4,
        "eval__every_steps": 0,
        "eval__windows": 16,
    }
    return test_train.settings(Path(), **(values | changes))


def prepare_objective(
    inputs: Path, workdir: Path, mesh: Mesh, **changes: Any
) -> tuple[Language, dict[str, Any]]:
    """What the trainer makes of the settings, and its frozen parameters."""
    parsed = config.parse(settings(inputs, eval__every_steps=1, **changes))
    objective = Language(parsed, workdir, mesh, resuming=False)
    return objective, objective.place_frozen(objective.abstract_frozen(), resuming=False)


def held_out_loss(inputs: Path, workdir: Path, mesh: Mesh, **changes: Any) -> float:
    """The loss of random parameters, the same whatever the search and the mesh."""
    objective, frozen = prepare_objective(inputs, workdir, mesh, **changes)
    params = small_models.random_params(objective.model.init, seed=0)
    return objective.evaluate(params, frozen)["eval/loss"]


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return partitioning.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    test_train.run(settings(inputs), workdir)
    return workdir


def test_a_run_that_was_cut_ends_bit_identical(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    metrics = test_train.run(settings(inputs), tmp_path)
    whole = test_train.read_metrics(finished)
    assert test_train.computed(metrics) == test_train.computed(whole)
    assert sorted(whole["train/loss"]) == [1, 2, 3, 4]
    assert len(set(whole["train/loss"].values())) == 4
    assert all(0 < share < 1 for share in whole["train/grounding_attention"].values())


def test_a_moved_run_ends_bit_identical_and_is_read_from_anywhere(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tower, index and windows lie elsewhere, and are named from there."""
    shutil.copytree(inputs, tmp_path / "inputs")
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    monkeypatch.chdir(tmp_path)
    metrics = test_train.run(settings(Path("inputs")), Path("run"))
    assert test_train.computed(metrics) == test_train.computed(test_train.read_metrics(finished))
    grounding = files.read_object(tmp_path / "run" / "config.json")["grounding"]
    assert grounding["tower"] == str(tmp_path / "inputs" / "clip")
    assert grounding["index"] == str(tmp_path / "inputs" / "index")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    found = trained.load("../run")
    assert found.images is not None
    assert found.images.index.directory == tmp_path / "inputs" / "index"


def test_another_tower_or_index_than_a_run_s_is_refused(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    other = small_valm.write_clip(tmp_path / "clip", seed=1)
    small_valm.write_images(tmp_path / "images", count=20)
    build_index(tmp_path / "index", tmp_path / "images", inputs / "clip")
    for changes, message in (
        ({"grounding__tower": str(other)}, r"with another tower \(made for a test\) than .*/clip"),
        ({"grounding__index": str(tmp_path / "index")}, "trained on another image index than"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            trainer.train(config.parse(settings(inputs, **changes)), finished)
        assert "\n" not in str(caught.value)


def test_a_run_does_not_resume_on_another_index_at_the_same_place(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    about = files.read_object(finished / "run.json")
    runs.check_data(finished, about)
    small_valm.write_images(tmp_path / "images", count=20)
    build_index(tmp_path / "index", tmp_path / "images", inputs / "clip")
    key = ImageIndex.open(tmp_path / "index").manifest.key
    with pytest.raises(UserError, match="trained on another image index than .*index is now"):
        runs.check_data(finished, {**about, "images": {**about["images"], "key": key}})
    shutil.copytree(finished, tmp_path / "run")
    config_file = tmp_path / "run" / "config.json"
    values = files.read_object(config_file)
    values["grounding"]["index"] = str(tmp_path / "index")
    files.write_json(config_file, values)
    with pytest.raises(UserError, match="trained on another image index than .*index is now"):
        trained.load(tmp_path / "run")


def assert_same_losses(workdir: Path, values: ml_collections.ConfigDict, finished: Path) -> None:
    """1e-6 at the first step: two fp32 ulp of its loss; 1e-5 after updates."""
    losses = test_train.run(values, workdir)["train/loss"]
    expected = test_train.read_metrics(finished)["train/loss"]
    assert losses[1] == pytest.approx(expected[1], abs=1e-6)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_neighbours_found_ahead_train_the_same_run(
    inputs: Path, finished: Path, prepared: Path, tmp_path: Path
) -> None:
    changes = {"grounding__search": "prepared", "grounding__prepared": str(prepared)}
    assert_same_losses(tmp_path / "run", settings(inputs, **changes), finished)
    moved = {**changes, "grounding__prepared": str(tmp_path / "moved")}
    shutil.copytree(prepared, tmp_path / "moved")
    trainer.train(config.parse(settings(inputs, **moved)), tmp_path / "run")
    manifest = tmp_path / "moved" / "train" / "manifest.json"
    values = files.read_object(manifest)
    values["shards"][0]["sha256"] = "0" * 64
    files.write_json(manifest, values)
    with pytest.raises(UserError, match=r"was trained with other neighbours \(.*/train\)"):
        trainer.train(config.parse(settings(inputs, **moved)), tmp_path / "run")


@pytest.mark.faiss
def test_faiss_trains_the_same_run_where_its_answers_are_exact(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    """All of the index are candidates that are ranked again."""
    shutil.copytree(inputs / "index", tmp_path / "index")
    changes = {
        "grounding__index": str(tmp_path / "index"),
        "grounding__search": "faiss",
        "grounding__nprobe": 2,
        "grounding__rerank": small_valm.IMAGES,
        "grounding__lists": 2,
        "grounding__code_bytes": 4,
    }
    assert_same_losses(tmp_path / "run", settings(inputs, **changes), finished)
    record = files.read_object(tmp_path / "run" / "run.json")
    faiss = record["images"]["faiss"]
    assert {name: faiss[name] for name in ("lists", "code_bytes", "nprobe", "candidates")} == {
        "lists": 2,
        "code_bytes": 4,
        "nprobe": 2,
        "candidates": small_valm.IMAGES,
    }
    assert faiss["made_by"] == faiss["searched_by"] == importlib.import_module("faiss").__version__
    as_there = {**changes, "grounding__lists": 0, "grounding__code_bytes": 0}
    trainer.train(config.parse(settings(inputs, **as_there)), tmp_path / "as_there")
    opened, there = ImageIndex.open(tmp_path / "index"), {"lists": 2, "code_bytes": 4}
    assert trained.load(tmp_path / "as_there").images is not None
    same = rewrite_other_answers(opened, neighbours=K, **there)
    assert {name for name in same if same[name] != faiss.get(name)} == {"sha256"}
    for ask in (trainer.train, lambda _, workdir: trained.load(workdir)):
        with pytest.raises(UserError, match="a FAISS index with sha256 .* the one in .*: bring"):
            ask(config.parse(settings(inputs, **changes)), tmp_path / "run")
    FaissEngine(opened, neighbours=K, lists=4, code_bytes=4, rebuild=True)
    with pytest.raises(UserError, match=r"was trained with lists 4, .*, expected lists 2, code"):
        trainer.train(config.parse(settings(inputs, **changes)), tmp_path / "run")
    with pytest.raises(UserError, match="a FAISS index with lists 2, the one in .* has 4: bring"):
        trainer.train(config.parse(settings(inputs, **as_there)), tmp_path / "as_there")


def rewrite_other_answers(index: ImageIndex, **arguments: Any) -> dict[str, Any]:
    """Makes FAISS's index of the same settings and size with its vectors swapped; its settings."""
    path, record = index.directory / INDEX_FILE, index.directory / RECORD_FILE
    faiss = importlib.import_module("faiss")
    made = faiss.read_index(str(path))
    made.reset()
    made.add(np.ascontiguousarray(index.vectors[:].astype(np.float32)[::-1]))
    faiss.write_index(made, str(path))
    values = files.read_object(record)
    assert path.stat().st_size == values["bytes"]
    files.write_json(record, {**values, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    return FaissEngine(index, nprobe=2, candidates=small_valm.IMAGES, **arguments).settings


def test_another_faiss_is_refused_or_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What decides its answers is compared; the version that searches, and old records, are not."""
    same = {"tokenizer": {"fingerprint": "t"}, "data": {"key": "d", "directory": "/d"}}
    versions = {"made_by": "1.8.0", "searched_by": "1.8.0"}
    faiss: dict[str, Any] = {"lists": 4, "nprobe": 4, **versions, "sha256": "a"}

    def about(faiss: dict[str, Any] | None) -> dict[str, Any]:
        return {**same, "images": {"key": "i", "index": "/index", "faiss": faiss}}

    def write(about: dict[str, Any]) -> None:
        files.write_json(tmp_path / "run.json", {**about, "config_as_given": {}, "starts": []})

    write(about(faiss))
    runs.check_data(tmp_path, about(faiss))
    assert capsys.readouterr().out == ""
    for name, value in (("lists", 8), ("nprobe", 2), ("made_by", "1.9.0"), ("sha256", "b")):
        with pytest.raises(UserError, match=f"a FAISS index with {name} .*{value}"):
            runs.check_data(tmp_path, about({**faiss, name: value}))
    runs.check_data(tmp_path, about({**faiss, "searched_by": "1.9.0"}))
    assert "another version of FAISS: '1.8.0' -> '1.9.0'" in capsys.readouterr().out
    write(about({**faiss, "sha256": None}))
    runs.check_data(tmp_path, about(faiss))
    assert "does not say sha256 of FAISS's index" in capsys.readouterr().out
    old = about(faiss)
    del old["images"]["faiss"]
    write(old)
    runs.check_data(tmp_path, about(faiss))
    assert "does not say how FAISS searched before" in capsys.readouterr().out


def test_held_out_loss_is_equal_on_every_mesh_and_ahead(
    inputs: Path, prepared: Path, tmp_path: Path
) -> None:
    """1e-5 for sums in another order, of a loss near 5."""
    ahead = {"grounding__search": "prepared", "grounding__prepared": str(prepared)}
    losses = [
        held_out_loss(inputs, tmp_path / "8", mesh_of(8, 1, 1)),
        held_out_loss(inputs, tmp_path / "2,2,2", mesh_of(2, 2, 2)),
        held_out_loss(inputs, tmp_path / "1", mesh_of(1, 1, 1)),
        held_out_loss(inputs, tmp_path / "ahead", mesh_of(1, 1, 1), **ahead),
    ]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    fewer = held_out_loss(inputs, tmp_path / "1 of 3", mesh_of(1, 1, 1), grounding__neighbours=1)
    assert abs(fewer - losses[0]) > 1e-3


def test_misfits_are_refused_before_compilation(
    inputs: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_valm.write_clip(tmp_path / "other", seed=1)
    build_index(tmp_path / "index", inputs / "images", other)
    ahead = {"grounding__search": "prepared", "grounding__prepared": str(prepared)}
    cut = tmp_path / "cut"
    shutil.copytree(prepared / "train", cut / "train")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"grounding__index": str(tmp_path / "index")}, "belongs to the text tower"),
        ({"grounding__index": str(tmp_path)}, "holds no finished image index: build one there"),
        ({"grounding__neighbours": 301}, "grounding.neighbours is 301, the index"),
        ({**ahead, "grounding__readout": "eos"}, "was made with readout 'token', expected 'eos'"),
        ({**ahead, "grounding__neighbours": 2}, "was made with neighbours 3, expected 2"),
        ({**ahead, "grounding__prepared": str(tmp_path)}, "no finished neighbours there"),
        (
            {**ahead, "grounding__prepared": str(cut), "eval__every_steps": 2},
            "eval/manifest.json is missing",
        ),
    ]
    for number, (changes, message) in enumerate(cases):
        values = settings(inputs, **changes)
        with pytest.raises(UserError) as caught:
            trainer.train(config.parse(values), tmp_path / str(number), dry_run=True)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize("readout", ["token", "eos"])
def test_features_are_what_numpy_finds(inputs: Path, tmp_path: Path, readout: str) -> None:
    """The K nearest by argsort in float64, where they are apart by more than fp32 rounds."""
    mesh = mesh_of(2, 2, 2)
    objective, frozen = prepare_objective(inputs, tmp_path, mesh, grounding__readout=readout)
    with objective.batches(0) as batches:
        batch = objective.to_device(next(batches))
    blind = dataclasses.replace(objective.model, search=None)
    with partitioning.use(mesh):
        found = np.asarray(jax.jit(objective.model.features)(frozen, batch))
        queries = np.asarray(jax.jit(blind.features)(frozen, batch))[:, :, 0]
    keys = ImageIndex.open(inputs / "index").vectors[:].astype(np.float64)
    scores = queries.astype(np.float64) @ keys.T
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)[:, :, : K + 1]
    clear = np.diff(-ranked, axis=-1).min(axis=-1) > 1e-5
    assert clear.mean() > 0.95
    assert found.shape == (8, small_valm.LENGTH, K, 16)
    np.testing.assert_array_equal(found[clear], keys[order[clear][:, :K]])
    assert len(np.unique(order[:, :, 0])) > 5, "all tokens find the same images"


def test_later_text_changes_neither_images_nor_logits_before_it() -> None:
    """Exactly, through cuts, tower, search and decoder, as without images (see test_fusion)."""
    tower = dataclasses.replace(
        small_models.TOWER, vocab_size=49408, context=77, start_id=49406, end_id=49407
    )
    keys = np.random.default_rng(0).standard_normal((50, tower.projection))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    mesh = mesh_of(8, 1, 1)
    search = on_devices(mesh, count=50, neighbours=K)
    decoder = test_fusion.fused(width=tower.projection)
    model = language_model.Model(decoder, TextTower(tower), search=search)
    frozen = {
        "tower": small_models.tower_params(tower),
        "index": retrieval.place_keys(keys, mesh, dtype=jnp.float32),
    }
    grounded = model, small_models.decoder_params(decoder), frozen
    places = np.array([0, 1, 20, 55, 74, 75, 76, 110])
    size = 120
    tokens = np.repeat(test_fusion.random_tokens(1, 1, size), len(places), axis=0)
    later = np.arange(size) > places[:, None]
    others = test_fusion.random_tokens(2, len(places), size, marks=0.4)
    others = np.where(later, others, tokens)
    z, before = test_fusion.run_rows(grounded, tokens, "causal")
    other_z, after = test_fusion.run_rows(grounded, others, "causal")
    np.testing.assert_array_equal(z[~later], other_z[~later])
    np.testing.assert_array_equal(before[~later], after[~later])
    assert (z[later] != other_z[later]).any(axis=(-1, -2)).mean() > 0.5
    assert (np.abs(before - after).max(axis=-1)[:, -1] > 0.01).all()
