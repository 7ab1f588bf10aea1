"""The runs of a sweep as they are planned: what each is, and what it will cost."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from blindvalm_jax import config
from blindvalm_jax.config import Config
from blindvalm_jax.costs import of_settings


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run: family and size, the budget of its group, N, D and model FLOPs of the whole run."""

    settings: Config
    family: str
    size: str
    budget: float
    n: int
    tokens: int
    flops: float


def planned(given: ConfigDict) -> dict[str, Planned]:
    """The runs that a sweep's config names, in its order."""
    found = {}
    for name, values in given.runs.items():
        settings = config.parse(values)
        account, shape = of_settings.account(settings), settings.decoder
        found[name] = Planned(
            settings=settings,
            family=_family(settings),
            size=f"{shape.layers}x{shape.width}",
            budget=account.budget,
            n=account.parameters,
            tokens=account.units,
            flops=account.budget,
        )
    return found


def _family(settings: Config) -> str:
    grounding = settings.grounding
    if grounding.source == "none":
        return "gpt2"
    if grounding.control != "none":
        return grounding.control
    names = {"text": ("blind", "eos"), "images": ("valm", "valm_eos")}[grounding.source]
    return names[grounding.readout == "eos"]
