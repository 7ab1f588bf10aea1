"""`python -m blindvalm_jax.convert` as a user runs it, and how it tells formats apart."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blindvalm_jax import config, hub, trainer, trees
from blindvalm_jax.data import tokenizers
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import (
    clip_openai,
    fairseq,
    formats,
    gpt2,
    rules,
    run_directory,
    tensor_files,
    weights,
)
from tests import small_models, small_text, test_train, tiny_tokenizers
from tests.foreign_models import (
    BLIND,
    GPT2,
    TOWER,
    assert_equal,
    golden,
    logits,
    random_params,
    write_hugging_face,
    write_tensors,
)


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blindvalm_jax.convert", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _layout(path: Path) -> str:
    return formats.open_model(path).layout


def test_there_and_back(tmp_path: Path) -> None:
    gpt2.export_gpt2(
        random_params(GPT2), GPT2.decoder, vocab_size=50, directory=tmp_path / "hf", eos_id=49
    )
    done = _run(f"--input={tmp_path}/hf", f"--out={tmp_path}/ours")
    assert done.returncode == 0, done.stderr
    stored = weights.load(tmp_path / "ours", kind="decoder")
    size = sum(value.size for value in trees.flatten(stored.params).values())
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
    assert _layout(clip) == "hf_clip"
    assert_equal(formats.read(str(clip)).params, formats.read(str(clip), layout="hf_clip").params)
    config, tensors, _, _ = golden("hf_gpt2")
    assert _layout(write_hugging_face(tmp_path / "gpt2", config, tensors)) == "hf_gpt2"

    theirs = fairseq.save_decoder(
        random_params(BLIND), vocab_size=50, layers=4, heads=2, fusion_layers=(2,)
    )
    path = write_tensors(tmp_path / "blind.safetensors", theirs)
    assert _layout(path) == "fairseq"
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
    assert _layout(path) == "openai_clip"
    model = formats.read(str(path), heads=4, activation="quick_gelu")
    assert model.config == TOWER
    (tmp_path / "clip" / "config.json").unlink()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    assert _layout(tmp_path / "clip") == "open_clip"


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


# What makes a decoder a plain GPT-2.
PLAIN = {
    "grounding__source": "none",
    "decoder__positions": "learned",
    "decoder__max_positions": 32,
    "decoder__embedding_scale": "none",
    "decoder__activation": "gelu_tanh",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates each of a BLIND-VALM and a plain GPT-2 on the same text."""
    root = tmp_path_factory.mktemp("runs")
    small_text.write_text(root / "text.txt", small_text.documents(120))
    short = {"train__steps": 2, "checkpoint__every_steps": 1, "eval__every_steps": 0}
    with small_models.quick_compilation():
        for name, changes in (("blind", {}), ("gpt2", PLAIN)):
            values = test_train.settings(root / "text.txt", **{**short, **changes})
            assert trainer.train(config.parse(values), root / name) == 0
    return root


def _saved(run: Path) -> dict[str, Any]:
    """Parameters of the last checkpoint, as Orbax gives them without being told what to expect."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = (run / "checkpoints" / "2" / "state").absolute()
        metadata = checkpointer.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=arguments))["params"]


@pytest.mark.parametrize("name", ["blind", "gpt2"])
def test_a_run_becomes_a_weights_directory(name: str, runs: Path, tmp_path: Path) -> None:
    done = _run(f"--input={runs / name}", f"--out={tmp_path}/out")
    assert (done.returncode, done.stderr) == (0, "")
    stored = weights.load(tmp_path / "out", kind="decoder")
    assert_equal(stored.params, _saved(runs / name))
    assert stored.source == f"{runs / name}, step 2"
    assert stored.decoder.fusion_layers == ((0,) if name == "blind" else ())
    assert stored.decoder.memory_width == (16 if name == "blind" else 0)
    tokenizer = tokenizers.load("train", f"{tmp_path}/out")
    assert stored.tokenizer == {"kind": "train", "fingerprint": tokenizer.fingerprint}
    assert stored.decoder.vocab_size == tokenizer.vocab_size


def test_a_plain_gpt2_is_exported_from_its_run(runs: Path, tmp_path: Path) -> None:
    done = _run("--to=hf_gpt2", f"--input={runs}/gpt2", f"--out={tmp_path}/hf")
    assert (done.returncode, done.stderr) == (0, "")
    spec, params = gpt2.load(tmp_path / "hf")
    assert_equal(params, _without_padding(_saved(runs / "gpt2"), spec.vocab_size))
    tokenizer = tokenizers.load("train", f"{tmp_path}/hf")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / name).read_text())
        assert written["eos_token_id"] == tokenizer.eos_id

    done = _run("--to=hf_gpt2", f"--input={runs}/blind", f"--out={tmp_path}/blind")
    assert done.returncode == 1
    assert done.stderr == "error: GPT-2 has no place for the grounding of fusion_0\n"


def _without_padding(params: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Padded rows of the embedding as zeros, whatever training left in them."""
    table = params["wte"].copy()
    table[vocab_size:] = 0
    return {**params, "wte": table}


@pytest.mark.torch
def test_transformers_reads_the_export_of_a_run(runs: Path, tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    assert _run("--to=hf_gpt2", f"--input={runs}/gpt2", f"--out={tmp_path}/hf").returncode == 0
    trained = run_directory.load(runs / "gpt2")
    assert isinstance(trained.config, weights.DecoderSpec)
    ids = np.random.default_rng(0).integers(0, trained.config.vocab_size, (2, 32))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    expected = make_golden.gpt2_logits(model, ids)
    # Our fp32 against float64 (1.3e-6 seen); logits are below 5 in size.
    got = logits(trained.config, trained.params, ids)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = tokenizers.load("train", f"{tmp_path}/hf")
    text = "A small red ball lies on the table."
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == model.generation_config.eos_token_id == ours.eos_id


def _damaged(run: Path, case: str) -> None:
    record = json.loads((run / "run.json").read_text())
    if case == "no checkpoint":
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    elif case == "other settings":
        settings = json.loads((run / "config.json").read_text())
        settings["decoder"]["mlp_width"] = 64
        (run / "config.json").write_text(json.dumps(settings))
    elif case == "no record":
        (run / "run.json").unlink()
    else:
        del record[case]
        (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no checkpoint", "is a run without a checkpoint yet"),
        ("other settings", "h/blocks_1_1/c_fc/bias must be float32[1, 64], got float32[1, 128]"),
        ("no record", "run.json is missing"),
        ("tokenizer", "run.json has no table 'tokenizer'"),
        ("tower", "run.json has no table 'tower'"),
    ],
)
def test_runs_that_cannot_be_read_are_one_line(
    case: str, message: str, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "blind", tmp_path / "run")
    _damaged(tmp_path / "run", case)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        formats.read(str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_half_a_checkpoint_is_one_line(runs: Path, tmp_path: Path) -> None:
    """In a process of its own: the reads that Orbax leaves behind are reported when they end."""
    shutil.copytree(runs / "blind", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "state" / "d")
    done = _run(f"--input={tmp_path}/run", f"--out={tmp_path}/out")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "checkpoints/2/state cannot be restored as the decoder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_has_moved_stays_behind(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "gpt2", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["data"]["directory"] = str(tmp_path / "gone")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    done = _run(f"--input={tmp_path}/run", f"--out={tmp_path}/out")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: the tokenizer is not taken along: its files are")
    assert weights.load(tmp_path / "out").tokenizer == {
        name: record["tokenizer"][name] for name in ("kind", "fingerprint")
    }


def test_an_occupied_directory_is_found_before_the_input_is_read(tmp_path: Path) -> None:
    weights.save(tmp_path / "ours", random_params(TOWER), config=TOWER, source="s")
    for flags in ([], ["--to=hf_gpt2"]):
        done = _run(f"--input={tmp_path}/nothing", f"--out={tmp_path}/ours", *flags)
        assert done.returncode == 1
        assert done.stderr == (
            f"error: {tmp_path}/ours holds a model already (config.json): choose a new directory\n"
        )


@pytest.mark.torch
def test_a_torch_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    theirs = fairseq.save_decoder(
        random_params(BLIND), vocab_size=50, layers=4, heads=2, fusion_layers=(2,)
    )
    torch.save({name: torch.tensor(value) for name, value in theirs.items()}, tmp_path / "m.pt")
    read, paths = tensor_files.read_torch, []

    def counted(path: Path) -> Any:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(tensor_files, "read_torch", counted)
    assert_equal(formats.read(str(tmp_path / "m.pt"), heads=2).params, _padded(theirs))
    assert paths == [tmp_path / "m.pt"]


def _padded(theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    return fairseq.load_decoder(
        theirs, layers=4, heads=2, fusion_layers=(2,), vocab_multiple=128, source="here"
    )


@pytest.mark.parametrize("name", ["tiny-gpt2", "someone/tiny-gpt2"])
def test_a_hub_id_is_downloaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = write_hugging_face(tmp_path / "remote", *golden("hf_gpt2")[:2])
    (remote / "pytorch_model.bin").write_bytes(b"never wanted")
    asked = []

    def download(repository: str, *, allow_patterns: Sequence[str]) -> str:
        """What the hub's client does, from a directory here."""
        asked.append(repository)
        copy = tmp_path / "cache"
        copy.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                shutil.copyfile(file, copy / file.name)
        return str(copy)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = formats.read(name)
    assert (asked, model.source) == ([name], name)
    assert_equal(model.params, formats.read(str(remote)).params)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    (remote / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"has no file \*\.safetensors on the hub"):
        formats.read(name)
    assert hub.local_path(name, patterns=["*.json"], needs=None) == tmp_path / "cache"


def test_the_hub_client_is_imported_only_when_needed() -> None:
    code = "import sys, blindvalm_jax.convert; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
