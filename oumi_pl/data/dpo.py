"""Data for preference training: pairs of responses that share their prompt, laid out without padding."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from oumi_pl.data.base import Sources
from oumi_pl.data.chat import ChatData
from oumi_pl.data.collate import FetchedRow, flatten_pairs
from oumi_pl.data.formats import FORMATS
from oumi_pl.data.pairs import TokenizePairs
from oumi_pl.data.preferences import PREFERENCE_FORMATS
from oumi_pl.data.reference import ReferenceLogps
from oumi_pl.data.tokenize import Overflow
from oumi_pl.data.tokenizers import TokenizerFactory


class DPOData(ChatData):
    """Rows become a prompt with a chosen and a rejected response, and the prompt is laid out once for both.

    Args:
        train: Where the training rows come from: a hub id, a file, directory or glob, `bundled/NAME`, or a list of
            these (a mixture).
        validation: A source, or the fraction of the training rows to hold out (chosen by a hash of the row).
        test: Source for `test`.
        predict: Source of prompts for `predict`, pairs or anything that SFT reads; the test or validation rows when
            left out.
        tokenizer: Hub id or directory, or a class that makes one; the model's own when left out.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        overflow: What becomes of pairs longer than `max_length`: with `truncate` the prompt loses its start, and the
            responses their ends if they have to; with `keep_start` only ends are cut; the pair is dropped; or the run
            stops.
        max_length: Longest prompt with one response, in tokens. A pack holds twice as many, so that every pair fits.
        packing: Put several pairs into one row, isolated from each other.
        batch_size: Pairs per micro-batch and device (packs, when packing).
        eval_batch_size: The same for validation and test; `batch_size` when left out.
        group_by_length: Without packing, put pairs of similar length into the same update. Saves nothing, since pairs
            are laid out without padding; it only evens out the micro-batches of one update.
        workers: Loader processes per device.
        seed: Of the order; the run's `seed_everything` when left out.
        trust_remote_code: Let the tokenizer run code that came with it.
    """

    gives = "pairs"
    formats = PREFERENCE_FORMATS
    prompt_formats = (*PREFERENCE_FORMATS, *FORMATS)

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        *,
        tokenizer: str | TokenizerFactory | None = None,
        template: str | None = None,
        overflow: Overflow = "truncate",
        max_length: int = 1024,
        packing: bool = False,
        batch_size: int = 8,
        group_by_length: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train,
            validation,
            test,
            predict,
            tokenizer=tokenizer,
            template=template,
            overflow=overflow,
            max_length=max_length,
            packing=packing,
            batch_size=batch_size,
            group_by_length=group_by_length,
            **kwargs,
        )

    @cached_property
    def tokenize(self) -> TokenizePairs:
        """Turns preferences into pairs."""
        return TokenizePairs(self.tokenizer, self.max_length, self.overflow)

    def encoding_key(self) -> list[Any]:
        """That these are pairs, and what happens to long ones."""
        return ["pairs", self.overflow]

    @property
    def capacity(self) -> int | None:
        """Tokens that a pack holds; None without packing."""
        return 2 * self.max_length if self.packing else None

    @property
    def collate(self) -> Callable[[list[FetchedRow]], Any]:
        """Makes a `PreferenceBatch` of rows, each as a list of ids and one of examples."""
        return partial(flatten_pairs, pad_id=self.pad_id)

    def _split_report(self, split: str) -> dict[str, Any]:
        """Adds `saved_by_sharing`: the share of tokens that are spared by laying out each prompt once for both."""
        report = super()._split_report(split)
        prompts = sum(int(store.added["chosen_start"].sum()) for store in self.stores(split) if len(store))
        report["saved_by_sharing"] = round(prompts / max(1, prompts + report["tokens"]), 6)
        # the flat layout makes no padding, whatever the lengths
        return report if self.packing else report | {"padding": 0.0}

    def reference_logps(self, split: str, parts: dict[str, Any]) -> ReferenceLogps:
        """Where log-probabilities of a split's targets are kept.

        Args:
            split: `train`, `validation` or `test`.
            parts: What they depend on besides the pairs: the reference model, its precision.
        """
        stores = self.stores(split)
        counts = np.concatenate([store.target_counts for store in stores])
        return ReferenceLogps(parts | {"pairs": [store.directory.name for store in stores]}, counts)
