"""Memory doesn't grow with the corpus: 2 GB are read, tokenized into shards, and read again."""

import itertools
import json
import threading
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sources import Source
from tests.data.corpora import pretrain_data

GIGABYTES = 2
WORDS = [f"{i:0>99}" for i in range(1000)]  # long ones, so that tokenizing is quick
GROWTH = 100e6


class Peak:
    """The most memory of its own that the process had, in bytes; pages of mapped files don't count."""

    def __enter__(self):
        self.start = self.most = anonymous()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.05)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def anonymous():
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def tokenizer():
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<unk>", "<eos>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind):
    text = "\n".join(" ".join(WORDS[i : i + 10]) for i in range(0, 100, 10))
    line = json.dumps({"text": text}) + "\n" if kind == "jsonl" else text + "\n\n"
    block = line * (10**7 // len(line))
    file = tmp_path / f"big.{kind}"
    with file.open("w") as out:
        for _ in range(int(GIGABYTES * 1e9) // len(block)):
            out.write(block)
    assert file.stat().st_size > 0.99e9 * GIGABYTES
    source = Source(str(file), documents=None if kind == "jsonl" else "blank_lines")
    settings = {"tokenizer": tokenizer(), "max_length": 1024, "shuffle_buffer": 100}
    list(itertools.islice(PretrainData(source, streaming=True, **settings).train_dataloader(), 50))  # libraries, pools

    with Peak() as streaming:
        list(itertools.islice(iter(PretrainData(source, streaming=True, **settings).train_dataloader()), 0, 500, 499))
    with Peak() as preparing:
        built = pretrain_data(source, **settings)
    with Peak() as reading:
        batches = sum(1 for _ in built.train_dataloader())
    assert batches == built.updates(1)
    assert built.report()["train"]["bytes"] > 0.9e9 * GIGABYTES
    for peak in (streaming, preparing, reading):
        assert peak.most - peak.start < GROWTH
