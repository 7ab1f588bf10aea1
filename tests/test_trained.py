"""A trained model is asked with the rows that training would have made, from runs and weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from blindvalm_jax import config, convert, indexing, partitioning, system, trained, trainer
from blindvalm_jax.data import packing, pipeline, tokenizers
from blindvalm_jax.data.images import FolderImages
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.decoding import generation
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_model, weights
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.objectives import language
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.tasks import identity
from blindvalm_jax.trained import TrainedModel
from tests import (
    small_aligned,
    small_models,
    small_text,
    small_valm,
    test_train,
    tiny_tokenizers,
)
from tests.foreign_models import BLIND, GPT2, random_params

LENGTH = 64
SENTENCE = "The red ring. Then the cat and the green ring; it's caf 10, the cat - redx and then on"
TEXTS = [
    *tiny_tokenizers.random_texts(3, 4, tiny_tokenizers.PLAIN, longest=30),
    SENTENCE,
]


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with GPT-2's tokens whose tower has CLIP's."""
    root = tmp_path_factory.mktemp("run")
    small_text.write_text(root / "text.txt", small_text.documents(30))
    vocab, merges = tiny_tokenizers.clip_parts()
    tower = test_train.write_tower(root / "clip", vocab_size=len(vocab))
    tiny_tokenizers.write_pair(tower, vocab, merges)
    gpt2 = tiny_tokenizers.write_pair(root / "gpt2", *tiny_tokenizers.gpt2_parts())
    changes = {
        "tokenizer__kind": "gpt2",
        "tokenizer__path": str(gpt2),
        "grounding__tower": str(tower),
        "train__steps": 2,
        "data__workers": 1,
        "eval__every_steps": 0,
    }
    values = test_train.settings(root / "text.txt", **changes)
    trainer.train(config.parse(values), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def aligned(run: Path) -> TrainedModel:
    return trained.load(run)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The decoder of the run as `convert` writes it."""
    out = run.parent / "exported"
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed(input=str(run), out=str(out)):
        convert.main(["convert"])
    return out


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that share one BPE: decoder/, tower/ and plain/, a GPT-2."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = small_text.small_bpe()
    tokenizer.save(root / "bpe")
    vocabulary = packing.record(tokenizer)
    shape = config.TextTowerConfig(layers=1, width=16, projection=16)
    tower = system.tower_shape(shape, vocabulary, setting="grounding.random")
    for name, spec in (
        ("decoder", dataclasses.replace(BLIND, vocab_size=vocabulary.vocab_size)),
        ("plain", dataclasses.replace(GPT2, vocab_size=vocabulary.vocab_size)),
        ("tower", tower),
    ):
        if isinstance(spec, weights.DecoderSpec):
            resized = dataclasses.replace(spec.decoder, vocab_size=0, max_positions=80)
            spec = dataclasses.replace(spec, decoder=resized)
        weights.save(
            root / name,
            random_params(spec),
            config=spec,
            source="made for a test",
            tokenizer=None
            if name == "tower"
            else {"kind": "train", "fingerprint": vocabulary.fingerprint},
            tokenizer_files=None if name == "tower" else root / "bpe",
        )
    return root


@pytest.fixture(scope="module")
def shared(random_weights: Path) -> TrainedModel:
    """A decoder whose tower reads its tokens."""
    return trained.from_weights(random_weights / "decoder", tower=random_weights / "tower")


@pytest.fixture(scope="module")
def plain(random_weights: Path) -> TrainedModel:
    return trained.from_weights(random_weights / "plain")


@functools.cache
def _compiled(model: Model) -> Callable[..., Any]:
    def run(params: Any, frozen: Any, batch: Batch) -> Any:
        z_BTKE = model.features(frozen, batch)
        logits_BTV: Any = model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)
        return z_BTKE, logits_BTV[..., : model.decoder.vocab_size]

    return jax.jit(run)


def answers(model: TrainedModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, T, K, E], if the model has a tower, and logits [B, T, V]."""
    with partitioning.use(model.mesh):
        z, logits = _compiled(model.model)(model.params, model.frozen, batch)
    return np.asarray(z), np.asarray(logits)


def with_rule(model: TrainedModel, rule: str) -> TrainedModel:
    grounding = dataclasses.replace(model.settings.grounding, segments=rule)
    return dataclasses.replace(
        model, settings=dataclasses.replace(model.settings, grounding=grounding)
    )


def first_window(
    model: TrainedModel, text: str, directory: Path, *, follows: Sequence[str] = ("what follows",)
) -> dict[str, np.ndarray]:
    """The row that training reads where the text is the first document."""
    tower = model.model.tower
    recipe = packing.Recipe(
        source=small_text.write_text(directory.with_suffix(".txt"), [text, *follows]),
        tokenizer=model.tokenizer,
        tower_tokenizer=model.tower_tokenizer,
        sequence_length=LENGTH,
        rule="causal" if model.settings.grounding.segments == "causal" else "reference",
        longest_segment=75 if tower is None else tower.config.longest_segment,
        eval_fraction=0,
    )
    packing.prepare(recipe, directory, workers=1)
    return pipeline.window_row(Windows(directory, "train")[0], tower=True)


@pytest.mark.parametrize("rule", ["causal", "reference"])
@pytest.mark.parametrize("mode", ["aligned", "shared"])
def test_a_text_is_the_row_that_training_reads(
    mode: str, rule: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same ids, cuts and index; features and logits to fp32's 1e-5."""
    model = with_rule(request.getfixturevalue(mode), rule)
    row = first_window(model, SENTENCE, tmp_path / "windows")
    batch = model.batch([SENTENCE], length=LENGTH)
    count = int(batch.weights_BT.sum()) + 1
    assert batch.tower is not None
    np.testing.assert_array_equal(batch.tokens_BT[0, :count], row["tokens"][:count])
    np.testing.assert_array_equal(batch.targets_BT[0, : count - 1], row["targets"][: count - 1])
    if mode == "aligned":
        assert batch.tower.index_BT is not None
        np.testing.assert_array_equal(batch.tower.index_BT[0, :count], row["tower_index"][:count])
        read = int(row["tower_index"][count - 1])
    else:
        assert batch.tower.index_BT is None
        read = count
    assert read > 10
    np.testing.assert_array_equal(batch.tower.tokens_BS[0, :read], row["tower_tokens"][:read])
    if rule == "causal":  # the other looks ahead, into the document that follows in the window
        np.testing.assert_array_equal(batch.tower.starts_BS[0, :read], row["tower_starts"][:read])
        window = language.make_batch({name: x[None] for name, x in row.items()})
        for got, expected in zip(answers(model, batch), answers(model, window), strict=True):
            np.testing.assert_allclose(got[0, :count], expected[0, :count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["causal", "reference"])
@pytest.mark.parametrize("mode", ["aligned", "shared"])
def test_a_text_that_fills_its_window_is_that_row_to_the_last_bit(
    mode: str, rule: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Nothing follows: the padding and the cuts of the rule that looks ahead are the same too."""
    model = with_rule(request.getfixturevalue(mode), rule)
    row = first_window(model, SENTENCE, tmp_path / "windows", follows=())
    window = language.make_batch({name: x[None] for name, x in row.items()})
    batch = model.batch([SENTENCE], length=LENGTH)
    jax.tree.map(np.testing.assert_array_equal, batch, window)


def test_a_prefix_has_the_features_of_the_whole_under_the_causal_rule(
    aligned: TrainedModel,
) -> None:
    """1e-5 in fp32; the other rule shows it how words go on, which guards this test."""
    tokenizer = aligned.tokenizer
    whole, ends = tokenizer.encode_with_ends(SENTENCE)
    prefixes = [SENTENCE[:end] for end in ends[4::6].tolist()]
    known = [len(tokenizer.encode_lm(prefix)) for prefix in prefixes]
    for prefix, count in zip(prefixes, known, strict=True):
        np.testing.assert_array_equal(tokenizer.encode_lm(prefix), whole[:count])
    changed = {}
    for rule in ("causal", "reference"):
        model = with_rule(aligned, rule)
        z, logits = answers(model, model.batch([SENTENCE, *prefixes], length=LENGTH))
        changed[rule] = [
            max(np.abs(x[row, : count + 1] - x[0, : count + 1]).max() for x in (z, logits))
            for row, count in enumerate(known, start=1)
        ]
    assert max(changed["causal"]) < 1e-5
    assert max(changed["reference"]) > 1e-2
    assert np.abs(np.diff(z[0, :, 0], axis=0)).max() > 1e-2


@pytest.mark.parametrize("mode", ["aligned", "shared"])
def test_without_the_start_a_text_is_alone(mode: str, request: pytest.FixtureRequest) -> None:
    """The tower then reads no end token; where it reads text, that token changed nothing: 1e-5."""
    model = request.getfixturevalue(mode)
    ids = model.tokenizer.encode_lm(SENTENCE)
    bare = model.batch([SENTENCE], start=False, length=LENGTH)
    whole = model.batch([SENTENCE], length=LENGTH)
    assert bare.tower is not None
    assert whole.tower is not None
    np.testing.assert_array_equal(bare.tokens_BT[0, : len(ids)], ids)
    np.testing.assert_array_equal(whole.tokens_BT[0, 1 : len(ids) + 1], ids)
    read, grounded = len(ids), np.ones(LENGTH - 1, bool)
    if mode == "aligned":
        index = np.asarray(bare.tower.index_BT)[0, :-1]
        np.testing.assert_array_equal(index, whole.tower.index_BT[0, 1:] - 1)
        read, grounded = int(index[-1]), index > 0
    tower_ids = bare.tower.tokens_BS[0, :read]
    np.testing.assert_array_equal(tower_ids, whole.tower.tokens_BS[0, 1 : read + 1])
    grounded[len(ids) :] = False
    assert grounded.sum() > 10
    (short, _), (long, _) = (answers(model, batch) for batch in (bare, whole))
    np.testing.assert_allclose(short[0, :-1][grounded], long[0, 1:][grounded], rtol=0, atol=1e-5)


def test_a_text_of_which_the_tower_knows_no_token_yet_is_a_row(aligned: TrainedModel) -> None:
    batch = aligned.batch(["the", "re"], start=False, length=LENGTH)
    assert batch.tower is not None
    assert batch.tower.index_BT is not None
    assert not np.any(batch.tower.index_BT)
    z, logits = answers(aligned, batch)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(z[0], z[1])


@pytest.mark.parametrize("mode", ["shared", "plain", "aligned"])
def test_ids_are_rows_as_they_are(mode: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(mode)
    ids = [model.tokenizer.encode_lm(text) for text in TEXTS]
    front = [np.append(np.int32(model.tokenizer.eos_id), row) for row in ids]
    for start, rows in ((True, front), (False, ids)):
        batch = model.batch_of_ids(rows, length=LENGTH)
        assert batch.tokens_BT.shape == (len(TEXTS), LENGTH)
        np.testing.assert_array_equal(batch.weights_BT.sum(axis=1), [len(x) - 1 for x in rows])
        texts = model.batch(TEXTS, start=start, length=LENGTH)
        jax.tree.map(np.testing.assert_array_equal, batch, texts)
    longest = max(len(row) for row in ids)
    assert model.batch_of_ids(ids).tokens_BT.shape == (len(TEXTS), longest)


def test_exported_weights_with_the_tower_of_the_run_are_the_run(
    aligned: TrainedModel, run: Path, exported: Path
) -> None:
    """The tower may be the run's copy, or the one it was trained with; 1e-6, equal in fact."""
    batch = aligned.batch(TEXTS)
    z, logits = answers(aligned, batch)
    model = trained.from_weights(exported, tower=run / "tower")
    assert (model.step, aligned.step) == (0, 2)
    assert model.settings.decoder == aligned.settings.decoder
    assert model.settings.fusion == aligned.settings.fusion
    jax.tree.map(np.testing.assert_array_equal, model.batch(TEXTS), batch)
    found = answers(model, model.batch(TEXTS))
    np.testing.assert_allclose(found[0], z, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], logits, rtol=0, atol=1e-6)
    bare = run.parent / "bare"
    shutil.copytree(run / "tower", bare)
    for name in weights.TOKENIZER_FILES:
        (bare / name).unlink(missing_ok=True)
    named = trained.from_weights(exported, tower=bare, tower_tokenizer=run.parent / "clip")
    jax.tree.map(np.testing.assert_array_equal, named.batch(TEXTS), batch)
    with pytest.raises(UserError, match=r"brings no tokenizer, and with .* it needs CLIP's"):
        trained.from_weights(exported, tower=bare)


@pytest.mark.torch
def test_a_hugging_face_gpt2_answers_as_transformers_does(tmp_path: Path) -> None:
    """1e-5: our fp32 against float64, of logits below 5 in size."""
    from tests import make_golden

    vocab, merges = tiny_tokenizers.gpt2_parts()
    theirs = make_golden.gpt2_model(
        vocab_size=len(vocab), n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2
    )
    theirs.save_pretrained(tmp_path)
    tiny_tokenizers.write_pair(tmp_path, vocab, merges)
    model = trained.from_weights(tmp_path)
    assert model.settings.grounding.source == "none"
    assert model.settings.decoder.max_positions == LENGTH
    for start in (True, False):
        batch = model.batch([SENTENCE], start=start)
        expected = make_golden.gpt2_logits(theirs, np.asarray(batch.tokens_BT))
        _, logits = answers(model, batch)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="rows of 65 tokens exceed the model's 64 learned posi"):
        model.batch(["the"], length=LENGTH + 1)


@pytest.mark.torch
def test_a_padded_gpt2_keeps_its_softmax_and_writes_only_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1e-5 as above; the last 7 entries, of which the likeliest is one, stand for no text."""
    from tests import make_golden

    vocab, merges = tiny_tokenizers.gpt2_parts()
    theirs = make_golden.gpt2_model(
        vocab_size=len(vocab) + 7, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2
    )
    with make_golden.torch.no_grad():
        table = theirs.transformer.wte.weight
        table[-7:] = 3 * table[:7]
    theirs.save_pretrained(tmp_path / "hf")
    tiny_tokenizers.write_pair(tmp_path / "hf", vocab, merges)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed(input=str(tmp_path / "hf"), out=str(tmp_path / "ours")):
        convert.main(["convert"])
    capsys.readouterr()
    for name in ("hf", "ours"):
        model = trained.from_weights(tmp_path / name)
        said = capsys.readouterr().err
        assert f"knows {len(vocab) + 7} tokens, the tokenizer in" in said
        assert said.count("\n") == 1
        batch = model.batch([SENTENCE])
        expected = make_golden.gpt2_logits(theirs, np.asarray(batch.tokens_BT))
        _, logits = answers(model, batch)
        assert logits.shape[-1] == len(vocab) + 7
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        likeliest = logits[0].argmax(axis=-1)
        assert (likeliest >= len(vocab)).any()
    prompt = np.asarray(batch.tokens_BT)[0, : int(np.argmax(likeliest >= len(vocab))) + 1]
    writer = generation.Generator(model, start=False)
    [written] = writer.generate([prompt], max_new_tokens=8).texts
    assert max(written.tokens) < len(vocab)


@pytest.mark.torch
def test_a_tokenizer_with_more_pieces_than_a_gpt2_knows_is_refused(tmp_path: Path) -> None:
    from tests import make_golden

    vocab, merges = tiny_tokenizers.gpt2_parts()
    make_golden.gpt2_model(
        vocab_size=len(vocab) - 1, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2
    ).save_pretrained(tmp_path)
    tiny_tokenizers.write_pair(tmp_path, vocab, merges)
    with pytest.raises(UserError, match=r"knows \d+ tokens, the tokenizer in .* has \d+: name"):
        trained.from_weights(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([np.zeros(0, np.int32)], "each row a token"),
        ([np.arange(3)], "a text of 3 tokens does not fit in rows of 2"),
        ([np.array([0]), np.array([1, -1])], r"row 1: token ids are 0 to \d+, got -1"),
        ([np.array([10**6])], "token ids are 0 to"),
        ([np.array([0.5])], "token ids are 0 to"),
    ],
)
def test_rows_that_are_none(plain: TrainedModel, rows: list[np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plain.batch_of_ids(rows, length=2)


@pytest.mark.parametrize("mode", ["shared", "aligned"])
def test_a_row_needs_a_token(mode: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match="at least one row"):
        request.getfixturevalue(mode).batch([""], start=False)


@pytest.mark.parametrize("rule", ["causal", "reference"])
@pytest.mark.parametrize("mode", ["aligned", "shared"])
def test_documents_in_one_row_are_the_window_that_training_reads(
    mode: str, rule: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = with_rule(request.getfixturevalue(mode), rule)
    texts = ["the red ring", "café: it's", "and then; the cat", "10 - on"]
    row = first_window(model, texts[0], tmp_path / "windows", follows=texts[1:])
    front = np.int32(model.tokenizer.eos_id)
    ids = np.concatenate([np.append(front, model.tokenizer.encode_lm(text)) for text in texts])
    batch = model.batch_of_ids([ids], length=LENGTH)
    assert batch.tower is not None
    np.testing.assert_array_equal(batch.tokens_BT[0], row["tokens"])
    if batch.tower.index_BT is not None:
        np.testing.assert_array_equal(batch.tower.index_BT[0], row["tower_index"])
    read = int(row["tower_index"][-1]) if mode == "aligned" else LENGTH
    np.testing.assert_array_equal(batch.tower.tokens_BS[0, :read], row["tower_tokens"][:read])
    np.testing.assert_array_equal(batch.tower.starts_BS[0, :read], row["tower_starts"][:read])


def test_weights_that_do_not_go_together_are_refused_in_one_line(
    run: Path, exported: Path, random_weights: Path, tmp_path: Path
) -> None:
    own, tower = random_weights / "decoder", random_weights / "tower"
    bare = tmp_path / "bare"
    shutil.copytree(own, bare, ignore=lambda *_: weights.TOKENIZER_FILES)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (exported, {}, r"has fusion layers \(0,\): name the text tower it was trained with"),
        (exported, {"tower": "random"}, "name the text tower it was trained with"),
        (random_weights / "plain", {"tower": tower}, "has no fusion layers, so it reads no tower"),
        (random_weights / "plain", {"grounding": {"readout": "eos"}}, "has no fusion layers"),
        (run, {}, "is a run, which is read whole"),
        (tower, {}, "expected kind decoder, got 'clip_text'"),
        (bare, {"tower": tower}, "has no tokenizer beside it"),
        (bare, {"tower": tower, "tokenizer": exported}, "was trained with another tokenizer"),
        (own, {"tower": run / "tower"}, r"gives features of width 24, .* was trained on 16"),
        (own, {"tower": own}, "expected kind clip_text or clip, got 'decoder'"),
        (own, {"tower": tower, "grounding": {"readout": "last"}}, "grounding.readout"),
        (own, {"tower": tower, "grounding": {"depth": 1}}, "depth"),
        (
            own,
            {"tower": tower, "grounding": {"source": "none"}},
            "grounding.source=none reads none",
        ),
        (tmp_path / "nothing", {}, "does not exist"),
    ]
    for directory, options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            trained.from_weights(directory, **options)
        assert "\n" not in str(caught.value), message


def test_a_tokenizer_of_another_size_than_unrecorded_weights_is_refused(
    exported: Path, random_weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "unrecorded")
    file = tmp_path / "unrecorded" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": None}))
    other: dict[str, Any] = {"tokenizer": random_weights / "bpe", "tokenizer_kind": "train"}
    with pytest.raises(UserError, match=r"knows \d+ tokens, the tokenizer in .*/bpe has 330: name"):
        trained.from_weights(file.parent, tower=exported, **other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "auto"}, "dtype must be one of float32, bfloat16, got 'auto'"),
        ({"workdir": 5}, r"workdir must be a text, got 5 \(int\)"),
        ({"tower": None}, r"tower must be a text, got None \(NoneType\)"),
        ({"neighbours": "3"}, r"neighbours must be a whole number, 0 or more, got '3' \(str\)"),
        ({"neighbours": -1}, "neighbours must be a whole number, 0 or more, got -1"),
    ],
)
def test_a_name_with_values_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        NamedModel(**{"workdir": "nowhere", **values}).load()
    assert "\n" not in str(caught.value)


def test_weights_say_how_they_are_taken_to_be_grounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = small_aligned.write(tmp_path)
    taken = NamedModel(**names).load()
    assert capsys.readouterr().err == (
        f"note: {tmp_path}/decoder does not record how it was grounded, nor was it said; assumed: "
        "readout=token, segments=causal (--readout, --segments)\n"
    )
    said = NamedModel(**names, readout="eos", segments="reference").load()
    assert not capsys.readouterr().err
    before, now = (identity.about(names["checkpoint"], model) for model in (taken, said))
    assert identity.differences(before, now) == (
        "grounding/readout 'token', now 'eos'; grounding/segments 'causal', now 'reference'"
    )


def test_a_valm_of_weights_finds_its_images(tmp_path: Path) -> None:
    """The vectors with the largest products with what its tower says, which reads CLIP's tokens."""
    clip = small_valm.write_clip(tmp_path / "clip")
    small_valm.write_images(tmp_path / "images", count=20)
    images = FolderImages(tmp_path / "images")
    indexing.build(tmp_path / "index", images, clip_model.load_clip(clip), name="t", batch_size=8)
    entries = tokenizers.load("clip", str(clip)).vocab_size
    decoder = dataclasses.replace(BLIND.decoder, vocab_size=0)
    spec = dataclasses.replace(BLIND, decoder=decoder, vocab_size=entries)
    weights.save(tmp_path / "decoder", random_params(spec), config=spec, source="made for a test")
    model = trained.from_weights(
        tmp_path / "decoder",
        tower=clip,
        tokenizer=clip,
        tokenizer_kind="clip",
        grounding={"source": "images", "index": str(tmp_path / "index"), "neighbours": 3},
    )
    about = identity.about("", model)["grounding"]["images"]
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert (about["key"], about["neighbours"]) == (manifest["key"], 3)
    batch = model.batch([SENTENCE])
    found, _ = answers(model, batch)
    assert found.shape[2] == 3
    blind = dataclasses.replace(model, model=dataclasses.replace(model.model, search=None))
    said, _ = answers(blind, batch)
    assert model.images is not None
    vectors = np.asarray(model.images.index.vectors[:], np.float32)
    products = np.sort(said[0, :, 0] @ vectors.T, axis=-1)[:, :-4:-1]
    got = np.einsum("te,tke->tk", said[0, :, 0], found[0])
    # The index holds half precision: 2^-11 of unit vectors.
    np.testing.assert_allclose(got, products, rtol=0, atol=1e-3)


def without_data(directory: str, names: list[str]) -> list[str]:
    """For copies of a run without its data; each checkpoint has an item of that name."""
    return ["data"] if "run.json" in names else []


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("tower/vocab.json", "the tokenizer of the tower of .* is gone"),
        ("checkpoints/2", "is a run without a checkpoint yet|cannot be restored"),
        ("run.json", "run.json"),
        ("tower/config.json", "config.json"),
        ("checkpoints of nothing", "is no run's directory"),
    ],
)
def test_a_run_that_lacks_something_is_refused_in_one_line(
    run: Path, gone: str, message: str, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=without_data)
    path = tmp_path / "run" / gone
    if gone == "checkpoints of nothing":
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        (tmp_path / "run" / "run.json").unlink()
    elif gone.startswith("checkpoints"):
        shutil.rmtree(path.parent)
        path.parent.mkdir()
    elif gone.startswith("tower/vocab"):
        for name in weights.TOKENIZER_FILES:
            (path.parent / name).unlink(missing_ok=True)
    else:
        path.unlink()
    with pytest.raises(UserError, match=message) as caught:
        trained.load(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_run_whose_tokenizer_changed_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=without_data)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["tokenizer"]["fingerprint"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="was trained with another tokenizer than lies in"):
        trained.load(tmp_path / "run")
