"""Base classes of the user's data sets for text: what a row is, from which the recipe makes tokens."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from oumi_pl.core.datasets.base import BaseMapDataset
from oumi_pl.core.types.conversation import Conversation, Role
from oumi_pl.errors import UserError


class BaseSftDataset(BaseMapDataset):
    """Rows that `transform_conversation` makes conversations of.

    Args:
        tokenizer: Kept for subclasses.
        kwargs: As in `BaseMapDataset`, and Oumi's options of tokenizing, which the recipe reads from the config.
    """

    def __init__(self, *, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tokenizer = tokenizer
        self._data = self._load_data()

    @abstractmethod
    def transform_conversation(self, example: Any) -> Conversation:
        """The conversation of a row."""

    def transform(self, sample: Any) -> dict[str, Any]:
        """The conversation of a row as a dictionary; what carries loss is decided by the config, for all data sets."""
        return self.transform_conversation(sample).to_dict()

    def conversation(self, idx: int) -> Conversation:
        """The conversation of a row, by its number."""
        return self.transform_conversation(self.raw(idx))

    def conversations(self) -> list[Conversation]:
        """All conversations."""
        return [self.conversation(number) for number in range(len(self))]


class BaseDpoDataset(BaseMapDataset):
    """Rows with `prompt`, `chosen` and `rejected`, or whatever `transform_preference` makes these of.

    Args:
        tokenizer: Kept for subclasses.
        return_tensors: Not used.
        kwargs: As in `BaseMapDataset`.
    """

    def __init__(self, *, tokenizer: Any = None, return_tensors: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tokenizer = tokenizer
        self._data = self._load_data()

    def transform_preference(self, samples: Any) -> dict[str, Any]:
        """`prompt`, `chosen` and `rejected` of a row, each a list of turns."""
        roles = {"prompt": Role.USER, "chosen": Role.ASSISTANT, "rejected": Role.ASSISTANT}
        return {name: self._to_messages_list(samples[name], role) for name, role in roles.items()}

    def transform(self, sample: Any) -> dict[str, Any]:
        """As `transform_preference`."""
        return self.transform_preference(sample)

    def _to_messages_list(self, turn: Any, role: Role) -> list[dict[str, Any]]:
        """Text, a turn or turns as a list of turns."""
        if isinstance(turn, str):
            return [{"role": str(role), "content": turn}]
        if isinstance(turn, dict):
            return [turn]
        if isinstance(turn, list | np.ndarray):
            return list(turn)
        raise UserError(f"a {type(turn).__name__} is no turn: text, a dictionary, or a list of these is needed")


BaseExperimentalDpoDataset = BaseDpoDataset


class BaseExperimentalKtoDataset(BaseMapDataset):
    """Rows with `prompt`, `completion` and `label`, or whatever `transform` makes these of."""

    def __init__(self, *, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._data = self._load_data()

    def transform(self, sample: Any) -> dict[str, Any]:
        """`prompt`, `completion` and `label` of a row."""
        return {name: sample[name] for name in ("prompt", "completion", "label")}


class BaseExperimentalGrpoDataset(BaseMapDataset):
    """Rows with a `prompt`, and whatever rewards read, as `transform` gives them."""

    def __init__(self, *, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._data = self._load_data()

    def transform(self, sample: Any) -> dict[str, Any]:
        """`prompt` and `completion` of a row, without blanks around them."""
        return {name: str(sample[name] or "").strip() for name in ("prompt", "completion")}


class BaseIterableDataset(BaseMapDataset):
    """Rows that are read one after the other.

    Args:
        tokenizer: Kept for subclasses.
        stream: Whether rows of the hub are streamed.
        kwargs: As in `BaseMapDataset`.
    """

    def __init__(self, *, tokenizer: Any = None, stream: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tokenizer = tokenizer
        self.stream = stream
        self._data = self._load_data()

    def __iter__(self) -> Iterator[Any]:
        for row in self.iter_raw():
            yield self.transform(row)

    def iter_raw(self) -> Iterator[Any]:
        """The rows as they are read."""
        rows: Any = self._data
        yield from rows.to_dict("records") if hasattr(rows, "to_dict") else rows

    def transform(self, sample: Any) -> Any:
        """The row itself."""
        return sample


class BasePretrainingDataset(BaseIterableDataset):
    """Documents: rows with a text, which are tokenized and joined into windows by the recipe.

    Args:
        seq_length: Tokens of a window; read from the config.
        dataset_text_field: Column of the text.
        kwargs: As in `BaseIterableDataset`, and Oumi's options of joining, which the recipe reads from the config.
    """

    def __init__(self, *, seq_length: int | None = None, dataset_text_field: str = "text", **kwargs: Any) -> None:
        self.seq_length = seq_length
        self._dataset_text_field = dataset_text_field
        super().__init__(**kwargs)

    def documents(self) -> Iterable[dict[str, str]]:
        """The texts."""
        for row in self.iter_raw():
            yield {"text": row[self._dataset_text_field]}
