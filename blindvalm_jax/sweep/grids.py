"""Families x sizes x budgets as runs: each within 1 % of its budget, settings by stated rules.

A config of a grid gives `base` (settings of all), `families` (what each changes in them, nested as
they are) and `grid` (see `Grid`); the command line edits all three, as in
--config.grid.budgets='(1e12,)' or --config.base.data.files='text/*'. What a token costs is
`costs.of_settings.account`'s: frozen towers and retrieval are in it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from blindvalm_jax import config as schema
from blindvalm_jax import config_fields, presets
from blindvalm_jax.config import Config
from blindvalm_jax.config_fields import field
from blindvalm_jax.costs import of_settings
from blindvalm_jax.costs.account import Account
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.decoder import padded_vocab
from blindvalm_jax.scaling import rules
from blindvalm_jax.sweep import trunks

TOLERANCE = 0.01  # how far the FLOPs of a run may lie from its budget
_LEAST_UPDATES = 50  # in whole numbers of which a budget is met within 1 %
KEYS = ("base", "families", "grid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What is trained of each family. branches: the lengths of a size share the longest's trunk."""

    sizes: tuple[str, ...] = field((), "decoders, as LAYERSxWIDTHxHEADS")
    budgets: tuple[float, ...] = field((), "model FLOPs of a run, ascending")
    tokens_a_parameter: tuple[float, ...] = field(
        (0.0, 1e9), "least and most: sizes beyond are left out of a budget"
    )
    branches: bool = field(True, "shorter runs leave the longest of their size at its cooldown")
    rules: rules.Rules = dataclasses.field(default_factory=rules.Rules)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run before it is trained.

    size: LAYERSxWIDTH. budget: model FLOPs that runs to be compared have in common. n: trained
    parameters, the head counted, the vocabulary's padding not. tokens: of the whole run, and flops:
    what they cost (docs/costs.md), also where a branch shares them with its trunk.
    """

    settings: Config
    family: str
    size: str
    budget: float
    n: int
    tokens: int
    flops: float

    @property
    def share(self) -> float:
        """Of the run that it trains itself: a branch what comes behind its trunk."""
        trunk = trunks.of(self.settings)
        return 1.0 if trunk is None else 1 - trunk.step / self.settings.train.steps


def default() -> ConfigDict:
    """A grid of nothing, for a config file to fill."""
    return ConfigDict(
        {"base": schema.default(), "families": {}, "grid": dataclasses.asdict(Grid())}
    )


def variants(base: ConfigDict, names: tuple[str, ...]) -> ConfigDict:
    """Families of `presets.variant`: what each grounds on, with the tower and index of `base`."""
    found = ConfigDict()
    for name in names:
        grounding = presets.variant(copy.deepcopy(base), name).grounding
        kept = ("source", "neighbours", "readout", "control")
        found[name] = {"grounding": {key: grounding[key] for key in kept}}
        if grounding.source == "none":
            found[name].grounding.tower = ""
        if grounding.source != "images":
            found[name].grounding.index, found[name].grounding.search = "", "exact"
    return found


def expand(given: Mapping[str, Any]) -> dict[str, Planned]:
    """The runs of a grid: whole ones, by size, then branches of these, by budget.

    Families take turns, so that a machine that slows down for a while does so for all of them.

    Raises:
      UserError: fields or settings do not fit, or a budget cannot be met.
    """
    grid: Grid = config_fields.build(Grid, given["grid"].to_dict(), "grid")
    _check(grid, given["families"])
    whole: dict[str, Planned] = {}
    branches: dict[str, Planned] = {}
    for size, (family, changes) in itertools.product(grid.sizes, given["families"].items()):
        runs = _of_size(grid, given["base"], family, changes, size)
        names = list(runs)
        longest = names[-1:]
        for name, planned in runs.items():
            shares = grid.branches and name not in longest
            (branches if shares else whole)[name] = planned
        if grid.branches and len(names) > 1:
            steps = tuple(_cools(runs[name].settings) for name in names[:-1])
            whole[names[-1]] = _keeping(runs[names[-1]], steps)
            for name, step in zip(names[:-1], steps, strict=True):
                branches[name] = _branch(runs[name], trunk=names[-1], step=step)
    if not whole:
        raise UserError("the grid has no runs: grid.tokens_a_parameter leaves out all sizes")
    by_budget = sorted(branches.items(), key=lambda item: item[1].budget)
    return {**whole, **dict(by_budget)}


def _check(grid: Grid, families: Mapping[str, Any]) -> None:
    for name, values in (("families", families), ("sizes", grid.sizes), ("budgets", grid.budgets)):
        if not values:
            where = name if name == "families" else f"grid.{name}"
            raise UserError(f"{where} is empty: give one or more")
    numbers = [*grid.budgets, *grid.tokens_a_parameter]
    if not all(isinstance(x, int | float) and x >= 0 for x in numbers):
        raise UserError(f"grid.budgets and grid.tokens_a_parameter must be numbers, got {numbers}")
    if sorted(set(grid.budgets)) != list(grid.budgets) or not grid.budgets[0]:
        raise UserError(f"grid.budgets must ascend from above 0, got {grid.budgets}")
    if len(grid.tokens_a_parameter) != 2:
        raise UserError(
            f"grid.tokens_a_parameter is a least and a most, got {grid.tokens_a_parameter}"
        )


def _of_size(
    grid: Grid, base: ConfigDict, family: str, changes: ConfigDict, size: str
) -> dict[str, Planned]:
    """The runs of a family at a size, from the smallest budget."""
    settings = copy.deepcopy(base)
    decoder = settings.decoder
    decoder.layers, decoder.width, decoder.heads = _shape(size)
    try:
        settings.update(changes)
        parsed = schema.parse(settings)
        account = of_settings.account(parsed)
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"families.{family} with {size}: {error}") from error
    n = counted(account, parsed)
    chosen = rules.chosen(grid.rules, n)
    settings.train.batch_size = chosen.batch_size
    settings.optimizer.learning_rate = chosen.learning_rate
    tokens = chosen.batch_size * settings.data.sequence_length
    least, most = grid.tokens_a_parameter
    runs = {}
    for budget in grid.budgets:
        updates = round(budget / (account.training * tokens))
        if not least <= updates * tokens / n <= most:
            continue
        shape = f"{decoder.layers}x{decoder.width}"
        name = f"{family}-{shape}-{label(budget)}"
        flops = account.training * tokens * updates
        if abs(flops / budget - 1) > TOLERANCE or updates < _LEAST_UPDATES:
            raise UserError(
                f"run {name}: {updates} updates of {tokens} tokens cost {flops:.3g} FLOPs, the "
                f"budget is {budget:.3g}; within {TOLERANCE:.0%} and {_LEAST_UPDATES} updates or "
                "more are needed: a smaller grid.rules.batch_size, or without that size"
            )
        settings.train.steps = updates
        runs[name] = Planned(
            settings=schema.parse(settings),
            family=family,
            size=shape,
            budget=budget,
            n=n,
            tokens=updates * tokens,
            flops=flops,
        )
    shortest = min((planned.settings.train.steps for planned in runs.values()), default=0)
    return {
        name: _warmed(
            planned,
            rules.warmup(
                grid.rules,
                n=n,
                updates=shortest if grid.branches else planned.settings.train.steps,
                tokens=tokens,
            ),
        )
        for name, planned in runs.items()
    }


def counted(account: Account, settings: Config) -> int:
    """N of a run: its trained parameters but for rows of the table that no token has."""
    decoder = settings.decoder
    padding = padded_vocab(account.vocabulary, decoder.vocab_multiple) - account.vocabulary
    return account.parameters - padding * decoder.width


def _shape(size: str) -> tuple[int, int, int]:
    try:
        layers, width, heads = map(int, size.split("x"))
    except ValueError:
        raise UserError(f"grid.sizes: expected LAYERSxWIDTHxHEADS, got {size!r}") from None
    return layers, width, heads


def label(budget: float) -> str:
    """A budget in a name: 1e12, 3.16e12."""
    digits, _, power = f"{budget:.3g}".partition("e+")
    return f"{digits}e{int(power)}" if power else digits


def _warmed(planned: Planned, updates: int) -> Planned:
    return _with(planned, "optimizer", warmup_steps=updates)


def _cools(settings: Config) -> int:
    """Updates of a run before its learning rate falls.

    Raises:
      UserError: its schedule is of another shape, which no trunk shares.
    """
    optimizer = settings.optimizer
    if optimizer.schedule != "constant_cooldown":
        raise UserError(
            f"grid.branches needs optimizer.schedule=constant_cooldown, got {optimizer.schedule}: "
            "runs of another schedule share no trunk; set grid.branches=False"
        )
    return settings.train.steps - int(max(optimizer.cooldown_fraction * settings.train.steps, 1))


def _keeping(planned: Planned, steps: tuple[int, ...]) -> Planned:
    return _with(planned, "checkpoint", keep_steps=tuple(sorted({*steps})))


def _branch(planned: Planned, *, trunk: str, step: int) -> Planned:
    return _with(planned, "train", branch_from=trunks.name(trunk, step))


def _with(planned: Planned, section: str, **values: Any) -> Planned:
    changed = dataclasses.replace(getattr(planned.settings, section), **values)
    return dataclasses.replace(
        planned, settings=dataclasses.replace(planned.settings, **{section: changed})
    )
