"""Writes a CLIP text tower of random weights in Hugging Face's format, with a given tokenizer.

    python -m benchmarks.random_clip --tokenizer=DIR --out=DIR [--layers=6 --width=256 --heads=4]

For measurements where no pretrained CLIP is at hand: the loading path and the cost are the real
ones, the knowledge is not there. Needs the torch extra.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "CLIP's tokenizer directory.", required=True)
_LAYERS = flags.DEFINE_integer("layers", 6, "Blocks.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 256, "Model width.", lower_bound=2)
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
_PROJECTION = flags.DEFINE_integer("projection", 256, "Width of the features.", lower_bound=1)


def main(argv: Sequence[str]) -> int:
    """Makes the model with transformers, seed 0, and copies the tokenizer beside it."""
    del argv
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError("this needs torch: pip install -e '.[torch]'") from error
    torch.manual_seed(0)
    shape = transformers.CLIPTextConfig(
        num_hidden_layers=_LAYERS.value,
        hidden_size=_WIDTH.value,
        intermediate_size=4 * _WIDTH.value,
        num_attention_heads=_HEADS.value,
        projection_dim=_PROJECTION.value,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    out = Path(_OUT.value)
    transformers.CLIPTextModelWithProjection(shape).save_pretrained(out)
    for path in Path(_TOKENIZER.value).iterdir():
        shutil.copy(path, out / path.name)
    return 0


if __name__ == "__main__":
    run_main(main)
