"""A model of ours as one of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from blindvalm_jax import partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data.workers import Progress
from blindvalm_jax.decoding.generation import Generator
from blindvalm_jax.errors import UserError
from blindvalm_jax.lm_eval import requests as asking
from blindvalm_jax.lm_eval.requests import Tokens
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.tasks.scoring import Scorer

NAME = "blindvalm"
_TOGETHER = 16  # texts that a device continues at once
_FIELDS = {field.name for field in dataclasses.fields(NamedModel)}


@register_model(NAME)
class BlindValm(TemplateLM):
    """Scores and continues texts with a model of ours, over all devices.

    Where a text is cut, how contexts and continuations become tokens and which windows a long text
    is read in are the harness's own choices, as for its `hf`.
    """

    def __init__(
        self,
        *,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        tokens_at_once: int = 4096,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **named: Any,
    ) -> None:
        """Reads the model.

        named: fields of `NamedModel`. add_bos_token: the end-of-text token in front of every text,
        as in training, and a token of it as the harness's `hf` counts; None: in front of contexts
        for all but hf, which goes without it as the harness's `hf` does. max_length: tokens a row,
        None: the model's positions, or without such the training length. tokens_at_once: of a
        batch; the harness's batch sizes and device are not used.

        Raises:
          UserError: an unknown argument or a value that is none of it, or see `NamedModel.load`.
        """
        super().__init__()
        numbers = {"tokens_at_once": tokens_at_once}
        if max_length is not None:
            numbers["max_length"] = max_length
        _check(named, add_bos_token=add_bos_token, numbers=numbers)
        name = NamedModel(**named)
        model = name.load(mesh=partitioning.make_mesh(MeshConfig()))
        self._model, self._tokenizer = model, model.tokenizer
        self._scorer = Scorer(model, tokens_at_once=tokens_at_once)
        longest = self._scorer.longest or model.settings.data.sequence_length
        if max_length is not None and self._scorer.longest and max_length > longest:
            raise UserError(f"max_length={max_length}: the model has {longest} positions")
        self.max_length = longest if max_length is None else max_length
        self._bos = not name.hf if add_bos_token is None else bool(add_bos_token)
        self._bos_counts = bool(add_bos_token)
        log = logging.getLogger(__name__)
        log.info(
            "%s: %s the end-of-text token in front, rows of up to %d tokens, %d tokens at once; "
            "batch_size and device are not used",
            name.path,
            "with" if self._bos else "without",
            self.max_length,
            tokens_at_once,
        )

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; a literal `<|endoftext|>` is that token.

        add_special_tokens: with the end-of-text token in front; None: as the model is asked, but
        none in front of another.
        """
        ids = [token + self._tokenizer.lm_offset for token in self._tokenizer.encode(string)]
        front = add_special_tokens
        if front is None:
            front = self._bos and ids[:1] != [self.eot_token_id]
        return [self.eot_token_id, *ids] if front else ids

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows."""
        windows: list[Tokens] = []
        counts = []
        for (text,) in (request.args for request in requests):
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
            counts.append(len(parts))
        values = np.array([value for value, _ in self._loglikelihood_tokens(windows)])
        return [float(part.sum()) for part in np.split(values, np.cumsum(counts)[:-1])]

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], **_: Any
    ) -> list[tuple[float, bool]]:
        prompts = asking.prompts(requests, longest=self.max_length)
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

        Contexts with the same arguments are continued together, the longest first.

        Raises:
          UserError: an argument of the request is unknown, or leaves no room for the context.
        """
        found: list[str] = [""] * len(requests)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        with Progress("generate", total=len(requests), unit="text") as progress:
            for own in groups.values():
                asked = asking.asked(requests[own[0]].args[1], self._tokenizer)
                room = self.max_length - asked.new
                if room < 1:
                    raise UserError(
                        f"max_gen_toks={asked.new} leaves no room for a context in "
                        f"max_length={self.max_length}: ask for fewer, --gen_kwargs max_gen_toks=N"
                    )
                generator = Generator(self._model, settings=asked.sampling, start=False)
                own.sort(key=lambda place: -len(contexts[place]))
                shards = partitioning.row_shards(self._model.mesh)
                for first in range(0, len(own), shards * _TOGETHER):
                    part = own[first : first + shards * _TOGETHER]
                    prompts = [np.array(contexts[place][-room:], np.int32) for place in part]
                    prompts += prompts[-1:] * (-len(prompts) % shards)
                    done = generator.generate(prompts, max_new_tokens=asked.new, stop=asked.stop)
                    for place, written in zip(part, done.texts, strict=False):
                        found[place] = written.text
                        self.cache_hook.add_partial(
                            "generate_until", requests[place].args, written.text
                        )
                    progress.advance(len(part))
        return found


def _check(named: Mapping[str, Any], *, add_bos_token: Any, numbers: Mapping[str, Any]) -> None:
    """Refuses unknown arguments, and values that are none of theirs; numbers: of tokens."""
    unknown = sorted(set(named) - _FIELDS)
    if unknown:
        raise UserError(
            f"--model_args has {', '.join(unknown)}; {NAME} knows add_bos_token, max_length, "
            f"tokens_at_once, {', '.join(sorted(_FIELDS))}"
        )
    if add_bos_token is not None and not isinstance(add_bos_token, bool):
        raise UserError(f"add_bos_token={add_bos_token}: expected true or false")
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value}: expected a number of tokens, 1 or more")
