"""A tokenizer that is trained on the training documents."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.data.store import cache_key, cache_root, is_whole, new_folder
from oumi_pl.data.tokenizers import SPECIAL_TOKENS, TokenizerFactory
from oumi_pl.errors import UserError
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Corpus = Callable[[], tuple[Any, Iterator[str]]]
"""Returns what the texts depend on, and the texts."""


class TrainedBPE(TokenizerFactory):
    """Trains a byte-level BPE tokenizer on the training documents (Sennrich et al. 2016, arXiv:1508.07909; on bytes as
    in GPT-2). It represents any text exactly, ends texts with `<|endoftext|>`, and has the ChatML tokens for
    fine-tuning.

    It is trained once per corpus and cached; an ordinary fast tokenizer is saved with the model.

    Args:
        vocab_size: Tokens in all, including the 256 bytes and four special tokens; fewer if the corpus is too small.
        max_bytes: Bytes of text to train on, at most, from the start; divided evenly among several sources.
    """

    def __init__(self, vocab_size: int = 8192, max_bytes: int = 1 << 30) -> None:
        self.vocab_size = vocab_size
        self.max_bytes = max_bytes
        self.corpus: Corpus | None = None

    def build(self) -> "PreTrainedTokenizerBase":
        """Trains the tokenizer, or loads it from the cache.

        Raises:
            UserError: the vocabulary is smaller than bytes and special tokens together, or there is no corpus, because
                the data are not `PretrainData`.
        """
        from transformers import PreTrainedTokenizerFast

        least = 256 + len(SPECIAL_TOKENS)
        if self.vocab_size < least:
            raise UserError(
                f"data.tokenizer.vocab_size is {self.vocab_size}, but bytes and special tokens alone are {least}"
            )
        if self.max_bytes < 1:
            raise UserError(f"data.tokenizer.max_bytes is {self.max_bytes}, but has to be at least 1")

        if self.corpus is None:
            raise UserError(
                "data.tokenizer: TrainedBPE is trained on the documents of PretrainData; for other data name the "
                "folder of the model that was trained with it"
            )
        made_from, texts = self.corpus()
        directory = cache_root() / "tokenizers" / cache_key(1, made_from, self.vocab_size, self.max_bytes)
        if not is_whole(directory):
            self._train(texts, directory)
        return PreTrainedTokenizerFast.from_pretrained(directory)

    def _train(self, texts: Iterator[str], directory: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        if (learnt := backend.get_vocab_size()) < self.vocab_size:
            echo(f"TrainedBPE: these texts have pairs for {learnt} tokens, not for {self.vocab_size}")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<|pad|>",
            eos_token="<|endoftext|>",
            clean_up_tokenization_spaces=False,
        )
        with new_folder(directory) as half:
            tokenizer.save_pretrained(half)


def first_bytes(texts: Iterator[str], most: int) -> Iterator[str]:
    """Yields the first `most` bytes of texts; the last text is cut."""
    for text in texts:
        size = len(text.encode())
        if size >= most:
            yield text.encode()[:most].decode(errors="ignore")
            return
        most -= size
        yield text
