"""The sections of the toy-world report that tell what models answer, and why."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from blindvalm_jax.toyworld import figures, findings, language
from blindvalm_jax.toyworld.figures import table
from blindvalm_jax.toyworld.findings import LABELS, WORDINGS, WORDS, against, mean
from blindvalm_jax.toyworld.world import ATTRIBUTES, attribute_of


def answers(page: figures.Page) -> list[str]:
    """Accuracy on held-out objects, against chance and by wording."""
    variants = page.variants
    seen, new = ({k: v["objects"]["heldout"][w] for k, v in variants.items()} for w in WORDINGS)
    train = {k: v["objects"]["train"]["seen"]["color"] for k, v in variants.items()}
    caption = "Accuracy on held-out objects by attribute and wording."
    lines = [
        "Accuracy on held-out objects, over all prompts unless the column says otherwise, after "
        f"{findings.durations(variants)}: "
        + (
            "mean ± standard deviation over seeds, as everywhere on this page; figures draw every "
            "seed and the 95 % interval of the mean."
            if page.seeds > 1
            else "one seed."
        ),
        *held_out(page, mean),
        _surprise(page),
        *page.figure("accuracy", figures.accuracy(page.results), caption),
        "" if page.seeds > 1 else "One seed gives no interval: a difference may be luck.\n",
    ]
    if page.seeds > 1:
        lines.append(
            "Against chance, mean and 95 % t interval over seeds. One such interval in twenty is "
            f"expected to leave out zero by luck; here are {len(variants) * len(ATTRIBUTES)}.\n"
        )
    for a, chance in page.results["chance"].items():
        gaps = {k: findings.Gap([value - chance for value in v[a]]) for k, v in variants.items()}
        lines.append(f"- {WORDS[a].capitalize()} against chance: {findings.grouped(gaps)}.")
    lines.append(f"- Colour, seen wordings against new ones: {against(seen, new)}.")
    base = [name for name in variants if name in ("gpt2", *findings.CONTROLS)]
    pairs = [f"{LABELS[k]} {mean(seen[k]['color'])} ({mean(train[k])})" for k in base]
    told = "Colour in seen wordings, of held-out objects (of train objects)"
    return [*lines, f"- {told}: {'; '.join(pairs)}."] if pairs else lines


def _surprise(page: figures.Page) -> str:
    """What the last two columns of the main table are."""
    texts = {
        x: language.sentences(page.gallery.config, page.gallery.things, x)
        for x in language.TEXT_SPLITS
    }
    known = set(texts["train"])
    share = np.mean([text in known for text in texts["validation"]])
    return (
        "*Perplexity* is that of validation sentences. These are drawn like the training ones "
        f"({100 * share:.0f} % of them are among these in the first seed) and state nothing of "
        "held-out objects either, so it cannot reward knowing what they look like. *Surprise* "
        "does: nats of the right word, among all tokens, behind seen wordings about them.\n"
    )


def held_out(page: figures.Page, show: Callable[[Sequence[float]], str]) -> list[str]:
    """The table of the main result."""
    color, *others = (page.title(a) for a in ATTRIBUTES)
    of_color = ["colour, seen wordings", "colour, new wordings"]
    head, rows = ["model", color, *of_color, *others, "surprise", "perplexity"], []
    for name, v in page.variants.items():
        seen, new = (v["objects"]["heldout"][wording]["color"] for wording in WORDINGS)
        columns = (v["color"], seen, new, v["shape"], v["size"], v["surprise"], v["perplexity"])
        rows.append([LABELS[name], *map(show, columns)])
    return table(head, rows)


def differences(page: figures.Page) -> list[str]:
    """Between variants, seed by seed."""
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


def stated(page: figures.Page) -> list[str]:
    """Train objects beside held-out ones."""
    seen, new, held, held_new = (
        {name: v["objects"][split][wording] for name, v in page.variants.items()}
        for split in ("train", "heldout")
        for wording in WORDINGS
    )
    rows = {
        "train objects, seen wordings": seen,
        "train objects, new wordings": new,
        "held-out objects, seen wordings": held,
        "held-out objects, new wordings": held_new,
    }
    caption = "Accuracy on objects that sentences describe, and on those they do not."
    lines = []
    for name, v in page.variants.items():
        told = [
            f"{'answers' if lowest >= findings.LEARNED else 'does not answer'} its train objects "
            f"in {wording} wordings (lowest: {lowest:.3f}, {where})"
            for wording, found in (("seen", seen), ("new", new))
            for lowest, where in [findings.least(found[name], page.results["seeds"])]
        ]
        lines.append(f"- {LABELS[name]} ({findings.updates(v)} updates) {', and '.join(told)}.")
    return [
        "Does a model know more than what was stated? The text states the attributes of train "
        "objects in the seen wordings. A control that has not learned even these proves nothing by "
        "failing on held-out objects, and one that fails in new wordings on train objects proves "
        "little by failing there.",
        *page.conditions("stated", rows, caption),
        "A model answers its train objects if every attribute's accuracy on them reaches "
        f"{findings.LEARNED} in every seed.\n",
        *lines,
        f"- Colour in seen wordings, train objects against held-out ones: {against(seen, held)}.",
    ]


def attention(page: figures.Page) -> list[str]:
    """How much of it goes to the grounding."""
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


def linear(page: figures.Page) -> list[str]:
    """What the features hold of the attributes, beside what models answer."""
    hold = {k: v["linear"] for k, v in page.variants.items() if "linear" in v}
    if not hold:
        return []
    said = {k: page.variants[k]["objects"]["heldout"]["seen"] for k in hold}
    rows = {"a linear map of the features": hold, "the model's answers": said}
    caption = "Held-out objects, seen wordings: what the features hold, and what is made of it."
    return [
        "Is it the features that lack the answer, or the language model that does not use them? A "
        "linear map (ridge regression) from the tower's feature at the end of a prompt to the "
        "answer, fitted on train objects and asked about held-out ones. For VALM the feature is "
        "what it searches with.",
        *page.conditions("linear", rows, caption),
        f"- Colour, the model's answers against the linear map: {against(said, hold)}.",
    ]


def attribution(page: figures.Page) -> list[str]:
    """Answers while the grounding is changed after training."""
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


def given(page: figures.Page) -> list[str]:
    """Answers when images take the place of the text features."""
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


def bias(page: figures.Page) -> list[str]:
    """Answers as sentences begin to state what held-out objects look like."""
    found, names = page.results["bias"], findings.swept(page.results)
    shares = [f"{100 * share:g} %" for share in found["stated_heldout"]]
    rows = [
        [
            share,
            *_reached(page, found["stated_heldout"][place]),
            *(mean(found[k][a][place]) for a in ATTRIBUTES for k in names),
        ]
        for place, share in enumerate(shares)
    ]
    head = ["stated", *(f"{WORDS[a]} reached" for a in ATTRIBUTES)]
    head += [f"{WORDS[a]}, {label}" for a in ATTRIBUTES for label in names.values()]
    caption = "Accuracy on held-out objects, seen wordings, as text begins to state what they are."
    lines = []
    for name, label in names.items():
        first, *others = found[name]["color"]
        gaps = [findings.Gap.between(values, first) for values in others]
        told = [f"{share} {gap.word} {gap}" for share, gap in zip(shares[1:], gaps, strict=True)]
        if told:
            lines.append(f"- Colour, {label}, against {shares[0]} stated: {'; '.join(told)}.")
    return [
        "How much would the text have to say? The share of sentences about a held-out object that "
        "state one of its attributes grows from left to right, in steps that are not to scale. "
        "Shown is the accuracy in seen wordings. *Reached*: held-out objects of which at least "
        "one sentence states the attribute, and in brackets such sentences per object (first "
        "seed): who remembers all that is stated and guesses the rest can do little better.",
        *page.figure("bias", figures.bias(page.results), caption),
        *table(head, rows),
        *lines,
    ]


def _reached(page: figures.Page, share: float) -> list[str]:
    """By attribute, how many held-out objects have it stated, and how often on average."""
    held = {thing.name for thing in page.gallery.things if thing.split == "heldout"}
    config = dataclasses.replace(page.gallery.config, stated_heldout=share)
    found: dict[str, Counter[str]] = {attribute: Counter() for attribute in ATTRIBUTES}
    for text in language.sentences(config, page.gallery.things, "train"):
        said = attribute_of(text.split()[-1].removesuffix("."))
        if said is not None and (names := held & set(re.findall(r"\w+", text))):
            found[said[0]].update(names)
    return [f"{len(x) / len(held):.2f} ({x.total() / len(held):.1f})" for x in found.values()]
