"""What becomes of each field of an Oumi config: honoured, refused by name, or without a meaning for training."""

import re
from operator import attrgetter

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.configs.params.base_params import BECOMES, Becomes, fields_of, shown, walk
from oumi_pl.core.recipe.notes import Notes, refuse

FIELDS: dict[str, Becomes] = {
    path.replace("[0]", ""): field.metadata[BECOMES]
    for path, field in fields_of(TrainingConfig)
    if BECOMES in field.metadata and not path.startswith("data.test.")  # which is never read
} | {"deepspeed": Becomes("harmless", "it decides on speed or memory alone")}
"""Field, or section, by its dotted path -> what becomes of it."""

ONLY_WITH = {
    "peft": "training.use_peft",
    "fsdp": "fsdp.enable_fsdp",
    "deepspeed": "deepspeed.enable_deepspeed",
    "training.grpo": "training.trainer_type TRL_GRPO or VERL_GRPO",
    "training.gkd": "training.trainer_type TRL_GKD",
}
"""Section -> the field without which Oumi reads none of it, and the values that it has to have, if not true."""


def field_of(path: str) -> Becomes | None:
    """What becomes of a field, list indices aside, or of the section that it is in; None if nothing is said of it."""
    name = re.sub(r"\[\d+\]", "", path)
    while name not in FIELDS and "." in name:
        name = name.rpartition(".")[0]
    return FIELDS.get(name)


def _is_read(config: TrainingConfig, condition: str) -> bool:
    """Whether a field is true, or has one of the values that follow it."""
    path, *wanted = condition.split()
    value = attrgetter(path)(config)
    return value.name in wanted if wanted else bool(value)


def note_fields(config: TrainingConfig, notes: Notes) -> None:
    """Refuses fields without a counterpart, and notes what becomes of all others that differ from their defaults.

    Raises:
        UserError: at the first one that is refused.
    """
    for path, value, default in walk(config):
        if value == default:
            continue
        section = next((section for section in ONLY_WITH if path.startswith(f"{section}.")), None)
        field = field_of(path)
        if section is not None and not _is_read(config, ONLY_WITH[section]):
            notes.became[path] = f"nothing: it is only read with {ONLY_WITH[section]}"
        elif field is None:
            refuse(path, "is not known here")
        elif field.how == "refused":
            word = shown(value).strip("'")
            refuse(path, f"{word} is set, and has no counterpart: {field.why}")
        else:
            notes.became[path] = field.why if field.how == "honoured" else f"nothing: {field.why}"
