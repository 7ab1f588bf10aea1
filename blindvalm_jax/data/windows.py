"""Random access to the windows that `prepare` wrote."""

from __future__ import annotations

import bisect
import collections
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from blindvalm_jax.data import manifest
from blindvalm_jax.data.replacing import DamagedRecord
from blindvalm_jax.errors import UserError

_MOST_OPEN = 32  # files of a process, per split: a large corpus has more shards than descriptors
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # windows are read in random order


class Windows:
    """Windows of one split; the files used last are open, in each process for itself.

    `windows[i]` is a dict: tokens int32 [T+1]; count, the number of real tokens in it;
    tower_tokens int32 [S], tower_starts bool [S]; in the aligned mode also tower_index int32 [T]
    (0: the start token, k: the k-th tower token). In the shared mode S = T.
    """

    def __init__(self, directory: str | Path, split: str, *, may_miss: bool = False) -> None:
        """Checks that the split of a directory is complete.

        may_miss: a shard that is missing or of the wrong size is no error before it is read.

        Raises:
          UserError: no finished directory, no such split or no window in it, a shard is missing or
            of the wrong size.
        """
        self.directory = Path(directory)
        self.manifest = manifest.load(self.directory)
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"no split {split!r} in {directory}; known: {known}")
        self.split = self.manifest.splits[split]
        if not self.split.windows:
            raise UserError(
                f"{directory} has no {split} windows: prepare it with eval_fraction > 0 or "
                "eval_files, or evaluate never (eval.every_steps=0)"
            )
        if not may_miss:
            self._check_files()
        tower = self.manifest.tower_record
        self._layout = manifest.record_dtype(
            sequence_length=self.manifest.sequence_length,
            vocab_size=self.manifest.tokenizer.vocab_size,
            tower_length=self.manifest.tower_length,
            tower_vocab_size=tower.tower_vocab_size,
        )
        self._table = manifest.tower_table(self.manifest.tokenizer)
        self._ends = list(itertools.accumulate(shard.windows for shard in self.split.shards))
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Windows of the split."""
        return self._ends[-1]

    def __repr__(self) -> str:
        """Directory and size, for Grain's messages."""
        return f"Windows({str(self.directory)!r}, {len(self)} windows)"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files, which no other process can use."""
        return {**self.__dict__, "_readers": collections.OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens nothing: files are opened on first use."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One window (see the class).

        Raises:
          DamagedRecord: its file is damaged, or not there.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        first = self._ends[number] - self.split.shards[number].windows
        record = self._record(number, index - first)
        length = self.manifest.sequence_length
        tokens = record["tokens"].astype(np.int32)
        found = {"tokens": tokens, "count": np.int32(record["count"])}
        if self.manifest.aligned:
            found["tower_tokens"] = record["tower_tokens"].astype(np.int32)
            found["tower_index"] = record["tower_index"].astype(np.int32)
        else:
            found["tower_tokens"] = self._table[tokens[:length]]
        size = len(found["tower_tokens"])
        bits = np.unpackbits(record["starts"], count=size, bitorder="little")
        found["tower_starts"] = bits.astype(bool)
        return found

    def _check_files(self) -> None:
        for shard in self.split.shards:
            path = self.directory / shard.file
            if not path.is_file():
                raise UserError(f"{path} is missing: delete {self.directory}, prepare again")
            if path.stat().st_size != shard.bytes:
                raise UserError(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {shard.bytes}: "
                    f"delete {self.directory}, prepare again"
                )

    def _record(self, number: int, place: int) -> Any:
        path = self.directory / self.split.shards[number].file
        try:
            content = self._reader(number, path).read([place])[0]
            return np.frombuffer(content, self._layout)[0]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DamagedRecord(
                f"{path} is damaged at window {place} of it ({reason}): delete "
                f"{self.directory}, prepare again"
            ) from error

    def _reader(self, number: int, path: Path) -> Any:
        with self._lock:
            reader = self._readers.pop(number, None)
            if reader is None:
                reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
            self._readers[number] = reader
            if len(self._readers) > _MOST_OPEN:
                # Not closed here, another thread may read from it: it closes with its last user.
                self._readers.popitem(last=False)
            return reader
