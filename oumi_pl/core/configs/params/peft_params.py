"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), and the 4-bit base under them (arXiv:2305.14314)."""

from dataclasses import dataclass
from enum import Enum, StrEnum

from oumi_pl.core.configs.params.base_params import BaseParams, OumiConfigError, harmless, honoured, refused


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
    """Rank of the adapters."""
    lora_alpha: int = honoured("model.lora.lora_alpha", 8)
    """Adapters are scaled by this over the rank."""
    lora_dropout: float = honoured("model.lora.lora_dropout", 0.0)
    """Dropout before the adapters, from 0 to 1."""
    lora_target_modules: list[str] | None = honoured("model.lora.target_modules", None)
    """Modules with adapters, by the end of their names; `[all-linear]`: all linear ones; null: PEFT's choice."""
    lora_exclude_modules: list[str] | None = honoured("model.lora.exclude_modules", None)
    """Regular expressions of modules that get no adapters, whatever the targets say."""
    lora_target_parameters: list[str] | None = honoured("model.lora.target_parameters", None)
    """Parameters with adapters of their own, for fused experts."""
    lora_modules_to_save: list[str] | None = honoured("model.lora.modules_to_save", None)
    """Modules that are trained whole and saved with the adapters."""
    lora_bias: str = honoured("model.lora.bias", "none")
    """Which biases are trained: `none`, `all`, or `lora_only`."""
    lora_init_weights: LoraWeightInitialization = honoured(
        "model.lora.init_lora_weights", LoraWeightInitialization.DEFAULT
    )
    """How adapters begin."""
    lora_task_type: TaskType = refused("causal language models are all that is trained", TaskType.CAUSAL_LM)
    """What the model is for."""
    q_lora: bool = honoured("model.quantization", False)
    """Whether the base is quantized (bitsandbytes)."""
    q_lora_bits: int = honoured("model.quantization", 4)
    """Bits of the quantized base: 4 or 8."""
    bnb_4bit_quant_type: str = honoured("model.quantization", "fp4")
    """Which 4 bits: `fp4` or `nf4`."""
    llm_int8_skip_modules: list[str] | None = refused("all linear layers but the head are quantized", None)
    """Modules that are not quantized."""
    use_bnb_nested_quant: bool = honoured("model.quantization, which nests", False)
    """Whether the quantization's constants are quantized as well."""
    bnb_4bit_quant_storage: str = harmless("it decides on how the 4-bit numbers lie in memory alone", "uint8")
    """Type in which the 4-bit numbers are stored."""
    bnb_4bit_compute_dtype: str = honoured("model.quantization, which computes in bfloat16", "float32")
    """Type in which the 4-bit numbers are computed with."""
    peft_save_mode: PeftSaveMode = honoured("export.merge", PeftSaveMode.ADAPTER_ONLY)
    """What is saved at the end."""

    def _check(self) -> None:
        self._at_least(1, "lora_r")
        self._is_share("lora_dropout")
        if self.lora_target_modules == [] and not self.lora_target_parameters:
            raise OumiConfigError("lora_target_modules: empty, so nothing is trained; null leaves the choice to PEFT")
        self._one_of("lora_bias", ("none", "all", "lora_only"))
        if self.q_lora_bits not in (4, 8):
            raise OumiConfigError(f"q_lora_bits is {self.q_lora_bits}, but has to be 4 or 8")
        self._one_of("bnb_4bit_quant_type", ("fp4", "nf4"))
