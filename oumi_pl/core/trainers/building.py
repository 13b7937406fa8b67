"""From the name of a trainer type to something that makes the trainer."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.core.trainers.base import BaseTrainer
from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainerType

RECIPES = ("SFT", "DPO", "PRETRAIN")
"""Types that are recipes of oumi_pl's own: they build their own model and data."""


def build_trainer(
    trainer_type: "TrainerType", processor: Any = None, verbose: bool = False
) -> Callable[..., BaseTrainer]:
    """What makes the trainer of a type, given `model`, `args`, `train_dataset` and the other arguments of a trainer.

    The tokenizer is `processing_class` or `tokenizer`; `training_config` or `config` is the whole configuration;
    callbacks of the transformers family run right after the one that decides when to log and save, so that what they
    add to the logs reaches the trackers. All other keywords go to the trainer's constructor as they are.

    Args:
        trainer_type: TRL_SFT, TRL_DPO, HF or OUMI.
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
    if kind == "OUMI":
        return _native(processor)
    return _hugging_face(trainer_type, processor, verbose)


def _native(processor: Any) -> Callable[..., BaseTrainer]:
    def make(*args: Any, **kwargs: Any) -> BaseTrainer:
        from oumi_pl.core.trainers.trainer import Trainer

        if "training_config" in kwargs:
            kwargs["config"] = kwargs.pop("training_config")
        if processor is not None:
            kwargs["processor"] = processor
        return Trainer(*args, **kwargs)

    return make


def _hugging_face(trainer_type: "TrainerType", processor: Any, verbose: bool) -> Callable[..., BaseTrainer]:
    def make(*positional: Any, **kwargs: Any) -> BaseTrainer:
        from oumi_pl.core.trainers.hugging_face import HuggingFaceTrainer
        from oumi_pl.core.trainers.hyperparameters import to_hf

        for name in ("training_config", "config"):
            kwargs.pop(name, None)
        params, callbacks = kwargs.pop("args", None), list(kwargs.pop("callbacks", None) or ())
        _refuse_lightning(callbacks, trainer_type.name)
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        if params is not None:
            kwargs["args"] = to_hf(params, trainer_type)
            if verbose:
                print(kwargs["args"])
            directory = params.logging_dir or str(Path(params.output_dir) / "tensorboard")
            os.environ["TENSORBOARD_LOGGING_DIR"] = directory  # transformers 5 reads it from nowhere else
        trainer = _trainer_class(trainer_type.name)(*positional, **kwargs)
        for i, callback in enumerate(callbacks):
            trainer.callback_handler.callbacks.insert(1 + i, callback)
        return HuggingFaceTrainer(trainer, processor)

    return make


def _trainer_class(kind: str) -> Any:
    if kind == "HF":
        from transformers import Trainer

        return Trainer
    import trl

    return {"TRL_SFT": trl.SFTTrainer, "TRL_DPO": trl.DPOTrainer}[kind]


def _refuse_lightning(callbacks: list[Any], kind: str) -> None:
    from transformers import TrainerCallback

    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            raise UserError(f"callbacks: {type(callback).__name__} is none of transformers'; {kind} takes only those")
