"""A baseline for pretraining, independent of the tokenizer: a trigram model of bytes."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.errors import UserError
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule


class TrigramBytes:
    """Predicts a byte from the two bytes before it, by Witten-Bell interpolation with shorter contexts.

    `p(c | ab) = (n(abc) + t(ab) p(c | b)) / (n(ab) + t(ab))`, where `n` counts occurrences in the training text and `t`
    the different bytes seen after a context; likewise for shorter contexts, down to a uniform distribution over all 256
    bytes (Witten and Bell 1991; Chen and Goodman 1999, section 2.5). Holds 256^3 counts: 64 MiB.

    Args:
        texts: The training documents, UTF-8. Contexts do not cross from one to the next.
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        self.counts = [np.zeros((256,) * order, dtype=np.int32) for order in (1, 2, 3)]
        for text in texts:
            codes = np.frombuffer(text, dtype=np.uint8)
            for order, counts in enumerate(self.counts, 1):
                np.add.at(counts, _grams(codes, order), 1)

    def bits(self, text: bytes) -> float:
        """Bits to encode all bytes of a document with the model."""
        codes = np.frombuffer(text, dtype=np.uint8)
        p = np.full(len(codes), 1 / 256)
        for order, counts in enumerate(self.counts, 1):
            grams = _grams(codes, order)
            context = grams[:-1]
            n = counts.sum(-1, dtype=np.int64)[context]
            t = np.count_nonzero(counts, axis=-1)[context]
            lower = p[order - 1 :]
            p[order - 1 :] = np.where(n + t > 0, (counts[grams] + t * lower) / np.maximum(1, n + t), lower)
        return float(-np.log2(p).sum())


def _grams(codes: np.ndarray, order: int) -> tuple[np.ndarray, ...]:
    """All n-grams of `order` bytes as index arrays, `order` times `[n]`."""
    n = max(0, len(codes) - order + 1)
    return tuple(codes[i : i + n] for i in range(order))


class TrigramBaseline(L.Callback):
    """Fits a trigram model of bytes to the training text, and prints its bits per byte beside those of the model.

    Args:
        max_bytes: Bytes of training text to count, and of held-out text to score.
    """

    needs_validation = True

    def __init__(self, max_bytes: int = 10_000_000) -> None:
        self.max_bytes = max_bytes
        self.bits_per_byte = math.nan

    def setup(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Checks that the data are documents.

        Raises:
            UserError: they are not.
        """
        data = trainer.datamodule
        if not isinstance(data, PretrainData):
            raise UserError(f"TrigramBaseline: reads documents, and {type(data).__name__} has none; leave it out")

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Fits the trigram model to the training text, and scores the held-out text with it."""
        data: PretrainData = trainer.datamodule
        model = TrigramBytes(self._texts(data, "train"))
        bits, size = 0.0, 0
        for text in self._texts(data, "validation"):
            bits, size = bits + model.bits(text), size + len(text)
        self.bits_per_byte = bits / max(1, size)
        echo(f"a trigram model of bytes: {self.bits_per_byte:.3f} bits per byte of held-out text")

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Prints the bits per byte of both models."""
        own = float(trainer.callback_metrics.get("val/bits_per_byte", math.nan))
        echo(f"bits per byte of held-out text: {own:.3f} (a trigram model of bytes: {self.bits_per_byte:.3f})")

    def _texts(self, data: PretrainData, split: str) -> Iterable[bytes]:
        left = self.max_bytes
        for text in itertools.chain.from_iterable(part.texts() for part in data.parts(split)):
            piece = text.encode()[:left]
            left -= len(piece)
            yield piece
            if left <= 0:
                return
