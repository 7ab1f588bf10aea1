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

<workdir>/eval or --out holds results.json, report.md with figures, and a line for every question in
TASK.jsonl, of one model under one protocol; other results that stand there are moved to before/NAME
below it, and come back when they are asked for again. Tasks that are there already, asked of the
same model in the same way by the same code, are not asked again unless --again says so.

    python -m blindvalm_jax.evaluate report DIR
    python -m blindvalm_jax.evaluate compare A B [--tasks=...] [--out=DIR]

Of directories that hold a results.json, or runs that were evaluated: report makes report.md anew,
compare says what A knows that B does not, question by question, with paired tests. --out gets
compare.json and compare.md with a figure; without it the table is all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from blindvalm_jax import files, model_flags
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.tasks import compare, evaluation, identity, report, results, standing
from blindvalm_jax.tasks.asked import Windows
from blindvalm_jax.tasks.scoring import Scorer

flags.adopt_module_key_flags(model_flags)
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
_AGAIN = flags.DEFINE_bool("again", False, "also tasks whose answers are there already")
_FLAGS: tuple[flags.FlagHolder[Any], ...] = (
    *(_TASKS, _DATA, _WINDOW, _STRIDE, _TFDS, _PROTOCOL, _OUT, _AGAIN),
)


def main(argv: Sequence[str]) -> int:
    """Runs the tasks that the command line names."""
    if len(argv) > 1 and argv[1] in _COMMANDS:
        return _COMMANDS[argv[1]](argv[2:])
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
    _make(out)
    known = evaluation.rehearse(asked, model)
    scorer = Scorer(model)
    with standing.held(out):
        found = evaluation.run(
            asked,
            scorer,
            model.tokenizer,
            protocol=_PROTOCOL.value,
            out=out,
            about=identity.about(named.path, model),
            there=None if _AGAIN.value else known,
        )
        page = report.write(found, out)
    print(f"{page}, {out}/results.json; {scorer.compiled} programs were compiled")
    return 0


def _report(arguments: Sequence[str]) -> int:
    """Makes report.md anew of a results.json."""
    _refuse_flags("report")
    if len(arguments) != 1:
        raise UserError(f"report takes one directory, got {len(arguments)}")
    found, place = results.read(Path(arguments[0]).expanduser())
    _make(place)
    print(report.write(found, place))
    return 0


def _refuse_flags(command: str, *but: str) -> None:
    """Refuses flags that a command would not read."""
    own = [flag.name for flag in _FLAGS if flag.present and flag.name not in but]
    given = [*model_flags.given(), *own]
    if given:
        takes = f"it takes {' and '.join(f'--{name}' for name in but) or 'none'}"
        raise UserError(f"{command} does not read --{', --'.join(given)}: {takes}")


def _out(named: NamedModel) -> Path:
    if not _OUT.value and (named.run is None or named.step is not None):
        raise UserError(f"--out is missing: say where the results of {named.path} are written")
    if _OUT.value or named.run is None:
        return _possible(Path(_OUT.value).expanduser())
    return _possible(named.run / "eval")


def _possible(out: Path) -> Path:
    """The directory, which need not be there yet."""
    files.check_possible(out, what=f"results in {out}")
    return out


def _make(out: Path) -> None:
    """Makes the directory, or says in one line why it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"results cannot be written to {out}: {error.strerror}") from error
    files.check_writable(out, what=f"results in {out}")


def _compare(arguments: Sequence[str]) -> int:
    """Prints what one evaluation has right that another has not."""
    _refuse_flags("compare", "tasks", "out")
    if len(arguments) != 2:
        raise UserError(f"compare takes two directories, got {len(arguments)}")
    first, second = (Path(name).expanduser() for name in arguments)
    out = _possible(Path(_OUT.value).expanduser()) if _OUT.value else None
    found = compare.compare(first, second, names=_TASKS.value)
    for which in ("A", "B"):
        print(f"{which}: {compare.described(found[which])}")
    print(compare.HEAD)
    for name, entry in found["tasks"].items():
        print(compare.line_of(name, entry))
    if out is not None:
        _make(out)
        print(compare.write(found, out))
    return 0


_COMMANDS = {"compare": _compare, "report": _report}

if __name__ == "__main__":
    run_main(
        main,
        inputs={
            **model_flags.INPUTS,
            "tasks": "eval.tasks",
            "data": "eval.tasks_data",
            "tfds_dir": "data.tfds_dir",
        },
    )
