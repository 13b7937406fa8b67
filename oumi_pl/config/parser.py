"""LightningCLI's argument parser with errors of our own, and the user's mistake inside of what jsonargparse raises."""

from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from oumi_pl.config.classes import known_classes
from oumi_pl.config.explain import explain
from oumi_pl.errors import UserError


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one message: what is wrong, where, and the nearest right name."""

    flags: ClassVar[list[str]] = []
    """The options of the command that is run."""
    typed: ClassVar[list[str]] = []
    """The command line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises instead of printing a page of usage.

        Raises:
            UserError: always, but in the parsers of nested classes, whose errors the outer one reports.
        """
        if not self.exit_on_error:
            return super().error(message, ex)
        raise UserError(explain(message, self.flags, known_classes(), self.typed)) from ex

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> Any:
        """Takes text for text: jsonargparse would open a data file named in a recipe and read it as a config."""
        return super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})


def mistake_in(error: BaseException) -> UserError | None:
    """The user's mistake that lies behind an error: a class found it in its arguments, and jsonargparse wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause
