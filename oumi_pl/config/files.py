"""Finds recipes by name or path and refuses broken YAML.

Imports only the standard library and PyYAML, so that a misspelt name is reported in a fraction of a second.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oumi_pl.errors import UserError, nearest

ENDINGS = (".yaml", ".yml")
ORDER = ("quickstart", "sft", "dpo", "pretrain")
"""Folders of shipped recipes, and names in `quickstart`, in the order in which to list them."""


class Header(NamedTuple):
    """The content of the comment at the top of a recipe."""

    purpose: str
    """What it trains on which data."""
    commands: list[str]
    """Command lines that run the recipe."""
    hardware: str
    """The hardware it needs, in a few words."""


def shipped() -> Path:
    """Directory of the shipped recipes: inside the package when installed, next to it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Names of the shipped recipes, `quickstart/sft` for example."""
    root = shipped()
    shipped_names = [p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")]
    return sorted(shipped_names, key=lambda name: [(_rank(part), part) for part in name.split("/")])


def _rank(part: str) -> int:
    return ORDER.index(part) if part in ORDER else len(ORDER)


def header(recipe: Path) -> Header:
    """Reads the comment at the top of a recipe.

    Lines before the first indented one are the purpose, indented lines are commands, and the first clause after
    `Hardware:` is the hardware.
    """
    lines: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    commands = [i for i, line in enumerate(lines) if line.startswith("  ")]
    purpose = " ".join(line.strip() for line in lines[: min(commands, default=0)])
    hardware = next((line.strip().removeprefix("Hardware:") for line in lines if line.startswith(" Hardware:")), "")
    needs = re.split(r"[.;](?:\s|$)", hardware.strip(), maxsplit=1)[0]
    return Header(purpose, [lines[i].strip().replace("python -m oumi_pl", "oumi_pl") for i in commands], needs)


def find(name: str) -> Path:
    """Finds the file of a recipe by path or name.

    Raises:
        UserError: if there is none; suggests the nearest name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in names():
        return shipped() / f"{name}.yaml"
    if path.suffix in ENDINGS:
        beside = [p.as_posix() for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        by_name = [f"recipes/{n}.yaml" for n in names()]
        raise UserError(f"--config: no file {name!r}{nearest(name, [*beside, *by_name])}")
    raise UserError(f"--config: no recipe {name!r}{nearest(name, names())}")


def recipe_name(path: Path) -> str:
    """The name of a recipe's runs: `quickstart-sft` for recipes/quickstart/sft.yaml."""
    root = shipped().resolve()
    resolved = path.resolve()
    if resolved.is_relative_to(root):
        return "-".join(resolved.relative_to(root).with_suffix("").parts)
    return path.stem


def check(path: Path) -> dict[str, Any]:
    """Reads and parses a recipe.

    Raises:
        UserError: if it can't be read, isn't YAML or a mapping, or repeats a key (PyYAML would silently keep the last).
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: not UTF-8 text; save the recipe as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), path, "")
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(value, dict):
        kind = {type(None): "empty", list: "a list", str: "text"}.get(type(value), f"of type {type(value).__name__}")
        raise UserError(f"{path}: a recipe is a mapping (model:, data:, trainer:), and this file is {kind}")
    return value


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two recipes key by key; the second wins."""
    tree = dict(first)
    for key, value in second.items():
        old = tree.get(key)
        tree[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return tree


def merged(recipes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges recipes in order; the later ones win."""
    return functools.reduce(merge, recipes, {})


def as_written(paths: Sequence[Path]) -> bytes | None:
    """The text of a recipe with its comments. Several recipes are merged without comments; None without any."""
    import yaml

    if len(paths) == 1:
        return paths[0].read_bytes()
    if not paths:
        return None
    header = f"# Merged, the later wins: {', '.join(map(str, paths))}\n"
    return (header + yaml.safe_dump(merged(map(check, paths)), sort_keys=False)).encode()


def _refuse_repeated_keys(node: Any, path: Path, prefix: str) -> None:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _refuse_repeated_keys(item, path, f"{prefix}[{i}]")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name = f"{prefix}.{key.value}" if prefix else str(key.value)
        line = key.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path} line {line}: the key {name} is repeated, first in line {seen[name]}; keep one")
        seen[name] = line
        _refuse_repeated_keys(value, path, name)
