"""Reading an untrusted checkpoint runs no code that it names."""

import collections
import contextlib
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from oumi_pl.commands.export import built, load_checkpoint
from oumi_pl.errors import UserError
from oumi_pl.runs.checkpoints import META, read_sharded, weight_names
from oumi_pl.runs.received import METADATA, refuse_code, refuse_foreign
from tests.tiny import LLAMA

MODULE = """
from pathlib import Path
Path({marker!r}).touch()
from oumi_pl.modules.sft import SFT
from oumi_pl.losses.causal import CrossEntropy

class Evil(SFT):
    pass

class EvilLoss(CrossEntropy):
    pass

def evil(row):
    return None
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that writes a file when it is imported."""
    marker = tmp_path / "was-imported"
    (tmp_path / "evil_module.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return marker


def recipe(model=(), data=(), class_path="oumi_pl.modules.sft.SFT"):
    tokenizer = {"class_path": "oumi_pl.data.tokenizers.ByteTokenizer"}
    return {
        "model": {"class_path": class_path, "init_args": {"config": LLAMA} | dict(model)},
        "data": {
            "class_path": "oumi_pl.data.sft.SFTData",
            "init_args": {"train": "rows.jsonl", "tokenizer": tokenizer} | dict(data),
        },
    }


def checkpoint(tmp_path, config):
    path = tmp_path / "received.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "config": yaml.safe_dump(config)}, path)
    return path


TRAIN = {"path": "a.jsonl", "format": "evil_module.evil"}
SYSTEM = {"class_path": "os.system", "init_args": {"command": "x"}}
FOREIGN = {
    "model.class_path: evil_module.Evil": recipe(class_path="evil_module.Evil"),
    "model.loss.class_path: evil_module.EvilLoss": recipe({"loss": {"class_path": "evil_module.EvilLoss"}}),
    "model.architecture: evil_module.Evil": recipe({"architecture": "evil_module.Evil"}),
    "model.trust_remote_code: true": recipe({"trust_remote_code": True}),
    "data.train.format: evil_module.evil": recipe(data={"train": TRAIN}),
    "data.validation.format: evil_module.evil": recipe(data={"validation": [TRAIN]}),
    "data.tokenizer.class_path: evil_module.Evil": recipe(data={"tokenizer": {"class_path": "evil_module.Evil"}}),
    "data.reward: evil_module.evil": recipe(data={"reward": {"evil_module.evil": 1.0, "exact_match": 1.0}}),
    "data.train.where: evil_module.evil": recipe(data={"train": {"path": "a.jsonl", "where": "evil_module.evil"}}),
    "data.tokenizer.class_path: os.system": recipe(data={"tokenizer": SYSTEM}),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_recipes_that_name_foreign_code_are_refused(tmp_path, evil, what):
    with pytest.raises(UserError, match=r"would run code that its recipe names .*add --trust") as refused:
        load_checkpoint(checkpoint(tmp_path, FOREIGN[what]))
    assert what in str(refused.value)
    assert not evil.exists()


def test_foreign_code_runs_if_the_user_trusts_it(tmp_path, evil):
    config = recipe({"loss": {"class_path": "evil_module.EvilLoss"}})
    with pytest.raises((UserError, RuntimeError)):  # its weights are none of this model
        load_checkpoint(checkpoint(tmp_path, config), trust=True)
    assert evil.exists()


@pytest.mark.parametrize("what", [what for what in FOREIGN if re.search("format|where|reward", what)])
def test_an_export_needs_neither_formats_nor_rewards(tmp_path, evil, what):
    with pytest.raises(Exception, match="w") as failed:  # only the weights are wrong
        built(checkpoint(tmp_path, FOREIGN[what]))
    assert "trust" not in str(failed.value)
    assert not evil.exists()


@pytest.mark.parametrize("name", ["optimizer", "schedule"])
def test_the_optimizer_and_the_schedule_are_not_created(tmp_path, evil, name):
    config = recipe({name: {"class_path": "os.system", "init_args": {"command": f"touch {evil}"}}})
    with pytest.raises(Exception, match="w") as failed:  # only the weights are wrong
        built(checkpoint(tmp_path, config))
    assert "trust" not in str(failed.value)
    assert not evil.exists()


@pytest.mark.parametrize(
    "data",
    [
        {"reward": "exact_match"},
        {"reward": {"./v1.0/judge": 1.0}},  # a folder of a reward model
        {"train": {"path": "a.jsonl", "where": "score >= 3.5 and lang == 'en'"}},
    ],
)
def test_recipes_of_this_package_are_not_refused(data):
    refuse_foreign(recipe({"loss": {"class_path": "CrossEntropy"}}, data), Path("a.ckpt"))


# ---- sharded checkpoints


class Call:
    """Pickled as a call of `os.system`."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def sharded(folder):
    values = {"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "optimizer_0": {"state": {"w": {"step": 3}}}}
    dcp.save(values, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 1}, folder / META)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_whole_sharded_checkpoint_is_read(tmp_path):
    folder = sharded(tmp_path / "step-1.ckpt")
    assert torch.equal(read_sharded(folder)["state_dict"]["w"], torch.arange(6.0).view(2, 3))
    assert weight_names(folder) == {"w"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("read", [read_sharded, weight_names])
def test_calls_in_the_metadata_are_refused(tmp_path, read):
    folder, marker = sharded(tmp_path / "step-1.ckpt"), tmp_path / "was-called"
    (folder / METADATA).write_bytes(pickle.dumps(Call(f"touch {marker}")))
    with pytest.raises(UserError, match=r"it names (posix|nt|os)\.system, which no checkpoint needs"):
        read(folder)
    assert not marker.exists()


class Got:
    """Pickled as `getattr(owner, name)`."""

    def __init__(self, owner, name):
        self.reduced = getattr, (owner, name)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("owner", "name", "is_refused"),
    [
        (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", False),  # as Python 3.11.2 writes it
        (_MEM_FORMAT_ENCODING, "mro", True),
        (_MEM_FORMAT_ENCODING, "__members__", True),
        (Path, "unlink", True),
        (collections.OrderedDict, "fromkeys", True),
    ],
)
def test_nothing_but_members_of_enums_is_got_by_name(tmp_path, owner, name, is_refused):
    (tmp_path / METADATA).write_bytes(pickle.dumps(Got(owner, name)))
    with pytest.raises(UserError, match="it names getattr") if is_refused else contextlib.nullcontext():
        refuse_code(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "content", [b"", b"\x80\x05", b"not a pickle", pickle.dumps(torch.load), pickle.dumps(Path.unlink)]
)
def test_damaged_metadata_are_refused(tmp_path, content):
    folder = sharded(tmp_path / "step-1.ckpt")
    (folder / METADATA).write_bytes(content)
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        read_sharded(folder)
