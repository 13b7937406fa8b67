"""Models with parts beside the text model, such as a vision tower: text is trained, and an export keeps the rest."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oumi_pl.errors import UserError

PARTS = ("language_model", "text_model")
"""Names that a text model has inside the whole one."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model folder that say how images are read."""
REMEDY = "set model.text_only: true to train and export the text model alone"


class WholeModel(NamedTuple):
    """The model that a text model was taken from.

    name: Folder, or id on the hub. config: of all parts. cls: the class with all parts. names: weight of the text model
    -> the same weight of the whole model. hub: further arguments of `from_pretrained`.
    """

    name: str
    config: Any
    cls: Any
    names: dict[str, str]
    hub: dict[str, Any]


def whole_model(text: Any, name: str, config: Any, **hub: Any) -> WholeModel | None:
    """What it takes to put a text model back where it came from; None if it is all of its base.

    Args:
        text: The causal LM that was loaded.
        name: Folder or hub id that it was loaded from.
        config: The config there.
        hub: `revision` and `trust_remote_code`.

    Raises:
        UserError: it came from a larger model, and its weights' places in that are not known.
    """
    if isinstance(text.config, type(config)) or config.get_text_config() is config:
        return None
    import transformers

    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None or not hasattr(cls, "_from_config"):
        raise UserError(f"model: {name} has parts beside its text model, and their class is not known; {REMEDY}")
    if isinstance(text, cls):  # the folder holds the text model alone
        return None
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in cls._from_config(config).state_dict().items()}
    names = _names(text.state_dict(), shapes)
    if names is None:
        raise UserError(f"model: {cls.__name__} has parts beside its text model, which an export would lose; {REMEDY}")
    return WholeModel(name, config, cls, names, hub)


def text_part(hf: Any, attn: str | None) -> Any:
    """The text model of a causal LM that has other parts; the model itself if it has none.

    Raises:
        UserError: it is quantized, or transformers has no text model with its weights.
    """
    from transformers import AutoModelForCausalLM

    config = hf.config.get_text_config()
    if config is hf.config:
        return hf
    kind = type(hf).__name__
    if getattr(hf, "is_quantized", False):
        raise UserError(f"model.text_only: {kind} can't be taken apart once it is quantized; leave quantization out")
    text = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=hf.dtype)
    own = hf.state_dict()
    names = _names(text.state_dict(), {name: value.shape for name, value in own.items()})
    if names is None:
        raise UserError(f"model.text_only: {kind} has no text model with its weights; leave it out")
    text.load_state_dict({name: own[place] for name, place in names.items()})
    return text


def _names(text: Mapping[str, Tensor], whole: Mapping[str, Any]) -> dict[str, str] | None:
    """Weight of the text model -> weight of the whole model; None if one has no place."""
    places: dict[str, str] = {}
    for name in whole:
        parts = name.split(".")
        inner = ".".join(part for part in parts if part not in PARTS)
        places.setdefault(inner, name)
    names = {name: places.get(name, "") for name in text}
    fits = all(place and whole[place][1:] == text[name].shape[1:] for name, place in names.items())
    return names if fits else None


def put_back(whole: WholeModel, text: Any, state: Mapping[str, Tensor]) -> Any:
    """The whole model with the weights of a trained text model; all others are those of the base.

    Args:
        whole: The model that it came from.
        text: The trained text model.
        state: Its weights, not sharded.
    """
    from oumi_pl.models.build import loaded, without_load_report

    kwargs: dict[str, Any] = {"config": whole.config, "dtype": text.dtype, "use_safetensors": True}
    with without_load_report():
        model = loaded(whole.cls.from_pretrained, whole.name, **kwargs, **whole.hub)
    rows = len(text.get_input_embeddings().weight)
    if len(model.get_input_embeddings().weight) != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[whole.names[name]].copy_(value)
    for part in model.config.sub_configs:
        if getattr(model.config, part, None) is model.config.get_text_config():
            setattr(model.config, part, text.config)
    return model


def copy_processors(whole: WholeModel, folder: Path) -> None:
    """Copies the files that say how images are read, if the base is a folder."""
    for name in PROCESSORS:
        if (Path(whole.name) / name).is_file():
            shutil.copyfile(Path(whole.name) / name, folder / name)
