r"""Goes on with texts.

    python -m blindvalm_jax.generate --workdir=RUN|--checkpoint=DIR|--hf=DIR --prompt=TEXT \
        [--max_new_tokens=64] [--temperature=0] [--samples=1] [--stop=STRING] [--stream]

--prompt and --stop may be given several times; --prompts is a file with a prompt on each line.
Temperature 0 takes the likeliest token; else --top_k, --top_p and --min_p cut off unlikely ones.
What is drawn depends on --seed, the prompt and the number of the sample alone.

--interactive reads prompts from standard input, and shows for each token how much attention went
to the grounding where it was predicted: as shades where the terminal has colours, else as a table.
Ctrl-C ends a text, at the prompt the program.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from blindvalm_jax import files, model_flags, terminal
from blindvalm_jax.command_line import run_main
from blindvalm_jax.decoding import generation, shading, tower_text
from blindvalm_jax.decoding.generation import Generation, Generator, Taken, Written
from blindvalm_jax.decoding.record import Record
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.errors import UserError
from blindvalm_jax.trained import TrainedModel

flags.adopt_module_key_flags(model_flags)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to go on with")
_PROMPTS = flags.DEFINE_string("prompts", "", "instead: file with a prompt on each line")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "instead: prompts from standard input")
_NEW = flags.DEFINE_integer("max_new_tokens", 64, "tokens of a text at most")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "divides logits; 0: the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 0, "only the k likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "only the likeliest with this probability; 1: all")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "only those with this share of the likeliest's; 0: all")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "on tokens that are there; 1: none")
_SAMPLES = flags.DEFINE_integer("samples", 1, "texts of each prompt")
_STOP = flags.DEFINE_multi_string("stop", [], "a text ends before this string")
_SEED = flags.DEFINE_integer("seed", 0, "of all draws", lower_bound=0, upper_bound=2**31 - 1)
_START = flags.DEFINE_bool("start", True, "the end-of-text token in front, as in training")
_STREAM = flags.DEFINE_bool("stream", False, "print the text as it comes")
_JSON = flags.DEFINE_string("json", "", "also write texts and tokens to this file")


def main(argv: Sequence[str]) -> int:
    """Writes behind the prompts that the command line names."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a --flag (see --help)")
    terminal.take_any_text()
    named = model_flags.named()
    settings = Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_PENALTY.value,
    )
    prompts = _prompts()
    generation.check(settings, _NEW.value, samples=_SAMPLES.value, stop=_stops())
    out = _out()
    trained = model_flags.load(rows_over_devices=False)
    slow = tower_text.whole_only(trained)
    if slow:
        print(f"note: {slow}: each token reads the whole text again, slowly", file=sys.stderr)
    if _INTERACTIVE.value:
        _interact(trained, settings)
        return 0
    generator = Generator(
        trained,
        settings=settings,
        start=_START.value,
        block=1 if _STREAM.value else generation.BLOCK,
    )
    about = {
        "model": named.path,
        "step": trained.step,
        "dtype": named.dtype,
        "seed": _SEED.value,
        "start": _START.value,
        "samples": _SAMPLES.value,
        "stop": _stops(),
        "max_new_tokens": _NEW.value,
    }
    with Record(out, {**about, **dataclasses.asdict(settings)}) as record:
        if _STREAM.value:
            found = _stream(generator, prompts[0], record)
        else:
            found = _write(generator, prompts, record)
    _report(found)
    return 0


def _stops() -> list[str]:
    """The stop strings of the command line."""
    return [terminal.argument(stop) for stop in _STOP.value]


def _out() -> Path | None:
    """The file of --json.

    Raises:
      UserError: it cannot be written.
    """
    if not _JSON.value:
        return None
    out = Path(_JSON.value).expanduser()
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--json={out} must be a file in a directory that is there")
    files.check_writable(out.parent, what=f"--json={out}")
    return out


def _prompts() -> list[str]:
    """The prompts of the command line.

    Raises:
      UserError: there is none, they come from two places, or do not go with other flags.
    """
    places = (_PROMPT, _PROMPTS, _INTERACTIVE)
    given = [f"--{flag.name}" for flag in places if flag.value]
    if len(given) != 1:
        raise UserError(
            "give --prompt=TEXT, --prompts=FILE or --interactive, got "
            + (" and ".join(given) or "none")
        )
    if _INTERACTIVE.value:
        others = (_SAMPLES.value > 1, "samples"), (_JSON.value, "json"), (_STREAM.value, "stream")
        named = [f"--{name}" for value, name in others if value]
        if named:
            raise UserError(
                f"--interactive shows one text of each prompt as it comes, and writes no file: "
                f"leave out {' and '.join(named)}"
            )
        if sys.stdin is None:
            raise UserError("--interactive reads standard input, which is closed")
        return []
    prompts = [terminal.argument(prompt) for prompt in _PROMPT.value]
    if _PROMPTS.value:
        try:
            path = Path(_PROMPTS.value).expanduser()
            text = path.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise UserError(f"--prompts={_PROMPTS.value} cannot be read: {error}") from error
        prompts = [line for line in text.split("\n") if line.strip()]
        if not prompts:
            raise UserError(f"--prompts={_PROMPTS.value} holds no line with a prompt")
    if _STREAM.value and len(prompts) * _SAMPLES.value > 1:
        raise UserError(
            f"--stream prints one text as it comes, got {len(prompts)} prompts x {_SAMPLES.value} "
            "samples: leave it out"
        )
    return prompts


def _write(generator: Generator, prompts: Sequence[str], record: Record) -> Generation:
    """All texts, printed when they are done."""
    several = len(prompts) * _SAMPLES.value > 1
    numbers = itertools.count()

    def show(texts: Sequence[Written]) -> None:
        for text in texts:
            if several:
                prompt = next(numbers) // _SAMPLES.value + 1
                print(f"=== prompt {prompt}, sample {text.sample + 1}")
            print(text.prompt + text.text, flush=True)
        record.add(texts)

    return generator.generate(
        prompts,
        max_new_tokens=_NEW.value,
        samples=_SAMPLES.value,
        stop=_stops(),
        seed=_SEED.value,
        on_texts=show,
    )


def _stream(generator: Generator, prompt: str, record: Record) -> Generation:
    """One text, printed as it comes."""
    print(prompt, end="", flush=True)
    try:
        return generator.generate(
            [prompt],
            max_new_tokens=_NEW.value,
            stop=_stops(),
            seed=_SEED.value,
            on_token=lambda taken: print(taken.text, end="", flush=True),
            on_texts=record.add,
        )
    finally:
        print(flush=True)


def _interact(trained: TrainedModel, settings: Sampling) -> None:
    """Goes on with each line of standard input."""
    fused = trained.model.decoder.fusion_layers
    generator = Generator(
        trained, settings=settings, start=_START.value, probe=bool(fused), block=1
    )
    generator.check(_NEW.value, stop=_stops())
    if not fused:
        print("note: this model has no fusion layers: no grounding to show", file=sys.stderr)
    colours = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    shades = bool(fused) and colours and "NO_COLOR" not in os.environ
    table = shading.Table(trained.tokenizer, fused) if fused and not shades else None
    if sys.stdin.isatty():
        print("a prompt on each line; Ctrl-C ends a text, Ctrl-D all", file=sys.stderr)
    if shades:
        print(f"attention to the grounding, at least: {shading.legend()}", file=sys.stderr)

    def go_on(prompt: str, check: Callable[[], None]) -> None:
        shaded = shading.Shades(trained.tokenizer) if shades else None

        def show(taken: Taken) -> None:
            check()
            if table is not None:
                print(table.line(taken), flush=True)
            else:
                print(taken.text if shaded is None else shaded.add(taken), end="", flush=True)

        print(prompt if table is None else table.head(), end="\n" if table else "", flush=True)
        found = generator.generate(
            [prompt], max_new_tokens=_NEW.value, stop=_stops(), seed=_SEED.value, on_token=show
        )
        text = found.texts[0]
        if table is not None:
            print(prompt + text.text, flush=True)
        else:
            print("" if shaded is None else shaded.rest(text.ending), flush=True)
        _report(found)

    terminal.each_line(go_on)


def _report(found: Generation) -> None:
    """How fast it was, on standard error."""
    first = len(found.texts)
    line = f"{first} first tokens in {found.prompt_seconds:.2f} s with compilation"
    if found.counted:
        speed = found.counted / found.seconds
        line += f"; {found.counted} others in {found.seconds:.2f} s, {speed:.1f} tokens/s"
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run_main(
        main,
        interrupted="the texts that were done are printed, and with --json in its file",
        inputs=model_flags.INPUTS,
    )
