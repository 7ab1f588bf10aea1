"""The harness's command line, which knows our model and tasks."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import lm_eval.models  # noqa: F401  the harness looks for its own only while none is known
from lm_eval import utils
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from blindvalm_jax.lm_eval import adapter

TASKS = Path(__file__).parent / "tasks"


def run() -> None:
    """Carries out what `sys.argv` says."""
    utils.setup_logging()
    _show_our_lines()
    harness = HarnessCLI()
    arguments = harness.parse_args()
    if hasattr(arguments, "include_path"):
        arguments.include_path = [str(TASKS), *included(arguments)]
    if arguments.command == "run" and not arguments.model and not arguments.config:
        arguments.model = adapter.NAME
    harness.execute(arguments)


def included(arguments: argparse.Namespace) -> list[str]:
    """Directories of tasks that are named; the flag stands before --config, as all flags do."""
    if arguments.include_path:
        return [arguments.include_path]
    if arguments.command != "run" or not arguments.config:
        return []
    named = EvaluatorConfig.load_yaml_config(arguments.config).get("include_path")
    return list(named) if isinstance(named, list) else [named] if named else []


def _show_our_lines() -> None:
    """What the adapter logs stands among the lines of the harness, which shows its own alone."""
    theirs, ours = logging.getLogger("lm_eval"), logging.getLogger("blindvalm_jax.lm_eval")
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate
    for handler in theirs.handlers:
        ours.addHandler(handler)
