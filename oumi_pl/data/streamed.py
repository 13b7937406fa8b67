"""Documents that are tokenized on the fly, as they are read."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from oumi_pl.data.documents import TokenizeDocuments, in_chunks
from oumi_pl.data.loader import as_it_is
from oumi_pl.errors import UserError


class StreamedDocuments:
    """The documents of a source, tokenized by loader processes that take turns, so that the order stays.

    Each process reads the whole source and tokenizes every `workers`-th chunk of it: reading is cheap beside
    tokenizing. To begin at a later document, those before it are read and left out.

    Args:
        name: What the source is called.
        texts: Starts over the source's texts.
        tokenize: Makes ids of texts.
        workers: Loader processes; with 0, this one tokenizes, with the tokenizer's own threads.
    """

    def __init__(
        self, name: str, texts: Callable[[], Iterator[str]], tokenize: TokenizeDocuments, workers: int
    ) -> None:
        self.name = name
        self.texts = texts
        self.tokenize = tokenize
        self.workers = workers

    def read(self, start: int) -> Iterator[np.ndarray]:
        """The ids of each document, `[tokens]` int32, from number `start` on.

        Raises:
            UserError: for whatever is wrong with a row; rows before it come out first.
        """
        loader: DataLoader = DataLoader(
            _Chunks(self.texts, self.tokenize, start),
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.workers,
            # its own generator: the seeds of workers must not be drawn from the stream that dropout uses
            generator=torch.Generator().manual_seed(0),
        )
        for chunk in loader:
            if isinstance(chunk, UserError):
                raise chunk
            ids, ends = chunk
            yield from np.split(ids.numpy(), ends)


class _Chunks(IterableDataset):
    """Chunks of documents: their ids one after the other, and where all but the last end."""

    def __init__(self, texts: Callable[[], Iterator[str]], tokenize: TokenizeDocuments, start: int) -> None:
        self.texts, self.tokenize, self.start = texts, tokenize, start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        turn, turns = (info.id, info.num_workers) if info else (0, 1)
        if info:  # threads don't survive a fork, and each process has a core of its own
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            for number, chunk in enumerate(in_chunks(itertools.islice(self.texts(), self.start, None))):
                if number % turns == turn:
                    ids = [document.ids for document in self.tokenize(chunk)]
                    flat = np.concatenate(ids).astype(np.int32)
                    yield torch.from_numpy(flat), np.cumsum([len(x) for x in ids])[:-1].tolist()
        except UserError as error:  # as a value: across processes it would arrive with a traceback in its message
            yield error
