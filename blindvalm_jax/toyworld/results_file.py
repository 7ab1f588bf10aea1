"""What a report needs of results.json: that all of it is there, a number for every seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld.findings import (
    CHANGED,
    COMMAND,
    GIVEN,
    LABELS,
    RETRIEVED,
    STAGES,
    WORDINGS,
)
from blindvalm_jax.toyworld.world import ATTRIBUTES, WorldConfig


def check(results: Mapping[str, Any]) -> WorldConfig:
    """The world of the first seed, if all that the report reads of the results is there.

    Raises:
      UserError: something is missing, or is not a number per seed.
    """
    seeds, variants = _at(results, "seeds"), _at(results, "variants")
    if not seeds or not variants or not set(variants) <= set(LABELS):
        raise UserError(f"results: need seeds and variants of {[*LABELS]}, got {[*variants]}")
    for path in _per_seed(results):
        _check_numbers(_at(results, *path), ".".join(path), len(seeds))
    of_variant = itertools.product(("variants",), variants, ("parameters", "flops_per_token"))
    timed = itertools.product(("timed",), results.get("timed", ()), ("seconds", "jobs"))
    for path in (*(("chance", attribute) for attribute in ATTRIBUTES), *of_variant, *timed):
        if not _finite([_at(results, *path)]):
            raise UserError(f"results: {'.'.join(path)} must be a number")
    for name in variants:
        curves = _at(results, "variants", name, "curves")
        if len(curves) != len(seeds) or not all(_at(curve, "loss") for curve in curves):
            raise UserError(f"results: variants.{name}.curves must be {len(seeds)}, one per seed")
    if unknown := sorted(set(results.get("timed", ())) - set(STAGES)):
        raise UserError(f"results: timed may hold {[*STAGES]}, got {unknown}")
    if "neighbours" in results:
        rows = {str(place): row for place, row in enumerate(results["neighbours"])}
        for where in itertools.product(rows, ("object", *ATTRIBUTES, "prompt", "images")):
            _at({"neighbours": rows}, "neighbours", *where)
    if "bias" in results:
        _check_bias(results, len(seeds))
    try:
        return WorldConfig(**{**_at(results, "world"), "seed": seeds[0]})
    except TypeError as error:
        raise UserError(f"results: world must hold the knobs of a world alone: {error}") from error


def given_kinds(results: Mapping[str, Any]) -> list[str]:
    """What the variants were given in place of text, in the order of `GIVEN`.

    Raises:
      UserError: nothing, or something unknown.
    """
    found = {kind for kinds in results["given"].values() for kind in kinds}
    if not found or not found <= set(GIVEN):
        raise UserError(f"results: given must hold some of {[*GIVEN]}, got {sorted(found)}")
    return [kind for kind in GIVEN if kind in found]


def _per_seed(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of all that must be one number per seed."""
    for name, variant in results["variants"].items():
        optional = ("attention", "attention_if_even") if "attention" in variant else ()
        for part, keys in (("linear", ATTRIBUTES), ("retrieved", RETRIEVED)):
            if part in variant:
                yield from (("variants", name, part, key) for key in keys)
        for key in (*ATTRIBUTES, "perplexity", "surprise", "steps", "step_seconds", *optional):
            yield "variants", name, key
        for prompts, attribute in itertools.product(("all", "seen"), ATTRIBUTES):
            yield "variants", name, "standard_error", prompts, attribute
        splits = ("train", *sorted({"dev"} & set(_at(variant, "objects"))), "heldout")
        for where in itertools.product(splits, WORDINGS, ATTRIBUTES):
            yield "variants", name, "objects", *where
    swapped = itertools.product(("swapped",), ATTRIBUTES, ("own", "donor"))
    wanted: dict[str, list[tuple[str, ...]]] = {
        "attribution": [*swapped, *itertools.product((*CHANGED, "removed"), ATTRIBUTES)]
    }
    if "given" in results:
        wanted["given"] = [*itertools.product(given_kinds(results), ATTRIBUTES)]
    for part in sorted(set(wanted) & set(results)):
        for name, below in itertools.product(results[part], wanted[part]):
            yield "variants", name, "color"  # to compare with
            yield part, name, *below
    if "clip" in results:
        yield from (("clip", name) for name in results["clip"])


def _check_bias(results: Mapping[str, Any], seeds: int) -> None:
    knob = _at(results, "bias", "stated_heldout")
    if not knob or not _finite(knob):
        raise UserError("results: bias.stated_heldout must be numbers")
    names = sorted({"gpt2", *results["bias"]} & set(LABELS))
    for name, attribute in itertools.product(names, ATTRIBUTES):
        rows = _at(results, "bias", name, attribute)
        if len(rows) != len(knob):
            raise UserError(f"results: bias must have {len(knob)} entries, one per stated_heldout")
        for place, values in enumerate(rows):
            _check_numbers(values, f"bias.{name}.{attribute}.{place}", seeds)


def _check_numbers(values: Any, path: str, seeds: int) -> None:
    if not isinstance(values, list) or len(values) != seeds or not _finite(values):
        raise UserError(f"results: {path} must be {seeds} numbers, one per seed")


def _at(node: Any, *path: str) -> Any:
    """What is at a path of the results."""
    for depth, key in enumerate(path):
        if not isinstance(node, Mapping) or key not in node:
            missing = ".".join(path[: depth + 1])
            raise UserError(f"results: {missing} is missing; write them again: {COMMAND}")
        node = node[key]
    return node


def _finite(values: Iterable[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
