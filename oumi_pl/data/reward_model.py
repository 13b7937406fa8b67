"""A reward model as a reward of online training: its score of a prompt with a completion."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from oumi_pl.data.rendering import Target, Written
from oumi_pl.data.reward import RewardData, response_ids
from oumi_pl.data.tokenize import Marked, Tokenize
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_config, loaded, read_adapter_config, without_load_report
from oumi_pl.models.hub import locate
from oumi_pl.rollouts.rewards import SampleReward, Scored
from oumi_pl.rollouts.sampling import Completion
from oumi_pl.runs.checksums import refuse_damaged_weights
from oumi_pl.types import Conversation, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from oumi_pl.data.prompts import Prompt

LONGEST = 100
"""How many of the longest prompts are rendered to find the one with the most tokens for a reward model."""
BATCH_SIZE = 16
"""Completions that are scored at once."""
KIND = "ForSequenceClassification"


class RewardModel(SampleReward):
    """Scores completions with a sequence-classification model of transformers that has one label.

    If its tokenizer has the vocabulary and the chat template of the data, it scores the sampled token ids, followed by
    what the template writes after a finished turn. Otherwise the conversation is rendered and tokenized as in the
    reward model's training. The model is loaded at the first use, in its saved precision, on the device of the policy.
    It is not a submodule of the trained module: it gets no gradient, and checkpoints don't hold it.

    Args:
        path: A folder, such as the export of a `Reward` run, also of an adapter; or a hub id.
        data: The data module of the prompts.
        key: The key that names it, for messages.

    Raises:
        UserError: there is no such model, or it has no single score.
    """

    def __init__(self, path: str, data: Any, key: str = "data.reward") -> None:
        self.path = locate(path, key)
        self.key = f"{key}: {path}"
        self.__name__ = name_of(path)
        self._data = data
        self._refuse_other_models()

    def _refuse_other_models(self) -> None:
        if self._is_adapter:
            if read_adapter_config(Path(self.path)).get("task_type") != "SEQ_CLS":
                raise UserError(f"{self.key} is an adapter of a language model, not of a reward model")
            return
        config = self._loaded(build_config, self.path, config=None, tokenizer=None, **self._hub)
        architecture = next(iter(config.architectures or ()), "a model without an architecture")
        if not architecture.endswith(KIND):
            raise UserError(f"{self.key} is {architecture}, not a reward model; train one with `fit`, module Reward")
        if config.num_labels != 1:
            raise UserError(f"{self.key} has {config.num_labels} labels; a reward model needs exactly one")

    @cached_property
    def most_tokens(self) -> int:
        """Most tokens that it reads."""
        base = self.path
        if self._is_adapter:
            base = read_adapter_config(Path(self.path)).get("base_model_name_or_path") or self.path
        config = self._loaded(build_config, base, config=None, tokenizer=None, **self._hub)
        return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def refuse_long(self, prompts: Sequence["Prompt"], new_tokens: int) -> None:
        """Checks that it can read the longest prompts with a completion.

        Its own tokenizer may make more tokens of a completion than were sampled, which only its text shows.

        Args:
            prompts: All prompts.
            new_tokens: Most tokens of a completion.

        Raises:
            UserError: it can't.
        """
        longest = sorted(prompts, key=lambda prompt: -len(prompt.ids))[: 1 if self.reads_ids else LONGEST]
        tokens = max((self._tokens(prompt, new_tokens) for prompt in longest), default=0)
        if tokens > self.most_tokens:
            raise UserError(
                f"{self.key} reads at most {self.most_tokens:,} tokens, but the longest prompt and {new_tokens:,} new "
                f"tokens are {tokens:,}; lower data.max_length, so that longer prompts are left out, or "
                "sampling.max_new_tokens"
            )

    def has_room(self, prompt: "Prompt", new_tokens: int) -> bool:
        """Whether it can read a prompt with so many new tokens."""
        return self._tokens(prompt, new_tokens) <= self.most_tokens

    def _tokens(self, prompt: "Prompt", new_tokens: int) -> int:
        nothing = np.zeros(0, np.float32)
        ids = self.ids(Scored(prompt, Completion(np.zeros(0, np.int32), nothing, nothing, False), ""))
        return len(ids) + new_tokens + (len(self._after_turn[1]) if self.reads_ids else 0)

    @property
    def _is_adapter(self) -> bool:
        folder = Path(self.path)
        return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()

    @property
    def _hub(self) -> dict[str, Any]:
        return {"trust_remote_code": self._data.trust_remote_code}

    def _loaded(self, load: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except UserError as error:
            # the loaders name the keys of a run's own model and tokenizer
            first, _, rest = str(error).partition(": ")
            raise UserError(f"{self.key}: {rest or first}") from error

    # ---- what is loaded

    @cached_property
    def _own(self) -> RewardData:
        """Prepares its tokenizer as for its training."""
        own = RewardData(tokenizer=self.path, max_length=sys.maxsize, overflow="error", lost="keep")
        own.trust_remote_code = self._data.trust_remote_code
        self._loaded(lambda: own.tokenizer)
        return own

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The model, in evaluation mode.

        Raises:
            UserError: it can't be loaded, or weights are missing or damaged.
        """
        from transformers import AutoModelForSequenceClassification

        arguments: dict[str, Any] = {"dtype": "auto", "output_loading_info": True, **self._hub}
        if self._is_adapter:
            arguments |= {"num_labels": 1, "pad_token_id": self._own.tokenizer.pad_token_id}
        refuse_damaged_weights(Path(self.path), self.key)
        load = AutoModelForSequenceClassification.from_pretrained
        # the base of an adapter has no score head, so transformers draws one and reports it before the adapter replaces
        # it: neither from the run's random numbers nor on the screen
        with torch.random.fork_rng(devices=[]), without_load_report():
            model, info = self._loaded(loaded, load, self.path, **arguments)
        if (missing := sorted(info["missing_keys"])) and not self._is_adapter:
            raise UserError(f"{self.key}: its weights {', '.join(missing[:3])} are missing, and would be random")
        return model.eval().requires_grad_(False)

    @cached_property
    def reads_ids(self) -> bool:
        """Whether the sampled ids mean the same to it."""
        ours, theirs = self._data.tokenizer, self._own.tokenizer
        templates = theirs.chat_template in (None, ours.chat_template)
        return templates and ours.get_vocab() == theirs.get_vocab()

    @cached_property
    def _after_turn(self) -> tuple[int | None, list[int]]:
        """The token that ends a turn, and the ids of what the chat template writes after it, which is not sampled."""
        tokenizer = self._data.tokenizer
        end: Any = (self._data.template and self._data.template.end_of_turn) or tokenizer.eos_token
        if not tokenizer.chat_template or not end:
            return None, []
        turns: Any = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        after = self._data.renderer.text(Conversation(turns)).rpartition(end)[2]
        ids = [] if after.strip() else tokenizer(after, add_special_tokens=False)["input_ids"]
        return tokenizer.convert_tokens_to_ids(end), list(ids)

    # ---- scores

    def ids(self, sample: Scored) -> list[int]:
        """What it reads of a sample.

        Raises:
            UserError: the conversation can't be rendered.
        """
        if self.reads_ids:
            ids = [*sample.prompt.ids, *sample.completion.ids.tolist()]
            end, after = self._after_turn
            return ids + (after if len(sample.completion.ids) and ids[-1] == end else [])
        record, tokenize = answered(sample.prompt.record, sample.text), self._own.tokenize
        try:
            if not sample.completion.is_finished:
                return unfinished_ids(tokenize, record, sample.text)
            return response_ids(tokenize, record, None).tolist()
        except UserError as error:
            raise UserError(f"{self.key}: {sample.prompt.origin}: {error}") from error

    @torch.no_grad()
    def __call__(self, samples: Sequence[Scored]) -> list[float]:
        """Scores samples, in batches of similar length.

        Raises:
            UserError: a sample has more tokens than the model has positions.
        """
        rows = [torch.tensor(self.ids(sample)) for sample in samples]
        model = self.model.to(self._data.policy.device)
        text = model.config.get_text_config()
        if (longest := max(map(len, rows), default=0)) > self.most_tokens:
            raise UserError(
                f"{self.key} reads at most {self.most_tokens:,} tokens, and a prompt with its completion has "
                f"{longest:,}; lower data.max_length"
            )
        pad = text.pad_token_id
        size = BATCH_SIZE if isinstance(pad, int) else 1  # without one, transformers can't find a padded row's end
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores: dict[int, float] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            scores |= dict(zip(chosen, scored(model, [rows[i] for i in chosen], pad or 0).tolist(), strict=True))
        return [scores[i] for i in range(len(rows))]


def name_of(path: str) -> str:
    """What metrics call a reward model: its folder, or the run's, since exports of runs are all called `model`."""
    name = Path(path)
    return name.parent.name if name.name == "model" and name.parent.name else name.name


def scored(model: "PreTrainedModel", rows: Sequence[Tensor], pad: int) -> Tensor:
    """Scores of rows of ids, `[rows]` float32, by transformers' own forward on one batch padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    device = model.device
    return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().cpu()


def answered(prompt: Record, answer: str) -> Conversation | Text:
    """A prompt with an answer; an answer that the row already has is replaced."""
    if isinstance(prompt, Text):
        return replace(prompt, prompt=prompt.prompt or prompt.text, text=answer)
    assert isinstance(prompt, Conversation)
    turns, border = prompt.messages, prompt.prompt_messages
    if border is None:
        border = len(turns) - (turns[-1]["role"] == "assistant")
    last: Any = {"role": "assistant", "content": answer}
    return replace(prompt, messages=(*turns[:border], last), prompt_messages=border)


def unfinished_ids(tokenize: Tokenize, record: Conversation | Text, answer: str) -> list[int]:
    """Ids of a prompt with an unfinished answer: up to its last character, without what ends a turn.

    Raises:
        UserError: it can't be rendered.
    """
    marked = tokenize.mark(record)
    assert isinstance(marked, Marked), "lost: keep drops nothing"
    (written,) = marked.texts
    start, text = written.targets[0].start, answer.strip()
    at = written.text.find(text, start)
    end = len(written.text) if at < 0 else at + len(text)
    (tokens,) = tokenize.tokens([Written(written.text[:end], [Target(0, start, end)])])
    return tokens.ids.tolist()
