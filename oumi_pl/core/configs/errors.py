"""The mistakes of a configuration."""

from typing import Self

from oumi_pl.errors import UserError


class OumiConfigError(UserError):
    """A configuration can't be: the message begins with the dotted path of the field that is wrong.

    A class of parameters knows its own fields alone, so its message begins with a field's name; whoever holds it
    puts the rest of the path before.
    """

    def at(self, place: str) -> Self:
        """The same error, told from further outside: `max_steps is 0` at `training` is `training.max_steps is 0`."""
        return type(self)(f"{place}.{self}") if place else self
