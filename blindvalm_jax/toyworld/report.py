"""The page that tells what a toy-world comparison found, made from its results.json alone.

Every sentence with a number is computed, and the data choose its words: "higher" and "lower" are
said of a 95 % interval over seeds that leaves the other value out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure

from blindvalm_jax import files
from blindvalm_jax.toyworld import figures, language
from blindvalm_jax.toyworld.figures import CHANGED, LABELS, WORDINGS, WORDS, Gap
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
_SEES = {
    "gpt2": "nothing; it has the text alone",
    "blind_valm": "the text tower's output at each token",
    "blind_valm_eos": "the tower's embedding of the text so far, as if it ended there",
    "valm": "the images nearest to the tower's output at each token",
    "valm_eos": "the images nearest to the embedding of the text so far",
    "random_tower": "a text tower with random weights (control)",
    "shuffled": "the features of another text of the batch (control)",
}
_PAIRS = (
    *((name, "gpt2") for name in LABELS if name != "gpt2"),
    *(("valm", "blind_valm"), ("valm_eos", "blind_valm_eos"), ("blind_valm_eos", "blind_valm")),
    *(("blind_valm", "random_tower"), ("blind_valm", "shuffled")),
)


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Writes report.md and its figures/*.png into `out`; gives the path of the page.

    Raises:
      UserError: something is missing in the results, or not as results.json has it.
    """
    page = _Page(results, out, figures.Gallery(figures.check(results)))
    (out / "figures").mkdir(parents=True, exist_ok=True)
    lines = ["# What text never says: the toy world", ""]
    for title, (section, part) in _SECTIONS.items():
        if part in results and (body := section(page)):
            lines += [f"## {title}", "", *body, ""]
    path = out / "report.md"
    files.write_bytes(path, re.sub("\n{3,}", "\n\n", "\n".join(lines)).encode())
    return path


def summary_table(results: Mapping[str, Any]) -> str:
    """Accuracy on held-out objects and perplexity, mean over seeds, as plain text.

    Raises:
      UserError: as `write`.
    """
    figures.check(results)
    columns = [(attribute, wording) for attribute in ATTRIBUTES for wording in WORDINGS]
    rows = [["", *(f"{WORDS[a]} {wording}" for a, wording in columns), "perplexity"]]
    for name, variant in results["variants"].items():
        found = [variant["objects"]["heldout"][wording][a] for a, wording in columns]
        rows.append([name, *(f"{np.mean(v):.3f}" for v in (*found, variant["perplexity"]))])
    rows.append(["chance", *(f"{results['chance'][a]:.3f}" for a, _ in columns), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


@dataclasses.dataclass(frozen=True)
class _Page:
    """What a section is made from."""

    results: Mapping[str, Any]
    out: Path
    gallery: figures.Gallery

    @property
    def variants(self) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], self.results["variants"])

    @property
    def seeds(self) -> int:
        return len(self.results["seeds"])

    def title(self, attribute: str) -> str:
        """The head of a column of accuracies."""
        return f"{WORDS[attribute]} (chance {self.results['chance'][attribute]:.3f})"

    def figure(self, name: str, figure: Figure, caption: str) -> list[str]:
        """Draws a figure; the lines that show it."""
        figures.save(figure, self.out / "figures" / f"{name}.png")
        return ["", f"![{caption}](figures/{name}.png)", "", f"*{caption}*", ""]

    def conditions(self, name: str, rows: figures.Conditions, caption: str) -> list[str]:
        """A figure, and a table per attribute: conditions in rows, variants in columns."""
        lines = self.figure(name, figures.conditions(self.results, rows), caption)
        names = list(next(iter(rows.values())))
        for a in ATTRIBUTES:
            head = [self.title(a), *(LABELS[k] for k in names)]
            body = [[title, *(_mean(row[k][a]) for k in names)] for title, row in rows.items()]
            lines += _table(head, body)
        return lines


def _world(page: _Page) -> list[str]:
    config, things = page.gallery.config, page.gallery.things
    first = {split: [i for i, x in enumerate(things) if x.split == split] for split in SPLITS}
    shown = [*first["train"][:4], *first["heldout"][:4]]
    texts = language.sentences(config, things, "train")
    every = language.captions(config, things, "train")
    heldout = {things[i].name for i in first["heldout"]}
    about = [text for text in texts if heldout & set(re.findall(r"\w+", text))]
    stated = sum(attribute_of(text.split()[-1]) is not None for text in about)
    rows = []
    for index in (shown[0], shown[-1]):
        thing = things[index]
        named = (text for image in every[index] for text in image)
        said = (text for text in texts if thing.name in re.findall(r"\w+", text))
        who = f"{thing.name}, {thing.size} {thing.color} {thing.shape} ({thing.split})"
        rows.append([who, *("<br>".join([*dict.fromkeys(found)][:6]) for found in (named, said))])
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
        *_table(["object", "captions", "sentences"], rows),
        "A probe is such a text, cut off before the attribute. The model's answer is the candidate "
        f"that it finds likeliest to come next. In a wording that sentences have: "
        f"“{seen.prompt} …”; in one that they never have: “{new.prompt} …”. The right "
        f"answer to both is “{seen.answer}”, one of {', '.join(seen.candidates)}.",
    ]


def _compared(page: _Page) -> list[str]:
    rows = [
        [
            LABELS[name],
            f"`{name}`",
            _SEES[name],
            f"{v['parameters']:,}",
            _each(sorted(set(v["steps"])), "{:,}"),
        ]
        for name, v in page.variants.items()
    ]
    return [
        "All models learn from the same sentences, with the same decoder but for one fusion layer: "
        "they differ in what that may attend to beside the text.",
        *_table(["model", "name", "what the fusion layer sees", "parameters", "updates"], rows),
    ]


def _result(page: _Page) -> list[str]:
    variants = page.variants
    seen, new = ({k: v["objects"]["heldout"][w] for k, v in variants.items()} for w in WORDINGS)
    color, *others = (page.title(a) for a in ATTRIBUTES)
    head = ["model", color, "colour, seen wordings", "colour, new wordings", *others, "perplexity"]
    columns = {
        k: [v["color"], seen[k]["color"], new[k]["color"], v["shape"], v["size"], v["perplexity"]]
        for k, v in variants.items()
    }
    means, each = (
        _table(head, [[LABELS[k], *map(show, row)] for k, row in columns.items()])
        for show in (_mean, _each)
    )
    caption = "Accuracy on held-out objects by attribute and wording."
    lines = [
        "Accuracy on held-out objects, over all prompts unless the column says otherwise, and "
        "perplexity of held-out sentences: "
        f"{'mean ± standard deviation over seeds' if page.seeds > 1 else 'one seed'}.",
        *(*means, "Every seed:", *each),
        *page.figure("accuracy", figures.accuracy(page.results), caption),
        "" if page.seeds > 1 else "One seed gives no interval: a difference may be luck.\n",
    ]
    for a, chance in page.results["chance"].items():
        gaps = {k: Gap([value - chance for value in v[a]]) for k, v in variants.items()}
        lines.append(f"- {WORDS[a].capitalize()} against chance: {_grouped(gaps)}.")
    return [*lines, f"- Colour, seen wordings against new ones: {_against(seen, new)}."]


def _differences(page: _Page) -> list[str]:
    keys, variants = [*ATTRIBUTES, "perplexity"], page.variants
    rows: list[list[str]] = []
    lines, fooled = [], []
    for mine, base in _PAIRS:
        if not {mine, base} <= set(variants):
            continue
        gaps = {key: Gap.between(variants[mine][key], variants[base][key]) for key in keys}
        cells = [f"**{gap}**" if gap.clear else f"{gap}" for gap in gaps.values()]
        rows.append([f"{LABELS[mine]} − {LABELS[base]}", *cells])
        above = sum(value > 0 for value in gaps["color"].values)
        word = gaps["color"].word + f"; above in {above} of {page.seeds} seeds" * (page.seeds > 1)
        lines.append(f"- Colour, {LABELS[mine]} against {LABELS[base]}: {word}.")
        if base == "gpt2" and gaps["perplexity"].word == "lower" and not gaps["color"].clear:
            fooled.append(LABELS[mine])
    if fooled:
        lines.append(
            "- Perplexity clearly lower than GPT-2's, but colour not clearly different from its: "
            f"{', '.join(fooled)}."
        )
    how = (
        "In brackets: the 95 % t interval of the mean over seeds, bold where it leaves out zero. "
        f"There are {len(rows) * len(keys)} of them, and one in twenty is expected to miss."
    )
    if not rows:
        return []
    return [
        "A seed decides world, CLIP and language model, so differences are taken by seed. "
        f"{how if page.seeds > 1 else ''}",
        *_table(["difference", *(WORDS.get(key, key) for key in keys)], rows),
        *lines,
    ]


def _training(page: _Page) -> list[str]:
    caption = "Training loss. Thick: mean over seeds; thin: one seed."
    ends = {k: _mean([c["loss"][-1] for c in v["curves"]]) for k, v in page.variants.items()}
    last = ", ".join(f"{LABELS[name]} {end}" for name, end in ends.items())
    drawn = page.figure("loss", figures.losses(page.results), caption)
    return [f"Training loss at the last record, nats per token: {last}.", *drawn]


def _stated(page: _Page) -> list[str]:
    rows = {
        title: {name: v["objects"][split]["seen"] for name, v in page.variants.items()}
        for title, split in (("train objects", "train"), ("held-out objects", "heldout"))
    }
    return [
        "Does a model know more than what was stated? The text states the attributes of train "
        "objects, in the wordings of these probes.",
        *page.conditions("stated", rows, "Accuracy in seen wordings on stated and other objects."),
        f"- Colour, train objects against held-out objects: {_against(*rows.values())}.",
    ]


def _attention(page: _Page) -> list[str]:
    shares = {k: v["attention"] for k, v in page.variants.items() if "attention" in v}
    if not shares:
        return []
    caption = "Attention on the grounding where the answer is given."
    return [
        "The share of the fusion layer's attention that goes to the grounding, not to the text, at "
        "the last position of held-out probes. It does not tell what the grounding is used for.",
        *page.figure(
            "attention", figures.bars(shares, "share of attention on the grounding"), caption
        ),
        *_table(["model", "share"], [[LABELS[k], _mean(values)] for k, values in shares.items()]),
    ]


def _attribution(page: _Page) -> list[str]:
    found = page.results["attribution"]
    own, donor = (
        {name: {a: v["swapped"][a][who] for a in ATTRIBUTES} for name, v in found.items()}
        for who in ("own", "donor")
    )
    trained = {name: page.variants[name] for name in found}
    changed = {text: {k: v[key] for k, v in found.items()} for key, text in CHANGED.items()}
    rows = {"as trained": trained, "swapped: own value": own, "swapped: donor's": donor, **changed}
    caption = "Held-out objects, all prompts, while the grounding is changed after training."
    return [
        "Where do the answers come from? *Swapped*: the tower reads the prompt of another object "
        "with another value (the donor), the decoder its own; shown is how often the answer is the "
        "own value and how often the donor's. *Last position only*, *all other positions* and "
        "*nowhere* say where the grounding can be seen. *Fusion removed*: its block is turned into "
        "a plain one.",
        *page.conditions("attribution", rows, caption),
        f"- Colour when swapped, the donor's value against the own: {_against(donor, own)}.",
        *(f"- Colour, {k}, against as trained: {_against(changed[k], trained)}." for k in changed),
    ]


def _given(page: _Page) -> list[str]:
    found = page.results["given"]
    text = {name: page.variants[name] for name in found}
    one, mean = ({k: v[key] for k, v in found.items()} for key in ("one_image", "mean_image"))
    rows = {"text, as trained": text, "one image": one, "mean of images": mean}
    caption = "Held-out objects, all prompts, when the decoder is given images instead of text."
    return [
        "A BLIND-VALM never sees an image. Here it is handed, at every position, CLIP's embedding "
        "of the object's pictures in the place of the text features.",
        *page.conditions("given", rows, caption),
        f"- Colour, one image against text: {_against(one, text)}.",
        f"- Colour, mean of images against text: {_against(mean, text)}.",
    ]


def _nearest(page: _Page) -> list[str]:
    lines = []
    if "clip" in page.results:
        found = [(k, v) for k, v in page.results["clip"].items() if k != "seconds"]
        named = "; ".join(f"{key.replace('_', ' ')} {_mean(values)}" for key, values in found)
        lines = [f"CLIP on validation images: {named}.", ""]
    if "neighbours" in page.results:
        rows, gallery = page.results["neighbours"], page.gallery
        pairs = [(row, gallery.things[gallery.find(i)[0]]) for row in rows for i in row["images"]]
        same = [
            f"the same {word} {np.mean([thing.value(a) == row[a] for row, thing in pairs]):.3f}"
            for a, word in WORDS.items()
        ]
        own = np.mean([thing.name == row["object"] for row, thing in pairs])
        distinct = list({row["object"]: row for row in reversed(rows)}.values())[::-1]
        caption = "Prompts and their nearest pictures, nearest first; ✓: of the prompt's object."
        lines += [
            f"Of the {len(pairs)} pictures nearest to prompts about held-out objects ({len(rows)} "
            f"prompts, seed {gallery.config.seed}), a share of {own:.3f} show the object itself; "
            f"shares with {', '.join(same)}.",
            *page.figure("neighbours", figures.neighbours(gallery, distinct[:5]), caption),
        ]
    return lines


def _bias(page: _Page) -> list[str]:
    found = page.results["bias"]
    names = [name for name in found if name in LABELS]
    rows = [
        [f"{100 * share:g} %", *(_mean(found[k][a][place]) for a in ATTRIBUTES for k in names)]
        for place, share in enumerate(found["stated_heldout"])
    ]
    head = ["stated", *(f"{WORDS[a]}, {LABELS[name]}" for a in ATTRIBUTES for name in names)]
    caption = "Held-out accuracy as the text begins to state held-out attributes."
    return [
        "How much would the text have to say? The share of sentences about a held-out object that "
        "state one of its attributes grows from left to right.",
        *page.figure("bias", figures.bias(page.results), caption),
        *_table(head, rows),
    ]


def _cost(page: _Page) -> list[str]:
    head = ["model", "ms per update", "MFLOPs per token"]
    rows, ratios, flops = {}, {}, {}
    for name, variant in page.variants.items():
        seconds, counted = variant["step_seconds"], variant["flops_per_token"]
        row = [_mean([1000 * each for each in seconds], 1), f"{counted / 1e6:.2f}"]
        rows[name] = [LABELS[name], *row]
        if "gpt2" in page.variants:
            base = page.variants["gpt2"]
            ratios[name] = [a / b for a, b in zip(seconds, base["step_seconds"], strict=True)]
            flops[name] = counted / base["flops_per_token"]
            rows[name] += [_mean(ratios[name], 2), f"{flops[name]:.2f}"]
    lines = [
        "FLOPs are those of matrix products, counted from shapes, with the frozen tower's and an "
        "exact search's. An update spends time on more than that, so the two need not agree.",
    ]
    if ratios:
        head += ["time / GPT-2's", "FLOPs / GPT-2's"]
        caption = "Median seconds of an update, and FLOPs, relative to GPT-2 of the same seed."
        label = "relative to GPT-2 (GPT-2 = 1)"
        lines += page.figure("cost", figures.bars(ratios, label, flops=[*flops.values()]), caption)
    return [*lines, *_table(head, rows.values())]


def _made(page: _Page) -> list[str]:
    results = page.results
    lines = [f"    {figures.COMMAND}", "", f"- seeds: {_each(results['seeds'], '{}')}"]
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
    return [*lines, "", "The knobs of the world:", *_table(["knob", "value", "meaning"], rows)]


def _against(mine: figures.Condition, base: figures.Condition) -> str:
    """Colour in one condition against another, by variant."""
    return _grouped({name: Gap.between(mine[name]["color"], base[name]["color"]) for name in base})


def _grouped(gaps: Mapping[str, Gap]) -> str:
    """Variants by the word that their difference deserves."""
    words = dict.fromkeys(gap.word for gap in gaps.values())
    return "; ".join(
        f"{word}: " + ", ".join(f"{LABELS[k]} {gap}" for k, gap in gaps.items() if gap.word == word)
        for word in words
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return ["", *lines, ""]


def _mean(values: Sequence[float], digits: int = 3) -> str:
    """The mean and, of several values, ± their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _each(values: Sequence[float], form: str = "{:.3f}") -> str:
    return ", ".join(map(form.format, values))


# Title -> what makes the section, and the part of the results without which there is none.
_SECTIONS: dict[str, tuple[Callable[[_Page], list[str]], str]] = {
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
    "How this was made": (_made, "seeds"),
}
