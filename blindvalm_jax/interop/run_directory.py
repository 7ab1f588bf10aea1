"""A run of ours as the source of a model: the decoder, or the CLIP, in its newest checkpoint.

`config.json` gives the settings, `run.json` the tokenizer and the width of the grounding. Only the
parameters are read, onto the host, whatever devices they were trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from blindvalm_jax import addresses, config, digests, files, trees
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.checkpoints.orbax_log import quiet
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.interop import weights
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.stores import inputs


class Trained(NamedTuple):
    """A trained model.

    config: a `DecoderSpec`, or a `ClipConfig` of a contrastive run. step: updates done; tokenizer:
    its kind and fingerprint; tokenizer_directory: where its files lie, or None; eos_id: the id that
    ends a document.
    """

    config: weights.Spec
    params: dict[str, Any]
    step: int
    tokenizer: dict[str, str]
    tokenizer_directory: Path | None
    eos_id: int


def is_run(directory: Path) -> bool:
    """Whether a directory is that of a run, with or without a checkpoint."""
    return (directory / "config.json").is_file() and (directory / "checkpoints").is_dir()


def load(directory: Path, *, step: int | None = None) -> Trained:
    """The decoder or CLIP of a run; step: of which checkpoint, None: the newest.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or the run's files lack something or do
        not agree.
    """
    record_path = directory / "run.json"
    if not is_run(directory) and not record_path.exists():
        raise UserError(
            f"{directory} is no run's directory: it has neither run.json nor checkpoints/"
        )
    settings = config.from_dict(files.read_object(directory / "config.json"))
    record = files.read_object(record_path)
    tokenizer = _table(record, "tokenizer", record_path)
    spec = spec_of(settings, record, record_path)
    there = steps(directory)
    if step is not None and step not in there:
        raise UserError(f"{directory} has no checkpoint of step {step}: it has {there}")
    step = there[-1] if step is None else step
    checkpoint = layout.directory(directory) / str(step)
    if fault := layout.fault(checkpoint):
        raise _damaged(checkpoint, fault)
    params = _restore(checkpoint / layout.STATE, spec)
    weights.check(params, spec, str(checkpoint))
    _check_digests(checkpoint, params)
    windows = _entry(_table(record, "data", record_path), "directory", str, record_path)
    return Trained(
        config=spec,
        params=params,
        step=step,
        tokenizer={
            name: _entry(tokenizer, name, str, record_path) for name in ("kind", "fingerprint")
        },
        tokenizer_directory=_tokenizer_directory(windows, directory),
        eos_id=_entry(tokenizer, "eos_id", int, record_path),
    )


def spec(directory: Path) -> weights.Spec:
    """The shape of the model of a run, whose checkpoints are not read.

    Raises:
      UserError: the run's files lack something or do not agree.
    """
    settings = config.from_dict(files.read_object(directory / "config.json"))
    path = directory / "run.json"
    return spec_of(settings, files.read_object(path), path)


def _tokenizer_directory(windows: str, run: Path) -> Path | None:
    """Where the tokenizer lies, beside the windows, which may be in a store or of a run moved."""
    if addresses.is_address(windows):
        return weights.tokenizer_directory(Path(inputs.bring(f"{windows}/tokenizer")))
    found = Path(windows)
    if not found.exists():  # the run was trained in another place
        found = run / "data" / found.name
    return weights.tokenizer_directory(found / "tokenizer")


def spec_of(settings: config.Config, record: dict[str, Any], path: Path) -> weights.Spec:
    """The shape of the model of a run, by its settings and its record, which lies at `path`."""
    if settings.train.objective == "contrastive":
        return weights.rebuild(ClipConfig, _table(record, "clip", path), f"{path}: clip")
    fused = config.fusion_layers(settings)
    width = 0
    if fused:
        width = _entry(_table(record, "tower", path), "projection", int, path)
    return weights.DecoderSpec(
        decoder=settings.decoder,
        fusion=settings.fusion,
        vocab_size=_entry(_table(record, "tokenizer", path), "vocab_size", int, path),
        fusion_layers=fused,
        memory_width=width,
    )


def steps(directory: Path) -> list[int]:
    """Updates done in the checkpoints of a run, ascending; only whole ones have a plain number.

    Raises:
      UserError: there is none.
    """
    there = layout.steps(directory)
    if not there:
        raise UserError(f"{directory} is a run without a checkpoint yet: train it further first")
    return there


def _restore(path: Path, spec: weights.Spec) -> dict[str, Any]:
    item = {"params": trees.unflatten(weights.abstract_params(spec))}
    quiet()
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                path.absolute(),
                args=ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True),
            )
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        kind = weights.kind_of(spec)
        raise UserError(f"{path} cannot be restored as the {kind}: {reason}") from error
    return restored["params"]


def _check_digests(checkpoint: Path, params: dict[str, Any]) -> None:
    """Refuses parameters that are not those saved; other arrays are not read."""
    expected = layout.read_digests(checkpoint)
    if expected is None:
        note = f"note: {checkpoint} is older than digests: its parameters are read unchecked"
        print(note, file=sys.stderr, flush=True)
        return
    saved = {k: text for k, text in expected.leaves.items() if k.startswith("params/")}
    got = digests.of_host_tree(trees.flatten({"params": params}))
    if wrong := digests.differing(saved, got):
        raise _damaged(checkpoint, digests.listed(wrong))


def _damaged(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {checkpoint} is damaged: {reason}; python -m blindvalm_jax.checkpoint verify "
        f"{checkpoint.parents[1]} tells which are sound"
    )


def _table(record: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(record.get(name), dict):
        raise UserError(
            f"{path} has no table {name!r}, which older versions did not write: train the run for "
            f"at least one more step with this version"
        )
    return record[name]


def _entry(table: dict[str, Any], name: str, expected: type, path: Path) -> Any:
    if type(table.get(name)) is not expected:
        raise UserError(f"{path}: {name} must be {expected.__name__}, got {table.get(name)!r}")
    return table[name]
