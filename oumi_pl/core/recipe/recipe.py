"""From an Oumi config to the recipe that trains the same."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe import data as data_section
from oumi_pl.core.recipe import optimisation
from oumi_pl.core.recipe import trainer as trainer_section
from oumi_pl.core.recipe.distillation import distillation
from oumi_pl.core.recipe.fields import note_fields
from oumi_pl.core.recipe.grpo import Online, online, vllm
from oumi_pl.core.recipe.model import model
from oumi_pl.core.recipe.notes import Notes
from oumi_pl.core.recipe.trainer import ENGINES, Engine, engine_of
from oumi_pl.core.recipe.trainer_kwargs import feedback, note_kwargs, preference
from oumi_pl.core.recipe.verl import as_trl


@dataclass(frozen=True)
class Recipe:
    """A native recipe, and where its keys come from.

    tree: what `fit --config` reads. became: field of the config that was set, or that matters -> what it became.
    comments: key of the tree by its dotted path, empty for all of it -> where Oumi does something else. resume: what
    `fit --resume` is given, empty for the last unfinished run; None for a new run.
    """

    tree: dict[str, Any]
    became: dict[str, str] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)
    resume: str | None = None


def to_recipe(
    config: TrainingConfig, engine: Engine | None = None, devices: int | None = None, *, online: bool = False
) -> Recipe:
    """Converts an Oumi config: each field is honoured with the same meaning, or refused by its name.

    Args:
        config: The config, finalized or not.
        engine: What drives the training loop; what Oumi's trainer type does so with when left out.
        devices: Devices per node; as many as there are when left out.
        online: Whether to ask the hub if the tokenizer has a chat template, unless its files are on this machine.

    Raises:
        UserError: a field has no counterpart; the message begins with its dotted path.
    """
    notes = Notes(online=online)
    data_section.refuse_images(config)
    note_fields(config, notes)
    kind = data_section.kind(config, notes)
    note_kwargs(config, kind, notes)
    sampled = None
    if kind == "GRPO":
        config, sampled = _online(config, engine, devices, notes)
    training = config.training
    module = model(config, notes) | _objective(config, kind, notes)
    module |= sampled.module if sampled is not None else {}
    module["optimizer"] = optimisation.optimizer(training, notes)
    if (schedule := optimisation.schedule(training, notes)) is not None:
        module["schedule"] = schedule
    if kind == "Pretrain" and "model" not in module:
        notes.comment(
            "model", "random weights begin with scaled residual projections, in Oumi as the architecture does"
        )
    chosen = engine_of(config, kind, engine, devices, notes)
    if chosen == "trl" and sampled is not None and "engine" in sampled.data:
        notes.comment("", "Lightning drives it, and not trl, which can't sample with vLLM here")
        chosen = "lightning"
    tree: dict[str, Any] = {"seed_everything": training.seed}
    tree |= {"engine": chosen} if chosen != "lightning" else {}
    tree |= {
        "model": {"class_path": kind, "init_args": module},
        "data": data_section.data(config, kind, notes),
        "trainer": trainer_section.trainer(config, notes, devices, chosen),
    }
    if sampled is not None:
        tree["data"]["init_args"] |= sampled.data
    tree |= trainer_section.around(config, notes)
    if chosen == "lightning" and kind != "Pretrain" and ENGINES[training.trainer_type.name] != "lightning":
        notes.comment("data", "the order of the rows is drawn by another sampler than transformers'")
    if training.trainer_type.name == "OUMI":
        # defects of Oumi's own trainer, which are not carried over
        notes.comment(
            "trainer",
            "the last update is a whole one, and an update that is cut short by the end of an epoch is done, where "
            "Oumi's own trainer takes one micro-batch, or none",
        )
        if training.max_steps <= 0:
            different = "the schedule ends with the run, also where gradients are accumulated"
            notes.comment("model.init_args.schedule", different)
    return Recipe(tree, notes.became, notes.comments, trainer_section.resume(training))


def _online(
    config: TrainingConfig, engine: Engine | None, devices: int | None, notes: Notes
) -> tuple[TrainingConfig, Online]:
    """The settings of online training, and the config with the micro-batches that they come to."""
    more: dict[str, Any] = {}
    if config.training.trainer_type.name == "VERL_GRPO":
        config, more = as_trl(config, devices, notes)
    sampled = online(config, notes)
    sampled = dataclasses.replace(sampled, data=sampled.data | more | vllm(config, engine, devices, notes))
    training = dataclasses.replace(config.training, gradient_accumulation_steps=sampled.micro_batches)
    return dataclasses.replace(config, training=training), sampled


def _objective(config: TrainingConfig, kind: str, notes: Notes) -> dict[str, Any]:
    """Arguments of the module for its loss, but for online training."""
    training = config.training
    if kind == "Distill":
        return distillation(config, notes)
    compared = {"DPO": preference, "KTO": feedback}
    if kind in compared:
        if not training.use_peft and config.model.dtype != "float32":
            notes.comment("model", "the reference is the model as training starts, where Oumi loads it in float32")
        return compared[kind](training.trainer_kwargs)
    if smoothing := training.trainer_kwargs.get("label_smoothing_factor"):
        return {"loss": {"class_path": "CrossEntropy", "init_args": {"label_smoothing": float(smoothing)}}}
    return {}
