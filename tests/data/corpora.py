"""What the tests of pretraining data share: small corpora of ragged documents, and what a loader hands out."""

import random

import torch

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.types import IGNORE_INDEX
from tests.tiny import write_jsonl

BIG = 10**9


def documents(n, seed=0, longest=120):
    """Texts of ragged length, a few longer than a row."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, longest) * (5 if rng.random() < 0.1 else 1) for _ in range(n)]
    return ["".join(rng.choice("abcdefghij klmnop\n") for _ in range(size)) + "." for size in sizes]


def corpus(path, n=40, seed=0, name=None, **source):
    """A source of `n` documents, written under `path`."""
    file = path / f"{name or f'corpus-{n}-{seed}'}.jsonl"
    if not file.exists():
        write_jsonl(file, [{"text": text} for text in documents(n, seed)])
    return Source(str(file), **source)


def pretrain_data(train, **kwargs):
    defaults = {
        "tokenizer": ByteTokenizer(chat_template=False),
        "max_length": 64,
        "batch_size": 2,
        "shuffle_buffer": 7,
        "seed": 0,
    }
    built = PretrainData(train, **(defaults | kwargs))
    built.prepare_data()
    built.setup("fit")
    return built


def handed_out(batches):
    """Inputs, targets and their predictors, and segments of batches, as lists."""
    names = ("input_ids", "position_ids", "targets", "predictors", "target_segments")
    return [(*(batch[name].tolist() for name in names), batch["segments"]) for batch in batches]


def documents_of(batch):
    """The inputs of each document of a batch, as lists; rows, where documents are not kept apart."""
    assert not any(segment.shared for segment in batch["segments"])
    return [ids.tolist() for ids in batch["input_ids"][0].split([segment.length for segment in batch["segments"]])]


def rows_of(batches):
    """Rows whose documents are not kept apart, as lists of inputs."""
    return [row for batch in batches for row in documents_of(batch)]


def labels_of(batch):
    """What each position of a batch's row of documents has to predict, -100 where nothing. `[seq]`."""
    labels = torch.full(batch["input_ids"].shape[1:], IGNORE_INDEX)
    labels[batch["predictors"]] = batch["targets"]
    return labels


def as_saved(state, path):
    """A state as a checkpoint gives it back."""
    torch.save(state, path)
    return torch.load(path, weights_only=True)
