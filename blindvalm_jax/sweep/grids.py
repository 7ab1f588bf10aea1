"""Families x sizes x budgets as runs: each within 1 % of its budget, settings by stated rules.

A config of a grid gives `base` (settings of all), `families` (what each changes in them, nested as
they are) and `grid` (see `Grid`); the command line edits what they hold, as in
--config.grid.budgets='(1e12,)' or --config.base.data.files='text/*'. What a token costs is
`costs.of_settings.account`'s: frozen towers and retrieval are in it. Decoder sizes, lengths, and
what the rules say are the grid's to set; at a size they are the same for all families, so that
these differ in nothing but what makes them one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from blindvalm_jax import addresses, config_fields, presets
from blindvalm_jax import config as schema
from blindvalm_jax.config import Config
from blindvalm_jax.config_fields import field
from blindvalm_jax.costs import of_settings
from blindvalm_jax.costs.account import Account
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.decoder import padded_vocab
from blindvalm_jax.scaling import isoflop, rules
from blindvalm_jax.sweep import trunks

TOLERANCE = 0.01  # how far the FLOPs of a run may lie from its budget
_LEAST_UPDATES = 50  # in whole numbers of which a budget is met within 1 %
KEYS = ("base", "families", "grid")
# What the grid sets, which a family cannot.
_OWN = {
    "decoder": ("layers", "width", "heads"),
    "train": ("steps", "batch_size", "branch_from"),
    "optimizer": ("learning_rate", "warmup_steps"),
    "checkpoint": ("keep_steps",),
}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


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

    account: of its settings. size: LAYERSxWIDTH. budget: model FLOPs that runs to be compared have
    in common. n: trained parameters, the head counted, the vocabulary's padding not. tokens: of the
    whole run, and flops: what they cost (docs/costs.md), also where a branch shares them with its
    trunk.
    """

    settings: Config
    account: Account
    family: str
    size: str
    budget: float

    @classmethod
    def of(
        cls, settings: Config, account: Account, *, family: str, budget: float | None = None
    ) -> Planned:
        """A run; budget: None where it is compared by what it costs itself."""
        shape = settings.decoder if account.unit == "token" else settings.clip.text
        rows = settings.train.steps * settings.train.batch_size
        units = rows * (settings.data.sequence_length if account.unit == "token" else 1)
        account = dataclasses.replace(account, units=units)
        return cls(
            settings=settings,
            account=account,
            family=family,
            size=f"{shape.layers}x{shape.width}",
            budget=account.budget if budget is None else budget,
        )

    @property
    def n(self) -> int:
        """Trained parameters, without rows of the table that no token has."""
        return counted(self.account, self.settings)

    @property
    def tokens(self) -> int:
        """D of the whole run."""
        return self.account.units

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole run."""
        return self.account.budget

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
    plain = schema.default().grounding
    of_images = ("index", "search", "prepared", "nprobe", "rerank", "lists", "code_bytes")
    found = ConfigDict()
    for name in names:
        grounding = presets.variant(copy.deepcopy(base), name).grounding
        kept = ("source", "neighbours", "readout", "control")
        found[name] = {"grounding": {key: grounding[key] for key in kept}}
        if grounding.source == "none":
            found[name].grounding.tower = ""
        if grounding.source != "images":
            found[name].grounding.update({key: plain[key] for key in of_images})
    return found


def expand(given: Mapping[str, Any]) -> dict[str, Planned]:
    """The runs of a grid: whole ones, by size, then branches of these, by budget.

    Families take turns, so that a machine that slows down for a while does so for all of them.

    Raises:
      UserError: fields or settings do not fit, or a budget cannot be met.
    """
    grid: Grid = config_fields.build(Grid, given["grid"].to_dict(), "grid")
    _check(grid, given["base"], given["families"])
    runs: dict[str, Planned] = {}
    misfits: list[str] = []
    for size in grid.sizes:
        models = {
            family: _model(given["base"], family, changes, size)
            for family, changes in given["families"].items()
        }
        for name, run in _of_size(grid, models, misfits).items():
            if name in runs:
                raise UserError(f"two runs of the grid are called {name}: leave one out")
            runs[name] = run
    if misfits:
        more = f" (and {len(misfits) - 1} more runs)" if len(misfits) > 1 else ""
        raise UserError(
            f"{misfits[0]}{more}: within {TOLERANCE:.0%} and {_LEAST_UPDATES} updates or more are "
            "needed; take a smaller grid.rules.batch_size, or leave them out by "
            "grid.tokens_a_parameter"
        )
    if not runs:
        raise UserError("the grid has no runs: grid.tokens_a_parameter leaves out all sizes")
    whole = {name: run for name, run in runs.items() if trunks.of(run.settings) is None}
    branches = [(name, run) for name, run in runs.items() if name not in whole]
    return {**whole, **dict(sorted(branches, key=lambda item: item[1].budget))}


def thin(runs: Iterable[Planned]) -> list[str]:
    """A line for each family and budget with fewer or closer sizes than an isoFLOP curve needs."""
    groups: dict[tuple[str, float], set[int]] = {}
    for run in runs:
        groups.setdefault((run.family, run.budget), set()).add(run.n)
    return [
        f"{family} at {budget:.3g} FLOPs: {len(sizes)} sizes over {max(sizes) / min(sizes):.1f} x "
        f"in N; {isoflop.SIZES} over {isoflop.SPAN:g} x tell where the best one lies"
        for (family, budget), sizes in groups.items()
        if len(sizes) < isoflop.SIZES or max(sizes) < isoflop.SPAN * min(sizes)
    ]


def counted(account: Account, settings: Config) -> int:
    """N of a run: its trained parameters but for rows of the table that no token has."""
    if account.unit != "token":
        return account.parameters
    decoder = settings.decoder
    padding = padded_vocab(account.vocabulary, decoder.vocab_multiple) - account.vocabulary
    return account.parameters - padding * decoder.width


def label(budget: float) -> str:
    """A budget in a name: 1e12, 3.16e12."""
    digits, _, power = f"{budget:.3g}".partition("e+")
    return f"{digits}e{int(power)}" if power else digits


def check_name(name: str, what: str) -> None:
    """Refuses what can be no directory's name.

    Raises:
      UserError: it has other characters.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} is called {name!r}: names are letters, digits, - _ and ., not first"
        )


def _check(grid: Grid, base: ConfigDict, families: Mapping[str, Any]) -> None:
    for name, values in (("families", families), ("sizes", grid.sizes), ("budgets", grid.budgets)):
        if not values:
            where = name if name == "families" else f"grid.{name}"
            raise UserError(f"{where} is empty: give one or more")
    numbers = [*grid.budgets, *grid.tokens_a_parameter]
    if not all(isinstance(x, int | float) and 0 <= x < math.inf for x in numbers):
        raise UserError(f"grid.budgets and grid.tokens_a_parameter must be numbers, got {numbers}")
    if sorted(set(grid.budgets)) != list(grid.budgets) or not grid.budgets[0]:
        raise UserError(f"grid.budgets must ascend from above 0, got {grid.budgets}")
    if len({label(budget) for budget in grid.budgets}) < len(grid.budgets):
        raise UserError(f"grid.budgets must differ in three digits, got {grid.budgets}")
    if len(grid.tokens_a_parameter) != 2:
        raise UserError(
            f"grid.tokens_a_parameter is a least and a most, got {grid.tokens_a_parameter}"
        )
    if base.train.objective != "language":
        raise UserError("a grid is of language models: leave base.train.objective at language")
    if base.train.branch_from:
        raise UserError("base.train.branch_from: the runs of a grid begin anew; leave it out")
    for family, changes in families.items():
        check_name(family, "a family")
        if not isinstance(changes, ConfigDict):
            raise UserError(f"families.{family} must be settings, got {changes!r}")
        for section, own in _OWN.items():
            for key in own:
                if key in changes.get(section, {}):
                    raise UserError(
                        f"families.{family}.{section}.{key}: the grid sets it, the same for all "
                        "families"
                    )


def _model(
    base: ConfigDict, family: str, changes: ConfigDict, size: str
) -> tuple[ConfigDict, Account, int]:
    """Settings of a family at a size, what they cost, and N."""
    settings = copy.deepcopy(base)
    decoder = settings.decoder
    decoder.layers, decoder.width, decoder.heads = _shape(size)
    try:
        settings.update(changes)
        parsed = schema.parse(settings)
        _check_here(parsed, "grounding.tower", "grounding.index", "tokenizer.path")
        account = of_settings.account(parsed)
        if account.guessed:
            _check_here(parsed, "data.windows")
            raise UserError(account.guessed[0])
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"families.{family} with {size}: {error}") from error
    return settings, account, counted(account, parsed)


def _check_here(settings: Config, *names: str) -> None:
    for name in names:
        section, _, key = name.partition(".")
        value = getattr(getattr(settings, section), key)
        if addresses.is_address(value):
            raise UserError(
                f"{name}={value}: a grid reads how large it is before anything is brought: copy "
                "it here (python -m blindvalm_jax.remote, or the store's own tools) or mount it, "
                "and give the path"
            )


def _shape(size: Any) -> tuple[int, int, int]:
    try:
        layers, width, heads = map(int, str(size).split("x"))
    except ValueError:
        raise UserError(f"grid.sizes: expected LAYERSxWIDTHxHEADS, got {size!r}") from None
    return layers, width, heads


def _of_size(
    grid: Grid, models: Mapping[str, tuple[ConfigDict, Account, int]], misfits: list[str]
) -> dict[str, Planned]:
    """The runs of all families at a size; misfits: runs that cannot meet their budget are added."""
    n = min(n for _, _, n in models.values())
    chosen = rules.chosen(grid.rules, n)
    runs: dict[str, dict[float, Planned]] = {}
    for family, (settings, account, _) in models.items():
        settings.train.batch_size = chosen.batch_size
        settings.optimizer.learning_rate = chosen.learning_rate
        runs[family] = dict(_lengths(grid, family, settings, account, misfits))
    all_runs = [run for of_family in runs.values() for run in of_family.values()]
    for of_family in runs.values():
        for budget, run in of_family.items():
            alike = all_runs if grid.branches else [x for x in all_runs if x.budget == budget]
            warmup = rules.warmup(
                grid.rules,
                n=n,
                updates=min(one.settings.train.steps for one in alike),
                tokens=chosen.batch_size * run.settings.data.sequence_length,
            )
            of_family[budget] = _with(run, "optimizer", warmup_steps=warmup)
    named: dict[str, Planned] = {}
    for family, of_family in runs.items():
        names = [f"{family}-{run.size}-{label(run.budget)}" for run in of_family.values()]
        branched = grid.branches and not misfits
        shared = _branched(names, [*of_family.values()]) if branched else of_family.values()
        named |= dict(zip(names, shared, strict=True))
    return named


def _lengths(
    grid: Grid, family: str, settings: ConfigDict, account: Account, misfits: list[str]
) -> Iterator[tuple[float, Planned]]:
    """The runs of a family at a size by their budgets, ascending."""
    tokens = settings.train.batch_size * settings.data.sequence_length
    least, most = grid.tokens_a_parameter
    for budget in grid.budgets:
        settings.train.steps = updates = max(1, round(budget / (account.training * tokens)))
        try:
            run = Planned.of(schema.parse(settings), account, family=family, budget=budget)
        except UserError as error:
            raise UserError(f"families.{family}, batches by grid.rules: {error}") from error
        if not least <= run.tokens / run.n <= most:
            continue
        if abs(run.flops / budget - 1) > TOLERANCE or updates < _LEAST_UPDATES:
            misfits.append(
                f"run {family}-{run.size}-{label(budget)}: {updates} updates of {tokens} tokens "
                f"cost {run.flops:.3g} FLOPs, the budget is {budget:.3g}"
            )
        yield budget, run


def _branched(names: Sequence[str], runs: Sequence[Planned]) -> list[Planned]:
    """The same runs, from the shortest, with the trunk of the longest for all."""
    if len(runs) < 2:
        return [*runs]
    *short, longest = runs
    steps = [_cools(run.settings) for run in short]
    kept = _with(longest, "checkpoint", keep_steps=tuple(sorted({*steps})))
    places = [trunks.name(names[-1], step) for step in steps]
    return [
        *(_with(x, "train", branch_from=at) for x, at in zip(short, places, strict=True)),
        kept,
    ]


def _cools(settings: Config) -> int:
    """Updates of a run before its learning rate falls.

    Raises:
      UserError: its schedule is of another shape, which no trunk shares.
    """
    optimizer, steps = settings.optimizer, settings.train.steps
    if optimizer.schedule != "constant_cooldown":
        raise UserError(
            f"grid.branches needs optimizer.schedule=constant_cooldown, got {optimizer.schedule}: "
            "runs of another schedule share no trunk; set grid.branches=False"
        )
    whole = steps - int(max(optimizer.cooldown_fraction * steps, 1))
    if whole <= optimizer.warmup_steps:
        raise UserError(
            f"optimizer.cooldown_fraction={optimizer.cooldown_fraction} of {steps} updates leaves "
            "no constant rate for lengths to share: set it lower, or grid.branches=False"
        )
    return whole


def _with(planned: Planned, section: str, **values: Any) -> Planned:
    changed = dataclasses.replace(getattr(planned.settings, section), **values)
    return dataclasses.replace(
        planned, settings=dataclasses.replace(planned.settings, **{section: changed})
    )
