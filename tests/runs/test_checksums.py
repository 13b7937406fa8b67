"""Damaged checkpoints and folders are noticed, whichever byte it is."""

import json
import os

import pytest
import torch

from oumi_pl.__main__ import main
from oumi_pl.data.tokenizers import ByteTokenizer, load_tokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model, read_checkpoint
from oumi_pl.models.hub import locate
from oumi_pl.models.lm import LM
from oumi_pl.runs import checksums
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from oumi_pl.runs.checksums import (
    LIST,
    MODEL,
    DamagedError,
    damage,
    refuse_damaged,
    refuse_damaged_tokenizer,
    refuse_damaged_weights,
    write_list,
)
from oumi_pl.runs.folders import CHECKPOINTS, checkpoint_name, newest_whole_checkpoint, saved_steps, set_aside
from tests.tiny import LLAMA

CONTENT = {"state_dict": {"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.bfloat16)}, "global_step": 3}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step-00000003.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def flipped(content, place, bit=0):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def is_same(content):
    same = content.keys() == CONTENT.keys() and content["global_step"] == CONTENT["global_step"]
    weights = content["state_dict"]
    return same and all(torch.equal(weights[name], value) for name, value in CONTENT["state_dict"].items())


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(checkpoint, first):
    whole, silent, noticed = checkpoint.read_bytes(), [], 0
    for place in range(first, len(whole), 5):
        checkpoint.write_bytes(flipped(whole, place, place % 8))
        try:
            if not is_same(read_checkpoint(checkpoint)):
                silent.append(place)
        except UserError:
            noticed += 1
    assert not silent
    assert noticed > 200  # the rest are gaps between the parts


@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint])
def test_a_damaged_checkpoint_is_refused_by_name(checkpoint, read):
    assert is_same(read(checkpoint))
    whole = checkpoint.read_bytes()
    weights = torch.arange(5.0).numpy().tobytes()
    checkpoint.write_bytes(flipped(whole, whole.index(weights) + 9))
    with pytest.raises(DamagedError, match=r"step-00000003\.ckpt is damaged: its part data/\d is not what"):
        read(checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_checkpoint_that_was_cut_short_is_refused(checkpoint, share):
    os.truncate(checkpoint, int(checkpoint.stat().st_size * share))
    with pytest.raises(UserError, match="cut short"):
        read_checkpoint(checkpoint)


def test_a_checkpoint_is_read_for_its_checksums_once(checkpoint, monkeypatch):
    assert damage(checkpoint) is None
    monkeypatch.setattr(checksums, "_damage_of_archive", lambda path: pytest.fail("was read again"))
    assert damage(checkpoint) is None


# ---- folders


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(range(100)))
    (folder / "b.json").write_text("{}")
    (folder / "empty").touch()
    write_list(folder)
    return folder


def test_a_flipped_bit_anywhere_in_a_folder_is_noticed(folder):
    assert damage(folder) is None
    for name in ("a.bin", "b.json", LIST):
        whole = (folder / name).read_bytes()
        for place in range(len(whole) - (name == LIST)):  # but for the line end of the list
            (folder / name).write_bytes(flipped(whole, place))
            assert damage(folder) is not None, (name, place)
        (folder / name).write_bytes(whole)


def test_missing_and_longer_files_of_a_folder_are_noticed(folder):
    with (folder / "empty").open("a") as file:
        file.write("x")
    with pytest.raises(DamagedError, match="store is damaged: its file empty has 1 bytes instead of 0"):
        refuse_damaged(folder)
    (folder / "empty").unlink()
    with pytest.raises(DamagedError, match="its file empty is missing"):
        refuse_damaged(folder)


def test_a_folder_of_an_older_version_has_no_list_and_is_not_checked(folder):
    (folder / LIST).unlink()
    (folder / "a.bin").write_bytes(b"")
    assert damage(folder) is None


# ---- models


@pytest.fixture
def model(tmp_path):
    """A small model folder, as it is exported."""
    tokenizer = ByteTokenizer().build()
    config = LLAMA | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": len(tokenizer)}
    export_model(LM(build_model(None, config=config, tokenizer=tokenizer)), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "refuse_damaged_part"),
    [
        ("model.safetensors", refuse_damaged_weights),
        (MODEL, refuse_damaged_weights),
        ("tokenizer.json", refuse_damaged_tokenizer),
        (MODEL, refuse_damaged_tokenizer),
    ],
)
def test_a_flipped_bit_anywhere_in_weights_or_tokenizer_of_a_model_is_noticed(model, name, refuse_damaged_part):
    refuse_damaged_part(model, "model")
    whole = (model / name).read_bytes()
    for place in range(0, len(whole) - (name == MODEL), 1 + len(whole) // 300):
        (model / name).write_bytes(flipped(whole, place))
        with pytest.raises(DamagedError, match=f"model: {model} is damaged"):
            refuse_damaged_part(model, "model")


def test_damaged_weights_are_neither_trained_on_nor_sampled_from(model, capsys):
    tokenizer = ByteTokenizer().build()
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(flipped(whole, len(whole) - 5))
    with pytest.raises(DamagedError, match=r"its file model\.safetensors is not what its checksum says"):
        build_model(str(model), tokenizer=tokenizer)
    assert main(["generate", "--model", str(model), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert f"if that was on purpose, delete {MODEL}" in error
    assert error.count("\n") == 1
    (model / MODEL).unlink()  # as a model of somebody else, which has no checksums
    build_model(str(model), tokenizer=tokenizer)


def swap_two_tokens(model):
    """Damage of a tokenizer that it loads with: two letters get each other's ids."""
    content = (model / "tokenizer.json").read_text()
    assert all(content.count(f'"{letter}": {ord(letter)}') == 1 for letter in "ab")
    swapped = content.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97')
    (model / "tokenizer.json").write_text(swapped)


def test_a_damaged_tokenizer_is_neither_trained_on_nor_sampled_from(model, capsys):
    swap_two_tokens(model)
    with pytest.raises(
        DamagedError, match=r"data\.tokenizer: .* its file tokenizer\.json is not what its checksum says"
    ):
        load_tokenizer(str(model))
    assert main(["generate", "--model", str(model), "--prompt", "a"]) == 2
    assert (
        f"tokenizer.json is not what its checksum says; if that was on purpose, delete {MODEL}"
        in capsys.readouterr().err
    )
    for key in ("model.reference", "model.teacher"):
        with pytest.raises(DamagedError, match=key):
            locate(str(model), key)
    (model / MODEL).unlink()
    assert load_tokenizer(str(model))("ab")["input_ids"] == [98, 97]


def test_other_files_of_a_model_may_be_edited(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 20_000.0}))
    (model / "README.md").write_text("my model")
    build_model(str(model), tokenizer=ByteTokenizer().build())


# ---- which checkpoint a run goes on from


def test_the_newest_whole_checkpoint_is_chosen_and_newer_ones_are_set_aside(tmp_path):
    (tmp_path / CHECKPOINTS).mkdir()
    paths = [tmp_path / CHECKPOINTS / checkpoint_name(step) for step in (2, 4, 6)]
    for path in paths:
        torch.save(CONTENT, path)
    assert newest_whole_checkpoint(tmp_path) == (paths[2], {})
    os.truncate(paths[2], 100)
    chosen, damaged = newest_whole_checkpoint(tmp_path)
    assert chosen == paths[1]
    assert [*damaged] == [paths[2]]
    set_aside(damaged)
    assert saved_steps(tmp_path / CHECKPOINTS) == paths[:2]
    assert paths[2].with_name("step-00000006.ckpt.damaged").is_file()
    for path in paths[:2]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged \(step-00000004.ckpt: it can't be read"):
        newest_whole_checkpoint(tmp_path)
