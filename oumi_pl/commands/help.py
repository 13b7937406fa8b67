"""`fit --help`, and `--help TOPIC`: the options of this project first, then whatever class or section is asked for.

All of it is read from signatures and docstrings, by the parser that reads the command line.
"""

import contextlib
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from oumi_pl.errors import UserError, nearest
from oumi_pl.terminal.screen import has_colours

WIDEST = 120
COLUMN = 34
"""Where docs begin, unless a name is longer."""
LISTED = 8
"""Classes of a place that are shown with all their arguments; of more, only what they are."""
OF_FIT = ("checkpoint", "export", "samples", "val_every", "max_tokens", "report", "logger", "engine")
HIDDEN = {
    "fit": ("predictions",),
    "validate": (*OF_FIT, "predictions"),
    "test": (*OF_FIT, "predictions"),
    "predict": OF_FIT,
}
"""Options that a command takes, so that one recipe serves all, and does nothing with."""
FOREIGN = ("builtins", "abc", "torch", "lightning", "transformers", "typing")
"""Packages whose docstrings are of many styles: what the parser makes of them is taken."""
TYPED = (
    ("", "--config NAME|FILE", "A recipe, by name or path; several are merged, and the later wins."),
    ("fit", "--resume [RUN]", "Go on with the last unfinished run of the recipe, or with this run folder."),
    ("", "--ckpt_path FILE", "Checkpoint whose weights are taken; with fit, also where it stands."),
    ("", "--seed_everything INT", "Seed of everything that is drawn (default: 42)."),
    ("", "--print_config", "Print what would run, as a recipe, and stop."),
)
"""What is taken off the command line before the parser sees it, and what Lightning adds to it: for which command."""
LAST = 3
"""How many of these come after the project's."""


class Option(NamedTuple):
    """One option: `--data.batch_size`, its type, what it is unless it is set, and what it does."""

    name: str
    kind: str
    default: str
    doc: str


def main(command: str, topic: str = "") -> int:
    """Prints the help of a command, or of a topic.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        topic: A section (`model`, `checkpoint`), a place of classes (`model.optimizer`), a class, or an option.

    Raises:
        UserError: there is no such topic; offers the nearest.
    """
    lines = _of_topic(command, topic.lstrip("-")) if topic else _of_command(command)
    print("\n".join(lines))
    return 0


def _of_command(command: str) -> Iterator[str]:
    """The project's own options by group, and what else there is to ask for."""
    yield f"usage: oumi_pl {command} --config NAME|FILE [--OPTION VALUE ...]"
    for title, options in _own(command):
        yield from _section(_titled(title), options)
    yield from _heading("values of the recipe, by the path that they have in it")
    for name in ("model", "data", "trainer"):
        example = {"model": "model.optimizer.lr 3e-4", "data": "data.batch_size 8", "trainer": "trainer.max_steps 100"}
        yield from _entry(f"  --{name}.KEY VALUE", f"--{example[name]}; all of them: oumi_pl {command} --help {name}")
    yield from _heading(f"oumi_pl {command} --help TOPIC")
    places = ", ".join(sorted(place for place in _places() if "." in place))
    yield from _entry(
        "  a section", f"model, data, trainer, {', '.join(title for title, _ in _own(command) if title != 'the run')}"
    )
    yield from _entry("  a place of classes", places)
    yield from _entry("  a class", "SFT, DPOData, Cosine, AdamW, ..., or one of your own: my_module.MyLoss")
    yield from _entry("  an option", "data.batch_size")
    yield from _entry("  all", "everything on one page, as the parser sees it")


def _of_topic(command: str, topic: str) -> Iterator[str]:
    """What a topic is about."""
    groups, places = dict(_own(command)), _places()
    if topic in groups:
        yield from _section(_titled(topic), groups[topic])
        return
    if topic == "trainer":
        from lightning.pytorch import Trainer

        yield from _section("trainer: Lightning's Trainer", _arguments(Trainer, "trainer"))
        return
    if topic in places:
        yield from _place(topic, places[topic])
        return
    if found := _class(topic, places):
        place, cls = found
        yield from _page(cls, place)
        return
    options = [*((name, option) for name, group in groups.items() for option in group), *_values(topic, places)]
    chosen: dict[Option, list[str]] = {}
    for owner, option in options:
        if option.name.split()[0] == f"--{topic}":
            chosen.setdefault(option, []).append(owner)
    for option, owners in chosen.items():
        yield from _section(", ".join(owners), [option])
    if not chosen:
        known = {"trainer", "all", *groups, *places, *(name for classes in places.values() for name in classes)}
        known |= {option.name[2:].split()[0] for _, option in options}
        raise UserError(f"--help: there is no topic {topic!r}{nearest(topic, known)}")


def _class(topic: str, places: dict[str, dict[str, type]]) -> tuple[str, type] | None:
    """A class by its short name, or by the path of one that is not known yet, and where it may stand."""
    module, _, name = topic.rpartition(".")
    if module and module not in places:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
        places = _places()
    return next(((place, known[name]) for place, known in places.items() if name in known), None)


def _place(place: str, classes: dict[str, type]) -> Iterator[str]:
    """The classes that may stand at a place: what they share once, then what each has of its own."""
    if len(classes) > LISTED:
        yield from _heading(f"{place}: one of these; the arguments of one: --help NAME")
        for name, cls in sorted(classes.items()):
            yield from _entry(f"  {name}", _summary(cls))
        return
    arguments = {name: _arguments(cls, place) for name, cls in classes.items()}
    shared = []
    if len(classes) > 1:
        yield from _heading(f"{place}: one of {', '.join(classes)}")
        shared = [option for option in next(iter(arguments.values())) if all(option in a for a in arguments.values())]
    for name, cls in classes.items():
        own = [option for option in arguments[name] if option not in shared]
        yield from _section(f"{name}: {_summary(cls)}", own)
    if shared:
        yield from _section("each of them", shared)


def _page(cls: type, place: str) -> Iterator[str]:
    """A class: its docstring, and its arguments as options."""
    yield from _heading(f"{cls.__name__}, for {place}")
    described = re.split(
        r"\n\s*(?:Args|Arguments|Returns|Raises|Examples?|Note)\b|\n\s*\.\.", inspect.getdoc(cls) or ""
    )
    for paragraph in re.split(r"\n\s*\n", described[0].strip()):
        yield from textwrap.wrap(_plain(paragraph), _width())
    options = _arguments(cls, place)
    if place.startswith("trainer."):  # a list of classes: an option does not say of which
        options = [option._replace(name=option.name.rpartition(".")[2]) for option in options]
        first = "".join(f"{option.name}: {option.default or '...'}" for option in options[:1])
        yield ""
        yield f"in a recipe: {place}: [{{class_path: {cls.__name__}, init_args: {{{first}}}}}]"
    yield from _section("arguments", options)


def _titled(group: str) -> str:
    """A group of options, and what the class that takes them does."""
    from oumi_pl.config import cli

    kind = {"checkpoint": "Checkpoints"}.get(group, group.capitalize())
    return f"{group}: {_summary(getattr(cli, kind))}" if hasattr(cli, kind) else group


def _places() -> dict[str, dict[str, type]]:
    from oumi_pl.config.classes import known_classes

    whole = {
        place: {name: cls for name, cls in classes.items() if not inspect.isabstract(cls)}
        for place, classes in known_classes().items()
    }
    return {place: classes for place, classes in whole.items() if classes}


def _values(topic: str, places: dict[str, dict[str, type]]) -> Iterator[tuple[str, Option]]:
    """Every option that a class of a topic's section brings, and the class's name."""
    from lightning.pytorch import Trainer

    lightnings: dict[str, dict[str, type]] = {"trainer": {"Trainer": Trainer}}
    section, dot, _ = topic.partition(".")
    for place, classes in (lightnings | places).items() if dot else ():
        for name, cls in classes.items() if place.split(".")[0] == section else ():
            yield from ((name, option) for option in _arguments(cls, place))


# ---- options


def _own(command: str) -> list[tuple[str, list[Option]]]:
    """The options that this project adds to a command, by group."""
    from oumi_pl.config.cli import CLI
    from oumi_pl.config.parser import Parser

    cli = CLI.__new__(CLI)
    cli.command = command
    parser = Parser()
    cli.add_arguments_to_parser(parser)
    groups: dict[str, list[Option]] = {"the run": []}
    for option in _options(parser):
        title, dot, _ = option.name[2:].partition(".")
        if title not in HIDDEN[command]:
            groups.setdefault(title if dot else "the run", []).append(option)
    typed = [Option(name, "", "", doc) for of, name, doc in TYPED if of in ("", command)]
    groups["the run"] = [*typed[:-LAST], *groups["the run"], *typed[-LAST:]]
    return list(groups.items())


def _arguments(cls: type, place: str) -> list[Option]:
    """What the constructor of a class takes, as options below its place in a recipe."""
    from torch.optim import Optimizer

    from oumi_pl.config.parser import Parser

    parser = Parser()
    try:
        parser.add_class_arguments(cls, place, skip={1} if issubclass(cls, Optimizer) else None)  # the parameters
    except (ValueError, TypeError):  # a constructor whose signature can't be read
        return []
    told = _documented(cls)
    return [option._replace(doc=told.get(option.name.rpartition(".")[2], option.doc)) for option in _options(parser)]


def _documented(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of arguments: a class knows best what it hands on to a base."""
    from docstring_parser import DocstringStyle, parse

    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if owner.__module__.split(".")[0] not in FOREIGN:
            found = parse(owner.__doc__ or "", style=DocstringStyle.GOOGLE).params
            docs |= {argument.arg_name: _plain(argument.description or "") for argument in found}
    return docs


def _options(parser: Any) -> Iterator[Option]:
    """The options that a parser knows, those that only load or describe others left out."""
    for action in parser._actions:
        if type(action).__name__ != "ActionTypeHint":
            continue
        doc = _plain(action.help or "")
        yield Option(action.option_strings[0], _kind(action._typehint), _default(action.default), doc)


def _kind(hint: Any) -> str:
    """A type as people write it: `int`, `lightning|hf|trl`, `str or list`."""
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("NoneType", "None")
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: found.group(1).replace("'", "").replace(", ", "|"), text)
    text = re.sub(r"^(?:Union|Optional)\[(.*)\]$", r"\1", text)
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", text)) != text:  # what a list is of is left to the docs
        text = shorter
    short = [part for part in dict.fromkeys(re.split(r" \| |, ", text)) if part != "None"]
    kind = " or ".join(short)
    return kind if len(kind) <= COLUMN else f"{kind[: COLUMN - 3].rpartition('|')[0] or short[0]}|..."


def _default(value: Any) -> str:
    """A default, if it says anything."""
    if isinstance(value, dict) and "class_path" in value:
        inside = ", ".join(f"{name}={given}" for name, given in (value.get("init_args") or {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({inside})"
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in (None, (), [], {}) or not isinstance(value, int | float | str | list | tuple) else str(value)


# ---- lines


def _section(title: str, options: Iterable[Option]) -> Iterator[str]:
    yield from _heading(title)
    for option in options:
        yield from _lines(option)


def _lines(option: Option) -> Iterator[str]:
    default = f" (default: {option.default})" if option.default else ""
    if "Default: " in option.doc or "efault" in option.doc[-40:]:  # it says so itself
        default = ""
    yield from _entry(f"  {option.name} {option.kind}".rstrip(), f"{option.doc}{default}".strip())


def _entry(name: str, doc: str) -> Iterator[str]:
    """A name, and beside or below it what it does, wrapped."""
    wrapped = textwrap.wrap(doc, _width() - COLUMN, break_on_hyphens=False) or [""]
    if len(name) < COLUMN - 1:
        yield f"{name:{COLUMN}}{wrapped.pop(0)}".rstrip()
    else:
        yield name
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
