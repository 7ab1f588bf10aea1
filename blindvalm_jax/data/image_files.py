"""Files of a folder of images: lines of captions, whether an image is there, its pixels."""

from __future__ import annotations

import errno
import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from blindvalm_jax.data.file_hashes import readable
from blindvalm_jax.errors import UserError, first_line

_SURROGATE = re.compile("[\ud800-\udfff]")
# What the system says of a name that leads to no file; all else is the fault of the system.
_NOT_THERE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def is_there(path: Path) -> bool:
    """Whether a path leads to a file; a `UserError` where the system cannot say."""
    with readable(path):
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            if is_of_the_system(error):
                raise
            return False


def is_of_the_system(error: Exception) -> bool:
    """Whether memory, a disk or too many open files are to blame, and not the image."""
    if isinstance(error, OSError):  # PIL raises it without a number where the content is wrong
        return error.errno not in (None, *_NOT_THERE)
    return isinstance(error, MemoryError)


def rgb(image: PIL.Image.Image) -> np.ndarray:
    """Three channels, a photograph's turn applied, transparency on black as PIL drops it."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")  # PIL would clip it
    return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))


def item(where: str, line: bytes) -> tuple[str, tuple[str, ...]]:
    """Image and captions that a line names."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # also: numbers too long, lists too deep
        raise UserError(f"{where}: not valid JSON: {first_line(error)}") from error
    fields = entry if isinstance(entry, dict) else {}
    given = [fields[name] for name in ("caption", "captions") if name in fields]
    captions = given[0] if len(given) == 1 else None
    captions = [captions] if isinstance(captions, str) else captions
    name: Any = fields.get("image")
    named = isinstance(name, str) and not _SURROGATE.search(name)
    if not named or not isinstance(captions, list) or not captions or not all(map(_text, captions)):
        raise UserError(
            f'{where}: expected {{"image": FILE, "caption": TEXT}} or "captions": [TEXT, ...], '
            "no text blank and no half of a surrogate pair in any"
        )
    return name, tuple(captions)


def _text(value: Any) -> bool:
    """Whether a value is text: not blank, no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)
