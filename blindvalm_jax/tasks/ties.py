"""Which candidate is chosen, also where several score exactly alike.

The reference's scripts put the scores of candidates into a dictionary in the order in which a set
of their tokens yields them, and take the first of the highest. Sets of whole numbers, or of tuples
of them, do not depend on a hash seed: their order follows from the numbers (CPython 3.8 and later).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

# What decides between candidates that score exactly alike.
#   first:         the place in the list of candidates
#   set_of_ids:    the order of a set of their first tokens' ids
#   set_of_tuples: the order of a set of their tuples of ids
#   previous:      the answer to the question before; the first question's is the first candidate
Ties = Literal["first", "set_of_ids", "set_of_tuples", "previous"]
BY_SET = "a tie goes to the candidate that a Python set of token ids yields first"
BY_PREVIOUS = "a tie repeats the answer to the text before"


def chosen(
    ties: Ties, scores: Sequence[np.ndarray], ids: Sequence[Sequence[tuple[int, ...]]]
) -> np.ndarray:
    """Place of the highest score among each question's candidates, in the order of questions.

    ids: the tokens of every candidate, numbered from 0 as their tokenizer does.
    """
    found: list[int] = []
    for values, own in zip(scores, ids, strict=True):
        best = np.flatnonzero(values == np.max(values)).tolist()
        if len(best) > 1 and ties == "previous" and found:
            best = found[-1:]
        elif len(best) > 1 and ties.startswith("set"):
            best = [place for place in _in_a_set(own, ties) if place in best]
        found.append(best[0])
    return np.array(found)


def _in_a_set(ids: Sequence[tuple[int, ...]], ties: Ties) -> list[int]:
    """Places of candidates in the order in which a set yields them that was filled in theirs."""
    if ties == "set_of_ids":
        first = [own[0] for own in ids]
        return [first.index(number) for number in set(first)]
    return [ids.index(own) for own in set(ids)]
