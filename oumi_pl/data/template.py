"""Chat templates: which one is in force, which tokens it needs, and where the assistant's turns lie in what it renders.

A template says itself which characters the assistant wrote when it has `{% generation %}` markers; the built-in ones
do. Without markers the border is found by rendering the conversation up to the turn, which is exact as long as the
template never writes a turn differently once others follow; where it does, `ChatRenderer` refuses rather than guesses.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = ("chatml", "llama3", "plain")
OUMI = tuple(
    f"oumi/{name}" for name in ("chat_ml", "default", "gemma2-it", "gpt2", "llama3-instruct", "phi3-instruct", "zephyr")
)
"""Those that recipes of Oumi name. They add no token to a tokenizer: what it lacks is tokenized as text."""
_OWN = "the tokenizer's own"
_HELP = f"a built-in template ({', '.join(BUILT_IN)})"

Span = tuple[int, int]
"""Start and end, in characters of the rendered text."""

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s'\"]+\|>")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what it asks of a tokenizer.

    text: the Jinja source. source: where it came from, for people: "the tokenizer's own", "built-in chatml",
    "file x.jinja". missing_tokens: special tokens that it writes and the tokenizer lacks. end_of_turn: the token that
    ends the assistant's turns where that isn't the tokenizer's EOS, so that generation can stop there; else None.
    """

    text: str
    source: str
    missing_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None


def load_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> ChatTemplate | None:
    """Finds the chat template to use, without changing the tokenizer.

    Args:
        tokenizer: The tokenizer that will be used.
        template: The name of a built-in one, the path of a `.jinja` file, or None for the tokenizer's own.

    Returns:
        The template; None where none is named and the tokenizer has none, which is fine as long as no row is a
        conversation (`ChatRenderer` refuses those).

    Raises:
        UserError: no such template (offers the nearest), it isn't valid Jinja, or it ends turns with an EOS token
            that the tokenizer doesn't have.
    """
    if template is None and not tokenizer.chat_template:
        return None
    text, source = _read(tokenizer, template)
    _check(tokenizer, text, source)
    # A tokenizer knows what its own template needs: only a foreign one brings tokens along.
    written = set() if source == _OWN or template in OUMI else set(_CONTROL_TOKEN.findall(_COMMENT.sub("", text)))
    missing = tuple(token for token in sorted(written) if not _is_token(tokenizer, token))
    return ChatTemplate(text, source, missing, _end_of_turn(tokenizer, text, missing))


def apply_template(tokenizer: "PreTrainedTokenizerBase", chat_template: ChatTemplate | None) -> int:
    """Puts a template in force: sets it, adds the special tokens it lacks, and gives the tokenizer a pad token.

    The pad token becomes EOS where there is none; nothing is confused by that, since masks never look at ids.

    Returns:
        The number of tokens added at the end of the vocabulary, for which a model needs new embeddings.

    Raises:
        UserError: the tokenizer has neither pad nor EOS token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has neither a pad token nor an end-of-text token (eos_token); set one")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is None:
        return 0
    if chat_template.source != _OWN:
        tokenizer.chat_template = chat_template.text
    return int(tokenizer.add_tokens(list(chat_template.missing_tokens), special_tokens=True))


def _read(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> tuple[str, str]:
    """Text and source of a template that is there."""
    if template is None:
        return tokenizer.get_chat_template(), _OWN
    if template in OUMI:
        return (Path(__file__).parent / "templates" / f"{template}.jinja").read_text("utf-8"), template
    if template in BUILT_IN:
        text = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text("utf-8")
        # Where the tokenizer begins every text with BOS, so does every conversation, in exported templates too.
        if "bos_token" not in text and adds_bos(tokenizer):
            text = "{{- bos_token }}" + text
        return text, f"built-in {template}"
    path = Path(template).expanduser()
    if path.is_file():
        return path.read_text("utf-8"), f"file {path.name}"
    if path.suffix != ".jinja":
        raise UserError(
            f"data.template: unknown chat template {template!r}{nearest(template, (*BUILT_IN, *OUMI))} (or name a "
            ".jinja file)"
        )
    beside = [str(file) for file in path.parent.glob("*.jinja")]
    raise UserError(f"data.template: no chat template file {template!r}{nearest(template, [*beside, *BUILT_IN])}")


def _check(tokenizer: "PreTrainedTokenizerBase", text: str, source: str) -> None:
    import jinja2

    try:
        _render(text, [{"role": "user", "content": "?"}], None, {})
    except jinja2.TemplateSyntaxError as error:
        told = f"chat template ({source}) isn't valid Jinja, line {error.lineno}: {error.message}"
        raise UserError(f"data.template: {told}") from error
    except Exception:  # it may want other turns, or a tool: rows will tell
        pass
    if "eos_token" in text and tokenizer.eos_token is None and source.startswith("built-in"):
        raise UserError(f"chat template ({source}) ends turns with the tokenizer's eos_token, and it has none: set one")


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Says whether the tokenizer by itself begins every text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("x")["input_ids"][:1]) == [bos]


def _is_token(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or token == tokenizer.unk_token)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", text: str, missing: tuple[str, ...]) -> str | None:
    """Renders an answer and looks which special token follows it."""
    probe = "Seventeen."
    turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    try:
        rendered, _ = _render(text, turns, None, tokenizer.special_tokens_map)
    except Exception:  # a template that refuses this says nothing about how turns end
        return None
    _, found, tail = rendered.rpartition(probe)
    if not found:
        return None
    ends = [token for token in (*_special_tokens(tokenizer), *missing) if tail.lstrip().startswith(token)]
    end = max(ends, key=len, default=None)
    return None if end == tokenizer.eos_token else end


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _render(
    text: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    special_tokens: Mapping[str, Any],
    *,
    marked: bool = False,
    generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    """Renders as `tokenizer.apply_chat_template` does; the spans are those of the markers, where `marked` asks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # As there: templates test for keys, and would write "None" for a key without a value.
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    rendered: Any = render_jinja_template(
        [turns],
        tools=None if tools is None else list(tools),
        chat_template=text,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=generation_prompt,
        **special_tokens,
    )
    (result,), spans = rendered
    return result, spans[0] if marked else []


class ChatRenderer:
    """Renders conversations with the template that a tokenizer has now, and finds the assistant's turns in the text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._names = dict(tokenizer.special_tokens_map)
        self._special = _special_tokens(tokenizer)

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> str:
        """Renders turns up to where the assistant would begin to speak.

        Raises:
            UserError: there is no template, or it refuses these turns.
        """
        return self._rendered(messages, tools, generation_prompt=True)[0]

    def spans(self, conversation: Conversation, turns: Sequence[int]) -> tuple[str, list[Span]]:
        """Renders a conversation and finds what the assistant wrote in some of its turns, end-of-turn token included.

        Args:
            conversation: The conversation.
            turns: Indices of assistant messages, ascending. Their spans are what must be exact.

        Returns:
            The rendered text, and one span of characters per turn.

        Raises:
            UserError: there is no template, it refuses the conversation, or the spans can't be told exactly.
        """
        messages, tools = conversation.messages, conversation.tools
        marked = bool(turns) and bool(_MARKER.search(self._text(tools)))
        text, spans = self._rendered(messages, tools, marked=marked)
        if marked:
            spans = self._marked_spans(conversation, turns, spans)
        else:
            spans = [self._span_by_prefix(text, conversation, turn) for turn in turns]
        written = "\n".join(text[start:end] for start, end in spans)
        for turn in turns:
            # Templates for images skip plain strings, and markers inside a captured block point anywhere: the end of
            # each answer has to be there. Not all of it, since templates may move thoughts, and trim.
            last_word = (messages[turn]["content"] or "").split()[-1:]
            if last_word and last_word[0][-8:] not in written:
                raise UserError(f"the chat template doesn't write the text of turn {turn + 1}; use {_HELP}")
        return text, spans

    @staticmethod
    def _marked_spans(conversation: Conversation, turns: Sequence[int], spans: list[Span]) -> list[Span]:
        """Chooses the spans of some turns: the markers say where the assistant speaks, not in which turn."""
        speaks = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(spans) == len(speaks):
            return [span for i, span in zip(speaks, spans, strict=True) if i in turns]
        if len(spans) > len(speaks) and list(turns) == speaks:
            return spans
        raise UserError(
            f"the chat template marks {len(spans)} spans with {{% generation %}} in a conversation of {len(speaks)} "
            f"assistant turns, so they can't be told apart; what helps: one marked span per turn, or {_HELP}"
        )

    def _text(self, tools: Sequence[dict[str, Any]] | None) -> str:
        if not self._tokenizer.chat_template:
            raise UserError(
                "rows are conversations and the tokenizer has no chat template; choose one with `template`: "
                f"{', '.join(BUILT_IN)}, or the path of a .jinja file"
            )
        return self._tokenizer.get_chat_template(tools=None if tools is None else list(tools))

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, **kwargs: bool
    ) -> tuple[str, list[Span]]:
        template = self._text(tools)
        try:
            return _render(template, messages, tools, self._names, **kwargs)
        except Exception as error:  # whatever a template does wrong, it is this template and this row
            raise RefusedError(f"the chat template refuses this conversation: {error}") from error

    def _span_by_prefix(self, text: str, conversation: Conversation, turn: int) -> Span:
        try:
            return self._exact_span(text, conversation, turn)
        except _InexactError as why:
            advice = "a template with {% generation %} markers, or " + _HELP
            last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
            with contextlib.suppress(_InexactError):
                self._exact_span(text, conversation, last)
                advice = f"train_on: last_turn (exact here), {advice}"
            raise UserError(
                f"with this chat template, turn {turn + 1} can't be masked exactly: {why}; what helps: {advice}"
            ) from why

    def _exact_span(self, text: str, conversation: Conversation, turn: int) -> Span:
        """The turn is what follows the prompt before it, provided that the template writes both as in the whole."""
        messages, tools = conversation.messages, conversation.tools
        try:
            before = self.prompt(messages[:turn], tools)
            through = text if turn + 1 == len(messages) else self._rendered(messages[: turn + 1], tools)[0]
        except UserError as error:
            raise _InexactError(f"it can't be rendered without what follows ({error})") from error
        if not text.startswith(through):
            raise _InexactError("the template writes a turn differently once others follow")
        if not through.startswith(before):
            raise _InexactError("the template's generation prompt isn't how it begins the turn")
        # A newline after the end-of-turn token is never generated; one that itself ends the turn is.
        spoken = through[len(before) :].rstrip()
        if spoken.endswith(self._special):
            return len(before), len(before) + len(spoken)
        if (content := (messages[turn]["content"] or "").strip()) and through.endswith(content):
            raise _InexactError(
                "the template writes nothing at the turn's end, so a model couldn't learn to stop there"
            )
        return len(before), len(through)


class Rendering:
    """Makes a text of a conversation, with the template that a tokenizer has now.

    template: what its texts depend on.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._renderer = ChatRenderer(tokenizer)
        self.template = f"{tokenizer.chat_template} {tokenizer.special_tokens_map}"

    def __call__(self, conversation: Conversation) -> str:
        """Renders all turns.

        Raises:
            UserError: there is no template, or it refuses these turns.
        """
        return self._renderer.spans(conversation, [])[0]


class RefusedError(UserError):
    """The chat template refuses a conversation."""


class _InexactError(Exception):
    """Why a turn can't be found by rendering prefixes."""
