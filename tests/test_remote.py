"""A run that is kept in an object store: brought, sent, cut off, gone on with elsewhere."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import importlib.util
import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from blindvalm_jax import addresses, config, remote, starting
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import inputs, mirror, places
from tests import small_models, small_text, tiny_tokenizers
from tests.test_train import settings, write_tower

ADDRESS = "memory://bucket/runs/first"
LAST = "_CHECKPOINT_METADATA"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are worked on in a directory of the test; the store is empty before and after."""
    monkeypatch.setattr(addresses, "STORES", ["gs", "s3", "memory"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.store.clear()
    with inputs.released():
        yield
    store.store.clear()


def there() -> dict[str, bytes]:
    """What the store holds of the run."""
    store = fsspec.filesystem("memory")
    root = "/bucket/runs/first/"
    return {n.removeprefix(root): store.cat_file(n) for n in store.find(root)}


def write(name: str, content: str) -> None:
    path = places.of_run(ADDRESS) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def here() -> dict[str, str]:
    """What is in the directory, without locks and notes."""
    directory = places.of_run(ADDRESS)
    found = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    return {n: p.read_text() for n, p in found.items() if n not in (".run.lock", ".sent.json")}


def aside() -> dict[str, str]:
    """What was moved aside."""
    found = [p for p in places.of_run(ADDRESS).parent.rglob("*") if p.is_file()]
    moved = [p for p in found if ".unsent-" in str(p)]
    return {str(p).partition(".unsent-")[2].partition("/")[2]: p.read_text() for p in moved}


def on_another_machine(place: Path) -> contextlib.ExitStack:
    """While it lasts, runs are worked on elsewhere."""
    stack = contextlib.ExitStack()
    monkey = stack.enter_context(pytest.MonkeyPatch.context())
    monkey.setattr("tempfile.tempdir", str(place))
    return stack


def test_what_is_new_is_sent_what_is_gone_is_removed_and_the_unfinished_stays() -> None:
    store = remote.Store(ADDRESS)
    write("run.json", "{}")
    write("metrics.jsonl", "1\n")
    write(f"checkpoints/2/{LAST}", "whole")
    write("checkpoints/2/state/a", "array")
    for name in (
        *("checkpoints/4/state/a", "checkpoints/4.orbax-checkpoint-tmp/state/a"),
        *(".run.lock", "data/x.17.partial"),
    ):
        write(name, "unfinished")
    store.send()
    first = {"run.json", "metrics.jsonl", f"checkpoints/2/{LAST}", "checkpoints/2/state/a"}
    assert there().keys() == first
    write("metrics.jsonl", "1\n2\n")
    write(f"checkpoints/4/{LAST}", "whole")
    shutil.rmtree(places.of_run(ADDRESS) / "checkpoints/2")
    store.send()
    assert there()["metrics.jsonl"] == b"1\n2\n"
    steps = {name for name in there() if name.startswith("checkpoints")}
    assert steps == {f"checkpoints/4/{LAST}", "checkpoints/4/state/a"}


def test_what_makes_a_step_whole_is_sent_last_and_removed_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, order = remote.Store(ADDRESS), []
    memory = fsspec.filesystem("memory")
    for name in ("put_file", "rm_file"):
        kept = getattr(memory, name)

        def noted(*paths: str, kept: Any = kept, name: str = name) -> None:
            order.append((name, Path(paths[-1]).name))
            kept(*paths)

        monkeypatch.setattr(memory, name, noted)
    for file in ("state/a", LAST, "zz"):
        write(f"checkpoints/2/{file}", "x")
    store.send()
    assert [name for _, name in order][-1] == LAST
    shutil.rmtree(places.of_run(ADDRESS) / "checkpoints/2")
    store.send()
    assert len(order) == len(there()) == 3  # it is the only one there
    write(f"checkpoints/4/{LAST}", "x")
    store.send()
    assert order[3:5] == [("put_file", LAST), ("rm_file", LAST)]
    assert there().keys() == {f"checkpoints/4/{LAST}"}


def test_a_bad_step_is_removed_and_one_that_is_saved_anew_is_none_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, memory = remote.Store(ADDRESS), fsspec.filesystem("memory")
    write("checkpoints/2/state/a", "old")
    write(f"checkpoints/2/{LAST}", "old")
    store.send()
    put, seen = memory.put_file, []

    def noted(*paths: str) -> None:
        seen.append((Path(paths[1]).name, f"checkpoints/2/{LAST}" in there()))
        put(*paths)

    monkeypatch.setattr(memory, "put_file", noted)
    write("checkpoints/2/state/a", "newer")
    write(f"checkpoints/2/{LAST}", "newer")
    store.send()
    assert seen == [("a", False), (LAST, False)]
    directory = places.of_run(ADDRESS)
    (directory / "quarantine").mkdir()
    (directory / "checkpoints/2").rename(directory / "quarantine/2")
    store.send()
    assert {name.split("/")[0] for name in there()} == {"quarantine"}


def test_another_machine_gets_what_was_sent_and_no_half_a_step() -> None:
    store = remote.Store(ADDRESS)
    write("run.json", "1")
    for step in (2, 4):
        write(f"checkpoints/{step}/state/a", str(step))
        write(f"checkpoints/{step}/{LAST}", "whole")
    store.send()
    fsspec.filesystem("memory").rm_file(f"/bucket/runs/first/checkpoints/4/{LAST}")
    directory = places.of_run(ADDRESS)
    write("run.json", "2")  # of one that was cut off before it was sent
    write("extra", "x")
    again = remote.Store(ADDRESS)
    assert again.bring() == []
    assert here().keys() == {"run.json", "checkpoints/2/state/a", f"checkpoints/2/{LAST}"}
    assert (directory / "run.json").read_text() == "1"
    assert not (directory / "checkpoints/4").exists()
    assert aside() == {"run.json": "2", "extra": "x"}
    again.send()
    assert not [name for name in there() if name.startswith("checkpoints/4/")]


def test_a_store_that_fails_for_a_while_is_tried_again_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    put, tries = memory.put_file, []

    def failing(*paths: str) -> None:
        tries.append(paths)
        if len(tries) < 3:
            raise OSError("no network")
        put(*paths)

    monkeypatch.setattr(memory, "put_file", failing)
    with remote.kept(ADDRESS, seconds=0.01):
        write("metrics.jsonl", "1\n")
        deadline = time.monotonic() + 60
        while "metrics.jsonl" not in there() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert there()["metrics.jsonl"] == b"1\n"  # while it is worked on
    assert capsys.readouterr().out.count("cannot be written: OSError: no network") == 2


def test_a_store_that_fails_at_the_end_is_an_error_that_says_where_the_run_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*paths: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fsspec.filesystem("memory"), "put_file", failing)
    directory = places.of_run(ADDRESS)
    told = f"no network.* What is here is in {directory}"
    with pytest.raises(UserError, match=told), remote.kept(ADDRESS, seconds=60):
        write("metrics.jsonl", "1\n")


def save(step: int, content: str) -> None:
    """A checkpoint; of one shape all are of one size."""
    for name in ("state/a", "manifest.ocdbt", LAST):
        write(f"checkpoints/{step}/{name}", content)


def fails(*paths: str) -> None:
    raise OSError("no network")


@pytest.mark.parametrize("sent_of_the_step", [0, 1, 3])
def test_what_was_not_sent_at_the_end_is_sent_by_the_same_command(sent_of_the_step: int) -> None:
    """However far the sending came: the store is as this machine left it."""
    memory = fsspec.filesystem("memory")
    worked({"run.json": "{}"}, (2, "two"))
    put, tries = memory.put_file, []

    def failing(*paths: str) -> None:
        tries.append(paths)
        if len(tries) > sent_of_the_step:
            raise OSError("no network")
        put(*paths)

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(memory, "put_file", failing)
        with pytest.raises(UserError, match="and the same command sends it"):
            worked({"saved.json": "4"}, (4, "four"))
    assert "saved.json" not in there()
    shutil.rmtree(places.of_run(ADDRESS) / "checkpoints/2")  # kept no longer, or lost here
    before = {name: content for name, content in here().items() if name != "run.json"}
    with remote.kept(ADDRESS):
        assert {name: here()[name] for name in before} == before
        assert {name: there()[name].decode() for name in before} == before  # before it begins
        assert here()["checkpoints/2/state/a"] == "two"  # nothing is removed there for it
    assert there().keys() == here().keys()
    assert aside() == {}


def worked(files: Mapping[str, str], *saved: tuple[int, str]) -> None:
    """A machine writes files and saves checkpoints."""
    with remote.kept(ADDRESS):
        for name, content in files.items():
            write(name, content)
        for step, content in saved:
            save(step, content)


def test_the_command_sends_what_was_not_sent_and_removes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worked({"run.json": "{}"}, (2, "two"))
    fsspec.filesystem("memory").pipe_file("/bucket/runs/first/checkpoints/4/state/a", b"on its way")
    assert remote.main(["remote", ADDRESS]) == 0  # another machine is sending
    assert "checkpoints/4/state/a" in there()
    save(6, "six")
    with monkeypatch.context() as broken:
        broken.setattr(fsspec.filesystem("memory"), "put_file", fails)
        assert remote.main(["remote", ADDRESS]) == 0  # one that may only read
    assert "cannot be written" in capsys.readouterr().err
    assert here()["checkpoints/6/state/a"] == "six"
    assert remote.main(["remote", ADDRESS]) == 0
    assert there()[f"checkpoints/6/{LAST}"] == b"six"
    assert "checkpoints/4/state/a" in there()


def test_what_another_machine_sent_is_brought_and_what_was_not_sent_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worked({"run.json": "{}"}, (2, "two"))
    save(4, "ours")  # killed before this was sent
    with on_another_machine(tmp_path / "other"):
        worked({}, (4, "them"))
    enter(remote.kept(ADDRESS))
    assert here() == {name: content.decode() for name, content in there().items()}
    assert here()["checkpoints/4/manifest.ocdbt"] == "them"
    steps = {f"checkpoints/4/{name}": "ours" for name in ("state/a", "manifest.ocdbt", LAST)}
    assert aside() == steps
    told = capsys.readouterr().err
    assert "was written by another machine" in told
    assert f"moved to {places.of_run(ADDRESS)}.unsent-" in told
    enter(remote.kept(ADDRESS))
    assert aside() == steps  # and once


def test_a_step_of_another_machine_replaces_one_of_the_same_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked({"checkpoints/4/state/of_ours": "x"}, (4, "ours"))
    with on_another_machine(tmp_path / "other"), remote.kept(ADDRESS):
        shutil.rmtree(places.of_run(ADDRESS) / "checkpoints/4")
        save(4, "them")
        write("data/tokens", "other")
    enter(remote.kept(ADDRESS))
    assert {name: text for name, text in here().items() if name.startswith("checkpoints")} == {
        f"checkpoints/4/{name}": "them" for name in ("state/a", "manifest.ocdbt", LAST)
    }
    assert aside() == {}  # ours had been sent


def test_only_what_differs_is_brought_and_a_bringing_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    worked({"data/tokens": "t"}, (2, "two"))
    get = memory.get_file
    brought: list[str] = []

    def noted(*paths: str) -> None:
        if len(brought) == 2:
            raise OSError("no network")
        brought.append(Path(paths[0]).name)
        get(*paths)

    with on_another_machine(tmp_path / "other"):
        worked({"run.json": "{}"}, (4, "four"))
    monkeypatch.setattr(memory, "get_file", noted)
    with pytest.raises(UserError, match="cannot be read: OSError: no network"):
        enter(remote.kept(ADDRESS))
    brought.append("the network is back")
    enter(remote.kept(ADDRESS))
    brought.remove("the network is back")
    assert sorted(brought) == sorted(["a", "manifest.ocdbt", LAST, "run.json"])
    assert here() == {name: content.decode() for name, content in there().items()}
    assert aside() == {}


@pytest.mark.parametrize("killed_at", ["get_file", "put_file"])
def test_what_travelled_and_was_not_noted_when_killed_is_no_other_machines_work(
    killed_at: str, tmp_path: Path
) -> None:
    memory, write_notes = fsspec.filesystem("memory"), mirror.Store._write_notes
    with on_another_machine(tmp_path / "other"):
        worked({"run.json": "{}", "metrics.jsonl": "1"}, (2, "two"))
    if killed_at == "put_file":
        enter(remote.kept(ADDRESS))
        for name in ("metrics.jsonl", "run.json", "tokens"):
            write(name, "12")
        save(4, "four")
    travel, travelled = getattr(memory, killed_at), []

    def killed(*paths: str) -> None:
        travel(*paths)
        travelled.append(paths)
        if len(travelled) > 1:
            raise OSError("killed")

    def before(store: mirror.Store) -> None:
        if not travelled:
            write_notes(store)

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(memory, killed_at, killed)
        broken.setattr(mirror.Store, "_write_notes", before)
        with pytest.raises(UserError, match="killed"):
            enter(remote.kept(ADDRESS))
    enter(remote.kept(ADDRESS))
    assert here() == {name: content.decode() for name, content in there().items()}
    assert aside() == {}
    assert here()["metrics.jsonl"] == ("1" if killed_at == "get_file" else "12")


def test_a_bad_step_of_before_does_not_let_the_newest_go(tmp_path: Path) -> None:
    store, directory = remote.Store(ADDRESS), places.of_run(ADDRESS)
    save(2, "bad")
    (directory / "quarantine").mkdir()
    (directory / "checkpoints/2").rename(directory / "quarantine/2")
    save(2, "good")
    store.send()
    shutil.rmtree(directory / "checkpoints/2")
    store.send()
    assert f"checkpoints/2/{LAST}" in there()


def test_an_emptied_store_takes_nothing_from_here() -> None:
    worked({}, (2, "two"))
    fsspec.filesystem("memory").store.clear()
    enter(remote.kept(ADDRESS))
    assert here() == {}
    assert aside()["checkpoints/2/state/a"] == "two"


def test_locks_and_the_unfinished_of_a_run_copied_by_hand_are_not_brought() -> None:
    memory = fsspec.filesystem("memory")
    for name in (".run.lock", ".sent.json", "data/x.17.partial", "run.json"):
        memory.pipe_file(f"/bucket/runs/first/{name}", b"{}")
    memory.pipe_file("/bucket/runs/first/checkpoints/4.orbax-checkpoint-tmp/state/a", b"a")
    worked({"metrics.jsonl": "1\n"})
    assert here() == {"run.json": "{}", "metrics.jsonl": "1\n"}


def test_what_tells_that_there_is_a_checkpoint_is_sent_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory, order = fsspec.filesystem("memory"), []
    put = memory.put_file

    def noted(*paths: str) -> None:
        order.append(Path(paths[1]).name)
        put(*paths)

    monkeypatch.setattr(memory, "put_file", noted)
    store = remote.Store(ADDRESS)
    write("saved.json", "{}")
    write("checkpoints/2/state/a", "x")
    store.send()
    assert there() == {}
    write(f"checkpoints/2/{LAST}", "x")
    write("tokens", "x")
    store.send()
    assert order == ["tokens", "a", LAST, "saved.json"]


def test_the_directory_is_read_as_often_for_many_files_as_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = fsspec.filesystem("memory")
    contents, reads = mirror.contents, []

    def noted(directory: Path) -> Any:
        reads.append(directory)
        return contents(directory)

    monkeypatch.setattr(mirror, "contents", noted)
    counts = []
    for count in (1, 20):
        for number in range(count):
            memory.pipe_file(f"/bucket/runs/first/{number}", b"x")
        reads.clear()
        remote.Store(ADDRESS).bring()
        counts.append(len(reads))
    assert counts[0] == counts[1]


def test_what_is_renamed_meanwhile_is_no_error(tmp_path: Path) -> None:
    """Orbax renames directories of a step that it writes."""
    (tmp_path / "kept").touch()
    names = [tmp_path / "a", tmp_path / "b"]
    for inner in range(50):
        (names[0] / f"{inner}/deep").mkdir(parents=True)
        (names[0] / f"{inner}/deep/file").touch()
    ended = threading.Event()

    def rename() -> None:
        for turn in itertools.count():
            if ended.is_set():
                return
            names[turn % 2].rename(names[1 - turn % 2])

    with concurrent.futures.ThreadPoolExecutor() as pool:
        renaming = pool.submit(rename)
        try:
            for _ in range(200):
                assert "kept" in mirror.contents(tmp_path)
        finally:
            ended.set()
        renaming.result()


def test_a_second_process_of_the_machine_is_kept_out() -> None:
    write("run.json", "{}")
    with (places.of_run(ADDRESS) / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for bring in (
            lambda: remote.main(["remote", ADDRESS]),
            lambda: enter(remote.kept(ADDRESS)),
        ):
            with pytest.raises(UserError, match="is in use by another process"):
                bring()
    assert (places.of_run(ADDRESS) / "run.json").exists()  # nothing was brought
    enter(remote.kept(ADDRESS))


def enter(context: contextlib.AbstractContextManager[Path]) -> None:
    with context:
        pass


def test_the_command_brings_a_run_and_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="holds no run"):
        remote.main(["remote", ADDRESS])
    write("run.json", "{}")
    remote.Store(ADDRESS).send()
    shutil.rmtree(places.of_run(ADDRESS))
    assert remote.main(["remote", ADDRESS]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "run.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("gs://bucket", "expected gs://BUCKET/DIRECTORY"),
        ("gs:/bucket/run", "expected gs://BUCKET/DIRECTORY"),
        ("https://example.org/run", "expected gs://BUCKET/DIRECTORY"),
        ("gs://bucket/../../run", "expected gs://BUCKET/DIRECTORY"),
        ("memory://bucket/run", "expected gs://BUCKET/DIRECTORY"),
    ],
)
def test_other_addresses_are_refused(
    address: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the store of these tests is none for users
    with pytest.raises(UserError, match=told):
        places.of_run(address)


@pytest.mark.parametrize(("address", "library"), [("gs://b/run", "gcsfs"), ("s3://b/run", "s3fs")])
def test_a_missing_library_is_named(address: str, library: str) -> None:
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    with pytest.raises(UserError, match=rf"pip install 'blindvalm_jax\[{address[:2]}\]'"):
        remote.Store(address)


def test_a_run_that_was_cut_off_goes_on_on_another_machine(tmp_path: Path) -> None:
    """Run and inputs are at addresses: the record says so, and a text that changed is refused."""
    text, tower = tmp_path / "text.txt", tmp_path / "tower"
    small_text.write_text(text, small_text.documents(120))
    vocab, merges = tiny_tokenizers.clip_parts()
    write_tower(tower, vocab_size=len(vocab))
    tiny_tokenizers.write_pair(tower, vocab, merges)
    memory = fsspec.filesystem("memory")
    memory.put_file(str(text), "/bucket/texts/a.txt")
    for place in ("tower", "tokenizer"):
        for path in tower.iterdir():
            memory.put_file(str(path), f"/bucket/{place}/{path.name}")
    named = {"data": {"files": "memory://bucket/texts/*.txt"}}
    named |= {"grounding": {"tower": "memory://bucket/tower"}}
    named |= {"tokenizer": {"kind": "clip", "path": "memory://bucket/tokenizer"}}
    given = settings(text, train__steps=4, eval__every_steps=0)
    given.update(named)
    values = config.parse(given)
    with small_models.quick_compilation():
        with remote.kept(ADDRESS) as directory:
            assert starting.start(values, directory) == 0
        whole = there()
        # killed while step 4 was sent; the next machine has nothing yet, and the tower is gone
        memory.rm_file(f"/bucket/runs/first/checkpoints/4/{LAST}")
        memory.rm("/bucket/tower", recursive=True)
        with on_another_machine(tmp_path / "other"), remote.kept(ADDRESS) as directory:
            assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["2"]
            assert starting.start(values, directory) == 0
        memory.pipe_file("/bucket/texts/a.txt", text.read_bytes() + b"\n\nAnother document.\n")
        with pytest.raises(UserError, match="was trained with other data"):
            starting.start(values, directory)
    kept = there()
    assert kept.keys() >= {"config.json", "run.json", f"checkpoints/4/{LAST}"}
    assert losses(kept["metrics.jsonl"])[4] == losses(whole["metrics.jsonl"])[4]
    record, resolved = json.loads(kept["run.json"]), json.loads(kept["config.json"])
    for section, values_of in named.items():
        for key, value in values_of.items():
            assert record["config_as_given"][section][key] == value
            assert resolved[section][key] == value
    assert "changed" not in record["starts"][1]
    manifest = next(n for n in kept if n.startswith("data/windows") and "manifest" in n)
    assert b"memory://bucket/texts/a.txt" in kept[manifest]
    written = [n for n in kept if n.endswith(".json") and b"/inputs/" in kept[n]]
    assert [n for n in written if not n.endswith("file_hashes.json")] == []


def losses(lines: bytes) -> dict[int, float]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
