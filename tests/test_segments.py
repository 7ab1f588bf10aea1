"""The cut rules: golden rows of the reference, and causality of the causal rule."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax.data import tokenizers
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments

SEPARATORS = segments.clip_separators()
# Ids with a meaning for a rule, drawn often, so that random rows are full of decisions.
MARKED = np.flatnonzero((SEPARATORS.rank < 127) | (SEPARATORS.minimum < 75))


def random_rows(seed: int, *, rows: int, size: int, marked: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    plain = rng.integers(1000, 40000, (rows, size))
    return np.where(rng.random((rows, size)) < marked, rng.choice(MARKED, (rows, size)), plain)


def reference_lengths(ids: list[int], longest: int) -> list[int]:
    """The rule as its definition reads, one row at a time."""
    order = [49407, 0, 269, 282, 256, 281, 267, 1081, 3823, 2811, 4332, 1818, 2361, 270, 268]
    found = []
    while len(ids) > longest:
        window = ids[:longest]
        cut = next((window.index(mark) + 1 for mark in order if mark in window), longest)
        found.append(cut)
        ids = ids[cut:]
    return [*found, len(ids)]


def test_reference_rule_equals_the_golden_rows(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "segmentation.json").read_text())["cases"]
    assert len(cases) == 67
    for case in cases:
        found = segments.starts(np.array([case["ids"]]), rule="reference", separators=SEPARATORS)
        assert segments.lengths(found[0]).tolist() == case["lengths"], case["desc"]


@pytest.mark.parametrize(
    "name",
    ["clip_text_a", "clip_text_b", "end_to_end_blind_a", "end_to_end_blind_b"]
    + ["end_to_end_valm_a", "end_to_end_valm_c"],
)
def test_reference_rule_equals_the_golden_models(shared: Path, name: str) -> None:
    want = json.loads((shared / "golden" / f"{name}.json").read_text())["segment_lengths"]
    tokens = np.load(shared / "golden" / f"{name}.npz")["tokens"]
    ids = np.where(tokens == 2, 49407, np.where(tokens == 1, 0, tokens - 4))
    found = segments.starts(ids, rule="reference", separators=SEPARATORS)
    assert [segments.lengths(row).tolist() for row in found] == want


@pytest.mark.parametrize("longest", [5, 30, 75])
@pytest.mark.parametrize("marked", [0.0, 0.02, 0.3])
def test_reference_rule_equals_its_definition(longest: int, marked: float) -> None:
    ids = random_rows(1, rows=40, size=200, marked=marked)
    separators = segments.clip_separators(longest)
    found = segments.starts(ids, rule="reference", separators=separators)
    for row, start in zip(ids, found, strict=True):
        assert segments.lengths(start).tolist() == reference_lengths(row.tolist(), longest)


@pytest.mark.parametrize("rule", ["causal", "reference"])
@pytest.mark.parametrize("size", [1, 2, 74, 75, 76, 300])
def test_segments_cover_the_row_and_fit_the_tower(rule: segments.Rule, size: int) -> None:
    ids = random_rows(2, rows=20, size=size, marked=0.1)
    for longest in (2, 20, 75):
        found = segments.starts(ids, rule=rule, separators=segments.clip_separators(longest))
        assert found[:, 0].all()
        for row in found:
            assert segments.lengths(row).sum() == size
            assert segments.lengths(row).max() <= longest


@pytest.mark.parametrize("longest", [7, 75])
@pytest.mark.parametrize("marked", [0.02, 0.2, 0.9])
def test_causal_starts_of_a_prefix_are_those_of_the_row(longest: int, marked: float) -> None:
    ids = random_rows(3, rows=12, size=220, marked=marked)
    separators = segments.clip_separators(longest)
    whole = segments.starts(ids, rule="causal", separators=separators)
    for size in range(1, ids.shape[1]):
        prefix = segments.starts(ids[:, :size], rule="causal", separators=separators)
        np.testing.assert_array_equal(prefix, whole[:, :size])


def test_reference_rule_does_look_ahead() -> None:
    """Guards the test above: the same comparison must be able to fail."""
    ids = random_rows(3, rows=12, size=220, marked=0.02)
    whole = segments.starts(ids, rule="reference", separators=SEPARATORS)
    prefix = segments.starts(ids[:, :150], rule="reference", separators=SEPARATORS)
    assert (prefix != whole[:, :150]).any()


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_steps_carry_the_causal_rule_token_by_token(array: type) -> None:
    ids = random_rows(4, rows=8, size=150, marked=0.1).astype(np.int32)
    minimum = array(SEPARATORS.minimum.astype(np.int32))
    length = array(np.zeros(8, np.int32))
    columns = []
    for column in array(ids.T):
        columns.append(np.asarray(length == 0))
        length = segments.step(length, column, minimum=minimum)
    whole = segments.starts(ids, rule="causal", separators=SEPARATORS)
    np.testing.assert_array_equal(np.stack(columns, 1), whole)


def test_causal_rule_cuts_where_its_table_says() -> None:
    word, stop, comma, eos = 1000, 269, 267, 49407

    def lengths(ids: list[int]) -> list[int]:
        found = segments.starts(np.array([ids]), rule="causal", separators=SEPARATORS)
        return segments.lengths(found[0]).tolist()

    assert lengths([eos, word, eos, word]) == [1, 2, 1]
    assert lengths([word] * 11 + [stop, word]) == [12, 1]
    assert lengths([word] * 10 + [stop, word]) == [12]
    assert lengths([word] * 55 + [comma, word]) == [56, 1]
    assert lengths([word] * 54 + [comma, word]) == [56]
    assert lengths([word] * 80) == [75, 5]


@pytest.mark.parametrize("rule", ["causal", "reference"])
def test_padding_changes_no_cut_and_fits_the_tower(rule: segments.Rule) -> None:
    ids = random_rows(5, rows=30, size=200, marked=0.1)
    counts = np.random.default_rng(5).integers(0, 201, 30)
    padded = np.where(np.arange(200) < counts[:, None], ids, 0)
    found = segments.starts(padded, rule=rule, separators=SEPARATORS, counts=counts)
    for row, count, start in zip(ids, counts, found, strict=True):
        alone = segments.starts(row[None, :count], rule=rule, separators=SEPARATORS)[0]
        np.testing.assert_array_equal(start[:count], alone)
        assert segments.lengths(start).max() <= 75
        assert start[0]


def test_fixed_ids_are_those_of_clips_tokenizer(shared: Path) -> None:
    clip = tokenizers.load("clip", str(shared / "data" / "tokenizers" / "clip"))
    found = segments.separators_for(clip)
    np.testing.assert_array_equal(found.rank, SEPARATORS.rank)
    np.testing.assert_array_equal(found.minimum, SEPARATORS.minimum)


class PieceTokenizer:
    """Only what the separators of a tokenizer are made from."""

    kind, vocab_size, lm_offset, eos_id, pad_id = "train", 300, 0, 299, 299

    def token_to_id(self, token: str) -> int | None:
        """Own id of a piece."""
        return {".": 10, ",": 11, ";": 12}.get(token)


def test_separators_by_piece_text() -> None:
    found = segments.separators_for(PieceTokenizer(), 75)
    assert found.minimum.shape == (300,)
    assert found.minimum[[10, 11, 12, 299, 5]].tolist() == [12, 56, 32, 1, 75]
    assert found.rank[[299, 10, 12, 11, 5]].argsort(kind="stable").tolist() == [0, 1, 2, 3, 4]
    assert found.rank[5] == 127


def test_marks_of_other_scripts_end_sentences_and_commas(shared: Path) -> None:
    gpt2 = tokenizers.load("gpt2", str(shared / "data" / "tokenizers" / "gpt2"))
    trained = tokenizers.train(iter([mark * 9 for mark in "。！？、،؟।，"]), vocab_size=400)
    for tokenizer, least in ((gpt2, 2), (trained, 8)):
        found = segments.separators_for(tokenizer)
        known = {mark: tokenizer.token_to_id(mark) for mark in "。！？؟।、،，"}
        ids = {mark: index for mark, index in known.items() if index is not None}
        assert len(ids) >= least
        for mark, index in ids.items():
            assert found.minimum[index] == (56 if mark in "、،，" else 12)
    assert SEPARATORS.minimum[[38000, 45262]].tolist() == [12, 56]


def test_wrong_rule_and_wrong_length_are_user_errors() -> None:
    ids = np.zeros((1, 4), int)
    with pytest.raises(UserError, match="causal or reference, got 'magic'"):
        segments.starts(ids, rule="magic", separators=SEPARATORS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got 1"):
        segments.clip_separators(1)
