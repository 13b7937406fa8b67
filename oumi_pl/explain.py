"""Turns jsonargparse's messages, which quote whole configs, into one line: where, what is wrong, what would be right."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from oumi_pl.errors import nearest

_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN_KEY = re.compile(r"(?:[Oo]ption|[Kk]ey) '([^']+)' is not (?:accepted|expected)")
_UNKNOWN_OPTION = re.compile(r"does not accept option '([^']+)'")
_UNKNOWN_FLAG = re.compile(r"[Uu]nrecognized arguments: (\S+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_IMPORT = re.compile(r"(?:No module named|has no attribute|cannot import name) '([^']+)'")
_NESTED = re.compile(r"NestedArg\(key='([^']+)', val=(.*)\)")
_EXPECTED = re.compile(r"Expected an? (typing\.Literal\[[^\]]*\]|<class '[^']+'>|\S+)")
_GIVEN = re.compile(r"(?:Got value|Given value): (.+?)(?= - |$)")


def explain(message: str, flags: Iterable[str], classes: Mapping[str, Mapping[str, Iterable[str]]], tree: Mapping[str, Any]) -> str:
    """Says in one line what jsonargparse says in many.

    Args:
        message: What jsonargparse says.
        flags: Options that the command line knows, as `--trainer.max_steps`.
        classes: For each section of a recipe, class names that a `class_path` may shorten, with their parameters.
        tree: The recipe as it was read, to find out where in it an unknown key stands.
    """
    message = re.sub(r"\s+", " ", message).strip()
    flags = list(flags)
    if found := _UNKNOWN_FLAG.search(message):
        flag = found.group(1).split("=")[0]
        return f"unknown option {flag}{nearest(flag, flags)}"
    if found := _UNKNOWN_OPTION.search(message):
        key = found.group(1)
        return f"{key}: unknown key{_nearest_of_level(key, [flag.removeprefix('--') for flag in flags])}"
    path = _path(message)
    own = classes.get(path[0], {}) if path else {}
    if found := _UNKNOWN_KEY.search(message):
        key = found.group(1).split(".")[-1]
        where = _find(tree, path[0], key) if path else None
        place = where or ".".join([*path[:1], *_nested(message), *([] if _nested(message) else [key])])
        parameters = {name for names in own.values() for name in names} - {key}
        return f"{place}: unknown key{nearest(key, parameters)}"
    if found := _UNKNOWN_CLASS.search(message):
        return f"{'.'.join(path)}: unknown class {found.group(1)!r}{nearest(found.group(1), own)}"
    if path and isinstance(section := tree.get(path[0]), Mapping) and "Not a valid subclass" in message:
        for key in section.keys() - {"class_path", "init_args"}:
            return f"{path[0]}.{key}: unknown key{nearest(key, ['class_path', 'init_args'])}"
    return _wrong_value(message, path)


def subclasses(base: type) -> Iterator[type]:
    """All imported subclasses of a class."""
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


def parameters(cls: type) -> list[str]:
    """Names that a class's constructor takes, those that it hands on to its bases included."""
    names: dict[str, None] = {}
    for owner in cls.__mro__[:-1]:
        if "__init__" in vars(owner):
            names |= dict.fromkeys(inspect.signature(owner).parameters)
    return [name for name in names if name not in ("self", "args", "kwargs")]


def _path(message: str) -> list[str]:
    return [part for key in _KEY.findall(message) for part in key.split(".") if part != "init_args"]


def _nested(message: str) -> list[str]:
    found = _NESTED.search(message)
    return found.group(1).split(".") if found else []


def _nearest_of_level(key: str, known: list[str]) -> str:
    """Compares an unknown key with those that stand at its place first: `trainer.max_step` with `trainer.*`."""
    parent = key.rpartition(".")[0]
    if parent.split(".")[0] not in {k.split(".")[0] for k in known}:
        parent = ""
    if parent and (siblings := [k for k in known if k.startswith(f"{parent}.")]):
        return nearest(key, siblings)
    top = {k.split(".")[0] for k in known if not k.startswith("-")}
    return nearest(key.split(".")[0], top)


def _find(tree: Any, section: str, key: str) -> str | None:
    paths = [path for path in _paths(tree) if path[0] == section and path[-1] == key]
    return ".".join(part for part in paths[0] if part != "init_args") if len(paths) == 1 else None


def _paths(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        path = (*prefix, str(key))
        yield path
        yield from _paths(value, path)


def _wrong_value(message: str, path: list[str]) -> str:
    """`data.batch_size: 'abc' is not an int`, from the innermost complaint."""
    innermost = message[message.rfind("Parser key") :] if "Parser key" in message else message
    expected = [_readable(kind) for kind in _EXPECTED.findall(innermost)]
    expected = list(dict.fromkeys(kind for kind in expected if kind not in ("null", "NoneType")))
    given = _NESTED.search(message).group(2) if _NESTED.search(message) else None  # type: ignore[union-attr]
    if given is None and (values := _GIVEN.findall(innermost)):
        given = repr(values[0])
    where = ".".join(path) or "the recipe"
    if not expected or given is None:
        return f"{where}: {innermost.split(' Given value')[0]}"
    choices = [kind for kind in expected if kind.startswith("one of")] or expected
    hint = ""
    if choices[0].startswith("one of"):
        names = re.findall(r"'([^']+)'", " ".join(choices))
        hint = nearest(given.strip("'\""), names) if names else ""
        return f"{where}: {given} is not a valid value{hint}"
    if len(given) > 80:
        given = given[:77] + "..."
    return f"{where}: {given} is not {' or '.join(_with_article(kind) for kind in expected)}"


def _readable(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        return "one of " + kind.removeprefix("typing.Literal[").removesuffix("]")
    found = re.match(r"<class '(?:\w+\.)*(\w+)'>", kind)
    return found.group(1) if found else kind.rstrip(".")


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
