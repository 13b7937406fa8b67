"""Conversations as one stream of tokens: rendered, joined and cut into rows, like the documents of pretraining."""

from datetime import date as Date
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from oumi_pl.data.corpus import Part
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.records import OnBadRows
from oumi_pl.data.rendering import Rendering
from oumi_pl.data.sources import titles
from oumi_pl.data.template import apply_template, load_template
from oumi_pl.data.template_date import template_date
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedChatData(PretrainData):
    """Renders conversations with the chat template and joins them into one stream of tokens, which all carry loss.

    Each conversation ends with EOS, and the next one sees it unless `isolate` is set. To train on answers alone, or to
    keep conversations apart, use `SFTData` with `packing`.

    Args:
        args: See `TextData`. Rows may have any format of `SFTData`.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        bad_rows: What happens if rows can't be used: `error` stops the run and lists all kinds of them, `drop` leaves
            them out and counts them.
        kwargs: See `PretrainData`.
    """

    def __init__(self, *args: Any, template: str | None = None, bad_rows: OnBadRows = "error", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if bad_rows not in get_args(OnBadRows):
            raise UserError(f"data.bad_rows: unknown {bad_rows!r}{nearest(str(bad_rows), get_args(OnBadRows))}")
        self.bad_rows: OnBadRows = bad_rows
        self.template_spec = template

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Sets the chat template and adds the special tokens that it needs."""
        self.template = load_template(tokenizer, self.template_spec)
        return apply_template(tokenizer, self.template)

    @cached_property
    def rendering(self) -> Rendering:
        """Renders conversations as texts."""
        return Rendering(self.tokenizer, self.template_date)

    @cached_property
    def template_date(self) -> Date | None:
        """The day that the template gets as today; None if it doesn't ask for it."""
        return template_date(self.tokenizer.chat_template, {}, titles(self.sources["train"]))

    def report(self) -> dict[str, Any]:
        """Adds the date that the template writes; see `PretrainData`."""
        date = {} if self.template_date is None else {"template_date": str(self.template_date)}
        return {split: described | date for split, described in super().report().items()}

    def parts(self, split: str) -> list[Part]:
        """The parts of sources that a split uses, with conversations rendered as texts."""
        return [part._replace(render=self.rendering, bad_rows=self.bad_rows) for part in super().parts(split)]
