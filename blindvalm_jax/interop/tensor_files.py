"""Tensors on disk, as numpy arrays; every way a file can be wrong is one clear line.

Half precision is read as fp32: parameters are kept in fp32 and computed in the dtype of the run.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from blindvalm_jax import files
from blindvalm_jax.errors import UserError

Skip = Callable[[str], bool]

_DISTRIBUTED = "module."
_FLOATS = ("float16", "bfloat16", "float64")


def read_safetensors(path: Path, *, skip: Skip = lambda name: False) -> dict[str, np.ndarray]:
    """All tensors of a file but those whose names are skipped; floats come as fp32."""
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a safetensors file")
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in sorted(file.keys()) if not skip(name)]
            tensors = {name: as_float32(file.get_tensor(name)) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again"
        ) from error
    _check_finite(tensors, path)
    return tensors


def names(path: Path, content: Any = None) -> set[str]:
    """Names of the tensors in a safetensors file, or in a torch file of this content."""
    if path.suffix != ".safetensors":
        return set(_table(content, path))
    found: set[str] = set()

    def skip(name: str) -> bool:
        found.add(name)
        return True

    read_safetensors(path, skip=skip)
    return found


def read_hugging_face(directory: Path, *, skip: Skip = lambda name: False) -> dict[str, np.ndarray]:
    """Tensors of a Hugging Face model directory: one safetensors file, shards, or a .bin file."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single, skip=skip)
    if index.exists():
        return _read_shards(index, skip)
    pickled = directory / "pytorch_model.bin"
    if pickled.exists():
        return state_dict(read_torch(pickled), pickled, skip=skip)
    raise UserError(
        f"{directory} holds no weights: expected {single.name}, {index.name} or {pickled.name}"
    )


def _read_shards(index: Path, skip: Skip) -> dict[str, np.ndarray]:
    weight_map = files.read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} must hold a table weight_map of tensor: file")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not a file of its own directory")
        tensors.update(read_safetensors(index.parent / name, skip=skip))
    promised = {name for name in weight_map if not skip(name)}
    if promised != set(tensors):
        raise UserError(
            f"{index} and its files differ in the tensors {sorted(promised ^ set(tensors))}: "
            f"download all files again"
        )
    return tensors


def read_torch(path: Path) -> Any:
    """What a torch checkpoint holds, read without running any code it carries.

    Plain data, tensors and argparse.Namespace are let through. An archive of TorchScript, the form
    in which OpenAI publishes CLIP, gives its state dict.

    Raises:
      UserError: torch is not installed, or the file is damaged or holds other Python objects.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the torch checkpoint in it")
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a torch checkpoint")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a torch checkpoint and torch is not installed: "
            f"pip install 'blindvalm_jax[torch]', or save its tensors as safetensors"
        ) from error
    try:
        if is_torchscript(path):
            with warnings.catch_warnings():
                # Deprecated for new models; OpenAI's CLIPs exist in no other form.
                warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated")
                return torch.jit.load(str(path), map_location="cpu").state_dict()
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        refused = re.search(r"Unsupported (?:global|class).*?(?:GLOBAL )?([\w.]+\.\w+)", str(error))
        if refused:
            raise UserError(
                f"{path} holds the Python object {refused[1]}, which is not loaded; where it is "
                f"installed, export the tensors with torch.save(torch.load(path, "
                f"weights_only=False)['model'], 'plain.pt') and convert plain.pt"
            ) from error
        # What torch says advises to load the file with weights_only=False: not repeated here.
        raise UserError(
            f"{path} cannot be read as a torch checkpoint ({type(error).__name__}): it is damaged, "
            "or something else"
        ) from error


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def state_dict(
    content: Any, path: Path, *, skip: Skip = lambda name: False
) -> dict[str, np.ndarray]:
    """The tensors of a torch checkpoint as numpy arrays, floats in fp32; `skip` as elsewhere.

    They may be the whole checkpoint or its entry `model` (fairseq) or `state_dict` (open_clip),
    with the `module.` that distributed training puts before every name.
    """
    tensors = {}
    for name, value in _table(content, path).items():
        if not skip(name):
            value = value.detach()
            tensors[name] = (value.float() if value.is_floating_point() else value).numpy()
    _check_finite(tensors, path)
    return tensors


def _check_finite(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")


def _table(content: Any, path: Path) -> dict[str, Any]:
    """Name to torch tensor."""
    import torch

    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no state dict: expected a table of name: tensor")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{path}: expected only tensors in the state dict, got also {others[:8]}")
    if all(name.startswith(_DISTRIBUTED) for name in content):
        return {name.removeprefix(_DISTRIBUTED): value for name, value in content.items()}
    return dict(content)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Floats of another width as fp32; everything else as it is."""
    return array.astype(np.float32) if array.dtype.name in _FLOATS else array
