"""All variants of the toy world over several seeds: trained, measured, gathered in results.json.

    DIR/seed_0/{datasets,tokenizer,clip,index}    the world of a seed and what is made of it
    DIR/seed_0/VARIANT/                           a run, its log.txt and measured.json
    DIR/results.json, DIR/report.md

World, CLIP and language models of a seed all have that seed. What is finished is not done again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.command_line import print_stop
from blindvalm_jax.errors import PREEMPTED, Preempted, UserError, first_line
from blindvalm_jax.survival import preemption
from blindvalm_jax.toyworld import recipes
from blindvalm_jax.toyworld.supply import Parts
from blindvalm_jax.toyworld.world import ATTRIBUTES, WorldConfig

# What the bias sweep compares, with the share of statements about held-out objects in the name.
BIAS_VARIANTS = ("gpt2", "blind_valm_eos")
_RECIPE = recipes.Steps()
_PATIENCE = 120.0  # seconds in which workers that are told to end may save what they train


@dataclasses.dataclass(frozen=True)
class Job:
    """A language model to train and measure; steps: updates, 0 for the recipe's."""

    parts: Parts
    world: WorldConfig
    variant: str
    steps: int = 0

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        stated = self.world.stated_heldout
        return self.variant if not stated else f"{self.variant}-stated{stated:g}"

    @property
    def workdir(self) -> Path:
        """Directory of the run."""
        return self.parts.root / self.name

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"seed {self.world.seed}, {self.name}"


def run(
    root: Path,
    *,
    worlds: Sequence[WorldConfig],
    variants: Sequence[str],
    stated: Sequence[float] = (),
    steps: recipes.Steps = _RECIPE,
    jobs: int,
) -> dict[str, Any]:
    """Trains and measures all variants in every world; returns what it wrote to results.json.

    worlds: one a seed. stated: shares of statements about held-out objects at which
    `BIAS_VARIANTS` are trained as well. jobs: processes at a time, each with its share of cores.

    Raises:
      UserError: a job failed; its log tells why.
    """
    parts = {world.seed: Parts(root / f"seed_{world.seed}") for world in worlds}

    def every_seed(variant: str, share: float = 0.0) -> list[Job]:
        of = [dataclasses.replace(world, stated_heldout=share) for world in worlds]
        return [Job(parts[world.seed], world, variant, steps.language) for world in of]

    shares = (0.0, *stated) if stated else ()
    compared = {variant: every_seed(variant) for variant in variants}
    swept = {v: {share: every_seed(v, share) for share in shares} for v in BIAS_VARIANTS}
    main = [one for of in compared.values() for one in of]
    rest = [one for at in swept.values() for of in at.values() for one in of if one not in main]
    main.sort(key=lambda one: one.world.seed)
    stages: dict[str, list[tuple[Any, ...]]] = {
        "world_and_clip": [
            (f"seed {w.seed}, world and CLIP", _make_world, parts[w.seed], w, steps.clip)
            for w in worlds
        ],
        "language": [(one.label, _train_and_measure, one) for one in main],
        "bias": [(one.label, _train_and_measure, one) for one in rest],
    }
    done, timed = {}, {}
    for stage, calls in stages.items():
        done[stage], timed[stage] = _timed(calls, root / f"{stage}_seconds.json", jobs)
    measured = dict(zip([*main, *rest], done["language"] + done["bias"], strict=True))
    results: dict[str, Any] = {
        "seeds": [world.seed for world in worlds],
        "world": dataclasses.asdict(worlds[0]),
        "chance": {k: 1 / len(values) for k, values in worlds[0].attributes.items()},
        **_gathered({name: [measured[one] for one in of] for name, of in compared.items()}),
        "clip": _listed(done["world_and_clip"]),
        "recipe": recipes.described(worlds[0]),
        "timed": {stage: record for stage, record in timed.items() if record is not None},
        "trained_at": sorted({str(row["commit"]) for row in measured.values()}),
        "command": " ".join(["python", "-m", "blindvalm_jax.toyworld", *sys.argv[1:]]),
        **_where(),
    }
    if "blind_valm_eos" in compared:
        first = compared["blind_valm_eos"][0]
        [results["neighbours"]] = _all([("nearest images", _neighbours, first)], jobs)
    if stated:
        results["bias"] = _bias_curves(swept, measured, shares)
    files.write_json(root / "results.json", results)
    return results


def _make_world(parts: Parts, world: WorldConfig, steps: int) -> dict[str, float]:
    """Datasets, tokenizer, CLIP and index of a world; what its CLIP ended with."""
    from blindvalm_jax import trainer
    from blindvalm_jax.toyworld import supply

    supply.make_datasets(world, parts)
    supply.make_tokenizer(world, parts)
    supply.make_clip(world, parts, train=trainer.train, steps=steps)
    supply.make_index(parts)
    lines = [json.loads(x) for x in (parts.clip / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/loss" in line][-1]
    found = {k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")}
    updates = [line for line in lines if "perf/step_seconds" in line]
    seconds = float(np.median([line["perf/step_seconds"] for line in updates]))
    return {**found, "seconds": seconds * updates[-1]["step"]}


def _train_and_measure(job: Job) -> dict[str, Any]:
    """Trains a variant and measures it, or reads what this version measured of it before.

    A run that is there with other settings, or of another world, is refused by `train`.
    """
    from blindvalm_jax import config, runs, trainer
    from blindvalm_jax.interop import run_directory
    from blindvalm_jax.toyworld import measure, supply

    supply.make_datasets(job.world, job.parts)
    values = recipes.language(job.world, job.variant, steps=job.steps)
    values.data.cache = str(job.parts.root / "cache")
    settings = supply.placed(config.parse(values), job.parts)
    code = trainer.train(settings, job.workdir)
    if code:
        raise UserError(f"{job.label} ended with exit code {code}: see {job.workdir}/log.txt")
    stored = job.workdir / "measured.json"
    of = {
        "step": run_directory.steps(job.workdir)[-1],
        "tower": measure.tower_sha256(job.workdir),
        "code": runs.CODE_SHA256,
    }
    if stored.exists():
        before = files.read_object(stored)
        if before.get("of") == of:
            return before["measured"]
    measured = measure.measure(job.workdir, job.world, job.parts)
    files.write_json(stored, {"of": of, "measured": measured})
    return measured


def _neighbours(job: Job) -> list[dict[str, Any]]:
    from blindvalm_jax.toyworld import measure

    return measure.neighbours(job.workdir, job.world, job.parts.index)


def _gathered(measured: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Measurements of each variant, one a seed, as lists over seeds; what only some have apart."""
    of: dict[str, dict[str, Any]] = {"variants": {}, "attribution": {}, "given": {}}
    for variant, found in measured.items():
        rows = [{k: v for k, v in row.items() if k != "commit"} for row in found]
        for section in ("attribution", "given"):
            column = [row.pop(section, None) for row in rows]
            if column[0] is not None:
                of[section][variant] = _listed(column)
        curves = [row.pop("curves") for row in rows]
        constant = {name: [row.pop(name) for row in rows][0] for name in _CONSTANT}
        of["variants"][variant] = {**_listed(rows), **constant, "curves": curves}
    return {name: part for name, part in of.items() if part}


_CONSTANT = ("parameters", "flops_per_token")


def _bias_curves(
    swept: Mapping[str, Mapping[float, Sequence[Job]]],
    measured: Mapping[Job, dict[str, Any]],
    shares: Sequence[float],
) -> dict[str, Any]:
    """Accuracy on held-out objects, seen wordings: variant -> attribute -> share -> seed."""

    def curve(at: Mapping[float, Sequence[Job]], attribute: str) -> list[list[float]]:
        answers = [[measured[one]["objects"]["heldout"]["seen"] for one in at[x]] for x in shares]
        return [[seed[attribute] for seed in seeds] for seeds in answers]

    curves = {v: {name: curve(at, name) for name in ATTRIBUTES} for v, at in swept.items()}
    return {"stated_heldout": list(shares), **curves}


def _listed(rows: Sequence[Any]) -> Any:
    """Equal nested dicts, one a seed, as one nested dict of lists over seeds."""
    if isinstance(rows[0], dict):
        return {name: _listed([row[name] for row in rows]) for name in rows[0]}
    return list(rows)


def _where() -> dict[str, Any]:
    """Machine, versions and commit."""
    import platform

    from blindvalm_jax import runs

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"machine": machine, "versions": runs.versions(), "commit": runs.commit()}


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Processes with their own share of the cores each: two that share theirs slow both down.

    When anything goes wrong here they are told to end, and have ended when this does: a training
    saves first. When this process is gone they end at once.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin_worker, initargs=(numbers, jobs, os.getpid())
    )
    before = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        with preemption.kept():
            pool.shutdown(wait=False, cancel_futures=True)
            workers = set(multiprocessing.active_children()) - before
            for worker in workers:
                worker.terminate()
            patience = time.monotonic() + _PATIENCE
            for worker in workers:
                worker.join(max(0.0, patience - time.monotonic()))
                worker.kill()
        raise
    pool.shutdown()


def _begin_worker(numbers: Any, jobs: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and ends this one
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))  # a training saves: see `train`
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[numbers.get() :: jobs] or cores)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _timed(
    calls: Sequence[tuple[Any, ...]], record: Path, jobs: int
) -> tuple[list[Any], dict[str, float] | None]:
    """What `_all` found; its seconds and jobs, kept in a file, or None if it took several goes."""
    if not calls:
        return [], None
    of = [call[0] for call in calls]
    fresh = not any(_directory(call[2]).exists() for call in calls)
    begin = time.perf_counter()
    found = _all(calls, jobs)
    if fresh:
        took = {"seconds": time.perf_counter() - begin, "jobs": min(jobs, len(calls))}
        files.write_json(record, {"calls": of, **took})
    kept = files.read_object(record) if record.exists() else {}
    timed = {name: kept[name] for name in ("seconds", "jobs")} if kept.get("calls") == of else None
    return found, timed


def _all(calls: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """Runs (label, function, *arguments), `jobs` at a time, says when each is done; in order.

    One process prints what its runs print; several write that to log.txt of their directories.
    """
    begin = time.perf_counter()

    def say_done(count: int, label: str) -> None:
        spent = time.perf_counter() - begin
        left = spent / count * (len(calls) - count)
        print(
            f"[{count}/{len(calls)}] {label}: done; {spent:,.0f} s so far, about {left:,.0f} s "
            "left",
            flush=True,
        )

    workers = min(jobs, len(calls))
    if workers == 1:
        found = []
        for count, (label, function, *arguments) in enumerate(calls, start=1):
            print(f"[{count}/{len(calls)}] {label}", flush=True)
            found.append(function(*arguments))
            say_done(count, label)
        return found
    with _workers(workers) as pool:
        futures = {pool.submit(_quiet, *call[1:]): call for call in calls}
        for count, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            label, _, subject, *_ = futures[future]
            try:
                future.result()
            except Exception as error:
                raise UserError(f"{label}: {first_line(error)}; see {_log(subject)}") from error
            say_done(count, label)
        by_label = {call[0]: future.result() for future, call in futures.items()}
        return [by_label[call[0]] for call in calls]


def _directory(subject: Job | Parts) -> Path:
    """What it makes lies there."""
    return subject.workdir if isinstance(subject, Job) else subject.root


def _log(subject: Job | Parts) -> Path:
    """Where a worker writes what its runs print."""
    return _directory(subject) / "log.txt"


def _quiet(function: Any, subject: Job | Parts, *rest: Any) -> Any:
    """Calls a function in a worker; what it prints, and why it fails, goes to its log."""
    with _logged(_log(subject)):
        try:
            return function(subject, *rest)
        except Preempted as stop:
            # Ends itself, here: a worker that is ended may hold what the others wait for.
            print_stop(str(stop))
            sys.stdout.flush()
            os._exit(PREEMPTED)
        except BaseException:
            traceback.print_exc()
            raise


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Sends what is printed, by libraries too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
