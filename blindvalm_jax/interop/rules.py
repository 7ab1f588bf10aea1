"""Foreign checkpoints as tables: which of their tensors make which of our parameters.

A format is a list of `Rule`s for the model and one for each block. The same tables read and write,
and every name that no rule mentions is reported, in both directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blindvalm_jax.errors import UserError
from blindvalm_jax.models.decoder import padded_vocab
from blindvalm_jax.models.transformer import split_stack
from blindvalm_jax.trees import flatten, unflatten

__all__ = [
    "Rule",
    "Tensors",
    "attention_output",
    "embedding",
    "flatten",
    "linear",
    "load",
    "norm",
    "packed_bias",
    "same",
    "save",
    "stacked_bias",
    "stacked_linear",
    "transposed",
    "unflatten",
]

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our parameter `ours` (a path like "attn/qkv/kernel") from the tensors named `theirs`.

    load: their arrays to ours; save: the inverse, one array per name.
    """

    ours: str
    theirs: tuple[str, ...]
    load: Callable[..., np.ndarray]
    save: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def same(ours: str, theirs: str) -> Rule:
    """Equal arrays."""
    return Rule(ours, (theirs,), lambda x: x, lambda x: (x,))


def transposed(ours: str, theirs: str) -> Rule:
    """A torch.nn.Linear weight [out, in] as our kernel [in, out]."""
    return Rule(ours, (theirs,), lambda x: x.T, lambda x: (x.T,))


def embedding(theirs: str, vocab_multiple: int) -> Rule:
    """The embedding [V, D] as `wte`, with zero rows up to a multiple; saved with those rows."""

    def pad(table: np.ndarray) -> np.ndarray:
        rows = padded_vocab(table.shape[0], vocab_multiple)
        return np.pad(table, ((0, rows - table.shape[0]), (0, 0)))

    return Rule("wte", (theirs,), pad, lambda table: (table,))


def norm(ours: str, theirs: str) -> list[Rule]:
    """LayerNorm: scale and bias from weight and bias."""
    return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str) -> list[Rule]:
    """torch.nn.Linear: kernel [in, out] and bias from weight [out, in] and bias."""
    return [
        transposed(f"{ours}/kernel", f"{theirs}.weight"),
        same(f"{ours}/bias", f"{theirs}.bias"),
    ]


def stacked_linear(ours: str, theirs: Sequence[str], heads: int) -> list[Rule]:
    """C torch.nn.Linear of D x D as one kernel [D, C, N, H] and bias [C, N, H]."""

    def load_kernel(*weights: np.ndarray) -> np.ndarray:
        width = weights[0].shape[1]
        return np.stack([w.T.reshape(width, heads, -1) for w in weights], axis=1)

    def save_kernel(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        width, count = kernel.shape[:2]
        return tuple(kernel[:, c].reshape(width, -1).T for c in range(count))

    return [
        Rule(f"{ours}/kernel", tuple(f"{n}.weight" for n in theirs), load_kernel, save_kernel),
        stacked_bias(f"{ours}/bias", [f"{n}.bias" for n in theirs], heads),
    ]


def stacked_bias(ours: str, theirs: Sequence[str], heads: int) -> Rule:
    """C bias vectors [D] as one [C, N, H]."""
    return Rule(
        ours,
        tuple(theirs),
        lambda *biases: np.stack([b.reshape(heads, -1) for b in biases]),
        lambda bias: tuple(b.reshape(-1) for b in bias),
    )


def packed_bias(theirs: str, heads: int) -> Rule:
    """The biases of q, k and v one after the other [3 D] as one [3, N, H]."""
    return Rule(
        "attn/qkv/bias",
        (theirs,),
        lambda bias: bias.reshape(3, heads, -1),
        lambda bias: (bias.reshape(-1),),
    )


def attention_output(theirs: str, heads: int) -> list[Rule]:
    """The output torch.nn.Linear as kernel [N, H, D] and bias [D]."""
    return [
        Rule(
            "attn/out/kernel",
            (f"{theirs}.weight",),
            lambda w: w.T.reshape(heads, -1, w.shape[0]),
            lambda k: (k.reshape(-1, k.shape[-1]).T,),
        ),
        same("attn/out/bias", f"{theirs}.bias"),
    ]


def load(
    tensors: Tensors,
    *,
    model: Iterable[Rule],
    block: Callable[[int], Iterable[Rule]],
    layers: int,
    fusion_layers: tuple[int, ...] = (),
    ignore: Callable[[str], bool] = lambda name: False,
    source: str,
) -> dict[str, Any]:
    """Our parameter tree from foreign tensors.

    block(i) gives the rules of block i, with full foreign names. ignore(name) is True for tensors
    that are known to carry nothing.

    Raises:
      UserError: listing the tensors that are missing and those that no rule uses.
    """
    rules = {index: list(block(index)) for index in range(layers)}
    model_rules = list(model)
    wanted = {n for rs in [model_rules, *rules.values()] for rule in rs for n in rule.theirs}
    missing = sorted(wanted - set(tensors))
    unused = sorted(name for name in set(tensors) - wanted if not ignore(name))
    if missing or unused:
        raise UserError(
            f"{source}: the tensors do not fit the model: "
            f"missing {missing or 'none'}; not understood {unused or 'none'}"
        )

    _check_floats(tensors, wanted, source)

    def read(rule: Rule) -> np.ndarray:
        arrays = [np.asarray(tensors[name]) for name in rule.theirs]
        try:
            return np.ascontiguousarray(rule.load(*arrays))
        except (ValueError, IndexError) as error:
            shapes = ", ".join(
                f"{n} {list(a.shape)}" for n, a in zip(rule.theirs, arrays, strict=True)
            )
            raise UserError(
                f"{source}: the shapes {shapes} do not fit {rule.ours}; are the heads right?"
            ) from error

    def stack(rules: list[Rule]) -> np.ndarray:
        arrays = [read(rule) for rule in rules]
        for rule, array in zip(rules, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise UserError(
                    f"{source}: {rule.theirs[0]} makes {rule.ours} {list(array.shape)}, but "
                    f"{rules[0].theirs[0]} makes it {list(arrays[0].shape)}; blocks must be alike"
                )
        return np.stack(arrays)

    params = {rule.ours: read(rule) for rule in model_rules}
    for segment in split_stack(layers, fusion_layers):
        first = rules[segment.start]
        for position, rule in enumerate(first):
            path = f"h/{segment.name}/{rule.ours}"
            if segment.fused:
                params[path] = read(rule)
            else:
                run = range(segment.start, segment.stop)
                params[path] = stack([rules[index][position] for index in run])
    return unflatten(params)


def _check_floats(tensors: Tensors, wanted: set[str], source: str) -> None:
    """Refuses integers: a quantised model."""
    for name in sorted(wanted):
        dtype = np.asarray(tensors[name]).dtype
        if not np.issubdtype(dtype, np.floating):
            raise UserError(f"{source}: {name} holds {dtype}, expected floats")


def save(
    params: Mapping[str, Any],
    *,
    model: Iterable[Rule],
    block: Callable[[int], Iterable[Rule]],
    layers: int,
    fusion_layers: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """Foreign tensors from our parameter tree; the inverse of `load`.

    Raises:
      UserError: listing our parameters that no rule writes.
    """
    flat = flatten(params)
    tensors: dict[str, np.ndarray] = {}
    written = set()

    def write(rule: Rule, path: str, index: int | None) -> None:
        if path not in flat:
            raise UserError(f"parameter {path} is missing; the model has {sorted(flat)}")
        written.add(path)
        value = np.asarray(flat[path] if index is None else flat[path][index])
        for name, array in zip(rule.theirs, rule.save(value), strict=True):
            tensors[name] = np.ascontiguousarray(array)

    for rule in model:
        write(rule, rule.ours, None)
    for segment in split_stack(layers, fusion_layers):
        for index in range(segment.start, segment.stop):
            for rule in block(index):
                at = None if segment.fused else index - segment.start
                write(rule, f"h/{segment.name}/{rule.ours}", at)
    left = sorted(set(flat) - written)
    if left:
        raise UserError(f"this format has no place for the parameters {left}")
    return tensors
