"""Turns the tokens of a batch into pieces of text that can be shown, and finds out which of them carry loss.

A token of a byte-level tokenizer may hold only a part of a character. Such tokens are shown together, as one piece.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oumi_pl.data.tokenizers import byte_symbols
from oumi_pl.terminal import text as safe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from itertools import pairwise

from oumi_pl.attention.segments import segment_starts
from oumi_pl.types import Batch

OPEN, CLOSE = "⟦", "⟧"
"""Brackets around tokens that carry loss. In the text itself, these characters are shown as code points."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = re.compile(r" {2,}|^ | $", re.MULTILINE)


@dataclass(frozen=True)
class Piece:
    """Tokens that make up whole characters: nearly always one.

    text: their text, unchanged. ids: their token ids. start: position of the first in its path. target: whether they
    carry loss. special: whether it is a control token. label_only: whether it is a target, but not an input of the row.
    """

    text: str
    ids: tuple[int, ...]
    start: int
    target: bool
    special: bool = False
    label_only: bool = False

    @property
    def described(self) -> str:
        """Position, id and loss, for tooltips."""
        ids = " ".join(map(str, self.ids))
        where = (
            f"position {self.start}"
            if len(self.ids) == 1
            else f"positions {self.start}-{self.start + len(self.ids) - 1}"
        )
        loss = ", carries loss" if self.target else ""
        return f"{where}, id {ids}{loss}" + (", not an input of this row" if self.label_only else "")


class Decoder:
    """Turns token ids into pieces.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._bytes = {symbol: byte for byte, symbol in enumerate(byte_symbols())} if "ByteLevel" in decoder else None
        self._word_pieces = "WordPiece" in decoder
        self._known: dict[int, bytes] = {}

    def pieces(
        self,
        ids: Sequence[int],
        targets: Sequence[bool] | np.ndarray,
        positions: Sequence[int],
        label_only: bool = False,
    ) -> list[Piece]:
        """The pieces of some tokens.

        Args:
            ids: `[tokens]`.
            targets: `[tokens]`, which of them carry loss.
            positions: `[tokens]`, their positions in the path.
            label_only: Set in all pieces.
        """
        pieces: list[Piece] = []
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        first, text = 0, ""

        def close(end: int, rest: bytes = b"", final: bool = True) -> None:
            nonlocal first, text
            text += decoder.decode(rest, final=final)
            if end > first:
                flags = bool(targets[first]), self._is_special(ids[first]) and end == first + 1, label_only
                pieces.append(Piece(text, tuple(map(int, ids[first:end])), int(positions[first]), *flags))
            first, text = end, ""

        for i, token in enumerate(ids):
            # marks have to be exact, so a character across the border of a target is shown as its bytes
            if first < i and (bool(targets[i]) != bool(targets[first]) or self._is_special(token)):
                close(i)
            text += decoder.decode(self._content(int(token)))
            if decoder.getstate()[0] == b"" or self._is_special(token):
                close(i + 1)
        close(len(ids))
        return pieces

    def _is_special(self, token: int) -> bool:
        return int(token) in self._added and bool(self._added[int(token)].special)

    def _content(self, token: int) -> bytes:
        """The bytes of a token's text."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        symbols = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(symbols, str):
            return f"⟨id {token}⟩".encode()  # beyond the vocabulary
        if self._bytes is not None:
            known = self._bytes
            return bytes(known[s] for s in symbols) if all(s in known for s in symbols) else symbols.encode()
        if byte := _BYTE_TOKEN.fullmatch(symbols):
            return bytes([int(byte.group(1), 16)])
        if self._word_pieces:
            return (symbols.removeprefix("##") if symbols.startswith("##") else f" {symbols}").encode()
        return symbols.replace("▁", " ").encode()


def visible(texts: Sequence[str]) -> list[str]:
    """Makes white space and invisible characters of adjacent texts visible; line ends are kept.

    Control characters, changes of direction and unassigned code points are replaced by their names.
    """
    # single spaces between words stay; which ones are single depends on the neighbouring texts
    joined = _SPACES.sub(lambda spaces: "·" * len(spaces.group()), "".join(texts))
    written, start = [], 0
    for text in texts:
        written.append("".join(map(_visible, joined[start : start + len(text)])))
        start += len(text)
    return written


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥   "
    odd_space = unicodedata.category(character) == "Zs" and character != " "
    return safe.named(character) if odd_space or character in OPEN + CLOSE else safe.visible(character)


@dataclass(frozen=True)
class Tokens:
    """Consecutive tokens of a batch.

    ids: `[n]`. targets: `[n]` bool, which of them carry loss. positions: `[n]`, their position ids. label: the target
    of the last token, if that is not a token of the row; else None.
    """

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    label: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "Tokens":
        """The tokens from `start` to `stop`."""
        label = self.label if stop == len(self) else None
        return Tokens(self.ids[start:stop], self.targets[start:stop], self.positions[start:stop], label)


def segments_of(batch: Batch) -> list[Tokens]:
    """The own tokens of each segment of a batch, in order, with the targets that the batch lists."""
    borders = np.array(segment_starts(batch["segments"]))
    owners, predictors = batch["target_segments"].numpy(), batch["predictors"].numpy()
    starts, ends = borders[owners], borders[owners + 1]
    # a target follows its predictor, unless that is in an earlier segment: then it is the first token of its own
    at = np.where(predictors >= starts, predictors + 1, starts)
    targets = np.zeros(borders[-1], dtype=bool)
    targets[at[at < ends]] = True
    labels = dict(zip(owners[at == ends].tolist(), batch["targets"].numpy()[at == ends].tolist(), strict=True))
    ids, positions = batch["input_ids"][0].numpy(), batch["position_ids"][0].numpy()
    spans = [slice(start, stop) for start, stop in pairwise(borders)]
    return [Tokens(ids[span], targets[span], positions[span], labels.get(i)) for i, span in enumerate(spans)]
