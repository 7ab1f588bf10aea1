"""Addresses are refused wherever a path is read; none becomes a directory here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blindvalm_jax import addresses, command_line, config, runs, trained
from blindvalm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("gs://bucket/runs/first", "gs://bucket/runs/first"),
        (str(Path("s3://bucket/runs")), "s3:/bucket/runs"),  # as pathlib makes it
        ("a.txt, gs://bucket/*.txt", "gs://bucket/*.txt"),
        ("text:gs://bucket/a.txt", "gs://bucket/a.txt"),
        (["a", "https://example.org/b.txt"], "https://example.org/b.txt"),
    ],
)
def test_an_address_is_found_and_named(value: object, address: str) -> None:
    told = addresses.refusal({"--other": "a/b", "--place": value})
    assert told is not None
    assert told.startswith(f"--place: {address} is an address")


@pytest.mark.parametrize(
    "value",
    ["", "runs/first", "/mnt/gs/runs", "openai/clip-vit-base-patch32", "logs:/a", 3, None, ("a",)],
)
def test_paths_hub_ids_and_numbers_are_no_addresses(value: object) -> None:
    assert addresses.refusal({"--place": value}) is None


@pytest.mark.parametrize(
    "address",
    ["gs://bucket", "gs:/bucket/a", "gs://*/a", "gs://bucket/../a", "az://bucket/a", "gs:///a"],
)
def test_what_names_nothing_in_a_store_that_is_known_is_no_input(address: str) -> None:
    told = addresses.misfit({"--other": "gs://bucket/a/*.txt", "data.files": f"a.txt,{address}"})
    assert told is not None
    assert told.startswith(f"data.files: {address} is an address, expected gs://BUCKET/NAME")


@pytest.mark.parametrize(
    ("module", "words", "named"),
    [
        (
            "train",
            ("--config=configs/text.py:tiny", "--workdir=run", "--config.data.cache=s3://b/data"),
            "data.cache: s3://b/data is an address",
        ),
        (
            "train",
            ("--config=configs/text.py:tiny", "--workdir=run", "--config.data.files=gs:/b/*.txt"),
            "data.files: gs:/b/*.txt is an address, expected gs://BUCKET/NAME",
        ),
        (
            "train",
            ("--config=configs/text.py:tiny", "--workdir=gs://b/run", "--dry_run"),
            "--dry_run trains nothing, and --workdir=gs://b/run",
        ),
        ("prepare", ("--files=https://b/a", "--out=out"), "--files: https://b/a is an address"),
        ("prepare", ("--files=a.txt", "--out=gs://b/out"), "--out: gs://b/out is an address"),
    ],
)
def test_a_command_says_so_in_one_line_and_makes_nothing(
    module: str, words: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, "-m", f"blindvalm_jax.{module}", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {named}")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def test_an_argument_without_a_flag_is_looked_at_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "compare", "runs/a", "gs://bucket/b"])
    with pytest.raises(SystemExit) as end:
        command_line.run_main(lambda argv: 0)
    assert end.value.code == 1
    assert "argument: gs://bucket/b is an address" in capsys.readouterr().err


def test_a_text_that_begins_so_may_be_a_prompt(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.generate", "--prompt=gs://b", "--workdir=none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "address" not in done.stderr


def test_a_config_file_and_the_functions_refuse_them_too(tmp_path: Path) -> None:
    settings = config.default()
    settings.grounding.tower = "az://bucket/clip"
    with pytest.raises(UserError, match="grounding.tower: az://bucket/clip is an address"):
        config.parse(settings)
    with pytest.raises(UserError, match="--workdir: gs:/bucket/run is an address"):
        runs.claim(Path("gs://bucket/run"))
    with pytest.raises(UserError, match="workdir: gs://bucket/run is an address"):
        trained.load("gs://bucket/run")
