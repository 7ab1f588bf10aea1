"""Our weights directory: what is written comes back, and every kind of damage is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import weights
from blindvalm_jax.interop.clip_text import load_tower
from tests.foreign_models import BLIND, GPT2, TOWER, assert_equal, logits, random_params


@pytest.mark.parametrize("config", [TOWER, GPT2, BLIND], ids=["tower", "gpt2", "blind"])
def test_what_is_saved_is_loaded(config: weights.Spec, tmp_path: Path) -> None:
    params = random_params(config)
    tokenizer = {"kind": "clip", "fingerprint": "ab12"}
    sha256 = weights.save(tmp_path / "w", params, config=config, source="s", tokenizer=tokenizer)
    stored = weights.load(tmp_path / "w", kind=weights.kind_of(config))
    assert (stored.config, stored.source, stored.tokenizer) == (config, "s", tokenizer)
    assert stored.sha256 == sha256 == weights.params_sha256(params)
    assert_equal(stored.params, params)
    assert not [path for path in (tmp_path / "w").iterdir() if path.name.startswith(".")]


def test_hash_sees_names_shapes_dtypes_and_bytes() -> None:
    x = np.arange(6, dtype=np.float32)
    trees: list[dict[str, Any]] = [
        {"a": x},
        {"b": x},
        {"a": x.reshape(2, 3)},
        {"a": x.view(np.int32)},
        {"a": np.append(x[:-1], np.float32(5.0000005))},
        {"a": {"a": x}},
        {"a": x[:1]},
        {"a": x[0]},
    ]
    assert len({weights.params_sha256(tree) for tree in trees}) == len(trees)
    assert weights.params_sha256({"a": x, "b": x + 1}) == weights.params_sha256(
        {"b": x + 1, "a": x}
    )


def test_saving_twice_keeps_the_first_and_other_weights_are_refused(tmp_path: Path) -> None:
    params = random_params(TOWER)
    weights.save(tmp_path, params, config=TOWER, source="first")
    weights.save(tmp_path, params, config=TOWER, source="second")
    assert weights.load(tmp_path).source == "first"
    with pytest.raises(UserError, match="holds other weights already: choose a new directory"):
        weights.save(tmp_path, random_params(TOWER, seed=1), config=TOWER, source="other")
    other = dataclasses.replace(TOWER, activation="gelu_erf")
    with pytest.raises(UserError, match="holds other weights already"):
        weights.save(tmp_path, params, config=other, source="other")


def test_an_interrupted_save_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / weights.PARAMS_FILE).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_tower(tmp_path)
    weights.save(tmp_path, random_params(TOWER), config=TOWER, source="s")
    assert load_tower(tmp_path).sha256 == weights.params_sha256(random_params(TOWER))


def test_parameters_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    params = random_params(TOWER)
    params["text_projection"] = params["text_projection"][:, :-1]
    expected = r"text_projection must be float32\[16, 12\], got float32\[16, 11\]"
    with pytest.raises(UserError, match=expected):
        weights.save(tmp_path / "w", params, config=TOWER, source="s")
    assert not (tmp_path / "w").exists()


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(path: Path, change: str) -> None:
    tensors = safetensors.numpy.load_file(path)
    if change == "shape":
        tensors["ln_final/bias"] = np.zeros(3, np.float32)
    elif change == "dtype":
        tensors["ln_final/bias"] = np.zeros(16, np.int32)
    elif change == "value":
        tensors["ln_final/bias"][0] += 1e-6
    else:
        tensors["ln_final/offset"] = tensors.pop("ln_final/bias")
    safetensors.numpy.save_file(tensors, path)


def _broken(directory: Path, case: str) -> None:
    config, params = directory / weights.CONFIG_FILE, directory / weights.PARAMS_FILE
    if case == "no params":
        params.unlink()
    elif case == "no config":
        config.unlink()
    elif case == "truncated":
        params.write_bytes(params.read_bytes()[:-5])
    elif case == "not json":
        config.write_text("{")
    elif case == "format":
        _edit(config, format=7)
    elif case == "kind":
        _edit(config, kind="vision")
    elif case == "field":
        _edit(config, config={**dataclasses.asdict(TOWER), "depth": 3})
    elif case == "type":
        _edit(config, config={**dataclasses.asdict(TOWER), "layers": "2"})
    elif case == "activation":
        _edit(config, config={**dataclasses.asdict(TOWER), "activation": "relu"})
    elif case == "layers":
        _edit(config, config={**dataclasses.asdict(TOWER), "layers": 3})
    else:
        _rewrite(params, case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no params", "/params.safetensors is missing: expected a safetensors file"),
        ("no config", "/config.json is missing"),
        ("truncated", "/params.safetensors is not a whole safetensors file"),
        ("not json", "/config.json cannot be read as JSON"),
        ("format", "/config.json: expected format 1, got 7"),
        ("kind", "/config.json: expected kind clip_text, got 'vision'"),
        ("field", "/config.json: config must have exactly the fields layers, width"),
        ("type", "/config.json: config.layers must be int, got '2'"),
        ("activation", "config.activation must be one of gelu_erf, gelu_tanh, quick_gelu"),
        ("layers", "missing ['h/blocks_0_2/attn/out/bias'"),
        ("shape", "/params.safetensors: ln_final/bias must be float32[16], got float32[3]"),
        ("dtype", "/params.safetensors: ln_final/bias must be float32[16], got int32[16]"),
        ("value", "(in config.json), got "),
        ("name", "missing ['ln_final/bias']; unknown ['ln_final/offset']"),
    ],
)
def test_damage_is_one_line_that_names_it(case: str, message: str, tmp_path: Path) -> None:
    weights.save(tmp_path, random_params(TOWER), config=TOWER, source="s")
    _broken(tmp_path, case)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        weights.load(tmp_path, kind="clip_text")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_tower(tmp_path)


def test_a_decoder_is_no_tower(tmp_path: Path) -> None:
    weights.save(tmp_path, random_params(GPT2), config=GPT2, source="s")
    with pytest.raises(UserError, match="expected kind clip_text or clip, got 'decoder'"):
        load_tower(tmp_path)
    with pytest.raises(UserError, match="expected weights of kind clip_text, got decoder"):
        _ = weights.load(tmp_path).tower
    assert weights.load(tmp_path).decoder == GPT2


def test_a_spec_rebuilds_a_module_that_runs(tmp_path: Path) -> None:
    weights.save(tmp_path, random_params(BLIND), config=BLIND, source="s")
    stored = weights.load(tmp_path)
    tokens, z = np.zeros((1, 5), np.int32), np.ones((1, 5, 1, 16), np.float32)
    out = logits(stored.decoder, stored.params, tokens, z)
    assert out.shape == (1, 5, 50)
    assert np.isfinite(out).all()
