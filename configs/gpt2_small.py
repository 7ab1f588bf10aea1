"""OpenAI's GPT-2 at any of its sizes, from scratch or from pretrained weights.

    python -m blindvalm_jax.convert --from=hf_gpt2 --input=openai-community/gpt2 --out=gpt2
    python -m blindvalm_jax.train --config=configs/gpt2_small.py[:SIZE] --workdir=DIR \
        --config.data.files='text/*.txt' --config.tokenizer.path=openai-community/gpt2 \
        --config.train.init_from=gpt2

SIZE: small (default), medium, large, xl. Without init_from it starts from random weights. To ground
a pretrained GPT-2 in a CLIP tower add --config.grounding.source=text --config.grounding.tower=CLIP:
the fusion layer starts as (nearly) an identity, and each token takes the feature of the last CLIP
token it may look at (docs/architecture.md, decision 6).
Time and result: not measured by this project yet.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """Settings of the run."""
    return presets.long_run(presets.gpt2(default(), size))
