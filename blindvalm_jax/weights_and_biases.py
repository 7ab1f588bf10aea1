"""A run at Weights & Biases (wandb.ai, or a server of one's own), the same after each resume.

Variables that wandb itself reads (WANDB_MODE=offline and the like) hold, but for the project.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.console import warn
from blindvalm_jax.errors import PREEMPTED, UserError, first_line

FILE = "wandb.json"  # which run there is that of the directory
_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
# For what is not sent yet, which stays here. Schedulers wait for 15 to 30 seconds behind SIGTERM,
# of which wandb's own end may take 13 more; other processes of the run wait for 10.
_FINISH_SECONDS = 5.0
_CODES = {"done": 0, "preempted": PREEMPTED, "failed": 1}


class Run:
    """The W&B run of a directory; rows are by update.

    W&B takes steps in order alone: an update that is done again stays as it was the first time.
    """

    def __init__(self, place: str, workdir: Path, *, written: int) -> None:
        """Begins it, or goes on with it, if need be offline; its config is that of config.json.

        place: as `log.wandb`; written: the last step that starts before have written.
        """
        wandb = _library()
        own = wandb.setup().settings
        entity, _, project = place.rpartition("/")
        before = _known(workdir, place)
        run_id = own.run_id or before or secrets.token_hex(4)
        again = run_id == before
        files.write_json(workdir / FILE, {"place": place, "id": run_id})
        begin = functools.partial(
            wandb.init,
            entity=entity or None,
            project=project,
            id=run_id,
            # who has given it another name there keeps that
            name=None if again else own.run_name or workdir.resolve().name,
            resume=own.resume or "allow",
            reinit="create_new",  # not one that this process has begun before
            dir=None if "WANDB_DIR" in os.environ else str(workdir),
            settings=wandb.Settings(finish_timeout=own.finish_timeout or _FINISH_SECONDS),
        )
        try:
            self._run = begin()
        except (wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
            warn(
                f"Weights & Biases cannot be reached ({first_line(error)}): this start is written "
                f"to {own.wandb_dir if 'WANDB_DIR' in os.environ else workdir / 'wandb'}, from "
                "where `wandb sync` sends it"
            )
            _tear_down()  # what has failed to begin still holds the run
            self._run = begin(mode="offline")
        try:
            settings = files.read_object(workdir / "config.json")
            self._run.config.update(settings, allow_val_change=True)
        except Exception:
            _tear_down()
            raise
        # offline nobody else knows what is written
        before_this = written + 1 if again and self._run.offline else 0
        self._from = max(self._run.starting_step, before_this)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step; of a step that is there already nothing."""
        if step >= self._from:
            self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def close(self, ending: str) -> None:
        """Ends it as done, preempted or failed; waits a while for what is not sent yet."""
        try:
            if ending == "preempted":
                self._run.mark_preempting()
            self._run.finish(exit_code=_CODES[ending])
        except Exception:
            _tear_down()
            raise


def check(place: str, workdir: Path) -> None:
    """Refuses to start where the run could not be written.

    Raises:
      UserError: wandb is not installed or refuses its variables, nobody is logged in, or what the
        directory says of its run cannot be read.
    """
    wandb = _library()
    _known(workdir, place)
    try:
        mode = wandb.setup().settings.mode
        ready = mode in _WITHOUT_LOGIN or wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise UserError(f"log.wandb: wandb refuses its variables or files: {error}") from error
    if not ready:
        raise UserError(
            f"log.wandb={place}: nobody is logged in: run `wandb login` or set WANDB_API_KEY; with "
            "WANDB_MODE=offline the run is written to its directory, to be sent by `wandb sync`"
        )


def _known(workdir: Path, place: str) -> str | None:
    """The run of the directory in a project, if it has one."""
    path = workdir / FILE
    if not path.exists():
        return None
    known = files.read_object(path, hint="without it a new run is begun there")
    return str(known["id"]) if known.get("place") == place and "id" in known else None


def _tear_down() -> None:
    """Ends wandb's process, so that the next run of this one begins without it."""
    with contextlib.suppress(Exception):
        _library().teardown()


def _library() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb needs wandb: pip install 'blindvalm_jax[wandb]'") from error
    return wandb
