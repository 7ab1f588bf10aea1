"""Two evaluations compared: differences, their errors and tests, and what cannot be compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, readers, results, statistics
from blindvalm_jax.tasks.answers import Answers
from blindvalm_jax.tasks.compare import compare, described, holm, line_of, write
from tests import small_tasks

ROOT = Path(__file__).resolve().parents[1]
GROUNDING = {"source": "text", "readout": "eos", "segments": "causal", "tower": "random"}
ABOUT = {"step": 3, "tokenizer": "clip", "dtype": "float32", "grounding": GROUNDING, "commit": "0"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tasks.write(tmp_path_factory.mktemp("compared") / "tasks")


def save(directory: Path, name: str, entry: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    """A task of an evaluation, beside those that are there."""
    directory.mkdir(exist_ok=True)
    path = directory / "results.json"
    whole: dict[str, Any] = {"tasks": {}, "model": directory.name, **ABOUT}
    if path.exists():
        whole = json.loads(path.read_text())
    whole["tasks"][name] = entry
    files.write_json(path, whole)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (directory / f"{name}.jsonl").write_text(text)
    return directory


def answered(
    directory: Path, data: Path, *, seed: int, name: str = "memory_colors", way: str = "corrected"
) -> Path:
    """An evaluation of a model that draws its answers."""
    task = catalog.TASKS[name]
    protocol = task.protocols[way]
    items = protocol.items(data)
    questions = protocol.questions(items)
    rng = np.random.default_rng(seed)
    scores = [rng.standard_normal(len(question.candidates)) for question in questions]
    chosen = np.array([int(np.argmax(own)) for own in scores])
    right = chosen == np.array([question.answer for question in questions])
    every = dict.fromkeys(protocol.scores, chosen)
    said = Answers(scores, every, dict.fromkeys(protocol.scores, right), 0)
    entry = {"protocol": way, **results.summary(task, protocol, items, questions, said)}
    lines = list(results.lines(questions, said, protocol))
    return save(directory, name, json.loads(json.dumps(entry)), json.loads(json.dumps(lines)))


def read_texts(directory: Path, nats: np.ndarray, tokens: np.ndarray, *, window: int = 32) -> Path:
    """An evaluation of perplexity, with these sums of documents."""
    entry = {
        "metric": "perplexity",
        "protocol": "corrected",
        "score": statistics.power(nats.sum() / tokens.sum()),
        **{"stderr": None, "interval": [None, None], "majority": None, "random": 320.0},
        **{"n": len(nats), "window": window, "stride": 16, "per_prompt": [], "faults": []},
        **{"tokens": int(tokens.sum()), "skipped": 0, "bits_per_byte": None},
        **{"nats_per_token": float(nats.sum() / tokens.sum()), "word_perplexity": 55.5},
        "source": "a text",
    }
    lines = [
        {"item": f"{number}", "nats": float(a), "tokens": int(n)}
        for number, (a, n) in enumerate(zip(nats, tokens, strict=True))
    ]
    return save(directory, "wikitext103", entry, lines)


def test_accuracies_are_compared_question_by_question(data: Path, tmp_path: Path) -> None:
    a = answered(tmp_path / "a", data, seed=1)
    b = answered(tmp_path / "b", data, seed=2)
    found = compare(a, b)["tasks"]["memory_colors"]
    rows = [
        [
            json.loads(line)["right"]
            for line in (of / "memory_colors.jsonl").read_text().split("\n")[:-1]
        ]
        for of in (a, b)
    ]
    mine, base = np.array(rows)
    assert found["difference"] == pytest.approx(mine.mean() - base.mean())
    assert (found["only_A"], found["only_B"]) == (sum(mine & ~base), sum(base & ~mine))
    assert (found["A"], found["questions"], found["clusters"]) == (mine.mean(), 36, 4)
    turned = compare(b, a)["tasks"]["memory_colors"]
    assert turned["difference"] == -found["difference"]
    assert turned["p"] == found["p"]
    assert turned["interval"] == pytest.approx([-x for x in found["interval"][::-1]])
    same = compare(a, a)["tasks"]["memory_colors"]
    assert (same["difference"], same["p"], same["only_A"]) == (0.0, 1.0, 0)


def test_pairs_are_compared_by_their_objects(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        answered(tmp_path / name, data, seed=seed, name="tnwit_height")
    entry = results.read(tmp_path / "a")[0]["tasks"]["tnwit_height"]
    # A tree, an ant, a house and a mouse, in three pairs.
    assert (entry["n"], entry["clusters"], entry["clustered_by"]) == (3, 4, "objects of pairs")
    found = compare(tmp_path / "a", tmp_path / "b")["tasks"]["tnwit_height"]
    assert (found["clusters"], found["clustered_by"]) == (4, "objects of pairs")
    entries = [results.read(tmp_path / name)[0]["tasks"]["tnwit_height"] for name in "ab"]
    lines = [
        results.read_lines(tmp_path / name, "tnwit_height", of)
        for name, of in zip("ab", entries, strict=True)
    ]
    items = [line["item"] for line in lines[0]]
    objects = [(*line["objects"],) for line in lines[0]]
    assert {*objects} == {("a tree", "an ant"), ("a house", "an ant"), ("a mouse", "a tree")}
    mine, base = (np.array([line["right"] for line in of]) for of in lines)
    expected = statistics.paired(mine, base, items, objects=objects)
    assert found["stderr"] == expected.stderr > statistics.paired(mine, base, items).stderr
    assert found["p"] == expected.p
    assert found["interval"] == [expected.low, expected.high]


def test_evaluations_that_know_no_clusters_are_refused(data: Path, tmp_path: Path) -> None:
    """What was written before questions about pairs said their objects."""
    for name in "ab":
        answered(tmp_path / name, data, seed=1)
    place = tmp_path / "b" / "results.json"
    whole = files.read_object(place)
    del whole["tasks"]["memory_colors"]["clustered_by"]
    files.write_json(place, whole)
    with pytest.raises(UserError, match="with clustered_by item in A and None in B"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="does not say what it is clustered by, in A nor in B"):
        compare(tmp_path / "b", tmp_path / "b")


def test_one_question_an_item_is_mcnemars_test(data: Path, tmp_path: Path) -> None:
    """Exact, as 12 items differ."""
    rng = np.random.default_rng(3)
    right = rng.random((2, 60)) < 0.5
    right[:, 12:] = right[:1, 12:]
    right[0, :12], right[1, :12] = [True] * 10 + [False] * 2, [False] * 10 + [True] * 2
    for name, own in zip("ab", right, strict=True):
        answered(tmp_path / name, data, seed=0)
        lines = [{"item": f"{n}", "right": bool(hit)} for n, hit in enumerate(own)]
        entry = json.loads((tmp_path / name / "results.json").read_text())["tasks"]
        save(tmp_path / name, "memory_colors", entry["memory_colors"], lines)
    found = compare(tmp_path / "a", tmp_path / "b")["tasks"]["memory_colors"]
    assert found["p"] == pytest.approx(stats.binomtest(10, 12).pvalue)


def test_perplexities_are_compared_by_document(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 400, 40)
    base = 3.0 * tokens + rng.standard_normal(40) * np.sqrt(tokens)
    b = read_texts(tmp_path / "b", base, tokens)
    worse = read_texts(tmp_path / "worse", base + 0.1 * tokens, tokens)
    found = compare(worse, b)["tasks"]["wikitext103"]
    # The same difference for every token: it is sure, however long the documents are.
    assert found["difference"] == pytest.approx(0.1)
    assert found["stderr"] == pytest.approx(0.0, abs=1e-9)
    assert found["ratio"] == pytest.approx(np.exp(0.1))
    assert (found["only_A"], found["only_B"]) == (0, 40)
    assert found["p"] < 0.001
    noise = rng.standard_normal(40) * np.sqrt(tokens)
    other = read_texts(tmp_path / "other", base + 0.1 * tokens + noise, tokens)
    found = compare(other, b)["tasks"]["wikitext103"]
    gaps = 0.1 * tokens + noise
    left_out = (gaps.sum() - gaps) / (tokens.sum() - tokens)
    jackknife = np.sqrt(39 / 40 * np.sum((left_out - left_out.mean()) ** 2))
    # Two estimates of one error; over 40 documents they differ by about a fortieth.
    assert found["stderr"] == pytest.approx(jackknife, rel=0.1)
    low, high = found["interval"]
    assert low < found["difference"] < high


def test_perplexities_that_are_no_floats_are_compared(tmp_path: Path) -> None:
    tokens = np.array([20, 30, 40])
    a = read_texts(tmp_path / "a", np.array([800.0, 801, 799]) * tokens, tokens)
    b = read_texts(tmp_path / "b", 3.0 * tokens, tokens)
    found = compare(a, b)
    entry = found["tasks"]["wikitext103"]
    assert entry["difference"] == pytest.approx((16_000 + 24_030 + 31_960) / 90 - 3)
    assert (entry["A"], entry["B"]) == (None, pytest.approx(math.exp(3)))
    assert entry["ratio"] is None
    assert line_of("wikitext103", entry).split()[1:3] == ["–", "20.09"]
    assert "| wikitext103 | corrected | – | 20.09 |" in write(found, tmp_path / "c").read_text()


def test_models_are_told_apart_by_dtype_and_grounding(data: Path, tmp_path: Path) -> None:
    """As far as an evaluation says it; one of before grew no such words."""
    for name, more in (("b", {"dtype": "bfloat16"}), ("c", {"grounding": None}), ("d", {})):
        whole = files.read_object(answered(tmp_path / name, data, seed=1) / "results.json")
        whole |= {"model": "M", **more}
        if name == "d":
            del whole["dtype"], whole["grounding"]
        files.write_json(tmp_path / name / "results.json", whole)
    told = [compare(tmp_path / name, tmp_path / name)["A"] for name in "bcd"]
    assert told[0]["grounding"] == {"source": "text", "readout": "eos"}
    assert [described(of).split("; protocol")[0] for of in told] == [
        "M, step 3, tokenizer clip, bfloat16, grounding source text, grounding readout eos",
        "M, step 3, tokenizer clip, float32, no grounding",
        "M, step 3, tokenizer clip",
    ]


def test_holms_correction() -> None:
    """An example of Holm's procedure, worked by hand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


def other_data(place: Path, data: Path) -> Path:
    rows = (data / "memory_color_data.csv").read_text().replace("ocean", "sea")
    place.mkdir()
    (place / "memory_color_data.csv").write_text(rows)
    return place


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, d: answered(p / "b", d, seed=2, way="published"), "asked with protocol correct"),
        (
            lambda p, d: answered(p / "b", other_data(p / "sea", d), seed=2),
            "question 2 differs in prompt, 'Q: What is the color of the ocean",
        ),
        (lambda p, d: answered(p / "b", d, seed=2, name="tnwit_height"), "A and B share no task"),
        (lambda p, d: p, "results.json is missing: .* has not been evaluated"),
    ],
)
def test_other_questions_are_refused(
    data: Path, tmp_path: Path, make: Callable[[Path, Path], Path], message: str
) -> None:
    a = answered(tmp_path / "a", data, seed=1)
    with pytest.raises(UserError, match=message):
        compare(a, make(tmp_path, data))


def test_another_file_is_refused_though_its_questions_are_the_same(
    data: Path, tmp_path: Path
) -> None:
    hashes = {"a": "0a" * 32, "b": "0b" * 32, "as_a": "0a" * 32}
    for name, sha256 in hashes.items():
        answered(tmp_path / name, data, seed=1)
        whole = files.read_object(tmp_path / name / "results.json")
        file = {"name": f"{name}.csv", "sha256": sha256}
        whole["tasks"]["memory_colors"]["file"] = file
        files.write_json(tmp_path / name / "results.json", whole)
    told = r"memory_colors was asked of a.csv \(0a0a0a0a0a0a\) in A and b.csv \(0b0b0b0b0b0b\) in B"
    with pytest.raises(UserError, match=told):
        compare(tmp_path / "a", tmp_path / "b")
    assert compare(tmp_path / "a", tmp_path / "as_a")["tasks"]["memory_colors"]["p"] == 1.0
    unknown = answered(tmp_path / "unknown", data, seed=1)
    assert compare(tmp_path / "a", unknown)["tasks"]["memory_colors"]["p"] == 1.0


def with_last_words(
    directory: Path, passages: list[str], *, source: str, file: dict[str, str] | None
) -> Path:
    """An evaluation of LAMBADA of which every second word is right."""
    lines = [
        {
            **{"item": f"{number}", "word": text.split()[-1], "nats": 1.0, "tokens": 1},
            **{"right": number % 2 == 0, "text_sha256": readers.text_sha256(text)},
        }
        for number, text in enumerate(passages)
    ]
    entry = {
        **{"metric": "accuracy", "protocol": "corrected", "score": 0.5, "stderr": 0.1},
        **{"interval": [0.1, 0.9], "n": len(lines), "majority": 0.1, "random": 0.1},
        **{"per_prompt": [0.5], "faults": [], "clustered_by": "item"},
        **{"source": source, "file": file},
    }
    return save(directory, "lambada", entry, lines)


def test_a_file_and_a_data_set_are_compared_by_their_texts(tmp_path: Path) -> None:
    """The same last words behind other contexts are other data, whatever names its file."""
    texts = [f"{number} so it was the {word}" for number, word in enumerate("abcdef")]
    file = {"name": "lambada.jsonl", "sha256": "0a" * 32}
    tfds = "TFDS lambada/1.0.0, test"
    a = with_last_words(tmp_path / "a", texts, source="LAMBADA", file=file)
    same = with_last_words(tmp_path / "same", texts, source=tfds, file=None)
    assert compare(a, same)["tasks"]["lambada"]["p"] == 1.0
    others = [f"but {text}" for text in texts]
    for name, source in (("other", tfds), ("unnamed", "LAMBADA")):
        other = with_last_words(tmp_path / name, others, source=source, file=None)
        for pair in ((a, other), (other, a)):
            with pytest.raises(UserError, match="lambada: question 1 differs in text_sha256, '"):
                compare(*pair)
    of_before = "".join(
        f"{json.dumps({k: v for k, v in json.loads(line).items() if k != 'text_sha256'})}\n"
        for line in (same / "lambada.jsonl").read_text().splitlines()
    )
    (same / "lambada.jsonl").write_text(of_before)
    told = (
        r"lambada was asked of lambada.jsonl \(0a0a0a0a0a0a\) in A and TFDS lambada/1.0.0, test in "
        "B, and not every line of both says of which text it is"
    )
    with pytest.raises(UserError, match=told):
        compare(a, same)
    older = with_last_words(tmp_path / "older", texts, source=tfds, file=None)
    assert compare(older, same)["tasks"]["lambada"]["p"] == 1.0


def test_other_windows_and_tokens_are_refused(tmp_path: Path) -> None:
    tokens = np.array([20, 30])
    a = read_texts(tmp_path / "a", 3.0 * tokens, tokens)
    b = read_texts(tmp_path / "b", 3.0 * tokens, tokens, window=64)
    with pytest.raises(UserError, match="asked with window 32 in A and 64 in B"):
        compare(a, b)
    c = read_texts(tmp_path / "c", 3.0 * tokens, tokens + 1)
    with pytest.raises(UserError, match="question 1 differs in tokens, 20 in A, 21 in B"):
        compare(a, c)
    with pytest.raises(UserError, match="sst2 was not asked in A and B: both have wikitext103"):
        compare(a, c, names=["sst2"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "line 2 is 5, expected an object"),
        ("[1]", r"line 2 is \[1\], expected an object"),
        ('{"item": "a"}', "line 2 lacks right"),
        ('{"item": "a", "right": 1}', "line 2 has 1 as right, expected true or false"),
        ("{", "memory_colors.jsonl cannot be read"),
        ("\udcff", "memory_colors.jsonl cannot be read"),
    ],
)
def test_lines_that_are_none_are_refused(
    data: Path, tmp_path: Path, line: str, message: str
) -> None:
    a = answered(tmp_path / "a", data, seed=1)
    path = a / "memory_colors.jsonl"
    first = path.read_text().split("\n")[0]
    path.write_bytes(f"{first}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        compare(a, a)
    assert "\n" not in str(caught.value)


def test_lines_of_another_evaluation_are_refused(data: Path, tmp_path: Path) -> None:
    a = answered(tmp_path / "a", data, seed=1)
    b = answered(tmp_path / "b", data, seed=2)
    whole = json.loads((a / "results.json").read_text())
    lines = results.read_lines(a, "memory_colors", whole["tasks"]["memory_colors"])
    content = results.as_lines(lines)
    (a / "memory_colors.jsonl").write_bytes(content)
    whole["tasks"]["memory_colors"]["lines"] = results.about_lines(content)
    files.write_json(a / "results.json", whole)
    assert whole["tasks"]["memory_colors"]["lines"]["count"] == 36
    compare(a, b)
    (a / "memory_colors.jsonl").write_bytes((b / "memory_colors.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"memory_colors.jsonl holds other lines than .*/a/results"):
        compare(a, b)


def test_the_command_writes_a_page(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        place = tmp_path / name
        place.mkdir()
        answered(place / "eval", data, seed=seed)
        answered(place / "eval", data, seed=seed, name="tnwit_height")
        read_texts(place / "eval", np.array([60.0 + seed, 80.0]), np.array([20, 30]))
    line = [sys.executable, "-m", "blindvalm_jax.evaluate", "compare", f"{tmp_path}/a"]
    done = subprocess.run(
        [*line, f"{tmp_path}/b", f"--out={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for which, row in zip("AB", told, strict=False):
        assert row == (
            f"{which}: eval, step 3, tokenizer clip, float32, grounding source text, grounding "
            f"readout eos; protocol corrected; in {tmp_path}/{which.lower()}/eval"
        )
    assert [row.split()[0] for row in told[3:6]] == [
        *("memory_colors", "tnwit_height", "wikitext103"),
    ]
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert kept == compare(tmp_path / "a", tmp_path / "b")
    group = compare(tmp_path / "a", tmp_path / "b", names=["vlu"])
    assert [*group["tasks"]] == ["memory_colors", "tnwit_height"]
    page = write(kept, tmp_path / "out").read_text()
    assert "corrected for these 3 tasks" in page
    assert [f"- {row}" in page.splitlines() for row in told[:2]] == [True, True]
    for figure in ("figures/compare.png",):
        assert f"]({figure})" in page
        assert (tmp_path / "out" / figure).read_bytes().startswith(b"\x89PNG")
    few = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert few.stderr == "error: compare takes two directories, got 1\n"
