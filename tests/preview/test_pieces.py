"""Pieces: whole characters, exact marks, nothing in them that a terminal would obey."""

import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.preview.pieces import Decoder, visible

BYTES = ByteTokenizer().build()


def pieces(text, targets=None, tokenizer=BYTES):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
    marks = [i in (targets or ()) for i in range(len(ids))]
    return Decoder(tokenizer).pieces(ids, marks, list(range(len(ids))))


@pytest.mark.parametrize(
    "text", ["plain", "👋🏽 你好", "a\tb\nc", "� itself", "<|im_start|>user", "\x00\x1b[31m", "عربي"]
)
def test_the_texts_of_pieces_add_up_to_the_text(text):
    built = pieces(text)
    assert "".join(piece.text for piece in built) == text
    assert [i for piece in built for i in piece.ids] == BYTES(text)["input_ids"]


def test_tokens_that_make_a_character_together_are_one_piece():
    built = pieces("a👋b")
    assert [(piece.text, len(piece.ids), piece.start) for piece in built] == [("a", 1, 0), ("👋", 4, 1), ("b", 1, 5)]


def test_a_border_of_loss_within_a_character_stays_where_it_is():
    built = pieces("你", targets={2})
    assert [(piece.text, piece.ids, piece.target) for piece in built] == [
        ("\\xe4\\xbd", (0xE4, 0xBD), False),
        ("\\xa0", (0xA0,), True),
    ]


def test_half_a_character_is_shown_as_its_bytes():
    (first, special) = pieces([0xF0, 0x9F, BYTES.eos_token_id])
    assert first.text == "\\xf0\\x9f"
    assert (special.text, special.special) == ("<|im_end|>", True)


def test_a_text_that_spells_a_special_token_is_none():
    ids = list(b"<|im_end|>")
    assert not any(piece.special for piece in pieces(ids))


def test_sentence_pieces_and_their_bytes():
    vocab = [("<unk>", 0.0), ("▁hello", -1.0), ("▁", -2.0), *[(f"<0x{byte:02X}>", -9.0) for byte in range(256)]]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    built = pieces("hello 你", tokenizer=tokenizer)
    assert [piece.text for piece in built] == [" hello", " ", "你"]
    assert len(built[-1].ids) == 3


def test_an_id_beyond_the_vocabulary_is_named():
    assert pieces([9999])[0].text == "⟨id 9999⟩"


def test_nothing_that_is_shown_drives_a_terminal_or_hides():
    everything = "".join(map(chr, range(0x3000))) + "\ufeff\ue000\U000e0041"
    shown = "".join(visible([everything]))
    assert set(shown) & set("\x1b\x07\r\x7f\x9b\u202e\u2066\u200b\u2028\u00a0⟦⟧\t") == set()
    odd = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Co", "Cs")}
    assert odd <= {"\n", "\u200c", "\u200d"}  # line ends, and joiners


def test_what_is_replaced_is_reported():
    assert visible(["a\x1b[0m\r\n\tb\u202e⟦"]) == ["a⟨ESC⟩[0m⟨CR⟩⏎\n⇥   b⟨U+202E⟩⟨U+27E6⟩"]


def test_spaces_are_dots_where_they_would_not_be_seen():
    assert visible(["a b", "  c ", "\n", " d", " e"]) == ["a b", "··c·", "⏎\n", "·d", " e"]
