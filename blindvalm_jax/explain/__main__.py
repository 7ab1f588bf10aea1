r"""Shows what grounding does to a prompt: a table, explain.md, explain.json and a figure.

    python -m blindvalm_jax.explain --workdir=RUN --prompt="The color of a banana is" \
        --candidates=yellow,red,blue --out=DIR

The scores of the candidates with the grounding vectors and without them, how much each head of each
fusion layer looks at them, and the words of the vocabulary that lie nearest to the vector of one
token, beside what chance gives. --help lists what names a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import files, model_flags, terminal
from blindvalm_jax.command_line import run_main
from blindvalm_jax.decoding import tower_text
from blindvalm_jax.errors import UserError
from blindvalm_jax.explain import probing, report, words

flags.adopt_module_key_flags(model_flags)
_PROMPT = flags.DEFINE_string("prompt", "", "text before the candidates")
_CANDIDATES = flags.DEFINE_list("candidates", [], "what may come behind it, with commas")
_TOKEN = flags.DEFINE_integer(
    "token", -1, "whose grounding vectors are looked at: place in the prompt, -1 is its last"
)
_WORDS = flags.DEFINE_integer("words", 5000, "words of the vocabulary compared", lower_bound=10)
_NEAREST = flags.DEFINE_integer("nearest", 10, "of these shown", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "directory that is written")


def main(argv: Sequence[str]) -> int:
    """Explains the prompt of the command line."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    terminal.take_any_text()
    model_flags.named()
    for flag in (_PROMPT, _CANDIDATES, _OUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing (see --help)")
    prompt = terminal.argument(_PROMPT.value)
    candidates = [terminal.argument(candidate) for candidate in _CANDIDATES.value]
    probing.check(candidates)
    out = Path(_OUT.value).expanduser()
    files.check_possible(out, what=f"--out={out}")
    model = model_flags.load(rows_over_devices=False)
    why = tower_text.whole_only(model)
    if why:
        print(
            f"note: {why}: attention and near words are those of the prompt alone, each score is "
            "that of the prompt with its candidate",
            file=sys.stderr,
        )
    reading = probing.read(model, prompt, candidates)
    count = len(reading.tokens)
    if not -count <= _TOKEN.value < count:
        raise UserError(f"--token={_TOKEN.value}: the prompt has {count} tokens, 0 to {count - 1}")
    at = _TOKEN.value % count
    vocabulary = words.of_vocabulary(model, count=_WORDS.value)
    others = words.drawn(model, vocabulary, tokens=at)
    near = [
        words.nearest(vocabulary, vector, others=others, count=_NEAREST.value)
        for vector in reading.vectors[at]
    ]
    other = "another text" if model.images is None else "another image"
    print("\n".join(report.write(reading, near, other=other, at=at, out=out)))
    print(f"{out}/explain.md, explain.json, explain.png")
    return 0


if __name__ == "__main__":
    run_main(main, interrupted="its files are written at the end")
