"""What FSDP2 on two processes must not change: unknown logits are refused, and packs don't leak."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oumi_pl.modules.sft import SFT
from tests.architectures import small
from tests.modules.test_base import FALCON_H1
from tests.tiny import data, distance, fit, sgd

CONFIGS = {
    # Its convolution leaks into the first 3 positions of a document, which carry no loss; a second layer reads them.
    "falcon_h1": FALCON_H1 | {"lm_head_multiplier": 1.0, "num_hidden_layers": 2},
    "recurrent_gemma": small("recurrent_gemma") | {"num_hidden_layers": 3, "vocab_size": 260},
}
"""Models whose recurrent layers read across the documents of a row."""
WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from lightning.pytorch.strategies import ModelParallelStrategy
from oumi_pl.errors import UserError
from oumi_pl.models.lm import LM
from tests.modules.test_base import FALCON_H1
from tests.modules.test_sharded import CONFIGS, packed_data
from oumi_pl.modules.sft import SFT
from tests.tiny import fit, sgd
out, fault = Path(sys.argv[1]), sys.argv[2]
if fault == "unchecked":
    LM.refuse_unknown_logits = lambda self: None
elif fault == "leaking":
    import oumi_pl.models.lm as lm
    lm.choose_layout = lambda *_: (lm.documents, "")

def trained(config):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    sft = SFT(config=config, optimizer=sgd)
    weights = fit(sft, packed_data(out), max_steps=2, devices=2, strategy=strategy)
    loss = float(sft.trainer.callback_metrics["train/loss"])
    return {{n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}} | {{"loss": loss}}

results = {{name: trained(config) for name, config in CONFIGS.items()}}
try:
    results["unknown"] = trained(FALCON_H1)
except UserError as error:
    results["unknown"] = str(error)
if torch.distributed.get_rank() == 0:
    torch.save(results, out / "results.pt")
"""


def packed_data(path):
    return data(path, 12, batch_size=1, packing=True, max_length=256, group_by_length=False)


def on_two_processes(path, fault="none"):
    script = path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    packed_data(path).stores("train")  # both processes find it in the cache
    done = subprocess.run(
        [sys.executable, str(script), str(path), fault],
        env=os.environ | {"OUMI_PL_CACHE": os.environ["OUMI_PL_CACHE"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path / "results.pt", weights_only=True)


def alone(path, name):
    """One process, and a row for each document."""
    sft = SFT(config=CONFIGS[name], optimizer=sgd)
    weights = fit(sft, packed_data(path), max_steps=2, accumulate_grad_batches=2)
    return weights, float(sft.trainer.callback_metrics["train/loss"])


@pytest.mark.slow
def test_two_processes_train_and_refuse_like_one(tmp_path):
    results = on_two_processes(tmp_path)
    assert "FalconH1ForCausalLM computes its logits in a way that is not supported" in results["unknown"]
    for name in CONFIGS:
        weights, loss = alone(tmp_path, name)
        result = results[name]
        assert result.pop("loss") == pytest.approx(loss, rel=1e-5)
        assert distance(result, weights) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["unchecked", "leaking"])
def test_a_sharded_run_without_the_checks_would_be_caught(tmp_path, fault):
    results = on_two_processes(tmp_path, fault)
    if fault == "unchecked":
        assert results["unknown"]["loss"] > 0  # trained, on a loss that is not the model's
        return
    distances = {}
    for name in CONFIGS:
        weights, _ = alone(tmp_path, name)
        results[name].pop("loss")
        distances[name] = distance(results[name], weights)
    assert min(distances.values()) > 3e-5  # three times what is allowed above
    assert max(distances.values()) > 1e-3
