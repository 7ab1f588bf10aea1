"""What a directory of windows says of itself: `manifest.json`, and the layout of its records.

A window holds T + 1 tokens of the stream and windows advance by T: inputs are the first T tokens,
targets the last T. `shared`: the tower reads the language model's own tokens. `aligned`: it reads
tokens of its own, S a window, and an index says which of them each input has seen last.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.data import output
from blindvalm_jax.errors import UserError

if TYPE_CHECKING:
    from blindvalm_jax.data.tokenizers import Tokenizer

FORMAT_VERSION = 2  # 1: under `causal` the aligned mode looked at words not read to their end
FILE_NAME = "manifest.json"
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """What is known of a tokenizer without loading it; ids are the language model's."""

    kind: str
    vocab_size: int
    lm_offset: int
    eos_id: int
    pad_id: int
    fingerprint: str

    @property
    def tower_vocab_size(self) -> int:
        """Entries of its own vocabulary, which a tower reads."""
        return self.vocab_size - self.lm_offset

    @property
    def tower_end_id(self) -> int:
        """Own id that ends a text: CLIP's end token, or the separator of documents."""
        return self.tower_vocab_size - 1 if self.kind == "clip" else self.eos_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of windows."""

    file: str
    windows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """Counts of a split; segments are those of real tokens, `full_segments` of the longest kind."""

    documents: int
    characters: int
    tokens: int
    tower_tokens: int
    windows: int
    segments: int
    mean_segment: float
    full_segments: float
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that determined the bytes of a directory of windows, and what is in it.

    tower_length: S of the aligned mode, None in the shared one.
    key: hash of the settings and the text; equal keys mean equal bytes.
    """

    key: str
    mode: str
    sequence_length: int
    tower_length: int | None
    tokenizer: TokenizerRecord
    tower_tokenizer: TokenizerRecord | None
    segments: str
    longest_segment: int
    eval_rule: str
    sources: list[dict[str, Any]]
    eval_sources: list[dict[str, Any]]
    splits: dict[str, SplitRecord]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def aligned(self) -> bool:
        """Whether the tower has tokens of its own."""
        return self.mode == "aligned"

    @property
    def tower_record(self) -> TokenizerRecord:
        """The tokenizer whose own ids the tower reads."""
        return self.tower_tokenizer or self.tokenizer

    def save(self, directory: Path, *, work: Path | None = None) -> None:
        """Writes the manifest; a directory that holds it is complete."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False)
        with files.replacing(directory / FILE_NAME, work=work) as partial:
            partial.write_bytes(text.encode() + b"\n")


def load(directory: Path) -> Manifest:
    """Reads the manifest of a directory of windows.

    Raises:
      UserError: there is none, it is of a newer version, or it is damaged.
    """
    path = directory / FILE_NAME
    if not directory.is_dir():
        raise UserError(f"no directory of windows at {directory}: run blindvalm_jax.prepare")
    if not path.is_file() and not (directory / output.MARKER).exists():
        raise UserError(f"{directory} holds no windows: make them with blindvalm_jax.prepare")
    if not path.is_file():
        raise UserError(
            f"{directory} has no {FILE_NAME}: preparation did not finish; run the same prepare "
            "command again, it goes on where it stopped"
        )
    try:
        values = json.loads(path.read_bytes())
        version = values["format_version"]
        if type(version) is not int:
            raise TypeError(f"format_version is {version!r}")
        if version == FORMAT_VERSION:
            return _from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): delete {directory}, prepare again"
        ) from error
    raise UserError(
        f"{path} is of format version {version}, this program reads {FORMAT_VERSION}: "
        + ("update blindvalm_jax" if version > FORMAT_VERSION else "prepare the text again")
    )


def _from_dict(values: dict[str, Any]) -> Manifest:
    tower = values["tower_tokenizer"]
    splits = {
        name: SplitRecord(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
        for name, split in values["splits"].items()
    }
    return Manifest(
        **{
            **values,
            "tokenizer": TokenizerRecord(**values["tokenizer"]),
            "tower_tokenizer": None if tower is None else TokenizerRecord(**tower),
            "splits": splits,
        }
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def record_dtype(
    *,
    sequence_length: int,
    vocab_size: int,
    tower_length: int | None,
    tower_vocab_size: int,
) -> np.dtype[Any]:
    """Layout of one window; `starts` is a bit per tower position, first position first.

    Fields: count (real tokens), tokens [T+1], starts [ceil(S/8)], and in the aligned mode
    (`tower_length` S given) tower_tokens [S], tower_index [T].
    """
    fields: list[tuple[str, Any, tuple[int, ...]]] = [
        ("count", "<u4", ()),
        ("tokens", token_dtype(vocab_size), (sequence_length + 1,)),
    ]
    size = sequence_length if tower_length is None else tower_length
    fields.append(("starts", "u1", (-(-size // 8),)))
    if tower_length is not None:
        fields.append(("tower_tokens", token_dtype(tower_vocab_size), (tower_length,)))
        fields.append(("tower_index", token_dtype(tower_length + 1), (sequence_length,)))
    return np.dtype(fields)


def tower_table(tokenizer: Tokenizer | TokenizerRecord) -> np.ndarray:
    """Tower id of every id of a language model whose tokens the tower reads: int32 [V].

    `clip` has fairseq's four specials in front (reference.md, section 1): <s> becomes the start
    token, <pad> 0, </s> and <unk> the end token. Other kinds: the same ids.
    """
    ids = np.arange(tokenizer.vocab_size, dtype=np.int32)
    if tokenizer.kind == "clip":
        ids -= tokenizer.lm_offset
        start, end = ids[-2:]
        ids[:4] = start, 0, end, end
    return ids
