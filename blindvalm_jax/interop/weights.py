"""Our own weights directory: converted models, and the frozen tower of a run.

`params.safetensors` holds the parameters under their paths ("h/blocks_0_9/attn/qkv/kernel"),
`config.json` all that rebuilds the module, where the weights came from, and a hash of them.
Files of a tokenizer may lie beside these two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from blindvalm_jax import files, trees
from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import tensor_files
from blindvalm_jax.models.clip import TextTower, TowerConfig
from blindvalm_jax.models.contrastive import Clip, ClipConfig
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.models.transformer import ACTIVATIONS
from blindvalm_jax.models.vision import VisionConfig, VisionTower

FORMAT = 1
PARAMS_FILE, CONFIG_FILE = "params.safetensors", "config.json"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "bpe_simple_vocab_16e6.txt.gz",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """All that rebuilds a decoder around its parameters; see `models.decoder.Decoder`."""

    decoder: DecoderConfig
    fusion: FusionConfig
    vocab_size: int
    fusion_layers: tuple[int, ...] = ()
    memory_width: int = 0

    def module(self, **options: Any) -> Decoder:
        """The module; options: dtype, kernel, remat, scan_unroll, deterministic."""
        return Decoder(
            self.decoder,
            self.fusion,
            vocab_size=self.vocab_size,
            fusion_layers=self.fusion_layers,
            memory_width=self.memory_width,
            **options,
        )


Spec = DecoderSpec | TowerConfig | VisionConfig | ClipConfig

_KINDS: dict[str, type] = {
    "decoder": DecoderSpec,
    "clip_text": TowerConfig,
    "clip_vision": VisionConfig,
    "clip": ClipConfig,
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model read from disk.

    kind: "decoder" (config is a `DecoderSpec`), "clip_text" (a `TowerConfig`), "clip_vision" (a
    `VisionConfig`) or "clip" (a `ClipConfig`, parameters under "text", "vision" and "logit_scale").
    tokenizer: its kind and fingerprint where known. source: where the weights came from. sha256:
    `params_sha256`.
    """

    params: dict[str, Any]
    kind: str
    config: Spec
    source: str
    sha256: str
    tokenizer: dict[str, str] | None = None

    @property
    def tower(self) -> TowerConfig:
        """The config of a text tower; a `UserError` when these are other weights."""
        if not isinstance(self.config, TowerConfig):
            raise UserError(f"expected weights of kind clip_text, got {self.kind} ({self.source})")
        return self.config

    @property
    def decoder(self) -> DecoderSpec:
        """The spec of a decoder; a `UserError` when these are other weights."""
        if not isinstance(self.config, DecoderSpec):
            raise UserError(f"expected weights of kind decoder, got {self.kind} ({self.source})")
        return self.config


def kind_of(config: Spec) -> str:
    """The name of a model's kind in `config.json`."""
    return next(kind for kind, cls in _KINDS.items() if isinstance(config, cls))


def params_sha256(params: Mapping[str, Any]) -> str:
    """Hash in hex over names, dtypes, shapes and bytes of all parameters, in order of names."""
    digest = hashlib.sha256()
    for path, value in sorted(trees.flatten(params).items()):
        array = np.asarray(value, order="C")
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save(
    directory: str | Path,
    params: Mapping[str, Any],
    *,
    config: Spec,
    source: str,
    tokenizer: Mapping[str, str] | None = None,
    tokenizer_files: str | Path | None = None,
) -> str:
    """Writes a weights directory, `config.json` last, and returns the hash of the parameters.

    tokenizer: kind and fingerprint; tokenizer_files: the directory whose tokenizer files are copied
    beside the weights.
    Weights that are there already and equal are left alone.

    Raises:
      UserError: the parameters do not fit `config`, or other weights are in the directory.
    """
    directory = Path(directory).expanduser()
    check(params, config, f"weights for {directory}")
    sha256 = params_sha256(params)
    if (directory / CONFIG_FILE).exists():
        there = load(directory)
        if there.sha256 != sha256 or there.config != config:
            raise UserError(f"{directory} holds other weights already: choose a new directory")
        return sha256
    content = {
        "format": FORMAT,
        "kind": kind_of(config),
        "config": dataclasses.asdict(config),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "source": source,
        "sha256": sha256,
    }
    # ascontiguousarray would make a scalar a vector.
    flat = {path: np.asarray(value, order="C") for path, value in trees.flatten(params).items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer_files is not None:
            copy_tokenizer(Path(tokenizer_files), directory)
        files.write_bytes(directory / PARAMS_FILE, safetensors.numpy.save(flat))
        files.write_json(directory / CONFIG_FILE, content)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error
    return sha256


def load(directory: str | Path, *, kind: str | tuple[str, ...] | None = None) -> Weights:
    """Reads a weights directory and checks names, shapes and hash.

    kind: the kind of model that is expected, or the kinds, if not every one will do.

    Raises:
      UserError: naming the file, and the tensor, that is missing or wrong.
    """
    directory = Path(directory).expanduser()
    config, content = _described(directory / CONFIG_FILE, kind)
    params_path = directory / PARAMS_FILE
    params = trees.unflatten(tensor_files.read_safetensors(params_path))
    check(params, config, str(params_path))
    sha256 = params_sha256(params)
    if sha256 != content["sha256"]:
        raise UserError(
            f"{params_path}: expected sha256 {content['sha256']} (in {CONFIG_FILE}), got {sha256}: "
            f"the file has changed since it was written; convert or copy it again"
        )
    return Weights(params, content["kind"], config, content["source"], sha256, content["tokenizer"])


def spec(directory: str | Path) -> Spec:
    """The shape of the model in a directory, whose weights are not read; raises as `load`."""
    return _described(Path(directory).expanduser() / CONFIG_FILE, None)[0]


def _described(path: Path, kind: str | tuple[str, ...] | None) -> tuple[Spec, dict[str, Any]]:
    """What a config file of ours says: the shape of the model, and all."""
    content = files.read_object(path)
    needed = {"format", "kind", "config", "tokenizer", "source", "sha256"}
    if content.keys() != needed:
        raise UserError(f"{path} is no config of our weights: its keys must be {sorted(needed)}")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT}, got {content['format']!r}")
    expected = (kind,) if isinstance(kind, str) else kind or tuple(_KINDS)
    if content["kind"] not in expected:
        raise UserError(f"{path}: expected kind {' or '.join(expected)}, got {content['kind']!r}")
    config = rebuild(_KINDS[content["kind"]], content["config"], f"{path}: config")
    return config, content


def is_weights_directory(directory: Path) -> bool:
    """Whether a directory is of this format, whole or not; `load` says what is wrong with it."""
    if (directory / PARAMS_FILE).exists():
        return True
    path = directory / CONFIG_FILE
    return path.is_file() and {"format", "kind"} <= files.read_object(path).keys()


def tokenizer_directory(directory: Path) -> Path | None:
    """The directory itself if tokenizer files lie in it."""
    has = any((directory / name).is_file() for name in TOKENIZER_FILES)
    return directory if has else None


def abstract_params(config: Spec) -> dict[str, jax.ShapeDtypeStruct]:
    """Path to shape and dtype of every parameter the module of `config` has."""

    def init() -> Any:
        key, tokens_BT = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        if isinstance(config, TowerConfig):
            return TextTower(config).init(key, tokens_BT, tokens_BT == 0, readout="token")
        if isinstance(config, VisionConfig):
            return VisionTower(config).init(key, _image(config))
        if isinstance(config, ClipConfig):
            length_B = jnp.zeros((1,), jnp.int32)
            return Clip(config).init(key, _image(config.vision), tokens_BT, length_B)
        z_BTKE = jnp.zeros((1, 1, 1, config.memory_width)) if config.fusion_layers else None
        return config.module().init(key, tokens_BT, z_BTKE)

    return trees.flatten(nn.unbox(jax.eval_shape(init))["params"])


def _image(config: VisionConfig) -> jax.Array:
    return jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8)


def check(params: Mapping[str, Any], config: Spec, source: str) -> None:
    """Checks that parameters are exactly those of the module: names, shapes and dtypes.

    Raises:
      UserError: naming `source`, and what is missing, unknown or of another shape.
    """
    expected, got = abstract_params(config), trees.flatten(params)
    missing, unknown = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{source}: the parameters do not fit the model: missing {missing or 'none'}; "
            f"unknown {unknown or 'none'}"
        )
    for path, want in expected.items():
        if got[path].shape != want.shape or got[path].dtype != want.dtype:
            raise UserError(
                f"{source}: {path} must be {want.dtype}{list(want.shape)}, "
                f"got {got[path].dtype}{list(got[path].shape)}"
            )


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer files that lie in a directory."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def rebuild(cls: type, values: Any, path: str) -> Any:
    """A dataclass from its JSON form, with every field present and of its own type."""
    fields = typing.get_type_hints(cls)
    if not isinstance(values, dict) or values.keys() != fields.keys():
        raise UserError(f"{path} must have exactly the fields {', '.join(fields)}, got {values!r}")
    built = {}
    for name, expected in fields.items():
        value = values[name]
        if dataclasses.is_dataclass(expected):
            built[name] = rebuild(typing.cast(type, expected), value, f"{path}.{name}")
            continue
        if typing.get_origin(expected) is tuple and isinstance(value, list):
            item = typing.get_args(expected)[0]
            value = tuple(_typed(x, item, f"{path}.{name}") for x in value)
        else:
            value = _typed(value, expected, f"{path}.{name}")
        if name == "activation" and value not in ACTIVATIONS:
            raise UserError(f"{path}.{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
        built[name] = value
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _typed(value: Any, expected: Any, path: str) -> Any:
    """The value if it is of its type; a whole number may stand for a float."""
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        name = expected.__name__ if isinstance(expected, type) else expected
        raise UserError(f"{path} must be {name}, got {value!r}")
    return value
