"""A trained model is asked with the rows that training would have made, from runs and weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from blindvalm_jax import config, convert, partitioning, train, trained
from blindvalm_jax.data import packing, pipeline, tokenizers
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import weights
from blindvalm_jax.objectives import language
from blindvalm_jax.objectives.language_model import Batch
from blindvalm_jax.trained import TrainedModel
from tests import small_models, small_text, test_train, tiny_tokenizers
from tests.foreign_models import write_hugging_face

LENGTH = 64
TEXTS = [
    *tiny_tokenizers.random_texts(3, 4, tiny_tokenizers.PLAIN, longest=30),
    "The red ring. Then the cat and the green ring; it's café 10, the cat -- redx and so on",
]
PLAIN = {
    "grounding__source": "none",
    "grounding__tower": "",
    "decoder__positions": "learned",
    "decoder__max_positions": 80,
}


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: aligned (GPT-2's tokens, a tower with CLIP's), shared (a BPE of its own) and plain."""
    root = tmp_path_factory.mktemp("runs")
    small_text.write_text(root / "text.txt", small_text.documents(30))
    vocab, merges = tiny_tokenizers.clip_parts()
    tower = test_train.write_tower(root / "clip", vocab_size=len(vocab))
    tiny_tokenizers.write_pair(tower, vocab, merges)
    gpt2 = tiny_tokenizers.write_pair(root / "gpt2", *tiny_tokenizers.gpt2_parts())
    aligned = {
        "tokenizer__kind": "gpt2",
        "tokenizer__path": str(gpt2),
        "grounding__tower": str(tower),
    }
    for name, changes in (("aligned", aligned), ("shared", {}), ("plain", PLAIN)):
        values = {"train__steps": 2, "eval__every_steps": 0, "data__cache": str(root / "cache")}
        settings = test_train.settings(root / "text.txt", **values, **changes)
        train.train(config.parse(settings), root / name)
    return root


@pytest.fixture(scope="module")
def models(runs: Path) -> dict[str, TrainedModel]:
    return {name: trained.load(runs / name) for name in ("aligned", "shared", "plain")}


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    """The decoders of the runs as `convert` writes them."""
    for name in ("aligned", "shared", "plain"):
        with flagsaver.as_parsed(input=str(runs / name), out=str(runs / "weights" / name)):
            convert.main(["convert"])
    return runs / "weights"


def answers(model: TrainedModel, batch: Batch) -> tuple[np.ndarray | None, np.ndarray]:
    """Features [B, T, K, E] and logits [B, T, V]."""

    @jax.jit
    def run(params: Any, frozen: Any, batch: Batch) -> Any:
        z_BTKE = model.model.features(frozen, batch)
        logits_BTV = model.model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)
        return z_BTKE, logits_BTV[..., : model.tokenizer.vocab_size]

    with partitioning.use(model.mesh):
        z, logits = run(model.params, model.frozen, batch)
    return None if z is None else np.asarray(z), np.asarray(logits)


def with_rule(model: TrainedModel, rule: str) -> TrainedModel:
    grounding = dataclasses.replace(model.settings.grounding, segments=rule)
    return dataclasses.replace(
        model, settings=dataclasses.replace(model.settings, grounding=grounding)
    )


def first_window(model: TrainedModel, text: str, directory: Path) -> dict[str, np.ndarray]:
    """The row that training reads where the text is the first document."""
    tower = model.model.tower
    recipe = packing.Recipe(
        source=small_text.write_text(directory.with_suffix(".txt"), [text, "what comes after"]),
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
    models: dict[str, TrainedModel], mode: str, rule: str, tmp_path: Path
) -> None:
    """Its ids, and behind the tower and the decoder the same numbers, to fp32's 1e-5."""
    model = with_rule(models[mode], rule)
    text = TEXTS[-1]
    count = 1 + len(model.tokenizer.encode_lm(text))
    row = first_window(model, text, tmp_path / "windows")
    batch = model.batch([text], length=LENGTH)
    assert batch.tower is not None
    np.testing.assert_array_equal(batch.tokens_BT[0, :count], row["tokens"][:count])
    np.testing.assert_array_equal(batch.targets_BT[0, : count - 1], row["targets"][: count - 1])
    assert batch.weights_BT.sum() == count - 1
    read = int(row["tower_index"][count - 1]) if mode == "aligned" else count
    np.testing.assert_array_equal(batch.tower.tokens_BS[0, :read], row["tower_tokens"][:read])
    if mode == "aligned":
        assert batch.tower.index_BT is not None
        np.testing.assert_array_equal(batch.tower.index_BT[0, :count], row["tower_index"][:count])
    else:
        assert batch.tower.index_BT is None
    if rule == "causal":  # the other looks ahead, into what comes after
        np.testing.assert_array_equal(batch.tower.starts_BS[0, :read], row["tower_starts"][:read])
        window = language.make_batch({name: x[None] for name, x in row.items()})
        for got, expected in zip(answers(model, batch), answers(model, window), strict=True):
            assert got is not None
            np.testing.assert_allclose(got[0, :count], expected[0, :count], rtol=0, atol=1e-5)
