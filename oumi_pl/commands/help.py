"""Prints `fit --help`, the project's own options, and `--help TOPIC`: a section, place of classes, class or option.

All texts come from signatures and docstrings, read by the parser of the command line.
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
"""Column at which descriptions begin, unless a name is longer."""
LISTED = 8
"""Places with more classes than this are listed with a summary per class instead of all arguments."""
OF_FIT = ("checkpoint", "export", "samples", "rollouts", "val_every", "max_tokens", "report", "logger", "engine")
HIDDEN = {
    "fit": ("predictions",),
    "validate": (*OF_FIT, "predictions"),
    "test": (*OF_FIT, "predictions"),
    "predict": OF_FIT,
}
"""Options that a command accepts and ignores, so that one recipe works with all commands."""
FOREIGN = ("builtins", "abc", "torch", "lightning", "transformers", "typing")
"""Packages with other docstring styles: for these, the descriptions parsed by jsonargparse are used."""
OF_EVERY_RUN = frozenset(
    (
        *("Advice", "BuildModel", "Checkpoints", "DryRun", "Export", "History", "LastStep", "Memory", "Predictions"),
        *("Preemption", "PreferenceWarnings", "ProgressLine", "Report", "RolloutWarnings", "Rollouts", "RunFolder"),
        *("SaveConfigCallback", "Start", "Throughput", "Tracking"),
    )
)
"""Callbacks that runs have by themselves, which a recipe has no use for: left out of the list."""
FIRST = {
    "config NAME|FILE": "A recipe, by name or path; several are merged, the later wins.",
    "resume [RUN]": "Resume the last unfinished run of the recipe, or this run folder; `auto`: or start the run.",
}
LAST = {
    "ckpt_path FILE": "Checkpoint to load weights from; fit also continues from its step.",
    "seed_everything INT": "Seed of all random generators (default: 42).",
    "print_config": "Print the complete config as a recipe, and exit.",
}
"""Options that are read before the parser, or added by Lightning: shown before and after the project's own."""

Options = dict[str, Any]
"""Name (`data.batch_size`) -> a `check.Argument`, or just a description."""


def main(command: str, topic: str = "") -> int:
    """Prints the help of a command, or of a topic.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        topic: A section (`model`, `checkpoint`), a place of classes (`model.optimizer`), a class, or an option.

    Raises:
        UserError: if the topic is unknown; suggests the nearest.
    """
    print("\n".join(_topic(command, topic.lstrip("-")) if topic else _command(command)))
    return 0


def _command(command: str) -> Iterator[str]:
    """The project's own options by group, and the other topics."""
    yield f"usage: oumi_pl {command} --config NAME|FILE [--OPTION VALUE ...]"
    groups = _groups(command)
    for title, options in groups.values():
        yield from _section(title, options)
    yield from _heading("override values of the recipe by their path")
    for name, example in {"model": "optimizer.lr 3e-4", "data": "batch_size 8", "trainer": "max_steps 100"}.items():
        yield from _entry(f"--{name}.KEY VALUE", f"--{name}.{example}; list all: oumi_pl {command} --help {name}")
    yield from _heading(f"oumi_pl {command} --help TOPIC")
    yield from _entry("a section", ", ".join(["model", "data", "trainer", *(name for name in groups if name != "run")]))
    yield from _entry("a place of classes", ", ".join(sorted(place for place in _places() if "." in place)))
    yield from _entry("a class", "SFT, DPOData, Cosine, AdamW, ..., or one of your own: my_module.MyLoss")
    yield from _entry("an option", "data.batch_size")
    yield from _entry("all", "all options on one page, printed by the parser")


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
    """Finds a class by short name, or imports it by path; returns it with its first place in a recipe."""
    module, _, name = topic.rpartition(".")
    if module and module not in places:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
        places = _places()
    return next(((known[name], place) for place, known in places.items() if name in known), None)


def _place(place: str, classes: dict[str, type]) -> Iterator[str]:
    """The classes of a place: the own arguments of each, then the shared ones."""
    if place == "trainer.callbacks":
        classes = _useful(classes)
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


def _useful(callbacks: dict[str, type]) -> dict[str, type]:
    """The callbacks that a recipe can use: without those that are refused, and those that every run has."""
    from oumi_pl.modules.base import BASES, UNFIT

    refused = (*BASES, *UNFIT)
    return {name: cls for name, cls in callbacks.items() if name not in OF_EVERY_RUN and cls not in refused}


def _page(cls: type, place: str) -> Iterator[str]:
    """The page of a class: docstring and arguments."""
    yield from _heading(f"{cls.__name__}, for {place}")
    ends = r"\n\s*(?:Args|Arguments|Returns|Raises|Examples?|Note)\b|\n\s*\.\."
    for paragraph in re.split(r"\n\s*\n", re.split(ends, inspect.getdoc(cls) or "")[0].strip()):
        yield from textwrap.wrap(_plain(paragraph), _width())
    options, dashes = _arguments(cls, place), "--"
    if place.startswith("trainer."):  # these are lists of classes, which options can't address
        options, dashes = {name.rpartition(".")[2]: option for name, option in options.items()}, ""
        first = "".join(f"{name}: {_default(option.default) or '...'}" for name, option in list(options.items())[:1])
        yield ""
        yield f"in a recipe: {place}: [{{class_path: {cls.__name__}, init_args: {{{first}}}}}]"
    yield from _section("arguments", options, dashes)


# ---- options


def _places() -> dict[str, dict[str, type]]:
    """The classes that a recipe can name, by place, and Lightning's Trainer."""
    from lightning.pytorch import Trainer

    from oumi_pl.config import check
    from oumi_pl.data.base import TextData
    from oumi_pl.modules.base import LanguageModule

    trainer: dict[str, type] = {"Trainer": Trainer}
    root = {"model": check.Argument(LanguageModule), "data": check.Argument(TextData)}
    return {"trainer": trainer} | check.places(root | _arguments(Trainer, "trainer"))


def _groups(command: str) -> dict[str, tuple[str, Options]]:
    """The options that this project adds to a command, by group: title and options."""
    from oumi_pl.config import check
    from oumi_pl.config.check import Parser
    from oumi_pl.config.cli import CLI

    cli, parser = CLI.__new__(CLI), Parser()  # without `__init__`, which would parse and run a command line
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
    """The constructor arguments of a class, as options under its place in a recipe."""
    from docstring_parser import DocstringStyle, parse

    from oumi_pl.config import check

    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):  # a subclass describes inherited arguments best
        if owner.__module__.split(".")[0] not in FOREIGN:
            params = parse(owner.__doc__ or "", style=DocstringStyle.GOOGLE).params
            docs |= {argument.arg_name: argument.description or "" for argument in params}
    known = check.arguments(cls).items()
    return {f"{place}.{name}": argument._replace(doc=docs.get(name, argument.doc)) for name, argument in known}


def _kind(hint: Any) -> str:
    """A type as text: `int`, `lightning|hf|trl`, `str or list`."""
    from oumi_pl.config import check

    names = check.type_names(hint)
    kind = " or ".join(names)
    return kind if len(kind) <= COLUMN else f"{kind[: COLUMN - 3].rpartition('|')[0] or names[0]}|..."


def _default(value: Any) -> str:
    """A default as text; empty if it carries no information."""
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
        if default and "Default: " not in doc and "efault" not in doc[-40:]:  # else the description mentions it
            doc = f"{doc} (default: {default})".strip()
        yield from _entry(f"{dashes}{name} {_kind(option.hint)}".rstrip(), doc)


def _entry(name: str, doc: str) -> Iterator[str]:
    """A name, with its description wrapped beside or below it."""
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
    """A paragraph of a docstring in one line, without reStructuredText markup."""
    doc = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(doc.split()))
    return doc.replace("``", "")


def _width() -> int:
    """Columns of the terminal, also if stdout goes through a pager."""
    columns = int(os.environ.get("COLUMNS") or 0)
    for stream in (1, 2, 0):
        with contextlib.suppress(OSError):
            columns = columns or os.get_terminal_size(stream).columns
    return max(60, min(WIDEST, columns or 100))
