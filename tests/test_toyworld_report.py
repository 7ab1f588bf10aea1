"""The report of a comparison says what its results hold, no more and no less."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld import figures, findings, language, recipes, report, results_file
from blindvalm_jax.toyworld.figures import Gallery
from blindvalm_jax.toyworld.findings import (
    CHANGED,
    GIVEN,
    LABELS,
    RETRIEVED,
    WORDS,
    Gap,
    half_width,
)
from blindvalm_jax.toyworld.world import ATTRIBUTES, SPLITS, WorldConfig, objects

KNOBS = {
    **{"train_objects": 6, "dev_objects": 3, "heldout_objects": 4, "image_size": 16},
    **{"images_per_object": 3, "validation_images_per_object": 1, "sentences": 60},
}
# 97.5 % quantiles of Student's t by degrees of freedom, from printed tables.
T_975 = {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216, 30: 2.04227}
# Optional part of the results -> title of its section.
OPTIONAL = {
    "attribution": "What the answers rest on",
    "given": "Images instead of text",
    "neighbours": "What CLIP finds",
    "bias": "How often text would have to say it",
}


def made_up(names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Results with every part, of random numbers."""
    rng = np.random.default_rng(len(seeds))

    def draw() -> list[float]:
        return [float(value) for value in rng.random(len(seeds))]

    def accuracies() -> dict[str, list[float]]:
        return {attribute: draw() for attribute in ATTRIBUTES}

    def variant(name: str) -> dict[str, Any]:
        curves = [{"step": [50, 100, 150], "loss": list(rng.random(3))} for _ in seeds]
        return {
            **accuracies(),
            "objects": {s: {w: accuracies() for w in ("seen", "new")} for s in SPLITS},
            **{"perplexity": draw(), "surprise": draw()},
            **{"steps": [150] * len(seeds), "step_seconds": draw()},
            **{"parameters": 1000, "flops_per_token": 2e6, "curves": curves},
            "standard_error": {prompts: accuracies() for prompts in ("all", "seen")},
            **({} if name == "gpt2" else {"attention": draw(), "attention_if_even": draw()}),
            **({} if name == "gpt2" else {"linear": accuracies()}),
            **({"retrieved": {k: draw() for k in RETRIEVED}} if "valm" in name[:4] else {}),
        }

    grounded = [name for name in names if name != "gpt2"]
    gallery = Gallery(WorldConfig(**KNOBS, seed=seeds[0]))
    thing = gallery.things[-1]
    return {
        "seeds": seeds,
        "world": {**KNOBS, "seed": seeds[0]},
        "chance": {"color": 0.125, "shape": 0.2, "size": 1 / 3},
        "variants": {name: variant(name) for name in names},
        "attribution": {
            name: {
                "swapped": {a: {"own": draw(), "donor": draw()} for a in ATTRIBUTES},
                **{where: accuracies() for where in (*CHANGED, "removed")},
            }
            for name in grounded
        },
        "given": {name: {kind: accuracies() for kind in GIVEN} for name in names},
        "clip": {"loss": draw(), "image_to_text_recall_at_1": draw(), "seconds": draw()},
        "neighbours": [
            {
                **{"object": thing.name, **{a: thing.value(a) for a in ATTRIBUTES}},
                **{"prompt": f"the color of a {thing.name} is", "images": ["train:0", "train:38"]},
            }
        ],
        "bias": {
            "stated_heldout": [0.0, 0.1],
            **{n: {a: [draw(), draw()] for a in ATTRIBUTES} for n in ("gpt2", "blind_valm_eos")},
        },
        "recipe": recipes.described(WorldConfig(**KNOBS)),
        "timed": {"language": {"seconds": 123.0, "jobs": 2}},
        **{"machine": "two cores", "versions": {"jax": "0.10.2"}},
        **{"commit": "abc", "trained_at": ["0123", "4567"]},
    }


ALL = made_up(list(LABELS), [0, 1, 2])


def tables(page: str) -> list[list[list[str]]]:
    """Rows of cells of every table."""
    found = re.findall(r"(?:^\|.*\|\n)+", f"{page}\n", re.MULTILINE)
    return [[line[2:-2].split(" | ") for line in table.splitlines()] for table in found]


def titles(page: str) -> list[str]:
    return re.findall(r"^## (.*)$", page, re.MULTILINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("report")
    path = report.write(ALL, out)
    assert path == out / "report.md"
    return path.read_text(encoding="utf-8"), out


def test_main_tables_hold_the_means_and_every_seed(page: tuple[str, Path]) -> None:
    means, each = (t for t in tables(page[0]) if t[0][1:3] == means_head())
    for rows, (name, variant) in itertools.product((means, each), ALL["variants"].items()):
        row = next(row for row in rows if row[0] == LABELS[name])
        held = variant["objects"]["heldout"]
        wanted = [variant["color"], held["seen"]["color"], held["new"]["color"]]
        wanted += [variant[key] for key in ("shape", "size", "surprise", "perplexity")]
        for cell, values in zip(row[1:], wanted, strict=True):
            deviation = np.std(values, ddof=1)
            expected = (
                f"{np.mean(values):.3f} ± {deviation:.3f}"
                if rows is means
                else ", ".join(f"{value:.3f}" for value in values)
            )
            assert cell == expected


def means_head() -> list[str]:
    return ["colour (chance 0.125)", "colour, seen wordings"]


def test_differences_are_paired_by_seed(page: tuple[str, Path]) -> None:
    rows = next(table for table in tables(page[0]) if table[0][0] == "difference")
    row = next(row for row in rows if row[0] == "VALM token − BLIND-VALM token")
    pairs = (ALL["variants"][name]["color"] for name in ("valm", "blind_valm"))
    differences = np.subtract(*pairs)
    mean, half = differences.mean(), T_975[2] * differences.std(ddof=1) / np.sqrt(3)
    assert row[1].strip("*") == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
    assert row[1].startswith("**") == (abs(mean) > half)
    assert row[-1] == f"{(differences > 0).sum()} of 3"


ROOT = Path(__file__).resolve().parents[1]


def test_the_table_in_the_readme_is_of_the_same_results() -> None:
    path = ROOT / "docs" / "results" / "toyworld" / "results.json"
    variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
    [table] = [t for t in tables((ROOT / "README.md").read_text()) if "held-out" in t[0][0]]
    rows = {row[0]: row[1:] for row in table}
    for label, name in (
        ("GPT-2", "gpt2"),
        ("BLIND-VALM, token readout (the paper's)", "blind_valm"),
        ("VALM, token readout", "valm"),
        ("BLIND-VALM, EOS readout", "blind_valm_eos"),
        ("VALM, EOS readout", "valm_eos"),
    ):
        found = [variants[name][attribute] for attribute in ATTRIBUTES]
        assert rows[label] == [findings.mean(values) for values in found], label
    controls = [[np.mean(variants[k][a]) for k in findings.CONTROLS] for a in ATTRIBUTES]
    [said] = [cells for label, cells in rows.items() if label.startswith("four controls")]
    assert said == [f"{min(of):.3f} to {max(of):.3f}" for of in controls]


def test_the_page_in_docs_is_what_its_results_say(tmp_path: Path) -> None:
    made = ROOT / "docs" / "results" / "toyworld"
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert text == (made / "report.md").read_text(encoding="utf-8")
    drawn, kept = ({path.name for path in x.glob("figures/*")} for x in (tmp_path, made))
    assert drawn == kept


def test_figures_named_exist_and_none_besides(page: tuple[str, Path]) -> None:
    text, out = page
    named = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {out / name for name in named} == set((out / "figures").iterdir())
    assert len(named) == len(set(named)) == 11
    for name in named:
        with Image.open(out / name) as image:
            image.verify()
            assert image.format == "PNG"
    assert sum((out / name).stat().st_size for name in named) < 1_000_000


def test_tables_are_rectangular(page: tuple[str, Path]) -> None:
    for table in tables(page[0]):
        assert len({len(row) for row in table}) == 1


def test_a_section_is_there_if_its_data_are(page: tuple[str, Path], tmp_path: Path) -> None:
    assert set(OPTIONAL.values()) <= set(titles(page[0]))
    assert len(titles(page[0])) == 17
    results = made_up(["gpt2", "valm"], [0, 1])
    for part in ("attribution", "given", "neighbours"):
        del results[part]
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    gone = {OPTIONAL[part] for part in ("attribution", "given")}
    assert titles(text) == [name for name in titles(page[0]) if name not in gone]
    assert "recall at 1" in text
    assert "neighbours.png" not in text


@pytest.mark.parametrize("names", [["gpt2", "blind_valm_eos"], ["valm"]])
def test_one_seed_and_few_variants_without_intervals(names: list[str], tmp_path: Path) -> None:
    results = made_up(names, [7])
    for part in (*OPTIONAL, "clip", "timed", "machine", "versions", "commit", "trained_at"):
        del results[part]
    for variant in results["variants"].values():
        variant.pop("retrieved", None)
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert "seed 7" in text
    assert not re.search(r"±|95 %|\[[+-]\d|not clear|higher|\bnan\b", text)
    assert ("cost.png" in text) == ("gpt2" in names)
    assert not set(titles(text)) & set(OPTIONAL.values())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    report.write(results, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_no_attention_without_grounding(tmp_path: Path) -> None:
    results = made_up(["gpt2"], [0])
    for part in OPTIONAL:
        del results[part]
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert "Attention on the grounding" not in titles(text)
    assert "Differences" not in titles(text)


def test_words_follow_the_data() -> None:
    def gap(values: list[float]) -> Gap:
        return Gap(values)

    assert [gap(v).word for v in ([0.5, 0.6, 0.55], [-0.5, -0.6, -0.55])] == ["higher", "lower"]
    assert gap([0.5, -0.6, 0.1]).word == "not clear over seeds"
    assert gap([0.0, 0.0]).word == "not clear over seeds"
    assert "one seed" in gap([0.5]).word
    assert not gap([0.5]).clear
    assert str(Gap([0.5, 0.5], least=0.2)) == "+0.500 [+0.300, +0.700]"
    assert not Gap([0.1, 0.1], least=0.2).clear


def test_chance_is_left_out_only_if_objects_say_so_too() -> None:
    """Seeds that agree by luck have no interval to speak of; the objects' own is wider."""
    same = {"gpt2": dict.fromkeys(ATTRIBUTES, [0.09, 0.09, 0.09, 0.09])}
    chance = dict.fromkeys(ATTRIBUTES, 0.125)
    for error, clear in ((0.04, False), (0.03, True)):
        errors = {"gpt2": dict.fromkeys(ATTRIBUTES, [error] * 4)}
        gap = findings.against_chance(same, errors, chance)["gpt2"]["color"]
        assert gap.half == pytest.approx(1.96 * error / 2)
        assert gap.clear == clear


@pytest.mark.parametrize("freedom", T_975)
def test_interval_is_students(freedom: int) -> None:
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    wanted = T_975[freedom] * np.std(values, ddof=1) / np.sqrt(len(values))
    assert half_width(list(values)) == pytest.approx(wanted, rel=5e-6)  # the table has six digits


@pytest.mark.parametrize("split", ["heldout", "dev"])
def test_summary_is_a_table_of_means(split: str) -> None:
    lines = report.summary_table(ALL, split=split).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*ALL["variants"], "chance"]
    assert len({len(line) for line in lines[:-1]}) == 1
    for line, (name, variant) in zip(lines[1:], ALL["variants"].items(), strict=False):
        held = variant["objects"][split]
        found = [held[wording][a] for a in ATTRIBUTES for wording in ("seen", "new")]
        wanted = [f"{np.mean(values):.3f}" for values in (*found, variant["perplexity"])]
        assert line.split() == [name, *wanted]
    assert lines[-1].split()[1:] == ["0.125", "0.125", "0.200", "0.200", "0.333", "0.333"]


@pytest.mark.parametrize(
    "path",
    [
        ("seeds",),
        ("world",),
        ("chance", "size"),
        ("variants",),
        ("variants", "valm", "perplexity"),
        ("variants", "gpt2", "objects", "heldout", "new", "shape"),
        ("variants", "gpt2", "curves"),
        ("variants", "gpt2", "flops_per_token"),
        ("attribution", "valm", "swapped", "size", "donor"),
        ("attribution", "valm", "removed"),
        ("variants", "gpt2", "standard_error", "seen", "size"),
        ("variants", "valm", "retrieved", "look"),
        ("given", "valm", "mean_image", "color"),
        ("neighbours", "0", "prompt"),
        ("bias", "stated_heldout"),
        ("bias", "gpt2", "shape"),
        ("variants", "valm", "objects", "dev", "new", "size"),
        ("given", "valm", "one_image_shifted", "size"),
    ],
)
def test_what_is_missing_is_named(path: tuple[str, ...], tmp_path: Path) -> None:
    results = copy.deepcopy(ALL)
    node: Any = results
    for key in path[:-1]:
        node = node[int(key)] if key.isdecimal() else node[key]
    del node[path[-1]]
    with pytest.raises(UserError, match=rf"{re.escape('.'.join(path))} is missing"):
        report.write(results, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [0.5, 0.5, None], [0.5, 0.5, float("nan")], 0.5])
def test_anything_but_a_number_per_seed_is_refused(wrong: Any, tmp_path: Path) -> None:
    results = copy.deepcopy(ALL)
    results["variants"]["valm"]["size"] = wrong
    with pytest.raises(UserError, match=r"variants\.valm\.size must be 3 numbers, one per seed"):
        report.write(results, tmp_path)


def test_unknown_variants_knobs_and_images_are_refused(tmp_path: Path) -> None:
    for path, value, message in (
        (
            ("variants", "bert"),
            ALL["variants"]["gpt2"],
            "need seeds and variants of .*, got .*'bert'",
        ),
        (("world", "flavour"), 3, "knobs of a world alone.*flavour"),
    ):
        results = copy.deepcopy(ALL)
        results[path[0]][path[1]] = value
        with pytest.raises(UserError, match=message):
            report.write(results, tmp_path)
    gallery = Gallery(WorldConfig(**KNOBS))
    assert gallery.find("train:38") == (12, 2)
    for image in ("train:39", "validation:0", "train:-1", "7"):
        with pytest.raises(UserError, match="none of this world; expected train:0 to train:38"):
            gallery.find(image)


def written(out: Path, *titles: str, **changed: Any) -> str:
    """The sections of these titles, of ALL with some parts changed."""
    results = ALL | changed
    (out / "figures").mkdir(exist_ok=True)
    page = figures.Page(results, out, Gallery(results_file.check(results)))
    return "\n".join(line for title in titles for line in report.SECTIONS[title][0](page)) + "\n"


def lengthened(steps: dict[str, int]) -> dict[str, Any]:
    """All variants, some trained longer."""
    variants = copy.deepcopy(ALL["variants"])
    for name, number in steps.items():
        variants[name]["steps"] = [number] * 3
        for curve in variants[name]["curves"]:
            curve["step"] = [number // 3, 2 * number // 3, number]
    return variants


def test_unequal_training_is_said_wherever_losses_are_compared(tmp_path: Path) -> None:
    variants = lengthened({"gpt2": 3000})
    for name, variant in variants.items():  # all look as if fooled
        variant["perplexity"] = [9.0, 9.1, 9.2] if name == "gpt2" else [3.0, 3.0, 3.1]
        variant["color"] = [0.1, 0.2, 0.3]
    titles = ["What is compared", "What they answer", "Differences", "Training"]
    text = written(tmp_path, *titles, variants=variants)
    assert "they differ in that and in what the fusion layer may attend to." in text
    assert "Perplexity clearly lower" not in text
    both = "different numbers of updates (GPT-2 3,000; BLIND-VALM token 150;"
    for line in text.splitlines():
        if line.startswith(("Each of the", "All models learn")):
            assert both in line
        if " − GPT-2" in line:
            assert "− GPT-2 (after 150 against 3,000 updates) |" in line
        elif " − " in line:
            assert "updates" not in line
    for variant in variants.values():
        variant["steps"] = [150] * 3
    text = written(tmp_path, titles[0], titles[2], variants=variants)
    assert "for 150 updates each: they differ in what that layer may attend to." in text
    assert "different numbers" not in text
    told = re.search(
        r"Perplexity clearly lower than GPT-2's after as many updates, but colour not: (.*)\.\n",
        text,
    )
    assert told
    assert told[1].split(", ") == [LABELS[name] for name in variants if name != "gpt2"]


def test_eos_controls_are_compared_with_their_readout(page: tuple[str, Path]) -> None:
    rows = [row[0] for table in tables(page[0]) if table[0][0] == "difference" for row in table]
    for readout in ("token", "EOS"):
        for control in ("random tower", "shuffled"):
            assert f"BLIND-VALM {readout} − {control} {readout}" in rows
    mixed = {"BLIND-VALM EOS − shuffled token", "BLIND-VALM token − shuffled EOS"}
    assert not mixed & set(rows)
    assert set(findings.SEES) == set(LABELS)
    assert len({findings.SEES[name] for name in LABELS}) == len(LABELS)


def test_who_answers_train_objects_is_said_of_each(tmp_path: Path) -> None:
    variants = copy.deepcopy(ALL["variants"])
    for variant in variants.values():
        variant["objects"]["train"]["seen"] = {a: [1.0, 0.95, 0.97] for a in ATTRIBUTES}
        variant["objects"]["train"]["new"] = {a: [1.0, 0.6, 0.97] for a in ATTRIBUTES}
    variants["shuffled_eos"]["objects"]["train"]["seen"]["size"] = [1.0, 0.99, 0.9]
    text = written(tmp_path, "Stated and never stated", variants=variants)
    rows = {row[0]: row[1:] for row in tables(text)[3][2:]}
    for name in variants:
        seen = "0.950 (colour, seed 1)"
        if name == "shuffled_eos":
            seen = "0.900 ✗ (size, seed 2)"
        assert rows[LABELS[name]] == ["150", seen, "0.600 ✗ (colour, seed 1)"]


def test_in_short_says_what_is_there(page: tuple[str, Path], tmp_path: Path) -> None:
    """Every sentence stands only on parts that are there; links are to sections of the page."""
    [short] = re.findall(r"## In short\n\n(.*?)\n\n##", page[0], re.DOTALL)
    lines = short.splitlines()
    assert len(lines) == 9
    targets = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles(page[0])
    }
    assert set(re.findall(r"\(#([^)]*)\)", short)) <= targets
    eos = findings.mean(ALL["variants"]["blind_valm_eos"]["color"])
    assert f"the right one in {eos} of cases" in lines[0]
    results = made_up(["gpt2", "valm"], [0, 1])
    for part in ("attribution", "given", "bias"):
        del results[part]
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    [short] = re.findall(r"## In short\n\n(.*?)\n\n##", text, re.DOTALL)
    assert len(short.splitlines()) == 2
    assert "BLIND-VALM" not in short


def test_losses_are_one_curve_and_differences_in_the_same_world() -> None:
    variants = lengthened({"valm": 3000})
    base = np.array([curve["loss"] for curve in variants["gpt2"]["curves"]])
    first, second = figures.losses({**ALL, "variants": variants}).axes
    drawn = [np.asarray(line.get_ydata(), float) for line in first.get_lines()]
    np.testing.assert_allclose(drawn, [*base, base.mean(axis=0)])
    for line, variant in zip(second.get_lines(), variants.values(), strict=True):
        losses = np.array([curve["loss"] for curve in variant["curves"]])
        apart = np.asarray(line.get_ydata(), float)
        np.testing.assert_allclose(apart, (losses - base).mean(axis=0), atol=1e-12)


def test_times_taken_side_by_side_are_not_paired(tmp_path: Path) -> None:
    cost = written(tmp_path, "Cost")
    assert "side by side, or not at one go" in cost
    assert written(tmp_path, "Cost", timed={}) == cost
    assert "docs/results.md" in cost
    assert not re.search(r"same seed|interval", cost)
    rows = {row[0]: row for row in tables(cost)[0]}
    medians = [np.median(ALL["variants"][name]["step_seconds"]) for name in ("valm", "gpt2")]
    assert rows["VALM token"][3] == f"{medians[0] / medians[1]:.2f}"
    cost = written(tmp_path, "Cost", timed={"language": {"seconds": 9.0, "jobs": 1}})
    assert "one at a time" in cost
    assert "side by side" not in cost
    assert "GPT-2's of the same seed" in cost


def test_images_given_are_those_that_are_there(page: tuple[str, Path], tmp_path: Path) -> None:
    rows = [row for table in tables(page[0]) for row in table]
    for kind, label in GIVEN.items():
        row = next(row for row in rows if row[0] == label)
        assert row[1] == findings.mean(ALL["given"]["gpt2"][kind]["color"])
        gap = Gap.between(ALL["given"]["valm"][kind]["size"], ALL["variants"]["valm"]["size"])
        assert [row for row in rows if row[0] == f"{label} − text, VALM token"][0][3] == gap.cell
    assert "CLIP keeps images and texts apart" in page[0]
    given = {name: {"mean_image": kinds["mean_image"]} for name, kinds in ALL["given"].items()}
    text = written(tmp_path, OPTIONAL["given"], given=given)
    assert "| mean of images |" in text
    assert not re.search(r"one image|shifted|keeps images", text)
    unknown: list[dict[str, Any]] = [{}, {"sound": {}}]
    for kinds in unknown:
        with pytest.raises(UserError, match="given must hold some of"):
            results_file.check({**ALL, "given": {"valm": kinds}})


def test_command_is_the_one_given(page: tuple[str, Path], tmp_path: Path) -> None:
    assert f"\n    {findings.COMMAND}\n" in page[0]
    text = written(tmp_path, "How this was made", command="python -m x --seeds=5")
    assert text.startswith("    python -m x --seeds=5\n")
    assert findings.COMMAND not in text


def test_bias_is_against_the_least_share_and_says_updates(tmp_path: Path) -> None:
    variants = lengthened({"gpt2": 3000})
    bias: dict[str, Any] = {"stated_heldout": [0.0, 0.1], "gpt2": ALL["bias"]["gpt2"]}
    text = written(tmp_path, OPTIONAL["bias"], variants=variants, bias=bias)
    gap = Gap.between(*bias["gpt2"]["color"][::-1])
    assert f"| 10 % − 0 %, GPT-2 | {gap.cell} |" in text
    head, _, *rows = next(table for table in tables(text) if table[0][0] == "stated")
    assert head[4:] == [f"{word}, GPT-2 (3,000 updates)" for word in WORDS.values()]
    assert rows[0][1:4] == [f"{ALL['chance'][a]:.3f} (0.0)" for a in ATTRIBUTES]
    assert "both at" not in text
    assert findings.swept({"variants": {}, "bias": bias}) == {"gpt2": "GPT-2"}
    bias["gpt2"] = {**bias["gpt2"], "size": [[0.1], [0.2]]}
    with pytest.raises(UserError, match=r"bias\.gpt2\.size\.0 must be 3 numbers"):
        results_file.check({**ALL, "bias": bias})
    for knob in ([], ["often"]):
        with pytest.raises(UserError, match=r"bias\.stated_heldout must be numbers"):
            results_file.check({**ALL, "bias": {**ALL["bias"], "stated_heldout": knob}})


@pytest.mark.parametrize(("last", "word"), [(0.9, "higher"), (0.1, "lower"), (0.5, "not clear")])
def test_the_data_choose_what_is_said_of_the_bias(tmp_path: Path, last: float, word: str) -> None:
    bias = copy.deepcopy(ALL["bias"])
    bias["gpt2"]["color"] = [[0.4, 0.5, 0.6], [last - 0.05, last, last + 0.05]]
    bias["blind_valm_eos"]["color"] = [[0.9] * 3, [last + 0.2] * 3]
    short = written(tmp_path, "In short", bias=bias)
    grown = Gap.between(bias["gpt2"]["color"][1], bias["gpt2"]["color"][0])
    assert f"at 10 % less at 0 %: {grown} ({word}" in short
    gap = Gap.between(bias["gpt2"]["color"][1], bias["blind_valm_eos"]["color"][1])
    assert f"less BLIND-VALM EOS, both at 10 %: {gap} (lower)" in short
    text = written(tmp_path, OPTIONAL["bias"], bias=bias)
    assert f"| GPT-2 − BLIND-VALM EOS, both at 10 % | {gap.cell} |" in text


def test_what_text_alone_gives_is_counted_from_the_text(tmp_path: Path) -> None:
    share, world = 0.4, {**KNOBS, "heldout_objects": 9, "sentences": 300, "seed": 0}
    bias = {**ALL["bias"], "stated_heldout": [0.0, share]}
    text = written(tmp_path, OPTIONAL["bias"], bias=bias, world=world)
    [row] = [row for table in tables(text) for row in table if row[0] == "40 %"]
    for cell, attribute in zip(row[1:4], ATTRIBUTES, strict=True):
        times: list[int] = []
        right: list[float] = []
        for seed in ALL["seeds"]:
            config = WorldConfig(**{**world, "seed": seed}, stated_heldout=share)
            things = objects(config)
            sentences = Counter(language.sentences(config, things, "train"))
            of = {thing.name: 0 for thing in things if thing.split == "heldout"}
            for probe in language.probes(config, things):
                if probe.object in of and (probe.attribute, probe.wording) == (attribute, "seen"):
                    of[probe.object] += sentences[f"{probe.prompt} {probe.answer}."]
            times += of.values()
            right += [1.0 if count else ALL["chance"][attribute] for count in of.values()]
        assert cell == f"{np.mean(right):.3f} ({np.mean(times):.1f})"


def test_removed_and_nowhere_agree_or_how_far_they_do_not(tmp_path: Path) -> None:
    found = {name: copy.deepcopy(ALL["attribution"][name]) for name in ("blind_valm", "valm")}
    for variant in found.values():
        variant["removed"] = copy.deepcopy(variant["nowhere"])
    assert "nowhere, and does: no accuracy here differs." in written(
        tmp_path, OPTIONAL["attribution"], attribution=found
    )
    found["valm"]["removed"]["size"][1] = found["valm"]["nowhere"]["size"][1] + 0.25
    text = written(tmp_path, OPTIONAL["attribution"], attribution=found)
    assert "nowhere, but differ by up to 0.25 (VALM token, size, seed 1)." in text
