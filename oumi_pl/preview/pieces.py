"""Turns token ids into pieces of text that can be shown: whole characters, nothing invisible, no escape codes.

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
from oumi_pl.terminal import screen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
"""Brackets around tokens that carry loss; where a text contains them, they are written as their code points."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = re.compile(r" {2,}|^ | $", re.MULTILINE)


@dataclass(frozen=True)
class Piece:
    """Tokens that make up whole characters: nearly always one.

    text: what they stand for, as it is in the data. ids: their token ids. start: the position of the first in its path.
    target: whether they carry loss. special: a control token. label_only: a target that is no input of this row.
    """

    text: str
    ids: tuple[int, ...]
    start: int
    target: bool
    special: bool = False
    label_only: bool = False

    @property
    def described(self) -> str:
        """Position and id, for people to read."""
        ids = " ".join(map(str, self.ids))
        where = (
            f"position {self.start}"
            if len(self.ids) == 1
            else f"positions {self.start}-{self.start + len(self.ids) - 1}"
        )
        loss = ", carries loss" if self.target else ""
        return f"{where}, id {ids}{loss}" + (", no input of this row" if self.label_only else "")


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
            positions: `[tokens]`, their places in their path.
            label_only: Of all pieces.
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
            # marks are exact: a character across the border of a target is shown as its bytes
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
        """The bytes of text that a token stands for."""
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
    """Adjacent texts with visible white space and without invisible characters; line ends are kept.

    Control characters, changes of direction and unassigned code points are written by name.
    """
    # a single space between words needs no sign; which spaces are single is seen only in all texts together
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
    return screen.named(character) if odd_space or character in OPEN + CLOSE else screen.visible(character)
