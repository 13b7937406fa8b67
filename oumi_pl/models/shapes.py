"""Named Llama shapes to train from scratch, and the initialisation of their residual projections."""

import math
from typing import Any, Literal

import torch
from torch import nn

Shape = Literal["1m", "10m", "30m", "135m", "1b", "8b"]

# Named by their parameters without embeddings at the small end, where a vocabulary would outweigh the layers, and as
# the models that they follow at the large one: SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B.
_SHAPES: dict[str, dict[str, Any]] = {
    "1m": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4},
    "10m": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 8, "num_attention_heads": 5},
    "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 9, "num_attention_heads": 8},
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
RESIDUAL = ("o_proj", "down_proj")
"""Names of the last linear layer of each residual branch, in Llama and similar architectures."""


def shape_config(shape: Shape) -> dict[str, Any]:
    """Config values of a Llama with about that many parameters; heads of 32 to 128, tied embeddings up to 1B."""
    values = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 2048} | _SHAPES[shape]
    return {"num_key_value_heads": values["num_attention_heads"]} | values


@torch.no_grad()
def scale_residuals(model: nn.Module) -> None:
    """Divides the initial weights of residual projections by sqrt(2 layers), as GPT-2 does (Radford et al. 2019).

    Attention and MLP of each layer add to the residual stream; with this scale its variance does not grow with depth.
    All other weights keep transformers' initialisation: normal with `initializer_range` (0.02), norms at 1.
    Architectures with other names for these projections are unchanged, among them GPT-2, which scales them itself.
    """
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in RESIDUAL:
            module.weight.div_(math.sqrt(2 * layers))
