"""What was published, or logged by the authors, of models asked these tasks.

Three sources, kept apart. A: what an index of papers lists as the best of BLIND-VALM (arXiv
2409.11148); B: the same of VALM (arXiv 2205.10178), in part as the former paper may have measured
it; C: the evaluation logs in the authors' repository (paulaonta/Blind-VaLM at c807024). The tables
of the papers themselves are not here. All hold for the published protocol and CLIP's BPE.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Source = Literal["A", "B", "C"]
SOURCES: dict[Source, str] = {
    "A": "an index of papers on BLIND-VALM (arXiv 2409.11148), the best of its models",
    "B": "the same index on VALM (arXiv 2205.10178); which paper's row a figure is from is unsure",
    "C": "the evaluation logs in the authors' repository; names of models are inferred from those "
    "of checkpoints",
}
# The models of C, in the order of its columns.
LOGGED = (
    "GPT-2 123M",
    "BLIND 124M",
    "BLIND 124M, more updates",
    "BLIND 355M",
    "BLIND 775M",
    "GPT-2 772M",
)
# What is wrong with figures whatever the task.
FAULTS = (
    "several figures of a model are one checkpoint's on other days; BLIND 775M's differ by up to "
    "10 points, and no CLIP is as wide as it is",
    "the logs hold no evaluation of a VALM",
    "perplexities are of lower-cased lines in tokens of CLIP's BPE: other tokenizers' differ",
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """What was printed of a model: accuracies in percent, or perplexities (`PERPLEXITIES`).

    Sizes are as printed, half of what they are. way: how candidates were scored, where that is not
    the first way of the task's protocol.
    """

    model: str
    values: tuple[float, ...]
    source: Source
    way: str = ""


# Task, or task/way -> a column for each of `LOGGED`; values of several days between slashes.
_LOGS = {
    "memory_colors": "37.1 47.2 45.97 47.6 27.62/31.6 38.02",
    "memory_colors_valm": "36.09 43.73 - - - -",
    "color_terms": "35.47 46.37 48.72 48.93 37.61/27.56 36.32",
    "color_terms_valm": "26.5 37.82 - - - -",
    "vicomte_color_all": "20.08 22.6 20.51 24.09 25.51/24.07 25.61",
    "vicomte_color_all_alt": "5.2 4.7 4.75 4.73 5.4/5.13 4.48",
    "vicomte_color_single": "20.75 22.96 20.24 25.28 25.06/24.6 25.17",
    "vicomte_color_single_alt": "5.61 5.5 5.67 5.73 6.07/6.12 5.5",
    "shapeit": "31.19 38.01 42.33 41.94 42.73/40.89 38.53",
    "shapeit/sum_from_one": "31.98 37.09 39.32 42.33 41.81/40.89 36.83",
    "shapeit_p0": "29.36 42.75 44.95 44.22 42.02/41.65 37.06",
    "shapeit_p0/sum_from_one": "28.62 40.92 40.92 41.47 40.92/40 35.41",
    "shapeit_p2": "30.58 39.45 43.63 43.83 40.16/37.82 37.92",
    "shapeit_p2/sum_from_one": "30.38 38.02 39.76 42 40.88/35.37 37",
    "relative_size": "25.77 25.72 25.38 25.45 25.44/25.14 25.33",
    "relative_size_than": "24.88 25.13 25.27 24.27 25.09/25.02 25.72",
    "vicomte_size": "- 25.64 25.59 25.77 25.47/25.17 25.41",
    "vicomte_size_than": "24.43 24.75 24.77 23.65 24.98/25.22 24.93",
    "tnwit_size": "26 25.82 25.79 25.86 25.5/25.52 25.5",
    "tnwit_size_than": "25.04 24.52 25 24 24.86/24.94 23.48",
    "tnwit_height": "26 25.32 25.92 25.32 25.37/25.17 25.05",
    "tnwit_height_than": "25 25 25 25 25 25",
    "sst2": "- 60.63 44.66 59 61.95 61.76",
    "mpqa": "38.45 71.65 78.1 55.65 51.4 41.95",
    "mpqa_all": "38.73 72.45/72.47 78.92 56.36 47.3 42.22",
    "agnews": "45.33 44.97 50.44 48.28 40.15/41.12 49.44",
    "dbpedia": "72.07 73.65 74.42 70.57 73.34/71.85 70.26",
    "lambada": "38.79 39.06 39.05 45.08 43.9/43.74 47.18",
    "wikitext103": "44.48 43.44/43.46/48.63 40.93/44.35/40.95 33.95/35.93 34.06/34.62 33.49",
    "lambada_perplexity": "46.18 45.78 43.83 37.63 35.64/35.99 35.23",
}
PERPLEXITIES = ("wikitext103", "lambada_perplexity")
_LISTED: dict[str, tuple[Figure, ...]] = {
    "memory_colors": (
        Figure("BLIND-VALM", (47.6,), "A"),
        Figure("VALM", (47.09,), "B"),
    ),
    "memory_colors_valm": (Figure("VALM", (58.6,), "B"),),
    "color_terms_valm": (Figure("VALM", (52.7,), "B"),),
    "vicomte_shape_all": (Figure("VALM", (62.8,), "B"),),
    "sst2": (Figure("BLIND-VALM", (59.0,), "A"), Figure("VALM", (44.66,), "B")),
    "mpqa": (Figure("BLIND-VALM", (78.1,), "A"), Figure("VALM", (67.95,), "B")),
    "agnews": (Figure("BLIND-VALM", (50.44,), "A"), Figure("VALM", (41.63,), "B")),
    "dbpedia": (Figure("BLIND-VALM", (74.42,), "A"),),
    "size_pairs_legacy": (Figure("VALM", (85.0,), "B"),),
    "lambada": (Figure("BLIND-VALM", (45.08,), "A"), Figure("VALM", (35.61,), "B")),
    "wikitext103": (Figure("BLIND-VALM", (33.95,), "A"),),
}


def of(task: str) -> tuple[Figure, ...]:
    """All figures of a task."""
    found = []
    for key, row in _LOGS.items():
        name, _, way = key.partition("/")
        for model, cell in zip(LOGGED, row.split(), strict=True):
            if name == task and cell != "-":
                values = tuple(float(value) for value in cell.split("/"))
                found.append(Figure(model, values, "C", way))
    return (*found, *_LISTED.get(task, ()))
