"""The page of an evaluation, the printed figures beside it, and variants that only those have."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, evaluation, identity, published, report, results, standing
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


HEAD = {"model": "a", "step": 3, "weights_sha256": "0" * 64}
OTHER = {**HEAD, "step": 4}


def settle(out: Path, head: dict[str, Any], protocol: str = "corrected", **more: Any) -> list[str]:
    """Names of the tasks that a directory then has of a model and protocol."""
    given = {"names": ["memory_colors"], "in_training": False, **more}
    return [*standing.settle(out, head, protocol=protocol, **given)]


def evaluated(out: Path, data: Path, task: str, way: str = "corrected", **more: Any) -> Path:
    """Results of `HEAD` with their page; more: of the head."""
    constant(out, data, task, way)
    found = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps({**found, **HEAD, **more}))
    report.write(*results.read(out))
    return out


def files_in(out: Path) -> dict[Path, bytes]:
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def name_of(head: dict[str, Any], protocol: str = "corrected") -> str:
    return identity.name({**head, "protocol": protocol})


def test_results_of_others_are_put_aside_and_come_back(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another protocol as of another model: nothing is lost, nor anything else touched."""
    out = evaluated(tmp_path / "eval", data, "tnwit_height", "published")
    mine = [out / "notes.jsonl", out / "figures" / "compare.png", out / "before" / "mine.txt"]
    (out / "before").mkdir()
    for path in mine:
        path.write_text("mine")
    kept = files_in(out)
    assert settle(out, {**HEAD, "model": "moved"}, "published") == ["tnwit_height"]
    assert not capsys.readouterr().err
    assert files_in(out) == kept
    turns = [(HEAD, "corrected", "protocol 'published', now 'corrected'"), (OTHER, "published", "")]
    for number, (head, protocol, differs) in enumerate(turns):
        assert settle(out, head, protocol) == []
        aside = out / "before" / name_of(HEAD, "published")
        assert f"held tnwit_height of {differs or 'step 3, now 4'}: they are in {aside} now" in (
            capsys.readouterr().err
        )
        assert {path for path in files_in(out) if "before" not in path.parts} == {
            path.relative_to(out) for path in mine[:2]
        }
        assert [*results.read(aside)[0]["tasks"]] == ["tnwit_height"]
        evaluated(out, data, "memory_colors", protocol, **head)
        assert settle(out, HEAD, "published") == ["tnwit_height"]
        assert f"what was asked in {aside} before is in {out} again" in capsys.readouterr().err
        there = {path for path in files_in(out) if path not in kept}
        assert {path.parts[0] for path in there} == {"before"}
        assert {path.parts[1] for path in there} == {
            name_of(*turn[:2]) for turn in turns[: number + 1]
        }
        assert {path: content for path, content in files_in(out).items() if path in kept} == kept


def test_nothing_is_put_aside_over_what_is_there(data: Path, tmp_path: Path) -> None:
    """Such as an older copy, or files of the user's."""
    out = evaluated(tmp_path / "eval", data, "memory_colors")
    for name in ("results.json", "memory_colors.jsonl"):
        aside = out / "before" / name_of(HEAD)
        aside.mkdir(parents=True, exist_ok=True)
        (aside / name).write_text("mine")
        assert settle(out, OTHER) == []
        assert (aside / name).read_text() == "mine"
        number = 2 + (name != "results.json")
        assert results.read(out / "before" / f"{name_of(HEAD)}_{number}")[0]["step"] == 3
        evaluated(out, data, "memory_colors")


@pytest.mark.parametrize("in_training", [False, True])
def test_files_that_no_results_account_for_are_left_alone(
    data: Path, tmp_path: Path, in_training: bool
) -> None:
    out = tmp_path / "eval"
    ours = ["memory_colors.jsonl"]
    ours += [] if in_training else ["report.md", "figures/scores.png", "figures/memory_colors.png"]
    for name in ours:
        (out / "figures").mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} would be written over, and no results.json"):
            settle(out, HEAD, in_training=in_training)
        assert files_in(out) == {Path(name): b"mine"}
        shutil.rmtree(out)
    evaluated(out, data, "tnwit_height")
    (out / "memory_colors.jsonl").mkdir()
    with pytest.raises(UserError, match=r"memory_colors.jsonl would be written over"):
        settle(out, HEAD, in_training=in_training)
    (out / "memory_colors.jsonl").rmdir()
    settle(out, OTHER)
    (out / "tnwit_height.jsonl").write_text("mine")  # in the way of what would come back
    with pytest.raises(UserError, match=r"tnwit_height.jsonl would be written over"):
        settle(out, HEAD)
    if not in_training:
        (out / "figures").write_text("mine")
        with pytest.raises(UserError, match=r"eval/figures would be written over"):
            settle(out, OTHER)


def test_training_replaces_its_own_results_alone(data: Path, tmp_path: Path) -> None:
    out = evaluated(tmp_path / "eval", data, "memory_colors")
    path, page = out / "results.json", out / "report.md"
    found = json.loads(path.read_text())
    settle(out, OTHER, in_training=True)
    assert results.read(out / "before" / name_of(HEAD))[0]["step"] == 3
    found["tasks"]["memory_colors"]["in_training"] = True
    for own in (True, False):
        path.write_text(json.dumps(found))
        page.unlink(missing_ok=True) if own else page.write_text("the command's")
        assert settle(out, OTHER, in_training=True) == []
        assert not path.exists()
        assert (out / "before" / f"{name_of(HEAD)}_2").exists() != own
    assert not page.exists()
    path.write_text(json.dumps({**found, **OTHER}))
    assert settle(out, OTHER, in_training=True) == ["memory_colors"]


def test_entries_that_cannot_be_used_are_put_aside_with_their_lines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluated(tmp_path / "eval", data, "tnwit_height")
    evaluated(out, data, "memory_colors")
    found = json.loads((out / "results.json").read_text())
    found["tasks"]["memory_colors"]["bytes"] = math.nan  # a field that is not read
    text = json.dumps(found)
    for number in ("", "_2"):
        (out / "results.json").write_text(text)
        (out / "memory_colors.jsonl").write_text(number)
        assert settle(out, HEAD) == ["tnwit_height"]
        aside = out / "before" / f"damaged{number}"
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(
            f"has a number in memory_colors that is not finite: the entry is left out, and is in "
            f"{aside} now"
        )
        assert (aside / "results.json").read_text() == text
        assert (aside / "memory_colors.jsonl").read_text() == number
        assert [*results.read(out)[0]["tasks"]] == ["tnwit_height"]
        assert settle(out, HEAD) == ["tnwit_height"]
        assert not capsys.readouterr().err
    for place, damaged in enumerate(
        ('{"tasks": {"a"', "[5]", '{"tasks": 5}', '{"tasks":{},"a":NaN}')
    ):
        (out / "results.json").write_text(damaged)
        (out / "memory_colors.jsonl").write_text("old")
        assert settle(out, HEAD) == []
        aside = out / "before" / f"damaged_{place + 3}"
        assert f"it is in {aside} now" in capsys.readouterr().err
        assert (aside / "results.json").read_text() == damaged
        assert (aside / "memory_colors.jsonl").read_text() == "old"
        assert not (out / "report.md").exists()


def test_two_evaluations_cannot_write_to_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "eval"
    with (
        standing.held(out),
        pytest.raises(UserError, match=f"another evaluation is writing to {out}: wait"),
        standing.held(out),
    ):
        pass
    assert not [*out.iterdir()]
    with standing.held(out):
        pass


def test_a_full_disk_is_one_line(data: Path, tmp_path: Path) -> None:
    """Of the page as of the lines; here a directory is in the way."""
    out = evaluated(tmp_path / "eval", data, "memory_colors")
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    with pytest.raises(UserError, match=f"results cannot be written to {out}: Is a directory"):
        report.write(*results.read(out))
    with pytest.raises(UserError, match="No space left"), standing.writing(out):
        Path("/dev/full").write_text("x")


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
