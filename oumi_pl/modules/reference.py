"""What a policy is compared with: nothing, its base without adapters, a frozen copy, or numbers on disk.

None of these is part of the module: a reference is in no checkpoint, no optimizer, and never in training mode.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from oumi_pl.errors import UserError
from oumi_pl.models.preference import PreferenceLM
from oumi_pl.terminal.progress import track
from oumi_pl.types import PreferenceBatch


class Reference(ABC):
    """Gives the log-probabilities of targets under the reference."""

    @abstractmethod
    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """`[targets]` float32, without gradient, for a batch of examples of a split."""


class NoReference(Reference):
    """For losses that need none."""

    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """Zeros."""
        return torch.zeros(len(batch["targets"]), device=batch["targets"].device)


class WithoutAdapters(Reference):
    """The policy itself with its adapters disabled: needs no memory."""

    def __init__(self, policy: PreferenceLM) -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """Runs the base model."""
        with self.policy.hf.disable_adapter():
            return self.policy(batch).logps


class FrozenModel(Reference):
    """Another model, or a copy of the policy as it was at the start, kept in memory."""

    def __init__(self, model: PreferenceLM) -> None:
        self.model: PreferenceLM = model.eval().requires_grad_(False)

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """Runs the model."""
        return self.model(batch).logps

    @torch.no_grad()
    def move_towards(self, policy: PreferenceLM, share: float) -> None:
        """Sets the weights to `(1 - share) reference + share policy` (Gorbatovski et al. 2024, arXiv:2404.09656)."""
        for mine, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            if theirs.requires_grad:  # the others are equal
                mine.lerp_(theirs.to(mine), share)


class Precomputed(Reference):
    """Log-probabilities computed before training and read from disk: no second model is in memory.

    Args:
        stores: split -> what holds its log-probabilities (`oumi_pl.data.reference.ReferenceLogps`).
    """

    def __init__(self, stores: dict[str, Any]) -> None:
        self.stores = stores

    def logps(self, batch: PreferenceBatch, split: str) -> Tensor:
        """Looks the examples up."""
        found = torch.from_numpy(self.stores[split].logps(batch["sample_ids"]))
        return found.to(batch["targets"].device, non_blocking=True)


def precompute(trainer: Any, model: PreferenceLM, split: str, store: Any) -> None:
    """Computes the chunks that a store lacks, shared out over the ranks.

    Raises:
        UserError: the ranks do not see each other's files.
    """
    missing = trainer.strategy.broadcast(store.missing())
    training = model.training
    model.eval()
    try:
        batches = _computed(trainer, model, split, store, missing)
        if trainer.is_global_zero and missing:
            total = sum(len(store.examples(chunk)) for chunk in missing) // trainer.world_size
            what = f"reference log-probabilities, {split}"
            batches = track(batches, what, total=total, unit="pairs", size=len)
        for _ in batches:
            pass
    finally:
        model.train(training)
    trainer.strategy.barrier("reference computed")
    if lacking := store.missing():
        raise UserError(
            f"the log-probabilities of {len(lacking)} chunks are not in {store.directory}: the ranks write to "
            "different disks; set OUMI_PL_CACHE to a directory that they share"
        )


def _computed(trainer: Any, model: PreferenceLM, split: str, store: Any, missing: list[int]) -> Iterator[list[int]]:
    """Computes this rank's share of the missing chunks, and yields the examples of each batch that is done.

    Every rank runs the model equally often: sharded weights are gathered by all of them together.
    """
    ranks, rank = trainer.world_size, trainer.global_rank
    for first in range(0, len(missing), ranks):
        chunks = missing[first : first + ranks]
        plans = [_batches(store.examples(chunk), trainer.datamodule, split) for chunk in chunks]
        mine = plans[rank] if rank < len(plans) else []
        found: dict[int, np.ndarray] = {}
        for step in range(max(map(len, plans))):
            ids = mine[step] if step < len(mine) else []
            found |= _logps(trainer, model, split, ids)
            yield ids
        if mine:
            store.write(chunks[rank], np.concatenate([found[i] for i in store.examples(chunks[rank])]))


def _batches(examples: range, data: Any, split: str) -> list[list[int]]:
    """Examples in batches of at most as many tokens as a micro-batch of validation may have, longest first."""
    lengths = data.lengths(split)[examples.start : examples.stop]
    budget = data.eval_batch_size * (data.capacity if data.packing else int(lengths.max()))
    batches: list[list[int]] = []
    tokens = budget
    for i in np.argsort(-lengths, kind="stable").tolist():
        tokens += int(lengths[i])
        if tokens > budget:
            batches.append([])
            tokens = int(lengths[i])
        batches[-1].append(examples.start + i)
    return batches


@torch.no_grad()
def _logps(trainer: Any, model: PreferenceLM, split: str, ids: list[int]) -> dict[int, np.ndarray]:
    """Log-probabilities of each example's targets."""
    data = trainer.datamodule
    examples = data.examples(split)
    batch = trainer.strategy.batch_to_device(data.collate([([i], [examples[i]]) for i in ids]))
    with trainer.precision_plugin.forward_context():
        logps = model(batch).logps
    counts = [examples[i].target_tokens for i in ids]
    pieces = cast("Any", logps.float().cpu()).split(counts) if ids else []
    return {i: piece.numpy() for i, piece in zip(ids, pieces, strict=True)}
