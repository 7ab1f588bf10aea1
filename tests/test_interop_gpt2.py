"""GPT-2 in and out, against numbers that transformers gave and against transformers itself."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import trees
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import gpt2
from tests.foreign_models import (
    BLIND,
    GPT2,
    assert_equal,
    golden,
    logits,
    random_params,
    write_hugging_face,
    write_tensors,
)

# fp32 sums in another order, logits up to 7 in size: 4e-6 measured.
TOLERANCE = 1e-4


def test_golden_logits(tmp_path: Path) -> None:
    config, tensors, ids, expected = golden("hf_gpt2")
    spec, params = gpt2.load(write_hugging_face(tmp_path, config, tensors))
    np.testing.assert_allclose(logits(spec, params, ids), expected, atol=TOLERANCE, rtol=0)


def test_golden_logits_notice_every_tensor(tmp_path: Path) -> None:
    config, tensors, ids, expected = golden("hf_gpt2")
    for number, name in enumerate(tensors):
        altered = {**tensors, name: tensors[name].copy()}
        altered[name].reshape(-1)[0] += 0.5
        spec, params = gpt2.load(write_hugging_face(tmp_path / str(number), config, altered))
        difference = np.abs(logits(spec, params, ids) - expected).max()
        assert difference > 10 * TOLERANCE, name


def test_export_then_import_is_the_same_model(tmp_path: Path) -> None:
    params = random_params(GPT2)
    gpt2.export_gpt2(params, GPT2.decoder, vocab_size=50, directory=tmp_path / "out", eos_id=49)
    spec, back = gpt2.load(tmp_path / "out", vocab_multiple=16)
    assert spec == GPT2
    assert_equal(back, params)
    with pytest.raises(UserError, match="holds a model already"):
        gpt2.export_gpt2(params, GPT2.decoder, vocab_size=50, directory=tmp_path / "out")


def _old_layout(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """No prefix, an explicit head, and the buffers of files from before 2023."""
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["lm_head.weight"] = bare["wte.weight"]
    for index in range(3):
        bare[f"h.{index}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.uint8))
        bare[f"h.{index}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    return bare


def test_old_layout_half_precision_and_shards_are_read(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_gpt2")
    tensors = {name: value.astype(np.float16).astype(np.float32) for name, value in tensors.items()}
    _, expected = gpt2.load(write_hugging_face(tmp_path / "new", config, tensors))
    _, params = gpt2.load(write_hugging_face(tmp_path / "old", config, _old_layout(tensors)))
    assert_equal(params, expected)
    half = {name: value.astype(np.float16) for name, value in tensors.items()}
    _, params = gpt2.load(write_hugging_face(tmp_path / "half", config, half))
    assert_equal(params, expected)
    _, params = gpt2.load(_sharded(tmp_path / "shards", config, tensors))
    assert_equal(params, expected)


def _sharded(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    write_hugging_face(directory, config, {}).joinpath("model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        write_tensors(directory / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _broken(directory: Path, case: str) -> Path:
    config, tensors, _, _ = golden("hf_gpt2")
    if case == "missing":
        del tensors["transformer.h.1.ln_2.bias"]
    elif case == "unknown":
        tensors["transformer.h.1.adapter.weight"] = np.zeros(3, np.float32)
    elif case == "outside":
        tensors["score.weight"] = np.zeros(3, np.float32)
    elif case == "untied":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    elif case == "shape":
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:-1]
    elif case == "qkv":
        tensors["transformer.h.2.attn.c_attn.weight"] = np.zeros((16, 47), np.float32)
    elif case == "uneven":
        tensors["transformer.h.2.mlp.c_fc.bias"] = np.zeros(41, np.float32)
    elif case == "shard":
        (_sharded(directory, config, tensors) / "b.safetensors").unlink()
        return directory
    elif case == "index":
        path = _sharded(directory, config, tensors) / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        del content["weight_map"]["transformer.wpe.weight"]
        path.write_text(json.dumps(content))
        return directory
    elif case == "outside index":
        path = _sharded(directory, config, tensors) / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
        return directory
    elif case == "empty":
        write_hugging_face(directory, config, tensors).joinpath("model.safetensors").unlink()
        return directory
    return write_hugging_face(directory, config, tensors)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "missing ['h.1.ln_2.bias']; not understood none"),
        ("unknown", "missing none; not understood ['h.1.adapter.weight']"),
        ("outside", "tensors outside the decoder, not understood: ['score.weight']"),
        ("untied", "lm_head.weight differs from wte.weight"),
        ("shape", "wpe must be float32[12, 16], got float32[11, 16]"),
        ("qkv", "the shapes h.2.attn.c_attn.weight [16, 47] do not fit attn/qkv/kernel"),
        ("uneven", "h.2.mlp.c_fc.bias makes c_fc/bias [41], but h.0.mlp.c_fc.bias makes it [40]"),
        ("shard", "b.safetensors is missing: expected a safetensors file"),
        ("index", "differ in the tensors ['transformer.wpe.weight']"),
        ("outside index", "names '../b.safetensors', which is not a file of its own directory"),
        ("empty", "holds no weights: expected model.safetensors"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(case: str, message: str, tmp_path: Path) -> None:
    directory = _broken(tmp_path, case)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        gpt2.load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "opt"}, "expected model_type gpt2, got 'opt'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"activation_function": "relu"}, "activation_function must be one of gelu, gelu_new"),
        ({"embd_pdrop": 0.2}, "resid_pdrop 0.1 and embd_pdrop 0.2 differ"),
        ({"n_head": 5}, "n_embd 16 is not a multiple of n_head 5"),
        ({"n_layer": "3"}, "n_layer must be int of at least 1, got '3'"),
        ({"n_embd": 0}, "n_embd must be int of at least 1, got 0"),
        ({"n_inner": 0}, "n_inner must be int of at least 1 or null, got 0"),
        ({"attn_pdrop": -0.1}, "attn_pdrop must be float from 0 to 0.99, got -0.1"),
        ({"activation_function": None}, "activation_function must be str, got None"),
        ({"n_layer": 2}, "not understood ['h.2.attn.c_attn.bias'"),
    ],
)
def test_options_we_lack_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, tensors, _, _ = golden("hf_gpt2")
    write_hugging_face(tmp_path, {**config, **change}, tensors)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        gpt2.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu_erf")],
)
def test_activations(theirs: str, ours: str, tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_gpt2")
    write_hugging_face(tmp_path, {**config, "activation_function": theirs}, tensors)
    assert gpt2.load(tmp_path)[0].decoder.activation == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "sinusoidal"}, "decoder.positions=sinusoidal cannot be exported"),
        ({"embedding_scale": "sqrt_width"}, "decoder.embedding_scale=sqrt_width cannot be folded"),
        ({"max_positions": 11}, "wpe must be float32[11, 16], got float32[10, 16]"),
    ],
)
def test_what_gpt2_cannot_express_is_not_exported(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(GPT2.decoder, **change)
    with pytest.raises(UserError, match=re.escape(message)):
        gpt2.export_gpt2(random_params(GPT2), config, vocab_size=50, directory=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fusion_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GPT-2 has no place for the grounding of fusion_2"):
        gpt2.export_gpt2(
            random_params(BLIND), BLIND.decoder, vocab_size=50, directory=tmp_path / "out"
        )


def test_torch_files_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors, _, _ = golden("hf_gpt2")
    write_hugging_face(tmp_path, config, tensors).joinpath("model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch is not installed: pip install .*\[torch\]"):
        gpt2.load(tmp_path)


@pytest.mark.torch
def test_live_logits_of_sharded_and_pickled_files(tmp_path: Path) -> None:
    import torch

    from tests import make_golden

    model = make_golden.gpt2_model()
    ids = make_golden.gpt2_ids(vocab_size=61, rows=4, length=12)
    expected = make_golden.gpt2_logits(model, ids)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    spec, params = gpt2.load(tmp_path / "shards")
    np.testing.assert_allclose(logits(spec, params, ids), expected, atol=TOLERANCE, rtol=0)
    model.transformer.save_pretrained(tmp_path / "bare")
    assert_equal(gpt2.load(tmp_path / "bare")[1], params)
    (tmp_path / "bare" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bare" / "pytorch_model.bin")
    assert_equal(gpt2.load(tmp_path / "bare")[1], params)


@pytest.mark.torch
def test_transformers_reads_what_is_exported(tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    params = random_params(GPT2)
    gpt2.export_gpt2(params, GPT2.decoder, vocab_size=50, directory=tmp_path, eos_id=49)
    model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.generation_config.eos_token_id == 49
    ids = make_golden.gpt2_ids(vocab_size=50, rows=3, length=10)
    got = make_golden.gpt2_logits(model, ids)
    np.testing.assert_allclose(got, logits(GPT2, params, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.torch
@pytest.mark.slow
def test_live_logits_at_full_size(tmp_path: Path) -> None:
    from tests import make_golden

    sizes = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None}
    model = make_golden.gpt2_model(**sizes, n_positions=1024)
    make_golden.randomise(model, seed=4, scale=0.02)
    ids = make_golden.gpt2_ids(vocab_size=50257, rows=1, length=128)
    expected = make_golden.gpt2_logits(model, ids)
    model.save_pretrained(tmp_path)
    spec, params = gpt2.load(tmp_path)
    assert sum(value.size for value in trees.flatten(params).values()) > 124e6
    got = logits(spec, params, ids)
    print(f"largest difference {np.abs(got - expected).max():.2e} of {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
