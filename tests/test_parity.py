"""Parity with the reference: its golden cases hold, a wrong weight is seen, a bad case refused.

golden/reference/ holds the smallest case of each kind; all of them lie in shared/golden.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import golden
from blindvalm_jax.errors import UserError
from blindvalm_jax.golden.case import Check, find, read
from tests import small_models

REFERENCE = Path(__file__).parent / "golden" / "reference"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


def copied(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Copies a case; returns what its two files hold."""
    stored = REFERENCE / f"{name}.npz"
    meta = json.loads((REFERENCE / f"{name}.json").read_text())
    arrays = dict(np.load(stored)) if stored.exists() else {}
    write(directory, name, meta, arrays)
    return meta, arrays


def write(directory: Path, name: str, meta: Any, arrays: dict[str, np.ndarray]) -> Path:
    path = directory / f"{name}.json"
    path.write_text(json.dumps(meta))
    if arrays:
        np.savez(directory / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return path


def parity(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "blindvalm_jax.parity", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", find(REFERENCE), ids=lambda path: path.stem)
def test_the_smallest_case_of_each_kind_holds(path: Path) -> None:
    checks = golden.run(read(path))
    assert [check for check in checks if not check.holds] == []
    names = {check.quantity for check in checks}
    expected = {
        "fusion_layer": {"attention", "layer", "share on the memory", "gradient x"},
        "decoder": {"position embedding", "embedding", "layer 0", "final norm", "logits"},
        "clip_text": {"rows with other segments", "features", "first segment"},
        "end_to_end": {"features", "neighbours", "logits", "loss", "loss of the updates"},
        "segmentation": set(),
    }[read(path).meta["kind"]]
    assert expected <= names
    assert read(path).meta["kind"] != "segmentation" or len(checks) == 67


def test_every_kind_has_a_case_here() -> None:
    assert {read(path).meta["kind"] for path in find(REFERENCE)} == set(golden.KINDS)


@pytest.mark.slow
def test_every_case_of_the_reference_holds(shared: Path) -> None:
    cases = find(shared / "golden")
    assert len(cases) == 17
    for path in cases:
        assert [check for check in golden.run(read(path)) if not check.holds] == []


@pytest.mark.parametrize(
    ("name", "weight", "first"),
    [
        ("decoder_gpt_c", "w/layers.1.fc1.bias", "layer 1"),
        ("decoder_valm_b", "w/layers.0.self_attn.img_v_proj.bias", "layer 0"),
        ("fusion_layer_valm_k4_c", "w/self_attn.img_layer_norm.weight", "attention"),
        ("clip_text_b", "clip/positional_embedding", "features"),
    ],
)
def test_one_wrong_entry_of_a_weight_differs(
    tmp_path: Path, name: str, weight: str, first: str
) -> None:
    meta, arrays = copied(tmp_path, name)
    arrays[weight].flat[arrays[weight].size // 2] += 0.2
    differing = [c for c in golden.run(read(write(tmp_path, name, meta, arrays))) if not c.holds]
    assert differing[0].quantity == first


def test_a_moved_cut_differs(tmp_path: Path) -> None:
    meta, _ = copied(tmp_path, "segmentation")
    meta["cases"][40]["lengths"][0] += 1
    checks = golden.run(read(write(tmp_path, "segmentation", meta, {})))
    assert [check.holds for check in checks].index(False) == 40
    assert sum(not check.holds for check in checks) == 1


def test_a_difference_that_is_no_number_or_of_another_shape_does_not_hold() -> None:
    case = read(REFERENCE / "segmentation.json")
    assert case.check("same", [1.0, 2.0], [1.0, 2.5], 0.5).holds
    assert not case.check("far", [1.0, 2.0], [1.0, 2.6], 0.5).holds
    assert not case.check("nan", [1.0, np.nan], [1.0, 2.0], 0.5).holds
    assert not case.check("shape", [[1.0, 2.0]], [1.0, 2.0], 0.5).holds
    assert not case.check_relative("small", [1.0, 0.0], [1.0, 2e-3]).holds
    assert not Check("case", "nan", float("nan"), float("inf")).holds


def test_the_command_runs_the_cases_asked_for_and_writes_them_down(tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    done = parity(REFERENCE, "--only=[cs]*t*_*b", f"--json={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 cases, 3 comparisons: 0 differ, 0 cases unreadable" in done.stdout
    written = json.loads(out.read_text())
    assert written["unreadable"] == []
    assert [c["quantity"] for c in written["checks"]] == [
        "rows with other segments",
        "features",
        "first segment",
    ]
    for check in written["checks"]:
        assert check["case"] == "clip_text_b"
        assert check["holds"] is True
        assert 0 <= check["difference"] <= check["tolerance"] <= 1e-5


def test_the_command_exits_with_1_where_a_weight_is_wrong(tmp_path: Path) -> None:
    meta, arrays = copied(tmp_path, "decoder_gpt_c")
    arrays["w/layer_norm.bias"][0] += 0.2
    write(tmp_path, "decoder_gpt_c", meta, arrays)
    copied(tmp_path, "segmentation")
    out = tmp_path / "out" / "checks.json"
    out.parent.mkdir()
    done = parity(tmp_path, f"--json={out}")
    assert done.returncode == 1
    assert "2 cases, 75 comparisons: 2 differ, 0 cases unreadable" in done.stdout
    differing = [line.split()[:2] for line in done.stdout.splitlines() if "DIFFERS" in line]
    assert differing == [["decoder_gpt_c", "final"], ["decoder_gpt_c", "logits"]]
    wrong = [c["quantity"] for c in json.loads(out.read_text())["checks"] if not c["holds"]]
    assert wrong == ["final norm", "logits"]


def test_the_command_exits_with_2_for_a_bad_case_and_still_runs_the_others(tmp_path: Path) -> None:
    copied(tmp_path, "decoder_gpt_c")
    stored = tmp_path / "decoder_gpt_c.npz"
    stored.write_bytes(stored.read_bytes()[:1000])
    copied(tmp_path, "segmentation")
    done = parity(tmp_path)
    assert done.returncode == 2
    assert "67 rows exactly" in done.stdout
    assert done.stderr.startswith("error: decoder_gpt_c.json: cannot be read as a golden case")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("args", [("nowhere",), (str(REFERENCE), "--only=poem*")])
def test_the_command_exits_with_2_where_there_is_no_case(args: tuple[str, ...]) -> None:
    done = parity(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def damaged(content: bytes) -> bytes:
    """Zeros in the middle of a file."""
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


def plain_array(content: bytes) -> bytes:
    """A .npy under the name of a .npz."""
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


@pytest.mark.parametrize(
    "change",
    [lambda x: x[: len(x) // 2], lambda x: x[:10], lambda x: b"", damaged, plain_array, None],
    ids=["half", "ten bytes", "empty", "damaged", "another format", "missing"],
)
def test_arrays_that_can_not_be_read_are_one_line(
    tmp_path: Path, change: Callable[[bytes], bytes] | None
) -> None:
    copied(tmp_path, "decoder_gpt_c")
    stored = tmp_path / "decoder_gpt_c.npz"
    if change is None:
        stored.unlink()
    else:
        stored.write_bytes(change((REFERENCE / stored.name).read_bytes()))
    with pytest.raises(UserError, match="decoder_gpt_c.json: cannot be read") as error:
        read(tmp_path / "decoder_gpt_c.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ['{"kind": "decoder",', "[1]", "{}", '{"kind": "segmentation", "arrays": [1]}']
)
def test_descriptions_that_can_not_be_read_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"case\.json: cannot be read") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_arrays_other_than_described_are_named(tmp_path: Path) -> None:
    meta, arrays = copied(tmp_path, "decoder_gpt_c")
    kept = {k: v for k, v in arrays.items() if k != "tokens"}
    (tmp_path / "decoder_gpt_c.npz").unlink()
    with pytest.raises(UserError, match=r"array tokens should be \[2, 77\], got nothing"):
        read(write(tmp_path, "decoder_gpt_c", meta, kept))
    turned = arrays | {"tokens": arrays["tokens"].T}
    with pytest.raises(UserError, match=r"array tokens should be \[2, 77\], got \[77, 2\]"):
        read(write(tmp_path, "decoder_gpt_c", meta, turned))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("decoder_gpt_c", {"kind": "poem"}, "kind 'poem' is unknown; known: fusion_layer"),
        ("decoder_gpt_c", {"kind": ["decoder"]}, "is unknown; known"),
        ("decoder_gpt_c", {"config": None}, "incomplete or wrong for its kind"),
        ("decoder_gpt_c", {"config": {"layers": 9}}, "do not fit the model: missing"),
        ("decoder_gpt_c", {"config": {"heads": 5}}, "are the heads right"),
        ("decoder_gpt_c", {"config": {"vocab": 500}}, r"wte must be float32\[512, \d+\], got"),
        (
            "decoder_gpt_c",
            {"config": {"layers": "2"}},
            "layers must be a positive integer, got '2'",
        ),
        ("fusion_layer_valm_k4_c", {"config": []}, "incomplete or wrong for its kind"),
        ("end_to_end_valm_c", {"config": {"lm": None}}, "incomplete or wrong for its kind"),
        ("clip_text_b", {"config": {"width": 64}}, "incomplete or wrong for its kind"),
        ("clip_text_b", {"segment_lengths": [[1]]}, "incomplete or wrong for its kind"),
        ("segmentation", {"cases": None}, "incomplete or wrong for its kind"),
        ("segmentation", {"cases": []}, "holds nothing to compare"),
    ],
)
def test_cases_that_do_not_fit_their_kind_are_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    meta, arrays = copied(tmp_path, name)
    for key, value in changes.items():
        meta[key] = meta[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message) as error:
        golden.run(read(write(tmp_path, name, meta, arrays)))
    assert "\n" not in str(error.value)


def test_a_case_without_an_array_its_kind_needs_names_it(tmp_path: Path) -> None:
    meta, arrays = copied(tmp_path, "decoder_gpt_c")
    del meta["arrays"]["valid"], arrays["valid"]
    with pytest.raises(UserError, match="decoder_gpt_c: incomplete: 'valid' is missing"):
        golden.run(read(write(tmp_path, "decoder_gpt_c", meta, arrays)))


def crash(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("shapes do not fit\nand more about it")


@pytest.mark.parametrize("name", ["decoder_gpt_c", "clip_text_b", "fusion_layer_valm_k4_c"])
def test_a_crash_of_ours_is_a_check_that_does_not_hold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flax.linen.LayerNorm.__call__", crash)
    (check,) = golden.run(read(REFERENCE / f"{name}.json"))
    assert check.quantity == "crashed: ValueError: shapes do not fit"
    assert not check.holds


def test_what_was_compared_before_a_crash_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blindvalm_jax.grounding.text.features", crash)
    checks = golden.run(read(REFERENCE / "clip_text_b.json"))
    assert [check.holds for check in checks] == [True, False]
    assert checks[0].quantity == "rows with other segments"


@pytest.mark.parametrize("change", [1, -1])
def test_another_number_of_layers_differs(change: int, tmp_path: Path) -> None:
    meta, arrays = copied(tmp_path, "decoder_gpt_c")
    states = arrays["out/inner_states"]
    arrays["out/inner_states"] = states[:-1] if change < 0 else np.concatenate([states, states[:1]])
    meta["arrays"]["out/inner_states"]["shape"][0] += change
    checks = golden.run(read(write(tmp_path, "decoder_gpt_c", meta, arrays)))
    wrong = [(check.quantity, check.difference) for check in checks if not check.holds]
    assert wrong == [("number of layers", 1)]


def test_a_gradient_on_one_side_only_differs(tmp_path: Path) -> None:
    name = "fusion_layer_valm_k4_c"
    meta, arrays = copied(tmp_path, name)
    for table in (arrays, meta["arrays"]):
        table["grad/extra.bias"] = table.pop("grad/fc1.bias")
    checks = golden.run(read(write(tmp_path, name, meta, arrays)))
    wrong = [(check.quantity, check.difference) for check in checks if not check.holds]
    assert wrong == [("gradients on one side only", 2.0)]


def test_a_gradient_norm_that_is_no_number_differs(tmp_path: Path) -> None:
    meta, arrays = copied(tmp_path, "end_to_end_valm_c")
    name = sorted(meta["grad_norms"])[3]
    meta["grad_norms"][name] = float("nan")
    checks = golden.run(read(write(tmp_path, "end_to_end_valm_c", meta, arrays)))
    wrong = [check.quantity for check in checks if not check.holds]
    assert wrong == [f"norms of {len(meta['grad_norms'])} gradients"]


@pytest.mark.parametrize(
    "args",
    [(), ("a", "b"), (str(REFERENCE), "--onyl=x"), (str(REFERENCE), "--json=nowhere/out.json")],
    ids=["nothing", "two directories", "unknown flag", "no directory for --json"],
)
def test_a_wrong_command_exits_with_2_before_anything_runs(args: tuple[str, ...]) -> None:
    done = parity(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_command_names_what_is_no_case_and_what_is_half_of_one(tmp_path: Path) -> None:
    copied(tmp_path, "segmentation")
    (tmp_path / "results.json").write_text('{"checks": []}')
    done = parity(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("skipped: results.json is no golden case")
    np.savez(tmp_path / "half.npz", x=np.zeros(2))
    done = parity(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: half.npz: cannot be read as a golden case: half.json is missing\n"
    )
    assert "67 rows exactly" in done.stdout


def test_what_is_written_is_strict_json(tmp_path: Path) -> None:
    meta, arrays = copied(tmp_path, "decoder_gpt_c")
    arrays["w/layer_norm.bias"][0] = np.nan
    write(tmp_path, "decoder_gpt_c", meta, arrays)
    out = tmp_path / "checks.json"
    assert parity(tmp_path, f"--json={out}").returncode == 1
    assert "NaN" not in out.read_text()
    wrong = [c for c in json.loads(out.read_text())["checks"] if not c["holds"]]
    assert {c["quantity"]: c["difference"] for c in wrong} == {"final norm": None, "logits": None}
