"""Streamed rows of SFT: read and tokenized while training, the same for any workers and ranks, resumed exactly."""

import itertools
import json

import pytest
import torch

from oumi_pl.data.example_stream import _to_state
from oumi_pl.data.plan import Layout
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.command_line import GONE, CommandLine
from tests.data.corpora import as_saved
from tests.data.test_splitting import turns
from tests.tiny import conversations, write_jsonl

OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 256, "seed": 0, "batch_size": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    rows = [
        {"messages": turns(f"Question {i}?", "Yes. " * (1 + i % 7)), "weight": 0.5 + i % 3, "level": i}
        for i in range(150)
    ]
    other = [{"messages": turns(f"Other {i}?", "No.")} for i in range(20)]
    return write_jsonl(folder / "rows.jsonl", rows), write_jsonl(folder / "other.jsonl", other)


def sft(train, streaming=True, **kwargs):
    data = SFTData(train, **(OPTIONS | {"shuffle_buffer": 9, "streaming": streaming} | kwargs))
    data.prepare_data()
    data.setup("fit")
    return data


def batches_of(data, count=10**9, layout=None, state=None):
    """The batches, as plain values, and the state after them."""
    loader = data.make_train_loader()
    loader.layout = layout or loader.layout
    if state is not None:
        loader.load_state_dict(state)
    found = [
        {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        | {"fields": {name: value.tolist() for name, value in batch["fields"].items()}}
        for batch in itertools.islice(loader, count)
    ]
    return found, loader.state_dict()


def mixed(files):
    return [Source(files[0], weight=0.7), Source(files[1], weight=0.3)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_has_the_examples_that_full_preparation_has(files, packing):
    streamed, _ = batches_of(sft(files[0], packing=packing))
    prepared, _ = batches_of(sft(files[0], streaming=False, packing=packing))

    def examples(batches):
        found = []
        for batch in batches:
            ends = list(itertools.accumulate(segment.length for segment in batch["segments"]))
            found += [tuple(batch["input_ids"][0][a:b]) for a, b in itertools.pairwise([0, *ends])]
        return found

    assert sorted(examples(streamed)) == sorted(examples(prepared))
    assert examples(streamed) != sorted(examples(streamed))
    for batches in (streamed, prepared):
        assert sorted(i for batch in batches for i in batch["sample_ids"]) == list(range(150))
        assert sum(batch["update"].rows for batch in batches) == 150
        for batch in batches:
            weights = batch.get("weights", [1.0] * len(batch["targets"]))
            assert batch["update"].units("targets") == pytest.approx(sum(weights))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"packing": True, "max_length": 400, "mixed": True},
        {"weight_by": "targets", "mixed": True},
        {"fields": ["level"], "shuffle_buffer": 0},
    ],
    ids=str,
)
def test_a_resumed_stream_yields_the_remaining_batches(files, tmp_path, kwargs):
    train = mixed(files) if kwargs.pop("mixed", False) else files[0]
    whole, _ = batches_of(sft(train, **kwargs), 60)
    for after in (1, 13, 40):
        before, state = batches_of(sft(train, **kwargs), after)
        rest, _ = batches_of(sft(train, **kwargs), 60 - after, state=as_saved(state, tmp_path / "state.pt"))
        assert before + rest == whole


def test_a_planted_fault_of_the_state_is_noticed(files):
    """A buffer that is dropped, or a source that is read from one row further, yields other batches."""
    whole, _ = batches_of(sft(files[0]), 30)
    _, state = batches_of(sft(files[0]), 10)
    for part, changes in (
        ("buffer", _to_state([])),
        ("mixture", {"documents": [state["stream"]["mixture"]["documents"][0] + 1]}),
    ):
        stream = state["stream"]
        changed = changes if part == "buffer" else stream[part] | changes
        rest, _ = batches_of(sft(files[0]), 20, state=state | {"stream": stream | {part: changed}})
        assert rest != whole[10:], part


def test_workers_and_ranks_change_no_row(files):
    train = files[0]
    whole, _ = batches_of(sft(train, batch_size=4), 30)
    workers, _ = batches_of(sft(train, batch_size=4, workers=2), 30)
    assert workers == whole
    ranks = [batches_of(sft(train), 30, Layout(2, 1, 2, rank))[0] for rank in (0, 1)]
    joined = [[*a["sample_ids"], *b["sample_ids"]] for a, b in zip(*ranks, strict=True)]
    assert joined == [batch["sample_ids"] for batch in whole]
    assert all(a["update"].targets == batch["update"].targets for a, batch in zip(ranks[0], whole, strict=True))


@pytest.mark.parametrize("unit", ["rows", "tokens", "targets"])
def test_sources_have_their_shares_of_the_unit(files, unit):
    data = sft(mixed(files), weight_by=unit, shuffle_buffer=0)
    data.train_loader = data.make_train_loader()
    list(itertools.islice(data.train_loader, 300))
    shares = [source["share"] for source in data.consumed()]
    assert shares == pytest.approx([0.7, 0.3], abs=0.01)
    assert data.consumed()[1]["passes"] > 0, "a source with weights begins again at its end"


def test_rows_that_can_not_be_used_are_counted_or_named(tmp_path):
    rows = [{"messages": turns(f"Question {i}?", "Yes.")} for i in range(300)]
    rows[250] = {"messages": [{"role": "nobody", "content": "?"}]}
    rows[251] = {"messages": turns("Long?", "x" * 500)}
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows\.jsonl:251: .*nobody"):
        batches_of(sft(file, overflow="drop"))
    data = sft(file, overflow="drop", bad_rows="drop")
    data.train_loader = data.make_train_loader()
    assert sum(len(batch["sample_ids"]) for batch in data.train_loader) == 298
    (source,) = data.consumed()
    assert source["rows"] == 300
    assert sorted(source["dropped"].values()) == [1, 1]
    with pytest.raises(
        UserError, match=r"data\.train: .*none of the first 2 rows can be used \(longer than max_length"
    ):
        sft(write_jsonl(tmp_path / "long.jsonl", rows[251:252] * 2), overflow="drop")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"order_by": "level"}, r"data\.order_by needs all rows before training"),
        ({"sample_by": "level"}, r"data\.sample_by needs all rows before training"),
        ({"weight_by": "tokens"}, r"data\.weight_by: tokens needs weights"),
        ({"shuffle_buffer": -1}, r"data\.shuffle_buffer is -1"),
    ],
)
def test_mistakes_are_one_message(files, kwargs, message):
    with pytest.raises(UserError, match=message):
        sft(files[0], **kwargs)


def test_repeated_rows_are_dropped_while_streaming(tmp_path):
    rows = [{"id": i, "messages": turns(f"Question {i % 20}?", "Yes.")} for i in range(100)]
    batches, _ = batches_of(sft(write_jsonl(tmp_path / "rows.jsonl", rows), duplicates="drop"))
    assert sum(len(batch["sample_ids"]) for batch in batches) == 20


def test_a_run_streams_and_resumes_bit_identically(tmp_path, monkeypatch, capsys):
    """Nothing of the training rows is written to the cache; on another cut of the same update too."""
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "val.jsonl", conversations(4, seed=4))
    changes = {
        "model.init_args.config.attention_dropout": 0.0,
        "model.init_args.schedule": GONE,
        "data.init_args.streaming": True,
        "data.init_args.shuffle_buffer": 5,
        "data.init_args.validation": "val.jsonl",
        "trainer.max_steps": 10,
        "checkpoint": {"every": 5},
    }
    cli.recipe(changes)
    code, _, err = cli.run("fit", "--config", "r.yaml", "--name", "whole")
    assert code == 0, err
    assert "rows.jsonl, tokenized while it is streamed" in err
    assert len(list((tmp_path / "cache/examples").iterdir())) == 1
    assert json.loads((tmp_path / "runs/whole/data.json").read_text())["consumed"][0]["dropped"] == {}
    cli.works("fit", "--config", "r.yaml", "--name", "cut", "--trainer.max_steps", "5")
    cli.works("fit", "--resume", "runs/cut", "--trainer.max_steps", "10")
    whole, cut = (
        torch.load(tmp_path / f"runs/{run}/checkpoints/step-00000010.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "cut")
    )
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    cli.recipe(changes | {"trainer.max_steps": GONE, "trainer.max_epochs": 1})
    assert "unknown length while streaming; set trainer.max_steps" in cli.run("fit", "--config", "r.yaml")[2]
