"""Alignment: ends against brute force, order, and that no token ends before its text."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from blindvalm_jax.data import token_ends
from blindvalm_jax.data import tokenizer_files as files
from blindvalm_jax.data.alignment import Aligned, align, align_ids, lm_to_tower_index
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.data.clip_cleaning import clean_lines, clean_words
from blindvalm_jax.data.tokenizers import Tokenizer, load, train
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.segments import Rule
from tests import tiny_tokenizers as tiny

BYTE_OF = {symbol: bytes([byte]) for byte, symbol in enumerate(files.byte_symbols())}


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    return ClipTokenizer(*tiny.clip_parts())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load("gpt2", str(tiny.write_pair(tmp_path_factory.mktemp("g"), *tiny.gpt2_parts())))


def pieces_of(vocab: dict[str, int], ids: np.ndarray) -> list[bytes]:
    """The bytes of each token."""
    texts = {index: piece for piece, index in vocab.items()}
    pieces = [texts[index].removesuffix(files.WORD_END) for index in ids.tolist()]
    return [b"".join(BYTE_OF[symbol] for symbol in piece) for piece in pieces]


def brute_force_ends(text: str, pieces: list[bytes], *, clip: bool) -> list[int]:
    """Reads tokens off the text byte by byte; CLIP's skip white space and end with a character."""
    encoded = text.encode()
    position = 0
    ends = []
    for piece in pieces:
        while clip and encoded[position] & 0xC0 != 0x80:
            rest = encoded[position:].decode()
            if not rest[0].isspace():
                break
            position += len(rest[0].encode())
        assert encoded[position : position + len(piece)] == piece
        position += len(piece)
        complete = len(encoded[:position].decode(errors="ignore"))
        inside = len(text[:complete].encode()) < position
        ends.append(complete + 1 if clip and inside else complete)
    return ends


def valid(texts: list[str]) -> list[str]:
    return [text.encode(errors="replace").decode() for text in texts]


def test_ends_equal_brute_force_where_cleaning_changes_nothing(
    clip: ClipTokenizer, gpt2: Tokenizer
) -> None:
    parts = [part for part in tiny.PLAIN if "&" not in part] + ["日本", "é", "😀", "\n", "\t"]
    for text in tiny.random_texts(1, 600, parts):
        found = align(gpt2, clip, text)
        lm_pieces = pieces_of(tiny.gpt2_parts()[0], found.lm_ids)
        assert found.lm_end.tolist() == brute_force_ends(text, lm_pieces, clip=False)
        clip_pieces = pieces_of(tiny.clip_parts()[0], found.clip_ids)
        expected = brute_force_ends(text.lower(), clip_pieces, clip=True)
        assert found.clip_end.tolist() == expected, ascii(text)


@pytest.mark.parametrize("longest", [12, 200])
def test_ids_are_unchanged_and_ends_in_order_for_any_text(
    clip: ClipTokenizer, gpt2: Tokenizer, longest: int
) -> None:
    for text in tiny.random_texts(2, 1200, tiny.HARD, longest=longest):
        found = align(gpt2, clip, text)
        np.testing.assert_array_equal(found.lm_ids, gpt2.encode_lm(text))
        np.testing.assert_array_equal(found.clip_ids, clip.encode(text))
        assert all(array.dtype == np.int32 for array in found)
        for end in (found.lm_end, found.clip_end):
            assert np.all(np.diff(end) >= 0)
            assert np.all((end >= 0) & (end <= len(text)))
        assert not text or found.lm_end[-1] == len(text)


def test_ids_are_aligned_with_the_text_that_they_spell(
    clip: ClipTokenizer, gpt2: Tokenizer
) -> None:
    """The tokens of a text as the text itself; byte by byte the same words, known as early."""
    byte_ids = [gpt2.encode(bytes([n]).decode()) if n < 128 else None for n in range(256)]
    for text in valid(tiny.random_texts(7, 600, tiny.HARD)):
        expected = align(gpt2, clip, text)
        for got, wanted in zip(align_ids(gpt2, clip, expected.lm_ids), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        if not text.isascii():
            continue
        apart = np.array([byte_ids[n] for n in text.encode()], np.int32).reshape(-1)
        spelled = align_ids(gpt2, clip, apart)
        np.testing.assert_array_equal(spelled.lm_end, np.arange(1, len(text) + 1))
        for got, wanted in zip(spelled[2:], expected[2:], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_parts_of_characters_at_both_ends_are_not_read(
    clip: ClipTokenizer, gpt2: Tokenizer
) -> None:
    vocabulary = tiny.gpt2_parts()[0]
    symbols = files.byte_symbols()
    ids = np.array([vocabulary[symbols[byte]] for byte in "é red 日".encode()], np.int32)
    found = align_ids(gpt2, clip, ids[1:-1])
    np.testing.assert_array_equal(found.clip_ids, clip.encode(" red "))
    np.testing.assert_array_equal(found.lm_end, [0, 1, 2, 3, 4, 5, 5, 5])
    inside = align_ids(gpt2, clip, np.append(ids[:1], ids[3:]))  # half of one before " red"
    assert clip.decode(inside.clip_ids.tolist()).startswith("\ufffd")


def test_what_is_complete_at_a_line_break_is_the_tokens_so_far(
    clip: ClipTokenizer, gpt2: Tokenizer
) -> None:
    """Cleaning works line by line, so tokens that end by then must not depend on later lines."""
    for text in tiny.random_texts(3, 1500, tiny.HARD, longest=60):
        found = align(gpt2, clip, text)
        for cut in (i + 1 for i, character in enumerate(text) if character == "\n"):
            complete = found.clip_ids[found.clip_end <= cut].tolist()
            assert complete == clip.encode(text[:cut]), ascii(text)


def test_a_token_never_ends_before_its_word_is_read(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    """What ends by a word's end is what the words so far give, when words clean alone."""
    joints = [" ", "  ", "\n", "\t", "\u2003", "\u3000", " \r\n"]
    words = ["the", "café", "ca\u0301t", "‘red’", "ﬁ", "ﬃt", "ＡＢ", "İĲn", "e\u0301ﬁ", "日本"]
    words += ["&amp;c", "a&nbsp;b", "\x00", "x\x00y", "ΟΣ"]
    rng = random.Random(4)
    for _ in range(600):
        chosen = rng.choices(words, k=rng.randint(1, 9))
        text = "".join(word + rng.choice(joints) for word in chosen)
        if clip.encode(text) != [index for word in chosen for index in clip.encode(word)]:
            continue
        found = align(gpt2, clip, text)
        position = 0
        for count, word in enumerate(chosen):
            position = text.index(word, position) + len(word)
            complete = found.clip_ids[found.clip_end <= position].tolist()
            assert complete == [i for w in chosen[: count + 1] for i in clip.encode(w)]


@pytest.mark.parametrize(
    ("text", "words", "ends"),
    [
        ("The  “Red” cat", ["the", '"red"', "cat"], [3, 10, 14]),
        ("ﬁre &amp; cafe\u0301!", ["fire", "&", "café!"], [3, 9, 16]),
        ("a&nbsp;b the cat", ["a", "b", "the", "cat"], [8, 8, 12, 16]),
        ("the \x00 c\x00at red", ["the", "cat", "red"], [3, 10, 14]),
        ("the voilÃ\xa0 la cat", ["the", "voilà", "la", "cat"], [3, 9, 13, 17]),
        ("the Ã Ã cat", ["the", "à", "à", "cat"], [3, 5, 7, 11]),
        ("the Ã\xa0la cat", ["the", "àla", "cat"], [3, 8, 12]),
        ("the \x85 Ã\xa0la \x85", ["the", "…", "àla", "…"], [3, 5, 10, 12]),
        ("one\r\ntwo\u2028in", ["one", "two", "in"], [3, 8, 11]),
        ("İn an", ["i̇n", "an"], [2, 5]),
        ("\ufeffthe cat", ["the", "cat"], [4, 8]),
        ("the cat\u0345s red", ["the", "cat\u0345s", "red"], [3, 9, 13]),
    ],
)
def test_moved_words_end_where_their_raw_words_do(
    clip: ClipTokenizer, gpt2: Tokenizer, text: str, words: list[str], ends: list[int]
) -> None:
    assert clean_words(text) == words
    found = align(gpt2, clip, text)
    sizes = [len(clip.encode(word)) for word in words]
    assert found.clip_end[np.cumsum(sizes) - 1].tolist() == ends


def test_inside_a_changed_word_every_token_ends_with_the_word(
    clip: ClipTokenizer, gpt2: Tokenizer
) -> None:
    found = align(gpt2, clip, "ﬁxq ‘xq’")
    assert clip.decode(found.clip_ids.tolist()) == "fixq ' xq '"
    assert found.clip_end.tolist() == [3, 3, 3, 3, 5, 6, 7, 8]
    assert set(align(gpt2, clip, "e\u0301ﬁ").clip_end.tolist()) == {3}, "as long, but shifted"


def test_words_that_match_nothing_end_together(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    """Mojibake that swallows a blank: two raw words become one, between words that match."""
    text = "the Ã¢â‚¬â„¢ Ã cat fÃ¼r â€ œ red"
    found = align(gpt2, clip, text)
    np.testing.assert_array_equal(found.clip_ids, clip.encode(text))
    assert found.clip_end[0] == 3
    assert found.clip_end[-1] == len(text)
    assert np.all(np.diff(found.clip_end) >= 0)


def test_a_token_that_ends_inside_a_character_gives_nothing_away(
    clip: ClipTokenizer, gpt2: Tokenizer
) -> None:
    found = align(gpt2, clip, "x 한x")
    assert found.lm_end.tolist() == [1, 2, 2, 2, 3, 4]
    assert found.clip_end.tolist() == [1, 3, 3, 3, 4]
    assert lm_to_tower_index(found, rule="reference").tolist() == [1, 1, 1, 1, 4, 5]
    assert lm_to_tower_index(found, rule="causal").tolist() == [0, 1, 1, 1, 1, 1]


def test_tower_index_counts_what_has_ended_or_is_known() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        lm_end, clip_end, known = (
            np.sort(rng.integers(0, 30, rng.integers(0, 20))).astype(np.int32) for _ in range(3)
        )
        aligned = Aligned(lm_end, lm_end, clip_end, clip_end, known)
        for rule, reached in (("reference", clip_end), ("causal", known)):
            found = lm_to_tower_index(aligned, rule=rule)  # type: ignore[arg-type]
            assert found.dtype == np.int32
            assert found.tolist() == [sum(e <= end for e in reached.tolist()) for end in lm_end]


def test_tower_index_of_a_sentence(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    """`t` of "tx" gives "t" away under `reference`; a word is known with the blank after it."""
    found = align(gpt2, clip, "tx the  cat")
    texts = [gpt2.decode([index]) for index in found.lm_ids]
    assert texts == ["t", "x", " the", " ", " cat"]
    assert clip.decode(found.clip_ids.tolist()) == "tx the cat"
    assert found.clip_end.tolist() == [1, 2, 6, 11]
    assert found.clip_known.tolist() == [3, 3, 7, 12]
    assert lm_to_tower_index(found, rule="reference").tolist() == [1, 2, 3, 3, 4]
    assert lm_to_tower_index(found, rule="causal").tolist() == [0, 0, 2, 3, 3]


def seen(aligned: Aligned, rule: Rule) -> list[list[int]]:
    """The tower's tokens that each language-model token may look at."""
    index = lm_to_tower_index(aligned, rule=rule)
    return [aligned.clip_ids[:count].tolist() for count in index]


def changed_by_later_text(lm: Tokenizer, clip: ClipTokenizer, text: str, rule: Rule) -> int:
    """Pairs of a prefix and a token in it that sees something else than in the whole text."""
    whole = align(lm, clip, text)
    expected = seen(whole, rule)
    changed = 0
    for count, end in enumerate(whole.lm_end.tolist(), start=1):
        prefix = align(lm, clip, text[:end])
        placed = prefix._replace(lm_ids=whole.lm_ids[:count], lm_end=whole.lm_end[:count])
        found = seen(placed, rule)
        changed += sum(a != b for a, b in zip(found, expected[:count], strict=True))
    return changed


ASCII = [part for part in tiny.PLAIN if part.isascii()]
# Characters that cleaning changes at most one for one, in the same way whatever stands around them.
UNREPAIRED = [part for part in [*tiny.PLAIN, "é", "“", "’", "…", "日本", "\n"] if "&" not in part]


@pytest.mark.parametrize("parts", [ASCII, UNREPAIRED], ids=["ascii", "unrepaired"])
def test_later_text_changes_nothing_seen_before(
    clip: ClipTokenizer, gpt2: Tokenizer, parts: list[str]
) -> None:
    """Left out is text that ftfy repairs: there a whole line decides how its words are read."""
    trained = train(iter(tiny.random_texts(6, 50, parts)), vocab_size=300)
    for text in tiny.random_texts(9, 300, parts):
        if not all(line.one_to_one for line in clean_lines(text)):
            continue
        for lm in (gpt2, trained):
            assert changed_by_later_text(lm, clip, text, "causal") == 0, ascii(text)


def test_the_reference_rule_leaks_the_rest_of_a_word(clip: ClipTokenizer, gpt2: Tokenizer) -> None:
    """Guards the test above, and pins the leak: "reds" is CLIP's word, "redx" begins with "re"."""
    red, reds = (align(gpt2, clip, text) for text in ("red x", "redx x"))
    assert red.clip_ids[0] != reds.clip_ids[0]
    assert changed_by_later_text(gpt2, clip, "redx x", "reference") > 0
    changed = [
        changed_by_later_text(gpt2, clip, text, "reference") > 0
        for text in tiny.random_texts(9, 300, ASCII)
    ]
    assert sum(changed) > 100


@pytest.mark.parametrize("kind", ["words", "repaired"])
def test_known_is_after_the_end_and_in_order(clip: ClipTokenizer, kind: str) -> None:
    parts = tiny.PLAIN if kind == "words" else tiny.HARD
    for text in tiny.random_texts(10, 600, parts, longest=60):
        words = clip.encode_words(text)
        assert (words.known > words.ends).all()
        assert (np.diff(words.known) >= 0).all()
        np.testing.assert_array_equal(words.ids, clip.encode_lm(text))


def test_clip_is_not_aligned_with_itself(clip: ClipTokenizer) -> None:
    with pytest.raises(UserError, match="let the tower read its tokens"):
        align(clip, clip, "the cat")


def test_trained_tokenizers_align(clip: ClipTokenizer) -> None:
    texts = valid(tiny.random_texts(7, 200, tiny.HARD))
    trained = train(iter(texts), vocab_size=350)
    for text in texts:
        found = align(trained, clip, text)
        pieces = pieces_of(trained._tokenizer.get_vocab(), found.lm_ids)
        assert found.lm_end.tolist() == brute_force_ends(text, pieces, clip=False)


def test_a_tokenizer_that_changes_text_is_refused(clip: ClipTokenizer, tmp_path: Path) -> None:
    trained = train(iter(["the red ring " * 9]), vocab_size=262)
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
    with pytest.raises(UserError, match="normalises text"):
        align(load("train", str(tmp_path)), clip, "the ring")


def test_ends_do_not_depend_on_the_cache(
    clip: ClipTokenizer, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_ends, "_MOST_WORDS", 3)
    monkeypatch.setattr(token_ends, "_LONGEST_CACHED", 4)
    small = ClipTokenizer(*tiny.clip_parts())
    for text in tiny.random_texts(8, 100, tiny.PLAIN):
        np.testing.assert_array_equal(
            align(gpt2, small, text).clip_end, align(gpt2, clip, text).clip_end
        )


def test_real_tokenizers_align_on_real_text(shared: Path) -> None:
    """LAMBADA has no mojibake: each CLIP word ends where some word of the text does."""
    folder = shared / "data"
    clip = load("clip", str(folder / "tokenizers" / "clip"))
    gpt2 = load("gpt2", str(folder / "tokenizers" / "gpt2"))
    assert isinstance(clip, ClipTokenizer)
    path = folder / "eval" / "lm" / "lambada_test_plain_text.txt"
    for line in path.read_text(encoding="utf-8").split("\n")[:-1][::20]:
        found = align(gpt2, clip, line)
        np.testing.assert_array_equal(found.lm_ids, gpt2.encode_lm(line))
        np.testing.assert_array_equal(found.clip_ids, clip.encode(line))
        assert found.lm_end[-1] == len(line)
        assert found.clip_end[-1] == len(line.rstrip())
        ends = {i for i, c in enumerate(f"{line} ") if c.isspace() and i and line[i - 1] != " "}
        assert ends <= set(found.clip_end.tolist())


def test_later_text_changes_nothing_with_real_tokenizers(shared: Path) -> None:
    folder = shared / "data"
    clip = load("clip", str(folder / "tokenizers" / "clip"))
    gpt2 = load("gpt2", str(folder / "tokenizers" / "gpt2"))
    assert isinstance(clip, ClipTokenizer)
    path = folder / "eval" / "lm" / "lambada_test_plain_text.txt"
    positions = leaks = 0
    for line in path.read_text(encoding="utf-8").split("\n")[:-1][::200]:
        assert changed_by_later_text(gpt2, clip, line, "causal") == 0
        whole = align(gpt2, clip, line)
        for tokens, end in zip(seen(whole, "reference"), whole.lm_end.tolist(), strict=True):
            positions += 1
            leaks += tokens != clip.encode(line[:end])
    # 7.9 % of all positions of LAMBADA.
    assert 0.05 < leaks / positions < 0.11
