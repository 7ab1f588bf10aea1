"""Converts pretrained weights into our weights directory, and a plain GPT-2 back.

python -m blindvalm_jax.convert --input=openai-community/gpt2 --out=weights/gpt2
python -m blindvalm_jax.convert --from=openai_clip --input=RN50x16.pt --out=weights/clip
python -m blindvalm_jax.convert --from=fairseq --input=checkpoint.pt --heads=12 --out=weights/blind
python -m blindvalm_jax.convert --to=hf_gpt2 --input=weights/gpt2 --out=exported

An input is a path or a Hugging Face hub id. It prints a table of what was converted; tensors that
do not fit the model end it with their names. Weights can start a run (`train.init_from`) or be its
tower (`grounding.tower`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from blindvalm_jax import trees
from blindvalm_jax.data import tokenizers
from blindvalm_jax.errors import UserError, run_main
from blindvalm_jax.interop import formats, gpt2, weights
from blindvalm_jax.models.transformer import ACTIVATIONS

_FROM = flags.DEFINE_enum("from", "auto", ["auto", *formats.FORMATS], "layout of --input")
_TO = flags.DEFINE_enum("to", "weights", ["weights", "hf_gpt2"], "layout of --out")
_INPUT = flags.DEFINE_string("input", "", "directory, file or hub id that is read")
_OUT = flags.DEFINE_string("out", "", "new directory that is written")
_HEADS = flags.DEFINE_integer("heads", None, "attention heads, where the input does not tell")
_ACTIVATION = flags.DEFINE_enum(
    "activation", None, list(ACTIVATIONS), "activation, where the input does not tell"
)
_EOS_ID = flags.DEFINE_integer(
    "eos_id", None, "for --to=hf_gpt2: id that ends generation; without it, none does"
)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, converts, prints the table."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: everything is a --flag")
    if not _INPUT.value or not _OUT.value:
        raise UserError("give --input (a directory, file or hub id) and --out (a new directory)")
    if _TO.value == "hf_gpt2":
        _export()
        return
    if _EOS_ID.value is not None:
        raise UserError("--eos_id is for --to=hf_gpt2")
    model = formats.read(
        _INPUT.value,
        layout=_FROM.value,
        heads=_HEADS.value,
        activation=_ACTIVATION.value,
    )
    tokenizer = _fingerprint(model)
    sha256 = weights.save(
        _OUT.value,
        model.params,
        config=model.config,
        source=_INPUT.value,
        tokenizer=tokenizer,
        tokenizer_files=model.tokenizer_directory if tokenizer else None,
    )
    print(_table(model.params, sha256))


def _fingerprint(model: formats.Converted) -> dict[str, str] | None:
    """Kind and fingerprint of the tokenizer beside the weights; one we cannot read stays there."""
    if model.tokenizer_directory is None:
        return None
    kind = "clip" if weights.kind_of(model.config) == "clip_text" else "gpt2"
    try:
        tokenizer = tokenizers.load(kind, str(model.tokenizer_directory))
    except UserError as error:
        print(f"warning: the tokenizer is not taken along: {error}", file=sys.stderr)
        return None
    return {"kind": kind, "fingerprint": tokenizer.fingerprint}


def _export() -> None:
    if _FROM.value != "auto" or _HEADS.value is not None or _ACTIVATION.value:
        raise UserError(
            "--to=hf_gpt2 reads our weights directory: leave out --from, --heads and --activation"
        )
    stored = weights.load(_INPUT.value, kind="decoder")
    gpt2.export_gpt2(
        stored.params,
        stored.decoder.decoder,
        vocab_size=stored.decoder.vocab_size,
        directory=_OUT.value,
        eos_id=_EOS_ID.value,
    )
    print(_table(stored.params, stored.sha256))


def _table(params: Mapping[str, Any], sha256: str) -> str:
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


if __name__ == "__main__":
    run_main(main)
