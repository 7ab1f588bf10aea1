"""CLIP on your own images with captions: the tower of a BLIND-VALM, the images of a VALM.

    python -m blindvalm_jax.train --config=configs/clip.py[:SIZE] --workdir=DIR \
        --config.data.images=photos

SIZE: tiny (default), vit_b32, vit_b16, vit_l14. `photos` holds captions.jsonl (docs/training.md);
a TFDS dataset is read with --config.data.tfds=NAME, --config.data.image_field and .caption_field.
--dry_run plans without images as well.

tiny: images of 64 pixels, a convolutional tower, a BPE learned from the captions; for a laptop.
The others are OpenAI's (Radford et al. 2021, arXiv 2103.00020) and take CLIP's own vocabulary:
add --config.tokenizer.path=openai/clip-vit-base-patch32. From the paper (section 2.5, tables 18
and 20): shapes, batch of 32,768, 32 epochs of 400 M pairs (390,625 updates), learning rate 5e-4
(vit_l14: 4e-4), 2,000 updates of warm-up and a cosine, Adam with beta2 0.98 and epsilon 1e-6,
weight decay 0.2, temperature from 1 / 0.07 to 100. Ours: the cosine ends at 0; 77 positions of
text, as in the released models (the paper says 76); no clipping of gradients; bfloat16. Another
thing differs: the paper crops a random square of each image, here it is the middle one.
On a smaller batch of images set train.batch_size, train.steps and a smaller learning rate;
--config.train.microbatches=N fits a batch into memory in N parts with the loss of the whole one.
Time and result of the published sizes: not measured by this project.
"""

from __future__ import annotations

import ml_collections

from blindvalm_jax import presets
from blindvalm_jax.config import default


def get_config(size: str = "tiny") -> ml_collections.ConfigDict:
    """Settings of the run."""
    return presets.clip(default(), size)
