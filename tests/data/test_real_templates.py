"""Chat templates that real models ship: each trained turn, in its context, against what inference feeds and expects.

Nothing here uses the package's own rendering: the expected texts come from `tokenizer.apply_chat_template`, and for
templates whose generation prompt is not how they begin a turn, from the table below, written by hand.

TRL's templates are those of the installed TRL. The others are in the source distribution of llama-cpp-python, whose
folder the environment variable OUMI_PL_TEMPLATES names.
"""

import importlib.util
import os
from itertools import groupby
from pathlib import Path

import pytest

from oumi_pl.data.rendering import ChatRenderer
from oumi_pl.data.template import apply_template, load_template
from oumi_pl.data.tokenize import Tokenize
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation
from tests.data.byte_level import byte_tokenizer, turn


def folder(package, *inside):
    spec = importlib.util.find_spec(package)
    actual = [Path(place, *inside) for place in spec.submodule_search_locations or ()] if spec else []
    return next((place for place in actual if place.is_dir()), None)


INSTALLED = folder("llama_cpp", "..", "vendor", "llama.cpp", "models", "templates")
LLAMA = Path(os.environ["OUMI_PL_TEMPLATES"]) if os.environ.get("OUMI_PL_TEMPLATES") else INSTALLED
TRL = folder("trl", "chat_templates")
FILES = [file for place in (LLAMA, TRL) if place for file in sorted(place.glob("*.jinja"))]
needs_sdist = pytest.mark.skipif(LLAMA is None, reason="OUMI_PL_TEMPLATES names no folder of llama.cpp's templates")

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "lookup_tide",
            "description": "Height of the tide",
            "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
        },
    },
)


def call(number, port):
    function = {"name": "lookup_tide", "arguments": {"port": port}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(number, text):
    return turn("tool", text, tool_call_id=f"call{number:05}", name="lookup_tide")


CONVERSATIONS = {
    "single": Conversation((turn("user", "2+2?"), turn("assistant", "It is four."))),
    "multi": Conversation(
        (
            *(turn("user", "2+2?"), turn("assistant", "It is four.")),
            *(turn("user", "And 3 more?"), turn("assistant", "That makes seven.")),
        )
    ),
    "system": Conversation((turn("system", "Be brief."), turn("user", "2+2?"), turn("assistant", "It is four."))),
    "tool": Conversation(
        (
            turn("user", "How high is the tide in Brest?"),
            turn("assistant", "", tool_calls=[call(1, "Brest")]),
            result(1, "4.2 m"),
            turn("assistant", "4.2 metres."),
        ),
        TOOLS,
    ),
    "parallel": Conversation(
        (
            turn("user", "Brest and Dover?"),
            turn("assistant", "", tool_calls=[call(1, "Brest"), call(2, "Dover")]),
            *(result(1, "4.2 m"), result(2, "5.9 m")),
            turn("assistant", "4.2 and 5.9 metres."),
        ),
        TOOLS,
    ),
    "reasoning": Conversation(
        (turn("user", "2+2?"), turn("assistant", "It is four.", reasoning_content="Two and two make four.")),
    ),
    "reasoning_multi": Conversation(
        (
            turn("user", "2+2?"),
            turn("assistant", "It is four.", reasoning_content="Two and two make four."),
            turn("user", "And 3 more?"),
            turn("assistant", "That makes seven.", reasoning_content="Four and three make seven."),
        )
    ),
    "starts_with_assistant": Conversation(
        (turn("assistant", "Welcome."), turn("user", "Tea."), turn("assistant", "One tea."))
    ),
    "user_twice": Conversation((turn("user", "Hello."), turn("user", "Are you there?"), turn("assistant", "Yes."))),
    "system_in_the_middle": Conversation(
        (
            *(turn("user", "2+2?"), turn("assistant", "It is four."), turn("system", "Be brief.")),
            *(turn("user", "And 3 more?"), turn("assistant", "That makes seven.")),
        )
    ),
}

NO_END = {"GLM-4.6", "GLM-4.7-Flash", "glm4moe"}
"""Templates that write nothing at the end of a turn: the model stops at the next turn's header."""
NO_STRINGS = {"idefics3", "idefics3_training", "smolvlm", "smolvlm_training"}
"""Templates that write nothing of a text that is not a list of parts."""
CLOSINGS = {
    "Apertus-8B-Instruct": "<|assistant_end|>",
    "Apriel-1.6-15b-Thinker-fixed": "\n<|end|>",
    "tencent-Hy3": "<\uff5chy_eos:opensource\uff5c>",
}
"""Ends of turns that these templates write only once another turn follows."""
MARKED_WITHOUT_END = {"glm4moe_training"}


def words_of(message):
    """The texts that have to be in the target of a turn."""
    words = [message["content"] or "", message.get("reasoning_content", "")]
    for built in message.get("tool_calls", ()):
        words += [built["function"]["name"], *built["function"]["arguments"].values()]
    return [word for word in words if word]


def has_all(text, words):
    return all(text.count(word) >= words.count(word) for word in words)


def runs(tokenizer, example):
    """What carries loss, in order: the text before it in its path, and itself."""
    actual, ends = [], []
    start = 0
    for segment in example.segments:
        own = range(start, start + segment.length)
        start += segment.length
        ends.append((*(ends[segment.parent][: segment.shared] if segment.shared else ()), *own))
        path = ends[-1]
        for carries, places in groupby(range(segment.shared, len(path)), lambda i, p=path: example.loss_mask[p[i]]):
            inside = list(places)
            if carries:
                texts = [tokenizer.decode([example.input_ids[i] for i in part]) for part in _split(path, inside)]
                actual.append(tuple(texts))
    return actual


def _split(path, inside):
    return path[: inside[0]], path[inside[0] : inside[-1] + 1]


def tokenizer_of(file):
    tokenizer = byte_tokenizer(bos_token="<bos>")
    apply_template(tokenizer, load_template(tokenizer, str(file)))
    return tokenizer


def rendered(tokenizer, messages, tools, prompt=False):
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(tools) if tools else None,
        add_generation_prompt=prompt,
        tokenize=False,
    )
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


def renders(tokenizer, messages, tools, prompt=False):
    try:
        return rendered(tokenizer, messages, tools, prompt)
    except Exception:  # what a template raises
        return None


OTHER_BEGINNINGS = {
    # What the model is fed is not how the template begins the rendered turn: (end of the context, target).
    # An open header that the turn does not have: the rendered turn is the only text there is.
    "Cohere2MoE": {"single": ("<|CHATBOT_TOKEN|>", "<|START_TEXT|>It is four.<|END_TEXT|><|END_OF_TURN_TOKEN|>")},
    "MiniMax-M2": {"single": ("]~b]ai\n", "It is four.[e~[")},
    "Spark2.5": {"single": ("<|Bot|>", "</think>It is four.<\uff5cend\u2581of\u2581sentence\uff5c>")},
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": {"single": ("assistant\n<think>", "</think>It is four.<|im_end|>")},
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": {
        "single": ("<\uff5cAssistant\uff5c>", "It is four.<\uff5cend\u2581of\u2581sentence\uff5c>")
    },
    "llama-cpp-deepseek-r1": {
        "single": ("<\uff5cAssistant\uff5c>", "It is four.<\uff5cend\u2581of\u2581sentence\uff5c>")
    },
    "deepseek-ai-DeepSeek-V3.2": {
        "single": ("<\uff5cAssistant\uff5c>", "</think>It is four.<\uff5cend\u2581of\u2581sentence\uff5c>")
    },
    # An empty block for thinking: inference feeds it, and the answer follows.
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": {
        "single": (
            "<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>",
            "<|START_RESPONSE|>It is four.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        )
    },
    "Qwen-QwQ-32B": {"single": ("assistant\n<think>\n</think>", "It is four.<|im_end|>")},
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": {
        "single": (
            "<\uff5cAssistant\uff5c><think>\n</think>",
            "It is four.<\uff5cend\u2581of\u2581sentence\uff5c>",
        )
    },
    "google-gemma-4-31B-it": {"single": ("<|turn>model\n<|channel>thought\n<channel|>", "It is four.<turn|>")},
    # A header for reasoning, which the reasoning follows, or which the turn writes in its own way.
    "Apriel-1.6-15b-Thinker-fixed": {
        "single": ("<|begin_assistant|>\n", "It is four.\n<|end|>"),
        "reasoning": (
            "<|begin_assistant|>\nHere are my reasoning steps:\n",
            "Two and two make four.\n[BEGIN FINAL RESPONSE]\nIt is four.\n<|end|>",
        ),
    },
    "tencent-Hy3": {
        "reasoning": (
            "<think:opensource>",
            "Two and two make four.</think:opensource>It is four.<\uff5chy_eos:opensource\uff5c>",
        )
    },
    "qwen3_5_nothink": {
        "reasoning": ("assistant\n<think>\n", "Two and two make four.\n</think>\n\nIt is four.<|im_end|>")
    },
    "nemotron_3_nano": {"single": ("assistant\n<think>", "</think>It is four.<|im_end|>")},
}


def marked(tokenizer, messages, tools):
    """The texts that transformers' own mask marks."""
    built = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(tools) if tools else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(built["assistant_masks"], built["input_ids"], strict=True)
    return [tokenizer.decode([i for _, i in group]) for carries, group in groupby(pairs, lambda p: p[0]) if carries]


def check_marked(name, tokenizer, conversation, index, context, target, whole):
    """Whether the target of a turn is what the template marks, and the end of the turn."""
    messages, tools = conversation.messages, conversation.tools
    spans = marked(tokenizer, messages, tools)
    if renders(tokenizer, messages[: index + 1], tools) is not None:
        spans += marked(tokenizer, messages[: index + 1], tools)[-1:]
    rests = [target.removeprefix(span).strip() for span in spans if target.startswith(span)]
    assert any(rest.count("<") <= 1 for rest in rests), (target, spans)
    prompt = renders(tokenizer, messages[:index], tools, prompt=True)
    through = renders(tokenizer, messages[: index + 1], tools)
    assert context + target in (through or whole) or context + target in whole or context == prompt


def check_target(name, tokenizer, conversation, index, context, target):
    """Whether the target of a trained turn is what a model would generate after the context."""
    messages, tools = conversation.messages, conversation.tools
    words = words_of(messages[index])
    assert has_all(target, words), f"not all of {words} in {target!r}"
    for other in messages[index + 1 :] + messages[:index]:  # nothing of another turn
        assert not (other["content"] and other["content"] in target and other["content"] not in "".join(words))
    if name not in MARKED_WITHOUT_END:  # the turn ends with something that says so
        assert not target.rstrip().endswith(words[-1]) or target != target.rstrip(), f"no end: {target!r}"
    whole = rendered(tokenizer, messages, tools)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        check_marked(name, tokenizer, conversation, index, context, target, whole)
        return
    closing = "<eos>" if name in NO_END else CLOSINGS.get(name, "")
    prompt = renders(tokenizer, messages[:index], tools, prompt=True)
    through = renders(tokenizer, messages[: index + 1], tools)
    if prompt is None or through is None or not index:
        assert context + target in whole + closing or context + target in (through or "") + closing
    elif through.startswith(prompt):
        assert context == prompt
        assert (through + closing).startswith(prompt + target), f"{target!r} is not how {through!r} goes on"
        # what generation does not reach: blanks, or an end of the text after the end of the turn
        rest = (through + closing).removeprefix(prompt + target).strip()
        always_prompts = through == renders(tokenizer, messages[: index + 1], tools, prompt=True)
        assert always_prompts or rest in {"", "<eos>", closing.strip()}
    else:
        assert context + target in through + closing or context == prompt


def never_writes(tokenizer, conversation):
    """Whether the template leaves out a text of an assistant's turn, whatever it is."""
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        changed = [{**message, key: "Zanzibar"} for key in ("content", "reasoning_content") if message.get(key)]
        calls = message.get("tool_calls", ())
        for i in range(len(calls)):
            changed.append({**message, "tool_calls": [*calls[:i], call(i + 1, "Zanzibar"), *calls[i + 1 :]]})
        for other in changed:
            before, after = conversation.messages[:index], conversation.messages[index + 1 :]
            through = renders(tokenizer, [*before, other], conversation.tools)
            if "Zanzibar" not in (through or renders(tokenizer, [*before, other, *after], conversation.tools) or ""):
                return True
    return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_trained_turn_is_what_would_be_generated_in_its_context(file):
    tokenizer, name = tokenizer_of(file), file.stem
    tokenize = Tokenize(tokenizer, 100_000, renderer=ChatRenderer(tokenizer, add_eos=name in NO_END))
    for case, conversation in CONVERSATIONS.items():
        if renders(tokenizer, conversation.messages, conversation.tools) is None:
            continue
        spoken = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        try:
            (example,) = tokenize([conversation])
        except UserError as error:  # only because the template does not write something
            assert "doesn't write the" in str(error), f"{case}: {error}"
            assert never_writes(tokenizer, conversation), f"{case}: {error}"
            continue
        trained = runs(tokenizer, example)
        assert len(trained) == len(spoken), (case, trained)
        for index, (context, target) in zip(spoken, trained, strict=True):
            check_target(name, tokenizer, conversation, index, context, target)
        if case in OTHER_BEGINNINGS.get(name, {}):
            context, target = OTHER_BEGINNINGS[name][case]
            assert trained[-1][0].endswith(context)
            assert trained[-1][1] == target
