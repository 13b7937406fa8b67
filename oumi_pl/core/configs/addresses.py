"""Addresses of Oumi's configs, `oumi://configs/...`: read where Oumi keeps those that it has fetched."""

import os
from pathlib import Path

from oumi_pl.errors import UserError

ADDRESS = "oumi:"
VARIABLE, FOLDER = "OUMI_DIR", "~/.oumi/fetch"


def config_path(text: str) -> Path:
    """The file of a config.

    Args:
        text: Its path, or `oumi://` and its path in Oumi's repository.

    Raises:
        UserError: it is an address, and Oumi has not fetched it to this machine; or one of Oumi's short names.
    """
    if text.lower().startswith(ADDRESS):
        folder = Path(os.environ.get(VARIABLE) or FOLDER).expanduser()
        path = folder / text[len(ADDRESS) :].lstrip("/")
        if not path.is_file():
            raise UserError(f"{text} is an address; download the file and pass its path (not fetched: {path})")
        return path
    path = Path(text).expanduser()
    if path.suffix not in (".yaml", ".yml") and os.sep not in text and not path.exists():
        known = "Oumi's short names of configs are not known here"
        raise UserError(f"no file {text!r}; {known}: download the config and pass its path")
    return path
