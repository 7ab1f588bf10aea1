"""Images are cut to a tower's size as CLIP cuts them."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from blindvalm_jax.data import images


@pytest.mark.parametrize(
    ("height", "width", "size", "scaled"),
    [
        (480, 640, 224, (224, 298)),
        (641, 427, 224, (336, 224)),
        (100, 333, 32, (32, 106)),
        (57, 57, 32, (32, 32)),
        (31, 20, 64, (99, 64)),
        (16, 16, 16, (16, 16)),
    ],
)
def test_resize_scales_and_cuts_as_clip_does(
    height: int, width: int, size: int, scaled: tuple[int, int]
) -> None:
    """Bicubic; the longer side is rounded down, and so is the place of the middle square.

    The scaled sizes are those of transformers' CLIPImageProcessorPil, whose pixels are the same.
    """
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    whole = PIL.Image.fromarray(image).resize(scaled[::-1], PIL.Image.Resampling.BICUBIC)
    top, left = ((side - size) // 2 for side in scaled)
    want = np.asarray(whole)[top : top + size, left : left + size]
    np.testing.assert_array_equal(images.resize(image, size), want)
