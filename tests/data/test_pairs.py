"""Pairs: one prompt for both responses, the tokens that carry loss, what is cut and what is dropped."""

import math
import random
from itertools import chain

import pytest
from tokenizers import models

from oumi_pl.data.pairs import TokenizePairs
from oumi_pl.data.template import BUILT_IN
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Example, Preference, Text
from tests.data.byte_level import WORDS, byte_tokenizer, chat, pieces, turn, wrap
from tests.trees import pair_lengths

Q = turn("user", "q")


def texts(prompt, chosen, rejected, margin=None):
    return Preference(Text(chosen, prompt), Text(rejected, prompt), margin)


def chats(chosen, rejected, prompt=(Q,)):
    """A preference of turns; a text stands for one turn of the assistant."""
    branches = [(turn("assistant", r),) if isinstance(r, str) else tuple(r) for r in (chosen, rejected)]
    return Preference(*(Conversation((*prompt, *b), prompt_messages=len(prompt)) for b in branches))


def one(tokenizer, record, max_length=1000, **kwargs):
    (example,) = TokenizePairs(tokenizer, max_length, **kwargs)([record])
    return example


def is_pair(example):
    """Whether an example is a prompt with two responses."""
    return isinstance(example, Example) and min(pair_lengths(example)) > 0


def starts(example):
    """Where the chosen and the rejected response begin in the example's tokens."""
    prompt, chosen, _ = pair_lengths(example)
    return prompt, prompt + chosen


def parts(example):
    """Ids of prompt, chosen and rejected response, as lists."""
    ids, (first, second) = example.input_ids.tolist(), starts(example)
    return ids[:first], ids[first:second], ids[second:]


def as_text(tokenizer, example):
    """The prompt, and both responses in pieces: [(text, carries loss)]."""
    first, second = starts(example)
    assert not example.loss_mask[:first].any()
    cuts = [slice(first, second), slice(second, None)]
    branches = [pieces(tokenizer, Example(example.input_ids[cut], example.loss_mask[cut])) for cut in cuts]
    return tokenizer.decode(example.input_ids[:first]), *branches


# --- what carries loss ------------------------------------------------------------------------------------------------


def test_chatml_by_hand():
    tokenizer = byte_tokenizer("chatml")
    example = one(tokenizer, chats("good", "bad"))
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    branches = ["good<|im_end|>", "bad<|im_end|>"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *branches, "\n")]
    assert parts(example) == (ids[0], ids[1] + ids[3], ids[2] + ids[3])
    carries = [[False] * len(ids[0]), *([True] * len(branch) + [False] for branch in ids[1:3])]
    assert example.loss_mask.tolist() == list(chain(*carries))
    assert pair_lengths(example) == (len(ids[0]), len(ids[1]) + 1, len(ids[2]) + 1)
    assert math.isnan(example.fields["margin"])
    assert not example.cut
    assert not example.straddled


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_assistant_turns_carry_loss(name):
    tokenizer = byte_tokenizer(name)
    long = chats([turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")], "bad", prompt=chat("q").messages)
    example = one(tokenizer, long)
    _, chosen, rejected = as_text(tokenizer, example)
    assert [text.strip()[:1] for text, loss in chosen if loss] == ["a", "c"]
    assert ["b" in text for text, loss in chosen if not loss][:1] == [True]
    assert [text.strip()[:3] for text, loss in rejected if loss] == ["bad"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_response_has_the_tokens_and_mask_of_sft(name):
    tokenizer = byte_tokenizer(name, bos_token="<s>", adds_bos=True)
    rng = random.Random(0)
    records = []
    for _ in range(30):
        start = chat(*(rng.choice(["hi", "é🙂", "the same"]) for _ in range(rng.choice([1, 3])))).messages
        records.append(chats(rng.choice(["a", "ab", "same words, one"]), rng.choice(["b", "same words, two"]), start))
    sft = Tokenize(tokenizer, 1000)
    for record, example in zip(records, TokenizePairs(tokenizer, 1000)(records), strict=True):
        prompt, chosen, rejected = parts(example)
        first, second = starts(example)
        masks = example.loss_mask[first:second].tolist(), example.loss_mask[second:].tolist()
        for alone, ids, mask in zip(sft([record.chosen, record.rejected]), (chosen, rejected), masks, strict=True):
            assert alone.input_ids.tolist() == prompt + ids
            assert alone.loss_mask.tolist() == [False] * len(prompt) + mask
        assert (prompt, record.chosen.messages[-1]["content"]) == sft.prompt_ids(record)
        assert prompt.count(tokenizer.bos_token_id) == 1


def test_texts_share_their_prompt_and_learn_to_end():
    tokenizer = byte_tokenizer()
    example = one(tokenizer, texts("12", "34", "35", margin=1.5))
    assert as_text(tokenizer, example) == ("12", [("34<eos>", True)], [("35<eos>", True)])
    assert example.fields == {"margin": 1.5}


def test_a_token_over_the_border_belongs_to_the_responses():
    tokenizer = wrap(models.BPE(), WORDS)
    clean = one(tokenizer, texts("the", " answer is", " question is"))
    crossed = one(tokenizer, texts("the ", "answer is", "question is"))
    for example in (clean, crossed):
        assert as_text(tokenizer, example) == ("the", [(" answer is<eos>", True)], [(" question is<eos>", True)])
    assert not clean.straddled
    assert crossed.straddled


def test_a_token_over_the_border_of_one_branch_ends_the_prompt_of_both():
    tokenizer = wrap(models.BPE(), WORDS)
    assert tokenizer.tokenize("the (") == ["the", "Ġ", "("]
    example = one(tokenizer, texts("the ", "answer", "("))
    assert as_text(tokenizer, example) == ("the", [(" answer<eos>", True)], [(" (<eos>", True)])
    assert example.straddled


def test_a_prompt_that_is_written_differently_is_shared_as_far_as_it_is_equal():
    tokenizer = byte_tokenizer(
        "turns {{ messages | length }}:{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}?{% endif %}{% endfor %}"
    )
    example = one(tokenizer, chats([turn("assistant", "a"), Q, turn("assistant", "b")], "c"))
    prompt, chosen, rejected = as_text(tokenizer, example)
    assert prompt == "turns "
    assert chosen == [("4:q?a.", True), ("q?", False), ("b.", True)]
    assert rejected == [("2:q?c.", True)]


def test_the_prompt_ends_before_the_first_trained_token_of_either_branch():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    several = [turn("tool", "xy"), turn("assistant", "a")]
    for record, flip in ((chats(several, "xz"), 1), (chats("xz", several), -1)):
        prompt, *branches = as_text(tokenizer, one(tokenizer, record))
        assert (prompt, branches[::flip]) == ("q", [[("xya.", True)], [("xz.", True)]])


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (10, ("123456", "abc<eos>", "x<eos>")),
        # the longer response fits: the prompt makes room
        (9, ("23456", "abc<eos>", "x<eos>")),
        (5, ("6", "abc<eos>", "x<eos>")),
        # it doesn't: the prompt keeps half at most, and the responses' ends go
        (4, ("56", "ab", "x<eos>")),
        (3, ("6", "ab", "x<eos>")),
        (2, ("6", "a", "x")),
    ],
)
def test_truncation(max_length, expected):
    tokenizer = byte_tokenizer()
    for record in (texts("123456", "abc", "x"), texts("123456", "x", "abc")):
        example = one(tokenizer, record, max_length)
        kept = [tokenizer.decode(ids) for ids in parts(example)]
        assert (kept[0], *sorted(kept[1:])) == expected
        assert example.cut == (max_length < 10)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_truncation_of_random_pairs_cuts_no_more_than_it_must(adds_bos):
    tokenizer = byte_tokenizer(bos_token="<s>", adds_bos=adds_bos)
    rng = random.Random(1)
    cut = 0
    for _ in range(500):
        prompt, chosen, rejected = ("".join(rng.choices("abc", k=rng.randint(1, 20))) for _ in range(3))
        record, max_length = texts(prompt, f"1{chosen}", f"2{rejected}"), rng.randint(2, 50)
        whole, example = (parts(one(tokenizer, record, m)) for m in (1000, max_length))
        lost = [len(before) - len(after) for before, after in zip(whole, example, strict=True)]
        assert all(n >= 0 for n in lost)
        bos = [tokenizer.bos_token_id] * adds_bos
        assert example[0] == bos + whole[0][len(bos) + lost[0] :], "the prompt loses its start, but not BOS"
        assert example[1:] == (whole[1][: len(example[1])], whole[2][: len(example[2])]), "responses lose their ends"
        assert example[0] and example[1] and example[2]
        longest = max(len(whole[1]), len(whole[2]))
        length = len(example[0]) + max(len(example[1]), len(example[2]))
        if len(whole[0]) + longest <= max_length:
            assert not any(lost)
        else:
            cut += 1
            assert length == max_length, "no more is cut than has to be"
            if longest < max_length:
                assert lost[1:] == [0, 0]
            else:
                assert len(example[0]) == min(len(whole[0]), max_length // 2)
        built = one(tokenizer, record, max_length)
        assert built.cut == any(lost)
        first, second = starts(built)
        assert built.loss_mask.tolist() == [False] * first + [True] * (len(built.input_ids) - first)
        assert second - first == len(example[1])
        for overflow in ("drop", "error"):
            if not any(lost):
                same = one(tokenizer, record, max_length, overflow=overflow)
                assert same.input_ids.tolist() == built.input_ids.tolist()
    assert 100 < cut < 400


def test_drop_and_error():
    tokenizer, record = byte_tokenizer(), texts("123456", "abc", "x")
    assert one(tokenizer, record, 9, overflow="drop") == Dropped("longer than max_length")
    with pytest.raises(UserError, match="10 tokens, but max_length is 9"):
        one(tokenizer, record, 9, overflow="error")


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(10, ("123456", "abc<eos>", "x<eos>")), (9, ("123456", "abc", "x<eos>")), (7, ("123456", "a", "x"))],
)
def test_keep_start_cuts_the_responses_ends_alone(max_length, expected):
    tokenizer = byte_tokenizer()
    example = one(tokenizer, texts("123456", "abc", "x"), max_length, overflow="keep_start")
    assert tuple(tokenizer.decode(ids) for ids in parts(example)) == expected
    assert one(tokenizer, texts("123456", "abc", "x"), 6, overflow="keep_start") == ONCE_CUT


# --- what is dropped --------------------------------------------------------------------------------------------------

ONCE_CUT = Dropped("chosen equals rejected once cut")


def test_equal_responses_are_dropped_before_and_after_cutting():
    tokenizer = byte_tokenizer("chatml")
    records = [texts("q", "same", "same"), chats("same", "same"), texts("q", "abcd1", "abcd2"), texts("q", "a", "b")]
    assert TokenizePairs(tokenizer, 1000)(records)[:2] == [Dropped("chosen equals rejected")] * 2
    short = TokenizePairs(tokenizer, 5)(records)
    assert short[:3] == [Dropped("chosen equals rejected")] * 2 + [ONCE_CUT]
    assert is_pair(short[3])
    assert is_pair(one(tokenizer, records[2], 6))


def test_responses_that_differ_only_in_what_the_template_trims_are_equal():
    assert one(byte_tokenizer("llama3"), chats("same", "same \n")) == Dropped("chosen equals rejected")
    assert is_pair(one(byte_tokenizer("chatml"), chats("same", "same \n")))


@pytest.mark.parametrize("blank", ["", " \n"])
def test_empty_responses_are_dropped(blank):
    tokenizer = byte_tokenizer("chatml")
    several = [turn("assistant", blank), turn("user", "so?"), turn("assistant", blank)]
    records = [texts("q", "a", blank), texts("q", blank, "a"), chats("a", blank), chats(several, "a"), chats("a", [])]
    assert TokenizePairs(tokenizer, 1000)(records) == [Dropped("empty response")] * 5
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    says_something = [turn("assistant", None, tool_calls=[call])], [*several[:-1], turn("assistant", "a")]
    for response in says_something:
        assert is_pair(one(tokenizer, chats(response, "b")))


def test_a_pair_needs_a_token_of_a_prompt():
    assert one(byte_tokenizer(), texts("", "ab", "ac")) == Dropped("no prompt")
    with_bos = byte_tokenizer(bos_token="<s>", adds_bos=True)
    assert as_text(with_bos, one(with_bos, texts("", "ab", "ac"))) == (
        "<s>",
        [("ab<eos>", True)],
        [("ac<eos>", True)],
    )
    # its only token also holds the beginning of both responses
    assert one(wrap(models.BPE(), WORDS), texts("t", "he", "he answer")) == Dropped("no prompt")


ALTERNATES = (
    "{% for m in messages %}{% if not loop.first and m.role == loop.previtem.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_dialogues_that_do_not_alternate_are_dropped_only_where_the_template_refuses_them():
    twice = chats([turn("assistant", "a"), turn("assistant", "b")], "c")
    assert is_pair(one(byte_tokenizer("chatml"), twice))
    reason = "the same role twice in a row, which the chat template refuses"
    strict = TokenizePairs(byte_tokenizer(ALTERNATES), 1000)
    dropped, kept = strict([twice, chats("a", "b")])
    assert dropped == Dropped(reason)
    assert is_pair(kept)


def test_what_the_template_refuses_for_other_reasons_is_an_error():
    refuses = byte_tokenizer("{% for m in messages %}{{ raise_exception('not today') }}{% endfor %}")
    with pytest.raises(UserError, match="the chat template refuses this conversation: not today"):
        one(refuses, chats("a", "b"))
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        one(byte_tokenizer(), chats("a", "b"))


def test_records_that_are_no_pairs_are_refused_and_pairs_are_refused_by_sft():
    tokenizer = byte_tokenizer("chatml")
    for record, message in [
        (Text("a", "q"), "not a pair of responses; DPO needs a chosen and a rejected one"),
        (Preference(Text("a", "q"), Text("b", "p")), "hold different prompts"),
        (Preference(Text("a", "q"), chat("q", "a", border=1)), "hold different prompts"),
        (Preference(chat("q", "a", border=1), chat("p", "b", border=1)), "hold different prompts"),
        (Preference(chat("q", "a"), chat("q", "b")), "needs prompt_messages"),
    ]:
        with pytest.raises(UserError, match=message):
            one(tokenizer, record)
    with pytest.raises(UserError, match="a pair of responses, a chosen and a rejected one, which is data for DPO"):
        Tokenize(tokenizer, 100)([texts("q", "a", "b")])
