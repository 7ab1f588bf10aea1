"""What a run will hold and send, known before its first step: all of it in `placement.md`.

The numbers of tensors are exact. Memory and collectives are those of the program that was compiled:
on simulated CPU devices it is not the one that an accelerator gets (docs/scaling_up.md).
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from blindvalm_jax import (
    collectives,
    compilation,
    compiler_messages,
    files,
    guard,
    markdown,
    memory,
    optim,
    partitioning,
    placement,
    process_layout,
    step,
)
from blindvalm_jax.config import Config
from blindvalm_jax.console import say
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.objectives.contrastive_shapes import ContrastiveShapes
from blindvalm_jax.objectives.shapes import Shapes
from blindvalm_jax.placement import mib

FILE_NAME = "placement.md"
_LONGEST_MESSAGE = 400
_ONE_MACHINE = 8  # devices that one usually has at most
# By train.objective: what knows the shapes of a run when there is no data.
WITHOUT_DATA: dict[str, type[Shapes | ContrastiveShapes]] = {
    "language": Shapes,
    "contrastive": ContrastiveShapes,
}


def simulate(devices: int, *, dry_run: bool) -> None:
    """Makes JAX see so many devices, simulated on the CPU; before anything asks for devices.

    Raises:
      UserError: it is no dry run, the number is not positive, or JAX has started already.
    """
    if not dry_run:
        raise UserError(
            "--simulated_devices is for --dry_run: a run on simulated devices would only be slow"
        )
    if devices < 1:
        raise UserError(f"--simulated_devices must be at least 1, got {devices}")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise UserError(f"--simulated_devices comes too late: {first_line(error)}") from error


def described(mesh: Mesh) -> str:
    """How many of which kind a mesh has, of how many processes, and its shape."""
    processes = process_layout.count()
    of = f" of {processes} processes" if processes > 1 else ""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{of}, mesh {dict(mesh.shape)}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a compiled step.

    messages: what XLA said of tensors gathered whole; unheard: why it could say nothing, if so.
    """

    mesh: Mesh
    trained: str
    tensors: list[placement.Tensor]
    gradient_bytes: int
    memory: memory.Memory | None
    collectives: list[collectives.Collective]
    messages: list[str]
    unheard: str | None

    @property
    def warnings(self) -> list[str]:
        """What a user should not have to pay for."""
        found = [
            f"whole on every device: {x.group} {x.name}, {mib(x.bytes)} MiB"
            for x in placement.replicated(self.tensors, self.mesh)
        ]
        found += [] if self.unheard is None else [self.unheard]
        return found + [f"XLA: {line[:_LONGEST_MESSAGE]}" for line in self.messages]


def describe(
    compiled: Any,
    *,
    mesh: Mesh,
    state: step.TrainState,
    frozen: Mapping[str, Any],
    batch: Any,
    trained: str,
    said: Sequence[str] | None,
) -> Plan:
    """The plan of a compiled step; said: what `compiler_messages.heard` collected, if asked."""
    tensors = placement.tensors(state, frozen, batch, trained=trained)
    return Plan(
        mesh,
        trained,
        tensors,
        sum(x.bytes_per_device for x in tensors if x.group == trained),
        memory.plan(compiled),
        collectives.read(compiled.as_text(), mesh),
        compiler_messages.rematerialized(list(said or ())),
        None if said is None else compiler_messages.unheard(list(said)),
    )


def of_settings(
    settings: Config,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Plan:
    """Compiles the step that settings describe from shapes alone; no data, no parameter is made.

    devices: of the mesh, None: all.

    Raises:
      UserError: sizes and mesh do not fit together, or too much would be whole on every device.
    """
    mesh = partitioning.make_mesh(settings.mesh, None if devices is None else list(devices))
    objective = WITHOUT_DATA[settings.train.objective](settings, None, mesh)
    optimizer = optim.make(settings.optimizer, steps=settings.train.steps)
    guarded = guard.make(settings.train) is not None
    state = compilation.abstract_state(objective.model, optimizer, mesh, guarded=guarded)
    frozen, batch = objective.abstract_frozen(), objective.abstract_batch()
    partitioning.check_sharded({objective.trained: state.params, **frozen}, mesh)
    update = compilation.make_update(settings, objective.model, optimizer)
    with compiler_messages.heard() as said:
        compiled = compilation.compile_step(update, state, frozen, batch, mesh)
    return describe(
        compiled,
        mesh=mesh,
        state=state,
        frozen=frozen,
        batch=batch,
        trained=objective.trained,
        said=said,
    )


def report(plan: Plan, workdir: Path, *, dry_run: bool) -> None:
    """Writes a plan to `placement.md` in the directory of the run; a dry run prints all of it.

    A run prints the memory of a device, and warnings.
    """
    lines = [*placement.table(plan.tensors), *memory_lines(plan), *collective_lines(plan)]
    warnings = [f"warning: {line}" for line in plan.warnings]
    alone = process_layout.simulates() and process_layout.count() == 1
    if alone and plan.mesh.size > _ONE_MACHINE:
        warnings.append(
            f"note: planned for one process: {plan.mesh.size} devices usually are of several, "
            "which refuse more, and so does a plan with --simulated_processes=P"
        )
    for line in (*(lines if dry_run else memory_lines(plan)), *warnings):
        say(line)
    if jax.process_index() == 0:
        head = [
            "# What this run holds and sends",
            "",
            f"On {described(plan.mesh)}:",
            f"`{shlex.join(sys.argv)}`",
        ]
        text = "\n".join((*head, *lines, *warnings)) + "\n"
        files.write_bytes(workdir / FILE_NAME, text.encode())
        written = "written to" if dry_run else "every tensor, and what devices send each other:"
        say(f"{written} {workdir / FILE_NAME}")


def memory_lines(plan: Plan) -> list[str]:
    """Markdown: bytes of one device, those known exactly and those that XLA planned."""
    known = {one.group: one.bytes_per_device for one in placement.sums(plan.tensors)}
    rows = [(f"{name}, exact", mib(size)) for name, size in known.items()]
    rows.append(
        (f"gradients of the {plan.trained}, exact, within temporary", mib(plan.gradient_bytes))
    )
    if plan.memory is None:
        rows.append(("the compiled step", "unknown on this backend"))
    else:
        rows += [
            ("held by the compiled step (all of the above but gradients)", mib(plan.memory.held)),
            ("temporary in a step", mib(plan.memory.temporary)),
            ("output beyond what is held", mib(plan.memory.output)),
            ("code", mib(plan.memory.code)),
            ("all", mib(plan.memory.total)),
        ]
    return markdown.aligned(("memory of a device", "MiB"), rows, numbers=1)


def collective_lines(plan: Plan) -> list[str]:
    """Markdown: what devices send each other in a step, by kind and axes of the mesh."""
    if not plan.collectives:
        return ["", "no collectives: devices send each other nothing"]
    rows = [
        (
            total.kind,
            " x ".join(total.axes),
            f"{total.instructions:,}",
            f"{total.executions:,}",
            mib(total.bytes_made),
            mib(total.bytes_sent),
        )
        for total in collectives.totals(plan.collectives)
    ]
    head = ("collective", "along", "in the program", "in a step", "MiB made", "MiB sent a device")
    lines = markdown.aligned(head, rows, numbers=4)
    if any(not one.counted for one in plan.collectives):
        lines.append("loops of unknown length are counted as one round")
    return lines
