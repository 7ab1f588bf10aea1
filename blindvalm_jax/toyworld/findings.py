"""What the toy-world report reads of results.json: checked, compared by seed, put in words.

The data choose the words: "higher" and "lower" are said of a 95 % interval over seeds that leaves
the other value out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blindvalm_jax.toyworld.world import ATTRIBUTES

COMMAND = "python -m blindvalm_jax.toyworld --workdir=DIR"
WORDINGS = ("seen", "new")
WORDS = {"color": "colour", "shape": "shape", "size": "size"}
CHANGED = {
    "last": "last position only",
    "not_last": "all other positions",
    "nowhere": "nowhere",
}
GIVEN = {
    "one_image": "one image",
    "mean_image": "mean of images",
    "one_image_shifted": "one image, shifted",
    "mean_image_shifted": "mean of images, shifted",
}
LABELS = {
    "gpt2": "GPT-2",
    "blind_valm": "BLIND-VALM token",
    "blind_valm_eos": "BLIND-VALM EOS",
    "valm": "VALM token",
    "valm_eos": "VALM EOS",
    "random_tower": "random tower token",
    "random_tower_eos": "random tower EOS",
    "shuffled": "shuffled token",
    "shuffled_eos": "shuffled EOS",
}
SEES = {
    "gpt2": "nothing; it has the text alone",
    "blind_valm": "the text tower's output at each token",
    "blind_valm_eos": "the tower's embedding of the text so far, as if it ended there",
    "valm": "the images nearest to the tower's output at each token",
    "valm_eos": "the images nearest to the embedding of the text so far",
    "random_tower": "a text tower with random weights, at each token (control)",
    "random_tower_eos": "the embedding that such a tower gives the text so far (control)",
    "shuffled": "the tower's output at the tokens of another text of the batch (control)",
    "shuffled_eos": "the tower's embedding of another text of the batch so far (control)",
}
# What a picture has in common with the object of a prompt; results.json's name -> in words.
RETRIEVED = {"object": "the object itself", "look": "one that looks the same"} | {
    attribute: f"the same {word}" for attribute, word in WORDS.items()
}
CONTROLS = ("random_tower", "random_tower_eos", "shuffled", "shuffled_eos")
PAIRS = (
    *((name, "gpt2") for name in LABELS if name != "gpt2"),
    *(("valm", "blind_valm"), ("valm_eos", "blind_valm_eos"), ("blind_valm_eos", "blind_valm")),
    *(("blind_valm", "random_tower"), ("blind_valm", "shuffled")),
    *(("blind_valm_eos", "random_tower_eos"), ("blind_valm_eos", "shuffled_eos")),
)
# Part of a comparison that is timed -> in words, and what is in results.json where it was made.
STAGES = {
    "world_and_clip": ("worlds, CLIP and indices", "clip"),
    "language": ("language models and their probes", "variants"),
    "bias": ("those of the reporting-bias curve", "bias"),
}
LEARNED = 0.95  # accuracy on stated objects from which they count as learned
# Variant -> attribute -> one accuracy per seed, under some condition; by the condition's name.
Condition = Mapping[str, Mapping[str, Sequence[float]]]
Conditions = Mapping[str, Condition]


def swept(results: Mapping[str, Any]) -> dict[str, str]:
    """Variants of the reporting-bias sweep, labelled with their updates where these are known."""
    variants = results["variants"]
    names = [name for name in results["bias"] if name in LABELS]
    known = {name: f" ({updates(variants[name])} updates)" for name in names if name in variants}
    return {name: LABELS[name] + known.get(name, "") for name in names}


def half_width(values: Sequence[float]) -> float | None:
    """Half of the mean's 95 % t interval; None for a single value, which says nothing of spread."""
    freedom = len(values) - 1
    if freedom == 0:
        return None
    # With t = sqrt(freedom) tan(angle), Student's density is cos(angle) ** (freedom - 1).
    edges = np.linspace(0, np.pi / 2, 50_001)
    mass = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    quantile = np.sqrt(freedom) * np.tan(np.interp(0.95 * mass[-1], mass, edges[1:]))
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


@dataclasses.dataclass(frozen=True)
class Gap:
    """Differences, one per seed: of two variants, two conditions, or to chance.

    least: the mean's interval reaches at least as far as this to both sides.
    """

    values: list[float]
    least: float = 0.0

    @classmethod
    def between(cls, mine: Sequence[float], base: Sequence[float]) -> Gap:
        """Pairs the seeds."""
        return cls([a - b for a, b in zip(mine, base, strict=True)])

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.values))

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval; None for a single seed."""
        half = half_width(self.values)
        return None if half is None else max(half, self.least)

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval leaves out zero; never of a single seed."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def word(self) -> str:
        """Higher or lower where that is clear; of a single seed, what it shows."""
        if len(self.values) == 1:
            return f"{'above' if self.mean > 0 else 'below' if self.mean else 'equal'} in one seed"
        return ("higher" if self.mean > 0 else "lower") if self.clear else "not clear over seeds"

    @property
    def cell(self) -> str:
        """Mean and interval, bold where it leaves out zero."""
        return f"**{self}**" if self.clear else str(self)

    def __str__(self) -> str:
        """Mean and interval."""
        mean, half = self.mean, self.half
        return (
            f"{mean:+.3f}"
            if half is None
            else f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a variant to another; after: the updates of both if these differ."""

    mine: str
    base: str
    gaps: Mapping[str, Gap]
    after: str

    @property
    def fools(self) -> bool:
        """Whether perplexity is clearly lower but colour not clearly other, equally trained."""
        lower = self.gaps["perplexity"].word == "lower"
        return lower and not self.gaps["color"].clear and not self.after


def differences(variants: Mapping[str, Any]) -> list[Difference]:
    """Of all `PAIRS` that are there: accuracies and perplexity."""
    found = []
    for mine, base in PAIRS:
        if {mine, base} <= set(variants):
            pair = variants[mine], variants[base]
            keys = (*ATTRIBUTES, "perplexity")
            gaps = {key: Gap.between(pair[0][key], pair[1][key]) for key in keys}
            after = " (after {} against {} updates)".format(*map(updates, pair))
            found.append(Difference(mine, base, gaps, "" if equally_long(*pair) else after))
    return found


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of variants: seconds of an update by seed; MFLOPs; ratios to GPT-2.

    beside: runs were timed side by side, or it is not known, so that seeds are no pairs.
    """

    beside: bool
    seconds: Mapping[str, Sequence[float]]
    mflops: Mapping[str, float]

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Costs:
        """Of the results; runs that were not made at one go may have run side by side."""
        variants, timed = results["variants"], results.get("timed", {}).get("language")
        beside = timed is None or timed["jobs"] > 1
        seconds = {k: v["step_seconds"] for k, v in variants.items()}
        return cls(beside, seconds, {k: v["flops_per_token"] / 1e6 for k, v in variants.items()})

    @property
    def times(self) -> dict[str, list[float]]:
        """Seconds over GPT-2's: those of the same seed, or, `beside`, their median."""
        base = self.seconds["gpt2"]
        if self.beside:
            base = [float(np.median(base))] * len(base)
        return {k: [a / b for a, b in zip(v, base, strict=True)] for k, v in self.seconds.items()}

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs over GPT-2's."""
        return {k: value / self.mflops["gpt2"] for k, value in self.mflops.items()}


def against(mine: Condition, base: Condition) -> dict[str, dict[str, Gap]]:
    """One condition against another: variant -> attribute -> difference."""
    return {
        name: {a: Gap.between(mine[name][a], base[name][a]) for a in ATTRIBUTES} for name in base
    }


def against_chance(
    found: Condition, errors: Condition, chance: Mapping[str, float]
) -> dict[str, dict[str, Gap]]:
    """Accuracies against guessing: variant -> attribute -> difference.

    errors: standard errors of the accuracies over objects. Seeds that happen to agree tell nothing
    of luck that is common to the few objects of each, so the wider of both intervals is taken.
    """

    def gap(values: Sequence[float], spread: Sequence[float], guessed: float) -> Gap:
        least = 1.96 * float(np.sqrt(np.sum(np.square(spread)))) / len(spread)
        return Gap([value - guessed for value in values], least)

    return {
        name: {a: gap(of[a], errors[name][a], chance[a]) for a in ATTRIBUTES}
        for name, of in found.items()
    }


def mean(values: Sequence[float], digits: int = 3) -> str:
    """The mean and, of several values, ± their standard deviation."""
    middle = f"{np.mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {np.std(values, ddof=1):.{digits}f}"


def each(values: Sequence[float], form: str = "{:.3f}") -> str:
    """All values."""
    return ", ".join(map(form.format, values))


def updates(variant: Mapping[str, Any]) -> str:
    """How long a variant was trained; several numbers if its seeds differ."""
    return " or ".join(f"{steps:,}" for steps in sorted(set(variant["steps"])))


def equally_long(*variants: Mapping[str, Any]) -> bool:
    """Whether variants were trained for the same numbers of updates, seed by seed."""
    return all(variant["steps"] == variants[0]["steps"] for variant in variants)


def durations(variants: Mapping[str, Any]) -> str:
    """How long the variants were trained: once if that is equal, else of each."""
    if equally_long(*variants.values()):
        return f"{updates(next(iter(variants.values())))} updates each"
    of = "; ".join(f"{LABELS[name]} {updates(variant)}" for name, variant in variants.items())
    return f"different numbers of updates ({of})"


def least(found: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> tuple[float, str]:
    """The lowest of the values of all attributes and seeds, and where it is."""
    return min(
        (value, f"{WORDS[attribute]}, seed {seed}")
        for attribute in ATTRIBUTES
        for seed, value in zip(seeds, found[attribute], strict=True)
    )


def farthest(mine: Condition, base: Condition, seeds: Sequence[int]) -> tuple[float, str]:
    """The largest difference of two conditions over variants, attributes, seeds; where it is."""
    return max(
        (abs(a - b), f"{LABELS[name]}, {WORDS[attribute]}, seed {seed}")
        for name, attribute in itertools.product(base, ATTRIBUTES)
        for seed, a, b in zip(seeds, mine[name][attribute], base[name][attribute], strict=True)
    )
