"""How large the parts are that settings name `toyworld`, told without making any."""

from __future__ import annotations

import dataclasses
import functools

from blindvalm_jax import config as schema
from blindvalm_jax.config import Config
from blindvalm_jax.data import byte_level_bpe
from blindvalm_jax.toyworld import language, recipes, supply
from blindvalm_jax.toyworld.world import WorldConfig, objects


def told(settings: Config) -> Config:
    """Settings with a vocabulary, a tower's shape and a number of vectors for what is made first.

    The index of a world of sentences is taken for that of the default images of its objects.

    Raises:
      UserError: `data.tfds` names no toy world.
    """
    if not supply.wanted(settings):
        return settings
    _, world = supply.world_of(settings)
    grounding, tokenizer = settings.grounding, settings.tokenizer
    if tokenizer.path == recipes.OWN:
        tokenizer = dataclasses.replace(tokenizer, path="", train_vocab_size=_entries(world))
    if grounding.tower == recipes.OWN:
        shape = clip(settings).clip.text
        grounding = dataclasses.replace(grounding, tower="random", random=shape)
    if grounding.index == recipes.OWN:
        count = len(objects(world)) * world.images_per_object
        grounding = dataclasses.replace(grounding, index=f"vectors:{count}")
    return dataclasses.replace(settings, tokenizer=tokenizer, grounding=grounding)


def clip(settings: Config) -> Config:
    """How the CLIP is trained that settings name `toyworld`; raises as `told`."""
    _, world = supply.world_of(settings)
    return schema.parse(recipes.clip(world))


@functools.cache
def _entries(world: WorldConfig) -> int:
    """Of the tokenizer of a world, which is learned from its wordings in a moment."""
    texts = language.vocabulary_text(world, objects(world))
    return byte_level_bpe.train(texts, vocab_size=supply.BPE_ENTRIES).vocab_size
