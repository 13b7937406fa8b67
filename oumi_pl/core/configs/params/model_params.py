"""Which model is trained, and its tokenizer."""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.params.base_params import (
    MISSING,
    BaseParams,
    OumiConfigError,
    harmless,
    honoured,
    refused,
)
from oumi_pl.errors import nearest

_SPELLINGS = {
    "float16": ("f16", "half"),
    "bfloat16": ("bf16",),
    "float32": ("f32", "float"),
    "float64": ("f64", "double"),
    "uint8": (),
}
DTYPES = {spelling: name for name, others in _SPELLINGS.items() for spelling in (name, *others)}
"""What may be written for a type of numbers -> its name in PyTorch."""


@dataclass
class ModelParams(BaseParams):
    """A model, its tokenizer, and how both are loaded."""

    model_name: str = honoured("model.model", MISSING)
    """Model of the hub or a folder; a folder of LoRA adapters stands for its base with them; required."""
    adapter_model: str | None = refused(
        "merge it into its base first (oumi_pl export --merge), and name that as model.model_name", None
    )
    adapter_trainable: bool = refused("an adapter can't be trained on; merge it into its base first", False)
    tokenizer_name: str | None = honoured("data.tokenizer", None)
    tokenizer_pad_token: str | None = honoured("data.pad_token", None)
    """Token to fill rows with, by its text; wins over `tokenizer_kwargs.pad_token`."""
    tokenizer_kwargs: dict[str, Any] = honoured("data.pad_token; padding_side decides on nothing", {})
    """`pad_token` and `padding_side`; others have no counterpart."""
    processor_kwargs: dict[str, Any] = refused("images are not trained on", {})
    model_max_length: int | None = honoured("data.max_length", None)
    """Longest sequence, in tokens; null: the trainer type's own limit."""
    load_pretrained_weights: bool = honoured("model.config in place of model.model", True)
    """false: random weights in the shape of the model."""
    trust_remote_code: bool = honoured("model.trust_remote_code and data.trust_remote_code", False)
    torch_dtype_str: str = honoured("model.dtype", "auto")
    """Type of the weights: `bfloat16`, `float32`; `auto`: that of the file."""
    compile: bool = refused("it stays false; training.compile compiles the model", False)
    chat_template: str | None = honoured("data.template", None)
    """Chat template by name; `auto`: the tokenizer's; null: the tokenizer's, or one that fits."""
    chat_template_kwargs: dict[str, Any] | None = harmless("only inference reads it", None)
    attn_implementation: str | None = honoured("model.attn", None)
    """`sdpa`, `eager`, `flash_attention_2`; null: as transformers chooses."""
    device_map: str | None = harmless("the trainer puts the model on its device", "auto")
    model_kwargs: dict[str, Any] = honoured("model.config", {})
    """Values that replace those of the model's configuration."""
    enable_liger_kernel: bool = harmless("the loss is computed in chunks without it; the numbers are the same", False)
    shard_for_eval: bool = harmless("only evaluation reads it", False)
    freeze_layers: list[str] = honoured("model.freeze", [])
    """Modules whose weights are not trained, by their dotted names."""
    text_only: bool = honoured("model.text_only", False)
    """Take the text model alone out of one that also sees; else its other parts stay as they are."""
    model_revision: str | None = honoured("model.revision", None)
    tool_call_parser: str | None = harmless("only inference reads it", None)

    @property
    def dtype(self) -> str | None:
        """PyTorch's name of the type of the weights; None for `auto`."""
        return DTYPES.get(self.torch_dtype_str.lower())

    def _problems(self) -> Iterator[str]:
        if self.torch_dtype_str != "auto" and self.dtype is None:
            near = nearest(self.torch_dtype_str, ["auto", *DTYPES])
            yield f"torch_dtype_str: {self.torch_dtype_str!r} is not a valid value{near}"
        yield from self._too_deep("processor_kwargs")
        revision = str(self.model_kwargs.get("revision", self.model_revision))
        if self.model_revision not in (None, revision):
            yield f"model_kwargs.revision: {revision!r}, but model_revision is {self.model_revision!r}"

    def _settle(self) -> None:
        if "revision" in self.model_kwargs:
            warnings.warn("model.model_kwargs.revision is now model.model_revision", DeprecationWarning, stacklevel=2)
            self.model_revision = str(self.model_kwargs.pop("revision"))

    def _final_problems(self) -> Iterator[str]:
        if not self.model_name:
            yield "model_name: missing, and there is no default"
        self._find_adapter()
        if self.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            needs = "flash_attention_2 needs the package flash_attn, which is not installed"
            yield f"attn_implementation: {needs}; sdpa needs none"
        yield from self._below(1, "model_max_length")

    def _find_adapter(self) -> None:
        """Takes a folder of adapters apart: the adapters, and the base that they were trained on."""
        folder = Path(self.model_name).expanduser()
        file = folder / "adapter_config.json"
        if self.adapter_model is not None or not file.is_file():
            return
        self.adapter_model = self.model_name
        if (folder / "config.json").is_file():
            return
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise OumiConfigError(f"model_name: {file} can't be read: {error.strerror}") from error
        except ValueError as error:
            raise OumiConfigError(f"model_name: {file} is not valid JSON: {error}") from error
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not base:
            raise OumiConfigError(
                f"model_name: {file} does not name its base model; give that, and the adapters as adapter_model"
            )
        self.model_name = str(base)
