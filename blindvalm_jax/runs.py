"""The directory of a run: the settings it was started with, and the record of what it is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from blindvalm_jax.config import Config
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop.rules import flatten

# May differ when a run is resumed: none of them changes what is computed, beyond rounding.
_FREE = ("log", "eval", "checkpoint", "mesh", "data.workers", "data.cache")
_FREE_IN_TRAIN = ("train.remat", "train.scan_unroll", "train.loss_chunk")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_run(workdir: Path, config: Config) -> bool:
    """Creates the directory and `config.json`; True when there is a checkpoint to resume from.

    Resuming refuses settings that change the run, and says which others changed.

    Raises:
      UserError: listing field by field what differs from the settings of the run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    resuming = any((workdir / "checkpoints").glob("[0-9]*"))
    if resuming and path.exists():
        before, now = (
            {key.replace("/", "."): value for key, value in flatten(settings).items()}
            for settings in (read_json(path), given)
        )
        changed = [k for k in sorted(set(before) | set(now)) if before.get(k) != now.get(k)]
        refused = [key for key in changed if not _is_free(key, config)]
        lines = {k: f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed}
        if refused:
            raise UserError(
                f"{workdir} holds a run with other settings: "
                f"{'; '.join(lines[key] for key in refused)}. Give the same settings to resume it, "
                "or another --workdir"
            )
        for key in changed:
            print(f"resuming with another setting, {lines[key]}", flush=True)
    write_json(path, given)
    return resuming


def _is_free(key: str, config: Config) -> bool:
    if key == "train.steps":
        return config.optimizer.schedule == "inverse_sqrt"  # the others depend on the length
    return key in _FREE_IN_TRAIN or any(key == f or key.startswith(f + ".") for f in _FREE)


def write_record(workdir: Path, about: Mapping[str, Any], *, step: int) -> None:
    """Writes `run.json`: what this run is and computes with, and each time it was started."""
    path = workdir / "run.json"
    starts = read_json(path).get("starts", []) if path.exists() else []
    starts.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step})
    record = {
        "versions": versions(),
        "commit": commit(),
        "devices": [jax.devices()[0].device_kind, jax.device_count()],
        "processes": jax.process_count(),
        **about,
        "starts": starts,
    }
    write_json(path, record)


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that compute."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **found}


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


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}; restore it or use another") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
