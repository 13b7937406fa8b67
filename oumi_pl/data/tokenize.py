"""Tokenizes records: token ids with a loss mask for training, and prompts for generation.

The characters that carry loss are found in the rendered text, and mapped to tokens by the offsets of a fast tokenizer.
Masks never depend on ids, so a pad token that equals EOS, or an answer that repeats the question, can't cause errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from oumi_pl.data.template import ChatRenderer, Span, adds_bos
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Conversation, Example, Preference, Record, Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "assistant", "last_turn", "all"]
Overflow = Literal["truncate", "keep_start", "drop", "error"]


@dataclass(frozen=True)
class Dropped:
    """The reason why a record gives no example."""

    reason: str


@dataclass(frozen=True)
class Marked:
    """A text and its spans that carry loss; `eos`: it has to end with an EOS token."""

    text: str
    targets: list[Span]
    eos: bool = False


class Tokens(NamedTuple):
    """A record's tokens before it is cut.

    ids: `[seq]` int32. mask: `[seq]` bool, True for tokens with a character that carries loss. straddled: one of these
    has other characters too.
    """

    ids: np.ndarray
    mask: np.ndarray
    straddled: bool


class Tokenize:
    """Turns records into examples, a batch at a time.

    Args:
        tokenizer: A fast tokenizer with its chat template and special tokens in place (`apply_template`).
        max_length: Longest example in tokens.
        train_on: Which tokens carry loss: `completion` (what follows the prompt), `assistant` (all assistant turns),
            `last_turn` (the last of them) or `all`. None: the completion if there is a prompt, all assistant turns of
            a conversation, all of a text.
        overflow: What happens to longer records: `truncate` cuts the context's start first, then the answer's end;
            `keep_start` cuts the end; `drop`; or `error`.

    Raises:
        UserError: a setting is unknown, or the tokenizer can't tell which characters a token stands for.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        train_on: TrainOn | None = None,
        overflow: Overflow = "truncate",
    ) -> None:
        if train_on is not None and train_on not in get_args(TrainOn):
            raise UserError(f"unknown train_on {train_on!r}{nearest(str(train_on), get_args(TrainOn))}")
        if overflow not in get_args(Overflow):
            raise UserError(f"unknown overflow {overflow!r}{nearest(str(overflow), get_args(Overflow))}")
        if max_length < 2:
            raise UserError(f"max_length is {max_length}; an example needs at least 2 tokens")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} doesn't report which characters a token stands for, which exact masks "
                "need; use a fast tokenizer (one with a tokenizer.json)"
            )
        self.max_length, self.overflow = max_length, overflow
        self._train_on = train_on
        self._renderer = ChatRenderer(tokenizer)
        self._backend = _with_exact_offsets(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._adds_bos = adds_bos(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._greedy = [index for index, token in added if token.lstrip or token.rstrip]

    def __call__(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Tokenizes records, each to one example or the reason why not, in order.

        An empty answer is an example too, whose target is the end of the turn.

        Raises:
            UserError: `train_on` doesn't fit a record, the chat template refuses it or can't be masked exactly, or it
                is too long and `overflow` is `error`.
        """
        tokens = self.tokens([self.mark(record) for record in records])
        silent = [self._train_on != "all" and says_nothing(record) for record in records]
        return [self._example(*row) for row in zip(tokens, silent, strict=True)]

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
            prompt = self._renderer.prompt(messages[:border], record.tools)
            answer = "\n".join(m["content"] or "" for m in messages[border:] if m["role"] == "assistant")
        ids = self._backend.encode(prompt, add_special_tokens=False).ids
        return [self._bos, *ids] if self._lacks_bos(ids) else ids, answer

    # --- characters that carry loss

    def mark(self, record: Record) -> Marked:
        """Renders a record and marks the characters that carry loss.

        Raises:
            UserError: `train_on` doesn't fit the record, or the chat template refuses it or can't be masked exactly.
        """
        if isinstance(record, Text):
            return self._marked_text(record)
        if isinstance(record, Preference):
            raise UserError("this row is a pair of responses, a chosen and a rejected one, which is data for DPO")
        record = _conversation(record)
        text, targets = self._renderer.spans(record, self._turns(record))
        return Marked(text, [(0, len(text))] if self._train_on == "all" else targets)

    def _marked_text(self, record: Text) -> Marked:
        if self._train_on in {"assistant", "last_turn"}:
            raise UserError(
                f"train_on: {self._train_on} needs conversations, and this row is text: completion and all fit"
            )
        if self._eos is None:
            raise UserError("the tokenizer has no end-of-text token (eos_token), so texts would have no end to learn")
        text = record.prompt + record.text
        return Marked(text, [(0 if self._train_on == "all" else len(record.prompt), len(text))], eos=True)

    def _turns(self, record: Conversation) -> list[int]:
        """Indices of the messages that carry loss; none for `all`, which needs no spans."""
        border = record.prompt_messages
        train_on = self._train_on or ("assistant" if border is None else "completion")
        turns = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
        if train_on == "completion":
            if border is None:
                raise UserError(
                    "train_on: completion needs rows of prompt and completion, and this one is a conversation: "
                    "assistant, last_turn and all fit"
                )
            return [i for i in turns if i >= border]
        return {"assistant": turns, "last_turn": turns[-1:], "all": []}[train_on]

    # --- tokens

    def tokens(self, marked: Sequence[Marked]) -> list[Tokens]:
        """Tokenizes marked texts, each once, with the BOS and EOS that they need."""
        encodings = self._backend.encode_batch([m.text for m in marked], add_special_tokens=False)
        tokenized = []
        for m, encoding in zip(marked, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            mask, straddled = self._mask(m, ids, encoding.offsets)
            if m.eos and (not len(ids) or ids[-1] != self._eos):
                ids, mask = np.append(ids, np.int32(self._eos)), np.append(mask, True)
            if self._lacks_bos(ids):
                ids, mask = np.insert(ids, 0, self._bos), np.insert(mask, 0, False)
            tokenized.append(Tokens(ids, mask, straddled))
        return tokenized

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
            return Dropped("longer than max_length")
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

    def _example(self, tokens: Tokens, empty_answer: bool) -> Example | Dropped:
        ids, mask, straddled = tokens
        mask[:1] = False  # nothing predicts the first token
        if not mask.any():
            return Dropped("no target tokens")
        kept = self.kept(ids, int(mask.argmax()))
        if isinstance(kept, Dropped):
            return kept
        if not mask[kept].any():
            return Dropped("no target tokens once cut")
        cut = len(kept) < len(ids)
        return Example(ids[kept], mask[kept], cut=cut, straddled=straddled, empty_answer=empty_answer)

    def _lacks_bos(self, ids: Sequence[int] | np.ndarray) -> bool:
        return self._adds_bos and (len(ids) == 0 or ids[0] != self._bos)

    def _mask(self, marked: Marked, ids: np.ndarray, offsets: list[Span]) -> tuple[np.ndarray, bool]:
        """Marks the tokens with a character of a target; also returns whether one of them has other characters.

        Shapes: `ids` `[seq]`, `offsets` `seq` pairs of characters; the mask is `[seq]` bool.
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
        for first, last in marked.targets:
            inside = (starts < last) & (ends > first)
            straddled |= bool((inside & ((starts < first) | (ends > last))).any())
            mask |= inside
        return mask, straddled


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
