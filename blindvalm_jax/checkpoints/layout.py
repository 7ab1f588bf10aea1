"""What a checkpoint is on disk: RUN/checkpoints/STEP with one directory for each item.

`state` holds step, parameters and optimizer (Orbax), `guard` what watches over the updates, where
there is such. The rest is JSON: `data` (the position, and the held-out loss where it was
measured), `config` (the settings), `digests` of the arrays and of these two. Checkpoints of before
the digests have none. Arrays are one OCDBT; of processes that wrote apart each is a directory of
zarr with a file for each of its pieces.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blindvalm_jax import digests, files
from blindvalm_jax.errors import UserError

STATE, GUARD, DATA, CONFIG, DIGESTS = "state", "guard", "data", "config", "digests"
ITEMS = (STATE, GUARD, DATA, CONFIG, DIGESTS)
UNFINISHED = "*.orbax-checkpoint-tmp*"
_METADATA, _JSON = "_CHECKPOINT_METADATA", "metadata"  # names of Orbax
_INDEX, _OCDBT, _ZARR = "_METADATA", "manifest.ocdbt", ".zarray"
_FORMAT = 1


class Digests(NamedTuple):
    """The digests of a checkpoint: of arrays by "params/...", of JSON items by their name."""

    leaves: dict[str, str]
    items: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """What is saved."""
        return {"format": _FORMAT, "leaves": self.leaves, "items": self.items}


def directory(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def steps(run: Path) -> list[int]:
    """Updates done in the checkpoints of a run, ascending; only committed ones have such a name."""
    there = directory(run)
    names = (path.name for path in there.iterdir()) if there.is_dir() else ()
    return sorted(int(name) for name in names if name.isdecimal())


def unfinished(run: Path) -> list[Path]:
    """What saves that never ended have left."""
    return sorted(directory(run).glob(UNFINISHED))


def fault(checkpoint: Path) -> str | None:
    """What can be seen to be wrong with a checkpoint without reading its arrays."""
    if not checkpoint.is_dir():
        return "it is no directory"
    if not any(checkpoint.iterdir()):
        return "it is empty"
    try:
        items = _items(checkpoint)
        for name in items:
            if not (checkpoint / name).is_dir():
                return f"its {name} is missing"
        for name in {DATA, CONFIG, DIGESTS} & items:
            read_json(checkpoint, name)
    except UserError as error:
        return str(error)
    missing = (
        f"{name}/{part}" for name in {STATE, GUARD} & items for part in _missing(checkpoint / name)
    )
    first = next(missing, None)
    return None if first is None else f"its {first} is missing"


def is_apart(checkpoint: Path) -> bool:
    """Whether its arrays were written by processes apart: one alone may have a part of them."""
    return not (checkpoint / STATE / _OCDBT).exists() and _arrays(checkpoint / STATE) is not None


def _missing(item: Path) -> Iterator[str]:
    """The files that an item of arrays lacks, as far as they follow from the others."""
    if not (item / _INDEX).is_file():
        yield _INDEX
    elif not (item / _OCDBT).is_file():
        arrays = _arrays(item)
        if arrays is None:
            yield _OCDBT
        else:
            for name in arrays:
                yield from (f"{name}/{part}" for part in _missing_of_array(item / name))


def _arrays(item: Path) -> list[str] | None:
    """The directories of an item's arrays; None: it is no item of such."""
    try:
        index = files.read_object(item / _INDEX)
    except UserError:
        return None
    if index.get("use_ocdbt") is not False:
        return None
    try:
        return [
            ".".join(str(part["key"]) for part in entry["key_metadata"])
            for entry in index["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")
        ]
    except (KeyError, TypeError, AttributeError):
        return None


def _missing_of_array(array: Path) -> Iterator[str]:
    pieces = _pieces(array)
    if pieces is None:
        yield _ZARR
    else:
        there = {path.name for path in array.iterdir()}
        yield from (name for name in pieces if name not in there)


def _pieces(array: Path) -> list[str] | None:
    """The files that hold an array; None: it does not say."""
    try:
        about = files.read_object(array / _ZARR)
        counts = [
            -(-size // part) for size, part in zip(about["shape"], about["chunks"], strict=True)
        ]
    except (UserError, KeyError, ValueError, TypeError, ZeroDivisionError):
        return None
    return [".".join(map(str, x)) or "0" for x in itertools.product(*map(range, counts))]


def pieces(checkpoint: Path) -> set[str] | None:
    """The files of all arrays that processes wrote apart, by their names in the checkpoint.

    None: it does not say, as when it is being removed.
    """
    found = set()
    for item in {STATE, GUARD} & {path.name for path in checkpoint.glob("*")}:
        for name in _arrays(checkpoint / item) or ():
            parts = _pieces(checkpoint / item / name)
            if parts is None:
                return None
            found |= {f"{item}/{name}/{part}" for part in parts}
    return found or None


def has(checkpoint: Path, name: str) -> bool:
    """Whether a checkpoint has an item, or says that it should."""
    return name in _items(checkpoint) or (checkpoint / name).exists()


def committed(checkpoint: Path) -> int:
    """When a checkpoint was written, in nanoseconds since 1970.

    Raises:
      UserError: it does not say.
    """
    found = files.read_object(checkpoint / _METADATA).get("commit_timestamp_nsecs")
    if not isinstance(found, int):
        raise UserError(f"{checkpoint / _METADATA} does not say when it was written")
    return found


def _items(checkpoint: Path) -> set[str]:
    """The items that were saved; of every checkpoint state, data and config.

    Raises:
      UserError: what says so is damaged.
    """
    named = files.read_object(checkpoint / _METADATA).get("item_handlers")
    if not isinstance(named, dict):
        raise UserError(f"{checkpoint / _METADATA} does not name the items")
    return {STATE, DATA, CONFIG} | (named.keys() & set(ITEMS))


def read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    """A JSON item of a checkpoint.

    Raises:
      UserError: it is missing or no JSON object.
    """
    return files.read_object(checkpoint / name / _JSON)


def read_digests(checkpoint: Path) -> Digests | None:
    """The digests of a checkpoint; None: it is older than digests.

    Raises:
      UserError: they are missing or damaged.
    """
    if not has(checkpoint, DIGESTS):
        return None
    content = read_json(checkpoint, DIGESTS)
    if content.keys() != {"format", "leaves", "items"} or content["format"] != _FORMAT:
        raise UserError(f"{checkpoint / DIGESTS} holds no digests of format {_FORMAT}")
    for table in (content["leaves"], content["items"]):
        if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
            raise UserError(f"{checkpoint / DIGESTS} is damaged")
    return Digests(content["leaves"], content["items"])


def json_sha256(value: Mapping[str, Any]) -> str:
    """Hash of a JSON item, in any layout of its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def wrong_items(checkpoint: Path, expected: Digests) -> dict[str, str]:
    """What is wrong with the JSON items of a checkpoint, by name."""
    got = {name: json_sha256(read_json(checkpoint, name)) for name in (DATA, CONFIG)}
    return digests.differing(expected.items, got)
