"""Image towers and whole CLIPs on disk, against numbers that transformers gave and themselves."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax import trees
from blindvalm_jax.data import tokenizers
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import (
    clip_hugging_face,
    clip_hugging_face_vision,
    formats,
    rules,
    weights,
)
from blindvalm_jax.interop.clip_model import load_clip, load_vision, vision_shape
from blindvalm_jax.interop.clip_text import load_tower
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.vision import CLIP_MEAN, CLIP_STD, VisionConfig, VisionTower
from tests import small_models, tiny_tokenizers
from tests.foreign_models import (
    GPT2,
    TOWER,
    assert_equal,
    golden,
    random_params,
    write_hugging_face,
    write_tensors,
)

# fp32 sums in another order, on unit vectors: 3e-7 measured.
TOLERANCE = 1e-5

VIT = VisionConfig(
    kind="vit", image_size=12, patch=4, layers=3, width=16, heads=4, mlp_width=40, projection=12
)
CONV = VisionConfig(
    kind="conv", image_size=8, channels=(4, 6), width=16, projection=12, mean=(0.5, 0.4, 0.3)
)
CLIP = ClipConfig(text=TOWER, vision=VIT, temperature_start=10.0, temperature_cap=50.0)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def _features(config: VisionConfig, params: Any, images: np.ndarray) -> np.ndarray:
    tower = VisionTower(config)
    return np.asarray(jax.jit(tower.apply)({"params": params}, jnp.asarray(images)))


def _theirs(config: VisionConfig, params: Any) -> dict[str, np.ndarray]:
    """Our image tower in Hugging Face's layout."""
    return rules.save(
        params,
        model=clip_hugging_face_vision.model_rules(config.patch),
        block=lambda index: clip_hugging_face.block_rules(index, heads=config.heads, side="vision"),
        layers=config.layers,
    )


def _whole(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of a CLIPModel, written to a directory; its image side is tiny."""
    config, tensors, _, _ = golden("hf_clip")
    write_hugging_face(directory, config, tensors)
    return config, tensors


def test_golden_features(tmp_path: Path) -> None:
    config, tensors, images, expected = golden("hf_clip_vision", inputs="images")
    tower = load_vision(write_hugging_face(tmp_path, config, tensors))
    assert tower.config == VIT
    assert tower.source == str(tmp_path)
    assert tower.sha256 == weights.params_sha256(tower.params)
    got = _features(tower.config, tower.params, images)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    back = _theirs(tower.config, tower.params)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def test_golden_features_notice_every_tensor(tmp_path: Path) -> None:
    config, tensors, images, expected = golden("hf_clip_vision", inputs="images")
    run = jax.jit(VisionTower(VIT).apply)
    for name in tensors:
        if name.endswith("k_proj.bias"):
            continue  # adds the same to all scores of a query, and softmax does not see it
        altered = {**tensors, name: tensors[name].copy()}
        altered[name].reshape(-1)[0] += 0.5
        params = load_vision(write_hugging_face(tmp_path, config, altered)).params
        got = np.asarray(run({"params": params}, jnp.asarray(images)))
        assert np.abs(got - expected).max() > 10 * TOLERANCE, name


def test_a_whole_clip_is_its_towers_and_its_scale(tmp_path: Path) -> None:
    _, tensors = _whole(tmp_path)
    clip = load_clip(tmp_path)
    text, vision = load_tower(tmp_path), load_vision(tmp_path)
    assert vision_shape(tmp_path) == vision.config
    assert (clip.config.text, clip.config.vision) == (text.config, vision.config)
    assert clip.config.temperature_start == pytest.approx(1 / 0.07, rel=1e-4)
    assert clip.config.temperature_cap == 100.0
    assert_equal(
        clip.params,
        {"text": text.params, "vision": vision.params, "logit_scale": tensors["logit_scale"]},
    )
    assert (clip.text_sha256, clip.vision_sha256) == (text.sha256, vision.sha256)
    assert clip.sha256 == weights.params_sha256(clip.params)
    assert (clip.source, clip.tokenizer_directory) == (str(tmp_path), None)


@pytest.mark.parametrize("config", [VIT, CONV, CLIP], ids=["vit", "conv", "clip"])
def test_what_is_saved_is_loaded(config: weights.Spec, tmp_path: Path) -> None:
    params = random_params(config)
    sha256 = weights.save(tmp_path, params, config=config, source="here")
    stored = weights.load(tmp_path, kind=weights.kind_of(config))
    assert (stored.config, stored.sha256, stored.source) == (config, sha256, "here")
    assert_equal(stored.params, params)
    weights.save(tmp_path, params, config=config, source="again")  # equal ones are left alone
    vision = load_vision(tmp_path)
    if isinstance(config, ClipConfig):
        assert weights.kind_of(config) == "clip"
        assert vision.config == config.vision
        assert_equal(vision.params, params["vision"])
    else:
        assert weights.kind_of(config) == "clip_vision"
        assert (vision.config, vision.sha256, vision.source) == (config, sha256, "here")


def test_a_stored_clip_serves_as_text_tower_and_as_a_whole(tmp_path: Path) -> None:
    params = random_params(CLIP)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "vocab.json").write_text("{}")
    path = tmp_path / "w"
    weights.save(path, params, config=CLIP, source="s", tokenizer_files=tmp_path / "tok")
    clip, tower = load_clip(path), load_tower(path)
    assert (tower.config, tower.source, tower.tokenizer_directory) == (TOWER, "s", path)
    assert_equal(tower.params, params["text"])
    weights.save(tmp_path / "text", params["text"], config=TOWER, source="s")
    assert load_tower(tmp_path / "text").sha256 == tower.sha256 == clip.text_sha256
    weights.save(tmp_path / "vision", params["vision"], config=VIT, source="s")
    assert load_vision(tmp_path / "vision").sha256 == clip.vision_sha256
    assert (clip.config, clip.source, clip.tokenizer_directory) == (CLIP, "s", path)
    assert len({clip.sha256, clip.text_sha256, clip.vision_sha256}) == 3
    assert_equal(clip.params, params)


def test_whole_numbers_stand_for_floats_in_a_stored_config(tmp_path: Path) -> None:
    config = dataclasses.replace(CLIP, temperature_start=10, temperature_cap=50)
    weights.save(tmp_path, random_params(config), config=config, source="s")
    assert load_clip(tmp_path).config == CLIP


@pytest.mark.parametrize(
    ("stored", "load", "message"),
    [
        (GPT2, load_clip, "expected kind clip, got 'decoder'"),
        (TOWER, load_clip, "expected kind clip, got 'clip_text'"),
        (VIT, load_tower, "expected kind clip_text or clip, got 'clip_vision'"),
        (TOWER, load_vision, "expected kind clip_vision or clip, got 'clip_text'"),
    ],
)
def test_weights_of_another_kind(
    stored: weights.Spec, load: Any, message: str, tmp_path: Path
) -> None:
    weights.save(tmp_path, random_params(stored), config=stored, source="s")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 5}, "config.vision: image_size 12 is not a multiple of patch 5"),
        ({"mean": [0.1, "0.2", 0.3]}, "config.vision.mean must be float, got '0.2'"),
        ({"mean": [0.1, 0.3]}, "config.vision: mean and std must be three numbers each"),
        ({"kind": None}, "config.vision.kind must be str, got None"),
        ({"projection": 8}, "config: both towers of a CLIP must have one projection"),
        (
            {"image_size": 8},
            "vision/position_embedding must be float32[5, 16], got float32[10, 16]",
        ),
    ],
)
def test_a_stored_config_that_fits_no_tower(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    weights.save(tmp_path, random_params(CLIP), config=CLIP, source="s")
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["vision"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_clip(tmp_path)
    assert "\n" not in str(caught.value)


def test_mean_and_deviation_of_the_image_processor(tmp_path: Path) -> None:
    """From the file that transformers takes, where two are there."""
    from transformers.image_processing_base import ImageProcessingMixin

    config, tensors, _, _ = golden("hf_clip_vision", inputs="images")
    write_hugging_face(tmp_path, config, tensors)
    assert load_vision(tmp_path).config == VIT
    alone, whole = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    own = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 1], "crop_size": 12}
    nested = {
        "image_mean": [0.1, 0.1, 0.1],
        "image_std": [0.3, 0.3, 0.3],
        "rescale_factor": 1 / 255,
    }
    for path, content, mean in (
        (alone, own, (0.5, 0.4, 0.3)),
        (whole, {"processor_class": "CLIPProcessor"}, (0.5, 0.4, 0.3)),
        (whole, {"image_processor": nested}, (0.1, 0.1, 0.1)),
    ):
        path.write_text(json.dumps(content))
        found = load_vision(tmp_path).config
        theirs, _ = ImageProcessingMixin.get_image_processor_dict(tmp_path)
        assert found.mean == mean == tuple(theirs["image_mean"])
        assert found.std == tuple(theirs["image_std"])
    alone.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3]}))
    whole.unlink()
    assert load_vision(tmp_path).config.std == CLIP_STD


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers, got [0.5, 0.5]"),
        ({"image_std": 0.5}, "image_std must be three numbers, got 0.5"),
        ({"image_std": [0.5, 0.5, 0]}, "mean and std must be three numbers each, std positive"),
        ({"do_normalize": False}, "takes bytes / 255 and normalises them, got do_normalize=false"),
        ({"rescale_factor": 1.0}, "takes bytes / 255 and normalises them, got rescale_factor=1.0"),
        ({"do_rescale": 1}, "do_rescale must be bool, got 1"),
    ],
)
def test_image_processors_that_do_something_else(
    processor: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, tensors, _, _ = golden("hf_clip_vision", inputs="images")
    write_hugging_face(tmp_path, config, tensors)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_vision(tmp_path)
    assert "\n" not in str(caught.value)


def test_half_precision_and_the_buffer_of_older_files(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip_vision", inputs="images")
    half: dict[str, np.ndarray] = {name: x.astype(np.float16) for name, x in tensors.items()}
    half["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    single = {name: half[name].astype(np.float32) for name in tensors}
    got = load_vision(write_hugging_face(tmp_path / "half", config, half))
    expected = load_vision(write_hugging_face(tmp_path / "single", config, single))
    assert_equal(got.params, expected.params)


def _damaged(case: str, directory: Path) -> Path:
    config, tensors, _, _ = golden("hf_clip_vision", inputs="images")
    if case == "no projection":
        config["architectures"] = ["CLIPVisionModel"]
        del tensors["visual_projection.weight"]
    elif case == "unknown":
        tensors["vision_model.pooler.weight"] = np.zeros(3, np.float32)
    elif case == "missing":
        del tensors["vision_model.pre_layrnorm.bias"]
    elif case == "patch bias":
        tensors["vision_model.embeddings.patch_embedding.bias"] = np.zeros(16, np.float32)
    elif case == "text":
        config["model_type"] = "clip_text_model"
    elif case == "act":
        config["hidden_act"] = "silu"
    elif case == "quantised":
        name = "vision_model.encoder.layers.1.mlp.fc1.weight"
        tensors[name] = tensors[name].astype(np.int8)
    else:
        name, value = case.split("=")
        config[name] = json.loads(value)
    return write_hugging_face(directory, config, tensors)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no projection", "matrix visual_projection.weight (architecture CLIPVisionModel), so its"),
        ("unknown", "missing none; not understood ['vision_model.pooler.weight']"),
        ("missing", "missing ['vision_model.pre_layrnorm.bias']"),
        ("patch bias", "not understood ['vision_model.embeddings.patch_embedding.bias']"),
        ("text", "expected model_type clip or clip_vision_model, got 'clip_text_model'"),
        ("act", "hidden_act must be one of gelu, gelu_new, gelu_pytorch_tanh, quick_gelu"),
        ("quantised", "layers.1.mlp.fc1.weight holds int8, expected floats"),
        ("num_attention_heads=3", "config.json: width 16 is not a multiple of 3 heads"),
        ("patch_size=5", "config.json: image_size 12 is not a multiple of patch 5"),
        ("image_size=8", "position_embedding must be float32[5, 16], got float32[10, 16]"),
        ("patch_size=2", "patch_embedding must be float32[12, 16], got float32[48, 16]"),
        ("num_channels=1", "num_channels must be 3, got 1"),
        ("image_size=[12, 12]", "image_size must be int of at least 1, got [12, 12]"),
        ("num_hidden_layers=4", "missing ['vision_model.encoder.layers.3.layer_norm1.bias'"),
    ],
)
def test_hugging_face_directories_that_do_not_fit(case: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_vision(_damaged(case, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_model.x": 1.0}, "not understood ['vision_model.x']"),
        ({"text_model.x": 1.0}, "not understood ['text_model.x']"),
        ({"other.x": 1.0}, "not understood ['other.x']"),
        ({"logit_scale": None}, "expected a number logit_scale, got none"),
    ],
)
def test_names_of_a_whole_clip_that_do_not_fit(
    change: dict[str, float | None], message: str, tmp_path: Path
) -> None:
    config, tensors = _whole(tmp_path)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = np.full(3, value, np.float32)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_clip(write_hugging_face(tmp_path, config, tensors))
    assert "\n" not in str(caught.value)


def test_one_tower_is_no_clip_and_other_layouts_have_no_image_side(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip_vision", inputs="images")
    path = write_hugging_face(tmp_path / "vision", config, tensors)
    with pytest.raises(UserError, match="expected model_type clip for both towers, got"):
        load_clip(path)
    with pytest.raises(UserError, match="expected model_type clip or clip_text_model, got"):
        load_tower(path)
    theirs = {"transformer.resblocks.0.ln_1.bias": np.zeros(2, np.float32)}
    path = write_tensors(tmp_path / "openai.safetensors", theirs)
    with pytest.raises(UserError, match="hf_clip, a contrastive run or our weights, got"):
        load_clip(path)
    with pytest.raises(UserError, match="image can be read of a Hugging Face CLIP alone"):
        formats.read(str(path), towers="image")
    with pytest.raises(UserError, match="does not exist: give a directory, a file or a hub id"):
        load_clip(tmp_path / "nothing")


def test_convert_takes_the_towers_it_is_told(tmp_path: Path) -> None:
    _whole(tmp_path / "hf")
    tiny_tokenizers.write_pair(tmp_path / "hf", *tiny_tokenizers.clip_parts())
    clip = load_clip(tmp_path / "hf")
    for towers, kind, sha256 in (
        ("both", "clip", clip.sha256),
        ("image", "clip_vision", clip.vision_sha256),
    ):
        command = [sys.executable, "-m", "blindvalm_jax.convert", f"--towers={towers}"]
        command += [f"--input={tmp_path}/hf", f"--out={tmp_path}/{towers}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == f"sha256 {sha256}"
        assert weights.load(tmp_path / towers, kind=kind).source == f"{tmp_path}/hf"
    assert load_tower(tmp_path / "both").sha256 == clip.text_sha256
    fingerprint = tokenizers.load("clip", f"{tmp_path}/both").fingerprint
    assert weights.load(tmp_path / "both").tokenizer == {"kind": "clip", "fingerprint": fingerprint}
    assert not (tmp_path / "image" / "vocab.json").exists()
    assert formats.read(str(tmp_path / "hf")).config == clip.config.text


def test_the_older_vision_config_dict_overrides(tmp_path: Path) -> None:
    config, tensors = _whole(tmp_path)
    older = dict(config["vision_config"])
    del older["layer_norm_eps"], older["hidden_act"]
    # As in transformers: also by its defaults, where it leaves a field out.
    config["vision_config_dict"] = older
    config["vision_config"] = {"hidden_size": 9, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    tower = load_vision(write_hugging_face(tmp_path, config, tensors)).config
    assert (tower.width, tower.norm_epsilon, tower.activation) == (8, 1e-5, "quick_gelu")


@pytest.mark.torch
def test_transformers_merges_the_two_vision_configs_alike(tmp_path: Path) -> None:
    import transformers

    config, tensors = _whole(tmp_path)
    config["vision_config_dict"] = dict(config["vision_config"])
    config["vision_config"] = {"layer_norm_eps": 1e-3, "hidden_act": "gelu", "patch_size": 4}
    del config["vision_config_dict"]["layer_norm_eps"], config["vision_config_dict"]["hidden_act"]
    tower = load_vision(write_hugging_face(tmp_path, config, tensors)).config
    theirs: Any = transformers.CLIPConfig.from_pretrained(tmp_path).vision_config
    assert tower.norm_epsilon == theirs.layer_norm_eps
    assert (tower.activation, tower.width) == (theirs.hidden_act, theirs.hidden_size)
    assert tower.patch == theirs.patch_size


@pytest.mark.torch
@pytest.mark.parametrize("architecture", ["CLIPModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_live_features(architecture: str, activation: str, tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    cls = getattr(transformers, architecture)
    model = make_golden.vision_model(cls, hidden_act=activation, image_size=20)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tower = load_vision(tmp_path)
    images = make_golden.random_images(rows=4, size=20)
    expected = make_golden.image_features(model, images)
    got = _features(tower.config, tower.params, images)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.torch
def test_live_logits_of_a_whole_clip(tmp_path: Path) -> None:
    """Scale times cosine, as transformers' own CLIPModel gives it; scale below the cap."""
    import torch
    import transformers

    from tests import make_golden

    model = make_golden.vision_model(transformers.CLIPModel)
    model.save_pretrained(tmp_path)
    clip = load_clip(tmp_path)
    ids = make_golden.clip_ids(vocab_size=67, rows=5, length=9)
    images = make_golden.random_images(rows=5, size=12)
    pixels = (images / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    with torch.no_grad():
        exact = make_golden.in_double(model)(
            input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2))
        )
    run = jax.jit(Clip(clip.config).apply)
    length = np.full(5, 9, np.int32)
    found: Any = run({"params": clip.params}, *map(jnp.asarray, (images, ids[:, 1:], length)))
    got = found.scale * found.image_BE @ found.text_BE.T
    scale = float(np.exp(trees.flatten(clip.params)["logit_scale"]))
    # Cosines of unit vectors that are exact to TOLERANCE.
    np.testing.assert_allclose(
        got, exact.logits_per_image.numpy(), atol=2 * scale * TOLERANCE, rtol=0
    )


@pytest.mark.torch
@pytest.mark.slow
def test_live_features_at_full_size(tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    model = make_golden.vision_model(
        transformers.CLIPVisionModelWithProjection,
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=512,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
    )
    make_golden.randomise(model, seed=5, scale=0.02)
    images = make_golden.random_images(rows=2, size=224)
    expected = make_golden.image_features(model, images)
    model.save_pretrained(tmp_path)
    tower = load_vision(tmp_path)
    got = _features(tower.config, tower.params, images)
    print(f"largest difference {np.abs(got - expected).max():.2e}")
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
