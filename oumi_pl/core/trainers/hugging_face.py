"""Trainers of transformers and TRL as Oumi's, and the trainer of any type by its name."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from oumi_pl.core.trainers.base import BaseTrainer
from oumi_pl.core.trainers.kinds import Adapted
from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import add_list, model_files, refuse_damaged
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainerType

logger = logging.getLogger("oumi_pl")

RECIPES = ("SFT", "DPO", "KTO", "PRETRAIN")
"""Types that are recipes of oumi_pl's own: they build their own model and data."""


class HuggingFaceTrainer(BaseTrainer):
    """Wraps a `transformers.Trainer`, or one of TRL's.

    Args:
        hf_trainer: The trainer.
        processor: Saved with the model, if there is one besides the trainer's own tokenizer.
    """

    def __init__(self, hf_trainer: Any, processor: Any = None) -> None:
        self.hf_trainer = hf_trainer
        self.processor = processor

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains to the end, from the start or from a checkpoint."""
        if isinstance(resume_from_checkpoint, str):
            refuse_damaged(Path(resume_from_checkpoint))
        self.hf_trainer.train(resume_from_checkpoint=resume_from_checkpoint)

    def save_state(self) -> None:
        """Writes `trainer_state.json`."""
        self.hf_trainer.save_state()

    def save_model(self, config: Any = None, final: bool = True) -> None:
        """Writes the model at the top of the output folder; an adapter as `peft.peft_save_mode` says.

        Sharded weights (FSDP, DeepSpeed) are gathered by transformers; an adapter of theirs is always saved alone.

        Args:
            config: The configuration of the run.
            final: Whether an adapter may be merged.
        """
        trainer, output_dir = self.hf_trainer, Path(self.hf_trainer.args.output_dir)
        if trainer.is_world_process_zero():
            with model_files(output_dir):
                self._write_model(output_dir, config, final)
        else:
            trainer.save_model(str(output_dir))

    def _write_model(self, output_dir: Path, config: Any, final: bool) -> None:
        from oumi_pl.core.trainers.saving import save_weights

        trainer = self.hf_trainer
        trainer.save_model(str(output_dir))
        if self.processor is not None:
            self.processor.save_pretrained(output_dir)
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        mode = config.peft.peft_save_mode.name if config is not None and final else "ADAPTER_ONLY"
        if mode == "ADAPTER_ONLY" or not isinstance(model, Adapted):
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("peft.peft_save_mode: %s can't be done on sharded weights; the adapter is saved alone", mode)
            return
        save_weights(cast("Any", model), output_dir, mode=mode)

    def get_last_eval_metrics(self) -> dict[str, Any]:
        """The metrics of the last evaluation."""
        rows = reversed(self.hf_trainer.state.log_history)
        return next((dict(row) for row in rows if any(name.startswith("eval_") for name in row)), {})


def build_trainer(
    trainer_type: "TrainerType", processor: Any = None, verbose: bool = False
) -> Callable[..., BaseTrainer]:
    """What makes the trainer of a type, given `model`, `args`, `train_dataset` and the other arguments of a trainer.

    The tokenizer is `processing_class` or `tokenizer`; `training_config` or `config` is the whole configuration;
    callbacks of transformers run right after the one that decides when to log and save, so that what they add to the
    logs reaches the trackers. All other keywords go to the trainer's constructor as they are.

    Args:
        trainer_type: TRL_SFT, TRL_DPO, TRL_KTO, TRL_GKD, TRL_GRPO, HF or OUMI.
        processor: Of a model that reads more than text; saved with it.
        verbose: Whether to print the arguments of trainers of transformers and TRL.

    Raises:
        UserError: for the types that are run as recipes.
    """
    kind = trainer_type.name
    if kind in RECIPES:
        raise UserError(
            f"trainer_type: {kind} builds its own model and data, so no trainer can be made around yours; "
            "run it with oumi_pl.train(config), or as a recipe"
        )

    def build(*args: Any, training_config: Any = None, **kwargs: Any) -> BaseTrainer:
        if kind != "OUMI":
            kwargs.pop("config", None)
            return _hugging_face(trainer_type, args, kwargs, processor, verbose)
        from oumi_pl.core.trainers.trainer import Trainer

        given = {"config": training_config, "processor": processor}
        return Trainer(*args, **kwargs | {name: value for name, value in given.items() if value is not None})

    return build


def _hugging_face(
    trainer_type: "TrainerType", args: tuple[Any, ...], kwargs: dict[str, Any], processor: Any, verbose: bool
) -> HuggingFaceTrainer:
    from transformers import TrainerCallback

    from oumi_pl.core.trainers.hyperparameters import class_of, to_hf

    params, callbacks = kwargs.pop("args", None), list(kwargs.pop("callbacks", None) or ())
    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            name = type(callback).__name__
            raise UserError(f"callbacks: {name} is none of transformers'; {trainer_type.name} takes only those")
    if "tokenizer" in kwargs:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
    if params is not None:
        kwargs["args"] = to_hf(params, trainer_type)
        if verbose:
            echo(kwargs["args"])
        directory = params.logging_dir or str(Path(params.output_dir) / "tensorboard")
        os.environ["TENSORBOARD_LOGGING_DIR"] = directory  # transformers 5 reads it from nowhere else
    trainer = class_of(trainer_type.name, "trainer")(*args, **kwargs)
    trainer.callback_handler.callbacks[1:1] = callbacks

    class AddsChecksums(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.world_size == 1:  # other processes may still be writing files of theirs
                add_list(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    trainer.add_callback(AddsChecksums())
    return HuggingFaceTrainer(trainer, processor)
