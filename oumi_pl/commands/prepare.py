"""`prepare`: the documents of a pretraining recipe as token shards, made once and found again by every run."""

from pathlib import Path
from typing import Any

from oumi_pl.commands.parser import Parser
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError
from oumi_pl.runs.folders import refuse_unwritable

SPLITS = ("train", "validation")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser("prepare", __doc__)
    parser.add_argument("--config", action="append", required=True, help="a recipe; several merge, the later wins")
    parser.add_argument("--output", type=Path, help="folder to write; the cache, which `fit` looks into, if left out")
    options = parser.parse_args(args)
    recipe: dict[str, Any] = {}
    for name in options.config:
        recipe = recipe_files.merge(recipe, recipe_files.check(recipe_files.find(name)))
    prepare(recipe, options.output.expanduser() if options.output else None)
    return 0


def prepare(recipe: dict[str, Any], output: Path | None = None) -> None:
    """Makes the shards of a recipe's training and validation sources, and goes on where it was killed before.

    Args:
        recipe: With the sections `model` and `data`.
        output: A folder that gets `train`, `validation` and `tokenizer`; `train-1`, `train-2` for several sources. The
            cache when left out.

    Raises:
        UserError: the recipe is not one for pretraining, something is wrong with a source, or the folder holds others.
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
    data.tokenizer_spec = data.tokenizer_spec or module.model_name
    data.streaming = False
    made = {split: _prepare_split(data, split, output) for split in SPLITS if data.sources[split] is not None}
    if output is not None:
        data.tokenizer.save_pretrained(output / "tokenizer")
        named = [f"{split}: {_in_recipe(data, split, found)}" for split, found in made.items()]
        print(f"in a recipe: {', '.join(named)}, tokenizer: {output / 'tokenizer'}")


def _in_recipe(data: Any, split: str, folders: list[str]) -> str:
    """Folders as a recipe names them, with the shares of the sources that they were made of."""
    weights = data.weights if split == "train" else [None] * len(folders)
    named = [f if w is None else f"{{path: {f}, weight: {w:g}}}" for f, w in zip(folders, weights, strict=True)]
    return named[0] if len(named) == 1 else f"[{', '.join(named)}]"


def _prepare_split(data: Any, split: str, output: Path | None) -> list[str]:
    """Makes the shards of a split, and returns their folders."""
    from oumi_pl.data.corpus import write_part
    from oumi_pl.data.shards import Shards
    from oumi_pl.data.tokenizers import tokenizer_fingerprint

    parts = data.parts(split)
    if output is None:
        made = data.shards(split)
    else:
        folders = [output / (split if len(parts) == 1 else f"{split}-{i}") for i in range(1, len(parts) + 1)]
        for part, folder in zip(parts, folders, strict=True):
            if part.prepared is not None:
                raise UserError(f"data.{split}: {part.prepared} is prepared already; leave it out")
            write_part(part, data.tokenizer, folder)
        made = [Shards(folder, tokenizer_fingerprint(data.tokenizer, chat=False)) for folder in folders]
    for shards in made:
        ratio = shards.manifest["text_bytes"] / max(1, shards.tokens)
        print(
            f"{split}: {shards.name}: {len(shards):,} documents, {shards.tokens:,} tokens ({ratio:.2f} bytes each, "
            f"{shards.dtype}) in {shards.directory}"
        )
    return [str(shards.directory) for shards in made]
