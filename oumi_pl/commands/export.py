"""`export`: any checkpoint to a folder that `transformers` loads."""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from oumi_pl.errors import UserError, nearest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; see: oumi_pl export --help")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = _Parser(prog="oumi_pl export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .ckpt file, a sharded checkpoint, or a run folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold a model yet")
    parser.add_argument("--merge", action="store_true", help="add a LoRA adapter to its base weights")
    parser.add_argument("--push_to_hub", metavar="NAME", help="also upload the folder to this hub repository")
    options = parser.parse_args(args)
    export_checkpoint(_find(options.checkpoint), options.output, merge=options.merge)
    print(f"exported to {options.output}")
    if options.push_to_hub:
        _push(options.output, options.push_to_hub)
    return 0


def export_checkpoint(checkpoint: Path, output: Path, *, merge: bool = False) -> None:
    """Builds the model that a checkpoint's own config describes, loads the weights and writes the folder.

    Raises:
        UserError: if the checkpoint can't be read, has no config, or the folder holds a model.
    """
    if (output / "config.json").exists() or (output / "adapter_config.json").exists():
        raise UserError(f"--output: {output} holds a model already; name another folder")
    content = load(checkpoint)
    if "config" not in content:
        raise UserError(f"--checkpoint: {checkpoint} holds no recipe, so it was not written by oumi_pl")
    import yaml

    from oumi_pl.cli import instantiate
    from oumi_pl.export import export_model, model_card

    config = yaml.safe_load(content["config"])
    module, data = instantiate(config)
    data.tokenizer_spec = data.tokenizer_spec or module.model_name
    tokenizer = data.tokenizer
    module.model = module.build(tokenizer, data.added_tokens)
    module.load_weights(content["state_dict"])
    export_model(
        module.model,
        output,
        tokenizer,
        merge=merge,
        stop_tokens=data.stop_tokens,
        card=model_card(config, content["config"], content.get("metrics", {}), output.resolve().name),
    )


def load(checkpoint: Path) -> dict[str, Any]:
    """Reads a checkpoint, whole or sharded, without running code from it.

    Raises:
        UserError: if it is not a checkpoint.
    """
    import pickle

    import torch

    try:
        if checkpoint.is_file():
            return torch.load(checkpoint, map_location="cpu", weights_only=True)
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "whole.ckpt"
            dcp_to_torch_save(checkpoint, whole)
            content = torch.load(whole, map_location="cpu", weights_only=True)
        return content | torch.load(checkpoint / "meta.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"--checkpoint: {checkpoint} can't be read: {str(error).splitlines()[0]}") from error


def _find(path: Path) -> Path:
    """The checkpoint itself, or the one that counts in a run folder: the best, else the newest."""
    from oumi_pl.checkpoint_files import saved_steps

    if not path.exists():
        beside = [p.as_posix() for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"--checkpoint: no file {path}{nearest(path.as_posix(), beside) if beside else ''}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if folder.is_file() or (folder / "meta.pt").exists():
        return folder
    if (folder / "best.ckpt").exists():
        return folder / "best.ckpt"
    if steps := saved_steps(folder):
        return steps[-1]
    raise UserError(f"--checkpoint: there is no checkpoint in {path}")


def _push(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        print(f"pushed to {api.upload_folder(repo_id=name, folder_path=folder)}")
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"--push_to_hub: {name}: {str(error).splitlines()[0]}; the folder {folder} is written") from error
