"""The wrapper around Hugging Face models: computes losses and log-probabilities of a batch, never all its logits.

Losses and log-probabilities are computed inside `forward`, so that DDP and FSDP2 see the whole computation: FSDP2
gathers the wrapper's own parameters, the output head among them, only while `forward` runs.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from oumi_pl.attention import NAME, packed, why_not_isolating, why_not_shared
from oumi_pl.attention.probe import body_of, probing
from oumi_pl.attention.rotary import rows_of
from oumi_pl.attention.segments import path_positions
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import TokenLossOutput, token_logps, token_loss_sum, token_losses
from oumi_pl.losses.devices import row_multiple
from oumi_pl.losses.linear_head import call_head, compute_dtype, transformed
from oumi_pl.models.fp8 import exact_products
from oumi_pl.types import Batch, Inputs, Segment, TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Arranged(NamedTuple):
    """The inputs of a model for a batch, and where to find its tokens in the output."""

    inputs: Inputs
    places: Tensor | None
    """`[seq]` int64, for each token of the batch's row the index of its hidden state in the model's flattened output
    `[batch x seq]`; None if that is its position in the row. A token repeated by several paths has one place."""

    def at(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Hidden states `[n, hidden]` at positions `[n]` of the batch's row, from the output `[batch, seq, hidden]`."""
        return hidden.flatten(0, 1)[positions if self.places is None else self.places[positions]]


Layout = Callable[[Batch], Arranged]
T = TypeVar("T")


def forest(batch: Batch) -> Arranged:
    """The batch's row itself, each token once."""
    if rectangle := _rectangle(batch):
        return rectangle
    inputs: Inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segments")}  # type: ignore[assignment]
    return Arranged(inputs, None)


def documents(batch: Batch) -> Arranged:
    """One row of documents, one for each path: shared tokens are repeated."""
    segments = batch["segments"]
    if not any(segment.shared for segment in segments):
        return forest(batch)
    paths = [path_positions(segments, i) for i in range(len(segments))]
    lengths = [len(path) for path in paths]
    starts = np.cumsum([0, *lengths[:-1]])
    taken, device = _tensor(np.concatenate(paths), batch), batch["input_ids"].device
    inputs: Inputs = {
        "input_ids": batch["input_ids"][:, taken],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "segments": [Segment(n) for n in lengths],
    }
    return Arranged(inputs, _tensor(_own_places(segments, starts), batch))


def padded(batch: Batch) -> Arranged:
    """A padded row for each path: shared tokens are repeated."""
    if rectangle := _rectangle(batch):
        return rectangle
    segments = batch["segments"]
    paths = [path_positions(segments, i) for i in range(len(segments))]
    width = max(map(len, paths))
    taken = np.zeros((len(paths), width), dtype=np.int64)  # padding repeats the row's first token; the mask hides it
    mask = np.zeros_like(taken)
    for i, path in enumerate(paths):
        taken[i, : len(path)], mask[i, : len(path)] = path, 1
    device = batch["input_ids"].device
    inputs: Inputs = {
        "input_ids": batch["input_ids"][0, _tensor(taken, batch)],
        "position_ids": torch.arange(width, device=device).expand(len(paths), width).contiguous(),
        "attention_mask": _tensor(mask, batch),
        "lengths": [len(path) for path in paths],
    }
    return Arranged(inputs, _tensor(_own_places(segments, width * np.arange(len(segments))), batch))


def padded_to_few_lengths(inputs: Inputs, has_own_attention: bool, longest: int | None = None) -> Inputs:
    """Pads rows on the right to one of a few lengths, by less than 1/16 or at most 7 tokens.

    The model's output beyond the width that the rows had means nothing. oneDNN compiles a kernel for each shape of a
    product in half precision on a CPU, which takes longer than the product itself, and keeps the last 1,024 of them, of
    about 0.5 MB each. Almost every packed row has a new length.

    Inputs with neither a mask nor segments are not padded, as the model could not tell padding from tokens: several
    documents of equal length, and one document for other attention than ours.

    Args:
        inputs: Of a model, in any layout.
        has_own_attention: Whether the model's attention is ours, which keeps the segments of a row apart.
        longest: Tokens of the longest row of the data, for which the model has positions: one row per document gets no
            longer.
    """
    ids, places, mask = inputs["input_ids"], inputs["position_ids"], inputs.get("attention_mask")
    rows, width = ids.shape
    segments = inputs.get("segments", [Segment(width)] if rows == 1 and has_own_attention else None)
    more = -width % max(8, 2 ** ((width - 1).bit_length() - 5))  # 16 lengths from one power of two to the next
    if mask is not None and longest is not None:
        more = min(more, max(0, longest - width))
    if not more or (mask is None and segments is None):
        return inputs
    longer: Inputs = {**inputs, "input_ids": F.pad(ids, (0, more)), "position_ids": F.pad(places, (0, more))}
    if mask is not None:
        longer["attention_mask"] = F.pad(mask, (0, more))
    elif segments is not None:
        longer["segments"] = [*segments, Segment(more)]
        longer["position_ids"][:, width:] = torch.arange(more)
    return longer


def positions(batch: Batch, layout: Layout) -> int:
    """Positions that a layout has for a batch, padding and repeated tokens included."""
    segments = batch["segments"]
    tokens = sum(segment.length for segment in segments)
    if layout is forest or (layout is padded and _is_rectangular(segments)):
        return tokens
    lengths = [segment.shared + segment.length for segment in segments]
    return len(lengths) * max(lengths) if layout is padded else sum(lengths)


def _own_places(segments: Sequence[Segment], starts: np.ndarray) -> np.ndarray:
    """Index of each token of the row in the concatenated paths, if the path of segment `i` begins at `starts[i]`."""
    return np.concatenate(
        [np.arange(start + s.shared, start + s.shared + s.length) for start, s in zip(starts, segments, strict=True)]
    )


def _is_rectangular(segments: Sequence[Segment]) -> bool:
    return all(segment.shared == 0 and segment.length == segments[0].length for segment in segments)


def _rectangle(batch: Batch) -> Arranged | None:
    """Documents of equal length as rows without padding or mask; None if lengths differ or tokens are shared."""
    segments = batch["segments"]
    if not _is_rectangular(segments):
        return None
    shape = len(segments), segments[0].length
    return Arranged(
        {"input_ids": batch["input_ids"].view(shape), "position_ids": batch["position_ids"].view(shape)}, None
    )


def _tensor(values: np.ndarray, batch: Batch) -> Tensor:
    return torch.from_numpy(values).to(batch["input_ids"].device)


PROBE_TOKENS = 8
"""Tokens on which `refuse_unknown_logits` compares logits."""
EXPORT_TOKENS = 24
"""Tokens on which the logits of an exported model are compared with those of the live one."""


@dataclass(frozen=True)
class States:
    """The hidden states of a batch, with methods for losses. Only valid while `LM.forward` runs.

    router_loss: Scalar, the weighted router loss of a mixture of experts in training, a mean over the batch; else None.
    """

    lm: "LM"
    batch: Batch
    arranged: Arranged
    hidden: Tensor
    """`[batch, seq, hidden]`, in the layout that the model reads."""
    router_loss: Tensor | None

    def at(self, positions: Tensor) -> Tensor:
        """Hidden states `[n, hidden]` at positions `[n]` of the batch's row."""
        return self.arranged.at(self.hidden, positions)

    @property
    def predicting(self) -> Tensor:
        """Hidden states `[targets, hidden]` that predict the targets."""
        return self.at(self.batch["predictors"])

    @property
    def ends(self) -> Tensor:
        """Hidden states `[segments, hidden]` at the last token of each segment."""
        lengths = torch.tensor([segment.length for segment in self.batch["segments"]])
        return self.at((lengths.cumsum(0) - 1).to(self.hidden.device))

    def loss_sum(self, token_loss: TokenLoss) -> TokenLossOutput:
        """Sum of `token_loss` over the targets, by weight; in training, with the router loss of mixtures of experts.

        The router loss is multiplied by the weight of the batch's targets: the update divides by that of all its
        targets, which leaves the weight that the config sets. It is left out in evaluation, since it is no likelihood
        and depends on which rows share a batch.
        """
        lm, batch = self.lm, self.batch
        out = token_loss_sum(
            *(self.predicting, batch["targets"], lm.head, token_loss),
            weights=batch.get("weights"),
            transform=lm.logit_transform,
        )
        if self.router_loss is not None:
            out = out._replace(loss_sum=out.loss_sum + self.router_loss * batch.get("weight", len(batch["targets"])))
        return out

    def token_losses(self, token_loss: TokenLoss) -> Tensor:
        """The loss of each target, `[targets]` float32, differentiable; backward calls the loss again."""
        lm = self.lm
        return token_losses(self.predicting, self.batch["targets"], lm.head, token_loss, transform=lm.logit_transform)

    def logits(self) -> Tensor:
        """The logits that predict each target, `[targets, vocab]` float32, differentiable.

        All of them are in memory at once, which training avoids.
        """
        return transformed(call_head(self.lm.head, self.predicting), self.lm.logit_transform)

    def logps(self, temperature: float = 1.0) -> Tensor:
        """Log-probability of each target at a temperature, `[targets]` float32, differentiable."""
        own = self.lm.logit_transform

        def tempered(logits: Tensor) -> Tensor:
            return (logits if own is None else own(logits)) / temperature

        transform = own if temperature == 1 else tempered
        return token_logps(self.predicting, self.batch["targets"], self.lm.head, transform=transform)


class LM(nn.Module):
    """A causal LM, or a PEFT model around one; called with a batch and a function of its hidden states.

    This is how to compute anything on a batch: `lm(batch)` for log-probabilities, `lm(batch, States.logits)`,
    `lm(batch, lambda states: states.token_losses(loss))`. It keeps the documents of a row apart, in whatever layout the
    model reads. `lm.hf` is the model of transformers: it doesn't know where documents end.

    For Hessian-vector products and forward-mode AD on CPUs, use `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`:
    torch's fused attention kernels have first derivatives only.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that loads an export."""

    def __init__(self, hf: Any, layout: Layout = forest, layout_reason: str = "") -> None:
        super().__init__()
        self.hf = hf
        self.layout = layout
        self.layout_reason = layout_reason
        """Why no cheaper layout could be used; empty for `forest`."""
        self.base.register_forward_pre_hook(_refuse_packed_rows, with_kwargs=True)
        self._longest: int | None = None
        self._kept: frozenset[str] = frozenset()
        self._is_fixed = False

    @property
    def adapter_weights(self) -> frozenset[str]:
        """Names in `hf` of the weights that LoRA trains; empty without LoRA."""
        return getattr(self.hf, "adapter_weights", frozenset())

    def keep_dtypes(self, dtype: torch.dtype, parameters: bool = True) -> None:
        """Makes casts leave alone what is not of `dtype` now, such as RoPE's frequencies in float32.

        Lightning's `bf16-true` casts the whole module, whereas `from_pretrained(dtype=bfloat16)` keeps what an
        architecture computes or needs in float32.

        Args:
            dtype: Of the weights.
            parameters: Whether this holds for parameters as well as buffers.
        """
        tensors = (*self.named_buffers(), *(self.named_parameters() if parameters else ()))
        self._kept = frozenset(name for name, t in tensors if t.is_floating_point() and t.dtype != dtype)

    def fix_dtypes(self) -> None:
        """Makes later casts of the module change no dtype, only devices.

        FSDP2 takes note of dtypes when the model first runs, which is before Lightning casts it for `bf16-true`.
        """
        self._is_fixed = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._is_fixed:
            return super()._apply(lambda t: t.to(fn(torch.empty(0, dtype=t.dtype, device=t.device)).device), recurse)
        before = {name: tensor.data for name, tensor in self._kept_tensors()}
        super()._apply(fn, recurse)
        for name, tensor in self._kept_tensors():
            if tensor.dtype != before[name].dtype:
                tensor.data = before[name].to(tensor.device)
        return self

    def _kept_tensors(self) -> list[tuple[str, Tensor]]:
        if not self._kept:
            return []
        return [(n, t) for n, t in (*self.named_buffers(), *self.named_parameters()) if n in self._kept]

    def forward(self, batch: Batch | None, compute: Callable[[Any], Any] = States.logps) -> Any:
        """Runs the model and returns `compute(states)`; by default the log-probabilities of the targets.

        Anything that needs the output head has to be in `compute`: sharded weights are gathered only while this runs.
        Without a batch, the model does not run, and `compute` gets None.
        """
        return compute(None if batch is None else self.states(batch))

    def gathered(self, compute: Callable[[], T]) -> T:
        """Returns `compute()`, during which the model can be called in any way.

        Sharded weights outside of its layers are gathered while it runs; all ranks have to call it then.
        """
        return self(None, lambda _: compute())

    def states(self, batch: Batch) -> States:
        """Runs the model up to its last hidden states."""
        arranged = self.layout(batch)
        inputs, width = arranged.inputs, arranged.inputs["input_ids"].shape[1]
        # not with a router loss, which would count the padding of packed rows
        if self._has_kernel_per_shape() and not self._router_coefficient:
            has_own_attention = self.base.config._attn_implementation == NAME
            inputs = padded_to_few_lengths(inputs, has_own_attention, self._longest)
        hidden, router_loss = self.hidden_states(inputs)
        return States(self, batch, arranged, hidden[:, :width], router_loss)

    def _has_kernel_per_shape(self) -> bool:
        weight = cast("Tensor", self.base.get_input_embeddings().weight)
        return row_multiple(weight, compute_dtype(weight)) > 1

    def choose_layout(self, share: bool, longest: int) -> None:
        """Sets the cheapest layout that is exact, by running the model; all ranks have to call it if it is sharded.

        Args:
            share: Whether to try to compute shared tokens once.
            longest: Tokens of the longest row.
        """
        self._longest = longest
        with exact_products(self):
            self.layout, why = self.gathered(lambda: choose_layout(self.hf, share, longest))
        # a right layout was found, so what to change for another one is left out
        self.layout_reason = why.partition("; ")[0]
        if self.layout is padded and self.base.config._attn_implementation == NAME:
            plain = "sdpa" if self.base._supports_sdpa else "eager"
            self.base.set_attn_implementation(plain)

    def positions(self, batch: Batch) -> int:
        """Positions that the layout has for a batch, padding and repeated tokens included."""
        return positions(batch, self.layout)

    # ---- the Hugging Face model

    @property
    def base(self) -> "PreTrainedModel":
        """The Hugging Face model with its adapters, without PEFT's wrapper."""
        return self.hf.get_base_model() if self.has_adapters else self.hf

    @property
    def has_adapters(self) -> bool:
        """Whether it is a PEFT model."""
        return hasattr(self.hf, "peft_config")

    @property
    def device(self) -> torch.device:
        """The device that the model computes on. Parts of sharded weights may be kept on another, the CPU."""
        weight: Tensor = next(self.parameters())
        if not isinstance(weight, DTensor):
            return weight.device
        kind = weight.device_mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @property
    def body(self) -> nn.Module:
        """The part of the model that returns hidden states."""
        return body_of(self.base)

    @property
    def logit_transform(self) -> Callable[[Tensor], Tensor] | None:
        """The architecture's function of its logits after the head: scaling, soft cap; None for most."""
        config = self.base.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma
        if scale == 1.0 and cap is None:
            return None
        return lambda logits: _scaled_and_capped(logits, scale, cap)

    @property
    def head(self) -> nn.Module:
        """The module from hidden states to logits."""
        return self.base.get_output_embeddings()

    @property
    def vocabulary_weights(self) -> list[nn.Parameter]:
        """Parameters with a row per token or position: embeddings, and the output head."""
        layers = [m for m in self.base.modules() if isinstance(m, nn.Embedding)]
        return [p for layer in (*layers, self.head) for p in layer.parameters()]

    def hidden_states(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[batch, seq, hidden]`, and the weighted router loss where the model has one.

        Raises:
            UserError: the architecture doesn't return them.
        """
        coefficient = self._router_coefficient
        kwargs: dict[str, Any] = {"output_router_logits": True} if coefficient else {}
        mask = inputs.get("attention_mask")
        rows, width = inputs["input_ids"].shape
        lengths = inputs.get("lengths", [width] * rows)
        with packed(inputs.get("segments")), rows_of(lengths):
            # with a cache, transformers would ignore the borders of packed documents
            output = self.body(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=mask,
                use_cache=False,
                **kwargs,
            )
        if getattr(output, "last_hidden_state", None) is None:
            name = type(self.base).__name__
            raise UserError(f"model: {name} returns no hidden states, so it can't be trained here; name another model")
        router_loss = self._router_loss(output.router_logits, inputs) * coefficient if coefficient else None
        return output.last_hidden_state, router_loss

    def probe_logits(self) -> Tensor:
        """Logits of a few random tokens, `[1, seq, vocabulary]`, to compare an export with.

        They are computed within `forward`: under FSDP2 all ranks have to call this. Their device and dtype are those
        of the computation. Restores random generators and training modes.
        """
        ids, device = probe_ids(self.base.config), self.device
        length = ids.shape[1]
        batch: Any = {
            "input_ids": ids.to(device),
            "position_ids": torch.arange(length, device=device)[None],
            "segments": [Segment(length)],
        }

        def compute(states: States) -> Tensor:
            logits = self.head(states.hidden)
            return logits if self.logit_transform is None else self.logit_transform(logits)

        # eager: compiling for these few tokens would take a minute
        with probing(self, device), exact_products(self), torch.compiler.set_stance("force_eager"):
            return self(batch, compute)

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """Arguments with which `auto_class` loads an adapter."""
        return {}

    def plain_logits(self, hf: Any) -> Tensor:
        """Logits of the same tokens by another instance's own forward, `[1, seq, vocabulary]` float32."""
        ids = probe_ids(hf.config)
        return hf(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits.float()

    @property
    def _router_coefficient(self) -> float:
        config = self.base.config.get_text_config()
        if not self.training or not getattr(config, "output_router_logits", False):
            return 0.0
        return float(getattr(config, "router_aux_loss_coef", 0.0))

    def _router_loss(self, router_logits: Any, inputs: Inputs) -> Tensor:
        # a function in the module of each architecture, which has the model's own definition
        balance = getattr(sys.modules[type(self.base).__module__], "load_balancing_loss_func", None)
        if balance is None:
            name = type(self.base).__name__
            raise UserError(f"model.config.output_router_logits: {name} has no load-balancing loss; leave it out")
        experts = getattr(self.base, "num_experts", None) or self.base.config.num_local_experts
        return balance(router_logits, experts, self.base.config.num_experts_per_tok, inputs.get("attention_mask"))

    def refuse_unknown_logits(self) -> None:
        """Compares our logits on a few tokens with the model's. Restores random generators and training modes.

        Raises:
            UserError: the architecture changes its logits in a way that this wrapper does not reproduce.
        """
        if has_values(self):
            self.gathered(self._refuse_unknown_logits)

    def _refuse_unknown_logits(self) -> None:
        weight = cast("Tensor", self.base.get_input_embeddings().weight)
        vocabulary = len(weight)
        places = torch.arange(PROBE_TOKENS, device=weight.device).unsqueeze(0)
        ids = places % vocabulary
        inputs: Inputs = {"input_ids": ids, "position_ids": places}
        with probing(self, weight.device), exact_products(self):
            logits = self.head(self.hidden_states(inputs)[0]).float()
            own = self.base(input_ids=ids, position_ids=places, use_cache=False).logits.float()
        if self.logit_transform is not None:
            logits = self.logit_transform(logits)
        if not are_near(logits, own, weight):
            raise UserError(
                f"{type(self.base).__name__} computes its logits in a way that is not supported, so the loss would be "
                "wrong; please report the architecture"
            )


def _refuse_packed_rows(hf: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuses rows of several documents in a call of the Hugging Face model itself. `LM` calls what is inside of it.

    Raises:
        UserError: positions start again within a row that has no attention mask.
    """
    places = kwargs.get("position_ids")
    # transformers' own attention functions find documents by their positions
    is_known = cast("Any", hf).config._attn_implementation != NAME
    if is_known or not isinstance(places, Tensor) or kwargs.get("attention_mask") is not None or places.dim() != 2:
        return
    if places.shape[1] > 1 and bool((places[:, 1:] <= places[:, :-1]).any()):
        raise UserError(
            f"{type(hf).__name__} was called on a row of several documents, which would see each other: call "
            "module.causal_lm(batch), or module.causal_lm(batch, compute) with a function of its States"
        )


class ScoringLM(LM):
    """A sequence-classification model with one label: scores the last token of each segment's path."""

    auto_class = "AutoModelForSequenceClassification"

    @property
    def head(self) -> nn.Module:
        """The module from hidden states to a score."""
        return self.base.score  # type: ignore[return-value]

    @property
    def _router_coefficient(self) -> float:
        return 0.0  # as in transformers, whose sequence-classification models have no router loss

    def scores(self, states: States) -> Tensor:
        """The score of each segment's path, `[segments]` float32."""
        head = cast("Any", self.head)
        # a trained head stays in float32 where the frozen weights are bfloat16
        return head(states.ends.to(head.weight.dtype))[:, 0].float()

    def probe_logits(self) -> Tensor:
        """Scores of a few rows of random tokens, `[rows]`; otherwise see `LM`."""
        rows = probe_rows(self.base.config)
        lengths, device = [len(row) for row in rows], self.device
        batch: Any = {
            "input_ids": torch.cat(rows)[None].to(device),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
            "segments": [Segment(n) for n in lengths],
        }
        with probing(self, device), exact_products(self), torch.compiler.set_stance("force_eager"):
            return self(batch, self.scores)

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """Arguments with which `auto_class` loads an adapter."""
        return {"num_labels": 1, "pad_token_id": self.base.config.get_text_config().pad_token_id}

    def plain_logits(self, hf: Any) -> Tensor:
        """Scores of the same rows by another instance's own forward, which reads one batch padded on the right."""
        return plain_scores(hf, probe_rows(hf.config))

    def refuse_unknown_logits(self) -> None:
        """Compares our scores of a few rows with the model's own. Restores random generators and training modes.

        Raises:
            UserError: the architecture computes its score in a way that this wrapper does not reproduce.
        """
        if not has_values(self):
            return
        scores, weight = self.probe_logits().cpu(), cast("Tensor", self.base.get_input_embeddings().weight)
        rows = [row[None].to(self.device) for row in probe_rows(self.base.config)]
        with probing(self, self.device), exact_products(self):
            own = self.gathered(lambda: torch.cat([plain_scores(self.base, row) for row in rows]))
        if not are_near(scores, own, weight):
            raise UserError(
                f"{type(self.base).__name__} computes its score in a way that is not supported, so rewards would be "
                "wrong; please report the architecture"
            )


def plain_scores(hf: Any, rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Scores of rows of ids by transformers' own forward, padded on the right if several; `[rows]` float32."""
    weight, head = hf.get_input_embeddings().weight, hf.score.weight
    pad = hf.config.get_text_config().pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad or 0).to(weight.device)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    # transformers does not convert hidden states for a head of another dtype, but leaves that to autocast
    with torch.autocast(weight.device.type, weight.dtype, enabled=head.dtype != weight.dtype):
        logits = hf(input_ids=ids, attention_mask=mask.to(weight.device), use_cache=False).logits
    return logits[:, 0].float().cpu()


def probe_rows(config: Any) -> list[Tensor]:
    """Rows of random tokens of different lengths, none of which is the pad token, `[seq]` each."""
    ids, text = probe_ids(config)[0], config.get_text_config()
    ids = torch.where(ids == text.pad_token_id, (ids + 1) % text.vocab_size, ids)
    first, second = len(ids) // 2, len(ids) // 6 + 1
    return list(ids.split([first, second, len(ids) - first - second]))


def are_near(ours: Tensor, theirs: Tensor, weight: Tensor) -> bool:
    """Whether two computations with the same weights agree, up to the precision of `weight`."""
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def has_values(model: nn.Module) -> bool:
    """Whether weights have values: not while a run is planned on fake tensors, nor on the meta device."""
    weight: Tensor = next(model.parameters())
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return not (local.is_meta or isinstance(local, FakeTensor))


def choose_layout(hf: Any, share: bool = True, longest: int = 0) -> tuple[Layout, str]:
    """Finds the cheapest layout that is exact for a model by running it, and the reason why no cheaper one is.

    Without values nothing can be compared, and the cheapest layout is assumed to be exact.

    Args:
        hf: The model, unsharded; unchanged afterwards.
        share: Whether to try to compute shared tokens once; False also if nothing is shared.
        longest: Tokens of the longest row: lengths below it at which the config says that the model changes are tried.
    """
    if not has_values(hf):
        return forest if share else documents, ""
    why = ""
    if share:
        why = why_not_shared(hf) or ""
    apart = why_not_isolating(hf, longest)
    if share and not why and apart is None:
        return forest, ""
    return (documents, why) if apart is None else (padded, apart)


def with_layout(build: Callable[[bool], Any], share: bool = True, longest: int = 0, wrap: type[LM] = LM) -> LM:
    """Builds a model with the cheapest layout that is exact for it.

    Args:
        build: Builds the Hugging Face model, with the attention that packed rows need (True) or with its own (False).
        share: See `choose_layout`.
        longest: See `choose_layout`.
        wrap: The class of the result.
    """
    state, hf = torch.get_rng_state(), None
    try:
        hf = build(True)
        layout, reason = choose_layout(hf, share, longest)
    except UserError as error:  # architectures without an implementation of this attention
        layout, reason = padded, str(error)
    if layout is padded and (hf is None or hf.config._attn_implementation == NAME):
        torch.set_rng_state(state)  # so that random weights do not depend on the attention
        hf = build(False)
    # a right answer was found, so what to change for another one is left out
    return wrap(hf, layout, reason.partition("; ")[0])


def without_layout(build: Callable[[bool], Any], wrap: type[LM] = LM) -> LM:
    """Builds a model whose weights are not there yet, so that no layout can be tried; `LM.choose_layout` does that.

    Args:
        build: See `with_layout`.
        wrap: The class of the result.
    """
    state = torch.get_rng_state()
    try:
        return wrap(build(True))
    except UserError as error:
        torch.set_rng_state(state)
        return wrap(build(False), padded, str(error).partition("; ")[0])


def probe_ids(config: Any) -> Tensor:
    """Random tokens, and the last ones of the vocabulary, which are often the added ones, `[1, seq]`."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    length = min(EXPORT_TOKENS, positions) if isinstance(positions, int) and positions > 0 else EXPORT_TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (1, length), generator=generator)
    added = min(4, length // 2)
    ids[0, :added] = torch.arange(text.vocab_size - added, text.vocab_size)
    return ids


def disable_dropout(model: nn.Module) -> None:
    """Turns dropout off for good: policy and reference have to be the same model (Rafailov et al. 2023).

    Not by `eval()`, which turns gradient checkpointing off as well, and which Lightning undoes.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(module, name, 0.0)


def _scaled_and_capped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)
