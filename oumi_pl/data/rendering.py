"""Renders conversations with a chat template, and finds in the text what a model would generate of each trained turn.

The rule, for each trained turn:

- The text is the template's own rendering of the conversation up to that turn, so that the history reads as it does
  when the turn is generated. The target begins where the generation prompt ends, and ends with the token at which
  generation stops. In a template with `{% generation %}` markers, it is what they mark, and the end of the turn.
- If the generation prompt goes on where the rendered turn differs (it opens a block for thinking, say), the target
  begins after what both have in common. The prompt replaces the turn's beginning if both then read as at inference:
  if the difference is an empty block (`<think></think>`) and the turn holds no reasoning, or a header that the turn's
  reasoning follows.
- A turn whose beginning can't be rendered alone (the template needs what follows) is found in the rendering of the
  whole conversation, by replacing its texts.

Where all these texts are beginnings of the rendering of the whole conversation, that one text serves all turns
("together"). Otherwise each turn has a text of its own ("apart").
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date as Date
from datetime import datetime, time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from oumi_pl.data.parts import missing_parts, parts_of
from oumi_pl.data.template import BUILT_IN, HELP, check_variables, compiled, limits, special_tokens
from oumi_pl.errors import UserError
from oumi_pl.types import TRAINING_KEYS, Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Start and end, in characters of the rendered text."""

Turns = Literal["auto", "together", "apart"]

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TAG = r"(?:<[^<>]*>|\[[^\[\]\s]*\])"
_END = re.compile(rf"\s*(?:{_TAG}|[^\s<])+|\s*\S+|\s+")
_NEXT_TAG = re.compile(rf"\s*{_TAG}")
_LAST_TAG = re.compile(rf"{_TAG}\s*\Z")
_START_TAGS = re.compile(r"(?:<[^<>]*(?:start|begin)[^<>]*>\s*)+\Z", re.IGNORECASE)
_EMPTY_BLOCK = re.compile(r"\s*(<[^<>/][^<>]*>)\s*\w*\s*(<[^<>]*>)\s*")
_PROBE = "Seventeen."
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}
_REWRITTEN = "the template writes a turn differently once others follow"
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MARK = "Zq{}zQ"
"""Stands for a text of a turn, to find it; such a text must not occur otherwise."""


class Target(NamedTuple):
    """Characters of a text that carry loss, and the index of the message that they belong to."""

    turn: int
    start: int
    end: int


@dataclass
class Written:
    """A rendered text and what in it carries loss.

    eos: it has to end with an EOS token, which is a target too. weights: factors on the loss of the targets, in their
    order; none if all are 1. Of targets that overlap, the last one counts.
    """

    text: str
    targets: list[Target] = field(default_factory=list)
    eos: bool = False
    weights: list[float] = field(default_factory=list)

    def of(self, turn: int) -> str:
        """The text of a turn's targets."""
        return "\n".join(self.text[start:end] for index, start, end in self.targets if index == turn)


@dataclass
class Rendered:
    """A conversation's texts for training.

    texts: one that holds all trained turns, or one for each of them, in order. lost: what the template does not write
    of trained turns, as (index of the message, kind, name); see `oumi_pl.data.parts.Part`. left_out: kinds of parts of
    earlier turns that are not in the history of the last trained turn.
    """

    texts: list[Written]
    lost: list[tuple[int, str, str]] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)


class RefusedError(UserError):
    """The chat template refuses a conversation."""


class _InexactError(Exception):
    """Why a turn can't be masked exactly."""


class _Ends(NamedTuple):
    """How a template begins and ends a turn of text.

    tail: all that it writes after the text of a last turn; None if the template can't be probed. end: the part of it at
    which generation stops; "" if there is none. closing: `end`, if it is written only once another turn follows.
    headers: what it may write between the user's turn and the answer.
    """

    tail: str | None = None
    end: str | None = None
    closing: str = ""
    headers: tuple[str, ...] = ()


class ChatRenderer:
    """Renders conversations with a tokenizer's current template, and finds the assistant's turns in the text.

    Args:
        tokenizer: A tokenizer with its chat template in place.
        variables: Given to the template; rows may have more (`Conversation.template_variables`).
        turns: Whether trained turns share one text: `auto` (where that is exact), `together` or `apart`.
        add_eos: End turns with EOS where the template writes nothing at their end.
        date: The day that the template gets as today; the actual one when left out.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        variables: Mapping[str, Any] | None = None,
        turns: Turns = "auto",
        add_eos: bool = False,
        date: Date | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._names = dict(tokenizer.special_tokens_map)
        self._special = special_tokens(tokenizer)
        self._variables = dict(variables or {})
        self._turns = turns
        self._eos = tokenizer.eos_token if add_eos else None
        self._date = date
        self._ends_of: dict[tuple[str, bool], _Ends] = {}
        self._shaped: tuple[Any, Any] = None, None  # the last conversation and its shape, asked for once per turn
        self._shapes: dict[Any, Any] = {}  # facts that hold for all conversations with turns of the same kinds

    # ---- text

    def prompt(self, conversation: Conversation, border: int) -> str:
        """Renders the first `border` turns, with the generation prompt at the end.

        Raises:
            UserError: there is no template, or it refuses these turns.
        """
        blank = _without_texts(conversation, "")
        try:
            return self._text(conversation, (blank or conversation).messages[:border], generation_prompt=True)
        except RefusedError:
            without = _without_texts(conversation, None)
            if without is None:
                raise
            return self._text(conversation, without.messages[:border], generation_prompt=True)

    def text(self, conversation: Conversation) -> str:
        """Renders all turns.

        Raises:
            UserError: there is no template, or it refuses these turns.
        """
        return self._text(conversation, conversation.messages)

    def render(self, conversation: Conversation, turns: Sequence[int], *, as_one: bool = False) -> Rendered:
        """Renders a conversation for training on some assistant turns.

        Args:
            conversation: The conversation.
            turns: Indices of assistant messages, ascending.
            as_one: Use the rendering of the whole conversation for all turns, also where they would be generated in
                another context.

        Raises:
            UserError: there is no template, it refuses the conversation, or a turn can't be masked exactly.
        """
        if not turns:
            return Rendered([Written(self.text(conversation))])
        blank = _without_texts(conversation, "")
        if blank is None:
            return self._render(conversation, turns, as_one)
        try:  # templates differ in whether a turn without text has an empty one or none
            rendered = self._render(blank, turns, as_one)
            if not rendered.lost:
                return rendered
        except UserError:
            return self._render(_without_texts(conversation, None) or conversation, turns, as_one)
        with contextlib.suppress(UserError):
            other = self._render(_without_texts(conversation, None) or conversation, turns, as_one)
            if len(other.lost) < len(rendered.lost):
                return other
        return rendered

    def _render(self, conversation: Conversation, turns: Sequence[int], as_one: bool) -> Rendered:
        if self._is_marked(conversation):
            rendered = self._render_marked(conversation, turns, as_one)
        else:
            rendered = self._render_unmarked(conversation, turns, as_one)
        by_turn = {target.turn: text for text in rendered.texts for target in text.targets}
        last, whole = by_turn.get(turns[-1]), set()
        for turn in turns:
            written = by_turn[turn].of(turn) if turn in by_turn else ""
            lost = self._lost(conversation, turn, written)
            rendered.lost += [(turn, kind, name) for kind, name in lost]
            if not lost and by_turn.get(turn) is last:
                whole.add(turn)
        if last is not None:
            history = [m for i, m in enumerate(conversation.messages[: turns[-1]]) if i not in whole]
            rendered.left_out = _left_out(history, last.text)
        return rendered

    # ---- which text serves which turn

    def _render_unmarked(self, conversation: Conversation, turns: Sequence[int], as_one: bool) -> Rendered:
        text = self.text(conversation)
        own = [self._alone(conversation, turn, text) for turn in turns]
        if turns[-1] + 1 == len(conversation.messages) and own[-1].text.startswith(text):
            text = own[-1].text  # with an end of the turn that the template doesn't write
        if self._turns != "apart" and all(_begins(text, written) for written in own):
            return Rendered([Written(text, [target for written in own for target in written.targets])])
        if self._turns == "together":
            self._refuse_together(text, turns, own)
        # If the template moves a later turn to the beginning, all use the whole, since no tree has two beginnings
        if (as_one and len(own) > 1) or not _shared([written.text for written in own]):
            try:
                within = [self._within(conversation, turn, text).targets[0] for turn in turns]
                return Rendered([Written(text, within)])
            except _InexactError as why:
                if as_one:
                    raise self._refused(turns[0], f"{_REWRITTEN}, and {why}") from why
        return Rendered(own)

    def _render_marked(self, conversation: Conversation, turns: Sequence[int], as_one: bool) -> Rendered:
        text, spans = self._marked(conversation, conversation.messages)
        targets = self._with_ends(conversation, text, _matched(conversation.messages, turns, text, spans))
        whole = Written(text, targets)
        if as_one:
            return Rendered([whole])
        if self._turns != "apart":
            key = ("together", self._shape(conversation), *turns)
            if key not in self._shapes:
                own = [self._alone_marked(conversation, turn, whole) for turn in turns]
                self._shapes[key] = _agree(whole, own)
            if self._shapes[key]:
                return Rendered([whole])
        own = [self._alone_marked(conversation, turn, whole) for turn in turns]
        if self._turns != "apart" and _agree(whole, own):
            return Rendered([whole])
        if self._turns == "together":
            self._refuse_together(text, turns, own)
        return Rendered(own)

    def _refuse_together(self, text: str, turns: Sequence[int], own: Sequence[Written]) -> None:
        turn = next(turn for turn, written in zip(turns, own, strict=True) if not _begins(text, written))
        raise UserError(
            f"turns: together is not exact with this chat template, which writes turn {turn + 1} or what is before it "
            "differently once others follow; what helps: turns: auto, train_on: last_turn, or another template"
        )

    # ---- one turn

    def _alone(self, conversation: Conversation, turn: int, whole: str) -> Written:
        """The text that a trained turn has of its own, and its target."""
        messages = conversation.messages
        try:
            prompt = self.prompt(conversation, turn)
            through = whole if turn + 1 == len(messages) else self._text(conversation, messages[: turn + 1])
            if not turn and not through.startswith(prompt):
                raise UserError("the template writes another beginning without it")
        except UserError as error:
            try:
                return self._within(conversation, turn, whole)
            except _InexactError as why:
                raise self._refused(turn, f"it can't be rendered without what follows ({error}), and {why}") from why
        try:
            through = self._closed(conversation, turn, through, whole)
            lead, start = self._lead(conversation, turn, prompt, through)
            end = self._end(conversation, turn, through, start)
        except _InexactError as why:
            if missing_parts(messages[turn], through):  # which is the cause, and `_render` will find it
                return Written(through, [Target(turn, len(through), len(through))])
            raise self._refused(turn, str(why)) from why
        return Written(lead + through[start:], [Target(turn, len(lead), len(lead) + end - start)])

    def _closed(self, conversation: Conversation, turn: int, through: str, whole: str) -> str:
        """A rendered turn with the end that the template only writes once another turn follows, or with EOS."""
        ends = self._ends(conversation)
        if ends.end == "" and self._eos:
            return through + self._eos
        if not ends.closing:
            return through
        messages = conversation.messages
        calls = bool(messages[turn].get("tool_calls"))
        if turn + 1 == len(messages):
            following: list[Message] = [{"role": "user", "content": "Thanks."}]
            if calls:
                following = [{"role": "tool", "content": "0"} for _ in messages[turn].get("tool_calls", ())]
            try:
                whole = self._text(conversation, [*messages, *following])
            except UserError:
                return through if calls else through + ends.closing
        if whole.startswith(through + ends.closing) or not calls:
            return through + ends.closing
        return through

    def _alone_marked(self, conversation: Conversation, turn: int, whole: Written) -> Written:
        """As `_alone`, with the targets that the template marks."""
        messages = conversation.messages
        marked = [target for target in whole.targets if target.turn == turn]
        try:
            prompt = self.prompt(conversation, turn)
            through, spans = self._marked(conversation, messages[: turn + 1])
            if turn + 1 < len(messages):
                marked = self._with_ends(conversation, through, _matched(messages[: turn + 1], [turn], through, spans))
            if not marked or not (turn or through.startswith(prompt)):
                return Written(whole.text, [target for target in whole.targets if target.turn == turn])
            lead, start = self._lead(conversation, turn, prompt, through)
        except (UserError, _InexactError):
            return Written(whole.text, [target for target in whole.targets if target.turn == turn])
        if through.startswith(lead) or start > marked[0].start:
            return Written(through, marked)
        moved = len(lead) - start
        return Written(lead + through[start:], [Target(turn, s + moved, e + moved) for _, s, e in marked])

    def _lead(self, conversation: Conversation, turn: int, prompt: str, through: str) -> tuple[str, int]:
        """What a turn follows, and where in the rendering of the turn the target begins."""
        if through.startswith(prompt):
            return prompt, len(prompt)
        message = conversation.messages[turn]
        start = _common(prompt, through, [part.value for part in parts_of(message) if isinstance(part.value, str)])
        extra, rest = prompt[start:], through[start:]
        with contextlib.suppress(UserError):
            history = self._text(conversation, conversation.messages[:turn])
            before = (conversation.messages[turn - 1].get("content") or "").strip() if turn else ""
            differs = prompt != history or (before and before in extra)
            if differs and start < len(history.rstrip()) and prompt.startswith(history):
                # the history reads differently once this turn follows: the prompt has it as it is at inference
                shorter = replace(conversation, messages=conversation.messages[: turn + 1])
                return prompt, self._within(shorter, turn, through).targets[0].start
        return (prompt if _reads_on(extra, rest, message) else through[:start]), start

    def _end(self, conversation: Conversation, turn: int, through: str, start: int) -> int:
        """Where a turn that ends a text stops."""
        ends = self._ends(conversation)
        if self._eos and ends.end == "":
            return len(through)
        if ends.end == "":
            raise _InexactError(
                "the template writes nothing at the turn's end, so a model couldn't learn to stop there; add_eos: true "
                "writes the tokenizer's EOS there"
            )
        tail = ends.closing or ends.tail
        if tail and ends.end and through.endswith(tail) and len(through) - len(tail) >= start:
            return len(through) - len(tail) + len(ends.end)
        return self._end_after(conversation.messages[turn], through, start, ends)

    @staticmethod
    def _end_after(message: Message, text: str, start: int, ends: _Ends) -> int:
        """Where a turn stops, found after the last of its parts from `start` on."""
        after = start
        for part in parts_of(message):
            for spelling in part.spellings:
                if (at := text.rfind(spelling, start)) >= 0:
                    after = max(after, at + len(spelling))
        end = ends.end or ""
        last_tag = _LAST_TAG.search(end)
        for stop in (end, last_tag.group().strip() if last_tag else ""):
            if stop and (at := text.find(stop, after)) >= 0:
                return at + len(stop)
        if (stripped := len(text.rstrip())) > after:
            return stripped
        if len(text) > after and not end.strip():
            return len(text)
        raise _InexactError("the template writes nothing at the turn's end, so a model couldn't learn to stop there")

    def _within(self, conversation: Conversation, turn: int, whole: str) -> Written:
        """A turn in the rendering of the whole conversation, found by replacing its texts."""
        messages = list(conversation.messages)
        messages[turn], marks = _replaced(messages[turn])
        try:
            swapped = self._text(conversation, messages)
        except UserError as error:
            raise _InexactError(f"it can't be found in the whole ({error})") from error
        places = [(swapped.find(mark), mark) for mark in marks if mark in swapped]
        if not places:
            raise _InexactError("the template doesn't write its text")
        first, (last, last_mark) = min(places)[0], max(places)
        after = len(whole) - (len(swapped) - last - len(last_mark))
        if whole[:first] != swapped[:first] or whole[after:] != swapped[last + len(last_mark) :]:
            raise _InexactError("the template writes other turns differently for other texts of this one")
        ends = self._ends(conversation)
        headers = [header for header in ends.headers if header.strip()]
        begun = [whole.rfind(header, 0, first) + len(header) for header in headers if header in whole[:first]]
        if headers and not begun:
            raise _InexactError("the template begins it in another way than other turns")
        start = max(begun, default=first)
        if ends.end == "" and self._eos:
            return Written(whole[:after] + self._eos, [Target(turn, start, after + len(self._eos))])
        if ends.end == "":
            raise _InexactError("the template writes nothing at the turn's end")
        if turn + 1 == len(messages):
            return Written(whole, [Target(turn, start, self._end_after(messages[turn], whole, after, ends))])
        following = (messages[turn + 1].get("content") or "").strip()
        until = whole.find(following, after) if following else len(whole)
        for stop in (ends.end, "" if ends.end is None else ends.end.strip()):
            if stop and (at := whole.find(stop, after, until)) >= 0:
                return Written(whole, [Target(turn, start, at + len(stop))])
        tag = _NEXT_TAG.match(whole, after, until)  # another end than that of a last turn
        if tag is None:
            raise _InexactError("the template writes nothing at the turn's end")
        return Written(whole, [Target(turn, start, tag.end())])

    def _refused(self, turn: int, why: str) -> UserError:
        return UserError(
            f"with this chat template, turn {turn + 1} can't be masked exactly: {why}; what helps: a template with "
            "{% generation %} markers, or " + HELP
        )

    # ---- markers

    def _is_marked(self, conversation: Conversation) -> bool:
        if not _MARKER.search(self._template(conversation)):
            return False
        return not (self._eos and self._ends(conversation).end == "")  # then EOS has to be added, after the markers

    def _marked(self, conversation: Conversation, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        spans: list[Span] = []
        text = self._text(conversation, messages, spans=spans)
        return text, spans

    def _with_ends(self, conversation: Conversation, text: str, targets: list[Target]) -> list[Target]:
        """Adds the end of the turn to targets if the template writes it after its markers."""
        end = (self._ends(conversation).end or "").strip()
        if not end:
            return targets
        extended = []
        for i, (turn, start, stop) in enumerate(targets):
            until, is_last = stop, i + 1 == len(targets) or targets[i + 1].turn != turn
            if is_last and not text[start:stop].rstrip().endswith(end):
                after = stop + len(text[stop:]) - len(text[stop:].lstrip())
                if text.startswith(end, after):
                    until = after + len(end)
            extended.append(Target(turn, start, until))
        return extended

    # ---- facts about the template, found by rendering a probe

    def _ends(self, conversation: Conversation) -> _Ends:
        key = self._template(conversation), bool(conversation.tools)
        if key not in self._ends_of:
            tools = (_PROBE_TOOL,) if conversation.tools else None
            probe = Conversation(({"role": "user", "content": "Why?"}, {"role": "assistant", "content": _PROBE}), tools)
            try:
                self._ends_of[key] = self._probed(probe)
            except UserError:
                self._ends_of[key] = _Ends()
        return self._ends_of[key]

    def _probed(self, probe: Conversation) -> _Ends:
        text = self.text(probe)
        _, separator, tail = text.rpartition(_PROBE)
        if not separator:
            return _Ends()
        thanks = Conversation((*probe.messages, {"role": "user", "content": "Thanks."}), probe.tools)
        try:
            longer = self.text(thanks)
        except UserError:
            longer = text
        try:
            user, prompt = self._text(probe, probe.messages[:1]), self.prompt(probe, 1)
        except UserError:  # it renders no conversation that ends with a user
            return _Ends(tail, self._stop(tail))
        middle = longer.rpartition(_PROBE)[2].partition("Thanks.")[0]
        if prompt == user and not middle.startswith(tail):
            # it also writes the next generation prompt after the answer, which isn't its end
            tail = _START_TAGS.sub("", tail[: _common(tail, middle, [])])
        headers = []
        for rendered in (text, longer):
            until = min(_common(prompt, rendered, [_PROBE]), max(0, rendered.find(_PROBE)))
            if prompt.startswith(user) and until > len(user):
                headers.append(prompt[len(user) : until])
        closing = ""
        if not tail and prompt != user:
            closing = middle[: len(middle) - _common_end(middle, longer.partition("Why?")[0])]
            closing = self._stop(closing)
        return _Ends(tail, self._stop(tail) or closing, closing, tuple(headers))

    def _stop(self, tail: str) -> str:
        """The part of what follows an answer at which generation stops: up to the first special token or tag.

        What follows that without a blank belongs to it.
        """
        first = min((tail.find(token) for token in self._special if token in tail), default=0)
        match = _END.match(tail, first)
        return tail[: match.end()] if match else ""

    def _shape(self, conversation: Conversation) -> Any:
        """The kinds of a conversation's turns, on which it depends what a template writes of them."""
        if conversation is not self._shaped[0]:
            self._shaped = conversation, self._new_shape(conversation)
        return self._shaped[1]

    @staticmethod
    def _new_shape(conversation: Conversation) -> Any:
        kinds = []
        for message in conversation.messages:
            content = message.get("content") or ""
            calls = len(message.get("tool_calls") or ())
            kinds.append(
                (message["role"], bool(content), "think>" in content, bool(message.get("reasoning_content")), calls)
            )
        variables = repr(sorted(conversation.template_variables.items())) if conversation.template_variables else ""
        return tuple(kinds), bool(conversation.tools), variables

    # ---- what is missing

    def _lost(self, conversation: Conversation, turn: int, written: str) -> list[tuple[str, str]]:
        """Kinds and names of the parts of a trained turn that are not in its target."""
        message = conversation.messages[turn]
        lost = [(part.kind, part.name) for part in missing_parts(message, written)]
        if not lost and written:
            # a short text may be in the target by accident: look once for each kind of conversation
            key = ("parts", self._shape(conversation), turn)
            kinds = self._shapes.get(key)
            if kinds is None:
                kinds = self._shapes[key] = self._never_written(conversation, turn)
            lost = [(part.kind, part.name) for part in parts_of(message) if part.kind in kinds] if kinds else []
        return list(dict.fromkeys(lost))

    def _never_written(self, conversation: Conversation, turn: int) -> set[str]:
        """Kinds of a turn's parts that the template doesn't write, whatever their text is."""
        messages = list(conversation.messages)
        kinds: set[str] = set()
        for key, kind in (("content", "text"), ("reasoning_content", "reasoning")):
            value = messages[turn].get(key)
            if not isinstance(value, str) or not value.strip() or "think>" in value:
                continue
            altered = [*messages]
            altered[turn] = cast("Message", {**messages[turn], key: _MARK.format("")})
            try:
                text = self._text(conversation, altered[: turn + 1])
            except UserError:
                try:
                    text = self._text(conversation, altered)
                except UserError:
                    continue
            if _MARK.format("") not in text:
                kinds.add(kind)
        return kinds

    # ---- Jinja

    def _template(self, conversation: Conversation) -> str:
        """The template of a conversation: of several, `tool_use` for those with tools, as in transformers."""
        templates: Any = self._tokenizer.chat_template
        if not templates:
            raise UserError(
                "rows are conversations and the tokenizer has no chat template; choose one with `template`: "
                f"{', '.join(BUILT_IN)}, or the path of a .jinja file"
            )
        if isinstance(templates, str):
            return templates
        for name in ("tool_use", "default") if conversation.tools else ("default", "tool_use"):
            if name in templates:
                return str(templates[name])
        raise UserError(f"the tokenizer's chat templates are {', '.join(templates)}; choose one with `template`")

    def _text(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        spans: list[Span] | None = None,
    ) -> str:
        """Renders messages as `tokenizer.apply_chat_template` does; adds the spans of the markers to `spans`."""
        source = self._template(conversation)
        template = compiled(source)
        variables = {**self._names, **self._variables}
        if conversation.template_variables:
            check_variables(source, conversation.template_variables)
            variables |= conversation.template_variables
        if self._date is not None:
            variables["strftime_now"] = _clock(self._date)
        values = {
            "messages": [_for_template(message) for message in self._with_known_roles(source, messages)],
            "tools": None if conversation.tools is None else list(conversation.tools),
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **variables,
        }
        try:
            if spans is None:
                with limits(source):
                    return str(template.render(values))
            blocks: list[str] = []
            with limits(source), template.environment.activate_tracker(blocks, spans):
                for block in template.generate(values):
                    blocks.append(block)
            return "".join(blocks)
        except Exception as error:  # a template can raise anything
            raise RefusedError(f"the chat template refuses this conversation: {error}") from error

    def _with_known_roles(self, source: str, messages: Sequence[Message]) -> Sequence[Message]:
        """Turns of developers as system turns, if the template doesn't write them: it refuses or drops them."""
        if not any(message["role"] == "developer" for message in messages) or _writes_developers(source):
            return messages
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


@lru_cache(maxsize=256)
def _writes_developers(source: str) -> bool:
    """Whether a template writes turns with the role `developer`."""
    turns = [("developer", _PROBE), ("user", "Why?"), ("assistant", "Because.")]
    try:
        with limits(source):
            text = compiled(source).render(
                messages=[{"role": role, "content": content} for role, content in turns], add_generation_prompt=False
            )
    except Exception:  # a template can raise anything
        return False
    return _PROBE in text


def _clock(today: Date) -> Any:
    """The function `strftime_now` of templates, on a fixed day at midnight."""
    return datetime.combine(today, time()).strftime


def _for_template(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to templates.

    Keys without value are left out, since templates test whether a key exists, and would write "None". A turn without
    text, of calls alone, has an empty one: some templates need a text. Reasoning has all the names by which templates
    read it.
    """
    turn = {key: value for key, value in message.items() if value is not None and key not in TRAINING_KEYS}
    turn.setdefault("content", "")
    for key in _REASONING_KEYS:
        if key in turn:
            return {"thinking": turn[key], **turn, "reasoning_content": turn[key]}
    return turn


def spans_by_kind(written: Written, messages: Sequence[Message]) -> dict[str, list[Target]]:
    """Where in the targets of a text the parts of turns are, by kind ("text", "reasoning", "tool call")."""
    spans: dict[str, list[Target]] = {}
    for turn, start, end in written.targets:
        places: dict[str, list[Span]] = {}
        for part in parts_of(messages[turn]):
            ranges = [(at, at + len(s)) for s in part.spellings if (at := written.text.find(s, start, end)) >= 0]
            places.setdefault(part.kind, []).extend(ranges[:1])
        if calls := places.get("tool call"):  # with the syntax between names and arguments, up to the last of them
            values = [s for part in parts_of(messages[turn]) if part.kind == "tool call" for s in part.spellings]
            ends = [written.text.rfind(value, start, end) + len(value) for value in values if value in written.text]
            places["tool call"] = [(min(calls)[0], max(ends))]
        for kind, ranges in places.items():
            spans.setdefault(kind, []).extend(Target(turn, *span) for span in ranges)
    return spans


# ---- texts


def _begins(text: str, written: Written) -> bool:
    """Whether a text begins with another one, up to the end of its last target."""
    end = written.targets[-1].end
    return text.startswith(written.text[:end])


def _agree(whole: Written, own: Sequence[Written]) -> bool:
    """Whether each target of a marked text follows what it follows in its own text."""
    ends = {target.turn: target.end for target in whole.targets}
    return all(written.text.startswith(whole.text[: ends[written.targets[0].turn]]) for written in own)


def _shared(texts: Sequence[str]) -> int:
    """Length of what all texts begin with."""
    shortest, longest = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))


def _common(prompt: str, through: str, texts: Sequence[str]) -> int:
    """Length of what a prompt and a rendered turn begin with: whole tags and words, nothing of the turn's texts."""
    length = _shared([prompt, through])
    opened = through.rfind("<", 0, length)
    if opened >= 0 and through.find(">", opened, length) < 0:
        length = opened
    while 0 < length < min(len(prompt), len(through)) and prompt[length - 1].isalnum():
        if not (prompt[length].isalnum() or through[length].isalnum()):
            break
        length -= 1
    for text in texts:
        at = through.find(text, max(0, length - len(text)))
        if 0 <= at < length:
            length = at
    return length


def _common_end(text: str, other: str) -> int:
    """Length of what two texts end with: whole tags."""
    length = _shared([text[::-1], other[::-1]])
    end = text[len(text) - length :]
    closed, opened = end.find(">"), end.find("<")
    return length - closed - 1 if closed >= 0 and (opened < 0 or closed < opened) else length


def _reads_on(extra: str, rest: str, message: Message) -> bool:
    """Whether a rendered turn's `rest` reads on after a generation prompt that goes on with `extra`."""
    reasoning = (message.get("reasoning_content") or "").strip()
    if reasoning and rest.lstrip().startswith(reasoning):
        return "/" not in extra and not _EMPTY_BLOCK.fullmatch(extra)
    block = _EMPTY_BLOCK.fullmatch(extra)
    return block is not None and not rest.lstrip().startswith(block[2]) and not (reasoning and reasoning in rest)


def _matched(messages: Sequence[Message], turns: Sequence[int], text: str, spans: Sequence[Span]) -> list[Target]:
    """The spans of some turns: markers don't say which turn a span belongs to."""
    speaks = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) == len(speaks):
        return [Target(i, *span) for i, span in zip(speaks, spans, strict=True) if i in turns]
    if len(spans) > len(speaks) and list(turns) == speaks:
        targets, place = [], 0
        for n, (start, end) in enumerate(spans):
            if n and place + 1 < len(speaks):  # does the next turn begin here, or does this one go on?
                parts = parts_of(messages[speaks[place + 1]])
                place += not parts or len(missing_parts(messages[speaks[place + 1]], text[start:end])) < len(parts)
            targets.append(Target(speaks[place], start, end))
        return targets
    raise UserError(
        f"the chat template marks {len(spans)} spans with {{% generation %}} in a conversation of {len(speaks)} "
        f"assistant turns, so they can't be matched; what helps: one marked span per turn, or {HELP}"
    )


def _replaced(message: Message) -> tuple[Message, list[str]]:
    """A turn with other texts, and these texts. Names of functions and arguments stay."""
    marks: list[str] = []

    def replace(value: Any) -> Any:
        if isinstance(value, str) and value.strip():
            marks.append(_MARK.format(len(marks)))
            return marks[-1]
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        return [replace(item) for item in value] if isinstance(value, list) else value

    turn: dict[str, Any] = dict(message)
    for key in ("content", *_REASONING_KEYS):
        if key in turn:
            turn[key] = replace(turn[key])
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_replaced_call(call, replace) for call in turn["tool_calls"]]
    return turn, marks  # type: ignore[return-value]


def _replaced_call(call: dict[str, Any], replace: Any) -> dict[str, Any]:
    function = call.get("function") or call
    altered = {**function, "arguments": replace(function.get("arguments"))}
    return {**call, "function": altered} if "function" in call else altered


def _without_texts(conversation: Conversation, content: str | None) -> Conversation | None:
    """A conversation whose assistant turns without text have this content; None if there are none."""
    messages = conversation.messages
    blank = [
        message["role"] == "assistant"
        and not (message.get("content") or "").strip()
        and bool(message.get("tool_calls") or message.get("reasoning_content"))
        for message in messages
    ]
    if not any(blank):
        return None
    turns = ({**m, "content": content} if empty else m for m, empty in zip(messages, blank, strict=True))
    return replace(conversation, messages=tuple(turns))  # type: ignore[arg-type]


def _left_out(history: Sequence[Message], text: str) -> set[str]:
    """Kinds of parts of earlier assistant turns that a text lacks."""
    kinds: set[str] = set()
    for message in history:
        if message["role"] != "assistant":
            continue
        content = message.get("content") or ""
        if message.get("reasoning_content") or message.get("tool_calls") or "think>" in content:
            kinds |= {part.kind for part in missing_parts(message, text)}
    return kinds


class Rendering:
    """Renders a conversation as text, with a tokenizer's current template; `date` is the day that it gets as today.

    template: everything that the texts depend on, for cache keys.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: Date | None = None) -> None:
        self._renderer = ChatRenderer(tokenizer, date=date)
        self.template = f"{tokenizer.chat_template} {tokenizer.special_tokens_map}{'' if date is None else f' {date}'}"

    def __call__(self, conversation: Conversation) -> str:
        """Renders all turns.

        Raises:
            UserError: there is no template, or it refuses these turns.
        """
        return self._renderer.text(conversation)
