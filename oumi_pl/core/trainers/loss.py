"""What a model of any kind makes of a batch: a loss, targets, rows, tokens.

The rule: an update's gradient is that of the mean over its *targets*, over all micro-batches and processes, however
they are cut. A target is

- a label that is not -100 (or `label_ignore_index`), where the batch has whole-number `labels`. Of a causal model's
  `labels [batch, seq]` the first of each row is not one, since the model shifts them; `shift_labels` count as they are;
- a row, where there are no labels, or labels that are real numbers.

A model whose forward takes `num_items_in_batch` is given the update's number of targets and divides by it itself. Of
any other, the loss of a micro-batch has to be the mean over its targets: it counts by its share of the update's
targets.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oumi_pl.core.trainers.kinds import bare
from oumi_pl.errors import UserError


@dataclass(frozen=True)
class Counter:
    """Counts what is in a batch. It knows nothing of the model but this, so that loader processes can have it.

    ignore_index: of labels that are no targets. shifts: the model predicts each label from those before it.
    """

    ignore_index: int = -100
    shifts: bool = True

    def predicts_tokens(self, batch: Any) -> bool:
        """Whether labels are the tokens themselves, each predicted from those before it."""
        ids, labels = _get(batch, "input_ids"), _get(batch, "labels")
        return self.shifts and ids is not None and labels is not None and labels.ndim > 1 and ids.shape == labels.shape

    def __call__(self, batch: Any) -> dict[str, int]:
        """Numbers of `targets`, `rows`, `tokens` (those attended to, or all ids) and `positions` of a batch."""
        rows, mask, ids = _rows(batch), _get(batch, "attention_mask"), _get(batch, "input_ids")
        positions = 0 if ids is None else ids.numel()
        tokens = int(mask.sum()) if mask is not None and mask.ndim == 2 else positions
        labels = _get(batch, "shift_labels")
        if labels is None:
            labels = _get(batch, "labels")
            if self.predicts_tokens(batch):
                labels = labels[..., 1:]
        is_rows = labels is None or labels.is_floating_point()
        targets = rows if is_rows else int((labels != self.ignore_index).sum())
        return {"targets": targets, "rows": rows, "tokens": tokens, "positions": positions}


class Loss:
    """Runs a model on micro-batches and weighs what it returns.

    Args:
        model: Takes a batch as keywords, and returns a loss: as `["loss"]`, as `.loss`, or by itself.
        ignore_index: Of labels that are no targets.
    """

    def __init__(self, model: nn.Module, ignore_index: int = -100) -> None:
        self.model = model
        base = bare(model)
        parameters = inspect.signature(base.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._names = None if takes_any else set(parameters)
        loss_type = getattr(base, "loss_type", None)
        encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        # that labels are shifted is assumed of a model that does not say
        shifts = not encodes and loss_type in (None, "ForCausalLM", "ForConditionalGeneration")
        self.count = Counter(ignore_index, shifts)
        self.makes_labels = loss_type == "ForCausalLM"
        """Whether `labels` are what the model needs for a loss, so that text without any can be given its own."""
        # transformers hands it on through **kwargs to the loss of its causal models; of others that is not known
        handed_on = takes_any and loss_type == "ForCausalLM" and getattr(base, "accepts_loss_kwargs", True)
        self._divides = "num_items_in_batch" in parameters or handed_on

    def __call__(self, batch: Any, targets: int, total: int) -> Tensor:
        """The part of an update's loss that a micro-batch makes: the parts add up to the mean over all targets.

        Args:
            batch: A micro-batch.
            targets: Its targets; 0 for one that only stands in, whose part is 0.
            total: Targets of the whole update, over all micro-batches and processes, at least 1.

        Raises:
            UserError: if the batch has no names, or the model returns no loss.
        """
        if not isinstance(batch, Mapping):
            raise UserError(f"train_dataset: a batch is a {type(batch).__name__}, but the model takes named columns")
        inputs = {k: v for k, v in batch.items() if self._names is None or k in self._names}
        if self._divides and ("labels" in batch or "shift_labels" in batch):
            device = next(self.model.parameters()).device
            loss = loss_of(self.model(**inputs, num_items_in_batch=torch.tensor(total, device=device)), inputs)
        else:
            loss = loss_of(self.model(**inputs), inputs)
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * (targets / total)
        # the mean over no targets at all is not a number
        return loss if targets else loss.nan_to_num() * 0


def loss_of(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The loss in what a model returned.

    Raises:
        UserError: if there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, Tensor) and output.ndim == 0:
        loss = output
    if loss is None:
        raise UserError(
            f"the model returned no loss for a batch of {', '.join(sorted(inputs))}: it is taken from "
            "output['loss'] or output.loss. Models of text make one when the rows have labels"
        )
    return loss.mean() if loss.ndim else loss


def _rows(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
        if isinstance(value, list | tuple):
            return len(value)
    return 1


def _get(batch: Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else None
