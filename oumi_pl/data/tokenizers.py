"""PLACEHOLDER until the real file is written: overwrite freely."""

from abc import ABC, abstractmethod
from pathlib import Path


class TokenizerFactory(ABC):
    @abstractmethod
    def build(self): ...


class ByteTokenizer(TokenizerFactory):
    def __init__(self, chat_template: bool = True):
        self.chat_template = chat_template

    def build(self):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        t = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
        t.decoder = decoders.ByteLevel()
        t.add_special_tokens(["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tok = PreTrainedTokenizerFast(
            tokenizer_object=t, pad_token="<|pad|>", eos_token="<|im_end|>" if self.chat_template else "<|endoftext|>"
        )
        if self.chat_template:
            tok.chat_template = (Path(__file__).parent / "templates" / "chatml.jinja").read_text()
        return tok
