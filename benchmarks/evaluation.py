"""Questions a second of `evaluate`, against scoring one prompt at a time, and programs compiled.

    python -m benchmarks.run evaluation --workdir=RUN --tasks=memory_colors,sst2 --data=DIR

Systems: `evaluate` as it is; the same with one prompt at a time, padded to the same lengths; and
one prompt at a time at its own length, as the reference's scripts go, where every new length is
compiled anew. Each begins with nothing compiled: its first pass over the questions counts what that
costs, the later ones, in which the systems take turns (see `turns.take`), do not.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import turns
from blindvalm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from blindvalm_jax.data.tokenizers import Tokenizer
    from blindvalm_jax.tasks.evaluation import AskedChoice
    from blindvalm_jax.tasks.scoring import Scorer
    from blindvalm_jax.trained import TrainedModel

_WORKDIR = flags.DEFINE_string("workdir", "", "evaluation: run of the model.")
_TASKS = flags.DEFINE_list("tasks", ["vlu"], "evaluation: names of tasks of choices, or groups.")
_DATA = flags.DEFINE_string("data", "", "evaluation: directory of the tasks' files.")
_QUESTIONS = flags.DEFINE_integer(
    "questions", 512, "evaluation: questions of each task, drawn from all.", lower_bound=1
)


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    import jax

    from blindvalm_jax import runs
    from blindvalm_jax.named_model import NamedModel

    asked = _asked()
    model = NamedModel(workdir=_WORKDIR.value).load()
    print(
        f"{'task':22} {'system':28} {'questions/s':>11} {'ratio':>6} {'range':>15} "
        f"{'first pass':>11} {'programs':>8}"
    )
    rows = []
    for one in asked:
        for row in _measured(model, one):
            spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
            print(
                f"{one.name:22} {row['system']:28} {row['questions_per_second']:11.1f} "
                f"{row['ratio']:6.2f} {spread:>15} {row['first_pass_seconds']:9.1f} s "
                f"{row['programs']:8}",
                flush=True,
            )
            rows.append({"task": one.name, **row})
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": runs.versions(),
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
        "settings": {"questions": _QUESTIONS.value, "rounds": turns.ROUNDS.value},
    }
    print(json.dumps(machine))
    return {"evaluation": rows, **machine}


def _asked() -> list[AskedChoice]:
    """The tasks of the command line, with as many of their questions as are to be asked."""
    import dataclasses

    import numpy as np

    from blindvalm_jax.tasks import evaluation

    if not _DATA.value:
        raise UserError("--data is missing: the directory of the tasks' files")
    asked = []
    for one in evaluation.read(_TASKS.value, "corrected", Path(_DATA.value).expanduser()):
        if not isinstance(one, evaluation.AskedChoice):
            raise UserError(f"{one.name} has no questions: name tasks of choices")
        order = np.random.default_rng(0).permutation(len(one.questions))[: _QUESTIONS.value]
        asked.append(dataclasses.replace(one, questions=[one.questions[n] for n in order]))
    return asked


def _measured(model: TrainedModel, asked: AskedChoice) -> list[dict[str, Any]]:
    """A row of the table for each system, checked to give the same scores."""
    import numpy as np

    from blindvalm_jax.tasks.scoring import Scorer

    scorers = {
        "evaluate": Scorer(model),
        "one prompt at a time, padded": Scorer(model, tokens_at_once=1),
    }
    plain = _Plain(model)
    count = len(asked.questions)
    passes: dict[str, Callable[[], list[np.ndarray]]] = {
        name: functools.partial(_scores, scorer, model.tokenizer, asked)
        for name, scorer in scorers.items()
    }
    passes["one prompt at its own length"] = lambda: plain.scores(asked)
    first, found = {}, {}
    for name, ask in passes.items():
        begin = time.perf_counter()
        found[name] = ask()
        first[name] = time.perf_counter() - begin
    for name, scores in found.items():
        for one, expected in zip(scores, found["evaluate"], strict=True):
            np.testing.assert_allclose(one, expected, atol=1e-3, err_msg=name)
    turn = {name: functools.partial(_seconds, ask) for name, ask in passes.items()}
    seconds = turns.take(turn, title=asked.name)
    programs = {name: scorer.compiled for name, scorer in scorers.items()}
    programs["one prompt at its own length"] = plain.compiled
    rows = []
    for name in passes:
        speed = turns.over(seconds["one prompt at its own length"], seconds[name])
        rows.append(
            {
                "system": name,
                "questions_per_second": count / statistics.median(seconds[name]),
                **{key: speed[key] for key in ("ratio", "ratio_low", "ratio_high")},
                "first_pass_seconds": first[name],
                "programs": programs[name],
            }
        )
    return rows


class _Plain:
    """One row at a time through the whole model, as long as it is."""

    def __init__(self, model: TrainedModel) -> None:
        """Compiles nothing yet."""
        import jax

        self._model, self._lengths = model, set[int]()

        def log_p(params: Any, frozen: Any, batch: Any) -> Any:
            of = model.model
            hidden: Any = of.decoder.apply(
                {"params": params}, batch.tokens_BT, of.features(frozen, batch), method="hidden"
            )
            logits_BTV: Any = of.decoder.apply(
                {"params": params}, hidden.hidden_BTD, method="logits"
            )
            return jax.nn.log_softmax(logits_BTV[0])

        self._log_p = jax.jit(log_p)

    @property
    def compiled(self) -> int:
        """Programs so far."""
        return len(self._lengths)

    def scores(self, asked: AskedChoice) -> list[np.ndarray]:
        """Of every candidate: the prompt is read again for each that has several tokens."""
        import numpy as np

        encode, start = self._model.tokenizer.encode_lm, self._model.tokenizer.eos_id
        found = []
        for question in asked.questions:
            prompt = np.append(start, encode(question.prompt.rstrip())).astype(np.int32)
            behind = self._read(prompt)[-1]
            own = []
            for candidate in question.candidates:
                ids = encode(f" {candidate}")
                total = float(behind[ids[0]])
                if len(ids) > 1:
                    rows = self._read(np.concatenate([prompt, ids[:-1]]))[len(prompt) :]
                    total += float(sum(rows[at, token] for at, token in enumerate(ids[1:])))
                own.append(total)
            found.append(np.array(own))
        return found

    def _read(self, ids: np.ndarray) -> np.ndarray:
        import numpy as np

        from blindvalm_jax import partitioning

        self._lengths.add(len(ids))
        batch = self._model.batch_of_ids([ids])
        with partitioning.use(self._model.mesh):
            return np.asarray(self._log_p(self._model.params, self._model.frozen, batch))


def _scores(scorer: Scorer, tokenizer: Tokenizer, asked: AskedChoice) -> list[np.ndarray]:
    from blindvalm_jax.tasks import answers

    return answers.answer(scorer, tokenizer, asked.protocol, asked.questions).scores


def _seconds(ask: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    ask()
    return time.perf_counter() - begin
