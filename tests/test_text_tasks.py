"""Tasks of texts: windows, documents, the published blocks, last words, counts of the real data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from blindvalm_jax import config, partitioning
from blindvalm_jax.data import byte_level_bpe, tokenizers
from blindvalm_jax.data.byte_level_bpe import ByteLevelTokenizer
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.clip import TextTower
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.objectives.language_model import Model
from blindvalm_jax.tasks import (
    catalog,
    evaluation,
    last_word,
    passages,
    perplexity,
    scoring,
    statistics,
    windows,
)
from blindvalm_jax.tasks.asked import Asked, Outcome, Windows
from blindvalm_jax.tasks.passages import Blocks
from blindvalm_jax.tasks.perplexity import AskedBlocks, AskedTexts
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.trained import TrainedModel
from tests import small_models, small_text, test_evaluate

CUT = Windows(24, 8)
DOCUMENTS = small_text.documents(2, seed=5, longest=60)
PASSAGES = [
    "The cat sat on the mat.\n\nIt's a Cat",
    "Über the naïve x-ray, the cat sat on a zebra",
]


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def vocabulary() -> ByteLevelTokenizer:
    return small_text.small_bpe()


def grounded(
    vocabulary: ByteLevelTokenizer, *, learned: bool = False, own: bool = False
) -> TrainedModel:
    """A BLIND-VALM of random weights, trained on rows of 32 tokens as far as it says.

    own: its tower has a tokenizer of its own.
    """
    clip = small_text.small_clip() if own else None
    size = vocabulary.vocab_size + 1 if clip is None else clip.vocab_size - clip.lm_offset
    tower = dataclasses.replace(
        small_models.TOWER,
        layers=1,
        vocab_size=size,
        start_id=size - (1 if clip is None else 2),
        end_id=vocabulary.eos_id if clip is None else size - 1,
    )
    settings = config.parse(config.default())
    decoder = dataclasses.replace(small_models.CONFIG, layers=2)
    if learned:
        decoder = dataclasses.replace(decoder, positions="learned", max_positions=32)
    model = Model(
        Decoder(
            decoder,
            small_models.PAPER_FUSION,
            vocab_size=vocabulary.vocab_size,
            fusion_layers=(1,),
            memory_width=tower.projection,
        ),
        TextTower(tower),
        readout="eos",
    )
    return TrainedModel(
        model=model,
        params=small_models.random_params(model.init, seed=3),
        frozen={"tower": small_models.tower_params(tower)},
        tokenizer=vocabulary,
        tower_tokenizer=clip,
        settings=dataclasses.replace(
            settings,
            decoder=decoder,
            data=dataclasses.replace(settings.data, sequence_length=32),
        ),
        step=0,
        mesh=partitioning.make_mesh(config.MeshConfig(), jax.devices()[:1]),
        images=None,
    )


@pytest.fixture(scope="module", params=["shared", "own"])
def model(vocabulary: ByteLevelTokenizer, request: pytest.FixtureRequest) -> TrainedModel:
    """With a tower that reads the language model's tokens, or CLIP's of the same text."""
    return grounded(vocabulary, own=request.param == "own")


def uniform(model: TrainedModel) -> TrainedModel:
    """The same model with an embedding of zeros: every token is as likely as any other."""
    params = dict(model.params)
    params["wte"] = jax.numpy.zeros_like(params["wte"])
    return dataclasses.replace(model, params=params)


def texts_of(documents: list[str], cut: Windows, counted: list[str] | None = None) -> AskedTexts:
    return AskedTexts("own", "made here", "text", documents, counted, cut)


def plain_nats(model: TrainedModel, tokens: np.ndarray) -> np.ndarray:
    """-log p [T - 1] of every token but the first of a row, of one row alone."""
    log_p = test_evaluate.plainly(model, tokens[:-1])
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (50, 25)])
def test_every_token_is_scored_once_behind_enough(count: int, window: int, stride: int) -> None:
    tokens = np.arange(100, 100 + count, dtype=np.int32)
    rows = windows.cut(tokens, front=7, windows=Windows(window, stride))
    wanted = np.concatenate([row.wanted[:, 0] for row in rows])
    np.testing.assert_array_equal(wanted, tokens)
    stream = np.append(7, tokens)
    for row in rows:
        assert len(row.tokens) <= window
        first = int(np.flatnonzero(stream == row.tokens[0])[0])
        np.testing.assert_array_equal(row.tokens, stream[first : first + len(row.tokens)])
        np.testing.assert_array_equal(row.wanted[:, 0], stream[first + row.at + 1])
        assert first == 0 or row.at.min() >= window - stride


def test_perplexity_is_that_of_plain_windows(model: TrainedModel) -> None:
    """1e-5 relative: sums of some hundred log probabilities in fp32."""
    outcome = texts_of(DOCUMENTS, CUT).run(Scorer(model), model.tokenizer)
    vocabulary = model.tokenizer
    nats, counts = [], []
    for text in DOCUMENTS:
        stream = np.append(vocabulary.eos_id, vocabulary.encode_lm(text)).astype(np.int32)
        own = list(plain_nats(model, stream[:25]))
        for first in range(8, len(stream) - 17, 8):
            own += list(plain_nats(model, stream[first : first + 25])[16:])
        nats.append(sum(own))
        counts.append(len(stream) - 1)
        assert len(own) == counts[-1]
    np.testing.assert_allclose([line["nats"] for line in outcome.lines], nats, rtol=1e-5)
    assert [line["tokens"] for line in outcome.lines] == counts
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in DOCUMENTS]
    assert [line["text_sha256"] for line in outcome.lines] == hashes
    entry, total = outcome.entry, sum(nats)
    assert entry["score"] == pytest.approx(math.exp(total / sum(counts)), rel=1e-5)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert entry["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    words = sum(len(text.split()) for text in DOCUMENTS)
    assert entry["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert (entry["window"], entry["stride"], entry["n"]) == (24, 8, len(DOCUMENTS))


def test_windows_are_those_of_training_unless_said(
    model: TrainedModel, vocabulary: ByteLevelTokenizer
) -> None:
    scorer = Scorer(model)
    assert windows.resolve(Windows(), scorer) == Windows(32, 16)
    assert windows.resolve(Windows(20), scorer) == Windows(20, 10)
    with pytest.raises(UserError, match="--stride=21 exceeds --window=20"):
        windows.resolve(Windows(20, 21), scorer)
    assert windows.resolve(Windows(33), scorer) == Windows(33, 16)
    with pytest.raises(UserError, match="--window=33 exceeds the model's 32 positions"):
        windows.resolve(Windows(33), Scorer(grounded(vocabulary, learned=True)))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model: TrainedModel) -> None:
    model = uniform(model)
    text = "the cat sat. 漢字"
    ids = model.tokenizer.encode_lm(text)
    entry = texts_of([text, text], Windows()).run(Scorer(model), model.tokenizer).entry
    size = model.tokenizer.vocab_size
    assert entry["score"] == pytest.approx(size, rel=1e-5)
    assert entry["random"] == size
    assert entry["bits_per_byte"] == pytest.approx(len(ids) * math.log2(size) / 19, rel=1e-5)
    assert entry["word_perplexity"] == pytest.approx(size ** (len(ids) / 4), rel=1e-4)
    assert entry["stderr"] == pytest.approx(0.0, abs=1e-3)
    assert entry["majority"] is None


def test_the_batch_and_the_order_change_nothing(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two rows, whose positions meet the vocabulary eight at a time."""
    expected = texts_of(DOCUMENTS, CUT).run(Scorer(model), model.tokenizer).lines
    order = np.random.default_rng(0).permutation(len(DOCUMENTS))
    mixed = texts_of([DOCUMENTS[place] for place in order], CUT)
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 16)
    found = mixed.run(Scorer(model, tokens_at_once=64), model.tokenizer).lines
    for place, line in zip(order, found, strict=True):
        per_token = expected[place]["nats"] / line["tokens"]
        assert line["nats"] / line["tokens"] == pytest.approx(per_token, abs=1e-5)


def test_no_score_depends_on_what_follows(model: TrainedModel) -> None:
    """Segments are causal: another second half leaves the first half's scores, 1e-5."""
    rng = np.random.default_rng(1)
    one = rng.integers(3, 300, 30).astype(np.int32)
    other = one.copy()
    other[15:] = rng.integers(3, 300, 15)
    at, wanted = np.arange(15), rng.integers(3, 300, (15, 1))
    found = Scorer(model).log_probabilities([Row(one, at, wanted), Row(other, at, wanted)])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5, rtol=0)
    changed = Scorer(model).log_probabilities(
        [Row(other, at + 15, wanted), Row(one, at + 15, wanted)]
    )
    assert np.abs(changed[0] - changed[1]).max() > 1e-3


def test_the_best_is_what_greedy_decoding_takes(model: TrainedModel) -> None:
    tokens = np.random.default_rng(2).integers(3, 300, 20).astype(np.int32)
    log_p = test_evaluate.plainly(model, tokens)[: len(tokens)]
    order = np.argsort(log_p, axis=1)
    wanted = order[:, [-1, -2]]
    [found] = Scorer(model).scores([Row(tokens, np.arange(20), wanted)])
    np.testing.assert_array_equal(found.log_p[:, 0], found.best)
    assert (found.log_p[:, 1] < found.best).all()
    np.testing.assert_allclose(found.best, log_p.max(axis=1), atol=1e-5, rtol=0)


def test_last_words_are_whole_and_as_in_running_text(model: TrainedModel) -> None:
    vocabulary = model.tokenizer
    asked = last_word.AskedLastWords("lambada", "made here", "corrected", PASSAGES)
    outcome = asked.run(Scorer(model), vocabulary)
    for text, line in zip(PASSAGES, outcome.lines, strict=True):
        stream = np.append(vocabulary.eos_id, vocabulary.encode_lm(text)).astype(np.int32)
        count = pieces(vocabulary, text)
        nats = plain_nats(model, stream)[-count:]
        assert line["nats"] == pytest.approx(nats.sum(), abs=1e-4)
        assert line["tokens"] == count
        assert line["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
        log_p = test_evaluate.plainly(model, stream[:-1])[len(stream) - 1 - count : len(stream) - 1]
        assert line["right"] == bool((log_p.argmax(axis=1) == stream[-count:]).all())
    mean = np.mean([line["nats"] for line in outcome.lines])
    assert outcome.entry["last_word_perplexity"] == pytest.approx(math.exp(mean))


@pytest.mark.parametrize(
    ("text", "count"), [("a b ½", 2), ("the cat saw Één", 5), ("so 漢", 3), ("the naïve mat", 1)]
)
def test_no_byte_of_the_last_word_is_given(
    vocabulary: ByteLevelTokenizer, text: str, count: int
) -> None:
    """Two bytes of ½ are two tokens; of Één the letter n alone is one byte."""
    row = last_word._last_word(vocabulary, text)
    assert len(row.wanted) == count
    assert vocabulary.decode(row.wanted[:, 0].tolist()).strip() == text.split()[-1]
    ids = small_text.small_clip().encode_lm(text.split()[-1])
    asked = last_word._last_word(small_text.small_clip(), text)
    np.testing.assert_array_equal(asked.wanted[:, 0], ids)


def test_a_token_of_a_blank_and_half_a_character_is_of_the_word() -> None:
    """Trained on letters of one first byte, the blank joins that byte."""
    vocabulary = byte_level_bpe.train(iter([" À Á Â Ã Ä Å Æ Ç È É Ê Ë"]), vocab_size=258)
    ids = vocabulary.encode_lm("a É")
    assert len(ids) == 3
    row = last_word._last_word(vocabulary, "a É")
    np.testing.assert_array_equal(row.wanted[:, 0], ids[1:])


def pieces(vocabulary: Any, text: str) -> int:
    """Of how many tokens at the end of a text the last word needs all."""
    ids, word = vocabulary.encode_lm(text).tolist(), text.split()[-1]
    count = 1
    while not vocabulary.decode(ids[-count:]).endswith(word):
        count += 1
    return count


class Saying(Scorer):
    """A scorer to which the tokens of a text are the likeliest, and to which others have 1e-4."""

    longest = 0
    trained_length = 512

    def __init__(self, ids: np.ndarray) -> None:
        self.said = set(ids.tolist())

    def scores(self, rows: Any, *, title: str = "") -> list[scoring.Scored]:
        hits = [np.isin(row.wanted, [*self.said]) for row in rows]
        return [scoring.Scored(np.where(x, -0.1, -9.2), np.full(len(x), -0.1)) for x in hits]


def test_a_word_is_right_if_all_its_tokens_are(vocabulary: ByteLevelTokenizer) -> None:
    count = pieces(vocabulary, PASSAGES[1])
    ids = vocabulary.encode_lm(PASSAGES[1])[-count:]
    assert len(set(ids.tolist())) == count > 2
    asked = last_word.AskedLastWords("lambada", "", "corrected", PASSAGES)
    for said, share in ((ids, 0.5), (ids[1:], 0.0), (ids[:-1], 0.0)):
        entry = asked.run(Saying(said), vocabulary).entry
        assert entry["score"] == share
    assert entry["majority"] == 0.5
    published = dataclasses.replace(asked, protocol="published")
    assert published.run(Saying(ids[-1:]), vocabulary).entry["score"] == 0.5


def test_passages_are_cut_in_front(vocabulary: ByteLevelTokenizer) -> None:
    model = grounded(vocabulary, learned=True)
    asked = last_word.AskedLastWords("lambada", "", "corrected", ["so " * 60 + "on"] * 2)
    found = asked.run(Scorer(model), vocabulary)
    assert found.entry["prompts_cut"] == 2
    assert found.notes == ("2 passages lost their beginning: 32 positions",)
    stream = vocabulary.encode_lm("so " * 60 + "on")[-33:]
    assert found.lines[0]["nats"] == pytest.approx(plain_nats(model, stream)[-1], abs=1e-4)


def test_the_published_last_token_is_asked_with_the_pieces_before_it(model: TrainedModel) -> None:
    vocabulary = model.tokenizer
    texts = ["the cat sat on ``the'' mat", "a naïve Cat"]
    asked = last_word.AskedLastWords("lambada", "made here", "published", texts)
    outcome = asked.run(Scorer(model), vocabulary)
    for text, line in zip(['the cat sat on "the" mat', "a naïve Cat"], outcome.lines, strict=True):
        ids = vocabulary.encode_lm(text)
        log_p = test_evaluate.plainly(model, ids)[len(ids) - 2]
        assert line["nats"] == pytest.approx(-log_p[ids[-1]], abs=1e-4)
        assert line["tokens"] == 1
    assert outcome.entry["faults"]
    assert outcome.entry["last_word_perplexity"] is None


def test_published_blocks_are_lines_behind_an_end_token(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 ** mean base-2 loss of every token and the line's end; long lines are left out."""
    monkeypatch.setattr(perplexity, "LONGEST_BLOCK", 20)
    vocabulary = model.tokenizer
    lines = ["the cat", "sat on the mat", "cat " * 40, "so"]
    outcome = AskedBlocks("x", "made here", Blocks(None, lines), Blocks(None, ["the"])).run(
        Scorer(model), vocabulary
    )
    losses = []
    for line in (lines[0], lines[1], lines[3]):
        stream = np.concatenate([[0], vocabulary.encode_lm(line), [0]]).astype(np.int32)
        stream[[0, -1]] = vocabulary.eos_id
        losses += list(plain_nats(model, stream) / math.log(2))
    entry = outcome.entry
    assert entry["score"] == pytest.approx(2 ** np.mean(losses), rel=1e-5)
    assert (entry["tokens"], entry["skipped"], entry["n"]) == (len(losses), 1, 3)
    assert [line["item"] for line in outcome.lines] == ["0", "1", "3"]
    assert len(entry["faults"]) == 3


def test_ids_are_taken_by_the_tokenizer_that_made_them(tmp_path: Path) -> None:
    path = tmp_path / "wikitext103_test_clipbpe.npz"
    np.savez(path, ids=np.array([5, 6, 2, 7, 2], np.uint16), lens=np.array([3, 2], np.int32))
    task = catalog.TEXTS["wikitext103"]
    asked = task.open("published", tmp_path, Windows())
    assert isinstance(asked, AskedBlocks)
    with pytest.raises(UserError, match="these ids are of CLIP's own tokenizer"):
        asked.blocks.encode(small_text.small_clip())
    (tmp_path / "wikitext103_test_clipbpe.decoded.txt").write_text("the cat\n\n at \n")
    asked = task.open("published", tmp_path, Windows())
    assert isinstance(asked, AskedBlocks)
    assert asked.blocks.ids is not None
    found = asked.blocks.encode(small_text.small_clip())
    assert found.texts == ["the cat", " at "]
    assert [ids[-1] for ids in found.ids] == [2, 2]
    np.savez(path, ids=np.array([5, 6, 2, 7, 2], np.uint16), lens=np.array([2, 3], np.int32))
    with pytest.raises(UserError, match="every line must end in 2"):
        task.open("published", tmp_path, Windows())
    np.savez(path, ids=np.array([5], np.uint16), lens=np.array([2], np.int32))
    with pytest.raises(UserError, match="lens add up to 2, there are 1 ids"):
        task.open("published", tmp_path, Windows())


def test_articles_begin_at_titles_of_the_first_level(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(
        " \n = A b = \n \n one \n = 1 k = \n \n = = Part = = \n \n two \n \n = Z = \n \n three \n"
    )
    found = passages.articles(path)
    assert [text.split()[:2] for text in found] == [["=", "A"], ["=", "Z"]]
    assert "two" in found[0]
    path.write_text("before\n= A =\none\n= = Part = =")
    assert [text.split()[0] for text in passages.articles(path)] == ["before", "="]


def test_own_texts_are_read_as_in_training_or_whole(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n')
    [asked] = evaluation.read([f"text:{tmp_path}/*"], "corrected", None)
    assert isinstance(asked, AskedTexts)
    assert asked.texts == ["one\ntwo", "three", "four"]
    [asked] = evaluation.read([f"file:{tmp_path}/a b.txt"], "corrected", None)
    assert isinstance(asked, AskedTexts)
    assert (asked.name, asked.texts) == ("file_a_b.txt", ["one\ntwo\n\nthree\n"])
    with pytest.raises(UserError, match=r"c.jsonl is no \.txt: give it as text:PATH"):
        evaluation.read([f"file:{tmp_path}/*"], "corrected", None)
    with pytest.raises(UserError, match="not published with a protocol"):
        evaluation.read([f"text:{tmp_path}/*"], "published", None)
    chosen = catalog.chosen(["text:a/x", "text:b/x", "text:c/b/x", "text:d/y"])
    assert [task.name for task in chosen] == ["text_a_x", "text_b_x", "text_c_b_x", "text_y"]
    with pytest.raises(UserError, match="two texts are called text_a_b_x: evaluate one of them"):
        catalog.chosen(["text:a b/x", "text:a_b/x"])
    with pytest.raises(UserError, match="--data is missing"):
        evaluation.read(["wikitext103"], "corrected", None)


def test_the_error_of_a_perplexity_is_that_of_documents() -> None:
    """Against the jackknife: 1 % for 400 documents of different length."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 50, 400)
    nats = tokens * rng.normal(3.0, 0.3, 400)
    found = statistics.perplexity(nats, tokens)
    assert found.low is not None
    assert found.mean is not None
    assert found.high is not None
    assert found.mean == pytest.approx(math.exp(nats.sum() / tokens.sum()))
    without = np.exp((nats.sum() - nats) / (tokens.sum() - tokens))
    jackknife = math.sqrt(399 / 400 * np.sum((without - without.mean()) ** 2))
    assert found.stderr == pytest.approx(jackknife, rel=0.01)
    assert found.low < found.mean < found.high


@pytest.mark.parametrize(
    ("by_token", "known"),
    [((150, 20), (True, True, True, False)), ((1500, 1500), (False, False, False, False))],
)
def test_a_perplexity_that_is_no_float_is_unknown(
    by_token: tuple[int, int], known: tuple[bool, ...]
) -> None:
    """Of two documents the interval is 25 errors wide."""
    tokens = np.array([10, 10])
    found = statistics.perplexity(tokens * by_token, tokens)
    values = (found.mean, found.stderr, found.low, found.high)
    assert tuple(value is not None for value in values) == known
    assert all(math.isfinite(value) for value in values if value is not None)
    one = statistics.perplexity(tokens[:1], tokens[:1])
    assert one == statistics.Perplexity(math.e, None, None, None)


def test_entries_and_lines_land_in_files(
    model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(DOCUMENTS))
    asked = evaluation.read([f"text:{tmp_path}/t.txt"], "corrected", None, cut=CUT)
    out = tmp_path / "out"
    arguments = {"protocol": "corrected", "out": out, "about": {}}
    evaluation.run(asked, Scorer(model), model.tokenizer, **arguments)  # type: ignore[arg-type]
    entry = json.loads((out / "results.json").read_text())["tasks"]["text_t.txt"]
    needed = {"protocol", "metric", "score", "stderr", "interval", "n", "tokens", "nats_per_token"}
    needed |= {"bits_per_byte", "word_perplexity", "majority", "random", "per_prompt", "window"}
    assert needed | {"stride", "skipped", "faults", "source"} <= entry.keys()
    lines = (out / "text_t.txt.jsonl").read_text().splitlines()
    assert len(lines) == entry["n"] == len(DOCUMENTS)
    nats = sum(json.loads(line)["nats"] for line in lines)
    assert nats / entry["tokens"] == pytest.approx(entry["nats_per_token"])
    assert "windows of 24 tokens, 8 apart" in capsys.readouterr().out


def prepare(directory: Path, dataset: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A TFDS dataset of that name (or name/config) on disk, which no code here knows."""
    name, _, config_name = dataset.partition("/")
    first = next(iter(rows.values()))[0]
    kinds = {str: tfds.features.Text(), int: tfds.features.Scalar(np.int64)}
    features = {key: kinds[type(value)] for key, value in first.items()}
    version = tfds.core.Version("1.0.0")

    with tfds.core.registered.skip_registration():

        class Made(tfds.core.GeneratorBasedBuilder):
            VERSION = version
            BUILDER_CONFIGS = (
                [tfds.core.BuilderConfig(name=config_name, version=version)] if config_name else []
            )

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), description="made"
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: enumerate(examples) for split, examples in rows.items()}

            def _generate_examples(self) -> Any:
                raise NotImplementedError

    Made.name = name
    Made(data_dir=directory, file_format="array_record").download_and_prepare()


def test_prepared_tfds_datasets_are_read(tmp_path: Path) -> None:
    twice = [{"title": title, "description": "It flies.", "label": 3} for title in "tu"]
    prepare(tmp_path, "ag_news_subset", {"test": twice})
    prepare(tmp_path, "lambada", {"test": [{"passage": "one two\n"}, {"passage": "two three"}]})
    prepare(tmp_path / "one", "lambada", {"test": [{"passage": "one two"}, {"passage": "alone"}]})
    prepare(tmp_path, "glue/sst2", {"validation": [{"sentence": "fun ", "label": 1, "idx": 0}]})
    names = ["agnews", "sst2", "lambada", "lambada_perplexity"]
    sst2, news, perplexities, words = evaluation.read(names, "corrected", None, tfds=tmp_path)
    assert isinstance(news, evaluation.AskedChoice)
    told = [(item.id, item.words["text"], item.answer) for item in news.items]
    assert told == 2 * [("0", "It flies.", "technology")]
    assert news.task.source == "TFDS ag_news_subset/1.0.0, test"
    assert isinstance(sst2, evaluation.AskedChoice)
    assert (sst2.items[0].answer, sst2.task.source) == (
        "Positive",
        "TFDS glue/sst2/1.0.0, validation",
    )
    # There its sentences end in a blank.
    assert [question.prompt for question in sst2.questions] == ["Review: fun Sentiment: "]
    assert isinstance(words, last_word.AskedLastWords)
    assert isinstance(perplexities, AskedTexts)
    assert sorted(words.passages) == sorted(perplexities.texts) == ["one two", "two three"]
    with pytest.raises(UserError, match="lambada: passage . has no two words: 'alone'"):
        evaluation.read(["lambada"], "corrected", None, tfds=tmp_path / "one")
    with pytest.raises(UserError, match="mpqa is not read from --tfds_dir: name sst2, agnews"):
        evaluation.read(["mpqa"], "corrected", None, tfds=tmp_path)
    with pytest.raises(UserError, match="wikitext103 is not read from --tfds_dir"):
        evaluation.read(["wikitext103"], "corrected", None, tfds=tmp_path)
    with pytest.raises(UserError, match="the published protocol reads the files"):
        evaluation.read(["agnews"], "published", None, tfds=tmp_path)
    with pytest.raises(UserError, match="TFDS lambada is not prepared as array_record in"):
        evaluation.read(["lambada"], "corrected", None, tfds=tmp_path / "other")


# The real data: section 8 of the protocols.


@pytest.fixture(scope="module")
def clip(shared: Path) -> ClipTokenizer:
    found = tokenizers.load("clip", str(shared / "data" / "tokenizers" / "clip"))
    assert isinstance(found, ClipTokenizer)
    return found


class Counting(Scorer):
    """A scorer that gives every token the same chance: what a task asks is what is tested."""

    longest = 0
    trained_length = 512

    def __init__(self, vocab_size: int) -> None:
        self.size = vocab_size

    def scores(self, rows: Any, *, title: str = "") -> list[scoring.Scored]:
        uniform = -math.log(self.size)
        return [
            scoring.Scored(np.full(row.wanted.shape, uniform), np.zeros(len(row.wanted)))
            for row in rows
        ]


def outcome(name: str, protocol: str, shared: Path, clip: ClipTokenizer) -> tuple[Asked, Outcome]:
    [asked] = evaluation.read([name], protocol, shared / "data" / "eval")
    return asked, asked.run(Counting(clip.vocab_size), clip)


@pytest.mark.parametrize(
    ("name", "lines", "tokens", "skipped", "majority"),
    [("wikitext103", 2890, 279_459, 1, 1628.5), ("lambada_perplexity", 5153, 407_114, 0, 1945.3)],
)
def test_published_perplexities_count_what_fairseq_counts(
    name: str,
    lines: int,
    tokens: int,
    skipped: int,
    majority: float,
    shared: Path,
    clip: ClipTokenizer,
) -> None:
    asked, found = outcome(name, "published", shared, clip)
    entry = found.entry
    assert (entry["n"], entry["tokens"], entry["skipped"]) == (lines, tokens, skipped)
    assert round(entry["majority"], 1) == majority
    assert entry["random"] == 49_412
    assert entry["score"] == pytest.approx(49_412)
    left_out = {f"{number}" for number in range(lines + skipped)} - {
        line["item"] for line in found.lines
    }
    assert left_out == ({"2226"} if skipped else set())
    assert isinstance(asked, AskedBlocks)
    assert asked.blocks.ids is not None
    own = dataclasses.replace(asked.blocks, ids=None).encode(clip)  # from the text
    np.testing.assert_array_equal(np.concatenate(own.ids), np.concatenate(asked.blocks.ids))


def test_published_last_words(shared: Path, clip: ClipTokenizer) -> None:
    _, found = outcome("lambada", "published", shared, clip)
    entry = found.entry
    assert (entry["n"], entry["tokens"]) == (5153, 5153)
    assert (round(100 * entry["majority"], 2), round(100 * entry["random"], 2)) == (0.37, 1.75)


def test_corrected_counts(shared: Path, clip: ClipTokenizer) -> None:
    _, found = outcome("lambada", "corrected", shared, clip)
    lengths = np.bincount([line["tokens"] for line in found.lines])
    assert lengths.tolist() == [0, 4465, 601, 83, 4]
    # 60 articles; of WikiText-103 there is a text without blank lines, and two of its formulas look
    # like titles.
    for name, count in (("wikitext103", 62), ("wikitext2", 60), ("ptb", 1)):
        _, found = outcome(name, "corrected", shared, clip)
        assert found.entry["n"] == count
        assert sum(line["tokens"] for line in found.lines) == found.entry["tokens"]
        assert found.entry["majority"] < 2000
