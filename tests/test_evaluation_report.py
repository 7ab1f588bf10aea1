"""The page of an evaluation, the printed figures beside it, and variants that only those have."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, evaluation, published, report, results
from blindvalm_jax.tasks.answers import Answers
from tests import small_tasks, test_compare

# Names of metrics in the logs' file, by task.
METRICS = {
    "memory_colors": "memory_colors",
    "memory_colors_valm": "memory_colors_VALM_prompts",
    "color_terms": "color_terms",
    "color_terms_valm": "color_terms_VALM_prompts(literal [DESCRIPTOR] left in)",
    "vicomte_color_all": "vicomte_color_all_obj",
    "vicomte_color_all_alt": "vicomte_color_all_alt",
    "vicomte_color_single": "vicomte_color_single_obj",
    "vicomte_color_single_alt": "vicomte_color_single_alt",
    **{f"shapeit{p}": f"shapeit_{q}_mean" for p, q in (("", "p1"), ("_p0", "p0"), ("_p2", "p2"))},
    **{
        f"shapeit{p}/sum_from_one": f"shapeit_{q}_sum"
        for p, q in (("", "p1"), ("_p0", "p0"), ("_p2", "p2"))
    },
    **{
        f"{name}{suffix}": f"{name}_{prompts}_mean"
        for name in ("relative_size", "vicomte_size", "tnwit_size", "tnwit_height")
        for suffix, prompts in (("", "P1"), ("_than", "P2"))
    },
    "sst2": "sst2_bad_labels",
    "mpqa": "mpqa_2000",
    "mpqa_all": "mpqa_10606",
    "agnews": "agnews",
    "dbpedia": "dbpedia",
    "lambada": "lambada_acc",
    "wikitext103": "ppl wikitext-103/test (2,891 lines)",
    "lambada_perplexity": "ppl lambada/test (5,153 lines)",
}
CHECKPOINTS = {
    "GPT-2 123M": "gpt_blind_lrx4_40600upd",
    "BLIND 124M": "valmA100_40600upd_lrx4",
    "BLIND 124M, more updates": "valmA100_40600upd_lrx4_more",
    "BLIND 355M": "valmA100_40600upd_small",
    "BLIND 775M": "valmA100_40600upd_medium",
    "GPT-2 772M": "gpt_medium_lrx4_40600upd",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tasks.write(tmp_path_factory.mktemp("reported") / "tasks")


def constant(directory: Path, data: Path, name: str, way: str) -> Path:
    """An evaluation of a model that always gives the first answer."""
    task = catalog.TASKS[name]
    protocol = task.protocols[way]
    items = protocol.items(data)
    questions = protocol.questions(items)
    chosen = np.zeros(len(questions), int)
    right = chosen == np.array([question.answer for question in questions])
    scores = [np.zeros(len(question.candidates)) for question in questions]
    ways = dict.fromkeys(protocol.scores, chosen), dict.fromkeys(protocol.scores, right)
    said = Answers(scores, *ways, 2)
    entry = {"protocol": way, **results.summary(task, protocol, items, questions, said)}
    return test_compare.save(directory, name, entry, list(results.lines(questions, said, protocol)))


def test_the_page_names_what_is_always_answered(data: Path, tmp_path: Path) -> None:
    out = constant(tmp_path / "a", data, "memory_colors", "corrected")
    test_compare.answered(out, data, seed=1, name="tnwit_height")
    found, place = results.read(out)
    page = report.write(found, place).read_text()
    assert "- memory_colors: “yellow” in 100.0% of the answers, right in 25.0%" in page
    assert "- tnwit_height: “" not in page
    assert "2 prompts lost their beginning." in page
    assert "was asked under `corrected` and reads `clip` tokens: **not like with like**" in page
    figures = re.findall(r"\]\((figures/.*?)\)", page)
    assert len(figures) == 3
    for figure in figures:
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    assert [*found["tasks"]["memory_colors"]["answers"].values()] == [[0, 9], [0, 18], [36, 9]]
    before = {path.name: path.read_bytes() for path in out.rglob("*.png")}
    report.write(found, place)
    assert {path.name: path.read_bytes() for path in out.rglob("*.png")} == before
    found["tasks"]["memory_colors"]["answers"]["$a_{$"] = [1, 1]  # no formula
    report.write(found, place)


def test_sizes_are_doubled_beside_doubled_figures(data: Path, tmp_path: Path) -> None:
    out = constant(tmp_path / "a", data, "tnwit_height", "published")
    entry = results.read(out)[0]["tasks"]["tnwit_height"]
    assert (entry["score"], entry["majority"], entry["random"]) == (0.25, 0.25, 0.25)
    page = report.write(*results.read(out)).read_text()
    row = next(line for line in page.splitlines() if line.startswith("| tnwit_height |"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["50.00", "52", "50.64"]
    assert "this model was asked and reads alike" in page
    assert "- each answer is counted twice in the total" in page


def test_perplexities_have_a_panel_and_a_line(tmp_path: Path) -> None:
    tokens = np.array([20, 30])
    out = test_compare.read_texts(tmp_path / "a", 3.0 * tokens, tokens)
    found, place = results.read(out)
    more = {"tokens": 50, "nats_per_token": 3.0, "bits_per_byte": None, "word_perplexity": 55.5}
    found["tasks"]["wikitext103"] |= more
    found["grounding"] = {"source": "text", "readout": "eos", "images": None}
    page = report.write(found, place).read_text()
    assert "50 tokens of 2 documents, in windows of 32 tokens, 16 apart; 0 left out." in page
    assert "nats per token 3, perplexity by word 55.5." in page
    assert "Grounding: source text, readout eos." in page
    assert "| 43.44 / 43.46 / 48.63 |" in page
    found["tasks"]["wikitext103"] |= {"score": None, "interval": [12.5, None], "majority": 20.0}
    page = report.write(found, place).read_text()
    assert "| corrected | – | – | [12.5, –] | 20 | 320 | 2 |" in page
    assert "Better than the majority with their whole interval: none." in page


def test_what_lacks_something_is_refused(data: Path, tmp_path: Path) -> None:
    out = constant(tmp_path / "a", data, "memory_colors", "corrected")
    path = out / "results.json"
    found = json.loads(path.read_text())
    del found["tokenizer"], found["tasks"]["memory_colors"]["random"]
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"lacks tokenizer: evaluate again"):
        results.read(out)
    found["tokenizer"] = "clip"
    path.write_text(json.dumps(found))
    line = [sys.executable, "-m", "blindvalm_jax.evaluate", "report", str(out)]
    done = subprocess.run(line, cwd=test_compare.ROOT, capture_output=True, text=True)
    assert done.stderr == f"error: {path} lacks memory_colors.random: evaluate again to have it\n"
    for name, value, message in (
        ("tasks", {}, "has the results of no task"),
        ("tasks", {"../a": {}}, 'has "../a", which is no name of a task'),
        ("grounding", {"images": 5}, "grounding.images must be a table or null, got 5"),
    ):
        path.write_text(json.dumps({**found, name: value}))
        with pytest.raises(UserError, match=re.escape(message)):
            results.read(out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("", 5, "has 5 as wikitext103, expected a table"),
        ("interval", None, "has null as wikitext103.interval, expected two numbers or nulls"),
        ("interval", [1.0], "expected two numbers or nulls"),
        ("metric", "f1", 'has "f1" as wikitext103.metric, expected accuracy or perplexity'),
        ("metric", [], "expected accuracy or perplexity"),
        ("score", True, "has true as wikitext103.score, expected a number"),
        ("n", 2.5, "has 2.5 as wikitext103.n, expected a whole number"),
        ("nats_per_token", "absent", "lacks wikitext103.nats_per_token: evaluate again"),
        ("prompts", ["a"], "has other numbers of wikitext103.prompts and wikitext103.per_prompt"),
        ("answers", {"red": [1]}, "expected a table of pairs of whole numbers"),
        ("beside", {"sum": 0.5}, "lacks wikitext103.scored_by"),
        ("lines", 5, "expected a table with sha256"),
        ("score", math.nan, "has NaN as wikitext103.score, expected a number"),
        ("random", 10**400, "as wikitext103.random, expected a number"),
        ("n", 10**400, "as wikitext103.n, expected a whole number"),
        ("answers", {"a": [0, 0]}, "expected a table of pairs of whole numbers, not all 0"),
        ("answers", {}, "expected a table of pairs of whole numbers, not all 0"),
        ("file", {"name": "a"}, "expected a table with name and sha256, or null"),
        ("bytes", math.inf, "has a number in wikitext103 that is not finite"),
    ],
)
def test_entries_that_are_none_are_refused(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    tokens = np.array([20, 30])
    path = test_compare.read_texts(tmp_path / "a", 3.0 * tokens, tokens) / "results.json"
    found = json.loads(path.read_text())
    entry = found["tasks"]["wikitext103"]
    found["tasks"]["wikitext103"] = {**entry, name: value} if name else value
    if value == "absent":
        del found["tasks"]["wikitext103"][name]
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        results.read(path.parent)
    assert "\n" not in str(caught.value)


def test_printed_figures_are_those_of_the_logs(shared: Path) -> None:
    path = shared / "data" / "author_logs_eval_metrics.json"
    logs: dict[str, Any] = json.loads(path.read_text())["results"]
    checked = 0
    for key, metric in METRICS.items():
        name, _, way = key.partition("/")
        own = [figure for figure in published.of(name) if figure.way == way]
        for model, checkpoint in CHECKPOINTS.items():
            logged = logs[f"checkpoint_{checkpoint}"].get(metric, [])
            expected = list(dict.fromkeys(entry.get("acc", entry.get("ppl")) for entry in logged))
            found = [list(figure.values) for figure in own if figure.model == model]
            assert found == ([expected] if expected else []), (key, model)
            checked += len(expected)
    assert checked == sum(
        len(figure.values)
        for name in {key.partition("/")[0] for key in METRICS}
        for figure in published.of(name)
        if figure.source == "C"
    )


def test_a_group_has_the_tasks_that_know_the_protocol(shared: Path) -> None:
    place = shared / "data" / "eval"
    groups = {way: evaluation.read(["vlu"], way, place) for way in evaluation.PROTOCOLS}
    names = {way: {one.name for one in asked} for way, asked in groups.items()}
    assert names["published"] - names["corrected"] == {
        *("memory_colors_valm", "color_terms_valm"),
        *("vicomte_color_all_alt", "vicomte_color_single_alt"),
    }
    with pytest.raises(UserError, match="color_terms_valm has no protocol 'corrected': take"):
        evaluation.read(["color_terms_valm"], "corrected", place)
    [valm] = evaluation.read(["color_terms_valm"], "published", place)
    assert isinstance(valm, evaluation.AskedChoice)
    assert valm.questions[0].prompt == "Q: What is the color of [DESCRIPTOR] ash? A: It is"
    [wrong] = evaluation.read(["vicomte_color_single_alt"], "published", place)
    assert isinstance(wrong, evaluation.AskedChoice)
    first = wrong.questions[0]
    assert first.prompt == "pine tree can be of color "
    assert first.candidates[first.answer] == "yellow"
