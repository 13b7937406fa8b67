"""Finds a model or tokenizer in a local folder, in the cache or on the hub, or raises a short error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError, nearby, reason
from oumi_pl.runs.checksums import refuse_damaged_tokenizer

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""


def locate(name: str, key: str, revision: str | None = None) -> str:
    """Checks that a model or tokenizer exists, before anything is loaded.

    transformers retries an unreachable hub for minutes; this sends a single request.

    Args:
        name: Path of a folder, or id on the hub.
        key: The key of the recipe that names it, for the message.
        revision: Branch, tag or commit on the hub.

    Returns:
        The absolute path of a folder, which stays valid in another working directory; a hub id unchanged.

    Raises:
        UserError: it is neither a folder nor in the cache nor on the hub, or the hub can't be reached.
        DamagedError: it is a folder with a tokenizer that is not as this package has written it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name).expanduser()
    if path.is_dir():
        refuse_damaged_tokenizer(path, key)
        return str(path.resolve())
    if path.is_file():
        advice = "; export it first: oumi_pl export --checkpoint FILE --output DIR" if path.suffix == ".ckpt" else ""
        raise UserError(f"{key}: {name} is a file, not a model folder{advice}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{key}: there is no folder {name!r}{nearby(path)}") from None
    _refuse_unreachable(name, key, revision)
    return name


@contextmanager
def asked_once(*settings: Any) -> Iterator[None]:
    """Puts the libraries into offline mode if the hub does not answer one request.

    Otherwise they retry for half a minute, with a warning each time.

    Args:
        settings: Modules of other libraries that have their own `HF_HUB_OFFLINE`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    modules = (constants, *settings)
    before = [module.HF_HUB_OFFLINE for module in modules]
    answers = True
    if not any(before):  # `datasets` also has its own environment variable for it
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception:  # any network error, of any HTTP library
            answers = False
    try:
        for module, is_offline in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = is_offline or not answers
        yield
    finally:
        for module, was_offline in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline


def _refuse_unreachable(name: str, key: str, revision: str | None) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    if (cache / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        return
    absent = f"{key}: {name!r} is no folder and not in the cache ({cache})"
    if constants.is_offline_mode():
        raise UserError(f"{absent}, and HF_HUB_OFFLINE is set: unset it to fetch it, or name a folder")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=TIMEOUT)
    except EntryNotFoundError:  # the repository exists: an adapter, or only a tokenizer
        return
    except GatedRepoError as error:
        raise UserError(
            f"{key}: {name!r} is gated: accept its terms on {constants.ENDPOINT}/{name}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{key}: {name!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{absent} nor on the hub; if it is private: `hf auth login`") from error
    except Exception as error:  # any network error, of any HTTP library
        unreachable = f"{absent}, and {constants.ENDPOINT} can't be reached: {reason(error)}"
        raise UserError(
            f"{unreachable}; without a network, name a folder, or fill the cache and set HF_HUB_OFFLINE=1"
        ) from error
