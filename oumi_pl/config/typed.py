"""What was typed on the command line, before anything parses it."""


def typed(option: str, args: list[str]) -> str | None:
    """The value that an option has on the command line: the last one, as everywhere; None if it isn't there."""
    value = None
    for i, arg in enumerate(args):
        flag, equals, attached = arg.partition("=")
        if flag == option:
            value = attached if equals else "".join(args[i + 1 : i + 2])
    return value
