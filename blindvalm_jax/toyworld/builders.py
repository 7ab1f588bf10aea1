"""The toy world as three TFDS datasets: images with captions, sentences, and probes.

A dataset's config name tells the world: `toyworld_sentences/stated_heldout0.05-seed3`. It holds
only what that dataset depends on, so worlds that differ in their text share their images.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from blindvalm_jax.toyworld import language, leaks, render
from blindvalm_jax.toyworld.world import (
    SPLITS,
    TEXT_SPLITS,
    Object,
    WorldConfig,
    dataset_name,
    objects,
    parse_dataset_name,
    tfds_name,
)

_FORMAT = "array_record"
_Examples = Iterator[tuple[int, dict[str, Any]]]


class _ToyworldBuilder(tfds.core.GeneratorBasedBuilder):
    """A dataset of the world that its config's name tells."""

    VERSION = tfds.core.Version("2.0.0")  # of what is made: a name and a version are one content
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="default")]
    DATASET = ""
    ABOUT = ""

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        """The config of any name that a world has; other names raise a `UserError`."""
        parse_dataset_name(name, cls.DATASET)
        return super().get_builder_config(name, version) or tfds.core.BuilderConfig(name=name)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features())
        # In the order they are made, so that an example's number tells its object.
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=self.ABOUT, disable_shuffling=True
        )

    @abc.abstractmethod
    def _features(self) -> dict[str, Any]:
        """The fields of an example."""

    @property
    def _world(self) -> WorldConfig:
        return parse_dataset_name(self.builder_config.name, self.DATASET)


class ToyworldImages(_ToyworldBuilder):
    """Images of all objects; the splits hold other images of the same objects."""

    DATASET = "images"
    ABOUT = "Pictures of made-up objects. A caption names the object or describes it, never both."

    def _features(self) -> dict[str, Any]:
        size = self._world.image_size
        return {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "object": tfds.features.Text(),
            "split": tfds.features.Text(),
        }

    def captions(self, things: tuple[Object, ...], split: str) -> list[list[tuple[str, ...]]]:
        """Captions of every image of every object, before they are checked."""
        return language.captions(self._world, things, split)

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        things = objects(self._world)
        captions = {split: self.captions(things, split) for split in TEXT_SPLITS}
        every = [text for made in captions.values() for of in made for one in of for text in one]
        leaks.check(every, (), things, stated_heldout=0)
        return {
            split: self._generate_examples(things, split, captions[split]) for split in captions
        }

    def _generate_examples(
        self, things: tuple[Object, ...], split: str, captions: list[list[tuple[str, ...]]]
    ) -> _Examples:
        world, key = self._world, 0
        for index, (thing, texts) in enumerate(zip(things, captions, strict=True)):
            pictures = render.pictures(world, split, index, thing, count=len(texts))
            for picture, of_picture in zip(pictures, texts, strict=True):
                yield (
                    key,
                    {
                        "image": Image.fromarray(picture),  # an array would need TensorFlow
                        "captions": list(of_picture),
                        "object": thing.name,
                        "split": thing.split,
                    },
                )
                key += 1


class ToyworldSentences(_ToyworldBuilder):
    """Sentences to learn a language from."""

    DATASET = "sentences"
    ABOUT = (
        "Sentences about made-up objects; some state an attribute, as the knobs of the name say."
    )

    def _features(self) -> dict[str, Any]:
        return {"text": tfds.features.Text()}

    def sentences(self, things: tuple[Object, ...], split: str) -> list[str]:
        """The sentences of a split, before they are checked."""
        return language.sentences(self._world, things, split)

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        things = objects(self._world)
        made = {split: self.sentences(things, split) for split in TEXT_SPLITS}
        every = [text for texts in made.values() for text in texts]
        leaks.check((), every, things, stated_heldout=self._world.stated_heldout)
        return {split: self._generate_examples(texts) for split, texts in made.items()}

    def _generate_examples(self, texts: list[str]) -> _Examples:
        yield from enumerate({"text": text} for text in texts)


class ToyworldProbes(_ToyworldBuilder):
    """Prompts that end right before an attribute word; the splits are those of the objects."""

    DATASET = "probes"
    ABOUT = "Prompts whose next word is an attribute of a made-up object."

    def _features(self) -> dict[str, Any]:
        features = {
            field.name: tfds.features.Text() for field in dataclasses.fields(language.Probe)
        }
        return {**features, "candidates": tfds.features.Sequence(tfds.features.Text())}

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> _Examples:
        for key, probe in enumerate(language.probes(self._world, objects(self._world))):
            if probe.split == split:
                yield key, {**vars(probe), "candidates": list(probe.candidates)}


_BUILDERS = (ToyworldImages, ToyworldSentences, ToyworldProbes)


def names(config: WorldConfig) -> tuple[str, str, str]:
    """TFDS names, as dataset/config, of the images, sentences and probes of a world."""
    images, sentences, probes = (tfds_name(config, builder.DATASET) for builder in _BUILDERS)
    return images, sentences, probes


def build(config: WorldConfig, data_dir: str | Path) -> None:
    """Prepares what is missing of the three datasets, and prints a line about each.

    Raises:
      UserError: a text gives away what only pictures may tell; that dataset is not written.
    """
    for builder in _BUILDERS:
        begin = time.monotonic()
        name = dataset_name(config, builder.DATASET)
        made = builder(config=name, data_dir=data_dir, file_format=_FORMAT)
        known = Path(made.data_dir).exists()
        if not known:
            _prepare(made)
        splits = ", ".join(
            f"{split.num_examples:,} {key}" for key, split in made.info.splits.items()
        )
        took = "already there" if known else f"{time.monotonic() - begin:.1f} s"
        megabytes = made.info.dataset_size / 1e6
        print(f"{made.name}/{name}: {splits}; {megabytes:.1f} MB, {took}")


def _prepare(builder: Any) -> None:
    """Prepares a TFDS dataset without its progress bars and announcements."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
