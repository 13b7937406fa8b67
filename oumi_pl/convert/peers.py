"""Which library a config is of, by its keys, and its recipe."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from oumi_pl.convert import axolotl, llama_factory, llama_factory_v1, trl
from oumi_pl.convert.settings import Settings, number
from oumi_pl.errors import UserError

COMMAND = re.compile(r"\btrl\s+(sft|dpo|kto|reward)\b|(?<![\w])(sft|dpo|kto|reward|reward_modeling)\.py\b")
"""A command of TRL's, or the name of its script."""


def library_of(tree: Any) -> str | None:
    """`axolotl`, `LLaMA-Factory`, `LLaMA-Factory v1` or `TRL`; None for another, such as Oumi's."""
    if not isinstance(tree, Mapping):
        return None
    if "base_model" in tree:
        return "axolotl"
    if "train_dataset" in tree and isinstance(tree.get("model"), str):
        return "LLaMA-Factory v1"
    if "model_name_or_path" in tree:
        own = ("stage", "finetuning_type", "cutoff_len", "dataset", "dataset_dir", "template")
        return "LLaMA-Factory" if any(key in tree for key in own) else "TRL"
    return None


def is_command(text: str) -> bool:
    """Whether a text is a command line of TRL's, or a shell script with one. Comments don't count."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return any(COMMAND.search(line) for line in lines) and any("--" in line for line in lines)


def refuse_other_command(text: str) -> None:
    """Refuses a command line of TRL's that is not read here.

    Raises:
        UserError: it is one.
    """
    if match := re.match(r"\s*trl\s+([\w-]+)\s+--", text):
        raise UserError(f"trl {match[1]} is not converted; {', '.join(trl.TRAINERS)} are")


def overridden(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The config with the options of a command line: `--key value`, `--key=value` or `key=value`; `-` counts as `_`.

    Raises:
        UserError: an argument belongs to no option.
    """
    tree, rest = dict(values), list(overrides)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not equals and not flag.startswith("--"):
            raise UserError(f"{flag!r} belongs to no option; write --key value")
        key = flag.removeprefix("--").replace("-", "_")
        listed: list[str] = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            listed.append(rest.pop(0))
        read = [number(yaml.safe_load(one)) if one else one for one in listed]
        tree[key] = True if not read else read[0] if len(read) == 1 else read
    return tree


def command(text: str) -> tuple[str, list[str]]:
    """Trainer (`sft`, ...) and arguments of the first command of TRL's in a text; comments are left out.

    Raises:
        UserError: it can't be taken apart.
    """
    lines = text.replace("\\\n", " ").splitlines()
    line = next(line for line in lines if COMMAND.search(line) and not line.lstrip().startswith("#"))
    match = COMMAND.search(line)
    assert match is not None
    trainer = (match[1] or match[2]).removesuffix("_modeling")
    try:
        launcher, arguments = shlex.split(line[: match.start()]), shlex.split(line[match.end() :], comments=True)
        return trainer, [*_launched(launcher), *arguments]
    except ValueError as error:
        raise UserError(f"the command line can't be taken apart: {error}") from error


LAUNCH_OPTIONS = ("--config_file", "--num_processes", "--num_machines", "--nproc_per_node", "--nnodes")
"""Options of `accelerate launch` and torchrun that decide on devices."""
TORCHRUN = re.compile(r"torchrun|torch\.distributed\.(run|launch)")


def _launched(words: list[str]) -> list[str]:
    """The options of a launcher before a script that decide on devices; the others are named together."""
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else (word,))]
    options, others = [], []
    if any(TORCHRUN.fullmatch(Path(word).name) for word in words):
        options += ["--nproc_per_node", "1"]  # its default
    while rest:
        word = rest.pop(0)
        flag = word.replace("-", "_").replace("__", "--", 1)
        if rest and flag in LAUNCH_OPTIONS:
            options += [flag, json.dumps(rest.pop(0))]  # quoted: 1:2 is a number in YAML
        elif word.startswith("-"):
            others.append(word)
    return options + ([f"--launcher={' '.join(others)}"] if others else [])


def recipe(
    values: Mapping[str, Any], library: str, folder: Path, trainer: str | None, devices: int | None
) -> tuple[dict[str, Any], Settings]:
    """The recipe of a config, and the notes on it.

    Args:
        values: The config.
        library: As `library_of` returns it.
        folder: Folder of the config.
        trainer: TRL's trainer (`sft`, `dpo`, `kto`, `reward`), which its YAML doesn't say.
        devices: Devices per node.

    Raises:
        UserError: something has no counterpart.
    """
    if library == "axolotl":
        tree, settings = axolotl.recipe(values, devices)
    elif library == "LLaMA-Factory":
        tree, settings = llama_factory.recipe(values, folder, devices)
    elif library == "LLaMA-Factory v1":
        tree, settings = llama_factory_v1.recipe(values, folder, devices)
    else:
        tree, settings = trl.recipe(values, trainer, devices)
    settings.name_unread()
    return tree, settings
