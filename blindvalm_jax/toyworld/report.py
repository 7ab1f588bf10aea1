"""The page that tells what a toy-world comparison found, made from its results.json alone.

Every sentence with a number is computed, and the data choose its words (see `findings`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.toyworld import figures, findings, language, report_probes
from blindvalm_jax.toyworld.figures import table
from blindvalm_jax.toyworld.findings import LABELS, WORDINGS, WORDS, mean, summary_table
from blindvalm_jax.toyworld.world import ATTRIBUTES, SPLITS, attribute_of

__all__ = ["summary_table", "write"]
_QUESTION = """\
Text seldom says what things look like: nobody writes that a banana is yellow, because everybody
knows. A model that learns from text alone misses what text leaves out (reporting bias). VALM gives
a language model the images nearest to its text; BLIND-VALM gives it the features of a CLIP *text*
tower, which was trained together with images but looks at none. Can a language model that reads
such a tower tell what objects look like, when no sentence ever said so?

Here every object is made up, so all that is known of it is in these data. CLIP learns from pictures
and captions; a caption names an object or describes it, never both. The language models all read
the same sentences."""


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Writes report.md and its figures/*.png into `out`; gives the path of the page.

    Raises:
      UserError: something is missing in the results, or not as results.json has it.
    """
    page = figures.Page(results, out, figures.Gallery(findings.check(results)))
    (out / "figures").mkdir(parents=True, exist_ok=True)
    lines = ["# What text never says: the toy world", ""]
    for title, (section, part) in SECTIONS.items():
        if part in results and (body := section(page)):
            lines += [f"## {title}", "", *body, ""]
    path = out / "report.md"
    files.write_bytes(path, re.sub("\n{3,}", "\n\n", "\n".join(lines)).encode())
    return path


def _world(page: figures.Page) -> list[str]:
    config, things = page.gallery.config, page.gallery.things
    first = {split: [i for i, x in enumerate(things) if x.split == split] for split in SPLITS}
    shown = [*first["train"][:4], *first["heldout"][:4]]
    texts = language.sentences(config, things, "train")
    every = language.captions(config, things, "train")
    heldout = {things[i].name for i in first["heldout"]}
    about = [text for text in texts if heldout & set(re.findall(r"\w+", text))]
    stated = sum(attribute_of(text.split()[-1]) is not None for text in about)
    rows = []
    for thing, images in ((things[index], every[index]) for index in (shown[0], shown[-1])):
        named = dict.fromkeys(text for image in images for text in image)
        said = dict.fromkeys(text for text in texts if thing.name in re.findall(r"\w+", text))
        who = f"{thing.name}, {thing.size} {thing.color} {thing.shape} ({thing.split})"
        rows.append([who, *("<br>".join([*found][:6]) for found in (named, said))])
    probes = {p.wording: p for p in language.probes([thing]) if p.attribute == "color"}
    seen, new = (probes[wording] for wording in WORDINGS)
    counts = ", ".join(f"{len(found)} {split}" for split, found in first.items())
    looks = {thing.look for thing in things if thing.split == "train"}
    twins = sum(things[i].look in looks for i in first["heldout"])
    caption = "Objects of the first seed, four pictures each. All objects have pictures and names."
    return [
        f"The world of seed {config.seed} has {len(things)} objects: {counts}. The text states "
        "attributes of train objects; dev objects are for choosing settings, held-out objects for "
        f"what is reported below. Of {len(texts)} training sentences, {len(about)} are about "
        f"held-out objects, and {stated} of these state an attribute. {twins} of the "
        f"{len(first['heldout'])} held-out objects look exactly like some train object, so that "
        "only their names are new.",
        *page.figure("world", figures.sample(page.gallery, shown), caption),
        "What CLIP reads of an object's images, and what a language model reads of it:",
        *table(["object", "captions", "sentences"], rows),
        "A probe is such a text, cut off before the attribute. The model's answer is the candidate "
        f"that it finds likeliest to come next. In a wording that sentences have: "
        f"“{seen.prompt} …”; in one that they never have: “{new.prompt} …”. The right "
        f"answer to both is “{seen.answer}”, one of {', '.join(seen.candidates)}.",
    ]


def _compared(page: figures.Page) -> list[str]:
    rows = []
    for name, v in page.variants.items():
        counts = f"{v['parameters']:,}", findings.updates(v)
        rows.append([LABELS[name], f"`{name}`", findings.SEES[name], *counts])
    differ = "they differ in that and in what the fusion layer may attend to"
    if findings.equally_long(*page.variants.values()):
        differ = "they differ in what that layer may attend to"
    if "gpt2" in page.variants:
        differ += (
            "; GPT-2's plain layer in its place also divides queries by the root of the head "
            "width, not of the model width (the controls have the fusion layer)"
        )
    return [
        "All models learn from the same sentences, with the same decoder but for one fusion layer, "
        f"for {findings.durations(page.variants)}: {differ}.",
        *table(["model", "name", "what the fusion layer sees", "parameters", "updates"], rows),
    ]


def _training(page: figures.Page) -> list[str]:
    caption = "Training loss. Thick: mean over seeds; thin: one seed."
    ends = {k: mean([c["loss"][-1] for c in v["curves"]]) for k, v in page.variants.items()}
    last = ", ".join(f"{LABELS[name]} {end}" for name, end in ends.items())
    return [
        "Training loss at the last record, nats per token, after "
        f"{findings.durations(page.variants)}: {last}.",
        *page.figure("loss", figures.losses(page.results), caption),
    ]


def _nearest(page: figures.Page) -> list[str]:
    lines = []
    if "clip" in page.results:
        found = [(k, v) for k, v in page.results["clip"].items() if k != "seconds"]
        named = "; ".join(f"{key.replace('_', ' ')} {mean(values)}" for key, values in found)
        count = len(page.gallery.things) * page.gallery.config.validation_images_per_object
        lines = [
            f"CLIP on {count} validation images, each with one of its captions: {named}. Recall by "
            f"chance at 1 would be {1 / count:.4f}. It stays low by its nature: a caption is true "
            "of all images of its object, and a description of all that look alike.",
            "",
        ]
    if "neighbours" in page.results:
        rows, gallery = page.results["neighbours"], page.gallery
        pictures, shares = gallery.shown(rows)
        same = ", ".join(f"the same {word} {shares[a]:.3f}" for a, word in WORDS.items())
        base = np.mean([figures.alike(thing, row) for row in rows for thing in gallery.things])
        distinct = list({row["object"]: row for row in reversed(rows)}.values())[::-1]
        caption = "Prompts and their nearest pictures, nearest first; ✓: looks like its object."
        lines += [
            f"Of the {pictures} pictures nearest to prompts about held-out objects ({len(rows)} "
            f"prompts, seed {gallery.config.seed}), a share of {shares['object']:.3f} show the "
            f"object itself, {shares['look']:.3f} one that looks the same (of all pictures "
            f"{base:.3f} do); shares with {same}.",
            *page.figure("neighbours", figures.neighbours(gallery, distinct[:5]), caption),
        ]
    return lines


def _cost(page: figures.Page) -> list[str]:
    costs = findings.Costs.of(page.results)
    lines = [
        "FLOPs are those of matrix products, counted from shapes, with the frozen tower's and an "
        "exact search's. An update spends time on more than that, so the two need not agree.\n",
    ]
    if costs.beside:
        lines.append(
            "Runs were timed side by side, or not at one go: times are rough, medians over seeds. "
            "`benchmarks/valm_cost.py` is the measurement."
        )
    else:
        lines.append("Runs were timed one at a time.")
    head = ["model", "ms per update", "MFLOPs per token"]
    rows = {
        k: [LABELS[k], mean([1000 * x for x in seconds], 1), f"{costs.mflops[k]:.2f}"]
        for k, seconds in costs.seconds.items()
    }
    if "gpt2" in rows:
        head += ["time / GPT-2's", "FLOPs / GPT-2's"]
        times, flops = costs.times, costs.flops
        for k, row in rows.items():
            row += [mean(times[k], 2), f"{flops[k]:.2f}"]
        of = "GPT-2's median" if costs.beside else "GPT-2 of the same seed"
        caption = f"Median seconds of an update, and FLOPs, relative to {of}."
        label = "relative to GPT-2 (GPT-2 = 1)"
        drawn = figures.bars(times, label, flops=[*flops.values()], spread=not costs.beside)
        lines += page.figure("cost", drawn, caption)
    return [*lines, *table(head, rows.values())]


def _every_seed(page: figures.Page) -> list[str]:
    lines = ["Held-out objects and sentences:", *report_probes.held_out(page, findings.each)]
    names = [k for k, v in page.variants.items() if "dev" in v["objects"]]
    head = [f"{WORDS[a]}, {wording} wordings" for a in ATTRIBUTES for wording in WORDINGS]
    rows = []
    for name in names:
        dev = page.variants[name]["objects"]["dev"]
        rows.append(
            [LABELS[name], *(findings.each(dev[w][a]) for a in ATTRIBUTES for w in WORDINGS)]
        )
    if rows:
        lines += ["Development objects of these worlds, which settings may be chosen on:"]
        lines += table(["model", *head], rows)
    return lines


def _made(page: figures.Page) -> list[str]:
    results = page.results
    command = results.get("command", findings.COMMAND)
    lines = [f"    {command}", "", f"- seeds: {findings.each(results['seeds'], '{}')}"]
    trained = {"trained at": ", ".join(results.get("trained_at", []))}
    about = {"machine": results.get("machine"), **trained, "measured at": results.get("commit")}
    about["versions"] = ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())
    lines += [f"- {key}: {value}" for key, value in about.items() if value]
    for stage, took in results.get("timed", {}).items():
        minutes = f"{took['seconds'] / 60:.1f} minutes, {took['jobs']} at a time"
        lines.append(f"- {findings.STAGES[stage]}: {minutes}")
    config = page.gallery.config
    rows = [
        [f"`{knob.name}`", str(getattr(config, knob.name)), knob.metadata["meaning"]]
        for knob in dataclasses.fields(config)
    ]
    return [*lines, "", "The knobs of the world:", *table(["knob", "value", "meaning"], rows)]


# Title -> what makes the section, and the part of the results without which there is none.
SECTIONS: dict[str, tuple[Callable[[figures.Page], list[str]], str]] = {
    "The question": (lambda page: [_QUESTION], "seeds"),
    "The world": (_world, "world"),
    "What is compared": (_compared, "variants"),
    "What they answer": (report_probes.answers, "variants"),
    "Differences": (report_probes.differences, "variants"),
    "Training": (_training, "variants"),
    "Stated and never stated": (report_probes.stated, "variants"),
    "Attention on the grounding": (report_probes.attention, "variants"),
    "What the features hold": (report_probes.linear, "variants"),
    "What the answers rest on": (report_probes.attribution, "attribution"),
    "Images instead of text": (report_probes.given, "given"),
    "What CLIP finds": (_nearest, "variants"),
    "How often text would have to say it": (report_probes.bias, "bias"),
    "Cost": (_cost, "variants"),
    "Appendix: every seed": (_every_seed, "variants"),
    "How this was made": (_made, "seeds"),
}
