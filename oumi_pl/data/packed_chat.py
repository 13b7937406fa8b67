"""Conversations as one stream of tokens: rendered, joined, and cut into rows as documents are in pretraining."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from oumi_pl.data.corpus import Part
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.template import Rendering, apply_template, load_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedChatData(PretrainData):
    """Rows of turns become texts by the chat template, and these one stream of tokens, of which all carry loss.

    What the assistant says isn't told from what it reads: `SFTData` with `packing` does that, and keeps conversations
    apart from each other. Here each ends with EOS, and the next one sees it unless `isolate` is set.

    Args:
        args: As of `TextData`; rows come in any format of `SFTData`.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        kwargs: As of `PretrainData`.
    """

    def __init__(self, *args: Any, template: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.template_spec = template

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Puts the chat template in force and adds the special tokens that it needs."""
        before = set(tokenizer.get_vocab().values())
        self.template = load_template(tokenizer, self.template_spec)
        apply_template(tokenizer, self.template)
        return sorted(set(tokenizer.get_vocab().values()) - before)

    @cached_property
    def rendering(self) -> Rendering:
        """Turns conversations into texts."""
        return Rendering(self.tokenizer)

    def parts(self, split: str) -> list[Part]:
        """What a split takes of which sources, with conversations as texts."""
        return [part._replace(render=self.rendering) for part in super().parts(split)]
