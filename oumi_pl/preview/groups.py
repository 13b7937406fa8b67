"""Shows what online training reads and samples: prompts, and groups of completions with their rewards."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from oumi_pl.data.distill import DistillData
from oumi_pl.data.rollout_loader import Group
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import Decoder
from oumi_pl.preview.shown import Section, Shown

LISTED = 12
"""Most columns of a row that are listed."""


def reads_prompts_alone(data: Any) -> TypeGuard[RolloutData]:
    """Whether the rows of the data are prompts, whose answers aren't trained on."""
    return isinstance(data, RolloutData) and not isinstance(data, DistillData)


def prompts(
    data: RolloutData, split: str, decoder: Decoder, count: int, *, numbers: Sequence[int] | None, longest: bool
) -> list[Shown]:
    """The first or the longest `count` prompts of a split, or those with these numbers, counted from 1.

    Raises:
        UserError: a number is out of range.
    """
    known = data.all_prompts(split)
    for number in numbers or ():
        if not 1 <= number <= len(known):
            raise UserError(f"--row {number}: the {split} split has prompts 1 to {len(known):,}")
    if numbers is not None:
        chosen = [number - 1 for number in dict.fromkeys(numbers)]
    elif longest:
        chosen = np.argsort(-data.prompt_lengths(split), kind="stable")[:count].tolist()
    else:
        chosen = list(range(min(count, len(known))))
    shown = []
    for i in chosen:
        prompt = known[i]
        columns = ", ".join(list(prompt.row)[:LISTED]) + (", ..." if len(prompt.row) > LISTED else "")
        facts = [prompt.origin, f"{len(prompt.ids):,} tokens", f"rewards read its columns {columns}"]
        shown.append(Shown(f"{split} prompt {i + 1:,}", facts, [_section(decoder, "", prompt.ids)]))
    return shown


def groups(data: RolloutData, decoder: Decoder, sampled: Sequence[Group], advantages: np.ndarray) -> list[Shown]:
    """Groups of training completions, with the rewards, the advantage and the tokens of each.

    Args:
        data: The data that sampled them.
        decoder: Of its tokenizer.
        sampled: The groups.
        advantages: `[groups, completions]`.
    """
    shown = []
    for number, (group, of_group) in enumerate(zip(sampled, advantages.tolist(), strict=True), 1):
        prompt = data.all_prompts("train")[group.prompt]
        totals, overlong = data.totals([group])[0], data.overlong(group)
        facts = [prompt.origin]
        if data.rewards.names:
            mean = f"rewards {totals.min():.4g} to {totals.max():.4g}, mean {totals.mean():.4g}"
            facts += [mean if np.ptp(totals) else f"all rewards are {totals[0]:.4g}, so no advantage differs"]
        sections = [_section(decoder, f"prompt ({len(prompt.ids):,} tokens)", prompt.ids)]
        for i, completion in enumerate(group.completions):
            components = zip(data.rewards.names, group.components[i].tolist(), strict=True)
            parts = [f"{name} {value:.4g}" for name, value in components]
            parts += [f"KL penalty {group.penalties[i]:.4g}"] if group.penalties[i] else []
            parts += [f"penalty for its length {overlong[i]:.4g}"] if overlong[i] else []
            if data.rewards.names:
                is_sum = len(parts) > 1 or parts[0].split()[-1] != f"{totals[i]:.4g}"
                parts += [f"total {totals[i]:.4g}"] if is_sum else []
                parts += [f"advantage {of_group[i]:+.4g}"]
            parts += [f"{len(completion.ids):,} tokens"]
            replied = int((~completion.is_sampled).sum())
            parts += [f"{replied:,} of them by the environment"] if replied else []
            parts += [] if completion.is_finished else [f"cut at {data.sampling.max_new_tokens:,}"]
            carry_loss = completion.is_sampled & (completion.is_finished or not data.mask_truncated)
            title = f"completion {i + 1}: {', '.join(parts)}"
            sections.append(_section(decoder, title, completion.ids.tolist(), carry_loss, len(prompt.ids)))
        shown.append(Shown(f"group {number:,}", facts, sections))
    return shown


def notes(data: RolloutData, sampled: Sequence[Group]) -> list[str]:
    """What the groups have in common."""
    completions = [completion for group in sampled for completion in group.completions]
    cut = sum(not completion.is_finished for completion in completions)
    lengths = [len(completion.ids) for completion in completions]
    facts = []
    if data.rewards.names:
        totals = data.totals(sampled)
        same = int((totals == totals[:, :1]).all(1).sum())
        facts = [f"mean reward {totals.mean():.4g}", f"{same} without variance, from which nothing is learned"]
    facts += [
        f"{cut} of {len(completions):,} completions cut at {data.sampling.max_new_tokens:,} tokens",
        f"{np.mean(lengths):.1f} tokens on average",
    ]
    same_as = "the first update of a run with the same seed samples the same completions"
    if isinstance(data, DistillData):
        which = "trains on such completions" if data.is_sampled(0, 0) else "trains on the answers, and samples none"
        same_as = f"the first update of a run with the same seed {which}; of all updates, {data.lmbda:.0%} sample"
    if data.rewards.names:
        same_as += "; advantages that compare with other prompts may differ"
    return [f"{len(sampled):,} groups of {data.completions}: {'; '.join(facts)}", same_as]


def _section(
    decoder: Decoder, title: str, ids: Sequence[int], carry_loss: np.ndarray | None = None, start: int = 0
) -> Section:
    targets = np.zeros(len(ids), dtype=bool) if carry_loss is None else carry_loss
    return Section(title, [*decoder.pieces(ids, targets, range(start, start + len(ids)))])
