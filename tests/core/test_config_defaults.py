"""Fields and defaults are Oumi's, written down here by hand."""

import dataclasses

import pytest

from oumi_pl.core import configs
from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.configs.base_config import as_tree

SPLIT = {
    "datasets": [],
    "collator_name": None,
    "collator_kwargs": {},
    "train_target": None,
    "pack": False,
    "stream": False,
    "target_col": None,
    "mixture_strategy": "first_exhausted",
    "seed": None,
    "use_torchdata": None,
}

DATASET = {
    "dataset_name": "???",
    "dataset_path": None,
    "subset": None,
    "split": "train",
    "dataset_kwargs": {},
    "sample_count": None,
    "mixture_proportion": None,
    "shuffle": False,
    "seed": None,
    "shuffle_buffer_size": 1000,
    "trust_remote_code": False,
    "transform_num_workers": None,
}

MODEL = {
    "model_name": "???",
    "adapter_model": None,
    "adapter_trainable": False,
    "tokenizer_name": None,
    "tokenizer_pad_token": None,
    "tokenizer_kwargs": {},
    "processor_kwargs": {},
    "model_max_length": None,
    "load_pretrained_weights": True,
    "trust_remote_code": False,
    "torch_dtype_str": "auto",
    "compile": False,
    "chat_template": None,
    "chat_template_kwargs": None,
    "attn_implementation": None,
    "device_map": "auto",
    "model_kwargs": {},
    "enable_liger_kernel": False,
    "shard_for_eval": False,
    "freeze_layers": [],
    "text_only": False,
    "model_revision": None,
    "tool_call_parser": None,
}

PROFILER = {
    "save_dir": None,
    "enable_cpu_profiling": False,
    "enable_cuda_profiling": False,
    "record_shapes": False,
    "profile_memory": False,
    "with_stack": False,
    "with_flops": False,
    "with_modules": False,
    "row_limit": 50,
    "schedule": {"enable_schedule": False, "wait": 0, "warmup": 1, "active": 3, "repeat": 1, "skip_first": 1},
}

TRAINING = {
    "use_peft": False,
    "trainer_type": "HF",
    "enable_gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": {},
    "output_dir": "output",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,
    "num_train_epochs": 3,
    "save_epoch": False,
    "save_steps": 500,
    "save_final_model": True,
    "seed": 42,
    "data_seed": 42,
    "use_deterministic": False,
    "full_determinism": False,
    "run_name": None,
    "metrics_function": None,
    "reward_functions": None,
    "reward_function_kwargs": {},
    "log_level": "info",
    "dep_log_level": "warning",
    "log_examples": False,
    "enable_wandb": False,
    "enable_mlflow": False,
    "enable_tensorboard": True,
    "logging_strategy": "steps",
    "logging_dir": None,
    "logging_steps": 50,
    "logging_first_step": False,
    "eval_strategy": "no",
    "eval_steps": 500,
    "learning_rate": 5e-05,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {},
    "warmup_ratio": None,
    "warmup_steps": None,
    "optimizer": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-08,
    "sgd_momentum": 0.0,
    "mixed_precision_dtype": "NONE",
    "compile": False,
    "include_performance_metrics": False,
    "include_alternative_mfu_metrics": False,
    "log_model_summary": False,
    "resume_from_checkpoint": None,
    "try_resume_from_last_checkpoint": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "dataloader_main_process_only": None,
    "ddp_find_unused_parameters": None,
    "max_grad_norm": 1.0,
    "trainer_kwargs": {},
    "verl_config_overrides": {},
    "profiler": PROFILER,
    "telemetry": {
        "telemetry_dir": "telemetry",
        "collect_telemetry_for_all_ranks": False,
        "track_gpu_temperature": False,
    },
    "empty_device_cache_steps": None,
    "nccl_default_timeout_minutes": None,
    "label_ignore_index": None,
}

PEFT = {
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "lora_exclude_modules": None,
    "lora_target_parameters": None,
    "lora_modules_to_save": None,
    "lora_bias": "none",
    "lora_init_weights": "DEFAULT",
    "lora_task_type": "CAUSAL_LM",
    "q_lora": False,
    "q_lora_bits": 4,
    "bnb_4bit_quant_type": "fp4",
    "llm_int8_skip_modules": None,
    "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "float32",
    "peft_save_mode": "ADAPTER_ONLY",
}

FSDP = {
    "enable_fsdp": False,
    "sharding_strategy": "FULL_SHARD",
    "cpu_offload": False,
    "mixed_precision": None,
    "backward_prefetch": "BACKWARD_PRE",
    "forward_prefetch": False,
    "use_orig_params": None,
    "state_dict_type": "FULL_STATE_DICT",
    "auto_wrap_policy": "NO_WRAP",
    "min_num_params": 100000,
    "transformer_layer_cls": None,
    "sync_module_states": True,
}

DEEPSPEED = {
    "enable_deepspeed": False,
    "deepspeed_config_path": None,
    "zero_stage": "ZERO_0",
    "offload_optimizer": None,
    "offload_param": None,
    "precision": None,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_bucket_size": 500000000,
    "allgather_bucket_size": 500000000,
    "allgather_partitions": True,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "stage3_prefetch_bucket_size": 50000000,
    "stage3_param_persistence_threshold": 100000,
    "stage3_max_live_parameters": 1000000000,
    "stage3_max_reuse_distance": 1000000000,
    "stage3_gather_16bit_weights_on_model_save": False,
    "sub_group_size": 1000000000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": True,
    "activation_checkpointing": {},
    "memory_efficient_linear": False,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
}

OFFLOAD = {
    "device": "CPU",
    "pin_memory": True,
    "buffer_count": 4,
    "buffer_count_nvme": 2,
    "block_size": 1048576,
    "queue_depth": 8,
    "single_submit": False,
    "overlap_events": True,
    "thread_count": 1,
}


def test_defaults_of_a_run():
    tree = as_tree(TrainingConfig())
    for elsewhere in ("grpo", "gkd", "gold"):
        assert tree["training"].pop(elsewhere)
    data = {"train": SPLIT, "test": SPLIT, "validation": SPLIT}
    assert tree == {
        "data": data,
        "model": MODEL,
        "training": TRAINING,
        "peft": PEFT,
        "fsdp": FSDP,
        "deepspeed": DEEPSPEED,
    }


@pytest.mark.parametrize(("name", "defaults"), [("DatasetParams", DATASET), ("OffloadConfig", OFFLOAD)])
def test_defaults_of_what_a_run_may_hold(name, defaults):
    assert as_tree(getattr(configs, name)()) == defaults


MEMBERS = {
    "TrainerType": {
        name: name.lower()
        for name in (
            *("TRL_SFT", "TRL_DPO", "TRL_KTO", "TRL_GRPO", "VERL_GRPO", "TRL_GKD"),
            *("HF", "OUMI", "SFT", "DPO", "KTO", "PRETRAIN"),
        )
    },
    "SchedulerType": {
        "LINEAR": "linear",
        "COSINE": "cosine",
        "COSINE_WITH_RESTARTS": "cosine_with_restarts",
        "COSINE_WITH_MIN_LR": "cosine_with_min_lr",
        "CONSTANT": "constant",
    },
    "MixedPrecisionDtype": {"NONE": "none", "FP16": "fp16", "BF16": "bf16"},
    "DatasetSplit": {"TRAIN": "train", "TEST": "test", "VALIDATION": "validation"},
    "MixtureStrategy": {"FIRST_EXHAUSTED": "first_exhausted", "ALL_EXHAUSTED": "all_exhausted"},
    "TrainTarget": {
        "ALL_ASSISTANT_TURNS": "all_assistant_turns",
        "FINAL_ASSISTANT_TURN": "final_assistant_turn",
    },
    "PeftSaveMode": {
        "ADAPTER_ONLY": "adapter_only",
        "ADAPTER_AND_BASE_MODEL": "adapter_and_base_model",
        "MERGED": "merged",
    },
    "LoraWeightInitialization": {
        "DEFAULT": "default",
        "RANDOM": "random",
        "GAUSSIAN": "gaussian",
        "EVA": "eva",
        "PISA": "pissa",
        "PISSA_NITER": "pissa_niter_[number of iters]",
        "LOFTQ": "loftq",
        "OLORA": "olora",
    },
    "ZeRORuntimeStage": {f"ZERO_{stage}": str(stage) for stage in range(4)},
    "DeepSpeedPrecision": {"FP16": "fp16", "BF16": "bf16"},
    "DeepSpeedOffloadDevice": {"CPU": "cpu", "NVME": "nvme"},
}
MEMBERS |= {
    name: {member: member for member in members}
    for name, members in {
        "ShardingStrategy": ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD", "HYBRID_SHARD_ZERO2"),
        "BackwardPrefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
        "StateDictType": ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"),
        "AutoWrapPolicy": ("SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP", "NO_WRAP"),
    }.items()
}


@pytest.mark.parametrize(("name", "members"), MEMBERS.items(), ids=MEMBERS)
def test_members_of_an_enum(name, members):
    assert {member.name: member.value for member in getattr(configs, name)} == members


def test_task_types_are_those_of_peft():
    theirs = pytest.importorskip("peft").TaskType
    assert {member.name: member.value for member in configs.TaskType} == {m.name: m.value for m in theirs}


def test_nothing_is_shared_between_two_configurations():
    one, other = TrainingConfig(), TrainingConfig()
    one.training.trainer_kwargs["beta"] = 0.1
    one.data.train.datasets.append(configs.DatasetParams(dataset_name="d"))
    assert other == TrainingConfig()


def test_every_public_name_is_there():
    assert all(hasattr(configs, name) for name in configs.__all__)
    made = [name for name in vars(configs) if dataclasses.is_dataclass(getattr(configs, name))]
    assert set(made) <= set(configs.__all__)
