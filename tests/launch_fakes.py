"""Commands that play a cloud or a scheduler: they record their calls and answer by a plan."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CODE = """#!{python} -IS
import json, os, subprocess, sys
from pathlib import Path
here, name, words = Path({here!r}), {name!r}, sys.argv[1:]
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, words, sys.stdin.read()]) + "\\n")
for number, (pattern, answers) in enumerate({plan!r}):
    if pattern not in " ".join(words):
        continue
    count = here / f"{{name}}.{{number}}"
    done = int(count.read_text()) if count.exists() else 0
    count.write_text(str(done + 1))
    code, out, err, script = answers[min(done, len(answers) - 1)]
    sys.stdout.write(out)
    sys.stdout.flush()
    sys.stderr.write(err)
    if script:
        code = subprocess.call(["bash", "-c", script, name, *words])
    sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command prints and ends with; `script` is run by bash with the words as arguments."""

    out: str = ""
    code: int = 0
    err: str = ""
    script: str = ""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a command."""

    name: str
    words: list[str]
    input: str

    def value(self, flag: str) -> str:
        """What stands behind `--flag=`."""
        return next(w.removeprefix(f"{flag}=") for w in self.words if w.startswith(f"{flag}="))


class Fakes:
    """A directory of such commands, first on PATH."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory."""
        self.directory = directory
        directory.mkdir()

    def add(self, name: str, plan: Mapping[str, Sequence[Answer]] | None = None) -> None:
        """Makes a command.

        plan: answers by a part of the call's words, the first that occurs counts; one answer a
        call, the last of them again and again. Any other call succeeds and prints nothing.
        """
        rows = [
            (pattern, [dataclasses.astuple(answer) for answer in answers])
            for pattern, answers in (plan or {}).items()
        ]
        rows = [
            (p, [(code, out, err, do) for out, code, err, do in answers]) for p, answers in rows
        ]
        path = self.directory / name
        path.write_text(
            _CODE.format(python=sys.executable, here=str(self.directory), name=name, plan=rows)
        )
        path.chmod(0o755)

    def calls(self) -> list[Call]:
        """What was called so far, in order."""
        path = self.directory / "calls.jsonl"
        return (
            [Call(*json.loads(line)) for line in path.read_text().splitlines()]
            if (path.exists())
            else []
        )

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a script of launch/ under bash, from the top of the checkout."""
        return run_script(*command, PATH=f"{self.directory}:{os.environ['PATH']}", **environment)


def run_script(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of launch/ with bash and none of the variables that it reads."""
    read = ("TPU_", "GKE_", "SLURM_", "SKYPILOT_", "SKY_", "CONTAINER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(read)}
    return subprocess.run(
        ["bash", *map(str, command)],
        cwd=ROOT,
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
