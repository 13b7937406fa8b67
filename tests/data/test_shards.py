"""Shards: documents are read as they were written, a killed preparation is resumed, damage is noticed."""

import json
import os
import signal
import socket
from collections import Counter

import numpy as np
import pytest

from oumi_pl.data.documents import TokenizeDocuments
from oumi_pl.data.shards import MANIFEST, Shards, write_shards
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import DamagedError
from tests.data.corpora import documents

TEXTS = documents(60)
MADE_FROM = {"tokenizer": "bytes", "source": "these"}


def tokenize():
    return TokenizeDocuments(ByteTokenizer(chat_template=False).build())


def write(directory, texts=TEXTS, **kwargs):
    def read(counts):
        for text in texts:
            counts["rows"] += 1
            yield text

    write_shards(directory, read, tokenize(), kwargs.pop("made_from", MADE_FROM), name="texts", **kwargs)
    return Shards(directory, "bytes")


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if not file.name.startswith(".")}


@pytest.mark.parametrize("shard_tokens", [1, 700, 1 << 26])
def test_documents_are_read_as_they_were_written(tmp_path, shard_tokens):
    shards = write(tmp_path, shard_tokens=shard_tokens)
    expected = [document.ids.tolist() for document in tokenize()(TEXTS)]
    for start in (0, 1, 30, 59, 60):
        assert [ids.tolist() for ids in shards.read(start)] == expected[start:]
    assert [shards[i].ids.tolist() for i in range(60)] == expected
    assert [shards[i][1:] for i in range(60)] == [document[1:] for document in tokenize()(TEXTS)]
    assert shards.lengths.tolist() == [len(ids) for ids in expected]
    assert shards.tokens == sum(map(len, expected))
    assert shards.manifest["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert shards.manifest["report"]["rows"] == 60
    sizes = [shard["tokens"] for shard in shards.manifest["shards"]]
    assert all(size >= shard_tokens for size in sizes[:-1])
    assert len(sizes) == {1: 60, 1 << 26: 1}.get(shard_tokens, len(sizes))


@pytest.mark.parametrize("killed_after", [0, 1, 25, 59])
def test_a_killed_and_restarted_preparation_writes_the_same_bytes(tmp_path, killed_after):
    write(tmp_path / "whole", shard_tokens=700)

    def dying():
        yield from TEXTS[:killed_after]
        raise KeyboardInterrupt

    # one document at a time, so that the kill comes where it is said to come
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oumi_pl.data.documents.CHUNK_DOCUMENTS", 1)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "killed", dying(), shard_tokens=700)
    assert not (tmp_path / "killed" / MANIFEST).exists()
    kept = content(tmp_path / "killed")
    write(tmp_path / "killed", shard_tokens=700)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert all(content(tmp_path / "killed")[name] == value for name, value in kept.items())
    assert not [file for file in (tmp_path / "killed").iterdir() if file.name.startswith(".")]


def test_what_a_killed_process_was_writing_is_removed_at_the_next_start(tmp_path):
    def dying():
        yield from TEXTS[:25]
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oumi_pl.data.documents.CHUNK_DOCUMENTS", 1)
        child = os.fork()
        if child == 0:
            write(tmp_path, dying(), shard_tokens=700)
        os.waitpid(child, 0)
    (tmp_path / f".keys.bin.{os.getppid()}@{socket.gethostname()}.half").touch()  # of one that still runs
    left = {file.name.partition(f".{child}@")[0] for file in tmp_path.glob(".*.half") if str(child) in file.name}
    assert {".keys.bin", ".origins.txt"} < left
    assert len(left) == 3, "and the tokens of a shard"
    write(tmp_path, shard_tokens=700)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == [
        f".keys.bin.{os.getppid()}@{socket.gethostname()}.half"
    ]


def test_whole_shards_are_not_tokenized_again(tmp_path, monkeypatch):
    write(tmp_path, shard_tokens=700)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "index-00002.npy").unlink()  # as if killed while the third one was written
    counted = Counter()
    original = TokenizeDocuments.__call__

    def counting(self, texts):
        counted["documents"] += len(texts)
        return original(self, texts)

    monkeypatch.setattr(TokenizeDocuments, "__call__", counting)
    shards = write(tmp_path, shard_tokens=700)
    assert counted["documents"] == 60 - sum(shard["documents"] for shard in shards.manifest["shards"][:2])
    write(tmp_path, shard_tokens=700)
    assert counted["documents"] < 60, "what is complete is left as it is"


@pytest.mark.parametrize("change", [{"made_from": MADE_FROM | {"source": "others"}}, {"shard_tokens": 800}])
def test_shards_of_other_texts_are_not_continued(tmp_path, change):
    write(tmp_path, shard_tokens=700)
    with pytest.raises(UserError, match="holds shards of other texts, another tokenizer or other settings"):
        write(tmp_path, **({"shard_tokens": 700} | change))
    (tmp_path / "made_from.json").unlink()
    with pytest.raises(UserError, match="holds shards of unknown origin"):
        write(tmp_path, shard_tokens=700)


def test_damaged_shards_are_an_error_that_names_the_file(tmp_path):
    write(tmp_path, shard_tokens=700)
    tokens, index = tmp_path / "tokens-00001.bin", tmp_path / "index-00001.npy"
    size, whole, ids = tokens.stat().st_size, index.read_bytes(), tokens.read_bytes()
    with tokens.open("r+b") as file:
        file.truncate(size - 2)
    with pytest.raises(UserError, match=rf"tokens-00001.bin: holds {size - 2} bytes, where the manifest says {size}"):
        Shards(tmp_path, "bytes")
    tokens.write_bytes(ids)
    index.write_bytes(whole[:-24])
    with pytest.raises(UserError, match=r"index-00001.npy: "):
        Shards(tmp_path, "bytes")
    np.save(index, np.load(tmp_path / "index-00000.npy"))
    with pytest.raises(UserError, match=r"index-00001.npy: doesn't match its shard"):
        Shards(tmp_path, "bytes")
    index.unlink()
    with pytest.raises(UserError, match=r"index-00001.npy: missing or damaged"):
        Shards(tmp_path, "bytes")
    index.write_bytes(whole)
    Shards(tmp_path, "bytes")
    with pytest.raises(UserError, match="made with another tokenizer"):
        Shards(tmp_path, "words")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(UserError, match="another version of oumi_pl"):
        Shards(tmp_path, "bytes")


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_of_tokens_is_an_error_when_its_block_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("oumi_pl.data.shards.BLOCK", 256)
    write(tmp_path, shard_tokens=700)
    tokens = tmp_path / "tokens-00001.bin"
    flip(tokens, 600)
    shards = Shards(tmp_path, "bytes")
    number = int(shards.starts[1])
    assert len(shards[number].ids)  # in another block
    place = number + int(np.searchsorted(shards._indices[1][:, 0], 300, side="right"))
    damaged = r"tokens-00001.bin: bytes 512 to 768 are not what their checksum says"
    for read in (lambda: shards[place], lambda: list(shards.read(number)), shards.check):
        with pytest.raises(DamagedError, match=damaged):
            read()
    flip(tokens, 600)
    Shards(tmp_path, "bytes").check()


@pytest.mark.parametrize("name", [MANIFEST, "index-00001.npy"])
def test_a_flipped_bit_anywhere_in_manifest_or_index_is_an_error(tmp_path, name):
    write(tmp_path, shard_tokens=700)
    whole = (tmp_path / name).read_bytes()
    for place in range(0, len(whole), 5):
        flip(tmp_path / name, place)
        with pytest.raises(UserError, match=r"prepare (it|them) again"):
            Shards(tmp_path, "bytes")
        (tmp_path / name).write_bytes(whole)


def test_shards_of_an_older_version_have_no_checksums_and_are_read(tmp_path):
    write(tmp_path, shard_tokens=700)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["crc32"]
    for shard in manifest["shards"]:
        del shard["tokens_crc32"], shard["index_crc32"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    flip(tmp_path / "tokens-00001.bin", 600)
    shards = Shards(tmp_path, "bytes")
    shards.check()
    assert sum(len(ids) for ids in shards.read(0)) == shards.tokens
