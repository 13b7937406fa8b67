"""Oumi's builders: a model, its tokenizer, an optimizer and a trainer from Oumi's parameters, for use outside a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.core.configs import (
    DataParams,
    DatasetParams,
    DatasetSplitParams,
    ModelParams,
    PeftParams,
    TrainingConfig,
    TrainingParams,
)
from oumi_pl.core.recipe.model import model as model_section
from oumi_pl.core.recipe.notes import Notes
from oumi_pl.core.recipe.tokenizer import tokenizer_of
from oumi_pl.core.trainers import build_trainer
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "build_chat_template", "build_model", "build_optimizer", "build_peft_model", "build_tokenizer", "build_trainer",
]  # fmt: skip

LATER = ("compile",)
"""What a run does to a model once it is built."""


def build_model(model_params: ModelParams, peft_params: PeftParams | None = None, **kwargs: Any) -> "PreTrainedModel":
    """Builds the model as a run does, in training mode on the CPU; with adapters only if they quantize their base.

    Args:
        model_params: The model.
        peft_params: Read for `q_lora` alone, as in Oumi; `peft.get_peft_model(model, peft_params.to_lora())` adds
            the adapters.
        kwargs: Further arguments of `oumi_pl.models.build.build_model`.

    Raises:
        UserError: a parameter has no counterpart, or the model can't be loaded.
    """
    from oumi_pl.models.build import build_model as build

    peft = PeftParams() if peft_params is None else peft_params
    args = model_section(_config(model_params, peft, quantized=peft.q_lora), Notes(online=True))
    args = {name: value for name, value in args.items() if name not in (*LATER, "lora")}
    return build(args.pop("model", None), **args, **kwargs)


def build_peft_model(base_model: Any, use_gradient_checkpointing: bool, peft_params: PeftParams) -> Any:
    """Puts adapters into a model of `build_model`.

    Args:
        base_model: The model.
        use_gradient_checkpointing: Of a quantized model, whose embeddings then give gradients.
        peft_params: The adapters.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if peft_params.q_lora:
        base_model = prepare_model_for_kbit_training(base_model, use_gradient_checkpointing=use_gradient_checkpointing)
    return get_peft_model(base_model, peft_params.to_lora())


def build_chat_template(template_name: str) -> str:
    """The Jinja text of one of Oumi's chat templates.

    Raises:
        UserError: there is no such template.
    """
    from oumi_pl.data import template

    if (name := f"oumi/{template_name.lower()}") not in template.OUMI:
        raise UserError(f"Oumi has no template {template_name!r}{nearest(name, template.OUMI)}")
    file = Path(template.__file__).parent / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def build_tokenizer(model_params: ModelParams) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer with the chat template and the pad token that a run exports.

    Args:
        model_params: The model; `tokenizer_name` names another tokenizer.

    Raises:
        UserError: it can't be loaded, or there is no such template.
    """
    return tokenizer_of(model_params, Notes(online=True))


def build_optimizer(model: "torch.nn.Module", config: TrainingParams) -> "torch.optim.Optimizer":
    """Builds the optimizer of Oumi's own trainer over the trainable parameters of a model.

    Raises:
        UserError: there is no such optimizer, or nothing is trainable.
    """
    from oumi_pl.core.trainers.optimisation import build_optimizer as build

    return build(model, config)


def _config(model: ModelParams, peft: PeftParams, *, quantized: bool) -> TrainingConfig:
    data = DataParams(train=DatasetSplitParams(datasets=[DatasetParams(dataset_name="text")]))
    return TrainingConfig(data=data, model=model, peft=peft, training=TrainingParams(use_peft=quantized))
