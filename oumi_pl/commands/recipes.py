"""Lists, shows and copies the recipes that come with the package."""

import shlex
import sys
import textwrap
from pathlib import Path

from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError, nearest
from oumi_pl.terminal.screen import has_colours
from oumi_pl.terminal.text import echo

HELP = """\
usage: oumi_pl recipes [FOLDER]             list recipes, in {folders}
       oumi_pl recipes show NAME            print a recipe
       oumi_pl recipes copy NAME FILE       copy a recipe, to change it

A recipe runs the classes and functions that it names: train only with recipes that you trust. Showing and copying one
runs nothing. README.md, "Security", lists what runs code and what never does.
"""
WIDTH = 80
"""Width of the list."""
COLUMN = 34
"""Column of the hardware."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    match args:
        case ["-h"] | ["--help"] | [_, "-h"] | [_, "--help"]:
            print(HELP.format(folders=", ".join(_folders())), end="")
        case ["show", name]:
            sys.stdout.write(_file(name).read_text(encoding="utf-8"))
        case ["copy", name, file]:
            copy(name, Path(file).expanduser())
        case ["show" | "copy", *_]:
            usage = {"show": "show NAME", "copy": "copy NAME FILE"}[args[0]]
            raise UserError(f"recipes: {args[0]} needs {usage.removeprefix(args[0])[1:]}: oumi_pl recipes {usage}")
        case []:
            print(listing(recipe_files.names(), has_colours(sys.stdout)))
        case [part] if names := [one for one in recipe_files.names() if f"{one}/".startswith(part.rstrip("/") + "/")]:
            print(listing(names, has_colours(sys.stdout)))
        case _:
            known = ["show", "copy", *_folders(), *recipe_files.names()]
            raise UserError(f"recipes: unknown recipe, folder or action {' '.join(args)!r}{nearest(args[0], known)}")
    return 0


def listing(names: list[str], bold: bool = False) -> str:
    """Lists recipes by folder with name, hardware and purpose, and the command if it takes more than the name.

    Args:
        names: Names of shipped recipes.
        bold: Whether to print names in bold and hardware dim.
    """
    strong, faint, plain = ("\033[1m", "\033[2m", "\033[0m") if bold else ("", "", "")
    blocks: dict[str, list[str]] = {}
    for name in names:
        header = recipe_files.header(recipe_files.shipped() / f"{name}.yaml")
        lines = blocks.setdefault(name.partition("/")[0], [])
        lines.append(f"{strong}{name.ljust(COLUMN - 2)}{plain}  {faint}{header.hardware}{plain}")
        lines += textwrap.wrap(header.purpose, WIDTH, initial_indent="  ", subsequent_indent="  ")
        if header.commands != [command(name)]:
            lines += [f"    {one}" for one in header.commands]
    shown = "\n\n".join("\n".join(lines) for lines in blocks.values())
    return (
        f"{shown}\n\n"
        f"train with it:      {command('NAME' if len(names) > 1 else names[0])}\n"
        "read or change it:  oumi_pl recipes show NAME; oumi_pl recipes copy NAME FILE"
    )


def command(name: str) -> str:
    """The command line that trains with a recipe."""
    return f"oumi_pl fit --config {name}"


def copy(name: str, file: Path) -> None:
    """Copies a recipe unchanged, and prints how to train with the copy.

    Args:
        name: Name of a shipped recipe.
        file: Target; in a directory, the copy keeps the recipe's file name.

    Raises:
        UserError: there is no such recipe, or the file exists or can't be written.
    """
    recipe = _file(name)
    file = file / recipe.name if file.is_dir() else file
    if not file.parent.is_dir():
        raise UserError(f"recipes: no directory {file.parent}; create it first")
    try:
        with file.open("xb") as out:
            out.write(recipe.read_bytes())
    except FileExistsError:
        raise UserError(f"recipes: {file} exists; name another file") from None
    except OSError as error:
        raise UserError(f"recipes: can't write {file}: {error.strerror}") from error
    echo(f"{name} -> {file}\ntrain with it: {command(shlex.quote(str(file)))}")


def _file(name: str) -> Path:
    names = recipe_files.names()
    if name not in names:
        partly = next((one for one in names if name in one.split("/")), name)
        raise UserError(f"recipes: unknown recipe {name!r}{nearest(partly, names)}")
    return recipe_files.shipped() / f"{name}.yaml"


def _folders() -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in recipe_files.names()))
