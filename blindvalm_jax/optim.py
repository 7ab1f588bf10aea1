"""AdamW with the paper's schedule, and two more (reference.md, section 2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from blindvalm_jax.config import OptimizerConfig

# Ends of the names of what is neither a matrix nor an embedding. By name, because stacked blocks
# give every parameter an extra axis.
_VECTORS = ("bias", "scale")
_TEMPERATURE = "logit_scale"


def schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of update `step` (0-based).

    Warm-up is linear from `warmup_init` to the peak over `warmup_steps`. Then: inverse_sqrt, peak *
    sqrt(warmup / step) (fairseq); cosine down to `final_fraction` of the peak at `steps`;
    constant_cooldown, constant and 1 - sqrt over the last `cooldown_fraction` of `steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps

    def rate(step: jax.Array) -> jax.Array:
        at = jnp.asarray(step, jnp.float32)
        rising = config.warmup_init + at * (peak - config.warmup_init) / max(warmup, 1)
        if config.schedule == "inverse_sqrt":
            falling = peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(at, 1))
        elif config.schedule == "cosine":
            done = jnp.clip((at - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            end = config.final_fraction
            falling = peak * (end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * done)))
        else:
            length = max(config.cooldown_fraction * steps, 1)
            cooled = jnp.clip((at - (steps - length)) / length, 0.0, 1.0)
            falling = peak * (1 - jnp.sqrt(cooled))
        return jnp.where(at < warmup, rising, falling)

    return rate


def same_until(updates: int, config: OptimizerConfig, *, lengths: tuple[int, int]) -> bool:
    """Whether the first updates of runs of two lengths have the same learning rates."""
    one, other = (schedule(config, steps=steps)(jnp.arange(updates)) for steps in lengths)
    return bool(jnp.array_equal(one, other))


def decay_mask(params: Any, *, decay: str) -> Any:
    """True for what a setting of `optimizer.decay` decays.

    matrices: matrices and embeddings, and no gain or bias, as in CLIP (Radford et al. 2021, section
    2.5). all: as in fairseq, also those. The logarithm of CLIP's temperature is never decayed.
    """

    def decayed(path: Any, _: Any) -> bool:
        name = str(getattr(path[-1], "key", ""))
        return name != _TEMPERATURE if decay == "all" else not name.endswith(_VECTORS)

    return jax.tree_util.tree_map_with_path(decayed, params)


def make(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; decay is decoupled and scaled by the learning rate."""
    adam = scale_by_adam(
        b1=config.beta1, b2=config.beta2, eps=config.epsilon, beside=config.epsilon_beside
    )
    adamw = optax.chain(
        adam,
        _add_decay(config),
        optax.scale_by_learning_rate(schedule(config, steps=steps)),
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _add_decay(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adds `weight_decay` times the parameters that are decayed to their updates."""
    mask = functools.partial(decay_mask, decay=config.decay)
    if config.decay == "matrices":
        return optax.add_decayed_weights(config.weight_decay, mask)

    # Not by optax's mask: it makes a state of another shape, which checkpoints of runs with
    # decay=all do not hold.
    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda decayed, update, value: (
                update + config.weight_decay * value if decayed else update
            ),
            mask(params),
            updates,
            params,
        )

    return optax.stateless(add)


def scale_by_adam(
    *, b1: float, b2: float, eps: float, beside: str
) -> optax.GradientTransformationExtraArgs:
    """Adam, whose epsilon is beside the `corrected` or the `uncorrected` root of second moments.

    uncorrected: epsilon is added before the bias is corrected. That is the more efficient form of
    Kingma and Ba (arXiv 1412.6980, end of section 2), and fairseq's: in the first updates a
    gradient of about epsilon moves its parameter less.

    An update that is called with applied=False leaves the moments and their count as they are. What
    it returns then means nothing. The choice is made here, and the update follows from the chosen
    moments: made on the whole state afterwards, it costs copies of it.
    """
    usual = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(
        grads: Any, state: Any, params: Any = None, *, applied: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        _, moved = usual.update(grads, state, params)
        if applied is not None:
            moved = jax.tree.map(lambda new, old: jnp.where(applied, new, old), moved, state)
        if beside == "corrected":
            mu = optax.tree.bias_correction(moved.mu, b1, moved.count)
            nu = optax.tree.bias_correction(moved.nu, b2, moved.count)
            return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), moved
        count = moved.count.astype(jnp.float32)
        factor = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        scaled = jax.tree.map(lambda m, v: factor * m / (jnp.sqrt(v) + eps), moved.mu, moved.nu)
        return scaled, moved

    return optax.GradientTransformationExtraArgs(usual.init, update)
