"""The shards of a corpus: in the cache, where damaged ones are written again, or prepared, where they are refused."""

import os

import pytest

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.shards import MANIFEST
from oumi_pl.data.store import cache_root
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.tiny import write_jsonl


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_high(file):
    """Makes the second token of a file larger than any of the vocabulary; of others, it harms other bytes."""
    content = bytearray(file.read_bytes())
    content[3] ^= 128
    file.write_bytes(content)


def opened(source):
    data = PretrainData(source, tokenizer=ByteTokenizer(), max_length=64)
    data.prepare_data()
    return data.shards("train")[0]


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Document {i} of the corpus."} for i in range(20)])


NAMES = ("tokens-00000.bin", "index-00000.npy", "keys.bin", "origins.txt", MANIFEST)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", [flip, flip_high, lambda file: file.unlink(), lambda file: os.truncate(file, 9)])
def test_damaged_shards_in_the_cache_are_written_again_with_a_line_that_says_so(source, capsys, name, harm):
    first = [ids.tolist() for ids in opened(source).read(0)]
    (directory,) = (cache_root() / "tokens").iterdir()
    whole = {file.name: file.read_bytes() for file in directory.iterdir()}
    harm(directory / name)
    assert [ids.tolist() for ids in opened(source).read(0)] == first
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == whole
    is_unfinished = name == MANIFEST and harm.__name__ == "<lambda>"  # then it is only finished
    assert is_unfinished or f"the cache folder {directory} is damaged: " in capsys.readouterr().err


def test_what_was_left_of_damaged_shards_does_not_block_the_cache(source, capsys):
    opened(source)
    (directory,) = (cache_root() / "tokens").iterdir()
    (directory / MANIFEST).unlink()
    (directory / "made_from.json").write_text("{")
    assert len(opened(source)) == 20
    assert "holds shards of other texts" in capsys.readouterr().err


def test_a_damaged_corpus_that_was_prepared_is_refused_by_name(source, tmp_path):
    directory = opened(source).directory
    prepared = directory.rename(tmp_path / "prepared")
    assert len(opened(str(prepared))) == 20
    flip(prepared / "tokens-00000.bin")
    with pytest.raises(UserError, match=r"prepared/tokens-00000.bin: bytes 0 to \d+ are not what .* prepare it again"):
        opened(str(prepared))[3]
    flip(prepared / "tokens-00000.bin")
    flip(prepared / "index-00000.npy")
    with pytest.raises(UserError, match=r"prepared/index-00000.npy: .*; prepare it again"):
        opened(str(prepared))
