"""The optimizer and the schedule that training parameters name: built from the recipe that they become."""

import copy
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from oumi_pl import optim
from oumi_pl.core.configs import TrainerType
from oumi_pl.core.recipe import optimisation
from oumi_pl.core.recipe.notes import Notes
from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams


def build_optimizer(model: nn.Module, params: "TrainingParams") -> Optimizer:
    """The optimizer that the parameters name, over the trainable parameters of a model.

    Weights with two or more dimensions are decayed; biases and the scales of norms are not, those of RMSNorm included.

    Raises:
        UserError: for an unknown name, a model without trainable parameters, or a missing library.
    """
    spec = optimisation.optimizer(_native(params), Notes())
    groups = optim.parameter_groups(model.named_parameters())
    if not groups:
        raise UserError("model: no parameter is trainable")
    module, _, name = spec["class_path"].rpartition(".")
    try:
        return getattr(import_module(module or "torch.optim"), name)(groups, **spec["init_args"])
    except ImportError as error:
        raise UserError(
            "training.optimizer: optimizers in 8 bits and paged ones are bitsandbytes'; "
            "install them with: pip install 'oumi_pl[gpu]'"
        ) from error
    except ValueError as error:
        raise UserError(f"training.optimizer: {error}") from error


def build_schedule(params: "TrainingParams", total: int) -> optim.Schedule:
    """The schedule that the parameters name, for a run of `total` optimizer steps.

    Raises:
        UserError: for an unknown name or argument.
    """
    native = _native(params)
    native.max_steps = total
    spec = optimisation.schedule(native, Notes()) or {"class_path": "Constant"}
    schedule = getattr(optim, spec["class_path"])(**spec.get("init_args", {}))
    if isinstance(schedule, optim.Cosine):
        schedule.keeps_floor = False
    return schedule


def refuse_unknown_names(params: "TrainingParams") -> None:
    """Refuses an unknown optimizer or schedule, and arguments that it does not take.

    Raises:
        UserError: with the nearest name.
    """
    optimisation.optimizer(_native(params), Notes())
    build_schedule(params, 1)


def _native(params: "TrainingParams") -> "TrainingParams":
    """The parameters as of Oumi's own trainer, whatever type of trainer they name."""
    native = copy.copy(params)
    native.trainer_type = TrainerType.OUMI
    return native
