"""Tokenizes preferences into pairs of responses that share their prompt.

Each response is rendered and tokenized together with its prompt, as one text, and the shared prompt is the common
prefix of both id sequences. Prompt and response are never tokenized separately, which could give other tokens at the
border.
"""

import copy
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from oumi_pl.data.rendering import ChatRenderer, RefusedError, Written
from oumi_pl.data.tokenize import Dropped, Lost, Overflow, Tokenize, Tokens, common_prefix
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Example, Preference, Record, Segment, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUAL = "chosen equals rejected"
"""Reason for dropping a pair, as it is in reports."""


class TokenizePairs(Tokenize):
    """Turns preferences into pairs, a batch at a time.

    The prompt is the longest common prefix of both token sequences without a token of a response: a token across the
    border belongs to the responses. In the responses, the tokens of the assistant's turns carry loss, as in SFT, and so
    do tokens before the first of these.

    Args:
        tokenizer: A fast tokenizer with its chat template and special tokens in place (`apply_template`).
        max_length: Longest prompt with one response, in tokens.
        overflow: What happens to longer pairs: `truncate` cuts the prompt's start first, then the responses' ends, by
            the rule of `Tokenize` with the longer response as the answer; `keep_start` cuts only the responses' ends;
            `drop`; or `error`.
        lost: See `Tokenize`.
        renderer: See `Tokenize`.

    Raises:
        UserError: a setting is unknown, or the tokenizer can't tell which characters a token stands for.
    """

    _as_one = True

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        overflow: Overflow = "truncate",
        lost: Lost = "error",
        renderer: ChatRenderer | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length, overflow=overflow, lost=lost, renderer=renderer)

    def __call__(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Tokenizes preferences, each to a prompt with two branches or the reason why not, in order.

        The first segment is the prompt with the chosen response, the second the rejected one, which continues the
        prompt. The field `margin` is NaN if the row has none.

        Pairs with equal responses, an empty response or an empty prompt are dropped.

        Raises:
            UserError: a record is no preference or its prompts differ, the chat template refuses it or can't be masked
                exactly, or it is too long and `overflow` is `error`.
        """
        preferences = [_checked(record) for record in records]
        marked = [self._marked_pair(preference) for preference in preferences]
        tokens = iter(self.tokens([m for pair in marked if not isinstance(pair, Dropped) for m in pair[:2]]))
        return [
            pair if isinstance(pair, Dropped) else self._pair(next(tokens), next(tokens), preference.margin, pair[2])
            for preference, pair in zip(preferences, marked, strict=True)
        ]

    def uncut(self, record: Record) -> tuple[Example, list[np.ndarray]] | None:
        """Cuts a pair: the longer response decides what is kept, and the other is cut to the same length."""
        whole = copy.copy(self)
        whole.max_length = sys.maxsize
        (example,) = whole([record])
        if isinstance(example, Dropped):
            return None
        chosen, rejected = example.segments
        border = rejected.shared
        prompt, ids = example.input_ids[:border], example.input_ids
        longer = max(ids[: chosen.length], np.concatenate([prompt, ids[chosen.length :]]), key=len)
        kept = self.kept(longer, border)
        if isinstance(kept, Dropped):
            kept = np.arange(0)
        context = kept[kept < border]
        room = len(kept) - len(context)
        first = np.concatenate([context, np.arange(border, min(border + room, chosen.length))])
        return example, [first, np.arange(min(room, rejected.length))]

    def _marked_pair(self, preference: Preference) -> tuple[Written, Written, tuple[str, ...]] | Dropped:
        chosen, rejected = preference.chosen, preference.rejected
        if _is_blank(chosen) or _is_blank(rejected):
            return Dropped("empty response")
        try:
            marked = [self.mark(chosen), self.mark(rejected)]
        except RefusedError:
            # Real dialogues don't always alternate, and some templates require it: drop those instead of stopping.
            if any(_repeats_a_role(response) for response in (chosen, rejected)):
                return Dropped("the same role twice in a row, which the chat template refuses")
            raise
        texts: list[Written] = []
        notes: list[str] = []
        for response in marked:
            if isinstance(response, Dropped):
                return response
            texts += response.texts
            notes += response.notes
        return texts[0], texts[1], tuple(dict.fromkeys(notes))

    def _pair(
        self, chosen: Tokens, rejected: Tokens, margin: float | None, notes: tuple[str, ...]
    ) -> Example | Dropped:
        if not (chosen.mask.any() and rejected.mask.any()):
            return Dropped("no target tokens")
        shared = common_prefix(chosen.ids, rejected.ids)
        if shared == len(chosen.ids) == len(rejected.ids):
            return Dropped(EQUAL)
        border = min(shared, int(chosen.mask.argmax()), int(rejected.mask.argmax()))
        if not border:
            return Dropped("no prompt")
        kept = self.kept(max(chosen.ids, rejected.ids, key=len), border)
        if isinstance(kept, Dropped):
            return kept
        prompt = kept[kept < border]
        room = len(kept) - len(prompt)
        branches = [_branch(tokens, border, room) for tokens in (chosen, rejected)]
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = branches
        if np.array_equal(chosen_ids, rejected_ids):
            return Dropped(f"{EQUAL} once cut")
        return Example(
            np.concatenate([chosen.ids[prompt], chosen_ids, rejected_ids]),
            np.concatenate([np.zeros(len(prompt), dtype=bool), chosen_mask, rejected_mask]),
            (Segment(len(prompt) + len(chosen_ids)), Segment(len(rejected_ids), parent=0, shared=len(prompt))),
            {"margin": float("nan") if margin is None else margin},
            cut=len(kept) < max(len(chosen.ids), len(rejected.ids)),
            straddled=chosen.straddled or rejected.straddled,
            notes=notes,
        )


def _branch(tokens: Tokens, border: int, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and loss mask of a response after the prompt, at most `room` tokens. Its first token carries loss.

    Unless its turns say what carries loss.
    """
    mask = tokens.mask[border:].copy()
    if tokens.weights is None:
        mask[: mask.argmax()] = True
    return tokens.ids[border:][:room], mask[:room]


def _checked(record: Record) -> Preference:
    """Refuses records that are no valid preferences, as a user's format may return."""
    if not isinstance(record, Preference):
        raise UserError("this row is not a pair of responses; DPO needs a chosen and a rejected one")
    if _prompt(record.chosen) != _prompt(record.rejected):
        raise UserError("chosen and rejected hold different prompts")
    for weight in (*_weights(record.chosen), *_weights(record.rejected)):
        if weight not in {0, 1}:
            raise UserError(
                f"a turn has the weight {weight:g}, and pairs count whole responses: a turn carries loss (weight 1) or "
                "doesn't (weight 0)"
            )
    return record


def _weights(response: Conversation | Text) -> list[float]:
    if isinstance(response, Text):
        return [response.weight]
    return [response.weight, *(turn["weight"] for turn in response.messages if "weight" in turn)]


def _prompt(response: Conversation | Text) -> object:
    if isinstance(response, Text):
        return response.prompt
    if response.prompt_messages is None:
        raise UserError("a pair of conversations needs prompt_messages, to say where the responses begin")
    return response.messages[: response.prompt_messages], response.tools


def _is_blank(response: Conversation | Text) -> bool:
    if isinstance(response, Text):
        return not response.text.strip()
    said = [turn for turn in response.messages[response.prompt_messages :] if turn["role"] == "assistant"]
    return not any(
        (turn["content"] or "").strip() or turn.get("tool_calls") or turn.get("reasoning_content") for turn in said
    )


def _repeats_a_role(response: Conversation | Text) -> bool:
    if isinstance(response, Text):
        return False
    roles = [turn["role"] for turn in response.messages]
    return any(role == following for role, following in pairwise(roles))
