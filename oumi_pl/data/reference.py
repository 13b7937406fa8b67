"""Reference log-probabilities on disk, computed once, in chunks, so that a killed run loses at most one chunk.

A chunk's file ends in a checksum. Files of older versions have none, and are read without a check.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from oumi_pl.data.store import cache_key, cache_root
from oumi_pl.runs import checksums
from oumi_pl.runs.files import write
from oumi_pl.runs.folders import remove_abandoned
from oumi_pl.terminal.text import echo

CHUNK = 512
"""Examples per file."""
MADE_FROM = "made_from.json"
MARK = b"crc1"
"""Comes before the checksum at the end of a file."""


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
        """Size of all chunks on disk, with their checksums."""
        return 4 * self.width * int(self.offsets[-1]) + self.chunks * (len(MARK) + 4)

    def examples(self, chunk: int) -> range:
        """The examples of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.offsets) - 1))

    def missing(self) -> list[int]:
        """The chunks whose files are missing or damaged. Reads all of them once per process."""
        return [chunk for chunk in range(self.chunks) if not self._is_whole(chunk)]

    def write(self, chunk: int, logps: np.ndarray) -> None:
        """Writes the values of a chunk's targets, in order of examples, in one step."""
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.directory)
        if not (self.directory / MADE_FROM).exists():
            write(self.directory / MADE_FROM, json.dumps(self.parts, indent=1, default=str) + "\n")
        content = logps.astype(np.float32, copy=False).tobytes()
        write(self._file(chunk), content + MARK + zlib.crc32(content).to_bytes(4, "little"))
        self._chunks.pop(chunk, None)

    def logps(self, examples: Iterable[int]) -> np.ndarray:
        """Reads the values of some examples' targets, in order, `[targets]` float32; `[targets, width]` if wider."""
        parts = [self._of(example) for example in examples]
        values = np.concatenate(parts) if parts else np.empty((0, self.width), dtype=np.float32)
        return values[:, 0] if self.width == 1 else values

    def _of(self, example: int) -> np.ndarray:
        chunk = example // CHUNK
        if chunk not in self._chunks:
            shape = (self._size(chunk) // (4 * self.width), self.width)
            self._chunks[chunk] = np.memmap(self._file(chunk), dtype=np.float32, mode="r", shape=shape)
        start = self.offsets[chunk * CHUNK]
        return self._chunks[chunk][self.offsets[example] - start : self.offsets[example + 1] - start]

    def _file(self, chunk: int) -> Path:
        return self.directory / f"{chunk:06}.bin"

    def _size(self, chunk: int) -> int:
        """Bytes of a chunk's values."""
        ids = self.examples(chunk)
        return 4 * self.width * int(self.offsets[ids.stop] - self.offsets[ids.start])

    def _is_whole(self, chunk: int) -> bool:
        file, size = self._file(chunk), self._size(chunk)
        if not file.is_file():
            return False
        if file.stat().st_size == size:  # of an older version
            return True
        key = checksums.stamp(file)
        if key in _whole:
            return True
        content = file.read_bytes()
        checksum = MARK + zlib.crc32(memoryview(content)[:size]).to_bytes(4, "little")
        if len(content) != size + len(checksum):
            return False
        if content[size:] != checksum:
            echo(f"{file} is damaged; its reference log-probabilities are computed again", file=sys.stderr)
            return False
        _whole.add(key)
        return True


_whole: set[Any] = set()
"""Files that this process has checked, as by `checksums.stamp`."""
