"""Named sizes and recipes for config files: the paper's, OpenAI's GPT-2 ladder, tiny ones.

Each function edits a ConfigDict from `config.default()` and returns it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from blindvalm_jax.errors import UserError

# name: (layers, width, heads)
SIZES = {
    "tiny": (4, 128, 4),
    "mini": (6, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}

VARIANTS = ("gpt2", "blind", "eos", "valm", "valm_eos", "random_tower", "shuffled")
VALM_NEIGHBOURS = 4
LOSS_CHUNK = 128  # positions

# name: (patch; layers, width, heads of the image tower; the same of the text tower; projection;
# learning rate), Radford et al. 2021, table 20
OPENAI_CLIPS = {
    "vit_b32": (32, (12, 768, 12), (12, 512, 8), 512, 5e-4),
    "vit_b16": (16, (12, 768, 12), (12, 512, 8), 512, 5e-4),
    "vit_l14": (14, (24, 1024, 16), (12, 768, 12), 768, 4e-4),
}
CLIP_SIZES = ("tiny", *OPENAI_CLIPS)
CLIP_PAIRS, CLIP_EPOCHS = 400_000_000, 32


def sized(config: ConfigDict, size: str) -> ConfigDict:
    """Sets layers, width and heads of the decoder.

    Raises:
      UserError: there is no such size.
    """
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    config.decoder.layers, config.decoder.width, config.decoder.heads = SIZES[size]
    return config


def paper(config: ConfigDict, size: str) -> ConfigDict:
    """BLIND-VALM's decoder, fusion, optimizer and rows (reference.md, sections 1 and 2).

    One thing differs: segments are cut by the causal rule, since the reference's leaks later
    tokens; `grounding.segments=reference` has the original.
    """
    sized(config, size)
    config.tokenizer.kind = "clip"
    config.data.sequence_length = 512
    config.decoder.positions = "sinusoidal"
    config.decoder.embedding_scale = "sqrt_width"
    config.decoder.activation = "gelu_erf"
    config.decoder.init = "fairseq"
    config.decoder.dropout = 0.1
    config.decoder.attention_dropout = 0.1
    config.decoder.fusion_layers = (-2,)
    config.fusion.query_scale = "model_width"
    config.fusion.grounding_kv = "shared"
    config.fusion.memory_bias = "none"
    config.grounding.source = "text"
    config.grounding.readout = "token"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 4000
    config.optimizer.warmup_init = 1e-7
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon_beside = "uncorrected"
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay = "all"
    config.optimizer.clip_norm = 2.0
    config.train.batch_size = 512  # rows of 512: 262,144 tokens an update
    config.train.steps = 40_600
    return config


def gpt2(config: ConfigDict, size: str) -> ConfigDict:
    """OpenAI's GPT-2 without grounding: what pretrained weights fit, and its usual optimizer."""
    sized(config, size)
    config.tokenizer.kind = "gpt2"
    config.data.sequence_length = 1024
    config.decoder.positions = "learned"
    config.decoder.max_positions = 1024
    config.decoder.embedding_scale = "none"
    config.decoder.activation = "gelu_tanh"
    config.decoder.init = "gpt2"
    config.decoder.dropout = 0.0
    config.decoder.attention_dropout = 0.0
    config.fusion.query_scale = "head_width"
    config.fusion.memory_bias = "learned"
    config.grounding.source = "none"
    config.optimizer.learning_rate = 6e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2000
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon_beside = "corrected"
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay = "matrices"
    config.optimizer.clip_norm = 1.0
    config.train.batch_size = 512
    config.train.steps = 20_000
    return config


def long_run(config: ConfigDict) -> ConfigDict:
    """What hours on accelerators ask for: less memory a row, and reports further apart."""
    config.train.remat = "dots"
    config.train.loss_chunk = LOSS_CHUNK
    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 1000
    config.log.every_steps = 50
    return config


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """Where z comes from: gpt2 (nowhere), blind (the token), eos, valm, random_tower, shuffled.

    valm and valm_eos take the four nearest images, as the paper does (reference.md, section 1), of
    the index that `grounding.index` names; fusion is BLIND-VALM's.

    Raises:
      UserError: there is no such variant.
    """
    if name not in VARIANTS:
        raise UserError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    valm = name.startswith("valm")
    config.grounding.source = "none" if name == "gpt2" else "images" if valm else "text"
    config.grounding.neighbours = VALM_NEIGHBOURS if valm else 1
    config.grounding.readout = "eos" if name in ("eos", "valm_eos") else "token"
    if name in ("random_tower", "shuffled"):
        config.grounding.control = name
    return config


def clip(config: ConfigDict, size: str) -> ConfigDict:
    """CLIP's two towers on images with captions: OpenAI's by name, or `tiny`.

    Raises:
      UserError: there is no such size.
    """
    if size not in CLIP_SIZES:
        raise UserError(f"size must be one of {', '.join(CLIP_SIZES)}, got {size!r}")
    config.train.objective = "contrastive"
    config.clip.temperature_start, config.clip.temperature_cap = 1 / 0.07, 100.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_init = 0.0
    config.optimizer.final_fraction = 0.0
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    config.optimizer.epsilon_beside = "corrected"
    config.optimizer.weight_decay = 0.2
    config.optimizer.decay = "matrices"
    return _tiny_clip(config) if size == "tiny" else _openai_clip(config, size)


def _openai_clip(config: ConfigDict, size: str) -> ConfigDict:
    """As published (Radford et al. 2021, section 2.5, tables 18 and 20)."""
    text, image = config.clip.text, config.clip.image
    image.kind, image.size = "vit", 224
    (
        image.patch,
        (image.layers, image.width, image.heads),
        (text.layers, text.width, text.heads),
        text.projection,
        config.optimizer.learning_rate,
    ) = OPENAI_CLIPS[size]
    text.context = 77
    config.tokenizer.kind = "clip"
    config.optimizer.warmup_steps = 2000
    config.optimizer.clip_norm = 0.0
    config.train.batch_size = 32_768
    config.train.steps = CLIP_PAIRS * CLIP_EPOCHS // config.train.batch_size
    config.eval.windows = 5000
    config.eval.every_steps = config.checkpoint.every_steps = 1000
    config.log.every_steps = 50
    return config


def _tiny_clip(config: ConfigDict) -> ConfigDict:
    """Two million parameters or so on images of 64 pixels, for a laptop."""
    text, image = config.clip.text, config.clip.image
    image.kind, image.size, image.width, image.channels = "conv", 64, 256, (32, 64, 128, 128)
    text.layers, text.width, text.heads, text.projection, text.context = 4, 128, 4, 128, 32
    config.tokenizer.kind = "train"
    config.train.dtype = "float32"
    config.train.batch_size = 64
    config.train.steps = 2000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.data.eval_fraction = 0.05
    config.eval.windows = 0
    config.eval.every_steps = config.checkpoint.every_steps = 250
    return config
