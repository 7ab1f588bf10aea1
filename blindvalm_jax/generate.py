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

import numpy as np
from absl import flags

from blindvalm_jax import files, model_flags
from blindvalm_jax.decoding import generation
from blindvalm_jax.decoding.generation import Generation, Generator, Written
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.errors import UserError, print_error, run_main
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
    named = model_flags.named()
    settings = Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_PENALTY.value,
    )
    prompts = _prompts()
    generation.check(settings, _NEW.value, samples=_SAMPLES.value, stop=_STOP.value)
    out = None if not _JSON.value else Path(_JSON.value).expanduser()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--json={out} must be a file in a directory that is there")
    if out is not None:
        files.check_writable(out.parent, what=f"--json={out}")
    trained = model_flags.load(rows_over_devices=False)
    slow = generation.whole_only(trained)
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
    found = _stream(generator, prompts[0]) if _STREAM.value else _write(generator, prompts)
    _report(found)
    if out is not None:
        about = {
            "model": named.path,
            "step": trained.step,
            "dtype": named.dtype,
            "seed": _SEED.value,
            "start": _START.value,
            "samples": _SAMPLES.value,
            "stop": _STOP.value,
            "max_new_tokens": _NEW.value,
        }
        _save(out, found, {**about, **dataclasses.asdict(settings)})
    return 0


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
        return []
    prompts = _PROMPT.value
    if _PROMPTS.value:
        try:
            text = Path(_PROMPTS.value).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
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


def _write(generator: Generator, prompts: Sequence[str]) -> Generation:
    """All texts, printed when they are done."""
    several = len(prompts) * _SAMPLES.value > 1
    numbers = itertools.count()

    def show(text: Written) -> None:
        if several:
            prompt = next(numbers) // _SAMPLES.value + 1
            print(f"=== prompt {prompt}, sample {text.sample + 1}")
        print(text.prompt + text.text, flush=True)

    return generator.generate(
        prompts,
        max_new_tokens=_NEW.value,
        samples=_SAMPLES.value,
        stop=_STOP.value,
        seed=_SEED.value,
        on_text=show,
    )


def _stream(generator: Generator, prompt: str) -> Generation:
    """One text, printed as it comes."""
    print(prompt, end="", flush=True)
    found = generator.generate(
        [prompt],
        max_new_tokens=_NEW.value,
        stop=_STOP.value,
        seed=_SEED.value,
        on_token=lambda row, text, share: print(text, end="", flush=True),
    )
    print()
    return found


def _interact(trained: TrainedModel, settings: Sampling) -> None:
    """Goes on with each line of standard input."""
    fused = trained.model.decoder.fusion_layers
    generator = Generator(
        trained, settings=settings, start=_START.value, probe=bool(fused), block=1
    )
    generator.check(_NEW.value, stop=_STOP.value)
    if not fused:
        print("note: this model has no fusion layers: no grounding to show", file=sys.stderr)
    colours = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    shades = bool(fused) and colours and "NO_COLOR" not in os.environ
    table = bool(fused) and not shades
    if sys.stdin.isatty():
        print("a prompt on each line; Ctrl-C ends a text, Ctrl-D all", file=sys.stderr)
    if shades:
        legend = "".join(_shaded(f" {share:.2f} ", share) for share, _ in _SHADES)
        print(f"attention to the grounding, at least: {legend}", file=sys.stderr)

    def show(row: int, text: str, share: np.ndarray | None) -> None:
        if share is None:
            print(text, end="", flush=True)
        elif shades:
            print(_shaded(text, float(share.mean())), end="", flush=True)
        else:
            print(f"{text!r:24}" + "".join(f"{value:10.4f}" for value in share), flush=True)

    def go_on(prompt: str) -> None:
        if table:
            print(f"{'token':24}" + "".join(f"{f'layer {layer}':>10}" for layer in fused))
        else:
            print(prompt, end="", flush=True)
        found = generator.generate(
            [prompt],
            max_new_tokens=_NEW.value,
            stop=_STOP.value,
            seed=_SEED.value,
            on_token=show,
        )
        print(f"{prompt}{found.texts[0].text}" if table else "", flush=True)
        _report(found)

    _each_line(go_on)


def _each_line(go_on: Callable[[str], None]) -> None:
    """Calls it with every line of standard input; Ctrl-C ends a text, at the prompt the program."""
    try:
        for line in sys.stdin:
            try:
                go_on(line.rstrip("\n"))
            except UserError as error:
                print_error(str(error))
            except KeyboardInterrupt:
                print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)


# Least share, and a background of the 256 colours of terminals.
_SHADES = ((0.05, 230), (0.1, 229), (0.2, 222), (0.4, 215), (0.6, 208))


def _shaded(text: str, share: float) -> str:
    """The text on a background that is the stronger the larger the share; 0 to 1."""
    colours = [colour for least, colour in _SHADES if share >= least]
    return f"\x1b[30;48;5;{colours[-1]}m{text}\x1b[0m" if colours and text else text


def _report(found: Generation) -> None:
    """How fast it was, on standard error."""
    first = len(found.texts)
    line = f"{first} first tokens in {found.prompt_seconds:.2f} s with compilation"
    if found.counted:
        speed = found.counted / found.seconds
        line += f"; {found.counted} others in {found.seconds:.2f} s, {speed:.1f} tokens/s"
    print(line, file=sys.stderr)


def _save(out: Path, found: Generation, about: dict[str, object]) -> None:
    texts = []
    for text in found.texts:
        values = dataclasses.asdict(text)
        del values["shares"]
        texts.append(values)
    files.write_json(out, {**about, "texts": texts})


if __name__ == "__main__":
    run_main(main)
