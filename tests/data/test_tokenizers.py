"""The byte tokenizer: ids, round trips, offsets, special tokens, the chat template and what saving keeps."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer, TokenizerFactory
from oumi_pl.errors import UserError

TEXTS = [
    "plain words, 12.5 % of them",
    "  two spaces before, a tab\tand\r\nlines \n",
    "Grüße, 漢字, עברית, मनोज",
    "👩‍👩‍👧 and e\u0301 beside \u00e9, \u00a0 and \u00ad",
    "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    "don 't join , these . ' s",
    "".join(map(chr, range(0x800))),
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say ünion"},
    {"role": "assistant", "content": "ünion"},
    {"role": "user", "content": "Twice"},
    {"role": "assistant", "content": "ünion ünion"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_utf8_bytes_and_decode_to_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_each_byte_of_a_character_has_the_offsets_of_the_character(tokenizer):
    text = " aü 漢👍\n"
    expected = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    assert tokenizer(text, return_offsets_mapping=True)["offset_mapping"] == expected


def test_special_tokens_follow_the_bytes(tokenizer):
    names = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(tokenizer) == 260
    assert tokenizer.convert_tokens_to_ids(names) == [256, 257, 258, 259]
    assert tokenizer("a<|im_end|>\n")["input_ids"] == [97, 259, 10]
    text = "a" + "".join(names) + " b"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "a b"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 259)


def test_chat_is_chatml_and_marks_what_the_assistant_says(tokenizer):
    out = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CHAT)
    assert tokenizer.decode(ids) == text
    spoken = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(spoken) == "ünion<|im_end|>ünion ünion<|im_end|>"
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("Say ünion<|im_end|>\n<|im_start|>assistant\n")


def test_without_chat_template_text_ends_with_endoftext():
    tokenizer = ByteTokenizer(chat_template=False).build()
    assert tokenizer.chat_template is None
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 257)
    assert len(tokenizer) == 260


@pytest.mark.parametrize("chat_template", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, chat_template):
    tokenizer = ByteTokenizer(chat_template).build()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.chat_template == tokenizer.chat_template
    for text in [*TEXTS, "<|im_start|>user\nüa<|im_end|>\n"]:
        ours, theirs = (t(text, return_offsets_mapping=True) for t in (tokenizer, loaded))
        assert ours["input_ids"] == theirs["input_ids"]
        assert ours["offset_mapping"] == theirs["offset_mapping"]
        assert loaded.decode(theirs["input_ids"]) == text


def test_batches_are_padded_with_the_pad_token(tokenizer):
    out = tokenizer(["a", "abc"], padding=True)
    assert out["input_ids"] == [[97, 256, 256], [97, 98, 99]]
    assert out["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_a_factory_has_to_say_how_to_build():
    with pytest.raises(TypeError, match="build"):
        type("Forgetful", (TokenizerFactory,), {})()


def test_importing_the_module_loads_no_heavy_library():
    code = (
        "import sys, importlib.util; s = importlib.util.spec_from_file_location('m', sys.argv[1]); "
        "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, sys.modules[ByteTokenizer.__module__].__file__], check=True)


def test_a_tokenizer_that_is_passed_is_copied_and_other_objects_are_refused(tmp_path):
    """Two data modules add the tokens of a template, and both know which ones they added."""
    tokenizer = ByteTokenizer(chat_template=False).build()
    first, second = (SFTData(tokenizer=tokenizer, template="llama3") for _ in range(2))
    assert first.tokenizer is not tokenizer
    assert len(first.tokenizer) == len(second.tokenizer) > len(tokenizer) == 260
    assert first.added_tokens == second.added_tokens != []
    tokenizer.save_pretrained(tmp_path)
    assert len(SFTData(tokenizer=Path(tmp_path), template="plain").tokenizer) == 260
    with pytest.raises(UserError, match=r"data\.tokenizer is a int; name a tokenizer or a folder"):
        SFTData(tokenizer=3).tokenizer  # noqa: B018
