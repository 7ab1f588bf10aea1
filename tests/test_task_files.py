"""What the files of tasks may hold, and how one line refuses the rest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, comparisons, evaluation, passages, readers, results
from blindvalm_jax.tasks.asked import Outcome, Windows
from blindvalm_jax.tasks.perplexity import AskedBlocks, AskedTexts
from blindvalm_jax.tasks.questions import Item
from tests import small_text
from tests.test_text_tasks import Counting

NEWS = '{"text": "It flies.", "label": "technology"}'


def read(directory: Path, task: str, name: str, content: str | bytes) -> list[Item]:
    """The items of a task whose file holds this."""
    raw = content if isinstance(content, bytes) else content.encode()
    (directory / name).write_bytes(raw)
    return catalog.TASKS[task].corrected.items(directory)


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("sst2", "sst2_test.jsonl", ""),
        ("sst2", "sst2_test.jsonl", "\n \n"),
        ("sst2", "sst2_test.jsonl", "[]"),
        ("mpqa", "mpqa_test.json", "\ufeff"),
        ("memory_colors", "memory_color_data.csv", "Index,Descriptor,Item,Color\n"),
        ("agnews", "agnews_test.csv", "\n"),
        ("size_pairs_legacy", "sizePairsFull.txt", "\n"),
        ("tnwit_size", "tnwit_size.json", ""),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, task: str, name: str, content: str) -> None:
    with pytest.raises(UserError, match=f"{name} holds no rows"):
        read(tmp_path, task, name, content)


def test_a_published_file_of_one_line_is_refused(tmp_path: Path) -> None:
    """The script leaves the first line out."""
    (tmp_path / "agnews_test.csv").write_text("world,Title,Text\n")
    published = catalog.TASKS["agnews"].published
    assert published is not None
    with pytest.raises(UserError, match=r"agnews_test.csv holds no rows"):
        published.items(tmp_path)


@pytest.mark.parametrize(
    ("task", "name", "row", "message"),
    [
        ("sst2", "sst2_test.jsonl", {"text": None, "label": "Positive"}, "null as text"),
        ("sst2", "sst2_test.jsonl", {"text": "so", "label": 1}, "1 as label"),
        ("agnews", "agnews_test.jsonl", {"text": ["so"], "label": "world"}, r'\["so"\] as text'),
        ("relative_size", "relative_size.jsonl", {"sub": 5, "obj": "b", "size": "big"}, "5 as sub"),
        ("vicomte_shape_single", "test_shape.jsonl", {"sub": "a", "obj": None}, "null as obj"),
        ("sst2", "sst2_test.jsonl", {"text": "\ud83d", "label": "Positive"}, r"ud83d. as text"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, task: str, name: str, row: dict[str, Any], message: str
) -> None:
    good = {key: "big" if key == "size" else "Positive" for key in row}
    content = "\n".join(map(json.dumps, (good, row)))
    with pytest.raises(UserError, match=f"{name}: example 2 has .*{message}, expected a text"):
        read(tmp_path, task, name, content)


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        (
            "memory_colors",
            "memory_color_data.csv",
            "Index,Descriptor,Item,Color\n1,,,red\n",
            "csv:2 has nothing as Item",
        ),
        (
            "color_terms",
            "color-concrete-objects.csv",
            "object,color\nsun,red\ncar, \n",
            "csv:3 has nothing as color",
        ),
        (
            "sst2",
            "sst2_test.jsonl",
            '{"text": "so", "label": ""}\n',
            "example 1 has nothing as label",
        ),
        (
            "vicomte_shape_single",
            "test_shape.jsonl",
            '{"sub": " ", "obj": "round"}\n',
            "example 1 has nothing as sub",
        ),
    ],
)
def test_what_is_blank_is_refused(
    tmp_path: Path, task: str, name: str, content: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, task, name, content)


def test_what_may_be_blank(tmp_path: Path) -> None:
    """A thing without a descriptor; a text, as MPQA has two."""
    head = "Index,Descriptor,Item,Color\n1,,sun,red\n"
    [item] = read(tmp_path, "memory_colors", "memory_color_data.csv", head)
    assert item.words == {"descriptor": "", "item": "sun"}
    content = '{"text": "", "label": "Positive"}\n'
    assert read(tmp_path, "mpqa", "mpqa_test.json", content)[0].words == {"text": ""}


def test_a_group_says_which_task_lacks_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sst2: sst2_test.jsonl is not in .* to leave it out, na"):
        evaluation.read(["nlu"], "corrected", tmp_path)
    with pytest.raises(UserError, match=r"^mpqa: mpqa_test.json or test.json is not in .* below$"):
        evaluation.read(["mpqa"], "corrected", tmp_path)


def test_a_passage_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "one two"}\n{"text": null}\n')
    with pytest.raises(UserError, match="example 2 has null as text"):
        passages.stripped_passages(path)


def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    content = 'world,Title,"one\n\ntwo"\n\nworld,Title\n'
    with pytest.raises(UserError, match=r"agnews_test.csv:5 has 2 fields"):
        read(tmp_path, "agnews", "agnews_test.csv", content)


def test_a_field_may_be_long(tmp_path: Path) -> None:
    long = "word " * 40_000
    [item] = read(tmp_path, "agnews", "agnews_test.csv", f'world,Title,"{long}"\n')
    assert item.words["text"] == long.strip()


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str) -> None:
    row = json.dumps({"text": f"so{mark}it is", "label": "Positive"}, ensure_ascii=False)
    [item] = read(tmp_path, "sst2", "sst2_test.jsonl", f"{row}\n")
    assert item.words["text"] == f"so{mark}it is"
    path = tmp_path / "agnews_test.csv"
    path.write_text(f"a,b,c\nworld,Title,so{mark}it is\n", encoding="utf-8")
    assert readers.split_rows(path) == [["world", "Title", f"so{mark}it is"]]
    row = json.dumps({"item": f"so{mark}it is", "right": True}, ensure_ascii=False)
    (tmp_path / "own.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert len(results.read_lines(tmp_path, "own", {"metric": "accuracy"})) == 2


def test_a_return_alone_ends_no_line(tmp_path: Path) -> None:
    """As in training: the same file has the same lines as text: and as file:."""
    own = put_bytes(tmp_path / "own.txt", b"\xef\xbb\xbfone\rtwo\r\nthree")
    for kind in ("text", "file"):
        [asked] = evaluation.read([f"{kind}:{own}"], "corrected", None)
        assert isinstance(asked, AskedTexts)
        assert asked.texts == ["one\rtwo\nthree"]
    [item] = read(tmp_path, "agnews", "agnews_test.csv", b'world,Title,"one\rtwo\r\nthree"\r\n')
    assert item.words["text"] == "one\rtwo\nthree"
    rows = read(tmp_path, "color_terms", "color-concrete-objects.csv", "object,color\rsun,red\r")
    assert [item.answer for item in rows] == ["red"], "as the csv module has it"


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("color_terms", "color-concrete-objects.csv", "object,color\n cat, black \ndog,black"),
        ("shapeit", "shape_association.csv", "word,gt,options\n cat, black ,\ndog,black,a"),
        *[
            (
                f"vicomte_{name}",
                file,
                "\n".join(
                    json.dumps({"sub": thing, "obj": value, "alt": value})
                    for thing, value in ((" cat", " black "), ("dog", "black"))
                ),
            )
            for name, file in (
                ("color_all", "test_color_all.jsonl"),
                ("color_all_alt", "test_color_all.jsonl"),
                ("shape_single", "test_shape.jsonl"),
            )
        ],
    ],
)
def test_blanks_make_no_other_candidates(
    tmp_path: Path, task: str, name: str, content: str
) -> None:
    """Nor other things; the scripts compare without them too."""
    put_bytes(tmp_path / name, content.encode())
    for protocol in catalog.TASKS[task].protocols.values():
        questions = protocol.questions(protocol.items(tmp_path))
        assert {question.candidates for question in questions} == {("black",)}
        first, second = (question.prompt for question in questions[:2])
        assert first.replace("cat", "dog") == second


def test_two_rows_of_one_index_are_refused(tmp_path: Path) -> None:
    rows = "Index,Descriptor,Item,Color\n1,a,sun,red\n2,a,sea,blue\n1 ,a,car,red\n"
    with pytest.raises(UserError, match="color_data.csv: 2 rows have 1 as Index, expected one"):
        read(tmp_path, "memory_colors", "memory_color_data.csv", rows)


def stored(ids: Any, lens: Any) -> bytes:
    """An .npz of these arrays."""
    file = io.BytesIO()
    np.savez(file, ids=ids, lens=lens)
    return file.getvalue()


def alone() -> bytes:
    """An array that is in no archive."""
    file = io.BytesIO()
    np.save(file, np.array([5, 2]))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no arrays ids and lens: File is not a zip file"),
        (stored([5, 2], [2])[:-30], "holds no arrays ids and lens"),
        (alone(), "holds no arrays ids and lens"),
        (stored([5.0, 2.0], [2]), r"holds ids as float64 \[2\], expected a row of integers"),
        (stored([5, 2], [2.5]), r"holds lens as float64 \[1\], expected a row of integers"),
        (stored([[5, 2]], [1]), r"holds ids as int64 \[1, 2\], expected a row of integers"),
        (stored([49_412, 2], [2]), "holds the id 49412, expected .* 0 to 49411"),
        (stored([(1 << 32) + 5, 2], [2]), "holds the id 4294967301, expected"),
        (stored([-1, 2], [2]), "holds the id -1, expected"),
    ],
)
def test_published_ids_that_are_none_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """When the file is read, before any task is asked."""
    put_bytes(tmp_path / "wikitext103_test_clipbpe.npz", content)
    with pytest.raises(UserError, match=f"wikitext103: .*clipbpe.npz {message}") as caught:
        evaluation.read(["wikitext103"], "published", tmp_path)
    assert "\n" not in str(caught.value)


def put_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def marked(content: str) -> bytes:
    return b"\xef\xbb\xbf" + content.encode()


def with_returns(content: str) -> bytes:
    return content.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("changed", [marked, with_returns])
@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("agnews", "agnews_test.jsonl", f"{NEWS}\n{NEWS}\n"),
        ("agnews", "agnews_test.csv", 'world,Title,"one\ntwo"\n3,Title,Text\n'),
        ("mpqa", "mpqa_test.json", '[{"text": "a",\n"label": "Positive"}]\n'),
        ("memory_colors", "memory_color_data.csv", "Index,Descriptor,Item,Color\n1,a,sea,blue\n"),
        ("size_pairs_legacy", "sizePairsFull.txt", "cow ant\nhouse cow\n"),
    ],
)
def test_marks_and_returns_change_nothing(
    tmp_path: Path, task: str, name: str, content: str, changed: Callable[[str], bytes]
) -> None:
    assert read(tmp_path, task, name, changed(content)) == read(tmp_path, task, name, content)


def test_blank_lines_end_a_list_of_pairs(tmp_path: Path) -> None:
    found = read(tmp_path, "size_pairs_legacy", "sizePairsFull.txt", "cow ant\n\n \n")
    assert [item.answer for item in found] == ["yes", "no"]


@pytest.mark.parametrize("label", ["1", 7, None, True, 1.0, []])
def test_another_relation_is_refused(tmp_path: Path, label: object) -> None:
    row = json.dumps({"obj_a": "ant", "obj_b": "cow", "label": label})
    with pytest.raises(UserError, match=r"example 1 has .* as label, expected 1 or 0"):
        read(tmp_path, "tnwit_size", "tnwit_size.json", row)


def sized(*rows: tuple[str, str, str]) -> str:
    return "\n".join(json.dumps({"sub": a, "obj": b, "size": size}) for a, b, size in rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("ant", "cow", "small"), ("ant", "cow", "big")], "'ant' is said to be both more and"),
        ([("ant ", "cow", "small"), ("ant", " cow", "big")], "'ant' is said to be both more and"),
        ([("ant", "cow", "small"), ("cow", "ant", "small")], "'cow' is said to be both more and"),
        ([("ant", "ant", "small")], "'ant' is compared with itself"),
    ],
)
def test_pairs_that_contradict_are_refused(
    tmp_path: Path, rows: list[tuple[str, str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=f"relative_size.jsonl: {message}"):
        read(tmp_path, "relative_size", "relative_size.jsonl", sized(*rows))


def test_legacy_pairs_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both more and less"):
        read(tmp_path, "size_pairs_legacy", "sizePairsFull.txt", "cow ant\nant cow\n")


def test_pairs_that_agree_are_rows_and_asked_once(tmp_path: Path) -> None:
    rows = [("ant", "cow", "small"), ("cow", "ant", "big"), ("ant", "cow", "small")]
    found = read(tmp_path, "relative_size", "relative_size.jsonl", sized(*rows))
    assert len(found) == 3
    asked = comparisons.both_orders(found)
    assert [(item.words["a"], item.answer) for item in asked] == [("ant", "less"), ("cow", "more")]


def test_the_majority_is_of_what_is_asked(tmp_path: Path) -> None:
    """The first thing is always larger, and both orders are asked: half are larger, half not."""
    rows = [("cow", "ant", "big"), ("house", "cow", "big"), ("tree", "bee", "big")]
    (tmp_path / "relative_size.jsonl").write_text(sized(*rows))
    for name in ("relative_size", "relative_size_than"):
        protocol = catalog.TASKS[name].corrected
        questions = protocol.questions(protocol.items(tmp_path))
        assert catalog.baselines(questions).majority == 0.5


def put(directory: Path, name: str, content: str | bytes) -> dict[str, str]:
    """Writes a file; what results.json says of it."""
    raw = content if isinstance(content, bytes) else content.encode()
    (directory / name).write_bytes(raw)
    return {"name": name, "sha256": hashlib.sha256(raw).hexdigest()}


def uniformly(task: str, directory: Path, protocol: str = "corrected") -> Outcome:
    """A task asked of a model to which all tokens are alike."""
    [asked] = evaluation.read([task], protocol, directory)
    vocabulary = small_text.small_bpe()
    return asked.run(Counting(vocabulary.vocab_size), vocabulary)


def test_the_file_of_choices_is_known(tmp_path: Path) -> None:
    file = put(tmp_path, "agnews_test.csv", "world,Title,Text\n")
    [asked] = evaluation.read(["agnews"], "corrected", tmp_path)
    assert isinstance(asked, evaluation.AskedChoice)
    assert asked.file is not None
    assert asked.file.entry == file
    assert "agnews_test.jsonl is not there" in asked.file.notes[0]
    put(tmp_path, "agnews_test.jsonl", NEWS)
    [asked] = evaluation.read(["agnews"], "corrected", tmp_path)
    assert isinstance(asked, evaluation.AskedChoice)
    assert asked.file is not None
    assert (asked.file.name, asked.file.notes) == ("agnews_test.jsonl", ())


def test_files_of_texts_are_recorded_and_others_than_wanted_noted(tmp_path: Path) -> None:
    decoded = put(tmp_path, "wikitext103_test_clipbpe.decoded.txt", "= a =\nthe cat\n")
    valid = put(tmp_path, "wiki.valid.raw", " = B = \nThe mat\n")
    found = uniformly("wikitext103", tmp_path)
    assert (found.entry["file"], found.entry["majority_file"]) == (decoded, valid)
    [note] = [note for note in found.notes if "is not there" in note]
    assert note.startswith(f"{decoded['name']} was read: wiki.test.raw is not there")
    raw = put(tmp_path, "wiki.test.raw", " = A = \nThe Cat\n")
    found = uniformly("wikitext103", tmp_path)
    assert found.entry["file"] == raw
    assert not [note for note in found.notes if "is not there" in note]
    plain = put(tmp_path, "lambada_test_plain_text.txt", "the cat sat\n")
    found = uniformly("lambada", tmp_path)
    assert found.entry["file"] == plain
    assert "lambada_test.jsonl is not there" in found.notes[0]


def test_own_files_are_recorded_together(tmp_path: Path) -> None:
    files = [put(tmp_path, f"{name}.txt", f"the {name}\n") for name in "ab"]
    assert uniformly(f"text:{tmp_path}/a.txt", tmp_path).entry["file"] == files[0]
    hashes = "".join(f"{file['sha256']}\n" for file in files).encode()
    both = {"name": f"{tmp_path}/*.txt", "sha256": hashlib.sha256(hashes).hexdigest()}
    assert uniformly(f"file:{tmp_path}/*.txt", tmp_path).entry["file"] == both


def test_published_blocks_are_not_of_another_edition(tmp_path: Path) -> None:
    """Raw WikiText has ` @-@ `; the text that the reference scored has hyphens."""
    raw = "wikitext103_test.txt"
    put(tmp_path, raw, " = A = \n a well @-@ known cat \n")
    with pytest.raises(UserError, match=f"{raw} holds ' @-@ ', which the published text does not"):
        evaluation.read(["wikitext103"], "published", tmp_path)
    put(tmp_path, raw, "= a =\na well - known cat\n")
    found = uniformly("wikitext103", tmp_path, "published")
    assert found.entry["file"]["name"] == raw
    assert "wikitext103_test_clipbpe.decoded.txt is not there" in found.notes[0]
    put(tmp_path, raw, " a well @-@ known cat \n")
    ids = tmp_path / "wikitext103_test_clipbpe.npz"
    np.savez(ids, ids=np.array([5, 2], np.uint16), lens=np.array([2], np.int32))
    asked = catalog.TEXTS["wikitext103"].open("published", tmp_path, Windows())
    assert isinstance(asked, AskedBlocks)
    assert (asked.blocks.ids is not None, asked.blocks.texts) == (True, None)
    assert asked.blocks.ids_file == readers.read_file(ids, [ids.name])


def test_bytes_are_those_of_what_is_scored(tmp_path: Path) -> None:
    """No byte order mark, one byte a line end, none for the line feed before a title."""
    lines = [" = A = ", "", "Über", "", " = B = ", "", "so"]
    put(tmp_path, "wiki.test.raw", marked("\n".join(lines)))
    expected = [len("\n".join(own).encode()) for own in (lines[:4], lines[4:])]
    assert [line["bytes"] for line in uniformly("wikitext103", tmp_path).lines] == expected
    put(tmp_path, "wiki.test.raw", marked("\r\n".join(lines)))
    assert [line["bytes"] for line in uniformly("wikitext103", tmp_path).lines] == expected
    [asked] = evaluation.read(["wikitext103"], "corrected", tmp_path)
    notes = asked.run(Counting(400), small_text.small_clip()).notes
    assert "bytes are those of the text before the tokenizer drops its case" in notes
