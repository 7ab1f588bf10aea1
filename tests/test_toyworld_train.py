"""`configs/toyworld.py` through the command, in a directory that holds nothing yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blindvalm_jax.toyworld.world import WorldConfig, tfds_name
from tests.dying import ROOT

WORLD = WorldConfig(
    train_objects=6,
    dev_objects=3,
    heldout_objects=3,
    image_size=16,
    images_per_object=4,
    validation_images_per_object=2,
    sentences=80,
    validation_sentences=20,
    seed=4,
)
SETTINGS = (
    *("--config.clip.image.size=16", "--config.train.batch_size=4", "--config.train.steps=3"),
    *("--config.optimizer.warmup_steps=1", "--config.eval.every_steps=3"),
)


def train(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.train", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", [pytest.param("conv", marks=pytest.mark.slow), "vit"])
def test_clip_of_a_world_is_trained_in_a_new_directory_and_gone_on_with(
    kind: str, tmp_path: Path
) -> None:
    small = [
        f"--config.clip.image.{name}" for name in ("patch=8", "layers=1", "width=16", "heads=2")
    ]
    command = [
        *("--config=configs/toyworld.py:clip", f"--config.clip.image.kind={kind}", *SETTINGS),
        *(f"--config.data.tfds={tfds_name(WORLD, 'images')}", *(small if kind == "vit" else [])),
    ]
    done = train(tmp_path / "new", *command)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3
    again = train(tmp_path / "new", *command)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout


def test_a_directory_of_something_else_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done = train(tmp_path, "--config=configs/toyworld.py:clip")
    assert done.returncode == 1
    assert "is not marked as a run's" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]
