"""An account: FLOPs of a unit by part, parameters, bytes, and what is done only once."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from blindvalm_jax.costs.products import Product

USEFUL = 0.6  # share of positions that hold a token where the reference pads texts to 77
HOST_SEARCH = "search (host)"
_TRAINED_BYTES = 12  # fp32: a parameter and its two moments


class Made(NamedTuple):
    """What is done once: in words, and of what, by which those that are called so differ."""

    what: str
    which: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Line:
    """A part of an account, a unit's FLOPs: counted forward and in training, and all computed.

    bytes: held in training, parameters with their moments, without gradients.
    """

    part: str
    parameters: int
    forward: float
    training: float
    hardware: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """What a run costs.

    unit: token or pair. vocabulary: its entries. once_whole: FLOPs of what is done once, outside of
    the budget, None where nothing tells; once_a_unit: the same of what is done once for each unit.
    units: trained on in all. padded_tower: the frozen tower as the reference pads it (`USEFUL`),
    for comparison. read: bytes of the index that a query reads, which queries of a batch share
    where the search is exact. gathered: bytes of the vectors found for a token. guessed: what is
    taken for granted, as nothing tells it yet, and what to do, a sentence each.
    """

    unit: str
    vocabulary: int
    products: tuple[Product, ...]
    trained: dict[str, int]
    frozen: dict[str, int]
    frozen_bytes: dict[str, float]
    once_whole: dict[Made, float | None]
    units: int
    once_a_unit: dict[Made, float] = dataclasses.field(default_factory=dict)
    padded_tower: tuple[Product, ...] = ()
    read: float | None = None
    gathered: float | None = None
    guessed: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return sum(self.trained.values())

    @property
    def training(self) -> float:
        """Model FLOPs of a unit: the budget."""
        return sum(one.training for one in self.products)

    @property
    def full(self) -> float:
        """With every key counted, as papers do that know no mask, and the vocabulary's padding."""
        return sum(one.full for one in self.products)

    @property
    def padded(self) -> float | None:
        """`full` with the tower as the reference pads it; None without a tower."""
        others = sum(one.full for one in self.products if one.part not in ("tower", "readout"))
        tower = sum(one.full for one in self.padded_tower)
        return others + tower if self.padded_tower else None

    @property
    def hardware(self) -> float:
        """What is computed for a unit, recomputation and padding included."""
        return sum(one.hardware for one in self.products)

    @property
    def budget(self) -> float:
        """Model FLOPs of the whole run."""
        return self.training * self.units

    @property
    def of_devices(self) -> float:
        """Of a unit's model FLOPs what devices compute."""
        return sum(one.training for one in self.products if one.part != HOST_SEARCH)

    @property
    def device_budget(self) -> float:
        """Of the budget what devices compute."""
        return self.of_devices * self.units

    @property
    def once(self) -> dict[Made, float | None]:
        """FLOPs of what is done once, outside of the budget; None where nothing tells."""
        return self.once_whole | {what: x * self.units for what, x in self.once_a_unit.items()}

    def lines(self) -> list[Line]:
        """The account part by part."""
        parts = [one.part for one in self.products]
        names = dict.fromkeys((*parts, *self.trained, *self.frozen, *self.frozen_bytes))
        return [self._line(name) for name in names]

    def _line(self, part: str) -> Line:
        own = [one for one in self.products if one.part == part]
        trained = self.trained.get(part, 0)
        return Line(
            part,
            trained + self.frozen.get(part, 0),
            sum(one.forward for one in own),
            sum(one.training for one in own),
            sum(one.hardware for one in own),
            trained * _TRAINED_BYTES + self.frozen_bytes.get(part, 0.0),
        )
