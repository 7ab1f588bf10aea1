"""The trainer as a user meets it: every variant runs, resumes bit for bit, and refuses misfits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from blindvalm_jax import config, files, runs, system, trainer
from blindvalm_jax.errors import DIVERGED, UserError
from blindvalm_jax.interop import formats, weights
from blindvalm_jax.models.clip import TowerConfig
from tests import small_models, small_text, tiny_tokenizers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    small_text.write_text(path, small_text.documents(120))
    return path


def settings(text: Path, **changes: Any) -> ml_collections.ConfigDict:
    """A run of seconds: 2 blocks of width 32 on rows of 32 tokens; changes: dotted names."""
    values = config.default()
    values.data.files = str(text)
    values.data.sequence_length = 32
    values.data.eval_fraction = 0.2
    values.tokenizer.kind = "train"
    values.tokenizer.train_vocab_size = 320
    values.decoder.layers, values.decoder.width, values.decoder.heads = 2, 32, 2
    values.grounding.tower = "random"
    values.grounding.random.width, values.grounding.random.layers = 16, 1
    values.grounding.random.projection = 16
    values.train.dtype = values.grounding.dtype = "float32"
    values.train.steps, values.train.batch_size = 6, 8
    values.optimizer.schedule, values.optimizer.warmup_steps = "cosine", 2
    values.checkpoint.every_steps = 2
    values.eval.every_steps = 3
    values.log.every_steps = 1
    values.mesh.data = 8
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return values


def run(values: ml_collections.ConfigDict, workdir: Path) -> dict[str, dict[int, float]]:
    """Trains and returns {metric: {step: value}}."""
    assert trainer.train(config.parse(values), workdir) == 0
    return read_metrics(workdir)


def read_metrics(workdir: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            assert step not in found.setdefault(name, {}), f"{name} twice at step {step}"
            found[name][step] = value
    return found


def computed(metrics: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Without what a clock says."""
    return {name: values for name, values in metrics.items() if not name.startswith("perf/")}


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    run(settings(text), workdir)
    return workdir


def test_run_leaves_the_record_that_checks_rely_on(finished: Path) -> None:
    metrics = read_metrics(finished)
    every = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"}
    every |= {"perf/tokens_per_second", "perf/step_seconds", "perf/data_wait_seconds"}
    every |= {"train/grounding_attention", "train/perplexity", "train/update_norm"}
    for name in every:
        assert sorted(metrics[name]) == [1, 2, 3, 4, 5, 6], name
    assert sorted(metrics["eval/loss"]) == [3, 6]
    assert "perf/mfu" not in metrics  # the peak of this device is not known
    assert metrics["train/tokens"][6] == 6 * 8 * 32
    assert all(0 < share < 1 for share in metrics["train/grounding_attention"].values())
    record = json.loads((finished / "run.json").read_text())
    assert record["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert set(record["kernels"].values()) == {"xla"}
    assert record["versions"]["jax"] == jax.__version__
    assert record["flops_per_token"]["total"] > record["flops_per_token"]["decoder"] > 0
    assert record["tower"]["sha256"] == weights.load(finished / "tower").sha256
    resolved = json.loads((finished / "config.json").read_text())
    assert resolved["decoder"]["width"] == 32
    assert resolved["decoder"]["vocab_size"] == record["tokenizer"]["vocab_size"] == 320
    assert resolved["decoder"]["fusion_layers"] == [0]
    assert record["mesh"].items() <= resolved["mesh"].items()
    assert config.from_dict(resolved).train.steps == 6
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [2, 4, 6]


def test_same_command_after_the_end_changes_nothing(finished: Path, text: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    run(settings(text), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_learns(text: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 40, "eval__every_steps": 40, "checkpoint__every_steps": 40}
    metrics = run(
        settings(text, decoder__dropout=0.0, optimizer__weight_decay=0.0, **changes), tmp_path
    )
    uniform = np.log(320)
    assert abs(metrics["train/loss"][1] - uniform) < 1.0
    assert metrics["eval/loss"][40] < metrics["train/loss"][1] - 1.0


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 4, "data": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_resume_on_another_mesh(
    finished: Path,
    text: Path,
    tmp_path: Path,
    mesh: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same batches and, up to the order of sums, the same losses: 1e-5. Other code is told."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    record = files.read_object(tmp_path / "run.json")
    other = "tensor" in mesh
    if other:
        files.write_json(tmp_path / "run.json", {**record, "code_sha256": "0" * 64})
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    sizes = {f"mesh__{name}": size for name, size in mesh.items()}
    metrics = computed(run(settings(text, **sizes), tmp_path))
    assert ("last run by other code" in capsys.readouterr().out) == other
    resumed = files.read_object(tmp_path / "run.json")
    codes = [resumed, *resumed["starts"]]
    assert [code["code_sha256"] for code in codes] == [runs.CODE_SHA256] * 3
    expected = computed(read_metrics(finished))
    for step in range(3, 7):
        assert metrics["train/loss"][step] == pytest.approx(expected["train/loss"][step], abs=1e-5)


def test_resume_refuses_other_settings_and_says_which(finished: Path, text: Path) -> None:
    before = (finished / "config.json").read_bytes()
    changes: dict[str, Any] = {"optimizer__learning_rate": 1e-3, "seed": 1, "log__every_steps": 2}
    changes |= {"decoder__width": 64, "grounding__readout": "eos"}
    changes |= {"tokenizer__train_vocab_size": 300}
    with pytest.raises(UserError) as caught:
        trainer.train(config.parse(settings(text, **changes)), finished)
    message = str(caught.value)
    assert (
        "holds a run with other settings: decoder.width: 32 -> 64; grounding.readout: 'token' -> "
        "'eos'; optimizer.learning_rate: 0.002 -> 0.001; seed: 0 -> 1; "
        "tokenizer.train_vocab_size: 320 -> 300. Give the same"
    ) in message
    assert (finished / "config.json").read_bytes() == before


def test_resume_with_settings_that_the_user_lets_differ(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    """By name or section; others are refused as ever, and run.json has what differs."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    values = settings(text, optimizer__learning_rate=1e-3, train__attention="xla", seed=1)
    other = config.parse(values)
    with pytest.raises(UserError, match=r"settings: seed: 0 -> 1\. Give"):
        runs.check_resume(tmp_path / "run", other, allowed=["optimizer", "train.attention"])
    for name in ("optimizers", "optimizer.learning", "learning_rate", ""):
        with pytest.raises(UserError, match=f"--allow_changed={name}: there is no such setting"):
            runs.check_resume(tmp_path / "run", other, allowed=["optimizer", name])
    with pytest.raises(UserError, match="--allow_changed=seed: a run keeps its seed"):
        runs.check_resume(tmp_path / "run", other, allowed=["optimizer", "seed"])
    values.seed = 0
    other = config.parse(values)
    allowed = ["optimizer", "train.attention"]
    assert trainer.train(other, tmp_path / "run", allow_changed=allowed) == 0
    first, second = files.read_object(tmp_path / "run" / "run.json")["starts"]
    assert "changed" not in first
    assert second["changed"] == {
        "optimizer.learning_rate": [0.002, 0.001],
        "train.attention": ["auto", "xla"],
    }
    # From now on these are the run's.
    assert runs.check_resume(tmp_path / "run", other) == 6
    rates = read_metrics(tmp_path / "run")["train/learning_rate"]
    assert rates[5] == pytest.approx(read_metrics(finished)["train/learning_rate"][5] / 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no file", "/tower/params.safetensors is missing: expected a safetensors file"),
        ("shape", "/tower/params.safetensors: ln_final/bias must be float32[16], got float32[3]"),
        (
            "tensor",
            "/params.safetensors: the parameters do not fit the model: missing ['ln_final/bias']",
        ),
    ],
)
@pytest.mark.parametrize("resuming", [True, False])
def test_a_damaged_tower_is_refused_before_compilation(
    finished: Path,
    text: Path,
    tmp_path: Path,
    resuming: bool,
    damage: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one that a run has kept, and the one that a new run names."""
    workdir = tmp_path / ("run" if resuming else "other")
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    if not resuming:
        (tmp_path / "run").rename(workdir)
        shutil.copytree(workdir / "tower", tmp_path / "tower")
    path = (workdir if resuming else tmp_path) / "tower" / "params.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.unlink()
    bias = tensors.pop("ln_final/bias")
    if damage == "shape":
        tensors["ln_final/bias"] = bias[:3]
    if damage != "no file":
        safetensors.numpy.save_file(tensors, path)
    values = settings(text)
    if not resuming:
        values.grounding.tower = str(tmp_path / "tower")
        workdir = tmp_path / "new"
    with pytest.raises(UserError, match=re.escape(message)):
        trainer.train(config.parse(values), workdir)
    assert "compiled" not in capsys.readouterr().out


def test_resume_announces_settings_that_may_change(
    finished: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.check_resume(finished, config.parse(settings(text, log__every_steps=2))) == 6
    assert "log.every_steps: 1 -> 2" in capsys.readouterr().out


def test_a_run_older_than_a_setting_is_resumed(finished: Path, text: Path, tmp_path: Path) -> None:
    """It has the default, and nothing else."""
    shutil.copytree(finished, tmp_path / "run")
    record = files.read_object(finished / "run.json")
    del record["config_as_given"]["grounding"]["rerank"], record["config_as_given"]["log"]
    files.write_json(tmp_path / "run" / "run.json", record)
    assert runs.check_resume(tmp_path / "run", config.parse(settings(text))) == 6
    with pytest.raises(UserError, match=r"settings: seed: 0 -> 1\. Give"):
        runs.check_resume(tmp_path / "run", config.parse(settings(text, seed=1)))


def test_length_may_grow_where_the_schedule_does_not_depend_on_it(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.steps: 6 -> 7"):
        runs.check_resume(finished, config.parse(settings(text, train__steps=7)))
    shape = {"optimizer__schedule": "inverse_sqrt"}
    run(settings(text, train__steps=2, eval__every_steps=0, **shape), tmp_path)
    longer = settings(text, train__steps=4, eval__every_steps=0, **shape)
    assert sorted(run(longer, tmp_path)["train/loss"]) == [1, 2, 3, 4]


def test_resume_on_changed_text_is_refused(tmp_path: Path) -> None:
    """Also where the BPE learned from it is the same; else each embedding row is another token's.

    Documents in another order have the same words.
    """
    mine, documents = tmp_path / "mine.txt", small_text.documents(120, seed=0)
    small_text.write_text(mine, documents)
    values = settings(mine, train__steps=4, optimizer__schedule="inverse_sqrt")
    run(values, tmp_path / "run")
    record = (tmp_path / "run" / "run.json").read_bytes()
    values.train.steps = 6
    for changed, message in (
        (documents[::-1], "was trained with other data"),
        (small_text.documents(120, seed=5), "was trained with another tokenizer"),
    ):
        small_text.write_text(mine, changed)
        with pytest.raises(UserError, match=message):
            run(values, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == record


def command(values: ml_collections.ConfigDict, directory: Path) -> list[str]:
    """The command line that trains with these settings, on one device."""
    values.mesh.data = 1
    (directory / "settings.json").write_text(values.to_json())
    (directory / "config.py").write_text(
        "import json, ml_collections\n"
        "def get_config():\n"
        f"    file = open({str(directory / 'settings.json')!r})\n"
        "    return ml_collections.ConfigDict(json.load(file))\n"
    )
    return [sys.executable, "-m", "blindvalm_jax.train", f"--config={directory / 'config.py'}"]


@pytest.mark.faults
def test_a_run_with_a_damaged_checkpoint_ends_bit_identical(text: Path, tmp_path: Path) -> None:
    """In a process of its own, to see all that is printed: no traceback. Then none is left.

    As is the run that it is compared with: here, last bits of the same steps differ.
    """
    start = command(settings(text), tmp_path)
    whole = [*start, f"--workdir={tmp_path / 'whole'}"]
    assert subprocess.run(whole, cwd=ROOT, capture_output=True).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "6")
    data = max((checkpoints / "4" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    arguments = [*start, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: the checkpoint of step 4 is bad: it cannot be read: " in done.stderr
    assert "resumed at step 2" in done.stdout
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "4", "6"]
    assert (tmp_path / "run" / "quarantine" / "4" / "reason.txt").exists()
    expected = computed(read_metrics(tmp_path / "whole"))
    assert computed(read_metrics(tmp_path / "run")) == expected
    for step in (2, 4, 6):
        shutil.rmtree(checkpoints / str(step) / "config")
    failed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    reasons = "; ".join(f"step {step}: its config is missing" for step in (2, 4, 6))
    assert failed.stderr == (
        f"error: no checkpoint of {tmp_path / 'run'} is sound: {reasons}. Nothing was moved or "
        "started afresh: bring one back, or take another --workdir\n"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"grounding__source": "none"},
        {"grounding__readout": "eos"},
        {"grounding__control": "shuffled", "mesh__data": 4, "mesh__fsdp": 2},
        {"grounding__segments": "reference", "train__microbatches": 1},
        {"decoder__positions": "learned", "decoder__init": "gpt2", "train__loss_chunk": 8},
        {"fusion__grounding_kv": "own", "fusion__memory_bias": "learned"},
        {"decoder__fusion_layers": (0, 1), "train__remat": "full"},
        {"train__dtype": "bfloat16", "grounding__dtype": "bfloat16", "train__remat": "dots"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_variant_trains(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    metrics = run(settings(text, train__steps=2, eval__every_steps=2, **changes), tmp_path)
    assert np.isfinite(metrics["train/loss"][2])
    assert metrics["train/loss"][2] != metrics["train/loss"][1]
    grounded = changes.get("grounding__source") != "none"
    assert ("train/grounding_attention" in metrics) == grounded


def write_tower(directory: Path, *, vocab_size: int) -> Path:
    """A tower in our own format, with CLIP's tokenizer in small beside it."""
    shape = TowerConfig(
        layers=1,
        width=16,
        heads=2,
        mlp_width=32,
        projection=24,
        vocab_size=vocab_size,
        start_id=vocab_size - 2,
        end_id=vocab_size - 1,
    )
    tower = system.fresh_tower(shape, seed=3)
    weights.save(directory, tower.params, config=shape, source="made for a test")
    return directory


@pytest.mark.parametrize("kind", ["clip", "gpt2"])
def test_tower_from_files_and_tokenizers_from_files(text: Path, tmp_path: Path, kind: str) -> None:
    """CLIP's tokens shared with the tower, and GPT-2's aligned with it."""
    clip_vocab, clip_merges = tiny_tokenizers.clip_parts()
    tower = write_tower(tmp_path / "tower", vocab_size=len(clip_vocab))
    tiny_tokenizers.write_pair(tower, clip_vocab, clip_merges)
    path = tower
    if kind == "gpt2":
        path = tiny_tokenizers.write_pair(tmp_path / "gpt2", *tiny_tokenizers.gpt2_parts())
    changes = {"tokenizer__kind": kind, "tokenizer__path": str(path), "train__steps": 2}
    values = settings(text, grounding__tower=str(tower), **changes, checkpoint__every_steps=1)
    metrics = run(values, tmp_path / "run")
    assert np.isfinite(metrics["train/loss"][2])
    stored = weights.load(tmp_path / "run" / "tower")
    assert stored.sha256 == weights.load(tower).sha256
    assert stored.source == "made for a test"
    if kind == "gpt2":  # a resumed run needs no more of its tower than it has kept
        shutil.rmtree(tower)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
        assert run(values, tmp_path / "run")["train/loss"] == metrics["train/loss"]


@pytest.mark.parametrize("control", ["none", "random_tower"])
def test_a_tower_may_move_and_be_no_other(
    text: Path, tmp_path: Path, control: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the control, whose tower is random, the shape that is named must be the same."""
    vocab, merges = tiny_tokenizers.clip_parts()
    tower = write_tower(tmp_path / "tower", vocab_size=len(vocab))
    tiny_tokenizers.write_pair(tower, vocab, merges)
    changes = {"tokenizer__kind": "clip", "train__steps": 1, "grounding__control": control}

    def on(tower: Path | str) -> ml_collections.ConfigDict:
        path = tmp_path / "moved" if (tmp_path / "moved").exists() else tmp_path / "tower"
        return settings(text, grounding__tower=str(tower), tokenizer__path=str(path), **changes)

    run(on(tower), tmp_path / "run")
    tower.rename(tmp_path / "moved")
    run(on(tower), tmp_path / "run")  # what is named as before is not looked for
    run(on(tmp_path / "moved"), tmp_path / "run")
    assert f"grounding.tower: '{tower}' -> '{tmp_path / 'moved'}'" in capsys.readouterr().out
    known = json.loads((tmp_path / "run" / "config.json").read_text())["grounding"]["tower"]
    assert known == str(tmp_path / "moved")
    other = write_tower(tmp_path / "other", vocab_size=len(vocab) + 1)
    for name, message in (
        (other, f"was trained with another tower .* than grounding.tower={other} is: name that"),
        ("random", "was trained with another tower .* than grounding.tower=random is: name that"),
        (tmp_path / "nowhere", "nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            trainer.train(config.parse(on(name)), tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_microbatches_are_part_of_a_language_model_s_run(finished: Path, text: Path) -> None:
    """Each draws its own dropout."""
    with pytest.raises(UserError, match=r"train\.microbatches: 1 -> 2"):
        runs.check_resume(finished, config.parse(settings(text, train__microbatches=2)))


def test_a_tower_that_lies_where_a_run_keeps_its_own_is_left_alone(
    text: Path, tmp_path: Path
) -> None:
    """Also in a workdir that a start which failed has marked."""
    runs.check_resume(tmp_path, config.parse(settings(text)))
    tower = write_tower(tmp_path / "tower", vocab_size=320)
    with pytest.raises(UserError, match="is where a run keeps its tower: name it elsewhere"):
        run(settings(text, grounding__tower=str(tower)), tmp_path)
    assert weights.load(tower).source == "made for a test"


def test_tower_with_another_vocabulary_is_refused(text: Path, tmp_path: Path) -> None:
    clip_vocab, clip_merges = tiny_tokenizers.clip_parts()
    tower = write_tower(tmp_path / "tower", vocab_size=len(clip_vocab) - 5)
    tiny_tokenizers.write_pair(tower, clip_vocab, clip_merges)
    with pytest.raises(UserError, match="knows .* tokens, the text was cut"):
        run(settings(text, grounding__tower=str(tower)), tmp_path / "run")


def test_starts_from_weights_of_a_plain_decoder(text: Path, tmp_path: Path) -> None:
    """A plain decoder's blocks land in a grounded one, which starts out (nearly) the same."""
    plain = {"grounding__source": "none", "train__steps": 4, "fusion__query_scale": "head_width"}
    run(settings(text, **plain), tmp_path / "plain")
    source = _export(tmp_path / "plain", tmp_path / "weights")
    grounded = {
        "train__init_from": str(source),
        "train__steps": 1,
        "eval__every_steps": 1,
        "optimizer__learning_rate": 0.0,
        "optimizer__warmup_init": 0.0,
        "fusion__query_scale": "head_width",
        "fusion__memory_bias": "learned",
    }
    metrics = run(settings(text, **grounded), tmp_path / "grounded")
    expected = read_metrics(tmp_path / "plain")["eval/loss"][4]
    # exp(-10) of the attention goes to the memory: 5e-5, less in the loss.
    assert metrics["eval/loss"][1] == pytest.approx(expected, abs=1e-3)
    assert metrics["train/grounding_attention"][1] < 1e-3


def _export(workdir: Path, out: Path) -> Path:
    """The decoder of a run as a weights directory."""
    found = formats.read(str(workdir))
    weights.save(
        out, found.params, config=found.config, source=found.source, tokenizer=found.tokenizer
    )
    return out


@pytest.mark.parametrize(
    ("trained", "started", "message"),
    [
        ({"decoder__width": 48}, {}, r"\(.*48.*\) instead of"),
        (
            {"tokenizer__train_vocab_size": 300},
            {},
            "is another.*has 320 entries, had 300",
        ),
        ({"decoder__activation": "gelu_tanh"}, {}, "activation is 'gelu_erf', was 'gelu_tanh'"),
        (
            {"grounding__source": "text"},
            {"fusion__query_scale": "head_width"},
            "fusion.query_scale is 'head_width', was 'model_width'",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_weights_of_another_function_are_refused_by_name(
    text: Path, tmp_path: Path, trained: dict[str, Any], started: dict[str, Any], message: str
) -> None:
    plain = {"grounding__source": "none", "train__steps": 1, "eval__every_steps": 0}
    run(settings(text, **{**plain, **trained}), tmp_path / "trained")
    source = _export(tmp_path / "trained", tmp_path / "weights")
    with pytest.raises(UserError, match=f"does not fit the decoder of this run: .*{message}"):
        run(settings(text, train__init_from=str(source), **started), tmp_path / "started")


def test_divergence_ends_with_its_own_exit_code(text: Path, tmp_path: Path) -> None:
    """And leaves no checkpoint that is not finite, logged step or not."""
    values = settings(text, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)
    values.log.every_steps = 100
    values.eval.every_steps = 0
    assert trainer.train(config.parse(values), tmp_path) == DIVERGED
    assert not any((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "mesh data=3 fsdp=1 tensor=1 does not fit 8 devices"),
        ({"train__batch_size": 12}, "train.batch_size / train.microbatches is 12, not a multiple"),
        ({"decoder__heads": 2, "mesh__data": 2, "mesh__tensor": 4}, "decoder.heads is 2"),
        ({"decoder__vocab_size": 999}, "decoder.vocab_size is 999, the tokenizer has"),
        ({"data__files": "nowhere/*.txt"}, "nowhere"),
        ({"grounding__tower": "nowhere/at/all"}, "nowhere/at/all"),
        ({"grounding__tower": ""}, "grounding.tower is needed"),
        ({"tokenizer__kind": "clip"}, "tokenizer.kind=clip needs tokenizer.path"),
        ({"grounding__random__heads": 3}, "grounding.random.width 16 is not a multiple"),
        ({"data__eval_fraction": 0.0}, "eval"),
        ({"train__init_from": "nowhere/at/all"}, "nowhere/at/all/config.json is missing"),
    ],
    ids=lambda value: str(value),
)
def test_misfits_are_refused_before_compilation(
    text: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError) as caught:
        trainer.train(config.parse(settings(text, **changes)), tmp_path, dry_run=True)
    assert "compiled" not in capsys.readouterr().out
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_text_is_refused(text: Path, tmp_path: Path) -> None:
    """A dry run plans it all the same (tests/test_planning.py)."""
    with pytest.raises(UserError, match="there is no text"):
        trainer.train(config.parse(settings(text, data__files="")), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/toyworld.py"], "--workdir=DIR are needed"),
        (["--config=configs/nowhere.py", "--workdir=x"], "configs/nowhere.py"),
        (
            ["--config=configs/toyworld.py", "--workdir=x", "--config.train.stepz=3"],
            "unknown setting --config.train.stepz=3",
        ),
        (
            ["--config=configs/toyworld.py", "--workdir=x", "--config.train.steps=many"],
            "--config.train.steps=many",
        ),
        (["--config=configs/text.py:huge", "--workdir=x"], "takes a size (tiny"),
        (["--config=configs/text.py:tiny,small", "--workdir=x"], "got 'tiny,small'"),
    ],
    ids=["no workdir", "no file", "unknown key", "bad value", "bad argument", "two sizes"],
)
def test_command_line_errors_are_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "blindvalm_jax.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
