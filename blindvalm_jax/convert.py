"""Converts pretrained weights into our weights directory, and a plain GPT-2 back.

python -m blindvalm_jax.convert --input=openai-community/gpt2 --out=weights/gpt2
python -m blindvalm_jax.convert --towers=both --input=openai/clip-vit-base-patch32 --out=weights/c
python -m blindvalm_jax.convert --from=openai_clip --input=RN50x16.pt --out=weights/clip
python -m blindvalm_jax.convert --from=fairseq --input=checkpoint.pt --heads=12 --out=weights/blind
python -m blindvalm_jax.convert --input=runs/a --out=weights/a
python -m blindvalm_jax.convert --to=hf_gpt2 --input=runs/a --out=exported

An input is a path or a Hugging Face hub id; of a run, the newest checkpoint is read. It prints a
table of what was converted; tensors that do not fit the model end it with their names. Weights can
start a run (`train.init_from`) or be its tower (`grounding.tower`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import formats, gpt2, run_directory, saving, weights
from blindvalm_jax.models.transformer import ACTIVATIONS

_FROM = flags.DEFINE_enum("from", "auto", ["auto", *formats.FORMATS], "layout of --input")
_TO = flags.DEFINE_enum("to", "weights", ["weights", "hf_gpt2"], "layout of --out")
_INPUT = flags.DEFINE_string("input", "", "directory, file or hub id that is read")
_OUT = flags.DEFINE_string("out", "", "new directory that is written")
_HEADS = flags.DEFINE_integer("heads", None, "attention heads, where the input does not tell")
_ACTIVATION = flags.DEFINE_enum(
    "activation", None, list(ACTIVATIONS), "activation, where the input does not tell"
)
_TOWERS = flags.DEFINE_enum(
    "towers", "text", formats.SIDES, "of a Hugging Face CLIP, what is converted"
)
_EOS_ID = flags.DEFINE_integer(
    "eos_id", None, "for --to=hf_gpt2: id that ends generation; without it, the tokenizer's"
)


def main(argv: Sequence[str]) -> None:
    """Reads the flags, converts, prints the table."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: everything is a --flag")
    if not _INPUT.value or not _OUT.value:
        raise UserError("give --input (a directory, file or hub id) and --out (a new directory)")
    out = Path(_OUT.value).expanduser()
    saving.check_free(out)
    if _TO.value == "hf_gpt2":
        _export(out)
        return
    if _EOS_ID.value is not None:
        raise UserError("--eos_id is for --to=hf_gpt2")
    model = formats.read(
        _INPUT.value,
        layout=_FROM.value,
        heads=_HEADS.value,
        activation=_ACTIVATION.value,
        towers=_TOWERS.value,
    )
    print(saving.table(model.params, saving.write(out, model)))


def _export(out: Path) -> None:
    foreign = _HEADS.value is not None or _ACTIVATION.value or _TOWERS.value != "text"
    if _FROM.value not in ("auto", "run") or foreign:
        raise UserError(
            "--to=hf_gpt2 reads a run or weights directory of ours: leave out --from, --heads, "
            "--activation and --towers"
        )
    model = _ours(Path(_INPUT.value).expanduser())
    if not isinstance(model.config, weights.DecoderSpec):
        raise UserError(f"{_INPUT.value} holds a {weights.kind_of(model.config)}, not a decoder")
    gpt2.check_expressible(model.params, model.config.decoder)
    tokenizer, files = saving.tokenizer(model), model.tokenizer_directory
    if tokenizer is not None and tokenizer.lm_offset:
        saving.warn(
            f"GPT-2 has no place for its offset of {tokenizer.lm_offset} between text and ids"
        )
        files = None
    eos_id = _EOS_ID.value
    if eos_id is None:
        eos_id = tokenizer.eos_id if tokenizer else model.eos_id
    gpt2.export_gpt2(
        model.params,
        model.config.decoder,
        vocab_size=model.config.vocab_size,
        directory=out,
        eos_id=eos_id,
        tokenizer_files=files if tokenizer else None,
    )
    print(saving.table(model.params, weights.params_sha256(model.params)))


def _ours(path: Path) -> formats.Converted:
    """A model of ours: the newest checkpoint of a run, or a weights directory."""
    if run_directory.is_run(path):
        return formats.load(formats.Opened(path, "run"))
    return formats.load_weights(path)


if __name__ == "__main__":
    run_main(main, inputs={"input": "train.init_from"})
