"""Tokens a second of generation: from caches, without, and by transformers, paired.

One process per system; they take turns, one generation of --new_tokens behind --prompt_tokens of
each row, greedily. gpt2: from caches; whole: the same model, each token from a full forward pass
(measured on --whole_tokens, at the lengths of the first ones); transformers: its `generate` in
torch on the same parameters, where installed, on as many threads; token and eos: BLIND-VALM, the
same decoder with a text tower that reads along. All in fp32; a turn includes reading the prompt.
The first three have to choose the same tokens.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import turns, valm_systems
from blindvalm_jax.command_line import run_main
from blindvalm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from blindvalm_jax.config import DecoderConfig
    from blindvalm_jax.trained import TrainedModel

_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Rows that are generated at once.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 32, "Tokens of a prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens behind a prompt.", lower_bound=1)
_WHOLE = flags.DEFINE_integer("whole_tokens", 4, "The same for the system whole.", lower_bound=1)

SYSTEMS = ("gpt2", "whole", "transformers", "token", "eos")
_POSITIONS = 1024  # GPT-2's
_SAME = SYSTEMS[:3]  # of which the tokens are compared

# A generation of so many rows: the tokens behind the prompts.
Run = Callable[[int], "np.ndarray"]


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    batches = turns.whole_numbers(_BATCHES.value, "batches")
    valm_systems.shape(valm_systems.DECODER.value, "decoder")
    valm_systems.shape(valm_systems.TOWER.value, "tower")
    if _PROMPT.value + _NEW.value - 1 > _POSITIONS:
        raise UserError(
            f"--prompt_tokens={_PROMPT.value} and --new_tokens={_NEW.value} exceed the decoder's "
            f"{_POSITIONS} positions: ask for fewer"
        )
    names = [name for name in SYSTEMS if name != "transformers" or _torch()]
    if "transformers" not in names:
        print("transformers is left out: torch is not installed (pip install -e '.[torch]')")
    workers = {name: _start(name) for name in names}
    rows = []
    print(
        f"{'rows':>4} {'system':12} {'tokens/s':>9} {'range':>15} {'time / gpt2':>11} {'range':>11}"
    )
    try:
        about = {name: worker.ask("ready") for name, worker in workers.items()}
        for batch in batches:
            rows.append({"rows": batch, **_measured(batch, workers)})
            _print(rows[-1])
    finally:
        for worker in workers.values():
            worker.stop()
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **about["gpt2"],
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "settings": {
            "prompt_tokens": _PROMPT.value,
            "new_tokens": _NEW.value,
            "whole_tokens": _new("whole"),
            "decoder": valm_systems.DECODER.value,
            "tower": valm_systems.TOWER.value,
            "dtype": "float32",
            "threads": os.cpu_count(),
            "rounds": turns.ROUNDS.value,
        },
    }
    print(json.dumps(machine))
    return {"batches": rows, **machine}


def _torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _start(name: str) -> turns.Worker:
    values = {
        "system": name,
        "prompt_tokens": _PROMPT.value,
        "new_tokens": _new(name),
        "decoder": ",".join(valm_systems.DECODER.value),
        "tower": ",".join(valm_systems.TOWER.value),
    }
    return turns.Worker(["benchmarks.generate", *(f"--{k}={v}" for k, v in values.items())])


def _new(name: str) -> int:
    return min(_WHOLE.value, _NEW.value) if name == "whole" else _NEW.value


def _measured(batch: int, workers: dict[str, turns.Worker]) -> dict[str, Any]:
    """Numbers of all systems at a batch size, and whether those of one model agree."""
    chosen = {name: worker.ask(f"tokens {batch}")["tokens"] for name, worker in workers.items()}
    same = {
        name: [row[: _new(name)] for row in chosen["gpt2"]] == chosen[name]
        for name in _SAME[1:]
        if name in chosen
    }
    taken = turns.take(
        {
            name: functools.partial(worker.seconds, f"seconds {batch}")
            for name, worker in workers.items()
        },
        title=f"{batch} rows",
    )
    each = {name: [x / _new(name) for x in seconds] for name, seconds in taken.items()}
    systems = {}
    for name, seconds in each.items():
        systems[name] = {
            "tokens_per_second": batch / statistics.median(seconds),
            "tokens_per_second_low": batch / max(seconds),
            "tokens_per_second_high": batch / min(seconds),
            **turns.over(seconds, each["gpt2"]),
        }
    different = len({token for row in chosen["gpt2"] for token in row})
    return {"same_tokens": same, "different_tokens": different, "systems": systems}


def _print(row: dict[str, Any]) -> None:
    for name, found in row["systems"].items():
        speed = f"{found['tokens_per_second_low']:.1f}-{found['tokens_per_second_high']:.1f}"
        spread = f"{found['ratio_low']:.2f}-{found['ratio_high']:.2f}"
        print(
            f"{row['rows']:4} {name:12} {found['tokens_per_second']:9.1f} {speed:>15} "
            f"{found['ratio']:11.2f} {spread:>11}",
            flush=True,
        )
    for name, same in row["same_tokens"].items():
        if not same:
            print(f"{name} has chosen other tokens than gpt2", flush=True)


def worker(system: str) -> None:
    """Holds a system; answers "ready", and "tokens N" and "seconds N" for N rows."""
    import jax

    from blindvalm_jax import runs

    generate = _transformers() if system == "transformers" else _ours(system)

    def seconds(batch: int) -> dict[str, Any]:
        begin = time.perf_counter()
        generate(batch)
        return {"seconds": time.perf_counter() - begin}

    for line in sys.stdin:
        word, *batch = line.split()
        if word == "ready":
            versions = {**runs.versions(), **_their_versions()}
            answer = {"device": jax.devices()[0].device_kind, "versions": versions}
        elif word == "tokens":
            answer = {"tokens": generate(int(batch[0])).tolist()}
        else:
            answer = seconds(int(batch[0]))
        print(json.dumps(answer), flush=True)


def _their_versions() -> dict[str, str]:
    names = ("torch", "transformers") if _torch() else ()
    return {name: importlib.metadata.version(name) for name in names}


def _ours(system: str) -> Run:
    """A system of ours."""
    import jax
    import numpy as np

    from blindvalm_jax.decoding import sampling
    from blindvalm_jax.decoding.generation import BLOCK
    from blindvalm_jax.decoding.rows import CachedRows, Draw, WholeRows

    trained = _model(system)
    draw = Draw(sampling.Sampling(), _not_drawn(), -1, 0)  # no token ends a text
    rows = WholeRows(trained, draw) if system == "whole" else CachedRows(trained, draw, block=BLOCK)

    def generate(batch: int) -> np.ndarray:
        new = _NEW.value
        keys = jax.random.split(jax.random.key(0), batch)
        tokens = rows.begin(list(_prompts(batch)), 1, keys, new).tokens
        while tokens.shape[1] < new:
            more = rows.go_on(np.zeros(batch, bool)).tokens
            tokens = np.concatenate([tokens, more], axis=1)
        return tokens[:, :new]

    return generate


def _transformers() -> Run:
    """transformers' GPT-2, in the same process with the same parameters."""
    import jax
    import numpy as np
    import torch
    import transformers

    from blindvalm_jax.interop import gpt2

    torch.set_num_threads(os.cpu_count() or 1)
    trained = _model("gpt2")
    config = trained.model.decoder.config
    with tempfile.TemporaryDirectory() as place:
        size = turns.VOCABULARY
        directory = Path(place) / "gpt2"
        params = jax.tree.map(np.asarray, trained.params)
        gpt2.export_gpt2(params, config, vocab_size=size, directory=directory)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    options = transformers.GenerationConfig(
        max_new_tokens=_NEW.value,
        do_sample=False,
        suppress_tokens=np.flatnonzero(_not_drawn()).tolist(),
        pad_token_id=0,
    )

    def generate(batch: int) -> np.ndarray:
        prompts = torch.from_numpy(_prompts(batch).astype(np.int64))
        found = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=options
        )
        return found[:, prompts.shape[1] :].numpy()

    return generate


def _prompts(batch: int) -> np.ndarray:
    """Random tokens, int32 [batch, prompt_tokens]."""
    import numpy as np

    size = (batch, _PROMPT.value)
    return np.random.default_rng(1).integers(4, turns.VOCABULARY - 2, size).astype(np.int32)


def _not_drawn() -> np.ndarray:
    """bool [V]: all that is no text, the end of a text too, so that all texts are of one length."""
    import numpy as np

    never = np.zeros(turns.VOCABULARY, bool)
    never[[0, 1, 2, 3, -2, -1]] = True
    return never


def _model(system: str) -> TrainedModel:
    """Random parameters, large enough that the tokens differ, as if they were read from a run."""
    import jax

    from blindvalm_jax import config, partitioning
    from blindvalm_jax.config import FusionConfig, MeshConfig
    from blindvalm_jax.models.clip import TextTower
    from blindvalm_jax.models.decoder import Decoder
    from blindvalm_jax.objectives.language_model import Model
    from blindvalm_jax.trained import TrainedModel

    shape = _decoder()
    tower, frozen = None, {}
    fused: dict[str, Any] = {}
    if system in ("token", "eos"):
        layers, width, heads = valm_systems.shape(valm_systems.TOWER.value, "tower")
        tower = TextTower(turns.tower_shape(layers, width, heads, projection=width))
        fused = {"fusion_layers": (max(shape.layers - 2, 0),), "memory_width": width}
        frozen["tower"] = _random(functools.partial(_tower_init, tower))
    decoder = Decoder(shape, FusionConfig(), turns.VOCABULARY, **fused)
    model = Model(decoder, tower, readout="eos" if system == "eos" else "token")
    return TrainedModel(
        model=model,
        params=_random(model.init),
        frozen=frozen,
        tokenizer=_tokenizer(),
        tower_tokenizer=None,
        settings=config.parse(config.default()),
        step=0,
        mesh=partitioning.make_mesh(MeshConfig(), jax.devices()[:1]),
        images=None,
    )


def _decoder() -> DecoderConfig:
    """A GPT-2 as OpenAI's, which transformers can hold."""
    from blindvalm_jax.config import DecoderConfig

    layers, width, heads = valm_systems.shape(valm_systems.DECODER.value, "decoder")
    return DecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        positions="learned",
        max_positions=_POSITIONS,
        embedding_scale="none",
        activation="gelu_tanh",
        init="gpt2",
        dropout=0.0,
        attention_dropout=0.0,
        fusion_layers=(),
    )


def _tower_init(tower: Any, key: Any) -> Any:
    import jax.numpy as jnp

    tokens, starts = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return tower.init(key, tokens, starts, readout="token")["params"]


def _random(init: Callable[[Any], Any]) -> Any:
    """Norms 1, biases 0, embeddings of tokens 0.02 and of positions 0.1, matrices 0.05."""
    import flax.linen as nn
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    spread = {"scale": 0.0, "bias": 0.0, "kv_bias": 0.0, "wte": 0.02, "wpe": 0.1}

    def value(path: Any, x: Any) -> Any:
        name = path[-1].key
        scale = spread.get(name, 0.05)
        drawn = rng.standard_normal(x.shape, np.float32) * np.float32(scale)
        if name == "wte":
            drawn[turns.VOCABULARY :] = 0
        return jax.numpy.asarray(drawn + np.float32(name == "scale"))

    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(value, shapes)


def _tokenizer() -> Any:
    """CLIP's format and number of tokens; each token above the bytes is a pair of them."""
    from blindvalm_jax.data import tokenizer_files
    from blindvalm_jax.data.clip_bpe import ClipTokenizer

    letters = [tokenizer_files.byte_symbols()[byte] for byte in tokenizer_files.openai_order()]
    pieces = [*letters, *(f"{letter}{tokenizer_files.WORD_END}" for letter in letters)]
    room = turns.VOCABULARY - ClipTokenizer.lm_offset - len(pieces) - 2
    merges = list(itertools.islice(itertools.product(letters, letters), room))
    pieces += ["".join(pair) for pair in merges] + list(tokenizer_files.CLIP_SPECIALS)
    return ClipTokenizer({piece: index for index, piece in enumerate(pieces)}, merges)


if __name__ == "__main__":
    _SYSTEM = flags.DEFINE_enum("system", "gpt2", SYSTEMS, "System of this process.")
    run_main(lambda _: worker(_SYSTEM.value))
