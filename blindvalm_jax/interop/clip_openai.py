"""CLIP text towers in OpenAI's and open_clip's layout: `transformer.resblocks.N`.

Which GELU a tower was trained with cannot be seen in its tensors, and a wrong one gives features
that are wrong without looking so. It is decided in this order:
1. `activation`, when the caller gives it;
2. open_clip's own config (`open_clip_config.json` beside the weights): quick_gelu when it says
   "quick_gelu": true, the exact GELU otherwise, as open_clip does;
3. quick_gelu for OpenAI's own files, known by the entries `input_resolution`, `context_length` and
   `vocab_size` that only they carry beside the weights: OpenAI trained all its CLIPs with it;
4. otherwise nothing is assumed: the activation must be given.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import fields, rules, tensor_files, weights
from blindvalm_jax.interop.rules import Rule, Tensors
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.transformer import ACTIVATIONS

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP = (OPEN_CLIP_CONFIG, *OPEN_CLIP_FILES)

# Numbers that OpenAI's archives carry among the tensors.
OPENAI_ENTRIES = {"input_resolution", "context_length", "vocab_size"}

# Fields of open_clip's text_cfg that change the tower, and the only value that ours has.
_FIXED: dict[str, Any] = {
    "hf_model_name": None,
    "ls_init_value": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    "output_tokens": False,
    "eos_id": 2,
    "act_kwargs": None,
    "norm_kwargs": None,
}
# What open_clip takes for one that is absent; all other sizes are seen in the tensors.
_HEADS, _QUICK_GELU = {"heads": fields.size(8)}, {"quick_gelu": fields.switch(False)}
_SIZES = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")


def model_rules() -> list[Rule]:
    """Embeddings, final norm, projection (used as x @ P, so not transposed)."""
    return [
        rules.same("token_embedding", "token_embedding.weight"),
        rules.same("position_embedding", "positional_embedding"),
        *rules.norm("ln_final", "ln_final"),
        rules.same("text_projection", "text_projection"),
    ]


def block_rules(index: int, *, heads: int) -> list[Rule]:
    """One residual attention block; q, k, v are rows of one matrix [3 D, D]."""
    layer = f"transformer.resblocks.{index}"

    def load_kernel(weight: np.ndarray) -> np.ndarray:
        width = weight.shape[1]
        return weight.T.reshape(width, 3, heads, width // heads)

    def save_kernel(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        return (kernel.reshape(kernel.shape[0], -1).T,)

    return [
        *rules.norm("ln_1", f"{layer}.ln_1"),
        Rule("attn/qkv/kernel", (f"{layer}.attn.in_proj_weight",), load_kernel, save_kernel),
        rules.packed_bias(f"{layer}.attn.in_proj_bias", heads),
        *rules.attention_output(f"{layer}.attn.out_proj", heads),
        *rules.norm("ln_2", f"{layer}.ln_2"),
        *rules.linear("c_fc", f"{layer}.mlp.c_fc"),
        *rules.linear("c_proj", f"{layer}.mlp.c_proj"),
    ]


def load_params(tensors: Tensors, *, config: TowerConfig, source: str) -> dict[str, Any]:
    """Our tower parameters from the text part of an OpenAI or open_clip checkpoint."""
    return rules.load(
        tensors,
        model=model_rules(),
        block=lambda index: block_rules(index, heads=config.heads),
        layers=config.layers,
        source=source,
    )


def load(
    path: Path,
    *,
    heads: int | None = None,
    activation: str | None = None,
    content: Any = None,
) -> tuple[TowerConfig, dict[str, Any]]:
    """The tower's config and our parameters, from a file or an open_clip directory.

    heads: needed where no open_clip config gives them and the width is no multiple of 64 (OpenAI's
    heads are 64 wide). activation: see the module. content: of a torch file, when it has been read.

    Raises:
      UserError: the tensors do not fit, or something about the tower cannot be known.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in OPEN_CLIP_FILES if (path / name).exists()]
        if not found:
            raise UserError(f"{path} holds no weights: expected {' or '.join(OPEN_CLIP_FILES)}")
        file = found[0]
    text, from_openai = _text_tensors(_read(file, content), str(file))
    settings = None
    if (file.parent / OPEN_CLIP_CONFIG).exists():
        settings = _open_clip_settings(file.parent / OPEN_CLIP_CONFIG)
    if activation is None and settings is not None:
        activation = "quick_gelu" if settings["quick_gelu"] else "gelu_erf"
    elif activation is None and from_openai:
        activation = "quick_gelu"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: the tensors do not say which GELU the tower uses: tell convert by "
            f"--activation, one of {', '.join(ACTIVATIONS)} (OpenAI's weights: quick_gelu), "
            f"or put open_clip's {OPEN_CLIP_CONFIG} beside the file; got {activation!r}"
        )
    config = _tower_config(text, settings, heads=heads, activation=activation, source=str(file))
    params = load_params(text, config=config, source=str(file))
    weights.check(params, config, str(file))
    return config, params


def has_layout(names: set[str]) -> bool:
    """Whether tensor names are those of an OpenAI or open_clip text tower."""
    return any(re.match(r"(text\.)?transformer\.resblocks\.\d", name) for name in names)


def _read(file: Path, content: Any) -> dict[str, np.ndarray]:
    def skip(name: str) -> bool:
        return name.startswith("visual.")

    if file.suffix == ".safetensors":
        return tensor_files.read_safetensors(file, skip=skip)
    content = tensor_files.read_torch(file) if content is None else content
    return tensor_files.state_dict(content, file, skip=skip)


def _text_tensors(tensors: Tensors, source: str) -> tuple[dict[str, np.ndarray], bool]:
    """Text tensors without open_clip's prefix `text.`, and whether the file is OpenAI's."""
    names = {n for n in tensors if not n.startswith("visual.") and n != "logit_scale"}
    from_openai = names >= OPENAI_ENTRIES
    names -= OPENAI_ENTRIES
    if not has_layout(names):
        raise UserError(
            f"{source} is no OpenAI or open_clip tower: no tensor transformer.resblocks.N among "
            f"{sorted(names)[:4]}; for a Hugging Face model give its directory"
        )
    prefixed = any(name.startswith("text.") for name in names)
    return {n.removeprefix("text.") if prefixed else n: tensors[n] for n in names}, from_openai


def _open_clip_settings(path: Path) -> dict[str, Any]:
    """Heads and activation from open_clip's config; what our tower does not have is refused."""
    content = files.read_object(path)
    model = fields.table(content, "model_cfg", str(path)) or content
    text = fields.table(model, "text_cfg", str(path))
    if text is None:
        raise UserError(f"{path} must hold model_cfg with text_cfg")
    odd = [k for k, value in text.items() if k not in _SIZES and value != _FIXED.get(k, value)]
    odd += [k for k in text if k not in _SIZES and k not in _FIXED]
    if odd:
        given = ", ".join(f"{key}={text[key]!r}" for key in odd)
        raise UserError(f"{path}: this tower does not have the options {given}")
    return {
        **fields.read(text, _HEADS, f"{path}: text_cfg"),
        **fields.read(model, _QUICK_GELU, str(path)),
    }


def _tower_config(
    text: Tensors,
    settings: dict[str, Any] | None,
    *,
    heads: int | None,
    activation: str,
    source: str,
) -> TowerConfig:
    """Sizes from the tensors' shapes; heads from the caller, open_clip's config, or width / 64."""
    table = _matrix(text, "token_embedding.weight", source)
    width = table.shape[1]
    if heads is None and settings is not None:
        heads = settings["heads"]
    if heads is None and width % 64 == 0:
        heads = width // 64
    if heads is None or heads < 1 or width % heads:
        raise UserError(
            f"{source}: tell convert by --heads, a divisor of the tower's width {width}; "
            f"got {heads}"
        )
    layers = {int(m[1]) for n in text if (m := re.match(r"transformer\.resblocks\.(\d+)\.", n))}
    return TowerConfig(
        layers=max(layers) + 1,
        width=width,
        heads=heads,
        mlp_width=_matrix(text, "transformer.resblocks.0.mlp.c_fc.weight", source).shape[0],
        projection=_matrix(text, "text_projection", source).shape[1],
        vocab_size=table.shape[0],
        context=_matrix(text, "positional_embedding", source).shape[0],
        activation=activation,
        start_id=table.shape[0] - 2,
        end_id=table.shape[0] - 1,
    )


def _matrix(tensors: Tensors, name: str, source: str) -> np.ndarray:
    if name not in tensors or tensors[name].ndim != 2:
        got = tensors[name].shape if name in tensors else f"none among {sorted(tensors)[:8]}"
        raise UserError(f"{source}: expected a matrix {name}, got {got}")
    return tensors[name]
