"""Names of models and tokenizers: a path here, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from blindvalm_jax.errors import UserError

MODEL_FILES = ("*.json", "*.txt", "*.safetensors")

# An owner and a name, or, for the hub's oldest repositories, a name alone ("gpt2").
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def local_path(
    name: str | Path,
    *,
    patterns: Sequence[str] = MODEL_FILES,
    needs: str | None = "*.safetensors",
    setting: str = "",
) -> Path:
    """The path itself if it exists; otherwise a downloaded copy of the repository it names.

    The network is used only for a hub id. patterns: the files that are downloaded; needs: one of
    them, without which the repository is of no use; setting: how messages call the name.

    Raises:
      UserError: it is neither a path nor a hub id, or the hub cannot be reached or lacks `needs`.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    called = f"{setting} {name}" if setting else str(name)
    if not _HUB_ID.fullmatch(str(name)):
        raise UserError(
            f"{called} does not exist: give a directory, a file or a hub id (owner/name)"
        )
    import huggingface_hub
    import huggingface_hub.errors

    try:
        found = huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{called} is no path here, and as a hub id it cannot be had ({type(error).__name__}): "
            f"check the name, or download it and give the directory"
        ) from error
    if needs is not None and not any(Path(found).glob(needs)):
        raise UserError(
            f"{called} has no file {needs} on the hub, and nothing but {', '.join(patterns)} is "
            f"downloaded: fetch its files into a directory yourself and give that"
        )
    return Path(found)
