"""GPT-2, BLIND-VALM and VALM at equal compute in the toy world, for a laptop.

    python -m blindvalm_jax.sweep run --config=configs/sweeps/laptop_toyworld.py --workdir=DIR
    python -m blindvalm_jax.sweep report --config=configs/sweeps/laptop_toyworld.py --workdir=DIR

VALM finds its images in an IVF-PQ index (the extra `faiss`), as the paper did, and ranks 64 of them
again; with laptop_toyworld.py:exact it compares all with every token, most of what it then costs.
As many of the first command as there are cores, each on its own: `taskset -c 0 python ...`.
The world is that of configs/toyworld.py with a million sentences in the place of 20,000, so that
few are read twice; its CLIP and index are trained and built first, by one of the workers.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from blindvalm_jax.sweep import grids
from blindvalm_jax.toyworld import recipes
from blindvalm_jax.toyworld.world import ATTRIBUTES, WorldConfig

WORLD = WorldConfig(seed=20, sentences=1_000_000, validation_sentences=5000)
# Sizes and budgets were twice these at first: the best sizes lay at the small end, and at 3e12
# FLOPs all families were near the least loss that this text allows.
SIZES = ("2x12x2", "2x16x2", "2x24x2", "2x36x2", "3x40x4", "3x56x4", "4x64x4")
BUDGETS = (2e11, 4.5e11, 1e12, 2.2e12)


def get_config(search: str = "faiss") -> ConfigDict:
    """The sweep; search: how VALM finds its images, faiss or exact."""
    config = grids.default()
    base = config.base = recipes.language(WORLD, "valm")
    base.grounding.search = search
    base.grounding.rerank = 64 if search == "faiss" else 0
    config.families = grids.variants(base, ("gpt2", "blind", "eos", "valm"))
    base.optimizer.schedule = "constant_cooldown"
    base.eval.every_steps = base.eval.tasks_every_steps = base.checkpoint.every_steps = 10**9
    base.eval.tasks = ",".join(f"toyworld_{attribute}" for attribute in ATTRIBUTES)
    base.eval.tasks_data = recipes.OWN
    base.log.every_steps = 50
    grid = config.grid
    grid.sizes, grid.budgets = SIZES, BUDGETS
    grid.rules.update(
        reference=250_000.0,
        learning_rate=4e-3,
        learning_rate_exponent=-0.3,
        batch_size=16.0,
    )
    return config
