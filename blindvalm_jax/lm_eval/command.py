"""The harness's command line, which knows our model and tasks."""

from __future__ import annotations

import argparse
import dataclasses
import linecache
import logging
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  the harness looks for its own only while none is known
from lm_eval import utils
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.lm_eval import adapter

TASKS = Path(__file__).parent / "tasks"
# Where the harness refuses what its flags and config files say: values, tasks, and models.
_READERS = (
    "lm_eval._cli.utils",
    "lm_eval.config.evaluate_config",
    "lm_eval.evaluator",
    "lm_eval.api.registry",
)


def run() -> None:
    """Carries out what `sys.argv` says.

    Raises:
      UserError: the harness refuses it.
    """
    utils.setup_logging()
    _show_our_lines()
    try:
        _execute()
    except (ValueError, TypeError, OSError) as error:
        if not _is_refusal(error):
            raise
        raise UserError(f"lm-evaluation-harness: {first_line(error)}") from error


def _execute() -> None:
    harness = HarnessCLI()
    arguments = harness.parse_args()
    if hasattr(arguments, "include_path"):
        arguments.include_path = [str(TASKS), *included(arguments)]
    if arguments.command == "run" and not arguments.model and not arguments.config:
        arguments.model = adapter.NAME
    harness.execute(arguments)


def included(arguments: argparse.Namespace) -> list[str]:
    """Directories of tasks that are named; the flag stands before --config, as all flags do.

    Raises:
      UserError: the config file has a key that the harness does not know.
    """
    has_config = arguments.command == "run" and arguments.config
    config = _config(arguments.config) if has_config else {}
    if arguments.include_path:
        return [arguments.include_path]
    named = config.get("include_path")
    return list(named) if isinstance(named, list) else [named] if named else []


def _config(path: str) -> dict[str, Any]:
    found = EvaluatorConfig.load_yaml_config(path)
    known = [field.name for field in dataclasses.fields(EvaluatorConfig)]
    unknown = [str(name) for name in found if name not in known]
    if unknown:
        raise UserError(f"{path} has {', '.join(unknown)}; the harness knows {', '.join(known)}")
    return found


def _is_refusal(error: BaseException) -> bool:
    """Whether the harness raised it, in so many words, where it reads what a user says."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or at.tb_frame.f_globals["__name__"] not in _READERS:
        return False
    line = linecache.getline(at.tb_frame.f_code.co_filename, at.tb_lineno)
    return line.lstrip().startswith("raise ")


def _show_our_lines() -> None:
    """What the adapter logs stands among the lines of the harness, which shows its own alone."""
    theirs, ours = logging.getLogger("lm_eval"), logging.getLogger("blindvalm_jax.lm_eval")
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate
    for handler in theirs.handlers:
        ours.addHandler(handler)
