"""Reward functions that the user registers, as rewards of a recipe: `registered_rewards.NAME`.

They are called as TRL calls them, with all completions at once: `function(completions=..., prompts=..., COLUMN=...)`
gives a list of numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from oumi_pl.core.registry import REGISTRY, RegistryType
from oumi_pl.errors import UserError, nearest
from oumi_pl.rollouts.rewards import Batched, batched


def __getattr__(name: str) -> Batched:
    if name.startswith("__"):
        raise AttributeError(name)
    function = REGISTRY.get(name, RegistryType.REWARD_FUNCTION)
    if function is None:
        raise AttributeError(
            f"no reward function {name!r}{nearest(name, REGISTRY.get_all(RegistryType.REWARD_FUNCTION))}"
        )

    def reward(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        said = [_turns(text) if _is_chat(row) else text for text, row in zip(completions, rows, strict=True)]
        names = dict.fromkeys(key for row in rows for key in row)
        columns = {key: [row.get(key) for row in rows] for key in names if key not in ("prompt", "completions")}
        values = function(completions=said, prompts=[row.get("prompt") for row in rows], **columns)
        if len(values) != len(completions):
            raise UserError(f"reward {name!r}: {len(values)} values for {len(completions)} completions")
        return [float(value) for value in values]

    reward.__name__ = name
    return batched(reward)


def _is_chat(row: Mapping[str, Any]) -> bool:
    return not isinstance(row.get("prompt"), str)


def _turns(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
