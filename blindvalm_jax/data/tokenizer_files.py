"""Vocabularies and merges on disk: reading them, and refusing what does not fit together."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blindvalm_jax import files, hub
from blindvalm_jax.errors import UserError

OPENAI_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
OPENAI_CLIP_MERGES = 49152 - 256 - 2
WORD_END = "</w>"
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_WHOLE = "give a directory with the whole tokenizer"
_FILES = ["vocab.json", "merges.txt", "tokenizer.json"]

Merges = list[tuple[str, str]]


def byte_symbols() -> list[str]:
    """One printable character per byte value, as GPT-2 and CLIP write bytes in their pieces."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update((byte, chr(256 + index)) for index, byte in enumerate(others))
    return [symbols[byte] for byte in range(256)]


def openai_order() -> list[int]:
    """Byte values in the order in which OpenAI's vocabularies list them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*printable, *(byte for byte in range(256) if byte not in set(printable))]


def find_directory(path: str, *, setting: str = "tokenizer.path") -> Path:
    """The directory a path or hub id names; the network is used only for a hub id.

    Raises:
      UserError: there is no such directory, and no such repository can be reached; `setting` is
        the name by which the message calls it.
    """
    if not path:
        raise UserError(f"{setting} is empty: give a directory or a hub id")
    found = hub.local_path(path, patterns=_FILES, needs=None, setting=setting)
    if not found.is_dir():
        raise UserError(f"{setting} {path} is a file; give the directory that holds it")
    return found


def holds_tokenizer(path: str) -> bool:
    """Whether a path that is there on disk is a directory with files of a tokenizer."""
    directory = Path(path).expanduser()
    return any((directory / name).is_file() for name in [*_FILES, OPENAI_CLIP_FILE])


def read_clip(directory: Path) -> tuple[dict[str, int], Merges]:
    """Vocabulary and merges of a CLIP tokenizer, from whichever of its three forms is there."""
    if (directory / "vocab.json").exists() or (directory / "merges.txt").exists():
        vocab, merges = read_pair(directory)
    elif (directory / OPENAI_CLIP_FILE).exists():
        vocab, merges = _read_openai(directory / OPENAI_CLIP_FILE)
    elif (directory / "tokenizer.json").exists():
        vocab, merges = model_of(files.read_json(directory / "tokenizer.json"), directory)
    else:
        raise UserError(
            f"{directory} holds no CLIP tokenizer: expected vocab.json and merges.txt, "
            f"tokenizer.json, or {OPENAI_CLIP_FILE}"
        )
    if not any(piece.endswith(WORD_END) for piece in vocab):
        raise UserError(
            f"{directory} holds no CLIP tokenizer: its pieces have no {WORD_END!r} form; "
            f"for a byte-level BPE set tokenizer.kind=gpt2"
        )
    symbols = byte_symbols()
    alphabet = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    missing = [piece for piece in (*CLIP_SPECIALS, *alphabet) if piece not in vocab]
    if missing:
        raise UserError(f"the vocabulary in {directory} lacks {missing[0]!r}, which CLIP needs")
    check_belong(vocab, merges, alphabet, CLIP_SPECIALS, directory)
    return vocab, merges


def read_pair(directory: Path) -> tuple[dict[str, int], Merges]:
    """Reads vocab.json and merges.txt."""
    path = directory / "vocab.json"
    vocab = _checked_vocab(files.read_json(path, hint=_WHOLE), path)
    return vocab, _parse_merges(_read_text(directory / "merges.txt"), directory / "merges.txt")


def model_of(content: Any, directory: Path) -> tuple[dict[str, int], Merges]:
    """Vocabulary and merges inside a tokenizer.json."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
        raise UserError(f"{directory / 'tokenizer.json'} holds no BPE with vocab and merges")
    path = directory / "tokenizer.json"
    vocab = _checked_vocab(model["vocab"], path)
    if not isinstance(model["merges"], list):
        raise UserError(f"{path}: the merges are no list, got {_short(model['merges'])}")
    merges = []
    for entry in model["merges"]:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
            raise UserError(f"{path}: expected two pieces, got {_short(entry)}")
        merges.append((parts[0], parts[1]))
    return vocab, merges


def added_tokens(content: dict[str, Any], directory: Path) -> list[str]:
    """Contents of the added tokens of a tokenizer.json."""
    added = content.get("added_tokens") or []
    tokens = added if isinstance(added, list) else [added]
    texts = [token.get("content") if isinstance(token, dict) else None for token in tokens]
    wrong = [token for token, text in zip(tokens, texts, strict=True) if not isinstance(text, str)]
    if wrong:
        raise UserError(
            f"{directory / 'tokenizer.json'}: added_tokens must be a list of tokens with their "
            f"content, got {_short(wrong[0])}"
        )
    return [str(text) for text in texts]


def _checked_vocab(vocab: Any, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict):
        raise UserError(f"{path}: the vocabulary is not a table of piece: id, got {_short(vocab)}")
    wrong = [item for item in vocab.items() if type(item[1]) is not int]
    if wrong:
        raise UserError(f"{path}: {_short(wrong[0][0])} has no whole number as its id")
    return vocab


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_belong(
    vocab: dict[str, int],
    merges: Merges,
    alphabet: Iterable[str],
    specials: Iterable[str],
    directory: Path,
) -> None:
    """Checks that the vocabulary is exactly alphabet, merge results and specials, ids 0 to V-1.

    Raises:
      UserError: a piece is missing or cannot come about, or the ids have gaps.
    """
    made = {left + right for left, right in merges}
    explained = made.union(alphabet, specials)
    parts = {part for pair in merges for part in pair}
    sizes = f"{len(vocab)} pieces and {len(merges)} merges in {directory}"
    missing = sorted((made | parts) - vocab.keys())
    if missing:
        raise UserError(
            f"{sizes} do not belong together: {len(missing)} pieces of the merges, such as "
            f"{missing[0]!r}, are not in the vocabulary; take both from the same tokenizer"
        )
    orphans = [piece for piece in vocab if piece not in explained]
    if orphans:
        raise UserError(
            f"{sizes} do not belong together: no merge makes {len(orphans)} of the pieces, such "
            f"as {orphans[0]!r}; take both from the same tokenizer"
        )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"the ids of the vocabulary in {directory} are not 0 to {len(vocab) - 1}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {_WHOLE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _parse_merges(text: str, path: Path) -> Merges:
    lines = text.split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = []
    for line in lines:
        parts = line.split()
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        elif parts:
            raise UserError(f"{path}: expected two pieces on a line, got {line[:80]!r}")
    return merges


def _read_openai(path: Path) -> tuple[dict[str, int], Merges]:
    """OpenAI's list of merges; the vocabulary follows from it."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    merges = _parse_merges("\n".join(text.split("\n")[1 : OPENAI_CLIP_MERGES + 1]), path)
    symbols = byte_symbols()
    alphabet = [symbols[byte] for byte in openai_order()]
    pieces = [*alphabet, *(symbol + WORD_END for symbol in alphabet)]
    pieces += [left + right for left, right in merges]
    pieces += CLIP_SPECIALS
    return {piece: index for index, piece in enumerate(pieces)}, merges
