"""The paper's medium BLIND-VALM: 355 M parameters (24 x 1024), 10.6 B tokens of CC-100.

    python -m blindvalm_jax.train --config=configs/paper_medium.py[:VARIANT] --workdir=DIR \
        --config.data.files='cc100/*.xz' --config.tokenizer.path=openai/clip-vit-large-patch14 \
        --config.grounding.tower=CLIP

VARIANT as in paper_small. CLIP: RN50x64 has features of width 1024; those of another width are
joined by a learned projection. Data, batch and updates as in paper_small.
Hardware: the paper used 8 A100. Time and result: not measured by this project yet.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default


def get_config(variant: str = "blind") -> ml_collections.ConfigDict:
    """Settings of the run."""
    return presets.long_run(presets.variant(presets.paper(default(), "medium"), variant))
