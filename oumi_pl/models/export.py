"""Exports a model to a folder that `transformers` loads: safetensors, tokenizer, chat template, model card."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oumi_pl import __version__
from oumi_pl.errors import UserError, reason
from oumi_pl.models.build import keep_differentiable, without_load_report
from oumi_pl.models.given import is_plain
from oumi_pl.models.lm import LM
from oumi_pl.models.lora import merged
from oumi_pl.models.sharding import is_sharded, whole
from oumi_pl.models.text_part import copy_processors, put_back
from oumi_pl.runs.checkpoints import read_sharded, read_tensors
from oumi_pl.runs.checksums import model_files, refuse_damaged, refuse_damaged_weights
from oumi_pl.runs.folders import filling, half_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HEADS = "heads.safetensors"
"""File of a model folder for the weights that a trainer type has beside the language model."""
NO_SCORES = ("lr", "grad_norm", "padding", "peak_memory_gb", "tokens_per_second", "mfu")
"""Metrics that describe the run, not the quality of the model: left out of the model card."""


def export_model(
    model: LM,
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    merge: bool = False,
    keep: bool = True,
    stop_tokens: Sequence[int] = (),
    card: str | None = None,
    heads: Mapping[str, Tensor] | None = None,
    expected: Tensor | None = None,
) -> None:
    """Writes a folder that the `from_pretrained` of the model's class loads, with the live model's outputs.

    A text model that was taken out of one with other parts (a vision tower) is put back: the folder holds them all.

    The folder appears once it is complete and was compared: it is loaded, which takes the memory of the model once more
    on the host, and its logits of a few tokens are compared with those of the live model. Under FSDP2 all ranks have
    to call this; rank 0 writes.

    Args:
        model: What to write; unchanged afterwards.
        directory: Where; new or empty.
        tokenizer: Written beside the weights, with its chat template.
        merge: Merge a LoRA adapter into its base weights; else the adapter is written alone.
        keep: Merge in a copy. False saves its memory, but leaves `model` unusable.
        stop_tokens: Ids that end an answer besides EOS.
        card: Text of the model card.
        heads: Weights that a trainer type has beside the model, written to a separate file.
        expected: `LM.probe_logits` of the live model, if `model` is a copy of it; computed from `model` if left out.

    Raises:
        UserError: an adapter would not fit its base on disk, sharded or quantised weights are to be merged, the folder
            is not empty or can't be written, or its logits are not those of the live model.
    """
    is_adapter = model.has_adapters
    is_writing = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_adapter:
        _refuse_unexportable(model, merge, is_writing)
    whole_heads = {name: whole(value) for name, value in (heads or {}).items()}
    if is_adapter and merge and not is_writing:
        return  # rank 0 merges into a copy of its own
    if expected is None:
        expected = model.probe_logits()
    state = _gathered(model)
    if not is_writing:
        return
    hf = model.hf
    if is_adapter and merge:
        hf = merged(copy.deepcopy(hf) if keep else hf)
    with _folder(directory) as half, _generation_config(hf, tokenizer, stop_tokens) as generation:
        save = _save_adapter if is_adapter and not merge else _save_weights
        save(hf, half, state)
        if generation is not None:
            generation.save_pretrained(half)
        _write_beside(half, tokenizer, whole_heads, card)
        del state  # make room for the model that is loaded now
        _refuse_other_logits(half, model, hf, expected)
        if is_adapter and not merge:
            _name_base(half / "adapter_config.json")


def _save_adapter(hf: Any, folder: Path, state: dict[str, Tensor] | None) -> None:
    kwargs = {} if state is None else {"state_dict": state}
    # the adapter holds the trained rows of embeddings, the base on disk the others
    hf.save_pretrained(folder, save_embedding_layers=False, **kwargs)
    if any(config.use_dora for config in hf.peft_config.values()):
        _rename_magnitudes(folder / "adapter_model.safetensors")


def _save_weights(hf: Any, folder: Path, state: dict[str, Tensor] | None) -> None:
    whole_base = getattr(hf, "taken_from", None)
    if whole_base is None:
        hf.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
        return
    put_back(whole_base, hf, hf.state_dict() if state is None else state).save_pretrained(folder)
    copy_processors(whole_base, folder)


def _name_base(file: Path) -> None:
    """Names the base of an adapter by its hub id, if it was loaded from the folder of the hub's cache."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if name := cached_name(config.get("base_model_name_or_path") or ""):
        config["base_model_name_or_path"] = name
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _write_beside(folder: Path, tokenizer: Any, heads: Mapping[str, Tensor], card: str | None) -> None:
    """Writes what a model folder holds besides the model."""
    if heads:
        save_file(dict(heads), folder / HEADS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # safetensors creates files that only the owner can read
        weights.chmod(next(folder.glob("*config.json")).stat().st_mode)


def read_heads(folder: Path, heads: Mapping[str, Tensor]) -> None:
    """Loads the heads of a model folder into `heads`; does nothing if it has none.

    Raises:
        UserError: they differ in name or shape.
    """
    file = folder / HEADS
    if not file.is_file():
        return
    refuse_damaged_weights(folder, "model")
    saved = load_file(file)
    wanted = {name: list(value.shape) for name, value in heads.items()}
    given = {name: list(value.shape) for name, value in saved.items()}
    if wanted != given:
        raise UserError(f"model: {file} holds the heads {given}, and this trainer type has {wanted}")
    with torch.no_grad():
        for name, value in saved.items():
            heads[name].copy_(value)


def why_not_alone(model: LM) -> str:
    """Why an adapter, loaded onto its base from disk, would not be the trained model; empty if it would be."""
    unnamed = "its base model has no name to be loaded by"
    return getattr(model.hf, "why_not_alone", "" if model.base.config._name_or_path else unnamed)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code from it; of a sharded one, everything but the optimizer.

    Tensors of a file are memory-mapped.

    Raises:
        UserError: if it is not a checkpoint, or damaged.
    """
    refuse_damaged(path)
    try:
        if path.is_file():
            return read_tensors(path, mmap=True)
        return read_sharded(path, optimizers=False)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"--checkpoint: {path} can't be read as a checkpoint: {reason(error)}") from error


def model_card(
    config: Mapping[str, Any],
    yaml_text: str,
    metrics: Mapping[str, float],
    title: str,
    adapter: bool = False,
    *,
    parent: str = "",
    generates: bool = False,
    chat: bool = False,
    licence: Callable[[str], str | None] = lambda path: None,
) -> str:
    """The text of a model card: base model, data, parent, use, metrics and recipe.

    Args:
        config: The recipe.
        yaml_text: Its text.
        metrics: Of the exported step.
        title: Heading.
        adapter: Whether the folder holds an adapter alone.
        parent: The run that training went on from, in words.
        generates: Whether the model completes prompts.
        chat: Whether its tokenizer has a chat template.
        licence: Returns the licence of a data source by its path; None if it isn't known.
    """
    base = _argument(config, "model", "model")
    sources = _argument(config, "data", "train")
    sources = [_path(source) for source in (sources if isinstance(sources, list) else [sources])]
    known = {str(source): licence(source) if isinstance(source, str) else None for source in sources}
    data = ", ".join(f"`{shown_path(path)}`{f' (licence: {name})' if name else ''}" for path, name in known.items())
    trainer = str((config.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]
    header = [f"library_name: {'peft' if adapter else 'transformers'}", "tags: [oumi_pl]"]
    if base and (name := cached_name(base) or (None if Path(base).expanduser().exists() else base)):
        header.append(f"base_model: {name}")  # the hub accepts only hub ids here
    names = [name for name in sorted(metrics) if name.rpartition("/")[2] not in NO_SCORES]
    scores = [f"| `{name}` | {metrics[name]:.4g} |" for name in names]
    lines = [
        *("---", *header, "---", "", f"# {title}", ""),
        f"{'A LoRA adapter, trained' if adapter else 'Trained'} by `oumi_pl` {__version__} ({trainer}) "
        f"from {f'`{shown_path(base)}`' if base else 'random weights'} on {data}.",
        *(("", f"Training went on from {parent}.") if parent else ()),
        *(("", "## Use", "", "```python", *_use(chat), "```") if generates else ()),
        *(("", "| metric | value |", "|---|---|", *scores) if scores else ()),
        *("", "## Recipe", "", "```yaml", yaml_text.strip(), "```", ""),
    ]
    return "\n".join(lines)


def _use(chat: bool) -> list[str]:
    """The code that completes a prompt, run in the model's folder."""
    turns = '[{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True'
    call = f"tokenizer.apply_chat_template({turns}, " if chat else 'tokenizer("Hello", '
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")',
        f'ids = {call}return_tensors="pt")',
        'out = model.generate(**ids, max_new_tokens=256)[0, ids["input_ids"].shape[1] :]',
        "print(tokenizer.decode(out, skip_special_tokens=True))",
    ]


_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


def cached_name(path: str) -> str | None:
    """The hub id of a model whose folder lies in the hub's cache; None for other folders."""
    match = _SNAPSHOT.search(str(path))
    return f"{match[1]}/{match[2]}" if match else None


def shown_path(path: Any) -> str:
    """A hub id or path without what belongs to this machine: of an absolute path, the last two parts."""
    text = str(path)
    if not Path(text).is_absolute():
        return text
    return cached_name(text) or "/".join(Path(text).parts[1:][-2:])


def _path(source: Any) -> Any:
    """The path of a source, which a recipe gives as a path, as arguments, or as a class with arguments."""
    arguments = source.get("init_args", source) if isinstance(source, Mapping) else {"path": source}
    return arguments.get("path")


def _argument(config: Mapping[str, Any], section: str, name: str) -> Any:
    return ((config.get(section) or {}).get("init_args") or {}).get(name)


@contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """A temporary folder whose content is in `directory` if nothing fails, with checksums."""
    with ExitStack() as stack:
        try:
            half_for(directory)  # a killed process may have left something in it
            if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
                raise UserError(f"{directory} is there and not an empty folder; export to another one")
            half = stack.enter_context(filling(directory))
        except OSError as error:
            raise UserError(f"can't write to {directory}: {error.strerror}") from error
        with model_files(half):
            yield half


@contextmanager
def _generation_config(hf: Any, tokenizer: Any, stop_tokens: Sequence[int]) -> Iterator[Any]:
    """Sets a generation config with which `generate` stops at the end of an answer, without further arguments.

    Yields None for a model that does not generate.
    """
    base = hf.get_base_model() if hasattr(hf, "peft_config") else hf
    if not base.can_generate() or is_plain(base):
        yield None
        return
    own = base.generation_config
    generation = copy.deepcopy(own)
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({*stop_tokens, *ends, getattr(tokenizer, "eos_token_id", None)} - {None})
    generation.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if generation.pad_token_id is None:
        generation.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    sampling = (generation.temperature, generation.top_p, generation.top_k, generation.min_p, generation.typical_p)
    if not generation.do_sample and any(value is not None for value in sampling):
        # some published models have a temperature without `do_sample`, which transformers refuses to save
        generation.do_sample = True
    base.generation_config = generation
    try:
        yield generation
    finally:
        base.generation_config = own


def _rename_magnitudes(file: Path) -> None:
    """Renames DoRA's magnitudes so that both PEFT and transformers find them.

    PEFT writes them without `.weight`; transformers 5 then ignores them silently and uses the magnitudes of the base.
    """
    ending = "lora_magnitude_vector"
    tensors = {f"{name}.weight" if name.endswith(ending) else name: t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _refuse_unexportable(model: LM, merge: bool, is_writing: bool) -> None:
    if not merge and (why := why_not_alone(model)):
        raise UserError(
            f"the adapter can't be exported alone, because {why}; merge it (--merge, or export.merge: true)"
        )
    if merge and is_writing and (is_sharded(model) or getattr(model.base, "is_quantized", False)):
        raise UserError("sharded or quantised weights can't be merged in place: export the checkpoint with --merge")


EXACT = {torch.float32, torch.float64}
TOLERANCE = 1e-4
"""How far the logits of an export may be from those of the live model, as a share of their norm, in float32."""
HALF_TOLERANCE = 5e-2
"""The same in half precision, on a quantized base, which computes in it, and on GPUs, whose matrix products in float32
may be rounded to three digits (TF32)."""


def _refuse_other_logits(folder: Path, model: LM, hf: Any, expected: Tensor) -> None:
    """Loads a folder as a user would, on the CPU, and compares its logits with those of the live model.

    Raises:
        UserError: they differ.
    """
    import transformers

    base = hf.get_base_model() if hasattr(hf, "peft_config") else hf
    weight = next(p for p in base.parameters() if p.is_floating_point())
    kwargs: dict[str, Any] = {"dtype": weight.dtype}
    if getattr(base, "is_quantized", False):  # an adapter alone: the base on disk is in full precision
        kwargs["quantization_config"] = base.config.quantization_config
    if type(base).__module__.startswith("transformers_modules"):  # code that came with the model, and runs already
        kwargs["trust_remote_code"] = True
    if base is not hf:  # what the base on disk does not know of the task
        kwargs |= model.adapter_settings
    with without_load_report(), torch.random.fork_rng(devices=[]), torch.no_grad():
        load: Any = getattr(transformers, model.auto_class)
        loaded = base.reloaded(folder) if is_plain(base) else load.from_pretrained(folder, **kwargs)
        logits = model.plain_logits(keep_differentiable(loaded).eval())
    is_exact = expected.device.type == "cpu" and {weight.dtype, expected.dtype} <= EXACT
    is_exact = is_exact and "quantization_config" not in kwargs
    expected = expected.float().cpu()
    off = float((logits - expected).norm() / expected.norm())
    tolerance = TOLERANCE if is_exact else HALF_TOLERANCE
    if not off <= tolerance:
        advice = "; merge the adapter (--merge, or export.merge: true)" if base is not hf else ""
        raise UserError(
            f"the exported {type(base).__name__} is not the trained model: its logits are off by {off:.1e} (relative; "
            f"{tolerance:.0e} would be rounding), so nothing was written; checkpoints are unharmed{advice}"
        )


def _gathered(model: LM) -> dict[str, Any] | None:
    """The full state dict of a sharded model on rank 0, named as for `save_pretrained`; None if not sharded."""
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        model.hf, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    for copied, source in getattr(model.hf, "all_tied_weights_keys", {}).items():
        # gathered twice, so that safetensors can't see that they are one
        if copied in state and source in state and torch.equal(state[copied], state[source]):
            del state[copied]
    return state
