"""Preference data from file to batch: cached, counted, packed whole, and read from real dialogues."""

import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.preferences import anthropic_hh
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.tiny import conversations, write_jsonl
from tests.trees import pair_lengths

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data (GPT-2's tokenizer, HH dialogues)")


def preferences(n, seed=0, longest=12):
    """Rows of ragged length, with scores in every other one."""
    built, rows = conversations(2 * n, seed, longest), []
    for i, (a, b) in enumerate(zip(built[::2], built[1::2], strict=True)):
        (prompt, chosen), (_, rejected) = a["messages"], b["messages"]
        scores = {"score_chosen": i + 0.5, "score_rejected": 1} if i % 2 else {}
        rows.append({"chosen": [prompt, chosen], "rejected": [prompt, rejected], **scores})
    return rows


def make(file, **kwargs):
    data = DPOData(file, **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def rows_file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", preferences(20))


@pytest.fixture
def tokenized(monkeypatch):
    """Counts the records that are tokenized."""
    counted = []
    original = DPOData.encode
    monkeypatch.setattr(DPOData, "encode", lambda self, records: counted.extend(records) or original(self, records))
    return counted


# --- stores and reports -----------------------------------------------------------------------------------------------


def test_a_second_run_reads_the_cache(rows_file, tokenized):
    first, second = make(rows_file), make(rows_file)
    assert len(tokenized) == 20
    assert second.report() == first.report()
    for i in range(20):
        a, b = first.examples("train")[i], second.examples("train")[i]
        assert (a.input_ids.tolist(), a.loss_mask.tolist()) == (b.input_ids.tolist(), b.loss_mask.tolist())
        assert pair_lengths(a) == pair_lengths(b)
        margin = b.fields["margin"]
        assert margin == i - 0.5 if i % 2 else math.isnan(margin)


@pytest.mark.parametrize("change", [{"max_length": 128}, {"template": "plain"}, {"overflow": "drop"}], ids=str)
def test_a_changed_setting_tokenizes_again(rows_file, tokenized, change):
    make(rows_file)
    make(rows_file, **change)
    assert len(tokenized) == 40


def test_sft_and_dpo_do_not_share_cached_examples(tmp_path):
    rows = [{"messages": row["messages"][:1], "chosen": "a", "rejected": "b"} for row in conversations(5)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(make(file).examples("train")) == 5
    sft = SFTData(file, tokenizer=ByteTokenizer(), max_length=256)
    sft.prepare_data()
    assert sft.stores("train")[0].report["dropped"] == {"no target tokens": 5}


def test_the_report_counts_what_became_of_all_pairs(tmp_path):
    rows = preferences(30, longest=40)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["chosen"][1]["content"] = ""
    data = make(write_jsonl(tmp_path / "rows.jsonl", rows), max_length=128, batch_size=4)
    report = data.report()["train"]
    assert (report["rows"], report["kept"]) == (30, 28)
    assert report["dropped"] == {"chosen equals rejected": 1, "empty response": 1}
    examples = [data.examples("train")[i] for i in range(28)]
    assert report["tokens"] == sum(len(e.input_ids) for e in examples) == data.lengths("train").sum()
    assert report["target_tokens"] == sum(e.target_tokens for e in examples)
    assert data.targets("train").tolist() == [e.target_tokens for e in examples]
    longest = [p + max(c, r) for p, c, r in map(pair_lengths, examples)]
    assert report["cut"] == sum(n == 128 for n in longest) > 0
    assert max(longest) == 128
    apart = sum(2 * p + c + r for p, c, r in map(pair_lengths, examples))
    assert report["saved_by_sharing"] == pytest.approx(1 - report["tokens"] / apart, abs=1e-6)
    assert "padding" not in report
    assert (report["rows_planned"], report["updates_per_epoch"]) == (28, 7)
    json.dumps(report)


def test_an_error_says_why_no_pair_is_left(tmp_path):
    rows = [row | {"rejected": row["chosen"]} for row in preferences(7)]
    with pytest.raises(UserError, match=r"none of 7 rows is left \(7 chosen equals rejected\)"):
        make(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_an_error_in_a_row_names_file_and_line(tmp_path):
    rows = preferences(3)
    rows[1]["rejected"] = [{"role": "user", "content": "another prompt"}, rows[1]["rejected"][1]]
    with pytest.raises(UserError, match=r"rows.jsonl:2: the prompts of chosen and rejected differ in turn 1"):
        make(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_an_error_in_tokenizing_names_file_and_line(tmp_path):
    rows = preferences(3)
    rows[2]["chosen"][1]["content"] = "long " * 100
    with pytest.raises(UserError, match=r"rows.jsonl:3: \d+ tokens, but max_length is 256"):
        make(write_jsonl(tmp_path / "rows.jsonl", rows), overflow="error")


def test_rows_without_a_rejected_response_are_refused(tmp_path):
    rows = preferences(3)
    lacking = [{"chosen": row["chosen"]} for row in rows]
    with pytest.raises(
        UserError, match=r"a.jsonl:1: no column 'rejected'; known: 'chosen'; .* \{rejected: my_column\}"
    ):
        make(write_jsonl(tmp_path / "a.jsonl", lacking))
    with pytest.raises(UserError, match=r"b.jsonl:2: no column 'rejected'"):
        make(write_jsonl(tmp_path / "b.jsonl", [rows[0], lacking[1]]))
    with pytest.raises(UserError, match=r"c.jsonl:1: no column 'chosen'; known: 'messages'"):
        make(write_jsonl(tmp_path / "c.jsonl", conversations(2)))


def test_columns_may_be_renamed(tmp_path):
    rows = [{"question": "q", "better": f"good {i}", "worse": "bad"} for i in range(3)]
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    data = make(Source(write_jsonl(tmp_path / "rows.jsonl", rows), columns=names))
    assert [answer for _, answer in data.prompts("train")] == ["good 0", "good 1", "good 2"]


def test_a_user_defined_format(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_preferences.py").write_text(
        "from oumi_pl.types import Preference, Text\n"
        "def ranked(row):\n"
        "    best, *_, worst = row['answers']\n"
        "    return Preference(Text(best, row['q']), Text(worst, row['q']), margin=len(row['answers']))\n"
    )
    rows = [{"q": "q", "answers": ["a", "b", "c"]}, {"q": "q", "answers": ["a", "b"]}]
    data = make(Source(write_jsonl(tmp_path / "rows.jsonl", rows), format="own_preferences.ranked"))
    examples = [data.examples("train")[i] for i in range(2)]
    assert [e.fields for e in examples] == [{"margin": 3}, {"margin": 2}]
    firsts = [[0, 1, sum(pair_lengths(e)[:2])] for e in examples]  # of prompt, chosen and rejected response
    assert [bytes(e.input_ids[at].astype(np.uint8)) for e, at in zip(examples, firsts, strict=True)] == [b"qac", b"qab"]
    with pytest.raises(UserError, match="unknown format 'rankd'"):
        make(Source(str(tmp_path / "rows.jsonl"), format="rankd"))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_packing_never_splits_a_pair_and_every_pair_fits(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", preferences(60, longest=40))
    data = make(file, max_length=96, packing=True, batch_size=2)
    assert data.lengths("train").max() > 96, "a pair may be longer than max_length"
    seen = []
    for batch in data.train_dataloader():
        segments = batch["segments"]
        assert sum(segment.length for segment in segments) == batch["input_ids"].shape[1] <= 2 * 2 * 96
        assert len(segments) == 2 * len(batch["sample_ids"])
        for i, number in enumerate(batch["sample_ids"]):
            first, second = segments[2 * i : 2 * i + 2]
            assert (first, second._replace(parent=0)) == data.examples("train")[number].segments
            assert second.parent == 2 * i
        seen += batch["sample_ids"]
    assert sorted(seen) == list(range(60))
    report = data.report()["train"]
    assert report["fill"] == pytest.approx(report["tokens"] / (report["rows_planned"] * 2 * 96), abs=1e-6)
    assert "padding" not in report
    plan = data.plan(0)
    assert max(data.lengths("train")[plan.row(i)].sum() for i in range(plan.rows)) <= 2 * 96


def test_without_packing_a_batch_has_batch_size_pairs(rows_file):
    data = make(rows_file, batch_size=8, validation=rows_file, eval_batch_size=5)
    assert [len(batch["sample_ids"]) for batch in data.train_dataloader()] == [8, 8, 4]
    assert [len(batch["segments"]) for batch in data.train_dataloader()] == [16, 16, 8]
    assert [len(batch["sample_ids"]) for batch in data.val_dataloader()] == [5, 5, 5, 5]
    assert "padding" not in data.report()["validation"]


def test_pairs_are_not_grouped_by_length_unless_asked(rows_file):
    def spread(**kwargs):
        """How much lengths differ within the updates."""
        data = make(rows_file, batch_size=4, **kwargs)
        plan, lengths = data.plan(0), data.lengths("train")
        return sum(np.ptp(lengths[plan.example_ids[i : i + 4]]) for i in range(0, 20, 4))

    assert spread() == spread(group_by_length=False) > spread(group_by_length=True)


def test_a_batch_of_any_examples(rows_file):
    data = make(rows_file)
    batch = data.batch("train", [3, 1])
    assert batch["sample_ids"] == [3, 1]
    assert len(batch["targets"]) == data.targets("train")[[3, 1]].sum()
    assert batch["fields"]["margin"].tolist() == [2.5, 0.5]
    assert data.batch("train", [])["sample_ids"] == []


@pytest.mark.parametrize("packing", [False, True])
def test_examples_in_batches_of_about_equal_numbers_of_tokens(rows_file, packing):
    data = make(rows_file, packing=packing, eval_batch_size=3)
    ids, lengths = range(4, 18), data.lengths("train")
    batches = data.in_batches("train", ids)
    assert sorted(i for batch in batches for i in batch) == list(ids)
    budget = 3 * (2 * 256 if packing else lengths[4:18].max())
    tokens = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(tokens) <= budget
    # none would have fitted into the batch before it
    assert all(before + lengths[batch[0]] > budget for before, batch in zip(tokens, batches[1:], strict=False))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_what_training_sees_with_the_chosen_answer(rows_file):
    data = make(rows_file)
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    for i, (ids, answer) in enumerate(data.prompts("train")):
        example = data.examples("train")[i]
        assert ids == example.input_ids[: pair_lengths(example)[0]].tolist()
        assert answer == rows[i]["chosen"][1]["content"]


def test_predict_reads_pairs_and_all_formats_of_sft(tmp_path, rows_file):
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"question": "2+2?", "answer": "4"}])
    for predict, answers in ((questions, 1), (rows_file, 20)):
        data = make(rows_file, predict=predict)
        batches = list(data.predict_dataloader())
        assert sum(len(batch["prompts"]) for batch in batches) == answers
    assert next(iter(make(rows_file, predict=questions).predict_dataloader()))["references"] == ["4"]
    with pytest.raises(UserError, match=r"questions.jsonl:1: no column 'chosen'"):
        make(questions)


# --- real dialogues ---------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_real_dialogues_from_file_to_batches(template):
    file = str(DATA / "hh-rlhf" / "*.jsonl.gz")
    data = make(file, tokenizer=str(DATA / "gpt2-tokenizer"), template=template, max_length=512, packing=True)
    report = data.report()["train"]
    assert (report["rows"], report["kept"], report["dropped"]) == (2312, 2308, {"empty response": 4})
    assert report["straddled"] == 0
    assert report["fill"] > 0.98
    assert 0.35 < report["saved_by_sharing"] < 0.37
    numbers = [i for batch in data.train_dataloader() for i in batch["sample_ids"]]
    assert sorted(numbers) == list(range(2308))


@needs_data
def test_real_dialogues_by_hand():
    source = Source(str(DATA / "hh-rlhf" / "*.jsonl.gz"), split="train[:300]", format="anthropic_hh")
    data = make(source, tokenizer=str(DATA / "gpt2-tokenizer"), template="chatml", max_length=4096)
    examples, kept = data.examples("train"), 0
    for _, preference in data.records("train"):
        border = preference.chosen.prompt_messages
        if not all(branch.messages[border]["content"] for branch in (preference.chosen, preference.rejected)):
            continue
        prompt = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in preference.chosen.messages[:border]
        )
        ids = [data.tokenizer(prompt + "<|im_start|>assistant\n")["input_ids"]]
        for branch in (preference.chosen, preference.rejected):
            (answer,) = branch.messages[border:]
            ids.append(data.tokenizer(answer["content"] + "<|im_end|>\n")["input_ids"])
        example = examples[kept]
        assert example.input_ids.tolist() == list(chain(*ids))
        assert pair_lengths(example) == tuple(map(len, ids))
        mask = [[False] * len(ids[0]), *([True] * (len(answer) - 1) + [False] for answer in ids[1:])]
        assert example.loss_mask.tolist() == list(chain(*mask))
        kept += 1
    assert kept == len(examples) > 290


@needs_data
@pytest.mark.filterwarnings("ignore")
def test_trl_finds_the_same_prompts_in_real_dialogues():
    from trl import extract_prompt

    from oumi_pl.data.sources import rows

    for _, row in rows(Source(str(DATA / "hh-rlhf" / "*.jsonl.gz"), split="train[:500]")):
        ours = anthropic_hh(row)
        whole = {"chosen": list(ours.chosen.messages), "rejected": list(ours.rejected.messages)}
        assert len(extract_prompt(whole)["prompt"]) == ours.chosen.prompt_messages
