"""The configuration of a training run, as Oumi's users write it."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from oumi_pl.core.configs.base_config import BaseConfig
from oumi_pl.core.configs.params.base_params import OumiConfigError
from oumi_pl.core.configs.params.data_params import DataParams, DatasetParams
from oumi_pl.core.configs.params.model_params import DTYPES, ModelParams
from oumi_pl.core.configs.params.peft_params import PeftParams
from oumi_pl.core.configs.params.sharding_params import DeepSpeedParams, FSDPParams
from oumi_pl.core.configs.params.training_params import (
    THROUGH_TRANSFORMERS,
    MixedPrecisionDtype,
    TrainerType,
    TrainingParams,
)

TRL = (TrainerType.TRL_SFT, TrainerType.TRL_DPO)
VISION_COLLATOR = "vision_language_sft"


@dataclass
class TrainingConfig(BaseConfig):
    """All that a run needs to know."""

    data: DataParams = field(default_factory=DataParams)
    """What is trained and evaluated on."""
    model: ModelParams = field(default_factory=ModelParams)
    """Which model is trained, and its tokenizer."""
    training: TrainingParams = field(default_factory=TrainingParams)
    """How long and how fast, and what is logged and saved."""
    peft: PeftParams = field(default_factory=PeftParams)
    """Adapters; read when `training.use_peft` is true."""
    fsdp: FSDPParams = field(default_factory=FSDPParams)
    """Sharding by PyTorch; read when `fsdp.enable_fsdp` is true."""
    deepspeed: DeepSpeedParams = field(default_factory=DeepSpeedParams)
    """Sharding by DeepSpeed; read when `deepspeed.enable_deepspeed` is true."""

    def _check(self) -> None:
        """Looks at the sections together, in Oumi's order, and hands on what one section says for another."""
        self._check_compile()
        self._check_distributed()
        precision = self.training.mixed_precision_dtype
        if precision != MixedPrecisionDtype.NONE and self.model.dtype != "float32":
            raise OumiConfigError(
                f"training.mixed_precision_dtype: {precision.name} needs float32 weights, "
                f"and model.torch_dtype_str is {self.model.torch_dtype_str!r}; make that float32, or this NONE"
            )
        self._hand_on_max_length()
        if self.model.enable_liger_kernel and self.training.trainer_type in THROUGH_TRANSFORMERS:
            self.training.trainer_kwargs["use_liger_kernel"] = True
            self.model.enable_liger_kernel = False
        if self.data.train.collator_name == VISION_COLLATOR:
            self._prepare_for_vision()
        self._hand_on_processor_kwargs()

    def _check_compile(self) -> None:
        if self.model.compile:
            raise OumiConfigError("model.compile: for training, it is training.compile")
        if self.training.compile and self.fsdp.use_orig_params is False:
            raise OumiConfigError("fsdp.use_orig_params: has to be true, or left out, when training.compile is true")

    def _check_distributed(self) -> None:
        if self.fsdp.enable_fsdp and self.deepspeed.enable_deepspeed:
            raise OumiConfigError("deepspeed.enable_deepspeed: fsdp.enable_fsdp is true as well; keep one")
        batch = self.deepspeed.train_batch_size
        if self.deepspeed.enable_deepspeed and self.training.trainer_type in TRL and batch != "auto":
            raise OumiConfigError(
                f"deepspeed.train_batch_size is {batch}, but has to be 'auto' for {self.training.trainer_type.name}, "
                "which counts the rows itself"
            )

    def _hand_on_max_length(self) -> None:
        length, arguments = self.model.model_max_length, self.training.trainer_kwargs
        if length is None or length <= 0 or self.training.trainer_type not in TRL:
            return
        if arguments.get("max_length") not in (None, length):
            warnings.warn(
                f"training.trainer_kwargs.max_length is {arguments['max_length']}, and model.model_max_length "
                f"{length}, which wins",
                stacklevel=2,
            )
        arguments["max_length"] = length

    def _prepare_for_vision(self) -> None:
        """The collator takes whole conversations, and makes of them what TRL would make otherwise."""
        for place, dataset in self._datasets():
            if not dataset.dataset_kwargs.get("return_conversations", True):
                raise OumiConfigError(
                    f"{place}.dataset_kwargs.return_conversations: has to be true, or left out, "
                    f"for collator_name: {VISION_COLLATOR}"
                )
            dataset.dataset_kwargs["return_conversations"] = True
        if self.training.trainer_type != TrainerType.TRL_SFT:
            return
        arguments = self.training.trainer_kwargs
        if arguments.get("remove_unused_columns"):
            raise OumiConfigError(
                "training.trainer_kwargs.remove_unused_columns: has to be false, or left out, "
                f"for collator_name: {VISION_COLLATOR}, which reads those columns"
            )
        arguments["remove_unused_columns"] = False
        arguments["dataset_kwargs"] = {**(arguments.get("dataset_kwargs") or {}), "skip_prepare_dataset": True}

    def _hand_on_processor_kwargs(self) -> None:
        """Datasets that use the model's processor load it as the model does, unless they say otherwise."""
        name = self.model.tokenizer_name or self.model.model_name
        for _, dataset in self._datasets() if self.model.processor_kwargs else ():
            given = dataset.dataset_kwargs
            if given.get("processor_name") == name and "processor_kwargs" not in given:
                given["processor_kwargs"] = dict(self.model.processor_kwargs)

    def _datasets(self) -> Iterator[tuple[str, DatasetParams]]:
        """All datasets of all splits, with their places."""
        splits = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        named = ([(f"data.{s}.datasets[{i}]", d) for i, d in enumerate(p.datasets)] for s, p in splits.items())
        return itertools.chain.from_iterable(named)

    def _finalize(self) -> None:
        strategy = self.training.eval_strategy
        if strategy != "no" and not self.data.validation.datasets:
            raise OumiConfigError(
                f"training.eval_strategy: {strategy!r} needs a dataset in data.validation, and there is none"
            )
        storage = self.peft.bnb_4bit_quant_storage
        quantized = self.training.use_peft and self.peft.q_lora and self.fsdp.enable_fsdp
        if quantized and (self.model.dtype is None or DTYPES.get(storage.lower()) != self.model.dtype):
            raise OumiConfigError(
                f"peft.bnb_4bit_quant_storage: {storage!r} differs from model.torch_dtype_str, "
                f"{self.model.torch_dtype_str!r}; to shard a quantized base both have to be the same type, not 'auto'"
            )
