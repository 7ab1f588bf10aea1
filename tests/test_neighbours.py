"""Neighbours found ahead are those of the search, tied to all that they depend on."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import files, partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data import packing, pipeline
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import neighbours
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.grounding.neighbours import Features, Neighbours, NeighboursManifest
from blindvalm_jax.grounding.retrieval import Engine, ExactEngine, Retrieved
from tests import dying, small_index, small_text

LENGTH = 16
K = 3
TEXT = small_index.CLIP.text_sha256


class NumpyEngine:
    """Exact search by numpy, the oracle of the others, as an engine."""

    def __init__(self, index: ImageIndex, k: int = K) -> None:
        self.neighbours = k
        self.settings = {"engine": "numpy", "index": index.manifest.key}
        self._keys = index.vectors[:].astype(np.float64)

    def search(self, queries_QE: np.ndarray, *, vectors: bool = True) -> Retrieved:
        scores_QM = queries_QE.astype(np.float64) @ self._keys.T
        index_QK = np.argsort(-scores_QM, axis=1, kind="stable")[:, : self.neighbours]
        scores_QK = np.take_along_axis(scores_QM, index_QK, axis=1)
        return Retrieved(scores_QK, index_QK, self._keys[index_QK] if vectors else None)


def features(rows: pipeline.Batch) -> np.ndarray:
    """Queries that depend on the token and on the token before it."""
    table = np.random.default_rng(0).standard_normal((1000, small_index.WIDTH))
    tokens = rows["tower_tokens"]
    return (table[tokens] + np.roll(table[tokens], 1, axis=1)).astype(np.float32)


def make_inputs(directory: Path) -> None:
    """Windows, and an index of 50 pictures."""
    source = small_text.write_text(directory / "a.txt", small_text.documents(12, longest=40))
    made = packing.Recipe(
        source=source,
        tokenizer=small_text.small_clip(),
        sequence_length=LENGTH,
        eval_fraction=0.2,
        windows_per_shard=50,
    )
    packing.prepare(made, directory / "windows", workers=1)
    small_index.build(directory / "index")


def write(directory: Path, out: Path, **changes: Any) -> NeighboursManifest:
    """The neighbours of the training windows, in shards of 13."""
    index = ImageIndex.open(directory / "index")
    values: dict[str, Any] = {
        "windows": Windows(directory / "windows", "train"),
        "index": index,
        "features": features,
        "engine": NumpyEngine(index),
        "text_sha256": TEXT,
        "readout": "token",
        "batch_size": 4,
        "windows_per_shard": 13,
    }
    return neighbours.write(out, **{**values, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("neighbours")
    make_inputs(directory)
    write(directory, directory / "whole")
    return directory


def content(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_every_token_has_the_neighbours_of_its_feature(inputs: Path) -> None:
    windows = Windows(inputs / "windows", "train")
    engine = NumpyEngine(ImageIndex.open(inputs / "index"))
    opened = Neighbours.open(inputs / "whole")
    assert len(opened) == len(windows) > 26, "too few windows for several shards"
    # eval_batches shows what rows are; here one after the other, in the order of the windows.
    order = pipeline.eval_order(len(windows), 0)
    for place, batch in zip(order, pipeline.eval_batches(windows, batch_size=1), strict=True):
        expected = engine.search(features(batch)[0], vectors=False).index_QK
        found = opened[int(place)]
        assert found.shape == (LENGTH, K)
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, expected)
    for wrong in (-1, len(windows)):
        with pytest.raises(IndexError):
            opened[wrong]


def test_the_engine_of_the_devices_finds_the_same(inputs: Path, tmp_path: Path) -> None:
    index = ImageIndex.open(inputs / "index")
    mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    engine: Engine = ExactEngine(
        index.vectors, neighbours=K, mesh=mesh, index_key=index.manifest.key, queries_at_once=64
    )
    write(inputs, tmp_path, engine=engine)
    opened, expected = Neighbours.open(tmp_path), Neighbours.open(inputs / "whole")
    for window in range(len(expected)):
        np.testing.assert_array_equal(opened[window], expected[window])


def test_neighbours_may_travel_to_another_process(inputs: Path) -> None:
    opened = Neighbours.open(inputs / "whole")
    first = opened[0]
    content = pickle.dumps(opened)
    assert len(content) < 10_000
    np.testing.assert_array_equal(pickle.loads(content)[0], first)


@pytest.mark.parametrize("batch_size", [1, 13, 64])
def test_the_batch_size_does_not_change_a_byte(
    inputs: Path, tmp_path: Path, batch_size: int
) -> None:
    seen = set()

    def watched(rows: pipeline.Batch) -> np.ndarray:
        seen.add(rows["tokens"].shape)
        return features(rows)

    write(inputs, tmp_path, features=watched, batch_size=batch_size)
    assert content(tmp_path) == content(inputs / "whole")
    assert seen == {(batch_size, LENGTH)}, "more than one shape"


WRITE = """
from tests import test_neighbours
features = dying(test_neighbours.features)
test_neighbours.write(Path(sys.argv[1]), Path(sys.argv[2]), features=features)
"""


def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    moments = dying.moments(WRITE, inputs, tmp_path / "lived")
    for left in (*random.Random(0).sample(range(1, moments - 1), 2), moments - 1):
        out = tmp_path / f"killed{left}"
        dying.kill(left, WRITE, inputs, out)
        write(inputs, out)
        assert content(out) == content(inputs / "whole")


def failing_once(calls: list[int]) -> Features:
    """`features` that fails in its sixth batch, in the second shard; calls: batches so far."""

    def run(rows: pipeline.Batch) -> np.ndarray:
        calls.append(len(rows["tokens"]))
        if len(calls) == 6:
            raise RuntimeError("no more power")
        return features(rows)

    return run


def test_finished_shards_are_not_searched_again(inputs: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    broken = failing_once(calls)
    rounding = {"devices": 8}
    with pytest.raises(RuntimeError, match="no more power"):
        write(inputs, tmp_path, features=broken, rounding=rounding)
    with pytest.raises(UserError, match="no finished neighbours there, write them again"):
        Neighbours.open(tmp_path)
    changes: dict[str, dict[str, Any]] = {
        "batch_size": {"batch_size": 2, "rounding": rounding},
        "devices": {"rounding": {"devices": 3}},
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=f"was made with {name} .*, expected"):
            write(inputs, tmp_path, **change)
    write(inputs, tmp_path, features=broken, rounding=rounding)
    # A shard takes 4 batches (of 13 windows); the second shard is begun again.
    batches = sum(-(-min(13, n) // 4) for n in _shard_sizes(inputs))
    assert len(calls) == 6 + batches - 4
    assert content(tmp_path) == content(inputs / "whole")


def test_work_begun_before_a_rounding_was_recorded_goes_on(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = failing_once([])
    rounding = {"devices": 8}
    with pytest.raises(RuntimeError, match="no more power"):
        write(inputs, tmp_path, features=broken, rounding=rounding)
    plan = tmp_path / "work" / "plan.json"
    values = files.read_object(plan)
    del values["batch_size"]
    files.write_json(plan, values)
    with pytest.raises(UserError, match="was made with devices 8, expected 1"):
        write(inputs, tmp_path, rounding={"devices": 1})
    capsys.readouterr()
    write(inputs, tmp_path, rounding=rounding)
    assert "plan.json does not say batch_size of what is" in capsys.readouterr().err
    assert content(tmp_path) == content(inputs / "whole")


def test_neighbours_of_an_engine_that_said_less_are_kept(inputs: Path, tmp_path: Path) -> None:
    engine = NumpyEngine(ImageIndex.open(inputs / "index"))
    engine.settings |= {"made_by": "1.8.0"}
    write(inputs, tmp_path, engine=engine)
    younger = NumpyEngine(ImageIndex.open(inputs / "index"))
    younger.settings |= {"made_by": "1.8.0", "sha256": "a"}
    before = content(tmp_path)
    write(inputs, tmp_path, engine=younger)
    younger.settings["made_by"] = "1.9.0"
    with pytest.raises(UserError, match=r"was made with engine .*1\.8\.0.*, expected .*1\.9\.0"):
        write(inputs, tmp_path, engine=younger)
    with pytest.raises(UserError, match=r"was made with engine .*1\.8\.0"):
        write(inputs, tmp_path)  # an engine without what is there
    assert content(tmp_path) == before


def _shard_sizes(inputs: Path) -> list[int]:
    count = len(Windows(inputs / "windows", "train"))
    return [min(13, count - first) for first in range(0, count, 13)]


def test_what_does_not_match_is_refused_on_reading(inputs: Path, tmp_path: Path) -> None:
    small_index.build(tmp_path / "other", 49)
    opened = Neighbours.open(inputs / "whole")
    fitting: dict[str, Any] = {
        "windows": Windows(inputs / "windows", "train"),
        "index": ImageIndex.open(inputs / "index"),
        "text_sha256": TEXT,
        "readout": "token",
        "neighbours": K,
    }
    opened.check(**fitting)
    changes: dict[str, dict[str, Any]] = {
        "split": {"windows": Windows(inputs / "windows", "eval")},
        "index_key": {"index": ImageIndex.open(tmp_path / "other")},
        "text_sha256": {"text_sha256": "x" * 64},
        "readout": {"readout": "eos"},
        "neighbours": {"neighbours": 4},
    }
    for field, change in changes.items():
        with pytest.raises(UserError, match=f"was made with {field} .*, expected "):
            opened.check(**{**fitting, **change})


def test_what_does_not_match_is_refused_on_writing(inputs: Path, tmp_path: Path) -> None:
    small_index.build(tmp_path / "other", 49)
    other = ImageIndex.open(tmp_path / "other")
    with pytest.raises(UserError, match="belongs to the text tower"):
        write(inputs, tmp_path / "out", text_sha256="x" * 64)
    with pytest.raises(UserError, match="the engine searches the index"):
        write(inputs, tmp_path / "out", engine=NumpyEngine(other))
    with pytest.raises(UserError, match=r"features of shape \(4, 15, 16\), expected \(4, 16, E\)"):
        write(inputs, tmp_path / "out", features=lambda rows: features(rows)[:, 1:])
    for out in (tmp_path / "out", inputs / "whole"):  # begun, finished
        before = content(out)
        with pytest.raises(UserError, match="was made with readout 'token', expected 'eos'"):
            write(inputs, out, readout="eos")
        index = ImageIndex.open(inputs / "index")
        with pytest.raises(UserError, match="was made with neighbours 3, expected 2"):
            write(inputs, out, engine=NumpyEngine(index, 2))
        assert content(out) == before


def test_damage_is_one_clear_line(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished neighbours there, write them first"):
        Neighbours.open(tmp_path)
    write(inputs, tmp_path)
    path = tmp_path / "neighbours-00001.npy"
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    with pytest.raises(UserError, match="neighbours-00001.npy is damaged"):
        Neighbours.open(tmp_path)[14]
    path.write_bytes(good[:-4])
    with pytest.raises(UserError, match=r"has \d+ bytes, the manifest says"):
        Neighbours.open(tmp_path)
    path.write_bytes(good)
    manifest = tmp_path / neighbours.FILE_NAME
    values = json.loads(manifest.read_bytes())
    for change, message in (
        ({"format": 9}, "format 9, this program reads 1"),
        ({"windows": 1}, "damaged"),
        ({"unknown": 1}, "damaged"),
    ):
        manifest.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=message):
            Neighbours.open(tmp_path)
