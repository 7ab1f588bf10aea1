"""Tokenizers: ids equal to the references', whatever the text, the file format and the cache."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from transformers import CLIPTokenizer, GPT2Tokenizer

from blindvalm_jax.data import clip_bpe
from blindvalm_jax.data import tokenizer_files as files
from blindvalm_jax.data.tokenizers import ClipTokenizer, Tokenizer, load, train
from blindvalm_jax.errors import UserError
from tests import tiny_tokenizers as tiny


def reference_merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """BPE as its definition reads: all of the best pair, from the left; then the next best."""
    while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        merged: list[str] = []
        position = 0
        while position < len(parts):
            both = tuple(parts[position : position + 2]) == best
            merged.append("".join(best) if both else parts[position])
            position += 2 if both else 1
        parts = merged
    return parts


VOCAB, MERGES = tiny.clip_parts()
RANKS = {pair: rank for rank, pair in enumerate(MERGES)}
SYMBOLS = files.byte_symbols()


def reference_clip_ids(text: str) -> list[int]:
    """OpenAI's ids with the tiny vocabulary, nothing cached."""
    pattern = (
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    ids = []
    for piece in regex.findall(pattern, tiny.reference_clean(text), regex.IGNORECASE):
        symbols = [SYMBOLS[byte] for byte in piece.encode()]
        symbols[-1] += files.WORD_END
        parts = [piece] if piece in files.CLIP_SPECIALS else reference_merge(symbols, RANKS)
        ids += [VOCAB[part] for part in parts]
    return ids


def write_forms(root: Path) -> list[Path]:
    """The tiny CLIP in each form in which it may come."""
    vocab, merges = tiny.clip_parts()
    pair = tiny.write_pair(root / "pair", vocab, merges)
    for name, listed in (("text", [" ".join(m) for m in merges]), ("lists", merges)):
        (root / name).mkdir()
        content = {"model": {"type": "BPE", "vocab": vocab, "merges": listed}}
        (root / name / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    openai = root / "openai"
    openai.mkdir()
    lines = "\n".join(["version", *(" ".join(m) for m in merges), ""])
    (openai / files.OPENAI_CLIP_FILE).write_bytes(gzip.compress(lines.encode()))
    return [pair, root / "text", root / "lists", openai]


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    return ClipTokenizer(*tiny.clip_parts())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load("gpt2", str(tiny.write_pair(tmp_path_factory.mktemp("g"), *tiny.gpt2_parts())))


@pytest.mark.parametrize("parts", [tiny.HARD, tiny.PLAIN], ids=["hard", "plain"])
def test_clip_ids_equal_the_definition(clip: ClipTokenizer, parts: list[str]) -> None:
    for text in tiny.random_texts(4, 800, parts):
        assert clip.encode(text) == reference_clip_ids(text), ascii(text)


def test_only_one_character_is_in_no_piece(clip: ClipTokenizer) -> None:
    """U+0345 folds to a letter but is none, and is lost; the ends of tokens allow for it."""
    every = [chr(code) for code in range(0x80, sys.maxunicode + 1) if chr(code).isprintable()]
    assert [c for c in every if not clip_bpe._PIECES.fullmatch(c) and not c.isspace()] == ["\u0345"]
    assert clip.encode("x \u0345 y") == clip.encode("x y")


def test_clip_ids_equal_transformers_on_cleaned_text(clip: ClipTokenizer, tmp_path: Path) -> None:
    clip.save(tmp_path)
    reference = CLIPTokenizer.from_pretrained(str(tmp_path))
    for text in tiny.random_texts(5, 1000, tiny.PLAIN):
        want = reference(tiny.reference_clean(text), add_special_tokens=False)["input_ids"]
        assert clip.encode(text) == want, ascii(text)


def test_merging_equals_its_definition_for_any_ranks() -> None:
    rng = random.Random(6)
    for _ in range(3000):
        made = list("abc")
        ranks: dict[tuple[str, str], int] = {}
        for _ in range(rng.randint(0, 12)):
            pair = (rng.choice(made), rng.choice(made))
            ranks[pair] = rng.randint(0, 10**6)
            made.append("".join(pair))
        symbols = rng.choices("abc", k=rng.randint(0, 20))
        assert clip_bpe.merge_symbols(symbols, ranks) == reference_merge(symbols, ranks)


def test_language_model_ids_leave_room_for_fairseq_specials(clip: ClipTokenizer) -> None:
    ids = clip.encode_lm("The cat, and the ring.")
    assert ids.dtype == np.int32
    assert (ids - 4).tolist() == clip.encode("The cat, and the ring.")
    assert (clip.lm_offset, clip.pad_id, clip.eos_id) == (4, 1, 2)
    assert clip.vocab_size == len(tiny.clip_parts()[0]) + 4


def test_ids_do_not_depend_on_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_bpe, "_MOST_WORDS", 3)
    monkeypatch.setattr(clip_bpe, "_LONGEST_CACHED", 5)
    small = ClipTokenizer(*tiny.clip_parts())
    for text in tiny.random_texts(7, 200, tiny.PLAIN):
        assert small.encode(text) == reference_clip_ids(text)
    assert len(small._words) <= 3


def test_encoding_does_not_hand_out_the_cache(clip: ClipTokenizer) -> None:
    clip.encode_lm("cat")[:] = 0
    assert clip.encode("cat") == reference_clip_ids("cat")


def test_clip_decodes_what_it_encodes(clip: ClipTokenizer) -> None:
    for text in tiny.random_texts(8, 300, tiny.PLAIN):
        back = clip.decode(clip.encode(text))
        assert back.replace(" ", "") == tiny.reference_clean(text).replace(" ", "")
    assert clip.decode(clip.encode("The  Café")) == "the café"


@pytest.mark.parametrize("form", [0, 1, 2, 3], ids=["pair", "json text", "json lists", "openai"])
def test_every_form_of_clip_gives_the_same_tokenizer(
    clip: ClipTokenizer, tmp_path: Path, form: int
) -> None:
    loaded = load("clip", str(write_forms(tmp_path)[form]))
    assert loaded.fingerprint == clip.fingerprint
    for text in tiny.random_texts(9, 50, tiny.HARD):
        assert loaded.encode(text) == clip.encode(text)


def test_fingerprints_tell_tokenizers_apart(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    vocab, merges = tiny.clip_parts()
    swapped = ClipTokenizer(vocab, [merges[1], merges[0], *merges[2:]])
    trained = [train(iter(["red ring " * 9]), vocab_size=size) for size in (262, 263)]
    found = {t.fingerprint for t in (clip, swapped, gpt2, *trained)}
    assert len(found) == 5


def test_token_to_id_prefers_the_end_of_a_word(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    vocab, _ = tiny.clip_parts()
    assert clip.token_to_id(".") == vocab[".</w>"]
    assert clip.token_to_id("th") == vocab["th"]
    assert [clip.token_to_id("café")] == clip.encode("café")
    assert gpt2.token_to_id(".") == gpt2.encode(".")[0]
    assert clip.token_to_id("zebra") is None
    assert gpt2.token_to_id("zebra") is None


def test_gpt2_ids_equal_transformers(gpt2: Tokenizer, tmp_path: Path) -> None:
    reference = GPT2Tokenizer.from_pretrained(
        str(tiny.write_pair(tmp_path / "gpt2", *tiny.gpt2_parts()))
    )
    texts = [t.encode(errors="ignore").decode() for t in tiny.random_texts(10, 1000, tiny.HARD)]
    batch = gpt2.encode_lm_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert gpt2.encode(text) == reference(text)["input_ids"], ascii(text)
        if "<|endoftext|>" not in text:
            assert gpt2.encode(text) == ids.tolist(), ascii(text)
        assert gpt2.decode(ids.tolist()) == text
        assert gpt2.eos_id not in ids


def test_gpt2_from_tokenizer_json_is_the_same(gpt2: Tokenizer, tmp_path: Path) -> None:
    reference = GPT2Tokenizer.from_pretrained(
        str(tiny.write_pair(tmp_path / "pair", *tiny.gpt2_parts()))
    )
    reference.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "json").mkdir()
    (tmp_path / "saved" / "tokenizer.json").rename(tmp_path / "json" / "tokenizer.json")
    loaded = load("gpt2", str(tmp_path / "json"))
    assert loaded.fingerprint == gpt2.fingerprint
    assert loaded.encode("the cat 10<|endoftext|>") == gpt2.encode("the cat 10<|endoftext|>")


def test_a_lone_surrogate_is_the_replacement_character(gpt2: Tokenizer) -> None:
    assert gpt2.encode("a\ud800b") == gpt2.encode("a\ufffdb")
    assert gpt2.encode_lm_batch(["a\ud800b"])[0].tolist() == gpt2.encode("a\ufffdb")


def test_training_is_deterministic_and_loses_nothing(tmp_path: Path) -> None:
    texts = [
        text.encode(errors="replace").decode() for text in tiny.random_texts(11, 300, tiny.HARD)
    ]
    first, second = (train(iter(texts), vocab_size=400) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 400
    assert first.token_to_id("<|endoftext|>") == first.eos_id == first.pad_id
    first.save(tmp_path)
    loaded = load("train", str(tmp_path))
    assert loaded.fingerprint == first.fingerprint
    for text in texts:
        assert loaded.encode(text) == first.encode(text)
        assert first.decode(first.encode(text)) == text


def test_tokenizers_travel_to_spawned_processes(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    clip.encode_with_ends("a cache that must not travel")
    trained = train(iter(["the red ring " * 9]), vocab_size=262)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for tokenizer in (clip, gpt2, trained):
            there = pool.apply(tokenizer.encode_lm, ("The red café.",))
            np.testing.assert_array_equal(there, tokenizer.encode_lm("The red café."))


def test_saved_tokenizers_load_again(clip: ClipTokenizer, gpt2: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (clip, gpt2):
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load(tokenizer.kind, str(tmp_path / tokenizer.kind))
        assert loaded.fingerprint == tokenizer.fingerprint


def test_ids_outside_the_vocabulary_are_refused(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    for tokenizer in (clip, gpt2):
        with pytest.raises(UserError, match="outside"):
            tokenizer.decode([0, tokenizer.vocab_size])


def _broken(root: Path, case: str) -> tuple[str, str]:
    """Writes a directory with one thing wrong; returns (kind, path)."""
    vocab, merges = tiny.clip_parts()
    g_vocab, g_merges = tiny.gpt2_parts()
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    (root / "bad").mkdir()
    (root / "bad" / "tokenizer.json").write_text("{")
    shifted = {piece: index + 1 for piece, index in vocab.items()}
    only_vocab = tiny.write_pair(root / "only", vocab, merges)
    (only_vocab / "merges.txt").unlink()
    unsized = {piece: index for piece, index in g_vocab.items() if piece != "<|endoftext|>"}
    return {
        "kind": ("bpe", str(root)),
        "no path": ("clip", ""),
        "missing": ("clip", str(root / "nowhere")),
        "file": ("gpt2", str(root / "file")),
        "hub": ("gpt2", "no-such-owner/no-such-tokenizer"),
        "empty clip": ("clip", str(root / "empty")),
        "empty gpt2": ("gpt2", str(root / "empty")),
        "empty train": ("train", str(root / "empty")),
        "no merges": ("clip", str(only_vocab)),
        "not json": ("train", str(root / "bad")),
        "gpt2 as clip": ("clip", str(tiny.write_pair(root / "g", g_vocab, g_merges))),
        "clip as gpt2": ("gpt2", str(tiny.write_pair(root / "c", vocab, merges))),
        "few merges": ("clip", str(tiny.write_pair(root / "f", vocab, merges[:-1]))),
        "few pieces": ("gpt2", str(tiny.write_pair(root / "p", g_vocab, [*g_merges, ("Q", "Q")]))),
        "gaps": ("clip", str(tiny.write_pair(root / "s", shifted, merges))),
        "no end": ("gpt2", str(tiny.write_pair(root / "u", unsized, g_merges))),
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("kind", "known: clip, gpt2, train"),
        ("no path", "tokenizer.path is empty"),
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("hub", "as a hub id it cannot be had"),
        ("empty clip", "expected vocab.json and merges.txt, tokenizer.json, or"),
        ("empty gpt2", "expected vocab.json and merges.txt, or tokenizer.json"),
        ("empty train", "expected the tokenizer.json"),
        ("no merges", "merges.txt is missing"),
        ("not json", "cannot be read as JSON"),
        ("gpt2 as clip", "tokenizer.kind=gpt2"),
        ("clip as gpt2", "tokenizer.kind=clip"),
        ("few merges", "do not belong together"),
        ("few pieces", "do not belong together"),
        ("gaps", "are not 0 to"),
        ("no end", "<|endoftext|>"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, case: str, message: str) -> None:
    kind, path = _broken(tmp_path, case)
    with pytest.raises(UserError) as caught:
        load(kind, path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_refuses_what_cannot_work() -> None:
    with pytest.raises(UserError, match="at least 257"):
        train(iter(["text"]), vocab_size=256)
    with pytest.raises(UserError, match="no text"):
        train(iter([""]), vocab_size=300)


@pytest.fixture(scope="module")
def real_clip(shared: Path) -> Tokenizer:
    return load("clip", str(shared / "data" / "tokenizers" / "clip"))


def test_clip_equals_the_reference_cases(real_clip: Tokenizer, shared: Path) -> None:
    cases = json.loads((shared / "data" / "tokenizers" / "tokenizer_cases.json").read_text())
    assert len(cases) == 134
    for case in cases:
        assert real_clip.encode(case["text"]) == case["ids"], case["text"]


def test_the_files_of_openai_and_hugging_face_agree(
    real_clip: Tokenizer, shared: Path, tmp_path: Path
) -> None:
    source = shared / "data" / "tokenizers" / "clip" / files.OPENAI_CLIP_FILE
    (tmp_path / source.name).symlink_to(source)
    assert load("clip", str(tmp_path)).fingerprint == real_clip.fingerprint
    assert (real_clip.vocab_size, real_clip.token_to_id(".")) == (49412, 269)


def test_clip_reproduces_the_published_lambada_ids(real_clip: Tokenizer, shared: Path) -> None:
    folder = shared / "data" / "eval" / "lm"
    stored = np.load(folder / "lambada_test_clipbpe.npz")
    lines = (folder / "lambada_test_plain_text.txt").read_text(encoding="utf-8").split("\n")[:-1]
    rows = np.split(stored["ids"], np.cumsum(stored["lens"])[:-1])
    assert len(lines) == len(rows) == 5153
    for line, row in zip(lines, rows, strict=True):
        for quote in ("“", "”", "''", "``"):
            line = line.replace(quote, '"')
        np.testing.assert_array_equal([*real_clip.encode_lm(line), real_clip.eos_id], row)


@pytest.mark.parametrize(("name", "count"), [("test", 2891), ("valid", 2461)])
def test_clip_reproduces_the_published_wikitext_ids(
    real_clip: Tokenizer, shared: Path, name: str, count: int
) -> None:
    """The raw text is not at hand: the stored ids decode to the text, and it encodes to them."""
    folder = shared / "data" / "eval" / "lm"
    stored = np.load(folder / f"wikitext103_{name}_clipbpe.npz")
    text = (folder / f"wikitext103_{name}_clipbpe.decoded.txt").read_text(encoding="utf-8")
    rows = np.split(stored["ids"].astype(np.int64), np.cumsum(stored["lens"])[:-1])
    assert len(rows) == count
    for line, row in zip(text.split("\n")[:count], rows, strict=True):
        assert real_clip.decode((row[:-1] - real_clip.lm_offset).tolist()) == line.rstrip(" ")
        np.testing.assert_array_equal([*real_clip.encode_lm(line), real_clip.eos_id], row)


def _corpus(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")


@pytest.mark.slow
def test_clip_equals_transformers_on_every_corpus(real_clip: Tokenizer, shared: Path) -> None:
    reference = CLIPTokenizer.from_pretrained(str(shared / "data" / "tokenizers" / "clip"))
    for path in sorted((shared / "data" / "corpora").glob("**/*.txt*")):
        for line in _corpus(path).split("\n"):
            want = reference.backend_tokenizer.encode(
                tiny.reference_clean(line), add_special_tokens=False
            )
            assert real_clip.encode(line) == want.ids, line


def test_clip_equals_transformers_on_a_sample_of_corpora(
    real_clip: Tokenizer, shared: Path
) -> None:
    reference = CLIPTokenizer.from_pretrained(str(shared / "data" / "tokenizers" / "clip"))
    for name in ("openstax_psychology2e_NC", "wikipedia_en_gensim106"):
        lines = _corpus(shared / "data" / "corpora" / f"{name}.txt.gz").split("\n")
        for line in lines[::10]:
            want = reference.backend_tokenizer.encode(
                tiny.reference_clean(line), add_special_tokens=False
            )
            assert real_clip.encode(line) == want.ids, line


def test_gpt2_equals_transformers_on_a_corpus(shared: Path) -> None:
    directory = str(shared / "data" / "tokenizers" / "gpt2")
    ours, reference = load("gpt2", directory), GPT2Tokenizer.from_pretrained(directory)
    assert (ours.vocab_size, ours.eos_id, ours.pad_id) == (50257, 50256, 50256)
    text = _corpus(shared / "data" / "corpora" / "wikipedia_en_gensim106.txt.gz")
    lines = text.split("\n")[::5]
    want = reference(lines)["input_ids"]
    assert [ids.tolist() for ids in ours.encode_lm_batch(lines)] == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "holds no BPE with vocab and merges"),
        ({"model": {"vocab": [], "merges": []}}, "not a table of piece: id"),
        ({"model": {"vocab": {"a": "0"}, "merges": []}}, "'a' has no whole number as its id"),
        ({"model": {"vocab": {"a": True}, "merges": []}}, "'a' has no whole number as its id"),
        ({"model": {"vocab": {}, "merges": {}}}, "the merges are no list"),
        ({"model": {"vocab": {}, "merges": [3]}}, "expected two pieces, got 3"),
        ({"model": {"vocab": {}, "merges": [["a", 3]]}}, "expected two pieces, got"),
        ({"added_tokens": 3}, "added_tokens must be a list"),
        ({"added_tokens": ["x"]}, "added_tokens must be a list"),
        ({"added_tokens": [{"id": 3}]}, "added_tokens must be a list"),
        ({"pre_tokenizer": 3}, "cannot be used"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "train"])
def test_a_malformed_tokenizer_json_is_one_line(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    train(iter(["the red ring " * 9]), vocab_size=262).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message) as caught:
        load(kind, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_decides_ids_is_in_the_fingerprint_and_dropout_is_refused(tmp_path: Path) -> None:
    train(iter(["the red ring " * 9]), vocab_size=262).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())

    def changed(**fields: Any) -> Tokenizer:
        model = {**content["model"], **fields}
        file.write_text(json.dumps({**content, "model": model}))
        return load("train", str(tmp_path))

    assert changed(ignore_merges=True).fingerprint != changed().fingerprint
    assert changed(continuing_subword_prefix="").fingerprint == changed().fingerprint
    with pytest.raises(UserError, match="asks for BPE dropout 0.5"):
        changed(dropout=0.5)
