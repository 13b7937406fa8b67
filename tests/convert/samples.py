"""A value for each key that the converters translate, other than its default."""

TRAINING = {
    "learning_rate": 0.5, "optim": "sgd", "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3,
    "weight_decay": 0.5, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 7,
    "warmup_ratio": 0.7, "per_device_train_batch_size": 7, "per_device_eval_batch_size": 9,
    "gradient_accumulation_steps": 9, "max_grad_norm": 0.5, "num_train_epochs": 5, "max_steps": 55, "bf16": True,
    "fp16": True, "seed": 7, "output_dir": "a/b", "gradient_checkpointing": False, "save_strategy": "epoch",
    "save_steps": 77, "save_total_limit": 7, "load_best_model_at_end": True, "metric_for_best_model": "acc",
    "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 77, "report_to": "wandb",
    "deepspeed": "zero3.json", "fsdp": "full_shard", "fsdp_config": {"offload_params": True},
    "accelerator_config": {"even_batches": True}, "dataloader_num_workers": 3, "label_smoothing_factor": 0.1,
    "group_by_length": True, "train_sampling_strategy": "group_by_length",
}  # fmt: skip
"""Arguments of transformers' `TrainingArguments`."""

AXOLOTL = {
    "base_model": "org/other", "tokenizer_config": "org/tok", "revision_of_model": "x", "trust_remote_code": True,
    "attn_implementation": "eager", "adapter": "lora", "load_in_4bit": True, "load_in_8bit": True, "lora_r": 3,
    "lora_alpha": 5, "lora_dropout": 0.3, "lora_modules_to_save": ["lm_head"], "lora_target_modules": ["q_proj"],
    "lora_target_linear": True, "lora_target_parameters": ["a"], "lora_exclude_modules": ["a"], "peft_use_rslora": True,
    "peft_use_dora": True, "peft_init_lora_weights": "gaussian", "lora_rank_pattern": {"a": 2},
    "lora_alpha_pattern": {"a": 2}, "peft_layers_to_transform": [1], "peft_layers_pattern": "l", "lora_model_dir": "d",
    "loraplus_lr_ratio": 3, "embedding_lr": 1e-3, "embedding_lr_scale": 2, "model_quantization_config": "Mxfp4Config",
    "model_quantization_config_kwargs": {"dequantize": True}, "float16": True, "bfloat16": True, "adam_eps": 1e-3,
    "cosine_min_lr_ratio": 0.1, "eta_min": 1e-6, "cosine_constant_lr_ratio": 0.5, "lr_quadratic_warmup": True,
    "rl": "orpo", "reward_model": True, "num_labels": 2, "batch_size": 8, "model_config": {"a": 1}, "rl_beta": 0.3,
    "orpo_alpha": 0.3, "simpo_gamma": 0.7, "cpo_alpha": 0.5, "dpo_label_smoothing": 0.1, "dpo_loss_type": ["hinge"],
    "trl": {"beta": 0.3}, "kto_desirable_weight": 2, "kto_undesirable_weight": 2, "center_rewards_coefficient": 0.1,
    "datasets": [{"path": "z", "type": "alpaca"}], "pretraining_dataset": "z", "test_datasets": [{"path": "z"}],
    "val_set_size": 0.2, "sequence_len": 100, "excess_length_strategy": "truncate", "sample_packing": True,
    "pretrain_multipack_attn": False, "train_on_inputs": True, "chat_template": "gemma3",
    "chat_template_jinja": "a.jinja", "chat_template_kwargs": {"a": 1}, "special_tokens": {"pad_token": "x"},
    "tokens": ["a"], "dataset_exact_deduplication": True, "streaming": True, "shuffle_merged_datasets": False,
    "sample_packing_sequentially": True, "curriculum_sampling": True, "evals_per_epoch": 3, "saves_per_epoch": 2,
    "unfrozen_parameters": ["a"], "use_eaft": True, "eaft_alpha": 2.0, "eaft_k": 3, "early_stopping_patience": 2,
    "dp_shard_size": 2, "dp_replicate_size": 2, "tensor_parallel_size": 2, "context_parallel_size": 2,
    "wandb_project": "a", "use_wandb": True, "use_tensorboard": True, "use_mlflow": True, "mlflow_tracking_uri": "a",
    "streaming_multipack_buffer_size": 9, "expert_parallel_size": 2,
    "fp8": True, "min_sample_len": 3, "optimizer": "sgd", "lr_scheduler": "linear", "micro_batch_size": 7,
    "eval_batch_size": 9, "num_epochs": 5,
}  # fmt: skip

LLAMA_FACTORY = {
    "model_name_or_path": "o/o", "adapter_name_or_path": "a/b", "model_revision": "x", "trust_remote_code": True,
    "stage": "pt", "finetuning_type": "freeze", "lora_rank": 3, "lora_alpha": 5, "lora_dropout": 0.3,
    "lora_target": "q_proj", "additional_target": "lm_head", "use_rslora": True, "use_dora": True,
    "create_new_adapter": True, "loraplus_lr_ratio": 3, "quantization_bit": 4, "quantization_type": "fp4",
    "double_quantization": False, "quantization_method": "hqq", "pure_bf16": True, "use_muon": True,
    "disable_gradient_checkpointing": True, "pref_beta": 0.3, "pref_loss": "ipo", "pref_ftx": 0.4,
    "dpo_label_smoothing": 0.1, "simpo_gamma": 0.9, "ld_alpha": 0.5, "kto_chosen_weight": 2, "kto_rejected_weight": 2,
    "ref_model": "r", "dataset": "chats", "dataset_dir": "ONLINE", "mix_strategy": "interleave_under",
    "interleave_probs": "1.0", "max_samples": 4, "eval_dataset": "instructions", "val_size": 0.2, "template": "gemma",
    "enable_thinking": False, "cutoff_len": 99, "train_on_prompt": True, "mask_history": True, "packing": False,
    "neat_packing": True, "streaming": True, "buffer_size": 9, "add_tokens": "a", "add_special_tokens": "b",
    "freeze_trainable_layers": 5, "freeze_trainable_modules": "mlp", "use_llama_pro": True, "use_dft_loss": True,
    "use_eaft_loss": True, "eaft_alpha": 3.0, "early_stopping_steps": 3, "preprocessing_num_workers": 3, "fp8": True,
    "disable_shuffling": True, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
    "context_parallel_size": 2, "expert_model_parallel_size": 2, "use_megatron_bridge": True,
}  # fmt: skip

LLAMA_FACTORY_V1 = {
    "model": "o/o", "train_dataset": "o/t", "peft_config": {"name": "lora"}, "quant_config": {"name": "bnb"},
    "optim_config": {"name": "muon"}, "dist_config": {"name": "fsdp2", "offload_params": True}, "micro_batch_size": 3,
    "global_batch_size": 12, "enable_activation_checkpointing": False, "save_epochs": 2, "custom_chat_template": "x",
    "mp_replicate_size": 2, "mp_shard_size": 4, "dp_size": 4, "cp_size": 2, "bf16": False,
}  # fmt: skip

TRL = {
    "model_name_or_path": "o/o", "model": "o/p", "model_revision": "x", "dtype": "bfloat16", "torch_dtype": "float16",
    "attn_implementation": "eager", "trust_remote_code": True, "use_peft": True, "lora_r": 3, "lora_alpha": 5,
    "lora_dropout": 0.3, "lora_target_modules": ["q_proj"], "lora_target_parameters": ["a"],
    "lora_modules_to_save": ["lm_head"], "use_rslora": True, "use_dora": True, "load_in_4bit": True,
    "load_in_8bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "dataset_name": "o/q",
    "datasets": [{"path": "a"}], "dataset_config": "c", "dataset_train_split": "s", "dataset_test_split": "ss",
    "max_length": 77, "pad_token": "p", "packing": True, "dataset_text_field": "body", "completion_only_loss": True,
    "assistant_only_loss": True, "chat_template_path": "a.jinja", "loss_type": "ipo",
    "packing_strategy": "wrapped", "truncation_mode": "keep_end", "beta": 0.5,
    "loss_weights": [2.0], "label_smoothing": 0.1, "discopop_tau": 0.1, "ld_alpha": 0.5, "sync_ref_model": True,
    "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.1, "desirable_weight": 2.0, "undesirable_weight": 2.0,
    "center_rewards_coefficient": 0.1, "f_divergence_type": "js", "accelerate_config": "zero3", "config_file": "x.yaml",
    "num_processes": 4, "num_machines": 2, "launcher": "--multi_gpu",
}  # fmt: skip
