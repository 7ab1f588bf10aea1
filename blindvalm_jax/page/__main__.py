r"""Draws runs on one page that opens in a browser without a server or a network.

    python -m blindvalm_jax.page RUN [RUN ...] --out=page.html

RUN: directories of runs, finished or not. The page has their curves in one figure (over updates,
tokens, FLOPs or hours), what happened to them (restarts, skipped updates, damaged checkpoints),
where their time went, and the settings in which they differ. It is drawn from what stands there
now: draw it again to see more. Needs plotly: pip install 'blindvalm_jax[page]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import files
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError
from blindvalm_jax.page import drawing, records

_OUT = flags.DEFINE_string("out", "", "the HTML file that is written")


def main(argv: Sequence[str]) -> None:
    """Draws the runs that the command line names."""
    out = Path(_OUT.value)
    if not argv[1:]:
        raise UserError("name at least one run: python -m blindvalm_jax.page RUN --out=page.html")
    if not _OUT.value or out.suffix != ".html":
        raise UserError(f"--out must name a file that ends in .html, got {_OUT.value!r}")
    if out.exists() and not drawing.is_page(out):
        raise UserError(f"--out={out} is there and is no page of runs: name another file")
    drawing.check_installed()
    runs = records.read([Path(name) for name in argv[1:]])
    files.check_possible(out.parent, what=f"--out={out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out, drawing.page(runs).encode())
    print(f"{out}: {', '.join(run.name for run in runs)}")


if __name__ == "__main__":
    run_main(main, interrupted="nothing was written")
