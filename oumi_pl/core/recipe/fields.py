"""What becomes of each field of an Oumi config: honoured, refused by name, or without a meaning for training."""

import dataclasses
import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.configs.params.base_params import BECOMES, BaseParams, Becomes, default_of, hints, section_in, shown
from oumi_pl.core.recipe.notes import Notes, refuse


def _fields(cls: type[BaseParams], place: str = "") -> Iterator[tuple[str, Becomes]]:
    for field in dataclasses.fields(cls):
        path = f"{place}{field.name}"
        if BECOMES in field.metadata:
            yield path, field.metadata[BECOMES]
        if (section := section_in(hints(cls)[field.name])) and path != "data.test":  # whose fields are never read
            yield from _fields(section, f"{path}.")


FIELDS = dict(_fields(TrainingConfig)) | {
    "deepspeed": Becomes("harmless", "it is only read with deepspeed.enable_deepspeed")
}
"""Field, or section, by its dotted path -> what becomes of it."""

ONLY_WITH = {
    "peft": "training.use_peft",
    "fsdp": "fsdp.enable_fsdp",
    "deepspeed": "deepspeed.enable_deepspeed",
}
"""Section -> the field without which Oumi reads none of it."""


def field_of(path: str) -> Becomes | None:
    """What becomes of a field, list indices aside, or of the section that it is in; None if nothing is said of it."""
    name = re.sub(r"\[\d+\]", "", path)
    while name not in FIELDS and "." in name:
        name = name.rpartition(".")[0]
    return FIELDS.get(name)


def walk(section: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All fields of a config as (dotted path, value, default), sections and lists of sections gone through."""
    for field in dataclasses.fields(section):
        path = f"{place}.{field.name}" if place else field.name
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, path)
            continue
        yield path, value, default_of(field)
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(item):
                yield from walk(item, f"{path}[{number}]")


def note_fields(config: TrainingConfig, notes: Notes) -> None:
    """Refuses fields without a counterpart, and notes what becomes of all others that differ from their defaults.

    Raises:
        UserError: at the first one that is refused.
    """
    switches = {section: attrgetter(switch)(config) for section, switch in ONLY_WITH.items()}
    for path, value, default in walk(config):
        if value == default:
            continue
        section = path.partition(".")[0]
        field = field_of(path)
        if not switches.get(section, True):
            notes.became[path] = f"nothing: it is only read with {ONLY_WITH[section]}"
        elif field is None:
            refuse(path, "is not known here")
        elif field.how == "refused":
            word = shown(value).strip("'")
            refuse(path, f"{word} is set, and has no counterpart: {field.why}")
        else:
            notes.became[path] = field.why if field.how == "honoured" else f"nothing: {field.why}"
