"""Loaders of online training: they sample the completions of an update when it is due, and yield its micro-batches."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from oumi_pl.data.loader import FollowsPlan, PlanSampler, refuse_other_rows
from oumi_pl.data.plan import Layout, Plan
from oumi_pl.rollouts.sampling import Completion
from oumi_pl.types import Batch, Update

if TYPE_CHECKING:
    from oumi_pl.data.rollouts import RolloutData


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    components: `[completions, rewards]`, the value of each reward. penalties: `[completions]`, taken from the total.
    metrics: `[completions, metrics]`, of held-out prompts. extra: how many other prompts were sampled in its place.
    """

    prompt: int
    completions: list[Completion]
    components: np.ndarray
    penalties: np.ndarray
    metrics: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    extra: int = 0


class TrainedGroups(NamedTuple):
    """The groups of an update, over all ranks and micro-batches."""

    groups: list[Group]
    advantages: np.ndarray
    """`[groups, completions]`."""
    are_new: bool
    """Whether this is the first update that trains on them."""


class RolloutLoader(FollowsPlan):
    """Yields this rank's micro-batches of each update, and samples the completions of an update when it is due.

    Its state is the position, counted in updates, and the rollouts that are not used up. It is the same on all ranks.
    """

    def __init__(self, data: "RolloutData", plan: Any, layout: Layout) -> None:
        self.data = data
        self.position = PlanSampler(plan, layout)
        self.groups: list[Group] = []
        """The groups of the current block."""
        self.block: tuple[int, int] | None = None
        """Epoch and number of the block that `groups` belongs to."""
        self.trained: TrainedGroups | None = None
        """The groups of the current update."""

    @property
    def sampler(self) -> PlanSampler:
        """Lightning looks here for `set_epoch`."""
        return self.position

    def __len__(self) -> int:
        """Micro-batches of an epoch on one rank. Lightning does not prefetch from loaders that have a length."""
        return len(self.position.current) * self.data.iterations * self.position.layout_now.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        position, plan = self.position, self.position.current
        for update in range(position.update, len(plan) * self.data.iterations):
            batches = self._batches(plan, update)
            for i, batch in enumerate(batches, 1):
                position.update = update + (i == self.position.layout_now.micro_batches)
                yield batch

    def _batches(self, plan: Plan, update: int) -> Iterator[Batch]:
        data, layout = self.data, self.position.layout_now
        per_block = data.steps_per_rollout * data.iterations
        number, within = divmod(update, per_block)
        first = number * data.steps_per_rollout
        size = min(data.steps_per_rollout, len(plan) - first)
        if self.block != (self.position.epoch, number):
            rows = range(first * plan.rows_per_update, min((first + size) * plan.rows_per_update, plan.rows))
            self.groups = data.training_groups(plan, self.position.epoch, rows)
            self.block = self.position.epoch, number
        start = (within % size) * plan.rows_per_update
        micro_batches = layout.within(data.limit, update, len(plan) * data.iterations)
        stop = start + min(plan.rows_per_update, micro_batches * layout.batch_size * layout.ranks)
        groups = self.groups[start:stop]
        advantages = data.policy.advantages(data.totals(groups))
        self.trained = TrainedGroups(groups, advantages, are_new=within < size)
        targets = sum(data.example("train", group).target_tokens for group in groups)
        totals = Update(targets, len(groups) * data.completions, layout.parts)
        for share in layout.shares(len(groups)):
            batch: Any = data.batch_of("train", [groups[i] for i in share], advantages[list(share)])
            # before the first update after sampling, the policy is the one that sampled
            batch["on_policy"] = within == 0
            batch["update"] = totals
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, between two updates, the layout of updates, and the rollouts that are not used up."""
        data = self.data
        number, within = divmod(self.position.update, data.steps_per_rollout * data.iterations)
        is_in_use = within > 0 and (self.position.epoch, number) == self.block
        return {
            "epoch": self.position.epoch,
            "update": self.position.update,
            "micro_batches": self.position.layout_now.micro_batches,
            "rows_per_update": self.position.layout_now.rows_per_update,
            "rollouts": [_to_plain(group) for group in self.groups] if is_in_use else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a position and the rollouts.

        Raises:
            UserError: an update has another number of rows than when the state was saved.
        """
        refuse_other_rows(dict(state), self.position.layout.at(state["epoch"]))
        self.position.epoch, self.position.update = state["epoch"], state["update"]
        if state["rollouts"]:
            self.groups = [_from_plain(group) for group in state["rollouts"]]
            self.block = state["epoch"], state["update"] // (self.data.steps_per_rollout * self.data.iterations)


class EvalLoader:
    """Completes held-out prompts, the same in every pass: greedily, or with a seed of their own."""

    def __init__(self, data: "RolloutData", split: str) -> None:
        self.data = data
        self.split = split
        self.sampling = replace(data.sampling, temperature=0.0) if data.eval_completions == 1 else data.sampling

    def __len__(self) -> int:
        """Batches."""
        layout, prompts = self.data.layout, len(self.data.all_prompts(self.split))
        return math.ceil(prompts / (self.data.eval_batch_size * layout.ranks))

    def __iter__(self) -> Iterator[Batch]:
        data = self.data
        layout = Layout(data.eval_batch_size, 1, data.layout.ranks, data.layout.rank)
        prompts = len(data.all_prompts(self.split))
        for first in range(0, prompts, layout.rows_per_update):
            rows_here = range(first, min(first + layout.rows_per_update, prompts))
            numbers = [(row, row) for row in rows_here]
            groups = data.groups(self.split, numbers, self.sampling, data.eval_completions)
            (share,) = layout.shares(len(groups))
            yield data.batch_of(self.split, [groups[i] for i in share])


def _to_plain(group: Group) -> dict[str, Any]:
    """A group as tensors and numbers, which checkpoints may hold."""
    return {
        "prompt": group.prompt,
        "ids": [torch.from_numpy(c.ids.copy()) for c in group.completions],
        "logps": [torch.from_numpy(c.logps.copy()) for c in group.completions],
        "entropies": [torch.from_numpy(c.entropies.copy()) for c in group.completions],
        "finished": [c.is_finished for c in group.completions],
        "replies": [[list(span) for span in c.replies] for c in group.completions],
        "policy_logps": [
            None if c.policy_logps is None else torch.from_numpy(c.policy_logps.copy()) for c in group.completions
        ],
        "components": torch.from_numpy(group.components.copy()),
        "penalties": torch.from_numpy(group.penalties.copy()),
        "extra": group.extra,
    }


def _from_plain(plain: Mapping[str, Any]) -> Group:
    """The inverse of `_to_plain`."""
    # checkpoints of earlier versions have neither
    replies = plain.get("replies", [()] * len(plain["ids"]))
    recomputed = plain.get("policy_logps", [None] * len(plain["ids"]))
    completions = [
        Completion(
            plain["ids"][i].numpy(),
            plain["logps"][i].numpy(),
            plain["entropies"][i].numpy(),
            is_finished,
            tuple((start, stop) for start, stop in replies[i]),
            None if recomputed[i] is None else recomputed[i].numpy(),
        )
        for i, is_finished in enumerate(plain["finished"])
    ]
    values = plain["components"].numpy(), plain["penalties"].numpy()
    return Group(plain["prompt"], completions, *values, extra=plain["extra"])
