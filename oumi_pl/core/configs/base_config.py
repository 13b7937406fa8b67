"""A whole configuration: read from YAML and from the command line, written back to YAML."""

import dataclasses
import logging
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Self

from oumi_pl.core.configs.errors import OumiConfigError
from oumi_pl.core.configs.params.base_params import BaseParams
from oumi_pl.core.configs.tree import as_tree, from_tree
from oumi_pl.errors import nearest


@dataclasses.dataclass
class BaseConfig(BaseParams):
    """A configuration that has a file of its own."""

    @classmethod
    def from_yaml(cls, config_path: str | Path, ignore_interpolation: bool = True) -> Self:
        """Reads a file; fields that it does not name have their defaults.

        Args:
            config_path: The file.
            ignore_interpolation: Whether `${...}` stays the text that it is.

        Raises:
            OumiConfigError: if there is no such file, it isn't YAML, or a key or value is wrong.
        """
        return cls.from_yaml_and_arg_list(config_path, (), ignore_interpolation=ignore_interpolation)

    @classmethod
    def from_str(cls, config_str: str) -> Self:
        """Reads YAML from a string, in which `${section.field}` stands for the value of that field.

        Raises:
            OumiConfigError: if it isn't YAML, or a key or value is wrong.
        """
        from oumi_pl.core.configs import yaml_text

        given = yaml_text.parsed(config_str, "the text", literal=False)
        return from_tree(cls, yaml_text.resolved(as_tree(cls()), given, ()))

    @classmethod
    def from_yaml_and_arg_list(
        cls,
        config_path: str | Path | None,
        arg_list: Sequence[str],
        logger: logging.Logger | None = None,
        ignore_interpolation: bool = True,
    ) -> Self:
        """Reads a file, and puts what was typed in place of what it says; the later wins.

        Args:
            config_path: The file; None for the defaults alone.
            arg_list: `--training.max_steps 3`, `--training.max_steps=3` or `training.max_steps=3`. Values are YAML;
                `data.train.datasets[0].dataset_name` names an element, and `${section.field}` another value.
            logger: Taken because Oumi's has it; an error says all that there is to log.
            ignore_interpolation: Whether `${...}` of the file stays the text that it is.

        Raises:
            OumiConfigError: if there is no such file, it isn't YAML, or a key or value is wrong.
        """
        from oumi_pl.core.configs import yaml_text
        from oumi_pl.core.configs.typed_keys import typed_pairs

        text = "" if config_path is None else _read(Path(config_path).expanduser())
        given = yaml_text.parsed(text, str(config_path), literal=ignore_interpolation)
        return from_tree(cls, yaml_text.resolved(as_tree(cls()), given, typed_pairs(arg_list)))

    def to_yaml(self, config_path: str | Path | StringIO) -> None:
        """Writes all fields, so that `from_yaml` gives an equal configuration.

        Values of free-form mappings that YAML has no word for, such as functions, are left out with a warning.

        Raises:
            OumiConfigError: if there is no folder to write to.
        """
        from oumi_pl.core.configs import yaml_text

        text = yaml_text.written(as_tree(self))
        if isinstance(config_path, StringIO):
            config_path.write(text)
            return
        try:
            Path(config_path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OumiConfigError(f"{config_path}: can't be written: {error.strerror}") from error

    def print_config(self, logger: logging.Logger | None = None) -> None:
        """Logs all fields as YAML."""
        from oumi_pl.core.configs import yaml_text

        (logger or logging.getLogger(__name__)).info("Configuration:\n%s", yaml_text.written(as_tree(self)))


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
