"""Compares the losses of runs on the same windows with each other and with counting baselines.

    python -m benchmarks.run loss_report --runs=runs/gpt2,runs/blind --windows=DIR --out=docs/text

Writes OUT.png (training and held-out loss over tokens) and OUT.md (tables: final loss, speed,
memory, cost, and held-out loss over tokens). Baselines, from all training windows, also those that
a short run never reached: unigram (add 0.1) and bigram, the counts interpolated with the unigram by
a weight chosen on training windows that are not counted.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import palette
from blindvalm_jax import files
from blindvalm_jax.data import manifest, pipeline
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError

_RUNS = flags.DEFINE_list("runs", [], "Directories of runs.")
_OUT = flags.DEFINE_string("out", "", "Where the report goes, without .md and .png.")
_WINDOWS = flags.DEFINE_string("windows", "", "The windows they trained on, for the baselines.")

_TUNING_SHARE = 0.02


def run() -> dict[str, Any]:
    """Writes the report and returns its numbers."""
    if not (_RUNS.value and _OUT.value and _WINDOWS.value):
        raise UserError("loss_report needs --runs=A,B --windows=DIR --out=PATH")
    names = [Path(run).name for run in _RUNS.value]
    if len(set(names)) < len(names):
        raise UserError(f"the runs are told apart by their names, got {', '.join(names)}")
    curves = {Path(run).name: read_curve(Path(run)) for run in _RUNS.value}
    limits = {curve["eval_windows"] for curve in curves.values()}
    keys = {curve["data_key"] for curve in curves.values()}
    if len(limits) > 1 or keys != {manifest.load(Path(_WINDOWS.value)).key}:
        raise UserError(
            f"the runs and --windows={_WINDOWS.value} are not of the same windows: "
            f"eval.windows {sorted(limits)}, keys {', '.join(sorted(keys))}"
        )
    baselines = count_baselines(_WINDOWS.value, limits.pop())
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, baselines, out.with_suffix(".png"))
    table = write_table(curves, baselines)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return {"baselines": baselines, "final": {k: v["summary"] for k, v in curves.items()}}


def read_curve(workdir: Path) -> dict[str, Any]:
    """Losses over tokens and a summary of a run.

    Raises:
      UserError: the directory holds no run.
    """
    try:
        lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{workdir} holds no run: {error}") from error
    record = files.read_object(workdir / "run.json")
    settings = files.read_object(workdir / "config.json")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{workdir / 'metrics.jsonl'} has a broken line: {error}") from error
    if not any("eval/loss" in row for row in rows):
        raise UserError(f"{workdir} was never evaluated: set eval.every_steps")
    per_step = settings["train"]["batch_size"] * settings["data"]["sequence_length"]
    train = [(row["train/tokens"], row["train/loss"]) for row in rows if "train/loss" in row]
    held_out = [(row["step"] * per_step, row["eval/loss"]) for row in rows if "eval/loss" in row]
    speeds = [row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row]
    shares = [row.get("train/grounding_attention") for row in rows if "train/loss" in row]
    summary = {
        "tokens": train[-1][0],
        "train_loss_last_tenth": float(np.mean([x for _, x in train[-len(train) // 10 :]])),
        "held_out_loss": held_out[-1][1],
        "tokens_per_second": float(np.median(speeds)),
        "decoder_parameters": record["parameters"]["decoder"],
        "tower_parameters": record["parameters"]["tower"],
        "mflops_per_token": record["flops_per_token"]["total"] / 1e6,
        "grounding_attention": shares[-1],
        "peak_memory_mib": max(row.get("perf/peak_memory_mib", 0.0) for row in rows),
        "commit": record["commit"],
    }
    windows = settings["eval"]["windows"]
    return {
        "train": train,
        "held_out": held_out,
        "summary": summary,
        "eval_windows": windows,
        "data_key": record["data"]["key"],
    }


def count_baselines(directory: str, eval_windows: int) -> dict[str, float]:
    """Loss in nats a token of unigram and interpolated bigram on the windows runs evaluate on."""
    pairs, vocab = _pairs(directory, "train", 0)
    cut = int(len(pairs) * (1 - _TUNING_SHARE))
    counted, tuning = pairs[:cut], pairs[cut:]
    held_out, _ = _pairs(directory, "eval", eval_windows)
    unigram = np.bincount(counted[:, 1], minlength=vocab) + 0.1
    unigram /= unigram.sum()
    keys, counts = np.unique(counted[:, 0] * vocab + counted[:, 1], return_counts=True)
    contexts = np.bincount(counted[:, 0], minlength=vocab)

    def bigram(pairs: np.ndarray) -> np.ndarray:
        wanted = pairs[:, 0] * vocab + pairs[:, 1]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = np.where(keys[at] == wanted, counts[at], 0)
        return found / np.maximum(contexts[pairs[:, 0]], 1)

    def loss(pairs: np.ndarray, weight: float) -> float:
        share = np.where(contexts[pairs[:, 0]] > 0, weight, 0.0)
        mixed = share * bigram(pairs) + (1 - share) * unigram[pairs[:, 1]]
        return float(-np.log(mixed).mean())

    weights = np.arange(0.05, 1.0, 0.05)
    best = float(weights[np.argmin([loss(tuning, weight) for weight in weights])])
    return {"unigram": loss(held_out, 0.0), "bigram": loss(held_out, best)}


def _pairs(directory: str, split: str, limit: int) -> tuple[np.ndarray, int]:
    """The (token, next token) pairs of a split [n, 2] as evaluation sees them, and V."""
    windows = Windows(directory, split)
    found = []
    for batch in pipeline.eval_batches(windows, batch_size=64, limit=limit, tower=False):
        real = batch["weights"] > 0
        found.append(np.stack([batch["tokens"][real], batch["targets"][real]], axis=1))
    return np.concatenate(found).astype(np.int64), windows.manifest.tokenizer.vocab_size


def draw(curves: dict[str, Any], baselines: dict[str, float], path: Path) -> None:
    """Training loss (thin) and held-out loss (dots) over tokens, baselines as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colors = palette.colors(curves)
    thin: dict[str, Any] = {"alpha": 0.5, "linewidth": 0.8}
    dots: dict[str, Any] = {"marker": "o", "markersize": 4}
    for name, curve in curves.items():
        for part, words, style in (("train", "training", thin), ("held_out", "held out", dots)):
            tokens, losses = zip(*curve[part], strict=True)
            label = f"{name}, {words}"
            axes.plot(np.array(tokens) / 1e6, losses, color=colors[name], label=label, **style)
    for (name, loss), line in zip(baselines.items(), ("--", ":"), strict=True):
        label = f"{name} counts, {loss:.2f}"
        axes.axhline(loss, color="0.15", linewidth=1.0, linestyle=line, label=label)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_table(curves: dict[str, Any], baselines: dict[str, float]) -> str:
    """The Markdown table."""
    lines = [
        "| system | tokens | train loss (last tenth) | held-out loss | perplexity | tokens/s "
        "(median) | peak MiB | MFLOPs a token | decoder | frozen tower |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, loss in baselines.items():
        lines.append(f"| {name} counts | | | {loss:.3f} | {np.exp(loss):.1f} | | | | | |")
    for name, curve in curves.items():
        row = curve["summary"]
        cells = [
            name,
            f"{row['tokens'] / 1e6:.2f} M",
            f"{row['train_loss_last_tenth']:.3f}",
            f"{row['held_out_loss']:.3f}",
            f"{np.exp(row['held_out_loss']):.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_mib']:,.0f}",
            f"{row['mflops_per_token']:.1f}",
            f"{row['decoder_parameters'] / 1e6:.1f} M",
            f"{row['tower_parameters'] / 1e6:.1f} M",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| held-out loss after | {' | '.join(curves)} |", f"|---|{'---|' * len(curves)}"]
    held_out = {name: dict(curve["held_out"]) for name, curve in curves.items()}
    for tokens in sorted(set().union(*held_out.values())):
        losses = [f"{found[tokens]:.3f}" if tokens in found else "" for found in held_out.values()]
        lines.append(f"| {tokens / 1e6:.2f} M tokens | {' | '.join(losses)} |")
    commits = sorted({str(curve["summary"]["commit"]) for curve in curves.values()})
    lines += ["", f"{platform.machine()}, commit {', '.join(commits)}", ""]
    return "\n".join(lines)
