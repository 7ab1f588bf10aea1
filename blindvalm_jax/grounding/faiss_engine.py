"""Approximate search with FAISS: IVF-PQ by inner product, as VALM used (arXiv 2205.10178).

Vectors fall into lists around centroids and are kept as short codes of the residual; a query
visits the `nprobe` lists nearest to it. Scores are those of the codes, unless a short list of
candidates is ranked again by the vectors on disk. Needs `pip install -e '.[faiss]'`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.data import output
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.grounding.index import ImageIndex, Vectors
from blindvalm_jax.grounding.retrieval import Retrieved

INDEX_FILE = "faiss.index"
RECORD_FILE = "faiss.json"
PAPER_NPROBE = 32
_CODES = 256  # centroids of each part of a code: one byte
_POINTS_PER_LIST = 39  # below this FAISS calls a centroid poorly trained
_ADDED_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaissSettings:
    """What determines `faiss.index`: lists, bytes of a code, vectors trained on, and the seed."""

    lists: int
    code_bytes: int
    train_vectors: int
    seed: int = 0


def default_settings(
    count: int, width: int, *, lists: int = 0, code_bytes: int = 0
) -> FaissSettings:
    """The paper's settings (131,072 lists, 64 bytes for 191.5 M vectors of 768) scaled to a size.

    lists, code_bytes: to be taken instead, where they are not 0.

    Lists: the power of two nearest to 8 sqrt(M) that leaves 39 vectors a list. Code: up to 64
    bytes, each for 4 dimensions or more. Trained on 64 vectors a list, 65,536 at least.
    """
    nearest = round(math.log2(8 * math.sqrt(count)))
    most = int(math.log2(max(count // _POINTS_PER_LIST, 1)))
    lists = lists or 1 << min(nearest, most)
    code = next(size for size in range(min(64, max(width // 4, 1)), 0, -1) if width % size == 0)
    return FaissSettings(
        lists=lists,
        code_bytes=code_bytes or code,
        train_vectors=min(count, max(64 * lists, 65_536)),
    )


class FaissEngine:
    """Search in an image index through `faiss.index` in its directory; an `Engine`."""

    def __init__(
        self,
        index: ImageIndex,
        *,
        neighbours: int,
        nprobe: int = PAPER_NPROBE,
        candidates: int = 0,
        lists: int = 0,
        code_bytes: int = 0,
        rebuild: bool = False,
    ) -> None:
        """Reads `faiss.index`, or trains and writes it if it is not there.

        candidates: R, how many of the approximate search are ranked again exactly; 0: none.
        lists, code_bytes: 0: those of the file that is there, `default_settings` for a new one.
        nprobe: more than there are lists are all of them, which is said on stderr.
        rebuild: replace a file of other settings, which is refused otherwise.

        Raises:
          UserError: FAISS is missing; impossible sizes; a file that is damaged or does not fit.
        """
        self._faiss = library()
        count = len(index.vectors)
        if not 1 <= neighbours <= count or not (candidates == 0 or candidates >= neighbours):
            raise UserError(
                f"{neighbours} neighbours of {count} vectors by {candidates} candidates: K must "
                "be from 1 to their number, and candidates 0 or at least K"
            )
        if nprobe < 1:
            raise UserError(f"nprobe must be 1 or more, got {nprobe}")
        self.neighbours = neighbours
        self._candidates = min(candidates, count)
        self._vectors: Vectors = index.vectors
        asked = {"lists": lists, "code_bytes": code_bytes}
        self._searcher, record = _open(self._faiss, index, asked, rebuild=rebuild)
        made = record.settings
        self._nprobe = min(nprobe, made.lists)
        if self._nprobe < nprobe:
            print(
                f"note: nprobe {nprobe} is more than the {made.lists} lists of "
                f"{index.directory / INDEX_FILE}: all are visited",
                file=sys.stderr,
                flush=True,
            )
        self.version = str(self._faiss.__version__)
        self.settings = {
            "engine": "faiss",
            "index": index.manifest.key,
            **dataclasses.asdict(made),
            "made_by": record.made_by,
            "nprobe": self._nprobe,
            "candidates": self._candidates,
            "sha256": record.sha256,
        }

    def search(self, queries_QE: np.ndarray, *, vectors: bool = True) -> Retrieved:
        """See `Engine`. Where the lists visited hold fewer than K vectors, all are visited."""
        queries_QE = np.ascontiguousarray(queries_QE, np.float32)
        size = max(self._candidates, self.neighbours)
        scores_QR, index_QR = self._visit(queries_QE, size, self._nprobe)
        short = np.flatnonzero(index_QR[:, self.neighbours - 1] < 0)
        if short.size:
            found = self._visit(queries_QE[short], size, self._searcher.nlist)
            scores_QR[short], index_QR[short] = found
        if self._candidates:
            scores_QR = self._exact_scores(queries_QE, index_QR)
            order_QR = np.lexsort((index_QR, -scores_QR), axis=1)
            scores_QR = np.take_along_axis(scores_QR, order_QR, axis=1)
            index_QR = np.take_along_axis(index_QR, order_QR, axis=1)
        index_QK = index_QR[:, : self.neighbours].astype(np.int32)
        vectors_QKE = self._vectors.rows(index_QK) if vectors else None
        return Retrieved(scores_QR[:, : self.neighbours], index_QK, vectors_QKE)

    def _visit(
        self, queries_QE: np.ndarray, size: int, nprobe: int
    ) -> tuple[np.ndarray, np.ndarray]:
        parameters = self._faiss.SearchParametersIVF(nprobe=nprobe)
        return self._searcher.search(queries_QE, size, params=parameters)

    def _exact_scores(self, queries_QE: np.ndarray, index_QR: np.ndarray) -> np.ndarray:
        """Inner products with the vectors on disk; -inf where there is no candidate."""
        # Each vector is read once, however many queries have it among their candidates.
        unique, place = np.unique(np.maximum(index_QR, 0), return_inverse=True)
        keys_ME = self._vectors.rows(unique)
        scores_QR = np.empty(index_QR.shape, np.float32)
        for row, (query_E, places_R) in enumerate(
            zip(queries_QE, place.reshape(index_QR.shape), strict=True)
        ):
            scores_QR[row] = keys_ME[places_R] @ query_E
        return np.where(index_QR < 0, -np.inf, scores_QR).astype(np.float32)


def library() -> Any:
    """FAISS.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            "FAISS is not installed: pip install -e '.[faiss]', or search exactly"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Record:
    """What `faiss.json` says; sha256: of `faiss.index`, None in a file that is older than this."""

    settings: FaissSettings
    made_by: str
    sha256: str | None


def verify(index: ImageIndex) -> bool:
    """Reads `faiss.index`, where there is one, and refuses one that is not as it was written.

    False, and a line on stderr: its record is too old to tell.
    """
    if not (index.directory / RECORD_FILE).exists():
        return True
    path, record = index.directory / INDEX_FILE, _read_record(index)
    hint = _rebuilding(index, dataclasses.asdict(record.settings))
    if record.sha256 is None:
        print(
            f"note: {path} cannot be checked, as {RECORD_FILE} is older than its hash; to have one "
            f"{hint}",
            file=sys.stderr,
            flush=True,
        )
        return False
    found = _sha256(path)
    if found != record.sha256:
        raise UserError(f"{path} has sha256 {found}, its record says {record.sha256}: {hint}")
    return True


def _open(
    faiss: Any, index: ImageIndex, asked: Mapping[str, int], *, rebuild: bool
) -> tuple[Any, _Record]:
    """The searcher in the directory of an index, made where there is none, and its record."""
    directory = index.directory
    if (directory / RECORD_FILE).exists() and not rebuild:
        return _read(faiss, index, asked)
    wanted = default_settings(*index.vectors.shape, **asked)
    _check(wanted, index.vectors)
    with output.writing(directory):
        if (directory / RECORD_FILE).exists():
            if not rebuild:  # by the process that this one waited for
                return _read(faiss, index, asked)
            (directory / RECORD_FILE).unlink()
        for partial in directory.glob(f"{INDEX_FILE}.*.partial"):  # of a run that was killed
            partial.unlink()
        made = _train(faiss, index.vectors, wanted)
        path = directory / INDEX_FILE
        try:
            with files.replacing(path) as partial:
                faiss.write_index(made, str(partial))
                sha256 = _sha256(partial)
        except RuntimeError as error:  # all that FAISS raises, on a full disk too
            raise OSError(first_line(error)) from error
        record = {
            "index": index.manifest.key,
            "settings": dataclasses.asdict(wanted),
            "bytes": path.stat().st_size,
            "sha256": sha256,
            "faiss": faiss.__version__,
        }
        files.write_json(directory / RECORD_FILE, record)
    return made, _Record(wanted, str(faiss.__version__), sha256)


def _read(faiss: Any, index: ImageIndex, asked: Mapping[str, int]) -> tuple[Any, _Record]:
    """Compares of what is asked for what is not 0; the content is read by `verify` alone."""
    path, record = index.directory / INDEX_FILE, _read_record(index)
    there = dataclasses.asdict(record.settings)
    wanted = {name: value for name, value in asked.items() if value}
    hint = _rebuilding(index, {**there, **wanted})
    if any(there[name] != value for name, value in wanted.items()):
        raise UserError(
            f"{path} was trained with {_in_words({name: there[name] for name in wanted})}, "
            f"expected {_in_words(wanted)}: ask for what is there, or {hint}"
        )
    try:
        return faiss.read_index(str(path)), record
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {hint}") from error


def _read_record(index: ImageIndex) -> _Record:
    """The record in the directory of an index, whose file is there in the size that it says."""
    path, place = index.directory / INDEX_FILE, index.directory / RECORD_FILE
    try:
        values = files.read_object(place)
    except UserError as error:
        raise UserError(f"{error}: {_rebuilding(index, {})}") from error
    try:
        settings = FaissSettings(**values["settings"])
        key, size, made_by = values["index"], values["bytes"], str(values["faiss"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{place} is damaged ({error!r}): {_rebuilding(index, {})}") from error
    hint = _rebuilding(index, dataclasses.asdict(settings))
    if key != index.manifest.key:
        raise UserError(
            f"{path} was made of the vectors of another index ({key}), expected "
            f"{index.manifest.key}: {hint}"
        )
    if not path.is_file() or path.stat().st_size != size:
        raise UserError(f"{path} is missing or not of the {size} bytes of its record: {hint}")
    return _Record(settings, made_by, values.get("sha256"))


def settings_of(index: ImageIndex) -> FaissSettings:
    """What `faiss.index` of an image index was made with.

    Raises:
      UserError: it is not there, damaged, or of other vectors.
    """
    return _read_record(index).settings


def _rebuilding(index: ImageIndex, settings: Mapping[str, int]) -> str:
    """The command that makes `faiss.index` again, with the settings as far as they are known."""
    known = [f" --{name}={settings[name]}" for name in ("lists", "code_bytes") if name in settings]
    return (
        "make it again: python -m blindvalm_jax.index recall "
        f"--index={shlex.quote(str(index.directory))} --rebuild{''.join(known)}"
    )


def _in_words(settings: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(settings: FaissSettings, vectors: Vectors) -> None:
    count, width = vectors.shape
    fewest = max(settings.lists, _CODES)
    if settings.lists < 1 or settings.code_bytes < 1 or width % settings.code_bytes:
        raise UserError(
            f"{settings.lists} lists, codes of {settings.code_bytes} bytes: there must be a list, "
            f"and the bytes must divide the width {width}"
        )
    if not fewest <= settings.train_vectors <= count:
        raise UserError(
            f"{settings.lists} lists and codes of {_CODES} values need {fewest} or more of the "
            f"{count} vectors to train on, got {settings.train_vectors}: take fewer lists, or "
            "search a small index exactly"
        )


def _train(faiss: Any, vectors: Vectors, settings: FaissSettings) -> Any:
    count, width = vectors.shape
    kind = f"IVF{settings.lists},PQ{settings.code_bytes}"
    made = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    made.do_polysemous_training = False  # orders codes for a filter that is not used here
    for clustering in (made.cp, made.pq.cp):
        clustering.seed = settings.seed
        clustering.min_points_per_centroid = 1  # how many there are is decided by the caller
    rng = np.random.default_rng(settings.seed)
    chosen = rng.choice(count, settings.train_vectors, replace=False, shuffle=False)
    made.train(vectors.rows(np.sort(chosen)))
    with Progress("add vectors to FAISS", total=count, unit="vec") as progress:
        for _, block in vectors.blocks(_ADDED_AT_ONCE):
            made.add(block)
            progress.advance(len(block))
    return made
