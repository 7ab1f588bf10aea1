"""A small world, its CLIP and its model trained for real, with the command that users run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dying import ROOT

SMALL = {
    **{"train_objects": 64, "dev_objects": 2, "heldout_objects": 32, "image_size": 24},
    **{"images_per_object": 40, "sentences": 8000, "validation_sentences": 40},
    **{"seeds": 1, "variants": "blind_valm_eos", "clip_steps": 700, "steps": 2500, "jobs": 1},
}


@pytest.mark.slow
def test_answers_of_a_trained_model_follow_the_features(tmp_path: Path) -> None:
    """Held-out colours are known, are another's with its features, and are gone without any."""
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.toyworld", f"--workdir={tmp_path}", *flags],
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    chance, [own] = results["chance"]["color"], results["variants"]["blind_valm_eos"]["color"]
    changed = results["attribution"]["blind_valm_eos"]
    [donor], [kept] = (changed["swapped"]["color"][who] for who in ("donor", "own"))
    [nowhere] = changed["nowhere"]["color"]
    found = f"own {own:.3f}, swapped: donor {donor:.3f}, own {kept:.3f}; nowhere {nowhere:.3f}"
    assert own > 5 * chance, found
    assert donor > 5 * chance, found
    assert kept < 2 * chance, found
    assert nowhere < 2 * chance, found
