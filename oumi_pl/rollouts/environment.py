"""Completions of several turns: an environment answers the policy's turns, with the results of tools for example."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from textwrap import shorten
from typing import Any

import numpy as np

from oumi_pl.errors import UserError
from oumi_pl.rollouts.sampling import Completion, Engine, Sampling

Reply = Callable[[np.ndarray], Sequence[int] | None]
"""Maps the token ids of a turn of the policy, `[tokens]` int32, to those that follow; None if the episode is over."""

LATER_TURNS = 0
"""Separates the completion's seed from the turn's number; the first turn uses the completion's seed alone."""
ENVIRONMENT = 2
"""Ends the seed of an environment's own random numbers."""
ANSWER = "0-answer-0"
"""Stands for the policy's turn when a chat template is rendered."""


class Environment(ABC):
    """Answers the policy's turns within a completion. Subclass it and name the class by `class_path` to train with it.

    The tokens that it returns carry no loss and have no log-probabilities. The policy goes on after them, until the
    environment ends the episode, or the completion has `max_new_tokens`, which count the environment's tokens as well.
    """

    @abstractmethod
    def start(self, row: dict[str, Any], tokenizer: Any, rng: np.random.Generator) -> Reply:
        """Begins an episode, which is one completion of a prompt.

        Args:
            row: The prompt's row.
            tokenizer: The tokenizer of the run.
            rng: Random numbers of this episode; those of a resumed run are the same.

        Returns:
            A function that is called after each finished turn of the policy, with its ids and the token that ended it.
            It returns the ids that follow, or None if the episode is over.
        """


@dataclass
class _Episode:
    prompt: Any
    seed: Sequence[int]
    reply: Reply
    most: int
    ids: list[int] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    entropies: list[np.ndarray] = field(default_factory=list)
    replies: list[tuple[int, int]] = field(default_factory=list)
    is_finished: bool = False
    """Whether the environment ended it; False if `max_new_tokens` cut it, or left no room for a reply."""

    @property
    def room(self) -> int:
        """How many tokens it may still have."""
        return self.most - len(self.ids)

    def turn_seed(self, turn: int) -> Sequence[int]:
        """The seed of a turn, counted from 0."""
        return self.seed if turn == 0 else _padded(self.seed, LATER_TURNS, turn)

    def add(self, turn: Completion) -> bool:
        """Adds a turn of the policy; returns whether it ended by itself within the room that was left."""
        room = self.room
        is_finished = turn.is_finished and len(turn.ids) <= room
        self.ids += turn.ids[:room].tolist()
        self.logps.append(turn.logps[:room])
        self.entropies.append(turn.entropies[:room])
        return is_finished

    def add_reply(self, ids: Sequence[int] | None) -> bool:
        """Adds a turn of the environment; returns whether the policy has another one.

        A reply that leaves no room for a token of the policy is left out: nothing could be learned from it.
        """
        self.is_finished = ids is None
        if ids is None or len(ids) >= self.room:
            return False
        if len(ids):
            self.replies.append((len(self.ids), len(self.ids) + len(ids)))
            self.ids += ids
        return True

    @property
    def completion(self) -> Completion:
        """All turns as one completion."""
        logps, entropies = np.concatenate(self.logps), np.concatenate(self.entropies)
        return Completion(np.array(self.ids, np.int32), logps, entropies, self.is_finished, tuple(self.replies))


def sample_episodes(
    engine: Engine,
    environment: Environment,
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Iterable[int],
    key: str = "data.environment",
) -> list[Completion]:
    """Samples a completion of several turns for each prompt. In each turn, an engine completes the ids so far.

    Random numbers depend on a completion's own seed and the turn, so episodes don't depend on which others are sampled
    with them.

    Args:
        engine: What samples a turn.
        environment: What answers it.
        policy: See `Engine.sample`; so for `tokenizer`, `seeds`, `sampling` and `ends`.
        tokenizer: Of the policy.
        prompts: Each an `oumi_pl.data.prompts.Prompt`.
        seeds: Of each prompt.
        sampling: The settings; `max_new_tokens` is that of all turns together.
        ends: Token ids that end a turn.
        key: The key of the environment, for messages.

    Raises:
        UserError: the environment fails; names the row.
    """
    most = sampling.max_new_tokens
    name = f"{key}: {type(environment).__name__}"
    episodes = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        rng = np.random.default_rng(_padded(seed, ENVIRONMENT))
        reply = _checked(name, prompt, 0, environment.start, dict(prompt.row), tokenizer, rng)
        episodes.append(_Episode(prompt, seed, reply, most))
    running, turn = episodes, 0
    while running:
        turns = engine.sample(
            policy,
            tokenizer,
            [[*episode.prompt.ids, *episode.ids] for episode in running],
            seeds=[episode.turn_seed(turn) for episode in running],
            # a turn draws the same tokens however much room the others have
            sampling=replace(sampling, max_new_tokens=max(episode.room for episode in running)),
            ends=ends,
            limits=[episode.room for episode in running],
        )
        turn += 1
        running = [e for e, sampled in zip(running, turns, strict=True) if _goes_on(e, sampled, name, turn, tokenizer)]
    return [episode.completion for episode in episodes]


def _goes_on(episode: _Episode, turn: Completion, name: str, number: int, tokenizer: Any) -> bool:
    if not episode.add(turn):
        return False
    reply = _checked(name, episode.prompt, number, episode.reply, turn.ids)
    if reply is None:
        return episode.add_reply(None)
    try:
        ids = [index(i) for i in reply]
    except TypeError:
        raise UserError(
            f"{name} returned {shorten(repr(reply), 100)}{_where(episode.prompt, number)}; return token ids, or None "
            "to end the episode"
        ) from None
    if not all(0 <= i < len(tokenizer) for i in ids):
        raise UserError(f"{name} returned ids that the tokenizer doesn't have{_where(episode.prompt, number)}: {ids}")
    return episode.add_reply(ids)


def _checked(name: str, prompt: Any, turn: int, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        raise UserError(f"{name} failed{_where(prompt, turn)}: {type(error).__name__}: {error}") from error


def _where(prompt: Any, turn: int) -> str:
    row = repr(dict(prompt.row))
    row = row if len(row) <= 100 else row[:97] + "..."
    return f" {f'after turn {turn}' if turn else 'before the first turn'} of {prompt.origin}, the row {row}"


def _padded(seed: Sequence[int], *more: int) -> list[int]:
    """A seed of four numbers (the last is that of an extra round, else 0) and some more."""
    return [*seed, *[0] * (4 - len(seed)), *more]


def turn_ids(
    tokenizer: Any, ended: np.ndarray, content: str, role: str = "tool", variables: Mapping[str, Any] | None = None
) -> list[int]:
    """The ids of a turn after one of the policy, as the chat template writes them, up to where the policy goes on.

    Args:
        tokenizer: One with a chat template.
        ended: The ids of the policy's turn. If `ended` lacks the template's end of turn, that is added.
        content: The text of the new turn.
        role: Its role.
        variables: Given to the template.

    Raises:
        UserError: the template does not write the earlier turns the same without the new one.
    """
    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": ANSWER}]
    settings = {"tokenize": False, **(variables or {})}
    before = str(tokenizer.apply_chat_template(turns, **settings))
    turns.append({"role": role, "content": content})
    after = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, **settings))
    start = before.rindex(ANSWER) + len(ANSWER) if ANSWER in before else 0
    if not start or after[:start] != before[:start]:
        raise UserError(f"the chat template has no place for a turn of the role {role!r} after one of the assistant")
    last = tokenizer.decode(ended[-1:])
    if last and before.startswith(last, start):
        start += len(last)
    return list(tokenizer(after[start:], add_special_tokens=False)["input_ids"])
