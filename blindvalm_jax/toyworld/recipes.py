"""How CLIP and the language models of a toy world are trained: settings by variant.

Chosen on the development objects of a world that no report shows: docs/toyworld.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from blindvalm_jax import config as schema
from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld.world import WorldConfig, tfds_name

# Filled in by `supply`: the tokenizer, CLIP and index of the world that the data names.
OWN = "toyworld"
VARIANTS = (
    "gpt2",
    "blind_valm",
    "blind_valm_eos",
    "valm",
    "valm_eos",
    "random_tower",
    "shuffled",
    "random_tower_eos",
    "shuffled_eos",
)
NEIGHBOURS = 4


@dataclasses.dataclass(frozen=True)
class Steps:
    """Updates of CLIP and of each language model, where they are not the recipe's (0)."""

    clip: int = 0
    language: int = 0


def clip(world: WorldConfig, *, steps: int = 0) -> ConfigDict:
    """CLIP on the images of a world: 0.3 M parameters; steps: updates, 0 for the recipe's."""
    config = _shared(world)
    config.train.objective = "contrastive"
    config.data.tfds = tfds_name(world, "images")
    config.data.tfds_eval_split = "validation"
    config.clip.temperature_start = 10.0
    config.clip.temperature_cap = 50.0
    text, image = config.clip.text, config.clip.image
    text.layers, text.width, text.heads, text.projection, text.context = 2, 64, 2, 64, 16
    image.kind, image.size, image.width, image.channels = (
        "conv",
        world.image_size,
        128,
        (16, 32, 64),
    )
    config.train.steps = steps or 1000
    config.train.batch_size = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.02
    config.eval.windows = 0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 1000
    return config


def language(world: WorldConfig, variant: str, *, steps: int = 0) -> ConfigDict:
    """A language model of 0.3 M parameters on the sentences of a world; steps: as for `clip`.

    Raises:
      UserError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    config = _shared(world)
    config.data.tfds = tfds_name(world, "sentences")
    config.data.tfds_eval_split = "validation"
    config.data.sequence_length = 32
    decoder = config.decoder
    decoder.layers, decoder.width, decoder.heads = 4, 64, 4
    decoder.dropout = decoder.attention_dropout = 0.0
    decoder.fusion_layers = (-2,)
    # As long as a GPT-2 takes to memorise what the text states about train objects, for all alike.
    config.train.steps = steps or 6000
    config.train.batch_size = 8
    config.optimizer.learning_rate = 2e-3
    # A name is in one of eight batches or so: a moment must last from one to the next.
    config.optimizer.beta2 = 0.999
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.1
    config.optimizer.weight_decay = 0.01
    config.eval.windows = 0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 1000
    grounding = config.grounding
    grounding.source, grounding.tower = "text", OWN
    grounding.readout = "eos" if variant.endswith("_eos") else "token"
    if variant == "gpt2":
        grounding.source, grounding.tower = "none", ""
    elif variant.startswith("valm"):
        grounding.source, grounding.index, grounding.neighbours = "images", OWN, NEIGHBOURS
    elif variant.startswith(("random_tower", "shuffled")):
        grounding.control = variant.removesuffix("_eos")
    return config


def described(world: WorldConfig) -> dict[str, Any]:
    """What readers of a comparison want to know of its models: sizes and batches."""
    read, said = clip(world), language(world, "valm")
    decoder = {key: said.decoder[key] for key in ("layers", "width", "heads")}
    text = {key: read.clip.text[key] for key in ("layers", "width", "heads")}
    image = {"kind": read.clip.image.kind}
    return {
        "decoder": {**decoder, "fused": said.decoder.layers + said.decoder.fusion_layers[0]},
        "windows": [said.train.batch_size, said.data.sequence_length],
        "clip": {"text": text, "image": image, "pairs": read.train.batch_size},
        "neighbours": said.grounding.neighbours,
    }


def _shared(world: WorldConfig) -> ConfigDict:
    """What CLIP and the language models have in common."""
    config = schema.default()
    config.seed = world.seed
    config.tokenizer.kind, config.tokenizer.path = "train", OWN
    config.train.dtype = config.grounding.dtype = "float32"
    config.optimizer.schedule = "cosine"
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon_beside = "corrected"
    config.optimizer.decay = "matrices"
    config.optimizer.clip_norm = 1.0
    config.log.every_steps = 50
    return config
