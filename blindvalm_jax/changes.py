"""Settings of a run that may differ where it goes on, and those that would make it another run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import optim
from blindvalm_jax.config import Config, completed
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import places
from blindvalm_jax.trees import flatten

# These may differ when a run is resumed: none of them changes what is computed, beyond rounding.
# How it is computed, and what is said of it. The guard's settings change what becomes of updates
# that would break the run, and of no other: one that has diverged goes on with them.
OF_COMPUTING = (
    *("log", "mesh", "data.workers", "data.cache"),
    *("train.remat", "train.scan_unroll", "train.loss_chunk", "train.watchdog_seconds"),
    *("train.on_nonfinite", "train.nonfinite_limit"),
    *("train.on_spike", "train.spike_factor", "train.spike_warmup"),
)
# What it is asked and keeps, and where it reads: contents of data, tokenizer, tower, index and
# neighbours are compared (`check_data`, and the tower where it is read).
OF_PLACES = (
    *("eval", "checkpoint", "data.files", "data.eval_files", "data.windows", "data.on_corrupt"),
    *("data.tfds", "data.tfds_split", "data.tfds_eval_split", "data.tfds_dir"),
    *("data.images", "data.eval_images", "tokenizer.path"),
    *("grounding.tokenizer", "grounding.tower", "grounding.index", "grounding.prepared"),
)
_FREE = (*OF_COMPUTING, *OF_PLACES, "train.branch_from")  # what it began with, it holds


def check_names(allowed: Sequence[str], config: Config) -> None:
    """Refuses what no setting is called, and the seed.

    Raises:
      UserError: as --allow_changed names them.
    """
    known = _flat(plain(config))
    for name in allowed:
        if not any(named(key, [name]) for key in known):
            raise UserError(
                f"--allow_changed={name}: there is no such setting; `python -m "
                "blindvalm_jax.config` lists all of them"
            )
    if "seed" in allowed:
        raise UserError(
            "--allow_changed=seed: a run keeps its seed, from which the order of its data follows; "
            "take another --workdir for another seed"
        )


def check(
    record: Mapping[str, Any],
    config: Config,
    *,
    updates: int,
    of: Path,
    allowed: Sequence[str] = (),
) -> list[str]:
    """A line for each setting that differs from those of a run's record, and may.

    Args:
      record: run.json.
      config: settings to go on with.
      updates: that are done.
      of: the run's directory.
      allowed: settings or sections that may differ besides.

    Raises:
      UserError: settings differ that change the run, listed field by field.
    """
    changed = between(record, config)
    lines = {key: f"{key}: {before!r} -> {now!r}" for key, (before, now) in changed.items()}
    refused = [
        line
        for key, line in lines.items()
        if not _is_free(key, changed[key][0], config, updates=updates) and not named(key, allowed)
    ]
    if refused:
        raise UserError(
            f"{of} holds a run with other settings: {'; '.join(refused)}. Give the same "
            "settings to resume it, take another --workdir, or say what may differ: "
            "--allow_changed=NAME,NAME"
        )
    return list(lines.values())


def between(record: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from those of a record, as (before, now)."""
    before, now = _flat(_completed(record["config_as_given"])), _flat(plain(config))
    names = sorted(set(before) | set(now))
    return {
        name: (before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name)
    }


def plain(config: Config) -> Any:
    """Settings as JSON gives them back, with the addresses of inputs that were brought."""
    return json.loads(json.dumps(places.as_given(dataclasses.asdict(config))))


def _completed(given: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(completed(given)))


def _flat(settings: Any) -> dict[str, Any]:
    """Nested settings by dotted names."""
    return {key.replace("/", "."): value for key, value in flatten(settings).items()}


def named(key: str, by: Iterable[str]) -> bool:
    """Whether one of these is the name of a setting, or of its section."""
    return any(key == name or key.startswith(f"{name}.") for name in by)


def _is_free(key: str, before: Any, config: Config, *, updates: int) -> bool:
    if key == "train.steps":  # the learning rates of what was done must not depend on it
        lengths = (int(before), config.train.steps)
        return optim.same_until(updates, config.optimizer, lengths=lengths)
    if key == "train.microbatches":  # of a language model they draw dropout, and are shuffled
        return config.train.objective == "contrastive"
    return named(key, _FREE)
