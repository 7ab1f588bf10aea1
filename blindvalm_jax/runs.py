"""The directory of a run: the settings it was started with, and the record of what it is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from blindvalm_jax import addresses, changes, distributed, files
from blindvalm_jax.checkpoints import layout, quarantine
from blindvalm_jax.config import Config
from blindvalm_jax.console import is_first, say
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import places

MARKER, LOCK = ".blindvalm_run", ".run.lock"
_WRITTEN = (
    *("checkpoints", "config.json", "data", "eval", "events.jsonl", "logs", "metrics.jsonl"),
    *("parameters.txt", "placement.md", "profile", "quarantine", "run.json", "saved.json"),
    *("tensorboard", "tower", "wandb", "wandb.json"),
)
_TIMED = ("remat", "scan_unroll", "loss_chunk")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_resume(workdir: Path, config: Config, *, allowed: Sequence[str] = ()) -> int | None:
    """Updates done in the newest checkpoint of the run to resume, or None; creates the directory.

    Says which settings changed that may. allowed: settings or sections that may change besides.

    Raises:
      UserError: the directory cannot be made or is not a run's, its record is gone, or settings
        changed that change the run, listed field by field; or there is no setting of a name in
        `allowed`, or it is the seed.
    """
    changes.check_names(allowed, config)
    claim(workdir)
    saved = layout.steps(workdir)
    if not saved:
        quarantine.check_not_lost(workdir)
        return None
    record, newest = record_of(workdir), _newest_whole(workdir, saved)
    for line in changes.check(record, config, updates=newest, allowed=allowed, of=workdir):
        say(f"resuming with another setting, {line}")
    return newest


def _newest_whole(workdir: Path, saved: list[int]) -> int:
    """The newest checkpoint with nothing missing; what it holds is checked where it is restored.

    Raises:
      UserError: there is none.
    """
    faults = {step: layout.fault(layout.directory(workdir) / str(step)) for step in saved}
    whole = [step for step, fault in faults.items() if fault is None]
    if not whole:
        named = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
        raise UserError(
            f"no checkpoint of {workdir} is sound: {named}. Nothing was moved or started afresh: "
            "bring one back, or take another --workdir"
        )
    return whole[-1]


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes the directory that of a run, and keeps other processes from training in it.

    Of several processes that train together the first one holds it.

    Raises:
      UserError: another process trains there (which, where, since when); whatever `claim` raises.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            claim(workdir)
            if is_first():
                stack.enter_context(files.held(workdir / LOCK))

        distributed.first_then_others(hold)
        yield


def claim(workdir: Path) -> None:
    """Makes the directory that of a run.

    Raises:
      UserError: it cannot be made, or something else is where a run would write.
    """
    if wrong := addresses.refusal({"--workdir": str(workdir)}):
        raise UserError(wrong)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        foreign = [name for name in _WRITTEN if (workdir / name).exists()]
        if foreign and not (workdir / MARKER).exists():
            raise UserError(
                f"--workdir={workdir} is not marked as a run's ({MARKER}) and holds "
                f"{', '.join(foreign)}, which a run would write over: choose a new directory"
            )
        if not (workdir / MARKER).exists():
            (workdir / MARKER).write_text("Files here are written and deleted by train.\n")
        (workdir / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error


def check_data(workdir: Path, about: Mapping[str, Any]) -> None:
    """Refuses to resume a run on other data or another tokenizer than it was started on.

    about: as `write_record` gets it.
    """
    before = record_of(workdir)
    for name, key, other in (
        ("tokenizer", "fingerprint", "another tokenizer"),
        ("data", "key", "other data"),
    ):
        if before[name][key] != about[name][key]:
            raise UserError(
                f"{workdir} was trained with {other}: on {before['data']['directory']}, now "
                f"{about['data']['directory']}. Bring the data back (for text, data.windows may "
                "name the windows of the run), or take another --workdir"
            )
    check_images(workdir, about.get("images"))


def check_images(workdir: Path, images: Mapping[str, Any] | None) -> None:
    """Refuses another image index, FAISS index or neighbours than the run in `workdir` had.

    images: as `Images.describe` gives it, None without an index.
    """
    before, now = record_of(workdir).get("images") or {}, images or {}
    if before.get("key") != now.get("key"):  # an older record has none, and had no index
        raise UserError(
            f"{workdir} was trained on another image index than {now.get('index')} is now: bring "
            "that index back, or take another workdir"
        )
    if now.get("faiss") is not None:
        _check_faiss(workdir, before.get("faiss"), now)
    if now.get("prepared") is not None:
        _check_neighbours(workdir, before.get("prepared"), now["prepared"])


def _check_faiss(
    workdir: Path, before: Mapping[str, Any] | None, images: Mapping[str, Any]
) -> None:
    """Refuses a FAISS index that answers otherwise than the run's; its version may be another."""
    if before is None:  # of before the record held it
        say("note: run.json does not say how FAISS searched before; that is not compared")
        return
    for name, value in images["faiss"].items():
        there = before.get(name)
        if there is None:  # of before the record held it
            say(f"note: run.json does not say {name} of FAISS's index; that is not compared")
        elif there == value:
            continue
        elif name == "searched_by":
            say(f"note: searched by another version of FAISS: {there!r} -> {value!r}")
        else:
            raise UserError(
                f"{workdir} was trained on a FAISS index with {name} {there!r}, the one in "
                f"{images['index']} has {value!r}: bring it back as it was, or take another workdir"
            )


def _check_neighbours(
    workdir: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> None:
    """Refuses other neighbours found ahead of time than the run read."""
    if before is None:  # of before the record held it
        say("note: run.json does not say which neighbours were read; that is not compared")
    elif before["key"] != now["key"]:
        raise UserError(
            f"{workdir} was trained with other neighbours ({before['directory']}) than "
            f"{now['directory']} holds: bring those back, or take another workdir"
        )


def say_other_code(workdir: Path) -> None:
    """Says if the code that last trained the run in `workdir` is another than this."""
    record, now = record_of(workdir), commit()
    before = record.get("commit")
    if "code_sha256" in record:
        other = record["code_sha256"] != CODE_SHA256
    else:  # of before the record held it
        other = None not in (before, now) and before != now
    if other:
        say(
            f"note: last run by other code (commit {before or 'unknown'}), resumed by commit "
            f"{now or 'unknown'}: what it computes may differ"
        )


def given_before(workdir: Path) -> Any:
    """The settings that the run in `workdir` was last started with, as nested dicts."""
    return record_of(workdir)["config_as_given"]


def keep_places(workdir: Path, about: Mapping[str, Any], *, resolved: Config) -> None:
    """Writes where data, tower and index of a finished run lie now, where they have moved.

    about: as `write_record` gets it, after `check_data`. All else it says stays as trained.
    """
    record = moved = files.read_object(workdir / "run.json")
    about = places.as_given(about)
    for place in (("data", "directory"), ("images", "index"), ("images", "prepared", "directory")):
        moved = _moved(moved, about, place)
    settings = files.read_object(workdir / "config.json")
    now = {**settings, "grounding": changes.plain(resolved)["grounding"]}
    for name, before, after in (("run.json", record, moved), ("config.json", settings, now)):
        if before != after:
            files.write_json(workdir / name, after)


def _moved(record: Any, about: Any, place: tuple[str, ...]) -> Any:
    """A record with what `about` has at a place, if both have something there."""
    if not place:
        return about
    name, *rest = place
    if not all(isinstance(table, Mapping) and name in table for table in (record, about)):
        return record
    return {**record, name: _moved(record[name], about[name], tuple(rest))}


def record_of(workdir: Path) -> Any:
    """What run.json of a run with checkpoints says.

    Raises:
      UserError: it is missing, or lacks what a resumed run needs.
    """
    hint = f"{workdir} has checkpoints, but no record of what they are; take another --workdir"
    record = files.read_object(workdir / "run.json", hint=hint)
    lacking = {"config_as_given", "tokenizer", "data", "starts"} - record.keys()
    if lacking:
        raise UserError(
            f"{workdir / 'run.json'} lacks {', '.join(sorted(lacking))}: restore it, or take "
            "another --workdir"
        )
    return record


def write_record(
    workdir: Path,
    about: Mapping[str, Any],
    *,
    given: Config,
    resolved: Config,
    step: int,
    began: str,
) -> None:
    """Writes config.json (as resolved) and run.json: what this run is and each of its starts.

    A start that resumed has the settings that differ from the start before, as [before, now].
    began: when this start did, see `lifetime.now`.
    """
    path = workdir / "run.json"
    before = record_of(workdir) if step and path.exists() else None
    if before is not None:
        starts = before["starts"]
    else:  # those that ended before the first checkpoint
        starts = files.read_object(path).get("starts", []) if path.exists() else []
    code = {"commit": commit(), "code_sha256": CODE_SHA256}
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    devices = [jax.devices()[0].device_kind, jax.device_count()]
    start: dict[str, Any] = {"time": written, "began": began, "step": step, **code}
    start |= {"devices": devices, "computed": _computed(resolved)}
    if before is not None and (changed := changes.between(before, given)):
        start["changed"] = changed
    starts.append(start)
    record = {
        "command": sys.argv,
        "config_as_given": changes.plain(given),
        "versions": versions(),
        **code,
        "devices": devices,
        "processes": jax.process_count(),
        **places.as_given(about),
        "starts": starts,
    }
    files.write_json(workdir / "config.json", changes.plain(resolved))
    files.write_json(path, record)


def _computed(resolved: Config) -> dict[str, Any]:
    """Settings of a start that change how long its updates take, and not what they are."""
    train, mesh = resolved.train, dataclasses.asdict(resolved.mesh)
    return {"mesh": mesh} | {name: getattr(train, name) for name in _TIMED}


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that compute."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **found}


def _code_sha256() -> str:
    """Hash of the package's sources."""
    found = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


CODE_SHA256 = _code_sha256()  # of what this process imports, whatever is changed afterwards


def commit() -> str | None:
    """Commit of the checkout the package runs from, with "+changes"; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()
