"""TrainedBPE: trained once, on the training documents only; afterwards an ordinary tokenizer."""

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.splitting import is_held_out
from oumi_pl.data.tokenizers import SPECIAL_TOKENS, tokenizer_fingerprint
from oumi_pl.data.trained_bpe import TrainedBPE, first_bytes
from oumi_pl.errors import UserError
from tests.data.corpora import handed_out
from tests.tiny import write_jsonl

TEXTS = [f"the quick brown fox number {i} jumps over the lazy dog" for i in range(200)]


@pytest.fixture
def trained(monkeypatch):
    """Counts the trainings."""
    counted = []
    original = TrainedBPE._train
    monkeypatch.setattr(TrainedBPE, "_train", lambda self, *args: counted.append(1) or original(self, *args))
    return counted


def data(path, texts=TEXTS, vocab_size=320, **kwargs):
    rows = write_jsonl(path / "rows.jsonl", [{"text": text} for text in texts])
    return PretrainData(rows, tokenizer=TrainedBPE(vocab_size, **kwargs.pop("bpe", {})), max_length=32, **kwargs)


def test_it_has_the_requested_size_and_represents_any_text(tmp_path):
    tokenizer = data(tmp_path).tokenizer
    assert len(tokenizer) == 320
    assert len(tokenizer("the quick brown fox")["input_ids"]) < 10
    for text in ("the lazy dog", "漢字 and 👍🏽\n\t", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_it_is_trained_once_for_a_corpus(tmp_path, trained):
    prints = [tokenizer_fingerprint(data(tmp_path).tokenizer) for _ in range(3)]
    assert len(set(prints)) == 1
    assert len(trained) == 1
    assert tokenizer_fingerprint(data(tmp_path, vocab_size=300).tokenizer) not in prints
    assert tokenizer_fingerprint(data(tmp_path, TEXTS[:50]).tokenizer) not in prints
    assert tokenizer_fingerprint(data(tmp_path, bpe={"max_bytes": 99}).tokenizer) not in prints
    assert len(trained) == 4


def test_it_is_not_trained_on_held_out_documents(tmp_path):
    words = [f"{a}xqz{b}" for a in "abcdefgh" for b in "jkvw"]
    held = next(word for word in words if is_held_out(word, 0.3))
    trained = next(word for word in words if not is_held_out(word, 0.3))
    texts = [*TEXTS, *[held] * 500, *[trained] * 500]
    vocabulary = data(tmp_path, texts, validation=0.3).tokenizer.get_vocab()
    assert trained in vocabulary
    assert held not in vocabulary


def test_streamed_and_prepared_documents_train_the_same_tokenizer(tmp_path):
    batches = []
    for streaming in (False, True):
        built = data(tmp_path, streaming=streaming)
        built.prepare_data()
        built.setup("fit")
        batches.append(handed_out(built.train_dataloader()))
    assert batches[0] == batches[1]


def test_saved_it_is_an_ordinary_fast_tokenizer(tmp_path):
    tokenizer = data(tmp_path).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).get_vocab_size() == 320


def test_the_first_bytes_of_texts():
    assert list(first_bytes(iter(["abc", "dü", "e"]), 100)) == ["abc", "dü", "e"]
    assert list(first_bytes(iter(["abc", "dü", "e"]), 5)) == ["abc", "d"]
    assert list(first_bytes(iter(["abc", "dü", "e"]), 2)) == ["ab"]


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"data.tokenizer.vocab_size is 200, but bytes and special tokens .* 260"):
        TrainedBPE(200).build()
    with pytest.raises(UserError, match=r"data.tokenizer.max_bytes is 0"):
        TrainedBPE(300, 0).build()
    rows = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="TrainedBPE is trained on the documents of PretrainData"):
        SFTData(rows, tokenizer=TrainedBPE()).prepare_data()
    with pytest.raises(UserError, match=r"learns from data.train, and the recipe names no source"):
        _ = PretrainData(validation=rows, tokenizer=TrainedBPE()).tokenizer
    built = data(tmp_path)
    built.prepare_data()
    shards = built.shards("train")[0].directory
    with pytest.raises(UserError, match=r"TrainedBPE learns from texts, and .* holds tokens"):
        PretrainData(str(shards), tokenizer=TrainedBPE()).prepare_data()
