"""Tokenizes records: token ids with a loss mask for training, and prompts for generation.

The characters that carry loss are found in the rendered text, and mapped to tokens by the offsets of a fast tokenizer.
Masks never depend on ids, so a pad token that equals EOS, or an answer that repeats the question, can't cause errors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from oumi_pl.data.rendering import ChatRenderer, Span, Target, Turns, Written, spans_by_kind
from oumi_pl.data.template import adds_bos, special_tokens
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Conversation, Example, Preference, Record, Segment, Text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "assistant", "last_turn", "all", "completion_or_all"]
Overflow = Literal["truncate", "keep_start", "drop", "error"]
Lost = Literal["error", "drop", "keep"]

LONGEST = 10_000_000
"""Most characters of a text. The tokens of one this long can take 3 GB until they are cut to `max_length`."""
TOO_LONG = "longer than max_length"
"""Reason for dropping a record, as it is in reports."""
CHARACTERS = 1 << 20
"""Characters after which no further text is tokenized in the same call."""


@dataclass(frozen=True)
class Dropped:
    """The reason why a record gives no example."""

    reason: str


@dataclass(frozen=True)
class Marked:
    """A record's texts with the characters that carry loss: one text, or one for each trained turn.

    notes: what the data report counts.
    """

    texts: list[Written]
    notes: tuple[str, ...] = ()


class Tokens(NamedTuple):
    """The tokens of a text before it is cut.

    ids: `[seq]` int32. mask: `[seq]` bool, True for tokens with a character that carries loss. straddled: one of these
    has other characters too. weights: `[seq]` float32, factors on the loss; None if all are 1.
    """

    ids: np.ndarray
    mask: np.ndarray
    straddled: bool
    weights: np.ndarray | None = None

    def at(self, places: np.ndarray) -> "Tokens":
        """The tokens at some places."""
        weights = None if self.weights is None else self.weights[places]
        return Tokens(self.ids[places], self.mask[places], self.straddled, weights)


class Tokenize:
    """Turns records into examples, a batch at a time.

    Args:
        tokenizer: A fast tokenizer with its chat template and special tokens in place (`apply_template`).
        max_length: Longest example in tokens.
        train_on: Which tokens carry loss: `completion` (what follows the prompt), `assistant` (all assistant turns),
            `last_turn` (the last of them), `all`, or `completion_or_all` (the completion if there is a prompt, else
            all). None: the completion if there is a prompt, all assistant turns of a conversation, all of a text.
        overflow: What happens to longer records: `truncate` cuts the context's start first, then the answer's end;
            `keep_start` cuts the end; `drop`; or `error`.
        turns: Whether the trained turns of a conversation share one text: `auto` (where that is exact), `together` or
            `apart`. Otherwise each has a branch of its own.
        lost: What happens to records with something to train that the chat template doesn't write: `error`, `drop` the
            record, or `keep` the rest of it.
        renderer: Renders conversations; built from the tokenizer and `turns` when left out.

    Raises:
        UserError: a setting is unknown, or the tokenizer can't tell which characters a token stands for.
    """

    _as_one = False
    """Whether all turns of a conversation share one text, also where they would be generated in another context."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        train_on: TrainOn | None = None,
        overflow: Overflow = "truncate",
        *,
        turns: Turns = "auto",
        lost: Lost = "error",
        renderer: ChatRenderer | None = None,
    ) -> None:
        settings = {"train_on": (train_on, TrainOn), "overflow": (overflow, Overflow)}
        for name, (value, known) in {**settings, "turns": (turns, Turns), "lost": (lost, Lost)}.items():
            if value not in get_args(known) and not (name == "train_on" and value is None):
                raise UserError(f"unknown {name} {value!r}{nearest(str(value), get_args(known))}")
        if max_length < 2:
            raise UserError(f"max_length is {max_length}; an example needs at least 2 tokens")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} doesn't report which characters a token stands for, which exact masks "
                "need; use a fast tokenizer (one with a tokenizer.json)"
            )
        self.max_length, self.overflow = max_length, overflow
        self._train_on = train_on
        self._lost = lost
        self._renderer = renderer or ChatRenderer(tokenizer, turns=turns)
        self._backend = _with_exact_offsets(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._adds_bos = adds_bos(tokenizer)
        self._special = special_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._greedy = [index for index, token in added if token.lstrip or token.rstrip]

    def __call__(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Tokenizes records, each to one example or the reason why not, in order.

        An empty answer is an example too, whose target is the end of the turn.

        Raises:
            UserError: `train_on` doesn't fit a record, the chat template refuses it or can't be masked exactly, or it
                is too long and `overflow` is `error`.
        """
        marked = [self.mark(record) for record in records]
        tokens = iter(self.tokens([text for m in marked if isinstance(m, Marked) for text in m.texts]))
        return [
            m if isinstance(m, Dropped) else self._example([next(tokens) for _ in m.texts], record, m.notes)
            for record, m in zip(records, marked, strict=True)
        ]

    def prompt_ids(self, record: Record) -> tuple[list[int], str]:
        """Tokenizes the prompt of a record for generation, and returns the record's answer.

        The prompt is everything before the completion or the final assistant turn. A conversation that ends with
        another role's turn, and a text without prompt, are prompts as a whole, with the answer "". For a preference,
        the answer is the chosen response. The prompt is not cut to `max_length`.

        Returns:
            The prompt's ids, with generation prompt and BOS as in training rows, and the answer's text.

        Raises:
            UserError: the chat template refuses the prompt.
        """
        if isinstance(record, Preference):
            record = record.chosen
        if isinstance(record, Text):
            prompt, answer = (record.prompt, record.text) if record.prompt else (record.text, "")
        else:
            record = _conversation(record)
            messages, border = record.messages, record.prompt_messages
            if border is None:
                border = len(messages) - (messages[-1]["role"] == "assistant")
            prompt = self._renderer.prompt(record, border)
            answer = "\n".join(m["content"] or "" for m in messages[border:] if m["role"] == "assistant")
        refuse_long(len(prompt))
        ids = self._backend.encode(prompt, add_special_tokens=False).ids
        return [self._bos, *ids] if self._lacks_bos(ids) else ids, answer

    # --- characters that carry loss

    def mark(self, record: Record) -> Marked | Dropped:
        """Renders a record and marks the characters that carry loss.

        Raises:
            UserError: `train_on` doesn't fit the record, the chat template refuses it or can't be masked exactly, or it
                doesn't write something that is to be trained and `lost` is `error`.
        """
        if isinstance(record, Text):
            return self._marked_text(record)
        if isinstance(record, Preference):
            raise UserError("this row is a pair of responses, a chosen and a rejected one, which is data for DPO")
        record = _conversation(record)
        if self._is_dropped_unread(sum(len(message["content"] or "") for message in record.messages)):
            return Dropped(TOO_LONG)
        rendered = self._renderer.render(record, self._turns(record), as_one=self._as_one)
        if rendered.lost and self._lost == "error":
            raise lost_error(rendered.lost)
        kinds = sorted({kind for _, kind, _ in rendered.lost})
        if kinds and self._lost == "drop":
            return Dropped(f"{' and '.join(kinds)} that the chat template doesn't write")
        notes = [f"{kind} not trained, because the chat template doesn't write it" for kind in kinds]
        notes += [f"{kind} of earlier turns left out of the context" for kind in sorted(rendered.left_out)]
        texts = rendered.texts
        if self._trains_all(record):
            texts = [Written(text.text, [Target(0, 0, len(text.text))]) for text in texts]
        if record.weight != 1 or any("weight" in message for message in record.messages):
            texts = self._weighed(record, texts)
        return Marked(texts, tuple(notes))

    def _marked_text(self, record: Text) -> Marked | Dropped:
        if self._train_on in {"assistant", "last_turn"}:
            raise UserError(
                f"train_on: {self._train_on} needs conversations, and this row is text: completion and all fit"
            )
        if self._eos is None:
            raise UserError("the tokenizer has no end-of-text token (eos_token), so texts would have no end to learn")
        text = record.prompt + record.text
        if self._is_dropped_unread(len(text)):
            return Dropped(TOO_LONG)
        target = Target(0, 0 if self._train_on == "all" else len(record.prompt), len(text))
        return Marked([Written(text, [target], eos=True, weights=[record.weight] if record.weight != 1 else [])])

    def _is_dropped_unread(self, characters: int) -> bool:
        """Whether a record of so many characters is dropped before it is tokenized.

        Raises:
            UserError: it can't be tokenized, and `overflow` is not `drop`.
        """
        if characters > LONGEST and self.overflow != "drop":
            refuse_long(characters)
        return characters > LONGEST

    def _weighed(self, record: Conversation, texts: list[Written]) -> list[Written]:
        """Gives the targets of a conversation's texts the weights that its turns and the row have.

        If answers have texts of their own, a turn of another role carries loss in that of the answer which follows it.

        Raises:
            UserError: a turn's text can't be found.
        """
        messages, all_of_it = record.messages, self._trains_all(record)
        others = [
            i
            for i, m in enumerate(messages)
            if m["role"] != "assistant" and (m.get("weight", 1) != 1 if all_of_it else m.get("weight", 0) > 0)
        ]
        if all_of_it:  # then turns with other weights lie over the whole
            flagged = [i for i, m in enumerate(messages) if m["role"] == "assistant" and "weight" in m]
            (whole,), own = texts, []
            rendered = self._renderer.render(record, flagged, as_one=True).texts[0] if flagged else whole
            if flagged and rendered.text.startswith(whole.text):
                whole, own = rendered, rendered.targets
            else:  # the template writes the last of them differently without what follows
                others += flagged
            texts = [replace(whole, targets=[Target(-1, 0, len(whole.text)), *own])]
        last = [max((target.turn for target in text.targets), default=-1) for text in texts]
        for i in others:
            place = next((k for k, turn in enumerate(last) if turn > i), len(texts) - 1)
            shown = record if len(texts) == 1 else replace(record, messages=messages[: last[place] + 1])
            texts[place].targets.append(self._place(shown, i, texts[place].text))
        return [self._with_weights(record, text) for text in texts]

    def _with_weights(self, record: Conversation, text: Written) -> Written:
        targets: list[Target] = []
        weights: list[float] = []
        for turn in dict.fromkeys(target.turn for target in text.targets):
            own = [target for target in text.targets if target.turn == turn]
            weight, spans = 1.0, None
            if turn >= 0:
                message = record.messages[turn]
                weight, spans = message.get("weight", 1.0), message.get("spans")
            if spans is not None:
                if self._trains_all(record):
                    targets, weights = targets + own, weights + [0.0] * len(own)
                own = _narrowed(own, spans, record.messages[turn]["content"] or "", text.text)
            targets, weights = targets + own, weights + [weight * record.weight] * len(own)
        return replace(text, targets=targets, weights=weights)

    def _place(self, record: Conversation, turn: int, text: str) -> Target:
        """Where in a conversation's text the content of a turn of any role is, with the special token that ends it."""
        mark = "Zq?zQ"  # a text that doesn't occur otherwise
        messages = [*record.messages]
        if turn >= len(messages):
            raise UserError(
                f"with this chat template, each answer has a context of its own, and turn {turn + 1}, which is to be "
                "trained, is in none of them, because no answer follows it; what helps: another template"
            )
        messages[turn] = {**messages[turn], "content": mark}
        marked = self._renderer.text(replace(record, messages=tuple(messages)))
        start, _, rest = marked.partition(mark)
        if len(start) == len(marked) or not (text.startswith(start) and text.endswith(rest)):
            raise UserError(f"the text of turn {turn + 1} can't be found in what the chat template writes")
        end = len(text) - len(rest)
        special = next((token for token in self._special if rest.startswith(token)), "")
        return Target(turn, len(start), end + len(special))

    def _turns(self, record: Conversation) -> list[int]:
        """Indices of the messages that carry loss; none for `all`, which needs no spans."""
        border = record.prompt_messages
        train_on = self._train_on or ("assistant" if border is None else "completion")
        if train_on == "completion_or_all":
            train_on = "all" if border is None else "completion"
        turns = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
        if train_on == "completion":
            if border is None:
                raise UserError(
                    "train_on: completion needs rows of prompt and completion, and this one is a conversation: "
                    "assistant, last_turn and all fit"
                )
            turns = [i for i in turns if i >= border]
        chosen = {"last_turn": turns[-1:], "all": []}.get(train_on, turns)
        return [i for i in chosen if record.messages[i].get("weight") != 0 and record.messages[i].get("spans") != []]

    def _trains_all(self, record: Record) -> bool:
        """Whether all tokens of a record carry loss, those of its prompt among them."""
        if self._train_on != "completion_or_all":
            return self._train_on == "all"
        return not record.prompt if isinstance(record, Text) else _conversation(record).prompt_messages is None

    # --- tokens

    def tokens(self, marked: Sequence[Written]) -> list[Tokens]:
        """Tokenizes marked texts, each once, with the BOS and EOS that they need."""
        tokenized = []
        for m, encoding in zip(marked, self._encoded([m.text for m in marked]), strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            weights = np.zeros(len(ids), dtype=np.float32) if m.weights else None
            mask, straddled = self._mask(m, ids, encoding.offsets, weights)
            if m.eos and (not len(ids) or ids[-1] != self._eos):
                ids, mask = np.append(ids, np.int32(self._eos)), np.append(mask, not m.weights or m.weights[-1] > 0)
                weights = None if weights is None else np.append(weights, np.float32(m.weights[-1]))
            if self._lacks_bos(ids):
                ids, mask = np.insert(ids, 0, self._bos), np.insert(mask, 0, False)
                weights = None if weights is None else np.insert(weights, 0, 0)
            tokenized.append(Tokens(ids, mask, straddled, weights))
        return tokenized

    def _encoded(self, texts: Sequence[str]) -> "Iterator[Encoding]":
        """Yields the encodings of texts, a few at a time: each takes up to 300 bytes of memory per character."""
        start = characters = 0
        for end, text in enumerate(texts, 1):
            characters += len(text)
            if characters >= CHARACTERS or end == len(texts):
                yield from self._backend.encode_batch(texts[start:end], add_special_tokens=False)
                start, characters = end, 0

    def kept(self, ids: np.ndarray, first_target: int) -> np.ndarray | Dropped:
        """Chooses the positions of `ids` `[seq]` to keep within `max_length`, according to `overflow`; ascending.

        `truncate` cuts the start of the context (everything before `first_target`) after its BOS. If the answer alone
        is too long, the context keeps up to half of `max_length`, and the answer is cut at its end. `keep_start` always
        cuts the end.

        Raises:
            UserError: it is too long and `overflow` is `error`.
        """
        length = len(ids)
        if length <= self.max_length:
            return np.arange(length)
        if self.overflow == "drop":
            return Dropped(TOO_LONG)
        if self.overflow == "error":
            raise UserError(f"{length} tokens, but max_length is {self.max_length}; raise it, or let overflow truncate")
        if self.overflow == "keep_start":
            return np.arange(self.max_length)
        answer = length - first_target
        fits = answer < self.max_length
        context = self.max_length - answer if fits else min(first_target, self.max_length // 2)
        kept = np.arange(first_target - context, first_target - context + self.max_length)
        if context and ids[0] == self._bos:
            kept[0] = 0
        return kept

    def _example(self, paths: list[Tokens], record: Record, notes: tuple[str, ...]) -> Example | Dropped:
        for path in paths:
            path.mask[:1] = False  # nothing predicts the first token
        if not any(path.mask.any() for path in paths):
            return Dropped("no target tokens")
        kept = self.cut(paths)
        if isinstance(kept, Dropped):
            return kept
        if not any(path.mask.any() for path in kept):
            return Dropped("no target tokens once cut")
        ids, mask, segments, weights = joined(kept)
        return Example(
            ids,
            mask,
            segments,
            weights=None if weights is None or (weights[mask] == 1).all() else weights,
            cut=any(len(before.ids) > len(after.ids) for before, after in zip(paths, kept, strict=True)),
            straddled=any(path.straddled for path in paths),
            empty_answer=not self._trains_all(record) and says_nothing(record),
            notes=notes,
        )

    def cut(self, paths: Sequence[Tokens]) -> list[Tokens] | Dropped:
        """Cuts the paths of an example to `max_length`: all lose the same context, and what then is too long its end.

        The context is what all paths begin with, up to the first target.
        """
        if all(len(path.ids) <= self.max_length for path in paths):
            return list(paths)
        places = self._places(paths)
        if isinstance(places, Dropped):
            return places
        cut = (places[: np.searchsorted(places, len(path.ids))] for path in paths)
        return [path.at(kept) for path, kept in zip(paths, cut, strict=True)]

    def _places(self, paths: Sequence[Tokens]) -> np.ndarray | Dropped:
        """The positions in the longest path that are kept, ascending."""
        longest = max((path.ids for path in paths), key=len)
        border = min(_first_target(path) for path in paths)
        for path in paths[1:]:
            border = min(border, common_prefix(paths[0].ids, path.ids))
        return self.kept(longest, border)

    def uncut(self, record: Record) -> tuple[Example, list[np.ndarray]] | None:
        """A record's example before it is cut, and for each segment the indices of its own tokens that are kept.

        Branches of which no target is kept are left out. None if the record is dropped whatever `max_length` is.
        """
        marked = self.mark(record)
        paths = [] if isinstance(marked, Dropped) else self.tokens(marked.texts)
        for path in paths:
            path.mask[:1] = False
        if not any(path.mask.any() for path in paths):
            return None
        places = self._places(paths)
        if isinstance(places, Dropped):
            example = _tree(paths)
            return example, [np.arange(0)] * len(example.segments)
        kept = [path for path in paths if path.mask[places[: np.searchsorted(places, len(path.ids))]].any()]
        example = _tree(kept or paths)
        own = []
        for segment in example.segments:
            end = segment.shared + segment.length
            own.append(places[(places >= segment.shared) & (places < end)] - segment.shared)
        return example, own

    def loss_by_kind(self, record: Conversation) -> dict[str, int]:
        """How many tokens that carry loss belong to text, reasoning and tool calls, before the record is cut.

        The others are what the template writes around them: headers, tags and ends of turns.
        """
        marked = self.mark(record)
        counts: dict[str, int] = {}
        for text in [] if isinstance(marked, Dropped) else marked.texts:
            spans = spans_by_kind(text, record.messages)
            for kind, tokens in zip(spans, self.tokens([Written(text.text, s) for s in spans.values()]), strict=True):
                counts[kind] = counts.get(kind, 0) + int(tokens.mask.sum())
        return counts

    def _lacks_bos(self, ids: Sequence[int] | np.ndarray) -> bool:
        return self._adds_bos and (len(ids) == 0 or ids[0] != self._bos)

    def _mask(
        self, marked: Written, ids: np.ndarray, offsets: list[Span], weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, bool]:
        """Marks the tokens with a character of a target; also returns whether one of them has other characters.

        Fills `weights` with those of the targets; tokens of weight 0 are not marked.

        Shapes: `ids` and `weights` `[seq]`, `offsets` `seq` pairs of characters; the mask is `[seq]` bool.
        """
        borders = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        starts, ends = borders[:, 0], borders[:, 1]
        if self._greedy:
            _shrink_greedy(marked.text, starts, ends, np.flatnonzero(np.isin(ids, self._greedy)))
        if (empty := starts == ends).any():
            # A token with an empty offset (part of a multi-byte character, for example) gets the characters that no
            # earlier token covers.
            taken = np.maximum.accumulate(np.concatenate(([0], ends[:-1])))
            starts = np.where(empty, np.minimum(taken, starts), starts)
        mask, straddled = np.zeros(len(ids), dtype=bool), False
        for i, (_, first, last) in enumerate(marked.targets):
            inside = (starts < last) & (ends > first)
            straddled |= bool((inside & ((starts < first) | (ends > last))).any())
            mask |= inside
            if weights is not None:
                weights[inside] = marked.weights[i]
        return (mask if weights is None else mask & (weights > 0)), straddled


def refuse_long(characters: int) -> None:
    """Refuses texts whose tokens would not fit into memory.

    Raises:
        UserError: the text has more than `LONGEST` characters.
    """
    if characters > LONGEST:
        raise UserError(f"a text of {characters:,} characters, and at most {LONGEST:,} are tokenized as one; divide it")


def lost_error(lost: Sequence[tuple[int, str, str]]) -> UserError:
    """The error for parts of trained turns that the chat template doesn't write; see `Rendered.lost`."""
    turn = lost[0][0]
    names = list(dict.fromkeys(name for index, _, name in lost if index == turn))
    listed = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
    return UserError(
        f"the chat template doesn't write the {listed} of turn {turn + 1}, so the model would not learn it; what "
        "helps: another template (chatml writes all parts), other columns (`columns`), or `lost: drop` or `lost: keep`"
    )


def _narrowed(targets: Sequence[Target], spans: Sequence[Span], content: str, text: str) -> list[Target]:
    """The parts of a turn's targets that `spans` name, in characters of its content.

    A span that reaches the end of the content includes what ends the turn.

    Raises:
        UserError: the content is not in the text as it is.
    """
    turn, start, end = targets[0].turn, targets[0].start, targets[-1].end
    stripped = content.strip()
    at = text.rfind(stripped, start, end)
    if at < 0:
        raise UserError(
            f"the chat template doesn't write the text of turn {turn + 1} as it is, so the spans that carry loss can't "
            "be found; what helps: another template, or `weight` or `train` for the whole turn"
        )
    at -= content.find(stripped)
    last = len(content.rstrip())
    return [Target(turn, max(start, at + first), end if stop >= last else min(end, at + stop)) for first, stop in spans]


def _tree(paths: Sequence[Tokens]) -> Example:
    """The paths as an example."""
    ids, mask, segments, weights = joined(paths)
    return Example(ids, mask, segments, weights=weights)


def joined(
    paths: Sequence[Tokens],
) -> tuple[np.ndarray, np.ndarray, tuple[Segment, ...], np.ndarray | None]:
    """Joins the paths of an example to a tree in which tokens that paths begin with are stored once.

    A path that goes on where the one before it ends is joined with it. Of several paths, tokens after the last target
    are left out.

    Returns:
        Token ids and loss mask, `[tokens]`, the segments, and the weights, `[tokens]`; None if all are 1.

    Raises:
        UserError: two paths begin with different tokens.
    """
    if len(paths) == 1:
        return paths[0].ids, paths[0].mask, (Segment(len(paths[0].ids)),), paths[0].weights
    weights: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    segments: list[Segment] = []
    known: list[np.ndarray] = []
    for path in paths:
        if not path.mask.any():  # its targets were cut off
            continue
        length = int(np.flatnonzero(path.mask)[-1]) + 1
        own, mask = path.ids[:length], path.mask[:length]
        common = [common_prefix(other, own) for other in known]
        parent = int(np.argmax(common)) if common else -1
        shared = min(common[parent], int(mask.argmax())) if common else 0
        if common and not shared:
            raise UserError(
                "the texts of two turns begin with different tokens, so they can't be trained as one row; what helps: "
                "train_on: last_turn, or another template"
            )
        if common and parent == len(known) - 1 and shared == len(known[parent]):
            segments[-1] = segments[-1]._replace(length=segments[-1].length + length - shared)
            known[-1] = own
        else:
            segments.append(Segment(length - shared, parent, shared))
            known.append(own)
        ids.append(own[shared:])
        masks.append(mask[shared:])
        if path.weights is not None:
            weights.append(path.weights[shared:length])
    return np.concatenate(ids), np.concatenate(masks), tuple(segments), np.concatenate(weights) if weights else None


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two id sequences."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def _first_target(path: Tokens) -> int:
    return int(path.mask.argmax()) if path.mask.any() else len(path.ids)


def _conversation(record: Record) -> Conversation:
    """Refuses a user's own type of record, which only a user's own data module can tokenize."""
    if not isinstance(record, Conversation):
        raise UserError(f"this row is a {type(record).__name__}, which this data module can't tokenize")
    return record


def says_nothing(record: Record) -> bool:
    """Whether the answer to a prompt is empty, or all assistant turns are."""
    if isinstance(record, Text):
        return bool(record.prompt) and not record.text.strip()
    if not isinstance(record, Conversation):
        return False
    answers = [turn for turn in record.messages[record.prompt_messages or 0 :] if turn["role"] == "assistant"]
    said = [(a["content"] or "").strip() or a.get("tool_calls") or a.get("reasoning_content") for a in answers]
    return bool(answers) and not any(said)


def _with_exact_offsets(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """A copy of the tokenizer's backend whose offsets cover all characters of a token.

    The post-processor of many backends strips spaces from the offsets (not from the tokens), so that no token would
    cover them. It also adds BOS and EOS, which `Tokenize.tokens` does instead.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    return backend


def _shrink_greedy(text: str, starts: np.ndarray, ends: np.ndarray, where: np.ndarray) -> None:
    """Strips the spaces that a special token has absorbed (`lstrip`, `rstrip`) from its offsets, in place.

    Otherwise the special token before an answer that begins with a space would carry loss.
    """
    for i in where:
        piece = text[starts[i] : ends[i]]
        starts[i] += len(piece) - len(piece.lstrip())
        ends[i] -= len(piece) - len(piece.rstrip())
