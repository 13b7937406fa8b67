"""Turns jsonargparse's messages, which quote whole configs, into one line: where, what is wrong, what is right."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from oumi_pl.errors import LISTED, nearest

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
_NO_CLASS = re.compile(r"Not a valid subclass of (\w+) .*?Given value: (.+?)(?= - | Given value|$)")
_ABSTRACT = re.compile(r"Expected an instantiatable class, but \S*?(\w+) is abstract")
_NESTED = re.compile(r"NestedArg\(key='([^']+)', val=(.*?)\)(?= - |$)")
_EXPECTED = re.compile(r"Expected an? (typing\.Literal\[[^\]]*\]|<class '[^']+'>|\S+)")
_GIVEN = re.compile(r"(?:Got value|Given value): (.+?)(?= - |\. Got value| Given value|$)")
_NO_TEXT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\[.*\]|\{.*\}|True|False")

EXAMPLES = {
    "lora": "{r: 16}",
    "config": "{model_type: llama}",
    "betas": "[0.9, 0.999]",
    "columns": "{question: my_column}",
    "optimizer": "{class_path: AdamW, init_args: {lr: 2.0e-5}}",
    "schedule": "{class_path: Cosine, init_args: {warmup: 100}}",
    "callbacks": "[{class_path: EMA}]",
    "freeze": "[model.embed_tokens]",
    "tokenizer": "HuggingFaceTB/SmolLM2-135M",
}
"""Last part of a key -> a value that would be right, for those that aren't plain numbers or names."""


def explain(message: str, flags: Iterable[str], classes: Classes, args: Sequence[str] = ()) -> str:
    """Says in one line what jsonargparse says in many.

    Args:
        message: What jsonargparse says.
        flags: Options that the command line knows, as `--trainer.max_steps`.
        classes: Classes that a `class_path` may shorten, by their place in a recipe.
        args: The command line.
    """
    message = re.sub(r"\s+", " ", message).strip()
    asked = re.search(r"--([\w.]+)\.help: ", message)
    path = asked.group(1).split(".") if asked else _path(message)
    said = _of_options(message, path, list(flags), classes, args) or _of_classes(message, path, classes)
    return said or _wrong_value(message, path)


def _of_options(message: str, path: list[str], flags: list[str], classes: Classes, args: Sequence[str]) -> str | None:
    """Options and keys that there are not, or that lack something."""
    if found := _UNKNOWN_FLAG.search(message):
        return _unknown_flag(_as_typed(found.group(1).split("=")[0], args), flags, classes)
    if found := _UNKNOWN_OPTION.search(message):
        return unknown_key(found.group(1), flags, classes)
    if found := _NO_VALUE.search(message):
        flag = found.group(1)  # of a class's parameter, only the class is named
        bare = (a for a, b in zip(args, [*args[1:], "--"], strict=True) if a.startswith(flag) and b.startswith("--"))
        return f"{next(bare, flag)}: a value is missing"
    if found := _REQUIRED.search(message):
        names = ", ".join(".".join([*path, name.split(".")[-1]]) for name in found.group(1).split(", "))
        return f"{names}: missing, and there is no default"
    return None


def _of_classes(message: str, path: list[str], classes: Classes) -> str | None:
    """Classes that can't be had, and keys that they don't take."""
    where = ".".join(path)
    if found := _UNKNOWN_KEY.search(message):
        nested = _nested(message)
        place = ".".join([_KEY.findall(message)[0], *nested]) if nested else f"{where}.{found.group(1)}"
        return misspelt(place, _parameters_there(message, path, classes), classes)
    if found := _NO_MODULE.search(message) or _NOT_PYTHON.search(message):
        return f"{where}: {found.group(1)}"
    if found := _WRONG_CLASS.search(message):
        return f"{where}: {found.group(1)} is not a subclass of {found.group(2)}"
    if said := _of_no_class(message, path):
        return said
    if (found := _UNKNOWN_CLASS.search(message)) and (known := classes_at(where, classes)):
        name = found.group(1)
        other = f"{name} is for another kind of model; those of each kind are in the README"
        return f"{where}: {other if name in known else f'unknown class {name!r}{nearest(name, known)}'}"
    return None


def _of_no_class(message: str, path: list[str]) -> str | None:
    """A value where a class belongs, or an argument of a class that isn't named."""
    where, innermost = ".".join(path), _innermost(message)
    if _ABSTRACT.search(innermost):
        key = _NESTED.findall(message)
        option = f"--{where}.{key[0][0]}" if key else where
        return f"{option}: no class is named that takes it; name one before it: --{where} NAME"
    if found := _NO_CLASS.search(innermost):
        right = "a path, or {path: rows.jsonl}" if found.group(1) == "Source" else "class_path: NAME"
        return f"{where}: {found.group(2)[:80]} does not name a {found.group(1)}; write {_example(path) or right}"
    return None


def unknown_key(key: str, flags: Iterable[str], classes: Classes) -> str:
    """What to say of a key that stands in no class: the nearest at its place, else where a key of this name belongs."""
    known = [flag.removeprefix("--") for flag in flags if not flag.endswith(".help")]
    level = key.rpartition(".")[0]
    siblings = [name for name in known if name.startswith(f"{level}.")] if level else []
    if siblings:
        return f"{key}: unknown key{nearest(key, siblings)}"
    top = {name.split(".")[0] for name in known if not name.startswith("-")} - {"help", "config", "print_config"}
    near = nearest(key.partition(".")[0], top)
    if elsewhere := _elsewhere(key, known, classes):  # of this very name, where near ones are only similar
        return f"{key}: unknown key; did you mean {elsewhere!r}?"
    return f"{key}: unknown key{near}"


def misspelt(place: str, known: Iterable[str], classes: Classes) -> str:
    """What to say of a key that a class does not take: the nearest that it takes, else where this name belongs."""
    key = place.rpartition(".")[2]
    near = nearest(key, [name for name in known if name != "params"])  # an optimizer's, which no recipe gives
    elsewhere = _elsewhere(key, (), classes)
    if not near.startswith("; did") and elsewhere and elsewhere != place:
        return f"{place}: unknown key; did you mean {elsewhere!r}?"
    return f"{place}: unknown key{near}"


def _as_typed(flag: str, args: Sequence[str]) -> str:
    """An option as it stands on the command line: of `--model.optimzer.lr`, jsonargparse tells `--optimzer.lr`."""
    typed = (arg.partition("=")[0] for arg in args if "." in flag)
    return next((arg for arg in typed if arg.endswith(f".{flag.lstrip('-')}")), flag)


def _unknown_flag(flag: str, flags: list[str], classes: Classes) -> str:
    if not flag.startswith("-"):
        return f"{flag!r} belongs to no option; a recipe is given as --config NAME or FILE"
    key, names = flag.lstrip("-"), [name.lstrip("-") for name in flags if not name.endswith(".help")]
    found = _elsewhere(key, names, classes) or _near_argument(key, classes)
    found = found or _in_the_nearest_section(key, names, classes) or _near(key, names)
    siblings = [name for name in names if name.startswith(f"{key.rpartition('.')[0]}.")]
    if not found and siblings:
        return f"unknown option {flag}; known: {', '.join(f'--{name}' for name in siblings[:LISTED])}"
    hint = f"did you mean '--{found}'?" if found else "`--help` lists all, `--model.help SFT` those of a class"
    return f"unknown option {flag}; {hint}"


def _near_argument(key: str, classes: Classes) -> str | None:
    """The nearest argument of the classes that stand where the option begins: `model.optimizer.lr`."""
    section, _, rest = key.partition(".")
    name, dot, end = rest.removeprefix("init_args.").partition(".")
    known = [argument for cls in classes.get(section, {}).values() for argument in parameters(cls)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{section}.{close[0]}{dot}{end}" if close else None


def _in_the_nearest_section(key: str, names: list[str], classes: Classes) -> str | None:
    """The option with its first part mended: `modle.optimizer.lr` stands for `model.optimizer.lr`."""
    section, dot, rest = key.partition(".")
    sections = {name.partition(".")[0] for name in (*names, *classes) if "." in name}
    close = difflib.get_close_matches(section, sections - {section}, n=1, cutoff=0.6)
    if not dot or section in sections or not close:
        return None
    mended = f"{close[0]}.{rest}"
    return mended if mended in names else _near_argument(mended, classes) or _near(mended, names)


def _near(key: str, names: list[str]) -> str | None:
    """The nearest option, by its whole name or by its last part: `max_epochs` stands for `trainer.max_epochs`."""
    section = key.rpartition(".")[0]
    if section and (siblings := [name for name in names if name.startswith(f"{section}.")]):
        names = siblings  # the section stands, so that only its own keys can be meant
        key = key.rpartition(".")[2]
    by_any = {name.rpartition(".")[2]: name for name in names} | {name: name for name in names}
    close = difflib.get_close_matches(key, by_any, n=1, cutoff=0.6)
    return by_any[close[0]] if close else None


def _elsewhere(key: str, names: Iterable[str], classes: Classes) -> str | None:
    """Where a key of this very name belongs: `batch_size` to `data.batch_size`."""
    of_classes: list[str] = []
    for place, known in classes.items():
        if not place.startswith("trainer."):  # lists of classes: an option does not say of which
            of_classes += [f"{place}.{name}" for kind in known.values() for name in parameters(kind)]
    return next((name for name in [*names, *of_classes] if name.rpartition(".")[2] == key and name != key), None)


def classes_at(place: str, classes: Classes) -> Mapping[str, type]:
    """The classes that may stand at a place, list indices aside; empty if none may."""
    return classes.get(re.sub(r"\.\d+", "", place), {})


def subclasses(base: type) -> Iterator[type]:
    """All imported subclasses of a class."""
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


def parameters(cls: type) -> list[str]:
    """Names that a class's constructor takes, those that it hands on to its bases as `**kwargs` included."""
    named, _ = signature(cls)
    return named


def signature(cls: type) -> tuple[list[str], bool]:
    """Names that a constructor takes, and whether these are all: no `**kwargs` is left open at the end."""
    names: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__[:-1]:
        if "__init__" in vars(owner):
            own = inspect.signature(vars(owner)["__init__"]).parameters
            names |= dict(list(own.items())[1:])
            if inspect.Parameter.VAR_KEYWORD not in [p.kind for p in own.values()]:
                break
    else:
        return _named(names), not names
    return _named(names), True


def _named(names: Mapping[str, inspect.Parameter]) -> list[str]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, parameter in names.items() if parameter.kind not in variable]


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
    innermost = _innermost(message)
    expected = [_readable(kind) for kind in _EXPECTED.findall(innermost.partition(" Given value type")[0])]
    expected = list(dict.fromkeys(kind for kind in expected if kind not in ("null", "NoneType", "dot", "Tensor")))
    nested = _NESTED.search(message)
    given = nested.group(2) if nested else None
    if given is None and (values := _GIVEN.findall(innermost)):
        given = repr(values[0])
    if given is not None and _NO_TEXT.fullmatch(given.strip("'\"")):
        given = given.strip("'\"")
    where = ".".join(path) or "the recipe"
    if not expected or given is None:
        complaint = re.split(r" Errors: - | Given value", re.sub(r'Parser key "[^"]+": ', "", innermost))
        return f"{where}: {complaint[-1 if 'Errors: -' in innermost else 0][:300]}"
    choices = [kind for kind in expected if kind.startswith("one of")]
    if choices:
        names = re.findall(r"'([^']+)'", " ".join(choices))
        names += ["true", "false"] if any("bool" in kind for kind in expected) else []
        hint = nearest(given.strip("'\""), names) if len(names) > 1 else f"; the only one so far is {names[0]!r}"
        return f"{where}: {given} is not a valid value{hint}"
    if len(given) > 80:
        given = given[:77] + "..."
    if expected == ["list"] and given.startswith("["):
        expected = ["list of such values"]
    right = f"; write {example}" if (example := _example(path)) else ""
    return f"{where}: {given} is not {' or '.join(_with_article(kind) for kind in expected)}{right}"


def _innermost(message: str) -> str:
    """The complaint about the deepest key: those around it quote the whole of what holds it."""
    return message[message.rfind("Parser key") :] if "Parser key" in message else message


def _example(path: list[str]) -> str | None:
    return next((f"for example `{key}: {EXAMPLES[key]}`" for key in path[-1:] if key in EXAMPLES), None)


def _readable(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        return "one of " + kind.removeprefix("typing.Literal[").removesuffix("]")
    found = re.match(r"<class '(?:\w+\.)*(\w+)'>", kind)
    name = found.group(1) if found else kind.rstrip(".")
    return {"dict": "mapping", "tuple": "list", "Sequence": "list"}.get(name, name)


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
