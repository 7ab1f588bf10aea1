"""The parts of a toy world that a run asks for by the name `toyworld`, made when missing.

datasets/   images, sentences and probes (TFDS)        tokenizer/   a BPE of whole words
clip/       the run that trains CLIP on the images     index/       its embeddings of them
questions/  held-out objects, for eval.tasks
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from blindvalm_jax import config as schema
from blindvalm_jax import files, indexing
from blindvalm_jax.config import Config
from blindvalm_jax.data import byte_level_bpe, images, output
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_model, run_directory
from blindvalm_jax.tasks import visual_world
from blindvalm_jax.toyworld import language, recipes
from blindvalm_jax.toyworld.recipes import OWN
from blindvalm_jax.toyworld.world import (
    WorldConfig,
    dataset_name,
    objects,
    parse_dataset_name,
)

Train = Callable[[Config, Path], int]
BPE_ENTRIES = 8192  # more than there are words: learning stops by itself
_BATCH = 256  # images at once, at least


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the parts of one world lie."""

    root: Path

    @property
    def datasets(self) -> Path:
        """TFDS's data directory."""
        return self.root / "datasets"

    @property
    def marker(self) -> Path:
        """Says which world it is, as far as objects and images go."""
        return self.root / "world.txt"

    @property
    def world(self) -> str:
        """What it says, "" where there is none; one of before could be left empty."""
        return self.marker.read_text().strip() if self.marker.exists() else ""

    @property
    def tokenizer(self) -> Path:
        """Directory of the tokenizer."""
        return self.root / "tokenizer"

    @property
    def questions(self) -> Path:
        """Directory of what `eval.tasks` ask about."""
        return self.root / "questions"

    @property
    def clip(self) -> Path:
        """The run of CLIP."""
        return self.root / "clip"

    @property
    def index(self) -> Path:
        """The image index."""
        return self.root / "index"


def wanted(settings: Config) -> bool:
    """Whether settings name a part of a toy world."""
    grounding = settings.grounding
    named = (settings.tokenizer.path, grounding.tower, grounding.index, settings.eval.tasks_data)
    return OWN in named


def complete(settings: Config, workdir: Path, *, train: Train, dry_run: bool = False) -> Config:
    """Settings with paths in the place of `toyworld`; the world is the one `data.tfds` names.

    What is missing is made first, in `data.cache` or <workdir>/data. train: trains CLIP. dry_run:
    refuse to train one.

    Raises:
      UserError: `data.tfds` names no toy world, or a part cannot be made.
    """
    kind, world = world_of(settings)
    parts = Parts(Path(settings.data.cache or workdir / "data"))
    if kind == "sentences":
        world = _with_its_images(world, parts)
    make_datasets(world, parts)
    make_tokenizer(world, parts)
    if settings.eval.tasks_data == OWN:
        make_questions(world, parts)
    if settings.grounding.tower == OWN:
        if dry_run and not run_directory.is_run(parts.clip):
            raise UserError(
                f"--dry_run trains no CLIP, and {parts.clip} holds none: train it first, with "
                "--config=configs/toyworld.py:clip, or leave --dry_run out"
            )
        make_clip(world, parts, train=train, steps=_steps_of(parts.clip))
    if settings.grounding.index == OWN:
        make_index(parts)
    return placed(settings, parts)


def world_of(settings: Config) -> tuple[str, WorldConfig]:
    """The dataset that `data.tfds` names, images or sentences, and the world it is of.

    Raises:
      UserError: it names no toy world.
    """
    dataset, _, name = settings.data.tfds.partition("/")
    kind = dataset.removeprefix("toyworld_")
    if kind == dataset or kind not in ("images", "sentences"):
        raise UserError(
            "`toyworld` as tokenizer, tower or index goes with data.tfds=toyworld_sentences/... or "
            f"toyworld_images/..., got {settings.data.tfds!r}"
        )
    return kind, parse_dataset_name(name or "default", kind)


def _with_its_images(world: WorldConfig, parts: Parts) -> WorldConfig:
    """The world with the images that are there: the name of its sentences tells nothing of them."""
    if not parts.world:
        return world
    made = parse_dataset_name(parts.world, "images")
    of_images = [k.name for k in dataclasses.fields(world) if k.metadata["datasets"] == ("images",)]
    return dataclasses.replace(world, **{name: getattr(made, name) for name in of_images})


def _steps_of(run: Path) -> int:
    """Updates that a run which is there was to have; 0: there is none."""
    if not run_directory.is_run(run):
        return 0
    return int(files.read_object(run / "config.json")["train"]["steps"])


def placed(settings: Config, parts: Parts) -> Config:
    """Settings with the paths of parts in the place of `toyworld`."""
    grounding, tokenizer = settings.grounding, settings.tokenizer
    if tokenizer.path == OWN:
        tokenizer = dataclasses.replace(tokenizer, path=str(parts.tokenizer))
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, tfds_dir=str(parts.datasets)),
        tokenizer=tokenizer,
        grounding=dataclasses.replace(
            grounding,
            tower=str(parts.clip) if grounding.tower == OWN else grounding.tower,
            index=str(parts.index) if grounding.index == OWN else grounding.index,
        ),
        eval=dataclasses.replace(
            settings.eval,
            tasks_data=str(parts.questions)
            if settings.eval.tasks_data == OWN
            else settings.eval.tasks_data,
        ),
    )


def make_datasets(world: WorldConfig, parts: Parts) -> None:
    """Images, sentences and probes; other processes wait for the one that makes them.

    Raises:
      UserError: the parts there are of a world with other objects or images.
    """
    # Imported here: TFDS takes seconds, and most runs are of no toy world.
    from blindvalm_jax.toyworld import builders

    with output.locked(parts.root):
        name = dataset_name(world, "images")
        if parts.world not in ("", name):
            raise UserError(
                f"{parts.root} holds the world {parts.world!r}, not {name!r}: take another "
                "directory for this one"
            )
        if not parts.world:  # others read it meanwhile
            files.write_bytes(parts.marker, f"{name}\n".encode())
        builders.build(world, parts.datasets)


def make_tokenizer(world: WorldConfig, parts: Parts) -> None:
    """Learns the BPE in which every word of the world is one token, unless it is there."""
    with output.locked(parts.root):
        if not parts.tokenizer.is_dir():
            texts = language.vocabulary_text(world, objects(world))
            partial = parts.tokenizer.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            byte_level_bpe.train(texts, vocab_size=BPE_ENTRIES).save(partial)
            os.replace(partial, parts.tokenizer)


def make_questions(world: WorldConfig, parts: Parts) -> None:
    """Held-out objects and what they look like: the file that `tasks.visual_world` reads."""
    heldout = [thing for thing in objects(world) if thing.split == "heldout"]
    lines = [json.dumps(dataclasses.asdict(thing)) + "\n" for thing in heldout]
    path = parts.questions / visual_world.FILE
    with output.locked(parts.root):
        if not path.exists():
            parts.questions.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, "".join(lines).encode())


def make_clip(world: WorldConfig, parts: Parts, *, train: Train, steps: int = 0) -> None:
    """Trains CLIP on the images, goes on with that, or finds it done; others wait for that.

    Raises:
      UserError: the training did not end well.
    """
    settings = placed(schema.parse(recipes.clip(world, steps=steps)), parts)
    with output.locked(parts.clip):
        code = train(settings, parts.clip)
    if code:
        raise UserError(f"training CLIP in {parts.clip} ended with exit code {code}")


def make_index(parts: Parts) -> None:
    """Embeds the training images of the world with its CLIP, unless that is done."""
    data = schema.from_dict(files.read_object(parts.clip / "config.json")).data
    data = dataclasses.replace(data, tfds_dir=str(parts.datasets))  # the world may have moved
    source, _ = images.open_sources(data)
    clip = clip_model.load_clip(parts.clip)
    batch = -(-_BATCH // jax.device_count()) * jax.device_count()
    indexing.build(parts.index, source, clip, name=data.tfds, batch_size=batch, dtype="float32")
