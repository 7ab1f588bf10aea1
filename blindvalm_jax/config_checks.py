"""Settings that must fit each other, and what follows from several of them."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from blindvalm_jax import addresses
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores.settings import INPUTS
from blindvalm_jax.trees import flatten

if TYPE_CHECKING:
    from blindvalm_jax.config import Config


def fusion_layers(config: Config) -> tuple[int, ...]:
    """Indices of the fusion blocks, sorted; none when there is no grounding."""
    if config.grounding.source == "none":
        return ()
    layers = config.decoder.layers
    return tuple(sorted(i + layers if i < 0 else i for i in config.decoder.fusion_layers))


def check(config: Config) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: naming the settings and what to change.
    """
    settings = {k.replace("/", "."): x for k, x in flatten(dataclasses.asdict(config)).items()}
    inputs = {name: settings.pop(name) for name in INPUTS}
    if wrong := addresses.misfit(inputs) or addresses.refusal(settings):
        raise UserError(wrong)
    if config.train.objective == "contrastive":
        _check_contrastive(config)
    else:
        _check_decoder(config)
        _check_grounding(config)
    _check_batch(config)
    _check_data(config)
    _check_profile(config.log.profile_steps)
    if config.log.wandb:
        _check_wandb(config.log.wandb)
    if config.eval.tasks:
        _check_tasks(config)
    _check_kept(config)
    mesh = config.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if sizes.count(-1) > 1 or 0 in (*sizes, mesh.slices):
        raise UserError(f"mesh sizes must be positive, at most one -1, got {mesh}")


def _check_decoder(config: Config) -> None:
    decoder = config.decoder
    if decoder.width % decoder.heads:
        raise UserError(
            f"decoder.width {decoder.width} is not a multiple of decoder.heads {decoder.heads}"
        )
    if decoder.positions == "sinusoidal" and decoder.width % 2:
        raise UserError(f"sinusoidal positions need an even decoder.width, got {decoder.width}")
    if decoder.positions == "learned" and config.data.sequence_length > decoder.max_positions:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} exceeds the learned position "
            f"table, decoder.max_positions {decoder.max_positions}"
        )
    for index in decoder.fusion_layers:
        if type(index) is not int or not -decoder.layers <= index < decoder.layers:
            raise UserError(
                f"decoder.fusion_layers holds {index!r}; the decoder has layers 0 to "
                f"{decoder.layers - 1} (or -1 to -{decoder.layers} from the end)"
            )
    fused = fusion_layers(config)
    if len(set(fused)) != len(fused):
        raise UserError(f"decoder.fusion_layers names a layer twice: {decoder.fusion_layers}")
    if config.train.loss_chunk and config.data.sequence_length % config.train.loss_chunk:
        raise UserError(
            f"train.loss_chunk {config.train.loss_chunk} does not divide data.sequence_length "
            f"{config.data.sequence_length}"
        )


def _check_grounding(config: Config) -> None:
    grounding = config.grounding
    if grounding.source != "none" and not fusion_layers(config):
        raise UserError(
            "decoder.fusion_layers is empty: name a layer, or set grounding.source=none"
        )
    if grounding.source == "none" and grounding.tower not in ("", "random"):
        raise UserError(
            f"grounding.tower is {grounding.tower}, but grounding.source=none reads none: set "
            "grounding.source=text, or leave the tower out"
        )
    if grounding.source == "text" and grounding.neighbours != 1:
        raise UserError(f"grounding.neighbours must be 1 for text, got {grounding.neighbours}")
    if grounding.source != "images" and (grounding.index or grounding.prepared):
        raise UserError(
            f"grounding.index and grounding.prepared are for grounding.source=images, got "
            f"{grounding.source}"
        )
    if grounding.source == "images" and not grounding.index:
        raise UserError(
            "grounding.source=images needs grounding.index, a directory that python -m "
            "blindvalm_jax.index build has written; for --dry_run without data vectors:NUMBER"
        )
    if grounding.source == "images" and (
        grounding.tower == "random" or grounding.control == "random_tower"
    ):
        raise UserError(
            "grounding.source=images asks its index with the text tower of the index's own CLIP: "
            "a random tower knows no images"
        )
    if grounding.source != "images" and grounding.search != "exact":
        raise UserError(
            f"grounding.search={grounding.search} is for grounding.source=images, got "
            f"{grounding.source}"
        )
    for name in ("nprobe", "rerank", "lists", "code_bytes"):
        if getattr(grounding, name) and grounding.search != "faiss":
            raise UserError(f"grounding.{name} is for grounding.search=faiss")
    if (grounding.search == "prepared") != bool(grounding.prepared):
        raise UserError("grounding.search=prepared and grounding.prepared=DIR go together")


def _check_contrastive(config: Config) -> None:
    image, train = config.clip.image, config.train
    for name in ("files", "eval_files", "windows"):
        if getattr(config.data, name):
            raise UserError(
                "train.objective=contrastive learns from images with captions: set data.images or "
                f"data.tfds, and leave data.{name} out"
            )
    if train.batch_size < 2:
        raise UserError("train.objective=contrastive needs a train.batch_size of at least 2")
    if config.clip.temperature_start > config.clip.temperature_cap:
        raise UserError(
            f"clip.temperature_start {config.clip.temperature_start:g} is above "
            f"clip.temperature_cap {config.clip.temperature_cap:g}"
        )
    if image.kind == "vit" and image.width % image.heads:
        raise UserError(
            f"clip.image.width {image.width} is not a multiple of clip.image.heads {image.heads}"
        )
    if image.kind == "vit" and image.size % image.patch:
        raise UserError(
            f"clip.image.size {image.size} is not a multiple of clip.image.patch {image.patch}"
        )
    if any(type(count) is not int or count < 1 for count in image.channels):
        raise UserError(f"clip.image.channels must be positive whole numbers, got {image.channels}")
    if image.kind == "conv" and not image.channels:
        raise UserError("clip.image.channels is empty: a conv tower needs a convolution")
    if train.attention == "cudnn":
        raise UserError("train.attention=cudnn is for train.objective=language: set auto or xla")
    for name, unset in (
        ("remat", "none"),
        ("loss_chunk", 0),
        ("scan_unroll", 1),
        ("init_from", ""),
    ):
        if getattr(train, name) != unset:
            raise UserError(f"train.{name} is for train.objective=language")


def _check_batch(config: Config) -> None:
    train = config.train
    if not train.microbatches:  # chosen later among those that fit together
        return
    if train.batch_size % train.microbatches:
        raise UserError(
            f"train.batch_size {train.batch_size} is not a multiple of train.microbatches "
            f"{train.microbatches}"
        )
    if config.grounding.control == "shuffled" and train.batch_size // train.microbatches < 2:
        raise UserError("grounding.control=shuffled needs at least 2 rows in a microbatch")


def _check_data(config: Config) -> None:
    data = config.data
    for name in ("images", "eval_images"):
        if config.train.objective == "language" and getattr(data, name):
            raise UserError(
                f"data.{name} is for train.objective=contrastive; a language model reads "
                "data.files, data.tfds or data.windows"
            )
    sources = [name for name in ("files", "tfds", "windows", "images") if getattr(data, name)]
    if len(sources) > 1:
        raise UserError(f"give one source of data, got data.{' and data.'.join(sources)}")
    if data.tfds_eval_split and (data.eval_files or data.eval_images or not data.tfds):
        raise UserError(
            "data.tfds_eval_split goes with data.tfds and without data.eval_files or "
            "data.eval_images"
        )


def _check_kept(config: Config) -> None:
    kept, saved, asked = config.checkpoint, config.checkpoint.every_steps, config.eval.every_steps
    if kept.keep_every % saved:
        raise UserError(
            f"checkpoint.keep_every {kept.keep_every} is no multiple of checkpoint.every_steps "
            f"{saved}: nothing is saved at most of its steps"
        )
    if not all(type(step) is int and step > 0 for step in kept.keep_steps):
        raise UserError(f"checkpoint.keep_steps must be steps above 0, got {kept.keep_steps}")
    if kept.keep_best and (asked == 0 or saved % asked):
        raise UserError(
            f"checkpoint.keep_best needs an eval/loss with each checkpoint: eval.every_steps "
            f"{asked} must divide checkpoint.every_steps {saved}"
        )


def _check_profile(steps: tuple[int, ...]) -> None:
    numbers = all(type(step) is int and step > 0 for step in steps)
    if steps and not (numbers and len(steps) == 2 and steps[0] <= steps[1]):
        raise UserError(
            f"log.profile_steps must be a first and a last step, as (10, 12), got {steps}"
        )


def _check_wandb(place: str) -> None:
    parts = place.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"[^\s\\#?%:][^\\#?%:]{,127}", p) for p in parts):
        raise UserError(
            "log.wandb must be PROJECT or ENTITY/PROJECT of Weights & Biases, without any of "
            rf"\#?%:, got {place!r}"
        )


def _check_tasks(config: Config) -> None:
    if config.train.objective == "contrastive":
        raise UserError("eval.tasks are for train.objective=language: leave them out")
    if config.grounding.control == "shuffled":
        raise UserError(
            "eval.tasks cannot be put to a run of grounding.control=shuffled: it reads the "
            "features of another row, so that its answers depend on the batch"
        )
    if config.grounding.search == "prepared":
        raise UserError(
            "eval.tasks need grounding.search=exact or faiss: prepared neighbours are those of "
            "the training text alone"
        )
    names = [name.strip() for name in config.eval.tasks.split(",")]
    own = all(name.startswith(("text:", "file:")) for name in names)  # they say where they lie
    if not own and not config.eval.tasks_data:
        raise UserError("eval.tasks needs eval.tasks_data, the directory of the tasks' files")
