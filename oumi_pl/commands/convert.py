"""Print a training config of Oumi, axolotl, LLaMA-Factory or TRL as a recipe, or write it to a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError
from oumi_pl.runs.files import write
from oumi_pl.terminal.text import echo, visible

ENGINES = ("lightning", "trl", "hf")
EPILOG = """\
Whose config it is follows from its keys. TRL's may also be a command line (`convert "trl sft --model ..."`, or a shell
script that holds one); its YAML needs --trainer. Other options override values of the config, as in the library:
--training.max_steps 100, --learning_rate 1e-4. Comments say what became of each key, and name those that are not taken
over with the reason. A key that changes what is trained and has no counterpart is refused."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser("convert", __doc__, epilog=EPILOG)
    parser.add_argument("config", help="a config file, a command line of TRL's, or Oumi's address oumi://...")
    parser.add_argument(
        "--engine", choices=ENGINES, help="who runs the loop (default: lightning; by Oumi's trainer type)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="devices per node (default: all)")
    parser.add_argument("--trainer", metavar="NAME", help="of TRL's YAML: sft, dpo, kto or reward")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the recipe to this new file instead")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options, overrides = parser.parse_known_args(args)
    if options.overwrite and options.output is None:
        raise UserError("convert: --overwrite is about a file; name it with --output")
    output = None if options.output is None else _checked(options.output.expanduser(), options.overwrite)
    text = text_of(options.config, overrides, options.engine, options.devices, options.trainer)
    if output is None:
        print(text, end="")
        return 0
    try:
        write(output, text)
    except OSError as error:
        raise UserError(f"--output: can't write to {output}: {error.strerror}") from error
    echo(f"converted {options.config} to {output}: oumi_pl fit --config {output}")
    return 0


def _checked(output: Path, overwrite: bool) -> Path:
    """Checks, before the work, that a file can be written.

    Raises:
        UserError: it exists and is not to be overwritten, or there is no such folder.
    """
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name a file")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise UserError(f"--output: {output} exists; name another file, or replace it with --overwrite")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    return output


def text_of(
    config: str, overrides: list[str], engine: str | None = None, devices: int | None = None, trainer: str | None = None
) -> str:
    """The text of the recipe that is equivalent to a config.

    Args:
        config: File, command line of TRL's, or Oumi's address.
        overrides: `--learning_rate 1e-4` and the like.
        engine: `lightning`, `trl` or `hf`.
        devices: Devices per node.
        trainer: `sft`, `dpo`, `kto` or `reward`, if it is TRL's YAML.

    Raises:
        UserError: the config can't be read, or something in it has no counterpart.
    """
    from oumi_pl.convert import peers
    from oumi_pl.core.configs.addresses import config_path
    from oumi_pl.core.recipe import as_yaml

    if " " in config and peers.is_command(config):
        text, path, name = config, Path(), "command line"
    else:
        peers.refuse_other_command(config)
        path = config_path(config)
        text, name = _read(path), path.name
    tree = _tree(text)
    library = peers.library_of(tree)
    if library is None and not isinstance(tree, Mapping) and peers.is_command(text):
        library, (trainer, arguments) = "TRL", peers.command(text)
        tree = _from_command(arguments, path.parent)
    if library is None:
        if not text.strip() and path.is_file() and path.stat().st_size <= len(text.encode()):
            raise UserError(f"{path}: this file is empty")
        if text.strip() and all(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines()):
            raise UserError(f"{path} has no settings; all of its lines are comments")
        return convert(path, overrides, engine, devices)
    if trainer is not None and library != "TRL":
        raise UserError(f"--trainer is for TRL's YAML, and {name} is a config of {library}, which says it itself")
    recipe, settings = peers.recipe(peers.overridden(tree, overrides), library, path.parent, trainer, devices)
    if engine not in (None, "lightning"):
        recipe = {"seed_everything": recipe["seed_everything"], "engine": engine} | recipe
    lines = [f"Converted from {settings.keys.library}'s {name}.", "  python -m oumi_pl fit --config THIS_FILE"]
    lines = [visible(line.replace("\n", " ")) for line in [*lines, *settings.header()]]
    comments = {place: [visible(text) for text in texts] for place, texts in settings.notes.comments.items()}
    return as_yaml(recipe, comments, "\n".join(lines))


def _read(path: Path) -> str:
    """The text of a file; empty if it can't be read, which Oumi's reader then says."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _tree(text: str) -> Any:
    """The content of a YAML file; None if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _from_command(arguments: list[str], folder: Path) -> dict[str, Any]:
    """The values of a command line, over those of the YAML that its --config names.

    Raises:
        UserError: there is no such file.
    """
    from oumi_pl.convert.peers import overridden

    values = overridden({}, arguments)
    if (name := values.pop("config", None)) is None:
        return values
    file = next((place for place in (Path(str(name)), folder / str(name)) if place.is_file()), None)
    if file is None:
        raise UserError(f"--config {name}: there is no such file")
    tree = _tree(_read(file))
    return {**(tree if isinstance(tree, Mapping) else {}), **values}


def convert(path: Path, overrides: list[str], engine: str | None = None, devices: int | None = None) -> str:
    """The text of the recipe that is equivalent to an Oumi config.

    Args:
        path: File of the config.
        overrides: `--training.max_steps 100` and the like.
        engine: `lightning`, `trl` or `hf`; by default the one of Oumi's trainer type.
        devices: Devices per node.

    Raises:
        UserError: the config can't be read, or something in it has no counterpart.
    """
    from oumi_pl.core.configs import TrainingConfig
    from oumi_pl.core.recipe import Engine, as_yaml, to_recipe

    assert engine is None or engine in get_args(Engine)
    config = TrainingConfig.from_yaml_and_arg_list(path, overrides)
    recipe = to_recipe(config, engine, devices)  # type: ignore[arg-type]
    resume = "" if recipe.resume is None else f" --resume {recipe.resume}".rstrip()
    header = f"Converted from Oumi's {path.name}.\n  python -m oumi_pl fit --config THIS_FILE{resume}"
    return as_yaml(recipe.tree, recipe.comments, header)
