"""Tasks of language modelling: WikiText, LAMBADA, Penn Treebank, and any text of the user's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from blindvalm_jax.data import corpora
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import passages, readers
from blindvalm_jax.tasks.asked import Asked, Windows
from blindvalm_jax.tasks.last_word import LastWordTask
from blindvalm_jax.tasks.passages import BlockFiles, Texts
from blindvalm_jax.tasks.perplexity import AskedTexts, TextTask
from blindvalm_jax.tasks.task import Group

# What is a document of one's own texts: text:GLOB and file:GLOB.
KINDS = {
    "text": "as in training: text between blank lines, or a line of .jsonl",
    "file": "the whole file",
}
_WIKITEXT = "WikiText-103 (Merity et al. 2017), test split"
_LAMBADA = "LAMBADA (Paperno et al. 2016), test split"
_HYPHEN = " @-@ "  # of WikiText; the reference's text has hyphens, and other quotes
_WIKITEXT_VALID = BlockFiles(
    ids=("wikitext103_valid_clipbpe.npz",),
    texts=("wikitext103_valid_clipbpe.decoded.txt", "wikitext103_valid.txt"),
    unlike=_HYPHEN,
)


def _wikitext(*files: str) -> Texts:
    return Texts(files, passages.articles, "article, from a line ` = Title = ` to the next")


def _treebank(file: str) -> Texts:
    return Texts((file,), passages.whole, "the whole file")


_RAW_VALID = _wikitext(
    "wiki.valid.raw", "wikitext103_valid.txt", "wikitext103_valid_clipbpe.decoded.txt"
)
_LAMBADA_FILES = ("lambada_test.jsonl", "lambada_test_plain_text.txt")
TASKS: tuple[TextTask | LastWordTask, ...] = (
    TextTask(
        name="wikitext103",
        group="lm",
        source=_WIKITEXT,
        corrected=_wikitext(
            "wiki.test.raw", "wikitext103_test.txt", "wikitext103_test_clipbpe.decoded.txt"
        ),
        valid=_RAW_VALID,
        blocks=BlockFiles(
            ids=("wikitext103_test_clipbpe.npz",),
            texts=("wikitext103_test_clipbpe.decoded.txt", "wikitext103_test.txt"),
            unlike=_HYPHEN,
        ),
        blocks_valid=_WIKITEXT_VALID,
    ),
    TextTask(
        name="lambada_perplexity",
        group="lm",
        source=_LAMBADA,
        corrected=Texts(_LAMBADA_FILES, passages.stripped_passages, "passage"),
        valid=_RAW_VALID,
        blocks=BlockFiles(
            ids=("lambada_test_clipbpe.npz",),
            texts=("lambada_test_plain_text.txt",),
            change=passages.straight_quotes,
        ),
        blocks_valid=_WIKITEXT_VALID,
    ),
    LastWordTask(
        name="lambada",
        group="lm",
        source=_LAMBADA,
        texts=Texts(_LAMBADA_FILES, passages.stripped_passages, "passage"),
    ),
    TextTask(
        name="wikitext2",
        group=None,
        source="WikiText-2 (Merity et al. 2017), test split with <unk>",
        corrected=_wikitext("wikitext2_test.txt", "wiki.test.tokens"),
        valid=_wikitext("wikitext2_valid.txt", "wiki.valid.tokens"),
    ),
    TextTask(
        name="ptb",
        group=None,
        source="Penn Treebank (Marcus et al. 1993) as of Mikolov et al. 2010, test split",
        corrected=_treebank("ptb_test.txt"),
        valid=_treebank("ptb_valid.txt"),
    ),
)


@dataclasses.dataclass(frozen=True)
class OwnTexts:
    """Texts of the user's: a path or glob, under one of `KINDS`; named: by how much of the path."""

    kind: str
    pattern: str
    named: int = 1
    group: Group | None = None

    @property
    def name(self) -> str:
        """Of its entry and its file: the kind, and the last parts of the path."""
        parts = "/".join(Path(self.pattern).parts[-self.named :])
        return f"{self.kind}_{re.sub(r'[^A-Za-z0-9.]+', '_', parts)}"

    def open(self, protocol: str, cut: Windows) -> Asked:
        """The texts, read; they lie where the pattern says.

        Raises:
          UserError: the protocol is not `corrected`, or see `passages.of_pattern`.
        """
        if protocol != "corrected":
            raise UserError(f"{self.name} was not published with a protocol: take corrected")
        found = passages.of_pattern(self.pattern, by_file=self.kind == "file")
        file = readers.read_files(corpora.find_files([self.pattern]), self.pattern)
        return AskedTexts(self.name, self.pattern, KINDS[self.kind], found, None, cut, file)


def told_apart(asked: Sequence[OwnTexts]) -> list[OwnTexts]:
    """Texts whose names are alike are called by as much of their paths as tells them apart.

    Raises:
      UserError: nothing in their paths does.
    """
    found = list(asked)
    while alike := {x.name for x in found if [y.name for y in found].count(x.name) > 1}:
        more = [dataclasses.replace(x, named=x.named + (x.name in alike)) for x in found]
        if {x.name for x in more} == {x.name for x in found}:
            raise UserError(f"two texts are called {alike.pop()}: evaluate one of them alone")
        found = more
    return found


def own(name: str) -> OwnTexts | None:
    """The task of a name such as text:PATH, None of another name."""
    kind, colon, pattern = name.partition(":")
    return OwnTexts(kind, pattern) if colon and kind in KINDS and pattern else None
