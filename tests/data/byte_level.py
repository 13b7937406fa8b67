"""What the tests of tokenizing share: small byte-level tokenizers, turns, and examples as text."""

from itertools import groupby

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from oumi_pl.data.rendering import ChatRenderer
from oumi_pl.data.template import BUILT_IN, apply_template, load_template
from oumi_pl.types import Conversation


def wrap(model, trained_on=(), use_regex=True, trim_offsets=None, adds_bos=False, **kwargs):
    """A byte-level tokenizer around `model`; merges are learnt from the lines of `trained_on`."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    if trained_on:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            trained_on, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<eos>", **kwargs})
    if trim_offsets is not None:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_bos:
        pair = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{pair[0]} $A", special_tokens=[pair]
        )
    return tokenizer


def byte_tokenizer(template=None, **kwargs):
    """One token per byte, so that every border can be hit; ready to use with `template`, a name or Jinja text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = wrap(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]), **kwargs)
    if template in BUILT_IN or template is None:
        apply_template(tokenizer, load_template(tokenizer, template))
    else:
        tokenizer.chat_template = template
    return tokenizer


WORDS = ["the answer is 42 .\n", " the answer to this question", "42 is an answer ;"] * 20


def turn(role, content, **rest):
    return {"role": role, "content": content, **rest}


def chat(*contents, border=None):
    """Turns of user and assistant, alternating."""
    roles = ("user", "assistant")
    return Conversation(tuple(turn(roles[i % 2], c) for i, c in enumerate(contents)), prompt_messages=border)


def pieces(tokenizer, example):
    """The example as text, cut where the mask changes: [(text, carries loss)]."""
    assert example.input_ids.dtype == np.int32
    assert example.loss_mask.dtype == bool
    pairs = zip(example.loss_mask.tolist(), example.input_ids.tolist(), strict=True)
    return [(tokenizer.decode([i for _, i in group]), loss) for loss, group in groupby(pairs, key=lambda pair: pair[0])]


def spans_of(tokenizer, conversation, turns):
    """The text of a conversation whose trained turns share one, and their spans."""
    (written,) = ChatRenderer(tokenizer).render(conversation, turns).texts
    return written.text, [(target.start, target.end) for target in written.targets]


def prompt_of(tokenizer, turns, tools=None):
    """Turns rendered with the generation prompt at the end."""
    return ChatRenderer(tokenizer).prompt(Conversation(tuple(turns), tools and tuple(tools)), len(turns))
