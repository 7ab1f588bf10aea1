"""`python -m blindvalm_jax.index` as a user meets it: what it writes, says and refuses."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from blindvalm_jax import indexing
from blindvalm_jax.data import images
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import text
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.grounding.neighbours import Neighbours
from blindvalm_jax.interop import clip_model, clip_text, weights
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.models.vision import VisionTower
from tests import dying, small_valm

ROOT = Path(__file__).resolve().parents[1]
K = 3

# Several command lines in one process, as the imports take longer than all else.
COMMANDS = """
import contextlib, io, json, sys
from absl import flags
from blindvalm_jax import command_line, index
for arguments in json.load(sys.stdin):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    sys.argv = ["index", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line.run_main(index.main)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def commands(*lines: list[str]) -> list[Any]:
    """Exit code, output and errors of each."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clip/, images/ and windows/, and index/ and found/ that the command wrote."""
    directory = tmp_path_factory.mktemp("command")
    clip = small_valm.write_clip(directory / "clip")
    small_valm.write_images(directory / "images")
    small_valm.write_windows(directory / "windows", clip)
    lines = (
        build(directory, "index", "--batch_size=7", "--shard_size=100"),
        [
            *("neighbours", f"--clip={clip}", f"--index={directory}/index", f"--neighbours={K}"),
            *(f"--windows={directory}/windows", f"--out={directory}/found", "--batch_size=8"),
        ],
    )
    (directory / "said.json").write_text(json.dumps(commands(*lines)))
    return directory


def build(inputs: Path, out: str, *more: str) -> list[str]:
    line = ["build", f"--clip={inputs}/clip", f"--images={inputs}/images", f"--out={inputs}/{out}"]
    return [*line, *more]


def test_vectors_are_those_of_the_tower_image_by_image(inputs: Path) -> None:
    """fp32 sums of another batch size: 1e-6; float16 keeps 11 bits of values below 1: 5e-4."""
    clip = clip_model.load_clip(inputs / "clip")
    source = images.FolderImages(inputs / "images")
    index = ImageIndex.open(inputs / "index")
    assert len(index.vectors) == len(source) == small_valm.IMAGES
    assert index.manifest.text_sha256 == clip.text_sha256
    assert index.manifest.vision_sha256 == clip.vision_sha256
    assert index.manifest.dtype == "float16"
    for place in (0, 99, 100, 299):  # both sides of a shard's end
        pixels = images.resize(source[place].image, small_valm.SIZE)[None]
        tower = VisionTower(clip.config.vision)
        want = np.asarray(tower.apply({"params": clip.params["vision"]}, pixels))
        np.testing.assert_allclose(index.vectors.rows(np.array([place])), want, rtol=0, atol=5e-4)
    record = index.items(np.array([100]))
    assert record == [{"id": "100.png", "caption": "the picture 100"}]


def test_neighbours_of_both_splits_are_of_this_index(inputs: Path) -> None:
    for split in ("train", "eval"):
        found = Neighbours.open(inputs / "found" / split)
        assert found[0].shape == (small_valm.LENGTH, K)
        assert found.manifest.index_key == ImageIndex.open(inputs / "index").manifest.key
        assert (found.manifest.readout, found.manifest.dtype) == ("token", "float32")


def test_both_say_what_was_made(inputs: Path) -> None:
    (built, found) = json.loads((inputs / "said.json").read_text())
    assert built[0] == found[0] == 0
    assert f"{inputs}/index: 300 vectors of width 16 in float16" in built[1]
    assert "images/s" in built[1]
    assert f"{inputs}/found/eval: {K} neighbours" in found[1]


def test_a_build_that_goes_on_reads_no_image_again_to_know_it(inputs: Path, tmp_path: Path) -> None:
    """An image of other bytes, but the same size and time of change, is known by its kept hash."""
    for name in ("clip", "images"):
        shutil.copytree(inputs / name, tmp_path / name)
    line = build(tmp_path, "index", "--shard_size=100")
    assert commands(line)[0][0] == 0
    hashes = tmp_path / "index" / "file_hashes.json"
    assert len(json.loads(hashes.read_bytes())) == small_valm.IMAGES
    path = tmp_path / "images" / "7.png"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert commands(line)[0][0] == 0
    known = images.FolderImages(tmp_path / "images", digests=hashes)
    read = images.FolderImages(tmp_path / "images")
    assert images.fingerprint(known) != images.fingerprint(read)


def test_damaged_and_missing_images_are_left_out_where_that_is_allowed(
    inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "clip", tmp_path / "clip")
    small_valm.write_images(tmp_path / "images", count=20)
    cut = tmp_path / "images" / "12.png"
    cut.write_bytes(cut.read_bytes()[:60])
    line = build(tmp_path, "index", "--shard_size=5", "--batch_size=4")
    missing = tmp_path / "images" / "3.png"
    refused = commands(line)[0]
    assert len(list((tmp_path / "index").glob("vectors-*.npy"))) == 2
    (tmp_path / "gone").mkdir()
    shutil.copytree(tmp_path / "images", tmp_path / "gone" / "images")
    shutil.copytree(tmp_path / "clip", tmp_path / "gone" / "clip")
    (tmp_path / "gone" / "images" / missing.name).unlink()
    without = build(tmp_path / "gone", "index", "--shard_size=5", "--batch_size=4")
    went_on, absent, both, again = commands(
        [*line, "--skip_damaged"], without, [*without, "--skip_damaged"], line
    )
    assert (refused[0], absent[0], again[0]) == (1, 1, 1)
    assert f"error: {cut} cannot be read as an image" in refused[2]
    assert "captions.jsonl:4: there is no image" in absent[2]
    assert "names damaged images that were left out" in again[2]
    for said, out, lost in ((went_on, tmp_path, ["12"]), (both, tmp_path / "gone", ["3", "12"])):
        assert said[0] == 0, said
        assert f"{len(lost)} damaged images were left out" in said[1]
        opened = ImageIndex.open(out / "index")
        assert opened.manifest.damaged == len(lost)
        names = [record["id"] for record in opened.items(np.arange(len(opened.vectors)))]
        assert names == [f"{n}.png" for n in range(20) if str(n) not in lost]
        records = [path.read_text() for path in sorted((out / "index").glob("damaged-*.jsonl"))]
        assert records == [json.dumps({"id": f"{n}.png"}) + "\n" for n in lost]


KILLED = """
import contextlib, io, jax
from absl import flags
from blindvalm_jax import index, indexing
jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
make = indexing.image_encoder
indexing.image_encoder = lambda *arguments: dying(make(*arguments))
with contextlib.redirect_stdout(io.StringIO()):
    index.main(flags.FLAGS(["index", *sys.argv[1:]]))
"""


def test_a_build_with_a_real_tower_killed_midway_goes_on_to_the_same_bytes(
    inputs: Path, tmp_path: Path
) -> None:
    """With the batches and devices that it began with; with others it is refused."""
    whole: dict[str, Any] = {"shard_size": 48, "batch_size": 16, "dtype": "float32"}

    def line(out: str) -> list[str]:
        given = {"clip": inputs / "clip", "images": inputs / "images", "out": tmp_path / out}
        return ["build", *(f"--{name}={value}" for name, value in (given | whole).items())]

    def files(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.*")}

    moments = dying.moments(KILLED, 2, *line("whole"))
    dying.kill(moments // 2, KILLED, 2, *line("killed"))
    assert 0 < len(list((tmp_path / "killed").glob("vectors-*.npy"))) < 7
    assert not (tmp_path / "killed" / "manifest.json").exists()
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "made with devices 2, expected 8"),
        ({"batch_size": 8}, "made with batch_size 16, expected 8"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            indexing.build(
                tmp_path / "killed",
                images.FolderImages(inputs / "images"),
                clip_model.load_clip(inputs / "clip"),
                name="in another process",
                **{**whole, **changes},
            )
    dying.moments(KILLED, 2, *line("killed"))
    assert files("killed") == files("whole")


@pytest.mark.faiss
def test_recall_is_one_where_every_list_is_visited_and_all_are_ranked_again(
    inputs: Path, tmp_path: Path
) -> None:
    line = ["recall", f"--index={inputs}/index", f"--neighbours={K}", "--queries=40"]
    everything = [*line, "--nprobe=1000", "--rerank=300", f"--json={tmp_path}/all.json"]
    text = [f"--clip={inputs}/clip", f"--windows={inputs}/windows", f"--json={tmp_path}/text.json"]
    plain = [*line, f"--json={tmp_path}/plain.json"]
    lines = everything, plain, [*line, *text], [*everything, *text[:2]]
    for number, (code, out, err) in enumerate(commands(*lines)):
        assert code == 0, err
        asked, head, *rows = out.splitlines()
        told = (
            "40 queries: features of the text tower (token) at tokens of"
            if number > 1
            else ("40 queries: vectors of the index with noise of norm 0.5, no text")
        )
        assert asked.startswith(told)
        assert "recall@3" in head
        assert [text.split()[0] for text in rows] == ["exact", "faiss"]
        assert ("note: nprobe 1000 is more than the 4 lists" in err) == (number in (0, 3))
    asked = {}
    for name, whole in (("all", True), ("plain", False), ("text", False)):
        written = json.loads((tmp_path / f"{name}.json").read_text())
        asked[name] = written["queries"]
        exact, faiss = written["searches"]
        assert exact["recall"] == 1.0
        assert 0.3 < faiss["recall"] <= 1.0
        assert (faiss["recall"] == 1.0) == whole
        assert faiss["queries_per_second"] > 0
        assert faiss["settings"]["nprobe"] == 4, "not what is really visited"
    assert asked["plain"] == {"kind": "images", "noise": 0.5, "count": 40, "seed": 0}
    assert asked["text"] == {
        "kind": "text",
        "windows": Windows(inputs / "windows", "train").manifest.key,
        "text_sha256": ImageIndex.open(inputs / "index").manifest.text_sha256,
        "readout": "token",
        "dtype": "float32",
        "count": 40,
        "seed": 0,
    }


@pytest.mark.faiss
def test_faiss_is_made_with_the_lists_and_codes_that_are_asked_for(
    inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "index", tmp_path / "index", ignore=shutil.ignore_patterns("faiss*"))
    line = ["recall", f"--index={tmp_path}/index", "--queries=8", f"--json={tmp_path}/found.json"]
    chosen = [*line, "--lists=2", "--code_bytes=8"]
    other = [*line, "--lists=3", "--code_bytes=8"]
    said = commands(chosen, line, other, [*other, "--rebuild"], [*line, "--lists=-1", "--rebuild"])
    assert [code for code, _, _ in said] == [0, 0, 1, 0, 1]
    assert "was trained with lists 2, code_bytes 8, expected lists 3, code_bytes 8" in said[2][2]
    assert "-1 lists, codes of 4 bytes: there must be a list" in said[4][2]
    made = json.loads((tmp_path / "found.json").read_text())["searches"][1]["settings"]
    assert (made["lists"], made["code_bytes"], made["nprobe"]) == (3, 8, 3)


@pytest.mark.faiss
def test_the_command_that_a_damaged_faiss_file_names_mends_it(inputs: Path, tmp_path: Path) -> None:
    """Neither search nor verify takes it before; settings are those that were there."""
    copy = tmp_path / "of mine"
    shutil.copytree(inputs / "index", copy, ignore=shutil.ignore_patterns("faiss*"))
    recall, verify = ["recall", f"--index={copy}", "--queries=8"], ["verify", f"--index={copy}"]
    made, whole = commands([*recall, "--lists=3", "--code_bytes=8"], verify)
    assert (made[0], whole[0]) == (0, 0)
    path = copy / "faiss.index"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    [changed] = commands(verify)
    assert changed[0] == 1
    assert "faiss.index has sha256" in changed[2]
    path.unlink()
    [missing] = commands(recall)
    assert missing[0] == 1
    arguments = shlex.split(missing[2].partition("-m blindvalm_jax.index ")[2])
    assert arguments[0] == "recall"
    mended, whole = commands([*arguments, "--queries=8"], verify)
    assert (mended[0], whole[0]) == (0, 0), mended
    assert path.read_bytes() == good
    record = json.loads((copy / "faiss.json").read_text())
    del record["sha256"]
    (copy / "faiss.json").write_text(json.dumps(record))
    [old] = commands(verify)
    assert old[:2] == [0, f"{copy}: 300 vectors, every file but faiss.index as it was written\n"]
    assert "cannot be checked" in old[2]


@pytest.mark.parametrize("readout", ["token", "eos"])
def test_queries_of_text_are_what_the_tower_says_at_real_tokens(
    inputs: Path, readout: Readout
) -> None:
    """Tokens one by one, in rows of their own; 1e-5: fp32 sums of other batches."""
    index, split = ImageIndex.open(inputs / "index"), Windows(inputs / "windows", "train")
    tower = clip_text.load_tower(inputs / "clip")
    asked = indexing.text_queries(
        index, inputs / "windows", tower, 37, readout=readout, batch_size=8, seed=3
    )
    drawn = indexing.real_tokens(split, 37, seed=3)
    features = functools.partial(text.features, TextTower(tower.config), readout=readout)
    say = jax.jit(features)
    for vector, (window, position) in zip(asked.vectors, drawn, strict=True):
        row = split[int(window)]
        tokens, starts = (jnp.asarray(row[f"tower_{name}"])[None] for name in ("tokens", "starts"))
        said = say(tower.params, text.TowerInput(tokens, starts))
        np.testing.assert_allclose(vector, said[0, position, 0], rtol=0, atol=1e-5)
    assert len(np.unique(asked.vectors.round(3), axis=0)) > 20


def test_tokens_to_ask_at_are_real_and_drawn_alike(inputs: Path) -> None:
    """The share drawn of short windows is that of their real tokens, within 4 standard errors."""
    split = Windows(inputs / "windows", "train")
    real = np.minimum([row["count"] for row in map(split.__getitem__, range(len(split)))], 32)
    assert real.min() < small_valm.LENGTH, "no window is padded"
    drawn = indexing.real_tokens(split, 2000, seed=0)
    assert (drawn[:, 1] < real[drawn[:, 0]]).all()
    assert drawn[:, 1].min() == 0
    assert drawn[:, 1].max() == small_valm.LENGTH - 1
    positions = np.concatenate([np.arange(count) for count in real])
    error = positions.std() / np.sqrt(len(drawn))
    assert abs(drawn[:, 1].mean() - positions.mean()) < 4 * error
    assert not np.array_equal(drawn, indexing.real_tokens(split, 2000, seed=1))


def test_verify_finds_one_changed_bit(inputs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(inputs / "index", tmp_path / "index")
    vectors = copy / "vectors-00001.npy"
    line = ["verify", f"--index={copy}"]
    [whole] = commands(line)
    assert whole == [0, f"{copy}: 300 vectors, every file as it was written\n", ""]
    content = vectors.read_bytes()
    vectors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    [damaged] = commands(line)
    assert damaged[0] == 1
    assert "vectors-00001.npy has sha256" in damaged[2]


def test_misuse_is_one_line_and_writes_nothing(inputs: Path) -> None:
    weights.save(
        inputs / "text",
        clip_model.load_clip(inputs / "clip").params["text"],
        config=clip_model.load_clip(inputs / "clip").config.text,
        source="test",
    )
    (inputs / "empty").mkdir()
    (inputs / "empty" / "captions.jsonl").write_text("\n")
    (inputs / "broken").mkdir()
    PIL.Image.new("RGB", (3, 3)).save(inputs / "broken" / "a.png")
    (inputs / "broken" / "captions.jsonl").write_text('{"image": "a.png"}')
    other = small_valm.write_clip(inputs / "other", seed=1)
    here, new = f"{inputs}/", ["--out=" + str(inputs / "new")]
    neighbours = ["neighbours", f"--clip={here}clip", f"--index={here}index", *new]
    neighbours = [*neighbours, f"--windows={here}windows", "--batch_size=8"]
    recall = ["recall", f"--index={here}index"]
    shown = clip_model.load_clip(inputs / "clip").text_sha256
    cases = {
        "name what to do first: build, neighbours, recall, verify; got none": [],
        "got 'bild'": ["bild"],
        "unexpected argument 'twice'": ["build", "twice"],
        "Unknown command line flag 'picture": ["build", "--pictures=x"],
        "--queries is not for build": build(inputs, "new", "--queries=3"),
        "build needs --clip": ["build", f"--images={here}images", *new],
        "as either --images or --tfds": ["build", f"--clip={here}clip", *new],
        "--tfds_split goes with --tfds": build(inputs, "new", "--tfds_split=a"),
        "--dtype must be float16 or float32": build(inputs, "new", "--dtype=bfloat16"),
        "a batch of 0 cannot be split": build(inputs, "new", "--batch_size=0"),
        "expected kind clip, got 'clip_text'": build(inputs, "new", f"--clip={here}text"),
        "nowhere does not exist": build(inputs, "new", f"--clip={here}nowhere"),
        "captions.jsonl is missing": build(inputs, "new", f"--images={here}clip"),
        "holds no caption": build(inputs, "new", f"--images={here}empty"),
        "captions.jsonl:1: expected": build(inputs, "new", f"--images={here}broken"),
        "is not empty and was not made by": build(inputs, "clip"),
        "was made with dtype 'float16'": build(
            inputs, "index", "--shard_size=100", "--dtype=float32"
        ),
        "--nprobe goes with --search=faiss": [*neighbours, "--nprobe=3"],
        "--lists goes with --search=faiss": [*neighbours, "--lists=3"],
        "--skip_damaged goes with --images": [
            *("build", f"--clip={here}clip", "--tfds=a", "--skip_damaged", *new)
        ],
        "--clip and --windows go together": [*recall, f"--clip={here}clip"],
        "--readout goes with --clip": [*recall, "--readout=eos"],
        f"belongs to the text tower {shown}": [
            *recall,
            f"--clip={other}",
            f"--windows={here}windows",
        ],
        "belongs to the text tower": [*neighbours, f"--clip={other}"],
        "301 neighbours of 300 vectors": [*neighbours, "--neighbours=301"],
        "holds no finished image index": [*recall, f"--index={here}images"],
        "at least one query": [*recall, "--queries=0"],
        "--queries is not for verify": ["verify", f"--index={here}index", "--queries=3"],
        "must be a file in a directory that is there": [*recall, f"--json={here}no/a.json"],
    }
    for (message, line), said in zip(cases.items(), commands(*cases.values()), strict=True):
        code, out, err = said
        assert code == 1, (line, said)
        assert message in err, (line, said)
        assert err.startswith("error: "), (line, said)
        assert len(err.strip().splitlines()) == 1, (line, said)
        assert out == "", (line, said)
    assert not (inputs / "new").exists()


def test_help_names_the_subcommands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.index", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for command in ("build:", "neighbours:", "recall:", "--shard_size"):
        assert command in done.stdout
