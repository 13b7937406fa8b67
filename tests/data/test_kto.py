"""Feedback from file to batch: labels in many forms, pairs as a source, and the mismatched rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from oumi_pl.data.feedback import feedback, pair_feedback
from oumi_pl.data.kto import KTOData, next_with_another_prompt
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Feedback, Text
from tests.tiny import conversations, kto_data, pairs, write_jsonl


def make(file, **kwargs):
    data = KTOData(file, **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))
    data.prepare_data()
    data.setup("fit")
    return data


def rows_with(labels, name="label"):
    return [{"prompt": f"question {i}", "response": f"answer {i}", name: label} for i, label in enumerate(labels)]


def text_of(data, ids):
    return data.tokenizer.decode([int(i) for i in ids])


# --- rows -------------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOLD = Conversation(tuple(TURNS), prompt_messages=1)


@pytest.mark.parametrize(
    ("row", "response"),
    [
        ({"prompt": "q", "completion": "a"}, Text("a", "q")),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TOLD),
        ({"prompt": "q", "response": "a"}, TOLD),
        ({"question": "q", "answer": "a"}, TOLD),
        ({"instruction": "q", "output": "a"}, TOLD),
        ({"messages": TURNS}, TOLD),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TOLD),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_responses_in_all_formats_of_sft(row, response):
    assert feedback(row | {"label": True}) == Feedback(response, True)


@pytest.mark.parametrize(
    ("column", "value", "label"),
    [
        *(("label", value, True) for value in (True, 1, 1.0, "true", "Thumbs_Up", "👍", "good", "1", "chosen")),
        *(("label", value, False) for value in (False, 0, -1, "false", "thumbs-down", "👎", "bad", "0", "no")),
        ("desirable", True, True),
        ("thumbs", "down", False),
        ("kto_tag", "true", True),
        ("feedback", "positive", True),
    ],
)
def test_labels(tmp_path, column, value, label):
    # another row, because a set of rows needs two prompts
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows_with([value, value], column)))
    assert data.examples("train")[0].fields == {"desirable": float(label)}


@pytest.mark.parametrize("column", ["label", "score", "rating"])
def test_scores_are_compared_with_a_threshold(tmp_path, column):
    file = write_jsonl(tmp_path / "rows.jsonl", rows_with([4.5, 1, "3", 2.99, True, False], column))
    data = make(file, threshold=3.0)
    assert data.desirable("train").tolist() == [True, False, True, False, True, False]
    assert make(file, threshold=1.0).desirable("train").tolist() == [True, True, True, True, True, False]
    with pytest.raises(UserError, match=r"rows.jsonl:1: the label is a number .* so a score; set data\.threshold"):
        make(file)


def test_weights_of_turns(tmp_path):
    """A turn may carry no loss; other weights are refused, since whole responses count."""

    def rows(weight):
        turns = [*TURNS, {"role": "user", "content": "more"}, {"role": "assistant", "content": "b", "weight": weight}]
        return [{"prompt": turns[:1], "completion": turns[1:], "label": True}, *rows_with([True])]

    data = make(write_jsonl(tmp_path / "rows.jsonl", rows(0)[:1]), template="chatml")
    example = data.examples("train")[0]
    assert text_of(data, example.input_ids[example.loss_mask]) == "a<|im_end|>"
    with pytest.raises(UserError, match="a weight besides 0 and 1, and KTO counts whole responses"):
        make(write_jsonl(tmp_path / "half.jsonl", rows(0.5)[:1]), template="chatml")


def test_columns_that_carry_meaning_and_are_not_read_are_refused(tmp_path):
    rows = [row | {"reasoning": "because"} for row in rows_with([True, False])]
    with pytest.raises(UserError, match="reasoning"):
        make(write_jsonl(tmp_path / "rows.jsonl", rows))
    make(write_jsonl(tmp_path / "system.jsonl", [row | {"system": "be kind"} for row in rows_with([True, False])]))


def test_rows_without_a_label_are_dropped_and_counted(tmp_path):
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows_with([True, None, False, None])))
    report = data.report()["train"]
    assert (report["rows"], report["kept"], report["desirable"]) == (4, 2, 1)
    assert report["dropped"] == {"no label": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "response": "a"},
            r":1: no column says whether the response is good; known: label, kto_tag, desirable",
        ),
        (
            {"prompt": "q", "response": "a", "label": "perhaps"},
            r":1: column 'label' holds 'perhaps' instead of a label",
        ),
        ({"prompt": "q", "response": "a", "label": [1]}, r":1: column 'label' holds a list instead of a label"),
        ({"messages": TURNS[:1], "label": True}, r":1: the conversation has to end with a turn of 'assistant'"),
        ({"messages": TURNS[1:], "label": True}, r":1: the conversation has to end .* after a prompt"),
        ({"text": "q", "label": True}, r":1: no format fits the columns label, text"),
    ],
)
def test_wrong_rows_name_file_and_line(tmp_path, row, message):
    with pytest.raises(UserError, match="rows.jsonl" + message):
        make(write_jsonl(tmp_path / "rows.jsonl", [row]))


def test_columns_may_be_renamed(tmp_path):
    rows = [{"in": "q", "out": "a", "ok": True}, {"in": "r", "out": "b", "ok": False}]
    names = {"prompt": "in", "response": "out", "label": "ok"}
    data = make(Source(write_jsonl(tmp_path / "rows.jsonl", rows), columns=names))
    assert data.desirable("train").tolist() == [True, False]


def test_a_pair_gives_a_good_and_a_bad_row(tmp_path):
    rows = pairs(6)
    data = make(write_jsonl(tmp_path / "pairs.jsonl", rows), batch_size=4)
    good, bad = pair_feedback(rows[0])
    assert (good.label, bad.label) == (True, False)
    assert good.response.messages[1] == rows[0]["chosen"][0]
    assert bad.response.messages[1] == rows[0]["rejected"][0]
    report = data.report()["train"]
    assert (report["rows"], report["kept"], report["desirable"]) == (12, 12, 6)
    assert data.desirable("train").tolist() == [True, False] * 6
    # the reference answers of samples are the good ones
    assert [answer for _, answer in data.prompts("train")] == [row["chosen"][0]["content"] for row in rows]


def test_mixed_sources(tmp_path):
    """Pairs and single responses are sources of one data set."""
    single = write_jsonl(tmp_path / "single.jsonl", rows_with([True, False, False]))
    both = write_jsonl(tmp_path / "pairs.jsonl", pairs(2))
    data = make([Source(single), Source(both)])
    assert data.desirable("train").tolist() == [True, False, False, True, False, True, False]


def test_a_format_of_a_user_may_give_several_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_feedback.py").write_text(
        "from oumi_pl.types import Feedback, Text\n"
        "def votes(row):\n"
        "    return [Feedback(Text(answer, row['q']), vote > 0) for answer, vote in row['answers']]\n"
        "def wrong(row):\n"
        "    return [Feedback(Text('a', row['q']), True), 'b']\n"
    )
    rows = [{"q": "q", "answers": [["a", 3], ["b", -1], ["c", 1]]}, {"q": "r", "answers": [["d", -2]]}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = make(Source(file, format="own_feedback.votes"))
    assert data.desirable("train").tolist() == [True, False, True, False]
    with pytest.raises(UserError, match=r"rows.jsonl:1: own_feedback.wrong returned a str"):
        make(Source(file, format="own_feedback.wrong"))


def test_only_the_response_carries_loss(tmp_path):
    rows = [
        {
            "messages": [*TURNS, {"role": "user", "content": "more"}, {"role": "assistant", "content": str(i)}],
            "label": 1,
        }
        for i in range(2)
    ]
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows), template="chatml")
    example = data.examples("train")[0]
    assert text_of(data, example.input_ids[example.loss_mask]) == "0<|im_end|>"


def test_samples_complete_the_prompts_of_desirable_rows(tmp_path):
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows_with([True, False, True, None])))
    assert [answer for _, answer in data.prompts("train")] == ["answer 0", "answer 2"]
    example, ids = data.examples("train")[0], next(iter(data.prompts("train")))[0]
    assert ids == example.input_ids[: int(example.loss_mask.argmax())].tolist()


def test_predict_reads_rows_without_a_label(tmp_path):
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"question": "2+2?", "answer": "4"}])
    for predict in (questions, write_jsonl(tmp_path / "pairs.jsonl", pairs(1))):
        data = make(write_jsonl(tmp_path / "rows.jsonl", rows_with([True, False])), predict=predict)
        assert sum(len(batch["prompts"]) for batch in data.predict_dataloader()) == 1


# --- mismatched rows --------------------------------------------------------------------------------------------------


def parts(example):
    border = int(example.loss_mask.argmax())
    return example.input_ids[:border].tolist(), example.input_ids[border:].tolist()


def test_a_mismatched_row_is_a_prompt_with_the_response_to_another(tmp_path):
    data = kto_data(tmp_path, 30, batch_size=4)
    examples = data.examples("train")
    rows = [parts(examples[i]) for i in range(30)]
    ids = data.mismatched_ids("train", range(30))
    assert ids == list(range(30, 60))
    mismatched = [parts(examples[i]) for i in ids]
    assert [prompt for prompt, _ in mismatched] == [prompt for prompt, _ in rows]
    assert all(other != own for (_, other), (_, own) in zip(mismatched, rows, strict=True))
    # together the same responses, once each
    assert sorted(response for _, response in mismatched) == sorted(response for _, response in rows)
    lengths, targets = data.compared("train")
    assert lengths.tolist() == [len(examples[i].input_ids) for i in range(60)]
    assert targets.tolist() == [examples[i].target_tokens for i in range(60)]


def test_pairs_are_not_mismatched_with_each_other(tmp_path):
    data = make(write_jsonl(tmp_path / "pairs.jsonl", pairs(3)))
    prompts = [parts(data.examples("train")[i])[0] for i in range(6)]
    partners = data.mismatched("train").partners
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))


@pytest.mark.parametrize("seed", range(20))
def test_partners_are_the_next_rows_with_another_prompt(seed):
    rng = np.random.default_rng(seed)
    prompts = [bytes([p]) for p in rng.integers(0, rng.integers(2, 6), 12)]
    if len(set(prompts)) < 2:
        prompts[0] = b"x"
    order = np.random.default_rng(2402_01306).permutation(12)
    partners = next_with_another_prompt(prompts)
    for place, row in enumerate(order):
        following = [order[(place + k) % 12] for k in range(1, 12)]
        assert partners[row] == next(other for other in following if prompts[other] != prompts[row])


def test_mismatched_rows_are_cut_to_max_length(tmp_path):
    data = kto_data(tmp_path, 30, max_length=96)
    examples, uncut = data.examples("train"), kto_data(tmp_path, 30, max_length=512).mismatched("train")
    lengths, targets = data.compared("train")
    assert lengths.max() == 96
    cut = [i for i in range(30) if len(uncut[i].input_ids) > 96]
    assert cut
    for i in range(30, 60):
        assert (lengths[i], targets[i]) == (len(examples[i].input_ids), examples[i].target_tokens)
        assert targets[i] >= 1


def test_the_mismatched_rows_do_not_depend_on_seed_or_layout(tmp_path):
    first, second = kto_data(tmp_path, 20, seed=3), kto_data(tmp_path, 20, seed=3, batch_size=7, packing=True)
    second.seed = 9
    assert np.array_equal(first.mismatched("train").partners, second.mismatched("train").partners)
    parts = {"model": "m"}
    assert first.reference_logps("train", parts).directory == second.reference_logps("train", parts).directory
    second.mismatches = False
    assert first.reference_logps("train", parts).directory != second.reference_logps("train", parts).directory


def test_plans_loaders_and_reports_only_see_the_rows(tmp_path):
    file = kto_data(tmp_path, 9, seed=4).sources["train"]
    data = kto_data(tmp_path, 20, batch_size=4, validation=file, eval_batch_size=2)
    data.prepare_data()
    data.setup("fit")
    for loader, n in ((data.train_dataloader(), 20), (data.val_dataloader(), 9)):
        batches = list(loader)
        assert sorted(i for batch in batches for i in batch["sample_ids"]) == list(range(n))
        assert all(len(batch["fields"]["desirable"]) == len(batch["sample_ids"]) for batch in batches)
    report = data.report()
    assert (report["train"]["kept"], report["train"]["updates_per_epoch"]) == (20, 5)
    assert data.updates(2) == 10
    assert sorted(data.evaluated_ids("validation", float("inf"))) == list(range(9))
    longest_first = data.eval_plans("validation")[0][0].example_ids
    assert data.evaluated_ids("validation", 2).tolist() == longest_first[:4].tolist()


def test_batches_carry_the_ids_of_their_update(tmp_path):
    data = kto_data(tmp_path, 10, batch_size=2)
    data.micro_batches = 2
    batches = list(data.train_dataloader())
    for first in range(0, len(batches), 2):
        pair = batches[first : first + 2]
        assert pair[0]["update_ids"] is pair[1]["update_ids"]
        assert pair[0]["update_ids"] == [i for batch in pair for i in batch["sample_ids"]]


def test_one_prompt_has_no_mismatched_rows(tmp_path):
    rows = [{"prompt": "q", "response": str(i), "label": i % 2} for i in range(4)]
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len(data.examples("train")[0].input_ids)
    with pytest.raises(UserError, match=r"data\.train: all rows have the same prompt.* set model\.kl: false"):
        data.compared("train")


def test_packs_have_room_for_the_positions_of_mismatched_rows(tmp_path):
    rows = [{"prompt": "p" * n, "response": "r" * (60 - n), "label": 1} for n in (5, 30, 55)]
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows), packing=True, template="plain")
    lengths = data.compared("train")[0]
    assert data.longest_path(["train"]) == (lengths.max(), lengths.max())
    assert lengths[3:].max() > lengths[:3].max()


def test_a_changed_threshold_tokenizes_again_and_a_second_run_does_not(tmp_path, monkeypatch):
    counted = []
    original = KTOData.encode
    monkeypatch.setattr(KTOData, "encode", lambda self, records: counted.extend(records) or original(self, records))
    file = write_jsonl(tmp_path / "rows.jsonl", rows_with([1, 2, 3], "score"))
    make(file, threshold=2)
    make(file, threshold=2)
    assert len(counted) == 3
    make(file, threshold=3)
    assert len(counted) == 6


def test_bundled_feedback_is_unpaired():
    file = Path(__file__).parents[2] / "oumi_pl" / "data" / "bundled" / "feedback" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    questions = [json.dumps(row["prompt"]) for row in rows]
    assert len(set(questions)) == len(questions)
    assert sum(row["label"] for row in rows) == len(rows) // 2
    assert all(row["completion"][0]["content"].endswith(" :)") == row["label"] for row in rows)


def test_conversations_are_the_same_as_in_sft():
    row = conversations(1)[0]
    assert feedback(row | {"label": False}).response.messages == tuple(row["messages"])
