"""The stream of rows does not depend on how documents are read, on ranks or workers, or on where a run resumed."""

import itertools
import multiprocessing
from functools import partial

import pytest
import torch

from oumi_pl.data.plan import Layout
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.row_stream import batch_of
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.errors import UserError
from oumi_pl.types import Segment
from tests.data.corpora import as_saved, corpus, documents_of, handed_out, pretrain_data, rows_of

KINDS = [("concat", False), ("concat", True), ("best_fit", False), ("best_fit", True)]


@pytest.fixture
def laid_out(monkeypatch):
    """Sets the layout of all data, without a trainer."""
    return lambda *args: monkeypatch.setattr(PretrainData, "layout", Layout(*args))


def mixture(path, **kwargs):
    """Two sources by weight, the smaller one several times over, shuffled."""
    sources = [corpus(path, 40, 0, weight=3), corpus(path, 6, 1, weight=1)]
    return pretrain_data(sources, **({"exhausted": "restart"} | kwargs))


def first(made, n):
    return list(itertools.islice(made.train_dataloader(), n))


@pytest.mark.parametrize(("packing", "isolate"), KINDS)
def test_prepared_and_streamed_are_the_same_for_any_number_of_workers(tmp_path, packing, isolate):
    kwargs = {"packing": packing, "isolate": isolate, "validation": 0.1}
    prepared = pretrain_data(corpus(tmp_path, 80), **kwargs)
    expected = handed_out(prepared.train_dataloader())
    assert len(expected) == prepared.updates(1) > 20
    for workers in (0, 1, 2):
        streamed = pretrain_data(corpus(tmp_path, 80), streaming=True, workers=workers, **kwargs)
        assert handed_out(streamed.train_dataloader()) == expected


def test_a_mixture_is_the_same_prepared_and_streamed(tmp_path):
    expected = handed_out(first(mixture(tmp_path), 60))
    assert handed_out(first(mixture(tmp_path, streaming=True), 60)) == expected
    assert handed_out(first(mixture(tmp_path, streaming=True, workers=2), 60)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_and_micro_batches_divide_the_rows_of_an_update(tmp_path, laid_out, streaming):
    """Together every row once, and each update the same rows, as for a single rank."""
    laid_out(8)
    alone = [documents_of(batch) for batch in pretrain_data(corpus(tmp_path, 80)).train_dataloader()]
    shares = []
    for rank in range(2):
        laid_out(2, 2, 2, rank)
        batches = list(pretrain_data(corpus(tmp_path, 80), streaming=streaming).train_dataloader())
        assert len(batches) == 2 * len(alone)
        shares.append(batches)
    for update, expected in enumerate(alone):
        micro = [shares[rank][2 * update + m] for m in range(2) for rank in range(2)]
        together = [row for batch in micro if batch["sample_ids"] for row in documents_of(batch)]
        assert together == expected
        numbers = [number for batch in micro for number in batch["sample_ids"]]
        assert numbers == list(range(8 * update, 8 * update + len(expected)))


def test_a_short_last_update_is_filled_up_with_batches_without_targets(tmp_path, laid_out):
    laid_out(4, 5)
    for isolate in (False, True):
        built = pretrain_data(corpus(tmp_path, 10), isolate=isolate)
        batches = list(built.train_dataloader())
        assert len(batches) == len(built.train_dataloader()) == 5 * built.updates(1)
        assert batches[-1]["sample_ids"] == []
        assert len(batches[-1]["targets"]) == len(batches[-1]["predictors"]) == 0
        assert batches[-1]["segments"] == [Segment(2)]
        # one segment per document where they are kept apart, else one per row
        rows = sum(len(batch["sample_ids"]) for batch in batches)
        segments = sum(len(batch["segments"]) for batch in batches if batch["sample_ids"])
        assert segments > rows if isolate else segments == rows


@pytest.mark.parametrize("buffer", [0, 1, 7, 1000])
def test_shuffling_loses_nothing_and_follows_seed_and_epoch(tmp_path, buffer):
    def numbered(**kwargs):
        return rows_of(pretrain_data(corpus(tmp_path), shuffle_buffer=buffer, **kwargs).train_dataloader())

    in_order = rows_of(pretrain_data(corpus(tmp_path), shuffle_buffer=0).train_dataloader())
    assert sorted(numbered()) == sorted(in_order)
    assert numbered() == numbered()
    assert (numbered() == in_order) == (buffer < 2)
    if buffer > 1:
        assert numbered() != numbered(seed=1)
        built = pretrain_data(corpus(tmp_path), shuffle_buffer=buffer)
        loader = built.train_dataloader()
        epochs = [rows_of(loader)]
        loader.sampler.set_epoch(1)
        epochs.append(rows_of(loader))
        assert epochs[0] != epochs[1]
        assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize("after", [0, 1, 3, 11, 30])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"streaming": True, "workers": 2},
        {"packing": "best_fit", "isolate": True, "shuffle_buffer": 0},
        {"packing": "best_fit", "streaming": True},
    ],
    ids=str,
)
def test_a_stream_resumed_at_any_update_yields_the_remaining_batches(tmp_path, laid_out, kwargs, after):
    laid_out(2, 2)
    whole = handed_out(first(mixture(tmp_path, **kwargs), 80))
    loader = mixture(tmp_path, **kwargs).train_dataloader()
    before = handed_out(itertools.islice(loader, 2 * after))
    state = as_saved(loader.state_dict(), tmp_path / "state.pt")
    resumed = mixture(tmp_path, **kwargs)
    resumed.load_state_dict(state)
    assert before + handed_out(first(resumed, 80 - 2 * after)) == whole


@pytest.mark.parametrize("kwargs", [{}, {"streaming": True}, {"packing": "best_fit", "streaming": True}], ids=str)
def test_the_position_of_a_resumed_stream_is_the_one_it_was_resumed_at(tmp_path, kwargs):
    """Also once batches were read ahead and none is trained yet: a checkpoint of this moment is resumed the same."""
    trained = [0]

    def loader():
        loaded = mixture(tmp_path, **kwargs).train_dataloader()
        loaded._trained = lambda: trained[0]
        return loaded

    first_run = loader()
    batches = iter(first_run)
    whole = handed_out(itertools.islice(batches, 12))
    trained[0] = 11
    state = as_saved(first_run.state_dict(), tmp_path / "state.pt")
    whole += handed_out(itertools.islice(batches, 10))
    resumed = loader()
    resumed.load_state_dict(state)
    next(iter(resumed))
    again = loader()
    again.load_state_dict(as_saved(resumed.state_dict(), tmp_path / "again.pt"))
    assert handed_out(itertools.islice(again, 10)) == whole[11:21]


def test_a_stream_that_is_left_ends_its_workers(tmp_path):
    """At once: in the garbage collector, it would take five seconds for each."""
    before = {*multiprocessing.active_children()}
    loader = mixture(tmp_path, streaming=True, workers=1).train_dataloader()
    batches = iter(loader)
    next(batches)
    assert len({*multiprocessing.active_children()} - before) == 2  # one for each source
    del batches
    assert not {*multiprocessing.active_children()} - before


def test_a_stream_resumes_within_a_document_that_fills_many_rows(tmp_path):
    """Nothing of the document is in the state, which says only how many of its rows are out."""
    (tmp_path / "long.txt").write_text("".join(f"{i} " for i in range(4000)))
    built = pretrain_data(str(tmp_path / "long.txt"), shuffle_buffer=0)
    whole = handed_out(built.train_dataloader())
    assert len(whole) > 100
    loader = built.train_dataloader()
    list(itertools.islice(loader, 50))
    state = loader.state_dict()
    assert state["stream"]["out"] == 100
    assert len(state["stream"]["carried"]["values"]) == 0
    resumed = pretrain_data(str(tmp_path / "long.txt"), shuffle_buffer=0)
    resumed.load_state_dict(state)
    assert handed_out(resumed.train_dataloader()) == whole[50:]


def test_a_prepared_run_may_be_resumed_streaming_and_the_other_way_round(tmp_path):
    whole = handed_out(first(mixture(tmp_path), 40))
    for streaming in (False, True):
        loader = mixture(tmp_path, streaming=streaming).train_dataloader()
        list(itertools.islice(loader, 17))
        resumed = mixture(tmp_path, streaming=not streaming)
        resumed.load_state_dict(loader.state_dict())
        assert handed_out(first(resumed, 23)) == whole[17:]


def test_a_run_resumes_with_another_layout_of_the_same_update_only(tmp_path, laid_out):
    laid_out(2, 2)
    loader = mixture(tmp_path).train_dataloader()
    batches = iter(loader)
    list(itertools.islice(batches, 10))
    state = loader.state_dict()
    rest = rows_of(itertools.islice(batches, 20))
    laid_out(4, 1)
    resumed = mixture(tmp_path)
    resumed.load_state_dict(state)
    assert rows_of(first(resumed, 10)) == rest
    laid_out(4, 2)
    other = mixture(tmp_path)
    other.load_state_dict(state)
    with pytest.raises(UserError, match="made with 4 rows per update, this run has 8"):
        other.train_dataloader()


def test_reading_ahead_does_not_move_the_position(tmp_path, laid_out):
    """The state is that after what was trained, not after what was fetched."""
    laid_out(2, 1)
    built, trained = mixture(tmp_path), [0]
    collate = partial(batch_of, pad_id=0)
    loader = StreamLoader(built.stream, built.layout, collate, trained=lambda: trained[0])
    batches = iter(loader)
    expected = []
    for ahead in (1, 2, 1, 2):
        taken = [next(batches) for _ in range(ahead)]
        expected.append(taken[0]["sample_ids"])
        trained[0] += ahead
        fetched = next(batches)
        assert loader.state_dict()["update"] == trained[0]
        assert fetched["sample_ids"] == [2 * trained[0], 2 * trained[0] + 1]
        trained[0] += 1
    resumed = StreamLoader(built.stream, built.layout, collate, trained=lambda: 100)
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(resumed))["sample_ids"] == [2 * trained[0], 2 * trained[0] + 1]


def test_a_stream_resumed_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    built = pretrain_data(corpus(tmp_path), streaming=True)
    loader = built.train_dataloader()
    whole = handed_out(loader)
    state = loader.state_dict()
    loader.sampler.set_epoch(1)
    second = handed_out(loader)
    assert whole != second
    resumed = built.train_dataloader()
    resumed.load_state_dict(state)
    # Lightning asks for a batch before it announces the epoch
    batches = iter(resumed)
    begun = [next(batches)]
    resumed.sampler.set_epoch(1)
    assert handed_out([*begun, *batches]) == second
    assert resumed.state_dict()["epoch"] == 1


def test_a_loader_has_a_length_only_if_that_of_a_pass_is_known(tmp_path):
    prepared = pretrain_data(corpus(tmp_path)).train_dataloader()
    assert len(prepared) == len(list(prepared))
    for unknown in ({"streaming": True}, {"exhausted": "restart"}):
        with pytest.raises(TypeError):
            len(pretrain_data(corpus(tmp_path), **unknown).train_dataloader())


def test_streaming_does_not_use_the_global_generator(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first(mixture(tmp_path, streaming=True, workers=1), 20)
    assert torch.equal(torch.rand(1), expected)


def test_workers_report_a_wrong_row_with_the_message_of_the_reader(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a good one"}\n' * 300 + '{"text": 3}\n')
    for workers in (0, 2):
        built = pretrain_data(str(file), streaming=True, workers=workers, shuffle_buffer=0)
        batches = iter(built.train_dataloader())
        next(batches)
        with pytest.raises(UserError) as caught:
            list(batches)
        assert str(caught.value).startswith(f"{file}:301: column 'text'")
        assert "\n" not in str(caught.value)
