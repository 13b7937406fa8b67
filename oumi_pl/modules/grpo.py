"""Online training (GRPO and relatives): policy gradients on completions that the policy samples."""

from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW

from oumi_pl.errors import UserError, nearest
from oumi_pl.losses.policy import (
    Completions,
    Estimator,
    GRPOLoss,
    PolicyLoss,
    kl_estimates,
    truncated_importance,
)
from oumi_pl.models.lm import States
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.reference import Reference
from oumi_pl.modules.update import Split
from oumi_pl.rollouts.advantages import Advantage, GroupMean
from oumi_pl.rollouts.evaluation import pass_at_k
from oumi_pl.types import Batch, Sums

SQUARES = "squares/"
"""Prefix of the names of sums of squares, from which standard deviations are computed."""
OF_SOURCE = "sources/"
"""Prefix of the names of sums over the completions of one source, if there are several."""
SAMPLED = 1e-3
"""Nats per token by which sampled and recomputed log-probabilities may differ before a warning."""


class GRPO(LanguageModule):
    """Trains on sampled completions with any `PolicyLoss`, normalised over the whole update. Dropout is off.

    Args:
        model: Hub id or directory of a pretrained model, usually one that was fine-tuned (SFT); an adapter's too.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        loss: The objective; `GRPOLoss` when left out. See `oumi_pl.losses.policy`.
        advantage: Maps rewards to advantages; `GroupMean` when left out. See `oumi_pl.rollouts.advantages`.
        kl: Coefficient of the penalty for divergence from the reference; with 0 there is no reference.
        kl_estimator: `k1`, `k2` or `k3`; see `oumi_pl.losses.policy.kl_estimates` for what their gradients mean.
        kl_corrected: Weigh the penalty of each token in the loss by its importance ratio. The gradient of `k1` and `k3`
            is then that of `KL(policy || reference)`, also after the policy has moved (TRL's `use_bias_correction_kl`).
        kl_in: Where the penalty is applied: in the `loss` of each token, or in the `reward` of a completion.
        reference: What the policy is compared with. `initial`: with LoRA the base with its adapters disabled, else a
            frozen copy of the initial model in memory.
        sync_every: Optimizer steps between updates of the reference towards the policy; needs a copy in memory.
        mixup: The policy's share in such an update, from 0 to 1: reference = mixup * policy + (1 - mixup) * reference.
        share_prompt: Compute the prompt of a group once for all completions. `auto`: if the model can do so exactly.
        max_importance_ratio: Completions of an engine whose log-probabilities are not exactly the policy's (vLLM) are
            weighted, token by token, by the ratio of the policy's probability to the engine's, at most this much: see
            `oumi_pl.losses.policy.truncated_importance`. None leaves them as they are. Does nothing with `Generate`.
        kwargs: See `LanguageModule`.
    """

    branching = True
    group_name = "group"
    validation_metrics: tuple[str, ...] = ("val/loss", "val/reward", "val/reward_std", "val/length", "val/truncated")
    details: ClassVar[tuple[str, ...]] = ("reward_std",)

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        loss: PolicyLoss | None = None,
        advantage: Advantage | None = None,
        kl: float = 0.0,
        kl_estimator: Estimator = "k3",
        kl_corrected: bool = False,
        kl_in: Literal["loss", "reward"] = "loss",
        reference: Literal["initial", "online"] = "initial",
        sync_every: int | None = None,
        mixup: float = 0.6,
        share_prompt: Literal["auto"] | bool = "auto",
        max_importance_ratio: float | None = 2.0,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, optimizer=optimizer, **kwargs)
        if not kl >= 0:
            raise UserError(f"model.kl is {kl}, but has to be 0 or more")
        if kl_estimator not in get_args(Estimator):
            raise UserError(f"model.kl_estimator: unknown {kl_estimator!r}{nearest(kl_estimator, get_args(Estimator))}")
        if kl and kl_in == "loss" and kl_estimator == "k1" and not kl_corrected:
            raise UserError(
                "model.kl_estimator: the gradient of k1 in the loss is 0 on average, so it would penalise nothing; use "
                "k2 or k3, kl_corrected: true or kl_in: reward"
            )
        if kl and kl_corrected and (kl_in == "reward" or kl_estimator == "k2"):
            raise UserError("model.kl_corrected: is for k1 and k3 in the loss, the only ones that it corrects")
        if max_importance_ratio is not None and not max_importance_ratio > 0:
            raise UserError(f"model.max_importance_ratio is {max_importance_ratio}, but has to be above 0, or null")
        self.max_importance_ratio = max_importance_ratio
        self.loss = loss or GRPOLoss()
        self.unit = self.loss.unit  # type: ignore[misc]
        self.advantage = advantage or GroupMean()
        self.kl, self.kl_estimator, self.kl_in = kl, kl_estimator, kl_in
        self.kl_corrected = kl_corrected
        self.share_prompt = share_prompt
        if kl:
            # completions are sampled during training, so the reference can't be computed before it
            name = "online" if reference == "initial" and (self.lora is None or sync_every) else reference
            share = share_prompt is not False
            self.reference = Reference(self, name, None, sync_every, mixup, share_prompt=share, user="the KL penalty")
        self.__warned = False

    # ---- what rollouts need

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Maps the rewards of an update, `[prompts, completions]`, to advantages of the same shape."""
        return self.advantage(rewards)

    @torch.no_grad()
    def recomputed(self, batch: Batch) -> np.ndarray | None:
        """Log-probabilities of sampled tokens under the policy, `[targets]`, for completions of an engine that rounds.

        None if the first update computes them anyway, and no other update follows.
        """
        data: Any = self.data
        is_penalised = self.kl > 0 and self.kl_in == "reward"
        if data.steps_per_rollout * data.iterations == 1 and not is_penalised:
            return None
        batch = self.trainer.strategy.batch_to_device(batch)
        return self.causal_lm(batch, lambda states: states.logps(data.sampling.temperature)).float().cpu().numpy()

    @torch.no_grad()
    def penalties(self, batch: Batch) -> np.ndarray:
        """The KL penalty to subtract from each reward, `[completions]`; zeros if the penalty is in the loss."""
        count = len(batch["segments"])
        if not self.kl or self.kl_in != "reward" or self.reference is None:
            return np.zeros(count)
        batch = self.trainer.strategy.batch_to_device(batch)
        rollouts: Any = batch
        sampled = rollouts.get("policy_logps", rollouts["sampled_logps"])
        estimates = kl_estimates(sampled, self.ref_logps(batch), self.kl_estimator)
        sums = torch.zeros(count, device=estimates.device).index_add(0, batch["target_segments"], estimates)
        return self.kl * sums.double().cpu().numpy()

    def on_model_built(self) -> None:
        """Refuses data whose sampling the objective can't correct for; see `LanguageModule`.

        Raises:
            UserError: says which setting.
        """
        super().on_model_built()
        data: Any = self.data
        if data is None:
            return
        if not data.samples:
            raise UserError(
                f"data: GRPO trains on completions that the policy samples; RolloutData does so, {type(data).__name__} "
                "reads answers"
            )
        if not data.rewards.names:
            raise UserError("data.reward: missing; name a function that scores completions, as `exact_match`")
        if data.sampling.temperature == 0:
            raise UserError("data.sampling.temperature: greedy completions of a prompt are all the same; raise it")
        if data.sampling.is_truncated:
            raise UserError(
                "data.sampling: with top_p, top_k or min_p, log-probabilities are not those of the tokens' "
                "distribution, so that gradients and ratios would be wrong; sample from all tokens"
            )
        if data.steps_per_rollout * data.iterations > 1 and not self.loss.has_ratio:
            raise UserError(
                f"data: {type(self.loss).__name__} does not correct for a policy that has moved since it sampled; set "
                "steps_per_rollout and iterations to 1, or take a loss with a ratio"
            )
        own = {name.removeprefix("val/") for name in self.validation_metrics} | {f"pass@{k}" for k in data.pass_at}
        if taken := own.intersection(data.metric_names):
            raise UserError(f"data.metrics: val/{min(taken)} is logged already; give the function another name")

    # ---- the loss

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """Sums over completions: loss and metrics in training, rewards alone in evaluation."""
        rollouts: Any = batch
        if split != "train":
            return self.__reward_sums(rollouts, split) | self.__solved(rollouts)
        temperature = self.data.sampling.temperature  # type: ignore[union-attr]
        targets = batch["targets"]

        def compute(states: States) -> tuple[Tensor, Tensor | None]:
            return states.logps(temperature), states.router_loss

        logps, router_loss = self.causal_lm(batch, compute)
        completions = self.completions(rollouts, logps)
        # a rank that ran out of prompts has no completions, but all parameters in its graph
        loss = self.loss(completions).sum() if completions.count else logps.sum()
        sums = self.rollout_sums(rollouts, completions)
        if self.reference is not None and self.kl_in == "loss":
            estimates = self.kl_terms(completions, self.ref_logps(batch))
            loss = loss + self.kl * (self.loss.weights(completions) * estimates).sum()
            sums["kl"] = estimates.detach().double().sum()
        elif self.kl:  # computed when the completions were sampled
            sums["kl"] = rollouts["penalties"].double().sum() / self.kl
        sums["loss"] = loss
        units = completions.count if self.unit == "rows" else len(targets)
        return sums if router_loss is None else sums | {"objective": loss + router_loss * units}

    def completions(self, rollouts: Any, logps: Tensor) -> Completions:
        """The completions of a batch, with their log-probabilities `[targets]` under the policy."""
        data: Any = self.data
        old = self.__old_logps(rollouts, logps)
        completions = rollouts["target_segments"], rollouts["advantages"], data.sampling.max_new_tokens
        if data.engine.is_exact or self.max_importance_ratio is None:
            return Completions(logps, old, *completions)
        importance = truncated_importance(old, rollouts["sampled_logps"], self.max_importance_ratio)
        return Completions(logps, old, *completions, importance)

    @staticmethod
    def __old_logps(rollouts: Any, logps: Tensor) -> Tensor:
        """Log-probabilities under the policy that sampled, `[targets]`; `logps` are those of the policy now."""
        if rollouts["on_policy"]:
            return logps.detach()
        return rollouts.get("policy_logps", rollouts["sampled_logps"])

    def kl_terms(self, completions: Completions, ref_logps: Tensor) -> Tensor:
        """The KL penalty of each token in the loss, `[targets]`, before it is multiplied by `kl`."""
        estimates = kl_estimates(completions.logps, ref_logps, self.kl_estimator)
        return completions.weighted(estimates * completions.log_ratios.exp() if self.kl_corrected else estimates)

    def rollout_sums(self, rollouts: Any, completions: Completions) -> Sums:
        """Sums of the metrics of rewards and ratios; their `loss` is minus the reward, to be replaced by the caller."""
        return self.__reward_sums(rollouts, "train") | self.__token_sums(completions, rollouts)

    def count(self, batch: Batch) -> dict[str, int]:
        """Counts completions as `rows`; see `LanguageModule`."""
        rollouts: Any = batch
        return super().count(batch) | {"rows": len(rollouts["rewards"])}

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Means over completions; those of entropy, KL, clipping, importance and `sampling_difference` over tokens.

        `NAME_std` is a standard deviation over completions. The loss of evaluation is minus the reward. Of several
        sources, each has its reward, `reward/SOURCE`, if the update had one of its prompts.
        """
        per_token = {"entropy", "kl", "clipped/low", "clipped/high", "sampling_difference"}
        per_token |= {"importance/mean", "importance/truncated"}
        rows, targets = sums["rows"].clamp(min=1), sums["targets"].clamp(min=1)
        metrics = {
            name: value / (targets if name in per_token else rows)
            for name, value in sums.items()
            if name not in {"targets", "rows", "tokens", "positions", "weight", "loss"}
            and not name.startswith((SQUARES, OF_SOURCE))
        }
        metrics["loss"] = sums["loss"] / (sums[self.unit].clamp(min=1) if split == "train" else rows)
        for name in filter(None, map(_squared, sums)):
            metrics[f"{name}_std"] = (sums[SQUARES + name] / rows - metrics[name].square()).clamp(min=0).sqrt()
        if f"{OF_SOURCE}0/reward" in sums:
            for i, name in enumerate(self.data.source_names(split)):  # type: ignore[union-attr]
                if (completions := sums[f"{OF_SOURCE}{i}/completions"]) > 0:
                    metrics[f"reward/{name}"] = sums[f"{OF_SOURCE}{i}/reward"] / completions
        return metrics

    def ref_logps(self, batch: Batch) -> Tensor:
        """Log-probabilities of the targets under the reference, at the sampling temperature, `[targets]`."""
        temperature = self.data.sampling.temperature  # type: ignore[union-attr]
        return self.reference.logps(batch, "train", lambda states: states.logps(temperature))  # type: ignore[union-attr]

    @torch.no_grad()
    def __reward_sums(self, rollouts: Any, split: Split) -> Sums:
        rewards, completions = rollouts["rewards"].double(), rollouts["completions"]
        names = self.data.rewards.names  # type: ignore[union-attr]
        sums: Sums = {"loss": -rewards.sum()}
        values = {"reward": rewards}
        if len(names) > 1:
            columns = rollouts["components"].double().T
            values |= {f"rewards/{name}": column for name, column in zip(names, columns, strict=True)}
        for name, value in values.items():
            sums[name] = value.sum()
            if split == "train" or name == "reward":
                sums[SQUARES + name] = value.square().sum()
        sums["length"] = rollouts["lengths"].double().sum()
        sums["truncated"] = (1 - rollouts["finished"]).double().sum()
        sums |= {name: rollouts[name].double().sum() for name in ("turns", "extra_groups") if name in rollouts}
        if completions > 1:
            groups = rewards.reshape(-1, completions)
            same = (groups == groups[:, :1]).all(1)
            sums["groups_without_variance"] = same.double().sum() * completions
        if "sources" in rollouts:
            none = rewards.new_zeros(len(self.data.source_names(split)))  # type: ignore[union-attr]
            for name, value in (("reward", rewards), ("completions", torch.ones_like(rewards))):
                of_sources = none.index_add(0, rollouts["sources"], value)  # a mask would wait for the GPU
                sums |= {f"{OF_SOURCE}{i}/{name}": of_source for i, of_source in enumerate(of_sources)}
        return sums

    @torch.no_grad()
    def __solved(self, rollouts: Any) -> Sums:
        """Sums over completions of pass@k estimates (`data.success` counts as solved) and of the user's metrics."""
        data: Any = self.data
        n = data.eval_completions
        solved = (rollouts["rewards"] >= data.success).reshape(-1, n).cpu().numpy()
        metrics = rollouts["metrics"].double().sum(0)
        sums = {f"pass@{k}": metrics.new_tensor(n * pass_at_k(solved, k).sum()) for k in data.pass_at}
        return sums | dict(zip(data.metric_names, metrics, strict=True))

    @torch.no_grad()
    def __token_sums(self, completions: Completions, rollouts: Any) -> Sums:
        low, high = self.loss.clipped(completions)
        # policy_logps: the policy has moved since, so the difference of the engine alone is that of the first update
        now = rollouts.get("policy_logps", completions.logps.detach())
        difference = (now - rollouts["sampled_logps"]).abs().double()
        if rollouts["on_policy"] and len(difference) and not self.__warned and float(difference.mean()) > SAMPLED:
            self.__warned = True
            rank_zero_warn(
                f"sampled and recomputed log-probabilities differ by {float(difference.mean()):.2g} nats per token: "
                "sampling and training compute in different precision"
            )
        importance: Sums = {}
        if completions.importance is not None and self.max_importance_ratio is not None:
            is_truncated = completions.importance >= self.max_importance_ratio
            importance["importance/mean"] = completions.importance.double().sum()
            importance["importance/truncated"] = is_truncated.double().sum()
        return importance | {
            "entropy": rollouts["entropies"].double().sum(),
            "clipped/low": low.double().sum(),
            "clipped/high": high.double().sum(),
            "sampling_difference": difference.sum(),
        }


def _squared(name: str) -> str:
    """The name without the prefix of sums of squares; empty for other sums."""
    return name.removeprefix(SQUARES) if name.startswith(SQUARES) else ""
