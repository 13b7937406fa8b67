"""Rows of reward models: pairs as in DPO, responses with an outcome, and the token at which each is scored."""

import numpy as np
import pytest

from oumi_pl.attention.segments import path_positions
from oumi_pl.data.reward import RewardData, as_pair, rated
from oumi_pl.data.tokenize import Dropped
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import Segment
from tests.tiny import conversations, dpo_data, pairs, reward_data, write_jsonl
from tests.tiny import rated as rated_rows

TURNS = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def of(tmp_path, rows, **kwargs):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return RewardData(str(tmp_path / "rows.jsonl"), **{"tokenizer": ByteTokenizer(), "max_length": 256} | kwargs)


def test_pairs_have_the_tokens_of_dpo_and_the_last_of_each_response_is_scored(tmp_path):
    ours, theirs = (make(tmp_path, 8).examples("train") for make in (reward_data, dpo_data))
    for example, pair in zip((ours[i] for i in range(8)), (theirs[i] for i in range(8)), strict=True):
        assert example.input_ids.tolist() == pair.input_ids.tolist()
        assert example.segments == pair.segments
        first, _ = example.segments
        assert np.flatnonzero(example.loss_mask).tolist() == [first.length - 1, len(example.input_ids) - 1]
        assert set(example.fields) == {"margin", "outcome"}


def test_a_path_is_the_whole_rendering_as_transformers_reads_it(tmp_path):
    data, rows = of(tmp_path, pairs(4)), pairs(4)
    for i, row in enumerate(rows):
        example = data.examples("train")[i]
        for segment, name in enumerate(("chosen", "rejected")):
            expected = data.tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=True)["input_ids"]
            assert example.input_ids[path_positions(example.segments, segment)].tolist() == expected


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        ({"prompt": "a", "response": "b", "label": 1}, 1.0),
        ({"messages": [*TURNS], "label": False}, 0.0),
        ({"conversations": [*TURNS], "score": 3.5}, 3.5),
        ({"question": "a", "answer": "b", "score": -1, "label": True}, 1.0),
        ({"prompt": "a ", "completion": "b", "label": 0}, 0.0),
    ],
)
def test_rated_rows(row, outcome):
    record = rated(row)
    assert record.outcome == outcome
    assert record.response is not None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b", "label": "good"}, "column 'label' holds 'good' instead of a number"),
        ({"prompt": "a", "response": "b", "score": float("nan")}, "column 'score' holds nan instead of a number"),
        ({"prompt": "a", "label": 1}, "no format fits the columns prompt"),
        ({"prompt": "a", "response": 3, "label": 1}, "column 'response' holds a value of type int instead of text"),
    ],
)
def test_rows_that_are_not_rated(row, message):
    with pytest.raises(UserError, match=message):
        rated(row)


def test_a_response_that_ends_with_the_pad_token_is_scored_before_it(tmp_path):
    """As in transformers, which finds the last token of a row by the pad token; EOS ends texts, and pads here."""
    tokenizer = ByteTokenizer().build()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [{"prompt": "ab", "chosen": " good", "rejected": " no"}, {"prompt": "ab", "chosen": "x", "rejected": "xy"}]
    data = of(tmp_path, texts, tokenizer=str(tmp_path / "tokenizer"), template="plain")
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id
    first, second = (data.examples("train")[i] for i in (0, 1))
    assert data.tokenizer.decode(first.input_ids) == "ab good no"
    assert data.tokenizer.decode(second.input_ids) == "abxxy"
    assert np.flatnonzero(first.loss_mask).tolist() == [6, 9]


def test_pairs_and_rated_rows_of_several_sources_share_an_epoch(tmp_path):
    data = reward_data(tmp_path, 12, outcomes=10, validation=0.4, batch_size=4)
    data.setup("fit")
    report = data.report()
    assert report["train"]["pairs"] + report["validation"]["pairs"] == 12
    assert report["train"]["outcomes"]["rows"] + report["validation"]["outcomes"]["rows"] == 10
    assert report["train"]["pairs_without_margin"] == report["train"]["pairs"]
    batch = data.batch("validation", range(report["validation"]["kept"]))
    sources = batch["fields"]["source"].tolist()
    assert [np.isnan(value) for value in batch["fields"]["outcome"].tolist()] == [source == 0 for source in sources]
    assert data.source_names("validation") == ["pairs-12-0", "rated-10-0"]
    assert "source" not in data.batch("train", [0])["fields"]


def test_margins_come_from_scores(tmp_path):
    data = of(tmp_path, [row | {"score_chosen": 4.0, "score_rejected": 1.5} for row in pairs(2)])
    assert data.examples("train")[0].fields["margin"] == 2.5
    assert data.report()["train"]["pairs_without_margin"] == 0


def test_responses_without_a_token_are_dropped(tmp_path):
    data = of(tmp_path, [])
    outcomes = data.encode([rated({"messages": [TURNS[0]], "label": 1})])
    assert outcomes == [Dropped("no target tokens")]


def test_another_pad_token_is_another_entry_of_the_cache(tmp_path):
    data = of(tmp_path, rated_rows(2))
    before = data.encoding_key()
    data.tokenizer.pad_token = data.tokenizer.eos_token
    assert data.encoding_key() != before


def test_as_pair_stores_common_tokens_once():
    a, b = np.array([1, 2, 3, 4]), np.array([1, 2, 5])
    ids, segments = as_pair(a, b)
    assert ids.tolist() == [1, 2, 3, 4, 5]
    assert segments == (Segment(4), Segment(1, parent=0, shared=2))
    for chosen, rejected in ((a, a), (a, a[:2]), (a[:1], a), (b, np.array([9]))):
        ids, segments = as_pair(chosen, rejected)
        assert ids[path_positions(segments, 0)].tolist() == chosen.tolist()
        assert ids[path_positions(segments, 1)].tolist() == rejected.tolist()


def test_prompts_of_both_kinds_of_rows(tmp_path):
    rows = conversations(3)
    data = of(tmp_path, [row | {"label": 1} for row in rows])
    answers = [answer for _, answer in data.prompts("train")]
    assert answers == [row["messages"][-1]["content"] for row in rows]


def test_weights_of_rows_are_refused(tmp_path):
    data = of(tmp_path, [])
    with pytest.raises(UserError, match="this row has a weight, and all rows of a reward model count alike"):
        data.encode([rated({"prompt": "a", "response": "b", "weight": 2.0, "label": 1})])
