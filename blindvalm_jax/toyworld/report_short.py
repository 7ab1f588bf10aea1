"""The findings of a toy-world report, a sentence each: what is there of them, computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blindvalm_jax.toyworld import figures, findings
from blindvalm_jax.toyworld.findings import LABELS, WORDS, Gap, each, mean
from blindvalm_jax.toyworld.world import ATTRIBUTES

_EOS, _TOKEN = ("valm_eos", "blind_valm_eos"), ("valm", "blind_valm")


def in_short(page: figures.Page) -> list[str]:
    """A list of sentences with links to the sections that they come from."""
    return [f"- {line}" for part in _PARTS for line in part(page)]


def _against_gpt2(page: figures.Page) -> list[str]:
    found = page.variants
    if not {"gpt2", "blind_valm_eos"} <= set(found):
        return []
    controls = [float(np.mean(found[k]["color"])) for k in findings.CONTROLS if k in found]
    between = f", controls {min(controls):.3f} to {max(controls):.3f}" if controls else ""
    return [
        "No sentence states the colour of a held-out object. BLIND-VALM EOS says the right one in "
        f"{mean(found['blind_valm_eos']['color'])} of cases, GPT-2 in "
        f"{mean(found['gpt2']['color'])}{between}; chance is {page.results['chance']['color']:.3f} "
        "([answers](#what-they-answer))."
    ]


def _by_seed(page: figures.Page) -> list[str]:
    found = [name for name in reversed(_TOKEN) if name in page.variants]
    if not found or page.seeds == 1:
        return []
    told = "; ".join(f"{LABELS[k]} {each(page.variants[k]['color'], '{:.2f}')}" for k in found)
    return [f"The same with the token readout, seed by seed: {told}."]


def _images(page: figures.Page) -> list[str]:
    lines = []
    for mine, base in (_EOS, _TOKEN):
        if {mine, base} <= set(page.variants):
            pair = page.variants[mine], page.variants[base]
            gaps = {a: Gap.between(pair[0][a], pair[1][a]) for a in ATTRIBUTES}
            told = ", ".join(f"{WORDS[a]} {gap} ({gap.word})" for a, gap in gaps.items())
            lines.append(
                f"{LABELS[mine]} less {LABELS[base]}: {told} ([differences](#differences))."
            )
    return lines


def _swapped(page: figures.Page) -> list[str]:
    found = page.results.get("attribution", {}).get("blind_valm_eos")
    if found is None:
        return []
    color = found["swapped"]["color"]
    return [
        "Given the features of another object, BLIND-VALM EOS says that object's colour in "
        f"{mean(color['donor'])} of cases and its own in {mean(color['own'])} "
        "([what answers rest on](#what-the-answers-rest-on))."
    ]


def _features(page: figures.Page) -> list[str]:
    found = page.variants.get("blind_valm", {})
    if "linear" not in found:
        return []
    said = found["objects"]["heldout"]["seen"]["color"]
    return [
        f"A linear map reads the colour from token features in {mean(found['linear']['color'])} of "
        f"cases, while BLIND-VALM token, which has them, says it in {mean(said)} of the same "
        "prompts ([what features hold](#what-the-features-hold))."
    ]


def _given(page: figures.Page) -> list[str]:
    found = page.results.get("given", {}).get("blind_valm_eos", {}).get("mean_image_shifted")
    if found is None:
        return []
    text = page.variants["blind_valm_eos"]
    gaps = {a: Gap.between(found[a], text[a]) for a in ATTRIBUTES}
    told = ", ".join(f"{WORDS[a]} {gap}" for a, gap in gaps.items())
    return [
        "Handed the mean embedding of an object's pictures, moved to where texts are, in place of "
        f"text features, BLIND-VALM EOS changes by: {told} "
        "([images](#images-instead-of-text))."
    ]


def _stated(page: figures.Page) -> list[str]:
    bias = page.results.get("bias", {})
    if "gpt2" not in bias:
        return []
    shares, colors = bias["stated_heldout"], bias["gpt2"]["color"]
    told = ", ".join(
        f"{mean(values)} at {100 * share:g} %" for share, values in zip(shares, colors, strict=True)
    )
    last = f"{100 * shares[-1]:g} %"
    gaps = {f"at {last} less at {100 * shares[0]:g} %": Gap.between(colors[-1], colors[0])}
    if "blind_valm_eos" in bias:
        other = Gap.between(colors[-1], bias["blind_valm_eos"]["color"][-1])
        gaps[f"less BLIND-VALM EOS, both at {last}"] = other
    compared = "; ".join(f"{what}: {gap} ({gap.word})" for what, gap in gaps.items())
    return [
        "GPT-2 where sentences about held-out objects state an attribute in some share of cases, "
        f"colour in seen wordings: {told}; {compared} "
        "([how often](#how-often-text-would-have-to-say-it))."
    ]


def _cost(page: figures.Page) -> list[str]:
    if "gpt2" not in page.variants:
        return []
    flops = findings.Costs.of(page.results).flops
    told = ", ".join(
        f"{LABELS[k]} {flops[k]:.2f}"
        for k in ("blind_valm", "blind_valm_eos", "valm", "valm_eos")
        if k in flops
    )
    return [f"FLOPs of an update relative to GPT-2's: {told} ([cost](#cost))."]


_PARTS: tuple[Callable[[figures.Page], list[str]], ...] = (
    _against_gpt2,
    _by_seed,
    _images,
    _swapped,
    _features,
    _given,
    _stated,
    _cost,
)
