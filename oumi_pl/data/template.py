"""Chat templates: loading them, the tokens they need, and the spans of the assistant's turns in rendered text.

With `{% generation %}` markers, as in the built-in ones, a template itself says which characters the assistant wrote.
Without markers the span of a turn is found by rendering the conversation up to that turn, which is exact if the
template never writes a turn differently once others follow. If it does, `ChatRenderer` raises an error.
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
"""Templates that Oumi's recipes name. They add no tokens: those that a tokenizer lacks are tokenized as text."""
_OWN = "the tokenizer's own"
_HELP = f"a built-in template ({', '.join(BUILT_IN)})"

Span = tuple[int, int]
"""Start and end, in characters of the rendered text."""

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s'\"]+\|>")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what it needs from a tokenizer.

    text: the Jinja source. source: its origin, for messages: "the tokenizer's own", "built-in chatml", "file x.jinja".
    missing_tokens: special tokens that it writes and the tokenizer lacks. end_of_turn: the token that ends the
    assistant's turns, at which generation has to stop; None if that is the tokenizer's EOS.
    """

    text: str
    source: str
    missing_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None


def load_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> ChatTemplate | None:
    """Finds the chat template to use, without changing the tokenizer.

    Args:
        tokenizer: The tokenizer that will be used.
        template: Name of a built-in template, path of a `.jinja` file, or None for the tokenizer's own.

    Returns:
        The template; None if none is named and the tokenizer has none. Rows that are conversations are then refused by
        `ChatRenderer`.

    Raises:
        UserError: no such template (offers the nearest), it isn't valid Jinja, or it needs an EOS token that the
            tokenizer doesn't have.
    """
    if template is None and not tokenizer.chat_template:
        return None
    text, source = _read(tokenizer, template)
    _check(tokenizer, text, source)
    # Only other templates than the tokenizer's own add tokens: it has those that its own needs.
    written = set() if source == _OWN or template in OUMI else set(_CONTROL_TOKEN.findall(_COMMENT.sub("", text)))
    missing = tuple(token for token in sorted(written) if not _is_token(tokenizer, token))
    return ChatTemplate(text, source, missing, _end_of_turn(tokenizer, text, missing))


def apply_template(tokenizer: "PreTrainedTokenizerBase", chat_template: ChatTemplate | None) -> list[int]:
    """Sets a tokenizer's template, adds the special tokens it lacks, and sets a pad token.

    Without a pad token, EOS becomes the pad token, which is harmless because masks never depend on ids.

    Returns:
        The ids added to the vocabulary, for which a model needs new embeddings. Tokens that were in the vocabulary and
        only became special are not among them, since they have trained rows.

    Raises:
        UserError: the tokenizer has neither pad nor EOS token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has neither a pad token nor an end-of-text token (eos_token); set one")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is None:
        return []
    if chat_template.source != _OWN:
        tokenizer.chat_template = chat_template.text
    before = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(list(chat_template.missing_tokens), special_tokens=True)
    return sorted(set(tokenizer.get_vocab().values()) - before)


def _read(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> tuple[str, str]:
    """Text and source of a template."""
    if template is None:
        return tokenizer.get_chat_template(), _OWN
    if template in BUILT_IN or template in OUMI:
        text = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text("utf-8")
        if template in OUMI:
            return text, template
        # If the tokenizer begins every text with BOS, the template does so too, also after an export.
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
        raise UserError(
            f"data.template: chat template ({source}) isn't valid Jinja, line {error.lineno}: {error.message}"
        ) from error
    except Exception:  # it may need other turns, or a tool: then rows decide
        pass
    if "eos_token" in text and tokenizer.eos_token is None and source.startswith("built-in"):
        raise UserError(f"chat template ({source}) ends turns with the tokenizer's eos_token, and it has none: set one")


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer itself begins every text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("x")["input_ids"][:1]) == [bos]


def _is_token(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    """Whether a string is a single token of the vocabulary."""
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or token == tokenizer.unk_token)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", text: str, missing: tuple[str, ...]) -> str | None:
    """The special token after an answer, found by rendering one; None if it is EOS or there is none."""
    probe = "Seventeen."
    turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    try:
        rendered, _ = _render(text, turns, None, tokenizer.special_tokens_map)
    except Exception:  # the template refuses these turns
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
    """Renders as `tokenizer.apply_chat_template` does; with `marked`, also returns the spans of the markers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # as in transformers: templates test whether a key exists, and would write "None" for its value
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
    """Renders conversations with a tokenizer's current template, and finds the assistant's turns in the text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._names = dict(tokenizer.special_tokens_map)
        self._special = _special_tokens(tokenizer)

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> str:
        """Renders turns, with the generation prompt at the end.

        Raises:
            UserError: there is no template, or it refuses these turns.
        """
        return self._rendered(messages, tools, generation_prompt=True)[0]

    def spans(self, conversation: Conversation, turns: Sequence[int]) -> tuple[str, list[Span]]:
        """Renders a conversation and finds the spans of some assistant turns, including end-of-turn tokens.

        Args:
            conversation: The conversation.
            turns: Indices of assistant messages, ascending.

        Returns:
            The rendered text, and one span of characters per turn.

        Raises:
            UserError: there is no template, it refuses the conversation, or the spans can't be found exactly.
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
            # Check that the spans contain the end of each answer: templates for images skip plain strings, and markers
            # in a captured block have wrong positions. Only the end, since templates may trim, and move thoughts.
            last_word = (messages[turn]["content"] or "").split()[-1:]
            if last_word and last_word[0][-8:] not in written:
                raise UserError(f"the chat template doesn't write the text of turn {turn + 1}; use {_HELP}")
        return text, spans

    @staticmethod
    def _marked_spans(conversation: Conversation, turns: Sequence[int], spans: list[Span]) -> list[Span]:
        """Selects the spans of some turns: markers don't say which turn a span belongs to."""
        speaks = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(spans) == len(speaks):
            return [span for i, span in zip(speaks, spans, strict=True) if i in turns]
        if len(spans) > len(speaks) and list(turns) == speaks:
            return spans
        raise UserError(
            f"the chat template marks {len(spans)} spans with {{% generation %}} in a conversation of {len(speaks)} "
            f"assistant turns, so they can't be matched; what helps: one marked span per turn, or {_HELP}"
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
        except Exception as error:  # a template can raise anything
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
        """The text after the prompt of a turn, if the template writes both as in the whole conversation."""
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
        # A newline after an end-of-turn token is not part of the turn, since generation stops before it. Without such a
        # token, the newline itself ends the turn.
        spoken = through[len(before) :].rstrip()
        if spoken.endswith(self._special):
            return len(before), len(before) + len(spoken)
        if (content := (messages[turn]["content"] or "").strip()) and through.endswith(content):
            raise _InexactError(
                "the template writes nothing at the turn's end, so a model couldn't learn to stop there"
            )
        return len(before), len(through)


class Rendering:
    """Renders a conversation as text, with a tokenizer's current template.

    template: everything that the texts depend on, for cache keys.
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
