"""Data sets that the user registers, as sources: their rows are written to a file, which the recipe names."""

import datetime
import hashlib
import json
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oumi_pl.core import datasets
from oumi_pl.core.configs import DatasetParams, ModelParams
from oumi_pl.core.datasets.base import refuse_unknown
from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.core.registry import REGISTRY
from oumi_pl.errors import UserError, cache_folder

FOLDER = "oumi_datasets"
"""Folder of the files, in the cache directory."""
HANDED_ON = ("dataset_name_override",)
READ = ("_load_data", "_load_hf_hub_dataset", "_load_local_dataset", "iter_raw", "documents", "__init__")
"""Methods of a data set of documents that decide which ones there are."""


class Base(NamedTuple):
    """A base class of data sets.

    kind: what the rows are. rows: the rows of a data set. fixed: methods that Oumi lets a subclass override to give
    tokens of its own, which would not be read here.
    """

    kind: str
    rows: Callable[[Any], Iterable[dict[str, Any]]]
    fixed: tuple[str, ...] = ()


def _transformed(dataset: Any) -> Iterable[dict[str, Any]]:
    return (dataset[number] for number in range(len(dataset)))


def _conversations(dataset: Any) -> Iterable[dict[str, Any]]:
    return (dataset.conversation(number).to_dict() for number in range(len(dataset)))


BASES: dict[type, Base] = {
    datasets.BaseSftDataset: Base("chat", _conversations, ("transform", "tokenize", "__getitem__")),
    datasets.BaseDpoDataset: Base("pair", _transformed, ("transform", "__getitem__", "_process_sample")),
    datasets.BaseExperimentalKtoDataset: Base("feedback", _transformed),
    datasets.BaseExperimentalGrpoDataset: Base("prompt", _transformed),
    datasets.BasePretrainingDataset: Base(
        "document", lambda dataset: dataset.documents(), ("transform", "tokenize", "__iter__")
    ),
}


def registered_class(dataset: DatasetParams) -> Any:
    """The class that the user registered by this name; None if there is none."""
    return REGISTRY.get_dataset(dataset.dataset_name, dataset.subset)


def base_of(cls: Any, place: str) -> Base:
    """The base class of a registered data set.

    Raises:
        UserError: there is none of text, or the class gives tokens of its own.
    """
    parent = next((parent for parent in BASES if isinstance(cls, type) and issubclass(cls, parent)), None)
    if parent is None:
        names = ", ".join(parent.__name__ for parent in BASES)
        refuse(f"{place}.dataset_name", f"{cls.__name__} is registered, but derives from none of {names}")
    for name in BASES[parent].fixed:
        if getattr(cls, name, None) is not getattr(parent, name, None):
            instead = "transform_preference" if parent is datasets.BaseDpoDataset else "transform_conversation"
            why = f"{cls.__name__}.{name} would not be called: tokens are made by the recipe; override {instead}"
            refuse(f"{place}.dataset_name", why)
    return BASES[parent]


def build(dataset: DatasetParams, cls: Any, place: str, tokenizer: Any = None) -> Any:
    """An object of a registered class, made as in Oumi.

    Raises:
        UserError: its code raised something.
    """
    kwargs = dict(dataset.dataset_kwargs)
    name = kwargs.pop("dataset_name_override", None) or dataset.dataset_name
    if dataset.transform_num_workers is not None:
        kwargs["transform_num_workers"] = dataset.transform_num_workers
    try:
        return cls(
            dataset_name=name,
            dataset_path=dataset.dataset_path,
            split=dataset.split,
            subset=dataset.subset,
            tokenizer=tokenizer,
            trust_remote_code=dataset.trust_remote_code,
            **kwargs,
        )
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except Exception as error:
        raise UserError(f"{place}: {_raised(cls, error)}") from error


def rows_file(dataset: DatasetParams, cls: Any, place: str, notes: Notes, model: ModelParams | None) -> str:
    """Path of a file with the rows that a registered data set gives; it is named by a hash of its content.

    Raises:
        UserError: the user's code raised something, or a row can't be written.
    """
    tokenizer = None if model is None else _tokenizer(model, notes)
    instance, lines = build(dataset, cls, place, tokenizer), []
    try:
        for row in base_of(cls, place).rows(instance):
            lines.append(json.dumps(row, default=_plain))
    except UserError as error:
        raise UserError(f"{place}: {cls.__name__}, row {len(lines) + 1}: {error}") from error
    except Exception as error:
        raise UserError(f"{place}: row {len(lines) + 1}: {_raised(cls, error)}") from error
    if not lines:
        refuse(place, f"{cls.__name__} has no rows")
    text = "".join(f"{line}\n" for line in lines)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    folder = cache_folder() / FOLDER
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', dataset.dataset_name)}-{digest}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=folder)  # then renamed: other ranks write the same file
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(scratch).replace(path)
    notes.comment(
        "data.init_args.train", f"{dataset.dataset_name}: the {len(lines)} rows that {cls.__name__} gave are in {path}"
    )
    return str(path)


def hub_path(dataset: DatasetParams, cls: Any, place: str) -> str | None:
    """What a data set of documents reads, if the class leaves the reading to its base; None if it reads by itself.

    Raises:
        UserError: the class has no such argument.
    """
    base = datasets.BasePretrainingDataset
    if any(getattr(cls, name) is not getattr(base, name) for name in READ):
        return None
    try:
        refuse_unknown(cls, [name for name in dataset.dataset_kwargs if name not in HANDED_ON])
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    named = dataset.dataset_kwargs.get("dataset_name_override") or dataset.dataset_name
    return str(dataset.dataset_path or named)


def _tokenizer(model: ModelParams, notes: Notes) -> Any:
    from oumi_pl.core.recipe.tokenizer import tokenizer_of

    return tokenizer_of(model, notes)


def _raised(cls: Any, error: Exception) -> str:
    """What the user's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f" ({f.filename}:{f.lineno})" for f in reversed(frames) if not _is_ours(f.filename)), "")
    return f"{cls.__name__} raised {type(error).__name__}: {error}{place}"


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parents[2])


def _plain(value: Any) -> Any:
    """A value of NumPy as Python's, a date as text."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} can't be written as JSON")
