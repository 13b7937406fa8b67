"""Small inputs that were once misread, with their right results; and LLaMA-Factory's example shapes.

The first half reads the files of `../shared/cases`; the second has rows of its own.
"""

import json
from pathlib import Path

import pytest

from oumi_pl.attention.segments import path_positions
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.errors import UserError
from tests.data.byte_level import byte_tokenizer
from tests.tiny import write_jsonl

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")


def module(source, cls=SFTData, template="chatml", options=None, **settings):
    """A data module of a file, or of rows."""
    built = cls(
        Source(str(source), **(options or {})), tokenizer="none", template=template, max_length=4000, **settings
    )
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = None
    built.__dict__["tokenizer"] = tokenizer
    built.added_tokens = built.prepare_tokenizer(tokenizer)
    return built


def trained(source, **kwargs):
    """The texts of a source's examples, as (text that carries loss, whole text)."""
    built = module(source, **kwargs)
    built.setup("fit")
    texts = []
    for example in built.examples("train"):
        ids = example.input_ids
        texts.append((built.tokenizer.decode(ids[example.loss_mask]), built.tokenizer.decode(ids)))
    return texts


def report(source, **kwargs):
    built = module(source, **kwargs)
    built.setup("fit")
    return built.report()["train"]


def rows(name):
    return [json.loads(line) for line in (CASES / name).read_text().splitlines() if line]


# ---- the files


@needs_cases
@pytest.mark.parametrize("name", ["tool_call.jsonl", "tool_call_parallel.jsonl", "tool_call_no_tools_column.jsonl"])
def test_calls_carry_loss_and_results_do_not(name):
    ((losses, whole),) = trained(CASES / name)
    ports = ["Brest", "Dover"] if "parallel" in name else ["Brest"]
    assert losses.count("lookup_tide") == len(ports)
    assert all(f'"port": "{port}"' in losses for port in ports)
    assert "4.2 m<" not in losses
    assert "4.2 m<" in whole.replace("\n", "<")


@needs_cases
def test_arguments_as_text_are_the_same_tokens():
    assert trained(CASES / "tool_call_string_arguments.jsonl") == trained(CASES / "tool_call.jsonl")


@needs_cases
def test_calls_of_other_formats_are_the_same_tokens(tmp_path):
    assert trained(CASES / "sharegpt_tool_roles.jsonl") == trained(CASES / "tool_call.jsonl")
    without = [{name: value for name, value in row.items() if name != "tools"} for row in rows("tool_call.jsonl")]
    assert trained(CASES / "function_call_legacy.jsonl") == trained(write_jsonl(tmp_path / "rows.jsonl", without))


@needs_cases
def test_pairs_of_calls():
    (first, second) = trained(CASES / "tool_call_dpo.jsonl", cls=DPOData)
    assert "lookup_tide" in first[0]
    assert "I can't know that." in first[0]
    assert "Brest" in second[0]
    assert "Paris" in second[0]


@needs_cases
@pytest.mark.parametrize("name", ["reasoning_key.jsonl", "reasoning_inline.jsonl"])
def test_reasoning_carries_loss(name):
    ((losses, _),) = trained(CASES / name)
    assert "Two and two make four." in losses
    assert losses.endswith("4<|im_end|>")


@needs_cases
def test_pairs_that_differ_in_their_reasoning_are_kept():
    ((losses, _),) = trained(CASES / "reasoning_dpo.jsonl", cls=DPOData)
    assert "Two and two make four." in losses
    assert "A guess." in losses


@needs_cases
def test_each_answer_is_trained_after_the_history_it_would_have():
    """Qwen3's template removes the reasoning of earlier turns once the user speaks again."""
    qwen3 = (
        Path(pytest.importorskip("trl", reason="needs TRL's templates").__file__).parent / "chat_templates/qwen3.jinja"
    )
    built = module(CASES / "reasoning_multi_turn.jsonl", template=str(qwen3))
    built.setup("fit")
    (example,) = built.examples("train")
    decode = built.tokenizer.decode
    paths = [path_positions(example.segments, i) for i in range(len(example.segments))]
    first, second = ([decode(example.input_ids[p]), decode(example.input_ids[p][example.loss_mask[p]])] for p in paths)
    assert first[1] == "<think>\nTwo and two make four.\n</think>\n\n4<|im_end|>"
    assert second[1] == "<think>\nFour and three make seven.\n</think>\n\n7<|im_end|>"
    assert "Two and two make four." not in second[0]
    assert second[0].startswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>")


@needs_cases
def test_the_end_of_a_turn_outside_the_markers_is_trained():
    row = CASES / "turn_weight.jsonl"
    ((losses, _),) = trained(row, template=str(CASES / "eot_outside_markers.jinja"))
    assert losses == "Paris.<|im_end|>"


@needs_cases
@pytest.mark.parametrize("name", ["turn_weight.jsonl", "turn_loss_false.jsonl", "turn_train_false.jsonl"])
def test_a_turn_that_says_so_carries_no_loss(name):
    ((losses, whole),) = trained(CASES / name)
    assert losses == "Paris.<|im_end|>"
    assert "Lyon" in whole


@needs_cases
@pytest.mark.parametrize("name", ["alpaca", "prompt_response", "sharegpt"])
def test_a_system_column_is_the_first_turn(name, tmp_path):
    turns = [("system", "Talk like a pirate."), ("user", "Greet."), ("assistant", "Ahoy!")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert trained(CASES / f"system_beside_{name}.jsonl") == trained(write_jsonl(tmp_path / "rows.jsonl", [row]))


@needs_cases
def test_a_history_is_trained_as_train_on_says():
    ((losses, whole),) = trained(CASES / "alpaca_history.jsonl")
    assert losses == "Bonjour.<|im_end|>"
    assert whole.count("<|im_start|>") == 4
    ((losses, _),) = trained(CASES / "alpaca_history.jsonl", train_on="assistant")
    assert losses == "Hello.<|im_end|>Bonjour.<|im_end|>"


@needs_cases
def test_an_alpaca_pair():
    ((losses, whole),) = trained(CASES / "alpaca_preference.jsonl", cls=DPOData)
    assert losses == "Red.<|im_end|>Blue.<|im_end|>"
    assert "<|im_start|>user\nName a colour.\n\nWarm.<|im_end|>" in whole


@needs_cases
def test_unpaired_rows_are_refused_in_sft():
    with pytest.raises(UserError, match=r"column 'label'.*`label: keep_good`"):
        trained(CASES / "unpaired_label.jsonl")
    assert [losses for losses, _ in trained(CASES / "unpaired_label.jsonl", options={"label": "keep_good"})] == [
        "4<|im_end|>"
    ]


@needs_cases
def test_images_are_refused():
    with pytest.raises(UserError, match="column 'images': images, audio and video can't be trained on yet"):
        trained(CASES / "image_column.jsonl")


@needs_cases
def test_messages_as_text_are_read():
    assert [losses for losses, _ in trained(CASES / "messages_as_json_text.jsonl")] == ["4<|im_end|>"]


@needs_cases
@pytest.mark.parametrize("name", ["starts_with_assistant.jsonl", "user_twice.jsonl"])
def test_unusual_turns_are_trained_or_named(name):
    assert len(trained(CASES / name)) == 2
    with pytest.raises(UserError, match=rf"{name}:1: the chat template refuses this conversation: .*alternate"):
        trained(CASES / name, template="oumi/gemma2-it")
    actual = report(CASES / name, template="oumi/gemma2-it", bad_rows="drop")
    assert (actual["kept"], sum(actual["dropped"].values())) == (1, 1)


# ---- the example shapes of LLaMA-Factory's data/README.md and of its demo files

GLAIVE = {
    "conversations": [
        {"from": "human", "value": "How high is the tide?"},
        {"from": "function_call", "value": '{"name": "tide", "arguments": {"port": "Brest"}}'},
        {"from": "observation", "value": '{"height": 4.2}'},
        {"from": "gpt", "value": "4.2 metres."},
    ],
    "tools": '[{"name": "tide", "description": "d", "parameters": {"type": "object", "properties": {}}}]',
    "system": "Be brief.",
}
DIALOGUE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
SHAPES = {
    "alpaca": (
        {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"], ["f", "g"]]},
        {"train_on": "assistant"},
        "e<|im_end|>g<|im_end|>c<|im_end|>",
    ),
    "alpaca, last answer": ({"instruction": "a", "output": "c", "history": [["d", "e"]]}, {}, "c<|im_end|>"),
    "sharegpt": ({"conversations": [*DIALOGUE[:2]], "system": "s", "tools": ""}, {}, "b<|im_end|>"),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {},
        "b<|im_end|>",
    ),
    "pre-training": ({"text": "words"}, {}, "ords<eos>"),
    "preference": (
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
        {"cls": DPOData},
        "c<|im_end|>d<|im_end|>",
    ),
    "sharegpt preference": (
        {"conversations": DIALOGUE, "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}},
        {"cls": DPOData},
        "x<|im_end|>y<|im_end|>",
    ),
    "unpaired": (
        {"instruction": "a", "input": "", "output": "b", "kto_tag": True},
        {"options": {"label": "keep_good"}},
        "b<|im_end|>",
    ),
    "unpaired sharegpt": (
        {"conversations": DIALOGUE[:2], "kto_tag": True},
        {"options": {"label": "keep_good"}},
        "b<|im_end|>",
    ),
    "kto demo": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True},
        {"options": {"label": "keep_good"}},
        "b<|im_end|>",
    ),
    "openorca": ({"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, {}, "b<|im_end|>"),
    "orca pairs": (
        {"system": "", "question": "a", "chosen": "x", "rejected": "y"},
        {"cls": DPOData},
        "x<|im_end|>y<|im_end|>",
    ),
    "lmsys": (
        {"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "language": "en"},
        {"options": {"columns": {"messages": "conversation"}}},
        "b<|im_end|>",
    ),
    "magpie": ({"instruction": "a", "response": "b"}, {"options": {"columns": {"output": "response"}}}, "b<|im_end|>"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_llama_factorys_shapes_need_one_line_at_most(tmp_path, name):
    row, settings, expected = SHAPES[name]
    assert len(settings) <= 1
    ((losses, whole),) = trained(write_jsonl(tmp_path / "rows.jsonl", [row]), **settings)
    assert losses == expected
    for text in ("system", "system_prompt"):
        assert not row.get(text) or f"<|im_start|>system\n{row[text]}<|im_end|>" in whole


def test_llama_factorys_calls(tmp_path):
    ((losses, whole),) = trained(write_jsonl(tmp_path / "rows.jsonl", [GLAIVE]))
    assert '{"name": "tide", "arguments": {"port": "Brest"}}' in losses
    assert losses.endswith("4.2 metres.<|im_end|>")
    assert "height" not in losses
    assert '"name": "tide", "description": "d"' in whole
    assert "Be brief." in whole


@pytest.mark.parametrize("name", ["images", "videos", "audios"])
def test_llama_factorys_media_are_refused_by_name(tmp_path, name):
    mark = f"<{name.removesuffix('s')}>"
    shapes = [
        {"instruction": f"{mark}a", "output": "b", name: ["file"]},
        {"conversations": [{"from": "human", "value": f"{mark}a"}, {"from": "gpt", "value": "b"}], name: ["file"]},
        {"messages": [{"role": "user", "content": f"{mark}a"}, {"role": "assistant", "content": "b"}], name: ["file"]},
    ]
    for i, row in enumerate(shapes):
        path = write_jsonl(tmp_path / f"{i}.jsonl", [row])
        with pytest.raises(UserError, match=f"column '{name}': images, audio and video can't be trained on yet"):
            trained(path)
        with pytest.raises(UserError, match=f"refers to what is left out: its text holds {mark}"):
            trained(path, options={"ignore": [name]})


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_unpaired_rows_name_their_column(tmp_path, name):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b", name: False}])
    with pytest.raises(UserError, match=f"column '{name}'.*`label: keep_good`"):
        trained(path)


# ---- developers

LOOP = "{% for m in messages %}"
GENERIC = LOOP + "<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
DROPS = GENERIC.replace(LOOP, "{% for m in messages if m.role != 'developer' %}")
REFUSES = GENERIC.replace(LOOP, LOOP + "{% if m.role == 'developer' %}{{ raise_exception('who?') }}{% endif %}")


@pytest.mark.parametrize(("template", "role"), [(GENERIC, "developer"), (DROPS, "system"), (REFUSES, "system")])
def test_developers_are_written_as_the_template_does_or_as_system(tmp_path, template, role):
    (tmp_path / "t.jinja").write_text(template)
    turns = [("developer", "Be brief."), ("user", "a"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    ((losses, whole),) = trained(write_jsonl(tmp_path / "rows.jsonl", [row]), template=str(tmp_path / "t.jinja"))
    assert losses == "b<eos>"
    assert whole == f"<{role}>Be brief.<eos><user>a<eos><assistant>b<eos>"
