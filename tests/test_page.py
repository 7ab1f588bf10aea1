"""The page of runs: made of what directories hold, valid for Plotly, drawn by a browser."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blindvalm_jax.errors import UserError
from blindvalm_jax.page import controls, curves, drawing, records

HOSTILE = 'a<b>&"</script>'


def make_run(
    directory: Path,
    *,
    source: str = "text",
    steps: int = 6,
    metrics: Mapping[str, float | None] | None = None,
) -> Path:
    """A directory with the files of a run that the page reads; metrics: of every second step."""
    directory.mkdir(parents=True)
    settings = {
        "train": {"steps": 10, "batch_size": 4},  # older than train.objective
        "data": {"sequence_length": 8},
        "grounding": {"source": source, "readout": "token", "control": "none"},
    }
    record = {
        "starts": [{"time": "2026-01-01T00:00:00+0000", "step": 0}],
        "parameters": {"decoder": 1000, "tower": 10, "bytes_per_device": 99},
        "devices": ["cpu", 2],
        "commit": None,
        "flops_per_token": {"total": 600.0},
    }
    lines = [
        {
            "step": step,
            "train/loss": 5.0 - step / 10,
            "perf/step_seconds": 1.5,
            "perf/tokens_per_second": 21.0,
            **((metrics or {}) if step % 2 == 0 else {}),
        }
        for step in range(1, steps + 1)
    ]
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return directory


def events(directory: Path, *found: dict[str, Any]) -> None:
    """Writes what happened to a run."""
    text = "".join(f"{json.dumps({'time': '2026-01-01', **event})}\n" for event in found)
    (directory / "events.jsonl").write_text(text)


def test_figure_is_valid_for_plotly_and_holds_every_point(tmp_path: Path) -> None:
    go = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed")
    one = make_run(tmp_path / "one", metrics={"eval/loss": 4.0, "train/grad_norm": None})
    events(one, {"step": 3, "event": "skipped"}, {"step": 4, "event": "saved"})
    figure = curves.figure(records.read([one, make_run(tmp_path / "two", source="none")]))
    for trace in figure["data"]:
        del trace["choices"]
    go.Figure(figure)  # refuses what Plotly does not know
    losses = [t for t in figure["data"] if t["yaxis"] == "y" and t["mode"] == "lines"]
    assert [t["name"] for t in losses] == ["one", "two"]
    assert losses[0]["x"] == [1, 2, 3, 4, 5, 6]
    assert losses[0]["y"] == pytest.approx([4.9, 4.8, 4.7, 4.6, 4.5, 4.4])
    [marked] = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    assert (marked["x"], marked["y"]) == ([3], pytest.approx([4.7]))  # saved is no accident
    norms = [t for t in figure["data"] if t["y"] == [None, None, None]]
    assert len(norms) == 1  # what was not finite leaves a gap


def test_axes_are_updates_tokens_flops_and_hours(tmp_path: Path) -> None:
    [run] = records.read([make_run(tmp_path / "one")])
    over = curves.axes(run)
    assert over["tokens"] == [32 * step for step in range(1, 7)]
    assert over["model FLOPs"] == [32 * 600 * step for step in range(1, 7)]
    assert over["hours of updates"] == pytest.approx([1.5 * s / 3600 for s in range(1, 7)])


def test_thinned_curves_keep_their_end() -> None:
    rows = curves.thinned(range(12_345))
    assert len(rows) <= curves.MOST_POINTS
    assert rows[-1] == 12_344
    assert rows == sorted(rows)
    assert curves.thinned(range(5)) == [0, 1, 2, 3, 4]


def test_what_runs_are_called_is_no_markup(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    one = make_run(tmp_path / HOSTILE.replace("/", "_"))
    events(one, {"step": 1, "event": "skipped", "reason": HOSTILE})
    text = drawing.page(records.read([one]))
    own = text.replace(drawing_library(), "")
    assert own.count("</script>") == 2
    assert "<b>&" not in own


def drawing_library() -> str:
    """The script that draws."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    text = drawing.page(records.read([make_run(tmp_path / "one")])).replace(drawing_library(), "")
    assert "http" not in text
    assert " src=" not in text


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / seed / "blind") for seed in ("seed_0", "seed_1")]
    assert [run.name for run in records.read(paths)] == ["seed_0/blind", "seed_1/blind"]
    within = [make_run(tmp_path / "x"), make_run(tmp_path / "x" / "x")]
    assert [run.name for run in records.read(within)] == ["x", "x/x"]


def test_differing_settings_are_listed_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", source="none")]
    text = drawing.page(records.read(runs))
    assert "<td>grounding.source</td><td>text</td><td>none</td>" in text
    assert "<td>train.steps</td>" not in text


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    one, page = make_run(tmp_path / "one"), tmp_path / "page.html"
    kept = tmp_path / "mine.html"
    kept.write_text("mine")
    for arguments, said in (
        ([f"--out={page}"], "name at least one run"),
        ([str(one)], "--out must name a file that ends in .html"),
        ([str(tmp_path), f"--out={page}"], "run.json is missing"),
        ([str(one), str(one), f"--out={page}"], "named twice"),
        ([str(one), f"--out={kept}"], "is no page of runs"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "blindvalm_jax.page", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert said in line
    assert not page.exists()
    assert kept.read_text() == "mine"


def test_page_is_drawn_again_over_itself(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    one, page = make_run(tmp_path / "one"), tmp_path / "pages" / "page.html"
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-m", "blindvalm_jax.page", str(one), f"--out={page}"],
            check=True,
            timeout=120,
        )
    assert drawing.is_page(page)


def test_run_that_has_not_logged_yet_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    one = make_run(tmp_path / "one", steps=0)
    assert "0 of 10" in drawing.page(records.read([one]))
    with pytest.raises(UserError, match="named twice"):
        records.read([one, one])


def test_what_a_record_lacks_is_a_cell_without_a_value(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    path = make_run(tmp_path / "one") / "run.json"
    whole = json.loads(path.read_text())
    for lacking in whole:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != lacking}))
        drawn = drawing.page(records.read([path.parent]))
        assert ">–</td>" in drawn
        assert "6 of 10" in drawn
    path.write_text('{"commit": "of something else"}')
    with pytest.raises(UserError, match=r"run\.json is no record of a run: name directories"):
        records.read([path.parent])


def many(tmp_path: Path, count: int) -> list[records.Run]:
    """Runs with long names that differ in sources, and in how far they are."""
    sources = ("text", "none")
    name = "learning_rate_0.0003_weight_decay_0.01_warmup_2000"
    return records.read(
        [
            make_run(
                tmp_path / "sweep" / f"{name}_seed_{number}",
                source=sources[number % 2],
                steps=6 + number % 9,
                metrics={"eval/loss": 3.0 + number / 10, "train/grad_norm": 1.0},
            )
            for number in range(count)
        ]
    )


def test_forty_runs_can_be_told_apart_and_switched(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    runs = many(tmp_path, 40)
    text = drawing.page(runs).replace(drawing_library(), "")
    assert "<h1>40 runs</h1>" in text
    assert len({curves.style(index) for index in range(40)}) == 40
    for index, run in enumerate(runs):
        assert f'data-run="{index}" autocomplete="off" checked>{controls.stroke(index)}' in text
        assert text.count(run.name) > 2
    # each a row of settings: nobody reads forty columns
    assert "<td>grounding.source</td>" not in text
    assert ">grounding.source</th>" in text


def test_script_has_each_curve_over_each_axis(tmp_path: Path) -> None:
    runs = many(tmp_path, 3)
    found, expected = drawing.data(runs), curves.figure(runs)["data"]
    assert len(found["columns"]) < len(expected) * len(found["choices"]) / 2  # shared by panels
    for number, trace in enumerate(expected):
        assert runs[found["owners"][number]].name == trace["name"]
        for axis, x in zip(found["choices"], trace["choices"], strict=True):
            assert list(found["columns"][axis[number]]) == x


def test_panels_stand_below_each_other_and_share_their_axis(tmp_path: Path) -> None:
    layout = curves.figure(many(tmp_path, 1))["layout"]
    domains = [layout[name]["domain"] for name in layout if name.startswith("yaxis")]
    assert len(domains) == 3
    for (below, _), (_, top) in itertools.pairwise(domains):
        assert top < below
    assert [layout[name].get("matches") for name in ("xaxis", "xaxis2", "xaxis3")] == [
        None,
        "x",
        "x",
    ]


# Clicks as a reader does, and leaves in the page what has become of it.
_CLICKS = """
<script>
const at = (query) => document.querySelector(query);
const before = at("#controls").getBoundingClientRect(), panels = plot.getBoundingClientRect();
at("[data-every=hidden]").click();
for (const run of [3, 12]) at(`[data-run="${run}"]`).click();
at('[data-axis="2"]').click();
at("[data-log=yaxis]").click();
const heads = [...at("table").rows[0].cells];
const column = heads.findIndex((cell) => cell.textContent === "held-out loss");
for (const click of [1, 2]) heads[column].click();
const seen = {
  apart: before.bottom <= panels.top, band: before.height / innerHeight,
  wide: document.documentElement.scrollWidth - innerWidth,
  shown: [...new Set(owners.filter((run, trace) => plot.data[trace].visible))],
  x: plot.data[0].x, loss: plot.layout.yaxis.type,
  sorted: [...at("table").rows].slice(1, 4).map((row) => row.cells[column].textContent),
};
const kept = document.createElement("pre");
kept.id = "seen";
kept.textContent = JSON.stringify(seen);
document.body.append(kept);
</script></body>"""


@pytest.mark.slow
def test_a_browser_draws_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on PATH")
    pytest.importorskip("plotly", reason="plotly is not installed")
    runs = many(tmp_path, 40)
    page = tmp_path / "page.html"
    page.write_text(drawing.page(runs).replace("</body>", _CLICKS))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    flags += ["--window-size=1280,900", f"--user-data-dir={tmp_path / 'b'}"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.count('class="scatterlayer') == len(curves_shown(runs))
    [told] = re.findall('<pre id="seen">(.*?)</pre>', done.stdout)
    seen = json.loads(html.unescape(told))
    assert seen["apart"]
    assert 0 < seen["band"] < 0.45
    assert seen["wide"] <= 0
    assert seen["shown"] == [3, 12]
    assert seen["x"] == curves.axes(runs[0])["model FLOPs"]
    assert seen["loss"] == "log"
    assert seen["sorted"] == ["6.9000", "6.8000", "6.7000"]


def curves_shown(runs: list[records.Run]) -> list[str]:
    """Titles of the panels that are drawn."""
    return [note["text"] for note in curves.figure(runs)["layout"]["annotations"] if "text" in note]
