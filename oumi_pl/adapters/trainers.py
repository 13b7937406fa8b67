"""The trainers of the engines, adapted to our batches. TRL is imported only when it is used."""

import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from oumi_pl.adapters import checkpoints
from oumi_pl.adapters.batches import EngineBatch, EngineLoader, completion_values, target_values
from oumi_pl.adapters.losses import (
    INSTEAD,
    compute_loss_func,
    dpo_settings,
    gkd_settings,
    grpo_settings,
    kto_settings,
    reward_settings,
)
from oumi_pl.adapters.refusals import kind_of
from oumi_pl.adapters.run_callback import RunCallback
from oumi_pl.callbacks.checkpoint import enabled_checkpoints
from oumi_pl.data.base import TextData
from oumi_pl.data.loader import as_it_is
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import is_cross_entropy
from oumi_pl.losses.distillation import DistillationSums, TeacherHead, distillation_sums
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.distill import Distill, sampled_targets
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.grpo import GRPO
from oumi_pl.modules.kto import KTO
from oumi_pl.modules.reference import refuse_other_start
from oumi_pl.modules.reward import Reward, outcome_sums, pair_sums
from oumi_pl.modules.sft import SFT
from oumi_pl.runs import checksums
from oumi_pl.types import IGNORE_INDEX, Sums


class EngineMixin:
    """Gives a trainer of transformers or TRL our batches and metrics. Has to come before it among the base classes."""

    run_callback: RunCallback
    """Set before `train` is called."""
    micro_batch: EngineBatch
    """The micro-batch that is being trained on."""

    def get_train_dataloader(self) -> EngineLoader:
        """Our loader. The engine would shuffle and collate rows in its own way."""
        return self.run_callback.loader

    def training_step(self, model: Any, inputs: EngineBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the engine's step, and adds the sums that our metrics need to those of the update."""
        self.micro_batch, outputs = inputs, []
        # hooks, because the engine's own step returns only the loss
        hooks = [
            observed.register_forward_hook(lambda _model, _args, output: outputs.append(self.reduce_output(output)))
            for observed in self.observed_models()
        ]
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()
        self.run_callback.add_to_update(inputs.native, self.batch_sums(outputs))
        return loss

    def observed_models(self) -> list[Any]:
        """The models whose outputs the metrics need, in the order in which the engine runs them."""
        return [self.model]  # type: ignore[attr-defined]

    def reduce_output(self, output: Any) -> Tensor:
        """Reduces a model's output to what the metrics need: how many targets have the largest logit."""
        hits = getattr(output, "is_top1", None)  # TRL's heads return this in place of logits
        if hits is None:
            hits = output.logits.detach().argmax(-1) == self.micro_batch["shift_labels"].to(output.logits.device)
        return hits.sum()

    def batch_sums(self, outputs: list[Tensor]) -> Sums:
        """The sums of the micro-batch without `loss`, from the reduced outputs of the models."""
        return {"correct": outputs[0]}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates with our sums, which do not depend on batch sizes. Engines average the means of batches."""
        engine: Any = self
        with engine.accelerator.autocast():
            metrics = self.run_callback.validate()
        engine.control = engine.callback_handler.on_evaluate(engine.args, engine.state, engine.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves our part first, then the engine's, whose last file marks the checkpoint as complete, then checksums."""
        engine: Any = self
        run = self.run_callback
        folder = Path(engine.args.output_dir) / f"checkpoint-{engine.state.global_step}"
        checkpoints.save(folder, run.lightning, run.metrics_row, run.checkpoints)
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        checksums.add_list(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: our export writes a model card."""


class RowsMixin(EngineMixin):
    """The mixin for trainers of TRL that count rows."""

    def observed_models(self) -> list[Any]:
        """The policy, and the reference if it is another model."""
        engine: Any = self
        return [engine.model] if engine.ref_model is None else [engine.model, engine.ref_model]

    def reduce_output(self, output: Any) -> Tensor:
        """The token log-probabilities, `[rows, seq - 1]`."""
        return output.log_probs.detach()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Weights TRL's loss by the rows of the micro-batch, so that the loss of an update is the mean over all rows.

        TRL averages over a micro-batch, and transformers then over the micro-batches of an update. Rows in a short
        micro-batch would count for more.
        """
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        native = self.micro_batch.native
        return loss * len(native["sample_ids"]) * self.run_callback.module.share(native)

    def refuse_other_start(self, policy: Tensor, reference: Tensor) -> None:
        """Refuses a policy that differs from its reference before the first update, `[targets]` each.

        Raises:
            UserError: it does.
        """
        module: Any = self.run_callback.module
        if self.run_callback.lightning.global_step == 0 and len(policy):
            refuse_other_start(float((policy - reference).abs().max()), module.reference.is_half_precision)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the one-row dataset unchanged: rows are tokenized already, and come from our loader."""
        return dataset


class PairsMixin(RowsMixin):
    """The mixin for `trl.DPOTrainer`."""

    def batch_sums(self, outputs: list[Tensor]) -> Sums:
        """The sums for our preference metrics, from TRL's log-probabilities of policy and reference.

        Raises:
            UserError: policy and reference differ before the first update.
        """
        module, lightning = cast("DPO", self.run_callback.module), self.run_callback.lightning
        mask = self.micro_batch["completion_mask"].to(outputs[0].device)
        policy, reference = (target_values(values.float(), mask) for values in outputs)
        self.refuse_other_start(policy, reference)
        pairs = module.pairs(lightning.strategy.batch_to_device(self.micro_batch.native), policy, reference)
        sums = module.pair_sums(pairs, policy.new_zeros(pairs.count))
        return {name: value for name, value in sums.items() if name != "loss"}


class FeedbackMixin(RowsMixin):
    """The mixin for `trl.KTOTrainer`."""

    def batch_sums(self, outputs: list[Tensor]) -> Sums:
        """The sums for our metrics, from TRL's log-probabilities of policy and reference.

        TRL runs each of them on the mismatched rows first, if it estimates the KL divergence.

        Raises:
            UserError: policy and reference differ before the first update.
        """
        module, lightning = cast("KTO", self.run_callback.module), self.run_callback.lightning
        kl = outputs[0].new_zeros(())
        if module.kl:
            mismatched, policy, ref_mismatched, reference = (values.float() for values in outputs)
            masked = self.micro_batch["KL_completion_mask"][:, 1:].to(mismatched.device)
            kl = ((mismatched - ref_mismatched) * masked).sum().div(len(masked)).clamp(min=0)
        else:
            policy, reference = (values.float() for values in outputs)
        mask = self.micro_batch["completion_mask"][:, 1:].bool().to(policy.device)
        policy, reference = policy[mask], reference[mask]
        self.refuse_other_start(policy, reference)
        native = lightning.strategy.batch_to_device(self.micro_batch.native)
        return module.response_sums(module.responses(native, policy, reference, kl))


class RewardMixin(RowsMixin):
    """The mixin for `trl.RewardTrainer`."""

    def observed_models(self) -> list[Any]:
        """The model; there is no reference."""
        return [self.model]  # type: ignore[attr-defined]

    def reduce_output(self, output: Any) -> Tensor:
        """The rewards, `[2 pairs]`."""
        return output.logits.detach()[:, 0]

    def batch_sums(self, outputs: list[Tensor]) -> Sums:
        """The sums for our metrics, from TRL's rewards."""
        chosen, rejected = outputs[0].float().chunk(2)
        pairs = len(self.micro_batch.native["sample_ids"])  # 0 for a stand-in
        return pair_sums(chosen[:pairs], rejected[:pairs]) | outcome_sums(chosen[:0], chosen[:0])


class DistillationMixin(EngineMixin):
    """The mixin for TRL's `GKDTrainer`."""

    sums: DistillationSums
    """Of the micro-batch, for our metrics."""

    def observed_models(self) -> list[Any]:
        """None: the loss sees the logits of both models."""
        return []

    def generalized_jsd_loss(self, student_logits: Tensor, teacher_logits: Tensor, **kwargs: Any) -> Tensor:
        """TRL's loss, at our temperature (TRL's is of sampling alone), of the logits that stand for tokens."""
        module = cast("Distill", self.run_callback.module)
        vocab, temperature = module.reference.vocab, module.temperature
        carries_loss = kwargs["labels"] != IGNORE_INDEX
        with torch.no_grad():
            student, teacher = student_logits[carries_loss], teacher_logits[carries_loss]
            self.sums = distillation_sums(
                student,
                kwargs["labels"][carries_loss],
                nn.Identity(),
                TeacherHead(teacher, nn.Identity(), None, temperature, vocab),
                module.divergence,
                vocab=vocab,
                temperature=temperature,
            )
        logits = (student_logits[..., :vocab], teacher_logits[..., :vocab])
        return super().generalized_jsd_loss(*logits, **kwargs | {"temperature": temperature})  # type: ignore[misc]

    def batch_sums(self, outputs: list[Tensor]) -> Sums:
        """The sums for our metrics, from the logits of both models."""
        sums = {name: value for name, value in self.sums._asdict().items() if name != "loss"}
        return sums | sampled_targets(self.micro_batch.native, self.sums.loss)


class RolloutsMixin(EngineMixin):
    """The mixin for `trl.GRPOTrainer`: it trains on completions that our data module sampled and scored."""

    ref_logps: Tensor | None = None
    """Log-probabilities of the micro-batch's targets under the reference, `[targets]`."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Moves a micro-batch to the device, with the reference's log-probabilities. TRL's own method would sample."""
        prepared = Trainer._prepare_inputs(self, inputs)  # type: ignore[arg-type]
        module, lightning = cast("GRPO", self.run_callback.module), self.run_callback.lightning
        if module.kl:
            with torch.no_grad():
                self.ref_logps = module.ref_logps(lightning.strategy.batch_to_device(inputs.native))
            prepared["ref_per_token_logps"] = completion_values(self.ref_logps, prepared["tool_mask"])
        return prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Weights TRL's loss so that the loss of an update is the mean over its completions, or its tokens.

        TRL averages over a micro-batch, and then over the micro-batches of an update; but for losses that it divides by
        the tokens of all of them.
        """
        loss, engine = super().compute_loss(*args, **kwargs), cast("Any", self)  # type: ignore[misc]
        if engine.loss_type in ("dapo", "cispo"):
            return loss
        module, native = self.run_callback.module, self.micro_batch.native
        count = module.count(native)[module.unit] * engine.current_gradient_accumulation_steps
        return loss * count * module.share(native) / engine.args.gradient_accumulation_steps

    def reduce_output(self, output: Any) -> Tensor:
        """The token log-probabilities, `[rows, seq - 1]`."""
        return output.log_probs.detach()

    def batch_sums(self, outputs: list[Tensor]) -> Sums:
        """The sums for our metrics, from TRL's log-probabilities."""
        module, lightning = cast("GRPO", self.run_callback.module), self.run_callback.lightning
        native: Any = lightning.strategy.batch_to_device(self.micro_batch.native)
        mask = self.micro_batch["tool_mask"].bool().to(outputs[-1].device)
        logps = outputs[-1][:, -mask.shape[1] :][mask].float()
        completions = module.completions(native, logps)
        sums = module.rollout_sums(native, completions)
        if module.kl and self.ref_logps is not None:
            sums["kl"] = module.kl_terms(completions, self.ref_logps).double().sum()
        return {name: value for name, value in sums.items() if name != "loss"}


class HFTrainer(EngineMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our batches."""


def training_arguments(
    trainer: Any, module: LanguageModule, data: TextData, *, folder: str, total: int, lr: float
) -> dict[str, Any]:
    """Translates settings to fields of `transformers.TrainingArguments` and its subclasses in TRL.

    Betas, weight decay and schedule are missing, because the engine gets our optimizer and schedule as objects.

    Args:
        trainer: The Lightning trainer, which has the recipe's settings.
        module: The module of the recipe.
        data: The data module of the recipe.
        folder: Folder for the engine's checkpoints.
        total: Optimizer steps of the run.
        lr: The highest learning rate of the first parameter group.
    """
    checkpoints = enabled_checkpoints(trainer)
    precision = str(trainer.precision)
    saving: dict[str, Any] = {"save_strategy": "no"}
    if checkpoints is not None:
        saving = {"save_strategy": "steps", "save_steps": checkpoints.every, "save_total_limit": checkpoints.keep}
    return saving | {
        "output_dir": folder,
        "per_device_train_batch_size": data.batch_size,
        "per_device_eval_batch_size": data.eval_batch_size,
        "gradient_accumulation_steps": trainer.accumulate_grad_batches,
        "max_steps": total,
        "learning_rate": lr,
        "max_grad_norm": float(trainer.gradient_clip_val or 0.0),
        "bf16": precision == "bf16-mixed",
        "fp16": precision == "16-mixed",
        # the layers of the model follow a policy already, which the engine would replace
        "gradient_checkpointing": module.gradient_checkpointing is True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if module.gradient_checkpointing is True else None,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "42")),
        "dataloader_num_workers": data.workers,
        "use_cpu": trainer.strategy.root_device.type == "cpu",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would replace a NaN loss by the mean so far
        "ignore_data_skip": True,  # our loader starts at the position of the checkpoint
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def build_trainer(engine: str, module: LanguageModule, settings: dict[str, Any], **common: Any) -> Any:
    """Builds an engine's trainer for a module.

    Args:
        engine: `hf` or `trl`.
        module: Its model has to be built and, for TRL, its reference opened.
        settings: Fields of `transformers.TrainingArguments`.
        common: Arguments that all trainers take: tokenizer, optimizers, callbacks.

    Raises:
        UserError: the engine refuses the settings.
    """
    builders: dict[type, Any] = {Distill: _trl_gkd, DPO: _trl_dpo, KTO: _trl_kto, Reward: _trl_reward, GRPO: _trl_grpo}
    build: Any = _hf if engine == "hf" else builders.get(kind_of(module), _trl_sft)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # warnings about later releases
            return build(module, settings, common)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--engine: {' '.join(str(error).split())[:300]}; {INSTEAD[3:]}") from error


def import_trl() -> Any:
    """Imports TRL.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import trl
    except ImportError as error:
        raise UserError(
            f"--engine trl needs TRL, which can't be imported ({error}): pip install trl, {INSTEAD}"
        ) from error
    return trl


def _hf(module: SFT, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    args = _on_one_device(TrainingArguments(**settings))
    return HFTrainer(model=module.causal_lm.hf, args=args, compute_loss_func=_loss_function(module), **common)


def _trl_sft(module: SFT, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    trl = import_trl()

    class SFTTrainer(EngineMixin, trl.SFTTrainer):  # type: ignore[name-defined]
        """TRL's trainer with our batches."""

    # TRL must not cut or tokenize rows: ours are tokenized and no longer than data.max_length
    args = trl.SFTConfig(
        **settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **_no_router_loss(module)
    )
    return SFTTrainer(
        model=module.causal_lm.hf,
        args=_on_one_device(args),
        data_collator=as_it_is,
        train_dataset=_one_row(),
        compute_loss_func=_loss_function(module),
        **common,
    )


def _trl_dpo(module: DPO, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    trl = import_trl()

    class DPOTrainer(PairsMixin, trl.DPOTrainer):  # type: ignore[name-defined]
        """TRL's trainer with our batches."""

    args = trl.DPOConfig(
        **settings, max_length=None, disable_dropout=True, **dpo_settings(module.loss), **_no_router_loss(module)
    )
    return _with_reference(DPOTrainer, module, args, common)


def _trl_kto(module: KTO, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    trl = import_trl()

    class KTOTrainer(FeedbackMixin, trl.KTOTrainer):  # type: ignore[name-defined]
        """TRL's trainer with our batches."""

    # TRL refuses single rows, because it would mismatch a row with itself; ours are mismatched with the whole data
    size = max(2, settings["per_device_train_batch_size"])
    args = trl.KTOConfig(
        **settings | {"per_device_train_batch_size": size},
        max_length=None,
        disable_dropout=True,
        **kto_settings(module),
        **_no_router_loss(module),
    )
    return _with_reference(KTOTrainer, module, args, common)


def _trl_reward(module: Reward, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    trl = import_trl()

    class RewardTrainer(RewardMixin, trl.RewardTrainer):  # type: ignore[name-defined]
        """TRL's trainer with our batches."""

    args = trl.RewardConfig(**settings, max_length=None, disable_dropout=True, **reward_settings(module.loss))
    return RewardTrainer(
        model=module.causal_lm.hf,
        args=_on_one_device(args),
        data_collator=as_it_is,
        train_dataset=_one_row(),
        **common,
    )


def _trl_gkd(module: Distill, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    import_trl()
    with warnings.catch_warnings(action="ignore"):  # that it is experimental
        from trl.experimental import gkd

    class GKDTrainer(DistillationMixin, gkd.GKDTrainer):  # type: ignore[misc]
        """TRL's trainer with our batches."""

    teacher = module.reference.frozen_model
    assert teacher is not None
    arguments: dict[str, Any] = settings | gkd_settings(module) | _no_router_loss(module)
    args = gkd.GKDConfig(**arguments, max_length=None, disable_dropout=True)
    return GKDTrainer(
        model=module.causal_lm.hf,
        teacher_model=teacher.hf,
        args=_on_one_device(args),
        data_collator=as_it_is,
        train_dataset=_one_row(),
        **common,
    )


def _trl_grpo(module: GRPO, settings: dict[str, Any], common: dict[str, Any]) -> Any:
    trl = import_trl()
    from datasets import Dataset

    class GRPOTrainer(RolloutsMixin, trl.GRPOTrainer):  # type: ignore[name-defined]
        """TRL's trainer with our batches."""

    data: Any = module.data
    args = trl.GRPOConfig(
        **settings | {"per_device_train_batch_size": data.batch_size * data.completions},
        num_generations=data.completions,
        max_completion_length=data.sampling.max_new_tokens,
        temperature=data.sampling.temperature,
        reward_weights=data.rewards.weights.tolist(),
        scale_rewards=module.advantage.scale,  # type: ignore[attr-defined]
        disable_dropout=True,
        **grpo_settings(module),
        **_no_router_loss(module),
    )
    trainer = GRPOTrainer(
        model=module.causal_lm.hf,
        reward_funcs=list(data.rewards.functions.values()),
        args=_on_one_device(args),
        train_dataset=Dataset.from_dict({"prompt": [""]}),
        **common,
    )
    # only now, because TRL would load a reference by the model's name; ours is the model that the run started from
    trainer.beta = module.kl
    return trainer


def _with_reference(kind: Any, module: DPO | KTO, args: Any, common: dict[str, Any]) -> Any:
    model, reference = module.causal_lm, module.reference.frozen_model
    trainer = kind(
        model=model.hf,
        ref_model=None if reference is None else reference.hf,  # None: the base, adapters disabled
        args=_on_one_device(args),
        data_collator=as_it_is,
        train_dataset=_one_row(),
        **common,
    )
    if model.has_adapters and "ref" in model.hf.peft_config:
        # TRL adds a frozen copy of the adapter as the reference. Our adapters start at zero, so the base alone is the
        # same reference, and our validation uses that. The copy would be saved and exported with the adapter.
        model.hf.delete_adapter("ref")
    return trainer


def _loss_function(module: SFT) -> Any:
    """The engine's `compute_loss_func`; None for plain cross entropy, which models compute themselves."""
    return None if is_cross_entropy(module.loss) else compute_loss_func(module.loss)


def _on_one_device(args: Any) -> Any:
    """Keeps an engine that sees several GPUs from wrapping the model in DataParallel: runs use one device."""
    args._n_gpu = min(1, args.n_gpu)
    return args


def _one_row() -> Any:
    """A dataset for TRL's constructors, which inspect its first row. Training never reads it."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})


def _no_router_loss(module: LanguageModule) -> dict[str, float]:
    """Turns off the load-balancing loss of mixtures of experts: TRL adds it by default, our modules only by config."""
    has_router = hasattr(module.causal_lm.base.config.get_text_config(), "output_router_logits")
    return {"router_aux_loss_coef": 0.0} if has_router else {}
