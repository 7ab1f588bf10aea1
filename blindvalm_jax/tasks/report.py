"""The page that tells what an evaluation found, made from its results.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.markdown import table
from blindvalm_jax.tasks import catalog, figures, identity, places, published, standing

_ALMOST_ALWAYS = 0.9  # share of answers from which one is named
_LONGEST_PROMPT = 90  # letters
_UNKNOWN = "–"


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Writes report.md and its figures/*.png into `out`; gives the path of the page.

    results: as `results.read` checks them.

    Raises:
      UserError: a file cannot be written.
    """
    tasks: Mapping[str, Mapping[str, Any]] = results["tasks"]
    path = out / places.PAGE
    with standing.writing(out):
        figures.save(figures.scores(tasks), out / places.SCORES)
        lines = [*_head(results), *_scores(tasks), *_constant(tasks), *_published(results)]
        lines += [line for name, entry in tasks.items() for line in _task(name, entry, out)]
        files.write_bytes(path, re.sub("\n{3,}", "\n\n", "\n".join(lines)).encode())
    return path


def _head(results: Mapping[str, Any]) -> list[str]:
    of = f"# Evaluation of {results['model']}"
    about = [f"step {results['step']}"] if results["step"] else []
    about += [f"in {results['dtype']}"] if "dtype" in results else []
    about += [f"{name} {results[name]}" for name in ("tokenizer", "commit") if results[name]]
    # Results of an older version do not say it.
    how = identity.grounded(results["grounding"]) if "grounding" in results else ""
    return [of, "", "; ".join(about), "", how, ""]


def _scores(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = ["task", "protocol", "score", "stderr", "95 % interval", "majority", "random", "n"]
    rows = [
        [
            f"[{name}](#{_anchor(name)})",
            entry["protocol"],
            _shown(entry, entry["score"]),
            _shown(entry, entry["stderr"]),
            _interval([_shown(entry, value) for value in entry["interval"]]),
            _shown(entry, entry["majority"]),
            _shown(entry, entry["random"]),
            f"{entry['n']:,}",
        ]
        for name, entry in tasks.items()
    ]
    above = [name for name, entry in tasks.items() if _beats_majority(entry)]
    return [
        f"![scores]({places.SCORES})",
        *table(head, rows),
        "Accuracies are in percent, perplexities as they are. Standard errors are clustered by "
        "item, those of pairs by the objects they share. Majority: the one answer that is right "
        "most often (perplexity: of a unigram); random: drawing among the candidates (perplexity: "
        "of equal chances; LAMBADA: a word drawn from the passage). n counts rows of the file or "
        "documents; items are asked with all templates.",
        "",
        "Better than the majority with their whole interval: "
        f"{', '.join(above) if above else 'none'}.",
        "",
    ]


def _beats_majority(entry: Mapping[str, Any]) -> bool:
    (low, high), majority = entry["interval"], entry["majority"]
    worst = low if entry["metric"] == "accuracy" else high
    if worst is None or majority is None:
        return False
    return bool(worst > majority if entry["metric"] == "accuracy" else worst < majority)


def _constant(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names the tasks in which the model answers almost always the same."""
    found = []
    chosen = {name: entry["answers"] for name, entry in tasks.items() if "answers" in entry}
    for name, counts in chosen.items():
        total = sum(said for said, _ in counts.values())
        for word, (said, gold) in counts.items():
            if said >= _ALMOST_ALWAYS * total:
                found.append(
                    f"- {name}: “{word}” in {said / total:.1%} of the answers, right in "
                    f"{gold / total:.1%}"
                )
    if not found:
        return []
    return [
        "**Almost always the same answer**, so that a score says nothing of knowledge:",
        "",
        *found,
        "",
    ]


def _published(results: Mapping[str, Any]) -> list[str]:
    """This model beside printed figures, and what is wrong with those."""
    tasks = results["tasks"]
    columns, rows = (*published.LOGGED, "listed"), []
    for name, entry in tasks.items():
        printed = published.of(name)
        for way in dict.fromkeys(figure.way for figure in printed):
            own = [figure for figure in printed if figure.way == way]
            cells = [_printed(name, own, column) for column in columns]
            rows.append([f"{name}, {way}" if way else name, _own(name, entry, way), *cells])
    if not rows:
        return []
    return [
        "## Beside published figures",
        "",
        "They hold for the protocol `published` and models that read CLIP's BPE; "
        f"{_comparable(results)} Columns of models: {published.SOURCES['C']} (C). Listed: A, "
        f"{published.SOURCES['A']}; B, {published.SOURCES['B']}. Accuracies in percent; those of "
        "sizes are twice what was printed, as each answer was counted twice.",
        *table(["task", "this model", *columns], rows),
        "What is wrong with them:",
        "",
        *(f"- {fault}" for fault in (*_faults(tasks), *published.FAULTS)),
        "",
    ]


def _faults(names: Iterable[str]) -> list[str]:
    """What is wrong with the printed figures of tasks, each fault with those that have it."""
    found: dict[str, list[str]] = {}
    printed = [name for name in names if published.of(name)]
    for name in printed:
        for fault in catalog.published_faults(name):
            found.setdefault(fault, []).append(name)
    return [f"{fault}: {_listed(own, printed)}" for fault, own in found.items()]


def _listed(names: Sequence[str], every: Sequence[str]) -> str:
    """Names, or which are not among them where that is shorter."""
    others = [name for name in every if name not in names]
    if len(names) < 4 or len(others) > 3:
        return ", ".join(names)
    return "all" + (f" but {', '.join(others)}" if others else "")


def _comparable(results: Mapping[str, Any]) -> str:
    protocols = {entry["protocol"] for entry in results["tasks"].values()}
    kind = results["tokenizer"]
    if protocols == {"published"} and kind == "clip":
        return "this model was asked and reads alike."
    asked = " and ".join(f"`{protocol}`" for protocol in sorted(protocols))
    return f"this model was asked under {asked} and reads `{kind}` tokens: **not like with like**."


def _times(name: str) -> float:
    """What a printed figure is multiplied by."""
    protocol = catalog.TASKS[name].published if name in catalog.TASKS else None
    return 1.0 if protocol is None else 1 / protocol.share


def _printed(name: str, printed: Sequence[published.Figure], column: str) -> str:
    cells = []
    for figure in printed:
        values = " / ".join(f"{_times(name) * value:.4g}" for value in figure.values)
        if figure.model == column:
            cells.append(values)
        elif column == "listed" and figure.source != "C":
            cells.append(f"{figure.source} {figure.model} {values}")
    return "; ".join(cells)


def _own(name: str, entry: Mapping[str, Any], way: str) -> str:
    """This model's score by a way of scoring, where it was scored so."""
    value = entry["score"]
    if way:
        if "beside" not in entry or way not in entry["beside"]:
            return ""
        value = entry["beside"][way]
    times = _times(name) if entry["protocol"] == "published" else 1.0
    return _shown(entry, None if value is None else times * value)


def _task(name: str, entry: Mapping[str, Any], out: Path) -> list[str]:
    lines = [f"## {name}", "", f"{entry['source']}. Protocol `{entry['protocol']}`.", ""]
    if "answers" in entry:
        figures.save(figures.answers(entry), out / places.figure(name))
        lines += [f"![answers to {name}]({places.figure(name)})", ""]
    if "prompts" in entry:
        pairs = zip(entry["prompts"], entry["per_prompt"], strict=True)
        rows = [
            [f"{number}", _shown(entry, score), f"`{_cut(prompt)}`"]
            for number, (prompt, score) in enumerate(pairs, 1)
        ]
        lines += table(["template", "accuracy", "first prompt"], rows)
    if "beside" in entry and entry["beside"]:
        ways = (f"by {way} {_shown(entry, value)}" for way, value in entry["beside"].items())
        lines += [f"Scored by {entry['scored_by']}; {', '.join(ways)}.", ""]
    if entry["metric"] == "perplexity":
        lines += [_texts(entry), ""]
    if entry.get("last_word_perplexity") is not None:
        lines += [f"Perplexity of the whole last word: {entry['last_word_perplexity']:.5g}.", ""]
    if "prompts_cut" in entry and entry["prompts_cut"]:
        lines += [f"{entry['prompts_cut']:,} prompts lost their beginning.", ""]
    if entry["faults"]:
        lines += ["Faults of the protocol:", "", *(f"- {fault}" for fault in entry["faults"]), ""]
    return lines


def _texts(entry: Mapping[str, Any]) -> str:
    """What a perplexity is made of."""
    names = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
    names["word_perplexity"] = "perplexity by word"
    known = [f"{text} {entry[key]:.4g}" for key, text in names.items() if entry[key] is not None]
    return (
        f"{entry['tokens']:,} tokens of {entry['n']:,} documents, in windows of {entry['window']} "
        f"tokens, {entry['stride']} apart; {entry['skipped']} left out. {', '.join(known)}."
    )


def _interval(ends: Sequence[str]) -> str:
    return "[{}, {}]".format(*ends) if set(ends) != {_UNKNOWN} else _UNKNOWN


def _shown(entry: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{100 * value:.2f}" if entry["metric"] == "accuracy" else f"{value:.5g}"


def _cut(prompt: str) -> str:
    """A prompt as one line of a cell."""
    line = " ".join(prompt.split()).replace("|", "/").replace("`", "'")
    return line if len(line) <= _LONGEST_PROMPT else f"{line[:_LONGEST_PROMPT]}…"


def _anchor(title: str) -> str:
    """Where a heading of this title is linked to."""
    return "".join(letter for letter in title.lower() if letter.isalnum() or letter in "-_")
