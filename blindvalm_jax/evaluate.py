r"""Evaluates a language model on the tasks of the BLIND-VALM paper.

    python -m blindvalm_jax.evaluate --workdir=RUN --tasks=vlu,nlu --data=DIR \
        [--protocol=corrected|published] [--out=DIR]

--tasks: names or groups (vlu: colours, shapes, sizes; nlu: sentiments and topics). --data: the
directory of the tasks' files as their authors publish them, or one above it: none is downloaded.
corrected (default): candidates are scored token by token behind the prompt. published: as the
reference's scripts do it, faults included; results.json names them.

<workdir>/eval or --out holds results.json, and a line for every question in TASK.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from blindvalm_jax import files, runs, trained
from blindvalm_jax.errors import UserError, run_main
from blindvalm_jax.tasks import answers, catalog, results
from blindvalm_jax.tasks.scoring import Scorer
from blindvalm_jax.tasks.task import ChoiceTask

_WORKDIR = flags.DEFINE_string("workdir", "", "run of a language model")
_TASKS = flags.DEFINE_list("tasks", [], "names of tasks, or groups")
_DATA = flags.DEFINE_string("data", "", "directory of the tasks' files, or one above it")
_PROTOCOL = flags.DEFINE_enum("protocol", "corrected", results.PROTOCOLS, "how tasks are asked")
_OUT = flags.DEFINE_string("out", "", "where results are written; empty: <workdir>/eval")


def main(argv: Sequence[str]) -> int:
    """Runs the tasks that the command line names."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    for name, value in (("workdir", _WORKDIR.value), ("data", _DATA.value)):
        if not value:
            raise UserError(f"--{name} is missing (see --help)")
    tasks = catalog.chosen(_TASKS.value)
    data = Path(_DATA.value).expanduser()
    asked = [_Asked(task, data) for task in tasks]  # every file is read before anything is scored
    workdir = Path(_WORKDIR.value).expanduser()
    out = Path(_OUT.value).expanduser() if _OUT.value else workdir / "eval"
    model = trained.load(workdir)
    scorer = Scorer(model)
    found: dict[str, Any] = {}
    print(_HEAD, flush=True)
    for one in asked:
        said = answers.answer(scorer, model.tokenizer, one.protocol, one.questions)
        entry = {"protocol": _PROTOCOL.value} | results.summary(
            one.task, one.protocol, one.items, one.questions, said
        )
        found[one.task.name] = entry
        lines = results.lines(one.questions, said, one.protocol)
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        out.mkdir(parents=True, exist_ok=True)
        files.write_bytes(out / f"{one.task.name}.jsonl", text.encode())
        print(_line(one.task.name, entry), flush=True)
        if said.cut:
            print(f"note: {said.cut} prompts lost their beginning: {scorer.longest} positions")
    files.write_json(
        out / "results.json",
        {
            "tasks": found,
            "model": str(workdir.resolve()),
            "step": model.step,
            "commit": runs.commit(),
            "versions": runs.versions(),
        },
    )
    print(f"{out}/results.json; {scorer.compiled} programs were compiled")
    return 0


class _Asked:
    """A task under the protocol of the command line, its files read."""

    def __init__(self, task: ChoiceTask, data: Path) -> None:
        protocol = task.corrected if _PROTOCOL.value == "corrected" else task.published
        if protocol is None:
            raise UserError(f"{task.name} was not published with a protocol: take corrected")
        self.task, self.protocol = task, protocol
        self.items = protocol.items(data)
        self.questions = protocol.questions(self.items)


_HEAD = (
    f"{'task':22} {'score':>7} {'stderr':>7} {'95 % interval':>17} {'majority':>9} {'random':>7} "
    f"{'n':>6}"
)


def _line(name: str, entry: dict[str, Any]) -> str:
    low, high = (100 * value for value in entry["interval"])
    error = "" if entry["stderr"] is None else f"{100 * entry['stderr']:.2f}"
    return (
        f"{name:22} {100 * entry['score']:7.2f} {error:>7} {f'[{low:.2f}, {high:.2f}]':>17} "
        f"{100 * entry['majority']:9.2f} {100 * entry['random']:7.2f} {entry['n']:6}"
    )


if __name__ == "__main__":
    run_main(main)
