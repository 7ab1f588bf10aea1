"""GPT-2's byte-level BPE and tokenizers of its kind, through the `tokenizers` library."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from blindvalm_jax import files
from blindvalm_jax.config import SMALLEST_BPE
from blindvalm_jax.data import tokenizer_files
from blindvalm_jax.data.token_ends import Encoded, begun_characters, complete_characters
from blindvalm_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_READING = "texts to learn from hold no special tokens"  # another rule makes other ids
_HASHED = ("vocab", "merges")  # on their own, in an order that does not depend on the file
_SURROGATE = re.compile("[\ud800-\udfff]")
_INSIDE = bytes(range(0x80, 0xC0))  # bytes that begin no character


class ByteLevelTokenizer:
    """A byte-level BPE whose `<|endoftext|>` separates documents; ids are the model's own.

    `encode` reads a literal `<|endoftext|>` as that token, as prompts need it. `encode_lm` and the
    like read texts to learn from: there it is text, so that none can pose as a separator.
    """

    lm_offset = 0

    def __init__(self, kind: str, serialized: str) -> None:
        """Takes the content of a tokenizer.json that is known to fit."""
        self.kind = kind
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"this tokenizer.json cannot be used: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = self._tokenizer.get_vocab_size()
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise UserError(f"this {kind} tokenizer has no {END_OF_TEXT} to separate documents")
        self.eos_id = self.pad_id = end
        self._plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        self._plain.add_special_tokens([END_OF_TEXT])
        self._plain.encode_special_tokens = True
        self.fingerprint = _fingerprint(json.loads(self._tokenizer.to_str()))
        self._symbols = tokenizer_files.byte_symbols()
        self._pieces = self._bytes_of_pieces()
        self._byte_lengths = np.array([len(piece) for piece in self._pieces], np.int32)

    @classmethod
    def from_directory(cls, kind: str, directory: Path) -> ByteLevelTokenizer:
        """Reads tokenizer.json, or for kind gpt2 also vocab.json and merges.txt."""
        whole = directory / "tokenizer.json"
        if whole.exists():
            content = files.read_json(whole)
            vocab, merges = tokenizer_files.model_of(content, directory)
            specials = tokenizer_files.added_tokens(content, directory)
            if content["model"].get("dropout"):
                raise UserError(
                    f"{whole} asks for BPE dropout {content['model']['dropout']!r}: the same text "
                    "would give other tokens each time; set its dropout to null"
                )
            serialized = json.dumps(content)
        elif kind == "gpt2":
            if not (directory / "vocab.json").exists() and not (directory / "merges.txt").exists():
                raise UserError(
                    f"{directory} holds no GPT-2 tokenizer: expected vocab.json and merges.txt, "
                    f"or tokenizer.json"
                )
            vocab, merges = tokenizer_files.read_pair(directory)
            specials = [END_OF_TEXT]
            serialized = ""
        else:
            raise UserError(
                f"{directory} holds no trained tokenizer: expected the tokenizer.json that "
                f"training writes; for GPT-2's own files set tokenizer.kind=gpt2"
            )
        _check(vocab, merges, specials, directory)
        return cls(kind, serialized or _assemble(vocab, merges).to_str())

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Pickles by content, so that no file is needed where it is read back."""
        return type(self), (self.kind, self._tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added in front or behind."""
        return self._tokenizer.encode(_valid(text), add_special_tokens=False).ids

    def encode_lm(self, text: str) -> np.ndarray:
        """int32[n] ids of a text; what looks like a special token is text."""
        return np.array(self._plain.encode(_valid(text), add_special_tokens=False).ids, np.int32)

    def encode_lm_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_lm` of each text, on as many threads as RAYON_NUM_THREADS allows."""
        valid = [_valid(text) for text in texts]
        encodings = self._plain.encode_batch_fast(valid, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_ends(self, text: str) -> Encoded:
        """Ids and the end of each token: that of the last character it completes.

        Raises:
          UserError: the tokenizer changes the text, so that tokens have no place in it.
        """
        return self._encoded(_valid(text), complete_characters)

    def encode_with_reach(self, text: str) -> Encoded:
        """Ids and how far each token reaches: behind the last character it holds a byte of.

        Raises:
          UserError: see `encode_with_ends`.
        """
        return self._encoded(_valid(text), begun_characters)

    def _encoded(self, valid: str, characters: Callable[[str], np.ndarray]) -> Encoded:
        """Ids, and ends in bytes as numbers of characters."""
        ids = self.encode_lm(valid)
        ends = np.cumsum(self._byte_lengths[ids], dtype=np.int32)
        covered = int(ends[-1]) if ends.size else 0
        if covered != (len(valid) if valid.isascii() else len(valid.encode())):
            raise UserError(
                f"this {self.kind} tokenizer normalises text, so its tokens cannot be aligned "
                f"with CLIP's: use one without normaliser and prefix space"
            )
        return Encoded(ids, ends if valid.isascii() else characters(valid)[ends])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        self._check(ids)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode_with_ends(self, ids: Sequence[int]) -> tuple[str, np.ndarray]:
        """Text of ids, and the end of each: how many characters are certain with it, int32 [n].

        Bytes that are no UTF-8 become U+FFFD. A character in front of which the first bytes are
        missing is left out, and so is one whose last bytes are not there yet.
        """
        self._check(ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = []
        begun = False
        for index in ids:
            piece = self._pieces[index]
            if not begun:
                piece = piece.lstrip(_INSIDE)
                begun = bool(piece)
            parts.append(decoder.decode(piece))
        ends = np.cumsum([len(part) for part in parts], dtype=np.int32)
        return "".join(parts), ends

    def token_to_id(self, token: str) -> int | None:
        """Id of the piece that is exactly this text, or None."""
        piece = "".join(self._symbols[byte] for byte in token.encode())
        return self._tokenizer.token_to_id(piece)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._tokenizer.to_str(), encoding="utf-8")

    def _check(self, ids: Sequence[int]) -> None:
        wrong = [index for index in ids if not 0 <= index < self.vocab_size]
        if wrong:
            raise UserError(f"token id {wrong[0]} is outside 0 to {self.vocab_size - 1}")

    def _bytes_of_pieces(self) -> list[bytes]:
        byte_of = {symbol: byte for byte, symbol in enumerate(self._symbols)}
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for piece, index in self._tokenizer.get_vocab().items():
            if index not in added:
                pieces[index] = bytes(byte_of[symbol] for symbol in piece)
        for index, token in added.items():
            pieces[index] = token.content.encode()
        return pieces


def train(texts: Iterator[str], *, vocab_size: int) -> ByteLevelTokenizer:
    """Learns a byte-level BPE from texts in any language; the same texts give the same result.

    The vocabulary is smaller than asked for when the texts have no more pairs to merge.

    Raises:
      UserError: `vocab_size` cannot hold the 256 bytes and `<|endoftext|>`, or there is no text.
    """
    if vocab_size < SMALLEST_BPE:
        raise UserError(
            f"tokenizer.train_vocab_size is {vocab_size}; it must be at least "
            f"{SMALLEST_BPE}, 256 bytes and {END_OF_TEXT}"
        )
    tokenizer = _assemble({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield _valid(text)

    tokenizer.train_from_iterator(counted(), trainer)
    if not characters:
        raise UserError("there is no text to learn a tokenizer from; check data.files")
    return ByteLevelTokenizer("train", tokenizer.to_str())


def _assemble(vocab: dict[str, int], merges: tokenizer_files.Merges) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _check(
    vocab: dict[str, int], merges: tokenizer_files.Merges, specials: list[str], directory: Path
) -> None:
    if any(piece.endswith(tokenizer_files.WORD_END) for piece in vocab):
        raise UserError(f"{directory} holds a CLIP tokenizer; set tokenizer.kind=clip")
    missing = [symbol for symbol in tokenizer_files.byte_symbols() if symbol not in vocab]
    if missing:
        raise UserError(f"{directory} holds no byte-level BPE: there is no piece {missing[0]!r}")
    tokenizer_files.check_belong(vocab, merges, tokenizer_files.byte_symbols(), specials, directory)


def _valid(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _fingerprint(content: dict[str, Any]) -> str:
    """sha256 of the parts of a tokenizer.json that decide ids."""
    added = [
        [token[key] for key in ("id", "content", "lstrip", "rstrip", "single_word")]
        for token in content["added_tokens"]
    ]
    model = content["model"]
    parts = [
        sorted(model["vocab"].items()),
        model["merges"],
        # An empty affix is none, and with all bytes in the vocabulary nothing is unknown.
        sorted((k, v) for k, v in model.items() if v and k not in (*_HASHED, "unk_token")),
        sorted(added),
        content["normalizer"],
        _without_offsets(content["pre_tokenizer"]),
        _READING,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _without_offsets(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_offsets(v) for k, v in sorted(value.items()) if k != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value
