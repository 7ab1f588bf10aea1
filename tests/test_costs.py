"""What training costs: against XLA's own count, published numbers, and shapes of parameters."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from blindvalm_jax import compilation, config, ladder, optim, partitioning, presets
from blindvalm_jax.config import Config
from blindvalm_jax.costs import language, of_settings, parameters, products, searching, tables
from blindvalm_jax.costs.account import HOST_SEARCH, Account, Made
from blindvalm_jax.costs.products import Product
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding.faiss_engine import FaissEngine, default_settings
from blindvalm_jax.grounding.index import ImageIndex
from blindvalm_jax.interop import clip_model
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.vision import VisionConfig
from blindvalm_jax.objectives.contrastive_model import Model
from blindvalm_jax.objectives.shapes import Shapes
from blindvalm_jax.sweep import cost
from blindvalm_jax.toyworld import recipes
from blindvalm_jax.toyworld.world import WorldConfig
from tests import small_index, small_valm, test_train, tiny_tokenizers

ROWS, LENGTH = 64, 64
VARIANTS = ("gpt2", "blind", "eos", "valm", "valm_eos")
SIZES = {"small": (2, 512, 4), "large": (3, 1024, 8)}


def settings(variant: str, size: str, *, projection: int = 512, **train: Any) -> Config:
    values = ladder.rung(config.default(), "10m", variant, LENGTH)
    layers, width, heads = SIZES[size]
    values.decoder.update(layers=layers, width=width, heads=heads, vocab_size=2000)
    values.decoder.fusion_layers = (0,)
    values.train.update(batch_size=ROWS, dtype="float32", remat="none", loss_chunk=0)
    values.train.update(train)
    values.grounding.dtype = "float32"
    values.grounding.random.update(
        layers=2, width=width // 2, heads=4, projection=projection, context=18
    )
    if "valm" in variant:
        values.grounding.index = "vectors:4096"
    return config.parse(values)


def counted(chosen: Config) -> tuple[float, float, tuple[Product, ...]]:
    """XLA's FLOPs of a token, forward and in an update, and the products we count.

    Of the program as it is lowered, which costs no compilation. XLA counts the body of a loop once,
    so blocks have parameters of their own here: the same products, not in a loop.
    """
    mesh = partitioning.make_mesh(chosen.mesh, jax.devices()[:1])
    shapes = Shapes(chosen, None, mesh)
    model, frozen = shapes.model, shapes.abstract_frozen()
    model = dataclasses.replace(model, decoder=model.decoder.clone(stacked=False))
    tower = None if model.tower is None else model.tower.clone(stacked=False)
    if tower is not None:
        model = dataclasses.replace(model, tower=tower)
        tokens = jnp.zeros((1, 2), jnp.int32)
        frozen["tower"] = nn.unbox(
            jax.eval_shape(
                lambda key: tower.init(key, tokens, tokens == 0, readout="token")["params"],
                jax.random.key(0),
            )
        )
    optimizer = optim.make(chosen.optimizer, steps=chosen.train.steps)
    state = compilation.abstract_state(model, optimizer, mesh)
    batch = shapes.abstract_batch()
    update = compilation.make_update(chosen, model, optimizer)
    with partitioning.use(mesh):
        forward: Any = jax.jit(lambda params, *rest: model.loss(params, *rest).loss).lower(
            state.params, frozen, batch
        )
        step: Any = jax.jit(update).lower(state, frozen, batch)
    found = language.token(
        chosen,
        vocab_size=chosen.decoder.vocab_size,
        tower=shapes.tower,
        tower_length=shapes.tower_length,
        vectors=shapes.vectors,
    )
    tokens_a_step = ROWS * LENGTH
    return (
        forward.cost_analysis()["flops"] / tokens_a_step,
        step.cost_analysis()["flops"] / tokens_a_step,
        found,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_xla_counts(variant: str, size: str) -> None:
    """Forward to 1 %, an update to 1 % too: XLA counts norms, softmax and the optimizer as well.

    Of the large size features are as wide as half of the decoder: an adapter is part of it.
    """
    forward, step, found = counted(settings(variant, size))
    assert sum(one.flops for one in found) == pytest.approx(forward, rel=0.01)
    assert sum(one.full for one in found) == pytest.approx(step, rel=0.01)
    parts = {one.part for one in found}
    assert ("fusion adapter" in parts) == (size == "large" and variant != "gpt2")


@pytest.mark.parametrize(
    "recomputed", [{"remat": "dots"}, {"remat": "full"}, {"loss_chunk": LENGTH}], ids=str
)
def test_what_is_recomputed_is_in_the_hardware_flops_alone(recomputed: dict[str, Any]) -> None:
    """XLA counts more than without, and just what `again` says; to 2 % of it, of softmax."""
    _, plain, _ = counted(settings("blind", "small"))
    _, step, found = counted(settings("blind", "small", **recomputed))
    more = sum(one.hardware - one.full for one in found)
    assert sum(one.hardware for one in found) == pytest.approx(step, rel=0.01)
    assert more == pytest.approx(step - plain, rel=0.25)
    assert more > 0


def test_a_budget_knows_neither_recomputation_nor_padding() -> None:
    plain = of_settings.account(settings("eos", "small"))
    again = of_settings.account(settings("eos", "small", remat="full", loss_chunk=8))
    assert again.training == plain.training
    assert again.full == plain.full
    assert again.hardware > plain.hardware >= plain.full > plain.training
    assert plain.budget == plain.training * plain.units


# As CLIP ViT-L/14's text tower reads and speaks; the published sizes take it as it is.
TOWER = TowerConfig(layers=12, width=768, heads=12, mlp_width=3072, projection=768, vocab_size=9)


def at_paper_size(size: str, variant: str, **more: Any) -> Account:
    values = presets.variant(presets.paper(config.default(), size), variant)
    if variant == "blind":
        values.grounding.tower = "random"
    values.grounding.random.update(layers=12, width=768, heads=12, projection=768, context=77)
    values.grounding.update(more)
    return of_settings.account(config.parse(values))


@pytest.mark.parametrize(
    ("size", "variant", "packed", "padded"),
    [
        ("small", "gpt2", 0.79, None),
        ("small", "blind", 0.97, 1.09),
        ("medium", "blind", 2.45, 2.57),
    ],
)
def test_gflops_a_token_at_the_papers_sizes(
    size: str, variant: str, packed: float, padded: float | None
) -> None:
    """To two digits, every key of the decoder counted as the published numbers do.

    The medium decoder has an adapter here: its tower's features are of width 768, not 1024.
    """
    account = at_paper_size(size, variant)
    tower = [one for one in account.products if one.part == "tower"]
    masked = sum(one.full - one.training for one in tower)
    assert (account.full - masked) / 1e9 == pytest.approx(packed, abs=0.006)
    if padded is not None:
        assert account.padded is not None
        assert account.padded / 1e9 == pytest.approx(padded, abs=0.006)


def test_gflops_a_token_of_valm_at_the_papers_size() -> None:
    """About 1.32 with the reference's padding, its four images and the search for them."""
    account = at_paper_size("small", "valm", index="vectors:191500000", search="faiss")
    assert account.padded is not None
    assert account.padded / 1e9 == pytest.approx(1.32, abs=0.01)
    assert account.read == pytest.approx(3e6, rel=0.01)
    assert account.gathered == 4 * 768 * 4
    searched = account.units * (2 * 768 * (131_072 + 256) + 32 / 131_072 * 191_500_000 * 64)
    assert account.budget - account.device_budget == pytest.approx(searched, rel=1e-6)
    once = {one.what: flops or 0.0 for one, flops in account.once.items()}
    encoded = once["images encoded with vit_l14"]
    assert encoded == pytest.approx(3.1e19, rel=0.01)
    assert 0 < once["lists and codes of the index"] < encoded / 100


def valm_of(clip: Path | str, index: str, **grounding: object) -> Config:
    values = ladder.rung(config.default(), "10m", "valm", LENGTH)
    values.tokenizer.update(kind="clip", path=str(clip))
    values.grounding.update(tower=str(clip), index=index, **grounding)
    return config.parse(values)


def test_a_named_clip_says_what_its_images_took_once(tmp_path: Path) -> None:
    """By its own image tower, whatever width it has; of a CLIP that is no run of ours no more."""
    clip = small_valm.write_clip(tmp_path / "clip")
    once = of_settings.account(valm_of(clip, "vectors:1000")).once
    image = products.image_tower(clip_model.load_vision(clip).config)
    encoded = 1000 * sum(one.forward for one in image)
    assert once == {
        Made("training of the CLIP clip", (str(clip),)): None,
        Made("images encoded with clip", (str(clip), "vectors:1000", "")): encoded,
    }
    text_alone = test_train.write_tower(tmp_path / "text", vocab_size=700)
    tiny_tokenizers.write_pair(text_alone, *tiny_tokenizers.clip_parts())
    once = of_settings.account(valm_of(text_alone, "vectors:1000")).once
    assert {one.what: cost for one, cost in once.items()} == {
        "training of the CLIP text": None,
        "images encoded with text": None,
    }
    said = tables.of_run(of_settings.account(valm_of(text_alone, "vectors:1000")), mfu=0.4)
    line = (
        "once, outside of the budget: images encoded with text: not counted, nothing here tells it"
    )
    assert line in said


def test_what_is_found_ahead_is_found_for_every_token(tmp_path: Path) -> None:
    values = ladder.rung(config.default(), "10m", "valm", LENGTH)
    values.grounding.update(index="vectors:4096", search="prepared", prepared=str(tmp_path))
    account = of_settings.account(config.parse(values))
    (what,) = account.once_a_unit
    longer = dataclasses.replace(account, units=3 * account.units)
    assert longer.once[what] == pytest.approx(3 * (account.once[what] or math.nan))
    assert tables.done_once([account, longer, account])[what] == longer.once[what]


def test_things_of_one_name_that_are_made_apart_are_counted_apart(tmp_path: Path) -> None:
    clips = [small_valm.write_clip(tmp_path / name / "clip") for name in ("a", "b")]
    accounts = [
        of_settings.account(valm_of(clip, f"vectors:{count}"))
        for clip, count in zip(clips, (1000, 5000), strict=True)
    ]
    once = tables.done_once([*accounts, accounts[0]])
    assert once == {**accounts[0].once, **accounts[1].once}
    names = tables.names_of(once)
    assert sorted(names.values()) == sorted(
        [
            *(f"training of the CLIP clip ({clip})" for clip in clips),
            f"images encoded with clip ({clips[0]}, vectors:1000)",
            f"images encoded with clip ({clips[1]}, vectors:5000)",
        ]
    )
    slashed = valm_of(f"{clips[0]}/", "vectors:1000")
    assert of_settings.account(slashed).once == accounts[0].once
    assert set(tables.names_of(accounts[0].once).values()) == {
        "training of the CLIP clip",
        "images encoded with clip",
    }


def test_what_is_built_of_two_worlds_is_two_things() -> None:
    def account(seed: int, variant: str) -> Account:
        values = recipes.language(WorldConfig(seed=seed), variant)
        values.grounding.search = "faiss"
        return of_settings.account(config.parse(values))

    found = [account(1, "valm"), account(2, "valm"), account(2, "valm_eos")]
    names = tables.names_of(tables.done_once(found)).values()
    built = [name for name in names if name.startswith("lists and codes of the index")]
    assert len(set(built)) == len(built) == 2
    assert all("lists, " not in name for name in built)  # which are as many in both


def test_what_is_guessed_is_said_of_a_run_and_of_a_sweep() -> None:
    values = ladder.rung(config.default(), "10m", "gpt2", LENGTH)
    values.tokenizer.kind = "train"
    account = of_settings.account(config.parse(values))
    (guess,) = account.guessed
    pairs = recipes.clip(WorldConfig())
    pairs.tokenizer.path = ""
    assert of_settings.account(config.parse(pairs)).guessed == (guess,)
    assert guess.startswith("the vocabulary is yet to be learned")
    assert f"guessed: {guess}" in tables.of_run(account, mfu=0.4)
    both = {"a": account, "b": account}
    assert tables.of_sweep(both, dict.fromkeys(both, 1.0), mfu=0.4).count(f"guessed: {guess}") == 1
    assert tables.as_json(account, mfu=0.4)["guessed"] == [guess]


@pytest.mark.faiss
def test_an_index_of_faiss_that_is_there_is_the_one_that_is_asked(tmp_path: Path) -> None:
    clip, index = small_valm.write_clip(tmp_path / "clip"), tmp_path / "index"
    small_index.build(index, 300)
    opened = ImageIndex.open(index)
    FaissEngine(opened, neighbours=2, lists=5)
    made = default_settings(300, small_index.WIDTH, lists=5)
    assert made != default_settings(300, small_index.WIDTH)
    account = of_settings.account(valm_of(clip, str(index), search="faiss"))
    (search,) = (one for one in account.products if one.part == HOST_SEARCH)
    assert search.flops == searching.ivf_pq(300, small_index.WIDTH, made, nprobe=32).flops


def test_a_position_of_clips_text_tower() -> None:
    one = products.padded_tower(TOWER, useful=1.0, eos=False)
    assert sum(x.training for x in one) == pytest.approx(173.9e6, rel=1e-3)
    both = products.padded_tower(TOWER, useful=0.6, eos=True)
    assert sum(x.training for x in both) == pytest.approx(2 * 173.9e6 / 0.6, rel=5e-3)


def test_an_exact_query_of_the_papers_index() -> None:
    query = searching.exact(191_500_000, 768, value_bytes=2)
    assert query.flops == pytest.approx(294e9, rel=1e-3)
    assert query.read == query.held == 191_500_000 * 768 * 2


def test_a_ranking_of_candidates_costs_their_vectors() -> None:
    made = default_settings(1_000_000, 64)
    plain = searching.ivf_pq(1_000_000, 64, made, nprobe=32)
    ranked = searching.ivf_pq(1_000_000, 64, made, nprobe=32, candidates=100)
    assert ranked.flops - plain.flops == 2 * 100 * 64
    assert ranked.read - plain.read == 100 * 64 * 4
    everything = searching.ivf_pq(1_000_000, 64, made, nprobe=2**20)
    assert everything.read == 1_000_000 * made.code_bytes


@pytest.mark.parametrize(
    ("name", "gflops"),
    [("vit_b32", 8.8), ("vit_l14", 162.0)],
)
def test_gflops_of_an_image(name: str, gflops: float) -> None:
    shape = vision_tower(name)
    found = sum(one.forward for one in products.image_tower(shape))
    assert found / 1e9 == pytest.approx(gflops, rel=3e-3)


def vision_tower(name: str) -> VisionConfig:
    patch, (layers, width, heads), _, projection, _ = presets.OPENAI_CLIPS[name]
    return VisionConfig(
        kind="vit",
        image_size=224,
        patch=patch,
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=4 * width,
        projection=projection,
    )


def size_of(shapes: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("variant", ["gpt2", "blind", "valm"])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_model(size: str, variant: str, own: bool) -> None:
    chosen = settings(variant, size)
    if own:
        fusion = dataclasses.replace(chosen.fusion, grounding_kv="own", memory_bias="none")
        decoder = dataclasses.replace(chosen.decoder, positions="sinusoidal", mlp_width=96)
        chosen = dataclasses.replace(chosen, fusion=fusion, decoder=decoder)
    mesh = partitioning.make_mesh(chosen.mesh, jax.devices()[:1])
    shapes = Shapes(chosen, None, mesh)
    made = nn.unbox(jax.eval_shape(shapes.model.init, jax.random.key(0)))
    account = of_settings.account(chosen)
    assert account.parameters == size_of(made)
    if variant != "gpt2":
        tower = shapes.abstract_frozen()["tower"]
        assert account.frozen["tower"] == size_of(tower)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tower))
        assert account.frozen_bytes["tower"] == held


@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_parameters_of_a_contrastive_run(kind: str) -> None:
    text = dataclasses.replace(TOWER, layers=2)
    image = {
        "vit": dataclasses.replace(vision_tower("vit_l14"), layers=2),
        "conv": VisionConfig(
            kind="conv", image_size=60, width=32, projection=768, channels=(8, 24)
        ),
    }
    shape = ClipConfig(text=text, vision=image[kind], temperature_start=1.0, temperature_cap=9.0)
    made = nn.unbox(jax.eval_shape(Model(Clip(shape)).init, jax.random.key(0)))
    assert sum(parameters.pair(shape).values()) == size_of(made)


def test_runs_and_their_account_agree_on_the_budget() -> None:
    for variant in VARIANTS:
        chosen = settings(variant, "large")
        shapes = Shapes(chosen, None, partitioning.make_mesh(chosen.mesh, jax.devices()[:1]))
        told = shapes.describe(shapes.abstract_batch())["flops_per_token"]["total"]
        assert told == pytest.approx(of_settings.account(chosen).training)


def run_cost(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blindvalm_jax.sweep", "cost", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_a_run_by_part_and_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    ran = run_cost("--config=configs/ladder.py:124m,blind", f"--json={out}", "--mfu=0.5")
    assert ran.returncode == 0, ran.stderr
    written = json.loads(out.read_text())
    training = sum(part["training"] for part in written["parts"])
    assert training == pytest.approx(written["flops_per_unit"]["training"])
    assert written["budget_flops"] == pytest.approx(training * written["units"])
    hours = written["budget_flops"] / (0.5 * 989e12) / 3600
    assert written["device_hours"]["H100"] == pytest.approx(hours)
    for part in written["parts"]:
        assert f"| {part['part']} " in ran.stdout
    assert "hours of one device at 50%" in ran.stdout


SWEEP = """
import ml_collections
from blindvalm_jax import ladder
from blindvalm_jax.config import default

def get_config():
    runs = ml_collections.ConfigDict()
    for size in ("10m", "25m"):
        runs[size] = ladder.rung(default(), size, "gpt2")
    return ml_collections.ConfigDict({"runs": runs})
"""


def test_the_command_sums_the_runs_of_a_sweep(tmp_path: Path) -> None:
    sweep, out = tmp_path / "sweep.py", tmp_path / "cost.json"
    sweep.write_text(SWEEP)
    ran = run_cost(f"--config={sweep}", f"--json={out}")
    assert ran.returncode == 0, ran.stderr
    written = json.loads(out.read_text())
    each = [run["budget_flops"] for run in written["runs"].values()]
    assert written["budget_flops"] == pytest.approx(sum(each))
    names = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert names == ["run", "---", "10m", "25m", "all"]


def test_bad_input_is_one_clear_line() -> None:
    ran = run_cost("--config=configs/paper_small.py")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: grounding.tower is needed")


@pytest.mark.parametrize(
    ("given", "mfu", "to", "message"),
    [
        (None, 0.4, "", "must return a ConfigDict"),
        (config.default(), 40.0, "", "--mfu is a share of the peak"),
        (config.default(), 0.4, "/proc/none/cost.json", "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_refused(given: Any, mfu: float, to: str, message: str) -> None:
    if given is not None:
        given.grounding.source = "none"
    with pytest.raises(UserError, match=message):
        cost.report(given, mfu=mfu, to=to)


def test_a_config_file_that_is_not_there_is_named() -> None:
    ran = run_cost("--config=configs/none.py")
    assert (ran.returncode, ran.stderr) == (1, "error: there is no config file configs/none.py\n")


def test_a_run_of_a_sweep_that_has_no_account_is_named() -> None:
    runs = {"bare": config.default()}
    with pytest.raises(UserError, match=r"run bare: grounding.tower is needed"):
        cost.report(ConfigDict({"runs": runs}), mfu=0.4, to="")
