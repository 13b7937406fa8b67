"""Conversations as one stream of tokens: rendered, joined and cut into rows, like the documents of pretraining."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from oumi_pl.data.corpus import Part
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.rendering import Rendering
from oumi_pl.data.sources import as_sources
from oumi_pl.data.template import apply_template, load_template
from oumi_pl.data.template_date import template_date

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedChatData(PretrainData):
    """Renders conversations with the chat template and joins them into one stream of tokens, which all carry loss.

    Each conversation ends with EOS, and the next one sees it unless `isolate` is set. To train on answers alone, or to
    keep conversations apart, use `SFTData` with `packing`.

    Args:
        args: As of `TextData`; rows come in any format of `SFTData`.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        kwargs: As of `PretrainData`.
    """

    def __init__(self, *args: Any, template: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.template_spec = template

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Sets the chat template and adds the special tokens that it needs."""
        self.template = load_template(tokenizer, self.template_spec)
        return apply_template(tokenizer, self.template)

    @cached_property
    def rendering(self) -> Rendering:
        """Renders conversations as texts."""
        sources = [str(source.path) for source in as_sources(self.sources["train"])] if self.sources["train"] else []  # type: ignore[arg-type]
        return Rendering(self.tokenizer, template_date(self.tokenizer.chat_template, {}, sources))

    def parts(self, split: str) -> list[Part]:
        """The parts of sources that a split uses, with conversations rendered as texts."""
        return [part._replace(render=self.rendering) for part in super().parts(split)]
