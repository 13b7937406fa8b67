"""The wrapper around Hugging Face models: a batch goes in, the loss comes out.

The loss is computed inside `forward`, so that DDP and FSDP2 see the whole of it: FSDP2 gathers the wrapper's own
parameters, the output head among them, exactly while `forward` runs.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from oumi_pl.attention import packed
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import TokenLossOutput, token_loss_sum
from oumi_pl.types import IGNORE_INDEX, Batch, Inputs, Segment, TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8


class CausalLM(nn.Module):
    """A causal LM (or a PEFT model around one) that maps batches to summed token losses, without full logits."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    @property
    def base(self) -> "PreTrainedModel":
        """The Hugging Face model itself, adapters in place but without PEFT's wrapper."""
        return self.hf.get_base_model() if hasattr(self.hf, "peft_config") else self.hf

    @property
    def logit_transform(self) -> Callable[[Tensor], Tensor] | None:
        """What the architecture does to its logits after the head: scaling, soft cap; None for most."""
        config = self.base.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        if scale == 1.0 and cap is None:
            return None
        return lambda logits: _scaled_and_capped(logits, scale, cap)

    def forward(self, batch: Batch, token_loss: TokenLoss) -> TokenLossOutput:
        """Sum of `token_loss` over the batch's targets; in training, with the router loss of mixtures of experts added.

        The router loss is a mean over the micro-batch; it is weighted by the micro-batch's target tokens, so that it
        survives the division by the update's token count with the weight that the config gives it. In evaluation it is
        left out: it is no likelihood, and depends on which rows happen to share a batch.
        """
        hidden, router_loss = self.hidden_states(batch)
        labels = batch["labels"]
        carries_loss = labels != IGNORE_INDEX
        # masked before the head: tokens without loss need no logits
        out = token_loss_sum(
            hidden[carries_loss], labels[carries_loss], self.head, token_loss, transform=self.logit_transform
        )
        if router_loss is not None:
            out = out._replace(loss_sum=out.loss_sum + router_loss * out.target_tokens)
        return out

    @property
    def head(self) -> nn.Module:
        """The module from hidden states to logits."""
        return self.base.get_output_embeddings()

    @property
    def vocabulary_weights(self) -> list[nn.Parameter]:
        """Parameters with a row per token or position: embeddings, and the output head."""
        layers = [m for m in self.base.modules() if isinstance(m, nn.Embedding)]
        return [p for layer in (*layers, self.head) for p in layer.parameters()]

    def hidden_states(self, batch: Inputs) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[batch, seq, hidden]`, and the weighted router loss where the model has one."""
        coefficient = self._router_coefficient
        kwargs: dict[str, Any] = {"output_router_logits": True} if coefficient else {}
        with packed(_segments(batch)):
            # no cache: it would make transformers ignore where packed documents begin
            output = self.base.base_model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=batch.get("attention_mask"),
                use_cache=False,
                **kwargs,
            )
        router_loss = self._router_loss(output.router_logits, batch) * coefficient if coefficient else None
        return output.last_hidden_state, router_loss

    @property
    def _router_coefficient(self) -> float:
        config = self.base.config.get_text_config()
        if not self.training or not getattr(config, "output_router_logits", False):
            return 0.0
        return float(getattr(config, "router_aux_loss_coef", 0.0))

    def _router_loss(self, router_logits: Any, batch: Inputs) -> Tensor:
        # each architecture's own balancing loss, from its own module
        balance = getattr(sys.modules[type(self.base).__module__], "load_balancing_loss_func", None)
        if balance is None:
            name = type(self.base).__name__
            raise UserError(
                f"model.config.output_router_logits: {name} has no loss that balances its experts; leave it out"
            )
        experts = getattr(self.base, "num_experts", None) or self.base.config.num_local_experts
        return balance(router_logits, experts, self.base.config.num_experts_per_tok, batch.get("attention_mask"))

    @torch.no_grad()
    def refuse_unknown_logits(self) -> None:
        """Compares our logits on a few tokens with the model's own. Leaves generators and training modes as they were.

        Raises:
            UserError: if the architecture does something to its logits that this wrapper does not know.
        """
        weight = next(p for p in self.base.parameters() if p.is_floating_point())
        vocabulary = len(cast("Tensor", self.base.get_input_embeddings().weight))
        positions = torch.arange(PROBE_TOKENS, device=weight.device).unsqueeze(0)
        ids = positions % vocabulary
        batch: Inputs = {"input_ids": ids, "position_ids": positions}
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
                logits = self.head(self.hidden_states(batch)[0]).float()
                own = self.base(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        finally:
            for module, mode in modes.items():
                module.training = mode
        if self.logit_transform is not None:
            logits = self.logit_transform(logits)
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        if not torch.allclose(logits, own, rtol=tolerance, atol=tolerance * float(own.abs().max())):
            raise UserError(
                f"{type(self.base).__name__} computes its logits in a way that is not known here, so the loss would be "
                "wrong; please report the architecture"
            )


def _scaled_and_capped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _segments(batch: Inputs) -> list[Segment] | None:
    """The segments of a packed row; None for padded rows."""
    if "pair_lengths" in batch:
        segments: list[Segment] = []
        for prompt, chosen, rejected in batch["pair_lengths"]:
            segments += [Segment(prompt + chosen), Segment(rejected, parent=len(segments), shared=prompt)]
        return segments
    return [Segment(length) for length in batch["document_lengths"]] if "document_lengths" in batch else None
