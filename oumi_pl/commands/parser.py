"""The command line of a command of our own: its mistakes are told like all others."""

import argparse
from typing import NoReturn

from oumi_pl.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, and raises instead of printing a page of usage.

    Args:
        command: The command's name.
        description: What it does.
        epilog: What stands below the options.
    """

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(prog=f"oumi_pl {command}", description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.prog.removeprefix('oumi_pl ')}: {message}; see: {self.prog} --help")
