"""Parses the command lines of commands other than Lightning's, with errors like all others."""

import argparse
from typing import NoReturn

from oumi_pl.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises errors instead of printing its usage.

    Args:
        command: Name of the command.
        description: Text above the options.
        epilog: Text below the options.
    """

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(prog=f"oumi_pl {command}", description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.prog.removeprefix('oumi_pl ')}: {message}; see: {self.prog} --help")
