"""Online training of an Oumi config: objective, rewards and rollouts of `TRL_GRPO`."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe import rewards
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.core.recipe.trainer_kwargs import NO_OTHERS, PLACE, moving_reference
from oumi_pl.core.registry import REGISTRY, RegistryType
from oumi_pl.errors import nearest
from oumi_pl.rollouts.advantages import Scale

REWARDS = rewards.__name__
GRPO, UTILIZATION = "training.grpo", "vllm_gpu_memory_utilization"
REGISTERED = "oumi_pl.core.recipe.registered_rewards"
NAMES = (
    *("count_letters", "countdown", "gsm8k"),
    *(f"{shape}_{words}tokens_completions" for shape in ("soft", "sharp") for words in (5, 10, 20)),
)
"""Oumi's names of rewards."""
TRL_COMPLETIONS, TRL_LENGTH = 8, 512
"""TRL's defaults: completions per prompt, and most tokens of one."""
PROMPT_LENGTH = 1024
"""Most tokens of a prompt, where the config says nothing. TRL takes any."""

LOSSES = {"grpo": "GRPOLoss", "bnpo": "BNPOLoss", "dapo": "DAPOLoss", "dr_grpo": "DrGRPOLoss", "cispo": "CISPOLoss"}


@dataclass(frozen=True)
class Online:
    """What `model`, `data` and the loop get of the settings of online training.

    micro_batches: of an update.
    """

    module: dict[str, Any]
    data: dict[str, Any]
    micro_batches: int


def online(config: TrainingConfig, notes: Notes) -> Online:
    """Translates the settings of TRL_GRPO.

    Raises:
        UserError: something has no counterpart.
    """
    training, kwargs = config.training, config.training.trainer_kwargs
    for key, only in NO_OTHERS.items():
        if kwargs.get(key, only) != only:
            refuse(f"{PLACE}.{key}", f"{kwargs[key]!r} has no counterpart; leave it out")
    members = training.grpo.num_generations or int(kwargs.get("num_generations") or TRL_COMPLETIONS)
    tokens = training.grpo.max_completion_length or int(kwargs.get("max_completion_length") or TRL_LENGTH)
    prompts, micro_batches = _micro_batches(config, members, notes)
    if training.gradient_accumulation_steps > 1 and kwargs.get("loss_type") == "bnpo":
        notes.comment("model.init_args.loss", "the mean over all tokens of an update; TRL's is that of a micro-batch")
    sampling = given(
        max_new_tokens=tokens,
        temperature=training.grpo.temperature,
        top_p=None if kwargs.get("top_p", 1.0) == 1 else kwargs["top_p"],
        top_k=kwargs.get("top_k") or None,
        min_p=kwargs.get("min_p") or None,
    )
    data = {
        "reward": reward(config),
        "completions": members,
        "sampling": sampling,
        "max_length": max_length(config, tokens, notes),
        "batch_size": prompts,
    } | given(
        mask_truncated=bool(kwargs.get("mask_truncated_completions")),
        iterations=None if kwargs.get("num_iterations", 1) == 1 else kwargs["num_iterations"],
        steps_per_rollout=_steps_per_rollout(config),
    )
    if training.eval_strategy != "no":
        data["eval_completions"] = int(kwargs.get("num_generations_eval") or members)
        # one completion is greedy
        data["eval_batch_size"] = max(1, training.per_device_eval_batch_size // data["eval_completions"])
    return Online(_module(kwargs, training.grpo.epsilon, notes), data, micro_batches)


def vllm(config: TrainingConfig, requested: str | None, devices: int | None, notes: Notes) -> dict[str, Any]:
    """`data.engine`, if the config asks for vLLM and that can be had.

    Args:
        config: The config.
        requested: The engine of the training loop that the user asks for.
        devices: Devices per node; None for as many as there are.
        notes: Where comments go.
    """
    params, kwargs = config.training.grpo, config.training.trainer_kwargs
    if not params.use_vllm:
        return {}
    if why := _why_not_vllm(kwargs.get("vllm_mode") or params.vllm_mode, requested, devices):
        notes.comment(
            "data.init_args",
            f"completions are sampled by transformers' generate, and not by vLLM{why}, set data.engine",
        )
        return {}
    notes.became |= {f"{GRPO}.{name}": "data.engine VLLM" for name in ("use_vllm", "vllm_mode", UTILIZATION)}
    notes.became |= {f"{PLACE}.{name}": "data.engine VLLM" for name in ("vllm_mode", UTILIZATION) if name in kwargs}
    share = float(kwargs.get(UTILIZATION, getattr(params, UTILIZATION)))
    options = given(max_model_len=kwargs.get("vllm_max_model_length"))
    if options:
        notes.became[f"{PLACE}.vllm_max_model_length"] = "data.engine.options"
    arguments = {"gpu_memory_utilization": share} | given(options=options)
    return {"engine": {"class_path": "VLLM", "init_args": arguments}}


def _why_not_vllm(mode: str | None, requested: str | None, devices: int | None) -> str:
    """Why `generate` takes the place of vLLM, and what to do; empty if it does not."""
    import torch

    if mode == "server":
        return ", since TRL's server is not understood here: start `vllm serve` as VLLMServer describes"
    if requested == "trl":
        return ", since --engine trl samples with that alone: name lightning"
    if find_spec("vllm") is None:
        return ", which is not installed: pip install 'oumi_pl[vllm]', or start a server"
    if (devices or int(os.environ.get("WORLD_SIZE", "0")) or torch.cuda.device_count()) > 1:
        return ", which runs in the process on one device alone: start a server"
    return ""


def reward(config: TrainingConfig) -> Any:
    """`data.reward`.

    Raises:
        UserError: there is none, or none of a name.
    """
    place = "training.reward_functions"
    names = [name for name in config.training.reward_functions or () if name]
    if not names:
        refuse(place, f"missing: name at least one; known: {', '.join(NAMES)}, or a function by its path")
    own = REGISTRY.get_all(RegistryType.REWARD_FUNCTION) if config.training.trainer_type.name == "TRL_GRPO" else {}
    for name in names:
        if name not in NAMES and "." not in name and name.lower() not in own:
            refuse(place, f"no counterpart of {name!r}{nearest(name, [*NAMES, *own])}; or name a function by its path")
    paths = [f"{REGISTERED if name.lower() in own else REWARDS}.{name}" if "." not in name else name for name in names]
    weights = config.training.trainer_kwargs.get("reward_weights")
    if weights is not None and len(weights) != len(paths):
        refuse(f"{PLACE}.reward_weights", f"{len(weights)} weights of {len(paths)} rewards")
    if weights is not None:
        return {path: float(weight) for path, weight in zip(paths, weights, strict=True)}
    return paths[0] if len(paths) == 1 else paths


def max_length(config: TrainingConfig, tokens: int, notes: Notes) -> int:
    """Most tokens of a prompt with a completion; longer prompts are left out."""
    length, prompt = config.model.model_max_length, config.training.grpo.max_prompt_length
    if prompt is not None:
        notes.comment("data.init_args.max_length", "prompts that are too long are left out; Oumi's trainers cut them")
        length = prompt + tokens
    elif length is None:
        notes.comment("data.init_args.max_length", f"prompts of more than {PROMPT_LENGTH} tokens are left out")
    return int(length or PROMPT_LENGTH + tokens)


def _micro_batches(config: TrainingConfig, members: int, notes: Notes) -> tuple[int, int]:
    """Prompts of a micro-batch, and micro-batches of an update. TRL's `per_device_train_batch_size` is completions."""
    training = config.training
    size, count = training.per_device_train_batch_size, training.gradient_accumulation_steps
    notes.became["training.per_device_train_batch_size"] = "data.batch_size, in prompts"
    if size % members == 0:
        return size // members, count
    notes.comment(
        "data.init_args.batch_size",
        f"a micro-batch has whole groups of {members} completions; {size} of them are a part of one, which Oumi "
        "divides among devices",
    )
    return 1, max(1, -(-size * count // members))


def _steps_per_rollout(config: TrainingConfig) -> int | None:
    """Updates whose completions are sampled at once: TRL counts micro-batches or completions."""
    training, kwargs = config.training, config.training.trainer_kwargs
    count, place = kwargs.get("steps_per_generation"), f"{PLACE}.steps_per_generation"
    if count is None and (rows := kwargs.get("generation_batch_size")):
        place = f"{PLACE}.generation_batch_size"
        count = rows / training.per_device_train_batch_size
    if not count:
        return None
    updates = count / training.gradient_accumulation_steps
    if updates != int(updates):
        refuse(place, f"{updates:g} updates; completions are sampled for whole updates here")
    return int(updates) if updates > 1 else None


def _module(kwargs: dict[str, Any], epsilon: float, notes: Notes) -> dict[str, Any]:
    beta = float(kwargs.get("beta") or 0.0)
    corrected = bool(kwargs.get("use_bias_correction_kl", True))
    scale = kwargs.get("scale_rewards", "group")
    scale = {True: "group", False: "none"}.get(scale, scale)
    if scale not in get_args(Scale):
        refuse(f"{PLACE}.scale_rewards", f"no counterpart of {scale!r}{nearest(str(scale), get_args(Scale))}")
    if not kwargs.get("disable_dropout", False):
        notes.comment("model", "dropout is off; in Oumi it is on where the model's config has some")
    loss = _loss(kwargs, epsilon)
    if beta and corrected and loss["class_path"] == "GSPOLoss":
        refuse(f"{PLACE}.use_bias_correction_kl", "true has no counterpart with sequences' ratios; set it to false")
    advantage = None if scale == "group" else {"class_path": "GroupMean", "init_args": {"scale": scale}}
    return (
        {"loss": loss}
        | given(advantage=advantage, kl=beta or None, kl_corrected=bool(beta) and corrected)
        | (moving_reference(kwargs))
    )


def _loss(kwargs: dict[str, Any], epsilon: float) -> dict[str, Any]:
    name = str(kwargs.get("loss_type") or "dapo")
    high = kwargs.get("epsilon_high")
    high = epsilon if high is None else float(high)
    if name not in LOSSES:
        refuse(f"{PLACE}.loss_type", f"no counterpart of {name!r}{nearest(name, LOSSES)}")
    level = kwargs.get("importance_sampling_level", "token")
    if level not in ("token", "sequence"):
        refuse(f"{PLACE}.importance_sampling_level", f"no counterpart of {level!r}")
    if level == "sequence" and name != "grpo":
        refuse(f"{PLACE}.importance_sampling_level", f"sequence is for loss_type grpo (GSPO); {name} weighs tokens")
    if name == "cispo":
        if high <= 1:
            why = f"TRL's cispo bounds the ratio itself, and {high:g} would bound it below 1; set e.g. 1.28"
            refuse(f"{PLACE}.epsilon_high", why)
        return {"class_path": "CISPOLoss", "init_args": {"epsilon_high": round(high - 1, 12)}}
    class_path = "GSPOLoss" if level == "sequence" else LOSSES[name]
    return {"class_path": class_path, "init_args": {"epsilon": epsilon, "epsilon_high": high}}
