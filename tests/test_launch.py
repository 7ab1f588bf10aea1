"""The files of launch/: well-formed, dry runs as recorded, and the page's commands."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from blindvalm_jax import config
from blindvalm_jax.objectives.shapes import without_data
from tests import make_golden_launch
from tests.launch_fakes import ROOT, Fakes

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bin")


def shellcheck(*words: str, text: str | None = None) -> None:
    """Fails with what shellcheck finds."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = shutil.which("shellcheck", path=path)
    if command is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[test]'")
    done = subprocess.run(
        [command, "--shell=bash", *words], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    assert len(SCRIPTS) >= 4
    shellcheck(*map(str, SCRIPTS))


@pytest.mark.parametrize("name", ["sky_tpu", "sky_gpu"])
@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing_in_the_tasks(name: str, part: str) -> None:
    task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    shellcheck("--exclude=SC2154", "-", text=task[part])  # SkyPilot sets the variables


@pytest.mark.parametrize("name", make_golden_launch.CASES)
def test_a_dry_run_prints_what_is_recorded(name: str) -> None:
    golden = make_golden_launch.GOLDEN / f"{name}.txt"
    assert make_golden_launch.dry_run(name) == golden.read_text(), (
        "python -m tests.make_golden_launch records it anew"
    )


def test_every_record_is_of_a_case() -> None:
    files = {path.stem for path in make_golden_launch.GOLDEN.iterdir()}
    assert files == set(make_golden_launch.CASES)


@pytest.mark.parametrize("name", sorted(set(make_golden_launch.CASES) - {"local", "local_sweep"}))
def test_a_dry_run_runs_nothing(name: str, fakes: Fakes) -> None:
    script, *words = make_golden_launch.CASES[name]
    for command in ("gcloud", "kubectl", "xpk", "sky", "docker", "srun", "scontrol", "sleep"):
        fakes.add(command)
    words.insert(1 if script.endswith(".sh") else 0, "--dry-run")
    variables = make_golden_launch.VARIABLES.get(name, {})
    assert fakes.run(script, *words, **variables).returncode == 0
    assert fakes.calls() == []


@pytest.mark.parametrize(
    "script", ["tpu_vm.sh", "gke.sh", "sky.sh", "container.sh", "slurm.sbatch", "local.py"]
)
def test_help_says_how_each_is_used(script: str) -> None:
    command = [sys.executable if script.endswith(".py") else "bash", f"launch/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"launch/{script}" in done.stdout
    assert "--dry-run" in done.stdout


def test_nothing_names_a_project_a_zone_or_a_bucket() -> None:
    for path in LAUNCH.iterdir():
        text = path.read_text()
        for found in re.findall(r"(?:gs|s3)://[\w.$-]*", text):
            bucket = found.partition("://")[2].strip(".")
            assert bucket == "" or bucket.isupper(), f"{path.name}: {found}"
        found = re.findall(r"(?<!such as )\b(?:us|europe|asia)-[a-z]+\d-[a-z]\b", text)
        assert not found, f"{path.name}: {found}"


def _commands() -> list[list[str]]:
    """The commands of the table in launch/README.md."""
    rows = (LAUNCH / "README.md").read_text().splitlines()
    found = [re.fullmatch(r"\|[^|]*\| `(.*)` \|", row) for row in rows]
    return [shlex.split(row[1]) for row in found if row]


def test_the_page_has_a_command_for_every_file() -> None:
    """Of its own, or by the script that reads it."""
    named = {Path(word).name for words in _commands() for word in words if "launch/" in word}
    read = {found for name in named for found in _READS.findall((LAUNCH / name).read_text())}
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()}
    assert named | read == files - {"README.md", "commands.sh", "Dockerfile.dockerignore"}


_READS = re.compile(r"=\S*launch/(\w+(?:\.yaml)?)\b")
# ml_collections reads config files so.
_LOADS = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def _train_words(text: str) -> list[str] | None:
    """The arguments of the first train command that a script prints, also in quotes of quotes."""
    if found := re.search(r"^apiVersion.*?(?=\n\+ )", text, re.MULTILINE | re.DOTALL):
        (job,) = yaml.safe_load(found[0])["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return [word.replace("$$", "$") for word in container["args"]]
    if "+ sky " in text:
        return _sky_words(text)
    if "\n+ docker run " in text:
        words = shlex.split(text.rpartition("\n+ docker run ")[2])
        return words[words.index("blindvalm") + 1 :]
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = list(lexer)
    if "blindvalm_jax.train" in words:
        own = words[words.index("blindvalm_jax.train") + 1 :]
        return list(itertools.takewhile(lambda word: word not in (";", "+"), own))
    inside = (_train_words(word) for word in words if "blindvalm_jax.train" in word)
    return next((found for found in inside if found), None)


def _sky_words(text: str) -> list[str]:
    """The arguments of train in what sky.sh shows."""
    words = shlex.split(text.rpartition("\n+ sky ")[2] or text)
    (train,) = (word.removeprefix("TRAIN=") for word in words if word.startswith("TRAIN="))
    return shlex.split(train)


def _settings(words: list[str]) -> config.Config:
    """What the flags of train say."""
    own = flags.FlagValues()
    argv = ["train", *words]
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    own(argv, known_only=True)
    return config.parse(own.config)


@_LOADS
@pytest.mark.parametrize("words", _commands())
def test_the_pages_commands_are_right(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are understood, and what they train has data."""
    at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    start = [sys.executable] if words[at].endswith(".py") else ["bash"]
    behind = at + 2 if words[at].endswith(".sh") else at + 1  # the scripts have subcommands
    command = [*start, *words[at:behind], "--dry-run", *words[behind:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    train = _train_words(done.stdout)
    assert train is not None
    monkeypatch.chdir(ROOT)
    assert not without_data(_settings(train))


@_LOADS
@pytest.mark.parametrize("file", ["Dockerfile", "sky_tpu.yaml", "sky_gpu.yaml", "slurm.sbatch"])
def test_what_a_file_gives_as_an_example_has_data(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (LAUNCH / file).read_text()
    comment = "\n".join(re.findall(r"^# ?(.*)", text, re.MULTILINE)).replace("\\\n", " ")
    example = re.findall(r"^  ((?:docker run|sky|sbatch) .*--config.*)$", comment, re.MULTILINE)
    (words,) = map(shlex.split, example)
    if words[0] == "sky":
        words = next(shlex.split(w.partition("=")[2]) for w in words if w.startswith("TRAIN="))
    train = [word for word in words if word.startswith(("--config", "--workdir"))]
    assert any(word.startswith("--workdir=") for word in train)
    monkeypatch.chdir(ROOT)
    assert not without_data(_settings(train))
