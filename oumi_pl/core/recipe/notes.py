"""What a conversion reports: where each field went, what was refused, and where Oumi does something else."""

from typing import Any, NoReturn

from oumi_pl.errors import UserError


class Notes:
    """Collects, while a config is converted, what its reader has to know.

    online: whether files of models may be fetched from the hub. became: field of the config -> what it became in the
    recipe. comments: key of the recipe by its dotted path, empty for the recipe as a whole -> how Oumi differs there.
    """

    def __init__(self, *, online: bool = False) -> None:
        self.online = online
        self.became: dict[str, str] = {}
        self.comments: dict[str, list[str]] = {}

    def comment(self, place: str, text: str) -> None:
        """Adds a comment to a key of the recipe, once."""
        here = self.comments.setdefault(place, [])
        if text not in here:
            here.append(text)

    def nothing(self, path: str, why: str) -> None:
        """Notes that a field, if it is set, has no effect on this run."""
        if path in self.became:
            self.became[path] = f"nothing: {why}"


def given(**args: Any) -> dict[str, Any]:
    """Arguments of a recipe without those that are None, False or empty: the recipe's own defaults do."""
    return {name: value for name, value in args.items() if value or (value == 0 and value is not False)}


def refuse(path: str, why: str) -> NoReturn:
    """Refuses a field.

    Raises:
        UserError: always.
    """
    raise UserError(f"{path}: {why}")
