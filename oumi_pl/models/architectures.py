"""Architectures of one's own: classes of transformers' kind that a recipe names by class path."""

from importlib import import_module
from typing import Any

from oumi_pl.errors import UserError


def register_architecture(architecture: str | type) -> str:
    """Makes transformers know an architecture, for new models and for folders of its `model_type`.

    Folders that are saved later hold the code of its module, with which `transformers` loads them anywhere with
    `trust_remote_code`.

    Args:
        architecture: A subclass of `transformers.PreTrainedModel` with a `config_class`, or its class path
            (`my_file.MyModel`).

    Returns:
        The `model_type` of its config.

    Raises:
        UserError: it can't be imported, or is something else.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    cls: Any = _imported(architecture) if isinstance(architecture, str) else architecture
    config = getattr(cls, "config_class", None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and config is not None):
        raise UserError(
            f"model.architecture: {architecture} is no subclass of transformers.PreTrainedModel with a config_class"
        )
    if not config.model_type:
        raise UserError(f"model.architecture: {config.__name__}.model_type is empty: give the architecture a name")
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, cls, exist_ok=True)
    if cls.__module__ != "__main__":  # whose code can't be saved
        config.register_for_auto_class()
        cls.register_for_auto_class("AutoModelForCausalLM")
    return str(config.model_type)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.architecture: can't import {path!r}: {error}") from error
