"""The tokenizer of an Oumi config, as a run exports it."""

from typing import TYPE_CHECKING

from oumi_pl.core.configs import ModelParams
from oumi_pl.core.recipe.notes import Notes
from oumi_pl.core.recipe.targets import template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(params: ModelParams, notes: Notes) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer with the chat template and the pad token that a run exports.

    Raises:
        UserError: it can't be loaded, or there is no such template.
    """
    from oumi_pl.data.sft import SFTData

    data = SFTData(
        tokenizer=params.tokenizer_name or params.model_name,
        pad_token=params.tokenizer_pad_token or params.tokenizer_kwargs.get("pad_token"),
        template=template(params, notes),
        trust_remote_code=params.trust_remote_code,
    )
    if params.model_max_length:
        data.tokenizer.model_max_length = params.model_max_length
    return data.tokenizer
