"""What `config.parse` accepts; every refusal names the field, what was expected and what came."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import ml_collections
import pytest

from blindvalm_jax import config
from blindvalm_jax.errors import UserError

Field = dataclasses.Field[Any]
WRONG_TYPE: dict[type, tuple[Any, ...]] = {
    str: (3, None),
    int: ("8", 1.5, True, None),
    float: ("0.1", True, None),
    bool: (1, "true", None),
    tuple: (1, "1", None),
}


def leaves(cls: type = config.Config, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every field that holds a value, with its dotted key."""
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if field.default is dataclasses.MISSING:
            section = field.default_factory
            assert isinstance(section, type)
            yield from leaves(section, f"{key}.")
        else:
            yield key, field


FIELDS = dict(leaves())


def edited(**changes: Any) -> dict[str, Any]:
    """The defaults as nested dicts with some dotted keys changed."""
    values: dict[str, Any] = config.default().to_dict()
    for key, value in changes.items():
        *sections, name = key.split(".")
        holder = values
        for section in sections:
            holder = holder[section]
        holder[name] = value
    return values


def refusal(**changes: Any) -> str:
    """The message with which the changed defaults are refused."""
    with pytest.raises(UserError) as error:
        config.from_dict(edited(**changes))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_parse_to_the_defaults() -> None:
    assert config.parse(config.default()) == config.Config()


def test_survives_json() -> None:
    written = json.dumps(edited(**{"decoder.fusion_layers": (1, -1)}))
    parsed = config.from_dict(json.loads(written))
    assert parsed.decoder.fusion_layers == (1, -1)
    assert config.fusion_layers(parsed) == (1, 11)


def test_int_is_taken_for_a_float() -> None:
    rate = config.from_dict(edited(**{"optimizer.learning_rate": 1})).optimizer.learning_rate
    assert type(rate) is float


@pytest.mark.parametrize("key", FIELDS)
def test_wrong_type(key: str) -> None:
    expected = type(FIELDS[key].default)
    for value in WRONG_TYPE[expected]:
        assert refusal(**{key: value}) == f"config.{key} must be {expected.__name__}, got {value!r}"


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.metadata["choices"]])
def test_value_that_is_no_choice(key: str) -> None:
    message = refusal(**{key: "nonsense"})
    assert message.startswith(f"config.{key} must be one of ")
    assert message.endswith(", got 'nonsense'")
    for choice in FIELDS[key].metadata["choices"]:
        assert choice in message


@pytest.mark.parametrize(
    ("key", "bound"),
    [
        (key, bound)
        for key, field in FIELDS.items()
        for bound in ("low", "high")
        if field.metadata[bound] is not None
    ],
)
def test_value_out_of_range(key: str, bound: str) -> None:
    field = FIELDS[key]
    limit = field.metadata[bound]
    kind: Any = type(field.default)
    value = kind(limit + (1 if bound == "high" else -1))
    message = refusal(**{key: value})
    assert f"config.{key} is {value!r}" in message
    assert f"{limit:g}" in message.partition("range")[2]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        pytest.param(
            {"decoder.width": 100, "decoder.heads": 12},
            ["decoder.width 100", "multiple of decoder.heads 12"],
            id="width-heads",
        ),
        pytest.param(
            {"decoder.width": 15, "decoder.heads": 3},
            ["even decoder.width", "got 15"],
            id="odd-sinusoidal-width",
        ),
        pytest.param(
            {
                "decoder.positions": "learned",
                "decoder.max_positions": 256,
                "data.sequence_length": 257,
            },
            ["data.sequence_length 257", "decoder.max_positions 256"],
            id="learned-positions",
        ),
        pytest.param(
            {"decoder.layers": 4, "decoder.fusion_layers": (4,)},
            ["decoder.fusion_layers holds 4", "0 to 3", "-1 to -4"],
            id="fusion-layer-too-high",
        ),
        pytest.param(
            {"decoder.layers": 4, "decoder.fusion_layers": (-5,)},
            ["decoder.fusion_layers holds -5", "0 to 3", "-1 to -4"],
            id="fusion-layer-too-low",
        ),
        pytest.param(
            {"decoder.fusion_layers": ("2",)},
            ["decoder.fusion_layers holds '2'"],
            id="fusion-layer-no-int",
        ),
        pytest.param(
            {"decoder.fusion_layers": ()},
            ["decoder.fusion_layers is empty", "grounding.source=none"],
            id="no-fusion-layer",
        ),
        pytest.param(
            {"decoder.layers": 4, "decoder.fusion_layers": (2, -2)},
            ["decoder.fusion_layers", "twice", "(2, -2)"],
            id="fusion-layer-twice",
        ),
        pytest.param(
            {"grounding.neighbours": 4},
            ["grounding.neighbours must be 1", "got 4"],
            id="neighbours-of-text",
        ),
        pytest.param(
            {"train.batch_size": 8, "train.microbatches": 3},
            ["train.batch_size 8", "multiple of train.microbatches 3"],
            id="microbatches",
        ),
        pytest.param(
            {"train.loss_chunk": 100, "data.sequence_length": 512},
            ["train.loss_chunk 100", "data.sequence_length 512"],
            id="loss-chunk",
        ),
        pytest.param(
            {
                "grounding.control": "shuffled",
                "train.batch_size": 8,
                "train.microbatches": 8,
            },
            ["grounding.control=shuffled", "at least 2 rows"],
            id="nothing-to-shuffle",
        ),
        pytest.param(
            {"data.files": "a.txt", "data.tfds": "lm1b"},
            ["one source of data", "data.files", "data.tfds"],
            id="two-sources",
        ),
        pytest.param(
            {"data.files": "a.txt", "data.tfds_eval_split": "test"},
            ["data.tfds_eval_split goes with data.tfds"],
            id="split-of-nothing",
        ),
        pytest.param(
            {"mesh.data": -1, "mesh.tensor": -1},
            ["mesh", "at most one -1", "data=-1", "tensor=-1"],
            id="mesh-two-unknowns",
        ),
        pytest.param(
            {"grounding.source": "none", "grounding.tower": "clip"},
            ["grounding.tower is clip", "grounding.source=none"],
            id="tower-of-a-plain-decoder",
        ),
        pytest.param(
            {"grounding.source": "images"}, ["needs grounding.index"], id="images-without-index"
        ),
        pytest.param(
            {"grounding.index": "index"},
            ["for grounding.source=images", "got text"],
            id="index-without-images",
        ),
        pytest.param(
            {
                "grounding.source": "images",
                "grounding.index": "index",
                "grounding.tower": "random",
            },
            ["a random tower knows no images"],
            id="images-of-a-random-tower",
        ),
        pytest.param(
            {
                "grounding.source": "images",
                "grounding.index": "index",
                "grounding.search": "prepared",
            },
            ["grounding.search=prepared and grounding.prepared=DIR go together"],
            id="prepared-from-nowhere",
        ),
        pytest.param(
            {"grounding.search": "faiss"},
            ["grounding.search=faiss is for grounding.source=images", "got text"],
            id="search-without-images",
        ),
        pytest.param(
            {"grounding.source": "images", "grounding.index": "index", "grounding.nprobe": 8},
            ["grounding.nprobe is for grounding.search=faiss"],
            id="nprobe-of-exact-search",
        ),
        pytest.param({"mesh.fsdp": 0}, ["mesh", "positive", "fsdp=0"], id="mesh-zero"),
    ],
)
def test_values_that_do_not_fit_together(changes: dict[str, Any], parts: list[str]) -> None:
    message = refusal(**changes)
    for part in parts:
        assert part in message


CLIP = {"train.objective": "contrastive", "data.images": "images"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.images": "", "data.files": "a.txt"}, "leave data.files out"),
        ({"data.eval_files": "a.txt"}, "leave data.eval_files out"),
        ({"data.images": "", "data.windows": "windows"}, "leave data.windows out"),
        ({"data.tfds": "coco"}, "give one source of data, got data.tfds and data.images"),
        ({"data.tfds_eval_split": "test"}, "data.tfds_eval_split goes with data.tfds"),
        (
            {
                "data.images": "",
                "data.tfds": "coco",
                "data.tfds_eval_split": "test",
                "data.eval_images": "held",
            },
            "without data.eval_files or data.eval_images",
        ),
        ({"train.batch_size": 1}, "train.batch_size of at least 2"),
        (
            {"clip.temperature_start": 20.0, "clip.temperature_cap": 10.0},
            "clip.temperature_start 20 is above clip.temperature_cap 10",
        ),
        (
            {"clip.image.width": 30, "clip.image.heads": 4},
            "clip.image.width 30 is not a multiple of clip.image.heads 4",
        ),
        (
            {"clip.image.size": 30, "clip.image.patch": 16},
            "clip.image.size 30 is not a multiple of clip.image.patch 16",
        ),
        (
            {"clip.image.kind": "conv", "clip.image.channels": ()},
            "clip.image.channels is empty: a conv tower",
        ),
        ({"clip.image.channels": (8, 0)}, "positive whole numbers, got (8, 0)"),
        ({"clip.image.channels": (8, 1.5)}, "positive whole numbers, got (8, 1.5)"),
        ({"train.attention": "cudnn"}, "train.attention=cudnn is for train.objective=language"),
        ({"train.remat": "full"}, "train.remat is for train.objective=language"),
        ({"train.loss_chunk": 8}, "train.loss_chunk is for train.objective=language"),
        ({"train.scan_unroll": 2}, "train.scan_unroll is for train.objective=language"),
        ({"train.init_from": "weights"}, "train.init_from is for train.objective=language"),
        ({"train.objective": "language"}, "data.images is for train.objective=contrastive"),
        (
            {"train.objective": "language", "data.images": "", "data.eval_images": "held"},
            "data.eval_images is for train.objective=contrastive",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_values_that_do_not_fit_a_contrastive_run(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**{**CLIP, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.images": "", "data.tfds": "coco", "data.tfds_eval_split": "test"},
        {"data.images": "", "data.tfds": "coco", "data.eval_images": "held"},
        {"train.attention": "xla", "train.batch_size": 2},
        {"clip.temperature_start": 10.0, "clip.temperature_cap": 10.0},
        {"clip.image.kind": "conv", "clip.image.heads": 5, "clip.image.patch": 5},
        # What only a language model reads is left alone.
        {"decoder.width": 15, "decoder.heads": 3, "grounding.neighbours": 4},
    ],
    ids=lambda value: ",".join(value),
)
def test_values_that_fit_a_contrastive_run(changes: dict[str, Any]) -> None:
    given = edited(**{**CLIP, **changes})
    assert dataclasses.asdict(config.from_dict(given)) == given


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder.positions": "learned", "decoder.max_positions": 512},
        {"decoder.layers": 4, "decoder.fusion_layers": (-4, 3)},
        {"grounding.source": "none", "decoder.fusion_layers": ()},
        {"train.loss_chunk": 128, "data.sequence_length": 512},
        {"grounding.control": "shuffled", "train.batch_size": 8, "train.microbatches": 4},
        {"mesh.data": 2, "mesh.fsdp": -1, "mesh.tensor": 2},
        {"train.attention": "cudnn", "decoder.attention_dropout": 0.0},
    ],
)
def test_values_at_the_edge_of_fitting_are_accepted(changes: dict[str, Any]) -> None:
    parsed = dataclasses.asdict(config.from_dict(edited(**changes)))
    assert parsed == edited(**changes)


def test_fusion_layers_without_grounding_are_none() -> None:
    parsed = config.from_dict(edited(**{"grounding.source": "none"}))
    assert config.fusion_layers(parsed) == ()


@pytest.mark.parametrize("section", ["", "decoder.", "grounding.random."])
def test_unknown_key(section: str) -> None:
    message = refusal(**{f"{section}layerz": 3})
    assert f"unknown setting config.{section}layerz" in message
    known = "seed" if not section else "layers"
    assert known in message.partition("known here")[2]


def test_missing_key() -> None:
    values = edited()
    del values["decoder"]["layers"]
    with pytest.raises(UserError, match=r"config\.decoder\.layers is missing"):
        config.parse(ml_collections.ConfigDict(values))


def test_the_record_of_a_run_may_be_older_than_a_setting() -> None:
    values = edited(**{"decoder.layers": 3, "clip.image.layers": 7, "seed": 5})
    for lacking in (("log",), ("decoder", "width"), ("clip", "text"), ("clip", "image", "size")):
        section = values
        for name in lacking[:-1]:
            section = section[name]
        del section[lacking[-1]]
    expected = edited(**{"decoder.layers": 3, "clip.image.layers": 7, "seed": 5})
    assert dataclasses.asdict(config.from_dict(values)) == expected
    values["clip"] = 3
    with pytest.raises(UserError, match=r"config\.clip must be a section"):
        config.from_dict(values)


def test_value_in_place_of_a_section() -> None:
    assert refusal(decoder=3) == "config.decoder must be a section with fields, got 3"


def test_describe_lists_every_field_with_its_default_and_range() -> None:
    described = {key: (default, meaning) for key, default, meaning in config.describe()}
    assert list(described) == list(FIELDS)
    for key, (default, meaning) in described.items():
        metadata = FIELDS[key].metadata
        assert default == FIELDS[key].default
        assert meaning.startswith(metadata["meaning"])
        for choice in metadata["choices"]:
            assert choice in meaning.removeprefix(metadata["meaning"])
        for bound in (metadata["low"], metadata["high"]):
            assert bound is None or f"{bound:g}" in meaning.removeprefix(metadata["meaning"])
