"""The paper's long run of the small BLIND-VALM: 88,255 updates, 23.1 B tokens.

    python -m blindvalm_jax.train --config=configs/paper_long.py[:VARIANT] --workdir=DIR \
        --config.data.files='cc100/*.xz' --config.tokenizer.path=openai/clip-vit-large-patch14 \
        --config.grounding.tower=CLIP

Everything but the length is as in paper_small; data: CC-100 English, 14 of 40 shards.
Time and result: not measured by this project yet.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default


def get_config(variant: str = "blind") -> ml_collections.ConfigDict:
    """Settings of the run."""
    config = presets.long_run(presets.variant(presets.paper(default(), "small"), variant))
    config.train.steps = 88_255
    return config
