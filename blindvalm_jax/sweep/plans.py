"""What a sweep's config asks for: its runs by name, in the order of --index."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from blindvalm_jax import config
from blindvalm_jax.config import Config, GroundingConfig
from blindvalm_jax.costs import of_settings
from blindvalm_jax.errors import UserError
from blindvalm_jax.sweep import grids, trunks
from blindvalm_jax.sweep.grids import Planned

CLIP = "clip"  # the family of contrastive runs, of which no law is made


def is_sweep(given: Any) -> bool:
    """Whether a config is that of a sweep: runs that are written out, or a grid of them."""
    return isinstance(given, ConfigDict) and ("runs" in given or "grid" in given)


def settings_of(given: Any) -> dict[str, Config]:
    """The settings of all runs, parsed before any is trained.

    Raises:
      UserError: the config gives no runs, or settings that do not fit.
    """
    if isinstance(given, ConfigDict) and "grid" in given:
        return {name: run.settings for name, run in _grid(given).items()}
    if not isinstance(given, ConfigDict) or "runs" not in given or not given.runs:
        raise UserError(
            "get_config() of a sweep must return a ConfigDict with its runs in `runs`, or a grid: "
            f"{', '.join(grids.KEYS)}"
        )
    runs = {}
    for name, settings in given.runs.items():
        grids.check_name(name, "a run")
        try:
            runs[name] = config.parse(settings)
        except UserError as error:
            raise UserError(f"run {name}: {error}") from error
    trunks.check(runs)
    return runs


def planned(given: Any) -> dict[str, Planned]:
    """The runs with what they are compared by; those written out have families by their grounding.

    Raises:
      UserError: as `settings_of`; or a tower or index that settings name cannot be read.
    """
    if isinstance(given, ConfigDict) and "grid" in given:
        return _grid(given)
    return {name: _described(name, settings) for name, settings in settings_of(given).items()}


def placed(settings: Config, workdir: Path) -> Config:
    """Settings of a run of the sweep in `workdir`: data and what is made of them are shared."""
    settings = trunks.placed(settings, workdir / "runs")
    if settings.data.cache:
        return settings
    shared = dataclasses.replace(settings.data, cache=str((workdir / "data").absolute()))
    return dataclasses.replace(settings, data=shared)


def _grid(given: ConfigDict) -> dict[str, Planned]:
    unknown = sorted(set(given) - set(grids.KEYS))
    lacking = sorted(set(grids.KEYS) - set(given))
    if unknown or lacking:
        raise UserError(
            f"a grid has {', '.join(grids.KEYS)}; unknown: {', '.join(unknown) or 'none'}, "
            f"lacking: {', '.join(lacking) or 'none'}"
        )
    runs = grids.expand(given)
    trunks.check({name: run.settings for name, run in runs.items()})
    return runs


def _described(name: str, settings: Config) -> Planned:
    try:
        account = of_settings.account(settings)
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error
    of_language = settings.train.objective == "language"
    kind = family(settings.grounding) if of_language else CLIP
    return Planned.of(settings, account, family=kind)


def family(grounding: GroundingConfig) -> str:
    """What `presets.variant` calls such a grounding."""
    if grounding.source == "none":
        return "gpt2"
    eos = grounding.readout == "eos"
    if grounding.control != "none":
        return f"{grounding.control}_eos" if eos else grounding.control
    if grounding.source == "images":
        return "valm_eos" if eos else "valm"
    return "eos" if eos else "blind"
