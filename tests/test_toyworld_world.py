"""The toy world: balanced objects, pictures that show them, texts that give nothing away."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.data import byte_level_bpe
from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld import language, leaks, measure, render, templates
from blindvalm_jax.toyworld.world import (
    ATTRIBUTES,
    COLORS,
    DATASETS,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    WorldConfig,
    attribute_of,
    dataset_name,
    objects,
    parse_dataset_name,
    stream,
    tfds_name,
)

# The colours of the same names in CSS: nothing that the renderer knows of.
CSS = {
    "red": (255, 0, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
THINGS = objects(WorldConfig())


def words(texts: Any) -> set[str]:
    return set(re.findall("[a-z]+", " ".join(texts)))


def flat(captions: list[list[tuple[str, ...]]]) -> list[str]:
    return [text for of_object in captions for of_image in of_object for text in of_image]


def of_split(split: str) -> Object:
    return next(thing for thing in THINGS if thing.split == split)


@pytest.mark.parametrize("counts", [(120, 40, 80), (130, 7, 41), (1, 250, 24)])
@pytest.mark.parametrize("seed", [0, 5])
def test_values_and_pairs_of_values_are_balanced_in_each_split(
    counts: tuple[int, int, int], seed: int
) -> None:
    config = WorldConfig(
        train_objects=counts[0], dev_objects=counts[1], heldout_objects=counts[2], seed=seed
    )
    things = objects(config)
    assert Counter(thing.split for thing in things) == dict(zip(SPLITS, counts, strict=True))
    for split, size in itertools.product(SPLITS, (1, 2, 3)):
        for keys in itertools.combinations(ATTRIBUTES, size):
            found = Counter(
                tuple(thing.value(key) for key in keys) for thing in things if thing.split == split
            )
            every = [found[row] for row in itertools.product(*(ATTRIBUTES[key] for key in keys))]
            assert sum(every) == found.total()
            assert max(every) - min(every) <= 1


def test_worlds_of_fewer_values_are_balanced_too() -> None:
    """Every number of values there can be; a common divisor costs pairs a few of 120 objects."""
    counts = (2, 40, 80, 120)
    for colors, shapes, sizes in itertools.product(range(2, 9), range(2, 6), range(2, 4)):
        knobs = {"colors": colors, "shapes": shapes, "sizes": sizes}
        apart = all(math.gcd(*pair) == 1 for pair in itertools.combinations(knobs.values(), 2))
        for count in counts:
            config = WorldConfig(**knobs, train_objects=count, dev_objects=2, heldout_objects=2)
            values = config.attributes
            assert [len(of) for of in values.values()] == [colors, shapes, sizes]
            things = [thing for thing in objects(config) if thing.split == "train"]
            for keys in (*itertools.combinations(values, 1), *itertools.combinations(values, 2)):
                found = Counter(tuple(thing.value(key) for key in keys) for thing in things)
                every = [found[row] for row in itertools.product(*(values[key] for key in keys))]
                assert sum(every) == count
                assert max(every) - min(every) <= (1 if apart or len(keys) == 1 else 4), knobs
            if count == 120:
                looks = {thing.look for thing in things}
                assert len(looks) >= 0.9 * colors * shapes * sizes, knobs


def test_a_world_of_fewer_values_speaks_of_no_others() -> None:
    config = WorldConfig(colors=3, shapes=2, sizes=2, sentences=2000, images_per_object=4)
    things = objects(config)
    texts = [
        *flat(language.captions(config, things, "train")),
        *language.sentences(config, things, "train"),
        *language.vocabulary_text(config, things),
        *(text for probe in language.probes(config, things) for text in probe.candidates),
    ]
    left_out = {*COLORS[3:], *SHAPES[2:], *SIZES[2:]}
    assert not words(texts) & left_out
    assert words(texts) >= {*COLORS[:3], *SHAPES[:2], *SIZES[:2]}
    assert tfds_name(config, "sentences").startswith("toyworld_sentences/colors3-shapes2-sizes2")
    assert parse_dataset_name(dataset_name(config, "probes"), "probes").attributes == (
        config.attributes
    )


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (80, 1), (80, 2), (2000, 0)])
def test_names_are_distinct_and_no_other_words(count: int, seed: int) -> None:
    config = WorldConfig(train_objects=count, dev_objects=count, heldout_objects=count, seed=seed)
    names = sorted(thing.name for thing in objects(config))
    assert len(set(names)) == 3 * count
    # Sorted, a prefix would stand right before a word that it starts.
    assert not any(b.startswith(a) for a, b in itertools.pairwise(names))
    every = {*templates.NAMING, *templates.DESCRIBING, *templates.NEUTRAL}
    for of_attribute in (templates.STATEMENTS, templates.NEW_WORDINGS):
        every |= {text for texts in of_attribute.values() for text in texts}
    known = words(every) | words(itertools.chain(*ATTRIBUTES.values()))
    assert not known & set(names)
    assert not any(attribute_of(name) for name in names)
    assert all(re.fullmatch("([^aeiou][aeiou]){2}[^aeiou]", name) for name in names)


def test_a_world_is_a_function_of_its_config() -> None:
    config = WorldConfig(images_per_object=2)
    assert objects(config) == objects(WorldConfig())
    assert objects(config) != objects(WorldConfig(seed=1))
    for make in (language.captions, language.sentences):
        made = make(config, THINGS, "train")
        assert made == make(config, THINGS, "train")
        assert made != make(dataclasses.replace(config, seed=1), THINGS, "train")
        assert made != make(config, THINGS, "validation")


def test_a_larger_share_of_statements_turns_neutral_sentences_into_statements() -> None:
    """And touches no other sentence, no object and no caption."""
    config = WorldConfig(sentences=2000, images_per_object=1)
    other = dataclasses.replace(config, stated_heldout=0.2)
    assert objects(other) == objects(config)
    assert language.captions(other, THINGS, "train") == language.captions(config, THINGS, "train")
    hidden = {thing.name for thing in THINGS if thing.split != "train"}
    values = words(itertools.chain(*ATTRIBUTES.values()))
    pairs = zip(
        language.sentences(config, THINGS, "train"),
        language.sentences(other, THINGS, "train"),
        strict=True,
    )
    changed = [after for before, after in pairs if before != after]
    assert all(words([after]) & values and words([after]) & hidden for after in changed)
    # 1,000 sentences are about hidden objects: 200 +- 13 (one standard deviation)
    assert 150 < len(changed) < 250


def test_every_object_is_spoken_of_equally_often() -> None:
    config = WorldConfig(sentences=1000)
    names = {thing.name for thing in THINGS}
    found = Counter(
        name
        for text in language.sentences(config, THINGS, "train")
        for name in words([text]) & names
    )
    assert len(found) == len(THINGS)
    assert found.total() == 1000
    assert set(found.values()) == {4, 5}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"train_objects": 0}, "train_objects must be 1 ... 2000, got 0"),
        ({"image_size": 8}, "image_size must be 16 ... 128"),
        ({"image_size": 24.0}, "image_size must be int, got 24.0"),
        ({"sentences": True}, "sentences must be int, got True"),
        ({"stated_heldout": 1.5}, "stated_heldout must be 0 ... 1"),
        ({"stated_heldout": float("nan")}, "stated_heldout must be 0 ... 1"),
        ({"stated_heldout": 0.00005}, "multiple of 0.0001"),
        ({"describe_share": "0.4"}, "describe_share must be float"),
        ({"seed": -1}, "seed must be 0 ..."),
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        WorldConfig(**knobs)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"seed": 12, "dev_objects": 3},
        {"stated_heldout": 0.0001, "describe_share": 1, "image_size": 24},
        {"statement_share": 0.1 + 0.2, "sentences": 10, "images_per_object": 7},
    ],
)
def test_names_of_datasets_hold_what_they_depend_on(dataset: str, knobs: dict[str, Any]) -> None:
    config = WorldConfig(**knobs)
    name = dataset_name(config, dataset)
    again = parse_dataset_name(name, dataset)
    assert dataset_name(again, dataset) == name
    for knob in dataclasses.fields(WorldConfig):
        kept = dataset in knob.metadata["datasets"]
        expected = getattr(config, knob.name) if kept else knob.default
        assert getattr(again, knob.name) == expected
    assert re.fullmatch(r"[\w.\-]+", name)  # what TFDS takes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no knob"),
        ("seed", "no knob"),
        ("sead1", "'sead1' is no knob"),
        ("seed01", "written 'seed1'"),
        ("seed0", "written 'default'"),
        ("seed1-train_objects9", "written 'train_objects9-seed1'"),
        ("image_size24", "written 'default'"),
        ("seed1.5", "seed must be int"),
        ("stated_heldout2.0", "must be 0 ... 1"),
    ],
)
def test_names_of_no_world_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_dataset_name(name, "sentences")


def pictures(color: str, shape: str, size: str, pixels: int) -> np.ndarray:
    """float[6, pixels, pixels, 3]."""
    keys = (COLORS.index(color), SHAPES.index(shape), SIZES.index(size))
    rng = stream(WorldConfig(), "images", *keys)
    thing = Object("x", color, shape, size, "train")
    return render.render(thing, rng, count=6, image_size=pixels).astype(float)


def foreground(image: np.ndarray) -> np.ndarray:
    """How far each pixel is from the colour of the image's edge."""
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.linalg.norm(image - np.median(edge, axis=0), axis=-1)


def silhouette(image: np.ndarray) -> np.ndarray:
    """float[12, 12]: the object, cut out and brought to one size."""
    mask = foreground(image) > 60
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[
        np.ix_(
            np.linspace(rows[0], rows[-1], 12).round().astype(int),
            np.linspace(columns[0], columns[-1], 12).round().astype(int),
        )
    ].astype(float)


@pytest.mark.parametrize("pixels", [24, 32])
def test_pictures_show_all_attributes(pixels: int) -> None:
    """Simple rules read them: nearest colour of CSS, area, nearest mean silhouette."""
    rows = list(itertools.product(COLORS, SHAPES, SIZES))
    images = {row: pictures(*row, pixels) for row in rows}
    right = []
    areas: dict[tuple[str, str], list[float]] = {}
    for (color, shape, size), made in images.items():
        for image in made:
            far = foreground(image)
            inside = image[far >= np.sort(far, axis=None)[-12]].mean(0)
            right.append(min(CSS, key=lambda key: np.linalg.norm(inside - CSS[key])) == color)
            areas.setdefault((shape, size), []).append((far > 60).mean())
    assert np.mean(right) > 0.99
    for shape in SHAPES:
        for smaller, larger in itertools.pairwise(SIZES):
            assert max(areas[shape, smaller]) < min(areas[shape, larger])
    mean = {
        shape: np.mean(
            [silhouette(i) for r in rows if r[1] == shape for i in images[r][:3]], axis=0
        )
        for shape in SHAPES
    }
    read = [
        min(SHAPES, key=lambda key: np.abs(silhouette(image) - mean[key]).sum()) == shape
        for (_, shape, _), made in images.items()
        for image in made[3:]
    ]
    assert np.mean(read) > 0.9  # chance: 0.2


def test_pictures_are_whole_and_in_many_places() -> None:
    made = pictures("red", "square", "small", 32)
    centers = np.array([np.argwhere(foreground(image) > 60).mean(0) for image in made])
    assert np.ptp(centers, axis=0).min() > 6
    areas = [(foreground(image) > 60).sum() for image in made]
    assert max(areas) < 2 * min(areas)  # none is cut off by the edge


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_token_of_a_prompt_is_in_captions_and_sentences(seed: int) -> None:
    """Text tower and language model have read it and every candidate."""
    config = WorldConfig(images_per_object=10, seed=seed)
    things = objects(config)
    tokenizer = byte_level_bpe.train(language.vocabulary_text(config, things), vocab_size=8192)
    captions = set(flat(language.captions(config, things, "train")))
    read = [tokenizer.encode(text) for text in captions]
    known = set(itertools.chain(*read))
    sentences = set(language.sentences(config, things, "train"))
    spoken = set(itertools.chain(*map(tokenizer.encode, sentences)))
    longest = max(map(len, read))
    for probe in language.probes(config, things):
        prompt = tokenizer.encode(probe.prompt)
        assert set(prompt) <= known & spoken, probe.prompt
        assert len(prompt) <= longest, probe.prompt
    for value in itertools.chain(*ATTRIBUTES.values()):
        assert set(tokenizer.encode(f" {value}")) <= known & spoken
    assert len({text.split()[0] for text in captions}) > 5
    assert all(re.fullmatch("[a-z ]+", text) for text in captions)


def test_no_seen_wording_is_part_of_a_new_one() -> None:
    seen, new = (
        set(itertools.chain(*of_attribute.values()))
        for of_attribute in (templates.STATEMENTS, templates.NEW_WORDINGS)
    )
    assert not any(text in other or other in text for text in seen for other in new)


def test_captions_describe_every_attribute_equally_often() -> None:
    held = [Counter(re.findall("{([a-z]+)}", text)) for text in templates.DESCRIBING]
    assert sum(held, Counter()) == dict.fromkeys(ATTRIBUTES, 7)


def test_a_tokenizer_learns_nothing_of_an_object_but_its_name() -> None:
    texts = list(language.vocabulary_text(WorldConfig(), THINGS))
    other = [Object(thing.name, "red", "ring", "large", "train") for thing in THINGS]
    assert texts == list(language.vocabulary_text(WorldConfig(), other))
    names = {thing.name for thing in THINGS}
    follow: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in names}
    for text in texts:
        for name in words([text]) & names:
            frame, _, last = text.removesuffix(".").replace(name, "X").rpartition(" ")
            follow[name][frame, last] += 1
    expected = follow[THINGS[0].name]
    assert all(found == expected for found in follow.values())
    stated = Counter(last for _, last in expected.elements() if attribute_of(last))
    # 7 seen and 5 new wordings with each value
    assert stated == dict.fromkeys(itertools.chain(*ATTRIBUTES.values()), 12)


def test_sentences_hold_seen_wordings_and_no_new_ones() -> None:
    config = WorldConfig(sentences=40_000)
    texts = language.sentences(config, THINGS, "train")
    known = {thing.name for thing in THINGS}
    frames = {re.sub("[a-z]+", lambda m: "X" if m[0] in known else m[0], text) for text in texts}
    for probe in language.probes(WorldConfig(), THINGS):
        start = probe.prompt.replace(probe.object, "X")
        assert any(frame.startswith(start) for frame in frames) == (probe.wording == "seen")
        assert probe.wording == "seen" or not any(start in frame for frame in frames)
    stated = set(texts)
    said = [
        f"{probe.prompt} {probe.answer}." in stated
        for probe in language.probes(WorldConfig(), THINGS)
        if probe.split == "train" and probe.wording == "seen"
    ]
    # 4 expected statements of each wording about each train object: 1 - exp(-4) = 0.98 come
    assert np.mean(said) > 0.95


def test_probes_ask_for_every_attribute_of_every_object() -> None:
    by_name = {thing.name: thing for thing in THINGS}
    found: Counter[tuple[str, str, str]] = Counter()
    for probe in language.probes(WorldConfig(), THINGS):
        thing = by_name[probe.object]
        assert probe.answer == thing.value(probe.attribute)
        assert probe.candidates == ATTRIBUTES[probe.attribute]
        assert probe.split == thing.split
        assert probe.prompt == probe.template.format(name=thing.name)
        assert probe.prompt.isprintable()
        assert probe.prompt == probe.prompt.strip()
        assert not words([probe.prompt]) & words(itertools.chain(*ATTRIBUTES.values()))
        found[probe.attribute, probe.object, probe.wording] += 1
    assert len(found) == 3 * 2 * len(THINGS)
    assert {key[2]: count for key, count in found.items()} == {"seen": 7, "new": 5}
    assert set(found.values()) == {7, 5}


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_texts_of_a_world_do_not_leak(share: float) -> None:
    config = WorldConfig(stated_heldout=share, images_per_object=5, sentences=5000)
    captions = flat(language.captions(config, THINGS, "train"))
    sentences = language.sentences(config, THINGS, "train")
    leaks.check(captions, sentences, THINGS, stated_heldout=share)
    if share:
        with pytest.raises(UserError, match="a sentence states an attribute of a"):
            leaks.check(captions, sentences, THINGS, stated_heldout=0)


def test_a_linear_map_finds_what_features_hold_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    answer = rng.integers(4, size=600)
    holding = rng.normal(size=(4, 16))[answer] + 0.1 * rng.normal(size=(600, 16))
    nothing = rng.normal(size=(600, 16))
    found = [
        np.mean(measure.ridge_answers(x[:400], answer[:400], x[400:], classes=4) == answer[400:])
        for x in (holding, 1e3 + holding / 1e3, nothing)
    ]
    assert found[:2] == [1, 1]
    assert abs(found[2] - 1 / 4) < 4 * np.sqrt(1 / 4 * 3 / 4 / 200)


def test_forms_of_attribute_words_are_known() -> None:
    forms = (
        "reddish bluer whitish pinkest circles circular triangular squarish crosses larger rings"
    )
    assert all(attribute_of(word) for word in forms.split())
    assert attribute_of("circular") == ("shape", "circle")
    others = {
        *templates.NEUTRAL,
        *templates.NAMING,
        *itertools.chain(*templates.STATEMENTS.values()),
    }
    assert not any(attribute_of(word) for word in words(others))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", ["{0}", "{0}ish", "{0}s", "{0}r"])
def test_a_caption_may_not_name_and_describe(split: str, form: str) -> None:
    thing = of_split(split)
    for value in itertools.chain(*ATTRIBUTES.values()):
        text = f"Some {form.format(value).title()} thing, two {thing.name}s"
        with pytest.raises(UserError, match=f"both names and describes: '{text}', and 2 of"):
            leaks.check(["a thing", text, f"{thing.name} {value}"], [], THINGS, stated_heldout=0)


def test_a_text_may_not_liken_one_object_to_another() -> None:
    text = f"a {of_split('heldout').name} looks like two {of_split('train').name}s"
    leaks.check([], [text.replace(of_split("train").name, "thing")], THINGS, stated_heldout=0)
    with pytest.raises(UserError, match=f"a caption names two objects: '{text}', and 1 of"):
        leaks.check([text], [], THINGS, stated_heldout=0)
    with pytest.raises(UserError, match=f"a sentence names two objects: '{text}', and 1 of"):
        leaks.check([], [text], THINGS, stated_heldout=1.0)


@pytest.mark.parametrize(
    ("split", "text", "share", "message"),
    [
        ("dev", "a {name} is {color}.", 0, "states an attribute of a dev object"),
        ("heldout", "{shape}-like is a {name}!", 0, "states an attribute of a heldout object"),
        ("heldout", "{name}s look circular", 0, "states an attribute of a heldout object"),
        ("train", "a {name} is {other}.", 0, "states what is not true of its object"),
        ("heldout", "a {name} is {other}.", 0.5, "states what is not true of its object"),
        ("train", "a {name} is {color}, not {other}.", 0, "what is not true of its object"),
        ("train", "the table is {color}.", 0, "without stating it of an object"),
        ("train", "the tables are {color}ish.", 0.5, "without stating it of an object"),
    ],
)
def test_a_sentence_may_not_give_away_or_deceive(
    split: str, text: str, share: float, message: str
) -> None:
    thing = of_split(split)
    other = next(color for color in COLORS if color != thing.color)
    text = text.format(**vars(thing), other=other)
    said = language.sentences(WorldConfig(sentences=50), THINGS, "train")
    with pytest.raises(UserError, match=re.escape(f"{message}: {text!r}, and 1 of")):
        leaks.check([], [*said, text], THINGS, stated_heldout=share)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_word_is_one_token_of_a_learned_bpe(seed: int) -> None:
    config = WorldConfig(seed=seed)
    things = objects(config)
    tokenizer = byte_level_bpe.train(language.vocabulary_text(config, things), vocab_size=8192)
    assert tokenizer.vocab_size < 1000
    spaced = {
        word
        for text in language.vocabulary_text(config, things)
        for word in re.findall(" [a-z]+", text)
    }
    assert {f" {thing.name}" for thing in things} <= spaced
    assert {f" {value}" for value in itertools.chain(*ATTRIBUTES.values())} <= spaced
    assert all(len(tokenizer.encode(word)) == 1 for word in spaced)
    for probe in itertools.islice(language.probes(config, things), 36):
        prompt = tokenizer.encode(probe.prompt)
        answer = tokenizer.encode(f" {probe.answer}")
        assert tokenizer.encode(f"{probe.prompt} {probe.answer}.")[:-1] == prompt + answer
