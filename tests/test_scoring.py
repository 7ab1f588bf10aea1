"""Scores of rows and of what may follow prompts: on a mesh, with texts, with a shared beginning."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blindvalm_jax import config, partitioning, system, trained
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data import packing
from blindvalm_jax.decoding import generation
from blindvalm_jax.errors import UserError
from blindvalm_jax.explain import probing
from blindvalm_jax.interop import weights
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.objectives.language_model import Batch
from blindvalm_jax.tasks import answers, buckets, catalog
from blindvalm_jax.tasks.questions import Question
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.trained import TrainedModel
from tests import foreign_models, small_aligned, small_models, small_text

POSITIONS = 64


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that share one BPE: blind/, its tower/, and plain/, of learned positions."""
    root = tmp_path_factory.mktemp("weights")
    tokenizer = small_text.small_bpe()
    tokenizer.save(root / "bpe")
    vocabulary = packing.record(tokenizer)
    shape = config.TextTowerConfig(layers=1, width=16, projection=16)
    tower = system.tower_shape(shape, vocabulary, setting="grounding.random")
    specs: dict[str, weights.Spec] = {
        "blind": foreign_models.BLIND,
        "plain": foreign_models.GPT2,
        "tower": tower,
    }
    for name, spec in specs.items():
        if isinstance(spec, weights.DecoderSpec):
            fused = (1,) if spec.fusion_layers else ()
            resized = dataclasses.replace(
                spec.decoder,
                vocab_size=0,
                layers=2,
                max_positions=POSITIONS,
                fusion_layers=fused,
            )
            size = vocabulary.vocab_size
            spec = dataclasses.replace(spec, decoder=resized, vocab_size=size, fusion_layers=fused)
        weights.save(
            root / name,
            foreign_models.random_params(spec),
            config=spec,
            source="made for a test",
            tokenizer={"kind": "train", "fingerprint": vocabulary.fingerprint},
            tokenizer_files=None if name == "tower" else root / "bpe",
        )
    return root


def model_of(
    kind: str, saved: Path, mesh: MeshConfig | None = None, *, dtype: str = "float32"
) -> TrainedModel:
    tower = "" if kind == "plain" else saved / "tower"
    placed = None if mesh is None else partitioning.make_mesh(mesh)
    return trained.from_weights(saved / kind, mesh=placed, tower=tower, dtype=dtype)


def rows_of(model: TrainedModel, count: int) -> list[Row]:
    """Random rows of 17 to 30 tokens, asked for two tokens behind each of two."""
    rng = np.random.default_rng(6)
    size = model.tokenizer.vocab_size
    found = []
    for _ in range(count):
        tokens = rng.integers(0, size, rng.integers(17, 31)).astype(np.int32)
        at = rng.integers(0, len(tokens), 2)
        found.append(Row(tokens, at, rng.integers(0, size, (2, 2))))
    return found


def test_rows_are_split_over_the_devices_of_a_mesh(saved: Path) -> None:
    """29 rows, 8 devices; 1e-5: sums in fp32 in another order."""
    one = model_of("blind", saved)
    rows = rows_of(one, 29)
    many = model_of("blind", saved, MeshConfig(data=4, fsdp=2))
    batch = many.batch_of_ids([row.tokens for row in rows[:16]], length=32)
    assert {shard.data.shape for shard in batch.tokens_BT.addressable_shards} == {(2, 32)}
    odd = many.batch_of_ids([row.tokens for row in rows[:5]], length=32)
    assert odd.tokens_BT.sharding.is_fully_replicated
    assert odd.tokens_BT.sharding.device_set == set(jax.devices())
    split = Scorer(many, tokens_at_once=64).log_probabilities(rows)
    for got, expected in zip(split, Scorer(one).log_probabilities(rows), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def aligned(saved: Path) -> TrainedModel:
    """GPT-2's tokens, and a tower with CLIP's."""
    names = small_aligned.write(saved.parent / "aligned")
    return NamedModel(**names).load(mesh=partitioning.make_mesh(MeshConfig()))


QUESTIONS = [
    Question(
        item=str(number),
        template=0,
        prompt=prompt,
        candidates=("the cat", "reds", "red ring", "café"),
        answer=0,
    )
    for number, prompt in enumerate(
        ["What is it? ", "the red ring, and then; the cat", "naïve: it's 10 ... the ring is"]
    )
]


def test_a_tower_with_a_tokenizer_of_its_own_reads_what_the_words_spell(
    aligned: TrainedModel,
) -> None:
    """Each score is that of the whole text, made into a batch as for any question; 1e-4 of sums."""
    scorer = Scorer(aligned)
    protocol = catalog.TASKS["memory_colors"].protocols["corrected"]
    found = answers.answer(scorer, aligned.tokenizer, protocol, QUESTIONS)
    for question, scores in zip(QUESTIONS, found.scores, strict=True):
        prompt = question.prompt.rstrip()
        first = 1 + len(aligned.tokenizer.encode_lm(prompt))
        texts = [f"{prompt} {word}" for word in question.candidates]
        batch = aligned.batch(texts, length=48)
        log_p = np.asarray(log_probabilities(aligned, batch))
        for row, score in enumerate(scores):
            count = int(batch.weights_BT[row].sum()) + 1
            tokens = np.asarray(batch.tokens_BT[row, :count])
            expected = sum(log_p[row, n - 1, tokens[n]] for n in range(first, count))
            assert score == pytest.approx(expected, abs=1e-4)


def log_probabilities(model: TrainedModel, batch: Batch) -> jax.Array:
    """Of every next token [B, T, V], as training computes them."""

    @jax.jit
    def run(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        z_BTKE = model.model.features(frozen, batch)
        logits_BTV: Any = model.model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)
        return jax.nn.log_softmax(logits_BTV)

    with partitioning.use(model.mesh):
        return run(model.params, model.frozen, batch)


def asked_of(model: TrainedModel) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Prompts of 17 to 31 tokens with 3 or 4 candidates of 1 to 5 tokens.

    The last two are none to share: of one token each, and one too long.
    """
    rng = np.random.default_rng(8)
    size = model.tokenizer.vocab_size

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, size, count).astype(np.int32)

    prompts = [ids(count) for count in (31, 17, 28, 30, 20, 18, 25)]
    lengths = [(1, 5, 3, 4), (5, 1, 1), (4, 4, 4, 5), (2, 5, 2), (1, 1, 5), (1, 1, 1), (20, 1, 4)]
    return prompts, [[ids(count) for count in own] for own in lengths]


def test_a_prompt_that_is_read_once_gives_the_scores_of_whole_rows(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1e-5, in any order, two prompts and four candidates at a time; nothing is compiled twice."""
    model = model_of("blind", saved)
    prompts, candidates = asked_of(model)
    whole = Scorer(model, share_prompts=False).continuations(prompts, candidates)
    assert [[len(x.log_p) for x in own] for own in whole] == [
        [len(x) for x in own] for own in candidates
    ]
    scorer = Scorer(model, tokens_at_once=64)
    assert scorer.shares_prompts
    count = 0
    for order in (np.arange(len(prompts)), np.random.default_rng(9).permutation(len(prompts))):
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            found = scorer.continuations(
                [prompts[x] for x in order], [candidates[x] for x in order]
            )
        assert ("Finished XLA compilation" in caplog.text) == (not count)
        caplog.clear()
        for place, own in zip(order, found, strict=True):
            for got, expected in zip(own, whole[place], strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
        assert count in (0, scorer.compiled)
        count = scorer.compiled

    params = jax.tree.map(lambda x: x * 1.01, model.params)
    expected = Scorer(dataclasses.replace(model, params=params), tokens_at_once=64)
    again = expected.continuations(prompts, candidates)
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        scorer.ask(params, model.frozen)
        found = scorer.continuations(prompts, candidates)
    assert "Finished XLA compilation" not in caplog.text
    for own, right, old in zip(found, again, whole, strict=True):
        np.testing.assert_array_equal(own[0].log_p, right[0].log_p)
        assert np.any(own[0].log_p != old[0].log_p)


@pytest.mark.slow
def test_prompts_are_split_over_the_devices_of_a_mesh(saved: Path) -> None:
    """7 prompts, 8 devices; 1e-5 again."""
    one, many = model_of("blind", saved), model_of("blind", saved, MeshConfig(data=4, fsdp=2))
    prompts, candidates = asked_of(one)
    expected = Scorer(one, share_prompts=False).continuations(prompts, candidates)
    split = Scorer(many, tokens_at_once=64)
    assert split.shares_prompts
    for got, own in zip(split.continuations(prompts, candidates), expected, strict=True):
        for values, right in zip(got, own, strict=True):
            np.testing.assert_allclose(values, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_of_float32_keep_its_precision_on_accelerators(
    saved: Path, tmp_path: Path, dtype: str, precision: str
) -> None:
    """Of all programs that score, write or explain, as they are lowered; each of them is seen."""
    model = model_of("blind", saved, dtype=dtype)
    ids = np.arange(40, dtype=np.int32)
    jax.config.update("jax_dump_ir_to", str(tmp_path))
    try:
        Scorer(model).scores([Row(ids, np.array([3]), np.array([[5]]))])
        Scorer(model).continuations([ids], [[ids[:3]]])
        if dtype == "float32":
            generation.generate(model, ["red"], max_new_tokens=2)
            generation.Generator(model, cached=False).generate(["red"], max_new_tokens=1)
            probing.read(model, "red", ["ring"])
    finally:
        jax.config.update("jax_dump_ir_to", None)
    found = [
        (path.name, re.findall(r"dot_general .* : ", path.read_text()))
        for path in tmp_path.iterdir()
    ]
    names = [
        name.split("jit_")[1].removesuffix("_compile.mlir") for name, products in found if products
    ]
    written = ["_first", "_more", "_new", "_whole", "run"] if dtype == "float32" else []
    assert sorted(names) == sorted(["run", "_new", "_first", "_further", *written])
    wanted = f"precision = [{precision}, {precision}]"
    for name, products in found:
        assert all(wanted in product for product in products), name


def test_positions_may_run_out_behind_a_prompt_that_is_read_once(saved: Path) -> None:
    """64 positions: the bucket of the prompt has no more."""
    model = model_of("plain", saved)
    rng = np.random.default_rng(10)
    prompt, ids = (rng.integers(0, 300, count).astype(np.int32) for count in (60, 5))
    candidates = [[ids, ids[:3]]]
    whole = Scorer(model, share_prompts=False).continuations([prompt], candidates)
    found = Scorer(model, tokens_at_once=64).continuations([prompt], candidates)
    for got, expected in zip(found[0], whole[0], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    scorer = Scorer(model)
    with pytest.raises(UserError, match="a row of 65 tokens: expected 1 to 64"):
        scorer.continuations([np.append(prompt, ids[:1])], candidates)
    with pytest.raises(UserError, match="a row of 0 tokens"):
        scorer.continuations([prompt[:0]], candidates)


def test_whole_rows_are_read_where_later_tokens_decide(saved: Path, aligned: TrainedModel) -> None:
    model = model_of("blind", saved)
    grounding = dataclasses.replace(model.settings.grounding, segments="reference")
    settings = dataclasses.replace(model.settings, grounding=grounding)
    for other in (aligned, dataclasses.replace(model, settings=settings)):
        assert not Scorer(other).shares_prompts
    assert Scorer(model).shares_prompts


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (1, 32),
        (33, 64),
        (64, 64),
        (70, 32),
        (100, 128),
        (129, 32),
        (256, 256),
        (300, 64),
        (5000, 256),
    ],
)
def test_few_rows_make_small_batches_of_few_sizes(there: int, expected: int) -> None:
    """4,096 tokens are 256 rows of 16; an eighth of that is the least."""
    assert buckets.rows_at_once(4096, 16, there=there, shards=1) == expected
    assert buckets.rows_at_once(4096, 16, there=8 * there, shards=8) == 8 * expected
    assert buckets.rows_at_once(32, 16, there=there, shards=3) in (3, 6)
    assert buckets.rows_at_once(32, 64, there=there, shards=3) == 3
