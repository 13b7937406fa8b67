"""The configuration of a training run, as Oumi's users write it."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from oumi_pl.core.configs.base_config import BaseConfig
from oumi_pl.core.configs.params.data_params import DataParams, DatasetParams, DatasetSplit
from oumi_pl.core.configs.params.model_params import DTYPES, ModelParams
from oumi_pl.core.configs.params.peft_params import PeftParams
from oumi_pl.core.configs.params.sharding_params import DeepSpeedParams, FSDPParams
from oumi_pl.core.configs.params.training_params import (
    THROUGH_TRANSFORMERS,
    MixedPrecisionDtype,
    TrainerType,
    TrainingParams,
)

TRL = (
    *(TrainerType.TRL_SFT, TrainerType.TRL_DPO, TrainerType.TRL_KTO, TrainerType.TRL_GKD),
    TrainerType.TRL_GRPO,
)
WITH_MAX_LENGTH = TRL[:4]
"""Types whose TRL config has `max_length`."""
VISION_COLLATOR = "vision_language_sft"


@dataclass
class TrainingConfig(BaseConfig):
    """All that a run needs to know."""

    data: DataParams = field(default_factory=DataParams)
    model: ModelParams = field(default_factory=ModelParams)
    training: TrainingParams = field(default_factory=TrainingParams)
    peft: PeftParams = field(default_factory=PeftParams)
    fsdp: FSDPParams = field(default_factory=FSDPParams)
    deepspeed: DeepSpeedParams = field(default_factory=DeepSpeedParams)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are divided among devices, by FSDP or by DeepSpeed's ZeRO."""
        return self.fsdp.enable_fsdp or self.deepspeed.shards

    def _problems(self) -> Iterator[str]:
        """What contradicts between sections, in Oumi's order."""
        training, model, fsdp = self.training, self.model, self.fsdp
        if model.compile:
            yield "model.compile: for training, it is training.compile"
        if training.compile and fsdp.use_orig_params is False:
            yield "fsdp.use_orig_params: has to be true, or left out, when training.compile is true"
        if fsdp.enable_fsdp and self.deepspeed.enable_deepspeed:
            yield "deepspeed.enable_deepspeed: fsdp.enable_fsdp is true as well; keep one"
        batch = self.deepspeed.train_batch_size
        if self.deepspeed.enable_deepspeed and training.trainer_type in TRL and batch != "auto":
            needed = f"'auto' for {training.trainer_type.name}, which counts the rows itself"
            yield f"deepspeed.train_batch_size is {batch}, but has to be {needed}"
        precision = training.mixed_precision_dtype
        if precision != MixedPrecisionDtype.NONE and model.dtype != "float32":
            yield (
                f"training.mixed_precision_dtype: {precision.name} needs float32 weights, "
                f"and model.torch_dtype_str is {model.torch_dtype_str!r}; make that float32, or this NONE"
            )
        if self.data.train.collator_name == VISION_COLLATOR:
            yield from self._vision_problems()

    def _vision_problems(self) -> Iterator[str]:
        for place, dataset in self._datasets():
            if not dataset.dataset_kwargs.get("return_conversations", True):
                option = f"{place}.dataset_kwargs.return_conversations"
                yield f"{option}: has to be true, or left out, for collator_name: {VISION_COLLATOR}"
        if self.training.trainer_type == TrainerType.TRL_SFT and self._kwargs.get("remove_unused_columns"):
            option = "training.trainer_kwargs.remove_unused_columns"
            yield f"{option}: has to be false, or left out, for {VISION_COLLATOR}, which reads those columns"

    def _settle(self) -> None:
        """Copies what one section says for another."""
        model, training, length = self.model, self.training, self.model.model_max_length
        if length is not None and length > 0 and training.trainer_type in WITH_MAX_LENGTH:
            if (given := self._kwargs.get("max_length")) not in (None, length):
                message = (
                    f"training.trainer_kwargs.max_length is {given}, and model.model_max_length {length}, which wins"
                )
                warnings.warn(message, stacklevel=2)
            self._kwargs["max_length"] = length
        if model.enable_liger_kernel and training.trainer_type in THROUGH_TRANSFORMERS:
            self._kwargs["use_liger_kernel"] = True
            model.enable_liger_kernel = False
        # the collator takes whole conversations, and does what TRL would do to them otherwise
        if self.data.train.collator_name == VISION_COLLATOR:
            for _, dataset in self._datasets():
                dataset.dataset_kwargs["return_conversations"] = True
            if training.trainer_type == TrainerType.TRL_SFT:
                prepared = {**(self._kwargs.get("dataset_kwargs") or {}), "skip_prepare_dataset": True}
                self._kwargs.update(remove_unused_columns=False, dataset_kwargs=prepared)
        # datasets that use the model's processor load it as the model does, unless they say otherwise
        name = model.tokenizer_name or model.model_name
        for _, dataset in self._datasets() if model.processor_kwargs else ():
            if dataset.dataset_kwargs.get("processor_name") == name:
                dataset.dataset_kwargs.setdefault("processor_kwargs", dict(model.processor_kwargs))

    @property
    def _kwargs(self) -> dict[str, Any]:
        return self.training.trainer_kwargs

    def _datasets(self) -> Iterator[tuple[str, DatasetParams]]:
        """All datasets of all splits, with their places."""
        for split in DatasetSplit:
            for i, dataset in enumerate(self.data.get_split(split).datasets):
                yield f"data.{split.value}.datasets[{i}]", dataset

    def _final_problems(self) -> Iterator[str]:
        strategy = self.training.eval_strategy
        if strategy != "no" and not self.data.validation.datasets:
            yield f"training.eval_strategy: {strategy!r} needs a dataset in data.validation, and there is none"
        storage = self.peft.bnb_4bit_quant_storage
        quantized = self.training.use_peft and self.peft.q_lora and self.fsdp.enable_fsdp
        if quantized and (self.model.dtype is None or DTYPES.get(storage.lower()) != self.model.dtype):
            yield (
                f"peft.bnb_4bit_quant_storage: {storage!r} differs from model.torch_dtype_str, "
                f"{self.model.torch_dtype_str!r}; to shard a quantized base both have to be the same type, not 'auto'"
            )
