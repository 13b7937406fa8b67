"""What the files of a model on disk or on the hub say, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from oumi_pl.core.configs import ModelParams

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Where a tokenizer's chat template may be, besides its config."""


def model_type(params: ModelParams, *, online: bool) -> str | None:
    """The `model_type` of the model that the tokenizer belongs to; None if it isn't known."""
    config = _read(params, "config.json", online=online)
    return None if config is None else config.get("model_type")


def has_template(params: ModelParams, *, online: bool) -> bool | None:
    """Whether the tokenizer has a chat template; None if it isn't known.

    Args:
        params: Which tokenizer.
        online: Whether its files may be fetched from the hub; else only those in the cache are read.
    """
    config = _read(params, "tokenizer_config.json", online=online)
    if config is None:
        return None
    return bool(config.get("chat_template")) or any(_file(params, name, online=online) for name in TEMPLATES)


def _read(params: ModelParams, name: str, *, online: bool) -> dict[str, Any] | None:
    file = _file(params, name, online=online)
    try:
        read = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # reported when it is loaded
        return None
    return read if isinstance(read, dict) else None


def _file(params: ModelParams, name: str, *, online: bool) -> Path | None:
    """A file of the tokenizer's folder or repository; None if there is none, or it can't be reached."""
    source = params.tokenizer_name or params.model_name
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).exists() else None
    revision = params.model_revision if source == params.model_name else None
    return hub_file(source, name, revision=revision, online=online)


def hub_file(
    repository: str, name: str, *, kind: str = "model", revision: str | None = None, online: bool
) -> Path | None:
    """A file of a repository on the hub, in the cache; None if it isn't there, or can't be reached.

    Args:
        repository: Its id.
        name: Path of the file in it.
        kind: `model` or `dataset`.
        revision: Branch, tag or commit.
        online: Whether it may be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        where: dict[str, Any] = {"repo_type": kind, "revision": revision, "local_files_only": not online}
        return Path(hf_hub_download(repository, name, **where))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return None
