"""What a compiled program sends between devices: its collectives, counted from the HLO text.

A collective in a loop counts as often as the loop runs, where XLA knows the number. Bytes sent are
those of a ring over n devices: all-gather and all-to-all (n - 1) / n of the result, all-reduce
twice that, reduce-scatter n - 1 times its result, collective-permute all of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KINDS = "|".join((*KINDS, "ragged-all-to-all", "collective-broadcast"))
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_EXPLICIT = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    axes: of the mesh, along which the devices of a group differ; group: how many talk to each
    other; result_bytes: on one device, of one execution; times: executions in a step; counted:
    False if it stands in a loop whose length XLA does not know (counted as one round).
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    result_bytes: int
    times: int
    counted: bool
    op_name: str

    @property
    def bytes_made(self) -> int:
        """Bytes of all its results in a step, on one device."""
        return self.result_bytes * self.times

    @property
    def bytes_sent(self) -> int:
        """Bytes that a device sends in a step, by a ring."""
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": float(n - 1),
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, (n - 1) / n)
        return round(self.bytes_made * share)


@dataclasses.dataclass(frozen=True)
class Total:
    """Collectives of a kind along the same axes: how many, how often in a step, bytes of it."""

    kind: str
    axes: tuple[str, ...]
    instructions: int
    executions: int
    bytes_made: int
    bytes_sent: int


def read(hlo: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`) that runs on a mesh.

    Those within groups of one device send nothing and are left out.
    """
    found, calls, entry = [], _calls(hlo), ""
    computation = ""
    for line in hlo.splitlines():
        if not line.startswith(" "):
            if heading := _COMPUTATION.match(line):
                computation = heading[2]
                entry = computation if heading[1] else entry
            continue
        if match := _COLLECTIVE.search(line):
            found.append((computation, match, line))
    rounds = _rounds(calls, entry)
    read = []
    for computation, match, line in found:
        times, counted = rounds.get(computation, (0, True))
        groups = _groups(line, mesh.size)
        size = 2 if match[2] == "collective-permute" else groups.shape[1]
        if not times or size == 1:
            continue
        name = _OP_NAME.search(line)
        read.append(
            Collective(
                kind=match[2],
                axes=_axes(groups, mesh),
                group=size,
                result_bytes=_bytes(match[1], kind=match[2], started=bool(match[3])),
                times=times,
                counted=counted,
                op_name=name[1] if name else "",
            )
        )
    return read


def totals(collectives: Sequence[Collective]) -> list[Total]:
    """Sums by kind and axes, most bytes first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.axes), []).append(one)
    found = [
        Total(
            kind,
            axes,
            len(group),
            sum(x.times for x in group),
            sum(x.bytes_made for x in group),
            sum(x.bytes_sent for x in group),
        )
        for (kind, axes), group in groups.items()
    ]
    return sorted(found, key=lambda total: -total.bytes_sent)


def _calls(hlo: str) -> dict[str, list[tuple[str, int, bool]]]:
    """Of each computation: what it calls, how often, and whether that number is known."""
    calls: dict[str, list[tuple[str, int, bool]]] = {}
    computation = ""
    for line in hlo.splitlines():
        if not line.startswith(" "):
            if heading := _COMPUTATION.match(line):
                computation = heading[2]
            continue
        trips = _TRIPS.search(line)
        looped = " while(" in line
        for match in _CALLED.finditer(line):
            names = [match[1]] if match[1] else re.findall(r"%([\w.\-]+)", match[2])
            times = int(trips[1]) if looped and trips else 1
            known = not looped or trips is not None
            calls.setdefault(computation, []).extend((name, times, known) for name in names)
    return calls


def _rounds(
    calls: Mapping[str, Sequence[tuple[str, int, bool]]], entry: str
) -> dict[str, tuple[int, bool]]:
    """How often each computation runs in a step, and whether all loops around it are counted."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        for called, _, _ in calls.get(name, ()):
            visit(called)
        order.append(name)

    visit(entry)
    rounds = {entry: (1, True)}
    for name in reversed(order):  # callers before what they call
        times, counted = rounds[name]
        for called, trips, known in calls.get(name, ()):
            before, all_known = rounds.get(called, (0, True))
            rounds[called] = (before + times * trips, all_known and counted and known)
    return rounds


def _bytes(types: str, *, kind: str, started: bool) -> int:
    """Bytes of a result; of an asynchronous start the operands before it do not count."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype)
        for dtype, dims in _SHAPE.findall(types)
    ]
    if started and kind == "collective-permute":
        sizes = sizes[1:2]
    elif started and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes) // 8


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 0


def _groups(line: str, devices: int) -> np.ndarray:
    """Device numbers [groups, devices of a group]; of a permutation its pairs."""
    if match := _NAMED.search(line):
        sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(match[1])}
        ids = _iota(match[2] or str(math.prod(sizes.values())), match[3])
        return _along(ids.reshape(list(sizes.values())), list(sizes), _AXIS.findall(match[4]))
    if match := _IOTA.search(line):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    match = _EXPLICIT.search(line)
    if match is None or not match[1]:
        return np.arange(devices)[None]
    groups = [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", match[1])]
    longest = max(len(group) for group in groups)
    return np.array([group for group in groups if len(group) == longest])


def _along(
    ids: np.ndarray, names: list[str], axes: Sequence[tuple[str, str, str, str]]
) -> np.ndarray:
    """Groups along named axes of an array of devices, or along parts ('a':(before)size) of them."""
    kept: list[int] = []
    shape: list[int] = []
    for name, size in zip(names, ids.shape, strict=True):
        parts = sorted((int(b), int(n)) for axis, _, b, n in axes if axis == name and n)
        whole = any(axis == name and not n for axis, _, _, n in axes)
        before = 1
        for begin, width in [(1, size)] if whole else parts:
            shape += [begin // before, width]
            kept.append(len(shape) - 1)
            before = begin * width
        shape.append(size // before)
    moved = np.moveaxis(ids.reshape(shape), kept, range(-len(kept), 0))
    return moved.reshape(-1, math.prod(shape[place] for place in kept))


def _iota(dims: str, order: str | None) -> np.ndarray:
    sizes = _numbers(dims)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())))
    differing = np.any(places != places[..., :1], axis=(1, 2))
    return tuple(name for name, differs in zip(mesh.axis_names, differing, strict=True) if differs)
