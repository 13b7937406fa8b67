"""The weights of a mixture as shares of its rows, of its tokens, or of what carries loss."""

import numpy as np
import pytest

from oumi_pl.callbacks.start import data_lines
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.data.test_splitting import turns, write

OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 512, "seed": 3}


@pytest.fixture
def mixture(tmp_path):
    """A source of long questions with short answers, and one of short questions with long answers."""
    short = [{"messages": turns("why " * (40 + i % 9), "no" * (9 + i % 3))} for i in range(300)]
    long = [{"messages": turns("why?", "because " * (6 + i % 3))} for i in range(200)]
    files = write(tmp_path / "short.jsonl", short), write(tmp_path / "long.jsonl", long)
    return [Source(file, weight=weight) for file, weight in zip(files, (0.7, 0.3), strict=True)]


def trained(data):
    """The share of the first source in the rows, tokens and targets of the first epoch, counted one by one."""
    ids = data.plan(0).example_ids
    is_first = ids < len(data.stores("train")[0])
    examples = data.examples("train")
    sums = np.array([(1, len(examples[i].input_ids), examples[i].target_tokens) for i in ids.tolist()])
    return sums[is_first].sum(0) / sums.sum(0)


@pytest.mark.parametrize(("unit", "place"), [("rows", 0), ("tokens", 1), ("targets", 2)])
def test_the_shares_of_an_epoch_are_the_weights(mixture, unit, place):
    data = SFTData(mixture, **OPTIONS, weight_by=unit)
    data.setup("fit")
    shares = trained(data)
    assert shares[place] == pytest.approx(0.7, abs=0.01)
    assert all(abs(share - 0.7) > 0.05 for i, share in enumerate(shares) if i != place)
    assert data.plan(0).rows == 500
    report = data.report()["train"]["sources"]
    assert [report[0][f"share_of_{name}"] for name in ("rows", "tokens", "targets")] == pytest.approx(shares, abs=1e-6)
    assert sum(source["share_of_targets"] for source in report) == pytest.approx(1, abs=1e-5)


def test_every_epoch_draws_these_shares(mixture):
    data = SFTData(mixture, **OPTIONS, weight_by="targets")
    targets = data.targets("train")
    border = len(data.stores("train")[0])
    for epoch in range(4):
        ids = data.plan(epoch).example_ids
        assert targets[ids[ids < border]].sum() / targets[ids].sum() == pytest.approx(0.7, abs=0.01)


def test_the_first_lines_of_a_run_have_all_three_shares(mixture):
    data = SFTData(mixture, **OPTIONS)
    data.setup("fit")
    lines = dict(data_lines(data, data.report()))
    assert "short.jsonl: 70.0% of the rows, 8" in lines["mixture"]
    assert lines["mixture"].count("of what carries loss") == 2


def test_weights_of_rows_count_as_they_do_in_the_loss(mixture, tmp_path):
    heavy = [{"messages": turns("why?", "because " * 5), "weight": 3} for _ in range(200)]
    sources = [mixture[0], Source(write(tmp_path / "heavy.jsonl", heavy), weight=0.3)]
    data = SFTData(sources, **OPTIONS, weight_by="targets")
    ids, border = data.plan(0).example_ids, len(data.stores("train")[0])
    weights = data.target_weights("train")
    assert weights[ids[ids < border]].sum() / weights[ids].sum() == pytest.approx(0.7, abs=0.02)


def test_shares_are_part_of_what_a_checkpoint_belongs_to(mixture):
    made_from = [SFTData(mixture, **OPTIONS, weight_by=unit).made_from() for unit in ("rows", "tokens")]
    other = [mixture[0], Source(mixture[1].address, weight=0.4)]
    made_from.append(SFTData(other, **OPTIONS).made_from())
    assert len({*map(tuple, made_from)}) == 3
    scaled = [Source(source.address, weight=10 * source.weight) for source in mixture]
    assert SFTData(scaled, **OPTIONS).made_from() == made_from[0]


def test_mistakes_are_refused(mixture):
    with pytest.raises(UserError, match=r"data\.weight_by: unknown 'token'; did you mean 'tokens'"):
        SFTData(mixture, **OPTIONS, weight_by="token")
    with pytest.raises(UserError, match=r"data\.weight_by: tokens needs weights, and no source of data.train has one"):
        SFTData(mixture[0].address, **OPTIONS, weight_by="tokens").make("train")
    with pytest.raises(UserError, match=r"data\.weight_by: targets of completions are unknown"):
        RolloutData(mixture, **OPTIONS, reward=len, weight_by="targets")
