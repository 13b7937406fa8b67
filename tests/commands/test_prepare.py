"""`prepare` writes shards that train like the texts they were made from; a killed one is continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from oumi_pl.commands.prepare import main
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.shards import MANIFEST
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.data.corpora import corpus, documents, handed_out
from tests.tiny import LLAMA, conversations, write_jsonl

ROOT = Path(__file__).parents[2]


def recipe(path, train, **data):
    sections = {
        "model": {"class_path": "SFT", "init_args": {"config": LLAMA}},
        "data": {
            "class_path": "oumi_pl.data.pretrain.PretrainData",
            "init_args": {"train": train, "tokenizer": {"class_path": "ByteTokenizer"}} | data,
        },
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return str(path / "recipe.yaml")


def batches(train, tokenizer, **kwargs):
    built = PretrainData(train, tokenizer=tokenizer, max_length=64, seed=0, **kwargs)
    built.prepare_data()
    built.setup("fit")
    return handed_out(built.train_dataloader()), handed_out(built.val_dataloader())


@pytest.mark.parametrize("streaming", [False, True])
def test_prepared_shards_give_the_same_batches_as_their_texts(tmp_path, capsys, streaming):
    rows = corpus(tmp_path, 60).path
    output = tmp_path / "out"
    settings = recipe(tmp_path, rows, validation=0.2, streaming=streaming)
    assert main(["--config", settings, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "train: corpus-60-0: " in printed
    assert f"in a recipe: train: {output}/train, validation: {output}/validation, tokenizer: " in printed
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    expected = batches(rows, tokenizer, validation=0.2)
    assert batches(str(output), tokenizer, validation=Source(str(output), split="validation")) == expected
    assert batches(f"{output}/train", tokenizer, validation=f"{output}/validation") == expected


def test_a_damaged_tokenizer_of_prepared_shards_is_refused(tmp_path):
    output = tmp_path / "out"
    main(["--config", recipe(tmp_path, corpus(tmp_path, 60).path), "--output", str(output)])
    file = output / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97'))
    with pytest.raises(UserError, match=r"data\.tokenizer: .* its file tokenizer\.json is not what its checksum says"):
        batches(str(output), str(output / "tokenizer"), validation=Source(str(output), split="validation"))


def test_each_of_several_sources_has_a_folder_of_its_own(tmp_path):
    paths = [corpus(tmp_path, n).path for n in (20, 10)]
    assert main(["--config", recipe(tmp_path, paths), "--output", str(tmp_path / "out")]) == 0
    tokenizer = str(tmp_path / "out" / "tokenizer")
    folders = [str(tmp_path / "out" / f"train-{i}") for i in (1, 2)]
    assert batches(folders, tokenizer) == batches(paths, tokenizer)
    with pytest.raises(UserError, match=r"several sources: name them one by one: .*train-1, .*train-2"):
        batches(str(tmp_path / "out"), tokenizer)


def test_without_an_output_folder_shards_go_to_the_cache(tmp_path, capsys, monkeypatch):
    path = corpus(tmp_path, 20).path
    assert main(["--config", recipe(tmp_path, path)]) == 0
    assert str(tmp_path / "cache" / "tokens") in capsys.readouterr().out
    monkeypatch.setattr("oumi_pl.data.corpus.write_shards", None)
    assert batches(path, ByteTokenizer())[0]


SLOW = """
import sys, time
from oumi_pl.data import shards
shards.SHARD_TOKENS = 5_000
write = shards._write_shard
shards._write_shard = lambda *args: (time.sleep(0.3), write(*args))[1]
from oumi_pl.commands.prepare import main
main(sys.argv[1:])
"""


def test_a_killed_preparation_is_continued(tmp_path, monkeypatch):
    """Nothing is there under the name of a whole before it is whole."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in documents(800)])
    settings = ["--config", recipe(tmp_path, rows), "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", SLOW, *settings, str(killed)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (killed / "train" / "index-00002.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert not (killed / "train" / MANIFEST).exists()
    with pytest.raises(UserError, match="preparing these shards was not finished"):
        batches(str(killed), ByteTokenizer())
    monkeypatch.setattr("oumi_pl.data.shards.SHARD_TOKENS", 5_000)
    for output in (killed, whole):
        assert main([*settings, str(output)]) == 0
    contents = [
        {file.name: file.read_bytes() for file in (output / "train").iterdir() if file.name[0] != "."}
        for output in (killed, whole)
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 10


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="prepare: the following arguments are required: --config"):
        main([])
    (tmp_path / "empty.yaml").write_text("model: {class_path: SFT}\n")
    with pytest.raises(UserError, match="prepare: the recipe has no section 'data'"):
        main(["--config", str(tmp_path / "empty.yaml")])
    (tmp_path / "file").write_text("")
    path = corpus(tmp_path, 5).path
    with pytest.raises(UserError, match=r"--output: .*file is a file; name a folder"):
        main(["--config", recipe(tmp_path, path), "--output", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"^data.shuffle_buffer is -1, but has to be at least 0$"):
        main(["--config", recipe(tmp_path, path, shuffle_buffer=-1)])
    chats = write_jsonl(tmp_path / "chats.jsonl", conversations(3))
    with pytest.raises(UserError, match=r"chats.jsonl:1: this row is a conversation"):
        main(["--config", recipe(tmp_path, chats), "--output", str(tmp_path / "out")])
    sft = yaml.safe_load(Path(recipe(tmp_path, chats)).read_text())
    sft["data"]["class_path"] = "SFTData"
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
    with pytest.raises(UserError, match="token shards are for PretrainData, and this recipe has SFTData"):
        main(["--config", str(tmp_path / "sft.yaml")])
    main(["--config", recipe(tmp_path, path), "--output", str(tmp_path / "done")])
    with pytest.raises(UserError, match="has been prepared already"):
        main(["--config", recipe(tmp_path, str(tmp_path / "done")), "--output", str(tmp_path / "again")])
    with pytest.raises(UserError, match="holds shards of other texts"):
        main(["--config", recipe(tmp_path, corpus(tmp_path, 6).path), "--output", str(tmp_path / "done")])
