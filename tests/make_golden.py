"""Writes tests/golden/*.npz: tiny Hugging Face models, and what transformers computes with them.

python tests/make_golden.py

Needs torch. Every parameter is random, norms and biases too, so that each one matters. A file
holds `config` (config.json as text), `tensor/NAME`, `ids` and `expected` (gpt2: logits [B, T, V];
clip: L2-normalised features [B, T, E] of every position, the start and end tokens included). That
of the image tower holds `images` instead of `ids`, and L2-normalised features [B, E].
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from blindvalm_jax.interop import tensor_files

GOLDEN = Path(__file__).parent / "golden"


def randomise(model: Any, *, seed: int, scale: float = 0.3) -> Any:
    """Every parameter N(0, scale^2), the weights of norms around 1; returns the model for use."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = any(part in name for part in ("ln_", "layer_norm", "layernorm"))
            centre = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gpt2_model(**sizes: Any) -> Any:
    """A random GPT-2 of these sizes; tiny unless given."""
    tiny = {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 12}
    sizes = {**tiny, "n_inner": 40, **sizes}
    last = sizes["vocab_size"] - 1
    config = transformers.GPT2Config(bos_token_id=last, eos_token_id=last, **sizes)
    return randomise(transformers.GPT2LMHeadModel(config), seed=1)


def clip_model(cls: Any, **sizes: Any) -> Any:
    """A random CLIPModel, CLIPTextModelWithProjection or CLIPTextModel; tiny unless given."""
    text = {
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 40,
        "projection_dim": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 14,
        **sizes,
    }
    text["bos_token_id"] = text["vocab_size"] - 2
    text["eos_token_id"] = text["vocab_size"] - 1
    if cls is not transformers.CLIPModel:
        return randomise(cls(transformers.CLIPTextConfig(**text)), seed=2)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 4,
        "patch_size": 2,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=text["projection_dim"]
    )
    return randomise(cls(config), seed=2)


def vision_model(cls: Any, **sizes: Any) -> Any:
    """A random CLIPModel, or CLIPVisionModelWithProjection, with this image side; tiny."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 40,
        "projection_dim": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        **sizes,
    }
    if cls is not transformers.CLIPModel:
        return randomise(cls(transformers.CLIPVisionConfig(**vision)), seed=4)
    text = clip_model(cls).config.text_config
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision, projection_dim=vision["projection_dim"]
    )
    return randomise(cls(config), seed=4)


def in_double(model: Any) -> Any:
    """A copy that computes in float64, so that a comparison sees our rounding alone.

    torch's own fp32 is no reference: the first threaded forward of a process is now and then
    6e-5 off (torch 2.13 on a CPU, scaled dot-product attention), every later one 1.4e-6.
    """
    return copy.deepcopy(model).double().eval()


def gpt2_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V], computed in float64."""
    with torch.no_grad():
        return in_double(model)(torch.tensor(ids)).logits.float().numpy()


def clip_features(model: Any, ids: np.ndarray) -> np.ndarray:
    """L2-normalised features [B, T, E] of every position, start and end tokens included."""
    model = in_double(model)
    with torch.no_grad():
        hidden = model.text_model(input_ids=torch.tensor(ids)).last_hidden_state
        features = model.text_projection(hidden)
    return (features / features.norm(dim=-1, keepdim=True)).float().numpy()


def image_features(model: Any, images: np.ndarray) -> np.ndarray:
    """L2-normalised features [B, E] of images [B, H, W, 3] of bytes."""
    mean, std = (np.array(x) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = torch.tensor(((images / 255.0 - mean) / std).transpose(0, 3, 1, 2))
    model = in_double(model)
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            pooled = model.get_image_features(pixel_values=pixels)
        else:
            pooled = model(pixel_values=pixels).image_embeds
    pooled = getattr(pooled, "pooler_output", pooled)
    return (pooled / pooled.norm(dim=-1, keepdim=True)).float().numpy()


def clip_ids(*, vocab_size: int, rows: int, length: int) -> np.ndarray:
    """Random texts between a start and an end token; id 0 is among them."""
    ids = np.random.default_rng(3).integers(0, vocab_size - 2, (rows, length))
    ids[0, 0] = 0
    special = np.full((rows, 1), vocab_size - 2)
    return np.concatenate([special, ids, special + 1], axis=1)


def random_images(*, rows: int, size: int) -> np.ndarray:
    """Random bytes [rows, size, size, 3]."""
    return np.random.default_rng(3).integers(0, 256, (rows, size, size, 3), np.uint8)


def gpt2_ids(*, vocab_size: int, rows: int, length: int) -> np.ndarray:
    """Random tokens; id 0 is among them."""
    ids = np.random.default_rng(3).integers(0, vocab_size, (rows, length))
    ids[0, 0] = 0
    return ids


def _write(name: str, model: Any, expected: np.ndarray, **inputs: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = (Path(directory) / "config.json").read_text()
        tensors = tensor_files.read_safetensors(Path(directory) / "model.safetensors")
    arrays = {f"tensor/{key}": value for key, value in tensors.items()}
    GOLDEN.mkdir(exist_ok=True)
    arrays |= {"config": np.array(config), **inputs, "expected": expected}
    np.savez_compressed(GOLDEN / f"{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    gpt2, ids = gpt2_model(), gpt2_ids(vocab_size=61, rows=2, length=12)
    _write("hf_gpt2", gpt2, gpt2_logits(gpt2, ids), ids=ids)
    clip = clip_model(transformers.CLIPModel)
    ids = clip_ids(vocab_size=67, rows=3, length=12)
    _write("hf_clip", clip, clip_features(clip, ids), ids=ids)
    tower = vision_model(transformers.CLIPVisionModelWithProjection)
    images = random_images(rows=3, size=12)
    _write("hf_clip_vision", tower, image_features(tower, images), images=images)
