"""Policy-gradient losses for online training (GRPO and relatives), each with its paper's denominator.

A loss maps the completions of a batch to values `[completions]`. An update minimises their sum divided by the number of
completions (`unit = "rows"`) or tokens (`unit = "targets"`) of the whole update, so it does not depend on how
completions are split into micro-batches and ranks.

`rho = pi / pi_old` is the importance ratio of a token, and `A` the advantage of its completion. In the first update
after sampling, the two policies are the same: rho is exactly 1, and every loss here has the gradient of REINFORCE, up
to its token weights.

TRL 1.16 computes the same for `grpo`, `dapo`, `dr_grpo` and, with `importance_sampling_level: sequence` and
`loss_type: grpo`, GSPO (`tests/parity/test_trl_grpo.py`). Differences:

- `bnpo`: TRL divides each micro-batch by its own tokens, so both agree only with one micro-batch per update.
- `cispo`: TRL's `epsilon_high` bounds the ratio itself; its 1.28 is 0.28 here.
- `dapo`: TRL clips symmetrically (0.2) unless `epsilon_high` is set.
- KL: TRL's default is k3 with `kl_corrected: true`; `use_bias_correction_kl: false` is `kl_corrected: false`.
- Old log-probabilities: TRL recomputes them with the policy that sampled; here they are recorded while sampling, and
  recomputed only if an engine's log-probabilities are not exactly the policy's.
- Advantages: the same formula (standard deviation with `n - 1`, plus 1e-4), in float64 here.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from oumi_pl.errors import UserError


@dataclass(frozen=True)
class Completions:
    """The sampled completions of a batch: the input of policy losses.

    logps: `[targets]`, of each sampled token under the policy, float32, differentiable.
    old_logps: `[targets]`, under the policy that sampled; `logps.detach()` if there was no update since.
    owners: `[targets]`, ascending: the completion of each token.
    advantages: `[completions]`.
    max_tokens: the most tokens that a completion could have had.
    importance: `[targets]`, the weight of each token if another distribution than the policy sampled, of
        `truncated_importance`; None if the policy itself did.
    """

    logps: Tensor
    old_logps: Tensor
    owners: Tensor
    advantages: Tensor
    max_tokens: int
    importance: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of completions."""
        return len(self.advantages)

    def sums(self, values: Tensor) -> Tensor:
        """Sums of `values` `[targets]` over the tokens of each completion, `[completions]`."""
        return values.new_zeros(self.count).index_add(0, self.owners, values)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each completion, `[completions]`, at least 1."""
        return self.sums(torch.ones_like(self.logps)).clamp(min=1)

    @cached_property
    def token_advantages(self) -> Tensor:
        """The advantage of each token's completion, multiplied by the token's importance, `[targets]`.

        A loss that is proportional to its advantage is corrected for the sampler if it reads these.
        """
        return self.weighted(self.advantages[self.owners])

    def weighted(self, values: Tensor) -> Tensor:
        """`values` `[targets]` multiplied by the importance of each token; unchanged if the policy itself sampled."""
        return values if self.importance is None else values * self.importance

    @cached_property
    def log_ratios(self) -> Tensor:
        """`log rho`, `[targets]`, differentiable."""
        return self.logps - self.old_logps


class PolicyLoss(ABC):
    """A loss on sampled completions. To train with your own, subclass it and name the class by `class_path`.

    Take the advantages of tokens from `completions.token_advantages`: they correct for an engine that samples with
    other log-probabilities than the policy's.
    """

    unit: ClassVar[Literal["rows", "targets"]] = "rows"
    """What the sum of the losses is divided by: the completions of the update, or their tokens."""
    has_ratio: ClassVar[bool] = True
    """Whether it corrects for updates since the sampling. If not, each rollout is used for one update only."""

    @abstractmethod
    def __call__(self, completions: Completions) -> Tensor:
        """Maps completions to losses `[completions]`."""

    def weights(self, completions: Completions) -> Tensor:
        """The weight of each token, `[targets]`, in the sum over the update; also used for the KL penalty."""
        return torch.ones_like(completions.logps)

    @torch.no_grad()
    def clipped(self, completions: Completions) -> tuple[Tensor, Tensor]:
        """Whether each token's ratio is clipped at the lower and at the upper bound: two bools `[targets]`."""
        none = torch.zeros_like(completions.logps, dtype=torch.bool)
        return none, none


class ClippedLoss(PolicyLoss):
    """`-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)` for each token (PPO, Schulman et al. 2017).

    Args:
        epsilon: How far the ratio may fall below 1 before its gradient is cut off.
        epsilon_high: The same above 1; `epsilon` when left out.
    """

    def __init__(self, epsilon: float = 0.2, epsilon_high: float | None = None) -> None:
        for name, value in (("epsilon", epsilon), ("epsilon_high", epsilon_high)):
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}, but has to be above 0")
        self.epsilon = epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high

    def __call__(self, completions: Completions) -> Tensor:
        """Sums over the tokens of each completion, `[completions]`."""
        ratios, advantages = completions.log_ratios.exp(), completions.token_advantages
        return completions.sums(self.weights(completions) * self._surrogate(ratios, advantages))

    @torch.no_grad()
    def clipped(self, completions: Completions) -> tuple[Tensor, Tensor]:
        """Marks the tokens at which clipping changes the loss."""
        return self._clipped(completions.log_ratios.exp(), completions.token_advantages)

    def _surrogate(self, ratios: Tensor, advantages: Tensor) -> Tensor:
        clipped = ratios.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        return -torch.minimum(ratios * advantages, clipped * advantages)

    def _clipped(self, ratios: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        return (ratios < 1 - self.epsilon) & (advantages < 0), (ratios > 1 + self.epsilon_high) & (advantages > 0)


class GRPOLoss(ClippedLoss):
    """The clipped loss, averaged over the tokens of a completion, then over completions.

    Shao et al. 2024, arXiv:2402.03300. A token of a long completion counts less than one of a short completion.
    """

    def weights(self, completions: Completions) -> Tensor:
        """1 / tokens of the completion."""
        return (1 / completions.lengths)[completions.owners]


class BNPOLoss(ClippedLoss):
    """The clipped loss, averaged over all tokens of the update (TRL's `bnpo` averages over a micro-batch)."""

    unit = "targets"


class DAPOLoss(BNPOLoss):
    """`BNPOLoss` that clips later above 1 than below (Yu et al. 2025, arXiv:2503.14476, "clip higher").

    The paper's other parts are settings of the module and the data: the penalty for overlong completions, and the
    resampling of groups without variance.
    """

    def __init__(self, epsilon: float = 0.2, epsilon_high: float = 0.28) -> None:
        super().__init__(epsilon, epsilon_high)


class DrGRPOLoss(ClippedLoss):
    """The clipped loss, summed over tokens and divided by `max_tokens` for every completion.

    Liu et al. 2025, arXiv:2503.20783: dividing by a completion's own length favours long wrong answers. Combine it with
    advantages that are not divided by the group's standard deviation, as in the paper.
    """

    def weights(self, completions: Completions) -> Tensor:
        """1 / `max_tokens`."""
        return torch.full_like(completions.logps, 1 / completions.max_tokens)


class GSPOLoss(ClippedLoss):
    """The clipped loss per completion, with the ratio `exp(mean log rho)` (Zheng et al. 2025, arXiv:2507.18071).

    Args:
        epsilon: How far a sequence's ratio may fall below 1. The default is the paper's: such ratios vary less.
        epsilon_high: The same above 1; the default is the paper's.
    """

    def __init__(self, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4) -> None:
        super().__init__(epsilon, epsilon_high)

    def __call__(self, completions: Completions) -> Tensor:
        """Computes one ratio and one loss per completion, weighted by the mean importance of its tokens."""
        losses = self._surrogate(self._ratios(completions), completions.advantages)
        if completions.importance is None:
            return losses
        return losses * completions.sums(completions.importance) / completions.lengths

    def weights(self, completions: Completions) -> Tensor:
        """1 / tokens of the completion."""
        return (1 / completions.lengths)[completions.owners]

    @torch.no_grad()
    def clipped(self, completions: Completions) -> tuple[Tensor, Tensor]:
        """Marks all tokens of the clipped completions."""
        low, high = self._clipped(self._ratios(completions), completions.advantages)
        return low[completions.owners], high[completions.owners]

    @staticmethod
    def _ratios(completions: Completions) -> Tensor:
        return (completions.sums(completions.log_ratios) / completions.lengths).exp()


class CISPOLoss(PolicyLoss):
    """`-sg(min(rho, 1 + epsilon_high)) A log pi`, averaged over all tokens of the update.

    MiniMax 2025, arXiv:2506.13585: the weight of a token is clipped instead of its gradient being cut off, so rare but
    decisive tokens still learn. `sg` stops the gradient.

    Args:
        epsilon_high: How far the weight may rise above 1.
    """

    unit = "targets"

    def __init__(self, epsilon_high: float = 0.28) -> None:
        if not epsilon_high > 0:
            raise UserError(f"epsilon_high is {epsilon_high}, but has to be above 0")
        self.epsilon_high = epsilon_high

    def __call__(self, completions: Completions) -> Tensor:
        """Sums over the tokens of each completion."""
        weights = completions.log_ratios.detach().exp().clamp(max=1 + self.epsilon_high)
        return completions.sums(-weights * completions.token_advantages * completions.logps)

    @torch.no_grad()
    def clipped(self, completions: Completions) -> tuple[Tensor, Tensor]:
        """Marks tokens whose weight is clipped; none is clipped from below."""
        high = completions.log_ratios.exp() > 1 + self.epsilon_high
        return torch.zeros_like(high), high


class ReinforceLoss(PolicyLoss):
    """`-A log pi(completion)`, averaged over completions, without a ratio (REINFORCE, Williams 1992).

    With `advantage: LeaveOneOut` this is RLOO (Ahmadian et al. 2024, arXiv:2402.14740).
    """

    has_ratio = False

    def __call__(self, completions: Completions) -> Tensor:
        """Sums over the tokens of each completion."""
        return -completions.advantages * completions.sums(completions.weighted(completions.logps))


# ---- completions that another distribution sampled


def truncated_importance(logps: Tensor, sampled_logps: Tensor, most: float) -> Tensor:
    """The weight of each token that another distribution than the policy sampled, `[targets]`.

    `w = min(pi(a) / mu(a), C)`: `pi` is the policy at the time of sampling, as training computes it, `mu` what the
    engine sampled from, and `C` is `most`. A mean over tokens of `mu`, weighted by `pi / mu`, is one over tokens of
    `pi`; the bound limits the variance for a small bias (Ionides 2008, "Truncated Importance Sampling", J. Comput.
    Graph. Stat. 17(2); for engines that round otherwise than training: Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"). Weights are per token, as in PPO: those of the tokens before it, which
    would complete the ratio of a sequence, are left out.

    Args:
        logps: `[targets]`, log pi; no gradient passes through.
        sampled_logps: `[targets]`, log mu.
        most: The bound `C`, above 0.
    """
    return (logps.detach() - sampled_logps).exp().clamp(max=most)


# ---- the penalty for leaving the reference

Estimator = Literal["k1", "k2", "k3"]


def kl_estimates(logps: Tensor, ref_logps: Tensor, estimator: Estimator) -> Tensor:
    """Estimates `KL(policy || reference)` per token from tokens that the policy sampled, `[targets]`.

    With `d = log pi - log ref` (Schulman 2020, "Approximating KL divergence"): k1 is `d`, k2 `d^2 / 2`, k3
    `exp(-d) - 1 + d`. As *values*, k1 and k3 are unbiased and k2 is not. As *terms of a loss* they behave differently:
    in expectation over the policy's samples, the gradient of k1 is 0, so it penalises nothing; that of k2 is the
    gradient of `KL(policy || reference)`; that of k3 is the gradient of `KL(reference || policy)`.
    """
    difference = logps - ref_logps
    if estimator == "k1":
        return difference
    return 0.5 * difference.square() if estimator == "k2" else torch.expm1(-difference) + difference
