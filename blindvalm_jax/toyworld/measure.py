"""What is measured of a trained variant: probes, attribution, images in place of text, cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blindvalm_jax import files, system, trained
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.interop import clip_model
from blindvalm_jax.models.vision import VisionTower
from blindvalm_jax.toyworld import language, probing, render
from blindvalm_jax.toyworld.language import Probe
from blindvalm_jax.toyworld.supply import Parts
from blindvalm_jax.toyworld.world import ATTRIBUTES, SPLITS, Object, WorldConfig, objects
from blindvalm_jax.trained import TrainedModel

Accuracies = dict[str, float]
_WORDINGS = ("seen", "new")
_SHOWN = 6  # objects whose neighbours are shown
_NEAREST = 4  # images of a prompt
_RIDGE = 1.0  # on features of unit variance


def measure(workdir: Path, world: WorldConfig, parts: Parts | None = None) -> dict[str, Any]:
    """What results.json holds of a variant and seed, each list's entry alone.

    parts: CLIP and index of the world, for what a model makes of images in the place of text, and
    for which of them are nearest to it.
    """
    model = trained.load(workdir)
    things = objects(world)
    probes = list(language.probes(world, things))
    heldout = [probe for probe in probes if probe.split == "heldout"]
    answers = probing.ask(model, probes)
    right = answers.said == np.array([probe.answer for probe in probes])
    held = np.array([probe.split == "heldout" for probe in probes])
    seen = np.array([probe.wording == "seen" for probe in probes])
    found: dict[str, Any] = {
        **_accuracies(heldout, right[held]),
        "surprise": float(np.mean(answers.nats[held & seen])),
        "standard_error": {
            "all": _standard_errors(heldout, right[held]),
            "seen": _standard_errors(np.array(probes)[held & seen], right[held & seen]),
        },
        "objects": _by_split(probes, right),
        **_training(workdir),
    }
    grounding = model.settings.grounding
    if grounding.source == "none":
        return found
    found["attention"] = float(np.mean(answers.share[held]))
    found["attention_if_even"] = _even_share(model, heldout)
    if grounding.control != "shuffled":  # whose features are those of another text
        found["linear"] = _linear(model, [probe for probe in probes if probe.wording == "seen"])
    if grounding.control == "none":
        found["attribution"] = _attribution(model, things, heldout)
        if parts is not None:
            images = ImageIndex.open(parts.index)
            images.check_tower(str(tower_sha256(workdir)))
            if grounding.source == "text":
                found["given"] = _given(model, parts, world, things, heldout)
            else:
                found["retrieved"] = _retrieved(model, images, world, things, heldout)
    return found


def neighbours(workdir: Path, world: WorldConfig, index: Path) -> list[dict[str, Any]]:
    """For some held-out objects: a prompt, and the images nearest to what the tower says of it."""
    model, images = trained.load(workdir), ImageIndex.open(index)
    images.check_tower(str(tower_sha256(workdir)))
    chosen = [thing for thing in objects(world) if thing.split == "heldout"][:_SHOWN]
    asked = itertools.cycle(ATTRIBUTES)
    prompts = [
        next(p.prompt for p in language.probes(world, [thing]) if p.attribute == attribute)
        for thing, attribute in zip(chosen, asked, strict=False)
    ]
    nearest = _nearest(model, images, prompts)
    return [
        {
            **{name: value for name, value in vars(thing).items() if name in ATTRIBUTES},
            "object": thing.name,
            "prompt": prompt,
            "images": [item["id"] for item in images.items(row)],
        }
        for thing, prompt, row in zip(chosen, prompts, nearest, strict=True)
    ]


def _nearest(model: TrainedModel, images: ImageIndex, prompts: Sequence[str]) -> np.ndarray:
    """Places int[n, K] in the index of the images nearest to what the tower says of prompts."""
    scores = probing.features(model, prompts) @ images.vectors[0 : len(images.vectors)].T
    return np.argsort(-scores, axis=1, kind="stable")[:, :_NEAREST]


def _retrieved(
    model: TrainedModel,
    images: ImageIndex,
    world: WorldConfig,
    things: Sequence[Object],
    probes: Sequence[Probe],
) -> dict[str, float]:
    """What the images nearest to prompts show, as shares of all such images."""
    nearest = _nearest(model, images, [probe.prompt for probe in probes])
    place = {thing.name: number for number, thing in enumerate(things)}
    own = np.array([place[probe.object] for probe in probes])[:, None]
    shown = nearest // world.images_per_object
    looks = {a: np.array([thing.value(a) for thing in things]) for a in ATTRIBUTES}
    same = {a: value[shown] == value[own] for a, value in looks.items()}
    same = {"object": shown == own, "look": np.all([*same.values()], axis=0), **same}
    return {what: float(np.mean(found)) for what, found in same.items()}


def _even_share(model: TrainedModel, probes: Sequence[Probe]) -> float:
    """The grounding's share if attention were even over it and the text behind the start token."""
    keys = model.settings.grounding.neighbours
    sizes = [1 + len(model.tokenizer.encode_lm(probe.prompt)) for probe in probes]
    return float(np.mean([keys / (keys + size) for size in sizes]))


def tower_sha256(workdir: Path) -> str | None:
    """Hash of the tower that a run was trained with; None: it has none."""
    tower = files.read_object(workdir / "run.json")["tower"]
    return None if tower is None else str(tower["sha256"])


def _accuracies(probes: Sequence[Probe], right: np.ndarray) -> Accuracies:
    return {
        attribute: float(np.mean(right[[probe.attribute == attribute for probe in probes]]))
        for attribute in ATTRIBUTES
    }


def _standard_errors(probes: Sequence[Probe], right: np.ndarray) -> Accuracies:
    """Of accuracies, as those of a draw of objects: answers about one object hang together."""
    found = {}
    for attribute in ATTRIBUTES:
        of_object: dict[str, list[bool]] = {}
        for probe, hit in zip(probes, right, strict=True):
            if probe.attribute == attribute:
                of_object.setdefault(probe.object, []).append(hit)
        shares = [np.mean(hits) for hits in of_object.values()]
        found[attribute] = float(np.std(shares, ddof=1) / np.sqrt(len(shares)))
    return found


def _by_split(probes: Sequence[Probe], right: np.ndarray) -> dict[str, dict[str, Accuracies]]:
    table: dict[str, dict[str, Accuracies]] = {}
    for split in SPLITS:
        table[split] = {}
        for wording in _WORDINGS:
            places = [n for n, p in enumerate(probes) if (p.split, p.wording) == (split, wording)]
            table[split][wording] = _accuracies([probes[n] for n in places], right[places])
    return table


def _linear(model: TrainedModel, probes: Sequence[Probe]) -> Accuracies:
    """What a linear map makes of the features behind prompts: learned on train objects."""
    found = {}
    for attribute in ATTRIBUTES:
        asked = [probe for probe in probes if probe.attribute == attribute]
        train, held = (np.array([p.split == x for p in asked]) for x in ("train", "heldout"))
        features = probing.features(model, [probe.prompt for probe in asked])
        values = asked[0].candidates
        answer = np.array([values.index(probe.answer) for probe in asked])
        said = ridge_answers(features[train], answer[train], features[held], classes=len(values))
        found[attribute] = float(np.mean(said == answer[held]))
    return found


def ridge_answers(
    known: np.ndarray, answers: np.ndarray, asked: np.ndarray, *, classes: int
) -> np.ndarray:
    """Classes int[m] of features `asked` [m, E], by ridge regression to one-hot answers.

    known, answers: features [n, E] and their classes int[n], from which it learns.
    """
    middle, scale = known.mean(axis=0), known.std(axis=0) + 1e-6

    def inputs(features: np.ndarray) -> np.ndarray:
        return np.concatenate([(features - middle) / scale, np.ones((len(features), 1))], axis=1)

    x = inputs(known)
    gram = x.T @ x + _RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ np.eye(classes)[answers])
    return np.argmax(inputs(asked) @ weights, axis=1)


def _attribution(
    model: TrainedModel, things: Sequence[Object], probes: Sequence[Probe]
) -> dict[str, Any]:
    """What the answers owe to the grounding, and at which positions."""
    answer = np.array([probe.answer for probe in probes])
    found: dict[str, Any] = {
        where: _accuracies(probes, probing.ask(model, probes, grounded=where).said == answer)
        for where in probing.WHERE
        if where != "everywhere"
    }
    givers = donors(things, probes)
    texts = [
        probe.template.format(name=donor.name) for probe, donor in zip(probes, givers, strict=True)
    ]
    said = probing.ask(model, probes, tower_reads=texts).said
    value = np.array([d.value(p.attribute) for p, d in zip(probes, givers, strict=True)])
    own, donor = _accuracies(probes, said == answer), _accuracies(probes, said == value)
    found["swapped"] = {name: {"own": own[name], "donor": donor[name]} for name in ATTRIBUTES}
    plain = probing.ask(without_fusion(model), probes).said
    found["removed"] = _accuracies(probes, plain == answer)
    return found


def donors(things: Sequence[Object], probes: Sequence[Probe]) -> list[Object]:
    """For each probe another object of its split, with another value of what is asked."""
    rng = np.random.default_rng(0)
    own = {thing.name: thing for thing in things}
    found = []
    for probe in probes:
        others = [
            thing
            for thing in things
            if thing.split == probe.split
            and thing.value(probe.attribute) != own[probe.object].value(probe.attribute)
        ]
        found.append(others[rng.integers(len(others))])
    return found


def without_fusion(model: TrainedModel) -> TrainedModel:
    """The model with its fusion blocks turned into plain ones, which have no memory.

    Their attention over the text stays what it was: a plain block divides queries by the root of
    the head width, a fusion block perhaps by that of the model width, so its queries are scaled.
    """
    decoder = model.model.decoder
    layers, fused = decoder.config.layers, decoder.fusion_layers
    params = jax.tree.map(np.asarray, model.params)
    flat = system.by_layer(params, layers, fused)
    kept = {name: value for name, value in flat.items() if "/memory/" not in name}
    if decoder.fusion.query_scale == "model_width":
        factor = decoder.config.heads**-0.5  # sqrt(H / D)
        for layer in fused:
            kernel, bias = f"h/{layer}/attn/qkv/kernel", f"h/{layer}/attn/qkv/bias"
            kept[kernel] = np.concatenate(
                [kept[kernel][:, :1] * factor, kept[kernel][:, 1:]], axis=1
            )
            kept[bias] = np.concatenate([kept[bias][:1] * factor, kept[bias][1:]])
    plain = dataclasses.replace(
        model.model, decoder=decoder.clone(fusion_layers=()), tower=None, search=None
    )
    return dataclasses.replace(
        model, model=plain, params=system.stacked(kept, layers, ()), frozen={}, images=None
    )


def _given(
    model: TrainedModel,
    parts: Parts,
    world: WorldConfig,
    things: Sequence[Object],
    probes: Sequence[Probe],
) -> dict[str, Accuracies]:
    """Accuracy when every position has an image's embedding in the place of the text's.

    The images are validation images, which CLIP was not trained on. CLIP keeps images and texts
    apart in its space. "shifted" moves images by the difference of the two means, taken over train
    objects.
    """
    of_object = _embedded(parts, world, things)
    known = [thing.split == "train" for thing in things]
    prompts = [p.prompt for p in language.probes(world, [t for t in things if t.split == "train"])]
    gap = probing.features(model, prompts).mean(axis=0) - of_object[known].mean(axis=(0, 1))
    place = {thing.name: number for number, thing in enumerate(things)}
    rows = np.array([place[probe.object] for probe in probes])
    drawn = np.random.default_rng(0).integers(of_object.shape[1], size=len(probes))
    answer = np.array([probe.answer for probe in probes])
    one, mean = of_object[rows, drawn], of_object.mean(axis=1)[rows]
    given = {
        "one_image": one,
        "mean_image": mean,
        "one_image_shifted": one + gap,
        "mean_image_shifted": mean + gap,
    }
    found = {}
    for name, chosen in given.items():
        unit = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
        said = probing.ask(model, probes, given=unit[:, None]).said
        found[name] = _accuracies(probes, said == answer)
    return found


def _embedded(parts: Parts, world: WorldConfig, things: Sequence[Object]) -> np.ndarray:
    """CLIP's vectors float[objects, images, E] of the validation images."""
    clip = clip_model.load_clip(parts.clip)
    count = world.validation_images_per_object
    tower = jax.jit(VisionTower(clip.config.vision).apply)
    params = {"params": clip.params["vision"]}
    return np.stack(
        [
            tower(params, render.pictures(world, "validation", number, thing, count=count))
            for number, thing in enumerate(things)
        ]
    )


def _training(workdir: Path) -> dict[str, Any]:
    """Cost and course of the training, from what the run wrote."""
    record = files.read_object(workdir / "run.json")
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "train/loss" in line]
    evaluations = [line["eval/perplexity"] for line in lines if "eval/perplexity" in line]
    # The first report counts what is slow once.
    seconds = [line["perf/step_seconds"] for line in updates[1:] or updates]
    return {
        "perplexity": evaluations[-1],
        "steps": updates[-1]["step"],
        "step_seconds": float(np.median(seconds)),
        "parameters": record["parameters"]["decoder"],
        "flops_per_token": record["flops_per_token"]["total"],
        "commit": record["commit"],
        "curves": {
            "step": [line["step"] for line in updates],
            "loss": [line["train/loss"] for line in updates],
        },
    }
