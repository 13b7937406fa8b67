"""A whole configuration: read from YAML and from the command line, written back to YAML."""

import dataclasses
import logging
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, Self, TypeVar

from oumi_pl.core.configs.params.base_params import (
    BaseParams,
    OumiConfigError,
    default_of,
    fields_of,
    hints,
    members,
    section_in,
    shown,
)
from oumi_pl.errors import nearest

T = TypeVar("T", bound=BaseParams)


@dataclasses.dataclass
class BaseConfig(BaseParams):
    """A configuration that has a file of its own."""

    @classmethod
    def from_yaml(cls, config_path: str | Path, ignore_interpolation: bool = True) -> Self:
        """Reads a file; fields that it does not name have their defaults.

        Args:
            config_path: The file.
            ignore_interpolation: Whether `${...}` is left as text.

        Raises:
            OumiConfigError: there is no such file, it isn't YAML, or a key or value is wrong.
        """
        return cls.from_yaml_and_arg_list(config_path, (), ignore_interpolation=ignore_interpolation)

    @classmethod
    def from_str(cls, config_str: str) -> Self:
        """Reads YAML from a string, in which `${section.field}` stands for the value of that field.

        Raises:
            OumiConfigError: it isn't YAML, or a key or value is wrong.
        """
        return cls._from_text(config_str, "the text", literal=False)

    @classmethod
    def from_yaml_and_arg_list(
        cls,
        config_path: str | Path | None,
        arg_list: Sequence[str],
        logger: logging.Logger | None = None,
        ignore_interpolation: bool = True,
    ) -> Self:
        """Reads a file, and overrides it with command-line arguments; the later wins.

        Args:
            config_path: The file; None for the defaults alone.
            arg_list: `--training.max_steps 3`, `--training.max_steps=3` or `training.max_steps=3`. Values are YAML;
                `data.train.datasets[0].dataset_name` names an element, and `${section.field}` another value.
            logger: Not used; here because Oumi's signature has it.
            ignore_interpolation: Whether `${...}` of the file is left as text.

        Raises:
            OumiConfigError: there is no such file, it isn't YAML, or a key or value is wrong.
        """
        text = "" if config_path is None else _read(Path(config_path).expanduser())
        return cls._from_text(text, str(config_path), arg_list, literal=ignore_interpolation)

    @classmethod
    def _from_text(cls, text: str, name: str, arg_list: Sequence[str] = (), *, literal: bool) -> Self:
        from oumi_pl.core.configs import yaml_text

        tree = yaml_text.parsed(text, name, literal)
        tree = yaml_text.resolved(_defaults(cls), tree, yaml_text.typed_pairs(arg_list))
        config = _section(cls, tree, "", cls)
        config.refuse_missing()
        return config

    def to_yaml(self, config_path: str | Path | StringIO) -> None:
        """Writes all fields, so that `from_yaml` gives an equal configuration.

        Values of free-form mappings that YAML can't represent, such as functions, are left out with a warning.

        Raises:
            OumiConfigError: the file can't be written.
        """
        if isinstance(config_path, StringIO):
            config_path.write(self._as_yaml())
            return
        try:
            Path(config_path).write_text(self._as_yaml(), encoding="utf-8")
        except OSError as error:
            raise OumiConfigError(f"{config_path}: can't be written: {error.strerror}") from error

    def print_config(self, logger: logging.Logger | None = None) -> None:
        """Logs all fields as YAML."""
        (logger or logging.getLogger(__name__)).info("Configuration:\n%s", self._as_yaml())

    def _as_yaml(self) -> str:
        from oumi_pl.core.configs import yaml_text

        return yaml_text.written(as_tree(self))


def _read(path: Path) -> str:
    if not path.is_file():
        beside = [p.as_posix() for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise OumiConfigError(f"no file {str(path)!r}{nearest(str(path), beside)}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise OumiConfigError(f"{path} line {line}: not UTF-8 text") from error
    except OSError as error:
        raise OumiConfigError(f"{path}: can't be read: {error.strerror}") from error


# --- as plain mappings and lists -------------------------------------------------------------------------------------


def as_tree(value: Any) -> Any:
    """Sections as mappings, enum members by their names, paths as text."""
    if isinstance(value, BaseParams):
        return {name: as_tree(item) for name, item in value}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: as_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_tree(item) for item in value]
    return value


def _required(cls: type[BaseParams]) -> list[str]:
    """Fields without a default, which subclasses of a user may have."""
    return [field.name for field in dataclasses.fields(cls) if default_of(field) is dataclasses.MISSING]


def _defaults(cls: type[BaseParams]) -> Any:
    """The tree of a section that nothing is said about; without the fields that have to be set."""
    if not _required(cls):
        return as_tree(cls())
    fields = ((field.name, default_of(field)) for field in dataclasses.fields(cls))
    return {name: as_tree(default) for name, default in fields if default is not dataclasses.MISSING}


def _section(cls: type[T], tree: Any, place: str, root: type[BaseParams]) -> T:
    """A section of a tree; `root` is what the whole tree is, for the message about an unknown key."""
    if not isinstance(tree, Mapping):
        raise OumiConfigError(f"{place}: {shown(tree)} is given, but here is a mapping of keys to values")
    fields, start = hints(cls), f"{place}." if place else ""
    for key in tree:
        if key not in fields:
            raise OumiConfigError(_unknown(str(key), start, list(fields), root))
    for name in _required(cls):
        if name not in tree:
            raise OumiConfigError(f"{start}{name}: missing, and there is no default")
    values = {key: _value(value, fields[key], f"{start}{key}", root) for key, value in tree.items()}
    try:
        return cls(**values)
    except OumiConfigError as error:
        raise error.at(place) from error


def _value(value: Any, hint: Any, place: str, root: type[BaseParams]) -> Any:
    section = section_in(hint)
    if section is None or (value is None and type(None) in members(hint)):
        return value
    if typing.get_origin(hint) is not list:
        return _section(section, value, place, root)
    if not isinstance(value, list):
        raise OumiConfigError(f"{place}: {shown(value)} is given, but here is a list")
    return [_section(section, item, f"{place}[{i}]", root) for i, item in enumerate(value)]


def _unknown(key: str, start: str, fields: Sequence[str], root: type[BaseParams]) -> str:
    """The message about an unknown key: offers the nearest one beside it, else where a key of this name belongs."""
    near = nearest(key, fields)
    elsewhere = next((name for name, _ in fields_of(root) if name.rpartition(".")[2] == key), None)
    if elsewhere and not near.startswith("; did"):
        near = f"; did you mean {elsewhere!r}?"
    return f"{start}{key}: unknown key{near}"
