"""Two evaluations question by question: who knows more, and how sure that is.

Both have answered the same questions, so that what is hard for both falls out. The tests are
`statistics.paired`; p-values are corrected for the number of tasks (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.markdown import table
from blindvalm_jax.tasks import catalog, figures, results, statistics
from blindvalm_jax.tasks.task import GROUPS

# What a line holds that the model has said; the rest is what it was asked.
_SAID = ("scores", "chosen", "right", "nats")
_WINDOWS = ("window", "stride")
# What a line says of the text itself: a question in full, or the hash of a passage or document.
_TEXT = ("prompt", "text_sha256")
HEAD = (
    f"{'task':22} {'A':>8} {'B':>8} {'A - B':>8} {'stderr':>7} {'95 % interval':>19} {'p':>7} "
    f"{'Holm':>7} {'only A':>6} {'only B':>6}"
)


def compare(first: Path, second: Path, *, names: Sequence[str] = ()) -> dict[str, Any]:
    """What compare.json holds: `first` (A) less `second` (B), by task.

    first, second: runs, or directories with a results.json. names: of tasks or groups; none: all
    that both were asked.

    Raises:
      UserError: a directory has no results, they share no task, or were asked other questions.
    """
    (mine, here), (base, there) = results.read(first), results.read(second)
    tasks = _shared(mine["tasks"], base["tasks"], names)
    found = {}
    for name in tasks:
        entries = mine["tasks"][name], base["tasks"][name]
        settings = _settings(name, *entries)
        lines = [
            results.read_lines(place, name, entry)
            for place, entry in zip((here, there), entries, strict=True)
        ]
        _check_texts(name, *entries, lines)
        found[name] = {**settings, **_compared(name, entries[0], *lines)}
    for name, p in zip(found, holm([entry["p"] for entry in found.values()]), strict=True):
        found[name]["p_holm"] = p
    protocol = ", ".join(sorted({entry["protocol"] for entry in found.values()}))
    about = [_about(whole, place, protocol) for whole, place in ((mine, here), (base, there))]
    return {"A": about[0], "B": about[1], "tasks": found, "correction": "Holm"}


def _about(whole: Mapping[str, Any], place: Path, protocol: str) -> dict[str, Any]:
    """What tells an evaluation from the other, as far as results.json says it."""
    names = ("model", "step", "tokenizer", "dtype", "grounding")
    known = {name: whole[name] for name in names if name in whole}
    if known.get("grounding") is not None:
        grounding = known["grounding"]
        known["grounding"] = {x: grounding[x] for x in ("source", "readout") if x in grounding}
    return {"directory": str(place), **known, "protocol": protocol}


def described(about: Mapping[str, Any]) -> str:
    """One of the two evaluations in a line; about: `A` or `B` of what `compare` gives."""
    told = [f"{about['model']}", f"step {about['step']}", f"tokenizer {about['tokenizer']}"]
    told += [f"{about['dtype']}"] if "dtype" in about else []
    if "grounding" in about:
        grounding = about["grounding"]
        told += ["no grounding"] if grounding is None else []
        told += [f"grounding {name} {value}" for name, value in (grounding or {}).items()]
    return f"{', '.join(told)}; protocol {about['protocol']}; in {about['directory']}"


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that any error is as rare as one was (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p)[order] * (len(p) - np.arange(len(p)))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in corrected]


def _shared(mine: Mapping[str, Any], base: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Names of the tasks to compare."""
    both = [name for name in mine if name in base]
    groups = [name for name in names if name in GROUPS]
    for name in names:
        if name not in both and name not in groups:
            known = f"both have {', '.join(both) or 'no task'}"
            raise UserError(f"{name} was not asked in A and B: {known}")
    wanted = {*names, *(task.name for task in catalog.chosen(groups))} if groups else set(names)
    found = [name for name in both if not names or name in wanted]
    if not found:
        raise UserError(f"A and B share no task: A has {', '.join(mine)}; B has {', '.join(base)}")
    return found


def _settings(name: str, mine: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Metric and protocol of a task, which must be the same, and so must windows and clusters."""
    for key in ("metric", "protocol", *_WINDOWS, "clustered_by"):
        a, b = mine.get(key), base.get(key)
        if a != b:
            raise UserError(
                f"{name} was asked with {key} {a} in A and {b} in B: evaluate both alike"
            )
    if mine["metric"] == "accuracy" and "clustered_by" not in mine:
        raise UserError(
            f"{name} does not say what it is clustered by, in A nor in B: evaluate again to have it"
        )
    return {"metric": mine["metric"], "protocol": mine["protocol"]}


def _check_texts(
    name: str,
    mine: Mapping[str, Any],
    base: Mapping[str, Any],
    lines: Sequence[Sequence[Mapping[str, Any]]],
) -> None:
    """Refuses other files, and other sources where the lines do not say what was asked.

    Where they do, the questions themselves are compared later on (`_check_same`).
    """
    hashes = [None if of.get("file") is None else of["file"]["sha256"] for of in (mine, base)]
    if hashes[0] == hashes[1] and (hashes[0] is not None or mine["source"] == base["source"]):
        return
    a, b = (
        of["source"] if sha256 is None else f"{of['file']['name']} ({sha256[:12]})"
        for of, sha256 in zip((mine, base), hashes, strict=True)
    )
    if None not in hashes:
        raise UserError(
            f"{name} was asked of {a} in A and {b} in B: other data, evaluate both alike"
        )
    if not all(any(text in line for text in _TEXT) for own in lines for line in own):
        raise UserError(
            f"{name} was asked of {a} in A and {b} in B, and not every line of both says of which "
            "text it is: evaluate both alike, or again to have it"
        )


def _compared(
    name: str,
    entry: Mapping[str, Any],
    mine: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    _check_same(name, entry["metric"], mine, base)
    items = [line["item"] for line in mine]
    if entry["metric"] == "perplexity":
        return _perplexities(mine, base)
    right, other = (np.array([line["right"] for line in lines], bool) for lines in (mine, base))
    of_pairs = entry["clustered_by"] == statistics.BY_OBJECT
    objects = [line["objects"] for line in mine] if of_pairs else None
    found = statistics.paired(right, other, items, objects=objects)
    return {
        "clustered_by": entry["clustered_by"],
        "A": float(right.mean()),
        "B": float(other.mean()),
        **_difference(found),
        "only_A": int(np.sum(right & ~other)),
        "only_B": int(np.sum(other & ~right)),
        "questions": len(items),
    }


def _perplexities(mine: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Difference of nats per token, and ratio of perplexities, by document."""
    nats, other = (np.array([line["nats"] for line in lines]) for lines in (mine, base))
    tokens = np.array([line["tokens"] for line in mine], float)
    found = statistics.paired_ratio(nats, other, tokens)
    a, b = float(nats.sum() / tokens.sum()), float(other.sum() / tokens.sum())
    return {
        "clustered_by": "document",
        "A": statistics.power(a),
        "B": statistics.power(b),
        **_difference(found),
        "ratio": statistics.power(found.difference),
        "only_A": int(np.sum(nats < other)),
        "only_B": int(np.sum(other < nats)),
        "questions": len(nats),
    }


def _difference(found: statistics.Paired) -> dict[str, Any]:
    unknown = math.isnan(found.stderr)
    return {
        "difference": found.difference,
        "stderr": None if unknown else found.stderr,
        "interval": [None, None] if unknown else [found.low, found.high],
        "p": found.p,
        "clusters": found.clusters,
    }


def _check_same(
    name: str, metric: str, mine: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]
) -> None:
    """Refuses other questions: other data or templates; for perplexities another tokenizer too."""
    said = _SAID if metric == "perplexity" else (*_SAID, "tokens")
    if not all("text_sha256" in line for line in (*mine, *base)):
        said = (*said, "text_sha256")  # older lines lack it
    if not mine or len(mine) != len(base):
        raise UserError(
            f"{name}: A has {len(mine)} questions or documents, B has {len(base)}: other data or "
            "templates"
        )
    for number, pair in enumerate(zip(mine, base, strict=True), 1):
        a, b = ({k: v for k, v in line.items() if k not in said} for line in pair)
        if a != b:
            key = next(key for key in [*a, *b] if key not in a or key not in b or a[key] != b[key])
            told = (_short(of[key]) if key in of else "nothing" for of in (a, b))
            raise UserError(
                f"{name}: question {number} differs in {key}, {' in A, '.join(told)} in B: other "
                "data, or in another order, templates or tokens"
            )


def _short(value: object) -> str:
    """A value as a few letters of an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def line_of(name: str, entry: Mapping[str, Any]) -> str:
    """A task's line in the table: accuracies in percent; of perplexities nats per token differ."""
    percent = entry["metric"] == "accuracy"
    unit, digits = (100, 2) if percent else (1, 4)

    def shown(value: float | None, width: int) -> str:
        return " " * width if value is None else f"{unit * value:{width}.{digits}f}"

    interval = "[{}, {}]".format(*(shown(value, 0) for value in entry["interval"]))
    return (
        f"{name:22} {_score(entry, 'A'):>8} {_score(entry, 'B'):>8} "
        f"{shown(entry['difference'], 8)} {shown(entry['stderr'], 7)} {interval:>19} "
        f"{_p(entry['p']):>7} {_p(entry['p_holm']):>7} {entry['only_A']:6} {entry['only_B']:6}"
    )


def _score(entry: Mapping[str, Any], which: str) -> str:
    """An accuracy in percent, or a perplexity where it is a float."""
    value = entry[which]
    unit = 100 if entry["metric"] == "accuracy" else 1
    return "–" if value is None else f"{unit * value:.2f}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"


def write(found: Mapping[str, Any], out: Path) -> Path:
    """Writes compare.json, compare.md and figures/compare.png; gives the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    tasks = found["tasks"]
    files.write_json(out / "compare.json", found)
    drawn = figures.differences(tasks, first="A", second="B")
    figures.save(drawn, out / "figures" / "compare.png")
    head = ["task", "protocol", "A", "B", "A − B", "stderr", "95 % interval", "p", "p (Holm)"]
    head += ["only A", "only B", "of"]
    rows = [_row(name, entry) for name, entry in tasks.items()]
    lines = ["# Two evaluations compared", ""]
    lines += [f"- {which}: {described(found[which])}" for which in ("A", "B")]
    lines += [
        "",
        "![differences](figures/compare.png)",
        *table(head, rows),
        "Accuracies are shares of questions that are right, in percent, and their differences "
        "points: under `published` the sizes of results.json are half of them. Of perplexities the "
        "difference is in nats per token, with the ratio of perplexities in brackets; less is "
        "better. Errors and tests are clustered by item or document, those of pairs by their "
        "objects. Intervals of accuracies count two further items, one that differs each way, so "
        "that they are wide where few differ; those of perplexities are of t. p is that of a "
        "permutation test, of pairs that of t; p (Holm) is corrected for "
        f"these {len(tasks)} tasks. Only A: questions that A alone has right, or documents that it "
        "predicts better; of: questions or documents.",
        "",
    ]
    path = out / "compare.md"
    files.write_bytes(path, "\n".join(lines).encode())
    return path


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    percent = entry["metric"] == "accuracy"

    def shown(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{100 * value:+.2f}" if percent else f"{value:+.4f}"

    known = not percent and entry["ratio"] is not None
    ratio = f" ({entry['ratio']:.4f})" if known else ""
    return [
        *(name, entry["protocol"], _score(entry, "A"), _score(entry, "B")),
        f"{shown(entry['difference'])}{ratio}",
        shown(entry["stderr"]).removeprefix("+"),
        "[{}, {}]".format(*(shown(value) for value in entry["interval"])),
        *(_p(entry["p"]), _p(entry["p_holm"])),
        *(f"{entry['only_A']:,}", f"{entry['only_B']:,}", f"{entry['questions']:,}"),
    ]
