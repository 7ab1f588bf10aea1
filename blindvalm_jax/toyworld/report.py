"""The page that tells what a toy-world comparison found, made from its results.json alone.

Every sentence with a number is computed, and the data choose its words (see `findings`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.toyworld import figures, findings, language
from blindvalm_jax.toyworld.figures import table
from blindvalm_jax.toyworld.findings import LABELS, WORDINGS, WORDS, against, mean, summary_table
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
    caption = "Objects of the first seed, four pictures each. All objects have pictures and names."
    return [
        f"The world of seed {config.seed} has {len(things)} objects: {counts}. The text states "
        "attributes of train objects; dev objects are for choosing settings, held-out objects for "
        f"what is reported below. Of {len(texts)} training sentences, {len(about)} are about "
        f"held-out objects, and {stated} of these state an attribute.",
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
        differ = "they differ in what that layer may attend to alone"
    return [
        "All models learn from the same sentences, with the same decoder but for one fusion layer, "
        f"for {findings.durations(page.variants)}: {differ}.",
        *table(["model", "name", "what the fusion layer sees", "parameters", "updates"], rows),
    ]


def _result(page: figures.Page) -> list[str]:
    variants = page.variants
    seen, new = ({k: v["objects"]["heldout"][w] for k, v in variants.items()} for w in WORDINGS)
    train = {k: v["objects"]["train"]["seen"]["color"] for k, v in variants.items()}
    caption = "Accuracy on held-out objects by attribute and wording."
    lines = [
        "Accuracy on held-out objects, over all prompts unless the column says otherwise, and "
        f"perplexity of held-out sentences, after {findings.durations(variants)}: "
        f"{'mean ± standard deviation over seeds' if page.seeds > 1 else 'one seed'}.",
        *_held_out(page, mean),
        *page.figure("accuracy", figures.accuracy(page.results), caption),
        "" if page.seeds > 1 else "One seed gives no interval: a difference may be luck.\n",
    ]
    for a, chance in page.results["chance"].items():
        gaps = {k: findings.Gap([value - chance for value in v[a]]) for k, v in variants.items()}
        lines.append(f"- {WORDS[a].capitalize()} against chance: {findings.grouped(gaps)}.")
    lines.append(f"- Colour, seen wordings against new ones: {against(seen, new)}.")
    base = [name for name in variants if name in ("gpt2", *findings.CONTROLS)]
    pairs = [f"{LABELS[k]} {mean(seen[k]['color'])} ({mean(train[k])})" for k in base]
    told = "Colour in seen wordings, of held-out objects (of train objects)"
    return [*lines, f"- {told}: {'; '.join(pairs)}."] if pairs else lines


def _held_out(page: figures.Page, show: Callable[[Sequence[float]], str]) -> list[str]:
    """The table of the main result."""
    color, *others = (page.title(a) for a in ATTRIBUTES)
    of_color = ["colour, seen wordings", "colour, new wordings"]
    head, rows = ["model", color, *of_color, *others, "perplexity"], []
    for name, v in page.variants.items():
        seen, new = (v["objects"]["heldout"][wording]["color"] for wording in WORDINGS)
        columns = (v["color"], seen, new, v["shape"], v["size"], v["perplexity"])
        rows.append([LABELS[name], *map(show, columns)])
    return table(head, rows)


def _differences(page: figures.Page) -> list[str]:
    found = findings.differences(page.variants)
    if not found:
        return []
    keys = [*found[0].gaps]
    rows, lines = [], []
    for one in found:
        cells = [f"**{gap}**" if gap.clear else f"{gap}" for gap in one.gaps.values()]
        mine, base, color = LABELS[one.mine], LABELS[one.base], one.gaps["color"]
        rows.append([f"{mine} − {base}{one.after}", *cells])
        above = sum(value > 0 for value in color.values)
        word = color.word + f"; above in {above} of {page.seeds} seeds" * (page.seeds > 1)
        lines.append(f"- Colour, {mine} against {base}{one.after}: {word}.")
    if fooled := [LABELS[one.mine] for one in found if one.base == "gpt2" and one.fools]:
        lines.append(
            "- Perplexity clearly lower than GPT-2's after as many updates, but colour not clearly "
            f"different from its: {', '.join(fooled)}."
        )
    how = (
        "In brackets: the 95 % t interval of the mean over seeds, bold where it leaves out zero. "
        f"There are {len(rows) * len(keys)} of them, and one in twenty is expected to miss."
    )
    return [
        "A seed decides world, CLIP and language model, so differences are taken by seed. "
        f"{how if page.seeds > 1 else ''}",
        *table(["difference", *(WORDS.get(key, key) for key in keys)], rows),
        *lines,
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


def _stated(page: figures.Page) -> list[str]:
    train, held = (
        {name: v["objects"][split]["seen"] for name, v in page.variants.items()}
        for split in ("train", "heldout")
    )
    rows = {"train objects": train, "held-out objects": held}
    caption = "Accuracy in seen wordings on stated and other objects."
    drawn = page.figure("stated", figures.conditions(page.results, rows), caption)
    head = [f"{WORDS[a]}, {split}" for a in ATTRIBUTES for split in ("train", "held out")]
    body, lines = [], []
    for name, v in page.variants.items():
        cells = [mean(row[name][a]) for a in ATTRIBUTES for row in (train, held)]
        body.append([LABELS[name], findings.updates(v), *cells])
        lowest, where = findings.least(train[name], page.results["seeds"])
        does = "answers" if lowest >= findings.LEARNED else "does not answer"
        lines.append(f"- {LABELS[name]} {does} its train objects (lowest: {lowest:.3f}, {where}).")
    return [
        "Does a model know more than what was stated? The text states the attributes of train "
        "objects, in the wordings of these probes. A control that has not learned even these "
        "proves nothing by failing on held-out objects.",
        *drawn,
        *table(["model", "updates", *head], body),
        "A model answers its train objects if every attribute's accuracy on them reaches "
        f"{findings.LEARNED} in every seed.\n",
        *lines,
        f"- Colour, train objects against held-out objects: {against(train, held)}.",
    ]


def _attention(page: figures.Page) -> list[str]:
    shares = {k: v["attention"] for k, v in page.variants.items() if "attention" in v}
    if not shares:
        return []
    caption = "Attention on the grounding where the answer is given."
    drawn = figures.bars(shares, "share of attention on the grounding")
    return [
        "The share of the fusion layer's attention that goes to the grounding, not to the text, at "
        "the last position of held-out probes. It does not tell what the grounding is used for.",
        *page.figure("attention", drawn, caption),
        *table(["model", "share"], [[LABELS[k], mean(values)] for k, values in shares.items()]),
    ]


def _attribution(page: figures.Page) -> list[str]:
    found = page.results["attribution"]
    own, donor = (
        {name: {a: v["swapped"][a][who] for a in ATTRIBUTES} for name, v in found.items()}
        for who in ("own", "donor")
    )
    trained = {name: page.variants[name] for name in found}
    changed = {
        text: {k: v[key] for k, v in found.items()} for key, text in findings.CHANGED.items()
    }
    rows = {"as trained": trained, "swapped: own value": own, "swapped: donor's": donor, **changed}
    caption = "Held-out objects, all prompts, while the grounding is changed after training."
    nowhere, removed = (changed[findings.CHANGED[key]] for key in ("nowhere", "removed"))
    most, where = findings.farthest(removed, nowhere, page.results["seeds"])
    return [
        "Where do the answers come from? *Swapped*: the tower reads the prompt of another object "
        "with another value (the donor), the decoder its own; shown is how often the answer is the "
        "own value and how often the donor's. *Last position only*, *all other positions* and "
        "*nowhere*: a mask hides the grounding from all positions but these. *Fusion removed*: the "
        "fusion block is turned into a plain one with the same text attention, so that nothing of "
        "the grounding is left. *Nowhere* and *fusion removed* should agree.",
        *page.conditions("attribution", rows, caption),
        "- Fusion removed and nowhere "
        + (f"differ, by at most {most:.3g} ({where})." if most else "agree: no accuracy differs."),
        f"- Colour when swapped, the donor's value against the own: {against(donor, own)}.",
        *(f"- Colour, {k}, against as trained: {against(changed[k], trained)}." for k in changed),
    ]


def _given(page: figures.Page) -> list[str]:
    found, kinds = page.results["given"], findings.given_kinds(page.results)
    text = {name: page.variants[name] for name in found}
    images = {findings.GIVEN[kind]: {k: v[kind] for k, v in found.items()} for kind in kinds}
    rows = {"text, as trained": text, **images}
    caption = "Held-out objects, all prompts, when the decoder is given images instead of text."
    shift = (
        " CLIP keeps images and texts apart in its space: *shifted* images were moved by the "
        "difference of the mean text feature and the mean image embedding of train objects."
    )
    return [
        "A BLIND-VALM never sees an image. Here it is handed, at every position, CLIP's embedding "
        "of the object's pictures in the place of the text features."
        + shift
        * any(kind.endswith("_shifted") for kind in kinds),
        *page.conditions("given", rows, caption),
        *(f"- Colour, {k}, against text: {against(row, text)}." for k, row in images.items()),
    ]


def _nearest(page: figures.Page) -> list[str]:
    lines = []
    if "clip" in page.results:
        found = [(k, v) for k, v in page.results["clip"].items() if k != "seconds"]
        named = "; ".join(f"{key.replace('_', ' ')} {mean(values)}" for key, values in found)
        lines = [f"CLIP on validation images: {named}.", ""]
    if "neighbours" in page.results:
        rows, gallery = page.results["neighbours"], page.gallery
        pictures, shares = gallery.shown(rows)
        same = ", ".join(f"the same {word} {shares[a]:.3f}" for a, word in WORDS.items())
        distinct = list({row["object"]: row for row in reversed(rows)}.values())[::-1]
        caption = "Prompts and their nearest pictures, nearest first; ✓: of the prompt's object."
        lines += [
            f"Of the {pictures} pictures nearest to prompts about held-out objects ({len(rows)} "
            f"prompts, seed {gallery.config.seed}), a share of {shares['object']:.3f} show the "
            f"object itself; shares with {same}.",
            *page.figure("neighbours", figures.neighbours(gallery, distinct[:5]), caption),
        ]
    return lines


def _bias(page: figures.Page) -> list[str]:
    found, names = page.results["bias"], findings.swept(page.results)
    shares = [f"{100 * share:g} %" for share in found["stated_heldout"]]
    rows = [
        [share, *(mean(found[k][a][place]) for a in ATTRIBUTES for k in names)]
        for place, share in enumerate(shares)
    ]
    head = ["stated", *(f"{WORDS[a]}, {label}" for a in ATTRIBUTES for label in names.values())]
    caption = "Held-out accuracy as the text begins to state held-out attributes."
    lines = []
    for name, label in names.items():
        first, *others = found[name]["color"]
        gaps = [findings.Gap.between(values, first) for values in others]
        told = [f"{share} {gap.word} {gap}" for share, gap in zip(shares[1:], gaps, strict=True)]
        if told:
            lines.append(f"- Colour, {label}, against {shares[0]} stated: {'; '.join(told)}.")
    return [
        "How much would the text have to say? The share of sentences about a held-out object that "
        "state one of its attributes grows from left to right.",
        *page.figure("bias", figures.bias(page.results), caption),
        *table(head, rows),
        *lines,
    ]


def _cost(page: figures.Page) -> list[str]:
    costs = findings.Costs.of(page.results)
    lines = [
        "FLOPs are those of matrix products, counted from shapes, with the frozen tower's and an "
        "exact search's. An update spends time on more than that, so the two need not agree.\n",
    ]
    if costs.beside:
        lines.append(
            f"Runs were timed side by side, {page.results['jobs']} at a time, on shared cores: "
            "times are rough, medians over seeds. `benchmarks/valm_cost.py` is the measurement."
        )
    elif "jobs" in page.results:
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
    lines = ["Held-out objects and sentences:", *_held_out(page, findings.each)]
    names = [k for k, v in page.variants.items() if "dev" in v["objects"]]
    head = [f"{WORDS[a]}, {wording} wordings" for a in ATTRIBUTES for wording in WORDINGS]
    rows = []
    for name in names:
        dev = page.variants[name]["objects"]["dev"]
        rows.append(
            [LABELS[name], *(findings.each(dev[w][a]) for a in ATTRIBUTES for w in WORDINGS)]
        )
    if rows:
        lines += ["Development objects, which settings may be chosen on:"]
        lines += table(["model", *head], rows)
    return lines


def _made(page: figures.Page) -> list[str]:
    results = page.results
    command = results.get("command", findings.COMMAND)
    lines = [f"    {command}", "", f"- seeds: {findings.each(results['seeds'], '{}')}"]
    lines += [f"- {key}: {results[key]}" for key in ("machine", "commit") if key in results]
    for key, form in (("versions", "{}"), ("seconds", "{:,.0f}")):
        if key in results:
            pairs = [f"{name} {form.format(value)}" for name, value in results[key].items()]
            lines.append(f"- {key}: {', '.join(pairs)}")
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
    "What they answer": (_result, "variants"),
    "Differences": (_differences, "variants"),
    "Training": (_training, "variants"),
    "Stated and never stated": (_stated, "variants"),
    "Attention on the grounding": (_attention, "variants"),
    "What the answers rest on": (_attribution, "attribution"),
    "Images instead of text": (_given, "given"),
    "What CLIP finds": (_nearest, "variants"),
    "How often text would have to say it": (_bias, "bias"),
    "Cost": (_cost, "variants"),
    "Appendix: every seed": (_every_seed, "variants"),
    "How this was made": (_made, "seeds"),
}
