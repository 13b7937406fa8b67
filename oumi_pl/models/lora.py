"""LoRA through PEFT: checks of the recipe's `lora:`, and the embedding rows of added tokens."""

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from oumi_pl.errors import UserError, nearest, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUES: dict[str, tuple[Any, Any, str]] = {
    "r": (int, lambda r: r > 0, "a whole number, at least 1"),
    "lora_alpha": (int | float, lambda alpha: alpha > 0, "a number above 0"),
    "bias": (str, lambda bias: bias in ("none", "all", "lora_only"), "none, all or lora_only"),
    "lora_dropout": (int | float, lambda p: 0 <= p < 1, "a number from 0 to below 1"),
}
"""Key -> type, condition and description of the values that PEFT would fail on later, without naming the key."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(lora: dict[str, Any], task: str = "CAUSAL_LM") -> Any:
    """Creates the `peft.LoraConfig` of a recipe's `lora:`; for all linear layers by default.

    Args:
        lora: Keys and values of `peft.LoraConfig`.
        task: PEFT's task type. `SEQ_CLS` also trains and saves the head `score` as a whole.

    Raises:
        UserError: `peft.LoraConfig` does not accept a key or value, or the initialisation rewrites the base.
    """
    from peft import LoraConfig

    known = inspect.signature(LoraConfig).parameters
    for key in lora:
        if key not in known:
            raise UserError(
                f"model.lora.{key}: unknown key{nearest(key, known)} (the keys are those of peft.LoraConfig)"
            )
    for key, (kind, fits, right) in _VALUES.items():
        value = lora.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not fits(value)):
            raise UserError(f"model.lora.{key} is {value!r}, but has to be {right}")
    start = lora.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        # checkpoints and exports hold only the adapter, for the base weights on disk
        raise UserError(f"model.lora.init_lora_weights: {start!r} rewrites the base weights; use true, or 'gaussian'")
    try:
        # copied, because PEFT adds the head of a classifier to `modules_to_save`
        return LoraConfig(**{"task_type": task, "target_modules": "all-linear"} | copy.deepcopy(lora))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.lora: {reason(error)}") from error


def with_lora(
    hf: "PreTrainedModel",
    lora: dict[str, Any],
    added_tokens: Sequence[int] = (),
    revision: str | None = None,
    task: str = "CAUSAL_LM",
) -> Any:
    """Adds LoRA layers to a model and freezes the rest, except for the rows of added tokens.

    Those rows are trained and saved with the adapter, since they have no pretrained values. Adapters are float32
    whatever the dtype of the base.

    Raises:
        UserError: the model has no module that `lora` names, or the rows can't be trained.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers.pytorch_utils import Conv1D

    config = lora_config(lora, task)
    if added_tokens and "trainable_token_indices" not in lora:
        config.trainable_token_indices = _token_rows(hf, added_tokens, lora.get("modules_to_save") or ())
    if getattr(hf, "is_quantized", False):
        hf = prepare_model_for_kbit_training(hf, use_gradient_checkpointing=False)
    _refuse_unsaved(hf, lora.get("modules_to_save") or ())
    try:
        return get_peft_model(hf, config, revision=revision)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in hf.named_modules() if isinstance(m, nn.Linear | Conv1D)})
        layers = f"linear layers of this model: {', '.join(linear)}"
        targets = lora.get("target_modules")
        if targets is None or "not found" not in str(error):
            raise UserError(f"model.lora: {reason(error)} ({layers})") from error
        named = [targets] if isinstance(targets, str) else list(targets)
        wrong = next((target for target in named if target not in linear), named[0])
        near = nearest(wrong, linear)
        hint = f"{near} {layers}" if near.startswith("; did") else f"; {layers}"
        raise UserError(f"model.lora.target_modules: {wrong!r} matches no layer{hint}") from error


def _refuse_unsaved(hf: "PreTrainedModel", saved: Sequence[str]) -> None:
    """Refuses unknown names in `modules_to_save`, which PEFT would ignore."""
    paths = [name for name, _ in hf.named_modules() if name]
    for wanted in [saved] if isinstance(saved, str) else saved:
        if not any(path == wanted or path.endswith(f".{wanted}") for path in paths):
            known = {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
            raise UserError(f"model.lora.modules_to_save: the model has no module {wanted!r}{nearest(wanted, known)}")


def _token_rows(
    hf: "PreTrainedModel", added_tokens: Sequence[int], saved: Sequence[str]
) -> dict[str, list[int]] | None:
    """The rows to train by layer: of the embedding, and of the head unless they are tied."""
    names = {module: name for name, module in hf.named_modules()}
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        layers.append(head)
    layers = [layer for layer in layers if not names[layer].endswith(tuple(saved))]
    if head in layers and getattr(head, "bias", None) is not None:
        name, both = names[head], f"[{names[embedding]}, {names[head]}]"
        raise UserError(
            f"model.lora: tokens were added, and {name} has a bias, so that PEFT can't train single rows of it; "
            f"train it whole (modules_to_save: {both}), or use a chat template without new tokens"
        )
    return {names[layer]: list(added_tokens) for layer in layers} or None
