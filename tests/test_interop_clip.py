"""CLIP text towers in every layout, against numbers that transformers gave and against itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import trees
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_openai, formats, rules, weights
from blindvalm_jax.interop.clip_text import load_tower
from blindvalm_jax.models.clip import TowerConfig
from tests.foreign_models import (
    TOWER,
    assert_equal,
    features,
    golden,
    random_params,
    write_hugging_face,
    write_tensors,
)

# fp32 sums in another order, on unit vectors: 2e-6 measured.
TOLERANCE = 1e-5


def _openai(config: TowerConfig, params: Any) -> dict[str, np.ndarray]:
    """Our parameters in OpenAI's layout."""
    return rules.save(
        params,
        model=clip_openai.model_rules(),
        block=lambda index: clip_openai.block_rules(index, heads=config.heads),
        layers=config.layers,
    )


def _with_image_side(tensors: dict[str, np.ndarray], *, prefix: str = "") -> dict[str, np.ndarray]:
    one = np.ones((1,), np.float32)
    named = {f"{prefix}{name}": value for name, value in tensors.items()}
    return {**named, "visual.conv1.weight": one, "logit_scale": one}


def test_golden_features(tmp_path: Path) -> None:
    config, tensors, ids, expected = golden("hf_clip")
    tower = load_tower(write_hugging_face(tmp_path, config, tensors))
    assert tower.config == TowerConfig(
        layers=3,
        width=16,
        heads=4,
        mlp_width=40,
        projection=12,
        vocab_size=67,
        context=14,
        start_id=65,
        end_id=66,
    )
    assert (tower.source, tower.tokenizer_directory) == (str(tmp_path), None)
    assert tower.sha256 == weights.params_sha256(tower.params)
    got = features(tower.config, tower.params, ids)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def test_golden_features_notice_every_tensor(tmp_path: Path) -> None:
    config, tensors, ids, expected = golden("hf_clip")
    text = {n: x for n, x in tensors.items() if n.startswith("text_")}
    for number, name in enumerate(text):
        if name.endswith("k_proj.bias"):
            continue  # adds the same to all scores of a query, and softmax does not see it
        altered = {**text, name: text[name].copy()}
        altered[name].reshape(-1)[0] += 0.5
        tower = load_tower(write_hugging_face(tmp_path / str(number), config, altered))
        difference = np.abs(features(tower.config, tower.params, ids) - expected).max()
        assert difference > 10 * TOLERANCE, name


def test_openai_layout_gives_the_same_tower(tmp_path: Path) -> None:
    config, tensors, ids, expected = golden("hf_clip")
    tower = load_tower(write_hugging_face(tmp_path / "hf", config, tensors))
    theirs = _with_image_side(_openai(tower.config, tower.params))
    path = write_tensors(tmp_path / "clip.safetensors", theirs)
    again = load_tower(path, heads=4, activation="quick_gelu")
    assert again.config == tower.config
    assert_equal(again.params, tower.params)
    got = features(again.config, again.params, ids)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize(("quick", "activation"), [(True, "quick_gelu"), (False, "gelu_erf")])
def test_open_clip_directory_tells_heads_and_activation(
    prefix: str, quick: bool, activation: str, tmp_path: Path
) -> None:
    params = random_params(TOWER)
    tensors = _with_image_side(_openai(TOWER, params), prefix=prefix)
    write_tensors(tmp_path / "open_clip_model.safetensors", tensors)
    text: dict[str, Any] = {
        "context_length": 14,
        "vocab_size": 50,
        "width": 16,
        "heads": 4,
        "layers": 2,
    }
    model: dict[str, Any] = {"embed_dim": 12, "vision_cfg": {}, "text_cfg": text}
    if quick:
        model["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        tower = load_tower(path)
        assert (tower.config.heads, tower.config.activation) == (4, activation)
        assert_equal(tower.params, params)
    for heads in ("4", 4.0, 0):
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": model | {"text_cfg": text | {"heads": heads}}})
        )
        with pytest.raises(UserError, match="heads must be int of at least 1, got"):
            load_tower(tmp_path)
    text["pool_type"] = "last"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(UserError, match="does not have the options pool_type='last'"):
        load_tower(tmp_path)


def test_openai_archives_are_known_to_use_quick_gelu(tmp_path: Path) -> None:
    tensors = _with_image_side(_openai(TOWER, random_params(TOWER)))
    for name in ("input_resolution", "context_length", "vocab_size"):
        tensors[name] = np.array(14)
    path = write_tensors(tmp_path / "clip.safetensors", tensors)
    assert load_tower(path, heads=4).config.activation == "quick_gelu"
    del tensors["context_length"]
    with pytest.raises(UserError, match="not say which GELU"):
        load_tower(write_tensors(path, tensors), heads=4)


@pytest.mark.parametrize(
    ("kept", "options", "message"),
    [
        (
            None,
            {"heads": 4},
            "the tensors do not say which GELU the tower uses: tell convert by --activation",
        ),
        (None, {"activation": "relu"}, "one of gelu_erf, gelu_tanh, quick_gelu"),
        (
            None,
            {"activation": "quick_gelu"},
            "tell convert by --heads, a divisor of the tower's width 16",
        ),
        ("no ln", {"heads": 4, "activation": "quick_gelu"}, "missing ['ln_final.bias']"),
        ("extra", {"heads": 4, "activation": "quick_gelu"}, "not understood ['text_projection.b']"),
        (
            "no blocks",
            {"heads": 4, "activation": "quick_gelu"},
            "its tensors are of no known layout",
        ),
    ],
)
def test_openai_files_that_do_not_fit(
    kept: str | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = _openai(TOWER, random_params(TOWER))
    if kept == "no ln":
        del tensors["ln_final.bias"]
    elif kept == "extra":
        tensors["text_projection.b"] = np.zeros(3, np.float32)
    elif kept == "no blocks":
        tensors = {name: x for name, x in tensors.items() if "resblocks" not in name}
    path = write_tensors(tmp_path / "clip.safetensors", tensors)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_tower(path, **options)
    assert "\n" not in str(caught.value)


def test_half_precision_and_the_buffer_of_older_files(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip")
    half: dict[str, np.ndarray] = {
        name: value.astype(np.float16) for name, value in tensors.items()
    }
    half["text_model.embeddings.position_ids"] = np.arange(14)[None]
    single = {name: half[name].astype(np.float32) for name in tensors}
    got = load_tower(write_hugging_face(tmp_path / "half", config, half))
    expected = load_tower(write_hugging_face(tmp_path / "single", config, single))
    assert_equal(got.params, expected.params)


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({"bos_token_id": 0, "eos_token_id": 2}, (65, 66)),
        ({"bos_token_id": 49406, "eos_token_id": 49407}, (65, 66)),
        ({"bos_token_id": None, "eos_token_id": None}, (65, 66)),
        ({"bos_token_id": 63, "eos_token_id": 64}, (63, 64)),
    ],
)
def test_start_and_end_ids(change: dict[str, Any], ids: tuple[int, int], tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip")
    config["text_config"].update(change)
    tower = load_tower(write_hugging_face(tmp_path, config, tensors)).config
    assert (tower.start_id, tower.end_id) == ids


def test_the_older_text_config_dict_overrides(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip")
    # As in transformers: also by its defaults, where it leaves a field out.
    config["text_config_dict"] = config["text_config"]
    config["text_config"] = {"hidden_size": 512, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    del config["text_config_dict"]["layer_norm_eps"], config["text_config_dict"]["hidden_act"]
    tower = load_tower(write_hugging_face(tmp_path, config, tensors)).config
    assert (tower.width, tower.norm_epsilon, tower.activation) == (16, 1e-5, "quick_gelu")


@pytest.mark.torch
def test_transformers_merges_the_two_text_configs_alike(tmp_path: Path) -> None:
    import transformers

    config, tensors, _, _ = golden("hf_clip")
    config["text_config_dict"] = dict(config["text_config"])
    config["text_config"] = {"layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    del config["text_config_dict"]["layer_norm_eps"], config["text_config_dict"]["hidden_act"]
    tower = load_tower(write_hugging_face(tmp_path, config, tensors)).config
    theirs: Any = transformers.CLIPConfig.from_pretrained(tmp_path).text_config
    assert tower.norm_epsilon == theirs.layer_norm_eps
    assert (tower.activation, tower.width) == (theirs.hidden_act, theirs.hidden_size)


def _text_model(case: str, directory: Path) -> Path:
    config, tensors, _, _ = golden("hf_clip")
    if case == "no projection":
        config["architectures"] = ["CLIPTextModel"]
        tensors = {n.removeprefix("text_model."): x for n, x in tensors.items() if "proj" not in n}
    elif case == "unknown":
        tensors["text_model.pooler.weight"] = np.zeros(3, np.float32)
    elif case == "missing":
        del tensors["text_model.encoder.layers.0.mlp.fc1.bias"]
    elif case == "act":
        config["text_config"]["hidden_act"] = "silu"
    elif case == "heads":
        config["text_config"]["num_attention_heads"] = 3
    elif case == "context":
        config["text_config"]["max_position_embeddings"] = 77
    elif case == "type":
        config["text_config"]["hidden_size"] = "16"
    elif case == "zero":
        config["text_config"]["hidden_size"] = 0
    elif case == "layers":
        config["text_config"]["num_hidden_layers"] = True
    elif case == "epsilon":
        config["text_config"]["layer_norm_eps"] = float("nan")
    elif case == "text":
        config["text_config"] = ["hidden_size", 16]
    elif case == "older":
        config["text_config_dict"] = 5
    elif case == "bias only":
        del tensors["text_projection.weight"]
        tensors["text_projection.bias"] = np.zeros(12, np.float32)
        config["architectures"] = 7
    elif case == "vector":
        tensors["text_projection.weight"] = np.zeros(12, np.float32)
    elif case == "nan":
        tensors["text_model.encoder.layers.0.mlp.fc1.bias"][3] = np.nan
    elif case == "quantised":
        name = "text_model.encoder.layers.1.mlp.fc1.weight"
        tensors[name] = tensors[name].astype(np.int8)
    elif case == "other":
        config = {"model_type": "siglip"}
    return write_hugging_face(directory, config, tensors)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no projection", "has no matrix text_projection.weight (architecture CLIPTextModel)"),
        ("unknown", "missing none; not understood ['text_model.pooler.weight']"),
        ("missing", "missing ['text_model.encoder.layers.0.mlp.fc1.bias']"),
        ("act", "hidden_act must be one of gelu, gelu_new, gelu_pytorch_tanh, quick_gelu"),
        ("heads", "hidden_size 16 is not a multiple of 3 heads"),
        ("context", "position_embedding must be float32[77, 16], got float32[14, 16]"),
        ("type", "hidden_size must be int of at least 1, got '16'"),
        ("zero", "hidden_size must be int of at least 1, got 0"),
        ("layers", "num_hidden_layers must be int of at least 1, got True"),
        ("epsilon", "layer_norm_eps must be float from 0 to 1, got nan"),
        ("text", "text_config must be a table of fields, got ['hidden_size', 16]"),
        ("older", "text_config_dict must be a table of fields, got 5"),
        ("bias only", "has no matrix text_projection.weight (architecture 7)"),
        ("vector", "has no matrix text_projection.weight"),
        ("nan", "layers.0.mlp.fc1.bias holds numbers that are not finite"),
        ("quantised", "layers.1.mlp.fc1.weight holds int8, expected floats"),
        ("other", "has no config.json of a GPT-2 or CLIP (model_type 'siglip')"),
    ],
)
def test_hugging_face_directories_that_do_not_fit(case: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_tower(_text_model(case, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_config_without_a_kind_is_refused_when_the_layout_is_given(tmp_path: Path) -> None:
    config, tensors, _, _ = golden("hf_clip")
    del config["model_type"]
    path = write_hugging_face(tmp_path, config, tensors)
    with pytest.raises(UserError, match="expected model_type clip or clip_text_model, got None"):
        formats.read(str(path), layout="hf_clip")


def test_names_that_are_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: give a directory, a file or a hub id"):
        load_tower(tmp_path / "nothing")
    # The tests run with HF_HUB_OFFLINE=1, so that this is what an unreachable hub looks like.
    with pytest.raises(UserError, match="no/such-tower is no path here, and as a hub id it cannot"):
        load_tower("no/such-tower")
    with pytest.raises(
        UserError, match=r"has no config\.json of a GPT-2 or CLIP \(model_type None\)"
    ):
        load_tower(tmp_path)


def test_a_weights_directory_keeps_source_and_tokenizer(tmp_path: Path) -> None:
    params = random_params(TOWER)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "vocab.json").write_text("{}")
    weights.save(
        tmp_path / "w", params, config=TOWER, source="the hub", tokenizer_files=tmp_path / "tok"
    )
    tower = load_tower(tmp_path / "w")
    assert (tower.config, tower.source) == (TOWER, "the hub")
    assert tower.tokenizer_directory == tmp_path / "w"
    assert_equal(tower.params, params)


@pytest.mark.torch
@pytest.mark.parametrize("architecture", ["CLIPModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_live_features(architecture: str, activation: str, tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    model = make_golden.clip_model(getattr(transformers, architecture), hidden_act=activation)
    ids = make_golden.clip_ids(vocab_size=67, rows=4, length=12)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    tower = load_tower(tmp_path)
    got = features(tower.config, tower.params, ids)
    expected = make_golden.clip_features(model, ids)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    exact = make_golden.in_double(model)
    outputs = exact.get_text_features if architecture == "CLIPModel" else exact
    pooled = np.asarray(_pooled(outputs, ids))
    pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
    np.testing.assert_allclose(got[:, -1], pooled, atol=TOLERANCE, rtol=0)


def _pooled(call: Any, ids: np.ndarray) -> np.ndarray:
    """CLIP's embedding of whole texts, as transformers itself pools it."""
    import torch

    with torch.no_grad():
        out = call(input_ids=torch.tensor(ids))
    for name in ("text_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).numpy()
    return out.numpy()


@pytest.mark.torch
def test_a_text_model_without_projection_is_refused(tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    make_golden.clip_model(transformers.CLIPTextModel).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="take a CLIPModel or CLIPTextModelWithProjection"):
        load_tower(tmp_path)


@pytest.mark.torch
def test_training_checkpoints_of_open_clip(tmp_path: Path) -> None:
    import torch

    params = random_params(TOWER)
    named = _with_image_side(_openai(TOWER, params)).items()
    content = {
        "epoch": 3,
        "name": "a run",
        "state_dict": {f"module.{name}": torch.tensor(value) for name, value in named},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": {"scale": 65536.0},
    }
    torch.save(content, tmp_path / "epoch_3.pt")
    tower = load_tower(tmp_path / "epoch_3.pt", heads=4, activation="gelu_erf")
    assert_equal(tower.params, params)
    assert tower.config.activation == "gelu_erf"


@pytest.mark.torch
def test_torch_files_in_openai_layout(tmp_path: Path) -> None:
    import torch

    params = random_params(TOWER)
    tensors = {n: torch.tensor(x) for n, x in _with_image_side(_openai(TOWER, params)).items()}
    torch.save(tensors, tmp_path / "plain.pt")
    assert_equal(load_tower(tmp_path / "plain.pt", heads=4, activation="gelu_erf").params, params)
    module = _archive_module(tensors)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(module), tmp_path / "archive.pt")
    tower = load_tower(tmp_path / "archive.pt", heads=4)
    assert tower.config.activation == "quick_gelu"
    half = random_params(TOWER)
    half = trees.unflatten(
        {n: x.astype(np.float16).astype(np.float32) for n, x in trees.flatten(half).items()}
    )
    assert_equal(tower.params, half)


def _archive_module(tensors: dict[str, Any]) -> Any:
    """A module whose state dict is OpenAI's: half precision, with its three numbers."""
    import torch

    class Tree(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Tree()
    numbers = {name: torch.tensor(14) for name in clip_openai.OPENAI_ENTRIES}
    for path, value in {**tensors, **numbers}.items():
        *parents, leaf = path.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, Tree())
            node = getattr(node, parent)
        node.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    return root


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads"), [(512, 8), (768, 12)])
def test_live_features_at_full_size(width: int, heads: int, tmp_path: Path) -> None:
    import transformers

    from tests import make_golden

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    model = make_golden.clip_model(
        transformers.CLIPTextModelWithProjection,
        **sizes,
        num_attention_heads=heads,
        num_hidden_layers=12,
        vocab_size=49408,
        max_position_embeddings=77,
    )
    make_golden.randomise(model, seed=5, scale=0.02)
    ids = make_golden.clip_ids(vocab_size=49408, rows=2, length=75)
    expected = make_golden.clip_features(model, ids)
    model.save_pretrained(tmp_path)
    tower = load_tower(tmp_path)
    got = features(tower.config, tower.params, ids)
    print(f"width {width}: largest difference {np.abs(got - expected).max():.2e}")
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
