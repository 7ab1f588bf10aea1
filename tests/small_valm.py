"""A CLIP, images and windows of text, so small that VALM trains on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import PIL.Image

from blindvalm_jax.data import packing, tokenizers
from blindvalm_jax.interop import weights
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.vision import VisionConfig
from tests import small_models, small_text, tiny_tokenizers

LENGTH = 32
IMAGES = 300  # FAISS learns codes of 256 values
SIZE = 8  # of what the image tower reads


def write_clip(directory: Path, *, seed: int = 0) -> Path:
    """A CLIP of random weights in our format, with its tokenizer beside it."""
    vocab, merges = tiny_tokenizers.clip_parts()
    config = ClipConfig(
        text=TowerConfig(
            layers=1,
            width=16,
            heads=2,
            mlp_width=32,
            projection=16,
            vocab_size=len(vocab),
            context=18,
            start_id=len(vocab) - 2,
            end_id=len(vocab) - 1,
        ),
        vision=VisionConfig(kind="conv", image_size=SIZE, width=16, projection=16, channels=(4,)),
        temperature_start=10.0,
        temperature_cap=100.0,
    )

    def init(key: jax.Array) -> Any:
        images = np.zeros((1, SIZE, SIZE, 3), np.uint8)
        tokens, length = np.zeros((1, 2), np.int32), np.ones(1, np.int32)
        return nn.unbox(Clip(config).init(key, images, tokens, length))["params"]

    params = small_models.random_params(init, seed=seed)
    weights.save(directory, params, config=config, source="made for a test")
    return tiny_tokenizers.write_pair(directory, vocab, merges)


def write_images(folder: Path, *, count: int = IMAGES) -> Path:
    """Images of few large coloured fields, none of the size that the tower reads."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        fields = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        image = fields.repeat(3, axis=0).repeat(4, axis=1)
        PIL.Image.fromarray(image).save(folder / f"{number}.png")
        captions = [f"the picture {number}", "another caption"]
        lines.append(json.dumps({"image": f"{number}.png", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_windows(directory: Path, clip: Path) -> Path:
    """Windows of `LENGTH` tokens of the CLIP's tokenizer, training and held out."""
    text = small_text.write_text(directory.with_suffix(".txt"), small_text.documents(60))
    recipe = packing.Recipe(
        source=text,
        tokenizer=tokenizers.load("clip", str(clip)),
        sequence_length=LENGTH,
        longest_segment=16,
        eval_fraction=0.2,
    )
    packing.prepare(recipe, directory, workers=1)
    return directory
