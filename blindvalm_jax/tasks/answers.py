"""From questions to answers: candidates behind prompts are scored, and one is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import ties
from blindvalm_jax.tasks.questions import Question
from blindvalm_jax.tasks.scoring import Row, Scorer
from blindvalm_jax.tasks.task import Protocol, Score


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model answers to each question.

    scores: of each question's candidates, under the protocol's first way of scoring. chosen: place
    of the candidate with the highest, under each of its ways (see `ties`). right: whether that
    counts. cut: how many prompts lost their beginning, as they were longer than the model's
    positions.
    """

    scores: list[np.ndarray]
    chosen: dict[Score, np.ndarray]
    right: dict[Score, np.ndarray]
    cut: int


def answer(
    scorer: Scorer, tokenizer: Tokenizer, protocol: Protocol, questions: Sequence[Question]
) -> Answers:
    """Scores every candidate of every question.

    Raises:
      UserError: a candidate has no tokens; see `Scorer`.
    """
    ids = {
        word: tokenizer.encode_lm(f" {word}")
        for word in sorted({word for question in questions for word in question.candidates})
    }
    for word, found in ids.items():
        if not len(found):
            raise UserError(f"the candidate {word!r} has no tokens")
    candidates = [[ids[word] for word in question.candidates] for question in questions]
    prompts = [
        _prompt(scorer, tokenizer, protocol, question.prompt, longest=max(map(len, own)))
        for question, own in zip(questions, candidates, strict=True)
    ]
    behind = [prompt.ids for prompt in prompts]
    if "continuation" in protocol.scores:
        given = scorer.continuations(behind, candidates)
        tokens = [[one.log_p for one in own] for own in given]
    else:
        tokens = _one_distribution(scorer, prompts, candidates)
    scores: dict[Score, list[np.ndarray]] = {
        way: [np.array([_reduced(way, values) for values in own]) for own in tokens]
        for way in protocol.scores
    }
    numbers = {word: _own_ids(tokenizer, found) for word, found in ids.items()}
    keys = [[numbers[word] for word in question.candidates] for question in questions]
    chosen = {way: ties.chosen(protocol.ties, of, keys) for way, of in scores.items()}
    said = {word: _spelled(tokenizer, found) for word, found in ids.items()}
    right = {
        way: np.array(
            [
                place == question.answer
                and (not protocol.spelled or said[word := question.candidates[place]] == word)
                for place, question in zip(of, questions, strict=True)
            ]
        )
        for way, of in chosen.items()
    }
    return Answers(scores[protocol.scores[0]], chosen, right, sum(prompt.cut for prompt in prompts))


class _Prompt(NamedTuple):
    """Its ids, and whether they lost their beginning."""

    ids: np.ndarray
    cut: bool


def _prompt(
    scorer: Scorer, tokenizer: Tokenizer, protocol: Protocol, prompt: str, *, longest: int
) -> _Prompt:
    """A prompt with room for `longest` tokens behind it, of which the last is not read.

    A blank at its end belongs to the candidate's first token, as in running text. Tokens that do
    not fit are cut off in front.
    """
    ids = tokenizer.encode_lm(prompt.rstrip())
    whole = np.append(tokenizer.eos_id, ids).astype(np.int32) if protocol.start else ids
    room = max(scorer.longest - longest + 1, 1) if scorer.longest else len(whole)
    return _Prompt(whole[-room:], cut=len(whole) > room)


def _one_distribution(
    scorer: Scorer, prompts: Sequence[_Prompt], candidates: Sequence[Sequence[np.ndarray]]
) -> list[list[np.ndarray]]:
    """Log probability of every token of every candidate as the one right behind the prompt."""
    rows = [
        Row(prompt.ids, np.array([len(prompt.ids) - 1]), np.concatenate(own)[None])
        for prompt, own in zip(prompts, candidates, strict=True)
    ]
    return [
        np.split(values[0], np.cumsum([len(ids) for ids in own])[:-1])
        for values, own in zip(
            scorer.log_probabilities(rows, title="next token"), candidates, strict=True
        )
    ]


def _reduced(way: Score, log_p: np.ndarray) -> float:
    """See `Score`."""
    total = float(np.sum(log_p, dtype=np.float64))
    if way in ("continuation", "sum"):
        return total
    if way == "mean":
        return total / len(log_p)
    if way == "sum_from_one":
        return 1.0 + total
    if way == "mean_from_one":
        return (1.0 + total) / len(log_p)
    return float(np.mean(np.exp(np.asarray(log_p, np.float64))))


def _spelled(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """What the tokens of a candidate spell."""
    return tokenizer.decode(_own_ids(tokenizer, ids)).strip()


def _own_ids(tokenizer: Tokenizer, ids: np.ndarray) -> tuple[int, ...]:
    """Ids of the language model as the tokenizer itself numbers them."""
    return tuple(int(token) - tokenizer.lm_offset for token in ids)
