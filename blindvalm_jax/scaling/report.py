"""The report on a sweep: report.md, report.html, results.csv, results.json and figures/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.scaling import figures, numbers, report_tables, results, sentences
from blindvalm_jax.scaling.analysis import Analysis
from blindvalm_jax.scaling.document import Block, Heading, Items, Text, as_html, as_markdown
from blindvalm_jax.scaling.document import Figure as Shown
from blindvalm_jax.scaling.family_fits import UNITS
from blindvalm_jax.scaling.results import FLOPS, Once
from blindvalm_jax.scaling.wording import label

ASSUMPTIONS = (
    "Model FLOPs count the matrix products of training once, with the keys that a position sees; "
    "masked keys, padding and what is computed again are not in them (docs/costs.md). "
    "Device-seconds: the median seconds of an update, times updates, times devices; evaluation, "
    "checkpoints and compilation are not in them, the search of an index and waits for data are.",
    "N: trained parameters, the tied head counted, the padding of the vocabulary not; of all "
    "families alike. Frozen towers and indices count in what a token costs, not in N.",
    "All runs are scored on the same held-out data with the same tokenizer; loss is in nats a "
    "token.",
    "Intervals (95 %) come from runs drawn again with replacement, those of one trunk together. "
    "They take trunks for independent. Families with the same sizes, budgets and trunks are drawn "
    "alike and compared draw by draw; others as if their runs had nothing in common. "
    "FLOPs of a token are known; its seconds are drawn again as runs are, and devices are taken "
    "for equally fast in all families' runs. No interval is widened for how many are looked at.",
    "Intervals of accuracies are of what one more run of this size and length would have: they "
    "hold how far runs lie from the response, and the draw of the questions. The intervals of "
    "single runs are those of their questions.",
    "What a token costs at a size between those trained: FLOPs by a straight line in logarithms "
    "from size to size, device-seconds by one parabola in logarithms through all runs of the "
    "family. A branched run costs what it would have cost alone.",
    "The best size of a budget is looked for among sizes that the family has trained, and no "
    "budget is compared that a family has not seen; the table of best sizes goes a decade further.",
)


def write(
    analysis: Analysis,
    out: Path,
    *,
    title: str = "Families at equal budget",
    once: Sequence[Once] = (),
    notes: Sequence[str] = (),
) -> None:
    """Makes all files first, then writes them; each is there whole or not at all.

    once: what is done once, outside of all budgets. notes: lines of who
    knows the runs (devices, what differs between them).

    Raises:
      UserError: `out` cannot be written.
    """
    made = figures.all_of(analysis)
    blocks = page(analysis, made, title=title, once=once, notes=notes)
    pictures = {name: content for name, (content, _) in made.items()}
    found = numbers.of(analysis, once=once, notes=notes)
    contents = {
        "results.csv": results.as_csv(analysis.results).encode(),
        "results.json": (json.dumps(found, indent=1, allow_nan=False) + "\n").encode(),
        **{f"figures/{name}.png": content for name, content in pictures.items()},
        "report.html": as_html(blocks, pictures).encode(),
        "report.md": as_markdown(blocks).encode(),
    }
    files.check_possible(out, what=str(out))
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            files.write_bytes(out / name, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error


def page(
    analysis: Analysis,
    made: Mapping[str, tuple[bytes, str]],
    *,
    title: str,
    once: Sequence[Once],
    notes: Sequence[str],
) -> list[Block]:
    """The report; made: its figures."""

    def figure(name: str) -> list[Block]:
        return [Shown(name, made[name][1])] if name in made else []

    used = len(analysis.results) - len(analysis.left_out)
    names = ", ".join(label(name) for name in (*analysis.families, *analysis.unfitted))
    blocks: list[Block] = [
        Heading(title, 1),
        Text(f"{used} of {len(analysis.results)} runs are done and used; families: {names}."),
        *([Items(list(notes))] if notes else []),
        Heading("What the data support"),
        Items(sentences.supported(analysis)),
        *report_tables.verdicts(analysis),
        *_left_out(analysis),
        Heading("The best runs, without a law"),
        *report_tables.best_runs(analysis),
        Heading("Loss at equal budget"),
        *figure("loss"),
    ]
    for unit in UNITS:
        blocks += [Heading(f"At equal {unit}", 3), *report_tables.losses(analysis, unit)]
    blocks += figure("multipliers")
    for task in analysis.tasks():
        blocks += [Heading(f"Accuracy: {task}"), *figure(figures.accuracy_name(task))]
        for unit in UNITS:
            blocks += report_tables.accuracies(analysis, task, unit)
        blocks += report_tables.responses(analysis, task)
    blocks += [Heading("Best size and length"), *figure("optimal")]
    for unit in UNITS:
        blocks += report_tables.optima(analysis, unit)
    blocks += [Heading("Laws"), *report_tables.laws(analysis)]
    blocks += [Heading("IsoFLOP parabolas"), *figure("isoflop"), *report_tables.parabolas(analysis)]
    blocks += [Heading("Done once"), *report_tables.once(once)]
    blocks += [Heading("Assumptions"), Items(ASSUMPTIONS)]
    blocks += [Heading("Runs"), *report_tables.runs(analysis)]
    return blocks


def _left_out(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    if analysis.left_out:
        lines = [f"{names}: {why}" for why, names in grouped(analysis.left_out).items()]
        blocks += [Heading("Runs that are left out", 3), Items(lines)]
    lines = [f"{label(name)}: {why}" for name, why in analysis.unfitted.items()]
    for name, fit in analysis.families.items():
        lines += [
            f"{label(name)}, {what}: {why}" for what, why in fit.without.items() if what != FLOPS
        ]
    if lines:
        blocks += [Heading("What has no fit, and why", 3), Items(lines)]
    return blocks


def grouped(left_out: Mapping[str, str]) -> dict[str, str]:
    """Why runs are left out -> the names of those that it is so of."""
    found: dict[str, list[str]] = {}
    for name, why in left_out.items():
        found.setdefault(why, []).append(name)
    return {why: ", ".join(names) for why, names in found.items()}
