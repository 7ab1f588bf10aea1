"""Inputs that lie in an object store: brought before they are read, recorded as they were given."""

from __future__ import annotations

import dataclasses
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from absl import flags

from blindvalm_jax import addresses, config
from blindvalm_jax.command_line import print_error
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import run_directory
from blindvalm_jax.stores import downloads, inputs, places, settings
from blindvalm_jax.trees import flatten

# Settings that hold text and name no input: choices, names, and what a run writes itself.
_NO_INPUTS = {
    "train.branch_from",
    *("tokenizer.kind", "data.tfds", "data.tfds_split", "data.tfds_eval_split", "data.text_field"),
    *("data.image_field", "data.caption_field", "data.cache", "log.wandb"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is brought goes to a directory of the test; the store is empty before and after."""
    monkeypatch.setattr(addresses, "STORES", ["gs", "s3", "memory"])
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "scratch"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    with inputs.released():
        yield
    store.store.clear()


def put(**contents: str) -> None:
    """Files of the bucket; in their names __ stands for /."""
    for name, content in contents.items():
        path = name.replace("__", "/").replace("_txt", ".txt")
        fsspec.filesystem("memory").pipe_file(f"/bucket/{path}", content.encode())


def read(place: str) -> dict[str, str]:
    """What a directory or file here holds, by the names below it."""
    top = Path(place)
    found = [top] if top.is_file() else [path for path in top.rglob("*") if path.is_file()]
    return {path.relative_to(top).as_posix(): path.read_text() for path in found}


def with_settings(**values: Any) -> config.Config:
    given = config.default()
    given.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config.parse(given)


def test_every_setting_that_may_name_a_file_is_an_input_or_known_to_be_none() -> None:
    texts = {
        name
        for name, default, meaning in config.describe()
        if isinstance(default, str) and "|" not in meaning
    }
    assert texts - _NO_INPUTS <= set(settings.INPUTS)
    known = {k.replace("/", ".") for k in flatten(dataclasses.asdict(config.Config()))}
    assert set(settings.INPUTS) <= known


def test_settings_name_paths_of_this_machine_and_say_what_was_given_on_the_way_back(
    tmp_path: Path,
) -> None:
    put(texts__a_txt="a", texts__b_txt="b", held_txt="h", words__x="w", words__deep__y="y")
    put(tfds__mine__1__data="1", tfds__other__1__data="2")
    (tmp_path / "local.txt").write_text("here")
    given = with_settings(
        data__files=f"{tmp_path}/local.txt, memory://bucket/texts/*.txt",
        data__eval_files="memory://bucket/held.txt",
        tokenizer__path="memory://bucket/words/",
        eval__tasks="sst2,text:memory://bucket/held.txt",
        eval__tasks_data="data",
    )
    found = settings.brought(given)
    first, _, second = found.data.files.partition(", ")
    assert first == f"{tmp_path}/local.txt"
    assert read(str(Path(second).parent)) == {"a.txt": "a", "b.txt": "b"}
    assert Path(found.data.eval_files).read_text() == "h"
    assert read(found.tokenizer.path) == {"x": "w", "deep/y": "y"}
    assert found.eval.tasks.startswith(f"sst2,text:{tmp_path}")
    back = places.as_given(dataclasses.asdict(found))
    expected = dataclasses.asdict(given)
    expected["tokenizer"]["path"] = "memory://bucket/words"  # without the last slash
    assert flatten(back) == flatten(places.as_given(expected))
    assert str(tmp_path / "scratch") not in str(back)
    sets = settings.brought(
        with_settings(data__tfds="mine:1", data__tfds_dir="memory://bucket/tfds")
    )
    assert read(sets.data.tfds_dir) == {"mine/1/data": "1"}
    assert places.as_given(sets.data.tfds_dir) == "memory://bucket/tfds"


def test_a_setting_that_is_left_out_stays_an_address() -> None:
    given = with_settings(train__init_from="memory://bucket/gone")
    assert settings.brought(given, but=["train.init_from"]) == given
    with pytest.raises(UserError, match="memory://bucket/gone names nothing"):
        settings.brought(given)


def test_only_what_differs_is_brought_and_what_is_gone_there_goes_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(t__a_txt="a", t__b_txt="b")
    glob = inputs.bring("memory://bucket/t/*.txt", glob=True)
    memory = fsspec.filesystem("memory")
    cat, fetched = memory.cat_file, []

    def noted(name: str, **part: int) -> Any:
        fetched.append(Path(name).name)
        return cat(name, **part)

    monkeypatch.setattr(memory, "cat_file", noted)
    assert inputs.bring("memory://bucket/t/*.txt", glob=True) == glob
    assert fetched == []
    put(t__b_txt="B", t__c_txt="c")
    memory.rm_file("/bucket/t/a.txt")
    inputs.bring("memory://bucket/t/*.txt", glob=True)
    assert sorted(fetched) == ["b.txt", "c.txt"]
    assert read(str(Path(glob).parent)) == {"b.txt": "B", "c.txt": "c"}
    (Path(glob).parent / "b.txt").write_text("damaged here")
    inputs.bring("memory://bucket/t/*.txt", glob=True)
    assert read(str(Path(glob).parent)) == {"b.txt": "B", "c.txt": "c"}


def test_of_a_run_the_newest_whole_checkpoint_is_brought() -> None:
    run = "runs__clip__"
    put(**{f"{run}{name}": name for name in ("run.json", "config.json", "data__windows-1__a")})
    put(**{f"{run}checkpoints__{step}__state": str(step) for step in (8, 9, 10, 11)})
    put(**{f"{run}checkpoints__{step}___CHECKPOINT_METADATA": "" for step in (8, 9, 10)})
    put(**{f"{run}checkpoints__12.tmp__state": "12"})
    found = read(inputs.bring("memory://bucket/runs/clip"))
    assert {name for name in found if name.startswith("checkpoints")} == {
        "checkpoints/10/state",
        "checkpoints/10/_CHECKPOINT_METADATA",
    }
    assert {"run.json", "config.json", "data/windows-1/a"} <= found.keys()


def test_the_tokenizer_of_a_run_is_found_where_its_windows_are(tmp_path: Path) -> None:
    put(windows__tokenizer__merges_txt="#version")
    found = run_directory._tokenizer_directory("memory://bucket/windows", tmp_path)
    assert found is not None
    assert read(str(found)) == {"merges.txt": "#version"}
    (tmp_path / "data/windows-1/tokenizer").mkdir(parents=True)
    (tmp_path / "data/windows-1/tokenizer/merges.txt").touch()
    moved = run_directory._tokenizer_directory("/elsewhere/run/data/windows-1", tmp_path)
    assert moved == tmp_path / "data/windows-1/tokenizer"


def test_errors_name_an_input_as_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    put(a_txt="a")
    place = inputs.bring("memory://bucket/a.txt", glob=True)
    capsys.readouterr()
    print_error(f"{place}:3: not valid JSON")
    assert capsys.readouterr().err == "error: memory://bucket/a.txt:3: not valid JSON\n"


def test_what_was_made_beside_them_here_stays() -> None:
    put(index__vectors="v")
    place = Path(inputs.bring("memory://bucket/index"))
    (place / "faiss.index").write_text("made here")
    put(index__vectors="other")
    inputs.bring("memory://bucket/index")
    assert read(str(place)) == {"vectors": "other", "faiss.index": "made here"}


def test_a_file_that_was_cut_off_goes_on_and_another_content_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downloads, "_PART", 4)
    memory = fsspec.filesystem("memory")
    cat, starts, broken = memory.cat_file, [], [8]

    def failing(name: str, *, start: int, end: int) -> Any:
        starts.append(start)
        if start in broken:
            raise OSError("no network")
        return cat(name, start=start, end=end)

    monkeypatch.setattr(memory, "cat_file", failing)
    put(a_txt="0123456789")
    told = "memory://bucket/a.txt cannot be read: OSError: no network.*Is the bucket there"
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            inputs.bring("memory://bucket/a.txt", glob=True)
    assert starts == [0, 4, 8, 8]
    put(a_txt="9876543210")
    broken.clear()
    place = inputs.bring("memory://bucket/a.txt", glob=True)
    assert Path(place).read_text() == "9876543210"
    assert starts[4:] == [0, 4, 8]


def test_what_changes_while_it_is_brought_is_brought_as_it_is_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downloads, "_PART", 4)
    memory = fsspec.filesystem("memory")
    cat, writers = memory.cat_file, [1]

    def changing(name: str, *, start: int, end: int) -> Any:
        part = cat(name, start=start, end=end)
        if start == 0 and writers:
            put(a_txt=f"other {writers.pop()}  ")
        return part

    monkeypatch.setattr(memory, "cat_file", changing)
    put(a_txt="first    ")
    assert Path(inputs.bring("memory://bucket/a.txt", glob=True)).read_text() == "other 1  "
    writers.extend(range(9))
    put(a_txt="again    ")
    with pytest.raises(UserError, match="changed faster than it is brought"):
        inputs.bring("memory://bucket/a.txt", glob=True)


def test_what_another_process_reads_is_not_changed_under_it() -> None:
    put(a_txt="one")
    place = Path(inputs.bring("memory://bucket/a.txt", glob=True))
    directory, _ = places.of_input("memory://bucket/a.txt")
    with (directory / ".reading").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        inputs.bring("memory://bucket/a.txt", glob=True)
        put(a_txt="two")
        with pytest.raises(UserError, match="was changed, and another process on this machine"):
            inputs.bring("memory://bucket/a.txt", glob=True)
        assert place.read_text() == "one"
    inputs.bring("memory://bucket/a.txt", glob=True)
    assert place.read_text() == "two"
    with (directory / ".reading").open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process reads them


def test_two_inputs_share_no_file() -> None:
    put(t__a_txt="a")
    glob = inputs.bring("memory://bucket/t/*.txt", glob=True)
    one = inputs.bring("memory://bucket/t/a.txt", glob=True)
    assert Path(one).parent != Path(glob).parent


def test_what_does_not_fit_on_the_disk_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    put(a_txt="x" * 10)
    monkeypatch.setattr(downloads, "_SPARE", 2**62)
    with pytest.raises(UserError, match=rf"to be brought, and .*free.*{places.VARIABLE}"):
        inputs.bring("memory://bucket/a.txt", glob=True)
    directory, _ = places.of_input("memory://bucket/a.txt")
    assert not [path for path in directory.rglob("*") if path.name == "a.txt"]


def test_what_cannot_be_brought_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(t__a_txt="a")
    with pytest.raises(UserError, match=r"is a directory: .* memory://bucket/t/\*\.txt"):
        inputs.bring("memory://bucket/t", glob=True)
    with pytest.raises(UserError, match=r"memory://bucket/u/\*\.txt names nothing"):
        inputs.bring("memory://bucket/u/*.txt", glob=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "file"))):
        inputs.bring("memory://bucket/t")
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "a,b"))
    with pytest.raises(UserError, match="name a place without a comma"):
        inputs.bring("memory://bucket/t")


def test_flags_of_other_commands_are_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    put(t__a_txt="a", windows__x="x")
    own = flags.FlagValues()  # not a command's: those of two do not fit into one process
    texts = flags.DEFINE_string("texts", None, "", flag_values=own)
    words = flags.DEFINE_string("words", None, "", flag_values=own)
    own(["", "--texts=memory://bucket/t/*.txt", "--words=openai/clip"])
    monkeypatch.setattr(flags, "FLAGS", own)
    settings.bring_flags({"texts": "data.files", "words": "tokenizer.path"})
    assert read(str(Path(str(texts.value)).parent)) == {"a.txt": "a"}
    assert words.value == "openai/clip"
    own(["", "--texts=https://example.org/a.txt"])
    with pytest.raises(UserError, match=r"--texts: https://example.org/a.txt .*expected gs://"):
        settings.bring_flags({"texts": "data.files"})
