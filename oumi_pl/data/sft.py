"""Data for supervised fine-tuning: conversations and completions, with the tokens to train on marked."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader

from oumi_pl.data.base import Sources, TextData
from oumi_pl.data.template import ChatTemplate, apply_template, load_template
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.data.tokenizers import TokenizerFactory
from oumi_pl.errors import UserError
from oumi_pl.types import Example, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SFTData(TextData):
    """Rows become conversations, are rendered by a chat template, and carry loss on what the model should learn to say.

    Args:
        train: Where the training rows come from: a hub id, a file, directory or glob, `bundled/NAME`, or a list of
            these (a mixture).
        validation: A source, or the fraction of the training rows to hold out (chosen by a hash of the row).
        test: Source for `test`.
        predict: Source of prompts for `predict`; the test or validation rows when left out.
        tokenizer: Hub id or directory, or a class that makes one; the model's own when left out.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        train_on: Which tokens carry loss. When left out: the completion where there is one, all assistant turns of a
            conversation, all of a plain text.
        overflow: What becomes of rows longer than `max_length`: the answer is kept where it can be, the row is dropped,
            or the run stops.
        max_length: Longest example in tokens, and the size of a pack.
        packing: Put several examples into one row, isolated from each other.
        batch_size: Rows per micro-batch and device (packs, when packing).
        eval_batch_size: The same for validation and test; `batch_size` when left out.
        group_by_length: Without packing, put examples of similar length into the same update.
        workers: Loader processes per device.
        seed: Of the order; the run's `seed_everything` when left out.
        trust_remote_code: Let the tokenizer run code that came with it.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        *,
        tokenizer: str | TokenizerFactory | None = None,
        template: str | None = None,
        train_on: Literal["completion", "assistant", "last_turn", "all"] | None = None,
        overflow: Literal["truncate", "drop", "error"] = "truncate",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, test, predict, tokenizer=tokenizer, **kwargs)
        self.template_spec = template
        self.train_on = train_on
        self.overflow = overflow
        self.template: ChatTemplate | None = None

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Puts the chat template in force and adds the special tokens that it needs."""
        before = set(tokenizer.get_vocab().values())
        self.template = load_template(tokenizer, self.template_spec)
        apply_template(tokenizer, self.template)
        # what was in the vocabulary already, and only became special, has a trained row
        return sorted(set(tokenizer.get_vocab().values()) - before)

    @cached_property
    def _tokenize(self) -> Tokenize:
        return Tokenize(self.tokenizer, self.max_length, self.train_on, self.overflow)

    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Records to examples by template, offsets and `train_on`."""
        return self._tokenize(list(records))

    def encoding_key(self) -> list[Any]:
        """Which tokens are trained, and what happens to long rows."""
        return [self.train_on, self.overflow]

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids and reference answer of each row of a split: what completions are sampled for."""
        for _, record in self.records(split):
            yield self._tokenize.prompt_ids(record)

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer besides EOS: the template's end of turn."""
        end = self.template.end_of_turn if self.template else None
        return [self.tokenizer.convert_tokens_to_ids(end)] if end else []  # type: ignore[list-item]

    def predict_dataloader(self) -> DataLoader:
        """Prompts of the `predict` rows (else test, else validation), each rank its share, in row order."""
        split = next((s for s in ("predict", "test", "validation") if self.sources[s] is not None), None)
        if split is None:
            raise UserError("data.predict: `predict` needs a source of prompts here, and the recipe names none")
        rows = [(row, ids, reference) for row, (ids, reference) in enumerate(self.prompts(split))]
        layout = self.layout
        share = rows[layout.rank :: layout.ranks]
        return DataLoader(share, batch_size=self.eval_batch_size, collate_fn=_prompt_batch)  # type: ignore[arg-type]


def _prompt_batch(rows: list[tuple[int, list[int], str]]) -> dict[str, list[Any]]:
    numbers, prompts, references = zip(*rows, strict=True)
    return {"rows": list(numbers), "prompts": list(prompts), "references": list(references)}
