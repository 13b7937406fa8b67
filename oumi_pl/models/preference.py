"""The wrapper for pairs of responses: how a batch of pairs is laid out for the model, and the log-probabilities.

Three layouts give the same log-probabilities. `shared` runs each prompt once; `documents` and `padded` run every
response with a prompt of its own, for models whose attention can't keep the responses of one prompt apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oumi_pl.attention import refuse_unless_isolating, why_not_shared
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import token_logps
from oumi_pl.models.causal_lm import CausalLM
from oumi_pl.types import Inputs, PreferenceBatch


class Laid(NamedTuple):
    """A batch of pairs as a model reads it."""

    inputs: Inputs
    predictors: Tensor
    """`[targets]` int64: the position, in the flattened `[batch x seq]`, whose hidden state predicts each target."""


Layout = Callable[[PreferenceBatch], Laid]


class PairOutput(NamedTuple):
    """What the model makes of a batch of pairs."""

    logps: Tensor
    """`[targets]`, the log-probability of each target, float32, differentiable."""
    router_loss: Tensor | None
    """Scalar, the weighted router loss of a mixture of experts in training."""
    inputs: Inputs
    """What was read, for the metrics."""


class PreferenceLM(CausalLM):
    """A causal LM that maps pairs to the log-probabilities of their targets, without full logits."""

    def __init__(self, hf: Any, layout: "Layout | None" = None) -> None:
        super().__init__(hf)
        self.layout = layout or shared
        self.layout_reason = ""
        """Why no layout with less work was chosen."""

    def forward(self, batch: PreferenceBatch) -> PairOutput:  # type: ignore[override]
        """Log-probabilities of the targets. Only positions that predict one go through the head."""
        inputs, predictors = self.layout(batch)
        hidden, router_loss = self.hidden_states(inputs)
        predicting = hidden.flatten(0, 1)[predictors]
        logps = token_logps(predicting, batch["targets"], self.head, transform=self.logit_transform)
        return PairOutput(logps, router_loss, inputs)


def shared(batch: PreferenceBatch) -> Laid:
    """One row as it comes: the prompt of a pair is computed once. Needs the attention of `oumi_pl.attention`."""
    inputs: Inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "pair_lengths": batch["pair_lengths"],
    }
    return Laid(inputs, batch["predictors"])


def documents(batch: PreferenceBatch) -> Laid:
    """One row of documents, two per pair: prompt and chosen response, prompt and rejected response."""
    parts, lengths, predictors = _apart(batch)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(predictors.device)
    inputs: Inputs = {
        "input_ids": torch.cat([batch["input_ids"][0, part] for part in parts])[None],
        "position_ids": torch.cat([batch["position_ids"][0, part] for part in parts])[None],
        "document_lengths": lengths,
    }
    return Laid(inputs, predictors + starts[batch["branches"]])


def padded(batch: PreferenceBatch) -> Laid:
    """Two padded rows per pair: what every causal model can read."""
    parts, lengths, predictors = _apart(batch)
    device, width = predictors.device, max(lengths)
    rows = [nn.functional.pad(batch["input_ids"][0, part], (0, width - len(part))) for part in parts]
    positions = torch.arange(width, device=device)
    inputs: Inputs = {
        "input_ids": torch.stack(rows),
        "position_ids": positions.expand(len(rows), width).contiguous(),
        "attention_mask": (positions < torch.tensor(lengths, device=device)[:, None]).long(),
    }
    return Laid(inputs, predictors + batch["branches"] * width)


def _apart(batch: PreferenceBatch) -> tuple[list[Tensor], list[int], Tensor]:
    """The pairs as two sequences each: positions in the row `[length]`, lengths, and predictors within the sequence."""
    device = batch["input_ids"].device
    parts, shifts, splits, start = [], [], [], 0
    for prompt, chosen, rejected in batch["pair_lengths"]:
        split, end = start + prompt + chosen, start + prompt + chosen + rejected
        parts.append(torch.arange(start, split, device=device))
        parts.append(torch.cat([parts[-1][:prompt], torch.arange(split, end, device=device)]))
        shifts += [start, start + chosen]  # how far a response's tokens move to stand where its sequence begins at 0
        splits += [start, split]
        start = end
    branches, predictors = batch["branches"], batch["predictors"]
    at_prompt = predictors < torch.tensor(splits, device=device)[branches]  # the rejected response's first target
    begins = torch.tensor(splits[::2], device=device)[branches // 2]
    moved = predictors - torch.where(at_prompt, begins, torch.tensor(shifts, device=device)[branches])
    return parts, [len(part) for part in parts], moved


def choose_layout(model: CausalLM, share_prompt: bool = True) -> tuple[Layout, str]:
    """The layout with the least work that is exact for a model, found out by trying, and why there is none with less.

    Args:
        model: Unsharded; left as it was.
        share_prompt: Whether `shared` may be chosen at all.
    """
    why = why_not_shared(model.base) if share_prompt else "share_prompt is off"
    if why is None:
        return shared, ""
    try:
        refuse_unless_isolating(model.base)
    except UserError:
        return padded, why
    return documents, why


def with_layout(build: Callable[[bool], PreferenceLM], share_prompt: bool = True) -> PreferenceLM:
    """Builds a model that reads pairs in the best layout that is exact for it; dropout is off.

    Args:
        build: Makes the model, with the attention that packed rows need (True) or with its own (False).
        share_prompt: Whether `shared` may be chosen.
    """
    try:
        model = build(True)
        layout, reason = choose_layout(model, share_prompt)
    except UserError as error:  # there are architectures that no such attention is written for
        layout, reason = padded, str(error)
    if layout is padded:
        model = build(False)
    model.layout, model.layout_reason = layout, reason
    disable_dropout(model)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Turns dropout off, for good: policy and reference have to see the same model (Rafailov et al. 2023).

    `eval()` would do, but it turns gradient checkpointing off as well, and Lightning turns it back.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(module, name, 0.0)
