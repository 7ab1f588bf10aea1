"""How a comparison's jobs are run: in order, with logs of their own, and what becomes of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax.errors import PREEMPTED, Preempted, UserError
from blindvalm_jax.survival import preemption
from blindvalm_jax.toyworld import comparison, recipes
from blindvalm_jax.toyworld.supply import Parts
from blindvalm_jax.toyworld.world import ATTRIBUTES, WorldConfig

ROOT = Path(__file__).resolve().parents[1]


def doubled(parts: Parts, number: int) -> int:
    """What a worker does; it prints as runs do."""
    print(f"number {number}")
    if number < 0:
        raise ValueError("a number below zero\nand more of it")
    return 2 * number


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_jobs_find_comes_in_their_order(jobs: int, tmp_path: Path) -> None:
    calls = [(f"job {n}", doubled, Parts(tmp_path / str(n)), n) for n in range(5)]
    assert comparison._all(calls, jobs) == [0, 2, 4, 6, 8]
    logs = {int(path.parent.name): path.read_text() for path in tmp_path.glob("*/log.txt")}
    assert logs == ({} if jobs == 1 else {n: f"number {n}\n" for n in range(5)})


def test_a_job_that_fails_ends_all_and_says_where_to_look(tmp_path: Path) -> None:
    calls = [(f"job {n}", doubled, Parts(tmp_path / str(n)), n) for n in (1, -1, 2)]
    log = tmp_path / "-1" / "log.txt"
    with pytest.raises(UserError, match=rf"^job -1: a number below zero; see {log}$"):
        comparison._all(calls, 2)
    assert "Traceback" in log.read_text()
    assert "and more of it" in log.read_text()


def measured(job: comparison.Job) -> dict[str, Any]:
    """What a job would have measured: numbers that tell which job it was."""
    code = job.world.seed + job.world.stated_heldout + 100 * len(job.variant)
    accuracies = dict.fromkeys(ATTRIBUTES, code)
    return {
        **accuracies,
        "objects": {"heldout": {"seen": accuracies}},
        **{"commit": f"of {job.variant}", "curves": job.label},
        **{"parameters": len(job.variant), "flops_per_token": 1.0},
        **({} if job.variant == "gpt2" else {"given": {"mean_image": accuracies}}),
    }


def test_results_are_gathered_by_variant_seed_and_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training and measuring are replaced: this is about which result goes where."""
    trained: list[str] = []

    def train(job: comparison.Job) -> dict[str, Any]:
        trained.append(job.label)
        return measured(job)

    monkeypatch.setattr(comparison, "_train_and_measure", train)
    monkeypatch.setattr(comparison, "_make_world", lambda parts, world, steps: {"loss": world.seed})
    monkeypatch.setattr(comparison, "_neighbours", lambda job: [job.label])
    found = comparison.run(
        tmp_path,
        worlds=[WorldConfig(seed=seed) for seed in (3, 7)],
        variants=["gpt2", "blind_valm_eos", "valm"],
        stated=[0.1, 0.5],
        steps=recipes.Steps(),
        jobs=1,
    )
    assert found["seeds"] == [3, 7]
    assert found["clip"] == {"loss": [3, 7]}
    assert found["neighbours"] == ["seed 3, blind_valm_eos"]
    assert found["trained_at"] == ["of blind_valm_eos", "of gpt2", "of valm"]
    for variant in ("gpt2", "blind_valm_eos", "valm"):
        of = found["variants"][variant]
        base = 100 * len(variant)
        assert of["color"] == [base + 3, base + 7]
        assert of["objects"]["heldout"]["seen"]["size"] == [base + 3, base + 7]
        assert of["curves"] == [f"seed 3, {variant}", f"seed 7, {variant}"]
        assert of["parameters"] == len(variant)
        assert (variant in found["given"]) == (variant != "gpt2")
        if variant in comparison.BIAS_VARIANTS:
            wanted = [[base + seed + share for seed in (3, 7)] for share in (0, 0.1, 0.5)]
            assert found["bias"][variant] == dict.fromkeys(ATTRIBUTES, wanted)
    assert found["bias"]["stated_heldout"] == [0.0, 0.1, 0.5]
    # All of a seed before the next, the curve at the end, and none of it twice.
    assert trained[:3] == [f"seed 3, {v}" for v in ("gpt2", "blind_valm_eos", "valm")]
    assert len(trained) == len(set(trained)) == 6 + 2 * 2 * 2
    assert set(found["timed"]) == {"world_and_clip", "language", "bias"}


def test_a_curve_of_a_variant_that_is_not_compared_has_its_origin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comparison, "_train_and_measure", measured)
    monkeypatch.setattr(comparison, "_make_world", lambda parts, world, steps: {"loss": 1.0})
    found = comparison.run(
        tmp_path, worlds=[WorldConfig()], variants=["valm"], stated=[0.2], jobs=1
    )
    assert found["bias"]["gpt2"]["shape"] == [[400], [400.2]]
    assert [*found["variants"]] == ["valm"]
    assert "neighbours" not in found


# Jobs that train until they are told to end, and then take a moment to save; and one that waits.
_STOPPED = """
import sys, time
from pathlib import Path
from blindvalm_jax.command_line import exit_after
from blindvalm_jax.survival import preemption
from blindvalm_jax.toyworld import comparison
from blindvalm_jax.toyworld.supply import Parts
from tests import test_toyworld_jobs
def main():
    root = Path(sys.argv[1])
    calls = [(f"job {n}", test_toyworld_jobs.trains, Parts(root / str(n)), n) for n in range(3)]
    with preemption.noticed():
        comparison._all(calls, 2)
if __name__ == "__main__":
    exit_after(main, interrupted="")
"""


def trains(parts: Parts, number: int) -> None:
    """As `train` does: it saves when SIGTERM comes, after which it is preempted."""
    with preemption.noticed() as notice, notice.kept():
        (parts.root / "began").touch()
        while not notice.stops(0):
            time.sleep(0.05)
        time.sleep(0.5)
        (parts.root / "saved").touch()
        raise Preempted(f"number {number} is saved")


def test_sigterm_ends_all_jobs_when_they_have_saved(tmp_path: Path) -> None:
    """And the comparison with 42; its workers are gone, those that had no job too."""
    (tmp_path / "main.py").write_text(_STOPPED)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        deadline = time.monotonic() + 120
        while not all((tmp_path / str(n) / "began").exists() for n in (0, 1)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert "stopped by SIGTERM: the same command goes on from what is on disk" in said
    assert "Traceback" not in said
    for number in (0, 1):
        assert (tmp_path / str(number) / "saved").exists()
        log = (tmp_path / str(number) / "log.txt").read_text()
        assert f"stopped by SIGTERM: number {number} is saved" in log
    assert not (tmp_path / "2").exists()
