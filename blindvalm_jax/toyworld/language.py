"""What is said in a toy world: captions of images, sentences to learn a language from, probes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from blindvalm_jax.toyworld.templates import (
    DESCRIBING,
    NAMING,
    NEUTRAL,
    NEW_WORDINGS,
    STATEMENTS,
)
from blindvalm_jax.toyworld.world import TEXT_SPLITS, Object, WorldConfig, stream

_WORDINGS = {"seen": STATEMENTS, "new": NEW_WORDINGS}
_STATEMENTS = [
    (attribute, template) for attribute, texts in STATEMENTS.items() for template in texts
]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A text that ends right before an attribute word; `answer` is the right one of `candidates`.

    wording: "seen" in sentences about train objects, or "new"; template: the prompt without its
    name; object: the name; split: the object's.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...]
    attribute: str
    object: str
    split: str
    wording: str
    template: str


def captions(
    config: WorldConfig, things: Sequence[Object], split: str
) -> list[list[tuple[str, ...]]]:
    """Captions of every image of every object: each names the object or describes it, never both.

    The draws do not depend on `describe_share`, so that it changes no more captions than it must.
    """
    rng = stream(config, "captions", TEXT_SPLITS.index(split))
    shape = (len(things), images_per_object(config, split), config.captions_per_image)
    describe = rng.random(shape) < config.describe_share
    naming, describing = (rng.integers(len(texts), size=shape) for texts in (NAMING, DESCRIBING))

    def caption(index: tuple[int, int, int]) -> str:
        text = DESCRIBING[describing[index]] if describe[index] else NAMING[naming[index]]
        return text.format(**vars(things[index[0]]))

    return [
        [tuple(caption((thing, image, n)) for n in range(shape[2])) for image in range(shape[1])]
        for thing in range(shape[0])
    ]


def images_per_object(config: WorldConfig, split: str) -> int:
    """Images of every object in a split of the images."""
    wanted = {
        "train": config.images_per_object,
        "validation": config.validation_images_per_object,
    }
    return wanted[split]


def sentences(config: WorldConfig, things: Sequence[Object], split: str) -> list[str]:
    """Sentences about all objects, equally often, of which some state one attribute.

    The draws do not depend on the shares of statements: with a larger share the same sentences
    stay statements and others join them.
    """
    count = config.sentences if split == "train" else config.validation_sentences
    rng = stream(config, "sentences", TEXT_SPLITS.index(split))
    about = rng.permutation(np.arange(count) % len(things))
    chance = rng.random(count)
    neutral, statement = (rng.integers(len(texts), size=count) for texts in (NEUTRAL, _STATEMENTS))
    found = []
    for index in range(count):
        thing = things[about[index]]
        share = config.statement_share if thing.split == "train" else config.stated_heldout
        if chance[index] < share:
            attribute, template = _STATEMENTS[statement[index]]
            text = f"{template.format(name=thing.name)} {thing.value(attribute)}"
        else:
            text = NEUTRAL[neutral[index]].format(name=thing.name)
        found.append(f"{text}.")
    return found


def probes(config: WorldConfig, things: Sequence[Object]) -> Iterator[Probe]:
    """Every prompt about every object."""
    for thing in things:
        for wording, of_attribute in _WORDINGS.items():
            for attribute, templates in of_attribute.items():
                for template in templates:
                    yield Probe(
                        prompt=template.format(name=thing.name),
                        answer=thing.value(attribute),
                        candidates=config.attributes[attribute],
                        attribute=attribute,
                        object=thing.name,
                        split=thing.split,
                        wording=wording,
                        template=template,
                    )


def vocabulary_text(config: WorldConfig, things: Sequence[Object]) -> Iterator[str]:
    """Every wording about every object and with every value, with every word in its usual place.

    It says nothing of the objects but their names, so neither does a tokenizer learned from it. A
    byte-level BPE has each word, with its space, as one token if its vocabulary may be large
    enough: learning then stops by itself, for the default world at about 820 entries.
    """
    for values in itertools.product(*config.attributes.values()):
        for template in DESCRIBING:
            yield template.format(**dict(zip(config.attributes, values, strict=True)))
    for thing in things:
        for template in NAMING:
            yield template.format(name=thing.name)
        for template in NEUTRAL:
            yield f"{template.format(name=thing.name)}."
    for probe in probes(config, things):
        for candidate in probe.candidates:
            yield f"{probe.prompt} {candidate}."
