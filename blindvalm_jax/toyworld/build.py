"""Makes the toy world's datasets: `python -m blindvalm_jax.toyworld.build --out=DIR --seed=0`.

Every knob of `world.WorldConfig` is a flag. What is there already is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.toyworld import knob_flags
from blindvalm_jax.toyworld.world import WorldConfig

_OUT = flags.DEFINE_string("out", "", "data directory of TFDS that the datasets go to")
_KNOBS = knob_flags.define()


def main(argv: Sequence[str]) -> None:
    """Makes the world that the flags say."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    if not _OUT.value:
        raise UserError("--out is missing: name the directory that the datasets go to")
    config = WorldConfig(**_KNOBS())
    # Imported here: it takes seconds, and wrong flags are told at once.
    from blindvalm_jax.toyworld import builders

    builders.build(config, _OUT.value)


if __name__ == "__main__":
    run_main(main)
