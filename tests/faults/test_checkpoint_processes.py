"""Two processes save one state, and fall back to the same checkpoint."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blindvalm_jax.checkpoints import layout, quarantine, verifying

ROOT = Path(__file__).resolve().parents[2]
# argv: process, port, run, and what to do: save 1 to 5, or restore.
CODE = """
import sys
from pathlib import Path
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from blindvalm_jax import config, partitioning
from blindvalm_jax.checkpoints.manager import Checkpoints
from blindvalm_jax.step import TrainState
mesh = partitioning.make_mesh(config.MeshConfig(data=1, fsdp=2))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
def state(step):
    value = np.random.default_rng(step).standard_normal((200, 250)).astype(np.float32)
    def put(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    count = put(np.asarray(step, np.int32), partitioning.replicated(mesh))
    return TrainState(count, {"kernel": put(value, rows)}, {})
with Checkpoints(Path(sys.argv[3]), config.CheckpointConfig(keep=5)) as checkpoints:
    if sys.argv[4] == "save":
        for step in range(1, 6):
            checkpoints.save(state(step), step=step, config=config.Config())
            checkpoints.settle()
        checkpoints.finish()
    else:
        found = checkpoints.restore(state(0), seed=0)
        print("step", int(found.step))
        for part in found.params["kernel"].addressable_shards:
            expected = state(int(found.step)).params["kernel"].addressable_shards[0]
            np.testing.assert_array_equal(part.data, expected.data)
"""


def both(run: Path, what: str) -> list[tuple[str, str]]:
    """What the processes print, on stdout and stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(index), str(port), str(run), what],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return said


@pytest.mark.faults
def test_all_fall_back_to_the_same_step(tmp_path: Path) -> None:
    """A byte of step 5 is changed, the part of one process is cut in 4 and 3, a file of 2 gone."""
    both(tmp_path, "save")
    assert layout.steps(tmp_path) == [1, 2, 3, 4, 5]
    saved = [verifying.verify(layout.directory(tmp_path) / str(x)).bad for x in range(1, 6)]
    assert saved == [[]] * 5
    for process, step in ((1, 4), (0, 3)):
        part = layout.directory(tmp_path) / str(step) / "state" / f"ocdbt.process_{process}"
        for chunk in part.glob("d/*"):
            chunk.write_bytes(chunk.read_bytes()[:50])
    chunks = (layout.directory(tmp_path) / "5").rglob("d/*")
    chunk = max(chunks, key=lambda path: path.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 0x10
    chunk.write_bytes(bytes(content))
    (layout.directory(tmp_path) / "2" / "data" / "metadata").unlink()
    said = both(tmp_path, "restore")
    assert [out.splitlines()[-1] for out, _ in said] == ["step 1", "step 1"]
    assert all(f"the checkpoint of step {step} is bad: " in said[0][1] for step in range(2, 6))
    assert "another process cannot read it" in said[0][1]
    assert "warning" not in said[1][1]
    assert sorted(quarantine.moved(tmp_path)) == ["2", "3", "4", "5"]
    assert layout.steps(tmp_path) == [1]
