"""Scores of tasks are those of torch: models of transformers, both protocols, every way of scoring.

What torch said lies in golden/scores_*.npz (make_golden_scores.py), so the comparison needs none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from blindvalm_jax import config, partitioning, trained
from blindvalm_jax.data import tokenizers
from blindvalm_jax.golden import case, parts
from blindvalm_jax.interop import fairseq, weights
from blindvalm_jax.objectives.language_model import Model
from blindvalm_jax.tasks import answers, catalog
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.tasks.task import Protocol
from blindvalm_jax.trained import TrainedModel
from tests import foreign_models, plain_scores, small_models, tiny_tokenizers

# Of sums of up to ten log probabilities of size 10 in fp32; 2e-5 measured.
ATOL = 1e-4
# The scripts' rule of segments, and the one that lets no later token decide.
RULES = {"published": "reference", "corrected": "causal"}
Arrays = dict[str, np.ndarray]
# Fewer of the model that takes longer to compile.
TASKS = {"gpt2": plain_scores.TASKS, "blind": ("memory_colors", "shapeit", "relative_size")}


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_scores.write_files(tmp_path_factory.mktemp("data"))


@functools.cache
def stored(kind: str) -> Arrays:
    with np.load(foreign_models.GOLDEN / f"scores_{kind}.npz") as file:
        return dict(file)


def named(kind: str, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): x for n, x in stored(kind).items() if n.startswith(prefix)}


def loaded(kind: str, protocol: str, directory: Path) -> TrainedModel:
    """The model of a file, brought in as a user does."""
    about = json.loads(str(stored(kind)["config"]))
    theirs = foreign_models.write_hugging_face(directory / "hf", about, named(kind, "tensor/"))
    if kind == "gpt2":
        tiny_tokenizers.write_pair(theirs, *tiny_tokenizers.gpt2_parts())
        return trained.from_weights(theirs)
    tiny_tokenizers.write_pair(theirs, *tiny_tokenizers.clip_parts())
    decoder = {f"decoder.{name}": x for name, x in named(kind, "decoder/").items()}
    path = foreign_models.write_tensors(directory / "decoder.safetensors", decoder)
    spec, params = fairseq.load_checkpoint(path, heads=2, vocab_multiple=16)
    weights.save(directory / "decoder", params, config=spec, source="made for a test")
    return trained.from_weights(
        directory / "decoder",
        tower=theirs,
        tokenizer=theirs,
        tokenizer_kind="clip",
        grounding={"segments": RULES[protocol]},
    )


def check(
    model: TrainedModel,
    data: Path,
    protocol: str,
    expected: Arrays,
    tasks: Sequence[str] = plain_scores.TASKS,
) -> None:
    """Compares scores and choices with those of `expected`, TASK/PROTOCOL/WAY."""
    scorer = Scorer(model)
    for task in tasks:
        of: Protocol = getattr(catalog.TASKS[task], protocol)
        questions = of.questions(of.items(data))
        asked = list(plain_scores.asked(task, protocol, data))
        assert [(x.prompt, [*x.candidates]) for x in questions] == asked
        found = answers.answer(scorer, model.tokenizer, of, questions)
        for place, way in enumerate(of.scores):
            right = expected[f"{task}/{protocol}/{way}"]
            if not place:
                np.testing.assert_allclose(np.array(found.scores), right, atol=ATOL, rtol=0)
            ahead = np.diff(np.sort(right, axis=1)[:, -2:])[:, 0]
            sure = ahead > 2 * ATOL
            assert sure.mean() > 0.7, (task, way)
            np.testing.assert_array_equal(found.chosen[way][sure], right.argmax(axis=1)[sure])


@pytest.mark.parametrize("protocol", plain_scores.PROTOCOLS)
@pytest.mark.parametrize("kind", ["gpt2", "blind"])
def test_scores_are_those_that_torch_gave(
    kind: str, protocol: str, data: Path, tmp_path: Path
) -> None:
    model = loaded(kind, protocol, tmp_path)
    assert (model.model.tower is None) == (kind == "gpt2")
    check(model, data, protocol, named(kind, "expected/"), TASKS[kind])


@pytest.mark.torch
def test_the_files_hold_what_torch_gives(tmp_path: Path) -> None:
    """The models too: float64 in both, 1e-9 for another order of sums."""
    import torch

    from tests import make_golden_scores

    torch.set_num_threads(1)
    model = make_golden_scores.gpt2()
    scores: dict[str, Callable[[Path, str, str], Arrays]] = {
        "gpt2": functools.partial(make_golden_scores.gpt2_scores, model),
        "blind": make_golden_scores.blind_scores,
    }
    for kind, theirs in (("gpt2", model), ("blind", make_golden_scores.clip())):
        theirs.save_pretrained(tmp_path / kind)
        tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
        for name, value in named(kind, "tensor/").items():
            np.testing.assert_array_equal(tensors[name], value, err_msg=name)
        found = make_golden_scores.everything(scores[kind])
        expected = {f"expected/{name}": x for name, x in named(kind, "expected/").items()}
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-9, rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.torch
def test_scores_of_the_real_files_are_those_of_torch(shared: Path, tmp_path: Path) -> None:
    from tests import make_golden_scores

    theirs = make_golden_scores.gpt2()
    theirs.save_pretrained(tmp_path / "hf")
    tiny_tokenizers.write_pair(tmp_path / "hf", *tiny_tokenizers.gpt2_parts())
    model = trained.from_weights(tmp_path / "hf")
    data = plain_scores.copy_some(
        shared / "data" / "eval", tmp_path / "data", every=60, longest=120
    )
    for protocol in plain_scores.PROTOCOLS:
        expected: Arrays = {}
        for task in plain_scores.TASKS:
            ways = make_golden_scores.gpt2_scores(theirs, data, task, protocol)
            expected |= {f"{task}/{protocol}/{way}": x for way, x in ways.items()}
        check(model, data, protocol, expected)


def test_templates_are_those_of_the_record(shared: Path) -> None:
    record = json.loads((shared / "data" / "protocols.json").read_text(encoding="utf-8"))
    written = {
        plain_scores.COLORS: record["memory_colors"]["templates"],
        plain_scores.SHAPES: record["shapeit"]["templates_p1_default"],
        plain_scores.VICOMTE: record["vicomte_shape"]["templates"],
        plain_scores.SIZES: record["relative_size"]["prompt1"]["templates"],
        (plain_scores.REVIEW.replace("[TEXT]", "{text}"),): [record["sst2"]["template"]],
    }
    for templates, of_record in written.items():
        assert [*templates] == of_record


def reference_case(name: str, shared: Path) -> tuple[case.Case, list[int]]:
    """A case from tokens to logits, and how many tokens of each row are real."""
    found = case.read(shared / "golden" / f"{name}.json")
    pads = found.arrays["tokens"] == 1
    return found, [int(row.argmax()) if row.any() else len(row) for row in pads]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["end_to_end_blind_a", "end_to_end_blind_b"])
def test_the_torch_model_is_the_reference(name: str, shared: Path) -> None:
    """1e-4 of logits in fp32 and segments: what the scores were computed with."""
    from tests import torch_blind

    found, counts = reference_case(name, shared)
    lm = found.meta["config"]["lm"]
    decoder = torch_blind.Decoder(found.weights("w/"), heads=lm["heads"], fused=lm["joint_layer"])
    marks = {".": 269, ";": 282, "!": 256, ":": 281, ",": 267, "/": 270, "-": 268, "end": 49407}
    for row, count in enumerate(counts):
        tokens = found.arrays["tokens"][row]
        ids = np.where(tokens == 2, 49407, np.where(tokens == 1, 0, tokens - 4)).tolist()
        lengths = torch_blind.looking_ahead(ids, longest=75, pieces=marks)
        assert lengths == found.meta["segment_lengths"][row]
        got = decoder.logits(tokens[:count], found.arrays["out/features"][row, :count])
        expected = found.arrays["out/logits"][row, :count]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["end_to_end_blind_a", "end_to_end_blind_b"])
def test_rows_of_the_reference_score_as_its_logits_say(name: str, shared: Path) -> None:
    """Every next token of its rows, its rule of segments; pads of its batch are tokens to us."""
    found, counts = reference_case(name, shared)
    about = found.meta["config"]
    decoder, params = parts.build_decoder(found, about["lm"])
    tower, tower_params = parts.build_tower(found, about["clip"])
    settings = config.Config()
    grounding = dataclasses.replace(settings.grounding, segments="reference")
    mesh = partitioning.make_mesh(config.MeshConfig(), jax.devices()[:1])
    model = TrainedModel(
        model=Model(decoder, tower),
        params=params,
        frozen={"tower": tower_params},
        tokenizer=tokenizers.load("clip", str(shared / "data" / "tokenizers" / "clip")),
        tower_tokenizer=None,
        settings=dataclasses.replace(settings, grounding=grounding),
        step=0,
        mesh=mesh,
        images=None,
    )
    tokens, targets = found.arrays["tokens"], found.arrays["targets"]
    rows = [
        Row(own, np.arange(count), after[:count, None])
        for own, after, count in zip(tokens, targets, counts, strict=True)
    ]
    with jax.default_matmul_precision("highest"):
        got = Scorer(model).log_probabilities(rows)
    for row, count in enumerate(counts):
        expected = -found.arrays["out/nll"][row, :count]
        np.testing.assert_allclose(got[row][:, 0], expected, atol=1e-4, rtol=0)
