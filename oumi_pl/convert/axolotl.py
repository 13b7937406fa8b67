"""axolotl's YAML as a recipe. What each key means was read in its sources (`schemas`, `core/builders`, `loaders`)."""

from collections.abc import Mapping
from typing import Any

from oumi_pl.convert import training
from oumi_pl.convert.axolotl_data import data
from oumi_pl.convert.settings import Keys, Settings
from oumi_pl.convert.training import LORA, MODEL, SPEED, VALIDATION, is_on
from oumi_pl.core.recipe.notes import given

IMAGES = "images and audio are not trained on"
OTHER_TRAINER = "this trainer type has no counterpart"
NO_SUCH_METHOD = "this method changes what is trained and has no counterpart"

OTHER_NAMES = {
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
}

TRANSLATED = {
    training_name: place for training_name, place in training.NAMES.items() if training_name not in OTHER_NAMES
}
TRANSLATED |= {OTHER_NAMES[name]: training.NAMES[name] for name in OTHER_NAMES if name in training.NAMES}
TRANSLATED |= {
    "base_model": "model.model",
    "tokenizer_config": "data.tokenizer",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attn",
    "adapter": "model.lora",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save", "lora_target_*"), "model.lora"),
    **dict.fromkeys(("lora_exclude_modules", "peft_use_rslora", "peft_use_dora"), "model.lora"),
    **dict.fromkeys(("peft_init_lora_weights", "lora_rank_pattern", "lora_alpha_pattern"), "model.lora"),
    **dict.fromkeys(("peft_layers_to_transform", "peft_layers_pattern"), "model.lora"),
    "lora_model_dir": "model.model",
    **dict.fromkeys(("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale"), "model.groups"),
    **dict.fromkeys(("model_quantization_config", "model_quantization_config_kwargs"), "model.config"),
    **dict.fromkeys(("float16", "bfloat16"), "model.dtype"),
    "adam_eps": "model.optimizer.eps",
    **dict.fromkeys(("cosine_min_lr_ratio", "eta_min"), "model.schedule.floor"),
    **dict.fromkeys(("cosine_constant_lr_ratio", "lr_quadratic_warmup"), "model.schedule"),
    "rl": "model.class_path",
    **dict.fromkeys(("reward_model", "num_labels"), "model.class_path Reward"),
    "batch_size": "trainer.accumulate_grad_batches",
    "model_config": "model.config",
    **dict.fromkeys(("rl_beta", "orpo_alpha", "simpo_gamma", "cpo_alpha", "dpo_label_smoothing"), "model.loss"),
    **dict.fromkeys(("dpo_loss_type", "trl"), "model.loss"),
    **dict.fromkeys(
        ("kto_desirable_weight", "kto_undesirable_weight"), "model.desirable_weight and undesirable_weight"
    ),
    "center_rewards_coefficient": "model.loss.center_rewards_coefficient",
    **dict.fromkeys(("datasets", "pretraining_dataset"), "data.train"),
    **dict.fromkeys(("test_datasets", "val_set_size"), "data.validation"),
    "sequence_len": "data.max_length",
    "excess_length_strategy": "data.overflow",
    "sample_packing": "data.packing",
    "pretrain_multipack_attn": "data.isolate",
    "train_on_inputs": "data.train_on",
    **dict.fromkeys(("chat_template", "chat_template_jinja"), "data.template"),
    "chat_template_kwargs": "data.template_variables",
    **dict.fromkeys(("special_tokens", "tokens"), "data.pad_token and tokens"),
    "dataset_exact_deduplication": "data.duplicates",
    "streaming": "data.streaming",
    "streaming_multipack_buffer_size": "data.shuffle_buffer",
    **dict.fromkeys(("shuffle_merged_datasets", "sample_packing_sequentially", "curriculum_sampling"), "data.train"),
    "evals_per_epoch": "trainer.val_check_interval",
    "saves_per_epoch": "checkpoint.every",
    "unfrozen_parameters": "trainer.callbacks, TrainOnly",
    **dict.fromkeys(("use_eaft", "eaft_alpha", "eaft_k"), "model.loss"),
    "early_stopping_patience": "trainer.callbacks, EarlyStopping",
    **dict.fromkeys(("dp_shard_size", "dp_replicate_size", "tensor_parallel_size"), "trainer.strategy"),
    "expert_parallel_size": "trainer.strategy",
    "context_parallel_size": "the rows of each device",
    **dict.fromkeys(("wandb_project", "use_wandb", "use_tensorboard", "use_mlflow", "mlflow_tracking_uri"), "logger"),
    "plugins": "each by its name",
    **dict.fromkeys(("fp8", "min_sample_len"), "a comment"),
}
"""Key -> key of the recipe."""

WITHOUT_EFFECT = training.WITHOUT_EFFECT | {
    **dict.fromkeys(("gradient_checkpointing_kwargs", "flash_*", "flex_*", "sdp_attention", "xformers_*"), SPEED),
    **dict.fromkeys(
        (
            "fsdp_version",
            "fsdp_final_state_dict_type",
            "liger_*",
            "cut_cross_entropy",
            "lora_*_kernel",
            "use_kernels",
            "fused_*",
        ),
        SPEED,
    ),
    **dict.fromkeys(("use_scattermoe", "use_sonicmoe", "experts_implementation", "quantize_moe_experts"), SPEED),
    **dict.fromkeys(
        ("tiled_mlp*", "activation_offloading", "torchdistx_path", "device_map", "gpu_memory_limit"), SPEED
    ),
    **dict.fromkeys(
        ("expert_parallel_*", "heads_k_stride", "ring_attn_func", "ddp*", "use_ray", "ray_*", "dataset_num_proc"),
        SPEED,
    ),
    **dict.fromkeys(
        ("dataset_processes", "dataset_keep_in_memory", "eval_sample_packing", "pad_to_sequence_len"), SPEED
    ),
    **dict.fromkeys(("sample_packing_*", "max_packed_sequence_len", "total_num_tokens", "group_by_length_*"), SPEED),
    **dict.fromkeys(
        ("dataset_num_proc", "bnb_config_kwargs", "gptq_*", "use_dsv4_kernels", "use_glm_dsa_kernels", "dsv4_*"), SPEED
    ),
    **dict.fromkeys(("gemma4_hybrid_attn_impl", "llama4_linearized_experts", "streaming_multipack_*"), SPEED),
    **dict.fromkeys(("experimental_skip_move_to_device", "fp8_*", "torch_dtype", "use_onebitllms_*"), SPEED),
    **dict.fromkeys(("wandb_*", "mlflow_*", "comet_*", "swanlab_*", "use_swanlab", "trackio_*"), training.LOGS),
    **dict.fromkeys(
        ("use_otel_metrics", "otel_*", "loss_watchdog_*", "eval_table_size", "eval_max_new_tokens"), training.LOGS
    ),
    **dict.fromkeys(("do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval"), training.LOGS),
    **dict.fromkeys(
        ("hub_model_id", "push_dataset_to_hub", "hf_use_auth_token", "dataset_prepared_path"), training.HUB
    ),
    **dict.fromkeys(("auto_resume_from_checkpoints", "save_only_model", "save_safetensors"), training.RESUME),
    "dataset_prepared_path": "tokenized rows are cached in any case",
    "push_dataset_to_hub": "tokenized rows stay on this machine",
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "cls_model_config"),
        "model and tokenizer are of the classes that their files name",
    ),
    "tokenizer_use_mistral_common": "the tokenizer is transformers' of the same vocabulary",
    "base_model_ignore_patterns": "only files of weights that are read are fetched",
    "resize_token_embeddings_to_32x": "the embeddings have a row for each token",
    **dict.fromkeys(
        ("strict", "debug", "skip_prepare_dataset", "is_*_derived_model", "test_value", "full_finetune"),
        "it decides on nothing that is trained",
    ),
    "freeze_mm_modules": "the text alone is trained",
    "report_to": training.LOGS,
    **dict.fromkeys(("train_sampling_strategy", "context_parapllel_size"), "axolotl does not read it"),
    "default_system_message": "it replaces a text that no template of axolotl has",
    "eot_tokens": "the end of a turn is where the template ends it",
    "reinit_weights": "it belongs to pretraining from random weights",
    "gptq": "it is off",
    "lora_fan_in_fan_out": "PEFT finds it out",
    "nvfp4_merge_aware": "it decides on merging",
    "evaluation_strategy": "there is a validation wherever data.validation is set",
}
"""Key -> why nothing that is trained depends on it."""

REFUSED = training.REFUSED | {
    **dict.fromkeys(("processor_type", "image_*"), IMAGES),
    **dict.fromkeys(("process_reward_model", "ebft", "diffusion", "vllm", "kd_*"), OTHER_TRAINER),
    **dict.fromkeys(
        ("relora*", "jagged_*", "lisa_*", "qat", "llmcompressor", "lr_groups", "neftune_*"), NO_SUCH_METHOD
    ),
    "dpo_use_weighting": "weights by the probability of responses (WPO) have no counterpart",
    "rl_adv_coef": OTHER_TRAINER,
    **dict.fromkeys(("noisy_embedding_alpha", "peft", "rex", "loss_*"), NO_SUCH_METHOD),
    **dict.fromkeys(("use_onebitllms",), NO_SUCH_METHOD),
    "gptq": "weights quantized by GPTQ are not trained on; name the model in full precision and adapter: qlora",
    "reinit_weights": "leave base_model out of the recipe and give its shape as model.config",
    "tokenizer_save_jinja_files": "the template is saved in the tokenizer's files",
}
WITHOUT_EFFECT = {key: why for key, why in WITHOUT_EFFECT.items() if key not in REFUSED}

NULL = dict.fromkeys(("bf16", "shuffle_merged_datasets", "pretrain_multipack_attn"), False)
"""Key that is on by default -> what null means: axolotl fills its defaults in first, and then leaves null keys out."""

TRANSLATED = {key: place for key, place in TRANSLATED.items() if key not in WITHOUT_EFFECT}

KEYS = Keys("axolotl", TRANSLATED, WITHOUT_EFFECT, REFUSED, OTHER_NAMES, NULL)

PLUGINS = {
    "cut_cross_entropy": SPEED,
    "liger": SPEED,
    "kernels": SPEED,
    "expert_parallel": SPEED,
    "swanlab": training.LOGS,
}
"""Part of a plugin's path -> why nothing depends on it; others are refused."""

RL = {None: "SFT", "dpo": "DPO", "ipo": "DPO", "simpo": "DPO", "orpo": "DPO", "kto": "KTO"}
"""`rl` -> trainer type."""


def recipe(values: Mapping[str, Any], devices: int | None = None) -> tuple[dict[str, Any], Settings]:
    """The recipe that trains what axolotl trains with a config, and the notes on it.

    Raises:
        UserError: something has no counterpart.
    """
    settings = Settings(_today(values), KEYS)
    if rows := settings.get("batch_size"):  # of an update, for each device
        settings.values["gradient_accumulation_steps"] = max(1, int(rows) // int(settings.get("micro_batch_size", 1)))
    ranks = training.divide_rows(settings, _ranks(settings), 1)
    _check_plugins(settings)
    kind, section = data(settings, _kind(settings))
    init = _model(settings) | _objective(settings, kind)
    init["optimizer"] = training.optimizer(settings, "adamw_torch_fused", None)
    if (schedule := _schedule(settings)) is not None:
        init["schedule"] = schedule
    trainer = training.trainer(settings, epochs=1.0, mixed=_mixed(settings), devices=devices, ranks=ranks)
    tree = training.sections(settings, kind, init, section, trainer | _callbacks(settings, section))
    around = training.around(
        settings, output="model-out", save=_saves(settings), save_steps=500, logger=_logger(settings)
    )
    return tree | around, settings


def _today(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with axolotl's former names under today's."""
    former = {"adam_eps": "adam_epsilon", "sequence_parallel_degree": "context_parallel_size"}
    today = {former.get(key, key): value for key, value in values.items() if values.get(former.get(key, "")) is None}
    tokens = today.get("tokens")
    if isinstance(tokens, Mapping):  # as `special_tokens` was written
        today["special_tokens"] = {**tokens, **(today.get("special_tokens") or {})}
        del today["tokens"]
    if today.get("warmup_steps") == 1:
        today["warmup_steps"] = 2  # which is what axolotl makes of it
    return today


def _ranks(settings: Settings) -> training.Ranks:
    """How axolotl arranges the devices: shards x experts x replicas x tensor x context is their number."""
    shards, replicas = (training.size(settings, f"dp_{name}_size") for name in ("shard", "replicate"))
    # experts are sharded as all weights are, over the devices that hold some of them
    shards *= training.size(settings, "expert_parallel_size") if shards > 1 else 1
    return training.Ranks(
        shards if shards > 1 else None,
        # of shards alone, there are as many groups as fit
        replicas if replicas > 1 else None if shards > 1 else 1,
        training.size(settings, "tensor_parallel_size"),
        training.size(settings, "context_parallel_size"),
    )


def _check_plugins(settings: Settings) -> None:
    for plugin in settings.get("plugins") or []:
        name = next((part for part in PLUGINS if f".{part}." in f".{plugin}."), None)
        if (why := PLUGINS.get(name or "")) is None:
            settings.refuse("plugins", f"{plugin}: {NO_SUCH_METHOD}")
        settings.notes.became[f"plugins, {plugin.rpartition('.')[2]}"] = f"nothing: {why}"
    settings.notes.became.pop("plugins", None)


def _kind(settings: Settings) -> str:
    if settings.get("reward_model"):
        if int(settings.get("num_labels", 1)) != 1:
            settings.refuse("num_labels", "classes other than a score have no counterpart")
        return "Reward"
    name = settings.get("rl")
    if name is not None and str(name) not in RL:
        settings.refuse("rl", f"{name}: {OTHER_TRAINER}")
    return RL[name]


# --- the model --------------------------------------------------------------------------------------------------------


def _bf16(settings: Settings) -> bool:
    return _is_bf16_on(settings) or bool(settings.get("bfloat16"))


def _is_bf16_on(settings: Settings) -> bool:
    """Whether `bf16` is on: `auto`, its default, is on cards that have it; null, or another precision, is not."""
    is_off = any(settings.get(name) for name in ("fp16", "float16", "bfloat16"))
    return is_on(settings.get("bf16", not is_off))


def _mixed(settings: Settings) -> str | None:
    if settings.get("fp8"):
        settings.comment("trainer.precision", training.FP8)
    if _is_bf16_on(settings):
        return "bf16"
    return "fp16" if settings.get("fp16") else None


def _model(settings: Settings) -> dict[str, Any]:
    init: dict[str, Any] = {"model": settings.get("lora_model_dir") or settings.get("base_model")}
    if settings.get("model_quantization_config"):
        dequantized = (settings.get("model_quantization_config_kwargs") or {}).get("dequantize")
        if settings.get("model_quantization_config") != "Mxfp4Config" or not dequantized:
            settings.refuse("model_quantization_config", "only Mxfp4Config, dequantized, can be trained")
        init["config"] = {"quantization_config": {"quant_method": "mxfp4", "dequantize": True}}
    if settings.get("model_config"):
        init["config"] = {**init.get("config", {}), **settings.get("model_config")}
        if settings.get("model_config").get("output_router_logits"):
            settings.comment(
                f"{MODEL}.config", "output_router_logits: the loss that balances experts is not added here"
            )
    half = bool(settings.get("load_in_8bit") or settings.get("fp16") or settings.get("float16"))
    if _bf16(settings):
        init["dtype"] = "bfloat16"
        settings.comment(
            f"{MODEL}.dtype", "axolotl loads, and without LoRA trains, weights in bfloat16 where bf16 is on"
        )
    elif half:
        init["dtype"] = "float16" if settings.get("adapter") else "float32"
        if not settings.get("adapter"):
            settings.comment(f"{MODEL}.dtype", "weights that are trained in float16 are kept in float32")
    adapter = settings.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        settings.refuse("adapter", f"{adapter} has no counterpart; use lora or qlora")
    if settings.get("lora_model_dir"):
        training.refuse_quantized_adapter(settings, "lora_model_dir")
        settings.comment(training.LORA, training.NEW_ADAPTER)
    if adapter:
        init["lora"] = training.lora(settings, {"r": 8, "alpha": 8, "dropout": 0.0}, _targets(settings)) | _more_lora(
            settings
        )
    init |= given(quantization=_quantization(settings))
    return init | given(
        attn=_attention(settings),
        gradient_checkpointing=is_on(settings.get("gradient_checkpointing", False)),
        revision=settings.get("revision_of_model"),
        trust_remote_code=bool(settings.get("trust_remote_code")),
        groups=_groups(settings),
    )


def _quantization(settings: Settings) -> str | None:
    adapter = settings.get("adapter")
    if adapter == "qlora" and settings.get("load_in_8bit"):
        settings.refuse("load_in_8bit", "the base of qlora has 4 bits")
    if adapter == "qlora" or (adapter and settings.get("load_in_4bit")):
        return "nf4"
    for key in ("load_in_4bit", "load_in_8bit"):
        if settings.get(key) and not adapter:
            settings.became_nothing(key, "only the base of an adapter is quantized")
    return "int8" if adapter and settings.get("load_in_8bit") else None


ATTENTION = {
    "eager": "eager",
    "sdpa": None,
    "flash_attention_2": None,
    "flash_attention_3": None,
    "flex_attention": None,
    "xformers": None,
}


def _attention(settings: Settings) -> str | None:
    name = str(settings.get("attn_implementation", "sdpa"))
    if ATTENTION.get(name) is None:
        settings.notes.became["attn_implementation"] = (
            "nothing: the fastest exact attention for data and device is used"
        )
    return ATTENTION.get(name)


def _targets(settings: Settings) -> Any:
    listed = settings.get("lora_target_modules") or None
    if settings.get("lora_target_linear"):
        if listed:
            settings.became_nothing("lora_target_modules", "lora_target_linear takes all linear layers")
        if beyond := [name for name in listed or () if name in ("embed_tokens", "lm_head", "wte")]:
            settings.comment(LORA, f"lora_target_linear: all linear layers; {', '.join(beyond)} are left out")
        return "all-linear"
    return listed if listed is not None or not settings.get("lora_target_parameters") else []


def _more_lora(settings: Settings) -> dict[str, Any]:
    if settings.get("peft_init_lora_weights") not in (None, True, "gaussian"):
        settings.refuse("peft_init_lora_weights", "an initialisation that rewrites the base has no counterpart")
    return given(
        exclude_modules=settings.get("lora_exclude_modules"),
        init_lora_weights=settings.get("peft_init_lora_weights"),
        rank_pattern=settings.get("lora_rank_pattern"),
        alpha_pattern=settings.get("lora_alpha_pattern"),
        layers_to_transform=settings.get("peft_layers_to_transform"),
        layers_pattern=settings.get("peft_layers_pattern"),
    )


def _groups(settings: Settings) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    if ratio := settings.get("loraplus_lr_ratio", 0.0):
        groups["*lora_B*"] = {"lr_factor": float(ratio)}
    if settings.has("embedding_lr"):
        groups["*embed_tokens*"] = {"lr": float(settings.get("embedding_lr", 0.0))}
    if settings.has("embedding_lr_scale"):
        groups["*embed_tokens*"] = {"lr_factor": float(settings.get("embedding_lr_scale", 1.0))}
    return groups


def _schedule(settings: Settings) -> dict[str, Any] | None:
    if settings.get("lr_quadratic_warmup"):
        settings.comment(training.SCHEDULE, "lr_quadratic_warmup: the warm-up is a straight line here")
    schedule = training.schedule(settings, "cosine", default_warmup=0.03)
    if schedule is None or settings.get("lr_scheduler_type", "cosine") != "cosine":
        return schedule
    floor = float(settings.get("cosine_min_lr_ratio", 0.0))
    if settings.has("eta_min"):
        floor = float(settings.get("eta_min", 0.0)) / float(settings.get("learning_rate", 1.0))
    if constant := float(settings.get("cosine_constant_lr_ratio", 0.0)):
        settings.refuse("cosine_constant_lr_ratio", f"{constant}: a plateau after the cosine has no counterpart")
    arguments = schedule.get("init_args", {}) | given(floor=floor or None)
    if not settings.has("warmup_steps") and not settings.has("warmup_ratio"):
        settings.comment(training.SCHEDULE, "the warm-up is 3 % of the run; axolotl's has at most 100 steps")
    return {"class_path": "Cosine"} | given(init_args=arguments)


# --- the objective ----------------------------------------------------------------------------------------------------

DPO_LOSSES = {"sigmoid": "Sigmoid", "hinge": "Hinge", "ipo": "IPO", "robust": "Robust", "apo_zero": "APOZero"}


TRL_KEYS = Keys("axolotl", {"beta": "model.loss"}, {"*": "only online training reads it"})
"""What becomes of the keys of `trl`."""


def _beta(settings: Settings, default: float = 0.1) -> float:
    of_trl = settings.part("trl", TRL_KEYS).get("beta")
    return float(settings.get("rl_beta", default) if of_trl is None else of_trl)


def _objective(settings: Settings, kind: str) -> dict[str, Any]:
    if kind == "KTO":
        return given(
            loss={"class_path": "KTOLoss", "init_args": {"beta": _beta(settings)}},
            desirable_weight=float(settings.get("kto_desirable_weight") or 1.0),
            undesirable_weight=float(settings.get("kto_undesirable_weight") or 1.0),
        )
    if kind == "DPO":
        return {"loss": _preference_loss(settings)}
    arguments: dict[str, Any]
    if kind == "Reward":
        value = settings.get("center_rewards_coefficient")
        arguments = {"center_rewards_coefficient": float(value)} if value else {}
        return {"loss": {"class_path": "BradleyTerry"} | given(init_args=arguments)}
    if settings.get("use_eaft"):
        arguments = {"alpha": float(settings.get("eaft_alpha", 1.0)), "top_k": int(settings.get("eaft_k", 20))}
        return {"loss": {"class_path": "oumi_pl.convert.losses.EntropyWeighted", "init_args": arguments}}
    smoothing = settings.get("label_smoothing_factor")
    arguments = {"label_smoothing": float(smoothing)} if smoothing else {}
    return {"loss": {"class_path": "CrossEntropy", "init_args": arguments}} if arguments else {}


def _preference_loss(settings: Settings) -> dict[str, Any]:
    name = settings.get("rl")
    if name == "orpo":
        return {"class_path": "ORPO", "init_args": {"beta": _beta(settings, settings.get("orpo_alpha", 0.1))}}
    beta = _beta(settings)
    if name == "ipo":
        return {"class_path": "IPO", "init_args": {"beta": beta}}
    if name == "simpo":
        return _simpo(settings, beta)
    listed = settings.get("dpo_loss_type") or ["sigmoid"]
    listed = [listed] if isinstance(listed, str) else [str(one) for one in listed]
    if len(listed) > 1 or listed[0] not in DPO_LOSSES:
        settings.refuse("dpo_loss_type", f"{listed}: name one of {', '.join(DPO_LOSSES)}")
    arguments = {"beta": beta} | given(label_smoothing=float(settings.get("dpo_label_smoothing") or 0.0) or None)
    return {"class_path": DPO_LOSSES[listed[0]], "init_args": arguments}


def _simpo(settings: Settings, beta: float) -> dict[str, Any]:
    # TRL's CPO subtracts gamma / beta from the difference, which beta then multiplies; its SFT term has cpo_alpha
    arguments = {"beta": beta, "gamma": float(settings.get("simpo_gamma") or 0.5)}
    simpo = {"class_path": "SimPO", "init_args": arguments}
    if not (weight := float(settings.get("cpo_alpha", 1.0))):
        return simpo
    settings.comment(f"{MODEL}.loss", "cpo_alpha: TRL adds an SFT term with this weight, here as SFTTerm")
    losses = [simpo, {"class_path": "SFTTerm"}]
    return {"class_path": "WeightedSum", "init_args": {"losses": losses, "weights": [1.0, weight]}}


# --- when it is saved, validated and stopped --------------------------------------------------------------------------


def _saves(settings: Settings) -> str:
    if settings.has("saves_per_epoch") and not settings.has("save_steps"):
        return "epoch" if settings.get("saves_per_epoch") else "no"
    return "steps"


def _callbacks(settings: Settings, data: Mapping[str, Any]) -> dict[str, Any]:
    """What is trained, when the held-out rows are scored, and whether the run stops by their loss."""
    section: dict[str, Any] = {}
    callbacks: list[dict[str, Any]] = []
    patterns = settings.get("unfrozen_parameters")
    if patterns and settings.get("adapter"):
        settings.notes.became["unfrozen_parameters"] = "nothing: with an adapter, the base is frozen"
    elif patterns:
        patterns = [str(pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
        if any("[" in pattern and pattern.endswith("]") and ":" in pattern for pattern in patterns):
            settings.refuse("unfrozen_parameters", "ranges of rows have no counterpart")
        callbacks.append({"class_path": "oumi_pl.convert.train_only.TrainOnly", "init_args": {"patterns": patterns}})
    if "validation" in data:
        callbacks += _watching(settings, section, data)
    return section | given(callbacks=callbacks)


def _watching(settings: Settings, section: dict[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    per_epoch = settings.get("evals_per_epoch", 0)
    if per_epoch and per_epoch > 1 and not settings.has("eval_steps") and not data.get("streaming"):
        section["val_check_interval"] = round(1 / per_epoch, 4)
    if not settings.has("eval_strategy") and settings.has("eval_steps"):
        settings.values["eval_strategy"] = "steps"
    if settings.get("save_strategy") == "best":
        settings.values |= {"load_best_model_at_end": True, "save_strategy": "steps"}
    if isinstance(data["validation"], float):
        settings.comment(VALIDATION, "held out by a hash of the prompt; axolotl draws rows")
    if not (patience := settings.get("early_stopping_patience")):
        return []
    settings.comment("trainer.callbacks", "early_stopping_patience counts validations")
    stop = {"monitor": "val/loss", "patience": int(patience)}
    return [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}]


def _logger(settings: Settings) -> Any:
    names = []
    if settings.get("use_wandb") or (settings.get("wandb_project") and settings.get("use_wandb") is None):
        names.append("wandb")
        settings.comment("logger", f"set WANDB_PROJECT={settings.get('wandb_project')} in the environment")
    names += ["tensorboard"] if settings.get("use_tensorboard") else []
    names += ["mlflow"] if settings.get("use_mlflow") or settings.get("mlflow_tracking_uri") else []
    return training.loggers(names)
