"""The configs of models by name: of the recipes' models without a network, of others from their folder or the hub."""

from typing import Any

from oumi_pl.errors import UserError
from oumi_pl.models.build import loaded
from oumi_pl.models.hub import locate

_LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
_QWEN2_5: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_5
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_5
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "Qwen/Qwen3-0.6B": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen/Qwen3-4B": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "meta-llama/Llama-3.2-1B": _LLAMA_8B
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "openai-community/gpt2": {"model_type": "gpt2", "vocab_size": 50257, "dtype": "float32"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "dtype": "float32"},
}
"""Shapes of the models and tokenizers that the recipes name, as in their `config.json`."""


def config_of(name: str, key: str, revision: str | None = None) -> dict[str, Any]:
    """The values of a model's config, with `model_type` and `dtype`.

    Args:
        name: Folder, or id on the hub.
        key: The key of the recipe that names it, for messages.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: it can't be loaded, or the architecture is not one of transformers.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in KNOWN:
        return dict(KNOWN[name])
    config = loaded(AutoConfig.from_pretrained, locate(name, key, revision), revision=revision)
    if config.model_type not in CONFIG_MAPPING:
        raise UserError(f"{key}: {name} has an architecture of its own ({config.model_type}), which `plan` can't build")
    own = {"architectures", "transformers_version", "model_type", "_name_or_path", "auto_map"}
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    return {k: v for k, v in config.to_diff_dict().items() if k not in own} | {
        "model_type": config.model_type,
        "dtype": dtype,
    }
