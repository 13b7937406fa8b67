"""What a template writes of each trained turn: parts that are lost, ends of turns, variables, dates, and branches."""

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from oumi_pl.attention.segments import path_positions
from oumi_pl.data import template_date
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.pairs import TokenizePairs
from oumi_pl.data.rendering import ChatRenderer
from oumi_pl.data.sft import SFTData
from oumi_pl.data.template import BUILT_IN, OUMI, apply_template, load_template
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Preference, Segment
from tests.data.byte_level import byte_tokenizer, chat, turn
from tests.tiny import write_jsonl


def call(port, number=1):
    function = {"name": "lookup_tide", "arguments": {"port": port}}
    return {"id": f"c{number}", "type": "function", "function": function}


def calls(*ports, content=""):
    return turn("assistant", content, tool_calls=[call(port, i) for i, port in enumerate(ports, 1)])


ASK = turn("user", "Brest and Dover?")
PARALLEL = Conversation((ASK, calls("Brest", "Dover"), turn("tool", "4.2 m"), turn("tool", "5.9 m")))
THOUGHT = turn("assistant", "4", reasoning_content="Two and two make four.")
REASONING = Conversation((turn("user", "2+2?"), THOUGHT))


def one(tokenizer, record, max_length=1000, **kwargs):
    (example,) = Tokenize(tokenizer, max_length, **kwargs)([record])
    return example


def target(tokenizer, example):
    return tokenizer.decode(example.input_ids[example.loss_mask])


def named(name):
    tokenizer = byte_tokenizer(bos_token="<s>")
    apply_template(tokenizer, load_template(tokenizer, name))
    return tokenizer


# --- nothing of an answer is lost silently ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_train_calls_and_reasoning(name):
    tokenizer = named(name)
    for content in ("", None):
        record = Conversation((ASK, calls("Brest", "Dover", content=content), *PARALLEL.messages[2:]))
        trained = target(tokenizer, one(tokenizer, record))
        assert trained.count("lookup_tide") == 2
        assert "Brest" in trained and "Dover" in trained and "4.2" not in trained
    assert "Two and two make four." in target(tokenizer, one(tokenizer, REASONING))


@pytest.mark.parametrize("name", OUMI)
def test_oumis_templates_refuse_what_they_do_not_write(name):
    tokenizer = named(name)
    record = Conversation((ASK, calls("Brest", content="Let me look.")))
    with pytest.raises(UserError, match=r"write the tool call lookup_tide, argument 'port'.* of turn 2.*`lost:"):
        one(tokenizer, record)
    with pytest.raises(UserError, match=r"doesn't write the reasoning of turn 2"):
        one(tokenizer, REASONING)
    assert one(tokenizer, record, lost="drop") == Dropped("tool call that the chat template doesn't write")
    kept = one(tokenizer, record, lost="keep")
    assert kept.notes == ("tool call not trained, because the chat template doesn't write it",)
    assert target(tokenizer, kept).startswith("Let me look.")


TAIL = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def template(written, end="<|end|>"):
    return f"{{% for m in messages %}}<|{{{{ m.role }}}}|>{written}{end}{{% endfor %}}{TAIL}"


@pytest.mark.parametrize(
    ("written", "answer", "lost"),
    [
        ("{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}", calls("x"), "argument 'port'"),
        ("{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}", calls("x", "x"), "tool call lookup_tide"),
        ("{{ m.tool_calls | tojson if m.tool_calls else m.content }}", calls("x", content="a"), "text"),
        ("{{ m.content.split('</think>')[-1] }}", turn("assistant", "<think>a b</think>c"), r"reasoning \(<think>\)"),
        ("{{ m.content[:3] }}", turn("assistant", "a long answer"), "text"),
        # a short text that is elsewhere in the turn by accident
        ("said", turn("assistant", "a"), "text"),
        ("{{ m.content }}", turn("assistant", "assist", reasoning_content="ss"), "reasoning"),
    ],
)
def test_every_part_of_a_trained_turn_has_to_be_written(written, answer, lost):
    with pytest.raises(UserError, match=rf"doesn't write the .*{lost}.*turn 2"):
        one(byte_tokenizer(template(written)), Conversation((ASK, answer)))


def test_values_may_be_written_in_other_ways():
    arguments = {"text": 'é "quoted"\n<b>', "flag": True, "n": 3, "none": None, "list": ["a\\b", {"deep": 1.5}]}
    built = {"function": {"name": "f", "arguments": arguments}}
    record = Conversation((ASK, turn("assistant", "  two\nlines ", tool_calls=[built])))
    for write in ("tojson", "string", "tojson | escape", "tojson | tojson"):
        written = f"{{{{ m.content | trim }}}}{{{{ m.tool_calls | {write} if m.tool_calls }}}}"
        assert one(byte_tokenizer(template(written)), record).target_tokens
    as_text = {"function": {"name": "f", "arguments": json.dumps(arguments)}}
    record = Conversation((ASK, turn("assistant", "", tool_calls=[as_text])))
    assert one(byte_tokenizer("chatml"), record).target_tokens


def test_what_the_history_leaves_out_is_counted_and_no_error():
    strips = template("{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}|{% endif %}{{ m.content }}")
    record = Conversation((*REASONING.messages, turn("user", "And 3 more?"), turn("assistant", "7")))
    example = one(byte_tokenizer(strips), record)
    assert example.notes == ("reasoning of earlier turns left out of the context",)
    assert len(example.segments) == 2


def test_tokens_that_carry_loss_are_counted_by_kind():
    acts = {**calls("Brest", "Dover"), "reasoning_content": "I need both."}
    record = Conversation((ASK, acts, *PARALLEL.messages[2:], turn("assistant", "4.2 and 5.9")))
    tokenizer = byte_tokenizer("chatml")
    first, second = (f'lookup_tide", "arguments": {{"port": "{port}' for port in ("Brest", "Dover"))
    written = first + '"}}\n</tool_call>\n<tool_call>\n{"name": "' + second
    counts = Tokenize(tokenizer, 1000).loss_by_kind(record)
    assert counts == {"reasoning": len("I need both."), "tool call": len(written), "text": len("4.2 and 5.9")}


# --- ends of turns ----------------------------------------------------------------------------------------------------


def test_an_end_of_turn_outside_the_markers_is_added():
    outside = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for special in (True, False):
        tokenizer = byte_tokenizer(outside)
        if special:
            tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        example = one(tokenizer, chat("a", "b", "c", "d"))
        assert target(tokenizer, example) == "b<|im_end|>d<|im_end|>"
        assert len(example.segments) == 1


@pytest.mark.parametrize(
    "answer",
    [
        turn("assistant", "a"),
        turn("assistant", "a  \n"),
        turn("assistant", "", reasoning_content="r"),
        turn("assistant", "a", reasoning_content="r"),
        calls("x"),
    ],
)
def test_a_template_without_an_end_of_turn_is_refused_unless_eos_is_added(answer):
    everything = "{{ m.reasoning_content }}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    tokenizer = byte_tokenizer(template(everything, end=""))
    record = Conversation((ASK, answer, turn("user", "and?"), answer))
    with pytest.raises(UserError, match=r"writes nothing at the turn's end.*add_eos: true"):
        one(tokenizer, record)
    example = one(tokenizer, record, renderer=ChatRenderer(tokenizer, add_eos=True))
    ends = [path_positions(example.segments, i)[-1] for i in range(len(example.segments))]
    assert [tokenizer.decode([example.input_ids[i]]) for i in ends] == ["<eos>", "<eos>"]
    assert example.loss_mask[ends].all()


# --- branches ---------------------------------------------------------------------------------------------------------

STRIPS = (
    "{% for m in messages %}<{{ m.role[0] }}>"
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def thinking(turns, words=1):
    """A conversation whose answers have reasoning."""
    messages = []
    for i in range(turns):
        messages += [turn("user", f"q{i} " * words), turn("assistant", f"a{i}", reasoning_content=f"r{i} " * words)]
    return Conversation(tuple(messages))


def paths(tokenizer, example):
    """Each path as (text without loss in it, text with the loss of its own tokens)."""
    actual = []
    for i, segment in enumerate(example.segments):
        places = path_positions(example.segments, i)
        own = np.arange(len(places)) >= segment.shared
        carries = example.loss_mask[places] & own
        ids = example.input_ids[places]
        actual.append((tokenizer.decode(ids[~carries]), tokenizer.decode(ids[carries])))
    return actual


def test_each_turn_is_trained_after_the_history_that_it_would_have():
    tokenizer = byte_tokenizer(STRIPS)
    example = one(tokenizer, thinking(3))
    assert paths(tokenizer, example) == [
        ("<u>q0 .<a>", "(r0 )a0."),
        ("<u>q0 .<a>a0.<u>q1 .<a>", "(r1 )a1."),
        ("<u>q0 .<a>a0.<u>q1 .<a>a1.<u>q2 .<a>", "(r2 )a2."),
    ]
    assert [segment.shared for segment in example.segments] == [0, 10, 23]
    assert example.segments[2].parent == 1


def test_turns_that_go_on_where_another_ends_share_its_branch():
    # the reasoning of turns after the last question stays: the call and the answer are one branch
    keeps = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role[0] }}>"
        "{% if m.reasoning_content and loop.index0 > ns.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}.{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    asked = turn("user", "q")
    acts = {**calls("x"), "reasoning_content": "think"}
    record = Conversation((*thinking(1).messages, asked, acts, turn("tool", "ok"), turn("assistant", "done")))
    tokenizer = byte_tokenizer(keeps)
    example = one(tokenizer, record)
    assert len(example.segments) == 2
    assert "done." in paths(tokenizer, example)[1][1] and "(think)" in paths(tokenizer, example)[1][1]


@pytest.mark.parametrize("max_length", range(8, 60, 3))
def test_branches_are_cut_alike_and_the_preview_knows_where(max_length):
    tokenizer = byte_tokenizer(STRIPS)
    record = thinking(3, words=3)
    tokenize = Tokenize(tokenizer, max_length)
    (example,) = tokenize([record])
    assert max(s.shared + s.length for s in example.segments) <= max_length
    whole, kept = tokenize.uncut(record)
    assert len(kept) == len(example.segments) == len(whole.segments)
    start, cut = 0, []
    for segment, own in zip(whole.segments, kept, strict=True):
        cut.append(whole.input_ids[start + own])
        start += segment.length
    assert np.array_equal(np.concatenate(cut), example.input_ids)
    assert [len(own) for own in cut] == [segment.length for segment in example.segments]


def test_rows_with_branches_are_stored_packed_and_reported(tmp_path):
    rows = [{"messages": list(thinking(n, words=4).messages)} for n in (1, 3, 2)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = SFTData(file, tokenizer=byte_tokenizer(STRIPS), max_length=100, packing=True, batch_size=1)
    assert not data.branching
    data.prepare_data()
    data.setup("fit")
    assert data.branching
    report = data.report()["train"]
    lengths = data.lengths("train")
    assert report["turns_apart"] == 2
    assert report["turns_apart_tokens"] > 0
    assert report["notes"] == {"reasoning of earlier turns left out of the context": 2}
    assert data.capacity_for("train") == max(100, lengths.max())
    packs = [data.plan(0).row(i) for i in range(data.plan(0).rows)]
    assert sorted(np.concatenate(packs)) == [0, 1, 2]
    batch = data.batch("train", [0, 1, 2])
    assert [s.parent for s in batch["segments"]] == [-1, -1, 1, 2, -1, 4]
    together = SFTData(file, tokenizer=byte_tokenizer(STRIPS), turns="together")
    with pytest.raises(UserError, match=r"rows.jsonl.*2: turns: together is not exact"):
        together.prepare_data()


def test_the_loss_of_branches_is_that_of_each_turn_alone(tmp_path):
    import torch

    from oumi_pl.models.lm import documents, forest, padded
    from oumi_pl.modules.sft import SFT
    from tests.tiny import LLAMA

    tokenizer = byte_tokenizer(STRIPS)
    record = thinking(3)
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": list(record.messages)}] * 2)
    data = SFTData(file, tokenizer=tokenizer, max_length=200, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    model = SFT(config=LLAMA | {"vocab_size": len(tokenizer)}).build(tokenizer, branching=True)
    assert model.layout is forest
    alone = 0.0
    for context, trained in paths(tokenizer, data.examples("train")[0]):
        ids = torch.tensor([tokenizer(context + trained, add_special_tokens=False)["input_ids"]])
        logps = model.hf(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        alone -= logps[len(tokenizer(context, add_special_tokens=False)["input_ids"]) - 1 :].sum()
    batch = data.batch("train", [0, 1])
    for layout in (forest, documents, padded):
        model.layout = layout
        losses = -model(batch, lambda states: states.logps())
        assert torch.allclose(losses.sum(), 2 * alone, rtol=1e-5), layout


# --- variables and dates ----------------------------------------------------------------------------------------------

READS = template("{{ m.content }}{{ mood if mood is defined }}")


def test_template_variables_are_given_and_unknown_ones_refused(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": list(chat("2+2?", "4").messages)}])

    def make(**kwargs):
        data = SFTData(file, tokenizer=byte_tokenizer(READS), **kwargs)
        data.prepare_data()
        return data.tokenizer.decode(data.examples("train")[0].input_ids)

    assert "4 happy" in make(template_variables={"mood": " happy"})
    assert "4<|end|>" in make()
    with pytest.raises(UserError, match=r"reads no 'mod'; did you mean 'mood'\?; it reads mood"):
        make(template_variables={"mod": 1})
    tokenizer = byte_tokenizer(READS)
    record = Conversation(chat("a", "b").messages, template_variables={"mood": "!"})
    assert target(tokenizer, one(tokenizer, record)) == "b!<|end|>"
    with pytest.raises(UserError, match="reads no 'date'"):
        one(tokenizer, Conversation(chat("a", "b").messages, template_variables={"date": "2026-01-01"}))


def test_todays_date_is_the_day_of_the_first_preparation(tmp_path, monkeypatch):
    dated = "{{ strftime_now('%d %b %Y') }}" + template("{{ m.content }}")
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": list(chat("a", "b").messages)}])

    def on(day, **kwargs):
        class Today(date):
            @classmethod
            def today(cls):
                return day

        monkeypatch.setattr(template_date, "Date", Today)
        data = SFTData(file, tokenizer=byte_tokenizer(dated), **kwargs)
        data.prepare_data()
        data.setup("fit")
        text = data.tokenizer.decode(data.examples("train")[0].input_ids)
        ((prompt, _),) = data.prompts("train")
        assert data.tokenizer.decode(prompt)[:11] == text[:11]
        assert data.report()["train"]["template_date"] == kwargs.get("template_variables", {}).get("date", "2026-03-01")
        return text[:11], data.made_from()

    first = on(date(2026, 3, 1))
    assert first[0] == "01 Mar 2026"
    assert on(date(2026, 3, 2)) == first
    other = on(date(2026, 3, 2), template_variables={"date": "2024-07-26"})
    assert other[0] == "26 Jul 2024"
    assert other[1] != first[1]
    with pytest.raises(UserError, match=r"template_variables\.date is 'soon'"):
        on(date(2026, 3, 2), template_variables={"date": "soon"})


def test_templates_of_trl_and_named_ones():
    tokenizer = byte_tokenizer()
    assert "{%- generation" in load_template(tokenizer, "trl/qwen3").text
    with pytest.raises(UserError, match=r"TRL has no template 'qwen33'; did you mean 'qwen3"):
        load_template(tokenizer, "trl/qwen33")
    tokenizer.chat_template = {"default": template("{{ m.content }}"), "tool_use": template("T{{ m.content }}")}
    assert load_template(tokenizer, "tool_use").text == template("T{{ m.content }}")
    with_tools = Conversation(chat("a", "b").messages, ({"type": "function", "function": {"name": "f"}},))
    assert [target(tokenizer, one(tokenizer, record)) for record in (chat("a", "b"), with_tools)] == [
        "b<|end|>",
        "Tb<|end|>",
    ]


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair(chosen, rejected):
    asked = turn("user", "How high is the tide in Brest?")
    return Preference(*(Conversation((asked, answer), prompt_messages=1) for answer in (chosen, rejected)))


def test_pairs_that_differ_in_calls_or_reasoning_are_kept():
    tokenizer = byte_tokenizer("chatml")
    thought = [turn("assistant", "4", reasoning_content=text) for text in ("Two and two make four.", "A guess.")]
    records = [
        pair(calls("Brest"), turn("assistant", "I can't know that.")),
        pair(calls("Brest"), calls("Paris")),
        pair(*thought),
    ]
    for example in TokenizePairs(tokenizer, 500)(records):
        chosen = example.segments[0].length
        assert example.loss_mask[:chosen].sum() > 2
        assert example.loss_mask[chosen:].sum() > 2
    bare = byte_tokenizer(template("{{ m.content }}"))
    for record, part in zip(records[1:], ("tool call lookup_tide", "reasoning"), strict=True):
        with pytest.raises(UserError, match=f"doesn't write the {part}"):
            TokenizePairs(bare, 500)([record])
    assert TokenizePairs(bare, 500, lost="drop")(records[1:2]) == [
        Dropped("tool call that the chat template doesn't write")
    ]


def test_pairs_take_the_options_of_chat_data(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    data = DPOData(file, tokenizer=byte_tokenizer("chatml"), lost="keep", template_variables={})
    data.prepare_data()
    assert data.encoding_key()[1] == "keep"


def test_cases(tmp_path):
    """The small inputs of `../shared/cases`, with each template that ships with the package."""
    folder = Path(__file__).parents[3] / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip("needs ../shared/cases")
    for name in ("tool_call", "tool_call_parallel", "tool_call_no_tools_column", "reasoning_key", "reasoning_inline"):
        row = json.loads((folder / f"{name}.jsonl").read_text().splitlines()[0])
        data = SFTData(write_jsonl(tmp_path / f"{name}.jsonl", [row]), tokenizer=named("chatml"), template="chatml")
        data.prepare_data()
        text = target(data.tokenizer, data.examples("train")[0])
        spoken = [message for message in row["messages"] if message["role"] == "assistant"]
        for message in spoken:
            for built in message.get("tool_calls", ()):
                assert text.count(built["function"]["arguments"]["port"]) == 1
            assert message.get("reasoning_content", "") in text
            assert message["content"] in text
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        assert not any(f"{content}\n" in text for content in results), name


def test_segments_of_one_text_are_one():
    example = one(byte_tokenizer("chatml"), chat("a", "b", "c", "d"), turns="apart")
    assert example.segments == (Segment(len(example.input_ids)),)
