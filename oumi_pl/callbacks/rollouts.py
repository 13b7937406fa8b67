"""Records online training: writes every completion to `rollouts.jsonl`, logs the time of each phase, and warns."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.advice import warn
from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.data.rollout_loader import TrainedGroups
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.errors import UserError
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule

FILE = "rollouts.jsonl"


class Rollouts(L.Callback):
    """Writes every training completion to `rollouts.jsonl`, and logs the seconds of generating, rewarding and training.

    Each line is one completion: `update`, `origin` (file and line of the prompt), `prompt`, `completion`, `rewards` by
    name, `penalty` (the KL penalty, if it is in the reward), `total`, `advantage`, `length` in tokens, and `finished`
    (false if it was truncated); with an environment also `turns`, each with `by` (`policy` or `environment`) and
    `text`. A completion that several updates train on is written once, at the first. Does nothing if the data module
    doesn't sample.

    Args:
        max_megabytes: Largest size of the file; the last line then names the update at which it stopped. 0 writes no
            file.
    """

    def __init__(self, max_megabytes: float = 50.0) -> None:
        if not max_megabytes >= 0:
            raise UserError(f"rollouts.max_megabytes is {max_megabytes}, but has to be 0 or more")
        self.max_megabytes = max_megabytes
        self._path: Path | None = None
        self._bytes = 0
        self._training = self._since = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Opens the run's file, and removes the lines of updates that a resumed run will repeat."""
        self._training = 0.0
        self._path = None
        directory = run_directory(trainer)
        if not trainer.datamodule.samples or directory is None or not self.max_megabytes:
            return
        path = directory / FILE
        self._bytes, is_full = cut_after(path, trainer.global_step)
        self._path = None if is_full else path

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Starts timing a micro-batch; its completions are sampled by now."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """At the end of an update, logs its times and writes its completions."""
        data = trainer.datamodule
        if not data.samples:
            return
        self._training += time.perf_counter() - self._since
        if trainer.fit_loop._should_accumulate():
            return
        seconds = {name: data.seconds[name] for name in ("generating", "rewarding")} | {"training": self._training}
        data.seconds.clear()
        self._training = 0.0
        pl_module.log_dict({f"train/seconds/{name}": value for name, value in seconds.items()}, batch_size=1)
        if (trained := data.train_loader.trained) is not None and trained.are_new:
            self._write(data, trained, trainer.global_step)

    @rank_zero_only
    def _write(self, data: RolloutData, trained: TrainedGroups, update: int) -> None:
        if self._path is None:
            return
        lines = "".join(map(_line, described(data, trained, update))).encode()
        path = self._path
        if self._bytes + len(lines) > self.max_megabytes * 1e6:
            reason = f"rollouts.max_megabytes, which is {self.max_megabytes:g}, was reached"
            lines, self._path = _line({"update": update, "stopped": reason}).encode(), None
            echo(f"{FILE} ends before update {update:,}: {reason}", file=sys.stderr)
        with path.open("ab") as out:
            out.write(lines)
        self._bytes += len(lines)


def described(data: RolloutData, trained: TrainedGroups, update: int) -> Iterator[dict[str, Any]]:
    """Yields the line of each completion of an update, as a dict."""
    for group, advantages in zip(trained.groups, trained.advantages.tolist(), strict=True):
        prompt = data.all_prompts("train")[group.prompt]
        shared = {"update": update, "origin": prompt.origin, "prompt": str(data.tokenizer.decode(prompt.ids))}
        totals = data.totals([group])[0].tolist()
        penalties = (group.penalties + data.overlong(group)).tolist()
        columns = (group.completions, group.components.tolist(), penalties, totals, advantages)
        for completion, components, penalty, total, advantage in zip(*columns, strict=True):
            yield (
                shared
                | {
                    "completion": data.text_of(completion),
                    "rewards": dict(zip(data.rewards.names, components, strict=True)),
                    "penalty": penalty,
                    "total": total,
                    "advantage": advantage,
                    "length": len(completion.ids),
                    "finished": completion.is_finished,
                }
                | ({} if data.environment is None else {"turns": data.turns_of(completion)})
            )


def cut_after(path: Path, update: int) -> tuple[int, bool]:
    """Truncates a file after the lines of `update`; also removes a line that a kill left incomplete.

    Returns:
        Size of the file in bytes, and whether it had reached its largest size.
    """
    if not path.exists():
        return 0, False
    kept, is_full = 0, False
    with path.open("r+b") as file:
        for line in file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                break
            if not isinstance(entry, dict) or entry.get("update", math.inf) > update:
                break
            kept += len(line)
            is_full = "stopped" in entry
        file.truncate(kept)
    return kept, is_full


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


# ---- warnings

WINDOW = 20
"""Updates over which shares and means are averaged; fewer would be too noisy."""
SAME_SHARE = 0.8
"""Warns from this share of groups without variance on: most completions then have no effect."""
TRUNCATED_SHARE = 0.3
"""Warns above this share of truncated completions: rewards then depend more on the cut than on the answer."""
COLLAPSED = 0.1
"""Warns below this share of the initial entropy: the policy no longer explores."""
SOLVED = 0.9
"""No entropy warning from this share of `data.success` on: the policy has learned the task."""
STANDARD_ERRORS = 3.0
"""Warns if the validation reward is below the best by more than this many standard errors."""


class RolloutWarnings(L.Callback):
    """Warns about rollouts that the policy can't learn from. Each warning appears once per run, resumes included.

    Does nothing if the data module doesn't sample.
    """

    def __init__(self) -> None:
        self._updates: list[dict[str, float]] = []
        """Sums of the last `WINDOW` updates."""
        self._first_entropy: float | None = None
        """Mean over the first `WINDOW` updates, in nats per token."""
        self._validations: list[tuple[float, float]] = []
        """For each validation: mean training reward since the previous one, and validation reward."""
        self._since_validation = [0.0, 0.0]
        """Sum and number of the training rewards since the last validation."""
        self._warned: list[str] = []
        """Names of the checks that have warned."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics so far, and which checks have warned."""
        return {
            "updates": [dict(sums) for sums in self._updates],
            "first_entropy": self._first_entropy,
            "validations": list(self._validations),
            "since_validation": list(self._since_validation),
            "warned": list(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._updates, self._first_entropy = list(state_dict["updates"]), state_dict["first_entropy"]
        self._validations = [(trained, validated) for trained, validated in state_dict["validations"]]
        self._since_validation, self._warned = list(state_dict["since_validation"]), list(state_dict["warned"])

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Checks the last `WINDOW` updates."""
        data, sums = trainer.datamodule, pl_module.last_update
        if not data.samples or trainer.fit_loop._should_accumulate() or "reward" not in sums:
            return
        self._since_validation[0] += sums["reward"]
        self._since_validation[1] += sums["rows"]
        self._updates = [*self._updates[1 - WINDOW :], dict(sums)]
        if len(self._updates) < WINDOW:
            return
        if self._first_entropy is None:
            self._first_entropy = self._mean("entropy", "targets")
        for check in (self._same_rewards, self._truncated, self._collapsed, self._constant_reward):
            if check.__name__ not in self._warned and (message := check(pl_module, data)):
                self._warned.append(check.__name__)
                warn(trainer, message)

    def on_validation_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Compares the validation reward with the best one so far."""
        data = trainer.datamodule
        if not data.samples or trainer.state.fn != "fit" or trainer.sanity_checking or not self._since_validation[1]:
            return
        metrics = trainer.callback_metrics
        if "val/reward" not in metrics or self._overfitting.__name__ in self._warned:
            return
        rewards, count = self._since_validation
        self._since_validation = [0.0, 0.0]
        self._validations.append((rewards / count, float(metrics["val/reward"])))
        error = float(metrics["val/reward_std"]) / math.sqrt(max(1, len(data.all_prompts("validation"))))
        if message := self._overfitting(error):
            self._warned.append(self._overfitting.__name__)
            warn(trainer, message)

    def _mean(self, name: str, per: str = "rows") -> float:
        """The mean of a metric over the last updates, per row or per token (`targets`)."""
        return sum(sums.get(name, 0.0) for sums in self._updates) / max(1.0, sum(sums[per] for sums in self._updates))

    def _same_rewards(self, module: Any, data: RolloutData) -> str | None:
        share, reward = self._mean("groups_without_variance"), self._mean("reward")
        # a baseline over the whole batch gives groups without variance an advantage, too
        if share < SAME_SHARE or np.any(module.advantages(np.array([[0.0, 0.0], [1.0, 1.0]]))):
            return None
        return (
            f"in {WINDOW} updates, all completions of a prompt got the same reward in {share:.0%} of the groups (mean "
            f"reward {reward:.3g}): their advantages are 0, so nothing is learned from them. If none is right, start "
            "from a model that solves some of the prompts, choose easier ones, or reward parts of an answer; if all "
            "are, choose harder prompts. More completions per prompt (data.completions, "
            f"{data.completions} now) or a higher data.sampling.temperature ({data.sampling.temperature:g}) help a "
            "bit; data.extra_rounds replaces such groups by those of other prompts"
        )

    def _truncated(self, module: Any, data: RolloutData) -> str | None:
        share, tokens = self._mean("truncated"), data.sampling.max_new_tokens
        if share <= TRUNCATED_SHARE:
            return None
        masked = "; they carry no loss (data.mask_truncated)" if data.mask_truncated else ""
        return (
            f"in {WINDOW} updates, {share:.0%} of the completions were cut at {tokens} tokens{masked}: their rewards "
            "are those of unfinished texts. Raise data.sampling.max_new_tokens; if the model rambles or does not end "
            "its turns, penalise length (oumi_pl.rollouts.rewards.LengthPenalty)"
        )

    def _collapsed(self, module: Any, data: RolloutData) -> str | None:
        entropy, first = self._mean("entropy", "targets"), self._first_entropy or 0.0
        if entropy >= COLLAPSED * first or self._mean("reward") >= SOLVED * data.success:
            return None
        return (
            f"the entropy of the policy fell from {first:.3g} to {entropy:.3g} nats per token, at a mean reward of "
            f"{self._mean('reward'):.3g}: the completions of a prompt are nearly the same, so the policy can't find "
            "better ones. Lower model.optimizer.lr, stay near the initial model (model.kl), clip unlikely tokens later "
            "(loss: DAPOLoss), or raise data.sampling.temperature"
        )

    def _constant_reward(self, module: Any, data: RolloutData) -> str | None:
        names = data.rewards.names if len(data.rewards.names) > 1 else []
        for name in names:
            mean, square = self._mean(f"rewards/{name}"), self._mean(f"squares/rewards/{name}")
            if square - mean * mean <= 1e-9 * square:
                return (
                    f"the reward {name} was {mean:.4g} for all completions of {WINDOW} updates, so nothing is "
                    "learned from it. Read some completions in rollouts.jsonl: does the reward check for something "
                    "that never occurs, or always does?"
                )
        return None

    def _overfitting(self, error: float) -> str | None:
        trained, validated = self._validations[-1]
        best_trained, best = max(self._validations, key=lambda rewards: rewards[1])
        if trained <= best_trained or best - validated <= STANDARD_ERRORS * error:
            return None
        return (
            f"the training reward rises ({best_trained:.3g} to {trained:.3g}), while that of held-out prompts falls "
            f"({best:.3g} to {validated:.3g}): the policy memorises the training prompts, or exploits the reward. Keep "
            "the best checkpoint (checkpoint.monitor: val/reward, checkpoint.mode: max), add prompts, or stay near the "
            "initial model (model.kl)"
        )
