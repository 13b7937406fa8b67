"""Runs a recipe on another engine, from the objects that LightningCLI made."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import LRSchedulerConfig
from transformers import PrinterCallback, TrainerCallback
from transformers import __version__ as transformers_version

from oumi_pl import attention
from oumi_pl.adapters import batches, engines, position
from oumi_pl.adapters.course import Course
from oumi_pl.adapters.losses import is_plain
from oumi_pl.adapters.refusals import refuse_engine, refuse_model, refuse_preferences, refuse_settings
from oumi_pl.adapters.settings import Validations, arguments, find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.models.preference import choose_layout
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.reference import FrozenModel
from oumi_pl.runs import folders


def run(engine: str, trainer: Any, module: Any, data: Any, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    """Trains as `trainer.fit(module, data)` does, in the loop of another engine.

    Args:
        engine: `hf` or `trl`.
        trainer: A Lightning trainer, for its settings, callbacks and loggers; it drives nothing.
        module: SFT, Pretrain or DPO. If its model is built, training starts from it; else the module builds it.
        data: The data of the recipe.
        callbacks: Further callbacks of transformers, called after ours at each event. Before training begins, each
            finds the engine's trainer as its attribute `trainer`, whose `update_batches` are the micro-batches of the
            update that is being trained on, in the engine's layout, and `native_batches` the same in ours.

    Returns:
        The engine's trainer, trained.

    Raises:
        UserError: for what the engine can't do as the recipe says.
    """
    refuse_engine(engine, module)
    refuse_settings(engine, trainer)
    if isinstance(module, DPO):
        refuse_preferences(module)
    if engine == "trl":
        engines.import_trl()
    _attach(trainer, module, data)
    with contextlib.ExitStack() as changes:
        driven, resumed = _prepared(changes, engine, trainer, module, callbacks=callbacks)
        _train(driven, changes, resumed)
    return driven


def _attach(trainer: Any, module: Any, data: Any) -> None:
    """Makes the parts of a run known to each other, as the first lines of `trainer.fit` do."""
    trainer.state.fn, trainer.state.status, trainer.training = TrainerFn.FITTING, TrainerStatus.RUNNING, True
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)
    data.prepare_data()
    for callback in trainer.callbacks:
        if isinstance(callback, RunFolder):
            callback.setup(trainer, module, "fit")
    data.setup("fit")


def _prepared(
    changes: contextlib.ExitStack, engine: str, trainer: Any, module: Any, *, callbacks: Sequence[Any]
) -> tuple[Any, Path | None]:
    """The engine's trainer, ready to begin, and the checkpoint that it goes on from; `changes` are to be undone."""
    data = trainer.datamodule
    _build(trainer, module, data)
    refuse_model(engine, module, data.packing)
    _notes(engine, module)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    trainer.strategy.optimizers = [optimizer]
    trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(schedule)]

    folder, checkpoints = find(trainer, RunFolder), find(trainer, Checkpoints)
    resumed = None if folder is None or folder.resume is None else position.newest(folder.resume / folders.CHECKPOINTS)
    if resumed is not None:
        position.load(resumed, trainer, folder, checkpoints)
        print(f"engine {engine}: going on from {resumed}")
    total = module.total_steps()
    if trainer.global_step >= total and folder is not None:
        folder.on_fit_end(trainer, module)  # says so
    course = _course(trainer, module, data, total)

    # the run folder is made when all else stands; until then the engine needs a place to make a directory in
    place = Path(changes.enter_context(tempfile.TemporaryDirectory()))
    changes.enter_context(_restored(module))
    # with a cache, transformers would not look where packed documents begin; engines say so to the outer config alone
    module.causal_lm.base.config.get_text_config().use_cache = False
    lr = schedule.base_lrs[0]
    settings = arguments(trainer, module, data, output_dir=place, total=total, lr=lr)
    make = {"hf": engines.hf, "trl": engines.trl_dpo if isinstance(module, DPO) else engines.trl_sft}[engine]
    tokenizer = copy.deepcopy(data.tokenizer)
    parts = engines.Parts(settings, tokenizer, (optimizer, schedule), [course, *callbacks])
    driven = engines.made(make, module, parts)
    driven.remove_callback(PrinterCallback)
    module._keep_adapters_in_float32()  # TRL rounds those of quantized models
    driven.follow(course)
    for callback in callbacks:
        callback.trainer = driven
    return driven, resumed


def _build(trainer: Any, module: Any, data: Any) -> None:
    """Builds the model as Lightning would, and gives it an attention that works in the engine's own forward pass.

    Ours for packed rows is told by a context where documents end, which an engine does not enter; transformers' sdpa,
    which it builds upon, finds out by itself, from positions.
    """
    if module.model is None:
        with trainer.precision_plugin.module_init_context():
            module.model = module.build(data.tokenizer, data.added_tokens, data.packing)
        module.on_model_built()
    base = module.causal_lm.base
    if base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation("sdpa" if getattr(base, "_supports_sdpa", True) else "eager")
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    if isinstance(module, DPO):
        policy, reference = module.policy, module.reference
        policy.layout, policy.layout_reason = choose_layout(policy, share_prompt=False)  # for our validation
        if reference.kind == "adapters":
            reference.open(("train", "validation"))
        else:  # in memory, for the engine computes with it in each step
            held = reference._held or copy.deepcopy(module.policy)
            reference._held, reference.opened = None, FrozenModel(reference._placed(held))
            reference.description = "reference: a frozen copy of the initial model"


def _notes(engine: str, module: Any) -> None:
    """What the engine does otherwise than Lightning would, for the first lines of the run."""
    notes = [f"engine: transformers.Trainer, transformers {transformers_version}"]
    if engine == "trl":
        name = "DPOTrainer" if isinstance(module, DPO) else "SFTTrainer"
        notes = [f"engine: trl.{name}, TRL {engines.import_trl().__version__}, transformers {transformers_version}"]
    if isinstance(module, DPO):
        twice = "prompts are computed twice per pair, as TRL does, and counted twice in train/num_tokens"
        notes += [module.reference.description, twice]
    elif not is_plain(module.loss):
        again = ", and TRL runs the model twice" if engine == "trl" else ""
        notes.append(f"{type(module.loss).__name__} is computed on full logits{again}")
    elif engine == "hf":
        notes.append("logits are computed for all positions at once, also for those without loss")
    module.notes = notes


def _course(trainer: Any, module: Any, data: Any, total: int) -> Course:
    if isinstance(module, DPO):
        convert: Any = batches.pairs
    else:
        convert = partial(batches.tokens, own_loss=not is_plain(module.loss))
    loader = data.train_dataloader()
    stands = data._position or {"epoch": 0, "update": 0}
    ours = batches.Batches(loader, convert, stands["epoch"], stands["update"] * trainer.accumulate_grad_batches)
    return Course(trainer, module, data, ours, Validations(trainer, data, ours.length, total))


@contextlib.contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Undoes what engines do to a model besides training it: changed configs, patched forward methods.

    They set `use_cache` and the ids of special tokens, which the export would write down.
    """
    hf, base = module.causal_lm.hf, module.causal_lm.base
    kept = [(holder, copy.deepcopy(vars(holder))) for holder in (base.config, base.generation_config) if holder]
    forwards = {model: vars(model).get("forward") for model in (hf, base)}
    try:
        yield
    finally:
        for holder, values in kept:
            vars(holder).clear()
            vars(holder).update(values)
        for model, forward in forwards.items():
            vars(model).pop("forward", None)
            if forward is not None:
                model.forward = forward


def _train(driven: Any, changes: contextlib.ExitStack, resumed: Path | None) -> None:
    """Trains, and ends the run as Lightning would: `finished` and exported, or `failed`, or `stopped`."""
    course = driven.course
    with course.logging():
        try:
            driven.train(resume_from_checkpoint=None if resumed is None else str(resumed))
            changes.close()  # the export is to see the model as it was built
            course.watch("on_train_end")
            course.watch("on_fit_end")
            for logger in course.lightning.loggers:
                logger.finalize("success")
        except BaseException as error:
            course.watch("on_exception", error)
            raise
        finally:
            if course.preemption is not None:
                course.preemption.teardown(course.lightning, course.module, "fit")
