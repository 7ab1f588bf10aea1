r"""Evaluates a language model on the tasks of the BLIND-VALM paper.

    python -m blindvalm_jax.evaluate --workdir=RUN|--checkpoint=DIR|--hf=DIR --tasks=vlu,nlu \
        --data=DIR [--protocol=corrected|published] [--out=DIR]

--tasks: names or groups (vlu: colours, shapes, sizes; nlu: sentiments and topics; lm: perplexity
of WikiText-103 and LAMBADA, and LAMBADA's last words); text:GLOB and file:GLOB give the perplexity
of texts of your own, read as training reads them, or each file as one document. --data: the
directory of the tasks' files as their authors publish them, or one above it: none is downloaded.
--tfds_dir, in place of --data: sst2, agnews, lambada and lambada_perplexity out of TFDS datasets
that are prepared there. Long texts are cut in windows of --window tokens, --stride apart: every
token is scored once.
corrected (default): candidates are scored token by token behind the prompt. published: as the
reference's scripts do it, faults included; results.json names them.

<workdir>/eval or --out holds results.json, and a line for every question in TASK.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import model_flags
from blindvalm_jax.errors import UserError, run_main
from blindvalm_jax.tasks import evaluation
from blindvalm_jax.tasks.asked import Windows
from blindvalm_jax.tasks.scoring import Scorer

_TASKS = flags.DEFINE_list("tasks", [], "names of tasks, or groups")
_DATA = flags.DEFINE_string("data", "", "directory of the tasks' files, or one above it")
_WINDOW = flags.DEFINE_integer(
    "window", 0, "tokens read at once of a long text; 0: as in training", lower_bound=0
)
_STRIDE = flags.DEFINE_integer(
    "stride", 0, "tokens from one window to the next; 0: half a window", lower_bound=0
)
_TFDS = flags.DEFINE_string(
    "tfds_dir", "", "instead of --data: directory of prepared TFDS datasets (array_record)"
)
_PROTOCOL = flags.DEFINE_enum("protocol", "corrected", evaluation.PROTOCOLS, "how tasks are asked")
_OUT = flags.DEFINE_string(
    "out", "", "where results are written; empty: eval in the run's directory"
)


def main(argv: Sequence[str]) -> int:
    """Runs the tasks that the command line names."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    named = model_flags.named()
    out = _out(named)
    cut = Windows(_WINDOW.value, _STRIDE.value)
    if _PROTOCOL.value == "published" and cut != Windows():
        raise UserError("--window and --stride are of the corrected protocol")
    data = Path(_DATA.value).expanduser() if _DATA.value else None
    prepared = Path(_TFDS.value).expanduser() if _TFDS.value else None
    if data is not None and prepared is not None:
        raise UserError("--data and --tfds_dir both say where the data are: give one of them")
    asked = evaluation.read(_TASKS.value, _PROTOCOL.value, data, cut=cut, tfds=prepared)
    model = model_flags.load()
    scorer = Scorer(model)
    evaluation.run(
        asked,
        scorer,
        model.tokenizer,
        protocol=_PROTOCOL.value,
        out=out,
        about={"model": named.path, "step": model.step},
    )
    print(f"{out}/results.json; {scorer.compiled} programs were compiled")
    return 0


def _out(named: model_flags.Named) -> Path:
    if _OUT.value:
        return Path(_OUT.value).expanduser()
    if named.run is None or named.step is not None:
        raise UserError(f"--out is missing: say where the results of {named.path} are written")
    return named.run / "eval"


if __name__ == "__main__":
    run_main(main)
