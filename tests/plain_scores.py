"""Five tasks asked and scored once more, as plainly as can be, for comparison with ours.

Written from what is known of the reference's scripts (arXiv 2409.11148): one prompt at a time, one
row for every token. Nothing of `blindvalm_jax.tasks` is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

TASKS = ("memory_colors", "shapeit", "vicomte_shape_single", "relative_size", "sst2")
PROTOCOLS = ("corrected", "published")
COLORS = (
    "Q: What is the color of [DESCRIPTOR] [ITEM]? A: It is",
    "Q: What is the colour of [DESCRIPTOR] [ITEM] ? A: It is ",
    "What is the color of [DESCRIPTOR] [ITEM]? It is",
    "What is the colour of [DESCRIPTOR] [ITEM]? ",
    "What is the usual color of [DESCRIPTOR] [ITEM]?",
    "What is the typical color of [DESCRIPTOR] [ITEM]?",
    "The color of [DESCRIPTOR] [ITEM] is",
    "The usual color of [DESCRIPTOR] [ITEM] is",
    "[DESCRIPTOR] [ITEM] usually has the color of",
)
SHAPES = (
    "[ITEM] can be shape of",
    "[ITEM] has shape of",
    "[ITEM] is of shape",
    "The shape of [ITEM] can be",
    "The shape of the [ITEM] is",
    "[ITEM] is",
    "This [ITEM] is",
)
VICOMTE = (
    "[ITEM] can be shape",
    "[ITEM] has shape",
    "[ITEM] is of shape",
    "The shape of [ITEM] can be",
    "The shape of the [ITEM] is",
)
SIZES = (
    "Which is bigger? [ITEMA] or [ITEMB]",
    "Which is smaller? [ITEMA] or [ITEMB]",
    "Which is larger? [ITEMA] or [ITEMB]",
    "Which is tinier? [ITEMA] or [ITEMB]",
    "Which has a bigger size? [ITEMA] or [ITEMB]",
    "Which has a smaller size? [ITEMA] or [ITEMB]",
    "Which one is larger in size? [ITEMA] or [ITEMB]",
    "Which one is smaller in size? [ITEMA] or [ITEMB]",
)
REVIEW = "Review: [TEXT] Sentiment: "

_FILES = {
    "memory_color_data.csv": """Index,Descriptor,Item,Color
1,a ,red cat,red
2,,ring,green
3,the inside of an,ant in the ring,café
""",
    "shape_association.csv": """word,gt,options
ring,ring,"[]"
cat,triangle,"[]"
""",
    "test_shape.jsonl": """{"sub": "caf; and", "obj": "round", "alt": ""}
{"sub": "ring", "obj": "the", "alt": ""}
""",
    "relative_size.jsonl": """{"sub": "ant", "obj": "the cat", "alt": "", "size": "small"}
{"sub": "ring", "obj": "ant", "alt": "", "size": "big"}
{"sub": "ant", "obj": "ring", "alt": "", "size": "small"}
""",
    "sst2_test.jsonl": """{"text": "it's red, and then... 10!", "label": "Negative"}
{"text": "the ring (an ant): naïve", "label": "Positive"}
""",
    "test_with_labels.json": """[{"text": "don't ; then the reds .", "label": "Negative"}]""",
}
_LABELS = ("test_with_labels.json", "sst2_blind_BAD_LABELS_test_with_labels.json")


def write_files(directory: Path) -> Path:
    """Small files of all tasks."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def copy_some(source: Path, directory: Path, *, every: int, longest: int) -> Path:
    """Every so manieth row of the real files of all tasks, none longer than so many characters."""
    directory.mkdir(parents=True)
    for name in ("memory_color_data.csv", "shape_association.csv"):
        lines = _text(source / "vlu" / name).splitlines()
        (directory / name).write_text("\n".join([lines[0], *lines[1::every]]), encoding="utf-8")
    shapes = {json.loads(x)["obj"]: x for x in _text(source / "vlu/test_shape.jsonl").splitlines()}
    (directory / "test_shape.jsonl").write_text("\n".join([*shapes.values()][:2]), encoding="utf-8")
    for name in ("vlu/relative_size.jsonl", "nlu/sst2_test.jsonl"):
        lines = [line for line in _text(source / name).splitlines() if len(line) <= longest]
        kept = "\n".join(lines[:: every * len(lines) // 100])
        (directory / Path(name).name).write_text(kept, encoding="utf-8")
    rows = [row for row in json.loads(_text(source / "nlu" / _LABELS[1])) if row["text"]]
    rows = [row for row in rows if len(row["text"]) <= longest // 2]
    (directory / _LABELS[1]).write_text(json.dumps(rows[:3]), encoding="utf-8")
    return directory


def asked(task: str, protocol: str, data: Path) -> Iterator[tuple[str, list[str]]]:
    """Prompts and their candidates, in the order of the file."""
    if task == "memory_colors":
        lines = _text(data / "memory_color_data.csv").splitlines()[1:]
        rows = [line.split(",") for line in lines]
        for template in COLORS:
            for _, descriptor, item, _ in rows:
                word = f"{descriptor.strip()} ".lstrip()
                prompt = template.replace("[DESCRIPTOR] ", word).replace("[ITEM]", item.strip())
                yield prompt, list(dict.fromkeys(row[3].strip() for row in rows))
    elif task == "shapeit":
        lines = _text(data / "shape_association.csv").splitlines()[1:]
        rows = [[field.strip('"') for field in line.split(",")[:2]] for line in lines]
        for template in SHAPES:
            for word, _ in rows:
                yield (
                    template.replace("[ITEM]", word),
                    list(dict.fromkeys(shape for _, shape in rows)),
                )
    elif task == "vicomte_shape_single":
        found = [json.loads(line) for line in _text(data / "test_shape.jsonl").splitlines()]
        for template in VICOMTE:
            for row in found:
                shapes = list(dict.fromkeys(other["obj"] for other in found))
                yield template.replace("[ITEM]", row["sub"]), shapes
    elif task == "relative_size":
        found = [json.loads(line) for line in _text(data / "relative_size.jsonl").splitlines()]
        pairs = [(row["sub"], row["obj"]) for row in found]
        if protocol == "corrected":
            pairs = list(dict.fromkeys([*pairs, *((b, a) for a, b in pairs)]))
        for template in SIZES:
            for a, b in pairs:
                yield template.replace("[ITEMA]", a).replace("[ITEMB]", b), [a, b]
    else:
        for text in _reviews(protocol, data):
            yield REVIEW.replace("[TEXT]", text), ["Positive", "Negative"]


def scores(
    task: str,
    protocol: str,
    data: Path,
    *,
    encode: Callable[[str], list[int]],
    end_id: int,
    log_p: Callable[[Sequence[int]], np.ndarray],
) -> dict[str, np.ndarray]:
    """[questions, candidates] of each way of scoring, in the order of `asked`.

    encode: ids of a text; end_id: of the token between texts; log_p: of every next token [V] behind
    one row.
    """
    found: dict[str, list[list[float]]] = {}
    for prompt, words in asked(task, protocol, data):
        ids = encode(prompt.rstrip())
        if protocol == "corrected":
            ids = [end_id, *ids]
        each = [_ways(task, protocol, ids, encode(f" {word}"), log_p) for word in words]
        for way in each[0]:
            found.setdefault(way, []).append([one[way] for one in each])
    return {way: np.array(values) for way, values in found.items()}


def _ways(
    task: str,
    protocol: str,
    prompt: list[int],
    candidate: list[int],
    log_p: Callable[[Sequence[int]], np.ndarray],
) -> dict[str, float]:
    """The score of one candidate, in each way that is reported."""
    if protocol == "corrected":
        behind = [log_p([*prompt, *candidate[:n]])[token] for n, token in enumerate(candidate)]
        return {"continuation": float(np.sum(behind))}
    values = [float(log_p(prompt)[token]) for token in candidate]
    if task == "shapeit":
        total = 1.0
        for value in values:
            total += value
        return {"mean_from_one": total / len(values), "sum_from_one": total}
    if task == "vicomte_shape_single":
        return {"mean_probability": sum(math.exp(value) for value in values) / len(values)}
    if task == "relative_size":
        return {"mean": sum(values) / len(values), "sum": sum(values)}
    return {"sum": sum(values)}


def _reviews(protocol: str, data: Path) -> list[str]:
    if protocol == "corrected":
        lines = _text(data / "sst2_test.jsonl").splitlines()
        return [json.loads(line)["text"] for line in lines]
    (path,) = [data / name for name in _LABELS if (data / name).exists()]
    return [row["text"] for row in json.loads(_text(path))]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
