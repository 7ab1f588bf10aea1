"""Windows hold every token once, the same bytes however they were made, and the tower's tokens."""

from __future__ import annotations

import concurrent.futures
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import config as config_lib
from blindvalm_jax.data import (
    alignment,
    corpora,
    manifest,
    output,
    packing,
    prepared,
    tokenizers,
    units,
)
from blindvalm_jax.data import windows as windows_module
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.data.workers import Workers
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments
from tests import dying, small_text

LENGTH = 32
BPE = small_text.small_bpe()
CLIP = small_text.small_clip()


def recipe(path: Path, **changes: Any) -> packing.Recipe:
    """A recipe of 60 documents with a fifth held out, in shards of 16 windows.

    The text is written but once: another process may be reading it.
    """
    source = corpora.FileSource((str(path),))
    if not path.exists():
        small_text.write_text(path, small_text.documents(60))
    fields: dict[str, Any] = {"tokenizer": BPE, "sequence_length": LENGTH, "eval_fraction": 0.2}
    fields |= {"windows_per_shard": 16, "source": source}
    return packing.Recipe(**{**fields, **changes})


def stream(texts: list[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    parts = [[tokenizer.eos_id, *tokenizer.encode_lm(text).tolist()] for text in texts]
    return np.concatenate(parts)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a finished directory but the lock."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    found = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    assert found.pop(".lock") == b""
    return found


def split_texts(made: packing.Recipe, split: str) -> list[str]:
    return [text for name, text in made.documents() if name == split]


@pytest.mark.parametrize("tokenizer", [BPE, CLIP], ids=["train", "clip"])
def test_every_token_is_a_target_exactly_once(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    made = recipe(tmp_path / "a.txt", tokenizer=tokenizer)
    result = packing.prepare(made, tmp_path / "out", workers=1, unit_characters=700)
    for split in manifest.SPLITS:
        windows = Windows(tmp_path / "out", split)
        expected = stream(split_texts(made, split), tokenizer)
        assert len(windows) == -(-(len(expected) - 1) // LENGTH)
        targets = [windows[i]["tokens"][1 : windows[i]["count"]] for i in range(len(windows))]
        np.testing.assert_array_equal(np.concatenate(targets), expected[1:])
        for index in range(len(windows)):
            count = windows[index]["count"]
            first = index * LENGTH
            np.testing.assert_array_equal(
                windows[index]["tokens"][:count], expected[first : first + LENGTH + 1]
            )
            assert (windows[index]["tokens"][count:] == tokenizer.pad_id).all()
        record = result.splits[split]
        assert (record.tokens, record.windows) == (len(expected), len(windows))
        assert record.documents == len(split_texts(made, split))
    assert sum(record.documents for record in result.splits.values()) == 60
    assert len(result.splits["train"].shards) > 2


@pytest.mark.parametrize("length", [2, 31, 64])
def test_a_stream_that_fills_its_windows_has_no_padding(tmp_path: Path, length: int) -> None:
    """The first token is no target, so 2 windows take 2 T + 1 tokens: one more needs a third."""
    for extra, expected in ((0, 2), (1, 3)):
        text = "x" * (2 * length + extra)
        source = small_text.write_text(tmp_path / f"{extra}.txt", [text])
        assert len(BPE.encode(text)) == len(text), "the text must give one token a character"
        made = recipe(tmp_path / "b", source=source, sequence_length=length, eval_fraction=0.0)
        out = tmp_path / f"out{extra}"
        packing.prepare(made, out, workers=1)
        windows = Windows(out, "train")
        assert len(windows) == expected
        assert [windows[i]["count"] for i in range(2)] == [length + 1] * 2


@pytest.mark.parametrize("tower", [None, CLIP], ids=["shared", "aligned"])
def test_workers_and_units_do_not_change_a_byte(
    tmp_path: Path, tower: tokenizers.Tokenizer | None
) -> None:
    made = recipe(tmp_path / "a.txt", tower_tokenizer=tower)
    packing.prepare(made, tmp_path / "one", workers=1)
    packing.prepare(made, tmp_path / "two", workers=2, unit_characters=300)
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "two")
    assert len([name for name in one if name.endswith(".array_record")]) > 3
    assert not any("work" in name or "partial" in name for name in one)


PREPARE = """
from tests import test_prepare
from blindvalm_jax.data import packing
made = test_prepare.recipe(Path(sys.argv[1]), tower_tokenizer=test_prepare.CLIP)
packing.prepare(made, Path(sys.argv[2]), workers=1, unit_characters=1500)
"""


def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Dies before its nth rename or removal: in units, plan, shards, manifest, and cleaning up."""
    made = recipe(tmp_path / "a.txt", tower_tokenizer=CLIP)
    moments = dying.moments(PREPARE, tmp_path / "a.txt", tmp_path / "whole")
    whole = content(tmp_path / "whole")
    stages = set()
    # The last is before the clean-up, the one before it before the manifest appears.
    for left in sorted({*range(0, moments, moments // 6), moments - 2, moments - 1}):
        out = tmp_path / f"killed{left}"
        dying.kill(left, PREPARE, tmp_path / "a.txt", out)
        finished = (out / manifest.FILE_NAME).exists()
        shards = len(list(out.glob("*/*.array_record")))
        stages.add("finished" if finished else "shards" if shards else "units")
        packing.prepare(made, out, workers=1, unit_characters=1500)
        found = content(out)
        assert found.keys() == whole.keys()
        assert not [name for name in whole if found[name] != whole[name]]
    assert stages == {"units", "shards", "finished"}


def test_a_killed_run_ends_its_workers(tmp_path: Path) -> None:
    code = """
import multiprocessing, os, signal, sys
from pathlib import Path
from tests import test_prepare
from blindvalm_jax.data import output, packing
def die(path):
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
output.remove_shards = die
if __name__ == "__main__":
    made = test_prepare.recipe(Path(sys.argv[1]))
    packing.prepare(made, Path(sys.argv[2]), workers=2, unit_characters=1500)
"""
    died = dying.run_python(code, tmp_path / "a.txt", tmp_path / "out")
    assert died.returncode == -signal.SIGKILL, died.stderr
    pids = [int(pid) for pid in died.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        ended = poll.poll(60_000)
        os.close(handle)
        assert ended, f"worker {pid} outlived its caller"


def test_a_finished_directory_may_be_read_only(tmp_path: Path) -> None:
    """What finds it writes nothing and takes no lock, which stands for a directory it cannot."""
    made = recipe(tmp_path / "a.txt")
    out = tmp_path / "out"
    first = packing.prepare(made, out, workers=1)
    (out / output.LOCK).unlink()
    (out / output.LOCK).mkdir()
    before = sorted(out.rglob("*"))
    assert packing.prepare(made, out, workers=1) == first
    assert sorted(out.rglob("*")) == before


def test_waiting_for_another_process_is_announced(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from blindvalm_jax.data import output
with output.locked(Path(sys.argv[1])):
    print("mine", flush=True)
"""
    root = Path(__file__).resolve().parents[1]
    with output.locked(tmp_path):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr is not None
        assert f"waiting: another process prepares {tmp_path}" in other.stderr.readline()
    assert other.communicate(timeout=60)[0] == "mine\n"


def test_an_error_is_not_preceded_by_a_last_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\n" + b"two\n" * 9_000 + b"\xff")
    source = corpora.FileSource((str(tmp_path / "a.txt"),))
    with pytest.raises(UserError, match="not UTF-8"):
        packing.prepare(recipe(tmp_path / "b.txt", source=source), tmp_path / "out", workers=1)
    assert capsys.readouterr().err == ""


def test_two_processes_may_prepare_the_same_directory(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt", tower_tokenizer=CLIP)
    packing.prepare(made, tmp_path / "alone", workers=1)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        arguments = PREPARE, tmp_path / "a.txt", tmp_path / "both"
        runs = [pool.submit(dying.moments, *arguments) for _ in range(2)]
    assert max(run.result() for run in runs) > 10
    assert content(tmp_path / "both") == content(tmp_path / "alone")


def test_finished_work_may_be_deleted_by_several_at_once(tmp_path: Path) -> None:
    """Who writes the manifest cleans up, and so does who finds it: both may be at it."""
    for attempt in range(20):
        work = tmp_path / f"work{attempt}"
        work.mkdir()
        for number in range(50):
            (work / f"train-{number:06}.npz").touch()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(output.remove_work, [work] * 4))
        assert not work.exists()


def test_a_dead_worker_is_one_clear_line() -> None:
    with Workers(2, None) as pool, pytest.raises(UserError, match="one of 2 worker processes died"):
        list(pool.map(small_text.die, range(5)))


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt")
    with pytest.raises(UserError, match="cannot make the directory .*a.txt/out"):
        packing.prepare(made, tmp_path / "a.txt" / "out", workers=1)
    output.claim(tmp_path / "out", [])
    (tmp_path / "out" / "train").write_text("a file where a directory must be")
    with pytest.raises(UserError, match="cannot prepare .*File exists.*goes on where it stopped"):
        packing.prepare(made, tmp_path / "out", workers=1)


def test_what_prepare_did_not_make_is_never_deleted(tmp_path: Path) -> None:
    """A directory with the user's own files is refused untouched, also the folders of a split."""
    made = recipe(tmp_path / "a.txt")
    out = tmp_path / "out"
    for name in (
        "train/a.txt",
        "eval/windows-00000.array_record",
        "work/x.npz",
        manifest.FILE_NAME,
    ):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        with pytest.raises(UserError, match="not empty and was not made by prepare"):
            packing.prepare(made, out, workers=1)
        assert [p.read_text() for p in out.rglob("*") if p.is_file()] == ["mine"]
        path.unlink()
    for folder in ("train", "eval", "work"):
        (out / folder).rmdir()
    packing.prepare(made, out, workers=1)


def test_own_directories_keep_files_of_others(tmp_path: Path) -> None:
    """Shards of a plan that was given up go; a file put beside them stays."""
    made = recipe(tmp_path / "a.txt")
    out = tmp_path / "out"
    output.claim(out, [])
    for name in ("train/notes.txt", "train/windows-00099.array_record", "work/notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    packing.prepare(made, out, workers=1)
    assert (out / "train" / "notes.txt").read_text() == "mine"
    assert (out / "work" / "notes.txt").read_text() == "mine"
    assert not (out / "train" / "windows-00099.array_record").exists()


def test_text_below_the_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output.claim(out, [])
    with pytest.raises(UserError, match="a.txt lies under .*out, where windows"):
        packing.prepare(recipe(out / "a.txt"), out, workers=1)
    (tmp_path / "link").symlink_to(out)
    source = corpora.FileSource((str(tmp_path / "link" / "a.txt"),))
    with pytest.raises(UserError, match="lies under"):
        packing.prepare(recipe(tmp_path / "b.txt", source=source), out, workers=1)
    assert (out / "a.txt").exists()


FULL = """
import resource, signal, sys
from pathlib import Path
from tests import test_prepare
from blindvalm_jax import errors
from blindvalm_jax.data import packing
made = test_prepare.recipe(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    packing.prepare(made, Path(sys.argv[2]), workers=1)
except errors.UserError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_clear_line(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: in the units, then in the shards."""
    for limit in (9_000, 30_000):
        made = recipe(tmp_path / "a.txt")
        done = dying.run_python(FULL, tmp_path / "a.txt", tmp_path / "out", limit)
        assert done.returncode == 0, done.stderr
        assert "cannot prepare" in done.stdout
        assert ("cannot write" in done.stdout) == bool(list((tmp_path / "out/work").glob("*.npz")))
        assert len(done.stdout.splitlines()) == 1
    packing.prepare(made, tmp_path / "out", workers=1)


def test_a_damaged_unit_is_tokenized_again(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt")
    job = units.UnitJob(path=tmp_path / "train-000000-x.npz", texts=("the cat sat " * 50,))

    def again() -> bool:
        tallies = {split: units.Tally() for split in manifest.SPLITS}
        found = units.jobs(made.documents(), directory=tmp_path, key="k", tallies=tallies)
        return bool(next(iter(found))[1].texts)

    assert again()
    tallies = {split: units.Tally() for split in manifest.SPLITS}
    (_, job), *_ = units.jobs(made.documents(), directory=tmp_path, key="k", tallies=tallies)
    units.encode(made.encoding, ("train", job))
    assert not again()
    whole = job.path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", whole[:-100], flipped):
        job.path.write_bytes(damaged)
        assert again()


def test_a_shard_of_another_size_is_packed_again(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt")
    whole = packing.prepare(made, tmp_path / "whole", workers=1)
    out = tmp_path / "out"
    moments = dying.moments(PREPARE, tmp_path / "a.txt", tmp_path / "count")
    dying.kill(moments - 2, PREPARE, tmp_path / "a.txt", out)
    (path, *_) = sorted((out / "train").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    made = recipe(tmp_path / "a.txt", tower_tokenizer=CLIP)
    found = packing.prepare(made, out, workers=1, unit_characters=1500)
    assert path.stat().st_size == found.splits["train"].shards[0].bytes
    assert found.splits["train"].windows == whole.splits["train"].windows
    Windows(out, "train")


def test_finished_units_are_not_tokenized_again(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt")

    def jobs() -> list[tuple[str, units.UnitJob]]:
        tallies = {split: units.Tally() for split in manifest.SPLITS}
        return list(
            units.jobs(
                made.documents(),
                directory=tmp_path,
                key="k",
                tallies=tallies,
                unit_characters=1500,
            )
        )

    first = jobs()
    assert all(job.texts for _, job in first)
    for job in first[:3]:
        units.encode(made.encoding, job)
    assert [bool(job.texts) for _, job in jobs()] == [False] * 3 + [True] * (len(first) - 3)
    texts = [f"{text} more" for text in small_text.documents(60)]
    small_text.write_text(tmp_path / "a.txt", texts)
    assert all(job.texts for _, job in jobs())


def test_shards_of_changed_text_are_not_kept(tmp_path: Path) -> None:
    """Killed in the shards, then the text changes: nothing of the old text may stay."""
    recipe(tmp_path / "a.txt")
    moments = dying.moments(PREPARE, tmp_path / "a.txt", tmp_path / "whole")
    dying.kill(moments - 4, PREPARE, tmp_path / "a.txt", tmp_path / "out")
    assert list((tmp_path / "out").glob("*/*.array_record"))
    texts = [text.replace("the", "these") for text in small_text.documents(60)]
    made = recipe(tmp_path / "a.txt", source=small_text.write_text(tmp_path / "b.txt", texts))
    packing.prepare(made, tmp_path / "out", workers=1)
    packing.prepare(made, tmp_path / "fresh", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = small_text.documents(400, longest=8)
    forward = recipe(tmp_path / "a", source=small_text.write_text(tmp_path / "f.txt", texts))
    turned = small_text.write_text(tmp_path / "t.txt", texts[::-1] + texts)
    backward = recipe(tmp_path / "a", source=turned)
    held_out = set(split_texts(forward, "eval"))
    assert held_out == set(split_texts(backward, "eval"))
    assert not held_out & set(split_texts(backward, "train"))
    # 400 draws at 0.2: the standard deviation is 8.
    assert 80 - 5 * 8 < len(held_out) < 80 + 5 * 8


def test_eval_files_replace_the_share(tmp_path: Path) -> None:
    held_out = small_text.write_text(tmp_path / "e.txt", small_text.documents(5, seed=3))
    made = recipe(tmp_path / "a.txt", eval_source=held_out)
    found = packing.prepare(made, tmp_path / "out", workers=1)
    assert [found.splits[split].documents for split in manifest.SPLITS] == [60, 5]
    assert found.eval_sources[0]["path"] == str(tmp_path / "e.txt")


@pytest.mark.parametrize("fraction", [1e-6, 0.3, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 60])
def test_both_splits_have_a_document_when_there_are_two(
    tmp_path: Path, fraction: float, count: int
) -> None:
    texts = small_text.documents(count)
    source = small_text.write_text(tmp_path / "a.txt", texts)
    found = packing.prepare(
        recipe(tmp_path / "b.txt", source=source, eval_fraction=fraction),
        tmp_path / "out",
        workers=1,
    )
    counts = [found.splits[split].documents for split in manifest.SPLITS]
    assert min(counts) >= 1
    assert sum(counts) == count
    held_out = split_texts(recipe(tmp_path / "b.txt", source=source, eval_fraction=1e-6), "eval")
    read = list(source.documents())
    assert held_out == [min(read, key=units.text_hash)]


@pytest.mark.parametrize("texts", [["one text"], ["one text"] * 3])
@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_a_text_that_cannot_be_split_is_refused(
    tmp_path: Path, texts: list[str], fraction: float
) -> None:
    source = small_text.write_text(tmp_path / "a.txt", texts)
    made = recipe(tmp_path / "b.txt", source=source, eval_fraction=fraction)
    message = f"{len(texts)} document.s., .* blank line .*data.eval_files.*data.eval_fraction=0"
    with pytest.raises(UserError, match=message):
        packing.prepare(made, tmp_path / "out", workers=1)
    made = recipe(tmp_path / "b.txt", source=source, eval_fraction=0.0)
    assert packing.prepare(made, tmp_path / "out", workers=1).splits["eval"].documents == 0


@pytest.mark.parametrize("tokenizer", [BPE, CLIP], ids=["train", "clip"])
@pytest.mark.parametrize("tower", [None, CLIP], ids=["shared", "aligned"])
def test_no_text_can_pose_as_a_separator(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, tower: tokenizers.Tokenizer | None
) -> None:
    texts = ["the <|endoftext|> cat <|endoftext|>", "sat</s>on"]
    source = small_text.write_text(tmp_path / "a.txt", texts)
    fields: dict[str, Any] = {"tokenizer": tokenizer, "tower_tokenizer": tower}
    made = recipe(tmp_path / "b.txt", source=source, eval_fraction=0.0, **fields)
    packing.prepare(made, tmp_path / "out", workers=1)
    windows = Windows(tmp_path / "out", "train")
    rows = [
        windows[i]["tokens"][: min(int(windows[i]["count"]), LENGTH)] for i in range(len(windows))
    ]
    tokens = np.concatenate(rows)
    assert (tokens == tokenizer.eos_id).sum() == 2
    if tokenizer is BPE:
        assert "the <|endoftext|> cat <|endoftext|>" in BPE.decode(tokens[1:].tolist())
        assert BPE.eos_id in BPE.encode(texts[0]), "a prompt may hold the separator"


def test_no_held_out_text_when_none_is_asked_for(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt", eval_fraction=0.0)
    assert packing.prepare(made, tmp_path / "out", workers=1).splits["eval"].windows == 0
    with pytest.raises(UserError, match="has no eval windows"):
        Windows(tmp_path / "out", "eval")


def test_a_finished_directory_is_kept_and_guarded(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt")
    out = tmp_path / "out"
    first = packing.prepare(made, out, workers=1)
    written = (out / manifest.FILE_NAME).stat().st_mtime_ns
    assert packing.prepare(made, out, workers=1) == first
    assert (out / manifest.FILE_NAME).stat().st_mtime_ns == written
    with pytest.raises(UserError, match="made of other text or with other settings"):
        packing.prepare(recipe(tmp_path / "a.txt", rule="reference"), out, workers=1)


@pytest.mark.parametrize("rule", ["causal", "reference"])
def test_shared_windows_hold_the_cuts_of_their_own_tokens(
    tmp_path: Path, rule: segments.Rule
) -> None:
    made = recipe(tmp_path / "a.txt", tokenizer=CLIP, rule=rule, longest_segment=14)
    packing.prepare(made, tmp_path / "out", workers=1)
    windows = Windows(tmp_path / "out", "train")
    lengths: list[int] = []
    for index in range(len(windows)):
        window = windows[index]
        real = min(int(window["count"]), LENGTH)
        ids = window["tokens"][:real] - 4
        ids = np.where(window["tokens"][:real] == 2, CLIP.vocab_size - 5, ids)
        np.testing.assert_array_equal(window["tower_tokens"][:real], ids)
        starts = segments.starts(
            ids[None], rule=rule, separators=segments.separators_for(CLIP, 14)
        )[0]
        np.testing.assert_array_equal(window["tower_starts"][:real], starts)
        lengths += segments.lengths(starts).tolist()
        assert "tower_index" not in window
    record = windows.split
    assert record.segments == len(lengths)
    assert record.mean_segment == pytest.approx(np.mean(lengths), abs=1e-3)
    assert record.full_segments == pytest.approx(np.mean(np.array(lengths) == 14), abs=1e-6)


@pytest.mark.parametrize("rule", ["causal", "reference"])
def test_aligned_windows_equal_a_token_by_token_computation(
    tmp_path: Path, rule: segments.Rule
) -> None:
    made = recipe(tmp_path / "a.txt", tower_tokenizer=CLIP, rule=rule, longest_segment=20)
    found = packing.prepare(made, tmp_path / "out", workers=1, unit_characters=900)
    widest = 0
    for split in manifest.SPLITS:
        lm: list[int] = []
        seen: list[int] = []  # tower tokens that each token may look at
        tower: list[int] = []
        for text in split_texts(made, split):
            aligned = alignment.align(BPE, CLIP, text)
            lm.append(BPE.eos_id)
            seen.append(len(tower) + 1)
            base = len(tower) + 1
            reached = aligned.clip_known if rule == "causal" else aligned.clip_end
            for token, end in zip(aligned.lm_ids, aligned.lm_end, strict=True):
                lm.append(int(token))
                seen.append(base + sum(int(other) <= end for other in reached))
            tower += [CLIP.vocab_size - 5, *aligned.clip_ids.tolist()]
        windows = Windows(tmp_path / "out", split)
        for index in range(len(windows)):
            window = windows[index]
            first = index * LENGTH
            inputs = range(first, min(first + LENGTH, len(lm)))
            before = seen[first - 1] if first else 0
            ids = tower[before : seen[inputs[-1]]]
            widest = max(widest, len(ids))
            np.testing.assert_array_equal(window["tower_tokens"][: len(ids)], ids)
            assert (window["tower_tokens"][len(ids) :] == 0).all()
            expected = [seen[position] - before for position in inputs]
            np.testing.assert_array_equal(window["tower_index"][: len(inputs)], expected)
            assert (window["tower_index"] <= len(ids)).all()
            starts = segments.starts(
                np.array([ids]), rule=rule, separators=segments.separators_for(CLIP, 20)
            )[0]
            np.testing.assert_array_equal(window["tower_starts"][: len(ids)], starts)
            assert segments.lengths(window["tower_starts"]).max() <= 20
    assert found.tower_length == -(-widest // 64) * 64


def test_the_tower_table_of_clip() -> None:
    known: dict[str, Any] = {"eos_id": 0, "pad_id": 0, "fingerprint": ""}
    clip = manifest.TokenizerRecord(kind="clip", vocab_size=49412, lm_offset=4, **known)
    table = manifest.tower_table(clip)
    assert table[[0, 1, 2, 3, 4, 5, 49411]].tolist() == [49406, 0, 49407, 49407, 0, 1, 49407]
    assert table.max() == 49407
    np.testing.assert_array_equal(manifest.tower_table(BPE), np.arange(BPE.vocab_size))


def test_ids_that_need_more_than_two_bytes_survive() -> None:
    layout = manifest.record_dtype(
        sequence_length=4, vocab_size=70_000, tower_length=None, tower_vocab_size=70_000
    )
    record = np.zeros(1, layout)
    record["tokens"] = 69_999
    assert np.frombuffer(record.tobytes(), layout)["tokens"].tolist() == [[69_999] * 5]


def damage_missing_manifest(out: Path) -> None:
    (out / manifest.FILE_NAME).unlink()


def damage_newer(out: Path) -> None:
    values = json.loads((out / manifest.FILE_NAME).read_text())
    (out / manifest.FILE_NAME).write_text(json.dumps({**values, "format_version": 99}))


def damage_version_type(out: Path) -> None:
    values = json.loads((out / manifest.FILE_NAME).read_text())
    (out / manifest.FILE_NAME).write_text(json.dumps({**values, "format_version": "two"}))


def damage_garbled(out: Path) -> None:
    (out / manifest.FILE_NAME).write_text('{"format_version": 2}')


def damage_missing_shard(out: Path) -> None:
    (out / "train" / "windows-00001.array_record").unlink()


def damage_short_shard(out: Path) -> None:
    path = out / "train" / "windows-00000.array_record"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_manifest, "has no manifest.json: preparation did not finish"),
        (damage_newer, "is of format version 99, this program reads 2: update"),
        (damage_garbled, "is damaged"),
        (damage_version_type, "is damaged .*format_version is 'two'"),
        (damage_missing_shard, "windows-00001.array_record is missing"),
        (damage_short_shard, r"windows-00000.array_record has \d+ bytes, the manifest says"),
    ],
)
def test_damaged_directories_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    packing.prepare(recipe(tmp_path / "a.txt"), tmp_path / "out", workers=1)
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        Windows(tmp_path / "out", "train")


def test_a_flipped_byte_in_a_shard_names_file_and_window(tmp_path: Path) -> None:
    packing.prepare(recipe(tmp_path / "a.txt"), tmp_path / "out", workers=1)
    path = tmp_path / "out" / "train" / "windows-00001.array_record"
    whole = path.read_bytes()
    row = Windows(tmp_path / "out", "train")[16 + 3]["tokens"].astype(np.uint16).tobytes()
    place = whole.index(row)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    windows = Windows(tmp_path / "out", "train")
    windows[16 + 2]
    with pytest.raises(UserError, match="windows-00001.array_record is damaged at window 3 of it"):
        windows[16 + 3]
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="windows-00001.array_record is damaged at window 0 of it"):
        Windows(tmp_path / "out", "train")[16]


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "_MOST_OPEN", 3)
    packing.prepare(recipe(tmp_path / "a.txt"), tmp_path / "out", workers=1)
    windows = Windows(tmp_path / "out", "train")
    assert len(windows.split.shards) > 6
    expected = [windows[index]["tokens"] for index in range(len(windows))]
    for index in np.random.default_rng(0).integers(0, len(windows), 100):
        np.testing.assert_array_equal(windows[index]["tokens"], expected[index])
        links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        assert 1 <= sum(link.startswith(str(tmp_path)) for link in links) <= 3


def test_no_directory_and_no_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory of windows"):
        Windows(tmp_path / "none", "train")
    packing.prepare(recipe(tmp_path / "a.txt"), tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="no split 'test'.*known: eval, train"):
        Windows(tmp_path / "out", "test")


def test_recipes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be 2 \.\.\. 1,048,576 tokens long, got 1"):
        packing.prepare(recipe(tmp_path / "a.txt", sequence_length=1), tmp_path / "out")
    with pytest.raises(UserError, match="must have CLIP's, got train"):
        packing.prepare(
            recipe(tmp_path / "a.txt", tokenizer=CLIP, tower_tokenizer=BPE), tmp_path / "out"
        )


def run_config(tmp_path: Path, **changes: Any) -> config_lib.Config:
    """Settings of a run on 60 documents with a learned BPE of 300 entries."""
    small_text.write_text(tmp_path / "a.txt", small_text.documents(60))
    values = config_lib.default()
    values.data.files = str(tmp_path / "a.txt")
    values.data.sequence_length = LENGTH
    values.data.eval_fraction = 0.2
    values.data.workers = 1
    values.tokenizer.kind = "train"
    values.tokenizer.train_vocab_size = 300
    with values.unlocked():
        values.update_from_flattened_dict(changes)
    return config_lib.parse(values)


def test_another_table_of_separators_makes_other_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_config(tmp_path)
    directory = prepared.ensure_prepared(settings, tmp_path / "run")
    monkeypatch.delitem(segments._SENTENCE, ".")
    assert prepared.ensure_prepared(settings, tmp_path / "run") != directory


def test_worker_processes_start_without_jax() -> None:
    code = "import sys, blindvalm_jax.data.units; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_prepares_once_and_finds_it_again(tmp_path: Path) -> None:
    settings = run_config(tmp_path)
    directory = prepared.ensure_prepared(settings, tmp_path / "run", tower_context=16)
    found = manifest.load(directory)
    assert directory.parent == tmp_path / "run" / "data"
    assert (found.longest_segment, found.tokenizer.vocab_size, found.mode) == (14, 300, "shared")
    written = (directory / manifest.FILE_NAME).stat().st_mtime_ns
    assert prepared.ensure_prepared(settings, tmp_path / "run", tower_context=16) == directory
    assert (directory / manifest.FILE_NAME).stat().st_mtime_ns == written
    assert prepared.ensure_prepared(settings, tmp_path / "run", tower_context=20) != directory


def test_a_learned_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    settings = run_config(tmp_path)
    directory = prepared.ensure_prepared(settings, tmp_path / "run")
    made = recipe(tmp_path / "a.txt")
    expected = tokenizers.train(iter(split_texts(made, "train")), vocab_size=300)
    loaded = tokenizers.load("train", str(directory / "tokenizer"))
    assert loaded.fingerprint == expected.fingerprint
    everything = tokenizers.train(iter(small_text.documents(60)), vocab_size=300)
    assert loaded.fingerprint != everything.fingerprint


def test_given_windows_must_fit_the_settings(tmp_path: Path) -> None:
    CLIP.save(tmp_path / "clip")
    directory = prepared.ensure_prepared(run_config(tmp_path), tmp_path / "run")
    given = {"data.files": "", "data.windows": str(directory)}
    assert prepared.ensure_prepared(run_config(tmp_path, **given), tmp_path / "x") == directory
    for change, message in (
        ({"data.sequence_length": 64}, "does not fit data.sequence_length: .* 64.* 32"),
        ({"tokenizer.kind": "gpt2"}, "does not fit tokenizer.kind: .*'gpt2'.*'train'"),
        ({"grounding.segments": "reference"}, "does not fit grounding.segments"),
        ({"grounding.tokenizer": str(tmp_path / "clip")}, "does not fit grounding.tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            prepared.ensure_prepared(run_config(tmp_path, **given, **change), tmp_path / "x")
    with pytest.raises(UserError, match="longest segment of the tower: .* 14.* 75"):
        prepared.ensure_prepared(run_config(tmp_path, **given), tmp_path / "x", tower_context=16)
    plain = {"grounding.source": "none", "grounding.segments": "reference"}
    assert prepared.ensure_prepared(run_config(tmp_path, **given, **plain), "x") == directory


def test_a_tower_with_its_own_tokenizer_gets_its_own_tokens(tmp_path: Path) -> None:
    CLIP.save(tmp_path / "clip")
    settings = run_config(tmp_path, **{"grounding.tokenizer": str(tmp_path / "clip")})
    directory = prepared.ensure_prepared(settings, tmp_path / "run")
    assert manifest.load(directory).tower_record.fingerprint == CLIP.fingerprint
    assert "tower_index" in Windows(directory, "train")[0]


def test_a_tower_without_a_tokenizer_shares_clips_tokens(tmp_path: Path) -> None:
    CLIP.save(tmp_path / "clip")
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower.pt").write_bytes(b"weights")
    clip = {"tokenizer.kind": "clip", "tokenizer.path": str(tmp_path / "clip")}
    for tower in ("tower", "tower.pt"):
        given = {"grounding.tower": str(tmp_path / tower)}
        directory = prepared.ensure_prepared(run_config(tmp_path, **clip, **given), tmp_path / "r")
        assert manifest.load(directory).mode == "shared"
        with pytest.raises(UserError, match="brings no tokenizer.*set grounding.tokenizer"):
            prepared.ensure_prepared(run_config(tmp_path, **given), tmp_path / "r")
    for wrong, message in (
        ({"grounding.tokenizer": "/none"}, "^grounding.tokenizer /none does not exist"),
        ({"grounding.tokenizer": str(tmp_path / "tower")}, "^grounding.tokenizer: .*no CLIP tok"),
        ({"grounding.tower": "/none"}, r"^grounding.tokenizer \(empty: grounding.tower\) /none"),
    ):
        with pytest.raises(UserError, match=message):
            prepared.ensure_prepared(run_config(tmp_path, **wrong), tmp_path / "r")


def test_settings_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data.files, data.tfds or data.windows"):
        prepared.ensure_prepared(run_config(tmp_path, **{"data.files": ""}), tmp_path)
    with pytest.raises(UserError, match="tokenizer.kind=clip needs tokenizer.path"):
        prepared.ensure_prepared(run_config(tmp_path, **{"tokenizer.kind": "clip"}), tmp_path)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blindvalm_jax.prepare", *arguments]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_prepares_and_reports(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a.txt")
    BPE.save(tmp_path / "bpe")
    out = tmp_path / "out"
    arguments = [f"--files={tmp_path}/a.txt", f"--out={out}", "--tokenizer=train"]
    arguments += [f"--tokenizer_path={tmp_path}/bpe", f"--sequence_length={LENGTH}"]
    done = run_cli(*arguments, "--eval_fraction=0.2", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert f"{manifest.load(out).splits['train'].windows:,} windows" in done.stdout
    packing.prepare(made, tmp_path / "library", workers=1)
    expected = Windows(tmp_path / "library", "eval")
    found = Windows(out, "eval")
    assert len(found) == len(expected)
    np.testing.assert_array_equal(found[0]["tokens"], expected[0]["tokens"])


@pytest.mark.parametrize(("words", "warned"), [("漢字 " * 40, True), ("the cat " * 300, False)])
def test_the_command_warns_of_a_wide_tower(tmp_path: Path, words: str, warned: bool) -> None:
    """CLIP's tokenizer of five merges reads these characters byte by byte, the BPE whole."""
    small_text.write_text(tmp_path / "a.txt", [words])
    tokenizers.train(iter([words]), vocab_size=280).save(tmp_path / "bpe")
    CLIP.save(tmp_path / "clip")
    arguments = [f"--files={tmp_path}/a.txt", f"--out={tmp_path}/out", "--tokenizer=train"]
    arguments += [f"--tokenizer_path={tmp_path}/bpe", f"--tower_tokenizer={tmp_path}/clip"]
    length = 32 if warned else 300
    done = run_cli(*arguments, "--eval_fraction=0", "--workers=1", f"--sequence_length={length}")
    assert done.returncode == 0, done.stderr
    assert ("warning: the tower reads rows of" in done.stdout) == warned, done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files=x.txt"], "--out is missing"),
        (["--files=x.txt", "--out=o", "--tfds_split=test"], "--tfds_split goes with --tfds"),
        (["--out=o"], "either --files or --tfds"),
        (["--out=o", "--files=x.txt"], "tokenizer.kind=clip needs tokenizer.path"),
        (["--out=o", "--files=none*.txt", "--tokenizer=train"], "no file matches 'none*.txt'"),
        (
            ["--out=o", "--files=x.txt", "--tokenizer=clip", "--tokenizer_path=/none"],
            "tokenizer.path /none does not exist",
        ),
        (["--out=o", "--files=x.txt", "--eval_fraction=0.9"], "must be 0 ... 0.5, got 0.9"),
    ],
)
def test_wrong_commands_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    arguments = [a.replace("--out=o", f"--out={tmp_path}/o") for a in arguments]
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_key_is_of_contents_in_order_not_of_paths(tmp_path: Path) -> None:
    def key(*names: str) -> str:
        source = corpora.FileSource(tuple(str(tmp_path / name) for name in names))
        return recipe(tmp_path / "x", source=source).key

    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("c.txt", "one"), ("d.jsonl", "one")):
        (tmp_path / name).write_text(text)
    assert key("a.txt") == key("c.txt") == key("a.txt", "sub/../a.txt".replace("sub/../", "./"))
    assert key("a.txt", "b.txt") == key("b.txt", "a.txt") != key("b.txt", "c.txt")
    assert len({key("a.txt"), key("b.txt"), key("d.jsonl")}) == 3


def test_the_order_of_fields_of_a_source_is_part_of_the_key(tmp_path: Path) -> None:
    """Two sources that read other fields of the same file make other windows."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "one two three", "b": "four five six"}\n')
    keys = {
        recipe(tmp_path / "x", source=corpora.FileSource((str(path),), field)).key
        for field in ("a", "b")
    }
    assert len(keys) == 2
