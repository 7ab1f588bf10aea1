r"""GPT-2, BLIND-VALM and VALM at equal compute on your own text, for a laptop.

    python -m blindvalm_jax.sweep run --config=configs/sweeps/laptop_text.py:BPE,CLIP,INDEX \
        --workdir=DIR --config.base.data.files='text/*.txt.gz'
    python -m blindvalm_jax.sweep report (all as above)

As many of the first command as there are cores, each on its own: `taskset -c 0 python ...`.
BPE: a tokenizer's directory; CLIP: a run of configs/clip.py with it; INDEX: of images embedded with
that (python -m blindvalm_jax.index build). docs/scaling_experiments.md has the commands that make
all three from text and a folder of images.
Tasks: --config.base.eval.tasks=memory_colors,shapeit --config.base.eval.tasks_data=FOLDER.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import grids

SIZES = ("2x10x2", "2x14x2", "2x22x2", "2x34x2", "3x48x4", "3x68x4", "4x88x4")
BUDGETS = (3e11, 6e11, 1.2e12, 2.4e12)


def get_config(arg: str = "") -> ConfigDict:
    """The sweep; arg: BPE,CLIP,INDEX."""
    words = arg.split(",")
    if len(words) != 3 or not all(words):
        raise UserError(f"expected BPE,CLIP,INDEX behind the colon, got {arg!r}")
    bpe, clip, index = words
    config = grids.default()
    base = config.base
    base.tokenizer.kind, base.tokenizer.path = "train", bpe
    base.data.sequence_length = 128
    base.train.dtype = base.grounding.dtype = "float32"
    base.decoder.dropout = base.decoder.attention_dropout = 0.0
    optimizer = base.optimizer
    optimizer.schedule = "constant_cooldown"
    optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm = 0.98, 0.1, 1.0
    optimizer.epsilon_beside, optimizer.decay = "corrected", "matrices"
    base.eval.windows = 0
    base.eval.every_steps = base.eval.tasks_every_steps = base.checkpoint.every_steps = 10**9
    base.grounding.tower, base.grounding.index = clip, index
    config.families = grids.variants(base, ("gpt2", "blind", "eos", "valm"))
    config.grid.sizes, config.grid.budgets = SIZES, BUDGETS
    config.grid.rules.update(
        reference=170_000.0,
        # Tried at 6e11 and 8e11 FLOPs: 16e-3 is better than 8e-3, or within 0.003 nats of it, in
        # eight pairs of runs from 44 k to 0.28 M parameters; at 0.74 M 8e-3 is, and than 4e-3.
        learning_rate=12e-3,
        learning_rate_exponent=-0.3,
        batch_size=4.0,
    )
    return config
