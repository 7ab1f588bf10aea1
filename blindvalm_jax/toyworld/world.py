"""A world of made-up objects: its knobs, and who looks like what.

Every object has a name, a colour, a shape and a size. Text states the attributes of `train` objects
only; those of `dev` objects (for choosing settings) and `heldout` objects (for reporting) can be
learned from pictures alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from blindvalm_jax.errors import UserError

# None starts with a vowel: no article in front of one tells what follows.
COLORS = ("red", "yellow", "green", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "medium", "large")
ATTRIBUTES = {"color": COLORS, "shape": SHAPES, "size": SIZES}
SPLITS = ("train", "dev", "heldout")
TEXT_SPLITS = ("train", "validation")  # of sentences, and of images with their captions
DATASETS = ("images", "sentences", "probes")

# One random stream each, so that a knob of one changes nothing in the others.
_STREAMS = ("objects", "images", "captions", "sentences")
_DEFAULT_NAME = "default"
_CONSONANTS, _VOWELS, _LAST = "bdfgklmnprstvz", "aeiou", "bfgvz"
# Names that are words already, and pieces that are better not part of one.
_AVOIDED = re.compile("debug|feliz|gomez|kebab|lopez|motif|nabob|perez|serif|topaz|fag|neg|nig")
_STEMS = {
    **{v.removesuffix("e"): (key, v) for key, values in ATTRIBUTES.items() for v in values},
    "circul": ("shape", "circle"),
    "triangul": ("shape", "triangle"),
}


def _knob(default: Any, meaning: str, low: float, high: float, *datasets: str) -> Any:
    """A field; `datasets` are those that depend on it, all of them if none is given."""
    metadata = {"meaning": meaning, "low": low, "high": high, "datasets": datasets or DATASETS}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The knobs of a world; everything else is a pure function of them.

    Raises:
      UserError: a knob is of the wrong type or outside its range.
    """

    train_objects: int = _knob(120, "objects whose attributes the text states", 1, 2000)
    dev_objects: int = _knob(40, "objects to choose settings on", 2, 2000)
    heldout_objects: int = _knob(80, "objects to report on", 2, 2000)
    colors: int = _knob(8, "colours that objects have", 2, len(COLORS))
    shapes: int = _knob(5, "shapes that objects have", 2, len(SHAPES))
    sizes: int = _knob(3, "sizes that objects have", 2, len(SIZES))
    image_size: int = _knob(32, "pixels of a side", 16, 128, "images")
    images_per_object: int = _knob(60, "training images of an object", 1, 500, "images")
    validation_images_per_object: int = _knob(4, "other images of it", 1, 500, "images")
    captions_per_image: int = _knob(5, "captions of an image", 1, 20, "images")
    describe_share: float = _knob(0.4, "captions that describe, not name", 0, 1, "images")
    sentences: int = _knob(20_000, "training sentences", 1, 1_000_000, "sentences")
    validation_sentences: int = _knob(1000, "validation sentences", 1, 1_000_000, "sentences")
    statement_share: float = _knob(
        0.5, "sentences about a train object that state an attribute", 0, 1, "sentences"
    )
    stated_heldout: float = _knob(
        0.0, "the same about a dev or held-out object; 0: full reporting bias", 0, 1, "sentences"
    )
    seed: int = _knob(0, "decides objects, images and text", 0, 2**31 - 1)

    def __post_init__(self) -> None:
        """Checks types and ranges; shares have at most four decimals, as names hold them."""
        for knob in dataclasses.fields(self):
            value, low, high = getattr(self, knob.name), knob.metadata["low"], knob.metadata["high"]
            wanted = type(knob.default)
            if type(value) not in (int, wanted):
                raise UserError(f"{knob.name} must be {wanted.__name__}, got {value!r}")
            if not low <= value <= high:
                raise UserError(f"{knob.name} must be {low:g} ... {high:g}, got {value!r}")
            if wanted is float:
                if not math.isclose(value, round(value, 4), rel_tol=0, abs_tol=1e-12):
                    raise UserError(f"{knob.name} must be a multiple of 0.0001, got {value!r}")
                object.__setattr__(self, knob.name, round(float(value), 4))

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """The values that objects have of each attribute."""
        counts = {"color": self.colors, "shape": self.shapes, "size": self.sizes}
        return {name: values[: counts[name]] for name, values in ATTRIBUTES.items()}


@dataclasses.dataclass(frozen=True)
class Object:
    """One object; `split` is train, dev or heldout."""

    name: str
    color: str
    shape: str
    size: str
    split: str

    def value(self, attribute: str) -> str:
        """Its colour, shape or size."""
        return str(getattr(self, attribute))

    @property
    def look(self) -> tuple[str, ...]:
        """All that pictures show of it."""
        return tuple(map(self.value, ATTRIBUTES))


def objects(config: WorldConfig) -> tuple[Object, ...]:
    """All objects, split by split, in the order of their names' drawing.

    In each split the values of an attribute, and the pairs of values of two attributes, are equally
    frequent: their counts differ by at most one; those of pairs by a few where the numbers of
    values have a common divisor.
    """
    rng = stream(config, "objects")
    counts = (config.train_objects, config.dev_objects, config.heldout_objects)
    names = iter(_names(sum(counts), rng))
    attributes = [*config.attributes.values()]
    sizes = [len(values) for values in attributes]
    found = []
    for split, count in zip(SPLITS, counts, strict=True):
        columns = [
            np.array(rng.permutation(values))[places]
            for values, places in zip(attributes, _design(count, sizes), strict=True)
        ]
        for row in rng.permutation(np.stack(columns, axis=1)):
            color, shape, size = map(str, row)
            found.append(Object(next(names), color, shape, size, split))
    return tuple(found)


def _design(count: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """A column of values int[count] for each attribute, their combinations balanced."""
    columns = [np.arange(count) % size for size in sizes]
    if all(math.gcd(*pair) == 1 for pair in itertools.combinations(sizes, 2)):
        # Consecutive numbers pass through every combination before one comes again.
        return columns
    for place in range(1, len(sizes)):
        columns[place] = _balanced(np.stack(columns[:place], axis=1), sizes[place])
    return columns


def _balanced(rows: np.ndarray, size: int) -> np.ndarray:
    """A next column for rows: permutations of its values, each the one that pairs most evenly."""
    seen: Counter[tuple[int, ...]] = Counter()
    found: list[int] = []

    def met(value: int, row: tuple[int, ...]) -> int:
        """How often a value came with each value of a row, and, doubled, with all of them."""
        return (
            sum(seen[place, known, value] for place, known in enumerate(row))
            + 2 * seen[(-1, *row, value)]
        )

    for first in range(0, len(rows), size):
        block = [tuple(map(int, row)) for row in rows[first : first + size]]
        orders = itertools.permutations(range(size), len(block))
        costs = {order: sum(map(met, order, block)) for order in orders}
        best = min(costs, key=costs.__getitem__)
        for value, row in zip(best, block, strict=True):
            found.append(value)
            seen.update([(-1, *row, value), *((n, known, value) for n, known in enumerate(row))])
    return np.array(found)


def stream(config: WorldConfig, name: str, *keys: int) -> np.random.Generator:
    """The random stream of one part of the world; `keys` divide it further."""
    return np.random.default_rng([config.seed, _STREAMS.index(name), *keys])


def attribute_of(word: str) -> tuple[str, str] | None:
    """(attribute, value) of an attribute word or a form of one, as "reddish" or "circles"."""
    return next((found for stem, found in _STEMS.items() if word.startswith(stem)), None)


def dataset_name(config: WorldConfig, dataset: str) -> str:
    """Canonical name of one dataset of the world: the knobs that it depends on, less defaults."""
    parts = [
        f"{knob.name}{value}"
        for knob in dataclasses.fields(config)
        if dataset in knob.metadata["datasets"]
        and (value := getattr(config, knob.name)) != knob.default
    ]
    return "-".join(parts) or _DEFAULT_NAME


def tfds_name(config: WorldConfig, dataset: str) -> str:
    """The TFDS name, as builder/config, of one dataset of the world."""
    return f"toyworld_{dataset}/{dataset_name(config, dataset)}"


def parse_dataset_name(name: str, dataset: str) -> WorldConfig:
    """The world of a name of one of its datasets; knobs that it does not depend on are defaults.

    Raises:
      UserError: the name is not what `dataset_name` gives for any world.
    """
    knobs = {knob.name: knob for knob in dataclasses.fields(WorldConfig)}
    values: dict[str, Any] = {}
    for part in name.split("-") if name != _DEFAULT_NAME else []:
        match = re.fullmatch(r"([a-z_]+)(\d+(\.\d+)?)", part)
        if match is None or match[1] not in knobs:
            raise UserError(f"toy world {name!r}: {part!r} is no knob with its value, as in seed1")
        kind: Any = type(knobs[match[1]].default)
        if kind is int and match[3]:
            raise UserError(f"toy world {name!r}: {match[1]} must be int, got {match[2]}")
        values[match[1]] = kind(match[2])
    config = WorldConfig(**values)
    canonical = dataset_name(config, dataset)
    if canonical != name:
        raise UserError(f"toy world {name!r} of {dataset} is written {canonical!r}")
    return config


def _names(count: int, rng: np.random.Generator) -> list[str]:
    """Two-syllable names of five letters, so that none starts another.

    Few syllables make many names: a learned BPE then needs few pieces besides the names.
    """
    firsts = rng.permutation([a + b for a in _CONSONANTS for b in _VOWELS])
    seconds = rng.permutation([a + b + c for a in _CONSONANTS for b in _VOWELS for c in _LAST])
    wanted = 2 * count
    starts = min(len(firsts), math.ceil(math.sqrt(wanted)))
    ends = min(len(seconds), math.ceil(wanted / starts))
    every = ["".join(pair) for pair in itertools.product(firsts[:starts], seconds[:ends])]
    usable = [name for name in every if not _AVOIDED.search(name) and not attribute_of(name)]
    return [str(name) for name in rng.permutation(usable)[:count]]
