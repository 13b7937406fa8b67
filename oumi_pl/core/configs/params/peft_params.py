"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), and the 4-bit base under them (arXiv:2305.14314)."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from importlib import import_module
from typing import Any

from oumi_pl.core.configs.params.base_params import BaseParams, harmless, honoured, refused


class PeftSaveMode(Enum):
    """What is saved at the end of a run with adapters."""

    ADAPTER_ONLY = "adapter_only"
    ADAPTER_AND_BASE_MODEL = "adapter_and_base_model"
    MERGED = "merged"


class LoraWeightInitialization(StrEnum):
    """How adapters begin; PISA is Oumi's spelling of PiSSA."""

    DEFAULT = "default"
    RANDOM = "random"
    GAUSSIAN = "gaussian"
    EVA = "eva"
    PISA = "pissa"
    PISSA_NITER = "pissa_niter_[number of iters]"
    LOFTQ = "loftq"
    OLORA = "olora"

    def get_literal_value(self) -> bool | str:
        """PEFT's `init_lora_weights`."""
        return {"RANDOM": False, "DEFAULT": True}.get(self.name, self.value)


class TaskType(StrEnum):
    """PEFT's kinds of tasks, by PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftParams(BaseParams):
    """LoRA and QLoRA; read when `training.use_peft` is true."""

    lora_r: int = honoured("model.lora.r", 8)
    lora_alpha: int = honoured("model.lora.lora_alpha", 8)
    lora_dropout: float = honoured("model.lora.lora_dropout", 0.0)
    lora_target_modules: list[str] | None = honoured("model.lora.target_modules", None)
    """By the end of their names; `[all-linear]`: all linear ones; null: PEFT's choice."""
    lora_exclude_modules: list[str] | None = honoured("model.lora.exclude_modules", None)
    """Regular expressions of modules that get no adapters, whatever the targets say."""
    lora_target_parameters: list[str] | None = honoured("model.lora.target_parameters", None)
    """Parameters with adapters of their own, for fused experts."""
    lora_modules_to_save: list[str] | None = honoured("model.lora.modules_to_save", None)
    """Modules that are trained whole and saved with the adapters."""
    lora_bias: str = honoured("model.lora.bias", "none")
    lora_init_weights: LoraWeightInitialization = honoured(
        "model.lora.init_lora_weights", LoraWeightInitialization.DEFAULT
    )
    lora_task_type: TaskType = refused("causal language models are all that is trained", TaskType.CAUSAL_LM)
    q_lora: bool = honoured("model.quantization", False)
    q_lora_bits: int = honoured("model.quantization", 4)
    bnb_4bit_quant_type: str = honoured("model.quantization", "fp4")
    llm_int8_skip_modules: list[str] | None = honoured("model.unquantized", None)
    """Layers that keep the precision of the weights, in 4 bits as well."""
    use_bnb_nested_quant: bool = honoured("model.quantization, which nests", False)
    """Whether the quantization's constants are quantized as well."""
    bnb_4bit_quant_storage: str = harmless("it only decides how the 4-bit numbers are stored in memory", "uint8")
    bnb_4bit_compute_dtype: str = honoured("model.quantization, which computes in bfloat16", "float32")
    peft_save_mode: PeftSaveMode = honoured("export.merge", PeftSaveMode.ADAPTER_ONLY)

    def to_lora(self) -> Any:
        """The `peft.LoraConfig` of these parameters."""
        targets: Any = self.lora_target_modules
        excluded = "|".join(f"({pattern})" for pattern in self.lora_exclude_modules or ())
        # imported by name, since reading a config must not import these libraries
        return import_module("peft").LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            exclude_modules=excluded or None,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            bias=self.lora_bias,
            task_type=self.lora_task_type.value,
            init_lora_weights=self.lora_init_weights.get_literal_value(),
        )

    def to_bits_and_bytes(self) -> Any:
        """The `transformers.BitsAndBytesConfig` of these parameters."""
        return import_module("transformers").BitsAndBytesConfig(
            load_in_4bit=self.q_lora_bits == 4,
            load_in_8bit=self.q_lora_bits == 8,
            llm_int8_skip_modules=self.llm_int8_skip_modules,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
        )

    def _problems(self) -> Iterator[str]:
        yield from self._below(1, "lora_r")
        yield from self._no_share("lora_dropout")
        if self.lora_target_modules == [] and not self.lora_target_parameters:
            yield "lora_target_modules: empty, so nothing is trained; null leaves the choice to PEFT"
        yield from self._none_of("lora_bias", ("none", "all", "lora_only"))
        if self.q_lora_bits not in (4, 8):
            yield f"q_lora_bits is {self.q_lora_bits}, but has to be 4 or 8"
        yield from self._none_of("bnb_4bit_quant_type", ("fp4", "nf4"))
