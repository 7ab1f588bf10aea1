"""One recipe at nine sizes, 10 M to 3 B parameters, for GPT-2, BLIND-VALM, VALM and the controls.

    python -m blindvalm_jax.train --config=configs/ladder.py[:SIZE,VARIANT,LENGTH] --workdir=DIR \
        --config.data.files='text/*.jsonl.zst' --config.tokenizer.path=openai-community/gpt2 \
        --config.grounding.tower=CLIP --config.mesh.fsdp=8

SIZE: 10m, 25m, 50m, 124m (default), 355m, 774m, 1.3b, 2.7b, 3b. VARIANT: blind (default), gpt2,
eos, random_tower, shuffled; or valm, valm_eos with --config.grounding.index=INDEX. LENGTH: tokens
of a row (1024), up to 4096. Without a CLIP the tower has random weights and ViT-L/14's shape.
Trained for 20 tokens a parameter in updates of 131,072 to 1,048,576 tokens, 2,000 of them warm-up
or, where that is less, 5 %.
Which size fits where, and --dry_run without any data: docs/scaling_up.md. What is slower and
smaller: --config.train.remat=full, more --config.train.microbatches, a larger mesh.fsdp.
Time and result: not measured by this project.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import ladder
from blindvalm_jax.config import default


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Settings of the run."""
    return ladder.rung(default(), *ladder.parse(arg))
