"""Grids: families, sizes and budgets as runs that cost what they should, with shared trunks."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from blindvalm_jax import config, ladder, optim, partitioning
from blindvalm_jax.costs import of_settings
from blindvalm_jax.data import packing, tokenizers
from blindvalm_jax.errors import UserError
from blindvalm_jax.objectives.shapes import Shapes
from blindvalm_jax.scaling import rules
from blindvalm_jax.scaling.rules import Rules
from blindvalm_jax.sweep import grids, plans, trunks
from blindvalm_jax.sweep.manifest import Manifest
from blindvalm_jax.toyworld import recipes, sizes, supply
from blindvalm_jax.toyworld.world import WorldConfig, objects
from tests import small_aligned, small_text

FAMILIES = ("gpt2", "blind", "eos", "valm")
SIZES = ("2x32x2", "3x64x4", "4x128x4")
BUDGETS = (3e11, 1e12, 3e12)


def given(**grid: Any) -> ConfigDict:
    """A small grid on the toy world, of which nothing is made."""
    found = grids.default()
    found.base = recipes.language(WorldConfig(), "valm")
    found.base.optimizer.schedule = "constant_cooldown"
    found.families = grids.variants(found.base, FAMILIES)
    found.grid.update(sizes=SIZES, budgets=BUDGETS)
    found.grid.update(grid)
    return found


def test_every_run_costs_its_budget_by_the_account_of_its_settings() -> None:
    runs = plans.planned(given())
    assert len(runs) == len(FAMILIES) * len(SIZES) * len(BUDGETS)
    for name, run in runs.items():
        account = of_settings.account(run.settings)
        assert abs(account.budget / run.budget - 1) < 0.01, name
        assert run.flops == pytest.approx(account.budget)
        assert run.tokens == account.units
        assert name == f"{run.family}-{run.size}-{grids.label(run.budget)}"
        assert plans.family(run.settings.grounding) == run.family


def test_n_counts_the_head_and_no_padding() -> None:
    run = plans.planned(given())[f"gpt2-2x32-{grids.label(3e12)}"]
    entries = of_settings.account(run.settings).vocabulary
    assert entries % 128  # else there would be no padding
    blocks = 12 * 2 * 32**2 + 13 * 2 * 32 + 2 * 32
    assert run.n == blocks + entries * 32


def test_families_differ_in_their_grounding_alone() -> None:
    runs = plans.planned(given(branches=False))
    for size in ("2x32", "4x128"):
        first, *others = (runs[f"{family}-{size}-3e12"].settings for family in FAMILIES)
        for other in others:
            train = dataclasses.replace(other.train, steps=first.train.steps)
            assert dataclasses.replace(other, grounding=first.grounding, train=train) == first


@pytest.mark.parametrize("branches", [True, False])
def test_learning_rate_batch_and_warmup_of_a_size_are_those_of_all_families(branches: bool) -> None:
    """The dearest family has the fewest updates, and so the least warm-up by its own length."""
    found = given(branches=branches)
    found.grid.rules.update(reference=2e5, batch_exponent=0.5, learning_rate_exponent=-0.3)
    alike: dict[Any, set[Any]] = {}
    for run in plans.planned(found).values():
        key = run.size if branches else (run.size, run.budget)
        optimizer = run.settings.optimizer
        chosen = optimizer.learning_rate, run.settings.train.batch_size, optimizer.warmup_steps
        alike.setdefault(key, set()).add(chosen)
        assert optimizer.warmup_steps <= 0.1 * run.settings.train.steps
    assert all(len(chosen) == 1 for chosen in alike.values())


def test_branches_leave_the_longest_run_where_their_rate_falls() -> None:
    runs = plans.planned(given())
    for family, size in (("gpt2", "2x32"), ("valm", "4x128")):
        of_size = [runs[f"{family}-{size}-{grids.label(budget)}"] for budget in BUDGETS]
        *short, longest = of_size
        assert not longest.settings.train.branch_from
        rates = optim.schedule(longest.settings.optimizer, steps=longest.settings.train.steps)
        for run in short:
            trunk = trunks.of(run.settings)
            assert trunk is not None
            assert trunk.step in longest.settings.checkpoint.keep_steps
            own = optim.schedule(run.settings.optimizer, steps=run.settings.train.steps)
            shared = jnp.arange(trunk.step)
            assert jnp.array_equal(own(shared), rates(shared))
            fall = jnp.array([trunk.step, trunk.step + 2])
            assert float(own(fall)[1]) < float(own(fall)[0]) <= float(rates(fall)[0])
            assert run.share == pytest.approx(0.2, abs=0.01)
            assert optim.same_until(
                trunk.step,
                run.settings.optimizer,
                lengths=(run.settings.train.steps, longest.settings.train.steps),
            )
    order = list(runs)
    firsts = [order.index(name) for name, run in runs.items() if trunks.of(run.settings) is None]
    assert max(firsts) == len(firsts) - 1  # trunks come first
    for first in range(0, len(order), len(FAMILIES)):  # and families take turns
        turn = [runs[name] for name in order[first : first + len(FAMILIES)]]
        assert sorted(run.family for run in turn) == sorted(FAMILIES)
        assert len({(run.size, run.budget) for run in turn}) == 1


def test_without_branches_every_run_is_whole() -> None:
    runs = plans.planned(given(branches=False))
    assert all(run.share == 1 and not run.settings.train.branch_from for run in runs.values())
    warm = {run.settings.optimizer.warmup_steps for run in runs.values() if run.size == "2x32"}
    assert len(warm) > 1  # each by its own length


def test_sizes_with_too_few_or_too_many_tokens_a_parameter_are_left_out() -> None:
    runs = plans.planned(given(tokens_a_parameter=(2.0, 30.0)))
    assert runs
    assert all(2 <= run.tokens / run.n <= 30 for run in runs.values())
    assert len(runs) < len(FAMILIES) * len(SIZES) * len(BUDGETS)


def test_too_few_or_too_close_sizes_are_told() -> None:
    three = plans.planned(given())
    lines = grids.thin(three.values())
    assert len(lines) == len(FAMILIES) * len(BUDGETS)
    assert "3 sizes over" in lines[0]
    seven = ("2x24x2", "2x36x2", "3x40x4", "3x56x4", "4x64x4", "4x80x4", "4x104x4")
    assert not grids.thin(plans.planned(given(sizes=seven)).values())


def test_rules_are_powers_with_caps() -> None:
    of = Rules(
        reference=1e6,
        learning_rate=1e-3,
        learning_rate_exponent=-0.5,
        batch_size=16,
        batch_exponent=1.0,
        batch_multiple=3,
    )
    assert rules.chosen(of, 4e6) == rules.Chosen(learning_rate=5e-4, batch_size=48)
    assert rules.chosen(of, 1e6).batch_size == 12
    assert rules.chosen(of, 1e3).batch_size == 3
    assert rules.warmup(of, n=1000, updates=10**6, tokens=100) == 10  # N tokens
    assert rules.warmup(of, n=10**9, updates=300, tokens=100) == 30  # a tenth


def test_the_grid_follows_rules_and_the_command_line() -> None:
    one = given()
    one.grid.rules.update(reference=1e5, learning_rate=1e-2, learning_rate_exponent=-0.25)
    one.base.data.sequence_length = 16
    runs = plans.planned(one)
    for run in runs.values():
        least = runs[f"gpt2-{run.size}-{grids.label(run.budget)}"].n  # the same for all families
        wanted = 1e-2 * (least / 1e5) ** -0.25
        assert math.isclose(run.settings.optimizer.learning_rate, wanted, rel_tol=0.005)
        assert run.settings.data.sequence_length == 16
        warm = run.settings.optimizer.warmup_steps * run.settings.train.batch_size * 16
        assert warm <= run.n


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, "grid.sizes is empty"),
        ({"budgets": ()}, "grid.budgets is empty"),
        ({"budgets": (1e12, 1e11)}, "grid.budgets must ascend"),
        ({"budgets": ("much",)}, "must be numbers"),
        ({"sizes": ("2x32",)}, "expected LAYERSxWIDTHxHEADS, got '2x32'"),
        ({"budgets": (1e9,)}, r"run gpt2-2x32-1e9: 1[0-9] updates of 256 .* \(and 2 more runs\)"),
        ({"budgets": (1e8, 1e12)}, r"run gpt2-2x32-1e8: 1 updates of 256 .* the budget is 1e\+08"),
        ({"budgets": (math.inf,)}, "must be numbers"),
        ({"sizes": (2,)}, "expected LAYERSxWIDTHxHEADS, got 2"),
        ({"sizes": ("2x32x2", "2x32x4")}, "two runs of the grid are called gpt2-2x32-3e11"),
        ({"budgets": (1e12, 1.001e12)}, "must differ in three digits"),
        ({"tokens_a_parameter": (1.0,)}, "a least and a most"),
        ({"tokens_a_parameter": (1e8, 1e9)}, "leaves out all sizes"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    found = given(**changes)
    found.families = {"gpt2": found.families.gpt2}
    with pytest.raises(UserError, match=message):
        plans.planned(found)


def test_other_schedules_share_no_trunk() -> None:
    cosine = given()
    cosine.base.optimizer.schedule = "cosine"
    with pytest.raises(UserError, match="needs optimizer.schedule=constant_cooldown, got cosine"):
        plans.planned(cosine)
    cosine.grid.branches = False
    assert plans.planned(cosine)


def test_a_family_that_no_setting_fits_and_unknown_parts_are_refused() -> None:
    wrong = given()
    wrong.families.gpt2.grounding.colour = "red"
    with pytest.raises(
        UserError, match="families.gpt2 with 2x32x2: unknown setting config.grounding.colour"
    ):
        plans.planned(wrong)
    extra = given()
    extra["rules"] = {}
    with pytest.raises(UserError, match="unknown: rules"):
        plans.planned(extra)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("families.blind.optimizer", {"learning_rate": 1.0}, "learning_rate: the grid sets it"),
        ("families.blind.train", {"steps": 5}, "families.blind.train.steps: the grid sets it"),
        ("families.a/b", {}, "a family is called 'a/b'"),
        ("families.blind", 3, "families.blind must be settings, got 3"),
        ("base.train.branch_from", "a@5", "the runs of a grid begin anew"),
        ("base.train.objective", "contrastive", "a grid is of language models"),
        ("base.optimizer.cooldown_fraction", 1.0, "leaves no constant rate"),
        ("base.grounding.tower", "gs://bucket/clip", "reads how large it is before anything is"),
    ],
)
def test_what_no_grid_can_take_is_refused(path: str, value: Any, message: str) -> None:
    found = given()
    *sections, key = path.split(".")
    place = found
    for section in sections:
        place = place[section]
    with place.unlocked(), place.ignore_type():
        place[key] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        plans.planned(found)


def test_a_search_is_that_of_families_with_images_alone() -> None:
    found = given()
    grounding = found.base.grounding
    grounding.search, grounding.nprobe, grounding.rerank = "faiss", 64, 8
    found.families = grids.variants(found.base, FAMILIES)
    runs = plans.planned(found)
    assert {run.settings.grounding.nprobe for run in runs.values() if run.family == "valm"} == {64}
    assert {run.settings.grounding.nprobe for run in runs.values() if run.family != "valm"} == {0}


def test_a_refused_sweep_leaves_no_trace(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    runs = {name: run.settings for name, run in plans.planned(given()).items()}
    manifest.plan(runs)
    before = manifest.lines()
    more = {name: run.settings for name, run in plans.planned(given(budgets=(1e12, 5e12))).items()}
    with pytest.raises(UserError, match="with other settings"):
        manifest.plan(more)
    assert manifest.lines() == before


def test_runs_that_are_written_out_are_planned_as_they_are() -> None:
    runs = ConfigDict()
    for name, variant in (("a", "gpt2"), ("b", "blind_valm_eos"), ("c", "random_tower")):
        runs[name] = recipes.language(WorldConfig(), variant)
    runs["clip"] = recipes.clip(WorldConfig())
    found = plans.planned(ConfigDict({"runs": runs}))
    assert [run.family for run in found.values()] == ["gpt2", "eos", "random_tower", "clip"]
    for name, run in found.items():
        assert run.settings == config.parse(copy.deepcopy(runs[name]))
        assert run.share == 1
        assert run.budget == run.flops == of_settings.account(run.settings).budget


def test_what_a_tower_with_its_own_tokens_costs_is_known_of_prepared_text(tmp_path: Path) -> None:
    named = small_aligned.write(tmp_path)
    windows = packing.Recipe(
        source=small_text.write_text(tmp_path / "a.txt", small_text.documents(20, longest=60)),
        tokenizer=tokenizers.load("gpt2", named["tokenizer"]),
        tower_tokenizer=tokenizers.load("clip", named["tower_tokenizer"]),
        sequence_length=16,
    )
    made = packing.prepare(windows, tmp_path / "windows", workers=1)
    values = given(sizes=SIZES[:1], budgets=(1e11,))
    values.base = ladder.rung(config.default(), "10m", "blind", 16)
    values.base.optimizer.schedule = "constant_cooldown"
    values.base.tokenizer.update(kind="gpt2", path=named["tokenizer"])
    values.base.grounding.update(tower=named["tower"], tokenizer=named["tower_tokenizer"])
    values.families = grids.variants(values.base, ("blind",))
    with pytest.raises(UserError, match=r"families\.blind with 2x32x2: the tower has a tokenizer"):
        plans.planned(values)
    values.base.data.windows = str(tmp_path / "windows")
    (run,) = plans.planned(values).values()
    told = Shapes(run.settings, None, partitioning.make_mesh(run.settings.mesh, jax.devices()[:1]))
    assert told.tower_length == made.tower_length
    per_token = told.describe(told.abstract_batch())["flops_per_token"]["total"]
    assert run.flops == pytest.approx(per_token * run.tokens)


def test_a_vocabulary_is_that_of_prepared_text_or_of_the_tokenizer_that_is_named(
    tmp_path: Path,
) -> None:
    """And none that is yet to be learned, of which a budget would be guessed."""
    named = small_aligned.write(tmp_path)
    learned = tokenizers.load("gpt2", named["tokenizer"])
    windows = packing.Recipe(
        source=small_text.write_text(tmp_path / "a.txt", small_text.documents(20, longest=60)),
        tokenizer=learned,
        tower_tokenizer=None,
        sequence_length=16,
    )
    packing.prepare(windows, tmp_path / "windows", workers=1)
    clip = tokenizers.load("clip", named["tower_tokenizer"])
    values = given(sizes=SIZES[:1], budgets=(1e11,))
    values.base = ladder.rung(config.default(), "10m", "gpt2", 16)
    values.base.optimizer.schedule = "constant_cooldown"
    values.families = grids.variants(values.base, ("gpt2",))

    def counted(kind: str, *, path: str = "", windows: str = "") -> int:
        values.base.tokenizer.update(kind=kind, path=path)
        values.base.data.windows = windows
        (run,) = plans.planned(values).values()
        return run.account.vocabulary

    assert learned.vocab_size != clip.vocab_size
    assert counted("gpt2", path=named["tokenizer"]) == learned.vocab_size
    assert counted("clip", path=named["tower_tokenizer"]) == clip.vocab_size
    assert counted("clip", path="a/hub-id") == 49_412
    for kind in ("gpt2", "train"):
        assert counted(kind, windows=str(tmp_path / "windows")) == learned.vocab_size
    with pytest.raises(UserError, match=r"gpt2 with 2x32x2: the vocabulary is yet to be learned"):
        counted("train")
    with pytest.raises(UserError, match=r"data\.windows=gs://b/w: a grid reads how large it is"):
        counted("train", windows="gs://b/w")


def test_a_toy_world_tells_its_sizes_before_it_is_made() -> None:
    world = WorldConfig(train_objects=3, dev_objects=2, heldout_objects=2)
    told = sizes.told(config.parse(recipes.language(world, "valm")))
    assert told.grounding.index == f"vectors:{len(objects(world)) * world.images_per_object}"
    clip = config.parse(recipes.clip(world)).clip.text
    assert told.grounding.random == clip
    assert told.grounding.tower == "random"


def test_a_tokenizer_of_ones_own_stays() -> None:
    values = recipes.language(WorldConfig(), "gpt2")
    values.tokenizer.path = "mine"
    values.eval.tasks, values.eval.tasks_data = "toyworld_color", recipes.OWN
    settings = config.parse(values)
    placed = supply.placed(settings, supply.Parts(Path("world")))
    assert placed.tokenizer.path == "mine"
    assert placed.eval.tasks_data == "world/questions"


def test_what_a_toy_world_takes_once_is_outside_of_the_budget() -> None:
    world = WorldConfig()
    valm, blind, plain = (
        of_settings.account(config.parse(recipes.language(world, name)))
        for name in ("valm", "blind_valm", "gpt2")
    )
    clip = of_settings.account(config.parse(recipes.clip(world)))
    assert not plain.once
    ((trained, cost),) = blind.once.items()
    assert (trained.what, cost) == ("the toy world's CLIP", clip.budget)
    count = len(objects(world)) * world.images_per_object
    forward = sum(x.forward for x in clip.products if x.part == "image tower")
    assert valm.once == {
        **blind.once,
        trained._replace(what="its images embedded"): forward * count,
    }
    assert clip.budget == pytest.approx(clip.training * 1000 * 128)
