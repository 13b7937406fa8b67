"""Tokenizers: loaded by name or directory, or built by a class that a recipe's `tokenizer:` names."""

import copy
import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError, is_out_of_memory, reason
from oumi_pl.models.hub import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""Ids 256 to 259 of the `ByteTokenizer`."""


class TokenizerFactory(ABC):
    """Builds a tokenizer. A recipe's `tokenizer:` may name a subclass by class_path and init_args."""

    @abstractmethod
    def build(self) -> "PreTrainedTokenizerBase":
        """Builds the tokenizer."""


class ByteTokenizer(TokenizerFactory):
    """Builds a tokenizer whose tokens are the 256 bytes (a token's id is its byte) and four special tokens.

    It needs no training and no files, and represents any text exactly, with one token per UTF-8 byte.

    Args:
        chat_template: Use the ChatML template, with `<|im_end|>` as EOS. Otherwise it has no template, and EOS is
            `<|endoftext|>`.
    """

    def __init__(self, chat_template: bool = True) -> None:
        self.chat_template = chat_template

    def build(self) -> "PreTrainedTokenizerBase":
        """Builds the tokenizer."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL_TOKENS)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<|pad|>",
            eos_token="<|im_end|>" if self.chat_template else "<|endoftext|>",
            clean_up_tokenization_spaces=False,
        )
        if self.chat_template:
            template = Path(__file__).parent / "templates" / "chatml.jinja"
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        return tokenizer


def byte_symbols() -> list[str]:
    """The character that represents each byte in byte-level tokenizers.

    A byte that is visible in Latin-1 is represented by that character, others by the code points from 256 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(0x100)]


def load_tokenizer(spec: Any, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads or builds the tokenizer of a `spec`: a hub id or directory, a factory with `build()`, or a tokenizer.

    Of a tokenizer, it returns a copy: the data add tokens and a chat template to theirs.

    Raises:
        UserError: it can't be loaded, or is something else.
    """
    if hasattr(spec, "build"):
        return spec.build()
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(spec, PreTrainedTokenizerBase):
        return copy.deepcopy(spec)
    if not isinstance(spec, str | os.PathLike):
        kind = type(spec).__name__
        raise UserError(f"data.tokenizer is a {kind}; name a tokenizer or a folder, or pass one of transformers")
    spec = locate(os.fspath(spec), "data.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code)
        json.dumps(
            tokenizer.init_kwargs, ensure_ascii=False, default=str
        ).encode()  # half of a surrogate pair could not be written again
        return tokenizer
    except BaseException as error:  # a damaged file can raise anything, also Rust's panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error) or (trust_remote_code and not isinstance(error, OSError | ValueError)):
            raise
        raise UserError(f"data.tokenizer: can't load {spec!r}: {reason(error)}") from error


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase", *, chat: bool = True) -> str:
    """Hash of a tokenizer's vocabulary, merges and special tokens; with `chat` also of its chat template."""
    digest = hashlib.blake2b(digest_size=16)
    template = str(tokenizer.chat_template) if chat else ""
    for part in (tokenizer.backend_tokenizer.to_str(), template, str(tokenizer.special_tokens_map)):
        digest.update(part.encode())
    return digest.hexdigest()
