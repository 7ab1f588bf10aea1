"""The section of the toy-world report on reporting bias: how often would text have to say it?"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from blindvalm_jax.markdown import table
from blindvalm_jax.toyworld import figures, findings, language
from blindvalm_jax.toyworld.findings import LABELS, WORDS, Gap, mean
from blindvalm_jax.toyworld.report_probes import gap_table
from blindvalm_jax.toyworld.world import ATTRIBUTES, WorldConfig, attribute_of, objects


@dataclasses.dataclass(frozen=True)
class Told:
    """What sentences tell of held-out objects, by attribute, mean over seeds.

    reached: share of the objects of which a sentence states the attribute; times: such sentences
    per object.
    """

    reached: Mapping[str, float]
    times: Mapping[str, float]

    @classmethod
    def by(cls, world: WorldConfig, *, seeds: Sequence[int], share: float) -> Told:
        """Counts in the training sentences; share: of those about such objects that state one."""
        counts: dict[str, list[list[int]]] = {attribute: [] for attribute in ATTRIBUTES}
        for seed in seeds:
            config = dataclasses.replace(world, seed=seed, stated_heldout=share)
            for attribute, found in _statements(config).items():
                counts[attribute].append(found)
        return cls(
            {k: float(np.mean([np.mean(np.array(x) > 0) for x in v])) for k, v in counts.items()},
            {k: float(np.mean([np.mean(x) for x in v])) for k, v in counts.items()},
        )

    def remembered(self, attribute: str, chance: float) -> float:
        """Accuracy of who remembers all that is stated, and guesses the rest."""
        return self.reached[attribute] + (1 - self.reached[attribute]) * chance

    def cell(self, attribute: str, chance: float) -> str:
        """That, and how often it is stated."""
        return f"{self.remembered(attribute, chance):.3f} ({self.times[attribute]:.1f})"


def bias(page: figures.Page) -> list[str]:
    """Answers as sentences begin to state what held-out objects look like."""
    found, names = page.results["bias"], findings.swept(page.results)
    chance, seeds = page.results["chance"], page.results["seeds"]
    told = [
        Told.by(page.gallery.config, seeds=seeds, share=share) for share in found["stated_heldout"]
    ]
    shares = [f"{100 * share:g} %" for share in found["stated_heldout"]]
    rows = [
        [
            share,
            *(told[place].cell(a, chance[a]) for a in ATTRIBUTES),
            *(mean(found[k][a][place]) for a in ATTRIBUTES for k in names),
        ]
        for place, share in enumerate(shares)
    ]
    head = ["stated", *(f"{WORDS[a]}, text alone" for a in ATTRIBUTES)]
    head += [f"{WORDS[a]}, {label}" for a in ATTRIBUTES for label in names.values()]
    caption = "Accuracy on held-out objects, seen wordings, as text begins to state what they are."
    alone = {a: [of.remembered(a, chance[a]) for of in told] for a in ATTRIBUTES}
    return [
        "How much would the text have to say? The share of sentences about a held-out object that "
        "state one of its attributes grows from left to right, in steps that are not to scale. "
        "Shown is the accuracy in seen wordings. *Text alone*: what one would get right who "
        "remembered all that sentences state of held-out objects and guessed the rest, and in "
        "brackets such statements per object; means over seeds.",
        *page.figure("bias", figures.bias(page.results, alone), caption),
        *table(head, rows),
        *gap_table(_gaps(page, shares)),
    ]


def _gaps(page: figures.Page, shares: Sequence[str]) -> dict[str, dict[str, Gap]]:
    """Of each variant to the least share, and of GPT-2 to the other one at each share."""
    found, names = page.results["bias"], findings.swept(page.results)
    rows = {
        f"{share} − {shares[0]}, {LABELS[k]}": {
            a: Gap.between(found[k][a][place], found[k][a][0]) for a in ATTRIBUTES
        }
        for k in names
        for place, share in enumerate(shares)
        if place
    }
    for other in (name for name in names if name != "gpt2"):
        for place, share in enumerate(shares):
            rows[f"GPT-2 − {LABELS[other]}, both at {share}"] = {
                a: Gap.between(found["gpt2"][a][place], found[other][a][place]) for a in ATTRIBUTES
            }
    return rows


def _statements(config: WorldConfig) -> dict[str, list[int]]:
    """By attribute, the sentences that state it, of each held-out object."""
    things = objects(config)
    held = [thing.name for thing in things if thing.split == "heldout"]
    found: dict[str, Counter[str]] = {attribute: Counter() for attribute in ATTRIBUTES}
    for text in language.sentences(config, things, "train"):
        said = attribute_of(text.split()[-1].removesuffix("."))
        if said is not None:
            found[said[0]].update(set(held) & set(re.findall(r"\w+", text)))
    return {attribute: [count[name] for name in held] for attribute, count in found.items()}
