"""Any text, any size: a BLIND-VALM or a control on your own files.

    python -m blindvalm_jax.train --config=configs/text.py[:SIZE,VARIANT] --workdir=DIR \
        --config.data.files='mine/*.txt,more/*.jsonl.gz' --config.grounding.tower=CLIP

SIZE: tiny, mini (default), small, medium, large, xl. VARIANT: blind (default), gpt2, eos,
random_tower, shuffled; or valm, valm_eos, which search an index of images made with that CLIP: add
--config.grounding.index=INDEX (python -m blindvalm_jax.index build). CLIP: a directory, a run of
configs/clip.py or a hub id; without one the tower has random weights, and the run is a control.
A BPE is learned from the text. To train on the CLIP's own tokens, as the paper does and a CLIP with
a learned BPE needs, add --config.tokenizer.path=CLIP, and for CLIP's own BPE
--config.tokenizer.kind=clip. Documents are separated by blank lines in .txt; .jsonl has them in the
field data.text_field.
Hardware: tiny and mini train on a laptop: mini took about 90 minutes for 2.87 M tokens on one CPU
core (docs/results.md).
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default
from blindvalm_jax.errors import UserError


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Settings of the run."""
    words = [word for word in arg.split(",") if word]
    sizes = [word for word in words if word in presets.SIZES]
    names = [word for word in words if word in presets.VARIANTS]
    if len(sizes) > 1 or len(names) > 1 or len(sizes) + len(names) < len(words):
        raise UserError(
            f"configs/text.py takes a size ({', '.join(presets.SIZES)}) and a variant "
            f"({', '.join(presets.VARIANTS)}); got {arg!r}"
        )
    size, name = (sizes or ["mini"])[0], (names or ["blind"])[0]
    config = presets.variant(presets.sized(default(), size), name)
    config.tokenizer.kind = "train"
    if config.grounding.source != "images":
        config.grounding.tower = "random"
    config.data.sequence_length = 256
    config.decoder.attention_dropout = 0.0
    config.train.steps = 2000
    config.train.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.epsilon_beside = "corrected"
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay = "matrices"
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every_steps = 250
    config.eval.every_steps = 250
    return config
