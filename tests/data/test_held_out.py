"""Held-out documents: each token but a document's first is a target once; bytes are counted; ranks don't matter."""

import itertools
from collections import Counter

import numpy as np
import pytest

from oumi_pl.data.held_out import sliding_windows
from oumi_pl.data.plan import Layout
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.tokenizers import ByteTokenizer
from tests.data.corpora import corpus, documents, pretrain_data

LENGTHS = np.array([1, 2, 8, 9, 10, 17, 18, 100, 3])


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_cover_each_target_once_with_as_much_context_as_fits(stride):
    actual = sliding_windows(LENGTHS, 8, stride)
    targets = Counter()
    for document, start, first, end in actual.tolist():
        assert start < first < end <= LENGTHS[document]
        assert end - 1 - start <= 8
        assert start == 0 or end - 1 - start == 8, "a later window sees as much as it can"
        targets.update((document, token) for token in range(first, end))
    assert targets == Counter((d, token) for d, length in enumerate(LENGTHS.tolist()) for token in range(1, length))


def test_a_stride_of_max_length_needs_the_fewest_windows():
    actual = sliding_windows(LENGTHS, 8, 8)
    assert Counter(actual[:, 0].tolist()) == {d: -(-(n - 1) // 8) for d, n in enumerate(LENGTHS.tolist()) if n > 1}


@pytest.mark.parametrize("kwargs", [{}, {"isolate": True}, {"eval_stride": 20}, {"streaming": True}])
def test_batches_of_all_ranks_hold_each_target_and_its_bytes_once(tmp_path, kwargs, monkeypatch):
    sources = [corpus(tmp_path, 23, 5), corpus(tmp_path, 8, 6)]
    expected = [
        Counter(pair for text in documents(n, seed) for pair in pairs([*text.encode(), 257]))
        for n, seed in ((23, 5), (8, 6))
    ]
    actual, sizes, counts = [Counter(), Counter()], [0, 0], []
    for rank in range(2):
        monkeypatch.setattr(PretrainData, "layout", Layout(4, 1, 2, rank))
        batches = list(pretrain_data(corpus(tmp_path), validation=sources, **kwargs).val_dataloader())
        counts.append(len(batches))
        for batch in batches:
            sizes[batch["source"]] += batch["text_bytes"]
            inputs, targets = batch["input_ids"][0, batch["predictors"]].tolist(), batch["targets"].tolist()
            actual[batch["source"]].update(zip(inputs, targets, strict=True))
            ends = np.cumsum([segment.length for segment in batch["segments"]])
            owners = np.searchsorted(ends, batch["predictors"], side="right")
            assert batch["target_segments"].tolist() == owners.tolist(), "predicted from within another window"
    assert actual == expected
    # a byte per token here, and the first of a document is no target
    assert sizes == [sum(map(len, documents(n, seed))) - n for n, seed in ((23, 5), (8, 6))]
    assert counts[0] == counts[1]


def pairs(ids):
    return list(itertools.pairwise(ids))


def test_held_out_documents_are_never_trained_on(tmp_path):
    for streaming in (False, True):
        built = pretrain_data(corpus(tmp_path, 200), validation=0.2, streaming=streaming, shuffle_buffer=0)
        held = [bytes(ids[:-1].tolist()).decode() for ids in built.shards("validation")[0].read(0)]
        trained = [bytes(ids[:-1].tolist()).decode() for ids in built.documents[0].read(0)]
        assert 20 <= len(held) <= 60
        assert sorted(held + trained) == sorted(documents(200))
        assert built.source_names("validation") == ["corpus-200-0"]


def test_prompts_are_beginnings_of_held_out_documents(tmp_path):
    built = pretrain_data(corpus(tmp_path), validation=corpus(tmp_path, 9, 5))
    for (ids, reference), text in zip(built.prompts("validation"), documents(9, 5), strict=True):
        prompt = bytes(ids).decode()
        assert 1 <= len(prompt) <= 32
        assert text.startswith(prompt + reference)


class Numbered(PretrainData):
    """Has prompts of its own, which are those of the class with a number."""

    def prompts(self, split):
        for number, (ids, reference) in enumerate(super().prompts(split)):
            yield [number, *ids], reference


def test_prompts_of_a_subclass_are_used_everywhere(tmp_path):
    held_out = [corpus(tmp_path, 3, 5), corpus(tmp_path, 2, 6)]
    settings = {"tokenizer": ByteTokenizer(chat_template=False), "validation": held_out, "predict": held_out}
    own, plain = (kind(corpus(tmp_path), **settings) for kind in (Numbered, PretrainData))
    expected = [([number, *ids], reference) for number, (ids, reference) in enumerate(plain.prompts("validation"))]
    (prompts,) = own.prompts_by_source("validation")  # they can't be separated
    assert list(prompts) == list(own.prompts("validation")) == expected
    assert [len([*prompts]) for prompts in plain.prompts_by_source("validation")] == [3, 2]
    texts = [(ids, row) for ids, _, row in plain.prompts_with_rows("predict")]
    assert [ids for ids, _, _ in own.prompts_with_rows("predict")] == [[i, *ids] for i, (ids, _) in enumerate(texts)]
    assert all(row["text"] for _, row in texts)
