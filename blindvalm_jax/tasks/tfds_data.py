"""Tasks whose data are also in TensorFlow Datasets: read where they lie prepared, no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blindvalm_jax.data import corpora
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import topics
from blindvalm_jax.tasks.questions import Item


class Labelled(NamedTuple):
    """A data set of texts with classes: its name and split, the text's field, words of classes."""

    name: str
    split: str
    text: str
    words: Sequence[str]


# The test split of SST-2 has no labels there.
LABELLED: Mapping[str, Labelled] = {
    "sst2": Labelled("glue/sst2", "validation", "sentence", ("Negative", "Positive")),
    "agnews": Labelled("ag_news_subset", "test", "description", topics.AGNEWS),
}
LAMBADA = ("lambada", "test", "passage")


def items(task: str, directory: Path) -> tuple[str, list[Item]]:
    """Name with version and split, and the examples of a task of choices.

    Raises:
      UserError: the task is not among them, or see `examples`.
    """
    if task not in LABELLED:
        raise UserError(
            f"{task} is not read from --tfds_dir: name {', '.join(LABELLED)}, lambada or "
            "lambada_perplexity, or give files with --data"
        )
    of = LABELLED[task]
    source, found = examples(of.name, of.split, directory)
    labels = [int(example["label"]) for example in found]
    wrong = [label for label in labels if not 0 <= label < len(of.words)]
    if wrong:
        raise UserError(f"{source}: labels are 0 to {len(of.words) - 1}, got {wrong[0]}")
    return source, topics.numbered(
        (example[of.text].decode(), of.words[label])
        for example, label in zip(found, labels, strict=True)
    )


def passages(directory: Path) -> tuple[str, list[str]]:
    """Name with version and split, and the passages of LAMBADA.

    Raises:
      UserError: see `examples`.
    """
    name, split, field = LAMBADA
    source, found = examples(name, split, directory)
    return source, [example[field].decode().strip() for example in found]


def examples(name: str, split: str, directory: Path) -> tuple[str, list[dict[str, Any]]]:
    """Name with version and split, and all examples; nothing is downloaded or prepared.

    Raises:
      UserError: it is not prepared there as array_record, or has no such split.
    """
    # Imported here: it takes seconds, and most evaluations read files.
    import tensorflow_datasets as tfds

    lacking = UserError(
        f"TFDS {name} is not prepared as array_record in {directory}: prepare it elsewhere with "
        "file_format='array_record', or give files with --data"
    )
    try:
        builder = tfds.builder(name, data_dir=str(directory), file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError) as error:
        raise lacking from error
    if not builder.is_prepared():
        raise lacking
    _, found = corpora.open_tfds(name, split, str(directory))
    return f"TFDS {builder.info.full_name}, {split}", [found[n] for n in range(len(found))]
