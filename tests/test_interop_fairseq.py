"""fairseq checkpoints: what they state, what must be given, what is refused."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import fairseq
from tests.foreign_models import BLIND, assert_equal, logits, random_params, write_tensors


def _checkpoint(*, prefix: str = "decoder.") -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, with those the reference saves and never uses."""
    tensors = fairseq.save_decoder(
        random_params(BLIND), vocab_size=50, layers=4, heads=2, fusion_layers=(2,)
    )
    tensors["output_projection.weight"] = tensors["embed_tokens.weight"]
    tensors["embed_positions._float_tensor"] = np.zeros(1, np.float32)
    tensors["version"] = np.full(1, 3.0, np.float32)
    for x in "kv":
        tensors[f"layers.2.self_attn.img_{x}_proj.weight"] = np.ones((16, 16), np.float32)
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["decoder.", ""])
def test_sizes_and_fusion_layer_come_from_the_tensors(prefix: str, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "c.safetensors", _checkpoint(prefix=prefix))
    spec, params = fairseq.load_checkpoint(path, heads=2, vocab_multiple=16)
    assert spec == BLIND
    assert_equal(params, random_params(BLIND))


@pytest.mark.parametrize("case", ["decoder_gpt_a", "decoder_blind_a", "decoder_blind_midpad_a"])
def test_reference_logits(case: str, shared: Path, tmp_path: Path) -> None:
    with np.load(shared / "golden" / f"{case}.npz") as file:
        arrays = dict(file)
    tensors = {f"decoder.{n[2:]}": x for n, x in arrays.items() if n.startswith("w/")}
    path = write_tensors(tmp_path / "c.safetensors", tensors)
    spec, params = fairseq.load_checkpoint(path, heads=4)
    assert spec.fusion_layers == (() if "gpt" in case else (2,))
    valid = arrays["valid"].astype(bool)
    got = logits(spec, params, arrays["tokens"], arrays.get("image_features"), valid)
    # The tolerance the cases name: fp32 against fp32, 5e-6 off fp64 themselves.
    np.testing.assert_allclose(got[valid], arrays["out/logits"][valid], atol=1e-4, rtol=0)


def _broken(tensors: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    if case == "missing":
        del tensors["decoder.layers.2.self_attn.img_layer_norm.bias"]
    elif case == "unknown":
        tensors["decoder.layers.1.adapter.weight"] = np.zeros(2, np.float32)
    elif case == "outside":
        tensors["encoder.visual.conv1.weight"] = np.zeros(2, np.float32)
    elif case == "untied":
        tensors["decoder.output_projection.weight"] = np.ones((50, 16), np.float32)
    elif case == "learned":
        tensors["decoder.embed_positions.weight"] = np.ones((50, 16), np.float32)
    elif case == "uneven":
        tensors["decoder.layers.3.fc1.bias"] = np.zeros(41, np.float32)
    elif case == "not fairseq":
        tensors = {"h.0.attn.c_attn.weight": np.zeros((16, 48), np.float32)}
    elif case == "no embedding":
        del tensors["decoder.embed_tokens.weight"], tensors["decoder.output_projection.weight"]
    return tensors


@pytest.mark.parametrize(
    ("case", "heads", "message"),
    [
        ("whole", None, "give --heads, a divisor of the width 16; got None"),
        ("whole", 5, "give --heads, a divisor of the width 16; got 5"),
        ("missing", 2, "missing ['layers.2.self_attn.img_layer_norm.bias']"),
        ("unknown", 2, "not understood ['layers.1.adapter.weight']"),
        ("outside", 2, "outside the decoder, not understood: ['encoder.visual.conv1.weight']"),
        ("untied", 2, "output_projection.weight differs from embed_tokens.weight"),
        ("learned", 2, "not understood ['embed_positions.weight']"),
        ("uneven", 2, "c_fc/bias must be float32[1, 40], got float32[1, 41]"),
        ("not fairseq", 2, "is no fairseq decoder"),
        ("no embedding", 2, "expected the matrices embed_tokens.weight and layers.0.fc1.weight"),
    ],
)
def test_misfits_are_named(case: str, heads: int | None, message: str, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "c.safetensors", _broken(_checkpoint(), case))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        fairseq.load_checkpoint(path, heads=heads)
    assert "\n" not in str(caught.value)


def _save_pt(path: Path, **entries: Any) -> Path:
    import torch

    state = {name: torch.tensor(value).half() for name, value in _checkpoint().items()}
    torch.save({"model": state, "extra_state": {"epoch": 3}, **entries}, path)
    return path


ARGUMENTS: dict[str, Any] = {
    "arch": "transformer_lm_gpt",
    "decoder_attention_heads": 2,
    "activation_fn": "gelu_accurate",
    "dropout": 0.2,
    "attention_dropout": 0.3,
    "no_scale_embedding": True,
    "no_token_positional_embeddings": False,
}


@pytest.mark.torch
@pytest.mark.parametrize("form", ["args", "cfg namespace", "cfg table"])
def test_arguments_of_a_checkpoint_are_used(form: str, tmp_path: Path) -> None:
    namespace = argparse.Namespace(**ARGUMENTS)
    forms: dict[str, dict[str, Any]] = {
        "args": {"args": namespace, "cfg": None},
        "cfg namespace": {"args": None, "cfg": {"model": namespace}},
        "cfg table": {"args": None, "cfg": {"model": ARGUMENTS}},
    }
    path = _save_pt(tmp_path / "c.pt", **forms[form])
    spec, params = fairseq.load_checkpoint(path)
    assert (spec.decoder.heads, spec.decoder.activation) == (2, "gelu_tanh")
    assert (spec.decoder.dropout, spec.decoder.attention_dropout) == (0.2, 0.3)
    assert spec.decoder.embedding_scale == "none"
    half = random_params(BLIND)["wte"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(params["wte"][:50], half[:50])
    with pytest.raises(UserError, match="states heads 2, got --heads=4: leave it out"):
        fairseq.load_checkpoint(path, heads=4)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "relu"}, "activation_fn must be one of gelu, gelu_accurate"),
        ({"no_token_positional_embeddings": True}, "not made without position embeddings"),
        ({"dropout": None}, "arguments: dropout must be float from 0 to 0.99, got None"),
        ({"decoder_attention_heads": "2"}, "decoder_attention_heads must be int of at least 1"),
        ({"no_scale_embedding": "False"}, "no_scale_embedding must be bool, got 'False'"),
    ],
)
def test_arguments_we_lack_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    namespace = argparse.Namespace(**{**ARGUMENTS, **change})
    with pytest.raises(UserError, match=message):
        fairseq.load_checkpoint(_save_pt(tmp_path / "c.pt", args=namespace))


class Odd:
    """A class that a checkpoint may name and that must not be loaded."""


@pytest.mark.torch
def test_other_python_objects_are_not_loaded(tmp_path: Path) -> None:
    path = _save_pt(tmp_path / "c.pt", args=Odd())
    with pytest.raises(UserError, match=r"test_interop_fairseq\.Odd, which is not loaded"):
        fairseq.load_checkpoint(path, heads=2)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint"):
        fairseq.load_checkpoint(path, heads=2)


@pytest.mark.torch
def test_a_plain_state_dict_is_enough(tmp_path: Path) -> None:
    import torch

    state = {name: torch.tensor(value) for name, value in _checkpoint().items()}
    torch.save(state, tmp_path / "plain.pt")
    spec, params = fairseq.load_checkpoint(tmp_path / "plain.pt", heads=2, vocab_multiple=16)
    assert spec == BLIND
    assert_equal(params, random_params(BLIND))
    torch.save([1, 2], tmp_path / "plain.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        fairseq.load_checkpoint(tmp_path / "plain.pt", heads=2)
