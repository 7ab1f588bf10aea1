"""Decoders from 10 M to 3 B parameters with one recipe, for any system and sequence length.

Shapes of 124m to 774m are GPT-2's (Radford et al. 2019), of 1.3b and 2.7b GPT-3's (Brown et al.
2020, table 2.1; its 24 heads of 128 do not make the width 2048 of 1.3b: 16 do). The others are
ours. Learning rates and tokens an update follow that table by size; below it they are ours.
"""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from blindvalm_jax import presets
from blindvalm_jax.errors import UserError

LONGEST = 4096
DEFAULT_LENGTH = 1024
_TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022
_WARMUP_SHARE = 0.05  # of the updates, where the recipe's number is more than that
# CLIP ViT-L/14's text tower
TOWER_LAYERS, TOWER_WIDTH, TOWER_HEADS, TOWER_CONTEXT = 12, 768, 12, 77


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder; parameters: with GPT-2's vocabulary and 1,024 positions, without fusion.

    tokens: of an update.
    """

    layers: int
    width: int
    heads: int
    parameters: int
    learning_rate: float
    tokens: int = 2**19


SIZES = {
    "10m": Size(6, 160, 5, 10_060_960, 1e-3, 2**17),
    "25m": Size(7, 320, 5, 25_041_280, 1e-3, 2**18),
    "50m": Size(8, 512, 8, 51_475_968, 8e-4, 2**18),
    "124m": Size(12, 768, 12, 124_439_808, 6e-4),
    "355m": Size(24, 1024, 16, 354_823_168, 3e-4),
    "774m": Size(36, 1280, 20, 774_030_080, 2.5e-4),
    "1.3b": Size(24, 2048, 16, 1_313_626_112, 2e-4, 2**20),
    "2.7b": Size(32, 2560, 32, 2_648_931_840, 1.6e-4, 2**20),
    "3b": Size(36, 2560, 32, 2_963_637_760, 1.6e-4, 2**20),
}


def rung(config: ConfigDict, size: str, variant: str, length: int = DEFAULT_LENGTH) -> ConfigDict:
    """GPT-2's face and optimizer at a size, as any of `presets.VARIANTS`, on rows of `length`.

    Trained for 20 tokens a parameter. Without a CLIP the tower is random, of ViT-L/14's shape.

    Raises:
      UserError: there is no such size, variant or length.
    """
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if not 2 <= length <= LONGEST:
        raise UserError(f"length must be 2 ... {LONGEST} tokens, got {length}")
    shape = SIZES[size]
    presets.gpt2(config, "small")
    presets.long_run(presets.variant(config, variant))
    config.decoder.layers, config.decoder.width = shape.layers, shape.width
    config.decoder.heads = shape.heads
    config.data.sequence_length = config.decoder.max_positions = length
    config.train.batch_size = max(1, shape.tokens // length)
    config.train.steps = math.ceil(_TOKENS_A_PARAMETER * shape.parameters / shape.tokens)
    config.optimizer.warmup_steps = min(
        config.optimizer.warmup_steps, round(_WARMUP_SHARE * config.train.steps)
    )
    # The table's gradient is summed over devices for each chunk: eight of them at any length.
    config.train.loss_chunk = math.gcd(length, max(presets.LOSS_CHUNK, length // 8))
    config.optimizer.learning_rate = shape.learning_rate
    if config.grounding.source == "text":
        config.grounding.tower = "random"
    random = config.grounding.random
    random.layers, random.width, random.heads = TOWER_LAYERS, TOWER_WIDTH, TOWER_HEADS
    random.projection, random.context = TOWER_WIDTH, TOWER_CONTEXT
    return config


def parse(argument: str) -> tuple[str, str, int]:
    """SIZE[,VARIANT][,LENGTH], in any order, as size, variant and length.

    Raises:
      UserError: something else is there, or a word twice.
    """
    words = [word for word in argument.split(",") if word]
    sizes = [word for word in words if word in SIZES]
    names = [word for word in words if word in presets.VARIANTS]
    lengths = [word for word in words if word.isdecimal()]
    found = (sizes, names, lengths)
    if any(len(kind) > 1 for kind in found) or sum(map(len, found)) < len(words):
        raise UserError(
            f"expected a size ({', '.join(SIZES)}), a variant ({', '.join(presets.VARIANTS)}) and "
            f"a length in tokens, got {argument!r}"
        )
    length = int(lengths[0]) if lengths else DEFAULT_LENGTH
    return (sizes or ["124m"])[0], (names or ["blind"])[0], length
