"""What tests of real processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import small_run
from tests.faults.small_run import Runs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for `small_run.settings`."""
    return small_run.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """What starts trainings, which end with the test."""
    with small_run.runs(tmp_path) as found:
        yield found
