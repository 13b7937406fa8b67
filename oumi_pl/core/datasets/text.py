"""Base classes of the user's data sets for text: they define the rows, from which the recipe makes tokens."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from oumi_pl.core.datasets.base import BaseMapDataset
from oumi_pl.core.types.conversation import Conversation, Role
from oumi_pl.errors import UserError


class BaseSftDataset(BaseMapDataset):
    """Rows that `transform_conversation` converts to conversations.

    Args:
        tokenizer: Kept for subclasses.
        task: Not used, as the other options of tokenizing: which tokens carry loss is read from the config.
        return_tensors: Not used.
        text_col: Not used.
        assistant_only: Read from the config.
        response_template: Not used.
        instruction_template: Not used.
        return_conversations: Not used.
        return_conversations_format: Not used.
        kwargs: As in `BaseMapDataset`.
    """

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        task: str = "auto",
        return_tensors: bool = False,
        text_col: str = "text",
        assistant_only: bool = False,
        response_template: str | None = None,
        instruction_template: str | None = None,
        return_conversations: bool = False,
        return_conversations_format: str = "json",
        **kwargs: Any,
    ) -> None:
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
    """Rows with `prompt`, `chosen` and `rejected`, or rows that `transform_preference` converts to these.

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
    """Rows with `prompt`, `completion` and `label`, or rows that `transform` converts to these.

    Args:
        tokenizer: Not used.
        return_tensors: Not used.
        kwargs: As in `BaseMapDataset`.
    """

    def __init__(self, *, tokenizer: Any = None, return_tensors: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._data = self._load_data()

    def transform(self, sample: Any) -> dict[str, Any]:
        """`prompt`, `completion` and `label` of a row."""
        return {name: sample[name] for name in ("prompt", "completion", "label")}


class BaseExperimentalGrpoDataset(BaseMapDataset):
    """Rows with a `prompt` and the columns that rewards read, or rows that `transform` converts to these.

    Args:
        tokenizer: Not used.
        return_conversations: Not used.
        kwargs: As in `BaseMapDataset`.
    """

    def __init__(self, *, tokenizer: Any = None, return_conversations: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._data = self._load_data()

    def transform(self, sample: Any) -> dict[str, Any]:
        """All columns of a row; texts of `prompt` and `completion` without white space around them.

        Raises:
            UserError: there is no `prompt`.
        """
        row = {str(name): value for name, value in sample.items()}
        if "prompt" not in row:
            raise UserError(f"no column 'prompt'; there are {', '.join(row)}")
        return row | {name: _stripped(row[name]) for name in ("prompt", "completion") if name in row}


def _stripped(value: Any) -> Any:
    """Text without white space around it, and none for None; turns as they are."""
    return "" if value is None else value.strip() if isinstance(value, str) else value


class BaseIterableDataset(BaseMapDataset):
    """Rows that are read one after the other.

    Args:
        tokenizer: Kept for subclasses.
        stream: Read rows of the hub one at a time, while iterating; they then have no number and no length. By default
            all are read first (Oumi streams by default).
        kwargs: As in `BaseMapDataset`.
    """

    def __init__(self, *, tokenizer: Any = None, stream: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tokenizer = tokenizer
        self.stream = stream
        self._data = self._load_data()

    def __iter__(self) -> Iterator[Any]:
        for row in self.iter_raw():
            yield self.transform(row)

    def iter_raw(self) -> Iterator[Any]:
        """The rows as they are read."""
        import pandas as pd

        rows: Any = self._data
        yield from rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows

    def _load_hf_hub_dataset(self) -> Any:
        """Reads a data set of the hub, or opens it as a stream."""
        return self._hub_split(streaming=True) if self.stream else super()._load_hf_hub_dataset()

    def transform(self, sample: Any) -> Any:
        """The row itself."""
        return sample


class BasePretrainingDataset(BaseIterableDataset):
    """Documents: rows with a text, which are tokenized and joined into windows by the recipe.

    The recipe also reads the rows of a subclass that overrides nothing about reading them, streamed if
    `data.train.stream` is set; no object of the class is then created.

    Args:
        seq_length: Tokens of a window; read from the config.
        dataset_text_field: Column of the text.
        append_concat_token: Not used: documents are joined by the recipe, as are the next two.
        add_special_tokens: Not used.
        skip_last: Not used.
        kwargs: As in `BaseIterableDataset`.
    """

    def __init__(
        self,
        *,
        seq_length: int | None = None,
        dataset_text_field: str = "text",
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
        skip_last: bool = True,
        **kwargs: Any,
    ) -> None:
        self.seq_length = seq_length
        self._dataset_text_field = dataset_text_field
        super().__init__(**kwargs)

    def documents(self) -> Iterable[dict[str, str]]:
        """The texts."""
        for row in self.iter_raw():
            yield {"text": row[self._dataset_text_field]}
