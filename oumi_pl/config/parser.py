"""LightningCLI's argument parser with one-line errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from oumi_pl.errors import UserError


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
