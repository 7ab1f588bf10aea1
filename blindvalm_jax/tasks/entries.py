"""What an entry of results.json holds, checked before anything is made of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from blindvalm_jax.tasks import statistics

_LONGEST = 40  # letters of a value in an error
_MOST = 2**53  # that is counted


def _is_number(value: object) -> bool:
    """Of a size that a float has: JSON knows larger whole numbers, and Python reads NaN in it."""
    finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return finite and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_number(value) and 0 <= value <= _MOST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_known(value: object) -> bool:
    return value is None or _is_number(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_known, value))


def _are(one: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(one, value))


def _table(one: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(one, value.values()))


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _are_answers(value: object) -> bool:
    if not isinstance(value, dict) or not all(map(_are_counts, value.values())):
        return False
    return any(said for said, _ in value.values())


def _is_file(value: object) -> bool:
    if not isinstance(value, dict):
        return value is None
    return {"name", "sha256"} <= value.keys() and all(map(_is_text, value.values()))


# A field, what it must be, and what an error calls that.
_Check = tuple[Callable[[object], bool], str]
_NUMBER, _KNOWN = (_is_number, "a number"), (_is_known, "a number or null")
_COUNT, _TEXT = (_is_count, "a whole number"), (_is_text, "a text")
_EVERY: dict[str, _Check] = {
    "protocol": _TEXT,
    "metric": (lambda value: value in ("accuracy", "perplexity"), "accuracy or perplexity"),
    "stderr": _KNOWN,
    "interval": (_is_pair, "two numbers or nulls"),
    "n": _COUNT,
    "majority": _KNOWN,
    "random": _KNOWN,
    "per_prompt": (_are(_is_number), "a list of numbers"),
    "faults": (_are(_is_text), "a list of texts"),
    "source": _TEXT,
}
_PERPLEXITY: dict[str, _Check] = {
    "score": _KNOWN,
    **dict.fromkeys(("tokens", "window", "stride", "skipped"), _COUNT),
    "nats_per_token": _NUMBER,
    **dict.fromkeys(("bits_per_byte", "word_perplexity"), _KNOWN),
}
_IF_THERE: dict[str, _Check] = {
    "prompts": (_are(_is_text), "a list of texts"),
    "per_item": (_table(_is_number), "a table of numbers"),
    "last_word_perplexity": _KNOWN,
    "answers": (_are_answers, "a table of pairs of whole numbers, not all 0"),
    "beside": (_table(_is_number), "a table of numbers"),
    **dict.fromkeys(("scored_by", "clustered_by"), _TEXT),
    "prompts_cut": _COUNT,
    **dict.fromkeys(("file", "majority_file"), (_is_file, "a table with name and sha256, or null")),
    "lines": (lambda value: isinstance(value, dict) and "sha256" in value, "a table with sha256"),
}
# Of a line of TASK.jsonl, by the metric of its entry.
_LINES: dict[str, dict[str, _Check]] = {
    "accuracy": {"item": _TEXT, "right": (lambda value: isinstance(value, bool), "true or false")},
    "perplexity": {"item": _TEXT, "nats": _NUMBER, "tokens": _COUNT},
}
_OBJECTS: dict[str, _Check] = {
    "objects": (
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_text, value)),
        "two texts",
    )
}


def is_name(task: str) -> bool:
    """Whether files can be called so, as those of a task are."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.]*", task) is not None


def problem(task: str, entry: object) -> str:
    """What is wrong with an entry, such as "lacks sst2.random"; "" if nothing is."""
    if not is_name(task):
        return f"has {_short(task)}, which is no name of a task"
    if not isinstance(entry, dict):
        return f"has {_short(entry)} as {task}, expected a table"
    perplexity = entry.get("metric") == "perplexity"
    wanted = {**_EVERY, **(_PERPLEXITY if perplexity else {"score": _NUMBER})}
    there = {name: check for name, check in _IF_THERE.items() if name in entry}
    found = _first(task, entry, {**wanted, **there})
    if not found and "prompts" in entry and len(entry["prompts"]) != len(entry["per_prompt"]):
        return f"has other numbers of {task}.prompts and {task}.per_prompt"
    if not found and entry.get("beside") and "scored_by" not in entry:
        return f"lacks {task}.scored_by"
    return found or _not_written(task, entry)


def _not_written(task: str, entry: object) -> str:
    """That an entry holds, in a field that is not read, what cannot be written again."""
    try:
        json.dumps(entry, allow_nan=False)
    except ValueError:
        return f"has a number in {task} that is not finite"
    return ""


def line_problem(line: object, entry: Mapping[str, Any]) -> str:
    """What is wrong with a line of a task's answers; "" if nothing is."""
    if not isinstance(line, dict):
        return f"is {_short(line)}, expected an object"
    of_pairs = entry.get("clustered_by") == statistics.BY_OBJECT
    return _first("", line, _LINES[entry["metric"]] | (_OBJECTS if of_pairs else {}))


def _first(of: str, values: Mapping[str, Any], wanted: Mapping[str, _Check]) -> str:
    """What is missing, else the first value that is not what it must be."""
    named = {name: f"{of}.{name}" if of else name for name in wanted}
    lacking = [named[name] for name in wanted if name not in values]
    if lacking:
        return f"lacks {', '.join(lacking[:5])}"
    for name, (holds, what) in wanted.items():
        if not holds(values[name]):
            return f"has {_short(values[name])} as {named[name]}, expected {what}"
    return ""


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
