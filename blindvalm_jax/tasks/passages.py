"""Texts that are scored token by token: documents of files, and the lines of a fairseq data set."""

from __future__ import annotations

import dataclasses
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blindvalm_jax.data import corpora
from blindvalm_jax.data.clip_bpe import FAIRSEQ_EOS
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.tasks import readers

_TITLE = re.compile(r" ?= [^=\s](.*[^=\s])? = ?")
_QUOTES = re.compile("“|”|''|``")
# Of OpenAI's vocabulary of 49,408 entries behind fairseq's four specials, and the size of both.
CLIP_FINGERPRINT = "2fe2c1a3f033352bb928cbd0d2731e12c8918788c441a647884d416051008dce"
CLIP_SIZE = 49_412
ReadTexts = Callable[[Path], list[str]]


class Opened(NamedTuple):
    """Documents, and the file that they are of."""

    texts: list[str]
    file: readers.File


@dataclasses.dataclass(frozen=True)
class Texts:
    """Files, the preferred one first, how they are read, and what is a document in them."""

    files: tuple[str, ...]
    read: ReadTexts
    document: str

    def open(self, data: Path) -> Opened:
        """The documents, and their file.

        Raises:
          UserError: there is no such file, it is not what it should be, or holds no text.
        """
        path = readers.find(data, self.files)
        return Opened(_some(self.read(path), path), readers.read_file(path, self.files))


def articles(path: Path) -> list[str]:
    """Articles of a WikiText file, each from its title, a line ` = Title = `, to the next.

    Where the file has blank lines, a title stands between two of them: lines of formulas look
    alike. What comes before the first title is an article too.
    """
    lines = readers.text_of(path).split("\n")
    blank = [True, *(not line.strip() for line in lines), True]
    spaced = any(blank[1 : len(lines)])
    starts = [
        number
        for number, line in enumerate(lines)
        if _TITLE.fullmatch(line) and (not spaced or (blank[number] and blank[number + 2]))
    ]
    cuts = sorted({0, *starts, len(lines)})
    found = ["\n".join(lines[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return [text for text in found if text.strip()]


def lines(path: Path) -> list[str]:
    """Lines that hold text."""
    return [line for line in readers.text_of(path).split("\n") if line.strip()]


def whole(path: Path) -> list[str]:
    """A file as one document."""
    return [readers.text_of(path)]


def stripped_passages(path: Path) -> list[str]:
    """LAMBADA: the field text of lines of JSON, or the lines of a text; no blanks around."""
    if path.suffix == ".jsonl":
        found = [row["text"] for row in readers.json_rows(path, ("text",))]
    else:
        found = lines(path)
    return [text.strip() for text in found]


def straight_quotes(text: str) -> str:
    """The text with one kind of double quote, as the reference's scripts write it."""
    return _QUOTES.sub('"', text)


def of_pattern(pattern: str, *, by_file: bool) -> list[str]:
    """Documents of files as training reads them (`corpora.documents`), or each .txt as one.

    Raises:
      UserError: see `corpora.documents`; or a file to be read whole is no .txt.
    """
    if not by_file:
        return list(corpora.documents([pattern]))
    paths = corpora.find_files([pattern])
    for path in paths:
        if path.suffix != ".txt":
            raise UserError(f"{path} is no .txt: give it as text:PATH, which reads it by documents")
    return [text for path in paths for text in _some(whole(path), path)]


def fairseq_lines(path: Path) -> list[np.ndarray]:
    """Lines of language-model ids, each with its end token; arrays `ids` and `lens` of an .npz.

    Raises:
      UserError: it holds other arrays, an id is none of CLIP's, or a line lacks its end.
    """
    ids, lens = (_whole_numbers(path, name) for name in ("ids", "lens"))
    lens = lens.astype(np.int64)
    if lens.sum() != len(ids) or not len(lens) or lens.min() < 1:
        raise UserError(f"{path}: lens add up to {lens.sum()}, there are {len(ids)} ids")
    wrong = ids[(ids < 0) | (ids >= CLIP_SIZE)]
    if len(wrong):
        raise UserError(
            f"{path} holds the id {wrong[0]}, expected those of CLIP's tokenizer behind fairseq's "
            f"specials, 0 to {CLIP_SIZE - 1}"
        )
    found = np.split(ids.astype(np.int32), np.cumsum(lens)[:-1])
    if any(line[-1] != FAIRSEQ_EOS for line in found):
        raise UserError(f"{path}: every line must end in {FAIRSEQ_EOS}, the end token of fairseq")
    return found


def _whole_numbers(path: Path, name: str) -> np.ndarray:
    """An array of an .npz: one dimension, whole numbers."""
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
            found = np.asarray(stored[name])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} holds no arrays ids and lens: {first_line(error)}") from error
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            f"{path} holds {name} as {found.dtype} {list(found.shape)}, expected a row of integers"
        )
    return found


class EncodedLines(NamedTuple):
    """Language-model ids of lines with their end tokens; texts: None if they were given as ids."""

    ids: list[np.ndarray]
    texts: list[str] | None
    file: readers.File | None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Lines as fairseq makes blocks of them: in CLIP's tokens, or as texts for other tokenizers.

    ids, texts: None where there is no such file, of one of them there is; the files they are of.
    """

    ids: list[np.ndarray] | None
    texts: list[str] | None
    ids_file: readers.File | None = None
    texts_file: readers.File | None = None

    def encode(self, tokenizer: Tokenizer) -> EncodedLines:
        """The ids where they are those of the tokenizer, else of the texts.

        Raises:
          UserError: the tokenizer is not CLIP's own, and there is no text.
        """
        if self.ids is not None and tokenizer.fingerprint == CLIP_FINGERPRINT:
            return EncodedLines(self.ids, None, self.ids_file)
        if self.texts is None:
            raise UserError(
                "these ids are of CLIP's own tokenizer, and the model has another: bring the text "
                "that they were made of"
            )
        ids = [
            np.append(own, tokenizer.eos_id).astype(np.int32)
            for own in tokenizer.encode_lm_batch(self.texts)
        ]
        return EncodedLines(ids, self.texts, self.texts_file)


@dataclasses.dataclass(frozen=True)
class BlockFiles:
    """Files of ids, and of the texts, one of which is enough; how a line is changed before.

    unlike: what no line of the reference's text holds, and another edition of it does.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    change: Callable[[str], str] = str
    unlike: str | None = None

    def open(self, data: Path) -> Blocks:
        """The lines. A text of another edition is left aside where there are ids.

        Raises:
          UserError: there is neither file, or one is not what it should be.
        """
        path = readers.find(data, (*self.ids, *self.texts))
        if path.name not in self.ids:
            return self._with_texts(path, Blocks(None, None))
        ids = Blocks(fairseq_lines(path), None, readers.read_file(path, self.ids))
        if not readers.holds(data, self.texts):
            return ids
        path = readers.find(data, self.texts)
        return ids if self._is_unlike(path) else self._with_texts(path, ids)

    def _with_texts(self, path: Path, blocks: Blocks) -> Blocks:
        if self._is_unlike(path):
            raise UserError(
                f"{path} holds {self.unlike!r}, which the published text does not: bring "
                f"{self.texts[0]}, or take --protocol=corrected"
            )
        texts = _some([self.change(line) for line in lines(path)], path)
        file = readers.read_file(path, self.texts)
        return dataclasses.replace(blocks, texts=texts, texts_file=file)

    def _is_unlike(self, path: Path) -> bool:
        return self.unlike is not None and self.unlike in readers.text_of(path)


def _some(texts: Sequence[str], path: Path) -> list[str]:
    found = [text for text in texts if text.strip()]
    if not found:
        raise UserError(f"{path} holds no text")
    return found
