"""How a command ends: what is said when it is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import pytest

from blindvalm_jax import command_line, errors


def _interrupted(argv: Sequence[str]) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "the same command goes on from what is on disk"),
        ({"interrupted": "nothing was written"}, "nothing was written"),
    ],
)
def test_an_interrupted_command_says_what_becomes_of_its_work(
    given: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        command_line.run_main(_interrupted, **given)  # type: ignore[arg-type]
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: interrupted; {told}\n"


def test_of_a_long_message_the_cause_at_its_end_is_kept() -> None:
    said = errors.first_line(OSError(f"cannot write {'a/' * 400}: File too large\nmore"))
    assert said.startswith("cannot write a/a/")
    assert said.endswith("a/a/: File too large")
    assert len(said) <= 500
    assert errors.first_line(ValueError("x" * 500)) == "x" * 500
    assert errors.first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("profile/vm.xplane.pb; No space left on device", "No space left on device; free some"),
        ("profile/vm.xplane.pb; Disk quota exceeded", "Disk quota exceeded; free some"),
        ("Out of memory allocating 99 bytes", "out of device memory"),
    ],
)
def test_a_full_disk_is_not_taken_for_device_memory(
    cause: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(argv: Sequence[str]) -> None:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {cause}")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        command_line.run_main(fails)
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert told in line
    assert ("out of device memory" in line) == (told == "out of device memory")
