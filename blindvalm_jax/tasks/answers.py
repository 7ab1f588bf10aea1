"""From questions to answers: candidates behind prompts are scored, and one is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
      UserError: a candidate has no tokens.
    """
    ids = {
        word: tokenizer.encode_lm(f" {word}")
        for word in sorted({word for question in questions for word in question.candidates})
    }
    for word, found in ids.items():
        if not len(found):
            raise UserError(f"the candidate {word!r} has no tokens")
    prompts = [_prompt(tokenizer, protocol, question.prompt) for question in questions]
    candidates = [[ids[word] for word in question.candidates] for question in questions]
    room = scorer.longest
    if room:
        cut = [
            prompt[-max(room - max(map(len, own)) + 1, 1) :]
            for prompt, own in zip(prompts, candidates, strict=True)
        ]
    else:
        cut = prompts
    shortened = sum(len(a) < len(b) for a, b in zip(cut, prompts, strict=True))
    tokens = _token_scores(scorer, cut, candidates, ahead="continuation" in protocol.scores)
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
    return Answers(scores[protocol.scores[0]], chosen, right, shortened)


def _prompt(tokenizer: Tokenizer, protocol: Protocol, prompt: str) -> np.ndarray:
    """Its ids; a blank at the end belongs to the candidate's first token, as in running text."""
    ids = tokenizer.encode_lm(prompt.rstrip())
    return np.append(tokenizer.eos_id, ids).astype(np.int32) if protocol.start else ids


def _token_scores(
    scorer: Scorer,
    prompts: Sequence[np.ndarray],
    candidates: Sequence[Sequence[np.ndarray]],
    *,
    ahead: bool,
) -> list[list[np.ndarray]]:
    """Log probability of every token of every candidate.

    ahead: the second token and later ones behind those before them; else all behind the prompt.
    """
    rows = []
    for prompt, own in zip(prompts, candidates, strict=True):
        wanted = np.concatenate([ids[:1] if ahead else ids for ids in own])
        rows.append(Row(prompt, np.array([len(prompt) - 1]), wanted[None]))
    behind = scorer.log_probabilities(rows, title="next token")
    if not ahead:
        return [
            np.split(values[0], np.cumsum([len(ids) for ids in own])[:-1])
            for values, own in zip(behind, candidates, strict=True)
        ]
    found = [
        [values[0, [place]] for place in range(len(own))]
        for values, own in zip(behind, candidates, strict=True)
    ]
    longer = [
        (number, place)
        for number, own in enumerate(candidates)
        for place, ids in enumerate(own)
        if len(ids) > 1
    ]
    rest = []
    for number, place in longer:
        prompt, ids = prompts[number], candidates[number][place]
        at = len(prompt) + np.arange(len(ids) - 1)
        rest.append(Row(np.concatenate([prompt, ids[:-1]]), at, ids[1:, None]))
    for (number, place), values in zip(
        longer, scorer.log_probabilities(rest, title="further tokens") if rest else [], strict=True
    ):
        found[number][place] = np.concatenate([found[number][place], values[:, 0]])
    return found


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
