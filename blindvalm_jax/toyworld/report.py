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
from blindvalm_jax.markdown import table
from blindvalm_jax.toyworld import (
    figures,
    findings,
    language,
    report_bias,
    report_probes,
    report_short,
    results_file,
)
from blindvalm_jax.toyworld.findings import LABELS, WORDINGS, WORDS, mean
from blindvalm_jax.toyworld.world import ATTRIBUTES, SPLITS, attribute_of

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
    page = figures.Page(results, out, figures.Gallery(results_file.check(results)))
    (out / "figures").mkdir(parents=True, exist_ok=True)
    lines = ["# What text never says: the toy world", ""]
    for title, (section, part) in SECTIONS.items():
        if part in results and (body := section(page)):
            lines += [f"## {title}", "", *body, ""]
    path = out / "report.md"
    files.write_bytes(path, re.sub("\n{3,}", "\n\n", "\n".join(lines)).encode())
    return path


def summary_table(results: Mapping[str, Any], *, split: str = "heldout") -> str:
    """Accuracy on objects of a split, and perplexity, mean over seeds, as plain text.

    Raises:
      UserError: as `check`.
    """
    results_file.check(results)
    columns = [(attribute, wording) for attribute in ATTRIBUTES for wording in WORDINGS]
    rows = [["", *(f"{WORDS[a]} {wording}" for a, wording in columns), "perplexity"]]
    for name, variant in results["variants"].items():
        found = [variant["objects"][split][wording][a] for a, wording in columns]
        rows.append([name, *(f"{np.mean(v):.3f}" for v in (*found, variant["perplexity"]))])
    rows.append(["chance", *(f"{results['chance'][a]:.3f}" for a, _ in columns), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _world(page: figures.Page) -> list[str]:
    config, things = page.gallery.config, page.gallery.things
    first = {split: [i for i, x in enumerate(things) if x.split == split] for split in SPLITS}
    shown = [*first["train"][:4], *first["heldout"][:4]]
    texts = language.sentences(config, things, "train")
    every = language.captions(config, things, "train")
    heldout = {things[i].name for i in first["heldout"]}
    about = [text for text in texts if heldout & set(re.findall(r"\w+", text))]
    stated = sum(attribute_of(text.split()[-1]) is not None for text in about)
    names, rows = {**dict(zip(SPLITS, SPLITS, strict=True)), "heldout": "held-out"}, []
    for thing, images in ((things[index], every[index]) for index in (shown[0], shown[-1])):
        named = dict.fromkeys(text for image in images for text in image)
        said = dict.fromkeys(text for text in texts if thing.name in re.findall(r"\w+", text))
        who = f"{thing.name}, {thing.size} {thing.color} {thing.shape} ({names[thing.split]})"
        rows.append([who, *("<br>".join([*found][:6]) for found in (named, said))])
    probes = {
        p.wording: p
        for p in language.probes(page.gallery.config, [thing])
        if p.attribute == "color"
    }
    seen, new = (probes[wording] for wording in WORDINGS)
    counts = ", ".join(f"{len(found)} {names[split]}" for split, found in first.items())
    looks = {thing.look for thing in things if thing.split == "train"}
    twins = sum(things[i].look in looks for i in first["heldout"])
    caption = "Objects of the first seed, four pictures each. All objects have pictures and names."
    return [
        f"The world of seed {config.seed} has {len(things)} objects: {counts}. The text states "
        "attributes of train objects; dev objects are for choosing settings, held-out objects for "
        f"what is reported below. Of {len(texts)} training sentences, {len(about)} are about "
        f"held-out objects, and {stated} of these state an attribute. {twins} of the "
        f"{len(first['heldout'])} held-out objects look exactly like some train object, so that "
        "only their names are new: nothing here asks for a new combination of attributes.",
        *page.figure("world", figures.sample(page.gallery, shown), caption),
        "What CLIP reads of an object's images, and what a language model reads of it:",
        *table(["object", "captions", "sentences"], rows),
        "A probe is a sentence, cut off before the attribute. The model's answer is the candidate "
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
            ". GPT-2 has a plain layer in its place, which also divides queries by the root of the "
            "head width, not of the model width; the controls have the fusion layer"
        )
    lines = [
        "All models learn from the same sentences, with the same decoder but for one fusion layer, "
        f"for {findings.durations(page.variants)}: {differ}.",
    ]
    if "recipe" in page.results:
        lines += ["", *_sizes(page)]
    head = ["model", "name", "what the fusion layer sees", "parameters", "updates"]
    return [*lines, *table(head, rows)]


def _sizes(page: figures.Page) -> list[str]:
    recipe, config = page.results["recipe"], page.gallery.config
    decoder, read, (rows, length) = recipe["decoder"], recipe["clip"], recipe["windows"]
    every = len(page.gallery.things) * config.images_per_object
    return [
        "Decoder: {layers} layers of width {width}, {heads} heads; the fusion layer is number "
        "{fused}, counted from 0. ".format(**decoder)
        + f"An update reads {rows} windows of {length} tokens. CLIP: a text tower of "
        "{layers} layers of width {width}, ".format(**read["text"])
        + f"a {read['image']['kind']} image tower, {read['pairs']} pairs an update. VALM searches "
        f"{every:,} images exactly, those of held-out objects among them, and sees the "
        f"{recipe['neighbours']} nearest.",
    ]


def _training(page: figures.Page) -> list[str]:
    base = next(iter(page.variants))
    caption = (
        f"Training loss of {LABELS[base]} (thick: mean over seeds; thin: one seed), and how far "
        "the others are from it in the same world; running means over a tenth of the updates."
    )
    ends = {
        name: mean([np.mean(c["loss"][-max(1, len(c["loss"]) // 10) :]) for c in v["curves"]])
        for name, v in page.variants.items()
    }
    last = ", ".join(f"{LABELS[name]} {end}" for name, end in ends.items())
    return [
        f"Training loss over the last tenth of the updates, nats per token: {last}.",
        *page.figure("loss", figures.losses(page.results), caption),
    ]


def _nearest(page: figures.Page) -> list[str]:
    lines = []
    gallery = page.gallery
    if "clip" in page.results:
        found = page.results["clip"]
        recall = "; ".join(
            f"{key.replace('_', ' ')} {mean(values)}"
            for key, values in found.items()
            if "_at_" in key
        )
        rivals = "the batches of training"
        if "recipe" in page.results:
            rivals = f"batches of {page.results['recipe']['clip']['pairs']} pairs"
        count = len(gallery.things) * gallery.config.validation_images_per_object
        lines = [
            f"CLIP on {count} validation images, each with one of its captions: loss "
            f"{mean(found['loss'])} in {rivals}; among all of them {recall}. By chance recall at 1 "
            f"would be {1 / count:.4f}, at 5 {5 / count:.4f}. It stays low by its nature: a "
            "caption is true of all images of its object, and a description of all that look "
            "alike.",
            "",
        ]
    retrieved = {k: v["retrieved"] for k, v in page.variants.items() if "retrieved" in v}
    if retrieved:
        by_chance = _by_chance(gallery)
        rows = [
            [LABELS[k], *(mean(v[key]) for key in findings.RETRIEVED)] for k, v in retrieved.items()
        ]
        rows.append(["any picture", *(f"{by_chance[key]:.3f}" for key in findings.RETRIEVED)])
        lines += [
            "What the pictures show that are nearest to the features behind all prompts about "
            "held-out objects, as shares of them:",
            *table(["nearest to the features of", *findings.RETRIEVED.values()], rows),
        ]
    if "neighbours" in page.results:
        rows = page.results["neighbours"]
        pictures, shares = gallery.shown(rows)
        alike = round(shares["look"] * pictures)
        caption = "Prompts and their nearest pictures, nearest first; ✓: looks like its object."
        lines += [
            f"Some held-out objects of seed {gallery.config.seed}, each with the pictures nearest "
            f"to the EOS feature of a prompt about it: {alike} of {pictures} look like the object.",
            *page.figure("neighbours", figures.neighbours(gallery, rows), caption),
        ]
    return lines


def _by_chance(gallery: figures.Gallery) -> dict[str, float]:
    """What a picture drawn at random has in common with a held-out object, as shares."""
    things = gallery.things
    held = [thing for thing in things if thing.split == "heldout"]
    pairs = [(one, other) for one in held for other in things]
    same = {"object": [one is other for one, other in pairs]}
    same |= {"look": [one.look == other.look for one, other in pairs]}
    same |= {a: [one.value(a) == other.value(a) for one, other in pairs] for a in ATTRIBUTES}
    return {what: float(np.mean(found)) for what, found in same.items()}


def _cost(page: figures.Page) -> list[str]:
    costs = findings.Costs.of(page.results)
    config = page.gallery.config
    every = len(page.gallery.things) * config.images_per_object
    lines = [
        "FLOPs are those of matrix products, counted from shapes, with the frozen tower's and an "
        f"exact search's, here of {every:,} images: much for decoders as small as these. An update "
        "spends time on more than that, so the two need not agree.\n",
    ]
    if costs.beside:
        lines.append(
            "Runs were timed side by side, or not at one go: times are rough, and models of equal "
            "FLOPs show how rough. docs/results.md has a careful measurement of larger models."
        )
    else:
        lines.append("Runs were timed one at a time.")
    head = ["model", "ms per update, median", "MFLOPs per token"]
    rows = {
        k: [LABELS[k], f"{1000 * np.median(seconds):.1f}", f"{costs.mflops[k]:.2f}"]
        for k, seconds in costs.seconds.items()
    }
    if "gpt2" in rows:
        head += ["time / GPT-2's", "FLOPs / GPT-2's"]
        times, flops = costs.times, costs.flops
        for k, row in rows.items():
            row += [f"{np.median(times[k]):.2f}", f"{flops[k]:.2f}"]
        of = "GPT-2's, medians over seeds" if costs.beside else "GPT-2's of the same seed"
        caption = f"Seconds of an update relative to {of}, and FLOPs (◇)."
        label = "relative to GPT-2 (GPT-2 = 1)"
        drawn = figures.bars(
            times, label, marks=flops, marked="FLOPs", intervals=not costs.beside, line=1.0
        )
        lines += page.figure("cost", drawn, caption)
    return [*lines, *table(head, rows.values())]


def _every_seed(page: figures.Page) -> list[str]:
    return ["Held-out objects and sentences:", *report_probes.held_out(page, findings.each)]


def _made(page: figures.Page) -> list[str]:
    results = page.results
    command = results.get("command", findings.COMMAND)
    lines = [f"    {command}", "", f"- seeds: {findings.each(results['seeds'], '{}')}"]
    trained = {"trained at": ", ".join(results.get("trained_at", []))}
    about = {"machine": results.get("machine"), **trained, "measured at": results.get("commit")}
    about["versions"] = ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())
    lines += [f"- {key}: {value}" for key, value in about.items() if value]
    timed = results.get("timed", {})
    for stage, (made, part) in findings.STAGES.items():
        minutes = "not timed, as they were not made at one go"
        if stage in timed:
            took = timed[stage]
            minutes = f"{took['seconds'] / 60:.1f} minutes, {took['jobs']} at a time"
        if part in results:
            lines.append(f"- {made}: {minutes}")
    config = page.gallery.config
    rows = [
        [f"`{knob.name}`", str(getattr(config, knob.name)), knob.metadata["meaning"]]
        for knob in dataclasses.fields(config)
    ]
    return [*lines, "", "The knobs of the world:", *table(["knob", "value", "meaning"], rows)]


# Title -> what makes the section, and the part of the results without which there is none.
SECTIONS: dict[str, tuple[Callable[[figures.Page], list[str]], str]] = {
    "The question": (lambda page: [_QUESTION], "seeds"),
    "In short": (report_short.in_short, "variants"),
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
    "How often text would have to say it": (report_bias.bias, "bias"),
    "Cost": (_cost, "variants"),
    "Appendix: every seed": (_every_seed, "variants"),
    "How this was made": (_made, "seeds"),
}
