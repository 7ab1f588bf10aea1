"""The mean of trained models, a "model soup" (Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.checkpoints.named import Named
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import formats, run_directory
from blindvalm_jax.trees import flatten, unflatten


def average(checkpoints: Sequence[Named]) -> formats.Converted:
    """The model whose every parameter is the mean over checkpoints; summed in float64.

    Raises:
      UserError: there are fewer than two, one is damaged, or they are not of the same model:
        naming what differs.
    """
    if len(set(checkpoints)) < 2 or len(set(checkpoints)) < len(checkpoints):
        raise UserError("average needs two or more different checkpoints, as RUN or RUN@STEP")
    first = run_directory.load(checkpoints[0].run, step=checkpoints[0].step)
    flat = flatten(first.params)
    dtypes = {name: x.dtype for name, x in flat.items()}
    sums = {name: x.astype(np.float64) for name, x in flat.items()}
    for named in checkpoints[1:]:
        model = run_directory.load(named.run, step=named.step)
        _check_alike(checkpoints[0], first, named, model)
        for name, value in flatten(model.params).items():
            sums[name] += value
    params = unflatten(
        {name: (x / len(checkpoints)).astype(dtypes[name]) for name, x in sums.items()}
    )
    return formats.Converted(
        config=first.config,
        params=params,
        source=f"mean of {', '.join(str(named) for named in checkpoints)}",
        tokenizer_directory=first.tokenizer_directory,
        tokenizer=first.tokenizer,
        eos_id=first.eos_id,
    )


def _check_alike(
    one: Named, first: run_directory.Trained, other: Named, model: run_directory.Trained
) -> None:
    before, now = (_described(a, b) for a, b in ((one, first), (other, model)))
    differing = [
        f"{name} is {before.get(name)!r} and {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(f"{one} and {other} are not of the same model: {'; '.join(differing)}")


def _described(named: Named, model: run_directory.Trained) -> dict[str, Any]:
    """All that must be equal for a mean of parameters to mean anything."""
    shape = {k.replace("/", "."): x for k, x in flatten(dataclasses.asdict(model.config)).items()}
    tower = files.read_object(named.run / "run.json").get("tower") or {}
    return {
        "kind": type(model.config).__name__,
        **shape,
        "tokenizer": model.tokenizer["fingerprint"],
        "sha256 of the tower": tower.get("sha256"),
    }
