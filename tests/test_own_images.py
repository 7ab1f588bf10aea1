"""From a folder of images to language models on own text, as README.md says it is done."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blindvalm_jax.interop import clip_model
from tests import small_images, test_train

ROOT = Path(__file__).resolve().parents[1]
KINDS, ROWS, STEPS = 16, 16, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, three pictures of each of 16 kinds; mine/, a text about them; configs/."""
    directory = tmp_path_factory.mktemp("own")
    photos = small_images.write_toyworld(directory / "photos", count=3 * KINDS)
    lines = (photos / "captions.jsonl").read_text().splitlines()
    texts = [caption for line in lines for caption in json.loads(line)["captions"]]
    (directory / "mine").mkdir()
    (directory / "mine" / "text.txt").write_text("\n\n".join(40 * f"{text}. " for text in texts))
    (directory / "configs").symlink_to(ROOT / "configs")
    return directory


def python(arguments: str, folder: Path) -> str:
    """What a command says, run in the folder on one device; like a user's, `python` left out."""
    quick = "0" if "OPTIMIZED_TESTS" in os.environ else "1"  # see small_models.quick_compilation
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": quick}
    line = f"{shlex.quote(sys.executable)} {arguments}"
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    assert "warning" not in done.stderr.lower()
    return done.stdout


def test_tiny_clip_learns_in_a_few_updates(folder: Path) -> None:
    """A guess among 16 pairs costs log 16 nats; an untrained CLIP's loss is no less."""
    changes = f"--config.train.steps={STEPS} --config.train.batch_size={ROWS}"
    changes += " --config.optimizer.warmup_steps=2 --config.log.every_steps=1"
    changes += " --config.eval.every_steps=0 --config.data.images=photos"
    python(f"-m blindvalm_jax.train --config=configs/clip.py --workdir=tiny {changes}", folder)
    metrics = test_train.read_metrics(folder / "tiny")
    assert metrics["train/pairs"][STEPS] == STEPS * ROWS
    assert metrics["train/loss"][1] > np.log(ROWS) - 0.5
    assert metrics["train/loss"][STEPS] < np.log(ROWS) - 1
    assert clip_model.load_clip(folder / "tiny").config.vision.image_size == 64


def section() -> str:
    """What README.md says of one's own images."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"^## With your own images$(.*?)^## ", text, re.M | re.S)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_readme_s_commands_do_what_it_says(folder: Path) -> None:
    """Every command with two updates a training, and what both models write."""
    text = section().replace("\\\n", " ")
    commands = re.findall(r"^    python (-m .*)$", text, re.M)
    assert len(commands) == 6
    for command in commands:
        trains = command.startswith("-m blindvalm_jax.train ")
        python(f"{command} --config.train.steps=2" if trains else command, folder)
    for name, images in (("valm", True), ("blind", False)):
        record = json.loads((folder / "runs" / name / "run.json").read_text())
        assert (record["images"] is not None) == images
        assert record["tower"]["source"] == "runs/clip, step 2"
    asked = re.search(r"^    echo (.*) \| python (-m .*)$", text, re.M)
    assert asked is not None
    (folder / "prompt.txt").write_text(f"{shlex.split(asked[1])[0]}\n")
    for name in ("valm", "blind"):
        command = asked[2].replace("runs/valm", f"runs/{name}")
        said = python(f"{command} --max_new_tokens=5 <prompt.txt", folder)
        shares = [float(share) for share in re.findall(r"^'.*' +(\d\.\d+)$", said, re.M)]
        assert 0 < len(shares) <= 5
        assert all(0 < share < 1 for share in shares)
