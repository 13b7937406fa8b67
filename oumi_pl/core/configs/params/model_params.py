"""Which model is trained, and its tokenizer."""

import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.params.base_params import (
    MISSING,
    BaseParams,
    OumiConfigError,
    harmless,
    hints,
    honoured,
    refused,
)
from oumi_pl.errors import nearest

DTYPES = {
    "f16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "f32": "float32",
    "float32": "float32",
    "float": "float32",
    "f64": "float64",
    "float64": "float64",
    "double": "float64",
    "uint8": "uint8",
}
"""What may be written for a type of numbers -> its name in PyTorch."""


@dataclass
class ModelParams(BaseParams):
    """A model, its tokenizer, and how both are loaded."""

    model_name: str = honoured("model.model", MISSING)
    """Model of the hub or a folder; a folder of LoRA adapters stands for its base with them; required."""
    adapter_model: str | None = refused(
        "merge it into its base first (oumi_pl export --merge), and name that as model.model_name", None
    )
    """LoRA adapters that are put on the model."""
    adapter_trainable: bool = refused("an adapter can't be trained on; merge it into its base first", False)
    """Whether those adapters are trained on; false: they stay as they are."""
    tokenizer_name: str | None = honoured("data.tokenizer", None)
    """Where the tokenizer comes from; null: from the model."""
    tokenizer_pad_token: str | None = harmless("padding is masked by position, never by its id", None)
    """Token that pads."""
    tokenizer_kwargs: dict[str, Any] = honoured("nothing but padding may be set, which is masked by position", {})
    """Further arguments to load the tokenizer with."""
    processor_kwargs: dict[str, Any] = refused("images are not trained on", {})
    """Further arguments of the processor of images."""
    model_max_length: int | None = honoured("data.max_length", None)
    """Longest sequence, in tokens; null: the trainer type's own limit."""
    load_pretrained_weights: bool = honoured("model.config in place of model.model", True)
    """false: random weights in the shape of the model."""
    trust_remote_code: bool = honoured("model.trust_remote_code and data.trust_remote_code", False)
    """Whether code that comes with the model may run."""
    torch_dtype_str: str = honoured("model.dtype", "auto")
    """Type of the weights: `bfloat16`, `float32`; `auto`: that of the file."""
    compile: bool = refused("it stays false; training.compile compiles the model", False)
    """Stays false: `training.compile` says whether the model is compiled."""
    chat_template: str | None = honoured("data.template", None)
    """Chat template by name; `auto`: the tokenizer's; null: the tokenizer's, or one that fits."""
    chat_template_kwargs: dict[str, Any] | None = harmless("only inference reads it", None)
    """Arguments of the template when text is generated; training does not read them."""
    attn_implementation: str | None = honoured("model.attn", None)
    """How attention is computed: `sdpa`, `eager`, `flash_attention_2`; null: as transformers chooses."""
    device_map: str | None = harmless("the trainer puts the model on its device", "auto")
    """Where weights are put as they are loaded."""
    model_kwargs: dict[str, Any] = honoured("model.config", {})
    """Values that replace those of the model's configuration."""
    enable_liger_kernel: bool = harmless("the loss is computed in chunks without it; the numbers are the same", False)
    """Whether Liger's kernels replace parts of the model."""
    shard_for_eval: bool = harmless("only evaluation reads it", False)
    """For evaluation only; training does not read it."""
    freeze_layers: list[str] = honoured("model.freeze", [])
    """Modules whose weights are not trained, by their dotted names."""
    text_only: bool = refused("images are not trained on", False)
    """Whether only the language part of a model for images and text is loaded."""
    model_revision: str | None = honoured("model.revision", None)
    """Revision of model and tokenizer on the hub."""
    tool_call_parser: str | None = harmless("only inference reads it", None)
    """For inference only; training does not read it."""

    @property
    def dtype(self) -> str | None:
        """PyTorch's name of the type of the weights; None for `auto`."""
        return DTYPES.get(self.torch_dtype_str.lower())

    def _check(self) -> None:
        if self.torch_dtype_str != "auto" and self.dtype is None:
            raise OumiConfigError(
                f"torch_dtype_str: {self.torch_dtype_str!r} is not a valid value"
                f"{nearest(self.torch_dtype_str, ['auto', *DTYPES])}"
            )
        for key in self.processor_kwargs:
            if key in hints(ModelParams):
                raise OumiConfigError(f"processor_kwargs.{key}: belongs one level higher, beside processor_kwargs")
        if "revision" in self.model_kwargs:
            self._move_revision()

    def _move_revision(self) -> None:
        revision = str(self.model_kwargs.pop("revision"))
        if self.model_revision not in (None, revision):
            raise OumiConfigError(f"model_kwargs.revision: {revision!r}, but model_revision is {self.model_revision!r}")
        warnings.warn("model.model_kwargs.revision is now model.model_revision", DeprecationWarning, stacklevel=2)
        self.model_revision = revision

    def _finalize(self) -> None:
        if not self.model_name:
            raise OumiConfigError("model_name: missing, and there is no default")
        self._find_adapter()
        if self.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise OumiConfigError(
                "attn_implementation: flash_attention_2 needs the package flash_attn, which is not installed; "
                "sdpa needs none"
            )
        self._at_least(1, "model_max_length")

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
