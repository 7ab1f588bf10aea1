"""Writes tests/golden/scores_*.npz: random models, and how torch scores small tasks with them.

python -m tests.make_golden_scores

Needs torch. A file holds `config` and `tensor/NAME` of a model of transformers (GPT-2; of a
BLIND-VALM its CLIP), `decoder/NAME` of a BLIND-VALM's decoder in fairseq's names, and
`expected/TASK/PROTOCOL/WAY`: scores [questions, candidates] in float64, see `plain_scores`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from blindvalm_jax.interop import tensor_files
from tests import make_golden, plain_scores, tiny_tokenizers, torch_blind

POSITIONS = 160
# Under which rule of segments the tower reads: the scripts' own, and the one without look-ahead.
RULES = {"published": "reference", "corrected": "causal"}

Expected = dict[str, np.ndarray]


def gpt2() -> Any:
    """A random GPT-2 over the tiny vocabulary."""
    size = len(tiny_tokenizers.gpt2_parts()[0])
    return make_golden.gpt2_model(
        vocab_size=size, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2
    )


def clip() -> Any:
    """A random text tower of CLIP over the tiny vocabulary."""
    size = len(tiny_tokenizers.clip_parts()[0])
    return make_golden.clip_model(
        transformers.CLIPTextModelWithProjection, vocab_size=size, projection_dim=16
    )


def decoder() -> dict[str, np.ndarray]:
    """Random tensors of fairseq's decoder of three layers, the second of them fused."""
    width, size = 16, len(tiny_tokenizers.clip_parts()[0]) + 4
    linear = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")}
    linear |= {"fc1": (40, width), "fc2": (width, 40)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (size, width)}
    norms = ["layer_norm", "layers.1.self_attn.img_layer_norm"]
    for layer in range(3):
        for name, shape in linear.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        norms += [f"layers.{layer}.{x}_layer_norm" for x in ("self_attn", "final")]
    shapes |= {f"layers.1.self_attn.img_{x}_proj.bias": (width,) for x in "kv"}
    shapes |= {f"{name}.{x}": (width,) for name in norms for x in ("weight", "bias")}
    generator = np.random.default_rng(5)
    return {
        name: (
            0.3 * generator.standard_normal(shape) + (name.endswith("layer_norm.weight"))
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def gpt2_scores(model: Any, data: Path, task: str, protocol: str) -> Expected:
    """Scores of a GPT-2 by transformers, model and tokenizer."""
    model = make_golden.in_double(model)

    @functools.cache
    def log_p(tokens: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
            return torch.log_softmax(logits, dim=-1).numpy()

    with tempfile.TemporaryDirectory() as directory:
        pair = tiny_tokenizers.write_pair(Path(directory), *tiny_tokenizers.gpt2_parts())
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(str(pair))
    return _scores(task, protocol, data, tokenizer.encode, tokenizer.eos_token_id, log_p)


def blind_scores(data: Path, task: str, protocol: str) -> Expected:
    """Scores of the BLIND-VALM, the tower by transformers."""
    with tempfile.TemporaryDirectory() as directory:
        pair = tiny_tokenizers.write_pair(Path(directory), *tiny_tokenizers.clip_parts())
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(pair))

    def encode(text: str) -> list[int]:
        clean = tiny_tokenizers.reference_clean(text)
        return [index + 4 for index in tokenizer.encode(clean, add_special_tokens=False)]

    pieces = {
        mark: tokenizer.convert_tokens_to_ids(f"{mark}</w>") for mark in (*".;!:,/-?)", "...")
    }
    model = torch_blind.Blind(
        torch_blind.Decoder(decoder(), heads=2, fused=1),
        clip(),
        pieces=pieces,
        rule=RULES[protocol],
    )
    return _scores(task, protocol, data, encode, 2, functools.cache(model.log_p))


def _scores(
    task: str,
    protocol: str,
    data: Path,
    encode: Callable[[str], list[int]],
    end_id: int,
    log_p: Callable[[tuple[int, ...]], np.ndarray],
) -> Expected:
    def of(tokens: Sequence[int]) -> np.ndarray:
        return log_p(tuple(tokens))

    return plain_scores.scores(task, protocol, data, encode=encode, end_id=end_id, log_p=of)


def everything(score: Callable[[Path, str, str], Expected]) -> Expected:
    """Of all tasks under both protocols, by the names that a file has."""
    found: Expected = {}
    with tempfile.TemporaryDirectory() as directory:
        data = plain_scores.write_files(Path(directory))
        for task in plain_scores.TASKS:
            for protocol in plain_scores.PROTOCOLS:
                ways = score(data, task, protocol)
                found |= {f"expected/{task}/{protocol}/{way}": x for way, x in ways.items()}
    return found


def _write(name: str, model: Any, **arrays: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = (Path(directory) / "config.json").read_text()
        tensors = tensor_files.read_safetensors(Path(directory) / "model.safetensors")
    found = {"config": np.array(config), **{f"tensor/{key}": x for key, x in tensors.items()}}
    found |= arrays
    np.savez_compressed(make_golden.GOLDEN / f"{name}.npz", allow_pickle=False, **found)


if __name__ == "__main__":
    model = gpt2()
    _write("scores_gpt2", model, **everything(functools.partial(gpt2_scores, model)))
    tensors = {f"decoder/{name}": x for name, x in decoder().items()}
    _write("scores_blind", clip(), **tensors, **everything(blind_scores))
