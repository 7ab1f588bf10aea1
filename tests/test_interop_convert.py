"""`python -m blindvalm_jax.convert` as a user runs it, and how it tells formats apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_openai, fairseq, formats, gpt2, rules, weights
from tests.foreign_models import (
    BLIND,
    GPT2,
    TOWER,
    assert_equal,
    golden,
    random_params,
    write_hugging_face,
    write_tensors,
)


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blindvalm_jax.convert", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_there_and_back(tmp_path: Path) -> None:
    gpt2.export_gpt2(
        random_params(GPT2), GPT2.decoder, vocab_size=50, directory=tmp_path / "hf", eos_id=49
    )
    done = _run(f"--input={tmp_path}/hf", f"--out={tmp_path}/ours")
    assert done.returncode == 0, done.stderr
    stored = weights.load(tmp_path / "ours", kind="decoder")
    size = sum(value.size for value in rules.flatten(stored.params).values())
    lines = done.stdout.splitlines()
    assert lines[-1] == f"sha256 {stored.sha256}"
    assert re.fullmatch(rf"16 tensors +{size:,}  parameters", lines[-2])
    assert any(line.split() == ["wpe", "160", "[10,", "16]"] for line in lines)
    assert (stored.source, stored.tokenizer) == (f"{tmp_path}/hf", None)

    flags = ["--to=hf_gpt2", f"--input={tmp_path}/ours", "--eos_id=49"]
    done = _run(*flags, f"--out={tmp_path}/again")
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_a_wrong_input_is_one_line(tmp_path: Path) -> None:
    done = _run(f"--input={tmp_path}/none", f"--out={tmp_path}/out")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}/none does not exist: give a directory, a file or a hub id (owner/name)"
    ]
    assert not (tmp_path / "out").exists()


def test_formats_are_recognised(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip")
    clip = write_hugging_face(tmp_path / "clip", config, tensors)
    assert formats.recognise(clip) == "hf_clip"
    assert_equal(formats.read(str(clip)).params, formats.read(str(clip), layout="hf_clip").params)
    config, tensors, _, _ = golden("hf_gpt2")
    assert formats.recognise(write_hugging_face(tmp_path / "gpt2", config, tensors)) == "hf_gpt2"

    theirs = fairseq.save_decoder(
        random_params(BLIND), vocab_size=50, layers=4, heads=2, fusion_layers=(2,)
    )
    path = write_tensors(tmp_path / "blind.safetensors", theirs)
    assert formats.recognise(path) == "fairseq"
    spec = formats.read(str(path), heads=2).config
    assert isinstance(spec, weights.DecoderSpec)
    assert spec.fusion_layers == (2,)

    theirs = rules.save(
        random_params(TOWER),
        model=clip_openai.model_rules(),
        block=lambda index: clip_openai.block_rules(index, heads=TOWER.heads),
        layers=TOWER.layers,
    )
    path = write_tensors(tmp_path / "openai.safetensors", theirs)
    assert formats.recognise(path) == "openai_clip"
    model = formats.read(str(path), heads=4, activation="quick_gelu")
    assert model.config == TOWER
    (tmp_path / "clip" / "config.json").unlink()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    assert formats.recognise(tmp_path / "clip") == "open_clip"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ours", "is a weights directory already: give --to to convert it"),
        ("empty", "has no config.json of a GPT-2 or CLIP"),
        ("bare", "its tensors are of no known layout (h.0.ln_1.bias, ...)"),
        ("options", "its config.json tells heads and activation; leave them out"),
    ],
)
def test_what_cannot_be_recognised(case: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / case
    if case == "ours":
        weights.save(path, random_params(TOWER), config=TOWER, source="s")
    elif case == "bare":
        path = write_tensors(tmp_path / "m.safetensors", {"h.0.ln_1.bias": np.zeros(2, np.float32)})
    elif case == "options":
        write_hugging_face(path, *golden("hf_gpt2")[:2])
    else:
        path.mkdir()
    heads = 4 if case == "options" else None
    with pytest.raises(UserError, match=re.escape(message)):
        formats.read(str(path), heads=heads)


def test_tokenizer_files_travel_with_the_weights(tmp_path: Path) -> None:
    from blindvalm_jax.data import tokenizers
    from tests import tiny_tokenizers

    config, tensors, _, _ = golden("hf_clip")
    clip = write_hugging_face(tmp_path / "clip", config, tensors)
    tiny_tokenizers.write_pair(clip, *tiny_tokenizers.clip_parts())
    done = _run(f"--input={clip}", f"--out={tmp_path}/ours")
    assert done.returncode == 0, done.stderr
    fingerprint = tokenizers.load("clip", str(clip)).fingerprint
    assert weights.load(tmp_path / "ours").tokenizer == {"kind": "clip", "fingerprint": fingerprint}
    assert tokenizers.load("clip", f"{tmp_path}/ours").fingerprint == fingerprint

    (clip / "merges.txt").unlink()
    done = _run(f"--input={clip}", f"--out={tmp_path}/without")
    assert done.returncode == 0
    assert "warning: the tokenizer is not taken along" in done.stderr
    assert json.loads((tmp_path / "without" / "config.json").read_text())["tokenizer"] is None
    assert not (tmp_path / "without" / "vocab.json").exists()
