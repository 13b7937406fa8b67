"""Upload the model of a run to the Hugging Face hub: into a new private repository, unless you say otherwise."""

import json
from pathlib import Path
from typing import Any

from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError
from oumi_pl.runs.files import HALF
from oumi_pl.terminal.text import echo


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser("push", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's name or folder, or a model folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository")
    parser.add_argument("--public", action="store_true", help="create a public repository, or write to one")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what an existing repository holds; its history keeps the old files",
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="list files and sizes; upload nothing")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    options = parser.parse_args(args)
    check_name(options.name, "push")
    folder = model_folder(options.run, options.runs_dir.expanduser())
    refuse_local_base(folder, "push")
    sizes = files_of(folder)
    if options.dry_run:
        for name, size in sizes.items():
            echo(f"{size:>15,}  {name}")
        kind = "public" if options.public else "private"
        where = f"the {kind} repository {options.name}"
        echo(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files of {folder}, for {where}; nothing was uploaded")
        return 0
    echo(f"pushed to {push(folder, options.name, public=options.public, overwrite=options.overwrite)}")
    return 0


def model_folder(run: str, root: Path) -> Path:
    """The model folder itself, or that of a run.

    Raises:
        UserError: there is none.
    """
    from oumi_pl.runs import folders

    path = Path(run).expanduser()
    if _is_model(path):
        return path
    folder = folders.find(run, root)
    if not _is_model(folder / "model"):
        raise UserError(f"push: {folder} has no exported model; write one with: oumi_pl export --checkpoint {folder}")
    return folder / "model"


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def files_of(folder: Path) -> dict[str, int]:
    """The files that are uploaded, with their sizes in bytes: all but hidden and unfinished ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in names.items() if not _is_left_out(name)}


def _is_left_out(name: str) -> bool:
    return any(part.startswith(".") or part.endswith(HALF) for part in name.split("/"))


def refuse_local_base(folder: Path, key: str) -> None:
    """Refuses an adapter whose base is a folder of this machine, because nobody else could load it.

    Raises:
        UserError: it is one.
    """
    file = folder / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if base and Path(base).expanduser().is_dir():
        raise UserError(
            f"{key}: the base of this adapter is the folder {base}, which is nowhere else; export it merged (--merge), "
            f"or write the name of its base on the hub into {file}"
        )


def check_name(name: str, key: str) -> None:
    """Checks the name of a repository, without asking the hub.

    Raises:
        UserError: it is not OWNER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{key}: {error}") from None
    if "/" not in name:
        raise UserError(f"{key}: {name!r} has no owner; name it as OWNER/NAME")


def push(folder: Path, name: str, *, public: bool = False, overwrite: bool = False, key: str = "push") -> str:
    """Uploads a model folder, and returns the address of its repository.

    Args:
        folder: The folder.
        name: OWNER/NAME of the repository, which is created.
        public: Create a public one.
        overwrite: If it exists, replace its files.
        key: Option that names the repository, for messages.

    Raises:
        UserError: the repository exists and `overwrite` is not set, it is public and `public` is not set, or the hub
            refuses or can't be reached.
    """
    from huggingface_hub import HfApi

    from oumi_pl.errors import reason

    api = HfApi()
    unfinished = f"the model is written in {folder}"
    try:
        is_new = _create(api, name, public=public)
        if not is_new:
            _refuse_existing(api, name, key, public=public, overwrite=overwrite)
        else:
            unfinished = f"the repository is created; repeat with --overwrite, from the folder {folder}"
        files = list(files_of(folder))
        # what else the repository holds belongs to another model: a merged model beside an adapter would win over it
        stale = None if is_new else "*"
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, delete_patterns=stale)
    except UserError:
        raise
    except Exception as error:  # of the hub, the network or the HTTP library
        raise UserError(f"{key}: {name}: {reason(error)}; {unfinished}") from error
    return f"{api.endpoint}/{name}"


def _create(api: Any, name: str, *, public: bool) -> bool:
    """Creates a repository; returns whether it is new. Creating is the only check that no one can come between."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(name, private=not public, exist_ok=False)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:  # conflict
            raise
        return False
    return True


def _refuse_existing(api: Any, name: str, key: str, *, public: bool, overwrite: bool) -> None:
    if not overwrite:
        raise UserError(f"{key}: the repository {name} exists; name another one, or replace its files with --overwrite")
    if not api.repo_info(name).private and not public:
        raise UserError(f"{key}: the repository {name} is public; to publish the model, add --public")
