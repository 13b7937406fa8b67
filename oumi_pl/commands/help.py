"""`fit --help`, and `--help TOPIC`: this project's options, or those of one section, place, class or option.

All of it is read from signatures and docstrings, by the parser that reads the command line.
"""

import contextlib
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from oumi_pl.errors import UserError, nearest
from oumi_pl.terminal.screen import has_colours

WIDEST = 120
COLUMN = 34
"""Where descriptions begin, unless a name is longer."""
LISTED = 8
"""Up to so many classes of a place are shown with their arguments; of more, only a summary each."""
OF_FIT = ("checkpoint", "export", "samples", "val_every", "max_tokens", "report", "logger", "engine")
HIDDEN = {
    "fit": ("predictions",),
    "validate": (*OF_FIT, "predictions"),
    "test": (*OF_FIT, "predictions"),
    "predict": OF_FIT,
}
"""Options that a command accepts but ignores, so that one recipe serves all commands."""
FOREIGN = ("builtins", "abc", "torch", "lightning", "transformers", "typing")
"""Packages whose docstrings follow other styles: jsonargparse's reading of them is used."""
FIRST = {
    "config NAME|FILE": "A recipe, by name or path; several are merged, and the later wins.",
    "resume [RUN]": "Resume the last unfinished run of the recipe, or this run folder.",
}
LAST = {
    "ckpt_path FILE": "Checkpoint whose weights are used; with fit, training also continues from its step.",
    "seed_everything INT": "Seed of every random number (default: 42).",
    "print_config": "Print what would run, as a recipe, and stop.",
}
"""Options that are read before the parser, or that Lightning adds to it: shown before and after the project's own."""

Options = dict[str, Any]
"""By name (`data.batch_size`): a `check.Argument`, or only a description."""


def main(command: str, topic: str = "") -> int:
    """Prints the help of a command, or of a topic.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        topic: A section (`model`, `checkpoint`), a place of classes (`model.optimizer`), a class, or an option.

    Raises:
        UserError: if the topic is unknown; offers the nearest.
    """
    print("\n".join(_topic(command, topic.lstrip("-")) if topic else _command(command)))
    return 0


def _command(command: str) -> Iterator[str]:
    """The project's own options by group, and what else there is to ask for."""
    yield f"usage: oumi_pl {command} --config NAME|FILE [--OPTION VALUE ...]"
    groups = _groups(command)
    for title, options in groups.values():
        yield from _section(title, options)
    yield from _heading("values of the recipe, by their path in it")
    for name, example in {"model": "optimizer.lr 3e-4", "data": "batch_size 8", "trainer": "max_steps 100"}.items():
        yield from _entry(f"--{name}.KEY VALUE", f"--{name}.{example}; all of them: oumi_pl {command} --help {name}")
    yield from _heading(f"oumi_pl {command} --help TOPIC")
    yield from _entry("a section", ", ".join(["model", "data", "trainer", *(name for name in groups if name != "run")]))
    yield from _entry("a place of classes", ", ".join(sorted(place for place in _places() if "." in place)))
    yield from _entry("a class", "SFT, DPOData, Cosine, AdamW, ..., or one of your own: my_module.MyLoss")
    yield from _entry("an option", "data.batch_size")
    yield from _entry("all", "everything on one page, as the parser prints it")


def _topic(command: str, topic: str) -> Iterator[str]:
    groups, places = _groups(command), _places()
    if topic in groups:
        yield from _section(*groups[topic])
        return
    if topic in places:
        yield from _place(topic, places[topic])
        return
    if class_and_place := _class(topic, places):
        yield from _page(*class_and_place)
        return
    owners = list(groups.items())
    for place, classes in places.items():
        if place.partition(".")[0] == topic.partition(".")[0]:
            owners += [(name, ("", _arguments(cls, place))) for name, cls in classes.items()]
    alike: dict[str, tuple[Any, list[str]]] = {}
    for owner, (_, options) in owners:
        if topic in options:
            alike.setdefault(str(options[topic]), (options[topic], []))[1].append(owner)
    for option, names in alike.values():
        yield from _section(", ".join(names), {topic: option})
    if not alike:
        known = {"all", *groups, *places, *(name for classes in places.values() for name in classes)}
        known |= {name.split()[0] for _, (_, options) in owners for name in options}
        raise UserError(f"--help: unknown topic {topic!r}{nearest(topic, known)}")


def _class(topic: str, places: dict[str, dict[str, type]]) -> tuple[type, str] | None:
    """A class by its short name, or by the path of one that isn't imported yet, and its first place in a recipe."""
    module, _, name = topic.rpartition(".")
    if module and module not in places:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
        places = _places()
    return next(((known[name], place) for place, known in places.items() if name in known), None)


def _place(place: str, classes: dict[str, type]) -> Iterator[str]:
    """The classes of a place: the arguments of each, then those that all share."""
    if len(classes) > LISTED:
        yield from _heading(f"{place}: one of these; the arguments of one: --help NAME")
        for name, cls in sorted(classes.items()):
            yield from _entry(name, _summary(cls))
        return
    arguments = {name: _arguments(cls, place).items() for name, cls in classes.items()}
    shared: Options = {}
    if len(classes) > 1:
        yield from _heading(f"{place}: one of {', '.join(classes)}")
        first, *others = arguments.values()
        shared = {name: option for name, option in first if all((name, option) in other for other in others)}
    for name, cls in classes.items():
        own = {key: option for key, option in arguments[name] if key not in shared}
        yield from _section(f"{name}: {_summary(cls)}", own)
    if shared:
        yield from _section("each of them", shared)


def _page(cls: type, place: str) -> Iterator[str]:
    """A class: its docstring, and its arguments as options."""
    yield from _heading(f"{cls.__name__}, for {place}")
    ends = r"\n\s*(?:Args|Arguments|Returns|Raises|Examples?|Note)\b|\n\s*\.\."
    for paragraph in re.split(r"\n\s*\n", re.split(ends, inspect.getdoc(cls) or "")[0].strip()):
        yield from textwrap.wrap(_plain(paragraph), _width())
    options, dashes = _arguments(cls, place), "--"
    if place.startswith("trainer."):  # a list of classes: an option does not say of which
        options, dashes = {name.rpartition(".")[2]: option for name, option in options.items()}, ""
        first = "".join(f"{name}: {_default(option.default) or '...'}" for name, option in list(options.items())[:1])
        yield ""
        yield f"in a recipe: {place}: [{{class_path: {cls.__name__}, init_args: {{{first}}}}}]"
    yield from _section("arguments", options, dashes)


# ---- options


def _places() -> dict[str, dict[str, type]]:
    """The classes that a recipe can name, by their place; and Lightning's Trainer."""
    from lightning.pytorch import Trainer

    from oumi_pl.config import check
    from oumi_pl.data.base import TextData
    from oumi_pl.modules.base import LanguageModule

    trainer: dict[str, type] = {"Trainer": Trainer}
    root = {"model": check.Argument(LanguageModule), "data": check.Argument(TextData)}
    return {"trainer": trainer} | check.places(root | _arguments(Trainer, "trainer"))


def _groups(command: str) -> dict[str, tuple[str, Options]]:
    """The options that this project adds to a command: the title and the options of each group."""
    from oumi_pl.config import check
    from oumi_pl.config.cli import CLI
    from oumi_pl.config.parser import Parser

    cli, parser = CLI.__new__(CLI), Parser()
    cli.command = command
    cli.add_arguments_to_parser(parser)
    run: Options = {name: doc for name, doc in FIRST.items() if command == "fit" or not name.startswith("resume")}
    groups = {"run": ("the run", run)}
    for name, argument in check.options(parser).items():
        group, dot, _ = name.partition(".")
        if group not in HIDDEN[command]:
            title = f"{group}: {(parser.groups or {})[group].title}" if dot else ""
            groups.setdefault(group if dot else "run", (title, {}))[1][name] = argument
    run |= LAST
    return groups


def _arguments(cls: type, place: str) -> Options:
    """What the constructor of a class takes, as options below its place in a recipe."""
    from docstring_parser import DocstringStyle, parse

    from oumi_pl.config import check

    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):  # a class describes best what it passes on to a base
        if owner.__module__.split(".")[0] not in FOREIGN:
            params = parse(owner.__doc__ or "", style=DocstringStyle.GOOGLE).params
            docs |= {argument.arg_name: argument.description or "" for argument in params}
    known = check.arguments(cls).items()
    return {f"{place}.{name}": argument._replace(doc=docs.get(name, argument.doc)) for name, argument in known}


def _kind(hint: Any) -> str:
    """A type in the column of names: `int`, `lightning|hf|trl`, `str or list`."""
    from oumi_pl.config import check

    names = check.type_names(hint)
    kind = " or ".join(names)
    return kind if len(kind) <= COLUMN else f"{kind[: COLUMN - 3].rpartition('|')[0] or names[0]}|..."


def _default(value: Any) -> str:
    """A default, if it says anything."""
    if isinstance(value, dict) and "class_path" in value:
        inside = ", ".join(f"{name}={given}" for name, given in (value.get("init_args") or {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({inside})"
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in (None, (), [], {}) or not isinstance(value, int | float | str | list | tuple) else str(value)


# ---- lines


def _section(title: str, options: Mapping[str, Any], dashes: str = "--") -> Iterator[str]:
    yield from _heading(title)
    for name, option in options.items():
        if isinstance(option, str):
            yield from _entry(f"{dashes}{name}", option)
            continue
        doc, default = _plain(option.doc), _default(option.default)
        if default and "Default: " not in doc and "efault" not in doc[-40:]:  # else it says so itself
            doc = f"{doc} (default: {default})".strip()
        yield from _entry(f"{dashes}{name} {_kind(option.hint)}".rstrip(), doc)


def _entry(name: str, doc: str) -> Iterator[str]:
    """A name, and beside or below it what it does, wrapped."""
    wrapped = textwrap.wrap(doc, _width() - COLUMN, break_on_hyphens=False) or [""]
    if len(name) < COLUMN - 3:
        yield f"  {name:{COLUMN - 2}}{wrapped.pop(0)}".rstrip()
    else:
        yield f"  {name}"
    yield from (" " * COLUMN + line for line in wrapped)


def _heading(title: str) -> Iterator[str]:
    yield ""
    for line in textwrap.wrap(title, _width()):
        yield f"\033[1m{line}\033[0m" if has_colours(sys.stdout) else line


def _summary(cls: type) -> str:
    """The first sentence of a class's docstring."""
    first = _plain((inspect.getdoc(cls) or "").split("\n\n")[0])
    return re.split(r"(?<! al)\. (?=[A-Z`])", first)[0].rstrip(".")


def _plain(doc: str) -> str:
    """A docstring's paragraph in one line, without the marks of reStructuredText."""
    doc = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(doc.split()))
    return doc.replace("``", "")


def _width() -> int:
    """Columns of the terminal, also when the page goes there through a pager."""
    columns = int(os.environ.get("COLUMNS") or 0)
    for stream in (1, 2, 0):
        with contextlib.suppress(OSError):
            columns = columns or os.get_terminal_size(stream).columns
    return max(60, min(WIDEST, columns or 100))
