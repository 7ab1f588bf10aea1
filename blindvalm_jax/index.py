r"""Makes what VALM looks at: an index of images, and the neighbours of a text's tokens in it.

  python -m blindvalm_jax.index build --clip=weights/clip --images=photos --out=index
  python -m blindvalm_jax.index neighbours --clip=weights/clip --index=index --windows=windows \
      --readout=token --neighbours=4 --out=found
  python -m blindvalm_jax.index recall --index=index --neighbours=4 --queries=1024 \
      --clip=weights/clip --windows=windows --readout=token
  python -m blindvalm_jax.index verify --index=index

build: every image through the CLIP's image tower. A folder of images holds captions.jsonl, see
data.images; with --tfds, --tfds_split, --tfds_dir, --image_field and --caption_field a TFDS dataset
is read instead. Also --batch_size, --shard_size, --dtype (of the vectors). --skip_damaged leaves
out images that are missing or cannot be decoded, and names them beside the vectors.
neighbours: for each token of windows (see prepare) the K nearest images, for
grounding.search=prepared. Also --search=faiss with --nprobe, --rerank, --lists and --code_bytes,
--batch_size, --dtype (the text tower computes in).
recall: FAISS against exact search on what VALM asks, the text tower's features at tokens of
windows. Without --clip and --windows the queries are vectors of the index with noise, which lie
nearer to images than text does: good for a first look, not for choosing settings. Also --nprobe,
--rerank, --lists, --code_bytes, --rebuild, --batch_size, --dtype, --seed, --json.
FAISS's index is made by whoever needs it first, with --lists and --code_bytes, and kept.
verify: reads every file of an index, FAISS's too, and refuses one that is not as it was written.

Train on an index with --config.grounding.source=images --config.grounding.index=DIR. build and
neighbours go on where they stopped when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import files, indexing, runs
from blindvalm_jax.command_line import run_main
from blindvalm_jax.config import DataConfig
from blindvalm_jax.data import images
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import index_build, retrieval
from blindvalm_jax.grounding.faiss_engine import INDEX_FILE, PAPER_NPROBE, FaissEngine, verify
from blindvalm_jax.grounding.index import DTYPES, ImageIndex
from blindvalm_jax.interop import clip_model, clip_text
from blindvalm_jax.models.clip import Readout

_DATA = DataConfig()
_BATCH_SIZE = 64
_COMPUTE = ("float32", "bfloat16")

_CLIP = flags.DEFINE_string("clip", "", "CLIP: weights directory, contrastive run, or hub id")
_OUT = flags.DEFINE_string("out", "", "directory that is written")
_IMAGES = flags.DEFINE_string("images", "", "build: folder with images and captions.jsonl")
_TFDS = flags.DEFINE_string("tfds", "", "build: TFDS dataset instead, as name[/config]")
_TFDS_SPLIT = flags.DEFINE_string("tfds_split", _DATA.tfds_split, "build: split of it")
_TFDS_DIR = flags.DEFINE_string("tfds_dir", "", "build: data directory of TFDS; empty: its default")
_IMAGE_FIELD = flags.DEFINE_string("image_field", _DATA.image_field, "build: its field of images")
_CAPTION_FIELD = flags.DEFINE_string(
    "caption_field", _DATA.caption_field, "build: its field of captions: a, or a/b inside a"
)
_BATCH = flags.DEFINE_integer(
    "batch_size", _BATCH_SIZE, "images, or windows, at once; a multiple of the devices"
)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", index_build.SHARD_SIZE, "build: images of a file")
_SKIP_DAMAGED = flags.DEFINE_bool(
    "skip_damaged", False, "build: leave out images of a folder that cannot be decoded"
)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "build: of the vectors (float16); else what the text tower computes in (float32)"
)
_WINDOWS = flags.DEFINE_string("windows", "", "neighbours, recall: directory that prepare wrote")
_INDEX = flags.DEFINE_string("index", "", "neighbours, recall, verify: directory that build wrote")
_READOUT = flags.DEFINE_enum(
    "readout", "token", ["token", "eos"], "neighbours, recall: as grounding.readout"
)
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 4, "neighbours, recall: K")
_SEARCH = flags.DEFINE_enum(
    "search", "exact", ["exact", "faiss"], "neighbours: on the devices, or FAISS on the host"
)
_NPROBE = flags.DEFINE_integer("nprobe", PAPER_NPROBE, "FAISS: lists visited a query")
_RERANK = flags.DEFINE_integer("rerank", 0, "FAISS: candidates ranked again exactly; 0: none")
_LISTS = flags.DEFINE_integer(
    "lists", 0, "FAISS: lists of its index; 0: those there are, or by its size"
)
_CODE_BYTES = flags.DEFINE_integer(
    "code_bytes", 0, "FAISS: bytes of a code; 0: those there are, or by the width"
)
_REBUILD = flags.DEFINE_bool("rebuild", False, "recall: make FAISS's index again")
_QUERIES = flags.DEFINE_integer("queries", 1024, "recall: how many")
_SEED = flags.DEFINE_integer("seed", 0, "recall: of the queries")
_JSON = flags.DEFINE_string("json", "", "recall: also write the numbers to this file")

_FAISS_ALONE = ("nprobe", "rerank", "lists", "code_bytes")
_TEXT_ALONE = ("readout", "batch_size", "dtype")
_TFDS_ALONE = ("tfds_split", "tfds_dir", "image_field", "caption_field")
# What each subcommand takes, and what of it must be given.
_TAKES: dict[str, tuple[str, ...]] = {
    "build": (
        *("clip", "out", "images", "tfds", *_TFDS_ALONE, "batch_size", "shard_size", "dtype"),
        "skip_damaged",
    ),
    "neighbours": (
        *("clip", "out", "windows", "index", "readout", "neighbours", "search", "nprobe", "rerank"),
        *("lists", "code_bytes", "batch_size", "dtype"),
    ),
    "recall": (
        *("index", "neighbours", "queries", "nprobe", "rerank", "lists", "code_bytes", "rebuild"),
        *("clip", "windows", "readout", "batch_size", "dtype", "seed", "json"),
    ),
    "verify": ("index",),
}
_NEEDS = {
    "build": ("clip", "out"),
    "neighbours": ("clip", "out", "windows", "index"),
    "recall": ("index",),
    "verify": ("index",),
}
_ALL = sorted({name for names in _TAKES.values() for name in names})


def main(argv: Sequence[str]) -> int:
    """Runs the subcommand that the command line names."""
    commands: dict[str, Callable[[], None]] = {
        "build": _build,
        "neighbours": _neighbours,
        "recall": _recall,
        "verify": _verify,
    }
    if len(argv) < 2 or argv[1] not in commands:
        got = f"got {argv[1]!r}" if len(argv) > 1 else "got none"
        raise UserError(f"name what to do first: {', '.join(commands)}; {got} (see --help)")
    if len(argv) > 2:
        raise UserError(f"unexpected argument {argv[2]!r}: every setting is a --flag (see --help)")
    _check_flags(argv[1])
    commands[argv[1]]()
    return 0


def _check_flags(command: str) -> None:
    for name in _ALL:
        if flags.FLAGS[name].present and name not in _TAKES[command]:
            raise UserError(f"--{name} is not for {command} (see --help)")
    for name in _NEEDS[command]:
        if not flags.FLAGS[name].value:
            raise UserError(f"{command} needs --{name} (see --help)")


def _dtype(known: Sequence[str]) -> str:
    """The flag, or the first of those that a subcommand knows."""
    if _DTYPE.value is not None and _DTYPE.value not in known:
        raise UserError(f"--dtype must be {' or '.join(known)}, got {_DTYPE.value!r}")
    return _DTYPE.value or known[0]


def _build() -> None:
    dtype = _dtype(DTYPES)
    if bool(_IMAGES.value) == bool(_TFDS.value):
        raise UserError("give the images as either --images or --tfds")
    for name in _TFDS_ALONE:
        if flags.FLAGS[name].present and not _TFDS.value:
            raise UserError(f"--{name} goes with --tfds")
    if _SKIP_DAMAGED.value and not _IMAGES.value:
        raise UserError("--skip_damaged goes with --images")
    out = Path(_OUT.value).expanduser()
    source = images.open_source(
        DataConfig(
            images=_IMAGES.value,
            tfds=_TFDS.value,
            tfds_split=_TFDS_SPLIT.value,
            tfds_dir=_TFDS_DIR.value,
            image_field=_IMAGE_FIELD.value,
            caption_field=_CAPTION_FIELD.value,
        ),
        digests=out / index_build.HASHES_FILE,
        may_miss=_SKIP_DAMAGED.value,
    )
    clip = clip_model.load_clip(_CLIP.value)
    begin = time.monotonic()
    made = indexing.build(
        out,
        source,
        clip,
        name=_IMAGES.value or f"TFDS {_TFDS.value}, {_TFDS_SPLIT.value}",
        batch_size=_BATCH.value,
        shard_size=_SHARD_SIZE.value,
        dtype=dtype,
        skip_damaged=_SKIP_DAMAGED.value,
    )
    seconds = time.monotonic() - begin
    if made.damaged:
        print(f"{made.damaged:,} damaged images were left out, see {out}/damaged-*.jsonl")
    print(
        f"{_OUT.value}: {made.count:,} vectors of width {made.width} in {made.dtype}, "
        f"{seconds:.1f} s, {made.count / max(seconds, 1e-9):,.1f} images/s"
    )


def _neighbours() -> None:
    dtype = _dtype(_COMPUTE)
    faiss = _SEARCH.value == "faiss"
    given = [name for name in _FAISS_ALONE if flags.FLAGS[name].present]
    if given and not faiss:
        raise UserError(f"--{given[0]} goes with --search=faiss")
    index = ImageIndex.open(Path(_INDEX.value).expanduser())

    def engine(mesh: retrieval.Mesh) -> retrieval.Engine:
        if faiss:
            return FaissEngine(
                index,
                neighbours=_NEIGHBOURS.value,
                nprobe=_NPROBE.value,
                candidates=_RERANK.value,
                lists=_LISTS.value,
                code_bytes=_CODE_BYTES.value,
            )
        return retrieval.ExactEngine(
            index.vectors,
            neighbours=_NEIGHBOURS.value,
            mesh=mesh,
            index_key=index.manifest.key,
        )

    tower = clip_text.load_tower(_CLIP.value)
    begin = time.monotonic()
    made = indexing.find_neighbours(
        Path(_OUT.value).expanduser(),
        Path(_WINDOWS.value).expanduser(),
        index,
        tower,
        readout=_readout(),
        batch_size=_BATCH.value,
        dtype=dtype,
        engine=engine,
    )
    seconds = time.monotonic() - begin
    tokens = sum(split.windows * split.length for split in made.values())
    for name, split in made.items():
        print(f"{_OUT.value}/{name}: {split.neighbours} neighbours, {split.windows:,} windows")
    print(f"{seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s")


def _readout() -> Readout:
    return "eos" if _READOUT.value == "eos" else "token"


def _check_text_flags() -> None:
    if bool(_CLIP.value) != bool(_WINDOWS.value):
        raise UserError(
            "--clip and --windows go together: the queries are the CLIP's at their text"
        )
    for name in _TEXT_ALONE:
        if flags.FLAGS[name].present and not _WINDOWS.value:
            raise UserError(f"--{name} goes with --clip and --windows")


def _queries(index: ImageIndex) -> indexing.Queries:
    if not _WINDOWS.value:
        return indexing.noisy_queries(index, _QUERIES.value, seed=_SEED.value)
    return indexing.text_queries(
        index,
        Path(_WINDOWS.value).expanduser(),
        clip_text.load_tower(_CLIP.value),
        _QUERIES.value,
        readout=_readout(),
        batch_size=_BATCH.value,
        dtype=_dtype(_COMPUTE),
        seed=_SEED.value,
    )


def _recall() -> None:
    out = Path(_JSON.value).expanduser()
    if _JSON.value and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--json={_JSON.value} must be a file in a directory that is there")
    _check_text_flags()
    index = ImageIndex.open(Path(_INDEX.value).expanduser())
    queries = _queries(index)
    measured = indexing.measure_recall(
        index,
        queries,
        neighbours=_NEIGHBOURS.value,
        nprobe=_NPROBE.value,
        rerank=_RERANK.value,
        lists=_LISTS.value,
        code_bytes=_CODE_BYTES.value,
        rebuild=_REBUILD.value,
    )
    asked = f"{len(queries.vectors):,} queries: "
    if queries.about["kind"] == "text":
        print(f"{asked}features of the text tower ({_READOUT.value}) at tokens of {_WINDOWS.value}")
    else:
        print(f"{asked}vectors of the index with noise of norm {queries.about['noise']}, no text")
    print(f"{'engine':8} {'queries/s':>11} {f'recall@{_NEIGHBOURS.value}':>10}")
    for row in measured:
        print(f"{row.engine:8} {row.queries_per_second:11,.0f} {row.recall:10.3f}")
    if _JSON.value:
        result = {
            "index": index.manifest.key,
            "vectors": index.manifest.count,
            "neighbours": _NEIGHBOURS.value,
            "queries": queries.about,
            "searches": [dataclasses.asdict(row) for row in measured],
            "versions": runs.versions(),
        }
        files.write_json(out, result)


def _verify() -> None:
    index = ImageIndex.open(Path(_INDEX.value).expanduser())
    index.verify()
    read = "every file" if verify(index) else f"every file but {INDEX_FILE}"
    print(f"{_INDEX.value}: {index.manifest.count:,} vectors, {read} as it was written")


if __name__ == "__main__":
    run_main(
        main,
        inputs={
            "clip": "grounding.tower",
            "images": "data.images",
            "tfds_dir": "data.tfds_dir",
            "windows": "data.windows",
            "index": "grounding.index",
        },
    )
