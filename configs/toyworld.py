"""One model of the toy world.

    python -m blindvalm_jax.train --config=configs/toyworld.py:VARIANT --workdir=DIR

    configs/toyworld.py:blind_valm_eos    gpt2; blind_valm, valm, random_tower or shuffled,
    configs/toyworld.py:gpt2,3,0.05       each with _eos behind it for that readout; or clip; then
                                          the seed of the world and the share of statements about
                                          held-out objects

The world, its tokenizer, CLIP and image index are made first, in data.cache or <workdir>/data.
`python -m blindvalm_jax.toyworld` trains all variants, probes them and writes the report.
Hardware: 2 CPU cores, minutes for CLIP and as many for a language model.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld import recipes
from blindvalm_jax.toyworld.world import WorldConfig


def get_config(arguments: str = "blind_valm_eos") -> ml_collections.ConfigDict:
    """Settings of the run; arguments: VARIANT[,SEED[,STATED_HELDOUT]]."""
    variant, *numbers = arguments.split(",")
    try:
        if len(numbers) > 2:
            raise ValueError("too many")
        seed, stated = int(numbers[0]) if numbers else 0, float((numbers + ["0", "0"])[1])
    except ValueError as error:
        raise UserError(
            f"expected VARIANT[,SEED[,STATED_HELDOUT]] behind the colon, got {arguments!r}"
        ) from error
    world = WorldConfig(seed=seed, stated_heldout=stated)
    if variant not in (*recipes.VARIANTS, "clip"):
        known = ", ".join((*recipes.VARIANTS, "clip"))
        raise UserError(f"variant must be one of {known}, got {variant!r}")
    return recipes.clip(world) if variant == "clip" else recipes.language(world, variant)
