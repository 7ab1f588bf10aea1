"""Writes a model that was read or made as a weights directory, with its tokenizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax import trees
from blindvalm_jax.data import tokenizers
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import formats, weights


def write(out: Path, model: formats.Converted) -> str:
    """Writes a weights directory and returns the hash of the parameters.

    Raises:
      UserError: other weights are in the directory.
    """
    found = tokenizer(model)
    record = model.tokenizer
    if record is None and found is not None:
        record = {"kind": found.kind, "fingerprint": found.fingerprint}
    return weights.save(
        out,
        model.params,
        config=model.config,
        source=model.source,
        tokenizer=record,
        tokenizer_files=model.tokenizer_directory if found else None,
    )


def check_free(out: Path) -> None:
    """Before a large model is read for nothing."""
    for path in (out / "config.json", out / "model.safetensors"):
        if path.exists():
            raise UserError(f"{out} holds a model already ({path.name}): choose a new directory")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file: choose a new directory")


def tokenizer(model: formats.Converted) -> tokenizers.Tokenizer | None:
    """The tokenizer beside the weights; one we cannot read or that is another stays there."""
    directory, record = model.tokenizer_directory, model.tokenizer
    if directory is None:
        if record is not None:
            warn("its files are no longer where the model was trained")
        return None
    kind = "gpt2" if isinstance(model.config, weights.DecoderSpec) else "clip"
    try:
        found = tokenizers.load(record["kind"] if record else kind, str(directory))
    except UserError as error:
        warn(str(error))
        return None
    if record is not None and found.fingerprint != record["fingerprint"]:
        warn(f"the one in {directory} is not the one the model was trained with")
        return None
    return found


def warn(reason: str) -> None:
    """Says why a model goes on without its tokenizer."""
    print(f"warning: the tokenizer is not taken along: {reason}", file=sys.stderr)


def table(params: Mapping[str, Any], sha256: str) -> str:
    """Each tensor with its shape and number of parameters, then the totals and the hash."""
    flat = {path: tuple(value.shape) for path, value in sorted(trees.flatten(params).items())}
    width = max(len(path) for path in flat)
    lines = [
        f"{path:{width}}  {math.prod(shape):>13,}  {list(shape)}" for path, shape in flat.items()
    ]
    total = sum(math.prod(shape) for shape in flat.values())
    lines.append(f"{f'{len(flat)} tensors':{width}}  {total:>13,}  parameters")
    lines.append(f"sha256 {sha256}")
    return "\n".join(lines)
