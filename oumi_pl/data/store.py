"""Tokenized examples on disk, memory-mapped: written once, found again by what they were made from."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from oumi_pl.errors import UserError
from oumi_pl.types import Example, Segment

REPORT = "report.json"
TABLES = "tables.npz"
FIELD = "field "
"""Begins the names of tables that are fields of the examples."""


def cache_root() -> Path:
    """Where tokenized data are kept: `$OUMI_PL_CACHE`, else `oumi_pl` in the user's cache directory.

    Raises:
        UserError: no such directory can be made.
    """
    explicit = os.environ.get("OUMI_PL_CACHE")
    root = Path(explicit or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "oumi_pl").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"can't make the cache directory {root}: {error.strerror}"
        raise UserError(f"{reason}; name another one with the environment variable OUMI_PL_CACHE") from error
    return root


def cache_key(*parts: Any) -> str:
    """Hash of everything the examples depend on; equal parts give equal keys in every process."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ExampleStore:
    """Examples of one source as flat arrays: ids and loss mask `[tokens]`, offsets `[examples + 1]`, the segments.

    targets: tokens that carry loss, per example, `[examples]` int64. fields: the numbers of the examples by name,
    `[examples]` float64 each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.report: dict[str, Any] = json.loads((directory / REPORT).read_text())
        self.input_ids = _mapped(directory / "input_ids.bin", np.int32)
        self.loss_mask = _mapped(directory / "loss_mask.bin", np.bool_)
        with np.load(directory / TABLES) as tables:
            self.offsets = tables["offsets"]
            self.targets = tables["targets"]
            self._segments = tables["segments"]  # [segments, 3], as in `Segment`
            self._first_segment = tables["first_segment"]  # [examples + 1]
            self.fields = {name[len(FIELD) :]: tables[name] for name in tables.files if name.startswith(FIELD)}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        start, stop = self.offsets[index], self.offsets[index + 1]
        first, end = self._first_segment[index], self._first_segment[index + 1]
        return Example(
            np.asarray(self.input_ids[start:stop]),
            np.asarray(self.loss_mask[start:stop]),
            tuple(Segment(*values) for values in self._segments[first:end].tolist()),
            {name: values[index].item() for name, values in self.fields.items()},
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, `[examples]`."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest path: of a pair, those of the prompt and the longer response."""
        return int((self._segments[:, 0] + self._segments[:, 2]).max(initial=0))

    @property
    def shared(self) -> int:
        """Tokens that are spared by computing what several paths share once."""
        return int(self._segments[:, 2].sum())

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss, over all examples."""
        return int(self.targets.sum())


def write_store(directory: Path, examples: Iterable[Example], report: dict[str, Any]) -> ExampleStore:
    """Writes examples beside their final place and moves them there in one step, so that a kill leaves no half store.

    What an example says of how it was made is only counted in the report, which is written last: whatever consuming
    `examples` adds to it is kept.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        lengths: list[int] = []
        targets: list[int] = []
        segments: list[Segment] = []
        counts: list[int] = []
        fields: dict[str, list[float]] = {}
        with (half / "input_ids.bin").open("wb") as ids, (half / "loss_mask.bin").open("wb") as masks:
            for example in examples:
                if not lengths:
                    fields = {name: [] for name in example.fields}
                elif example.fields.keys() != fields.keys():
                    raise ValueError(f"an example with the fields {[*example.fields]} among others with {[*fields]}")
                for name, values in fields.items():
                    values.append(example.fields[name])
                ids.write(example.input_ids.astype(np.int32, copy=False).tobytes())
                masks.write(example.loss_mask.astype(np.bool_, copy=False).tobytes())
                lengths.append(len(example.input_ids))
                targets.append(example.target_tokens)
                segments += example.segments
                counts.append(len(example.segments))
        tables: dict[str, Any] = {
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            "targets": np.array(targets, dtype=np.int64),
            "segments": np.array(segments, dtype=np.int64).reshape(-1, 3),
            "first_segment": np.cumsum([0, *counts], dtype=np.int64),
        }
        tables |= {FIELD + name: np.array(values, dtype=np.float64) for name, values in fields.items()}
        np.savez(half / TABLES, **tables)
        (half / REPORT).write_text(json.dumps(report, indent=1))
        half.chmod(0o755)
        try:
            half.rename(directory)
        except OSError:
            # another process made the same store meanwhile, and its content is the same by construction
            if not (directory / REPORT).exists():
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return ExampleStore(directory)


def _mapped(file: Path, dtype: type) -> np.ndarray:
    if file.stat().st_size == 0:  # an empty file can't be mapped
        return np.empty(0, dtype=dtype)
    return cast("np.ndarray", np.memmap(file, dtype=dtype, mode="r"))
