"""Evaluation of a run: against a plain loop, in any batch and order, both protocols, files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blindvalm_jax import partitioning, trained
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import run_directory, weights
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.tasks import answers, catalog, evaluation, identity, results, standing
from blindvalm_jax.tasks.questions import Question
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.tasks.task import Protocol
from blindvalm_jax.trained import TrainedModel
from tests import small_models, small_text, test_train

ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"grounding__source": "none", "grounding__tower": ""},
    "token": {"decoder__positions": "learned", "decoder__max_positions": 32},
    "eos": {"grounding__readout": "eos"},
}
COLORS = """Index,Descriptor,Item,Color
1,a ,sunflower,yellow
2,the ,ocean,blue
3,,grass,green
4,the inside of a,watermelon from a garden,red
"""
SHAPES = 'word,gt,options\nwheel,circle,"[]"\ndoor,rectangle,"[]"\ncarrot,triangle,"[]"\n'


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/KIND, each after two updates; data/, small files of tasks."""
    directory = tmp_path_factory.mktemp("evaluated")
    text = directory / "text.txt"
    small_text.write_text(text, small_text.documents(120))
    for kind, changes in KINDS.items():
        values = test_train.settings(text, train__steps=2, eval__every_steps=0, **changes)
        values.data.cache = str(directory / "cache")
        test_train.run(values, directory / kind)
    data = directory / "data" / "vlu"
    data.mkdir(parents=True)
    (data / "memory_color_data.csv").write_text(COLORS)
    (data / "shape_association.csv").write_text(SHAPES)
    (data / "story.txt").write_text("the boat is on the sea")
    heights = [("a tree", "an ant", 1), ("an ant", "a house", 0), ("a tree", "a mouse", 1)]
    lines = [json.dumps({"obj_a": a, "obj_b": b, "label": label}) for a, b, label in heights]
    (data / "tnwit_height.json").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module", params=KINDS)
def model(runs: Path, request: pytest.FixtureRequest) -> TrainedModel:
    return trained.load(runs / request.param)


def asked(name: str, data: Path, protocol: str = "corrected") -> tuple[Protocol, list[Question]]:
    found = catalog.TASKS[name].protocols[protocol]
    return found, found.questions(found.items(data))


def plainly(model: TrainedModel, tokens: np.ndarray) -> np.ndarray:
    """log p [T, V] of every next token, of one row alone."""
    learned = model.settings.decoder.positions == "learned"
    batch = model.batch_of_ids([tokens], length=32 if learned else 128)
    with partitioning.use(model.mesh):
        return np.asarray(_plain(model.model)(model.params, model.frozen, batch))


@functools.cache
def _plain(model: Model) -> Callable[..., jax.Array]:
    @jax.jit
    def run(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        z_BTKE = model.features(frozen, batch)
        logits_BTV: Any = model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)
        return jax.nn.log_softmax(logits_BTV[0])

    return run


@pytest.mark.parametrize("task", ["memory_colors", "tnwit_height"])
def test_scores_are_those_of_one_row_at_a_time(model: TrainedModel, runs: Path, task: str) -> None:
    """1e-4 for sums of ten log probabilities in fp32."""
    protocol, questions = asked(task, runs / "data")
    found = answers.answer(Scorer(model), model.tokenizer, protocol, questions)
    vocabulary = model.tokenizer
    for place in np.random.default_rng(0).permutation(len(questions))[:6]:
        question = questions[place]
        prompt = np.append(vocabulary.eos_id, vocabulary.encode_lm(question.prompt.rstrip()))
        for candidate, score in zip(question.candidates, found.scores[place], strict=True):
            ids = vocabulary.encode_lm(f" {candidate}")
            longest = max(len(vocabulary.encode_lm(f" {x}")) for x in question.candidates)
            behind = prompt
            if model.settings.decoder.positions == "learned":  # 32 of them
                behind = prompt[-(32 - longest + 1) :]
            log_p = plainly(model, np.concatenate([behind, ids[:-1]]))
            expected = sum(log_p[len(behind) - 1 + n, token] for n, token in enumerate(ids))
            assert score == pytest.approx(expected, abs=1e-4)
        assert found.chosen["continuation"][place] == np.argmax(found.scores[place])


def test_no_score_depends_on_the_batch_or_the_order(model: TrainedModel, runs: Path) -> None:
    protocol, questions = asked("memory_colors", runs / "data")
    expected = answers.answer(Scorer(model), model.tokenizer, protocol, questions)
    order = np.random.default_rng(1).permutation(len(questions))
    mixed = [questions[place] for place in order]
    found = answers.answer(Scorer(model, tokens_at_once=100), model.tokenizer, protocol, mixed)
    for place, scores in zip(order, found.scores, strict=True):
        np.testing.assert_allclose(scores, expected.scores[place], atol=1e-5, rtol=0)


def test_the_published_protocol_reads_one_distribution(model: TrainedModel, runs: Path) -> None:
    protocol, questions = asked("shapeit", runs / "data", "published")
    found = answers.answer(Scorer(model), model.tokenizer, protocol, questions)
    vocabulary = model.tokenizer
    for question, scores in zip(questions, found.scores, strict=True):
        prompt = vocabulary.encode_lm(question.prompt.rstrip())
        log_p = plainly(model, prompt)[len(prompt) - 1]
        ids = [vocabulary.encode_lm(f" {candidate}") for candidate in question.candidates]
        expected = [(1 + log_p[own].sum()) / len(own) for own in ids]
        np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    sums = np.array([np.argmax(scores) for scores in found.scores])
    assert not np.array_equal(sums, found.chosen["sum_from_one"]), "one way of scoring tested"


def test_positions_run_out_at_the_beginning_of_a_prompt(runs: Path) -> None:
    model = trained.load(runs / "token")
    scorer = Scorer(model)
    assert scorer.longest == 32
    long = Question(item="1", template=0, prompt="sea " * 60, candidates=("red", "blue"), answer=0)
    protocol = asked("memory_colors", runs / "data")[0]
    found = answers.answer(scorer, model.tokenizer, protocol, [long])
    assert found.cut == 1
    with pytest.raises(UserError, match="a row of 33 tokens: expected 1 to 32"):
        scorer.log_probabilities([Row(np.zeros(33, np.int32), np.array([0]), np.array([[0]]))])


def test_a_model_that_reads_other_rows_is_refused(runs: Path) -> None:
    model = trained.load(runs / "eos")
    shuffled = dataclasses.replace(model, model=dataclasses.replace(model.model, shuffled=True))
    with pytest.raises(UserError, match="what it scores depends on the batch"):
        Scorer(shuffled)


def command(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "blindvalm_jax.evaluate", f"--workdir={runs / 'eos'}"]
    return subprocess.run([*line, *arguments], cwd=ROOT, capture_output=True, text=True)


# Several command lines in one process, as the imports take longer than all else.
COMMANDS = """
import contextlib, io, json, sys
from absl import flags
from blindvalm_jax import command_line, evaluate
for arguments in json.load(sys.stdin):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    sys.argv = ["evaluate", *arguments]
    err, code = io.StringIO(), None
    with contextlib.redirect_stderr(err):
        try:
            command_line.run_main(evaluate.main)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue()]), flush=True)
"""


def test_the_command_writes_what_checks_rely_on(runs: Path) -> None:
    tasks = f"--data={runs / 'data'}", "--tasks=tnwit_height,memory_colors"
    done = command(runs, *tasks)
    assert done.returncode == 0, done.stderr
    found = json.loads((runs / "eos" / "eval" / "results.json").read_text())["tasks"]
    assert [*found] == ["memory_colors", "tnwit_height"]
    colors = found["memory_colors"]
    needed = {"protocol", "metric", "score", "stderr", "n", "majority", "random", "per_prompt"}
    assert needed <= colors.keys()
    assert (colors["protocol"], colors["n"], colors["random"]) == ("corrected", 4, 0.25)
    assert np.mean(colors["per_prompt"]) == pytest.approx(colors["score"])
    assert [*colors["per_item"]] == ["1", "2", "3", "4"]
    assert np.mean([*colors["per_item"].values()]) == pytest.approx(colors["score"])
    content = (runs / "data" / "vlu" / "memory_color_data.csv").read_bytes()
    file = {"name": "memory_color_data.csv", "sha256": hashlib.sha256(content).hexdigest()}
    assert colors["file"] == file
    page = (runs / "eos" / "eval" / "report.md").read_text()
    assert f"| {100 * colors['score']:.2f} |" in page
    lines = (runs / "eos" / "eval" / "memory_colors.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 9 * 4
    assert np.mean([row["right"] for row in rows]) == pytest.approx(colors["score"])
    assert all(np.argmax(row["scores"]) == row["chosen"] for row in rows)
    assert sum(chosen for chosen, _ in colors["answers"].values()) == 36
    here = runs / "eos" / "eval"
    again = command(runs, *tasks, "--protocol=published")
    assert again.returncode == 0, again.stderr
    [other] = (here / "before").iterdir()
    held = f"{here} held memory_colors, tnwit_height of protocol 'corrected', now 'published'"
    assert f"{held}: they are in {other} now" in again.stderr
    assert json.loads((other / "results.json").read_text())["tasks"] == found
    heights = json.loads((here / "results.json").read_text())["tasks"]["tnwit_height"]
    assert heights["score"] <= 0.5
    assert "counted twice" in heights["faults"][0]
    assert heights["beside"].keys() == {"sum"}


WRONG = [
    (
        "--workdir=RUN --tasks=colours --data=.",
        "--tasks must be names or groups (vlu, nlu, lm), got",
    ),
    ("--workdir=RUN --tasks=sst2 --data=DATA", "sst2_test.jsonl is not in"),
    ("--workdir=RUN --tasks=sst2", "--data is missing"),
    (
        "--workdir=RUN --tasks=memory_colors --data=DATA --out=FILE",
        "shape_association.csv is no directory",
    ),
    (
        "--workdir=RUN --tasks=memory_colors --data=DATA --out=FILE/x",
        "shape_association.csv is no directory",
    ),
    (
        "--workdir=RUN --tasks=memory_colors,text:DATA/vlu/story.txt --data=DATA "
        "--window=8 --stride=9",
        "--stride=9 exceeds --window=8",
    ),
    (
        "--workdir=RUN --tasks=lm --data=DATA --protocol=published --window=8",
        "--window and --stride are of the corrected protocol",
    ),
    (
        "--workdir=RUN --tasks=memory_colors --data=DATA --out=HELD",
        "another evaluation is writing to",
    ),
    (
        "--workdir=RUN --tasks=memory_colors --data=DATA --out=OWN",
        "memory_colors.jsonl would be written over, and no results.json in",
    ),
    ("report DATA --workdir=RUN --out=o", "report does not read --workdir, --out: it takes none"),
    (
        "compare DATA DATA --workdir=RUN",
        "compare does not read --workdir: it takes --tasks and --out",
    ),
    ("compare DATA DATA --data=DATA", "compare does not read --data: it takes"),
    ("compare DATA DATA --out=FILE", "shape_association.csv is no directory"),
    ("compare DATA DATA --out=FILE/x", "shape_association.csv is no directory"),
]


def test_wrong_commands_are_one_line(runs: Path) -> None:
    places = {"FILE": "DATA/vlu/shape_association.csv", "RUN": f"{runs / 'eos'}"}
    places |= {"DATA": f"{runs / 'data'}", "HELD": f"{runs / 'held'}", "OWN": f"{runs / 'own'}"}
    (runs / "own").mkdir()
    (runs / "own" / "memory_colors.jsonl").write_text("the user's")
    lines = []
    for arguments, _ in WRONG:
        for name, place in places.items():
            arguments = arguments.replace(name, place)
        lines.append(arguments.split())
    with standing.held(runs / "held"):
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS],
            input=json.dumps(lines),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (arguments, message), (code, told) in zip(WRONG, answers, strict=True):
        assert code == 1, arguments
        assert message in told, arguments
        assert told.count("\n") == 1, arguments
    assert not list(runs.glob("eos/eval/text*")), "asked before all was checked"
    assert [path.read_text() for path in (runs / "own").iterdir()] == ["the user's"]


def test_another_evaluation_of_the_same_model_adds_to_what_is_there(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained.load(runs / "eos")
    about = identity.about(str(runs / "eos"), model)
    scorer = Scorer(model)

    def run(
        names: list[str], about: dict[str, Any], protocol: str = "published", again: bool = False
    ) -> list[str]:
        found = evaluation.read(names, protocol, runs / "data")
        whole = evaluation.run(
            found,
            scorer,
            model.tokenizer,
            protocol=protocol,
            out=tmp_path,
            about=about,
            there=None if again else evaluation.rehearse(found, model),
        )
        assert not whole["tasks"] or json.loads((tmp_path / "results.json").read_text()) == whole
        return [*whole["tasks"]]

    def told() -> list[str]:
        found = capsys.readouterr()
        lines = [*found.out.splitlines(), *found.err.splitlines()]
        return [line for line in lines if line.startswith(("note", "already"))]

    assert run(["memory_colors"], about) == ["memory_colors"]
    assert run(["tnwit_height"], about) == ["memory_colors", "tnwit_height"]
    assert not told()
    both = ["memory_colors", "tnwit_height"]
    (tmp_path / "tnwit_height.jsonl").write_text("")  # others than the entry's
    assert run(both, {**about, "model": "moved"}) == both
    assert told() == ["already there: memory_colors (--again asks anew)"]
    assert run(both, about, again=True) == both
    assert not told()
    other = {**about, "grounding": {**about["grounding"], "readout": "token"}}
    assert run(["tnwit_height"], other) == ["tnwit_height"]
    [line] = told()
    aside = tmp_path / "before" / identity.name({**about, "protocol": "published"})
    assert line == (
        f"note: {tmp_path} held memory_colors, tnwit_height of grounding/readout 'eos', now "
        f"'token': they are in {aside} now"
    )
    kept, place = results.read(aside)
    assert kept["grounding"]["readout"] == "eos"
    assert len(results.read_lines(place, "memory_colors", kept["tasks"]["memory_colors"])) == 36
    assert not (tmp_path / "memory_colors.jsonl").exists()
    assert run(["tnwit_height"], {**other, "weights_sha256": "0" * 64}) == ["tnwit_height"]
    assert f"of weights_sha256 {about['weights_sha256'][:12]}…, now 0" in told()[0]
    assert run(["memory_colors"], about) == both
    there, held, back = told()
    assert there == "already there: memory_colors (--again asks anew)"
    assert f"{tmp_path} held tnwit_height of weights_sha256 00" in held
    assert back == f"note: what was asked in {aside} before is in {tmp_path} again"

    given = runs / "given"
    for letter, text in (("a", "the boat is on the sea"), ("b", "the sea")):
        (given / letter).mkdir(parents=True)
        (given / letter / "x.txt").write_text(text)
    names = [f"text:{given}/{letter}/x.txt" for letter in "ab"]
    in_b = {**about, "step": 5}
    assert run(names[:1], in_b, protocol="corrected") == ["text_x.txt"]
    assert run(names[1:], in_b, protocol="corrected") == ["text_x.txt"]
    digits = hashlib.sha256(b"the boat is on the sea").hexdigest()[:12]
    assert told()[-1] == (
        f"note: text_x.txt is in the place of what was asked with source {given}/a/x.txt, "
        f"file x.txt ({digits}…)"
    )
    assert run(names, in_b, protocol="corrected") == ["text_x.txt", "text_a_x.txt", "text_b_x.txt"]


def test_a_model_is_known_by_its_weights_and_its_grounding(runs: Path) -> None:
    """The decoder's hash is that of the parameters on disk, the tower's what its files say."""
    models = {kind: trained.load(runs / kind) for kind in KINDS}
    said = {kind: identity.about(str(runs / kind), model) for kind, model in models.items()}
    for kind, model in models.items():
        on_disk = run_directory.load(runs / kind).params
        assert said[kind]["weights_sha256"] == weights.params_sha256(on_disk)
        assert said[kind]["tokenizer_fingerprint"] == model.tokenizer.fingerprint
    assert said["gpt2"]["grounding"] is None
    kept = json.loads((runs / "eos" / "tower" / "config.json").read_text())
    found = said["eos"]["grounding"]
    assert found["tower_sha256"] == kept["sha256"]  # the run computes in float32
    assert (found["source"], found["readout"], found["segments"]) == ("text", "eos", "causal")
    assert json.loads(json.dumps(said)) == said


# What changes no parameter and no shape, but what is computed.
TURNED: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {"activation": "quick_gelu"}),
    ("decoder", {"norm_epsilon": 0.1}),
    ("decoder", {"embedding_scale": "none"}),
    ("decoder", {"heads": 4}),
    ("decoder/fusion", {"query_scale": "head_width"}),
    ("grounding/tower_config", {"activation": "gelu_erf"}),
    ("grounding/tower_config", {"norm_epsilon": 0.1}),
    ("grounding/tower_config", {"heads": 1}),
]


def test_a_model_is_known_by_all_that_it_computes_by(runs: Path) -> None:
    """And not by what training alone does with it, nor by where it is kept."""
    model = trained.load(runs / "eos")
    one, tower = model.model.decoder, model.model.tower
    assert tower is not None
    said = identity.about("a", model)
    names = set()
    for place, changes in TURNED:
        decoder, read = one, tower
        if place == "decoder":
            decoder = one.clone(config=dataclasses.replace(one.config, **changes))
        elif place == "decoder/fusion":
            decoder = one.clone(fusion=dataclasses.replace(one.fusion, **changes))
        else:
            read = tower.clone(config=dataclasses.replace(tower.config, **changes))
        parts = dataclasses.replace(model.model, decoder=decoder, tower=read)
        other = identity.about("a", dataclasses.replace(model, model=parts))
        [(field, value)] = changes.items()
        assert f"now {value!r}" in identity.differences(said, other)
        assert identity.differences(said, other).startswith(f"{place}/{field} ")
        names.add(identity.name({**other, "protocol": "published"}))
    idle: dict[str, Any] = {
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "init": "gpt2",
        "max_positions": 7,
    }
    same = one.clone(config=dataclasses.replace(one.config, **idle), remat="full", scan_unroll=2)
    parts = dataclasses.replace(model.model, decoder=same)
    moved = identity.about("b", dataclasses.replace(model, model=parts))
    assert not identity.differences(said, moved)
    own = {identity.name({**x, "protocol": "published"}) for x in (said, moved)}
    assert len(own) == 1
    assert len(names | own) == len(TURNED) + 1
    assert identity.differences({**said, "device": "a GPU"}, said).startswith("device 'a GPU', now")


def test_what_is_damaged_is_put_aside_before_tasks_are_asked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained.load(runs / "gpt2")
    asked = evaluation.read(["memory_colors"], "published", runs / "data")
    scorer = Scorer(model)

    def run(*, step: int = 2, in_training: bool = False) -> dict[str, Any]:
        about = {"model": "gpt2", "step": step}
        return evaluation.run(
            asked,
            scorer,
            model.tokenizer,
            protocol="published",
            out=tmp_path,
            about=about,
            in_training=in_training,
        )

    path, before = tmp_path / "results.json", tmp_path / "before"
    path.write_text('{"tasks": {"sst2"')
    assert [*run()["tasks"]] == ["memory_colors"]
    assert (before / "damaged" / "results.json").read_text() == '{"tasks": {"sst2"'
    assert "cannot be read as JSON: Expecting" in capsys.readouterr().err
    found = json.loads(path.read_text())
    entry = found["tasks"]["memory_colors"]
    found["tasks"] |= {"sst2": {**entry, "interval": None}, "mpqa": entry, "agnews": 5}
    path.write_text(json.dumps(found))
    assert [*run()["tasks"]] == ["memory_colors", "mpqa"]
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note")]
    assert len(notes) == 2
    assert "has null as sst2.interval, expected two numbers or nulls: the entry is" in notes[0]
    assert "has 5 as agnews, expected a table" in notes[1]
    capsys.readouterr()
    assert [*run(step=3, in_training=True)["tasks"]] == ["memory_colors"]
    assert "held memory_colors, mpqa of step 2, now 3: they" in capsys.readouterr().err
    run(step=4, in_training=True)
    told = capsys.readouterr()
    assert (told.out, "note" in told.err) == ("", False)
    [aside] = before.glob("step_*")
    assert json.loads((aside / "results.json").read_text())["step"] == 2
    (tmp_path / "memory_colors.jsonl").unlink()
    lines = run(step=4)["tasks"]["memory_colors"]["lines"]
    content = (tmp_path / "memory_colors.jsonl").read_bytes()
    assert lines == results.about_lines(content)


def test_scores_that_are_no_numbers_are_refused(runs: Path) -> None:
    model = trained.load(runs / "gpt2")
    params = jax.tree.map(lambda x: x * np.nan, model.params)
    protocol, questions = asked("shapeit", runs / "data")
    for share in (False, True):
        scorer = Scorer(dataclasses.replace(model, params=params), share_prompts=share)
        with pytest.raises(UserError, match="log probabilities are not finite"):
            answers.answer(scorer, model.tokenizer, protocol, questions)
