"""YAML as Oumi reads it: OmegaConf's numbers, references from one value to another, overrides of the command line."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigIndexError, OmegaConfBaseException

from oumi_pl.config.files import merge
from oumi_pl.core.configs.params.base_params import OumiConfigError

REFERENCE = "${"
LITERAL = "$\ue000{"
"""Replaces a `${` that has to stay text while others are resolved; the character is from a private use area."""
OF_THE_LAUNCHER = "local-rank"
"""torch.distributed.launch appends this to the arguments of a script; it is no part of the configuration."""


def parsed(text: str, where: str, literal: bool) -> dict[str, Any]:
    """The keys and values of a text.

    Args:
        text: YAML.
        where: What to call it in a message.
        literal: Whether `${...}` is left as text.

    Raises:
        OumiConfigError: it isn't YAML, isn't a mapping, or has a key twice.
    """
    if literal:
        text = text.replace(REFERENCE, LITERAL)
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        raise OumiConfigError(f"{where}{_line(error)}: {_problem(error)}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise OumiConfigError(f"{where}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(tree, dict) or (len(tree) == 1 and text.strip() in tree):
        kind = "a list" if isinstance(tree, list) else "text"
        raise OumiConfigError(f"{where}: a configuration is a mapping (model:, data:, training:), and this is {kind}")
    return tree


def resolved(defaults: Mapping[str, Any], given: Mapping[str, Any], typed: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Defaults, overridden by the file, overridden by the command line; references are replaced by their values.

    Raises:
        OumiConfigError: a key can't be set, or a reference leads nowhere.
    """
    place = ""
    try:
        config = OmegaConf.create(merge(defaults, given))
        for place, text in typed:
            OmegaConf.update(config, place, _typed_value(text, place))
        tree = OmegaConf.to_container(config, resolve=True)
    except ConfigIndexError as error:
        raise OumiConfigError(f"{place}: there is no such element; a longer list is given as a whole") from error
    except OmegaConfBaseException as error:
        raise OumiConfigError(f"{error.full_key or place}: {_first_line(error)}") from error
    except ValueError as error:  # of a list, elements are named by their numbers
        raise OumiConfigError(f"{place}: there is no such element; the first is [0]") from error
    return dict(_with_literals(tree))


def written(tree: Mapping[str, Any]) -> str:
    """A tree as YAML that `parsed` reads back to the same; what YAML can't represent is left out with a warning."""
    return OmegaConf.to_yaml(OmegaConf.create(_writable(tree, ""))).replace(LITERAL, REFERENCE)


def typed_pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys of the command line and the text of their values, in order.

    Args:
        args: `--key value`, `--key=value` and `key=value`, in any order.

    Raises:
        OumiConfigError: a value has no key, or a key no value.
    """
    waiting: str | None = None  # the key whose value is the next argument
    for word in args:
        key, equals, value = word.partition("=")
        if waiting is not None:
            if word.startswith("--"):
                break
            key, value, waiting = waiting, word, None
        elif equals:
            key = key.removeprefix("--")
        elif word.startswith("--"):
            waiting = key.removeprefix("--")
            continue
        else:
            raise OumiConfigError(f"{word!r} belongs to no key; it is --section.field VALUE, or section.field=VALUE")
        if key.replace("_", "-") != OF_THE_LAUNCHER:
            yield key, value
    if waiting is not None:
        raise OumiConfigError(f"--{waiting}: a value is missing; what is switched on takes one too: true")


def _typed_value(text: str, place: str) -> Any:
    try:
        typed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except yaml.MarkedYAMLError as error:
        raise OumiConfigError(f"{place}: {text!r}: {_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise OumiConfigError(f"{place}: {text!r}: {_first_line(error)}") from error
    return typed["value"]


def _with_literals(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(LITERAL, REFERENCE)
    if isinstance(value, dict):
        return {_with_literals(key): _with_literals(item) for key, item in value.items()}
    return [_with_literals(item) for item in value] if isinstance(value, list) else value


def _line(error: yaml.MarkedYAMLError) -> str:
    return f" line {error.problem_mark.line + 1}" if error.problem_mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error)
    if problem.startswith("found duplicate key"):
        return f"the key {problem.removeprefix('found duplicate key').strip()} is there twice; keep one"
    return f"not valid YAML: {problem}".replace(LITERAL, REFERENCE)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].replace(LITERAL, REFERENCE)


def _writable(value: Any, place: str) -> Any:
    """A tree as OmegaConf takes it: `${` as text, and nothing that YAML has no word for."""
    if isinstance(value, str):
        return value.replace(REFERENCE, LITERAL)
    if isinstance(value, dict):
        items = {key: (item, f"{place}.{key}".lstrip(".")) for key, item in value.items()}
        return {_writable(key, ""): _writable(*item) for key, item in items.items() if _is_plain(*item)}
    if isinstance(value, list):
        numbered = [(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return [_writable(*item) for item in numbered if _is_plain(*item)]
    return value


def _is_plain(value: Any, place: str) -> bool:
    if value is None or type(value) in (str, int, float, bool, bytes, dict, list):
        return True
    warnings.warn(f"{place}: {value!r} can't be written as YAML and is left out", stacklevel=4)
    return False
