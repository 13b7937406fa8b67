"""verl's keys (`training.verl_config_overrides`) in the terms of TRL_GRPO."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from oumi_pl.core.configs import MixedPrecisionDtype, TrainerType, TrainingConfig
from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.errors import nearest

PLACE = "training.verl_config_overrides"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
FILTER = "algorithm.filter_groups"
OVERLONG = "reward_model.overlong_buffer"
EARLIER = {"reward_model.reward_kwargs.overlong_buffer_cfg": OVERLONG}
"""Section of verl -> another name of it."""
METRICS = ("acc", "score", "seq_reward", "seq_final_reward")
"""What verl can compare the completions of a group by; for rewards that are numbers, all are the reward."""
MOST_ROUNDS = 10
"""Rounds of prompts in place of those without variance where verl has no limit."""

DEFAULTS: dict[str, tuple[Any, str]] = {
    "data.train_batch_size": (1024, "data.steps_per_rollout"),
    "data.max_prompt_length": (512, "data.max_length"),
    "data.max_response_length": (None, "data.sampling.max_new_tokens"),
    f"{ACTOR}.ppo_mini_batch_size": (256, "data.batch_size and trainer.accumulate_grad_batches"),
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": (None, "data.batch_size"),
    f"{ACTOR}.ppo_epochs": (1, "data.iterations"),
    f"{ACTOR}.clip_ratio": (0.2, "model.loss"),
    f"{ACTOR}.clip_ratio_low": (None, "model.loss"),
    f"{ACTOR}.clip_ratio_high": (None, "model.loss"),
    f"{ACTOR}.loss_agg_mode": ("token-mean", "model.loss"),
    f"{ACTOR}.use_kl_loss": (False, "model.kl"),
    f"{ACTOR}.kl_loss_coef": (0.001, "model.kl"),
    f"{ACTOR}.kl_loss_type": ("low_var_kl", "model.kl_estimator"),
    f"{ACTOR}.entropy_coeff": (0, "0 is how it is done"),
    f"{ACTOR}.grad_clip": (1.0, "trainer.gradient_clip_val"),
    f"{ACTOR}.optim.lr": (None, "model.optimizer.lr"),
    f"{ACTOR}.optim.weight_decay": (0.01, "model.optimizer.weight_decay"),
    f"{ROLLOUT}.n": (1, "data.completions"),
    f"{ROLLOUT}.temperature": (None, "data.sampling.temperature"),
    "algorithm.adv_estimator": ("grpo", "model.advantage"),
    "algorithm.norm_adv_by_std_in_grpo": (True, "model.advantage"),
    "algorithm.use_kl_in_reward": (False, "false is how it is done"),
    f"{FILTER}.enable": (False, "data.extra_rounds"),
    f"{FILTER}.metric": ("acc", "groups are compared by their total rewards"),
    f"{FILTER}.max_num_gen_batches": (0, "data.extra_rounds"),
    f"{OVERLONG}.enable": (False, "data.overlong_tokens"),
    f"{OVERLONG}.len": (0, "data.overlong_tokens"),
    f"{OVERLONG}.penalty_factor": (1.0, "data.overlong_penalty"),
}
"""Key of verl -> its default, and what it becomes. None: that of another field."""
OF_REWARD = "it is only read with algorithm.use_kl_in_reward"
HARMLESS = {
    "data.val_batch_size": "it decides on speed alone",
    "data.filter_overlong_prompts": "prompts that are too long are left out in any case",
    "data.truncation": "prompts that are too long are left out",
    "data.shuffle": "rows are shuffled in any case",
    "data.gen_batch_size": "each group without variance is replaced by itself",
    f"{OVERLONG}.log": "the penalty is in rollouts.jsonl",
    "reward_model.reward_manager": "rewards are those of training.reward_functions",
    "reward_model.reward_kwargs.max_resp_len": "it is data.max_response_length",
    "algorithm.kl_ctrl": OF_REWARD,
    "algorithm.kl_penalty": OF_REWARD,
    "actor_rollout_ref.model.use_remove_padding": "there is no padding",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "training.enable_gradient_checkpointing decides",
    f"{ACTOR}.ppo_max_token_len_per_gpu": "it decides on memory alone",
    f"{ACTOR}.use_dynamic_bsz": "it decides on memory alone",
    f"{ACTOR}.param_offload": "it decides on memory alone",
    f"{ACTOR}.optimizer_offload": "it decides on memory alone",
    f"{ACTOR}.fsdp_config": "it decides on memory alone",
    "actor_rollout_ref.ref": "the reference is computed with the policy's batches",
    **{
        f"{ROLLOUT}.{name}": "completions are sampled by generate, which draws from the same distribution"
        for name in (
            "name", "mode", "tensor_model_parallel_size", "gpu_memory_utilization", "enforce_eager",
            "free_cache_engine", "enable_chunked_prefill", "log_prob_micro_batch_size_per_gpu",
            "max_num_batched_tokens", "max_num_seqs", "dtype", "load_format",
        )
    },
    "trainer.critic_warmup": "there is no critic",
    "trainer.val_before_train": "validation begins after the first updates",
    "trainer.n_gpus_per_node": "as many devices as there are, or --devices",
    "trainer.nnodes": "as many devices as there are, or --devices",
    "trainer.logger": "the trackers are those of the fields of training",
}  # fmt: skip
"""Key, or section, of verl -> why nothing depends on it."""
UNREAD = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "optimizer", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "sgd_momentum", "max_grad_norm", "seed", "data_seed", "mixed_precision_dtype",
)  # fmt: skip
"""Fields of `training` that Oumi doesn't pass on to verl."""
LOSSES = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}


def as_trl(config: TrainingConfig, devices: int | None, notes: Notes) -> tuple[TrainingConfig, dict[str, Any]]:
    """The config of TRL_GRPO that trains as verl does, and arguments of the data for which TRL has none.

    Raises:
        UserError: a key has no counterpart.
    """
    values = _values(config, notes)
    training = copy.deepcopy(config.training)
    for name in UNREAD:
        notes.nothing(f"training.{name}", "Oumi doesn't pass it on to verl")
    if config.training.trainer_kwargs:
        refuse("training.trainer_kwargs", "they are TRL's, and verl reads none of them; leave them out")
    training.trainer_type, training.verl_config_overrides = TrainerType.TRL_GRPO, {}
    training.learning_rate = values[f"{ACTOR}.optim.lr"] or training.learning_rate
    training.optimizer, training.lr_scheduler_type = "adamw_torch", "constant"
    training.lr_scheduler_kwargs, training.warmup_ratio, training.warmup_steps = {}, None, None
    training.adam_beta1, training.adam_beta2, training.adam_epsilon, training.sgd_momentum = 0.9, 0.999, 1e-8, 0.0
    training.weight_decay = float(values[f"{ACTOR}.optim.weight_decay"])
    training.max_grad_norm = float(values[f"{ACTOR}.grad_clip"])
    _sampling(training.grpo, values)
    training.trainer_kwargs = _objective(training.grpo, values, notes)
    updates = _updates(training, values, devices or _devices())
    # verl's steps are those of sampling
    for name in ("max_steps", "save_steps"):
        if (steps := getattr(training, name)) > 0:
            setattr(training, name, steps * updates)
    if isinstance(training.eval_steps, int):
        training.eval_steps *= updates
    if updates > 1:
        notes.comment("trainer", f"steps are updates; in verl, a step is all {updates} updates of a rollout")
    translated = copy.copy(config)
    translated.training, translated.model = training, copy.copy(config.model)
    # verl's own choice: with weights in bfloat16, steps of 1e-6 would be lost in rounding
    translated.model.torch_dtype_str, training.mixed_precision_dtype = "float32", MixedPrecisionDtype.BF16
    notes.nothing("model.torch_dtype_str", "verl trains float32 weights, and computes in bfloat16")
    return translated, _groups(values, notes)


def _values(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """The keys that decide what is trained, with verl's defaults."""
    overrides = {}
    for key, value in _flat(config.training.verl_config_overrides):
        section, _, name = key.rpartition(".")
        overrides[f"{EARLIER.get(section, section)}.{name}" if section else key] = value
    for key, value in overrides.items():
        place = f"{PLACE}.{key}"
        if key in DEFAULTS:
            notes.became[place] = DEFAULTS[key][1]
        elif why := next((HARMLESS[name] for name in HARMLESS if f"{key}.".startswith(f"{name}.")), None):
            notes.became[place] = f"nothing: {why}"
        else:
            refuse(place, f"{value!r} has no counterpart{nearest(key, DEFAULTS)}")
    notes.became.pop(PLACE, None)
    return {key: default for key, (default, _) in DEFAULTS.items()} | overrides


def _flat(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def _sampling(grpo: Any, values: dict[str, Any]) -> None:
    grpo.num_generations = int(values[f"{ROLLOUT}.n"])
    if grpo.num_generations < 2:
        refuse(f"{PLACE}.{ROLLOUT}.n", "missing, or 1: GRPO compares at least 2 completions of a prompt")
    grpo.max_prompt_length = int(values["data.max_prompt_length"])
    if (tokens := values["data.max_response_length"]) is not None:
        grpo.max_completion_length = int(tokens)
    if grpo.max_completion_length is None:
        refuse("training.grpo.max_completion_length", "missing: verl has no default for it")
    if (temperature := values[f"{ROLLOUT}.temperature"]) is not None:
        grpo.temperature = float(temperature)


def _objective(grpo: Any, values: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Sets how ratios are clipped, and returns TRL's arguments for loss, advantages and penalty."""
    mode, penalty = values[f"{ACTOR}.loss_agg_mode"], values[f"{ACTOR}.kl_loss_type"]
    if mode not in LOSSES:
        refuse(f"{PLACE}.{ACTOR}.loss_agg_mode", f"no counterpart of {mode!r}{nearest(str(mode), LOSSES)}")
    if values["algorithm.adv_estimator"] != "grpo":
        name = values["algorithm.adv_estimator"]
        refuse(f"{PLACE}.algorithm.adv_estimator", f"{name!r} has no counterpart; the only value is grpo")
    for key in ("algorithm.use_kl_in_reward", f"{ACTOR}.entropy_coeff"):
        if values[key]:
            refuse(f"{PLACE}.{key}", f"{values[key]!r} has no counterpart; leave it out")
    kwargs: dict[str, Any] = {"loss_type": LOSSES[mode], "use_bias_correction_kl": False, "num_generations_eval": 1}
    low, high = (values[f"{ACTOR}.clip_ratio_{side}"] for side in ("low", "high"))
    ratio = values[f"{ACTOR}.clip_ratio"]
    grpo.epsilon, kwargs["epsilon_high"] = (float(ratio if one is None else one) for one in (low, high))
    if not values["algorithm.norm_adv_by_std_in_grpo"]:
        kwargs["scale_rewards"] = "none"
    if values[f"{ACTOR}.use_kl_loss"]:
        if penalty not in ("low_var_kl", "k3"):
            refuse(f"{PLACE}.{ACTOR}.kl_loss_type", f"{penalty!r} has no counterpart; the only value is low_var_kl")
        kwargs["beta"] = float(values[f"{ACTOR}.kl_loss_coef"])
    notes.comment(
        "model.init_args.loss",
        "without verl's third bound, of ratios above clip_ratio_c (3) where the advantage is negative; averages are of "
        "the update, and not of a micro-batch",
    )
    return kwargs


def _groups(values: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """Arguments of the data for DAPO's dynamic sampling and its penalty of long completions."""
    arguments: dict[str, Any] = {}
    if values[f"{OVERLONG}.enable"]:
        arguments["overlong_tokens"] = int(values[f"{OVERLONG}.len"])
        arguments["overlong_penalty"] = float(values[f"{OVERLONG}.penalty_factor"])
    if not values[f"{FILTER}.enable"]:
        return arguments
    if (metric := values[f"{FILTER}.metric"] or METRICS[0]) not in METRICS:
        refuse(f"{PLACE}.{FILTER}.metric", f"{metric!r} has no counterpart{nearest(str(metric), METRICS)}")
    batches = int(values[f"{FILTER}.max_num_gen_batches"])
    arguments["extra_rounds"] = batches - 1 if batches > 0 else MOST_ROUNDS
    limit = "" if batches > 0 else f", and after {MOST_ROUNDS} rounds"
    notes.comment(
        "data.init_args.extra_rounds",
        "a group whose completions have the same reward, before penalties, is replaced by one of another prompt; if "
        f"none is better{limit}, it stays, where verl stops the run",
    )
    return arguments


def _updates(training: Any, values: dict[str, Any], devices: int) -> int:
    """Sets micro-batches, and returns the updates of a rollout times how often each is trained on."""
    prompts, mini = int(values["data.train_batch_size"]), int(values[f"{ACTOR}.ppo_mini_batch_size"])
    place = f"{PLACE}.{ACTOR}.ppo_mini_batch_size"
    if mini > prompts or prompts % mini:
        refuse(place, f"{mini} prompts of an update don't divide data.train_batch_size, which is {prompts}")
    if mini % devices:
        refuse(place, f"{mini} prompts of an update can't be divided among {devices} devices")
    members = training.grpo.num_generations
    most = max(1, int(values[f"{ACTOR}.ppo_micro_batch_size_per_gpu"] or members) // members)
    size = max(n for n in range(1, most + 1) if mini // devices % n == 0)
    training.per_device_train_batch_size = size * members
    training.gradient_accumulation_steps = mini // devices // size
    epochs = int(values[f"{ACTOR}.ppo_epochs"])
    steps = prompts // mini
    training.trainer_kwargs |= {"num_iterations": epochs}
    training.trainer_kwargs |= {"steps_per_generation": training.gradient_accumulation_steps * steps}
    return steps * epochs


def _devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())
