"""The toy world as TFDS datasets: what is read is what was made, without TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from blindvalm_jax.data.corpora import TfdsSource
from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld import builders, language, render, supply
from blindvalm_jax.toyworld.world import TEXT_SPLITS, Object, WorldConfig, objects, stream

CONFIG = WorldConfig(
    train_objects=6,
    dev_objects=3,
    heldout_objects=4,
    image_size=16,
    images_per_object=3,
    validation_images_per_object=1,
    sentences=60,
    validation_sentences=20,
    seed=4,
)
THINGS = objects(CONFIG)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toyworld")
    builders.build(CONFIG, directory)
    return directory


def read(name: str, split: str, directory: Path) -> list[dict[str, Any]]:
    """Examples with their texts decoded."""
    builder = tfds.builder(name, data_dir=directory, file_format="array_record")
    assert builder.is_prepared()

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [text.decode() for text in value]
        return value.decode() if isinstance(value, bytes) else value

    return [
        {key: decoded(value) for key, value in example.items()}
        for example in builder.as_data_source(split=split)
    ]


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("split", TEXT_SPLITS)
def test_images_and_captions_are_read_as_they_were_made(built: Path, split: str) -> None:
    expected = {}
    captions = language.captions(CONFIG, THINGS, split)
    for index, thing in enumerate(THINGS):
        rng = stream(CONFIG, "images", TEXT_SPLITS.index(split), index)
        images = render.render(thing, rng, count=len(captions[index]), image_size=16)
        for image, texts in zip(images, captions[index], strict=True):
            expected[image.tobytes()] = (thing.name, thing.split, list(texts))
    found = read(builders.names(CONFIG)[0], split, built)
    assert len(found) == len(expected) == (39 if split == "train" else 13)
    for example in found:
        assert example["image"].shape == (16, 16, 3)
        assert example["image"].dtype == np.uint8
        said = (example["object"], example["split"], example["captions"])
        assert expected[example["image"].tobytes()] == said


def test_the_two_splits_share_no_image(built: Path) -> None:
    name = builders.names(CONFIG)[0]
    train, other = ({e["image"].tobytes() for e in read(name, s, built)} for s in TEXT_SPLITS)
    assert not train & other


@pytest.mark.parametrize("split", TEXT_SPLITS)
def test_sentences_are_read_as_a_corpus(built: Path, split: str) -> None:
    source = TfdsSource(builders.names(CONFIG)[1], split, data_dir=str(built))
    assert sorted(source.documents()) == sorted(language.sentences(CONFIG, THINGS, split))


def test_probes_are_read_as_they_were_made(built: Path) -> None:
    made = list(language.probes(CONFIG, THINGS))
    for split in ("train", "dev", "heldout"):
        found = read(builders.names(CONFIG)[2], split, built)
        probes = [language.Probe(**{**e, "candidates": tuple(e["candidates"])}) for e in found]
        assert sorted(probes, key=repr) == sorted(
            (probe for probe in made if probe.split == split), key=repr
        )


def test_building_again_changes_nothing(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    builders.build(CONFIG, built)
    printed = capsys.readouterr()
    assert printed.out.count("already there") == printed.out.count("\n") == 3
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == times
    builders.build(CONFIG, tmp_path)
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 3
    assert not printed.err
    assert files(tmp_path) == files(built)


def test_a_version_stands_for_one_content() -> None:
    """If this fails, what is made has changed: raise VERSION and pin the new texts beside it."""
    pinned = {"2.0.0": "3f397cf9766c0a68"}
    texts = [
        language.captions(CONFIG, THINGS, "train"),
        language.sentences(CONFIG, THINGS, "train"),
    ]
    every = repr([THINGS, *texts, list(language.probes(CONFIG, THINGS))])
    version = str(builders.ToyworldSentences.VERSION)
    assert hashlib.sha256(every.encode()).hexdigest()[:16] == pinned[version]


def test_worlds_of_other_text_share_images_and_probes(built: Path) -> None:
    images, sentences, probes = builders.names(CONFIG)
    biased = builders.names(dataclasses.replace(CONFIG, stated_heldout=0.5))
    assert biased[0] == images
    assert biased[1] != sentences
    assert biased[2] == probes
    assert builders.names(WorldConfig())[0] == "toyworld_images/default"


def test_a_name_alone_makes_its_dataset_in_a_fresh_process(tmp_path: Path) -> None:
    """With stated held-out attributes, images too, and no TensorFlow in sight."""
    config = dataclasses.replace(CONFIG, stated_heldout=0.5)
    images, sentences, _ = builders.names(config)
    program = f"""
import sys
from blindvalm_jax.data import corpora
source = corpora.TfdsSource({sentences!r}, data_dir={str(tmp_path)!r})
print(sorted(source.documents()))
examples = corpora.open_tfds({images!r}, "train", {str(tmp_path)!r})[1]
print(examples[0]["image"].shape, "tensorflow" in sys.modules, "jax" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert str(sorted(language.sentences(config, THINGS, "train"))) in lines
    assert "(16, 16, 3) False False" in lines


def test_names_of_no_world_are_one_clear_line(built: Path) -> None:
    source = TfdsSource("toyworld_sentences/sead1", data_dir=str(built))
    with pytest.raises(UserError, match="'sead1' is no knob") as error:
        list(source.documents())
    assert "\n" not in str(error.value)


class LeakyCaptions(builders.ToyworldImages):
    """One caption of validation both names and describes."""

    def captions(self, things: tuple[Object, ...], split: str) -> list[list[tuple[str, ...]]]:
        made = super().captions(things, split)
        if split == "validation":
            made[-1][-1] = (*made[-1][-1], f"a {things[-1].color} {things[-1].name}")
        return made


class LeakySentences(builders.ToyworldSentences):
    """One sentence of validation states a held-out object's colour."""

    def sentences(self, things: tuple[Object, ...], split: str) -> list[str]:
        planted = [f"the {things[-1].name} is {things[-1].color}."] if split == "validation" else []
        return super().sentences(things, split) + planted


@pytest.mark.parametrize(
    ("leaky", "message"),
    [
        (LeakyCaptions, "a caption both names and describes"),
        (LeakySentences, "states an attribute of a heldout object"),
    ],
)
def test_a_leak_fails_the_build_and_leaves_no_dataset(
    leaky: type[Any], message: str, tmp_path: Path
) -> None:
    name = builders.names(CONFIG)[0 if leaky is LeakyCaptions else 1].split("/")[1]
    builder = leaky(config=name, data_dir=tmp_path, file_format="array_record")
    with pytest.raises(UserError, match=f"{message}: .* and 1 of that kind"):
        builder.download_and_prepare()
    assert not builder.is_prepared()
    assert not [path for path in files(tmp_path) if ".config" not in path]
    assert not leaky(config=name, data_dir=tmp_path, file_format="array_record").is_prepared()


def test_the_command_makes_a_world_and_refuses_bad_knobs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blindvalm_jax.toyworld.build"]
    small = [
        f"--{field.name}={getattr(CONFIG, field.name)}" for field in dataclasses.fields(CONFIG)
    ]
    made = subprocess.run(
        [*command, *small, f"--out={tmp_path}"], capture_output=True, text=True, check=True
    )
    assert made.stdout.count("\n") == 3
    assert not made.stderr
    source = TfdsSource(builders.names(CONFIG)[1], data_dir=str(tmp_path))
    assert source.size() == 60
    for wrong, message in (
        ([f"--out={tmp_path}", "--stated_heldout=2"], "error: stated_heldout must be 0 ... 1"),
        ([], "error: --out is missing"),
    ):
        refused = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert refused.returncode == 1
        assert refused.stderr.startswith(message)
        assert refused.stderr.count("\n") == 1


def test_what_says_which_world_it_is_is_written_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other workers of a sweep read it meanwhile; one of before was left empty by a kill."""
    monkeypatch.setattr(builders, "build", lambda world, place: None)
    parts = supply.Parts(tmp_path)
    parts.marker.touch()
    assert supply._with_its_images(WorldConfig(seed=3), parts) == WorldConfig(seed=3)
    supply.make_datasets(WorldConfig(seed=3), parts)
    assert parts.marker.read_text() == "seed3\n"
    first = parts.marker.stat()
    supply.make_datasets(WorldConfig(seed=3), parts)
    again = parts.marker.stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    with pytest.raises(UserError, match="holds the world 'seed3', not 'seed4'"):
        supply.make_datasets(WorldConfig(seed=4), parts)
