"""`convert`: an Oumi config as a native recipe, printed."""

from pathlib import Path
from typing import get_args

from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError

ENGINES = ("lightning", "trl", "hf")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        "convert",
        __doc__,
        epilog="anything else puts a value in place of the config's, as for Oumi: --training.max_steps 100",
    )
    parser.add_argument("config", type=Path, help="a config as `oumi train` reads it")
    parser.add_argument("--engine", choices=ENGINES, help="what drives the loop; as Oumi's trainer type when left out")
    parser.add_argument("--devices", type=int, metavar="N", help="devices per node; all there are when left out")
    options, overrides = parser.parse_known_args(args)
    print(convert(options.config.expanduser(), overrides, options.engine, options.devices), end="")
    return 0


def convert(path: Path, overrides: list[str], engine: str | None = None, devices: int | None = None) -> str:
    """The text of the recipe that trains what an Oumi config describes.

    Args:
        path: The config.
        overrides: `--training.max_steps 100` and the like.
        engine: `lightning`, `trl` or `hf`; what Oumi's trainer type stands for when left out.
        devices: Devices per node.

    Raises:
        UserError: the config can't be read, or something in it has no counterpart.
    """
    if str(path).startswith("oumi:"):
        raise UserError(f"convert: {path} is an address; download the file, and name it")
    from oumi_pl.core.configs import TrainingConfig
    from oumi_pl.core.recipe import Engine, as_yaml, to_recipe

    assert engine is None or engine in get_args(Engine)
    config = TrainingConfig.from_yaml_and_arg_list(path, overrides)
    recipe = to_recipe(config, engine, devices)  # type: ignore[arg-type]
    resume = "" if recipe.resume is None else f" --resume {recipe.resume}".rstrip()
    header = f"Converted from Oumi's {path.name}.\n  python -m oumi_pl fit --config THIS_FILE{resume}"
    return as_yaml(recipe.tree, recipe.comments, header)
