"""Export a checkpoint as a folder that `transformers` loads, or as a GGUF file for llama.cpp and Ollama."""

import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from oumi_pl.commands.parser import Parser
from oumi_pl.commands.push import check_name, push, refuse_local_base
from oumi_pl.errors import UserError, nearby
from oumi_pl.terminal.text import echo

TRUST = "run code outside the package that the checkpoint's recipe names"
TRAINING_ONLY = ("optimizer", "schedule", "groups", "layer_decay")
"""Arguments of a module that only training needs."""
ROWS = ("train", "validation", "test", "predict", "group", "reward", "metrics")
"""Arguments of data that are about rows: an export needs the tokenizer and the template alone."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser("export", __doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a .ckpt file, a sharded checkpoint, or a run folder (its best, else newest)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to, new or empty")
    parser.add_argument(
        "--format",
        choices=("transformers", "gguf"),
        default="transformers",
        help="gguf: model.gguf for llama.cpp, and Ollama's Modelfile; adapters are merged; --checkpoint may also be a "
        "model folder",
    )
    parser.add_argument("--outtype", choices=("f16", "q8_0"), help="of the matrices of a GGUF file (default: f16)")
    parser.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its base weights")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument(
        "--check",
        choices=("vllm",),
        help="load the folder with vLLM (the extra `vllm`), and compare its greedy completions with the model's",
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="also upload the folder to this repository, new and private"
    )
    parser.add_argument("--public", action="store_true", help="the repository is public")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an existing repository")
    options = parser.parse_args(args)
    if (options.public or options.overwrite) and not options.push_to_hub:
        raise UserError("export: --public and --overwrite are about a repository; name it with --push_to_hub")
    if options.outtype and options.format != "gguf":
        raise UserError("export: --outtype is of GGUF files; add --format gguf")
    output = options.output.expanduser()
    if options.format == "gguf":
        if options.check or options.push_to_hub:
            raise UserError("export: --check and --push_to_hub are for --format transformers")
        export_gguf(options.checkpoint.expanduser(), output, options.outtype or "f16", trust=options.trust)
        echo(f"exported {options.checkpoint} to {output / 'model.gguf'}")
        return 0
    checkpoint = find(options.checkpoint.expanduser())
    if options.push_to_hub:
        check_name(options.push_to_hub, "--push_to_hub")
    if options.check:
        from oumi_pl.rollouts.vllm import import_llm

        import_llm()  # before the work of the export
    export_checkpoint(checkpoint, output, merge=options.merge, trust=options.trust)
    echo(f"exported {checkpoint} to {output}")
    if options.check:
        from oumi_pl.commands.serving import check_vllm

        echo(str(check_vllm(output)))
    if options.push_to_hub:
        refuse_local_base(output, "--push_to_hub")
        settings = {"public": options.public, "overwrite": options.overwrite, "key": "--push_to_hub"}
        echo(f"pushed to {push(output, options.push_to_hub, **settings)}")
    return 0


def export_gguf(source: Path, output: Path, outtype: Any = "f16", *, trust: bool = False) -> None:
    """Writes a checkpoint or a model folder as `model.gguf`, with Ollama's Modelfile beside it.

    Args:
        source: A checkpoint, a run folder (its best checkpoint, else its newest), or a folder of whole weights.
        output: A new or empty folder.
        outtype: `f16` or `q8_0`.
        trust: Run code outside the package that the checkpoint's recipe names.

    Raises:
        UserError: the model can't be read, or llama.cpp's own converter is needed.
    """
    from oumi_pl.models.gguf_file import import_gguf, modelfile, read, write_gguf
    from oumi_pl.runs.files import HALF, replacing
    from oumi_pl.runs.folders import refuse_unwritable

    import_gguf()  # before the work of the export
    _refuse_used(output)
    refuse_unwritable(output.parent, "--output")
    output.parent.mkdir(parents=True, exist_ok=True)
    # beside the output, where there is room for it
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", suffix=HALF, dir=output.parent) as scratch:
        folder = source
        if not (source / "config.json").is_file():
            folder = Path(scratch) / output.resolve().name
            _export_whole(source, folder, outtype, trust=trust)
        read(folder, outtype)
        text = modelfile(folder, "model.gguf")
        with replacing(output) as half:
            half.mkdir()
            write_gguf(folder, half / "model.gguf", outtype, name=output.resolve().name)
            (half / "Modelfile").write_text(text, encoding="utf-8")


def _export_whole(source: Path, folder: Path, outtype: str, *, trust: bool) -> None:
    """Writes the whole weights of a checkpoint, unless they can't be written as GGUF."""
    from oumi_pl.models.gguf_file import refuse_other

    checkpoint = find(source)
    parts = built(checkpoint, trust=trust)
    module, data, *_ = parts
    merge = " --merge" if module.lora is not None else ""
    before = f"oumi_pl export --checkpoint {source} --output DIR{merge}\n  "
    refuse_other(module.causal_lm.base.config, data.tokenizer, "DIR", outtype, before)
    _save(checkpoint, parts, folder, merge=True)


def _refuse_used(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists and is not an empty folder; name another one")


def export_checkpoint(checkpoint: Path, output: Path, *, merge: bool = False, trust: bool = False) -> None:
    """Builds the model from the config in a checkpoint, loads the weights and writes the folder.

    Args:
        checkpoint: The file or folder.
        output: A new or empty folder.
        merge: Merge a LoRA adapter into its base weights.
        trust: Run code outside the package that the checkpoint's recipe names.

    Raises:
        UserError: if the checkpoint can't be read or has no config, its base model can't be loaded, or the folder is
            not empty.
    """
    _refuse_used(output)
    _save(checkpoint, built(checkpoint, trust=trust), output, merge=merge)


def _save(checkpoint: Path, parts: "Parts", output: Path, *, merge: bool) -> None:
    """Writes what `built` returned as a model folder."""
    from oumi_pl.data.licences import licence_of
    from oumi_pl.models.export import model_card
    from oumi_pl.runs.folders import read_state
    from oumi_pl.runs.lineage import parent_text

    module, data, config, content = parts
    adapter = module.lora is not None and not merge
    module.save(
        output,
        tokenizer=data.tokenizer,
        merge=merge,
        keep=False,
        stop_tokens=data.stop_tokens,
        card=model_card(
            config,
            content["config"],
            content.get("metrics", {}),
            output.resolve().name,
            adapter,
            parent=parent_text(read_state(checkpoint.resolve().parent.parent)),
            generates=module.generates,
            chat=bool(data.tokenizer.chat_template),
            licence=licence_of,
        ),
    )


class LoadedCheckpoint(NamedTuple):
    """A checkpoint, loaded."""

    module: Any
    """The trainer type, in evaluation mode. `module.causal_lm` is the model, to call with batches."""
    tokenizer: Any
    data: Any
    """The data module of the recipe; it has read nothing yet."""
    config: dict[str, Any]
    """The recipe."""
    metrics: dict[str, float]
    """The metrics of its step."""


def load_checkpoint(path: str | Path, *, trust: bool = False) -> LoadedCheckpoint:
    """Loads the module and the tokenizer of a checkpoint, or of a run folder (its best checkpoint, else its newest).

    Args:
        path: The file or folder.
        trust: Run code outside the package that the checkpoint's recipe names, such as a loss of your own.

    Raises:
        UserError: it can't be read, was not written by a recipe, or its base model can't be loaded.
    """
    module, data, config, content = built(find(Path(path).expanduser()), for_batches=True, trust=trust)
    return LoadedCheckpoint(module.eval(), data.tokenizer, data, config, content.get("metrics", {}))


Parts = tuple[Any, Any, dict[str, Any], dict[str, Any]]
"""Module, data, parsed config, and the whole content of a checkpoint."""


def built(checkpoint: Path, *, for_batches: bool = False, trust: bool = False) -> Parts:
    """Builds module and data from the config in a checkpoint, and loads the weights.

    Args:
        checkpoint: The file or folder.
        for_batches: Whether the model will read batches, which may be packed.
        trust: Run code outside the package that the checkpoint's recipe names.

    Returns:
        Module, data, parsed config, and the whole content of the checkpoint.

    Raises:
        UserError: if the checkpoint can't be read or has no config, or its base model can't be loaded.
    """
    import yaml

    from oumi_pl.models.export import read_checkpoint

    content = read_checkpoint(checkpoint)
    if not content.get("config") or "state_dict" not in content:
        raise UserError(f"--checkpoint: {checkpoint} has no config, so it was not written by `oumi_pl fit`")
    from oumi_pl.config.cli import instantiate
    from oumi_pl.runs.received import refuse_foreign

    config = yaml.safe_load(content["config"])
    parts = copy.deepcopy({"model": config["model"], "data": config["data"]})
    for part, names in (("model", TRAINING_ONLY), ("data", () if for_batches else ROWS)):
        for name in names:
            parts[part].get("init_args", {}).pop(name, None)
    if not trust:
        refuse_foreign(parts, checkpoint)
    module, data = instantiate(parts)
    data.tokenizer_spec = data.tokenizer_spec or module.tokenizer_name
    module.quantization = None  # it only saves memory in training; adapters are exported for the full-precision base
    if module.lora is None:  # with `precision: bf16-true`, the weights are bfloat16 whatever `model.dtype` is
        dtype = _dtype(content["state_dict"])
        module.dtype_name = dtype or module.dtype_name
    module.assemble(data.tokenizer, data.added_tokens, branching=data.branching if for_batches else None)
    module.load_weights(content["state_dict"])
    return module, data, config, content


def _dtype(state: dict[str, Any]) -> Any:
    """Name of the dtype of most weights; None if there are none."""
    sizes: dict[str, int] = {}
    for value in state.values():
        if value.is_floating_point():
            name = str(value.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + value.numel()
    return max(sizes, key=lambda name: sizes[name], default=None)


def find(path: Path) -> Path:
    """The checkpoint itself, or that of a run folder: the best, else the newest."""
    from oumi_pl.runs.folders import saved_steps

    if not path.exists():
        raise UserError(f"--checkpoint: no file {path}{nearby(path, lambda p: p.is_dir() or p.suffix == '.ckpt')}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if folder.is_file() or (folder / "meta.pt").exists():
        return folder
    if (folder / "best.ckpt").exists():
        return folder / "best.ckpt"
    if steps := saved_steps(folder):
        return steps[-1]
    if (path / "run.json").is_file():
        written = f"; the model that the run exported is {path / 'model'}" if (path / "model").is_dir() else ""
        raise UserError(
            f"--checkpoint: {path} has no checkpoint yet{written}; to train it: oumi_pl fit --resume {path}"
        )
    raise UserError(f"--checkpoint: no checkpoint in {path}")
