"""The pretraining DataModule: what it refuses, what it reports, and a run that is killed and resumed."""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.start import Start
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.data.documents import TokenizeDocuments
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.data.trained_bpe import TrainedBPE
from oumi_pl.errors import UserError
from oumi_pl.models.lm import forest
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.types import Segment
from tests.data.corpora import corpus, documents, handed_out, pretrain_data
from tests.test_resume import DROPOUT, Kill, adamw, newest
from tests.tiny import distance, fit, module, trainer, weights, write_jsonl

# --- batches


ENTRIES = {"input_ids", "position_ids", "segments", "targets", "predictors", "target_segments", "fields", "sample_ids"}


def test_rows_are_full_and_each_a_segment_unless_documents_are_isolated(tmp_path):
    built = pretrain_data(corpus(tmp_path), shuffle_buffer=0)
    assert not built.packing
    *full, last = built.train_dataloader()
    for batch in full:
        assert set(batch) == ENTRIES | {"update"}
        assert batch["segments"] == [Segment(64), Segment(64)]
        assert batch["input_ids"].shape == (1, 128)
        assert batch["position_ids"].tolist() == [[*range(64), *range(64)]]
        assert batch["predictors"].tolist() == list(range(128)), "every position predicts the next token"
        assert batch["target_segments"].tolist() == [0] * 64 + [1] * 64
        assert set(forest(batch).inputs) == {"input_ids", "position_ids"}, "what the model reads needs no mask"
    assert last["input_ids"].numel() == sum(segment.length for segment in last["segments"]) < 128
    assert len(last["targets"]) == last["input_ids"].numel()


def test_isolated_documents_are_segments_of_one_row(tmp_path):
    built = pretrain_data(corpus(tmp_path), isolate=True)
    assert built.packing
    for batch in built.train_dataloader():
        assert set(batch) == ENTRIES | {"update"}
        lengths = [segment.length for segment in batch["segments"]]
        assert batch["segments"] == [Segment(length) for length in lengths]
        assert batch["input_ids"].shape == (1, sum(lengths))
        assert batch["position_ids"].tolist() == [[p for n in lengths for p in range(n)]]
        owners = [i for i, length in enumerate(lengths) for _ in range(length)]
        assert batch["target_segments"].tolist() == [owners[p] for p in batch["predictors"].tolist()]


# --- the cache


def test_documents_are_tokenized_once_as_long_as_nothing_changes(tmp_path, monkeypatch):
    tokenized = []
    original = TokenizeDocuments.__call__
    monkeypatch.setattr(
        TokenizeDocuments, "__call__", lambda self, texts: tokenized.extend(texts) or original(self, texts)
    )
    source = corpus(tmp_path)
    first = handed_out(pretrain_data(source).train_dataloader())
    assert len(tokenized) == 40
    assert handed_out(pretrain_data(source, max_length=64, workers=1).train_dataloader()) == first
    pretrain_data(source, max_length=32, packing="best_fit")
    assert len(tokenized) == 40, "shards are of the documents alone"
    pretrain_data(source, tokenizer=ByteTokenizer())
    pretrain_data(Source(source.path, split="train[:30]"))
    assert len(tokenized) == 40 + 40 + 30
    write_jsonl(tmp_path / "corpus-40-0.jsonl", [{"text": "another"}])
    pretrain_data(source)
    assert len(tokenized) == 111


# --- refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"packing": "concatenate"}, "data.packing: unknown 'concatenate'; did you mean 'concat'"),
        ({"exhausted": "restrat"}, "data.exhausted: unknown 'restrat'; did you mean 'restart'"),
        ({"shuffle_buffer": -1}, "data.shuffle_buffer is -1"),
        ({"max_length": 8, "eval_stride": 9}, "data.eval_stride is 9, but has to be between 1 and max_length, 8"),
        ({"validation": 1.5}, "data.validation is 1.5"),
        ({"train": [Source("a", weight=1), "b"]}, "1 of 2 sources have a weight"),
        ({"train": [Source("a", weight=1), Source("b", weight=-2)]}, "source number 2 has the weight -2"),
    ],
)
def test_contradictory_settings_are_refused_before_anything_is_read(kwargs, message):
    with pytest.raises(UserError) as caught:
        PretrainData(**({"train": "nowhere.txt"} | kwargs))
    assert message in str(caught.value)


def test_sources_without_documents_are_refused(tmp_path):
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}, {"text": ""}])
    with pytest.raises(UserError, match=r"data.train: blank: there are no documents in it \(2 rows, 2 of them empty\)"):
        pretrain_data([blank, corpus(tmp_path)])
    with pytest.raises(UserError, match=r"data.validation: corpus-5-0: .* \(a fraction holds out whole documents"):
        pretrain_data(corpus(tmp_path, 5), validation=0.0001)
    with pytest.raises(UserError, match="blank: there are no documents in it"):
        list(pretrain_data(blank, streaming=True).train_dataloader())
    with pytest.raises(UserError, match="the documents don't fill a single row"):
        single = write_jsonl(tmp_path / "single.jsonl", [{"text": "x"}])
        list(pretrain_data(single, isolate=True, tokenizer=only_eos()).train_dataloader())
    with pytest.raises(UserError, match="no such file"):
        pretrain_data(str(tmp_path / "gone.jsonl"), streaming=True)


def only_eos():
    """A tokenizer that sees nothing in any text."""
    from tokenizers import normalizers

    tokenizer = ByteTokenizer(chat_template=False).build()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    return tokenizer


@pytest.mark.parametrize(
    ("kwargs", "why"), [({"streaming": True}, "an unknown length"), ({"exhausted": "restart"}, "no end")]
)
def test_epochs_of_unknown_length_are_refused(tmp_path, kwargs, why):
    with pytest.raises(UserError, match=f"a pass through the documents has {why}.*trainer.max_steps or max_tokens"):
        pretrain_data(corpus(tmp_path), **kwargs).updates(1)


def test_token_shards_are_refused_by_other_data_and_as_a_fraction(tmp_path):
    built = pretrain_data(corpus(tmp_path)).shards("train")[0].directory
    again = pretrain_data(str(built))
    assert handed_out(again.train_dataloader()) == handed_out(pretrain_data(corpus(tmp_path)).train_dataloader())
    with pytest.raises(UserError, match="token shards, which only PretrainData reads"):
        SFTData(str(built), tokenizer=ByteTokenizer()).prepare_data()
    with pytest.raises(UserError, match=r"no fraction of .* can be held out, since it holds tokens"):
        pretrain_data(str(built), validation=0.1)
    with pytest.raises(UserError, match="made with another tokenizer"):
        pretrain_data(str(built), tokenizer=ByteTokenizer())


def test_a_fraction_of_what_is_streamed_from_the_hub_is_refused(tmp_path):
    with pytest.raises(UserError, match="holding out a fraction of org/name would download all of it"):
        pretrain_data("org/name", streaming=True, validation=0.1)


# --- report


@pytest.mark.parametrize("kwargs", [{}, {"isolate": True}, {"packing": "best_fit"}, {"exhausted": "restart"}], ids=str)
def test_the_report_counts_what_became_of_all_documents(tmp_path, kwargs):
    texts = documents(50)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in [*texts, ""]])
    built = pretrain_data(rows, validation=corpus(tmp_path, 9, 5), **kwargs)
    report = built.report()
    train = report["train"]
    assert (train["rows"], train["kept"], train["documents"], train["dropped"]) == (51, 50, 50, {"empty": 1})
    assert train["bytes"] == sum(len(text) for text in texts)
    assert train["tokens"] == train["bytes"] + 50
    assert train["bytes_per_token"] == pytest.approx(train["bytes"] / train["tokens"], abs=1e-4)
    if "exhausted" in kwargs:
        assert "rows_planned" not in train
    else:
        batches = list(built.train_dataloader())
        targets = sum(len(batch["targets"]) for batch in batches)
        assert targets == train["target_tokens"]
        assert train["rows_planned"] == sum(len(batch["sample_ids"]) for batch in batches)
        assert train["updates_per_epoch"] == len(batches)
        inputs = sum(batch["input_ids"].numel() for batch in batches)
        assert train["fill"] == pytest.approx(inputs / (64 * train["rows_planned"]), abs=0.02)
    held = list(built.val_dataloader())
    assert report["validation"]["windows"] == sum(len(batch["sample_ids"]) for batch in held)
    assert report["validation"]["target_tokens"] == sum(len(batch["targets"]) for batch in held)
    assert "padding" not in train | report["validation"]
    json.dumps(report)


def test_the_consumed_share_of_each_source_is_reported_beside_the_wanted_one(tmp_path):
    sources = [corpus(tmp_path, 200, 0, weight=3), corpus(tmp_path, 6, 1, weight=1)]
    built = pretrain_data(sources, exhausted="restart", shuffle_buffer=0)
    assert built.consumed() == []
    for _, _ in zip(range(60), built.train_dataloader(), strict=False):
        pass
    first, second = built.consumed()
    assert first["source"], second["source"] == ("corpus-200-0", "corpus-6-1")
    assert first["tokens"] + second["tokens"] == pytest.approx(60 * 2 * 64, abs=700)
    assert first["share"] == pytest.approx(0.75, abs=0.1)
    assert (first["wanted"], second["wanted"]) == (0.75, 0.25)
    assert second["passes"] > 0 == first["passes"]


# --- runs


def run(path, directory, kill=10**9, resume=None, seed=1, every=3, **kwargs):
    """A run of SFT's loss on a mixture, with validation, in updates of two micro-batches."""
    checkpoints = Checkpoints(every=every, keep=1)
    checkpoints.directory = directory
    directory.mkdir(exist_ok=True)
    killer, model = Kill(kill), module(adamw, DROPOUT)
    limits = {name: kwargs.pop(name) for name in ("max_steps", "max_epochs") if name in kwargs}
    L.seed_everything(seed)
    loop = trainer(
        **{"max_steps": 14, "accumulate_grad_batches": 2, "enable_checkpointing": True} | limits,
        callbacks=[killer, LastStep(), Start(), checkpoints],
        plugins=[AtomicCheckpointIO()],
    )
    sources = [corpus(path, 40, 0, weight=3), corpus(path, 3, 1, weight=1)]
    settings = {"exhausted": "stop", "shuffle_buffer": 5, "validation": corpus(path, 3, 5)} | kwargs
    data = PretrainData(
        sources, tokenizer=ByteTokenizer(chat_template=False), max_length=64, batch_size=2, seed=0, **settings
    )
    with contextlib.suppress(InterruptedError):
        loop.fit(model, data, ckpt_path=resume, weights_only=True)
    return model, killer.seen, loop


def assert_same_weights(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(weights(ours).values(), weights(theirs).values(), strict=True))


KINDS = {
    "prepared": {},
    "streamed": {"streaming": True},
    "endless": {"exhausted": "restart", "streaming": True, "workers": 1},
    "no_validation": {"streaming": True, "validation": None},
    "isolated": {"isolate": True, "packing": "best_fit", "streaming": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, kind):
    """Killed in the first pass, near its end, and in later passes."""
    whole, seen, loop = run(tmp_path, tmp_path / "whole", **KINDS[kind])
    assert loop.global_step == 14
    assert (loop.current_epoch > 1) == (kind != "endless"), "several passes"
    for kill in (5, 15, 25):
        directory = tmp_path / f"killed-{kill}"
        _, before, _ = run(tmp_path, directory, kill, **KINDS[kind])
        assert before == seen[:kill]
        checkpoint = newest(directory)
        if checkpoint is None:
            continue
        # another seed: whatever is drawn anew instead of restored shows
        resumed, after, _ = run(tmp_path, directory, resume=checkpoint, seed=2, **KINDS[kind])
        assert after == seen[2 * int(checkpoint.stem.split("-")[1]) :]
        assert_same_weights(resumed, whole)


@pytest.mark.parametrize("kind", ["prepared", "streamed", "isolated"])
def test_a_run_resumes_at_the_end_of_a_pass(tmp_path, kind):
    """Where Lightning doesn't know the length of a pass, it fetches a batch of the next one ahead."""
    whole, seen, _ = run(tmp_path, tmp_path / "whole", every=100, **KINDS[kind])
    numbers = [batch[0] for batch in seen if batch]
    ends = [i // 2 for i in range(1, len(seen)) if seen[i] and seen[i][0] == 0]
    assert numbers.count(0) > 2
    for end in (ends[0] - 1, ends[0], ends[0] + 1, ends[1]):
        directory = tmp_path / f"short-{end}"
        run(tmp_path, directory, every=100, max_steps=end, **KINDS[kind])
        longer, after, _ = run(tmp_path, directory, every=100, resume=newest(directory), seed=2, **KINDS[kind])
        assert after == seen[2 * end :]
        assert_same_weights(longer, whole)


def test_each_epoch_reads_every_row_of_prepared_documents_once(tmp_path):
    """There are as many updates as `updates` says."""
    _, seen, loop = run(tmp_path, tmp_path / "runs", max_steps=-1, max_epochs=2)
    numbers = [number for batch in seen for number in batch]
    rows = len(numbers) // 2
    assert numbers == [*range(rows)] * 2
    assert loop.global_step == 2 * -(-rows // 4)


WORKER = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.data.test_pretrain import on_ranks
on_ranks(Path(sys.argv[1]), 2)
"""


def on_ranks(path, ranks):
    """Trains on a tokenizer that is learnt first, in updates of four rows, and keeps weights and validation loss."""
    streamed = PretrainData(
        corpus(path, 40),
        corpus(path, 7, 5),
        tokenizer=TrainedBPE(300),
        max_length=64,
        batch_size=4 // ranks,
        streaming=True,
        seed=0,
    )
    model = module()
    devices = {"devices": 2, "strategy": "ddp"} if ranks == 2 else {}
    result = fit(model, streamed, max_steps=20, **devices)
    if model.global_rank == 0:
        torch.save((result, model.trainer.callback_metrics["val/loss"]), path / f"result-{ranks}.pt")


def test_two_processes_train_the_same_weights_as_one(tmp_path):
    """In passes of unknown length, whose last update has too few rows for both."""
    on_ranks(tmp_path, 1)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    environment = os.environ | {"OUMI_PL_CACHE": str(tmp_path / "other"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (one, one_loss), (two, two_loss) = (torch.load(tmp_path / f"result-{n}.pt", weights_only=True) for n in (1, 2))
    assert distance(two, one) < 1e-5
    assert float(two_loss) == pytest.approx(float(one_loss), rel=1e-5)


def test_the_consumed_shares_count_the_document_that_is_being_read(tmp_path):
    """A few short documents, and one that fills nearly all rows of the run."""
    sources = [Source([{"text": "short"}] * 3), Source([{"text": "x" * 40_000}])]
    built = PretrainData(
        [dataclasses.replace(s, name=name, weight=w) for s, name, w in zip(sources, "ab", (1, 99), strict=True)],
        tokenizer=ByteTokenizer(False),
        max_length=32,
        batch_size=8,
        shuffle_buffer=0,
    )
    built.prepare_data()
    built.setup("fit")
    batches = itertools.islice(built.train_dataloader(), 20)  # 160 rows
    seen = sum(int((batch["input_ids"] == ord("x")).sum()) for batch in batches)
    short, long = built.consumed()
    assert seen > 156 * 32
    assert long["tokens"] == pytest.approx(seen, abs=32)
    assert short["share"] < 0.01 < 0.99 < long["share"]
