"""Builds a model and its tokenizer from Oumi's parameters, for use outside a run."""

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build_model", "build_tokenizer"]

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


def build_tokenizer(model_params: ModelParams) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer with the chat template and the pad token that a run exports.

    Args:
        model_params: The model; `tokenizer_name` names another tokenizer.

    Raises:
        UserError: it can't be loaded, or there is no such template.
    """
    return tokenizer_of(model_params, Notes(online=True))


def _config(model: ModelParams, peft: PeftParams, *, quantized: bool) -> TrainingConfig:
    data = DataParams(train=DatasetSplitParams(datasets=[DatasetParams(dataset_name="text")]))
    return TrainingConfig(data=data, model=model, peft=peft, training=TrainingParams(use_peft=quantized))
