"""Loads tokenizers by name, directory or factory, and tells them apart."""

import hashlib
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError
from oumi_pl.hub import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(spec: Any, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer that `spec` stands for: a hub id or directory, a factory with `build()`, or a tokenizer.

    Raises:
        UserError: if there is none to be loaded, or it has no fast implementation.
    """
    if hasattr(spec, "build"):
        return spec.build()
    if not isinstance(spec, str):
        return spec
    from transformers import AutoTokenizer

    spec = locate(spec, "data.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.tokenizer: can't load {spec!r}: {reason}") from error


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of all that a tokenizer does to text: vocabulary, merges, special tokens, chat template."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(tokenizer.special_tokens_map)):
        digest.update(part.encode())
    return digest.hexdigest()
