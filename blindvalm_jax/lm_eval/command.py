"""The harness's command line, which knows our model and tasks."""

from __future__ import annotations

from pathlib import Path

import lm_eval.models  # noqa: F401  the harness looks for its own only while none is known
from lm_eval import utils
from lm_eval._cli import HarnessCLI

from blindvalm_jax.lm_eval import adapter

TASKS = Path(__file__).parent / "tasks"


def run() -> None:
    """Carries out what `sys.argv` says."""
    utils.setup_logging()
    harness = HarnessCLI()
    arguments = harness.parse_args()
    if hasattr(arguments, "include_path"):
        named = arguments.include_path
        arguments.include_path = [str(TASKS), *([named] if named else [])]
    if arguments.command == "run" and not arguments.model and not arguments.config:
        arguments.model = adapter.NAME
    harness.execute(arguments)
