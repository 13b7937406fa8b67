"""Documents that are tokenized while they are read."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from oumi_pl.data.documents import TokenizeDocuments, in_chunks
from oumi_pl.data.loader import as_it_is
from oumi_pl.data.workers import Loader
from oumi_pl.errors import UserError


class StreamedDocuments:
    """The documents of a source, in order, tokenized by loader processes in turn.

    Each process reads the whole source and tokenizes every `workers`-th chunk of it, since reading is cheap compared to
    tokenizing. To start at a later document, those before it are read and skipped.

    Args:
        name: The source's name in messages and metrics.
        texts: Iterates over the source's texts from the start.
        tokenize: Turns texts into ids.
        workers: Loader processes; with 0, this process tokenizes, with the tokenizer's own threads.
    """

    def __init__(
        self, name: str, texts: Callable[[], Iterator[str]], tokenize: TokenizeDocuments, workers: int
    ) -> None:
        self.name = name
        self.texts = texts
        self.tokenize = tokenize
        self.workers = workers

    def read(self, start: int) -> Iterator[np.ndarray]:
        """Yields the ids of each document, `[tokens]` int32, from number `start` on.

        Raises:
            UserError: a row is invalid; after those before it were yielded.
        """
        loader: DataLoader = Loader(
            _Chunks(self.texts, self.tokenize, start),
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.workers,
            # a separate generator, so that the seeds of workers are not drawn from the one that dropout uses
            generator=torch.Generator().manual_seed(0),
        )
        for chunk in loader:
            if isinstance(chunk, UserError):
                raise chunk
            ids, ends = chunk
            yield from np.split(ids.numpy(), ends)


class _Chunks(IterableDataset):
    """Chunks of documents: their ids, concatenated, and the ends of all but the last."""

    def __init__(self, texts: Callable[[], Iterator[str]], tokenize: TokenizeDocuments, start: int) -> None:
        self.texts, self.tokenize, self.start = texts, tokenize, start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        turn, turns = (info.id, info.num_workers) if info else (0, 1)
        if info:  # the tokenizer's threads don't survive a fork, and each process has its own core
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            for number, chunk in enumerate(in_chunks(itertools.islice(self.texts(), self.start, None))):
                if number % turns == turn:
                    ids = [document.ids for document in self.tokenize(chunk)]
                    flat = np.concatenate(ids).astype(np.int32)
                    yield torch.from_numpy(flat), np.cumsum([len(x) for x in ids])[:-1].tolist()
        except UserError as error:  # yielded, since an exception across processes gets a traceback into its message
            yield error
