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

from oumi_pl.data.template import apply_template, load_template
from oumi_pl.types import Conversation
from tests.data.byte_level import byte_tokenizer, turn


def folder(package, *inside):
    spec = importlib.util.find_spec(package)
    found = [Path(place, *inside) for place in spec.submodule_search_locations or ()] if spec else []
    return next((place for place in found if place.is_dir()), None)


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
    "tencent-Hy3": "<｜hy_eos:opensource｜>",
}
"""Ends of turns that these templates write only once another turn follows."""
MARKED_WITHOUT_END = {"glm4moe_training"}


def words_of(message):
    """The texts that have to be in the target of a turn."""
    words = [message["content"] or "", message.get("reasoning_content", "")]
    for made in message.get("tool_calls", ()):
        words += [made["function"]["name"], *made["function"]["arguments"].values()]
    return [word for word in words if word]


def has_all(text, words):
    return all(text.count(word) >= words.count(word) for word in words)


def runs(tokenizer, example):
    """What carries loss, in order: the text before it in its path, and itself."""
    found, ends = [], []
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
                found.append(tuple(texts))
    return found


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
