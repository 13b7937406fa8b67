"""What was typed to change a configuration: `--training.max_steps 3`."""

from collections.abc import Iterator, Sequence

from oumi_pl.core.configs.errors import OumiConfigError

OF_THE_LAUNCHER = "local-rank"
"""torch.distributed.launch puts this behind the arguments of a script; it is no part of the configuration."""


def typed_pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and the text of their values, in the order in which they were typed.

    Args:
        args: `--key value`, `--key=value` and `key=value`, in any order.

    Raises:
        OumiConfigError: if a value has no key, or a key no value.
    """
    rest = iter(args)
    waiting: str | None = None
    for word in rest:
        key, equals, value = word.partition("=")
        if waiting is not None and not word.startswith("--"):
            yield from _pair(waiting, word)
            waiting = None
            continue
        if waiting is not None:
            break
        if equals:
            yield from _pair(key.removeprefix("--"), value)
        elif word.startswith("--"):
            waiting = key.removeprefix("--")
        else:
            raise OumiConfigError(f"{word!r} belongs to no key; it is --section.field VALUE, or section.field=VALUE")
    if waiting is not None:
        raise OumiConfigError(f"--{waiting}: a value is missing; what is switched on takes one too: true")


def _pair(key: str, value: str) -> Iterator[tuple[str, str]]:
    if key.replace("_", "-") != OF_THE_LAUNCHER:
        yield key, value
