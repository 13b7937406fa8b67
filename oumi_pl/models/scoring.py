"""Folders of reward models, as plain transformers loads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oumi_pl.errors import reason
from oumi_pl.models.lm import LM, are_near


def set_pad_token(config: Any, pad: int | None) -> None:
    """Sets the pad token in a config, and in that of its text model where there is one."""
    config.pad_token_id = config.get_text_config().pad_token_id = pad


def load_plainly(folder: Path, pad: int | None) -> Any:
    """Loads a reward model as a user of transformers would.

    Args:
        folder: A model folder; that of an adapter is loaded with its base.
        pad: The pad token, which the base of an adapter may not know.
    """
    from transformers import AutoModelForSequenceClassification

    is_adapter = (folder / "adapter_config.json").is_file()
    settings = {"num_labels": 1, "pad_token_id": pad} if is_adapter else {}
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def plain_scores(hf: Any, rows: Sequence[Tensor], pad: int) -> Tensor:
    """Scores of rows of ids, `[rows]` float32, by the model's own forward on one batch padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().cpu()


def why_other_scores(folder: Path, live: LM, rows: Sequence[Tensor], scores: Tensor) -> str:
    """Why an exported folder does not give the live model's `scores` of `rows`; empty if it does."""
    config, weight = live.base.config, live.base.get_input_embeddings().weight
    pad = config.get_text_config().pad_token_id
    if pad is None:
        return "the model has no pad token, which transformers needs to score several rows"
    try:
        hf = load_plainly(folder, pad)
        exported = plain_scores(hf, rows, pad)
    except Exception as error:  # whatever a damaged or incomplete folder makes transformers raise
        return f"transformers can't load it ({type(error).__name__}: {reason(error)})"
    if are_near(exported, scores, weight):  # type: ignore[arg-type]
        return ""
    off = float((exported - scores).abs().max())
    return f"in plain transformers its scores differ from those of the trained model by up to {off:.1e}"
