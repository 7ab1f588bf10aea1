"""Cost of a token: what XLA counts of the compiled step; peaks of devices by their names."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from blindvalm_jax import compilation, config, flops, ladder, optim, partitioning
from blindvalm_jax.objectives.shapes import Shapes
from tests import small_models


def test_flops_of_a_decoder_are_those_that_xla_counts() -> None:
    """To 3 %: XLA counts norms, softmax, the optimizer and keys that are masked as well.

    One block, since XLA counts the body of a loop once.
    """
    rows, length = 32, 32
    values = ladder.rung(config.default(), "10m", "gpt2", length)
    values.decoder.update(layers=1, width=1024, heads=4, vocab_size=2000, fusion_layers=(0,))
    values.train.update(batch_size=rows, dtype="float32", remat="none", loss_chunk=0)
    settings = config.parse(values)
    mesh = partitioning.make_mesh(settings.mesh, jax.devices()[:1])
    objective = Shapes(settings, None, mesh)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    state = compilation.abstract_state(objective.model, optimizer, mesh, guarded=False)
    batch = objective.abstract_batch()
    update = compilation.make_update(settings, objective.model, optimizer)
    with small_models.quick_compilation():
        compiled: Any = compilation.compile_step(update, state, {}, batch, mesh)
    counted = compiled.cost_analysis()["flops"] / (rows * length)
    assert counted == pytest.approx(objective.describe(batch)["flops_per_token"]["total"], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
        ("TPU7x", 1153.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA B200", 2250.0),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all(
    kind: str, peak: float | None
) -> None:
    assert flops.peak_tflops(kind, 0.0) == peak
    assert flops.peak_tflops(kind, 12.5) == 12.5
