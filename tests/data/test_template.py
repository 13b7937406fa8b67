"""Finding a chat template, giving a tokenizer what it needs, and the texts that the built-in ones write."""

import signal
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oumi_pl.data import template
from oumi_pl.data.template import BUILT_IN, apply_template, load_template
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation
from tests.data.byte_level import prompt_of, spans_of


def byte_tokenizer(bos=None, eos="<eos>", adds_bos=False, **kwargs):
    """One token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, **kwargs)
    if adds_bos:
        pair = (bos, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[pair])
    return tokenizer


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL, {"function": {"name": "f", "arguments": '{"x": "é"}'}}],
    },
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Two", "reasoning_content": "so"},
)
CHATML = """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
1 + 1?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>
<tool_call>
{"name": "f", "arguments": {"x": "é"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
2
</tool_response>
<tool_response>
3
</tool_response><|im_end|>
<|im_start|>assistant
<think>
so
</think>

Two<|im_end|>
<|im_start|>assistant
"""
LLAMA3 = """<|start_header_id|>system<|end_header_id|>

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "add", "parameters": {"a": 1}}
{"name": "f", "parameters": {"x": "é"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

2<|eot_id|><|start_header_id|>ipython<|end_header_id|>

3<|eot_id|><|start_header_id|>assistant<|end_header_id|>

<think>
so
</think>

Two<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""
PLAIN = """System: Be brief.
User: 1 + 1?
Assistant: Call: {"name": "add", "arguments": {"a": 1}}
Call: {"name": "f", "arguments": {"x": "é"}}<eos>
Tool: 2
Tool: 3
Assistant: <think>
so
</think>

Two<eos>
Assistant:"""


@pytest.mark.parametrize(("name", "expected"), [("chatml", CHATML), ("llama3", LLAMA3), ("plain", PLAIN)])
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_built_in_texts(name, expected, bos):
    tokenizer = byte_tokenizer(bos=bos, adds_bos=bos is not None)
    apply_template(tokenizer, load_template(tokenizer, name))
    assert prompt_of(tokenizer, TURNS, None) == (bos or "") + expected
    # What the exported tokenizer writes for others is what was trained on.
    assert tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False) == (bos or "") + expected


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("system", [True, False])
def test_tools_are_listed_once_before_the_conversation(name, system):
    tokenizer = byte_tokenizer()
    apply_template(tokenizer, load_template(tokenizer, name))
    schema = {"type": "function", "function": {"name": "add"}}
    text = prompt_of(tokenizer, TURNS if system else TURNS[1:], [schema])
    assert text.count('{"type": "function", "function": {"name": "add"}}') == 1
    assert text.index('"type"') < text.index("1 + 1?")
    assert text.count("Be brief.") == system
    if name == "chatml":
        assert text.count("<|im_start|>system\n") == 1
        assert "<tools>\n{" in text and "}\n</tools>\n" in text


@pytest.mark.parametrize(
    ("name", "missing", "end"),
    [
        ("chatml", ("<|im_end|>", "<|im_start|>"), "<|im_end|>"),
        ("llama3", ("<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"), "<|eot_id|>"),
        ("plain", (), None),
    ],
)
def test_missing_tokens_are_added_once_and_survive_saving(name, missing, end, tmp_path):
    tokenizer = byte_tokenizer()
    template = load_template(tokenizer, name)
    assert (template.source, template.missing_tokens, template.end_of_turn) == (f"built-in {name}", missing, end)
    size = len(tokenizer)
    assert len(apply_template(tokenizer, template)) == len(missing) == len(tokenizer) - size
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in missing)
    again = load_template(tokenizer, name)
    assert (again.missing_tokens, again.end_of_turn, apply_template(tokenizer, again)) == ((), end, [])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    own = load_template(loaded, None)
    assert (own.text, own.source, own.end_of_turn) == (template.text, "the tokenizer's own", end)
    assert loaded.decode(loaded("a" + "".join(missing))["input_ids"], skip_special_tokens=True) == "a"


def test_a_word_tokenizer_lacks_what_it_reads_as_unknown():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert load_template(tokenizer, "chatml").missing_tokens == ("<|im_end|>", "<|im_start|>")


def test_pad_becomes_eos_only_where_there_is_none():
    tokenizer = byte_tokenizer()
    assert apply_template(tokenizer, None) == []
    assert tokenizer.pad_token == "<eos>"
    padded = byte_tokenizer(pad_token="<pad>")
    apply_template(padded, load_template(padded, "plain"))
    assert padded.pad_token == "<pad>"
    with pytest.raises(UserError, match="neither a pad token nor an end-of-text token"):
        apply_template(byte_tokenizer(eos=None), None)
    with pytest.raises(UserError, match=r"built-in plain\) ends turns with the tokenizer's eos_token"):
        load_template(byte_tokenizer(eos=None), "plain")


def test_a_file_brings_the_tokens_it_writes(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{# <|comment|> #}{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}<|done|>\n{% endfor %}<eos>\n"
    )
    tokenizer = byte_tokenizer()
    template = load_template(tokenizer, str(file))
    assert (template.source, template.end_of_turn) == ("file mine.jinja", "<|done|>")
    assert template.missing_tokens == ("<|done|>", "<|turn|>")
    assert len(apply_template(tokenizer, template)) == 2
    assert tokenizer.chat_template == template.text


def test_the_tokenizers_own_template_is_left_alone():
    tokenizer = byte_tokenizer()
    assert load_template(tokenizer, None) is None
    tokenizer.chat_template = "{% for m in messages %}<|x|>{{ m.content }}{{ eos_token }}{% endfor %}"
    template = load_template(tokenizer, None)
    assert (template.missing_tokens, template.end_of_turn) == ((), None)
    assert apply_template(tokenizer, template) == []


def test_wrong_names_and_files_offer_the_nearest(tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for %}")
    for name, message in {
        "chatmll": r"unknown chat template 'chatmll'; did you mean 'chatml'\? \(or name a .jinja file\)",
        str(tmp_path / "mime.jinja"): r"no chat template file '.*'; did you mean '.*mine.jinja'",
        str(tmp_path / "mine.jinja"): r"\(file mine.jinja\) isn't valid Jinja, line 1",
    }.items():
        with pytest.raises(UserError, match=message):
            load_template(byte_tokenizer(), name)


def test_conversations_without_any_template_are_refused():
    conversation = Conversation(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))
    with pytest.raises(UserError, match="no chat template; choose one with `template`: chatml, llama3, plain"):
        spans_of(byte_tokenizer(), conversation, [1])


def test_the_end_of_turn_is_unknown_where_the_answer_is_not_written():
    tokenizer = byte_tokenizer(bos="<s>")
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}{% endfor %}"
    assert load_template(tokenizer, None).end_of_turn is None


def test_a_key_without_a_value_is_not_there():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'name' in m }}{% endfor %}"
    assert prompt_of(tokenizer, [{**TURNS[1], "name": "x"}, {**TURNS[1], "name": None}]) == "TrueFalse"


def test_named_templates_with_one_for_tools():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "no tools", "tool_use": "{{ tools | length }} tools"}
    assert load_template(tokenizer, None).text == "no tools"
    assert prompt_of(tokenizer, TURNS, None) == "no tools"
    assert prompt_of(tokenizer, TURNS, [{"name": "f"}]) == "1 tools"


# ---- limits of rendering

LOOPS = 3 * "{% for i in range(99999) %}" + 3 * "{% endfor %}"


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    monkeypatch.setattr(template, "_limited", set())


def test_a_template_that_loops_is_ended_and_not_rendered_again(short_limit):
    with pytest.raises(template.TemplateLimitError, match="does it loop for ever"), template.limits(LOOPS):
        template.compiled(LOOPS).render()
    with pytest.raises(template.TemplateLimitError, match="does it loop for ever"), template.limits(LOOPS):
        raise AssertionError("rendered again")


GIANT = {
    "repeated": "{{ 'a' * 10 ** 10 }}",
    "added": "{% set n = namespace(a='a') %}{% for _ in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "joined": "{% set a = 'a' * 1000000 %}{% for _ in range(1000) %}{{ a }}{% endfor %}",
    "centred": "{{ 'a' | center(10 ** 10) }}",
    "formatted": "{{ '%0*d' | format(10 ** 9, 1) }}",
}


@pytest.mark.parametrize("source", GIANT.values(), ids=GIANT)
def test_a_template_that_writes_giant_texts_is_ended(source):
    with pytest.raises(template.TemplateLimitError, match="characters"), template.limits(source):
        template.compiled(source).render()


def test_time_in_which_this_process_does_not_run_is_not_counted(short_limit):
    """A machine that many programs share, or a laptop that sleeps, is no fault of the template."""
    with template.limits(LOOPS):
        time.sleep(0.5)
    with pytest.raises(template.TemplateLimitError), template.limits(LOOPS):
        time.sleep(0.3)
        work(0.5)


def test_a_timer_that_could_not_be_stopped_ends_nothing_later(short_limit, monkeypatch):
    """An exception at the end of the stack leaves no room for the call that stops it."""
    start = signal.setitimer

    def stack_is_full(which, seconds, interval=0.0):
        if not seconds:
            raise RecursionError
        return start(which, seconds, interval)

    monkeypatch.setattr(signal, "setitimer", stack_is_full)
    with pytest.raises(RecursionError), template.limits(LOOPS):
        raise RecursionError
    work(0.5)
    monkeypatch.setattr(signal, "setitimer", start)
    with template.limits(LOOPS):
        pass
