"""Tokenized examples on disk, memory-mapped: written once, found again by what they were made from."""

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from oumi_pl.errors import UserError
from oumi_pl.types import Example

REPORT = "report.json"
KIND = "kind.json"
ADDED = "added.npz"

COUNTED_AT_ONCE = 4096
"""Examples whose targets are counted in one step: the whole mask as integers wouldn't fit into memory."""

_EXAMPLE_FIELDS = {field.name for field in fields(Example)}


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
    """Examples of one source as flat arrays: ids `[tokens]`, loss mask `[tokens]`, offsets `[examples + 1]`.

    The fields that a subclass of `Example` adds, numbers all, are arrays `[examples]` in `added`, by name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.report: dict[str, Any] = json.loads((directory / REPORT).read_text())
        self.input_ids = _mapped(directory / "input_ids.bin", np.int32)
        self.loss_mask = _mapped(directory / "loss_mask.bin", np.bool_)
        self.offsets = np.load(directory / "offsets.npy")
        kind = json.loads((directory / KIND).read_text())
        self.kind: type[Example] = getattr(importlib.import_module(kind["module"]), kind["name"])
        with np.load(directory / ADDED) as added:
            self.added: dict[str, np.ndarray] = dict(added)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        start, stop = self.offsets[index], self.offsets[index + 1]
        added = {name: values[index].item() for name, values in self.added.items()}
        return self.kind(np.asarray(self.input_ids[start:stop]), np.asarray(self.loss_mask[start:stop]), **added)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, `[examples]`."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Positions that the longest example needs: of a pair, those of the prompt and the longer response."""
        lengths = self.lengths
        if "rejected_start" in self.added:
            rejected = self.added["rejected_start"]
            lengths = lengths - np.minimum(rejected - self.added["chosen_start"], lengths - rejected)
        return int(lengths.max(initial=0))

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss, over all examples."""
        return int(np.count_nonzero(self.loss_mask))

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Tokens that carry loss, per example, `[examples]` int64."""
        counts = np.empty(len(self), dtype=np.int64)
        for first in range(0, len(self), COUNTED_AT_ONCE):
            borders = self.offsets[first : first + COUNTED_AT_ONCE + 1]
            targets = np.flatnonzero(self.loss_mask[borders[0] : borders[-1]])
            counts[first : first + COUNTED_AT_ONCE] = np.diff(np.searchsorted(targets, borders - borders[0]))
        return counts


def write_store(directory: Path, examples: Iterable[Example], report: dict[str, Any]) -> ExampleStore:
    """Writes examples beside their final place and moves them there in one step, so that a kill leaves no half store.

    Examples are all of one class, which the store gives back; of the fields of `Example` itself, those beside ids
    and mask are only counted in the report. `report` is written last: whatever consuming `examples` adds to it is kept.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        offsets: list[int] = [0]
        kind: type[Example] | None = None
        added: dict[str, list] = {}
        with (half / "input_ids.bin").open("wb") as ids, (half / "loss_mask.bin").open("wb") as masks:
            for example in examples:
                if kind is None:
                    kind = type(example)
                    added = {field.name: [] for field in fields(kind) if field.name not in _EXAMPLE_FIELDS}
                elif type(example) is not kind:
                    raise TypeError(f"a {type(example).__name__} among examples of class {kind.__name__}")
                for name, values in added.items():
                    values.append(getattr(example, name))
                ids.write(example.input_ids.astype(np.int32, copy=False).tobytes())
                masks.write(example.loss_mask.astype(np.bool_, copy=False).tobytes())
                offsets.append(offsets[-1] + len(example.input_ids))
        np.save(half / "offsets.npy", np.array(offsets, dtype=np.int64))
        columns: dict[str, Any] = {name: np.array(values) for name, values in added.items()}
        np.savez(half / ADDED, **columns)
        kind = kind or Example
        (half / KIND).write_text(json.dumps({"module": kind.__module__, "name": kind.__qualname__}))
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
