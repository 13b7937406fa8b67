"""Tensor parallelism, alone and under FSDP2 and HSDP: the model of one process, trained as one process trains it."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.sft import SFT
from oumi_pl.types import TokenLoss
from tests.conftest import free_port
from tests.models.test_lora import pretrained
from tests.models.test_sharding import LORA, Start
from tests.tiny import LLAMA, data, distance, dpo, dpo_data, fit, kto, kto_data, module, reward, reward_data, sgd

BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16, "pad_token_id": 0}
GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": None}
sft = functools.partial(SFT, optimizer=sgd)
UPDATES, ROWS = 3, 4
B = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {t: B | {"model_type": t} for t in ("phi3", "olmo2", "gpt_neox", "gemma2", "cohere", "smollm3", "granite", "mistral", "qwen2", "glm4", "starcoder2", "stablelm", "olmo3", "cohere2", "seed_oss", "helium", "glm", "phi", "nemotron", "exaone4", "ernie4_5", "apertus", "hunyuan_v1_dense", "arcee", "diffllama")}
OTHERS["gpt_neox"].pop("num_key_value_heads"); OTHERS["helium"]["head_dim"]=8; OTHERS["hunyuan_v1_dense"]["head_dim"]=8; OTHERS["seed_oss"] |= {"attention_dropout":0.0,"residual_dropout":0.0}
OTHERS["gemma2"] |= {"head_dim": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8}


class Squared(TokenLoss):
    def __call__(self, logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none") ** 2


def distill(folder):
    from oumi_pl.modules.distill import Distill
    return Distill(model=str(folder / "qwen3"), teacher=str(folder / "llama"), optimizer=sgd)


def distill_data(folder):
    return data(folder)


def make_pretrained(folder: Path) -> None:
    """The folders of models that the cases load."""
    pretrained(folder / "llama", **LLAMA)
    pretrained(folder / "biased", **BIASED)
    pretrained(folder / "odd", room=1, **QWEN3)
    pretrained(folder / "qwen3", **QWEN3)  # tied, with norms of single heads
    pretrained(folder / "gemma3", **GEMMA3)  # tied, with a scale on embeddings


def cases(folder: Path) -> dict:
    """Name -> a module, its data, and settings of the trainer."""
    packed: dict = {"packing": True, "max_length": 64, "group_by_length": False}
    base = {name: str(folder / name) for name in ("llama", "biased", "qwen3", "gemma3")}
    smooth = {"class_path": "oumi_pl.losses.causal.CrossEntropy"}
    from oumi_pl.losses.causal import CrossEntropy

    del smooth
    return {
        "packed": (lambda: sft(model=base["llama"]), lambda: data(folder, **packed), {}),
        "biased": (lambda: sft(model=base["biased"]), lambda: data(folder), {}),
        "qwen3": (lambda: sft(model=base["qwen3"]), lambda: data(folder, **packed), {}),
        "gemma3": (lambda: sft(model=base["gemma3"]), lambda: data(folder), {}),
        "smoothed": (
            lambda: sft(model=base["qwen3"], loss=CrossEntropy(label_smoothing=0.1, z_loss=1e-3)),
            lambda: data(folder),
            {},
        ),
        "clipped": (lambda: sft(model=base["qwen3"]), lambda: data(folder), {"gradient_clip_val": 0.1}),
        "random": (lambda: module(), lambda: data(folder, **packed), {}),
        "pretrain": (lambda: Pretrain(config=QWEN3, optimizer=sgd), lambda: data(folder), {}),
        "lora": (lambda: sft(model=base["biased"], lora=LORA), lambda: data(folder, **packed), {}),
        "lora on random": (lambda: module(lora=LORA), lambda: data(folder), {}),
        "reward": (lambda: reward(base["llama"]), lambda: reward_data(folder), {}),
        "dpo": (lambda: dpo(base["llama"]), lambda: dpo_data(folder), {}),
        "dpo, a copy": (lambda: dpo(base["qwen3"], reference="online"), lambda: dpo_data(folder), {}),
        "kto": (lambda: kto(base["llama"]), lambda: kto_data(folder), {}),
        "odd": (lambda: sft(model=str(folder / "odd")), lambda: data(folder, **packed), {}),
        "odd dpo": (lambda: dpo(str(folder / "odd")), lambda: dpo_data(folder), {}),
        "squared": (lambda: sft(model=base["qwen3"], loss=Squared()), lambda: data(folder), {}),
        "bf16": (lambda: sft(model=base["qwen3"]), lambda: data(folder), {"precision": "bf16-mixed"}),
        "bf16 true": (lambda: sft(model=base["qwen3"], lora=LORA), lambda: data(folder), {"precision": "bf16-true"}),
        "frozen": (lambda: sft(model=base["qwen3"], freeze=["model.embed_tokens"]), lambda: data(folder), {}),
        "distill": (lambda: distill(folder), lambda: distill_data(folder), {}),
        **{k: (lambda k=k, c=c: sft(config=c), lambda: data(folder), {}) for k, c in OTHERS.items()},
        "muon": (lambda: sft(model=base["qwen3"], optimizer=lambda p: __import__("oumi_pl.optim.muon").optim.muon.MuonAdamW(p, lr=0.01)), lambda: data(folder), {}),
        "lora on phi3": (lambda: sft(config=OTHERS["phi3"], lora=LORA), lambda: data(folder), {}),
        "checkpointing": (
            lambda: sft(model=base["qwen3"], gradient_checkpointing=True),
            lambda: data(folder, **packed),
            {},
        ),
    }


def trained(folder: Path, name: str, ranks: int, **trainer) -> tuple[dict, L.LightningModule, Start]:
    """Trains a case with the same rows per update on any number of ranks that read rows."""
    make_module, make_data, settings = cases(folder)[name]
    start, pl_module, rows = Start(), make_module(), make_data()
    rows.batch_size = ROWS // 4
    settings = settings | {"max_steps": UPDATES, "accumulate_grad_batches": 4 // ranks, "callbacks": [start]} | trainer
    return fit(pl_module, rows, **settings), pl_module, start


WORKER = """
import sys, json, torch, traceback
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import oumi_pl.models.sharding as sharding
from tests.models.test_tensor_parallel import trained
out, ranks, sizes, fault = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
results = {{}}
for name in sys.argv[5:]:
    strategy = sharding.Sharded(**sizes, process_group_backend="gloo")
    try:
        weights, module, start = trained(out, name, ranks // sizes["tensor"], devices=ranks, strategy=strategy)
    except Exception as e:
        print("FAILED", name, type(e), str(e)[:600], file=sys.stderr)
        traceback.print_exc()
        continue
    weights = {{n: sharding.whole(p) for n, p in weights.items()}}
    metrics = {{n: float(v) for n, v in module.trainer.callback_metrics.items()}}
    results[name] = {{"weights": weights, "metrics": metrics, "start": start.fingerprint}}
if torch.distributed.get_rank() == 0:
    torch.save(results, out / "results.pt")
"""


def on_processes(folder: Path, ranks: int, names, fault="none", **sizes) -> dict:
    """What a run of each case on several processes comes to; they are started once, since that takes longest."""
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    environment = {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), "OUMI_PL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(ranks), json.dumps({"tensor": 2} | sizes), fault, *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    sys.stderr.write(done.stderr)
    return torch.load(folder / "results.pt", weights_only=True)
