"""A model of ours as one of lm-evaluation-harness."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from blindvalm_jax import partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data.byte_level_bpe import END_OF_TEXT
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.decoding.generation import Generator
from blindvalm_jax.errors import UserError
from blindvalm_jax.lm_eval import requests as asking
from blindvalm_jax.lm_eval.requests import Tokens
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.tasks.scoring import Scorer

NAME = "blindvalm"
_TOGETHER = 16  # texts that a device continues at once
_SEEDS = 1 << 31
_log = logging.getLogger(__name__)
_FIELDS = {field.name for field in dataclasses.fields(NamedModel)}


@register_model(NAME)
class BlindValm(TemplateLM):
    """Scores and continues texts with a model of ours, over all devices.

    Where a row has an end, what is cut off in front is the harness's own choice, as for its `hf`;
    so is how contexts and continuations become tokens, and which windows a long text is read in.
    """

    def __init__(
        self,
        *,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        tokens_at_once: int = 4096,
        seed: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **named: Any,
    ) -> None:
        """Reads the model.

        named: fields of `NamedModel`. add_bos_token: the end-of-text token in front of every text,
        as in training, and a token of it as the harness's `hf` counts; None: in front of contexts
        for all but hf, which goes without it as the harness's `hf` does. max_length: tokens of a
        row, None: the model's positions, or without such any number, in windows of the training
        length where a whole text is scored. tokens_at_once: of a batch; the harness's batch sizes
        and device are not used. seed: of all draws, None: what the harness's own --seed makes it.

        Raises:
          UserError: an unknown argument or a value that is none of it, or see `NamedModel.load`.
        """
        super().__init__()
        numbers = {"tokens_at_once": tokens_at_once}
        if max_length is not None:
            numbers["max_length"] = max_length
        _check(named, add_bos_token=add_bos_token, numbers=numbers, seed=seed)
        self._seed = seed_of_numpy() if seed is None else seed
        name = NamedModel(**named)
        model = name.load(mesh=partitioning.make_mesh(MeshConfig()))
        self._model, self._tokenizer = model, model.tokenizer
        self._scorer = Scorer(model, tokens_at_once=tokens_at_once)
        positions = self._scorer.longest or None
        if max_length is not None and positions is not None and max_length > positions:
            raise UserError(f"max_length={max_length}: the model has {positions} positions")
        self._limit = positions if max_length is None else max_length
        self.max_length = self._limit or model.settings.data.sequence_length
        self._drawn: collections.Counter[tuple[bytes, str]] = collections.Counter()
        self._bos = not name.hf if add_bos_token is None else bool(add_bos_token)
        self._bos_counts = bool(add_bos_token)
        _log.info(
            "%s: %s the end-of-text token in front, rows of up to %s tokens, %d tokens at once, "
            "draws of seed %d; batch_size and device are not used",
            name.path,
            "with" if self._bos else "without",
            self._limit or "any number of",
            tokens_at_once,
            self._seed,
        )

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness asks for before it applies a chat template: there is none."""
        _refuse_chat()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a text: no model of ours knows any."""
        _refuse_chat()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; a literal `<|endoftext|>` is the token that separates documents.

        With CLIP's tokenizer too, where it would be a token that no training text gives.

        add_special_tokens: with the end-of-text token in front; None: as the model is asked, but
        none in front of another.
        """
        tokenizer, end = self._tokenizer, self.eot_token_id
        literal = tokenizer.token_to_id(END_OF_TEXT)
        ids = [
            end if token == literal else token + tokenizer.lm_offset
            for token in tokenizer.encode(string)
        ]
        front = add_special_tokens
        if front is None:
            front = self._bos and ids[:1] != [end]
        return [end, *ids] if front else ids

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows."""
        windows: list[Tokens] = []
        owner: list[int] = []
        for place, (text,) in enumerate(request.args for request in requests):
            own = utils.get_rolling_token_windows(
                token_list=self.tok_encode(
                    text, add_special_tokens=None if self._bos_counts else False
                ),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in own]
            windows += parts
            owner += [place] * len(parts)
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        sums = np.bincount(owner, weights=values, minlength=len(requests))
        found = sums.astype(float).tolist()  # of no window at all they would be integers
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], **_: Any
    ) -> list[tuple[float, bool]]:
        prompts = asking.prompts(requests, longest=self._limit)
        self._note_cut(
            [len(context) + len(ids) - 1 for _, context, ids in requests], most=self._limit
        )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scored = self._scorer.continuations(
            [prompt.ids for prompt in prompts],
            [prompt.continuations for prompt in prompts],
        )
        for prompt, all_tokens in zip(prompts, scored, strict=True):
            for place, tokens in zip(prompt.places, all_tokens, strict=True):
                total = float(tokens.log_p.sum(dtype=np.float64))
                found[place] = total, bool((tokens.log_p >= tokens.best).all())
        for (texts, *_ids), value in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, value)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to one of its stop strings, or the end of the text.

        Contexts with the same arguments are continued together, the longest first. One that comes
        again is another sample, also in later calls.

        Raises:
          UserError: an argument of the request is unknown, or leaves no room for the context.
        """
        found: list[str] = [""] * len(requests)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            arguments = json.dumps(request.args[1], sort_keys=True, default=repr)
            groups.setdefault(arguments, []).append(place)
        with Progress("generate", total=len(requests), unit="text") as progress:
            for arguments, own in groups.items():
                asked = asking.asked(requests[own[0]].args[1], self._tokenizer)
                prompts = self._contexts([contexts[place] for place in own], new=asked.new)
                numbers = [self._number(ids, arguments) for ids in prompts]
                for part, texts in self._written(prompts, numbers, asked):
                    for number, text in zip(part, texts, strict=True):
                        found[own[number]] = text
                        self.cache_hook.add_partial(
                            "generate_until", requests[own[number]].args, text
                        )
                    progress.advance(len(part))
        return found

    def _written(
        self, prompts: Sequence[np.ndarray], numbers: Sequence[int], asked: asking.Asked
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Which prompts, and what stands behind them; numbers: of their samples."""
        generator = Generator(self._model, settings=asked.sampling, start=False)
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        shards = partitioning.row_shards(self._model.mesh)
        size = min(shards * _TOGETHER, len(order) + -len(order) % shards)
        for first in range(0, len(order), size):
            part = order[first : first + size]
            filled = [*part, *part[-1:] * (size - len(part))]  # one size, compiled once
            done = generator.generate(
                [prompts[place] for place in filled],
                max_new_tokens=asked.new,
                numbers=[numbers[place] for place in filled],
                stop=asked.stop,
                seed=self._seed,
            )
            yield part, [written.text for written in done.texts[: len(part)]]

    def _contexts(self, contexts: Sequence[list[int]], *, new: int) -> list[np.ndarray]:
        """Contexts with room for `new` tokens behind them, where rows have an end."""
        if self._limit is None:
            return [np.array(ids, np.int32) for ids in contexts]
        room = self._limit - new
        if room < 1:
            raise UserError(
                f"max_gen_toks={new} leaves no room for a context in max_length={self._limit}: "
                "ask for fewer, --gen_kwargs max_gen_toks=N"
            )
        self._note_cut([len(ids) for ids in contexts], most=room)
        return [np.array(ids[-room:], np.int32) for ids in contexts]

    def _number(self, ids: np.ndarray, arguments: str) -> int:
        """How often the same was asked before."""
        asked = ids.tobytes(), arguments
        self._drawn[asked] += 1
        return self._drawn[asked] - 1

    def _note_cut(self, lengths: Sequence[int], *, most: int | None) -> None:
        """Says how many contexts are longer than a row."""
        cut = 0 if most is None else sum(length > most for length in lengths)
        if cut:
            _log.warning(
                "%d of %d contexts lose their beginning: rows have up to %s tokens",
                cut,
                len(lengths),
                self._limit,
            )


def seed_of_numpy() -> int:
    """A seed of numpy's global generator, which the harness's --seed seeds; it is left as it is."""
    generator = np.random.RandomState()
    generator.set_state(np.random.get_state())
    return int(generator.randint(_SEEDS))


def _refuse_chat() -> NoReturn:
    raise UserError("these models have no chat template: leave out --apply_chat_template")


def _check(
    named: Mapping[str, Any], *, add_bos_token: Any, numbers: Mapping[str, Any], seed: Any
) -> None:
    """Refuses unknown arguments, and values that are none of theirs; numbers: of tokens."""
    unknown = sorted(set(named) - _FIELDS)
    if unknown:
        raise UserError(
            f"--model_args has {', '.join(unknown)}; {NAME} knows add_bos_token, max_length, "
            f"tokens_at_once, seed, {', '.join(sorted(_FIELDS))}"
        )
    if add_bos_token is not None and not isinstance(add_bos_token, bool):
        raise UserError(f"add_bos_token={add_bos_token}: expected true or false")
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value}: expected a number of tokens, 1 or more")
    if seed is not None and (type(seed) is not int or not 0 <= seed < _SEEDS):
        raise UserError(f"seed={seed}: expected a whole number from 0 to {_SEEDS - 1}")
