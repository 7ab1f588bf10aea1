"""Tasks put to a run while it trains: the same answers as afterwards, and the same training."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindvalm_jax import config, runs, trained, trainer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import evaluation, identity, results, standing, training
from blindvalm_jax.tasks.scoring import Scorer
from tests import small_models, small_tasks, small_text, test_compare, test_train

SHARDED = {"mesh__data": 2, "mesh__fsdp": 4, "eval__every_steps": 0, "train__steps": 3}


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, tasks/ and a run without tasks in plain/."""
    directory = tmp_path_factory.mktemp("training_tasks")
    text = directory / "text.txt"
    small_text.write_text(text, small_text.documents(120))
    small_tasks.write(directory / "tasks")
    return directory


def values(files: Path, **changes: Any) -> Any:
    found = test_train.settings(files / "text.txt", **SHARDED, **changes)
    found.data.cache = str(files / "cache")
    return found


def asking(files: Path, **changes: Any) -> Any:
    tasks = {"eval__tasks": "memory_colors", "eval__tasks_every_steps": 2}
    tasks["eval__tasks_protocol"] = "published"  # few programs to compile
    return values(files, **{**tasks, "eval__tasks_data": str(files / "tasks"), **changes})


def test_asking_changes_no_update_and_is_what_the_run_says_afterwards(
    files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = test_train.run(values(files), files / "plain")
    asked = test_train.run(asking(files), files / "asked")
    scores = asked.pop("eval/tasks/memory_colors")
    assert sorted(scores) == [2, 3]
    assert test_train.computed(asked) == test_train.computed(plain), "another training"
    assert not (files / "plain" / "eval").exists()

    kept, place = results.read(files / "asked")
    assert (kept["step"], kept["tasks"]["memory_colors"]["score"]) == (3, scores[3])
    model = trained.load(files / "asked")  # on one device
    questions = evaluation.read(["memory_colors"], "published", files / "tasks")
    about = identity.about(str(files / "asked"), model)
    assert not identity.differences(kept, about)  # though it was spread over other devices
    again = files / "again"
    whole = evaluation.run(
        questions, Scorer(model), model.tokenizer, protocol="published", out=again, about=about
    )
    pairs = zip(
        *(
            results.read_lines(place, "memory_colors", of["tasks"]["memory_colors"])
            for place, of in ((place, kept), (again, whole))
        ),
        strict=True,
    )
    for a, b in pairs:
        # Sums of a few log probabilities in fp32, added up over devices in another order.
        np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-4, rtol=0)

    # Cut off while it asked at step 2: the checkpoint is there, and no score.
    shutil.rmtree(files / "asked" / "checkpoints" / "3")
    path = files / "asked" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "eval/tasks" not in line))
    resumed = test_train.run(asking(files), files / "asked")
    assert resumed["eval/tasks/memory_colors"] == scores
    assert "tasks of step 2 were not answered before" in capfd.readouterr().out
    assert results.read(files / "asked")[0]["step"] == 3
    assert not (files / "asked" / "eval" / "before").exists()

    # Cut off while it asked at its last step, of which the checkpoint is there.
    lines = path.read_text().splitlines(keepends=True)
    kept_lines = [x for x in lines if "eval/tasks" not in x or '"step": 3' not in x]
    assert len(kept_lines) == len(lines) - 1
    path.write_text("".join(kept_lines))
    assert test_train.run(asking(files), files / "asked")["eval/tasks/memory_colors"] == scores
    assert "tasks of step 3 were not answered before" in capfd.readouterr().out


def test_what_goes_wrong_with_tasks_ends_no_training(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And a run that was never asked says how to: here another evaluation writes there."""
    given = asking(files, eval__tasks_protocol="corrected", eval__tasks_every_steps=9)
    given.eval.tasks = f"text:{files}/short.txt"  # lies where it says, so no tasks_data
    given.eval.tasks_data = ""
    (files / "short.txt").write_text("the boat is on the sea")
    place = tmp_path / "run" / "eval"
    settings = config.parse(given)
    runs.claim(place.parent)
    place.mkdir()
    (place / "results.json").write_text('{"tasks": {')
    with standing.held(place):
        found = test_train.run(given, place.parent)
    told = capfd.readouterr().err
    assert (place / "results.json").read_text() == '{"tasks": {'
    assert "error: tasks of step 3 are not answered: another evaluation is writing to" in told
    assert "training goes on" in told
    assert sorted(found["train/loss"]) == [1, 2, 3]
    assert not [name for name in found if name.startswith("eval/tasks")]

    assert trainer.train(settings, place.parent) == 0
    [line] = [x for x in capfd.readouterr().out.splitlines() if "its tasks were not asked" in x]
    command = shlex.split(line.partition(": ")[2])
    assert command[:3] == ["python", "-m", "blindvalm_jax.evaluate"]
    assert command[3:] == [
        *(f"--workdir={place.parent}", f"--tasks=text:{files}/short.txt"),
        *("--protocol=corrected", "--dtype=float32"),
    ]
    found = json.loads((files / "asked" / "eval" / "results.json").read_text())
    del found["tasks"]
    for protocol in ("published", "corrected"):  # by the latter its answers are put aside
        more: dict[str, Any] = {"protocol": protocol, "names": ["sst2"], "in_training": False}
        standing.settle(files / "asked" / "eval", found, **more)
        assert trainer.train(config.parse(asking(files)), files / "asked") == 0
        assert "tasks were not asked" not in capfd.readouterr().out
    assert not (files / "asked" / "eval" / "results.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__tasks": "colours"}, "eval.tasks=colours: eval.tasks must be names or groups"),
        (
            {"eval__tasks": "sst2"},
            "eval.tasks=sst2: sst2: test_with_labels.json or sst2.* is not in",
        ),
        (
            {
                **{"eval__tasks": "lambada", "eval__tasks_protocol": "corrected"},
                **{"decoder__positions": "learned", "decoder__max_positions": 32},
            },
            "eval.tasks=lambada: lambada: a last word of .* tokens: the model has 32",
        ),
        ({"eval__tasks_data": ""}, "eval.tasks needs eval.tasks_data"),
        ({"grounding__control": "shuffled"}, "eval.tasks cannot be put to a run of"),
        ({"train__objective": "contrastive"}, "eval.tasks are for train.objective=language"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    files: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = asking(files, **changes)
    (files / "tasks" / "lambada_test_plain_text.txt").write_text(f"the cat {'z' * 60}\n")
    if "train__objective" in changes:
        given.data.files = ""
    with pytest.raises(UserError, match=message):
        trainer.train(config.parse(given), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_results_stay_where_they_are_until_tasks_are_asked(files: Path, tmp_path: Path) -> None:
    """Here training is refused after its tasks were read."""
    runs.claim(tmp_path)
    test_compare.answered(tmp_path / "eval", files / "tasks", seed=1)
    before = (tmp_path / "eval" / "results.json").read_bytes()
    given = config.parse(asking(files, train__init_from=str(files / "none")))
    with pytest.raises(UserError, match="none"):
        trainer.train(given, tmp_path, dry_run=True)
    assert (tmp_path / "eval" / "results.json").read_bytes() == before


def test_a_score_that_is_no_float_is_said() -> None:
    told = training.scores({"sst2": {"score": 0.5}, "ptb": {"score": None}})
    assert told == {"eval/tasks/sst2": 0.5, "eval/tasks/ptb": math.inf}
