"""Documents: what a text file is divided into, which rows are documents, and exactly which ids a document has."""

import numpy as np
import pytest
from tokenizers import models

from oumi_pl.data import documents as module
from oumi_pl.data.documents import TokenizeDocuments, texts, token_dtype
from oumi_pl.data.records import RowCounts
from oumi_pl.data.sources import Source, fingerprint
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.data.byte_level import WORDS, byte_tokenizer, wrap
from tests.data.source_files import lines, mistake, read, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- text files


def test_a_text_file_is_one_document_by_default():
    write("a.txt", "one\n\ntwo\n")
    assert list(texts(Source("a.txt"))) == list(texts(Source("a.txt", documents="file"))) == ["one\n\ntwo\n"]


def test_documents_may_be_divided_by_blank_lines():
    write("a.txt", "\n \none\ntwo\r\n\n\t\n\nthree\n\nfour")
    actual = read("a.txt", documents="blank_lines")
    assert actual == [
        ("a.txt:3", {"text": "one\ntwo"}),
        ("a.txt:8", {"text": "three"}),
        ("a.txt:10", {"text": "four"}),
    ]


@pytest.mark.parametrize(
    ("separator", "content", "expected"),
    [
        ("<|end|>", "one\n<|end|>\ntwo\n\nlines<|end|>", [(1, "one"), (3, "two\n\nlines")]),
        ("<|end|>", "<|end|>a<|end|><|end|>b<|end|>\n\n\nc", [(1, "a"), (1, "b"), (4, "c")]),
        ("\n---\n", "one\n---\ntwo\n--\n---\n", [(1, "one"), (3, "two\n--")]),
        ("\n\n\n", "one\n\ntwo\n\n\nthree", [(1, "one\n\ntwo"), (6, "three")]),
        ("|", "a|b\nc", [(1, "a"), (1, "b\nc")]),
    ],
)
def test_documents_may_be_divided_by_a_separator_anywhere(separator, content, expected):
    write("a.txt", content)
    assert read("a.txt", documents=separator) == [(f"a.txt:{line}", {"text": text}) for line, text in expected]


def test_wrong_settings_are_refused():
    write("a.jsonl", lines([{"text": "x"}]))
    assert "'documents' divides .txt files" in mistake("a.jsonl", documents="blank_lines")
    write("a.txt", "x")
    assert "unknown documents 'blank_line'; did you mean 'blank_lines'?" in mistake("a.txt", documents="blank_line")
    assert "unknown errors 'replac'; did you mean 'replace'?" in mistake("a.txt", errors="replac")


def test_invalid_bytes_are_an_error_or_are_replaced_and_counted():
    write("a.txt", b"one\ntw\xffo\n\xe2\x82 \xef\xbf\xbd\n")
    assert "a.txt:2: not UTF-8 text (0xff at byte 3 of the line, 7 of the file); save it as UTF-8" in mistake("a.txt")
    counts = RowCounts()
    assert list(texts(Source("a.txt", errors="replace"), counts=counts)) == ["one\ntw\ufffdo\n\ufffd \ufffd\n"]
    assert counts["replaced"] == 2, "the third one was there before"
    write("a.jsonl", b'{"text": "a\xff"}\n')
    assert list(texts(Source("a.jsonl", errors="replace"))) == ["a\ufffd"]


def test_a_binary_file_among_texts_is_refused_by_its_name():
    write("texts/a.txt", "fine")
    write("texts/b.txt", b"PK\x00\x01")
    assert "texts/b.txt:1: expected text, found binary data" in mistake("texts")
    assert "texts/b.txt:1: expected text, found binary data" in mistake("texts", errors="replace")


def test_another_way_to_divide_is_another_source():
    write("a.txt", "one\n\ntwo")
    prints = {fingerprint(Source("a.txt", documents=d)) for d in (None, "blank_lines", "<|x|>")}
    assert len(prints) == 3


# --- rows


def test_rows_that_are_documents():
    write("a.jsonl", lines([{"text": "a", "url": "u"}, {"text": " \n"}, {"text": "b"}]))
    counts = RowCounts()
    assert list(texts(Source("a.jsonl"), counts=counts)) == ["a", "b"]
    assert counts == {"rows": 3, "kept": 2, "empty": 1}
    write("b.jsonl", lines([{"content": "c"}]))
    assert list(texts(Source("b.jsonl", columns={"text": "content"}))) == ["c"]
    write("c.jsonl", lines([{"prompt": "p ", "completion": "c"}]))
    assert list(texts(Source("c.jsonl", format="prompt_completion"))) == ["p c"]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"messages": []}, {}, "a.jsonl:1: this row is a conversation, which SFT trains on"),
        (
            {"prompt": "a", "response": "b"},
            {"format": "prompt_response"},
            "a.jsonl:1: the format returns a Conversation",
        ),
        ({"txt": "a"}, {}, "a.jsonl:1: no column 'text'; did you mean 'txt'?"),
        ({"text": 3}, {}, "a.jsonl:1: column 'text'"),
    ],
)
def test_rows_that_are_no_documents(row, fields, message):
    write("a.jsonl", lines([row]))
    with pytest.raises(UserError) as caught:
        list(texts(Source("a.jsonl", **fields)))
    assert message in str(caught.value)


def test_the_hub_is_streamed_if_asked_for(monkeypatch):
    import datasets

    write("hub/a.jsonl", lines([{"text": f"text {i}"} for i in range(5)]))
    original, asked = datasets.load_dataset, []

    def load(path, config, *, split, revision, streaming=False):
        asked.append(streaming)
        return original("hub", split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load)
    streamed, downloaded = (list(texts(Source("org/name"), streaming=how)) for how in (True, False))
    assert streamed == downloaded == [f"text {i}" for i in range(5)]
    assert asked == [True, False]


# --- ids


def test_documents_end_with_eos_and_begin_with_bos_only_where_the_tokenizer_adds_one():
    tokenizer = ByteTokenizer(chat_template=False).build()
    (document,) = TokenizeDocuments(tokenizer)(["aü"])
    assert document.ids.tolist() == [*"aü".encode(), tokenizer.eos_token_id]
    assert (document.text_bytes, document.target_bytes) == (3, 2)
    with_bos = byte_tokenizer(bos_token="<bos>", adds_bos=True)
    (document,) = TokenizeDocuments(with_bos)(["ab"])
    assert document.ids[0] == with_bos.bos_token_id
    assert document.ids[-1] == with_bos.eos_token_id
    assert len(document.ids) == 4
    assert document.target_bytes == document.text_bytes == 2


def test_the_bytes_of_the_first_token_are_not_counted_as_targets():
    tokenizer = wrap(models.BPE(), WORDS)
    tokenize = TokenizeDocuments(tokenizer)
    for text in (" the answer", "answer is", "x", "42 is"):
        (document,) = tokenize([text])
        first = len(tokenizer.decode(document.ids[:1]).encode())
        assert 0 < first < len(text.encode()) or text == "x"
        assert document.target_bytes == document.text_bytes - first
    # half a character is no text yet: its bytes count where it is completed
    assert TokenizeDocuments(ByteTokenizer(False).build())(["ü"])[0].target_bytes == 2


def test_long_documents_are_tokenized_in_pieces_with_the_ids_of_the_whole(monkeypatch):
    tokenizer = wrap(models.BPE(), WORDS)
    text = "".join(f"{word}\n\n  the {i}.\nanswer" for i, word in enumerate(WORDS * 5))
    whole = TokenizeDocuments(tokenizer)([text])[0]
    monkeypatch.setattr(module, "PIECE", 40)
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 100)
    tokenize = TokenizeDocuments(tokenizer)
    assert len(tokenize._pieces(text)) > 20
    (pieces,) = tokenize([text])
    assert pieces.ids.tolist() == whole.ids.tolist()
    assert pieces[1:] == whole[1:]


def test_documents_are_encoded_whole_where_pieces_could_change_ids(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 4)
    text = "one\ntwo\nthree\nfour"
    joined = wrap(models.BPE(), WORDS, use_regex=False)  # merges across line ends
    assert TokenizeDocuments(joined)._pieces(text) == [text]
    prefixed = wrap(models.BPE(), WORDS)
    from tokenizers import pre_tokenizers

    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert TokenizeDocuments(prefixed)._pieces(text) == [text]


def test_a_document_whose_tokens_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_PIECE", 10)
    tokenize = TokenizeDocuments(ByteTokenizer(False).build())
    assert len(tokenize(["0123456789"])) == 1
    with pytest.raises(UserError, match="the document that begins with '01234567890' has a text of 11 characters"):
        tokenize(["01234567890"])


def test_ids_take_two_bytes_each_if_the_vocabulary_fits():
    tokenizer = ByteTokenizer().build()
    assert token_dtype(tokenizer) is np.uint16
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)])
    assert token_dtype(tokenizer) is np.uint32
    assert TokenizeDocuments(tokenizer)(["a<65535>"])[0].ids.tolist() == [
        97,
        len(tokenizer) - 1,
        tokenizer.eos_token_id,
    ]


def test_unsuitable_tokenizers_are_refused():
    with pytest.raises(UserError, match="no end-of-text token"):
        TokenizeDocuments(wrap(models.BPE(), WORDS, eos_token=None))


def test_a_prompt_has_no_eos():
    assert TokenizeDocuments(ByteTokenizer(False).build()).prompt("ab") == [97, 98]
