"""Weights on the disk: a model as `transformers` and PEFT load it, or a plain module as safetensors."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oumi_pl.core.trainers.kinds import Adapted, Pretrained, bare
from oumi_pl.errors import UserError
from oumi_pl.models.lora import merged
from oumi_pl.runs.checksums import model_files, refuse_damaged_weights

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_weights(model: nn.Module, directory: Path, tokenizer: Any = None, mode: str = "ADAPTER_ONLY") -> None:
    """Writes a model into a folder, with its tokenizer.

    A model of transformers is written by `save_pretrained`, any other module to `model.safetensors`. What is written of
    a model with an adapter says the mode:

    - `ADAPTER_ONLY`: the adapter;
    - `ADAPTER_AND_BASE_MODEL`: the adapter, and beside it the base model without a trace of it. `from_pretrained` on
      the folder loads the two together;
    - `MERGED`: the model with the adapter added to its weights, and the adapter in `adapter/`. The model itself is
      left as it was.

    Raises:
        UserError: if quantised weights are to be merged or written as a base.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with model_files(directory):
        if isinstance(model, Adapted):
            _save_peft(model, directory, mode)
        elif isinstance(model, Pretrained):
            model.save_pretrained(directory)
        else:
            from safetensors.torch import save_model

            save_model(model, str(directory / "model.safetensors"))
        if isinstance(tokenizer, Pretrained):
            tokenizer.save_pretrained(directory)
        for weights in directory.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes them for the owner alone


def _save_peft(model: Any, directory: Path, mode: str) -> None:
    if mode != "ADAPTER_ONLY" and getattr(bare(model), "is_quantized", False):
        raise UserError(
            f"peft.peft_save_mode: {mode} needs the base in full precision, but it was loaded in fewer bits"
        )
    if mode == "MERGED":
        adapter = directory / "adapter"
        with model_files(adapter):
            model.save_pretrained(adapter)
        for name in ADAPTER_FILES:  # a checkpoint of the adapter would be put on the merged model once more
            (directory / name).unlink(missing_ok=True)
        merged(copy.deepcopy(model)).save_pretrained(directory)
        return
    model.save_pretrained(directory)
    if mode == "ADAPTER_AND_BASE_MODEL":
        bare(model).save_pretrained(directory, state_dict=base_state(model))
    elif mode != "ADAPTER_ONLY":
        raise UserError(f"peft.peft_save_mode: there is no {mode!r}")


def base_state(model: Any) -> dict[str, Tensor]:
    """The state of a model with an adapter as it was before the adapter: its own names, and none of the adapter's.

    Trained copies of whole modules (`modules_to_save`) are the adapter's; what they were copied from is the base's.
    """
    state = {}
    prefixes = {".lora_", f".{getattr(model.base_model, 'prefix', 'lora_')}", ".modules_to_save."}
    for name, value in bare(model).state_dict().items():
        if any(prefix in f".{name}" for prefix in prefixes):
            continue
        state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    return state


def load_weights(model: nn.Module, directory: Path) -> None:
    """Loads what `save_weights` wrote back into the model, to the bit.

    Raises:
        UserError: if the folder holds no weights, or those of another model.
        DamagedError: if the weights are not as they were written.
    """
    refuse_damaged_weights(directory, "training.resume_from_checkpoint")
    if isinstance(model, Adapted):
        from peft import load_peft_weights, set_peft_model_state_dict

        if not (directory / ADAPTER_FILES[1]).is_file():
            raise UserError(f"{directory}: holds no adapter ({ADAPTER_FILES[1]})")
        result: Any = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
        if result.unexpected_keys:
            raise UserError(f"{directory}: the adapter is of another model, first {result.unexpected_keys[0]}")
        return
    state = _read(directory)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{directory}: the weights are of another model: {str(error).splitlines()[-1].strip()}"
        ) from error
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in state if name in own}
    # tied weights are written once
    missing = [name for name in result.missing_keys if own[name].data_ptr() not in loaded]
    if (missing or result.unexpected_keys) and hasattr(type(model), "from_pretrained"):
        # some architectures are written under other names than they have in memory
        fresh = type(model).from_pretrained(directory, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
        model.load_state_dict(fresh.state_dict())
    elif missing or result.unexpected_keys:
        raise UserError(
            f"{directory}: the weights are of another model, first {[*missing, *result.unexpected_keys][0]}"
        )


def _read(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{directory}: holds no weights (model.safetensors)")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return state
