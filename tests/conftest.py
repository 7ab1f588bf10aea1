"""What every test runs under: 8 simulated CPU devices, strict ranks, no network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import jax
import pytest

DEVICES = 8

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests hold millions of objects, all of which Python would look through again and again.
gc.set_threshold(20_000, 20, 20)

# What a test starts in another process inherits the platform; nothing may reach for a model hub.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_report_header() -> str:
    """Versions and devices, so that a log says what was tested."""
    return f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked `torch` or `faiss` where that is not installed."""
    for name in ("torch", "faiss"):
        if item.get_closest_marker(name):
            pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[{name}]'")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden cases and data beside the checkout; without it the test is skipped."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder shared/ (golden cases, data) is not beside the checkout")
    return path
