"""Token shards: the ids of a source's documents on disk, memory-mapped, with random access by document number.

A folder of shards holds pairs of files `tokens-00000.bin` (the ids of all documents, concatenated) and
`index-00000.npy` (per document: its end in the shard, bytes of its text, bytes of its targets' text); `keys.bin` and
`origins.txt` (per document: hashes of its text, its file and line); and `manifest.json`, written last, which has the
checksums of all of them.

Tokens are checked in blocks, when a process reads a block for the first time, since a corpus may be large; the manifest
and the indices when they are opened. Shards of older versions have no checksums, and are read without a check.
"""

import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from oumi_pl.data.documents import Document, TokenizeDocuments, in_chunks
from oumi_pl.data.duplicates import KeyFiles, Lines, line_of, read_lines
from oumi_pl.data.records import RowCounts
from oumi_pl.errors import UserError
from oumi_pl.runs import checksums, files
from oumi_pl.runs.checksums import DamagedError
from oumi_pl.runs.files import sync
from oumi_pl.runs.folders import half_of, remove_abandoned
from oumi_pl.terminal.screen import track

FORMAT = 1
"""Version of the files and of the tokenization of documents: increase it when either changes."""
MANIFEST = "manifest.json"
MADE_FROM = "made_from.json"
HELD_OUT = "held_out.txt"
"""File and line of each document, if they were held out of a source."""
LOOKED_AT = 1 << 16
"""Ids at the start of each shard that are checked when it is opened; the others are checked when read."""
BLOCK = 1 << 18
"""Bytes of the blocks of tokens that have a checksum each."""
SHARD_TOKENS = 1 << 26
"""Tokens after which a shard is closed, at the next end of a document."""


_checked_blocks: dict[Any, np.ndarray] = {}
"""File, as by `checksums.stamp` -> which of its blocks this process has checked, `[blocks]` bool."""


class OtherShardsError(UserError):
    """A folder holds shards of other texts than those that are to be written."""


class Shards:
    """The tokenized documents of a source, as written by `write_shards`.

    Args:
        directory: The folder of shards.
        tokenizer: Fingerprint of the tokenizer that the ids should belong to.
        vocabulary: Number of ids of the tokenizer, to refuse larger ones when they are read; None: not checked.

    Raises:
        DamagedError: a file is missing, truncated or damaged.
        UserError: the shards have another tokenizer or version.
    """

    def __init__(self, directory: Path, tokenizer: str, vocabulary: int | None = None) -> None:
        self.directory = directory
        self._vocabulary = vocabulary
        self.manifest = _read_manifest(directory)
        self.name: str = self.manifest["name"]
        if self.manifest["tokenizer"] != tokenizer:
            raise UserError(
                f"{directory}: these shards were made with another tokenizer; set data.tokenizer to that one, or "
                "prepare them again"
            )
        self.dtype = np.dtype(self.manifest["dtype"])
        counts = [shard["documents"] for shard in self.manifest["shards"]]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._tokens = [self._open(i, shard["tokens"]) for i, shard in enumerate(self.manifest["shards"])]
        self._blocks = [self._blocks_of(i, shard) for i, shard in enumerate(self.manifest["shards"])]
        self._indices = [self._open_index(i, shard) for i, shard in enumerate(self.manifest["shards"])]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> Document:
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        local = number - int(self.starts[shard])
        end, text_bytes, target_bytes = self._indices[shard][local].tolist()
        start = int(self._indices[shard][local - 1, 0]) if local else 0
        return Document(self._read(shard, start, end), text_bytes, target_bytes)

    def read(self, start: int) -> Iterator[np.ndarray]:
        """Yields the ids of each document, `[tokens]`, from number `start` on."""
        for shard, index in enumerate(self._indices):
            first = max(0, start - int(self.starts[shard]))
            if first >= len(index):
                continue
            begin = int(index[first - 1, 0]) if first else 0
            for chunk in range(first, len(index), 4096):  # converted to ints in blocks, since an index may be large
                for end in index[chunk : chunk + 4096, 0].tolist():
                    yield self._read(shard, begin, end)
                    begin = end

    def check(self) -> None:
        """Reads the keys of documents, and all blocks of tokens that this process has not read yet.

        Raises:
            DamagedError: something is not as it was written.
        """
        for name in self.manifest.get("keys_crc32", {}):
            self._whole_file(name)
        for shard, (tokens, blocks) in enumerate(zip(self._tokens, self._blocks, strict=True)):
            if blocks is not None:
                self._check_blocks(shard, 0, len(tokens))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.manifest["tokens"])

    @property
    def held_out(self) -> list[str]:
        """File and line of each document, if they were held out of a source; else empty."""
        file = self.directory / HELD_OUT
        return read_lines(file) if file.is_file() else []

    @property
    def has_keys(self) -> bool:
        """Whether it is known which documents say the same; shards of earlier versions lack this."""
        return "keys_crc32" in self.manifest

    @cached_property
    def origins(self) -> Lines:
        """File and line of each document."""
        return Lines(self._whole_file(KeyFiles.ORIGINS))

    @property
    def record_keys(self) -> np.ndarray:
        """Hash of the text of each document, `[documents]` uint64."""
        return self._keys[:, 0]

    @property
    def prompt_keys(self) -> np.ndarray:
        """Hash of the text of each document but for white space and case, `[documents]` uint64."""
        return self._keys[:, 1]

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.fromfile(self._whole_file(KeyFiles.KEYS), dtype="<u8").reshape(-1, 2)

    def _whole_file(self, name: str) -> Path:
        file = self.directory / name
        if not file.is_file() or checksums.is_other(file, self.manifest["keys_crc32"][name]):
            raise DamagedError(f"{file}: missing or damaged; prepare it again")
        return file

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, `[documents]`."""
        parts = [np.diff(index[:, 0], prepend=0) for index in self._indices]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _open(self, number: int, tokens: int) -> np.ndarray:
        file = self.directory / f"tokens-{number:05}.bin"
        size = file.stat().st_size if file.is_file() else None
        if size != tokens * self.dtype.itemsize:
            problem = "is missing" if size is None else f"holds {size} bytes"
            raise DamagedError(
                f"{file}: {problem}, where the manifest says {tokens * self.dtype.itemsize} bytes; prepare it again"
            )
        ids = np.memmap(file, dtype=self.dtype, mode="r").view(np.ndarray)
        self._checked(ids[:LOOKED_AT], number)
        return ids

    def _blocks_of(self, number: int, shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """Which blocks of a shard were checked, and the checksums of all; None if there is nothing left to check."""
        if "tokens_crc32" not in shard:
            return None
        expected = np.array(shard["tokens_crc32"], dtype=np.uint32)
        key = checksums.stamp(self.directory / f"tokens-{number:05}.bin")
        checked = _checked_blocks.setdefault(key, np.zeros(len(expected), dtype=np.bool_))
        return None if checked.all() else (checked, expected)

    def _read(self, shard: int, start: int, end: int) -> np.ndarray:
        """The ids of a shard from `start` to `end`, checked."""
        if self._blocks[shard] is not None and end > start:
            self._check_blocks(shard, start, end)
        return self._checked(self._tokens[shard][start:end], shard)

    def _check_blocks(self, shard: int, start: int, end: int) -> None:
        checked, expected = cast("tuple[np.ndarray, np.ndarray]", self._blocks[shard])
        size = self.dtype.itemsize
        first, last = start * size // BLOCK, (end * size - 1) // BLOCK
        if last - first < 2 and checked[first] and checked[last]:  # which is asked for each document
            return
        content = self._tokens[shard].view(np.uint8)
        for block in range(first, last + 1):
            if not checked[block]:
                begin = block * BLOCK
                if zlib.crc32(content[begin : begin + BLOCK].data) != expected[block]:
                    file = self.directory / f"tokens-{shard:05}.bin"
                    end = min(begin + BLOCK, len(content))
                    raise DamagedError(
                        f"{file}: bytes {begin} to {end} are not what their checksum says: it was overwritten or "
                        "damaged; prepare it again"
                    )
                checked[block] = True
        if checked.all():
            self._blocks[shard] = None

    def _checked(self, ids: np.ndarray, shard: int) -> np.ndarray:
        """Returns the ids if all are in the vocabulary: larger ones would index past the embedding table."""
        if self._vocabulary is not None and len(ids) and (largest := int(ids.max())) >= self._vocabulary:
            raise DamagedError(
                f"{self.directory / f'tokens-{shard:05}.bin'}: holds the id {largest}, and the tokenizer has "
                f"{self._vocabulary}: it was overwritten or damaged; prepare it again"
            )
        return ids

    def _open_index(self, number: int, shard: dict[str, int]) -> np.ndarray:
        file = self.directory / f"index-{number:05}.npy"
        try:
            is_other = checksums.is_other(file, shard.get("index_crc32"))
            index = cast("np.ndarray", np.load(file, mmap_mode="r")).view(np.ndarray)
        except Exception as error:  # numpy parses the header as Python, which can raise anything
            raise DamagedError(f"{file}: missing or damaged; prepare it again") from error
        if is_other or index.shape != (shard["documents"], 3) or int(index[-1, 0]) != shard["tokens"]:
            raise DamagedError(f"{file}: doesn't match its shard; prepare it again")
        return index


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{directory}: shards of another version of oumi_pl; prepare them again")
        own = manifest.pop("crc32", None)
        has_checksums = own is not None or any("tokens_crc32" in shard for shard in manifest["shards"])
        if has_checksums and checksums.of_json(manifest) != own:
            raise DamagedError(f"{file} is not what its checksum says; prepare it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{file}: can't be read; prepare it again") from error
    return manifest


def write_shards(
    directory: Path,
    documents: Callable[[RowCounts], Iterator[str]],
    tokenize: TokenizeDocuments,
    made_from: dict[str, Any],
    *,
    name: str,
    shard_tokens: int | None = None,
    total: int | None = None,
) -> None:
    """Writes the shards of a source; continues after the last complete one, and does nothing if all are complete.

    Args:
        directory: The folder to write to.
        documents: Iterates over the source's texts from the start, and updates the counter it is given.
        tokenize: Turns texts into ids.
        made_from: Everything that the shards depend on, including the fingerprint of the `tokenizer`.
        name: The source's name in messages and metrics.
        shard_tokens: Tokens after which a shard is closed; `SHARD_TOKENS` when left out.
        total: Number of documents, for progress, if it is known.

    Raises:
        UserError: the folder holds other shards, or a row is invalid.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory)
    shard_tokens = shard_tokens or SHARD_TOKENS
    made_from = {"format": FORMAT, "dtype": np.dtype(tokenize.dtype).name, "shard_tokens": shard_tokens} | made_from
    _check_origin(directory, made_from)
    if (directory / MANIFEST).exists():
        return
    whole = _whole_shards(directory, np.dtype(tokenize.dtype))
    counts = RowCounts()
    counts.row_keys = KeyFiles(directory)
    try:
        _write_all(directory, documents(counts), tokenize, whole, name=name, shard_tokens=shard_tokens, total=total)
    except BaseException:
        counts.row_keys.close(keep=False)
        raise
    counts.row_keys.close(keep=True)
    totals = {key: sum(shard[key] for shard in whole) for key in ("documents", "tokens", "text_bytes")}
    report: dict[str, Any] = {key: counts[key] for key in ("rows", "kept", "empty", "replaced")}
    report |= {"dropped": dict(counts.dropped)} if counts.dropped else {}
    report |= {"bad_rows": counts.bad.report()} if counts.bad.count else {}
    keys = {key: checksums.of_file(directory / key) for key in (KeyFiles.KEYS, KeyFiles.ORIGINS)}
    manifest = made_from | totals | {"name": name, "report": report | counts.duplicates, "shards": whole}
    manifest |= {"keys_crc32": keys}
    manifest["crc32"] = checksums.of_json(manifest)
    if counts.held_out:
        files.write(directory / HELD_OUT, b"".join(map(line_of, counts.held_out)))
    files.write(directory / MANIFEST, json.dumps(manifest))


def _write_all(
    directory: Path,
    documents: Iterator[str],
    tokenize: TokenizeDocuments,
    whole: list[dict[str, Any]],
    *,
    name: str,
    shard_tokens: int,
    total: int | None,
) -> None:
    """Writes the shards that follow those in `whole`, and adds them to it."""
    # documents in complete shards are read again for the counts, which costs little compared to tokenizing
    done = sum(shard["documents"] for shard in whole)
    rest = itertools.islice(documents, done, None)
    left = None if total is None else max(0, total - done)
    tracked = track(rest, f"tokenizing {name}", unit="documents", total=left)
    tokenized = itertools.chain.from_iterable(map(tokenize, in_chunks(tracked)))
    while shard := _write_shard(directory, len(whole), tokenized, shard_tokens):
        whole.append(shard)


def _check_origin(directory: Path, made_from: dict[str, Any]) -> None:
    """Writes `made_from` to the folder, or checks that shards in it were made from the same."""
    file, text = directory / MADE_FROM, json.dumps(made_from, indent=1, default=str)
    if not file.exists():
        if any(directory.glob("tokens-*.bin")):
            raise OtherShardsError(f"{directory}: holds shards of unknown origin; name another folder, or remove it")
        files.write(file, text)
    elif file.read_bytes() != text.encode():
        raise OtherShardsError(
            f"{directory}: holds shards of other texts, another tokenizer or other settings; name another folder, or "
            "remove it"
        )


def _whole_shards(directory: Path, dtype: np.dtype) -> list[dict[str, Any]]:
    """The complete shards, up to the first incomplete one. An index is written after its tokens."""
    whole: list[dict[str, Any]] = []
    while (file := directory / f"index-{len(whole):05}.npy").exists():
        try:
            index = np.load(file)
        except Exception:  # damaged: numpy parses the header as Python, which can raise anything
            break
        tokens = directory / f"tokens-{len(whole):05}.bin"
        if not tokens.exists() or tokens.stat().st_size != index[-1, 0] * dtype.itemsize:
            break
        whole.append(_described(directory, len(whole), index))
    return whole


def _described(directory: Path, number: int, index: np.ndarray) -> dict[str, Any]:
    """What the manifest says about a shard that is written."""
    return {
        "documents": len(index),
        "tokens": int(index[-1, 0]),
        "text_bytes": int(index[:, 1].sum()),
        "tokens_crc32": checksums.of_blocks(directory / f"tokens-{number:05}.bin", BLOCK),
        "index_crc32": checksums.of_file(directory / f"index-{number:05}.npy"),
    }


def _write_shard(
    directory: Path, number: int, documents: Iterable[Document], shard_tokens: int
) -> dict[str, Any] | None:
    """Writes one shard, tokens first; None if no documents are left."""
    index: list[tuple[int, int, int]] = []
    tokens, of_documents = directory / f"tokens-{number:05}.bin", directory / f"index-{number:05}.npy"
    half = half_of(tokens)
    end = 0
    try:
        with half.open("wb") as out:
            for document in documents:
                out.write(document.ids.tobytes())
                end += len(document.ids)
                index.append((end, document.text_bytes, document.target_bytes))
                if end >= shard_tokens:
                    break
            out.flush()
            os.fsync(out.fileno())
        if not index:
            return None
        half.replace(tokens)
        half = half_of(of_documents)
        with half.open("wb") as out:  # `np.save` would add a suffix to a name
            np.save(out, np.array(index, dtype=np.int64))
        sync(half)
        half.replace(of_documents)
        sync(directory)
    finally:
        half.unlink(missing_ok=True)
    return _described(directory, number, np.array(index, dtype=np.int64))


class Lengths:
    """`Documents` whose items have only the documents' lengths, for counting rows without reading tokens.

    Args:
        shards: The shards of the documents.
    """

    def __init__(self, shards: Shards) -> None:
        self.name = shards.name
        self._shards = shards

    def read(self, start: int) -> Iterator[Any]:
        """Yields an object of each document's length."""
        return map(range, self._shards.lengths[start:].tolist())
