"""Every file of configs/ parses with every argument, and what a published model has is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import pytest

from blindvalm_jax import config, optim, partitioning, presets
from blindvalm_jax.data import byte_level_bpe, tokenizer_files
from blindvalm_jax.data.clip_bpe import ClipTokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.objectives.contrastive import Contrastive
from blindvalm_jax.sweep import grids, plans
from tests import small_images

ROOT = Path(__file__).resolve().parents[1]
VALM = {name for name in presets.VARIANTS if name.startswith("valm")}
PAPERS = ("paper_small", "paper_medium", "paper_long", "paper_valm")


def read(name: str) -> ml_collections.ConfigDict:
    """The settings of a config file: its name, and behind a colon its argument."""
    stem, _, argument = name.partition(":")
    namespace: dict[str, Any] = {}
    path = ROOT / "configs" / f"{stem}.py"
    exec(compile(path.read_text(), path, "exec"), namespace)
    values: ml_collections.ConfigDict = namespace["get_config"](*filter(None, [argument]))
    return values


CONFIGS = [
    *(path.stem for path in sorted((ROOT / "configs").glob("*.py"))),
    *(f"text:{size},{variant}" for size in presets.SIZES for variant in presets.VARIANTS),
    *(f"{paper}:{variant}" for paper in PAPERS for variant in presets.VARIANTS),
    *(f"clip:{size}" for size in presets.CLIP_SIZES),
    *(f"gpt2_small:{size}" for size in ("medium", "large", "xl")),
]


@pytest.mark.parametrize("name", ["laptop_toyworld", "paper"])
def test_a_shipped_sweep_tells_where_the_best_size_lies(name: str) -> None:
    runs = plans.planned(read(f"sweeps/{name}"))
    families = {run.family for run in runs.values()}
    assert families == {"gpt2", "blind", "eos", "valm"}
    assert len(runs) == len(families) * 7 * 4
    assert not grids.thin(runs.values())


def test_a_sweep_on_ones_own_text_takes_its_tower_and_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected BPE,CLIP,INDEX behind the colon, got 'bpe'"):
        read("sweeps/laptop_text:bpe")
    bpe = byte_level_bpe.train(iter(["a text to learn from " * 9]), vocab_size=300)
    bpe.save(tmp_path / "bpe")
    given = read(f"sweeps/laptop_text:{tmp_path / 'bpe'},random,vectors:64")
    with given.unlocked():  # shapes are told, in the place of files
        given.families.valm.grounding.tower = ""
    given.grid.budgets = (6e11,)
    runs = plans.planned(given)
    assert {run.account.vocabulary for run in runs.values()} == {bpe.vocab_size}
    assert not grids.thin(runs.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_parses_with_every_argument(name: str) -> None:
    stem, _, argument = name.partition(":")
    values = read(name)
    words = argument.split(",") if argument else {"paper_valm": ["valm"]}.get(stem, [])
    if VALM & set(words):
        with pytest.raises(UserError, match=r"needs grounding\.index, a directory that") as error:
            config.parse(values)
        assert "\n" not in str(error.value)
        values.grounding.index, values.grounding.tower = "index", "clip"
    parsed = config.parse(values)
    if stem == "clip":
        assert parsed.train.objective == "contrastive"
        return
    for size in set(words) & set(presets.SIZES):
        decoder = parsed.decoder
        assert (decoder.layers, decoder.width, decoder.heads) == presets.SIZES[size]
    source, neighbours = "text", 1
    if "gpt2" in words or stem == "gpt2_small":
        source = "none"
    elif VALM & set(words):
        source, neighbours = "images", 4
    assert (parsed.grounding.source, parsed.grounding.neighbours) == (source, neighbours)
    eos = stem == "toyworld" or any(word.endswith("eos") for word in words)
    assert (parsed.grounding.readout == "eos") == eos
    control = {"random_tower", "shuffled"} & set(words)
    assert parsed.grounding.control == (control.pop() if control else "none")


def test_valm_s_own_recipe_is_its_paper_s() -> None:
    """reference.md, section 2, its last column; the rest is the one before it."""
    ours, blind = read("paper_valm"), read("paper_small:valm")
    assert ours.train.batch_size * ours.data.sequence_length == 65_536
    assert ours.train.steps * ours.train.batch_size * ours.data.sequence_length == 32_768_000_000
    assert ours.optimizer.learning_rate == 5e-4
    ours.train, ours.optimizer.learning_rate = blind.train, blind.optimizer.learning_rate
    assert ours == blind
    assert vars(config.FusionConfig()) == ours.fusion.to_dict()


def test_a_valm_without_index_is_one_line_on_the_command_line() -> None:
    line = ["-m", "blindvalm_jax.train", "--config=configs/text.py:tiny,valm", "--workdir=x"]
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    assert said == [
        "error: grounding.source=images needs grounding.index, a directory that python -m "
        "blindvalm_jax.index build has written; for --dry_run without data vectors:NUMBER"
    ]


def write_vocabulary(directory: Path) -> Path:
    """A tokenizer of CLIP's size, 49,408 entries, with made-up merges."""
    symbols = tokenizer_files.byte_symbols()
    alphabet = [symbols[byte] for byte in tokenizer_files.openai_order()]
    pairs = [(left, right) for left in alphabet for right in alphabet][: 49_408 - 512 - 2]
    pieces = [*alphabet, *(symbol + tokenizer_files.WORD_END for symbol in alphabet)]
    pieces += [left + right for left, right in pairs] + [*tokenizer_files.CLIP_SPECIALS]
    ClipTokenizer({piece: index for index, piece in enumerate(pieces)}, pairs).save(directory)
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ and tokenizer/."""
    directory = tmp_path_factory.mktemp("clip")
    small_images.write_folder(directory / "images", small_images.noise(4), ["a photo"] * 4)
    write_vocabulary(directory / "tokenizer")
    return directory


def objective(inputs: Path, workdir: Path, name: str) -> Contrastive:
    """A run of a config file on these images, as it stands before anything is compiled."""
    values = read(name)
    values.data.images = str(inputs / "images")
    if values.tokenizer.kind == "clip":
        values.tokenizer.path = str(inputs / "tokenizer")
    parsed = config.parse(values)
    mesh = partitioning.make_mesh(parsed.mesh)
    return Contrastive(parsed, workdir, mesh, resuming=False)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("vit_b32", 151_277_313), ("vit_b16", 149_620_737), ("vit_l14", 427_616_513)],
)
def test_published_clips_have_the_parameters_of_openai_s(
    inputs: Path, tmp_path: Path, size: str, parameters: int
) -> None:
    """By shape alone: nothing is allocated."""
    model = objective(inputs, tmp_path, f"clip:{size}").model
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    found: ClipConfig = model.clip.config
    assert (found.text.vocab_size, found.text.context) == (49_408, 77)
    assert (found.text.start_id, found.text.end_id) == (49_406, 49_407)


def test_published_clips_see_each_pair_as_often_as_openai_s_with_its_learning_rates() -> None:
    """Radford et al. 2021, section 2.5 and table 18: 32 epochs of 400 M, 2,000 of warm-up."""
    for size, peak in (("vit_b32", 5e-4), ("vit_b16", 5e-4), ("vit_l14", 4e-4)):
        parsed = config.parse(read(f"clip:{size}"))
        assert parsed.train.steps * parsed.train.batch_size == 32 * 400_000_000
        rate = optim.schedule(parsed.optimizer, steps=parsed.train.steps)
        assert float(rate(2000)) == pytest.approx(peak)
        assert float(rate(1000)) == pytest.approx(peak / 2)
        assert float(rate(parsed.train.steps)) == pytest.approx(0, abs=1e-9)


def test_tiny_clip_is_for_a_laptop(inputs: Path, tmp_path: Path) -> None:
    """Any caption's BPE: 8,192 entries at most, so four million parameters at most."""
    run = objective(inputs, tmp_path, "clip")
    shapes = nn.unbox(jax.eval_shape(run.model.init, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) < 4_000_000
    assert run.model.clip.config.vision.image_size == 64


def test_a_size_that_is_none() -> None:
    with pytest.raises(UserError, match="size must be one of tiny, vit_b32, vit_b16, vit_l14, got"):
        read("clip:huge")
