"""Tokenize the documents of a pretraining recipe once, into shards that every run reuses."""

from pathlib import Path
from typing import Any

from oumi_pl.commands.parser import Parser
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import model_files
from oumi_pl.runs.folders import refuse_unwritable
from oumi_pl.terminal.text import echo

SPLITS = ("train", "validation")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser("prepare", __doc__)
    parser.add_argument("--config", action="append", required=True, help="a recipe; several are merged, the later wins")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the cache, where fit finds them)")
    options = parser.parse_args(args)
    recipes = (recipe_files.check(recipe_files.find(name)) for name in options.config)
    prepare(recipe_files.merged(recipes), options.output.expanduser() if options.output else None)
    return 0


def prepare(recipe: dict[str, Any], output: Path | None = None) -> None:
    """Writes the shards of a recipe's training and validation sources; continues where it was killed.

    Args:
        recipe: A recipe with the sections `model` and `data`.
        output: Folder for `train`, `validation` and `tokenizer`; `train-1`, `train-2` for several sources. By default
            the cache.

    Raises:
        UserError: the recipe is not for pretraining, a source has a mistake, or the folder has other shards.
    """
    for section in ("model", "data"):
        if section not in recipe:
            raise UserError(f"prepare: the recipe has no section {section!r}")
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; name a folder")
    if output is not None:
        refuse_unwritable(output, "--output")
    from oumi_pl.config.cli import instantiate
    from oumi_pl.data.pretrain import PretrainData

    module, data = instantiate(recipe)
    if not isinstance(data, PretrainData):
        raise UserError(f"prepare: token shards are for PretrainData, and this recipe has {type(data).__name__}")
    data.tokenizer_spec = data.tokenizer_spec or module.tokenizer_name
    data.streaming = False
    prepared = {split: _prepare_split(data, split, output) for split in SPLITS if data.sources[split] is not None}
    if output is not None:
        with model_files(output / "tokenizer"):
            data.tokenizer.save_pretrained(output / "tokenizer")
        named = [f"{split}: {_in_recipe(data, split, folders)}" for split, folders in prepared.items()]
        echo(f"in a recipe: {', '.join(named)}, tokenizer: {output / 'tokenizer'}")


def _in_recipe(data: Any, split: str, folders: list[str]) -> str:
    """The folders as a recipe lists them, with the weights of their sources."""
    weights = data.weights if split == "train" else [None] * len(folders)
    named = [f if w is None else f"{{path: {f}, weight: {w:g}}}" for f, w in zip(folders, weights, strict=True)]
    return named[0] if len(named) == 1 else f"[{', '.join(named)}]"


def _prepare_split(data: Any, split: str, output: Path | None) -> list[str]:
    """Writes the shards of a split, and returns their folders."""
    from oumi_pl.data.corpus import write_part
    from oumi_pl.data.shards import Shards
    from oumi_pl.data.tokenizers import tokenizer_fingerprint

    parts = data.parts(split)
    if output is None:
        written = data.shards(split)
    else:
        folders = [output / (split if len(parts) == 1 else f"{split}-{i}") for i in range(1, len(parts) + 1)]
        written = []
        for part, folder in zip(parts, folders, strict=True):
            if part.prepared is not None:
                raise UserError(f"data.{split}: {part.prepared} has been prepared already; leave it out")
            write_part(data.without_repeated(split, part, written), data.tokenizer, folder)
            written.append(Shards(folder, tokenizer_fingerprint(data.tokenizer, chat=False)))
    for shards in written:
        ratio = shards.manifest["text_bytes"] / max(1, shards.tokens)
        echo(
            f"{split}: {shards.name}: {len(shards):,} documents, {shards.tokens:,} tokens ({ratio:.2f} bytes each, "
            f"{shards.dtype}) in {shards.directory}"
        )
    return [str(shards.directory) for shards in written]
