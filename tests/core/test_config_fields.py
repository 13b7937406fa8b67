"""What has to hold of a value, and the one message that says what does not."""

import pytest

from tests.core.oumi_yaml import load, refused

COMPLETIONS = "data.train.collator_name=text_completions_only_with_padding"

FIELDS = {
    "accumulation": (
        ["training.gradient_accumulation_steps=0"],
        "training.gradient_accumulation_steps is 0, but has to be at least 1",
    ),
    "train batch": (
        ["training.per_device_train_batch_size=0"],
        "training.per_device_train_batch_size is 0, but has to be at least 1",
    ),
    "eval batch": (
        ["training.per_device_eval_batch_size=-1"],
        "training.per_device_eval_batch_size is -1, but has to be at least 1",
    ),
    "length": (
        ["training.max_steps=0", "training.num_train_epochs=0"],
        "training.max_steps is 0 and num_train_epochs 0, so there is nothing to train; one of them has to be positive",
    ),
    "clipping": (
        ["training.max_grad_norm=-0.5"],
        "training.max_grad_norm is -0.5, but has to be at least 0, which clips nothing",
    ),
    "output_dir": (["training.output_dir=''"], "training.output_dir: empty, but there has to be a folder to write to"),
    "workers": (
        ["training.dataloader_num_workers='4'"],
        "training.dataloader_num_workers: '4' is not an int or 'auto'",
    ),
    "warmup_ratio": (
        ["training.warmup_ratio=3"],
        "training.warmup_ratio is 3, but has to be between 0 and 1; warmup_steps counts updates",
    ),
    "warmup_steps": (["training.warmup_steps=-1"], "training.warmup_steps is -1, but has to be at least 0"),
    "two warmups": (
        ["training.trainer_type=OUMI", "training.warmup_ratio=0.1", "training.warmup_steps=3"],
        "training.warmup_ratio: warmup_steps is given as well; keep one",
    ),
    "logging_strategy": (
        ["training.logging_strategy=step"],
        "training.logging_strategy: 'step' is not a valid value; did you mean 'steps'?",
    ),
    "eval_strategy": (
        ["training.eval_strategy=epochs"],
        "training.eval_strategy: 'epochs' is not a valid value; did you mean 'epoch'?",
    ),
    "whole eval_steps": (
        ["training.eval_steps=1.0"],
        "training.eval_steps is 1.0, but has to be an int, or a share between 0 and 1",
    ),
    "fractional eval_steps": (
        ["training.eval_steps=0.1", "training.trainer_type=OUMI"],
        "training.eval_steps is 0.1, but for trainer_type: OUMI it has to be an int",
    ),
    "no eval_steps": (
        ["training.eval_steps=0", "training.eval_strategy=steps"],
        "training.eval_steps is 0, but has to be at least 1",
    ),
    "rewards": (
        ["training.reward_functions=[f]"],
        "training.reward_functions: is for TRL_GRPO and VERL_GRPO; remove it",
    ),
    "reward arguments": (
        ["training.reward_function_kwargs.a=1"],
        "training.reward_function_kwargs: is for TRL_GRPO and VERL_GRPO; remove it",
    ),
    "verl": (
        ["training.verl_config_overrides.a=1"],
        "training.verl_config_overrides: is for VERL_GRPO; remove it",
    ),
    "grpo": (
        ["training.grpo.temperature=1.5"],
        "training.grpo.temperature is 1.5, but has to be between 0 and 1",
    ),
    "gkd": (
        ["training.gkd.lmbda=1.5"],
        "training.gkd.lmbda is 1.5, but has to be between 0 and 1",
    ),
    "gold": (
        ["training.gold.top_k=3"],
        "training.gold.top_k: GOLD is not among the trainer types here; remove the section",
    ),
    "twice, same name": (
        ["training.trainer_kwargs.learning_rate=1"],
        "training.trainer_kwargs.learning_rate: is set by training.learning_rate",
    ),
    "twice, other name": (
        ["training.trainer_kwargs.bf16=true", "training.trainer_type=TRL_DPO"],
        "training.trainer_kwargs.bf16: is set by training.mixed_precision_dtype",
    ),
    "fixed": (
        ["training.trainer_kwargs.push_to_hub=true"],
        "training.trainer_kwargs.push_to_hub: is fixed, and can't be set",
    ),
    "profiler": (["training.profiler.schedule.wait=-1"], "training.profiler.schedule.wait is -1, but has to be at"),
    "profiler active": (
        ["training.profiler.schedule.active=0"],
        "training.profiler.schedule.active is 0, but has to be at least 1",
    ),
    "sample_count": (
        ["data.train.datasets=[{dataset_name: c}, {dataset_name: d, sample_count: -1}]"],
        "data.train.datasets[1].sample_count is -1, but has to be at least 0",
    ),
    "proportion": (
        ["data.train.datasets=[{dataset_name: d, mixture_proportion: 1.5}]"],
        "data.train.datasets[0].mixture_proportion is 1.5, but has to be between 0 and 1",
    ),
    "some proportions": (
        ["data.train.datasets=[{dataset_name: c, mixture_proportion: 1}, {dataset_name: d}]"],
        "data.train.datasets[1].mixture_proportion: missing; give it to all datasets or to none",
    ),
    "sum of proportions": (
        ["data.validation.datasets=[{dataset_name: c, mixture_proportion: 0.5}, "
         "{dataset_name: d, mixture_proportion: 0.4}]"],
        "data.validation.datasets: the mixture_proportion of all sum to 0.9, but have to sum to 1",
    ),
    "transform workers": (
        ["data.train.datasets[0].transform_num_workers=0"],
        "data.train.datasets[0].transform_num_workers: 0 is not a positive int or 'auto'",
    ),
    "transform workers, text": (
        ["data.train.datasets[0].transform_num_workers=many"],
        "data.train.datasets[0].transform_num_workers: 'many' is not a positive int or 'auto'",
    ),
    "dataset_kwargs": (
        ["data.train.datasets[0].dataset_kwargs.split=test"],
        "data.train.datasets[0].dataset_kwargs.split: belongs one level higher, beside dataset_kwargs",
    ),
    "train_target": (
        ["data.train.train_target=ALL_ASSISTANT_TURNS"],
        "data.train.train_target: needs collator_name: text_completions_only_with_padding beside it",
    ),
    "collator": (
        ["data.train.collator_name=text_with_pading"],
        "data.train.collator_name: 'text_with_pading' is not a valid value; did you mean 'text_with_padding'?",
    ),
    "mixture_strategy": (
        ["data.train.mixture_strategy=ALL_EXHAUSTED"],
        "data.train.mixture_strategy: 'ALL_EXHAUSTED' is not a valid value; did you mean 'all_exhausted'?",
    ),
    "dtype": (
        ["model.torch_dtype_str=bfloat61"],
        "model.torch_dtype_str: 'bfloat61' is not a valid value; did you mean 'bfloat16'?",
    ),
    "processor_kwargs": (
        ["model.processor_kwargs.model_name=x"],
        "model.processor_kwargs.model_name: belongs one level higher, beside processor_kwargs",
    ),
    "two revisions": (
        ["model.model_kwargs.revision=a", "model.model_revision=b"],
        "model.model_kwargs.revision: 'a', but model_revision is 'b'",
    ),
    "rank": (["peft.lora_r=0"], "peft.lora_r is 0, but has to be at least 1"),
    "dropout": (["peft.lora_dropout=1.5"], "peft.lora_dropout is 1.5, but has to be between 0 and 1"),
    "no targets": (
        ["peft.lora_target_modules=[]"],
        "peft.lora_target_modules: empty, so nothing is trained; null leaves the choice to PEFT",
    ),
    "bias": (["peft.lora_bias=al"], "peft.lora_bias: 'al' is not a valid value; did you mean 'all'?"),
    "bits": (["peft.q_lora_bits=3"], "peft.q_lora_bits is 3, but has to be 4 or 8"),
    "quantization": (
        ["peft.bnb_4bit_quant_type=nf5"],
        "peft.bnb_4bit_quant_type: 'nf5' is not a valid value; did you mean 'nf4'?",
    ),
    "fsdp precision": (
        ["fsdp.mixed_precision=bf61"],
        "fsdp.mixed_precision: 'bf61' is not a valid value; did you mean 'bf16'?",
    ),
    "offloaded weights": (
        ["deepspeed.zero_stage=ZERO_2", "deepspeed.offload_param.device=NVME"],
        "deepspeed.offload_param: needs zero_stage: ZERO_3, and it is ZERO_2",
    ),
    "offloaded optimizer": (
        ["deepspeed.offload_optimizer={}"],
        "deepspeed.offload_optimizer: needs zero_stage: ZERO_1, ZERO_2 or ZERO_3, and it is ZERO_0",
    ),
    "bucket": (
        ["deepspeed.reduce_bucket_size=large"],
        "deepspeed.reduce_bucket_size: 'large' is not an int or 'auto'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("typed", "message"), FIELDS.values(), ids=FIELDS)
def test_a_wrong_value_is_refused(typed, message):
    assert refused(load, *typed).startswith(message)


ACCEPTED = {
    "no clipping": ("training.max_grad_norm=null",),
    "epochs": ("training.max_steps=-1", "training.num_train_epochs=1"),
    "steps": ("training.max_steps=1", "training.num_train_epochs=0"),
    "a share of the steps": ("training.eval_steps=0.1", "training.trainer_type=TRL_SFT"),
    "no eval_steps, unused": ("training.eval_steps=0",),
    "both warmups of TRL": (
        "training.trainer_type=TRL_SFT",
        "training.warmup_ratio=0.1",
        "training.warmup_steps=3",
    ),
    "workers": ("training.dataloader_num_workers=auto", "data.train.datasets[0].transform_num_workers=auto"),
    "rewards of nothing": ("training.reward_functions=['']",),
    "proportions": (
        "data.train.datasets=[{dataset_name: c, mixture_proportion: 0.1}, "
        "{dataset_name: d, mixture_proportion: 0.2}, {dataset_name: e, mixture_proportion: 0.7}]",
    ),
    "no rows": ("data.train.datasets[0].sample_count=0",),
    "target": (COMPLETIONS, "data.train.train_target=FINAL_ASSISTANT_TURN"),
    "parameters as targets": ("peft.lora_target_modules=[]", "peft.lora_target_parameters=[experts.gate]"),
    "Oumi's arguments, trainers that read none": ("training.trainer_type=OUMI", "training.trainer_kwargs.bf16=true"),
    "offloaded optimizer": ("deepspeed.offload_optimizer={}", "deepspeed.zero_stage=ZERO_1"),
    "a section that is not here, as it is by default": ("training.grpo.temperature=0.9", "training.gold.top_p=0.95"),
}


@pytest.mark.parametrize("typed", ACCEPTED.values(), ids=ACCEPTED)
def test_a_right_value_is_accepted(typed):
    load(*typed).finalize_and_validate()
