"""Print an Oumi training config as a recipe."""

from pathlib import Path
from typing import get_args

from oumi_pl.commands.parser import Parser

ENGINES = ("lightning", "trl", "hf")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        "convert",
        __doc__,
        epilog="other options override values of the config, as in Oumi: --training.max_steps 100",
    )
    parser.add_argument("config", help="a config for `oumi train`, or its address oumi://... if Oumi has fetched it")
    parser.add_argument("--engine", choices=ENGINES, help="who runs the loop (default: by Oumi's trainer type)")
    parser.add_argument("--devices", type=int, metavar="N", help="devices per node (default: all)")
    options, overrides = parser.parse_known_args(args)
    from oumi_pl.core.configs.addresses import config_path

    print(convert(config_path(options.config), overrides, options.engine, options.devices), end="")
    return 0


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
