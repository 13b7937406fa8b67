"""Checks recipes and the command line against signatures, key by key, before jsonargparse parses them.

jsonargparse reports most of these mistakes as well, but in a page of text that quotes the whole config. It also accepts
unknown sections if they are empty, and hides a failing import behind the list of types that it tried.
"""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, _typehints
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torch.optim import Optimizer

from oumi_pl import callbacks, data, losses, modules, optim, rollouts
from oumi_pl.config.files import Option
from oumi_pl.errors import UserError, nearest


class Parser(LightningArgumentParser):
    """An argument parser that raises a `UserError` that says what is wrong, and where."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises instead of printing a page of usage.

        Raises:
            UserError: always, except in the parsers of nested classes, whose errors the outer one reports.
        """
        if not self.exit_on_error:
            return super().error(message, ex)
        raise UserError(innermost(message)) from ex

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> Any:
        """Leaves text values alone: jsonargparse would open a data file that a recipe names and read it as a config."""
        return super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})


def innermost(message: str) -> str:
    """Extracts the error of the innermost key from a message of jsonargparse, which quotes the config around it."""
    message = " ".join(message.split())
    keys = re.findall(r'Parser key "([^"]+)"', message)
    path = [part for key in keys for part in key.split(".") if part != "init_args"]
    if missing := re.search(r"arguments are required: (.+?)(?= - |$)", message):
        names = [".".join([*path, name]) for name in missing.group(1).split(", ")]
        return f"{', '.join(names)}: missing, and there is no default"
    problem = re.split(r'Parser key "[^"]+": ', message)[-1]
    problem = re.split(r" - |\. Got value: Namespace| Given value", problem.rpartition("Errors: - ")[2])[0]
    return ": ".join([*filter(None, [".".join(path)]), problem[:300]])


@contextmanager
def unwrapped_mistakes() -> Iterator[None]:
    """Raises the `UserError` of a class about its arguments instead of jsonargparse's error around it.

    Raises:
        UserError: the error of the class.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise


for _package in (callbacks, data, losses, modules, optim, rollouts):
    for _module in pkgutil.walk_packages(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

ACCIDENTAL = ("accelerate", "bitsandbytes", "transformers")
"""Packages that libraries import, whose optimizers have the same names as torch's: recipes give them by full path."""


_all_paths = _typehints.get_all_subclass_paths


def _paths_on_purpose(*args: Any, **kwargs: Any) -> list[str]:
    return [path for path in _all_paths(*args, **kwargs) if path.partition(".")[0] not in ACCIDENTAL]


# jsonargparse would call `SGD` ambiguous once bitsandbytes is imported, which also has one
_typehints.get_all_subclass_paths = _paths_on_purpose


def known_classes(bases: Iterable[type]) -> dict[str, type]:
    """The concrete classes that fit one of `bases`, by the short name that a recipe may use.

    A class is known once it is imported; all of ours are imported above.
    """
    classes = (cls for base in bases for cls in list(_subclasses(base)) or [base])
    return {
        cls.__name__: cls
        for cls in classes
        if not cls.__name__.startswith("_")
        and not _is_abstract(cls)
        and cls.__module__.partition(".")[0] not in ACCIDENTAL
    }


def _is_abstract(cls: type) -> bool:
    """Whether a class leaves abstract methods open, of a base that is no `ABC` as well: Lightning's are none."""
    return any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))


def _subclasses(base: type) -> Iterator[type]:
    """All imported subclasses of a class."""
    cls: type
    for cls in type.__subclasses__(base):
        yield cls
        yield from _subclasses(cls)


class Argument(NamedTuple):
    """An argument of a constructor, or an option of the command line."""

    hint: Any
    """Its type."""
    default: Any = None
    doc: str = ""


class Kinds(NamedTuple):
    """The alternatives of a type hint, by what they look like in a recipe. Kinds that do not occur are empty."""

    plain: Any
    """Numbers, text and choices, as one hint."""
    bases: tuple[type, ...]
    """Classes that are given by `class_path`."""
    items: Any
    """Type of the items of a list."""
    values: Any
    """Type of the values of a mapping."""


def options(parser: Any) -> dict[str, Argument]:
    """The options of a parser by name, without those that load files or print help."""
    return {
        action.dest: Argument(action._typehint, action.default, action.help or "")
        for action in parser._actions
        if type(action).__name__ == "ActionTypeHint"
    }


@cache
def arguments(cls: type) -> dict[str, Argument]:
    """The arguments of a class's constructor by name, including those that it passes to its bases as `**kwargs`.

    Fields of a dataclass argument have names with a dot: `theme.description`.
    """
    parser = Parser()
    skip: Any = {1} if issubclass(cls, Optimizer) else None  # its first argument, the parameters, comes from the model
    try:
        parser.add_class_arguments(cls, "_", skip=skip, fail_untyped=False)
    except (ValueError, TypeError):  # an argument that no recipe can set
        return {}
    return {name.removeprefix("_."): argument for name, argument in options(parser).items()}


@cache
def kinds(hint: Any) -> Kinds:
    """Sorts the alternatives of a type hint."""
    plain, bases, items, values = [], [], [], []
    for member in members(hint):
        kind, inner = get_origin(member) or member, get_args(member)
        if kind is Callable and inner:  # a recipe names the class that it returns: an optimizer, for example
            kind = inner[-1]
        if not inspect.isclass(kind):
            plain.append(member if get_origin(member) else Any)  # `Literal[...]`; other special forms can't be checked
        elif issubclass(kind, Mapping):
            values.append(inner[-1] if inner else Any)
        elif kind.__module__.partition(".")[0] not in sys.stdlib_module_names:
            bases.append(kind)
        elif issubclass(kind, Iterable) and not issubclass(kind, str | bytes):
            items += [item for item in inner if item is not ...] or [Any]
        else:
            plain.append(member)
    return Kinds(_union(plain), tuple(bases), _union(items), _union(values))


def members(hint: Any) -> Iterator[Any]:
    """The alternatives of a type hint without None and Tensor, which torch allows for a learning rate."""
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from members(member)
    elif get_origin(hint) is Annotated:
        yield from members(get_args(hint)[0])
    elif hint not in (None, NoneType, Tensor):
        yield hint


def _union(hints: list[Any]) -> Any:
    return Any if Any in hints else Union[tuple(hints)] if hints else None  # noqa: UP007


def type_names(hint: Any) -> list[str]:
    """The alternatives of a type hint as people write them: `int`, `lightning|hf|trl`, `list`."""
    names = []
    for member in members(hint):
        kind = kinds(member)
        if kind.bases or kind.items or kind.values:
            names += [base.__name__ for base in kind.bases] or ["list" if kind.items else "mapping"]
        elif get_origin(member) is Literal:
            names.append("|".join(map(str, get_args(member))))
        else:
            names.append(getattr(member, "__name__", str(member)))
    return list(dict.fromkeys(names))


def places(level: Mapping[str, Argument], above: str = "") -> dict[str, dict[str, type]]:
    """The classes that a recipe can name, by their place in it (`model.optimizer`) and their short name.

    Args:
        level: The top-level keys of a recipe, or the arguments of a class.
        above: Place of that class, with a dot at the end.
    """
    known: dict[str, dict[str, type]] = {}
    for name, argument in level.items():
        place, kind = f"{above}{name}", kinds(argument.hint)
        classes = known_classes(kind.bases or kinds(kind.items).bases)
        if classes:
            known[place] = classes
        # Lightning's own classes have many arguments, few of which belong in recipes
        for cls in classes.values() if place.count(".") < 2 and not place.startswith("trainer.") else ():
            for inner, others in places(arguments(cls), f"{place}.").items():
                known[inner] = known.get(inner, {}) | others
    return known


CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
CONTROLS = ("config", "help", "print_config", "resume")
"""Options that are not keys of a recipe."""
EXAMPLES = {
    "model": "{class_path: SFT, init_args: {model: org/name}}",
    "model.config": "{model_type: llama}",
    "model.freeze": "[model.embed_tokens]",
    "model.lora": "{r: 16}",
    "model.optimizer": "{class_path: AdamW, init_args: {lr: 2.0e-5}}",
    "model.optimizer.betas": "[0.9, 0.999]",
    "model.schedule": "{class_path: Cosine, init_args: {warmup: 100}}",
    "data": "{class_path: SFTData, init_args: {train: rows.jsonl}}",
    "data.tokenizer": "HuggingFaceTB/SmolLM2-135M",
    "data.train.columns": "{question: my_column}",
    "trainer.callbacks": "[{class_path: EMA}]",
}
"""Place -> an example value, for places that don't take plain numbers or names."""


class Checker:
    """Checks the recipes of a run in order, then its options.

    Args:
        root: The top-level keys of a recipe: the options of the command, by name.
    """

    def __init__(self, root: Mapping[str, Argument]) -> None:
        self.root = root
        self.named: dict[str, Any] = {}  # the class, function or text last named at each place
        self.option = ""  # the option being checked; empty in recipes

    def check_recipe(self, tree: Mapping[str, Any]) -> None:
        """Checks a recipe.

        Raises:
            UserError: at the first wrong key, class or value; suggests the nearest.
        """
        model = tree.get("model")
        if isinstance(tree.get("training"), Mapping) or (isinstance(model, Mapping) and "model_name" in model):
            raise UserError("this is an Oumi config, not a recipe: run it with oumi_pl train -c FILE, or convert it")
        self._check_keys(tree, self.root)

    def check_options(self, options: Sequence[Option]) -> None:
        """Checks a command line, each option as a recipe with a single value, and that model and data are named.

        Raises:
            UserError: at the first wrong option; suggests the nearest.
        """
        for flag, value in options:
            if not flag.startswith("-"):
                raise UserError(f"{flag!r} belongs to no option; a recipe is given as --config NAME or FILE")
            self.option = flag.removesuffix("+")
            path = self.option.lstrip("-").removesuffix(".help").split(".")
            if path[0] in CONTROLS:
                continue
            tree: Any = [value] if flag.endswith("+") and value and not value.startswith("[") else value
            for key in reversed(path):
                tree = {key: tree}
            self._check_keys(tree, {**dict.fromkeys(CONTROLS, Argument(Any)), **self.root})
            if value is None and not flag.endswith(".help"):
                raise UserError(f"{flag}: a value is missing")
        for place in ("model", "data"):
            if place not in self.named and not any(flag.endswith("help") for flag, _ in options):
                raise UserError(f"{place}: missing, and there is no default; write {_example(place)}")

    # ---- keys

    def _check_keys(self, tree: Any, known: Mapping[str, Argument], above: str = "", section: str = "") -> None:
        """Checks a level of a recipe: its top, a section such as `trainer`, or the arguments of a class.

        Args:
            tree: Keys and values.
            known: The arguments at this level. Names with a dot belong to a section.
            above: Place of the class whose arguments these are, with a dot at the end.
            section: Name of the section, with a dot at the end.
        """
        place = f"{above}{section}"
        if not isinstance(tree, Mapping):
            raise UserError(f"{place[:-1]}: {tree!r} is given, but here is a mapping of keys to values")
        for key, value in tree.items():
            name = f"{section}{key}"
            if name in known:
                self._check_value(value, known[name].hint, f"{place}{key}", known[name].default)
            elif not any(other.startswith(f"{name}.") for other in known):
                names = (other.removeprefix(section) for other in known if other.startswith(section))
                raise self._unknown(f"{place}{key}", dict.fromkeys(place + other.partition(".")[0] for other in names))
            elif not (self.option and isinstance(value, str) and Path(value).is_file()):  # read by jsonargparse
                self._check_keys(_loaded(value), known, above, f"{name}.")

    def _unknown(self, place: str, siblings: Iterable[str]) -> UserError:
        """The error for an unknown key: suggests the key that was probably meant, or lists those of its level."""
        meant, depth = self._meant(place, siblings), place.count(".") + 1
        typed = [key for key in self.option.lstrip("-").split(".") if key not in CLASS_KEYS]
        if depth > len(typed) or not self.option:  # a key in a recipe, or in a mapping on the command line
            return UserError(f"{place}: unknown key" + (f"; did you mean {meant!r}?" if meant else _listed(siblings)))
        hint = "; `--help` lists all, `--model.help SFT` those of a class"
        if meant:
            hint = f"; did you mean '--{'.'.join([meant, *typed[depth:]])}'?"
        elif depth > 1:
            hint = _listed(f"--{sibling}" for sibling in siblings)
        return UserError(f"unknown option {self.option}{hint}")

    def _meant(self, place: str, siblings: Iterable[str]) -> str | None:
        """The key that was probably meant: the same name at another place, else a similar name, here first."""
        key, everywhere = place.rpartition(".")[2], [*self.root]
        for at, classes in places(self.root).items():
            if not at.startswith("trainer."):  # these are lists of classes, which keys can't address
                everywhere += [f"{at}.{name}" for cls in classes.values() for name in arguments(cls)]
        if same := [path for path in everywhere if path.rpartition(".")[2] == key and path != place]:
            return same[0]
        # in an existing section, one of its own keys is meant
        for paths in (siblings, everywhere) if "." not in place else (siblings,):
            last = {path.rpartition(".")[2].casefold(): path for path in reversed([*paths])}
            if close := difflib.get_close_matches(key.casefold(), last, n=1):
                return last[close[0]]
        return None

    # ---- values

    def _check_value(self, value: Any, hint: Any, place: str, default: Any = None) -> None:
        kind = kinds(hint)
        if kind.bases or kind.items or kind.values:
            value = _loaded(value)
        if value in (None, "null") or kind.plain is Any:
            return
        if isinstance(value, Mapping) and (kind.bases or "class_path" in value):
            self._check_class(value, kind.bases, place, default)
        elif isinstance(value, Mapping) and kind.values:
            for key, item in value.items():
                self._check_value(item, kind.values, f"{place}.{key}")
        elif isinstance(value, list) and kind.items:
            for number, item in enumerate(value):
                self._check_value(item, kind.items, place if self.option else f"{place}.{number}")
        elif kind.plain and _accepts(kind.plain, value):
            if isinstance(value, str):  # it may name a class, as `strategy: DDPStrategy` does
                self.named[_without_numbers(place)] = known_classes(kind.bases).get(value, value)
        elif kind.bases and isinstance(value, str):
            self._find_class(value, kind.bases, place)
        else:
            raise _wrong_value(value, hint, place)

    def _check_class(self, value: Mapping[str, Any], bases: tuple[type, ...], place: str, default: Any) -> None:
        name = value.get("class_path")
        cls = self._class_before(bases, place, default) if name is None else self._find_class(name, bases, place)
        if cls is not None and not inspect.isclass(cls):
            return  # a function that returns an instance, or text, which is left to jsonargparse
        owners = [cls] if cls is not None else list(known_classes(bases).values())
        known = {key: argument for owner in owners for key, argument in arguments(owner).items()}
        if not isinstance(inside := value.get("init_args", {}), Mapping):
            raise UserError(f"{place}.init_args: {inside!r} is given, but here is a mapping of keys to values")
        beside = {key: value[key] for key in value if key not in CLASS_KEYS}
        if beside and not self.option and not (name is None and all(map(dataclasses.is_dataclass, owners))):
            key = next(iter(beside))
            unknown = f"unknown key{nearest(str(key), CLASS_KEYS)}"
            deeper = f"belongs one level deeper, under {place}.init_args"
            raise UserError(f"{place}.{key}: {deeper if key in known else unknown}")
        given = {**inside, **beside}
        self._check_keys(given, known, f"{place}.")
        takes_them = (not inspect.isabstract(base) and given.keys() <= arguments(base).keys() for base in bases)
        if self.option and cls is None and not any(takes_them):
            raise UserError(f"{self.option}: no class is named that takes it; name one before it: --{place} NAME")

    def _class_before(self, bases: tuple[type, ...], place: str, default: Any) -> Any:
        """The class named at this place before, else the default; None without either."""
        cls = self.named.get(_without_numbers(place))
        if cls is not None and _fits(cls, bases):
            return cls
        return _imported(default["class_path"], place) if isinstance(default, Mapping) else None

    def _find_class(self, name: Any, bases: tuple[type, ...], place: str) -> Any:
        """The class of this name, or the function that returns an instance.

        Raises:
            UserError: if there is none, or it does not fit.
        """
        no_class = _wrong_value(name, Union[bases or (type,)], place)  # noqa: UP007
        if not isinstance(name, str) or "/" in name:
            raise no_class
        known = known_classes(bases)
        cls: Any = known.get(name)
        try:
            if cls is None and "." in name:
                cls = _imported(name, place)
            elif cls is None:
                cls = places(self.root).get(_without_numbers(place), {}).get(name)  # another kind: refused below
            if cls is None:
                raise UserError(f"{place}: unknown class {name!r}{nearest(name, known)}")
        except UserError as error:
            raise no_class if Path(name).exists() else error from None
        if not _fits(cls, bases):
            kind = " or ".join(base.__name__ for base in bases)
            raise UserError(f"{place}: {name} is not a subclass of {kind}{'' if '.' in name else _listed(known)}")
        self.named[_without_numbers(place)] = cls
        return cls


def _without_numbers(place: str) -> str:
    """A place without the numbers of list items."""
    return re.sub(r"\.\d+", "", place)


def _fits(cls: Any, bases: tuple[type, ...]) -> bool:
    """Whether a class may be given where one of `bases` is expected. Functions are accepted unchecked."""
    if not inspect.isclass(cls) or not bases:
        return True
    return any(getattr(base, "_is_protocol", False) or issubclass(cls, base) for base in bases)


def _listed(names: Iterable[str]) -> str:
    return nearest("", names)  # no name is similar to an empty one, so it lists them all


def _example(place: str) -> str:
    """An example value; empty for plain numbers and names."""
    place = _without_numbers(place)
    return f"for example `{place.rpartition('.')[2]}: {EXAMPLES[place]}`" if place in EXAMPLES else ""


def _loaded(value: Any) -> Any:
    """Parses a list or mapping from the command line; returns anything else unchanged."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        with contextlib.suppress(yaml.YAMLError):
            loaded = yaml.safe_load(value)
            if not isinstance(loaded, dict) or any(item is not None for item in loaded.values()):  # `{r:8}` is text
                return loaded
    return value


def _accepts(hint: Any, value: Any) -> bool:
    """Whether jsonargparse accepts a value for this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def _wrong_value(value: Any, hint: Any, place: str) -> UserError:
    """The error for a wrong value: `data.batch_size: 'many' is not an int`, or the nearest choice."""
    with contextlib.suppress(yaml.YAMLError):  # a number from the command line is text
        value = loaded if isinstance(loaded := yaml.safe_load(str(value)), int | float) else value
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    alternatives = [*members(hint)]
    choices = [str(choice) for one in alternatives if get_origin(one) is Literal for choice in get_args(one)]
    if choices:
        choices += ["true", "false"] * (bool in alternatives)
        return UserError(f"{place}: {shown} is not a valid value{nearest(str(value), choices)}")
    names = " or ".join(f"an {name}" if name[0].lower() in "aeiou" else f"a {name}" for name in type_names(hint))
    right = _example(place) or "class_path: NAME" * bool(kinds(hint).bases)
    return UserError(f"{place}: {shown} is not {names}" + (f"; write {right}" if right else ""))


# ---- imports


def _imported(name: str, place: str) -> Any:
    """Imports a class or function by its path.

    Raises:
        UserError: if the module or class does not exist, or the import fails; names file and line.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise UserError(f"{place}: {name}: its module imports {missing!r}, which is not installed") from error
        if missing.partition(".")[0] == "torchao":
            raise UserError(f"{place}: {name} needs torchao: pip install 'oumi_pl[low-bit]'") from error
        raise UserError(f"{place}: {name}: there is no module {missing!r}{_nearby_module(missing)}") from error
    except SyntaxError as error:
        raise UserError(f"{place}: {name}: {error.filename} line {error.lineno}: {error.msg}") from error
    except Exception as error:  # a user's module may do anything on import
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})"
        raise UserError(f"{place}: {name}: its module can't be imported: {reason}") from error
    if not hasattr(module, attribute):
        own = [n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        raise UserError(f"{place}: module {module_name!r} has no {attribute!r}{nearest(attribute, own)}")
    return getattr(module, attribute)


def _nearby_module(missing: str) -> str:
    """Suggests the nearest module in the working directory, where users keep their own classes."""
    near = nearest(missing, [path.stem for path in Path.cwd().glob("*.py")])
    return near if near.startswith("; did") else f"; searched {Path.cwd()} and the installed packages"
