"""A BLIND-VALM with GPT-2's tokens whose tower has CLIP's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from blindvalm_jax.interop import weights
from tests import foreign_models, test_train, tiny_tokenizers


def write(root: Path) -> dict[str, Any]:
    """Random weights and tokenizers below a directory; the arguments of `NamedModel`."""
    vocab, merges = tiny_tokenizers.clip_parts()
    clip = test_train.write_tower(root / "clip", vocab_size=len(vocab))
    tiny_tokenizers.write_pair(clip, vocab, merges)
    bpe = tiny_tokenizers.write_pair(root / "gpt2", *tiny_tokenizers.gpt2_parts())
    spec = dataclasses.replace(
        foreign_models.BLIND,
        decoder=dataclasses.replace(foreign_models.BLIND.decoder, vocab_size=0),
        vocab_size=len(tiny_tokenizers.gpt2_parts()[0]),
        memory_width=24,
    )
    params = foreign_models.random_params(spec)
    weights.save(root / "decoder", params, config=spec, source="made for a test")
    return {
        "checkpoint": str(root / "decoder"),
        "tower": str(clip),
        "tower_tokenizer": str(clip),
        "tokenizer": str(bpe),
    }
