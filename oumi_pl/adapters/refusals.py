"""Refuses settings that an engine does not support, if possible before any row is read."""

import os
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from oumi_pl import attention
from oumi_pl.adapters.losses import INSTEAD, dpo_settings, gkd_settings, grpo_settings, kto_settings, reward_settings
from oumi_pl.callbacks.advice import Advice, PreferenceWarnings
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.export import Export
from oumi_pl.callbacks.memory import Memory
from oumi_pl.callbacks.metrics import Metrics
from oumi_pl.callbacks.pass_at_k import PassAtK
from oumi_pl.callbacks.predictions import Predictions
from oumi_pl.callbacks.progress import ProgressLine
from oumi_pl.callbacks.report import Report
from oumi_pl.callbacks.rollouts import Rollouts, RolloutWarnings
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.samples import Answers, Samples
from oumi_pl.callbacks.start import Start
from oumi_pl.callbacks.stopping import LastStep, Preemption
from oumi_pl.callbacks.throughput import Throughput
from oumi_pl.callbacks.tracking import Tracking
from oumi_pl.callbacks.trigram import TrigramBaseline
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import is_cross_entropy
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.distill import Distill
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.grpo import GRPO
from oumi_pl.modules.kto import KTO
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.reward import Reward
from oumi_pl.modules.sft import SFT
from oumi_pl.types import IGNORE_INDEX

FITS: dict[type, tuple[str, ...]] = {
    Distill: ("lightning", "trl"),
    DPO: ("lightning", "trl"),
    GRPO: ("lightning", "trl"),
    KTO: ("lightning", "trl"),
    Pretrain: ("lightning", "hf"),
    Reward: ("lightning", "trl"),
    SFT: ("lightning", "hf", "trl"),
}
"""Trainer type -> the engines that can train it. A module counts as the first type that it is an instance of."""
OBSERVERS = (
    *(RunFolder, Start, Throughput, PreferenceWarnings, ProgressLine, Rollouts, RolloutWarnings),
    *(Advice, Answers, Samples, PassAtK, Metrics, TrigramBaseline, Export, Report, Tracking),
)
"""Callbacks that only observe what happens between two updates, so that any engine can call them."""
REPLACED = (LastStep, Memory, Checkpoints, Preemption, Predictions)
"""Callbacks that are not called, because the engine or `RunCallback` does their work."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
REPLACED_METHODS = (
    *("loss_sums", "share", "training_step"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step"),
)
"""Methods of a module that an engine replaces by its own in training."""


def kind_of(module: LanguageModule) -> type:
    """The trainer type that a module counts as; `LanguageModule` if no other engine knows it."""
    return next((kind for kind in FITS if isinstance(module, kind)), LanguageModule)


def refuse_engine(engine: str, module: LanguageModule) -> None:
    """Refuses an engine that can't train a module, or would not call methods that its class overrides.

    Raises:
        UserError: with the engines that can.
    """
    kind = kind_of(module)
    fitting = FITS.get(kind, ("lightning",))
    if engine not in fitting:
        raise UserError(f"engine: {engine} can't train {type(module).__name__}; these can: {', '.join(fitting)}")
    if module.fp8 and engine != "lightning":
        raise UserError(f"model.fp8: {engine} would multiply as without it; train with --engine lightning")
    for name in REPLACED_METHODS:
        if getattr(type(module), name) is not getattr(kind, name):
            raise UserError(
                f"engine: {engine} has its own training loop, which would not call {type(module).__name__}.{name}; "
                "train with --engine lightning"
            )


def refuse_settings(engine: str, trainer: Any) -> None:
    """Refuses settings of the Lightning trainer that an engine would ignore.

    Raises:
        UserError: at the first one.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        strategy = type(trainer.strategy).__name__
        raise UserError(
            f"trainer.devices: --engine {engine} trains on one device, and this run has {trainer.world_size} "
            f"({strategy}): updates are cut by rank and averaged in Lightning alone; set devices: 1, {INSTEAD}"
        )
    if trainer.strategy.root_device.index not in (None, 0):
        raise UserError(
            f"trainer.devices: --engine {engine} takes the first visible GPU; name yours with CUDA_VISIBLE_DEVICES"
        )
    if str(trainer.precision) not in PRECISIONS:
        raise UserError(
            f"trainer.precision: {trainer.precision} is unknown to --engine {engine}; take one of "
            f"{', '.join(PRECISIONS)}, {INSTEAD}"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise UserError(f"trainer.gradient_clip_algorithm: --engine {engine} clips by norm; take it, {INSTEAD}")
    ignored = {
        "fast_dev_run": trainer.fast_dev_run,
        "overfit_batches": trainer.overfit_batches,
        "limit_train_batches": trainer.limit_train_batches != 1.0,
        "limit_val_batches": trainer.limit_val_batches != 1.0,
        "val_check_interval as a time": getattr(trainer, "_val_check_time_interval", None) is not None,
        "reload_dataloaders_every_n_epochs": trainer.reload_dataloaders_every_n_epochs,
    }
    for name, is_set in ignored.items():
        if is_set:
            raise UserError(f"trainer.{name} has no effect with --engine {engine}; leave it out, {INSTEAD}")
    for callback in trainer.callbacks:
        if isinstance(callback, Checkpoints) and callback.asynchronous:
            raise UserError(f"checkpoint.asynchronous: --engine {engine} waits for its files; leave it out, {INSTEAD}")
        if not isinstance(callback, OBSERVERS + REPLACED):
            name = type(callback).__name__
            place = "trainer.max_time" if name == "Timer" else f"trainer.callbacks: {name}"
            raise UserError(
                f"{place} belongs to Lightning's loop, which --engine {engine} does not run; leave it out, {INSTEAD}"
            )


def refuse_preferences(module: DPO) -> None:
    """Refuses losses and references that TRL does not support.

    Raises:
        UserError: with what is supported.
    """
    dpo_settings(module.loss)
    if module.share_prompt is True:
        raise UserError(f"model.share_prompt: TRL computes prompts twice; leave it out, {INSTEAD}")
    _refuse_reference(module)


def refuse_feedback(module: KTO, micro_batches: int) -> None:
    """Refuses losses, references and updates of several micro-batches that TRL does not support in KTO.

    Raises:
        UserError: with what is supported.
    """
    kto_settings(module)
    if module.kl and micro_batches > 1:
        raise UserError(
            "trainer.accumulate_grad_batches: TRL estimates the KL divergence on each micro-batch, not on the update; "
            f"set it to 1 and data.batch_size to {micro_batches} times as many rows, {INSTEAD}"
        )
    _refuse_reference(module)


def refuse_rollouts(module: GRPO, data: Any) -> None:
    """Refuses objectives and rollouts that TRL does not support in GRPO.

    Raises:
        UserError: with what is supported.
    """
    grpo_settings(module)
    if module.share_prompt is True:
        raise UserError(f"model.share_prompt: TRL computes prompts for each completion; leave it out, {INSTEAD}")
    if module.reference is not None:
        _refuse_reference(module)
    if data is not None and data.samples and not data.engine.is_exact:
        name = type(data.engine).__name__
        raise UserError(
            f"data.engine: --engine trl trains on what Generate samples, not {name}; leave it out, {INSTEAD}"
        )


def refuse_rewards(module: Reward) -> None:
    """Refuses losses of a reward model that TRL does not support.

    Raises:
        UserError: with what is supported.
    """
    reward_settings(module.loss)
    if module.outcome_loss is not None:
        raise UserError(f"model.outcome_loss: TRL's RewardTrainer trains on pairs alone; leave it out, {INSTEAD}")
    if module.share_prompt is True:
        raise UserError(f"model.share_prompt: TRL computes prompts twice; leave it out, {INSTEAD}")


def refuse_distillation(module: Distill) -> None:
    """Refuses losses and teachers that TRL does not support.

    Raises:
        UserError: with what is supported.
    """
    gkd_settings(module)
    if module.reference.top_k is not None:
        raise UserError(f"model.top_k: TRL runs the teacher and compares all tokens; leave it out, {INSTEAD}")


def _refuse_reference(module: DPO | KTO | GRPO) -> None:
    reference = module.reference
    assert reference is not None
    if not reference.is_initial:
        raise UserError(
            f"model.reference: --engine trl compares with the initial model, not with {reference.name}; {INSTEAD[3:]}"
        )
    if reference.sync_every is not None:
        raise UserError(f"model.sync_every: with --engine trl the reference stays what it is; leave it out, {INSTEAD}")
    if module.lora is not None and reference.kind != "adapters":
        raise UserError(
            "model.reference: with LoRA, --engine trl compares with the base, adapters disabled: leave out "
            f"reference and lora.bias, {INSTEAD}"
        )


def refuse_model(engine: str, module: LanguageModule, packing: bool) -> None:
    """Refuses a model for which the engine would compute a different loss. Runs it on a few tokens.

    Raises:
        UserError: with the reason.
    """
    model = module.causal_lm
    model.refuse_unknown_logits()  # again, because the attention has changed since it was built
    if packing and module.unit == "targets":
        try:
            attention.refuse_unless_isolating(model.base)
        except UserError as error:
            raise UserError(
                f"data.packing: {type(model.base).__name__} with transformers' own attention lets packed documents see "
                f"each other, and --engine {engine} runs no other; set data.packing to false, {INSTEAD}"
            ) from error
    config = model.base.config.get_text_config()
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0):
        raise UserError(
            f"model.config.output_router_logits: --engine {engine} weighs the experts' balancing loss by micro-batch "
            f"and not by token; leave it out, {INSTEAD}"
        )
    models_own_loss = engine == "hf" and isinstance(module, SFT) and is_cross_entropy(module.loss)
    if models_own_loss and not _averages_over_targets(model.base):
        raise UserError(
            f"{type(model.base).__name__} averages its loss in a way of its own, so that transformers.Trainer can't "
            f"weigh all target tokens of an update alike; {INSTEAD[3:]}"
        )
    if module.scoring:  # TRL runs the head as a part of the model
        return
    if engine == "trl" and (not isinstance(model.head, nn.Linear) or hasattr(model.head, "base_layer")):
        raise UserError(
            "model.lora: --engine trl multiplies by the output head's weight itself, so that an adapter or added "
            f"tokens on it would not be trained; leave the head out, {INSTEAD}"
        )


@torch.no_grad()
def _averages_over_targets(base: Any) -> bool:
    """Tests whether a model's loss is the cross entropy of `shift_labels` divided by `num_items_in_batch`."""
    weight = base.get_input_embeddings().weight
    ids = torch.arange(8, device=weight.device)[None] % len(weight)
    targets = ids.roll(-1, 1).index_fill(1, torch.tensor([0, 1, 4], device=weight.device), IGNORE_INDEX)
    labels = {"labels": ids, "shift_labels": targets, "num_items_in_batch": torch.tensor(7, device=weight.device)}
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        output = base(input_ids=ids, use_cache=False, **labels)
    except TypeError:  # a forward method that takes no such arguments
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    expected = nn.functional.cross_entropy(output.logits[0].float(), targets[0], reduction="sum") / 7
    return getattr(base, "accepts_loss_kwargs", True) and bool(torch.isclose(output.loss.float(), expected, rtol=1e-2))
