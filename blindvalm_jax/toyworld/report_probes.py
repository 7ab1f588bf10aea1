"""The sections of the toy-world report that tell what models answer, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blindvalm_jax.markdown import table
from blindvalm_jax.toyworld import figures, findings, language, results_file
from blindvalm_jax.toyworld.findings import LABELS, WORDINGS, WORDS, mean
from blindvalm_jax.toyworld.world import ATTRIBUTES, TEXT_SPLITS


def answers(page: figures.Page) -> list[str]:
    """Accuracy on held-out objects, against chance and by wording."""
    variants, chance = page.variants, page.results["chance"]
    caption = "Accuracy on held-out objects by attribute and wording."
    asked = Counter(
        (p.attribute, p.wording)
        for p in language.probes(page.gallery.config, page.gallery.things)
        if p.split == "heldout"
    )
    seen, new = (asked["color", wording] for wording in WORDINGS)
    things = sum(thing.split == "heldout" for thing in page.gallery.things)
    luck = np.sqrt(chance["color"] * (1 - chance["color"]) / things)
    lines = [
        f"Each of the {things} held-out objects is asked about each attribute in "
        f"{seen // things} seen and {new // things} new wordings. A model that guesses an object's "
        f"colour, the same in all wordings, is right about {chance['color']:.3f} of them, with a "
        f"standard deviation of {luck:.3f} from world to world. Accuracy over all prompts unless "
        "the column says otherwise, after "
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
    ]
    if page.seeds == 1:
        return [*lines, "One seed gives no interval: a difference may be luck."]
    held = {k: v["objects"]["heldout"]["seen"] for k, v in variants.items()}
    errors = {k: v["standard_error"] for k, v in variants.items()}
    gaps = [
        findings.against_chance(of, {k: v[prompts] for k, v in errors.items()}, chance)
        for of, prompts in ((variants, "all"), (held, "seen"))
    ]
    head = ["less chance", *(f"{WORDS[a]}{of}" for of in ("", ", seen wordings") for a in chance)]
    rows = [[LABELS[k], *(of[k][a].cell for of in gaps for a in chance)] for k in variants]
    return [
        *lines,
        "Less what guessing gives, mean over seeds and the wider of two 95 % intervals: the t "
        "interval over seeds, and the one from how objects differ within a seed, since answers "
        "about one object in several wordings hang together. Bold: it leaves out zero. Of "
        f"{len(rows) * (len(head) - 1)} intervals some would by luck alone, one in twenty where "
        "there is nothing.",
        *table(head, rows),
    ]


def _surprise(page: figures.Page) -> str:
    """What the last two columns of the main table are."""
    texts = {
        x: language.sentences(page.gallery.config, page.gallery.things, x) for x in TEXT_SPLITS
    }
    known = set(texts["train"])
    even = np.mean([np.log(len(values)) for values in page.gallery.config.attributes.values()])
    share = np.mean([text in known for text in texts["validation"]])
    return (
        "*Perplexity* is that of validation sentences. These are drawn like the training ones "
        f"({100 * share:.0f} % of them are among these in the first seed) and state nothing of "
        "held-out objects either, so it cannot reward knowing what they look like. *Surprise* "
        "does: nats of the right word, among all tokens, behind seen wordings about them. Who "
        f"knows the kind of word and guesses evenly has {even:.3f} nats; more is to be wrong with "
        "confidence.\n"
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
        above = sum(value > 0 for value in one.gaps["color"].values)
        name = f"{LABELS[one.mine]} − {LABELS[one.base]}{one.after}"
        cells = [gap.cell for gap in one.gaps.values()]
        rows.append([name, *cells, f"{above} of {page.seeds}"])
    if fooled := [LABELS[one.mine] for one in found if one.base == "gpt2" and one.fools]:
        lines.append(
            "- Perplexity clearly lower than GPT-2's after as many updates, but colour not: "
            f"{', '.join(fooled)}."
        )
    how = (
        "In brackets: the 95 % t interval of the mean over seeds, bold where it leaves out zero; "
        "one in twenty would by luck alone. "
    )
    return [
        "A seed decides world, CLIP and language model, so differences are taken by seed. "
        f"{how * (page.seeds > 1)}Last: in how many seeds colour is above.",
        *table(["difference", *(WORDS.get(key, key) for key in keys), "above in"], rows),
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
    told = []
    for name, v in page.variants.items():
        lowest = [findings.least(found[name], page.results["seeds"]) for found in (seen, new)]
        told.append([LABELS[name], findings.updates(v)])
        for value, where in lowest:
            told[-1].append(f"{value:.3f}{'' if value >= findings.LEARNED else ' ✗'} ({where})")
    return [
        "Does a model know more than what was stated? The text states the attributes of train "
        "objects in the seen wordings. The less of these a control has learned, the less its "
        "failure on held-out objects shows; and where it fails in new wordings on train objects "
        "too, it fails at the wording.",
        *page.conditions("stated", rows, caption),
        f"The lowest accuracy on train objects, of all attributes and seeds; ✗: under "
        f"{findings.LEARNED}, from which on a model counts as having learned what was stated.",
        *table(["model", "updates", "seen wordings", "new wordings"], told),
        "Seen wordings, train objects less held-out ones:",
        *gap_table({LABELS[k]: gaps for k, gaps in findings.against(seen, held).items()}),
    ]


def attention(page: figures.Page) -> list[str]:
    """How much of it goes to the grounding."""
    found = {k: v for k, v in page.variants.items() if "attention" in v}
    if not found:
        return []
    shares = {k: v["attention"] for k, v in found.items()}
    even = {k: float(np.mean(v["attention_if_even"])) for k, v in found.items()}
    caption = "Attention on the grounding where the answer is given; ◇: if it were even."
    drawn = figures.bars(
        shares, "share of attention on the grounding", marks=even, marked="if even"
    )
    rows = [[LABELS[k], mean(values), f"{even[k]:.3f}"] for k, values in shares.items()]
    return [
        "The share of the fusion layer's attention that goes to the grounding, not to the text, at "
        "the last position of held-out probes, beside what it would be if attention were even over "
        "the text and the grounding, which is one vector, or of VALM as many as it retrieves. It "
        "does not tell what the grounding is used for: random features get their share too.",
        *page.figure("attention", drawn, caption),
        *table(["model", "share", "if even"], rows),
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
        "The model's answers less the linear map's:",
        *gap_table({LABELS[k]: gaps for k, gaps in findings.against(said, hold).items()}),
        *_by_seed(page, hold, said),
    ]


def _by_seed(page: figures.Page, hold: findings.Condition, said: findings.Condition) -> list[str]:
    """Colour, seed by seed, of what the features hold and what is made of it."""
    if page.seeds == 1:
        return []
    order = sorted(range(page.seeds), key=lambda n: next(iter(hold.values()))["color"][n])
    rows = [
        [f"{what}, {LABELS[k]}", *(f"{of[k]['color'][n]:.3f}" for n in order)]
        for k in hold
        for what, of in (("linear map", hold), ("answers", said))
        if k not in findings.CONTROLS
    ]
    seeds = [f"seed {page.results['seeds'][n]}" for n in order]
    return [
        f"Colour by seed, in the order of what the features of {LABELS[next(iter(hold))]} hold "
        "(those of VALM with the same readout are the same):",
        *table(["colour, seen wordings", *seeds], rows),
    ]


def gap_table(rows: Mapping[str, Mapping[str, findings.Gap]]) -> list[str]:
    """A table of differences by attribute; bold: the interval leaves out zero."""
    cells = [[name, *(gaps[a].cell for a in ATTRIBUTES)] for name, gaps in rows.items()]
    return table(["difference", *WORDS.values()], cells)


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
    removed = {k: v["removed"] for k, v in found.items()}
    rows = {"as trained": trained, "swapped: own value": own, "swapped: donor's": donor, **changed}
    gaps = {"swapped, donor's − own": findings.against(donor, own)} | {
        f"{what} − as trained": findings.against(of, trained) for what, of in changed.items()
    }
    caption = "Held-out objects, all prompts, while the grounding is changed after training."
    nowhere = changed[findings.CHANGED["nowhere"]]
    most, where = findings.farthest(removed, nowhere, page.results["seeds"])
    agree = (
        f"but differ by up to {most:.3g} ({where})"
        if most
        else "and does: no accuracy here differs"
    )
    return [
        "Where do the answers come from? *Swapped*: the tower reads the prompt of another object "
        "with another value (the donor), the decoder its own; shown is how often the answer is the "
        "own value and how often the donor's; who follows the donor says the own value less often "
        "than chance. *Last position only*, *all other positions* and *nowhere*: a mask hides the "
        "grounding from all positions but these. A model whose fusion block is turned into a plain "
        f"one with the same text attention should answer as with the grounding nowhere, {agree}.",
        *page.conditions("attribution", rows, caption),
        *gap_table({f"{what}, {LABELS[k]}": of[k] for what, of in gaps.items() for k in of}),
    ]


def given(page: figures.Page) -> list[str]:
    """Answers when images take the place of the text features."""
    found, kinds = page.results["given"], results_file.given_kinds(page.results)
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
        "of pictures of the object, which CLIP was not trained on, in the place of the text "
        "features." + shift * any(kind.endswith("_shifted") for kind in kinds),
        *page.conditions("given", rows, caption),
        *gap_table(
            {
                f"{what} − text, {LABELS[k]}": gaps
                for what, row in images.items()
                for k, gaps in findings.against(row, text).items()
            }
        ),
    ]
