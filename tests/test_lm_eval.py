"""lm-evaluation-harness with our models: the numbers of its own `hf`, and those of `evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blindvalm_jax import partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.decoding.generation import Generator
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import weights
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.tasks import answers, catalog, perplexity
from blindvalm_jax.tasks.asked import Windows
from blindvalm_jax.tasks.scoring import Scorer
from tests import (
    foreign_models,
    small_aligned,
    small_models,
    small_tasks,
    small_text,
    tiny_tokenizers,
)

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "blindvalm_jax" / "lm_eval" / "tasks"
TEXTS = """task: small_texts
custom_dataset: !function texts.documents
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
metadata:
  version: 1.0
"""
STORIES = """task: small_stories
custom_dataset: !function texts.documents
test_split: test
output_type: generate_until
doc_to_text: "{{beginning}}"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["9", "ring"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""
DOCUMENTS = """import datasets

TEXTS = ["the cat and the ring are red", "then " + "a naive green cat in the caf\\u00e9 " * 9, "in"]


def documents(**_):
    rows = [{"text": text, "beginning": text[:200]} for text in TEXTS]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
"""


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights, as transformers saves it, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    directory = tmp_path_factory.mktemp("gpt2")
    vocabulary, merges = tiny_tokenizers.gpt2_parts()
    tiny_tokenizers.write_pair(directory, vocabulary, merges)
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    end = vocabulary["<|endoftext|>"]
    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,  # so that answers differ
        bos_token_id=end,
        eos_token_id=end,
    )
    transformers.GPT2LMHeadModel(settings).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tasks.write(tmp_path_factory.mktemp("data") / "vlu")


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "small_texts.yaml").write_text(TEXTS)
    (directory / "small_stories.yaml").write_text(STORIES)
    (directory / "texts.py").write_text(DOCUMENTS)
    return directory


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names a model with GPT-2's tokens whose tower has CLIP's."""
    return small_aligned.write(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module")
def sinusoidal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names a model with CLIP's tokens and no limit of positions, whose training length is 512."""
    root = tmp_path_factory.mktemp("sinusoidal")
    tokenizer = small_text.small_clip()
    tokenizer.save(root / "clip")
    spec = dataclasses.replace(
        foreign_models.GPT2,
        decoder=dataclasses.replace(
            foreign_models.GPT2.decoder, layers=2, vocab_size=0, positions="sinusoidal"
        ),
        vocab_size=tokenizer.vocab_size,
    )
    weights.save(
        root / "decoder",
        foreign_models.random_params(spec),
        config=spec,
        source="made for a test",
        tokenizer={"kind": "clip", "fingerprint": tokenizer.fingerprint},
        tokenizer_files=root / "clip",
    )
    return {"checkpoint": str(root / "decoder")}


def harness_or_skip() -> None:
    """Imports the harness, whose own warnings and those of what it imports are no errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "lm_eval is not installed: pip install -e '.[harness]'"
        pytest.importorskip("lm_eval", reason=reason)
        pytest.importorskip("lm_eval.models", reason=reason)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """What the harness hands to a model."""
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=own, idx=0) for own in arguments]


def harness(
    model: str,
    arguments: Mapping[str, Any],
    data: Path,
    own_tasks: Path,
    *,
    tasks: list[str],
    **flags: Any,
) -> dict[str, Any]:
    """What the harness finds, called as its command line calls it."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and of what it imports
        import lm_eval
        import lm_eval.models  # noqa: F401
        from lm_eval.tasks import TaskManager

        from blindvalm_jax.lm_eval import adapter  # noqa: F401  registers the model

        manager = TaskManager(
            include_path=[str(TASKS), str(own_tasks)],
            include_defaults=False,
            metadata={"data": str(data)},
        )
        return lm_eval.simple_evaluate(
            model=model,
            model_args=dict(arguments),
            tasks=tasks,
            task_manager=manager,
            batch_size=1,
            device="cpu" if model == "hf" else None,
            bootstrap_iters=0,
            **flags,
        )


def sampled(found: Mapping[str, Any], task: str) -> list[Any]:
    """What was asked and answered, document by document."""
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def answered(found: Mapping[str, Any], task: str) -> list[Any]:
    """Responses to the requests of each document."""
    return [sample["filtered_resps"] for sample in sampled(found, task)]


@pytest.mark.torch
def test_our_numbers_are_those_of_hf(gpt2: Path, data: Path, own_tasks: Path) -> None:
    """1e-3 in log-likelihood, as the harness's users compare; greedy texts token by token."""
    tasks = ["blindvalm_memory_colors", "blindvalm_tnwit_height", "small_texts", "small_stories"]
    theirs = harness(
        "hf", {"pretrained": str(gpt2), "dtype": "float32"}, data, own_tasks, tasks=tasks
    )
    ours = harness("blindvalm", {"hf": str(gpt2)}, data, own_tasks, tasks=tasks)
    for task in tasks[:2]:
        mine, others = answered(ours, task), answered(theirs, task)
        for one, other in zip(mine, others, strict=True):
            np.testing.assert_allclose(
                [value for value, _ in one], [value for value, _ in other], atol=1e-3, rtol=0
            )
            assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
        assert ours["results"][task]["acc,none"] == theirs["results"][task]["acc,none"]
    texts = answered(ours, "small_texts"), answered(theirs, "small_texts")
    np.testing.assert_allclose(*texts, atol=1e-3, rtol=0)
    assert answered(ours, "small_stories") == answered(theirs, "small_stories")
    assert len({text for [text] in answered(ours, "small_stories")}) > 1


END = "<|endoftext|>"
PAIRS = [
    ("", f"{END}the cat"),
    ("", "the cat"),
    ("the cat", f" and{END}"),
    (f"{END}the cat", " and the"),
    (f"{END}the cat", " and"),
    ("the cat ", " and the"),
]
LONG = "then a naive green cat " * 12
GENERATIONS: list[dict[str, Any]] = [
    {"until": "e", "max_new_tokens": 7, "num_beams": 1},
    {"max_tokens": 5, "do_sample": False, "temperature": 0.7},
]


@pytest.mark.torch
@pytest.mark.parametrize("front", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_special_tokens_and_the_start_are_read_as_hf_reads_them(
    gpt2: Path, front: bool | None
) -> None:
    """1e-3 in log-likelihood; ids and greedy texts exactly."""
    harness_or_skip()
    from lm_eval.models.huggingface import HFLM

    from blindvalm_jax.lm_eval import adapter

    said: dict[str, Any] = {} if front is None else {"add_bos_token": front}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HFLM(pretrained=str(gpt2), dtype="float32", device="cpu", batch_size=1, **said)
    ours = adapter.BlindValm(hf=str(gpt2), **said)
    texts = ["", "the cat and", f"{END}the cat", f"the cat{END}then the ring", LONG]
    for text in texts:
        for special in (None, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), text
    pairs = requests("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = ours.loglikelihood(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose(
        [value for value, _ in found], [value for value, _ in expected], atol=1e-3, rtol=0
    )
    whole = requests("loglikelihood_rolling", *[(text,) for text in texts])
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(whole),
        theirs.loglikelihood_rolling(whole, disable_tqdm=True),
        atol=1e-3,
        rtol=0,
    )
    for asked in GENERATIONS:
        written = requests("generate_until", *[(text, asked) for text in texts[1:]])
        expected = theirs.generate_until(written, disable_tqdm=True)
        assert ours.generate_until(written) == expected, asked


def test_what_is_asked_of_a_generation() -> None:
    harness_or_skip()
    from blindvalm_jax.decoding.sampling import Sampling
    from blindvalm_jax.lm_eval.requests import Asked
    from blindvalm_jax.lm_eval.requests import asked as asked_of

    asked = functools.partial(asked_of, tokenizer=small_text.small_bpe())
    clip = asked_of({"until": ["\n\n", "a"]}, small_text.small_clip())
    assert clip == Asked(Sampling(), 256, ["a"]), "CLIP's tokenizer writes no line breaks"
    assert asked({"until": "\n\n"}).stop == ["\n\n"]

    assert asked({"until": [""]}) == Asked(Sampling(), 256, [])
    assert asked({"until": ["", "a"], "max_tokens": 3, "top_k": 5}) == Asked(Sampling(), 3, ["a"])
    assert asked({"max_completion_tokens": 5}).new == 5
    assert asked({"until": ("a", "b")}) == asked({"until": ["a", "b"]})
    assert asked({"temperature": 1, "top_p": 0.5}).sampling == Sampling(temperature=1, top_p=0.5)
    nothing = {"until": None, "do_sample": None, "temperature": None, "top_k": None}
    assert asked(nothing) == asked({})
    assert asked({"do_sample": True, "temperature": None}).sampling == Sampling(temperature=1)
    unused = {"do_sample": True, "temperature": 0, "top_p": 0.9}
    assert asked(unused) == asked({}), "temperature 0 takes the likeliest"
    drawn = {"temperature": 0.5, "top_k": 5, "until": "a"}
    assert asked(drawn) == Asked(Sampling(temperature=0.5, top_k=5), 256, ["a"])
    for wrong, message in (
        ({"num_beams": 2}, "num_beams=2 is asked for: blindvalm has no beam search"),
        ({"length_penalty": 2}, "generation with length_penalty is asked for; blindvalm knows"),
        ({"until": 5}, "generation with until=5 is asked for: expected a text, or a list of texts"),
        ({"until": ["a", 5]}, r"with until=\['a', 5\] is asked for: expected a text, or a list"),
        ({"until": {"a": 1}}, r"with until=\{'a': 1\} is asked for: expected a text, or a list"),
        ({"temperature": "0.5"}, "with temperature='0.5' is asked for: expected a number"),
        ({"do_sample": True, "temperature": True}, "temperature=True is asked for: expected a n"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many' is asked for: expected a whole number"),
        ({"max_gen_toks": 4.7}, "max_gen_toks=4.7 is asked for: expected a whole number"),
        ({"max_tokens": True}, "max_tokens=True is asked for: expected a whole number"),
        ({"do_sample": True, "top_k": 2.5}, "top_k=2.5 is asked for: expected a whole number"),
        ({"do_sample": "no"}, "do_sample='no' is asked for: expected true or false"),
        ({"do_sample": True, "min_p": "low"}, "min_p='low' is asked for: expected a number"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            asked(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "max_length=0: expected a number of tokens, 1 or more"),
        ({"max_length": -3}, "max_length=-3: expected"),
        ({"max_length": "many"}, "max_length=many: expected"),
        ({"tokens_at_once": 0}, "tokens_at_once=0: expected"),
        ({"tokens_at_once": None}, "tokens_at_once=None: expected"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0 to 2147483647"),
        ({"seed": 0.5}, "seed=0.5: expected"),
        ({"add_bos_token": "no"}, "add_bos_token=no: expected true or false"),
        ({"dtype": "auto"}, "dtype must be one of float32, bfloat16, got 'auto'"),
        ({"hf": 5}, r"hf must be a text, got 5 \(int\)"),
    ],
)
def test_model_arguments_that_are_none(arguments: dict[str, Any], message: str) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    with pytest.raises(UserError, match=message) as caught:
        adapter.BlindValm(**{"hf": "nowhere", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.torch
def test_a_row_of_one_token_is_the_shortest(gpt2: Path) -> None:
    """Of a context nothing but its last token is read."""
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    model = adapter.BlindValm(hf=str(gpt2), max_length=1)
    [(cut, _), (bare, _)] = model._loglikelihood_tokens([(None, [7, 5, 9], [3]), (None, [9], [3])])
    assert cut == bare


@pytest.mark.torch
@pytest.mark.slow
def test_tasks_that_a_config_file_includes_are_found(
    gpt2: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import command

    settings = {
        "model": "blindvalm",
        "model_args": {"hf": str(gpt2)},
        "tasks": ["small_texts"],
        "include_path": str(own_tasks),
        "output_path": str(tmp_path / "out"),
    }
    file = tmp_path / "run.json"  # which is YAML too
    file.write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--config", str(file)])
    # Put back afterwards: other tests read what is logged.
    monkeypatch.setattr(logging.getLogger("blindvalm_jax.lm_eval"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command.run()
    [written] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["n-samples"]["small_texts"]["effective"] == 3


def test_the_flag_stands_before_the_config_file(tmp_path: Path) -> None:
    """As all flags of the harness do."""
    harness_or_skip()
    from blindvalm_jax.lm_eval import command

    file = tmp_path / "run.json"
    for named, flag, expected in (
        ("a", None, ["a"]),
        (["a", "b"], None, ["a", "b"]),
        (["a", "b"], "c", ["c"]),
        (None, None, []),
    ):
        file.write_text(json.dumps({"include_path": named}))
        arguments = argparse.Namespace(command="run", config=str(file), include_path=flag)
        assert command.included(arguments) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "x", "--log_samples"], "lm-evaluation-harness: Specify --output_path if pro"),
        (["--tasks", "x", "--metadata", '{"data": '], "lm-evaluation-harness: Invalid JSON: "),
        (["run", "--config", "nowhere.yaml"], "lm-evaluation-harness: Config file not found: .*"),
        (["run", "--config", "wrong.yaml"], "wrong.yaml has taks; the harness knows config, mod"),
        (["run", "--config", "open.yaml"], "lm-evaluation-harness: Invalid YAML in open.yaml: "),
        pytest.param(
            *(["--tasks", "nothing"], "lm-evaluation-harness: Tasks not found: nothing"),
            marks=pytest.mark.slow,  # it reads all its tasks
        ),
    ],
)
def test_what_the_harness_refuses_is_one_line(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import command

    (tmp_path / "wrong.yaml").write_text("taks: [x]\n")
    (tmp_path / "open.yaml").write_text("[\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given])
    # Put back afterwards: other tests read what is logged.
    monkeypatch.setattr(logging.getLogger("blindvalm_jax.lm_eval"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=message) as caught:
            command.run()
    assert "\n" not in str(caught.value)


def test_an_error_that_is_no_refusal_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of our own, and one of the harness's reading that it does not raise in so many words."""
    harness_or_skip()
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from blindvalm_jax.lm_eval import command

    monkeypatch.setattr(logging.getLogger("blindvalm_jax.lm_eval"), "propagate", True)
    wrong: Any = 5
    for fail in (lambda: int("x"), EvaluatorConfig(model_args=wrong)._process_arguments):
        monkeypatch.setattr(command, "_execute", fail)
        with pytest.raises((ValueError, TypeError)) as caught:
            command.run()
        assert not isinstance(caught.value, UserError)


@pytest.mark.torch
def test_what_the_model_writes_is_greedy(gpt2: Path) -> None:
    """Its own text counts as greedy, the same with another token in any place does not."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
    from blindvalm_jax import trained
    from blindvalm_jax.decoding import generation
    from blindvalm_jax.lm_eval import adapter

    [written] = generation.generate(trained.from_weights(gpt2), ["the cat"], max_new_tokens=6)
    model = adapter.BlindValm(hf=str(gpt2))
    context = model.tok_encode("the cat", add_special_tokens=True)
    others = [
        [*written.tokens[:place], written.tokens[place] + 1, *written.tokens[place + 1 :]]
        for place in range(len(written.tokens))
    ]
    texts = [written.tokens, *others, written.tokens[:1], [written.tokens[0] + 1]]
    found = model._loglikelihood_tokens([(None, context, text) for text in texts])
    assert [greedy for _, greedy in found] == [True, *[False] * len(others), True, False]


@pytest.mark.torch
def test_the_harness_counts_what_evaluate_counts(gpt2: Path, data: Path, own_tasks: Path) -> None:
    from blindvalm_jax import trained

    task = "tnwit_height"
    model = trained.from_weights(gpt2)
    protocol = catalog.TASKS[task].protocols["corrected"]
    questions = protocol.questions(protocol.items(data))
    expected = answers.answer(Scorer(model), model.tokenizer, protocol, questions)
    found = harness(
        "blindvalm",
        {"hf": str(gpt2), "add_bos_token": True},
        data,
        own_tasks,
        tasks=[f"blindvalm_{task}"],
    )
    by_prompt = dict(zip([question.prompt for question in questions], expected.scores, strict=True))
    samples = sampled(found, f"blindvalm_{task}")
    assert len(samples) == len(by_prompt)
    for sample in samples:
        values = [value for value, _ in sample["filtered_resps"]]
        scores = by_prompt[sample["doc"]["prompt"]]
        np.testing.assert_allclose(values, scores, atol=1e-4, rtol=0)
    accuracy = expected.right["continuation"].mean()
    assert found["results"][f"blindvalm_{task}"]["acc,none"] == pytest.approx(accuracy)


def test_examples_are_about_other_things(tmp_path: Path, own_tasks: Path) -> None:
    """No template of the question, no pair with a thing of it, no other row of its text."""
    harness_or_skip()
    from lm_eval.utils import handle_non_serializable

    data = small_tasks.write(tmp_path / "data")
    things = ["bug", "cod", "dog", "fig", "gnu", "hen"]
    pairs = [(a, b) for n, a in enumerate(things) for b in things[n + 1 :]]
    rows = [{"obj_a": a, "obj_b": b, "label": 1} for a, b in pairs]
    (data / "tnwit_height.json").write_text("\n".join(map(json.dumps, rows)))
    reviews = [{"text": text, "label": "Positive"} for text in ("good", "fine", " good", "well")]
    (data / "sst2_test.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    tasks = {"memory_colors": 20, "tnwit_height": 20, "sst2": 2}
    for task, shots in tasks.items():
        name = f"blindvalm_{task}"
        found = harness("dummy", {}, data, own_tasks, tasks=[name], num_fewshot=shots)
        for sample in sampled(found, name):
            own = sample["doc"]
            *examples, asked = sample["arguments"][0][0].split("\n\n")
            assert asked == own["prompt"]
            assert len(examples) == shots
            if task == "tnwit_height":
                words = own["candidates"]
            elif task == "sst2":
                words = [asked.split()[1]]
            else:
                words = [thing for thing in small_tasks.THINGS if thing in asked]
            assert words
            for word in words:
                assert not re.search(rf"\b{word}\b", " ".join(examples)), (asked, examples)
        written = {key: value for key, value in found.items() if key != "samples"}
        assert json.dumps(written, default=handle_non_serializable)
    few = "--num_fewshot=4: 3 questions are about other things than 0: ask for fewer"
    (data / "sst2_test.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": "Positive"}) for text in "abcd")
    )
    with pytest.raises(UserError, match=few):
        harness("dummy", {}, data, own_tasks, tasks=["blindvalm_sst2"], num_fewshot=4)


def test_a_limit_is_of_whole_items(data: Path, own_tasks: Path) -> None:
    harness_or_skip()
    name = "blindvalm_memory_colors"
    found = harness("dummy", {}, data, own_tasks, tasks=[name], limit=18)
    asked = [(sample["doc"]["item"], sample["doc"]["template"]) for sample in sampled(found, name)]
    assert asked == [(item, template) for item in "12" for template in range(9)]


def test_a_tower_with_a_tokenizer_of_its_own_is_asked_choices(
    aligned: dict[str, Any], data: Path
) -> None:
    """As `evaluate` asks them, 1e-5: the rows are the same."""
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    model = NamedModel(**aligned).load(mesh=partitioning.make_mesh(MeshConfig()))
    protocol = catalog.TASKS["tnwit_height"].protocols["corrected"]
    questions = protocol.questions(protocol.items(data))[:6]
    expected = answers.answer(Scorer(model), model.tokenizer, protocol, questions).scores
    pairs = [
        (question.prompt, f" {word}") for question in questions for word in question.candidates
    ]
    found = adapter.BlindValm(**aligned).loglikelihood(
        requests("loglikelihood", *pairs), disable_tqdm=True
    )
    np.testing.assert_allclose(
        [value for value, _ in found], np.concatenate(expected), atol=1e-5, rtol=0
    )
    assert len({round(value, 3) for value, _ in found}) > 6


def test_a_tower_with_a_tokenizer_of_its_own_is_asked_texts(aligned: dict[str, Any]) -> None:
    """A text that fits in a window is scored as `evaluate` does, 1e-4 of a sum, and written on."""
    harness_or_skip()
    from lm_eval.api.model import CacheHook, hash_args

    from blindvalm_jax.lm_eval import adapter

    asked = adapter.BlindValm(**aligned)
    text = "the red ring, and then; the cat"
    kept: dict[str, float] = {}
    hook = CacheHook(None)
    hook.dbdict = kept
    asked.set_cache_hook(hook)
    [total] = asked.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert kept == {hash_args("loglikelihood_rolling", (text,)): total}
    assert asked.loglikelihood_rolling([]) == []
    [nothing] = asked.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)))
    assert (nothing, type(nothing)) == (0.0, float)
    model = NamedModel(**aligned).load(mesh=partitioning.make_mesh(MeshConfig()))
    own = perplexity.AskedTexts("own", "here", "text", [text], None, Windows())
    outcome = own.run(Scorer(model), model.tokenizer)
    assert total == pytest.approx(-outcome.lines[0]["nats"], abs=1e-4)
    [written] = asked.generate_until(requests("generate_until", (text, {"max_gen_toks": 4})))
    expected = Generator(model).generate([text], max_new_tokens=4).texts[0]
    assert written == expected.text
    assert len(expected.tokens) == 4


@pytest.mark.parametrize("positions", [pytest.param("learned", marks=pytest.mark.torch), "any"])
def test_a_long_prompt_is_scored_as_evaluate_scores_it(
    positions: str,
    data: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """1e-4, with the arguments that hold where none are given.

    Where positions are learned it is cut: for each candidate by its own length, as `hf` does, and
    by `evaluate` for all by that of the longest.
    """
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    learned = positions == "learned"
    named: dict[str, Any]
    if learned:
        named = {"hf": str(request.getfixturevalue("gpt2"))}
    else:
        named = request.getfixturevalue("sinusoidal")
    model = NamedModel(**named).load(mesh=partitioning.make_mesh(MeshConfig()))
    protocol = catalog.TASKS["tnwit_height"].protocols["corrected"]
    questions = [
        dataclasses.replace(question, prompt=f"the {question.item} {LONG * 3}{question.prompt}")
        for question in protocol.questions(protocol.items(data))[:3]
    ]
    expected = answers.answer(Scorer(model), model.tokenizer, protocol, questions)
    asked = adapter.BlindValm(**named)
    contexts = [len(asked.tok_encode(question.prompt)) for question in questions]
    assert min(contexts) > asked.max_length
    pairs = [
        (question.prompt, f" {word}") for question in questions for word in question.candidates
    ]
    found = asked.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    sizes = np.array([len(asked.tok_encode(word, add_special_tokens=False)) for _, word in pairs])
    sizes = sizes.reshape(len(questions), -1)
    same = (sizes == sizes.max(axis=1, keepdims=True)) | (not learned)
    values = np.array([value for value, _ in found]).reshape(sizes.shape)
    np.testing.assert_allclose(values[same], np.array(expected.scores)[same], atol=1e-4, rtol=0)
    assert expected.cut == (len(questions) if learned else 0)
    told = f"{len(pairs)} of {len(pairs)} contexts lose their beginning"
    assert (told in caplog.text) == learned


def test_where_no_row_has_an_end_the_whole_context_is_continued(
    sinusoidal: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    text = "the cat sat " + LONG * 3
    asked = adapter.BlindValm(**sinusoidal)
    assert len(asked.tok_encode(text)) > asked.max_length
    [written] = asked.generate_until(requests("generate_until", (text, {"max_gen_toks": 5})))
    assert "lose their beginning" not in caplog.text
    short = adapter.BlindValm(**sinusoidal, max_length=20)
    [cut] = short.generate_until(requests("generate_until", (text, {"max_gen_toks": 5})))
    assert "1 of 1 contexts lose their beginning: rows have up to 20 tokens" in caplog.text
    ids = np.array(asked.tok_encode(text), np.int32)
    whole = Generator(NamedModel(**sinusoidal).load(), start=False)
    expected = whole.generate([ids, ids[-15:]], max_new_tokens=5).texts
    assert [written, cut] == [one.text for one in expected]
    assert written != cut
    with pytest.raises(UserError, match="max_gen_toks=20 leaves no room .* max_length=20"):
        short.generate_until(requests("generate_until", (text, {"max_gen_toks": 20})))


def test_what_is_asked_again_is_drawn_again(
    sinusoidal: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the harness asks for `repeats`; a seed gives the same again, in parts of any size."""
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    repeated = requests("generate_until", *[(text, drawn) for text in ("the", "a cat", "") * 3])
    first = adapter.BlindValm(**sinusoidal, seed=3)
    texts = first.generate_until(repeated)
    for number in range(3):
        assert len(set(texts[number::3])) == 3
    sizes = []
    generate = Generator.generate

    def counted(self: Generator, prompts: Any, **how: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, **how)

    monkeypatch.setattr(Generator, "generate", counted)
    monkeypatch.setattr(adapter, "_TOGETHER", 1)
    assert adapter.BlindValm(**sinusoidal, seed=3).generate_until(repeated) == texts
    assert sizes == [8, 8], "the last part is filled up: one program for all"
    [later] = first.generate_until(repeated[:1])
    assert later not in texts[::3]
    [other] = adapter.BlindValm(**sinusoidal, seed=4).generate_until(repeated[:1])
    assert other not in texts[::3]


def test_the_seed_is_what_the_harness_s_seed_makes_it(
    sinusoidal: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The harness seeds numpy's generator before it reads a model; tasks find it as it was."""
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    found = []
    for seed in (1234, 1234, 7):
        np.random.seed(seed)
        found.append(adapter.seed_of_numpy())
        assert found[-1] == np.random.RandomState(seed).randint(1 << 31)
    assert np.random.randint(1 << 31) == found[2] != found[0] == found[1]
    np.random.seed(7)
    with caplog.at_level("INFO"):
        adapter.BlindValm(**sinusoidal)
        adapter.BlindValm(**sinusoidal, seed=5)
    assert f"draws of seed {found[2]};" in caplog.text
    assert "draws of seed 5;" in caplog.text


def test_with_clip_s_tokens_too_the_literal_separates_documents(
    sinusoidal: dict[str, Any],
) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    asked = adapter.BlindValm(**sinusoidal)
    [end], cat, ring = (asked.tok_encode(text, False) for text in (END, "the cat", "ring"))
    assert end == asked.eot_token_id
    for special, front in ((None, []), (False, []), (True, [end])):
        assert asked.tok_encode(f"{END}the cat", special) == [*front, end, *cat]
    assert asked.tok_encode(f"the cat{END}ring") == [end, *cat, end, *ring]


def test_a_chat_template_is_refused_in_one_line(sinusoidal: dict[str, Any]) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import adapter

    asked = adapter.BlindValm(**sinusoidal)
    for ask in (lambda: asked.tokenizer_name, lambda: asked.apply_chat_template([])):
        with pytest.raises(UserError, match="no chat template: leave out --apply_chat_template"):
            ask()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "interrupted; nothing was written; --use_cache keeps answers"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), "out of device memory; .*harness"),
    ],
    ids=["interrupted", "memory"],
)
def test_the_command_ends_with_one_line(
    error: BaseException,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harness_or_skip()
    from blindvalm_jax.lm_eval import command

    def run() -> None:
        raise error

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("blindvalm_jax.lm_eval", run_name="__main__")
    assert end.value.code == 1
    assert re.fullmatch(f"error: {told}.*\n", capsys.readouterr().err)


def test_every_task_of_choices_is_there_for_the_harness() -> None:
    asked = {name for name, task in catalog.TASKS.items() if "corrected" in task.protocols}
    assert {path.stem for path in TASKS.glob("[a-z]*.yaml")} == asked
    for name in asked:
        lines = (TASKS / f"{name}.yaml").read_text().splitlines()
        assert f"task: blindvalm_{name}" in lines
        assert f"  task: {name}" in lines
    for group in ("vlu", "nlu"):
        listed = (TASKS / f"_{group}.yaml").read_text()
        of_group = {task.name for task in catalog.TASKS.values() if task.group == group}
        names = {
            line.removeprefix("  - blindvalm_") for line in listed.splitlines() if "- " in line
        }
        assert names == of_group & asked


def test_without_the_harness_the_command_says_what_to_install() -> None:
    hidden = "import sys, runpy; sys.modules['lm_eval'] = None; "
    run = "runpy.run_module('blindvalm_jax.lm_eval', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hidden + run], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: lm-evaluation-harness is not installed: pip install 'blindvalm_jax[harness]'\n"
    )


@pytest.mark.torch
@pytest.mark.slow
def test_the_command_line_is_the_harness_s_own(gpt2: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
    command = [sys.executable, "-m", "blindvalm_jax.lm_eval"]
    asked = ["--model_args", f"hf={gpt2}", "--tasks", "blindvalm_memory_colors"]
    given = [*asked, "--metadata", json.dumps({"data": str(data)}), "--output_path", str(tmp_path)]
    given += ["--seed", "7"]
    done = subprocess.run(
        [*command, *given], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    drawn = np.random.RandomState(7).randint(1 << 31)
    [line] = [line for line in done.stderr.splitlines() if f"draws of seed {drawn};" in line]
    assert "INFO" in line, "as the harness shows its own"
    [file] = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["model"] == "blindvalm"
    assert found["n-samples"]["blindvalm_memory_colors"]["effective"] == 36
    wrong = subprocess.run(
        [*command, "--model_args", f"hf={gpt2},temperature=2", "--tasks", asked[-1], *given[4:6]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("error: --model_args has temperature;")
