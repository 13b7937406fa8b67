"""Turns jsonargparse's messages, which quote whole configs, into one line: where, what is wrong, what would be right."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from oumi_pl.errors import nearest

Classes = Mapping[str, Mapping[str, type]]
"""Place in a recipe (`model.optimizer`) -> the classes that may stand there, by the short name that recipes use."""

_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN_KEY = re.compile(r"(?:[Oo]ption|[Kk]ey) '([^']+)' is not (?:accepted|expected)")
_OF_CLASS = re.compile(r"class_path '([^']+)': [Oo]ption '[^']+' is not accepted")
_GIVEN_CLASS = re.compile(r"Got value: Namespace\(class_path='([^']+)'")
_UNKNOWN_OPTION = re.compile(r"does not accept option '([^']+)'")
_UNKNOWN_FLAG = re.compile(r"[Uu]nrecognized arguments: (\S+)")
_NO_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
_REQUIRED = re.compile(r"the following arguments are required: (.+?)(?= - |$)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_MODULE = re.compile(r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+')")
_NOT_PYTHON = re.compile(r" - ([^-]+ \(\S+\.py, line \d+\))")
_WRONG_CLASS = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
_NESTED = re.compile(r"NestedArg\(key='([^']+)', val=(.*?)\)(?= - |$)")
_EXPECTED = re.compile(r"Expected an? (typing\.Literal\[[^\]]*\]|<class '[^']+'>|\S+)")
_GIVEN = re.compile(r"(?:Got value|Given value): (.+?)(?= - |$)")


def explain(message: str, flags: Iterable[str], classes: Classes, args: Sequence[str] = ()) -> str:
    """Says in one line what jsonargparse says in many.

    Args:
        message: What jsonargparse says.
        flags: Options that the command line knows, as `--trainer.max_steps`.
        classes: Classes that a `class_path` may shorten, by their place in a recipe.
        args: The command line.
    """
    message = re.sub(r"\s+", " ", message).strip()
    flags = list(flags)
    path = _path(message)
    where = ".".join(path) or "the recipe"
    if found := _UNKNOWN_FLAG.search(message):
        return _unknown_flag(found.group(1).split("=")[0], flags, classes)
    if found := _UNKNOWN_OPTION.search(message):
        return unknown_key(found.group(1), flags, classes)
    if found := _NO_VALUE.search(message):
        bare = [a for a, b in zip(args, [*args[1:], "--"], strict=True) if a.startswith(found.group(1)) and b[:2] == "--"]
        return f"{bare[0] if bare else found.group(1)}: a value is missing"
    if found := _REQUIRED.search(message):
        names = ", ".join(".".join([*path, name.split(".")[-1]]) for name in found.group(1).split(", "))
        return f"{names}: missing, and there is no default"
    if found := _UNKNOWN_KEY.search(message):
        nested = _nested(message)
        place = where if not nested else ".".join([_KEY.findall(message)[0], *nested])
        place = place if nested else f"{where}.{found.group(1)}"
        return f"{place}: unknown key{nearest(found.group(1), _parameters_there(message, path, classes))}"
    if found := _NO_MODULE.search(message) or _NOT_PYTHON.search(message):
        return f"{where}: {found.group(1)}"
    if found := _WRONG_CLASS.search(message):
        known = classes_at(where, classes)
        return f"{where}: {found.group(1)} is no {found.group(2)}; subclass it, or take one of: {', '.join(known)}"
    if (found := _UNKNOWN_CLASS.search(message)) and classes_at(where, classes):
        return f"{where}: unknown class {found.group(1)!r}{nearest(found.group(1), classes_at(where, classes))}"
    return _wrong_value(message, path)


def unknown_key(key: str, flags: Iterable[str], classes: Classes) -> str:
    """What to say of a key that stands in no class: the nearest at its place, else where a key of this name belongs."""
    known = [flag.removeprefix("--") for flag in flags if not flag.endswith(".help")]
    level = key.rpartition(".")[0]
    siblings = [name for name in known if name.startswith(f"{level}.")] if level else []
    if siblings:
        return f"{key}: unknown key{nearest(key, siblings)}"
    top = {name.split(".")[0] for name in known if not name.startswith("-")} - {"help", "config", "print_config"}
    near = nearest(key.split(".")[0], top)
    if not near.startswith("; did") and (elsewhere := _elsewhere(key, known, classes)):
        return f"{key}: unknown key; did you mean {elsewhere!r}?"
    return f"{key}: unknown key{near}"


def _unknown_flag(flag: str, flags: list[str], classes: Classes) -> str:
    if not flag.startswith("-"):
        return f"{flag!r} belongs to no option; a recipe is given as --config NAME or FILE"
    if elsewhere := _elsewhere(flag.lstrip("-"), [name.lstrip("-") for name in flags], classes):
        return f"unknown option {flag}; did you mean '--{elsewhere}'?"
    near = nearest(flag, flags)
    return f"unknown option {flag}{near if near.startswith('; did') else '; `--help` lists all, `--model.help SFT` those of a class'}"


def _elsewhere(key: str, names: Iterable[str], classes: Classes) -> str | None:
    """Where a key of this very name belongs: `batch_size` to `data.batch_size`."""
    of_classes = (f"{place}.{name}" for place, known in classes.items() for cls in known.values() for name in parameters(cls))
    return next((name for name in [*names, *of_classes] if name.rpartition(".")[2] == key and name != key), None)


def classes_at(place: str, classes: Classes) -> Mapping[str, type]:
    """The classes that may stand at a place, list indices aside; empty if none may."""
    return classes.get(re.sub(r"\.\d+", "", place), {})


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
    """The key of a command-line option below its class: quoted innermost first, so that the last says most."""
    found = _NESTED.findall(message)
    return [part for part in found[-1][0].split(".") if part != "init_args"] if found else []


def _parameters_there(message: str, path: list[str], classes: Classes) -> list[str]:
    """Parameters of the class that refused a key, or of all that may stand at its place."""
    named = _OF_CLASS.search(message) or _GIVEN_CLASS.search(message)
    name = named.group(1).rpartition(".")[2] if named else ""
    here = [known[name] for known in classes.values() if name in known]
    here = here or list(classes_at(".".join(path), classes).values())
    return list(dict.fromkeys(name for cls in here for name in parameters(cls)))


def _wrong_value(message: str, path: list[str]) -> str:
    """`data.batch_size: 'abc' is not an int`, from the innermost complaint."""
    innermost = message[message.rfind("Parser key") :] if "Parser key" in message else message
    expected = [_readable(kind) for kind in _EXPECTED.findall(innermost)]
    expected = list(dict.fromkeys(kind for kind in expected if kind not in ("null", "NoneType", "dot", "Tensor")))
    nested = _NESTED.search(message)
    given = nested.group(2) if nested else None
    if given is None and (values := _GIVEN.findall(innermost)):
        given = repr(values[0])
    where = ".".join(path) or "the recipe"
    if not expected or given is None:
        complaint = re.split(r" Errors: - | Given value", re.sub(r'Parser key "[^"]+": ', "", innermost))
        return f"{where}: {complaint[-1 if 'Errors: -' in innermost else 0][:300]}"
    choices = [kind for kind in expected if kind.startswith("one of")]
    if choices:
        names = re.findall(r"'([^']+)'", " ".join(choices))
        hint = nearest(given.strip("'\""), names) if len(names) > 1 else f"; the only one so far is {names[0]!r}"
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
