"""VALM as its own paper trained it (arXiv 2205.10178): 124 M parameters, 32.8 B tokens of CC-100.

    python -m blindvalm_jax.index build --clip=CLIP --images=photos --out=index
    python -m blindvalm_jax.train --config=configs/paper_valm.py[:VARIANT] --workdir=DIR \
        --config.data.files='cc100/*.xz' --config.tokenizer.path=openai/clip-vit-large-patch14 \
        --config.grounding.tower=CLIP --config.grounding.index=index

VARIANT as in paper_small, here valm by default. The decoder is BLIND-VALM's; batch, updates,
learning rate and precision are VALM's (500,000 updates of 65,536 tokens, 5e-4, no half precision).
The paper searched 191.5 M images of LAION with FAISS: add --config.grounding.search=faiss.
To compare with BLIND-VALM at equal batches and updates take paper_small.py:valm instead.
Hardware: the paper used 16 GPUs. Time and result: not measured by this project yet.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default


def get_config(variant: str = "valm") -> ml_collections.ConfigDict:
    """Settings of the run."""
    config = presets.long_run(presets.variant(presets.paper(default(), "small"), variant))
    config.train.batch_size = 128  # rows of 512: 65,536 tokens an update
    config.train.steps = 500_000
    config.train.dtype = "float32"
    config.optimizer.learning_rate = 5e-4
    return config
