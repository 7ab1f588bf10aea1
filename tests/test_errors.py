"""How a command ends: what is said when it is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from blindvalm_jax import errors


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
        errors.run_main(_interrupted, **given)  # type: ignore[arg-type]
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: interrupted; {told}\n"
