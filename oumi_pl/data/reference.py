"""Reference log-probabilities on disk, computed once, in chunks, so that a killed run loses at most one chunk."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from oumi_pl.data.store import cache_key, cache_root

CHUNK = 512
"""Examples per file."""


class ReferenceLogps:
    """Log-probabilities of each example's targets, float32, in a cache folder named after all that they depend on.

    Args:
        parts: Everything that they depend on: the model, the examples, the precision.
        target_counts: Target tokens per example, `[examples]`.
        width: Values per target; more than 1 for the distributions of a teacher.
    """

    def __init__(self, parts: dict[str, Any], target_counts: np.ndarray, width: int = 1) -> None:
        self.directory = cache_root() / "reference" / cache_key(parts)
        self.parts = parts
        self.width = width
        self.offsets = np.concatenate([[0], np.cumsum(target_counts)])
        self._chunks: dict[int, np.ndarray] = {}

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-(len(self.offsets) - 1) // CHUNK)

    @property
    def bytes(self) -> int:
        """Size of all chunks on disk."""
        return 4 * self.width * int(self.offsets[-1])

    def examples(self, chunk: int) -> range:
        """The examples of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.offsets) - 1))

    def missing(self) -> list[int]:
        """The chunks whose files are missing, or do not have the right size."""
        return [chunk for chunk in range(self.chunks) if not self._is_whole(chunk)]

    def write(self, chunk: int, logps: np.ndarray) -> None:
        """Writes the values of a chunk's targets, in order of examples, in one step."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "made_from.json").write_text(json.dumps(self.parts, indent=1, default=str) + "\n")
        handle, half = tempfile.mkstemp(suffix=".half", dir=self.directory)
        with os.fdopen(handle, "wb") as out:
            out.write(logps.astype(np.float32, copy=False).tobytes())
            out.flush()
            os.fsync(out.fileno())
        Path(half).replace(self._file(chunk))

    def logps(self, examples: Iterable[int]) -> np.ndarray:
        """Reads the values of some examples' targets, in order, `[targets]` float32; `[targets, width]` if wider."""
        parts = [self._of(example) for example in examples]
        values = np.concatenate(parts) if parts else np.empty((0, self.width), dtype=np.float32)
        return values[:, 0] if self.width == 1 else values

    def _of(self, example: int) -> np.ndarray:
        chunk = example // CHUNK
        if chunk not in self._chunks:
            self._chunks[chunk] = np.memmap(self._file(chunk), dtype=np.float32, mode="r").reshape(-1, self.width)
        start = self.offsets[chunk * CHUNK]
        return self._chunks[chunk][self.offsets[example] - start : self.offsets[example + 1] - start]

    def _file(self, chunk: int) -> Path:
        return self.directory / f"{chunk:06}.bin"

    def _is_whole(self, chunk: int) -> bool:
        ids = self.examples(chunk)
        size = 4 * self.width * int(self.offsets[ids.stop] - self.offsets[ids.start])
        file = self._file(chunk)
        return file.is_file() and file.stat().st_size == size
