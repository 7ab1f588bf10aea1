"""What tasks ask: prompts, candidates, right answers and counts, corrected and as published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, comparisons, questions, readers, topics
from blindvalm_jax.tasks.questions import Item, Question
from blindvalm_jax.tasks.task import Protocol

PAIRS = [("ant", "cow", "small"), ("house", "cow", "big"), ("cow", "house", "small")]


def write_pairs(directory: Path) -> None:
    lines = [json.dumps({"sub": a, "obj": b, "alt": "", "size": size}) for a, b, size in PAIRS]
    (directory / "relative_size.jsonl").write_text("\n".join(lines))


def asked(protocol: Protocol | None, data: Path) -> list[Question]:
    assert protocol is not None
    return protocol.questions(protocol.items(data))


def answers(found: Sequence[Question]) -> list[tuple[str, str]]:
    return [(question.prompt, question.candidates[question.answer]) for question in found]


def test_an_empty_word_leaves_no_gap() -> None:
    words = {"descriptor": "the", "item": "sea"}
    assert questions.fill("[DESCRIPTOR] [ITEM] is", words) == "the sea is"
    assert questions.fill("of [DESCRIPTOR] [ITEM]?", {**words, "descriptor": ""}) == "of sea?"
    with pytest.raises(UserError, match=r"needs OTHER, an item has \['descriptor', 'item'\]"):
        questions.fill("[OTHER]", words)


def test_memory_colors_with_a_comma_in_quotes(tmp_path: Path) -> None:
    rows = ["Index,Descriptor,Item,Color", "1,a ,rose,red", '2,,"salt, dry",white']
    (tmp_path / "memory_color_data.csv").write_text("\n".join(rows))
    task = catalog.TASKS["memory_colors"]
    found = asked(task.corrected, tmp_path)
    assert len(found) == 18
    assert answers(found)[:2] == [
        ("Q: What is the color of a rose? A: It is", "red"),
        ("Q: What is the color of salt, dry? A: It is", "white"),
    ]
    assert {question.candidates for question in found} == {("red", "white")}


def test_both_orders_of_every_pair_are_asked_once(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    task = catalog.TASKS["relative_size"]
    found = asked(task.corrected, tmp_path)
    first = [x for x in answers(found) if x[0].startswith("Which is bigger?")]
    assert sorted(first) == [
        ("Which is bigger? ant or cow", "cow"),
        ("Which is bigger? cow or ant", "cow"),
        ("Which is bigger? cow or house", "house"),
        ("Which is bigger? house or cow", "house"),
    ]
    assert ("Which is tinier? cow or ant", "ant") in answers(found)
    assert {question.item for question in found} == {"ant | cow", "cow | house"}
    published = answers(asked(task.published, tmp_path))
    assert len(published) == 8 * 3
    assert ("Which is bigger? cow or ant", "cow") not in published


def lines(*rows: Mapping[str, object]) -> str:
    return "\n".join(map(json.dumps, rows))


SIZES = lines(*({"sub": a, "obj": b, "size": size} for a, b, size in PAIRS))
LABELS = lines(*({"obj_a": a, "obj_b": b, "label": int(size == "big")} for a, b, size in PAIRS))
COLORS = lines(*({"sub": a, "obj": b} for a, b in (("rose", "red"), ("salt", "white"))))
SHAPES = lines(*({"sub": a, "obj": b} for a, b in (("ball", "round"), ("book", "square"))))
FILES = {
    "memory_color_data.csv": "Index,Descriptor,Item,Color\n1,a,rose,red\n2,,salt,white",
    "color-concrete-objects.csv": "object,color\nrose,red\nsalt,white",
    **dict.fromkeys(("test_color_all.jsonl", "test_color_single.jsonl"), COLORS),
    "shape_association.csv": "word,gt,options\nball,circle,a\nbook,rectangle,b",
    **dict.fromkeys(("objectSize.json", "test_shape.jsonl"), SHAPES),
    **dict.fromkeys(("relative_size.jsonl", "combined_size.jsonl"), SIZES),
    **dict.fromkeys(("tnwit_size.json", "tnwit_height.json"), LABELS),
    "sizePairsFull.txt": "cow ant\nhouse cow\ncow ant",
    **{
        name: lines(*({"text": text, "label": label} for text in ("It is.", "It was.")))
        for name, label in (
            *(("sst2_test.jsonl", "Positive"), ("mpqa_test.json", "Positive")),
            *(("mpqa_test_all.json", "Negative"), ("agnews_test.jsonl", "world")),
            *(("dbpedia_sample5000.jsonl", "film"), ("dbpedia_dev256.jsonl", "film")),
        )
    },
}


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    for task in catalog.TASKS.values():
        if "corrected" in task.protocols:
            found = asked(task.corrected, tmp_path)
            alike = {(question.prompt, question.candidates) for question in found}
            assert len(found) == len(alike) > 0, task.name


def test_than_is_said_of_what_is_named_first(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    task = catalog.TASKS["relative_size_than"]
    found = answers(asked(task.corrected, tmp_path))
    # Four wordings that name the first thing first, of four pairs and orders.
    assert len(found) == len(dict(found)) == 4 * 4
    for prompt, answer in found:
        things = [word for word in prompt.rstrip("?").split() if word in ("ant", "cow", "house")]
        larger = ["ant", "cow", "house"].index(things[0]) > ["ant", "cow", "house"].index(things[1])
        assert answer == ("larger" if larger else "smaller"), prompt


def test_the_published_relations_lack_a_comma_and_turn_the_last(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    task = catalog.TASKS["relative_size_than"]
    found = asked(task.published, tmp_path)
    assert len(found) == 5 * 3
    glued = "The size of cow is larger or smaller than ant?ant has a larger or smaller size than"
    assert found[9].prompt == f"{glued} cow?"
    assert answers(found)[9][1] == "larger"
    assert answers(found)[12] == ("cow has a larger or a smaller size than ant?", "smaller")
    assert task.published is not None
    assert task.published.share == 0.5


def test_published_heights_are_right_by_their_template(tmp_path: Path) -> None:
    rows = [
        {"obj_a": "ant", "obj_b": "cow", "label": 0},
        {"obj_a": "cow", "obj_b": "ant", "label": 1},
    ]
    (tmp_path / "tnwit_height.json").write_text("\n".join(map(json.dumps, rows)))
    task = catalog.TASKS["tnwit_height_than"]
    published = [said for _, said in answers(asked(task.published, tmp_path))]
    assert published == ["taller", "taller", "shorter", "shorter"]
    corrected = [said for _, said in answers(asked(task.corrected, tmp_path))]
    assert corrected == ["shorter", "taller"]


def test_published_news_ends_at_commas(tmp_path: Path) -> None:
    lines = [
        "world,Left out,It is.",
        'sports,A title,"He won, at last, and ""how""."',
        '3,"A title, with a comma",The rest',
    ]
    (tmp_path / "agnews_test.csv").write_text("\n".join(lines))
    task = catalog.TASKS["agnews"]
    assert [x.prompt for x in asked(task.corrected, tmp_path)] == [
        "input: It is. type: ",
        'input: He won, at last, and "how". type: ',
        "input: The rest type: ",
    ]
    assert answers(asked(task.corrected, tmp_path))[2][1] == "business"
    lines[2] = 'business,"A title, with a comma",The rest'
    (tmp_path / "agnews_test.csv").write_text("\n".join(lines))
    assert answers(asked(task.published, tmp_path)) == [
        ('input: "He won type: ', "sports"),
        ('input: with a comma" type: ', "business"),
    ]


@pytest.mark.parametrize(
    ("task", "name", "content", "prompt"),
    [
        ("sst2", "sst2_test.jsonl", None, "Review: a  b Sentiment: "),
        ("agnews", "agnews_test.jsonl", None, "input: a  b type: "),
        (
            "agnews",
            "agnews_test.csv",
            'world,t," a  b "\nworld,t,a  b\n',
            "input: a  b type: ",
        ),
    ],
)
def test_blanks_around_a_text_are_not_asked(
    tmp_path: Path, task: str, name: str, content: str | None, prompt: str
) -> None:
    """Texts that differ in them alone are one item; as published they are as they stand."""
    label = "Positive" if task == "sst2" else "world"
    rows = [{"text": text, "label": label} for text in ("a  b ", "\ta  b")]
    (tmp_path / name).write_text(lines(*rows) if content is None else content)
    found = asked(catalog.TASKS[task].corrected, tmp_path)
    assert [(question.item, question.prompt) for question in found] == [("0", prompt)] * 2
    if task == "sst2":
        (tmp_path / "test_with_labels.json").write_text(lines(*rows))
        published = asked(catalog.TASKS[task].published, tmp_path)
        assert [(question.item, question.prompt) for question in published] == [
            ("0", "Review: a  b  Sentiment: "),
            ("1", "Review: \ta  b Sentiment: "),
        ]


def test_rows_of_one_text_are_one_item(tmp_path: Path) -> None:
    """Whatever their labels: they are asked the same."""
    texts = [("1", "It is."), ("2", "It was."), ("3", "It is."), ("1", "It was.")]
    lines = [json.dumps({"label": topics.AGNEWS[int(n) - 1], "text": text}) for n, text in texts]
    for name, content in (
        ("agnews_test.csv", "\n".join(f"{n},t,{text}" for n, text in texts)),
        ("agnews_test.jsonl", "\n".join(lines)),
    ):
        path = tmp_path / name
        path.write_text(content)
        found = topics.topics(topics.AGNEWS)(path)
        assert [item.id for item in found] == ["0", "1", "0", "1"]
        assert [item.answer for item in found] == ["world", "sports", "business", "world"]
    # The first row is left out.
    cut = topics.cut_at_commas(tmp_path / "agnews_test.csv")
    assert [item.id for item in cut] == ["1", "2", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,text\n", "agnews_test.csv:1 has 2 fields, expected label, title, text"),
        ("7,a,b\n", "label '7' is neither 1 to 4 nor one of"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "agnews_test.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        catalog.TASKS["agnews"].corrected.items(tmp_path)


def test_files_are_found_below_and_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.csv").write_text("1")
    assert readers.find(tmp_path, ("y.csv", "x.csv")) == tmp_path / "a" / "b" / "x.csv"
    with pytest.raises(UserError, match=r"z\.csv is not in .*, nor up to 3 levels below"):
        readers.find(tmp_path, ("z.csv",))
    (tmp_path / "x.csv").write_text("2")
    with pytest.raises(UserError, match=r"x\.csv is in .* and in .*: name a directory"):
        readers.find(tmp_path, ("x.csv",))
    with pytest.raises(UserError, match="is no directory"):
        readers.find(tmp_path / "x.csv", ("x.csv",))


def test_an_answer_that_is_no_candidate_is_refused() -> None:
    item = Item(id="1", words={"text": "x"}, answer="Neutral")
    with pytest.raises(UserError, match="item 1 has the answer 'Neutral', expected one of Pos"):
        list(questions.asking(("[TEXT]",), ("Positive", "Negative"))([item]))


def test_tasks_are_chosen_by_name_and_group() -> None:
    assert [task.name for task in catalog.chosen(["sst2", "memory_colors"])] == [
        "memory_colors",
        "sst2",
    ]
    assert {task.group for task in catalog.chosen(["nlu"])} == {"nlu"}
    in_group = [task for task in topics.TASKS if task.group == "nlu"]
    assert catalog.chosen(["nlu", "sst2"]) == in_group
    assert [task.name for task in catalog.chosen(["dbpedia_dev"])] == ["dbpedia_dev"]
    with pytest.raises(UserError, match="got 'colours'; known: memory_colors"):
        catalog.chosen(["sst2", "colours"])


def test_what_was_not_published_has_no_published_faults() -> None:
    for name in ("wikitext2", "ptb", "dbpedia_dev", "text_own"):
        assert catalog.published_faults(name) == (), name
    for name in ("wikitext103", "lambada_perplexity", "lambada", "relative_size"):
        assert catalog.published_faults(name), name


# protocols: items, candidates, share of the most frequent answer, of guessing.
TABLE = {
    "memory_colors": (109, 11, 22.94, 9.09),
    "color_terms": (52, 10, 19.23, 10.0),
    "vicomte_color_all": (574, 12, 37.46, 8.33),
    "vicomte_color_single": (252, 11, 38.49, 9.09),
    "shapeit": (109, 3, 43.12, 33.33),
    "vicomte_shape_single": (101, 8, 80.2, 12.5),
    "vicomte_shape_all": (140, 9, 73.57, 11.11),
    "sst2": (1821, 2, 50.08, 50.0),
    "mpqa": (2000, 2, 69.2, 50.0),
    "mpqa_all": (10606, 2, 68.77, 50.0),
    "agnews": (7600, 4, 25.0, 25.0),
    "dbpedia": (5000, 14, 7.64, 7.14),
    "dbpedia_dev": (256, 14, 9.38, 7.14),
    "size_pairs_legacy": (972, 2, 50.0, 50.0),
    **dict.fromkeys(("relative_size", "relative_size_than"), (972, 2, 50.0, 50.0)),
    **dict.fromkeys(("vicomte_size", "vicomte_size_than"), (400, 2, 50.0, 50.0)),
    **dict.fromkeys(("tnwit_size", "tnwit_size_than"), (500, 2, 50.0, 50.0)),
    **dict.fromkeys(("tnwit_height", "tnwit_height_than"), (500, 2, 50.0, 50.0)),
}


@pytest.mark.parametrize("name", TABLE)
def test_counts_and_baselines_of_the_real_files(name: str, shared: Path) -> None:
    protocol = catalog.TASKS[name].corrected
    items = protocol.items(shared / "data" / "eval")
    found = protocol.questions(items)
    of = catalog.baselines(found)
    assert (len(items), len(found[0].candidates)) == TABLE[name][:2]
    assert (round(100 * of.majority, 2), round(100 * of.random, 2)) == TABLE[name][2:]
    alike = {(question.prompt, question.candidates) for question in found}
    if items[0].words.keys() == {"text"}:
        texts = {"mpqa": 1808, "mpqa_all": 8241, "agnews": 7594}
        assert len({item.id for item in items}) == len(alike) == texts.get(name, len(items))
    else:
        assert len(found) == len(alike)


@pytest.mark.parametrize(
    ("name", "count", "majority"),
    [
        ("memory_colors", 981, 22.94),
        ("memory_colors_valm", 981, 22.94),
        ("color_terms", 468, 19.23),
        ("color_terms_valm", 468, 19.23),
        ("vicomte_color_all_alt", 7 * 574, 12.54),
        ("vicomte_color_single_alt", 7 * 252, 13.89),
        ("shapeit_p0", 545, 43.12),
        ("shapeit", 763, 43.12),
        ("shapeit_p2", 981, 43.12),
        ("relative_size", 7776, 50.0),
        ("relative_size_than", 4860, 50.0),
        ("size_pairs_legacy", 1944, 100.0),
        ("sst2", 2210, 63.12),
        ("agnews", 7599, 25.0),
    ],
)
def test_what_the_published_scripts_ask(
    name: str, count: int, majority: float, shared: Path
) -> None:
    protocol = catalog.TASKS[name].published
    assert protocol is not None
    items = protocol.items(shared / "data" / "eval")
    found = protocol.questions(items)
    assert len(found) == count
    assert 100 * catalog.baselines(found).majority == pytest.approx(majority, abs=0.02)


def test_the_published_script_skips_one_of_the_official_topics(tmp_path: Path) -> None:
    """DBPedia's test split has 70,000 rows and no commas within them."""
    rows = (f"{topics.DBPEDIA[n % 14]},Title,About {n}.\n" for n in range(70_000))
    (tmp_path / "dbpedia_test.csv").write_text("".join(rows))
    found = asked(catalog.TASKS["dbpedia"].published, tmp_path)
    assert len(found) == 69_999
    assert (found[0].prompt, found[0].answer) == ("input: About 1. type: ", 1)


def test_yes_or_no_is_asked_in_both_orders_and_published_in_one(tmp_path: Path) -> None:
    (tmp_path / "sizePairsFull.txt").write_text("cow ant\n")
    task = catalog.TASKS["size_pairs_legacy"]
    corrected = answers(asked(task.corrected, tmp_path))
    assert corrected[:2] == [
        ("Is cow bigger than ant?", "yes"),
        ("Is ant bigger than cow?", "no"),
    ]
    assert len(corrected) == 6 * 2
    assert ("cow is taller than ant, is it true?", "yes") in corrected
    published = answers(asked(task.published, tmp_path))
    assert len(published) == 4
    assert {answer for _, answer in published} == {"yes"}
    assert published[3][0].startswith("cow is bigger than ant, is it true?cow is larger than ant")
    assert task.published is not None
    assert "always says yes is always right" in task.published.faults[0]
    (tmp_path / "sizePairsFull.txt").write_text("cow ant\ncow\n")
    with pytest.raises(UserError, match=r"sizePairsFull.txt:2 has 1 words, expected LARGER"):
        task.corrected.items(tmp_path)


def test_how_many_news_the_published_script_cuts(shared: Path) -> None:
    """What protocols say of them: 2,228 whole descriptions up to quotes and blanks."""
    task = catalog.TASKS["agnews"]
    assert task.published is not None
    whole = task.corrected.items(shared / "data" / "eval")[1:]
    cut = task.published.items(shared / "data" / "eval")

    def plain(text: str) -> str:
        return text.replace('"', "").strip()

    same = [
        plain(a.words["text"]) == plain(b.words["text"]) for a, b in zip(whole, cut, strict=True)
    ]
    assert sum(same) == pytest.approx(2228, abs=1)  # the first of them is left out


def test_a_pair_turned_round_has_the_other_answer() -> None:
    items = comparisons.both_orders([Item(id="a", words={"a": "x", "b": "y"}, answer="more")])
    assert [(item.words["a"], item.answer) for item in items] == [("x", "more"), ("y", "less")]
    assert [item.id for item in items] == ["a", "a"]
