"""Runs a recipe on another engine, from the objects that LightningCLI built."""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import LRSchedulerConfig
from transformers import PrinterCallback, TrainerCallback
from transformers import __version__ as transformers_version

from oumi_pl import attention
from oumi_pl.adapters import batches, checkpoints
from oumi_pl.adapters.refusals import (
    kind_of,
    refuse_distillation,
    refuse_engine,
    refuse_feedback,
    refuse_model,
    refuse_preferences,
    refuse_rewards,
    refuse_rollouts,
    refuse_settings,
)
from oumi_pl.adapters.run_callback import RunCallback, ValidationSchedule
from oumi_pl.adapters.trainers import build_trainer, import_trl, training_arguments
from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import enabled_checkpoints
from oumi_pl.callbacks.run_folder import RunFolder, nothing_left
from oumi_pl.data.base import TextData
from oumi_pl.losses.causal import is_cross_entropy
from oumi_pl.models.lm import LM, documents, padded
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.distill import Distill
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.grpo import GRPO
from oumi_pl.modules.kto import KTO
from oumi_pl.modules.reward import Reward
from oumi_pl.runs import folders
from oumi_pl.terminal.text import echo
from oumi_pl.types import Batch


def run(
    engine: str, trainer: Any, module: LanguageModule, data: TextData, callbacks: Sequence[TrainerCallback] = ()
) -> Any:
    """Trains like `trainer.fit(module, data)`, but in the loop of another engine; returns the engine's trainer.

    Args:
        engine: `hf` or `trl`.
        trainer: A Lightning trainer with settings, callbacks and loggers; its loops do not run.
        module: SFT, Pretrain, DPO, KTO, GRPO, Reward or Distill. Its model is trained; if it has none, the module
            builds one.
        data: The data module of the recipe.
        callbacks: Additional transformers callbacks, called after ours. The keyword argument `train_dataloader` of
            their hooks is an `EngineLoader`, which has the micro-batches of the update.

    Raises:
        UserError: the engine does not support the recipe.
    """
    _refuse_before_loading(engine, trainer, module, data)
    _connect(trainer, module, data)
    _build_model(trainer, module, data)
    # the checks run a few tokens, for which compiling is not worth its time
    with torch.compiler.set_stance("force_eager") if module.compile_layers else contextlib.nullcontext():
        refuse_model(engine, module, data.packing)
    module.engine_notes = list(_notes(engine, module))
    optimizer, schedule = _optimizers(trainer, module)
    checkpoint, position = _resume(trainer, engine)
    total = module.total_steps()
    is_trained = _is_trained(trainer, total)
    loader = _loader(trainer, module, data, position)
    validation = ValidationSchedule(trainer, data, loader.epoch_length, total)
    run_callback = RunCallback(trainer, module, data, loader, validation)
    module.log_to = run_callback.log
    try:
        # the engine creates its output folder at once, but our run folder is created only when training begins
        with _model_restored(module), tempfile.TemporaryDirectory() as folder:
            engine_trainer = build_trainer(
                engine,
                module,
                training_arguments(trainer, module, data, folder=folder, total=total, lr=schedule.base_lrs[0]),
                processing_class=copy.deepcopy(data.tokenizer),  # a copy, because engines set its pad token
                optimizers=(optimizer, schedule),
                callbacks=[run_callback, *callbacks],
            )
            engine_trainer.run_callback = run_callback
            engine_trainer.remove_callback(PrinterCallback)
            module.keep_adapters_in_float32()  # TRL casts adapters of quantized models to bfloat16
            if is_trained:  # but killed before its end: what is left is the export
                engine_trainer._load_from_checkpoint(str(checkpoint))
                run_callback.start()
            else:
                engine_trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        run_callback.finish()  # after `_model_restored`, because the export writes the model's config
    except BaseException as error:
        run_callback.call("on_exception", error)
        raise
    finally:
        module.log_to = None
        if run_callback.preemption is not None:
            run_callback.preemption.teardown(trainer, module, "fit")
    return engine_trainer


def _is_trained(trainer: Any, total: int) -> bool:
    """Whether the last update was made before the run was killed.

    Raises:
        UserError: it was made, and the run is finished.
    """
    folder = find(trainer, RunFolder)
    if trainer.global_step >= total and (folder is None or not folder.resumes_unfinished()):
        raise nothing_left(trainer.global_step)
    return trainer.global_step >= total


def _refuse_before_loading(engine: str, trainer: Any, module: LanguageModule, data: Any) -> None:
    """Makes all checks that are possible before anything is loaded."""
    refuse_engine(engine, module)
    refuse_settings(engine, trainer)
    if isinstance(module, DPO):
        refuse_preferences(module)
    if isinstance(module, KTO):
        refuse_feedback(module, trainer.accumulate_grad_batches)
    if isinstance(module, GRPO):
        refuse_rollouts(module, data)
    if isinstance(module, Reward):
        refuse_rewards(module)
    if isinstance(module, Distill):
        refuse_distillation(module)
    if engine == "trl":
        import_trl()


def _connect(trainer: Any, module: LanguageModule, data: TextData) -> None:
    """Connects trainer, module and data, and sets up the data, as `trainer.fit` does at its start."""
    trainer.state.fn, trainer.state.status, trainer.training = TrainerFn.FITTING, TrainerStatus.RUNNING, True
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)
    data.prepare_data()
    if (folder := find(trainer, RunFolder)) is not None:
        folder.setup(trainer, module, "fit")
    data.setup("fit")


def _build_model(trainer: Any, module: LanguageModule, data: TextData) -> None:
    """Builds the model as Lightning would, then sets attention and layout for the engine.

    Our own attention reads the documents of a packed row from a context that only our modules enter. The attention of
    transformers finds documents by their positions.
    """
    with trainer.precision_plugin.module_init_context():
        module.configure_model()
    model = module.causal_lm
    _use_their_attention(model)
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    if data.packing and module.unit == "targets":
        model.layout, model.layout_reason = documents, ""
    else:
        model.layout, model.layout_reason = padded, "the engine reads padded rows"
    if module.reference is not None:
        module.reference.open(("train", "validation"), in_memory=True)
    if isinstance(module, Distill) and (teacher := module.reference.frozen_model) is not None:
        _use_their_attention(teacher)
        teacher.layout = model.layout


def _use_their_attention(model: LM) -> None:
    if model.base.config._attn_implementation == attention.NAME:
        model.base.set_attn_implementation("sdpa" if getattr(model.base, "_supports_sdpa", True) else "eager")


def _notes(engine: str, module: LanguageModule) -> Iterator[str]:
    """Notes on the engine, printed before the first update."""
    versions = f"transformers {transformers_version}"
    if engine == "hf":
        yield f"engine: transformers.Trainer, {versions}"
    else:
        name = "experimental.gkd.GKD" if isinstance(module, Distill) else kind_of(module).__name__
        yield f"engine: trl.{name}Trainer, TRL {import_trl().__version__}, {versions}"
    if module.unit == "rows":
        return
    if isinstance(module, Distill):
        yield "logits of student and teacher are computed for all positions at once"
        return
    if not is_cross_entropy(module.loss):
        twice = ", and TRL runs the model twice" if engine == "trl" else ""
        yield f"{type(module.loss).__name__} is computed on full logits{twice}"
    elif engine == "hf":
        yield "logits are computed for all positions at once, including those without loss"


def _optimizers(trainer: Any, module: LanguageModule) -> tuple[Any, Any]:
    """Builds the recipe's optimizer and schedule, and registers them with the Lightning trainer."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    trainer.strategy.optimizers = [optimizer]
    trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(schedule)]
    return optimizer, schedule


def _resume(trainer: Any, engine: str) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to resume from, or None, and the position in the data."""
    folder = find(trainer, RunFolder)
    start = {"epoch": 0, "update": 0}
    if folder is None or folder.resume is None:
        return None, start
    checkpoint, damaged = checkpoints.newest_whole(folder.resume / folders.CHECKPOINTS)
    if checkpoint is None:
        return None, start
    for path, why in damaged.items():
        echo(f"note: {path} is damaged: {why}; what came after {checkpoint.name} is trained again")
    folders.set_aside(damaged)
    echo(f"engine {engine}: resuming from {checkpoint}")
    return checkpoint, checkpoints.load(checkpoint, trainer, folder, enabled_checkpoints(trainer))


def _loader(trainer: Any, module: LanguageModule, data: TextData, position: dict[str, Any]) -> batches.EngineLoader:
    if isinstance(module, DPO):
        convert: Any = batches.pair_inputs
    elif isinstance(module, KTO):
        convert = partial(batches.feedback_inputs, mismatched=_mismatched(data) if module.kl else None)
    elif isinstance(module, GRPO):
        convert = batches.rollout_inputs
    elif isinstance(module, Reward):
        convert = partial(batches.reward_inputs, pad=data.pad_id, with_margins=module.loss.needs_margins)
    elif isinstance(module, Distill):
        convert = batches.distillation_inputs
    else:
        layout, is_own = module.causal_lm.layout, not is_cross_entropy(module.loss)
        convert = partial(batches.token_inputs, layout=layout, labels_are_shifted=is_own)
    micro_batches = trainer.accumulate_grad_batches
    epoch, fetched = position["epoch"], position["update"] * micro_batches
    return batches.EngineLoader(data.train_dataloader(), convert, micro_batches, epoch, fetched)


def _mismatched(data: Any) -> Callable[[list[int]], Batch]:
    """Returns the batch of the mismatched rows of some training rows."""
    return lambda ids: data.batch("train", data.mismatched_ids("train", ids))


@contextlib.contextmanager
def _model_restored(module: LanguageModule) -> Iterator[None]:
    """Restores a model's configs and forward methods, which engines change, at the end of the block.

    They set `use_cache` and the ids of special tokens, which would end up in the export.
    """
    hf, base = module.causal_lm.hf, module.causal_lm.base
    changed = [base.config, *([base.generation_config] if base.can_generate() else [])]
    configs = [(config, copy.deepcopy(vars(config))) for config in changed]
    forwards = {model: vars(model).get("forward") for model in (hf, base)}
    # with a cache, transformers ignores the borders of packed documents; engines turn it off only in the outer config
    base.config.get_text_config().use_cache = False
    try:
        yield
    finally:
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)
        for model, forward in forwards.items():
            vars(model).pop("forward", None)
            if forward is not None:
                model.forward = forward
