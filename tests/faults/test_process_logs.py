"""What a process that prints nothing keeps of itself, while two train one run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blindvalm_jax.data.windows import Windows
from tests.faults import small_run
from tests.faults.small_run import FAILED, LEFT
from tests.test_replacing import LENGTH, SHARD, prepare
from tests.test_train import read_metrics

pytestmark = pytest.mark.faults
_STEPS = 9

# The second process is slow to read its fourth batch, and cannot read its last.
_STRAGGLES = f"""
import time
from blindvalm_jax.data import pipeline
from blindvalm_jax.errors import UserError
real = pipeline.Batches.__init__
class Straggling:
    def __init__(self, iterator):
        self.iterator, self.count = iterator, 0
    def __next__(self):
        self.count += 1
        if self.count == 4:
            time.sleep(2)
        if self.count == {_STEPS}:
            raise UserError("a record of mine cannot be read")
        return next(self.iterator)
    def close(self):
        self.iterator.close()
pipeline.Batches.__init__ = lambda self, iterator: real(self, Straggling(iterator))
"""


def test_a_process_that_prints_nothing_keeps_a_log(tmp_path: Path) -> None:
    """Steps with its own seconds of waiting, its damaged records, and what ended it."""
    directory, workdir = prepare(tmp_path / "data"), tmp_path / "run"
    shards = Windows(directory, "train").split.shards
    for shard in shards[2:5]:
        (directory / shard.file).unlink()
    values = small_run.settings(tmp_path / "none", train__steps=_STEPS, train__batch_size=16)
    values.data.files, values.data.windows = "", str(directory)
    values.data.sequence_length, values.data.on_corrupt = LENGTH, "skip"
    values.tokenizer.kind = Windows(directory, "train", may_miss=True).manifest.tokenizer.kind
    with small_run.runs(tmp_path) as runs:
        first, other = runs.several(2, values, workdir, codes={1: _STRAGGLES})
        printed = other.ends(FAILED)
        first.ends(*LEFT)
    [log] = (workdir / "logs").iterdir()
    assert log.name == "process-1.txt"
    lines = log.read_text().splitlines()
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line), line
    said = [line.split(" ", 1)[1] for line in lines]
    assert said[0].startswith("process 1 of 2 begins: ")
    assert any(line.startswith("compiled in ") for line in said)

    steps = {
        int(found[1]): float(found[2])
        for line in said
        if (
            found := re.fullmatch(
                rf"step (\d+)/{_STEPS}  \d+\.\d+ s a step, (\d+\.\d+) s for data"
                r"  memory [\d,]+ MiB at most",
                line,
            )
        )
    }
    assert list(steps) == list(range(1, _STEPS - 1))
    waited = {step: steps[step] for step in (3, 4)}
    slow = max(waited, key=lambda step: waited[step])
    assert waited[slow] >= 2
    assert read_metrics(workdir)["perf/data_wait_seconds"][slow] < 2

    replaced = [line for line in said if "another is read in its place" in line]
    numbers = [int(found[1]) for found in re.finditer(r"\((\d+) so far\)", "\n".join(replaced))]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 10 < len(numbers) < 3 * SHARD
    assert printed.count("another is read in its place") == 10
    assert "; further ones: logs" in printed
    assert said[-1] == "error: process 1: a record of mine cannot be read"
