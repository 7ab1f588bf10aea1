r"""Cuts text into windows of tokens ahead of training.

  python -m blindvalm_jax.prepare --files='corpus/*.txt.gz' --out=windows \
      --tokenizer=clip --tokenizer_path=tokenizers/clip --sequence_length=512

Train on the result with --config.data.windows=windows. A run that was stopped goes on when the
same command is given again; the result is the same for any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax.command_line import run_main
from blindvalm_jax.config import DataConfig, GroundingConfig, TokenizerConfig
from blindvalm_jax.data import output, packing, prepared, tokenizers
from blindvalm_jax.data.manifest import Manifest
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import segments

# The flags have the defaults of the settings that they stand for.
_DATA, _BPE = DataConfig(), TokenizerConfig()

_FILES = flags.DEFINE_string(
    "files", "", "text: comma-separated globs of .txt (blank line between documents) and .jsonl"
)
_TFDS = flags.DEFINE_string("tfds", "", "TFDS text dataset instead of files, as name[/config]")
_TFDS_SPLIT = flags.DEFINE_string("tfds_split", _DATA.tfds_split, "split of it to train on")
_TFDS_EVAL_SPLIT = flags.DEFINE_string("tfds_eval_split", "", "split of it that is held out")
_TFDS_DIR = flags.DEFINE_string("tfds_dir", "", "data directory of TFDS; empty: its default")
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", _DATA.text_field, "field of a .jsonl line or TFDS example"
)
_OUT = flags.DEFINE_string("out", "", "directory that the windows go to")
_TOKENIZER = flags.DEFINE_string("tokenizer", _BPE.kind, "clip, gpt2 or train")
_TOKENIZER_PATH = flags.DEFINE_string(
    "tokenizer_path", "", "directory or hub id of the tokenizer; empty with train: learn it"
)
_TRAIN_VOCAB_SIZE = flags.DEFINE_integer(
    "train_vocab_size", _BPE.train_vocab_size, "entries of a learned BPE"
)
_TOWER_TOKENIZER = flags.DEFINE_string(
    "tower_tokenizer", "", "directory of CLIP's tokenizer, if the language model has another one"
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", _DATA.sequence_length, "tokens of a window (T)"
)
_SEGMENTS = flags.DEFINE_string(
    "segments", GroundingConfig().segments, "rule that cuts rows for the tower"
)
_LONGEST_SEGMENT = flags.DEFINE_integer(
    "longest_segment", segments.LONGEST, "tokens of a segment: the tower's context less 2"
)
_WORKERS = flags.DEFINE_integer("workers", 0, "processes; 0: one per core")
_EVAL_FRACTION = flags.DEFINE_float(
    "eval_fraction", _DATA.eval_fraction, "share of documents held out"
)
_EVAL_FILES = flags.DEFINE_string("eval_files", "", "held-out text, instead of a share")
_MUCH_WIDER = 1.5


def main(argv: Sequence[str]) -> int:
    """Prepares what the flags say and prints what was made."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    if not _OUT.value:
        raise UserError("--out is missing: name the directory that the windows go to")
    if bool(_FILES.value) == bool(_TFDS.value):
        raise UserError("give the text as either --files or --tfds")
    if _TFDS_SPLIT.present and not _TFDS.value:
        raise UserError("--tfds_split goes with --tfds")
    if _TFDS_EVAL_SPLIT.value and (_EVAL_FILES.value or not _TFDS.value):
        raise UserError("--tfds_eval_split goes with --tfds and without --eval_files")
    if not 0 <= _EVAL_FRACTION.value <= 0.5:
        raise UserError(f"--eval_fraction must be 0 ... 0.5, got {_EVAL_FRACTION.value}")
    if _WORKERS.value < 0:
        raise UserError(f"--workers must be 0 or more, got {_WORKERS.value}")
    begin = time.monotonic()
    out = Path(_OUT.value)
    made = packing.prepare(_recipe(out), out, workers=_WORKERS.value)
    print(_summary(made, out, time.monotonic() - begin))
    return 0


def _recipe(out: Path) -> packing.Recipe:
    source, eval_source = prepared.sources(
        DataConfig(
            files=_FILES.value,
            tfds=_TFDS.value,
            tfds_split=_TFDS_SPLIT.value,
            tfds_eval_split=_TFDS_EVAL_SPLIT.value,
            tfds_dir=_TFDS_DIR.value,
            text_field=_TEXT_FIELD.value,
            eval_files=_EVAL_FILES.value,
        )
    )
    if _TOKENIZER.value == "train" and not _TOKENIZER_PATH.value:  # it is kept in `out`
        paths = [path for texts in (source, eval_source) if texts for path in texts.paths()]
        output.claim(out, paths)
    tokenizer = prepared.load_or_train(
        _TOKENIZER.value,
        _TOKENIZER_PATH.value,
        vocab_size=_TRAIN_VOCAB_SIZE.value,
        source=source,
        eval_fraction=0.0 if eval_source else _EVAL_FRACTION.value,
        cache=out,
    )
    tower = _TOWER_TOKENIZER.value
    return packing.Recipe(
        source=source,
        tokenizer=tokenizer,
        tower_tokenizer=tokenizers.load("clip", tower, setting="--tower_tokenizer")
        if tower
        else None,
        sequence_length=_SEQUENCE_LENGTH.value,
        rule=prepared.segment_rule(_SEGMENTS.value),
        longest_segment=_LONGEST_SEGMENT.value,
        eval_fraction=_EVAL_FRACTION.value,
        eval_source=eval_source,
    )


def _summary(made: Manifest, out: Path, seconds: float) -> str:
    lines = [f"{out}: windows of {made.sequence_length} tokens, {made.tokenizer.kind} tokenizer"]
    for name, split in made.splits.items():
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.windows:,} windows; segments of {split.mean_segment:.1f} tokens, "
            f"{split.full_segments:.2%} cut at {made.longest_segment}"
        )
    if made.tower_length and made.tower_length > _MUCH_WIDER * made.sequence_length:
        lines.append(
            f"  warning: the tower reads rows of {made.tower_length} tokens for windows of "
            f"{made.sequence_length}, as its tokens are finer than the model's in the fullest "
            "window; every step pays for that width"
        )
    characters = sum(split.characters for split in made.splits.values())
    lines.append(f"  {seconds:.1f} s, {characters / 1e6 / max(seconds, 1e-9):.2f} M characters/s")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(
        main,
        inputs={
            "files": "data.files",
            "eval_files": "data.eval_files",
            "tfds_dir": "data.tfds_dir",
            "tokenizer_path": "tokenizer.path",
            "tower_tokenizer": "grounding.tokenizer",
        },
    )
