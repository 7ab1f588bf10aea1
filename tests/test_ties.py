"""Which of several candidates is chosen that score exactly alike."""

from __future__ import annotations

import numpy as np
import pytest

from blindvalm_jax.tasks import ties, topics, visual
from blindvalm_jax.tasks.ties import Ties


@pytest.mark.parametrize("rule", ["set_of_ids", "set_of_tuples"])
def test_a_set_decides_as_a_sorted_dictionary_of_it_does(rule: Ties) -> None:
    rng = np.random.default_rng(0)
    unlike_the_list = 0
    for _ in range(200):
        count = int(rng.integers(2, 15))
        numbers = rng.choice(49408, 2 * count, replace=False).tolist()
        lengths = rng.integers(1, 3, count) if rule == "set_of_tuples" else np.ones(count, int)
        ids = [tuple(numbers[2 * i : 2 * i + n]) for i, n in enumerate(lengths)]
        scores = rng.integers(0, 3, count).astype(float)
        filled = set()
        for own in ids:
            filled.add(own if rule == "set_of_tuples" else own[0])
        keys = [own if rule == "set_of_tuples" else own[0] for own in ids]
        values = {key: scores[keys.index(key)] for key in filled}
        first = sorted(values.items(), key=lambda pair: pair[1], reverse=True)[0][0]
        [place] = ties.chosen(rule, [scores], [ids])
        assert keys[place] == first
        unlike_the_list += place != np.argmax(scores)
    assert unlike_the_list > 20


def test_a_tie_repeats_the_answer_before() -> None:
    ids = [[(1,), (2,)]] * 5
    scores = [np.array(row) for row in ([0.5, 0.5], [0.1, 0.9], [0.5, 0.5], [0.9, 0.1], [0.2, 0.2])]
    assert ties.chosen("previous", scores, ids).tolist() == [0, 1, 1, 0, 0]
    assert ties.chosen("first", scores, ids).tolist() == [0, 1, 0, 0, 0]


def test_every_published_task_says_what_a_tie_does() -> None:
    for task in (*visual.TASKS, *topics.TASKS):
        if task.published is not None:
            rule = task.published.ties
            named = ties.BY_PREVIOUS if rule == "previous" else ties.BY_SET
            assert (rule == "first") != (named in task.published.faults), task.name
