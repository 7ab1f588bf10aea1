"""The paper's BLIND-VALM and its GPT-2 baseline: 124 M parameters, 10.6 B tokens of CC-100.

    python -m blindvalm_jax.train --config=configs/paper_small.py[:VARIANT] --workdir=DIR \
        --config.data.files='cc100/*.xz' --config.tokenizer.path=openai/clip-vit-large-patch14 \
        --config.grounding.tower=CLIP

VARIANT: blind (default), gpt2, eos, random_tower, shuffled; or valm, valm_eos, which search the
index of images that --config.grounding.index names (python -m blindvalm_jax.index build). CLIP:
RN50x16 in OpenAI's layout for the paper (width 768), or any other text tower. Data: CC-100 English,
6 of 40 shards.
Hardware: the paper used 4 A100; batch 512 x 512 tokens, so set train.microbatches to fit memory.
Expected: 40,600 updates, 262,144 tokens each. Time and result: not measured by this project yet.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default


def get_config(variant: str = "blind") -> ml_collections.ConfigDict:
    """Settings of the run."""
    return presets.long_run(presets.variant(presets.paper(default(), "small"), variant))
