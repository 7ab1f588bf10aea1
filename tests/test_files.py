"""Files that are written whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from blindvalm_jax import files


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compact", [False, True])
def test_json_has_no_word_for_what_is_not_finite(
    tmp_path: Path, value: float, compact: bool
) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1.5}, compact=compact)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": [value]}, compact=compact)
    assert files.read_json(path) == {"a": 1.5}
    assert [*tmp_path.iterdir()] == [path]
