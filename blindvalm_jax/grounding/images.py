"""VALM's grounding in a run: the images nearest to what the text tower says at each token.

On the devices (exact), on the host (FAISS), or found ahead of time; see `retrieval`,
`faiss_engine` and `neighbours`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from blindvalm_jax.config import GroundingConfig
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import retrieval
from blindvalm_jax.grounding.faiss_engine import PAPER_NPROBE, FaissEngine
from blindvalm_jax.grounding.index import ImageIndex, Vectors
from blindvalm_jax.grounding.neighbours import Neighbours
from blindvalm_jax.grounding.retrieval import Engine, Search


class Images:
    """An image index as the grounding of a run.

    search: what the model asks in a step, None where neighbours come with the batch.
    """

    def __init__(self, grounding: GroundingConfig, mesh: Mesh, *, text_sha256: str) -> None:
        """Opens the index; text_sha256: of the tower that asks it.

        Raises:
          UserError: there is no index, it is another CLIP's, or it cannot be searched as settings
            say.
        """
        self.index = ImageIndex.open(Path(grounding.index).expanduser())
        self.index.check_tower(text_sha256)
        self._grounding, self._mesh, self._text_sha256 = grounding, mesh, text_sha256
        count, neighbours = self.index.manifest.count, grounding.neighbours
        if neighbours > count:
            raise UserError(
                f"grounding.neighbours is {neighbours}, the index {grounding.index} holds {count}"
            )
        self.search: Search | None = None
        self._faiss: dict[str, Any] | None = None
        self._prepared: dict[str, Any] | None = None
        if grounding.search == "exact":
            self.search = on_devices(mesh, count=count, neighbours=neighbours)
        elif grounding.search == "faiss":
            engine = FaissEngine(
                self.index,
                neighbours=neighbours,
                nprobe=grounding.nprobe or PAPER_NPROBE,
                candidates=grounding.rerank,
                lists=grounding.lists,
                code_bytes=grounding.code_bytes,
            )
            self.search = on_host(engine)
            self._faiss = {**engine.settings, "searched_by": engine.version}

    @property
    def compared(self) -> int:
        """Vectors that each token is compared with in the step."""
        return self.index.manifest.count if self._grounding.search == "exact" else 0

    def abstract_keys(self) -> dict[str, Any]:
        """Shape and sharding of the vectors where they are searched on the devices, by name."""
        if self._grounding.search != "exact":
            return {}
        manifest = self.index.manifest
        shape = (retrieval.padded_rows(manifest.count, self._mesh), manifest.width)
        placed = retrieval.keys_sharding(self._mesh)
        dtype = jnp.dtype(self._grounding.dtype)
        return {"index": jax.ShapeDtypeStruct(shape, dtype, sharding=placed)}

    def place_keys(self) -> dict[str, Any]:
        """The vectors on the devices, as `abstract_keys` describes them."""
        dtype = jnp.dtype(self._grounding.dtype)
        return {
            name: retrieval.place_keys(self.index.vectors, self._mesh, dtype=dtype)
            for name in self.abstract_keys()
        }

    def windows(self, windows: Windows, split: str) -> Windows | PreparedWindows:
        """The windows, with the vectors of their neighbours where those were found ahead of time.

        Raises:
          UserError: the neighbours are of other windows, another index, tower, readout or K.
        """
        grounding = self._grounding
        if grounding.search != "prepared":
            return windows
        found = Neighbours.open(Path(grounding.prepared).expanduser() / split)
        found.check(
            windows=windows,
            index=self.index,
            text_sha256=self._text_sha256,
            readout=grounding.readout,
            neighbours=grounding.neighbours,
        )
        if split == "train":
            directory = str(found.directory.resolve())
            self._prepared = {"directory": directory, "key": found.manifest.key}
        return PreparedWindows(windows, found, self.index.vectors)

    def describe(self) -> dict[str, Any]:
        """What run.json says of the index and its search.

        faiss: of its index; prepared: of the neighbours trained on. None where there is none.
        """
        manifest, grounding = self.index.manifest, self._grounding
        return {
            "index": str(self.index.directory.resolve()),
            "key": manifest.key,
            "vectors": manifest.count,
            "neighbours": grounding.neighbours,
            "search": grounding.search,
            "faiss": self._faiss,
            "prepared": self._prepared,
        }


@dataclasses.dataclass(frozen=True)
class PreparedWindows:
    """Windows with the vectors of their neighbours: "features" [T, K, E]."""

    windows: Windows
    neighbours: Neighbours
    vectors: Vectors

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A window (see `Windows`)."""
        vectors = self.vectors.rows(self.neighbours[int(index)])
        return {**self.windows[index], "features": vectors.astype(self.vectors.dtype)}


def on_devices(mesh: Mesh, *, count: int, neighbours: int) -> Search:
    """Exact search inside the step, over `count` keys that lie on all devices."""

    def search(queries_BTE: Array, keys_ME: Array | None) -> Array:
        if keys_ME is None:
            raise ValueError("a search on the devices needs the keys there")
        batch, length, width = queries_BTE.shape
        found = retrieval.search(
            queries_BTE.reshape(-1, width), keys_ME, count=count, neighbours=neighbours, mesh=mesh
        )
        return found.vectors_QKE.reshape(batch, length, neighbours, width)

    return search


def on_host(engine: Engine) -> Search:
    """A search that leaves the step for the host and comes back with the vectors."""

    def search(queries_BTE: Array, keys_ME: Array | None) -> Array:
        batch, length, width = queries_BTE.shape
        shape = (batch, length, engine.neighbours, width)

        def ask(queries_BTE: Any) -> np.ndarray:
            queries_QE = np.asarray(queries_BTE, np.float32).reshape(-1, width)
            return np.asarray(engine.search(queries_QE).vectors_QKE, np.float32).reshape(shape)

        found = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.pure_callback(ask, found, queries_BTE)

    return search
