"""AdamW with states of 8 bits, from torchao: trained, saved and resumed like any optimizer."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from oumi_pl.__main__ import main
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.errors import UserError
from oumi_pl.models.export import read_checkpoint
from oumi_pl.modules.sft import SFT
from oumi_pl.runs.checkpoints import AtomicCheckpointIO, as_kept, is_sharded_checkpoint, read_tensors
from oumi_pl.runs.folders import newest_checkpoint
from tests import test_elastic
from tests.conftest import free_port
from tests.crash.harness import prepare
from tests.test_elastic import HALF, fit, recipe
from tests.test_sharded_checkpoints import run
from tests.tiny import LLAMA, data, distance, trainer

LARGE = LLAMA | {"hidden_size": 64, "intermediate_size": 128}
"""Weights of fewer than 4,096 values have states of 32 bits."""


def train(folder, optimizer, checkpoints=None, resume=None):
    """Trains for six updates; the module and its losses."""
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    L.seed_everything(0)
    module = SFT(config=LARGE, optimizer=optimizer)
    callbacks = [Losses(), *([] if checkpoints is None else [checkpoints])]
    loop = trainer(
        max_steps=6, callbacks=callbacks, enable_checkpointing=bool(checkpoints), plugins=[AtomicCheckpointIO()]
    )
    with torch.compiler.set_stance("force_eager"):  # its step would be compiled, which takes a minute
        loop.fit(module, data(folder, 32, batch_size=2), ckpt_path=resume)
    return module, losses


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_states_of_eight_bits_train_like_adamw_and_resume_exactly(tmp_path, asynchronous):
    low_bit = pytest.importorskip("torchao.optim")
    checkpoints = Checkpoints(every=3, keep=5, asynchronous=asynchronous)
    checkpoints.directory = tmp_path / "checkpoints"
    checkpoints.directory.mkdir()
    whole, losses = train(tmp_path, partial(low_bit.AdamW8bit, lr=1e-2), checkpoints)
    _, expected = train(tmp_path, partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01))
    assert losses == pytest.approx(expected, rel=1e-3)
    saved = read_tensors(checkpoints.directory / "step-00000003.ckpt")
    states = saved["optimizer_states"][0]["state"].values()
    assert any(type(state["exp_avg"]) is low_bit.subclass_8bit.OptimState8bit for state in states)
    resumed, later = train(
        tmp_path, partial(low_bit.AdamW8bit, lr=1e-2), resume=checkpoints.directory / "step-00000003.ckpt"
    )
    assert later == losses[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_without_torchao_the_extra_is_named(tmp_path, monkeypatch, capsys):
    optimizer = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1e-2}}
    prepare(tmp_path / "run", changes={"model.init_args.optimizer": optimizer})
    monkeypatch.chdir(tmp_path / "run")
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert main(["fit", "--config", "r.yaml"]) == 2
    assert "torchao.optim.AdamW8bit needs torchao: pip install 'oumi_pl[low-bit]'" in capsys.readouterr().err


def test_a_file_with_its_states_names_the_extra_as_well(tmp_path, monkeypatch):
    import pickle

    def unknown(*_, **__):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL torchao.optim.subclass_8bit.OptimState8bit")

    monkeypatch.setattr(torch, "load", unknown)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'oumi_pl\[low-bit\]'"):
        read_tensors(tmp_path / "x.ckpt")


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_read_as_floats_is_quantized_again(signed):
    low_bit = pytest.importorskip("torchao.optim.subclass_8bit")
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    state = low_bit.OptimState8bit.zeros((64, 128), signed)
    state.copy_(values if signed else values.abs())
    again = as_kept(state.dequantize(), low_bit.OptimState8bit.zeros((64, 128), signed))
    assert torch.equal(again.codes, state.codes)
    torch.testing.assert_close(again.dequantize(), state.dequantize(), rtol=1e-6, atol=0)
    floats = as_kept(state, torch.zeros(64, 128))
    assert torch.equal(floats, state.dequantize())
    assert as_kept(state, low_bit.OptimState8bit.zeros((64, 128))) is state


LAYOUTS = {"one process": (1, "auto"), "two shards": (2, "fsdp2")}


@pytest.mark.slow
def test_two_shards_train_as_one_process_and_go_on_exactly_or_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("torchao.optim")
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    recipe(tmp_path)
    tree = yaml.safe_load((tmp_path / "r.yaml").read_text())
    tree["model"]["init_args"]["optimizer"] = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1e-2}}
    tree["model"]["init_args"]["config"] |= {"hidden_size": 128, "intermediate_size": 256}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    for resume in ("", "resume"):
        for processes in (1, 2):
            worker = [sys.executable, __file__, str(tmp_path), str(processes), resume]
            environment = os.environ | {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
            ended = subprocess.run(worker, capture_output=True, text=True, timeout=900, env=environment)
            assert ended.returncode == 0, ended.stderr[-3000:]
    ended = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(ended) == 2 + 4
    assert not {name: result["err"][-2000:] for name, result in ended.items() if result["code"]}
    shards = tmp_path / f"runs/two shards/checkpoints/step-{HALF:08d}.ckpt"
    assert is_sharded_checkpoint(shards)
    assert sum(file.stat().st_size for file in shards.glob("*.distcp")) < 0.6 * floats_of(shards)
    final = {name: read_checkpoint(newest_checkpoint(tmp_path / "runs" / name))["state_dict"] for name in ended}
    assert distance(final["two shards"], final["one process"]) < 1e-3  # a value between two codes takes either
    for source in LAYOUTS:
        for target in LAYOUTS:
            apart = distance(final[f"{source} to {target}"], final[source])
            assert apart == 0 if source == target else apart < 1e-3, (source, target, apart)


def floats_of(checkpoint):
    """Bytes of weights, and of both states if they were floats."""
    return 3 * sum(4 * weight.numel() for weight in read_checkpoint(checkpoint)["state_dict"].values())


if __name__ == "__main__":  # on several processes: Lightning starts the others by running this file again
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    test_elastic.LAYOUTS = LAYOUTS
    for layout, (processes, _) in LAYOUTS.items():
        for source in LAYOUTS if sys.argv[3] else [None]:
            if processes == int(sys.argv[2]):
                result = run(fit(layout, source))
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    Path(f"{layout if source is None else f'{source} to {layout}'}.json").write_text(json.dumps(result))
