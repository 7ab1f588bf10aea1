"""Updates that would break a run: left out or made smaller, counted, told; many of them end it."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax import Array

from blindvalm_jax import config, events, guard, optim, partitioning, step, trainer
from blindvalm_jax.config import MeshConfig, OptimizerConfig
from blindvalm_jax.data import pipeline
from blindvalm_jax.errors import DIVERGED
from blindvalm_jax.guard import Guard
from tests import small_models, small_text, test_train
from tests.test_train import read_metrics, settings

OPTIMIZER = OptimizerConfig(warmup_steps=0, schedule="cosine", learning_rate=1e-2)
ROWS, WIDTH = 16, 4


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@struct.dataclass
class Batch:
    """Rows of a linear model; the loss is multiplied by the mean of `factor_B`."""

    x_BD: Array
    y_B: Array
    factor_B: Array


class Linear:
    """Least squares: a model whose gradients grow with what the batch says."""

    def init(self, key: Array) -> Any:
        return {"w": jax.random.normal(key, (WIDTH,))}

    def gradients(
        self, params: Any, frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Any, dict[str, Array]]:
        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            errors_B = jnp.sum(batch.x_BD * params["w"][None], axis=1) - batch.y_B
            found = jnp.mean(jnp.square(errors_B)) * jnp.mean(batch.factor_B)
            return found, {"train/loss": found}

        return jax.grad(loss, has_aux=True)(params)


def batch_of(index: int, factor: float = 1.0) -> Batch:
    rng = np.random.default_rng(index)
    x_BD = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    y_B = x_BD.sum(axis=1) + rng.standard_normal(ROWS).astype(np.float32)
    return Batch(x_BD, y_B, np.full(ROWS, factor, np.float32))  # type: ignore[arg-type]


def state_of(*, guarded: bool = True, beside: str = "uncorrected") -> step.TrainState:
    params = Linear().init(jax.random.key(0))
    optimizer = optim.make(dataclasses.replace(OPTIMIZER, epsilon_beside=beside), steps=50)
    memory = guard.fresh() if guarded else None
    return step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), memory)


@functools.cache
def updater(rules: Guard | None, beside: str = "uncorrected") -> Any:
    optimizer = dataclasses.replace(OPTIMIZER, epsilon_beside=beside)
    return jax.jit(
        functools.partial(
            step.train_step,
            model=Linear(),
            optimizer=optim.make(optimizer, steps=50),
            rate=optim.schedule(optimizer, steps=50),
            seed=0,
            rules=rules,
        )
    )


def run(
    rules: Guard, factors: list[float], state: step.TrainState | None = None
) -> tuple[step.TrainState, list[dict[str, float]]]:
    """Updates over batches whose loss is multiplied by these; the metrics of each."""
    state, found = state or state_of(), []
    for factor in factors:
        state, metrics = updater(rules)(state, {}, batch_of(int(state.step), factor))
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def moments(state: step.TrainState) -> list[optax.ScaleByAdamState]:
    found = jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    return [x for x in found if isinstance(x, optax.ScaleByAdamState)]


@pytest.mark.parametrize("beside", ["corrected", "uncorrected"])
@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("before", [0, 3])
def test_an_update_that_is_not_finite_changes_nothing(
    beside: str, factor: float, before: int
) -> None:
    """To the last bit, also the very first; 1e38: the norm overflows, the loss may not."""
    update, state = updater(Guard(), beside), state_of(beside=beside)
    for index in range(before):
        state, _ = update(state, {}, batch_of(index))
    after, metrics = update(state, {}, batch_of(before, factor))
    assert bits((after.params, moments(after))) == bits((state.params, moments(state)))
    assert int(after.step) == before + 1
    assert int(metrics["train/skipped_updates"]) == 1
    assert float(metrics["train/update_norm"]) == 0.0
    assert not np.isfinite(metrics["train/grad_norm"])
    assert np.isfinite(float(metrics["train/param_norm"]))
    again, metrics = update(after, {}, batch_of(before + 1))
    assert float(metrics["train/update_norm"]) > 0
    assert np.isfinite(np.asarray(again.params["w"])).all()


def test_the_learning_rate_is_one_of_steps_also_behind_a_skipped_update() -> None:
    state, _ = run(Guard(), [np.nan, np.nan])
    counts = [
        int(x.count)
        for x in jax.tree.leaves(
            state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )
        if isinstance(x, optax.ScaleByScheduleState)
    ]
    assert counts == [2]
    assert [int(x.count) for x in moments(state)] == [0]


def test_rows_of_updates_that_are_not_finite_do_not_add_up() -> None:
    state, found = run(Guard(), [np.nan, np.nan, 1.0, np.nan, np.nan, np.nan, 1.0, np.nan])
    assert [m["guard/longest"] for m in found] == [1, 2, 2, 2, 2, 3, 3, 3]
    assert found[-1]["train/skipped_updates"] == 6
    assert state.guard is not None
    assert int(state.guard.row) == 1


@pytest.mark.parametrize("policy", ["none", "skip", "clip"])
def test_a_spike_is_left_out_or_scaled_down_as_settings_say(policy: str) -> None:
    """A loss 100 times as large; the norms of the other updates stay within a factor of 4."""
    rules = Guard(on_spike=policy, factor=6.0, warmup=10)
    before, quiet = run(rules, [1.0] * 20)
    assert quiet[-1]["train/skipped_updates"] == quiet[-1]["train/clipped_updates"] == 0
    after, (metrics,) = run(rules, [100.0], before)
    plain, (reference,) = run(rules, [1.0], before)
    assert metrics["train/grad_norm"] == pytest.approx(100 * reference["train/grad_norm"], rel=1e-5)
    assert metrics["train/skipped_updates"] == (policy == "skip")
    assert metrics["train/clipped_updates"] == (policy == "clip")
    norms = [m["train/grad_norm"] for m in quiet]
    weights = np.array([0.97 ** (len(norms) - 1 - i) for i in range(len(norms))])
    limit = 6 * np.exp((weights * np.log(norms)).sum() / weights.sum())
    if policy == "skip":
        assert bits((after.params, moments(after))) == bits((before.params, moments(before)))
    else:
        # the first moment has taken in the gradient, clipped to optimizer.clip_norm after ours
        (old,), (new,) = moments(before), moments(after)
        taken = float(optax.tree.norm(new.mu["w"] - 0.9 * old.mu["w"])) / 0.1
        norm = metrics["train/grad_norm"] if policy == "none" else limit
        assert taken == pytest.approx(min(norm, OPTIMIZER.clip_norm), rel=1e-4)


def test_a_clipped_spike_has_the_norm_of_the_limit() -> None:
    """Without the optimizer's own clipping, by the guard alone."""
    rules = Guard(on_spike="clip", factor=3.0, warmup=2)
    memory = guard.fresh()
    judge = jax.jit(rules.judge)
    for norm in (2.0, 2.0, 2.0):
        verdict = judge(memory, step=jnp.ones(()), loss=jnp.ones(()), norm=jnp.asarray(norm))
        assert float(verdict.scale) == 1.0
        memory = verdict.state
    verdict = judge(memory, step=jnp.ones(()), loss=jnp.ones(()), norm=jnp.asarray(200.0))
    assert float(verdict.scale) * 200 == pytest.approx(6.0, rel=1e-5)
    assert bool(verdict.applied)
    # the spike has entered as 3 times the mean: 0.03 / (1 - 0.97^4) of a step of log 3
    following = judge(verdict.state, step=jnp.ones(()), loss=jnp.ones(()), norm=jnp.asarray(200.0))
    mean = 2 * np.exp(np.log(3) * 0.03 / (1 - 0.97**4))
    assert float(following.scale) * 200 == pytest.approx(3 * mean, rel=1e-5)


def test_nothing_is_a_spike_before_the_warm_up_is_over() -> None:
    _, found = run(Guard(on_spike="skip", warmup=100), [1.0] * 20 + [100.0])
    assert found[-1]["train/skipped_updates"] == 0


def test_a_lasting_change_of_level_is_followed() -> None:
    rules = Guard(on_spike="skip", factor=4.0, warmup=10)
    state, found = run(rules, [1.0] * 20 + [100.0] * 150)
    skipped = found[-1]["train/skipped_updates"]
    assert 30 < skipped < 150
    assert found[-10]["train/skipped_updates"] == skipped


def test_a_gradient_of_zero_says_nothing_of_the_usual_norm() -> None:
    """Also in the warm-up, where the mean takes in any norm."""
    rules = Guard(on_spike="skip", warmup=5)
    _, found = run(rules, [1.0] * 2 + [0.0] * 2 + [1.0] * 10 + [0.0] * 3 + [1.0, 100.0])
    assert found[-2]["train/skipped_updates"] == 0
    assert found[-1]["train/skipped_updates"] == 1


def test_a_guard_that_has_nothing_to_do_changes_no_bit() -> None:
    """Also in the program as XLA optimizes it: the same moments, and what follows from them."""
    plain, watched = state_of(guarded=False), state_of()
    rules = Guard(on_spike="clip", factor=100.0)
    for index in range(8):
        plain, _ = updater(None)(plain, {}, batch_of(index))
        watched, _ = updater(rules)(watched, {}, batch_of(index))
    assert bits((plain.params, plain.opt_state)) == bits((watched.params, watched.opt_state))


def test_all_devices_decide_alike() -> None:
    """A NaN in the rows of one device; and the verdict on one device is that on eight."""
    rules = Guard(on_spike="skip", factor=4.0, warmup=5)
    states = []
    for devices in (1, 8):
        mesh = partitioning.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        placed = jax.device_put(state_of(), partitioning.replicated(mesh))
        update = updater(rules)
        with partitioning.use(mesh):
            for index in range(12):
                batch = batch_of(index, 100.0 if index == 9 else 1.0)
                if index == 7:
                    np.asarray(batch.x_BD)[5, 0] = np.nan
                rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
                placed, _ = update(placed, {}, rows)
        states.append(jax.device_get(placed))
    one, eight = states
    assert int(one.guard.skipped.count) == int(eight.guard.skipped.count) == 2
    assert int(one.guard.skipped.step) == int(eight.guard.skipped.step) == 10
    # another order of sums over the rows: fp32 rounding, 12 updates of at most 0.01
    np.testing.assert_allclose(one.params["w"], eight.params["w"], atol=1e-6)
    np.testing.assert_allclose(one.guard.log_norm, eight.guard.log_norm, atol=1e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    small_text.write_text(path, small_text.documents(60))
    return path


def poison(
    monkeypatch: pytest.MonkeyPatch, *, at: set[int], value: float = float("nan")
) -> list[int]:
    """Rows of these steps, from 1, weigh `value` at one position; returns the steps read."""
    read: list[int] = []
    original = pipeline.batches

    class Poisoned(pipeline.Batches):
        def __next__(self) -> pipeline.Batch:
            rows = super().__next__()
            read.append(start + 1 + len(read))
            if read[-1] in at:
                rows["weights"] = rows["weights"].copy()
                rows["weights"][0, 0] = value
            return rows

    start = 0

    def batches(*args: Any, start_step: int = 0, **options: Any) -> pipeline.Batches:
        nonlocal start
        start = start_step
        read.clear()
        inner = original(*args, start_step=start_step, **options)
        return Poisoned(inner._iterator)

    monkeypatch.setattr(pipeline, "batches", batches)
    return read


def small(text: Path, **changes: Any) -> config.Config:
    """A run without grounding, without evaluation."""
    plain: dict[str, Any] = {"grounding__source": "none", "grounding__tower": ""}
    plain["eval__every_steps"] = 0
    plain |= {"decoder__layers": 1, "decoder__width": 16, "decoder__fusion_layers": ()}
    return config.parse(settings(text, **{**plain, **changes}))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_run_goes_on_behind_a_batch_that_is_not_finite(
    microbatches: int,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = poison(monkeypatch, at={3})
    rows = 8 * microbatches
    values = small(text, train__microbatches=microbatches, train__batch_size=rows)
    assert trainer.train(values, tmp_path) == 0
    assert read[:6] == [1, 2, 3, 4, 5, 6]
    metrics = read_metrics(tmp_path)
    assert [metrics["train/skipped_updates"][k] for k in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert metrics["train/loss"][3] is None
    assert metrics["train/update_norm"][3] == 0
    assert metrics["train/param_norm"][3] == metrics["train/param_norm"][2]
    assert metrics["train/loss"][6] < metrics["train/loss"][1]
    assert "step 3: update skipped, not finite: loss nan" in capsys.readouterr().out
    found = events.read(tmp_path)
    assert [(e["event"], e["step"]) for e in found] == [("start", 0), ("skipped", 3)]
    assert found[1]["reason"] == "not finite"
    assert found[1]["loss"] is None
    assert not any(name.startswith("guard/") for name in metrics)


def test_a_storm_ends_the_run_is_said_once_and_again_when_it_is_resumed(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The checkpoint before it stays; what the storm left is as good, and ends the same way."""
    poison(monkeypatch, at={1, 4, 5, 6})
    values = small(text, train__nonfinite_limit=3)
    for attempt in range(2):
        assert trainer.train(values, tmp_path) == DIVERGED
        output = capsys.readouterr()
        storm = [line for line in output.out.splitlines() if "update skipped" in line]
        assert [line.split(":")[0] for line in storm] == (["step 1", "step 4"], ["step 5"])[attempt]
        message = "error: diverged at step 6: 3 updates in a row had a loss or a gradient that is"
        assert message in output.err
        assert ("has diverged before, last at step 6 (3 updates" in output.out) == bool(attempt)
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    ends = [e["step"] for e in events.read(tmp_path) if e["event"] == "diverged"]
    assert ends == [6, 6]
    monkeypatch.undo()
    assert trainer.train(small(text, train__nonfinite_limit=4), tmp_path) == 0
    assert read_metrics(tmp_path)["train/skipped_updates"][6] == 2


def test_stop_ends_the_run_at_the_first(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, at={3})
    values = small(text, train__on_nonfinite="stop")
    assert trainer.train(values, tmp_path) == DIVERGED
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]
    assert [e["event"] for e in events.read(tmp_path)] == ["start", "diverged"]


@pytest.mark.parametrize("policy", ["skip", "clip"])
def test_a_resumed_run_knows_what_is_usual(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Weights that nearly cancel make the mean, and its gradient, far larger: a spike at step 5."""
    changes = {
        "train__on_spike": policy,
        "train__spike_warmup": 3,
        "train__spike_factor": 3.0,
        "train__batch_size": 8,
    }
    poison(monkeypatch, at={5}, value=-250.0)
    values = small(text, **changes)
    assert trainer.train(values, tmp_path / "whole") == 0
    whole = read_metrics(tmp_path / "whole")
    name = "train/skipped_updates" if policy == "skip" else "train/clipped_updates"
    assert [whole[name][k] for k in range(1, 7)] == [0, 0, 0, 0, 1, 1]
    (event,) = [e for e in events.read(tmp_path / "whole") if e["event"] != "start"]
    assert (event["step"], event["reason"]) == (5, "spike")
    assert event["grad_norm"] == pytest.approx(whole["train/grad_norm"][5], rel=1e-6)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "6")
    assert trainer.train(values, tmp_path / "whole") == 0
    again = read_metrics(tmp_path / "whole")
    assert test_train.computed(again) == test_train.computed(whole)


def test_a_run_of_before_the_guard_is_resumed_with_a_fresh_one(text: Path, tmp_path: Path) -> None:
    """Its checkpoints hold no memory of one, its record no setting."""
    assert trainer.train(small(text, train__on_nonfinite="stop"), tmp_path) == 0
    whole = test_train.computed(read_metrics(tmp_path))
    assert not (tmp_path / "checkpoints" / "4" / "guard").exists()
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert trainer.train(small(text), tmp_path) == 0
    again = test_train.computed(read_metrics(tmp_path))
    assert again["train/loss"] == whole["train/loss"]
    assert again["train/skipped_updates"] == {5: 0, 6: 0}
    assert (tmp_path / "checkpoints" / "6" / "guard").is_dir()
