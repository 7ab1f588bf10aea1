"""lm-evaluation-harness with our models: the numbers of its own `hf`, and those of `evaluate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.tasks import answers, catalog
from blindvalm_jax.tasks.scoring import Scorer
from tests import small_models, small_tasks, tiny_tokenizers

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


def harness(
    model: str, arguments: Mapping[str, Any], data: Path, own_tasks: Path, *, tasks: list[str]
) -> dict[str, Any]:
    """What the harness finds, called as its command line calls it."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm_eval]'")
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
        )


def answered(found: Mapping[str, Any], task: str) -> list[Any]:
    """Responses to the requests of each document."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


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


@pytest.mark.torch
def test_what_the_model_writes_is_greedy(gpt2: Path) -> None:
    """Its own text counts as greedy, the same with another token in any place does not."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm_eval]'")
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
    for one, scores in zip(answered(found, f"blindvalm_{task}"), expected.scores, strict=True):
        np.testing.assert_allclose([value for value, _ in one], scores, atol=1e-4, rtol=0)
    accuracy = expected.right["continuation"].mean()
    assert found["results"][f"blindvalm_{task}"]["acc,none"] == pytest.approx(accuracy)


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
        "error: lm-evaluation-harness is not installed: pip install 'blindvalm_jax[lm_eval]'\n"
    )


@pytest.mark.torch
@pytest.mark.slow
def test_the_command_line_is_the_harness_s_own(gpt2: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm_eval]'")
    command = [sys.executable, "-m", "blindvalm_jax.lm_eval"]
    asked = ["--model_args", f"hf={gpt2}", "--tasks", "blindvalm_memory_colors"]
    given = [*asked, "--metadata", json.dumps({"data": str(data)}), "--output_path", str(tmp_path)]
    done = subprocess.run(
        [*command, *given], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
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
