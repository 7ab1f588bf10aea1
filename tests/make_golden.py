"""Writes tests/golden/*.npz: tiny Hugging Face models, and what transformers computes with them.

python tests/make_golden.py

Needs torch. Every parameter is random, norms and biases too, so that each one matters. A file
holds `config` (config.json as text), `tensor/NAME`, `ids` and `expected` (gpt2: logits [B, T, V];
clip: L2-normalised features [B, T, E] of every position, the start and end tokens included).
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

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


def clip_ids(*, vocab_size: int, rows: int, length: int) -> np.ndarray:
    """Random texts between a start and an end token; id 0 is among them."""
    ids = np.random.default_rng(3).integers(0, vocab_size - 2, (rows, length))
    ids[0, 0] = 0
    special = np.full((rows, 1), vocab_size - 2)
    return np.concatenate([special, ids, special + 1], axis=1)


def gpt2_ids(*, vocab_size: int, rows: int, length: int) -> np.ndarray:
    """Random tokens; id 0 is among them."""
    ids = np.random.default_rng(3).integers(0, vocab_size, (rows, length))
    ids[0, 0] = 0
    return ids


def _write(name: str, model: Any, ids: np.ndarray, expected: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = (Path(directory) / "config.json").read_text()
        tensors = tensor_files.read_safetensors(Path(directory) / "model.safetensors")
    arrays = {f"tensor/{key}": value for key, value in tensors.items()}
    GOLDEN.mkdir(exist_ok=True)
    arrays |= {"config": np.array(config), "ids": ids, "expected": expected}
    np.savez_compressed(GOLDEN / f"{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    gpt2, ids = gpt2_model(), gpt2_ids(vocab_size=61, rows=2, length=12)
    _write("hf_gpt2", gpt2, ids, gpt2_logits(gpt2, ids))
    clip = clip_model(transformers.CLIPModel)
    ids = clip_ids(vocab_size=67, rows=3, length=12)
    _write("hf_clip", clip, ids, clip_features(clip, ids))
