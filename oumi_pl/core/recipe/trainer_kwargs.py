"""What `training.trainer_kwargs` may hold: arguments of transformers' and TRL's trainers, and the loss they set."""

from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.errors import nearest

PLACE = "training.trainer_kwargs"

HARMLESS = {
    "use_liger_kernel": "the loss is computed in chunks without it; the numbers are the same",
    "padding_free": "it decides on speed alone",
    "pad_to_multiple_of": "it decides on speed alone",
    "activation_offloading": "it decides on memory alone",
    "dataset_num_proc": "it decides on speed alone",
    "precompute_ref_log_probs": "they are computed before training wherever that gives the same",
    "precompute_ref_batch_size": "it decides on speed alone",
    "remove_unused_columns": "columns that a format doesn't read are not kept",
    "dataset_kwargs": "rows are tokenized here in any case",
    "average_tokens_across_devices": "the loss is that of all tokens of all devices",
    "save_only_model": "checkpoints hold what it takes to go on",
}
"""Argument -> why nothing depends on it."""

OF_ANY = {
    "max_length": "data.max_length",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.monitor",
    "metric_for_best_model": "checkpoint.monitor",
    "greater_is_better": "checkpoint.mode",
}
OF_TOKENS = {
    "dataset_text_field": "columns of the source",
    "packing": "data.packing",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
    "label_smoothing_factor": "model.loss",
}
_OF_DPO = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "discopop_tau", "ld_alpha", "sync_ref_model",
    "ref_model_sync_steps", "ref_model_mixup_alpha", "precompute_ref_log_probs", "disable_dropout", "truncation_mode",
)  # fmt: skip
OF_PREFERENCES = dict.fromkeys(_OF_DPO, "model.loss and the reference")
_OF_KTO = (
    "beta", "loss_type", "desirable_weight", "undesirable_weight", "sync_ref_model", "ref_model_sync_steps",
    "ref_model_mixup_alpha", "precompute_ref_log_probs", "disable_dropout",
)  # fmt: skip
OF_FEEDBACK = dict.fromkeys(_OF_KTO, "model.loss, the weights and the reference")
OF_ROLLOUTS = {
    **dict.fromkeys(("loss_type", "epsilon_high", "importance_sampling_level"), "model.loss"),
    **dict.fromkeys(("beta", "use_bias_correction_kl"), "model.kl and model.kl_corrected"),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), "model.sync_every and mixup"),
    **dict.fromkeys(("top_p", "top_k", "min_p", "max_completion_length"), "data.sampling"),
    **dict.fromkeys(("steps_per_generation", "generation_batch_size"), "data.steps_per_rollout"),
    "scale_rewards": "model.advantage",
    "reward_weights": "data.reward",
    "num_generations": "data.completions",
    "num_generations_eval": "data.eval_completions",
    "num_iterations": "data.iterations",
    "mask_truncated_completions": "data.mask_truncated",
    "disable_dropout": "dropout is off in any case",
}
"""Argument -> the key of the recipe that says the same: of all trainers, of those of tokens, of TRL's DPO, KTO and
GRPO."""
GENERATE = "completions are sampled by generate, which draws from the same distribution"
OF_GENERATING = (
    "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host",
    "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization",
    "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "use_transformers_paged", "use_transformers_continuous_batching",
    "transformers_continuous_batching_config", "cache_implementation", "ds3_gather_for_generation",
)  # fmt: skip
"""Arguments of TRL's GRPO that decide how completions are sampled, but not from which distribution."""
NO_OTHERS: dict[str, Any] = {
    "delta": None, "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False,
    "multi_objective_aggregation": "sum_then_normalize", "off_policy_mask_threshold": None, "shuffle_dataset": True,
    "chat_template_kwargs": None, "generation_kwargs": None, "router_aux_loss_coef": None, "model_init_kwargs": None,
    "cast_lm_head_to_fp32": False, "max_tool_calling_iterations": None,
}  # fmt: skip
"""Argument of TRL's GRPO -> the only value that has a counterpart, its default."""
SHOWN = ("log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal", "use_liger_loss")

GONE = ("max_seq_length", "max_prompt_length", "max_completion_length")
"""Arguments that TRL no longer has."""
FORMER_LENGTH = "max_seq_length"
"""What TRL's SFT called `max_length` before 0.20; Oumi's recipes still have it, on which TRL now fails."""

ONLY = {"loss_type": ("nll",), "truncation_mode": ("keep_start",), "packing_strategy": ("bfd",)}
"""Argument of TRL's SFT -> the values that have a counterpart, which are its defaults."""


def note_kwargs(config: TrainingConfig, kind: str, notes: Notes) -> None:
    """Notes what becomes of each argument.

    Raises:
        UserError: an argument has no counterpart.
    """
    kwargs = config.training.trainer_kwargs
    if kwargs and config.training.trainer_type.name == "OUMI":
        refuse(PLACE, f"Oumi's own trainer reads none of {', '.join(kwargs)}; leave them out")
    known = OF_ANY | {"DPO": OF_PREFERENCES, "KTO": OF_FEEDBACK, "GRPO": OF_ROLLOUTS, "Distill": {}}.get(
        kind, OF_TOKENS
    )
    harmless = HARMLESS
    if kind == "GRPO":
        del known["max_length"]
        known |= dict.fromkeys(NO_OTHERS, "its default is the only value")
        harmless = HARMLESS | dict.fromkeys(OF_GENERATING, GENERATE) | dict.fromkeys(SHOWN, "nothing depends on it")
    for key, value in kwargs.items():
        place = f"{PLACE}.{key}"
        if key in known:
            notes.became[place] = known[key]
        elif key in harmless:
            notes.became[place] = f"nothing: {harmless[key]}"
        elif key == FORMER_LENGTH and kind in ("SFT", "Pretrain"):
            notes.became[place] = "data.max_length"
            notes.comment(
                "data.init_args.max_length", f"{key} is TRL's former name of max_length, on which TRL now fails"
            )
        elif key in GONE:
            refuse(place, "TRL has no such argument any more; set model.model_max_length")
        elif kind in ("SFT", "Pretrain") and key in ONLY:
            if value not in ONLY[key]:
                refuse(place, f"{value!r} has no counterpart; the only value is {ONLY[key][0]}")
        else:
            refuse(place, f"has no counterpart{nearest(key, [*known, *harmless])}")
    notes.became.pop(PLACE, None)
    for key in ("max_length", FORMER_LENGTH):
        if key in kwargs and notes.became.get(f"{PLACE}.{key}") and config.model.model_max_length is not None:
            notes.became[f"{PLACE}.{key}"] = "data.max_length, which is model.model_max_length"


# --- the loss of TRL's DPO -------------------------------------------------------------------------------------------

LOSSES = {
    "sigmoid": "Sigmoid",
    "hinge": "Hinge",
    "ipo": "IPO",
    "exo_pair": "EXO",
    "nca_pair": "NCA",
    "robust": "Robust",
    "bco_pair": "BCO",
    "sppo_hard": "SPPO",
    "aot": "AOT",
    "aot_unpaired": "AOTUnpaired",
    "apo_zero": "APOZero",
    "apo_down": "APODown",
    "discopop": "DiscoPOP",
    "sigmoid_norm": "LengthNormalizedSigmoid",
    "sft": "SFTTerm",
}
RESPONSE_LOSSES = {"kto": "KTOLoss", "apo_zero_unpaired": "APOZeroUnpaired"}
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")
BETA = 0.1


def preference(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model.loss`, and `sync_every` and `mixup` of a reference that moves, as far as they aren't the defaults.

    Raises:
        UserError: there is no such loss, or an argument has no counterpart.
    """
    for key, only in {"disable_dropout": True, "truncation_mode": "keep_start"}.items():
        if kwargs.get(key, only) != only:
            refuse(f"{PLACE}.{key}", f"{kwargs[key]!r} has no counterpart; leave it out")
    return given(loss=_loss(kwargs)) | moving_reference(kwargs)


def feedback(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model.loss` and the weights of TRL's KTO, and a reference that moves, as far as they aren't the defaults.

    Raises:
        UserError: there is no such loss, or an argument has no counterpart.
    """
    if not kwargs.get("disable_dropout", True):
        refuse(f"{PLACE}.disable_dropout", "False has no counterpart; leave it out")
    name = str(kwargs.get("loss_type") or "kto")
    if name not in RESPONSE_LOSSES:
        refuse(f"{PLACE}.loss_type", f"no counterpart of {name!r}{nearest(name, RESPONSE_LOSSES)}")
    weights = {key: kwargs.get(key) for key in ("desirable_weight", "undesirable_weight")}
    loss = {"class_path": RESPONSE_LOSSES[name], "init_args": {"beta": float(kwargs.get("beta", BETA))}}
    return given(loss=loss, **{key: None if value is None else float(value) for key, value in weights.items()}) | (
        moving_reference(kwargs)
    )


def moving_reference(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`sync_every` and `mixup` of a reference that moves."""
    moves = kwargs.get("sync_ref_model")
    return given(
        sync_every=kwargs.get("ref_model_sync_steps", 512) if moves else None,
        mixup=kwargs.get("ref_model_mixup_alpha") if moves else None,
    )


def _loss(kwargs: dict[str, Any]) -> dict[str, Any]:
    given = kwargs.get("loss_type") or "sigmoid"
    names = list(given) if isinstance(given, list | tuple) else [given]
    losses = [_single(str(name), kwargs) for name in names]
    weights = kwargs.get("loss_weights")
    loss = losses[0]
    if len(losses) > 1:
        arguments = {"losses": losses, "weights": [float(w) for w in weights or [1.0] * len(losses)]}
        loss = {"class_path": "WeightedSum", "init_args": arguments}
    elif weights and list(weights) != [1.0]:
        refuse(f"{PLACE}.loss_weights", "there is one loss, which needs no weight; leave it out")
    if kwargs.get("ld_alpha") is not None:
        return {"class_path": "LDDPO", "init_args": {"loss": loss, "alpha": kwargs["ld_alpha"]}}
    return loss


def _single(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if name not in LOSSES:
        refuse(f"{PLACE}.loss_type", f"no counterpart of {name!r}{nearest(name, LOSSES)}")
    arguments: dict[str, Any] = {} if name == "sft" else {"beta": float(kwargs.get("beta", BETA))}
    smoothing = kwargs.get("label_smoothing")
    if smoothing:
        if name not in SMOOTHED:
            refuse(f"{PLACE}.label_smoothing", f"{name} takes none; leave it out")
        arguments["label_smoothing"] = float(smoothing)
    elif name == "robust":
        refuse(f"{PLACE}.label_smoothing", "robust needs the share of labels that are wrong, above 0")
    if name == "discopop" and "discopop_tau" in kwargs:
        arguments["tau"] = float(kwargs["discopop_tau"])
    return {"class_path": LOSSES[name]} | given(init_args=arguments)
