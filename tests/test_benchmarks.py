"""What the benchmarks are made of: vectors on disk, figures, and a table at a tiny size.

Modules that define flags are run as processes: other commands' flags have the same names.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from benchmarks import clusters, palette, valm_figure
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.images import PreparedWindows

ROOT = Path(__file__).resolve().parents[1]
SIZE, WIDTH, LENGTH, K = 300, 16, 6, 3
FAISS = importlib.util.find_spec("faiss") is not None


def test_colours_are_told_apart() -> None:
    names = [*palette.COLORS, "mine", "other"]
    found = palette.colors(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert found["gpt2"] == palette.colors(["gpt2"])["gpt2"] == "#666666"


def test_what_lies_on_disk_is_what_was_drawn(tmp_path: Path) -> None:
    world = clusters.Clusters(SIZE, WIDTH)
    index = clusters.write_index(tmp_path / "index", world)
    expected = world.vectors(range(clusters.BATCH))[:SIZE]  # drawn a batch at a time
    np.testing.assert_array_equal(index.vectors[:], expected.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)  # fp32 rounding
    queries = world.vectors(range(SIZE, SIZE + 50))
    # Of 16 dimensions a random unit vector's nearest among 300 is at 0.7 or so.
    assert np.median(np.max(queries @ expected.T, axis=1)) > 0.8
    with pytest.raises(UserError, match="at most 16,777,215 vectors"):
        clusters.Clusters(1 << 24, WIDTH)


def test_vectors_lie_around_what_is_given(tmp_path: Path) -> None:
    around = np.eye(WIDTH, dtype=np.float32)
    found = clusters.Clusters(SIZE, WIDTH, around=around).vectors(range(SIZE))
    near = np.max(found @ around.T, axis=1)
    assert len(set(np.argmax(found @ around.T, axis=1))) == clusters.centres_of(SIZE) == 10
    # Noise of norm 0.6 beside a centre of norm 1, in any direction: 0.84 to 0.88 if orthogonal.
    assert np.median(near) == pytest.approx(0.86, abs=0.03)


def test_a_worker_that_is_gone_is_one_clear_line() -> None:
    code = """
import time
from benchmarks import turns
from blindvalm_jax.errors import UserError
gone = turns.Worker(["benchmarks.no_such_module"])
gone._process.wait()
try:
    gone.ask("ready")
except UserError as error:
    print(error)
finally:
    gone.stop()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a process ended, its message is above: [")
    assert "no_such_module" in done.stderr


def test_neighbours_found_ahead_lead_to_vectors_of_the_index(tmp_path: Path) -> None:
    index = clusters.write_index(tmp_path / "index", clusters.Clusters(SIZE, WIDTH))
    found = clusters.write_neighbours(
        tmp_path / "neighbours", index, windows=4, length=LENGTH, each=K
    )
    texts: Any = [{"tokens": np.arange(LENGTH + 1), "count": np.int32(LENGTH + 1)}] * 4
    windows = PreparedWindows(texts, found, index.vectors)
    seen = [windows[place]["features"] for place in range(4)]
    for place, features in enumerate(seen):
        assert features.shape == (LENGTH, K, WIDTH)
        np.testing.assert_array_equal(features, index.vectors[:][found[place]])
    assert len(np.unique(np.concatenate(seen).reshape(-1, WIDTH), axis=0)) > K


def rows(*systems: str) -> list[dict[str, Any]]:
    """What valm_cost measures, at two sizes; FAISS is missing at the first."""
    found = []
    for size in (100, 1000):
        values = {}
        for number, name in enumerate(systems, start=1):
            if name.startswith("faiss") and size < 256:
                continue
            values[name] = {"ratio": number, "ratio_low": number / 2, "ratio_high": 3 * number}
            if name not in ("gpt2", "blind"):
                values[name] |= {"share": 0.5, "share_low": 0.25, "share_high": 0.75}
        found.append({"vectors": size, "systems": values})
    return found


def bars(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    """Lowest and highest of each point, by colour."""
    found: dict[str, list[tuple[float, float]]] = {}
    collections: list[Any] = list(panel.collections)
    for collection in collections:
        ends = [(x[0][1], x[1][1]) for x in collection.get_segments()]
        found.setdefault(to_hex(collection.get_color()[0]).upper(), []).extend(ends)
    return found


def test_the_figure_shows_every_round_and_share() -> None:
    systems = ("gpt2", "blind", "prepared", "valm", "faiss", "faiss_ranked")
    figure = valm_figure.draw(rows(*systems))
    ratios, shares = figure.axes
    expected = {name: (n / 2, 3.0 * n) for n, name in enumerate(systems, start=1)}
    assert bars(ratios) == {
        palette.COLORS["blind"]: [expected["blind"]] * 2,
        palette.COLORS["prepared"]: [expected["prepared"]] * 2,
        palette.COLORS["valm"]: [expected["valm"]] * 2,
        palette.COLORS["faiss"]: [expected["faiss"], expected["faiss_ranked"]],
    }
    assert set(bars(shares)) == {palette.COLORS[name] for name in ("prepared", "valm", "faiss")}
    assert set(sum(bars(shares).values(), [])) == {(25.0, 75.0)}
    for label in (ratios.get_xlabel(), ratios.get_ylabel(), shares.get_xlabel()):
        assert label.endswith("(log scale)")
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(named) == len(systems)
    without = valm_figure.draw(rows("gpt2", "blind", "prepared", "valm"))
    assert len(without.legends[0].get_texts()) == 4


def benchmark(tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints, and the numbers it writes."""
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "benchmarks.run", *arguments, f"--json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout, json.loads(out.read_bytes())


def test_search_measures_every_engine(tmp_path: Path) -> None:
    printed, found = benchmark(
        tmp_path, "search", "--sizes=20,300", "--width=16", "--queries=64", "--rounds=1"
    )
    measured = [(row["vectors"], row["engine"]) for row in found["searches"]]
    engines = ("exact", "faiss", "faiss, 64 ranked") if FAISS else ("exact",)
    assert measured == [(20, "exact"), *((300, engine) for engine in engines)]
    recall = {row["engine"]: row["recall"] for row in found["searches"]}
    assert recall["exact"] == 1
    if FAISS:
        assert recall["faiss"] <= recall["faiss, 64 ranked"] <= 1
        assert "FAISS is left out below 256 vectors" in printed
    else:
        assert printed.count("FAISS is left out: it is not installed (pip install") == 1


@pytest.mark.slow
def test_the_overhead_of_the_loop_is_measured_beside_a_bare_one(tmp_path: Path) -> None:
    shape = ("--rows=2", "--length=16", "--decoder=2,16,2", "--tower=1,16,2", "--rounds=2")
    printed, found = benchmark(tmp_path, "overhead", *shape, "--turn_steps=4", "--save_every=50")
    systems = found["systems"]
    assert list(systems) == ["bare", "guarded", "loop"]
    assert systems["bare"]["ratio"] == systems["bare"]["processor_ratio"] == 1
    # parameters and two moments, and little besides
    assert found["checkpoint"]["bytes"] > 3 * 4 * 16 * 8000
    for part in ("clock", "processor"):
        saved = found["checkpoint"][part]
        assert saved["interval"][0] <= saved["seconds"] <= saved["interval"][1]
        assert f"{saved['overhead']:.2%}" in printed
    spread = found["checkpoint"]["clock"]["seconds"] / 50 / systems["bare"]["seconds"]
    overhead = found["checkpoint"]["clock"]["overhead"]
    assert overhead == pytest.approx(systems["loop"]["ratio"] - 1 + spread)


@pytest.mark.slow
def test_the_cost_of_retrieval_is_measured_of_every_system(tmp_path: Path) -> None:
    shape = ("--rows=1", "--length=16", "--decoder=2,16,2", "--tower=1,16,2", "--rounds=1")
    png = tmp_path / "cost.png"
    _, found = benchmark(tmp_path, "valm_cost", "--index_sizes=300", *shape, f"--png={png}")
    systems = found["sizes"][0]["systems"]
    approximate = ["faiss", "faiss_ranked"] if FAISS else []
    assert list(systems) == ["gpt2", "blind", "prepared", "valm", *approximate]
    assert systems["gpt2"]["ratio"] == 1
    retrieving = [name for name, system in systems.items() if "share" in system]
    assert retrieving == ["prepared", "valm", *approximate]
    assert png.read_bytes().startswith(b"\x89PNG")
