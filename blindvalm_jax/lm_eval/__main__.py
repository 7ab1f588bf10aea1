r"""Runs lm-evaluation-harness with our models and our tasks; needs the extra `harness`.

    python -m blindvalm_jax.lm_eval --model_args workdir=RUN --tasks blindvalm_vlu \
        --metadata '{"data": "DIR"}'

The flags are the harness's own (`run --help`). --model is `blindvalm` if neither it nor --config is
given; its --model_args are those of `adapter.BlindValm`. Our tasks are there besides those of the
harness and of --include_path.
"""

from __future__ import annotations

import importlib.util

from blindvalm_jax.command_line import exit_after
from blindvalm_jax.errors import UserError


def main() -> int:
    """Hands the command line to the harness, which ends the process itself where it refuses it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed: pip install 'blindvalm_jax[harness]'"
        )
    from blindvalm_jax.lm_eval import command

    command.run()
    return 0


if __name__ == "__main__":
    exit_after(main, interrupted="nothing was written; --use_cache keeps answers for the next time")
