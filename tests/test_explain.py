"""What an explanation says: scores, attention and near words, each against another way to them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blindvalm_jax import partitioning, trained
from blindvalm_jax.errors import UserError
from blindvalm_jax.explain import probing, report, words
from blindvalm_jax.grounding import index
from blindvalm_jax.tasks import answers, catalog
from blindvalm_jax.tasks.questions import Question
from blindvalm_jax.tasks.scoring import Scorer
from blindvalm_jax.trained import TrainedModel
from tests import small_index, small_models, small_text, test_train

ROOT = Path(__file__).resolve().parents[1]
PROMPT, CANDIDATES = "the boat on the sea is", ["red", "blue and green", "sea"]


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explained")
    text = directory / "text.txt"
    small_text.write_text(text, small_text.documents(120))
    values = test_train.settings(
        text, train__steps=2, eval__every_steps=0, grounding__readout="eos"
    )
    values.data.cache = str(directory / "cache")
    test_train.run(values, directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return trained.load(run, dtype="float32")


@pytest.fixture(scope="module")
def reading(model: TrainedModel) -> probing.Reading:
    return probing.read(model, PROMPT, CANDIDATES)


def test_grounded_scores_are_those_of_evaluation(
    model: TrainedModel, reading: probing.Reading
) -> None:
    question = Question(item="1", template=0, prompt=PROMPT, candidates=tuple(CANDIDATES), answer=0)
    protocol = catalog.TASKS["memory_colors"].protocols["corrected"]
    expected = answers.answer(Scorer(model), model.tokenizer, protocol, [question])
    np.testing.assert_allclose(reading.grounded, expected.scores[0], atol=1e-4, rtol=0)


def test_ungrounded_scores_know_nothing_of_the_tower(
    model: TrainedModel, reading: probing.Reading
) -> None:
    """Another tower changes every score with grounding, and none without."""
    rng = np.random.default_rng(0)
    tower = jax.tree.map(
        lambda x: np.asarray(rng.normal(size=x.shape, scale=0.1), x.dtype), model.frozen["tower"]
    )
    other = probing.read(dataclasses.replace(model, frozen={"tower": tower}), PROMPT, CANDIDATES)
    np.testing.assert_array_equal(other.ungrounded, reading.ungrounded)
    assert np.all(other.grounded != reading.grounded)
    assert np.all(other.grounded != other.ungrounded)


def test_attention_is_what_training_logs(model: TrainedModel, reading: probing.Reading) -> None:
    """The mean over heads is the decoder's own count of it; nothing is looked at beyond 1."""
    ids = model.tokenizer.encode_lm(PROMPT)
    batch = model.batch_of_ids([np.append(model.tokenizer.eos_id, ids).astype(np.int32)])
    features = model.model.features(model.frozen, batch)
    with partitioning.use(model.mesh):
        hidden = jax.jit(functools.partial(model.model.decoder.apply, method="hidden"))(
            {"params": model.params}, batch.tokens_BT, features
        )
    expected = np.asarray(hidden.memory_share_LBT)[:, 0]
    assert reading.attention.shape[:2] == expected.shape == (1, len(ids) + 1)
    np.testing.assert_allclose(reading.attention.mean(axis=2), expected, atol=1e-6, rtol=0)
    assert np.all((reading.attention > 0) & (reading.attention < 1))
    assert reading.tokens[0] == "(start)"
    assert "".join(reading.tokens[1:]) == PROMPT


def test_candidates_change_neither_attention_nor_vectors(model: TrainedModel) -> None:
    """Under the reference rule either, where their tokens move segment borders of the prompt."""
    grounding = dataclasses.replace(model.settings.grounding, segments="reference")
    settings = dataclasses.replace(model.settings, grounding=grounding)
    reference = dataclasses.replace(model, settings=settings)
    # The prompt is one segment, longer rows are cut at a full stop in it.
    prompt, tower = "the boat. ", model.model.tower
    assert tower is not None
    while len(model.tokenizer.encode_lm(prompt)) < tower.config.longest_segment - 16:
        prompt += "on the sea "
    candidates = ["red", "blue and green " * 5]
    one, other = (
        probing.read(reference, prompt, order) for order in (candidates, candidates[::-1])
    )
    np.testing.assert_allclose(one.attention, other.attention, atol=1e-6, rtol=0)
    np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6, rtol=0)
    np.testing.assert_allclose(one.grounded, other.grounded[::-1], atol=1e-4, rtol=0)


def test_a_word_is_nearest_to_itself(model: TrainedModel) -> None:
    found = words.of_vocabulary(model, count=40)
    assert len(set(found.texts)) == len(found.texts) > 5
    assert all(len(text) >= 3 and text.isalpha() for text in found.texts)
    near = words.nearest(found, found.vectors[3], others=found.vectors, count=5)
    assert near.words[0] == found.texts[3]
    assert near.cosines[0] == pytest.approx(1, abs=1e-6)
    assert list(near.cosines) == sorted(near.cosines, reverse=True)
    alone = probing.read(model, f" {found.texts[3]}", ["red"])
    assert len(alone.tokens) == 2
    np.testing.assert_allclose(alone.vectors[-1, 0], found.vectors[3], atol=1e-5, rtol=0)


def test_the_nulls_are_what_chance_gives() -> None:
    """2.5 % of vectors drawn anew pass the 97.5 % quantile: of 2,000 and 512 1 to 4.5 %."""
    rng = np.random.default_rng(1)
    cone = rng.normal(size=(300, 12)) @ np.diag(np.linspace(0.1, 1, 12)) + 2
    vectors = probing.unit(cone.astype(np.float32))
    known = words.Words([f"w{n}" for n in range(300)], np.arange(300), vectors)
    others = probing.unit(rng.normal(size=(2512, 12)) + 1)
    near = words.nearest(known, known.vectors[0], others=others[:512], count=3)
    for null, meaningless in (
        (near.directions, rng.normal(size=(2000, 12))),
        (near.others, others[512:]),
    ):
        best = np.sort(probing.unit(meaningless) @ known.vectors.T, axis=1)[:, ::-1][:, :3]
        passed = (best > null[1]).mean(axis=0)
        assert np.all((passed > 0.01) & (passed < 0.045)), passed
        np.testing.assert_allclose(null[0], best.mean(axis=0), atol=0.03, rtol=0)


def test_other_grounding_is_of_random_texts_or_of_images(
    model: TrainedModel, tmp_path: Path
) -> None:
    """Each vector is that of some text of as many words; of a VALM one of the index's."""
    known = words.of_vocabulary(model, count=2)
    pairs = [f" {one} {other}" for one in known.texts for other in known.texts]
    possible = np.stack([probing.read(model, pair, ["red"]).vectors[-1, 0] for pair in pairs])
    found = words.drawn(model, known, tokens=2)
    apart = np.abs(found[:, None] - possible).max(axis=2)
    assert np.all(apart.min(axis=1) < 1e-5)
    assert set(apart.argmin(axis=1)) == set(range(4)), "all of them are drawn"
    small_index.build(tmp_path / "index", count=7)
    images: Any = types.SimpleNamespace(index=index.ImageIndex.open(tmp_path / "index"))
    found = words.drawn(dataclasses.replace(model, images=images), known, tokens=2)
    vectors = probing.unit(images.index.vectors.rows(np.arange(7)))
    alike = np.abs(found[:, None] - vectors).max(axis=2) < 1e-6
    np.testing.assert_array_equal(alike.sum(axis=0), np.ones(7))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "blindvalm_jax.explain", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_a_page_a_figure_and_numbers(
    run: Path, tmp_path: Path, reading: probing.Reading
) -> None:
    asked = f"--prompt={PROMPT}", f"--candidates={','.join(CANDIDATES)}"
    done = command(f"--workdir={run}", *asked, f"--out={tmp_path}", "--words=30", "--nearest=4")
    assert done.returncode == 0, done.stderr
    assert "| blue and green |" in done.stdout
    found = json.loads((tmp_path / "explain.json").read_text())
    grounded = [found["candidates"][name]["grounded"] for name in CANDIDATES]
    np.testing.assert_allclose(grounded, reading.grounded, atol=1e-4, rtol=0)
    assert np.shape(found["attention"]) == reading.attention.shape
    assert [len(one["words"]) for one in found["nearest"]] == [4]
    assert (tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "explain.md").read_text()
    assert page.startswith("![explanation](explain.png)")
    assert "| random direction | vector of another text |" in page


def test_signs_of_markdown_and_formulas_are_only_text(tmp_path: Path) -> None:
    """On the page they are escaped, in the figure nothing is a formula; no font has emoji."""
    signs = ["a|b", "$x_$", "$1 and $2", "\\frac{", "\U0001f642", "_it_"]
    reading = probing.Reading(
        tokens=["(start)", *(f" {sign}" for sign in signs), "\n"],
        candidates=signs,
        grounded=np.arange(6.0),
        ungrounded=np.zeros(6),
        attention=np.full((1, 8, 2), 0.5, np.float32),
        layers=[0],
        vectors=np.ones((8, 1, 4), np.float32),
    )
    chance = np.zeros((2, 6))
    near = [words.Nearest(signs, np.arange(6.0), chance, chance)]
    lines = report.write(reading, near, other="another text", at=2, out=tmp_path)
    assert (tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "explain.json").read_text())
    assert [*found["candidates"]] == signs
    rows = [line for line in lines if line.startswith("| ") and "a" in line and "b" in line]
    assert [row.split(" | ")[0] for row in rows if "a\\|b" in row] == ["| a\\|b"] * 3
    assert "| \\$x\\_\\$ |" in "\n".join(lines)
    for line in lines:
        assert len(re.findall(r"(?<!\\)\$", line)) == 0


def test_the_page_is_there_without_the_figure(tmp_path: Path, reading: probing.Reading) -> None:
    chance = np.zeros((2, 1))
    near = [words.Nearest(["a"], np.ones(1), chance, chance)]
    (tmp_path / "explain.png").mkdir()
    with pytest.raises(IsADirectoryError):
        report.write(reading, near, other="another text", at=0, out=tmp_path)
    assert (tmp_path / "explain.md").exists()
    assert (tmp_path / "explain.json").exists()


def test_what_cannot_be_explained_is_one_line(run: Path, model: TrainedModel) -> None:
    done = command(f"--workdir={run}", "--prompt=x", "--candidates=y")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--out is missing" in done.stderr
    with pytest.raises(UserError, match="the candidate '' has no tokens"):
        probing.read(model, "the", [""])
    with pytest.raises(UserError, match="the candidate 'red' is there twice"):
        probing.read(model, "the", ["red", "sea", " red"])
    place = run / "config.json"
    done = command("--workdir=none", "--prompt=x", "--candidates=y", f"--out={place}/out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"--out={place}/out cannot be written: {place} is no directory" in done.stderr
    new = run.parent / "refused"
    assert command("--workdir=none", "--prompt=x", "--candidates=y", f"--out={new}").returncode == 1
    assert not new.exists()
    plain = dataclasses.replace(model.model.decoder, fusion_layers=(), memory_width=0)
    bare = dataclasses.replace(model, model=dataclasses.replace(model.model, decoder=plain))
    with pytest.raises(UserError, match="without grounding has nothing to explain"):
        probing.read(bare, "the", ["sea"])
