"""What checksums cost at the start and in a step: a prepared corpus and a checkpoint, with checksums and without.

    python benchmarks/checksums.py [--corpus-gb 1] [--checkpoint-mb 500] [--updates 400]

The corpus is read as the training loader of `PretrainData` reads it, without a model. Its copy without checksums is in
the form that older versions wrote, which is read without a check. Each update reads one block of 256 KB: the first pass
checks it, the second does not. All files are in the system's page cache.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from contenders import processor

from oumi_pl.data import shards
from oumi_pl.data.documents import Document
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.shards import MANIFEST, write_shards
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer, tokenizer_fingerprint
from oumi_pl.runs import checksums
from oumi_pl.runs.checkpoints import AtomicCheckpointIO

ROWS, LENGTH = 64, 2048  # 131,072 tokens of two bytes: a block
REPEATS = 5


class RandomTokens:
    """Stands for a tokenizer: each text is the seed of a document of random ids."""

    dtype = np.uint16

    def __call__(self, seeds: Iterable[str]) -> list[Document]:
        return [Document(np.random.default_rng(int(s)).integers(3, 250, 4096, np.uint16), 4096, 4095) for s in seeds]


def write_corpus(folder: Path, size: float, tokenizer: ByteTokenizer) -> None:
    made_from = {"tokenizer": tokenizer_fingerprint(tokenizer.build(), chat=False)}
    documents = int(size * 1e9 / 2 / 4096)
    write_shards(folder, lambda counts: map(str, range(documents)), RandomTokens(), made_from, name="random")


def without_checksums(folder: Path, copy: Path) -> None:
    """Links the files of a corpus, with a manifest that has no checksums."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != MANIFEST:
            os.link(file, copy / file.name)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["crc32"]
    for shard in manifest["shards"]:
        del shard["tokens_crc32"], shard["index_crc32"]
    (copy / MANIFEST).write_text(json.dumps(manifest))


def read_corpus(folder: Path, tokenizer: ByteTokenizer, updates: int) -> tuple[float, list[float]]:
    """Seconds to open a corpus, and of each update's batch."""
    begin = time.perf_counter()
    source = Source(str(folder))
    data = PretrainData(source, tokenizer=tokenizer, max_length=LENGTH, batch_size=ROWS, shuffle_buffer=0)
    data.setup("fit")
    opened = time.perf_counter() - begin
    batches, seconds = iter(data.make_train_loader()), []
    for _ in range(updates):
        begin = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - begin)
    return opened, seconds


def measured(action: Callable[[], object]) -> float:
    """The median of the seconds that an action takes."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def checkpoint(folder: Path, megabytes: int) -> None:
    path = folder / "step-1.ckpt"
    weights = {f"weight {i}": torch.randn(megabytes * 250_000 // 50) for i in range(50)}
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"state_dict": weights}, path)

    def checked() -> None:
        checksums._whole.clear()  # a new process has checked nothing
        plugin.load_checkpoint(path)

    bare = measured(lambda: torch.load(path, map_location="cpu", weights_only=True))
    print(f"checkpoint of {megabytes} MB: load {bare:.3f} s, with the check {measured(checked):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times what checksums cost.")
    parser.add_argument("--corpus-gb", type=float, default=1.0)
    parser.add_argument("--checkpoint-mb", type=int, default=500)
    parser.add_argument("--updates", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}; python {platform.python_version()}, torch {torch.__version__}, one thread; medians")
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), ByteTokenizer()
        write_corpus(folder / "corpus", args.corpus_gb, tokenizer)
        without_checksums(folder / "corpus", folder / "bare")
        print(f"corpus of {args.corpus_gb:g} GB, updates of {ROWS * LENGTH:,} tokens:")
        read_corpus(folder / "bare", tokenizer, args.updates)  # imports, page cache
        passes = {"without": "bare", "first pass": "corpus", "second pass": "corpus"}
        rounds: dict[str, list[tuple[float, float]]] = {label: [] for label in passes}
        for _ in range(REPEATS):  # in turn, so that each meets the same machine
            shards._checked_blocks.clear()
            for label, corpus in passes.items():
                opened, seconds = read_corpus(folder / corpus, tokenizer, args.updates)
                rounds[label].append((opened, statistics.mean(seconds)))
        for label, figures in rounds.items():
            opened, seconds = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"  {label:12} open {1000 * opened:.1f} ms, batch of an update {1000 * seconds:.2f} ms")
        checkpoint(folder, args.checkpoint_mb)


if __name__ == "__main__":
    main()
