"""The comparison of the toy world end to end, on a tiny world.

Slow: compiling its models takes minutes, whatever their size.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import config, trained, trainer
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_model
from blindvalm_jax.tasks import evaluation
from blindvalm_jax.tasks.scoring import Scorer
from blindvalm_jax.toyworld import (
    comparison,
    language,
    measure,
    probing,
    recipes,
    report,
    supply,
)
from blindvalm_jax.toyworld.world import ATTRIBUTES, WorldConfig, objects
from tests import small_models

WORLD = WorldConfig(
    train_objects=8,
    dev_objects=3,
    heldout_objects=5,
    image_size=16,
    images_per_object=4,
    validation_images_per_object=2,
    sentences=300,
    validation_sentences=40,
)
VARIANTS = ("gpt2", "blind_valm_eos", "valm", "shuffled")
STEPS = recipes.Steps(clip=3, language=3)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def compare(root: Path, **changes: Any) -> dict[str, Any]:
    options = {"worlds": [WORLD], "variants": VARIANTS, "steps": STEPS, "jobs": 1}
    return comparison.run(root, **(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Directory and results of a comparison."""
    root = tmp_path_factory.mktemp("comparison")
    return root, compare(root)


@pytest.fixture(scope="module")
def blind(made: tuple[Path, dict[str, Any]]) -> trained.TrainedModel:
    return trained.load(made[0] / "seed_0" / "blind_valm_eos")


@pytest.fixture(scope="module")
def probes() -> list[language.Probe]:
    return [probe for probe in language.probes(WORLD, objects(WORLD)) if probe.split == "heldout"]


@pytest.mark.slow
def test_results_hold_what_the_report_and_others_read(
    made: tuple[Path, dict[str, Any]],
) -> None:
    root, results = made
    assert json.loads((root / "results.json").read_text()) == json.loads(json.dumps(results))
    assert tuple(results["variants"]) == VARIANTS
    for of in results["variants"].values():
        assert all(len(of[name]) == 1 for name in (*ATTRIBUTES, "perplexity", "step_seconds"))
    assert set(results["attribution"]) == {"blind_valm_eos", "valm"}
    assert set(results["given"]) == {"blind_valm_eos"}
    assert "attention" not in results["variants"]["gpt2"]
    assert "bias" not in results
    text = report.write(results, root).read_text()
    assert "blind" in text.lower()
    assert "gpt2" in report.summary_table(results)


@pytest.mark.slow
def test_the_same_again_trains_nothing(made: tuple[Path, dict[str, Any]]) -> None:
    root, results = made
    runs = [root / "seed_0" / name / "metrics.jsonl" for name in ("clip", *VARIANTS)]
    before = [path.read_bytes() for path in runs]
    again = compare(root)
    assert [path.read_bytes() for path in runs] == before
    assert again == results  # with how long it took when it was done
    assert set(results["timed"]) == {"world_and_clip", "language"}


@pytest.mark.slow
def test_a_comparison_may_move_and_be_named_by_another_path(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained or built again, and a VALM finds its index where it lies now."""
    shutil.copytree(made[0], tmp_path / "moved")
    seed = tmp_path / "moved" / "seed_0"
    written = [seed / name / "metrics.jsonl" for name in ("clip", *VARIANTS)]
    written.append(seed / "index" / "manifest.json")
    before = [path.read_bytes() for path in written]
    monkeypatch.chdir(tmp_path)
    assert compare(Path("moved")) == made[1]
    assert [path.read_bytes() for path in written] == before
    monkeypatch.chdir(seed)
    valm = trained.load("valm")
    assert valm.images is not None
    assert valm.images.index.directory == seed / "index"
    for name in VARIANTS:
        record = json.loads((seed / name / "run.json").read_text())
        assert Path(record["data"]["directory"]).is_relative_to(seed)
    assert compare(tmp_path / "moved") == made[1]


@pytest.mark.slow
def test_other_settings_are_refused(made: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"holds a run with other settings: train\.steps"):
        compare(made[0], steps=dataclasses.replace(STEPS, language=4))
    other = dataclasses.replace(WORLD, sentences=310)
    with pytest.raises(UserError, match=r"was trained with other data"):
        compare(made[0], worlds=[other])
    other = dataclasses.replace(WORLD, train_objects=9)
    with pytest.raises(UserError, match=r"holds the world .*train_objects8.*, not"):
        compare(made[0], worlds=[other])


@pytest.mark.slow
def test_a_run_takes_the_parts_of_its_world(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """`toyworld` becomes paths, and what is there is used."""
    root = made[0] / "seed_0"
    values = recipes.language(WORLD, "valm", steps=3)
    values.data.cache = str(root)
    settings = supply.complete(config.parse(values), tmp_path, train=trainer.train)
    assert settings.grounding.tower == str(root / "clip")
    assert settings.grounding.index == str(root / "index")
    assert settings.tokenizer.path == str(root / "tokenizer")
    values.data.tfds = "lm1b"
    with pytest.raises(UserError, match="goes with data.tfds=toyworld_sentences/"):
        supply.complete(config.parse(values), tmp_path, train=trainer.train)


@pytest.mark.slow
def test_clip_in_the_index_is_the_tower_of_the_run(made: tuple[Path, dict[str, Any]]) -> None:
    root = made[0] / "seed_0"
    record = json.loads((root / "index" / "manifest.json").read_text())
    clip = clip_model.load_clip(root / "clip")
    assert record["text_sha256"] == clip.text_sha256
    run = json.loads((root / "valm" / "run.json").read_text())
    assert run["tower"]["sha256"] == clip.text_sha256
    assert run["images"]["vectors"] == WORLD.images_per_object * len(objects(WORLD))


@pytest.mark.slow
def test_answers_do_not_depend_on_order_or_number(
    blind: trained.TrainedModel, probes: list[language.Probe]
) -> None:
    answers = probing.ask(blind, probes)
    backwards = probing.ask(blind, probes[::-1])
    np.testing.assert_array_equal(answers.said, backwards.said[::-1])
    np.testing.assert_allclose(answers.share, backwards.share[::-1], atol=1e-6)
    few = probing.ask(blind, probes[7:20])
    np.testing.assert_array_equal(answers.said[7:20], few.said)


@pytest.mark.slow
def test_tasks_ask_what_probes_ask(
    blind: trained.TrainedModel, probes: list[language.Probe], tmp_path: Path
) -> None:
    """Of attributes all of whose values some held-out object has."""
    supply.make_questions(WORLD, supply.Parts(tmp_path))
    scorer = Scorer(blind)
    for attribute in ("shape", "size"):
        own = [p for p in probes if p.attribute == attribute and p.wording == "seen"]
        said = probing.ask(blind, own).said
        right = np.mean([answer == p.answer for answer, p in zip(said, own, strict=True)])
        [asked] = evaluation.read([f"toyworld_{attribute}"], "corrected", tmp_path)
        entry = asked.run(scorer, blind.tokenizer).entry
        assert entry["n"] == WORLD.heldout_objects
        assert entry["score"] == pytest.approx(right)
        assert entry["random"] == pytest.approx(1 / len(own[0].candidates))


@pytest.mark.slow
def test_what_the_tower_reads_matters_only_where_it_is_seen(
    blind: trained.TrainedModel, probes: list[language.Probe]
) -> None:
    """The share of attention tells: it moves with the tower's text, and is 0 where unseen."""
    names = sorted({probe.object for probe in probes})
    after = dict(zip(names, names[1:] + names[:1], strict=True))
    other = [probe.template.format(name=after[probe.object]) for probe in probes]
    own = [probe.prompt for probe in probes]
    seen = probing.ask(blind, probes)
    same = probing.ask(blind, probes, tower_reads=own)
    np.testing.assert_array_equal(seen.share, same.share)
    swapped = probing.ask(blind, probes, tower_reads=other)
    assert np.abs(seen.share - swapped.share).max() > 1e-6
    for where, share in (("last", True), ("not_last", False), ("nowhere", False)):
        found = probing.ask(blind, probes, grounded=where)
        assert np.all((found.share > 0) == share)
    hidden = [
        probing.ask(blind, probes, grounded="nowhere", tower_reads=texts).said
        for texts in (own, other)
    ]
    np.testing.assert_array_equal(hidden[0], hidden[1])
    shorter = [text.rsplit(" ", 1)[0] for text in own]
    with pytest.raises(UserError, match="another number of tokens than its prompt"):
        probing.ask(blind, probes, tower_reads=shorter)


@pytest.mark.slow
def test_given_vectors_take_the_place_of_the_features(
    blind: trained.TrainedModel, probes: list[language.Probe]
) -> None:
    """The features at the last position, handed back there, change nothing of it."""
    vectors = probing.features(blind, [probe.prompt for probe in probes])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    given = probing.ask(blind, probes, given=vectors[:, None], grounded="last")
    own = probing.ask(blind, probes, grounded="last")
    np.testing.assert_array_equal(given.said, own.said)
    np.testing.assert_allclose(given.share, own.share, atol=1e-6)


@pytest.mark.slow
def test_a_model_without_fusion_is_the_plain_one(
    blind: trained.TrainedModel, probes: list[language.Probe]
) -> None:
    plain = measure.without_fusion(blind)
    assert plain.model.decoder.fusion_layers == ()
    batch = plain.batch([probe.prompt for probe in probes])
    logits: Any = plain.model.decoder.apply({"params": plain.params}, batch.tokens_BT)
    assert np.isfinite(np.asarray(logits)[..., : plain.tokenizer.vocab_size]).all()
    assert np.all(probing.ask(plain, probes).share == 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=x", "--variants=gpt3"], "--variants must be among gpt2, blind_valm"),
        (["--workdir=x", "--stated_heldout=some"], "--stated_heldout must be numbers"),
        (["--workdir=x", "--stated_heldout=0,0.1"], "takes shares above 0, each once"),
        (["--workdir=x", "--stated_heldout=2"], "stated_heldout must be 0 ... 1"),
        (["--workdir=x", "--image_size=3"], "image_size must be 16 ... 128"),
        (["--workdir=x", "--seeds=0"], "seeds"),
        (["--workdir=x", "more"], "unexpected argument 'more'"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blindvalm_jax.toyworld", *flags]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert not (root / "x").exists()
