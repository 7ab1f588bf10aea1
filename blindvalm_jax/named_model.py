"""A trained model by name: a run, one of its checkpoints, weights, or a GPT-2 of others."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from jax.sharding import Mesh

from blindvalm_jax import trained
from blindvalm_jax.errors import UserError
from blindvalm_jax.trained import TrainedModel

DTYPES = ("float32", "bfloat16")
_NAMES = ("workdir", "checkpoint", "hf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A run, a checkpoint or a Hugging Face GPT-2, and what weights do not say of themselves.

    checkpoint: RUN/checkpoints/STEP, or a directory that `convert` wrote. hf: directory or hub id.
    dtype: of the computation; in bfloat16 a score depends on the batch in its third digit. The
    others are for weights without a run: see `trained.from_weights`; "" and 0: not said.
    """

    workdir: str = ""
    checkpoint: str = ""
    hf: str = ""
    tokenizer: str = ""
    tower: str = ""
    tower_tokenizer: str = ""
    readout: str = ""
    segments: str = ""
    index: str = ""
    neighbours: int = 0
    dtype: str = DTYPES[0]

    @property
    def path(self) -> str:
        """The absolute directory of the model, or its hub id."""
        return self.hf or str(Path(self.workdir or self.checkpoint).expanduser().absolute())

    @property
    def run(self) -> Path | None:
        """The run that the model is of."""
        path = Path(self.path)
        if self.workdir:
            return path
        return path.parent.parent if self.step is not None else None

    @property
    def step(self) -> int | None:
        """The checkpoint of the run that is named, None: none is, so it is the newest."""
        path = Path(self.path)
        named = bool(self.checkpoint) and path.parent.name == "checkpoints"
        return int(path.name) if named and path.name.isdecimal() else None

    def check(self) -> None:
        """Refuses what names no model, or several, or says of a run what the run records.

        Raises:
          UserError: in these cases, or a value is none of its field.
        """
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                wanted = "a text" if kind is str else "a whole number, 0 or more"
                raise UserError(
                    f"{field.name} must be {wanted}, got {value!r} ({type(value).__name__})"
                )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        given = [name for name in _NAMES if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                f"name one model, by one of {', '.join(_NAMES)}; got "
                f"{' and '.join(given) or 'none'}"
            )
        for field in dataclasses.fields(self):
            if (
                self.run is not None
                and field.name not in (*_NAMES, "dtype")
                and getattr(self, field.name)
            ):
                raise UserError(f"{field.name} is for weights without a run: {self.run} records it")

    def load(self, *, mesh: Mesh | None = None) -> TrainedModel:
        """Reads the model; mesh: None: the first device alone.

        Raises:
          UserError: see `check`, `trained.load` and `trained.from_weights`.
        """
        self.check()
        if self.run is not None:
            return trained.load(self.run, step=self.step, dtype=self.dtype, mesh=mesh)
        grounding = {
            "readout": self.readout,
            "segments": self.segments,
            "index": self.index,
            "neighbours": self.neighbours,
            "source": "images" if self.index else "",
        }
        model = trained.from_weights(
            self.path,
            tower=self.tower,
            tower_tokenizer=self.tower_tokenizer,
            tokenizer=self.tokenizer,
            grounding={name: value for name, value in grounding.items() if value},
            dtype=self.dtype,
            mesh=mesh,
        )
        self._say_assumed(model)
        return model

    def _say_assumed(self, model: TrainedModel) -> None:
        """Says on stderr how weights that do not say it are taken to be grounded."""
        used = model.settings.grounding
        names = ["readout", "segments"] if model.model.tower is not None else []
        names += ["neighbours"] if model.images is not None else []
        assumed = [name for name in names if not getattr(self, name)]
        if assumed:
            told = ", ".join(f"{name}={getattr(used, name)}" for name in assumed)
            print(
                f"note: {self.path} does not record how it was grounded, nor was it said; assumed: "
                f"{told} (--{', --'.join(assumed)})",
                file=sys.stderr,
                flush=True,
            )
