"""The paper's question at its own scale, for a pod: which family wins within VALM's compute budget.

    python -m blindvalm_jax.sweep cost --config=configs/sweeps/paper.py [--mfu=0.4]
    python -m blindvalm_jax.sweep run --config=configs/sweeps/paper.py:CLIP,INDEX --workdir=DIR \
        --config.base.data.files='cc100/*.xz' --config.base.tokenizer.path=CLIP_BPE

GPT-2, BLIND-VALM (with either readout) and VALM at seven sizes from 30 M to 537 M parameters, and
four budgets of which the third is about that of the paper's BLIND-VALM (1.0e19 FLOPs) and the last
that of its medium one (2.5e19). Settings are those of configs/paper_small.py but for the schedule,
a constant rate and a cooldown, so that lengths of a size share a trunk, and for learning rate and
batch, which grow with N as the rules below say, from the paper's values at its small size (VALM's
own learning rate there, 5e-4: the paper's 2e-3 goes with a rate that falls from the 4,000th update
on). CLIP: RN50x16 in OpenAI's layout, INDEX: of images embedded with it; without them, a tower of
that shape and 191.5 M vectors are counted by their sizes. VALM searches on its host (IVF-PQ), so
its runs take one process each.
Hardware and device-hours: `sweep cost` and docs/scaling_experiments.md. Result: not measured.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from blindvalm_jax import ladder, presets
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import grids

# From 30 M to 537 M parameters, with CLIP's vocabulary of 49,412.
SIZES = (
    *("6x384x6", "8x512x8", "10x640x10", "12x768x12"),
    *("16x896x14", "20x1024x16", "24x1280x20"),
)
BUDGETS = (1e18, 3e18, 1e19, 2.5e19)


def get_config(arg: str = "") -> ConfigDict:
    """The sweep; arg: CLIP,INDEX."""
    clip, _, index = arg.partition(",")
    if bool(clip) != bool(index):
        raise UserError(f"expected CLIP,INDEX behind the colon, or nothing, got {arg!r}")
    config = grids.default()
    base = presets.long_run(presets.variant(presets.paper(config.base, "small"), "valm"))
    base.grounding.tower = clip
    base.grounding.random.update(
        layers=ladder.TOWER_LAYERS,
        width=ladder.TOWER_WIDTH,
        heads=ladder.TOWER_HEADS,
        projection=ladder.TOWER_WIDTH,
        context=ladder.TOWER_CONTEXT,
    )
    base.grounding.search, base.grounding.index = "faiss", index or "vectors:191500000"
    base.optimizer.schedule = "constant_cooldown"
    base.eval.windows = 0
    config.families = grids.variants(base, ("gpt2", "blind", "eos", "valm"))
    for name in ("blind", "eos"):
        config.families[name].grounding.tower = clip or "random"
    config.grid.sizes, config.grid.budgets = SIZES, BUDGETS
    config.grid.rules.update(
        reference=123e6,
        learning_rate=5e-4,
        learning_rate_exponent=-0.25,
        batch_size=512.0,
        batch_exponent=0.5,
    )
    return config
