"""Training of a model that the user registered, on data sets that the user registered, by Oumi's own trainer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.core.configs import DatasetSplitParams, ModelParams, TrainingConfig
from oumi_pl.core.configs.params.base_params import walk
from oumi_pl.core.recipe.custom import build, registered_class
from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.core.recipe.tokenizer import tokenizer_of
from oumi_pl.core.registry import REGISTRY, RegistryType
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import nn

    from oumi_pl.core.trainers.trainer import Trainer

HONOURED = (
    "model.model_name", "model.model_kwargs", "model.load_pretrained_weights", "model.torch_dtype_str",
    "model.freeze_layers", "model.tokenizer_name", "model.tokenizer_pad_token", "model.tokenizer_kwargs",
    "model.model_max_length", "model.chat_template", "model.device_map", "model.trust_remote_code",
)  # fmt: skip
"""Fields of `model` that mean something for a module of the user's."""
HONOURED_DATA = ("datasets", "use_torchdata", "stream", "target_col", "mixture_strategy", "seed")
"""Fields of a split that are honoured, or decide on nothing."""


def registered_model(params: ModelParams) -> Any:
    """The class that the user registered: by the name, or by that in the folder's config; None if there is none."""
    if (cls := REGISTRY.get_model(params.model_name)) is not None:
        return cls
    config = Path(params.model_name).expanduser() / "config.json"
    if not REGISTRY.get_all(RegistryType.MODEL) or not config.is_file():
        return None
    try:
        return REGISTRY.get_model(str(json.loads(config.read_text(encoding="utf-8")).get("model_type")))
    except ValueError:  # reported when it is loaded
        return None


def trainer_of(config: TrainingConfig) -> "Trainer":
    """Oumi's own trainer of the registered model and data sets that a config names.

    Raises:
        UserError: the trainer type is another one, a field has no meaning for such a model, or a data set isn't
            registered.
    """
    from oumi_pl.core.trainers.trainer import Trainer

    name, kind = config.model.model_name, config.training.trainer_type.name
    if kind != "OUMI":
        refuse("training.trainer_type", f"{kind} trains language models, and {name!r} is registered; set OUMI")
    _refuse_fields(config)
    tokenizer = tokenizer_of(config.model, Notes(online=True)) if config.model.tokenizer_name else None
    validation = config.data.validation if config.training.eval_strategy != "no" else DatasetSplitParams()
    return Trainer(
        _model(config.model),
        tokenizer,
        config.training,
        _rows(config.data.train, "train", tokenizer),
        eval_dataset=_rows(validation, "validation", tokenizer),
        config=config,
    )


def _refuse_fields(config: TrainingConfig) -> None:
    if config.training.use_peft:
        refuse("training.use_peft", "a registered model gets no adapters; set it to false")
    for path, value, default in walk(config.model, "model."):
        if value != default and path not in HONOURED:
            refuse(path, "is for models of transformers, and has no meaning for a registered one; leave it out")


def _model(params: ModelParams) -> "nn.Module":
    import torch

    from oumi_pl.models.build import freeze_modules

    cls = registered_model(params)
    folder = Path(params.model_name).expanduser()
    if not params.load_pretrained_weights:
        try:
            model = cls(**params.model_kwargs)
        except TypeError as error:
            raise UserError(f"model.model_kwargs: {cls.__name__}: {error}") from error
    elif folder.is_dir():
        model = cls.from_pretrained(folder)
    else:
        refuse(
            "model.load_pretrained_weights",
            f"{params.model_name!r} is a registered class without weights; set it to false, or name a saved folder",
        )
    if params.dtype is not None:
        model = model.to(getattr(torch, params.dtype))
    freeze_modules(model, params.freeze_layers)
    return model


def _rows(split: DatasetSplitParams, name: str, tokenizer: Any) -> Any:
    """The rows of a split, as the registered classes transform them; None if it has no data sets."""
    from torch.utils.data import ConcatDataset, Subset

    default = DatasetSplitParams()
    for key, value in split:
        if key not in HONOURED_DATA and value != getattr(default, key):
            refuse(f"data.{name}.{key}", "a registered model gets the rows as its data sets give them; leave it out")
    parts: list[Any] = []
    for number, dataset in enumerate(split.datasets):
        place = f"data.{name}.datasets[{number}]"
        cls = registered_class(dataset)
        if cls is None:
            known = REGISTRY.get_all(RegistryType.DATASET)
            why = f"{dataset.dataset_name!r} is not registered, and a registered model trains on such data alone"
            refuse(f"{place}.dataset_name", f"{why}{nearest(dataset.dataset_name, known)}")
        if dataset.mixture_proportion is not None:
            refuse(f"{place}.mixture_proportion", "rows of registered data sets are not mixed here; leave it out")
        rows = build(dataset, cls, place, tokenizer)
        if (count := dataset.sample_count) is not None:
            if dataset.shuffle or count > len(rows):
                refuse(f"{place}.sample_count", f"only the first rows are taken, of {len(rows)}; leave shuffle out")
            rows = Subset(rows, range(count))
        parts.append(rows)
    return (ConcatDataset(parts) if len(parts) > 1 else parts[0]) if parts else None
