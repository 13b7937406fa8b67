"""FSDP2 and HSDP on two and four processes: they build the model of one process, and train it as one process does."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.distributed.tensor import DTensor

from oumi_pl.attention import interface
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models import sharding
from oumi_pl.models.build import build_model
from oumi_pl.models.fingerprint import weights_fingerprint
from oumi_pl.models.lm import States
from oumi_pl.models.recomputation import EveryNth, Offload, Selective
from oumi_pl.models.sharding import Parts, Sharded, Structure
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.sft import SFT
from tests.conftest import free_port
from tests.models.test_lora import plain_tokenizer, pretrained
from tests.tiny import LLAMA, data, distance, dpo, dpo_data, fit, module, reward, reward_data, sgd, write_jsonl

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512} | dict.fromkeys(
    ("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0
)
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LORA = {"r": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Rows of whole blocks of weights that share a scale once they are quantized."""
sft = functools.partial(SFT, optimizer=sgd)
UPDATES, ROWS = 2, 4


def multiply_exactly(setattr=setattr) -> None:
    """Makes 4-bit layers compute in float32: bfloat16 would blow up differences in the last digits."""
    from bitsandbytes.nn import Linear4bit

    setattr(Linear4bit, "compute_dtype", property(lambda layer: torch.float32, lambda layer, dtype: None))


class Start(L.Callback):
    """Remembers the fingerprint of the initial weights, and how the ranks got them."""

    fingerprint = loading = ""

    def on_fit_start(self, trainer, pl_module):
        weights = list(pl_module.parameters())
        assert trainer.world_size == 1 or all(isinstance(weight, DTensor) for weight in weights)
        self.fingerprint = weights_fingerprint(pl_module.causal_lm)
        self.loading = type(pl_module._LanguageModule__weight_loading).__name__

    def on_train_start(self, trainer, pl_module):
        meshes = {weight.device_mesh for weight in pl_module.parameters() if trainer.world_size > 1}
        assert len(meshes) < 2, "weights are gathered before the first update"


def made_pretrained(folder: Path) -> None:
    """The folders of models that the cases load."""
    pretrained(folder / "llama", **LLAMA)
    pretrained(folder / "tied", **GPT2)  # with biases, too
    pretrained(folder / "experts", **QWEN3_MOE)
    pretrained(folder / "plain", plain_tokenizer(), **LLAMA)
    pretrained(folder / "wide", **LLAMA | WIDE)


def cases(folder: Path) -> dict:
    """Name -> a module, its data, and how the first rank gets the weights."""
    packed: dict = {"packing": True, "max_length": 64, "group_by_length": False}
    base = {name: str(folder / name) for name in ("llama", "tied", "experts", "plain", "wide")}
    qlora = {"model": base["wide"], "lora": LORA, "quantization": "nf4"}
    second, selective = ({"gradient_checkpointing": policy} for policy in (EveryNth(2), Selective()))
    elsewhere = {"gradient_checkpointing": Offload(recompute=False)}
    own_tokenizer = {"tokenizer": None, "template": "chatml"}
    return {
        "pretrained": (lambda: sft(model=base["llama"]), lambda: data(folder, **packed), "Parts"),
        "tied": (lambda: sft(model=base["tied"]), lambda: data(folder), "Parts"),
        "experts": (lambda: sft(model=base["experts"]), lambda: data(folder, **packed), "Parts"),
        "random": (lambda: module(), lambda: data(folder, **packed), "FirstRank"),
        "scaled": (lambda: Pretrain(config=LLAMA, optimizer=sgd), lambda: data(folder), "FirstRank"),
        "lora": (lambda: sft(model=base["llama"], lora=LORA), lambda: data(folder, **packed), "Parts"),
        "lora on experts": (lambda: sft(model=base["experts"], lora=LORA), lambda: data(folder), "Parts"),
        "lora on random": (lambda: module(lora=LORA), lambda: data(folder), "FirstRank"),
        "dora": (lambda: sft(model=base["llama"], lora=LORA | {"use_dora": True}), lambda: data(folder), "Loading"),
        "new tokens": (lambda: sft(model=base["plain"]), lambda: data(folder, **own_tokenizer), "FirstRank"),
        "reward": (lambda: reward(base["llama"]), lambda: reward_data(folder), "Parts"),
        "dpo": (lambda: dpo(base["llama"]), lambda: dpo_data(folder), "Parts"),
        "dpo, a copy": (lambda: dpo(base["llama"], reference="online"), lambda: dpo_data(folder), "Parts"),
        "qlora": (lambda: sft(**qlora, gradient_checkpointing=True), lambda: data(folder, **packed), "Loading"),
        "qlora, dpo": (lambda: dpo(**qlora), lambda: dpo_data(folder), "Loading"),
        "qlora, offloaded": (lambda: sft(**qlora), lambda: data(folder, **packed), "Loading"),
        "lora, offloaded": (lambda: sft(model=base["llama"], lora=LORA), lambda: data(folder, **packed), "Parts"),
        "random, offloaded": (lambda: module(), lambda: data(folder, **packed), "FirstRank"),
        "dpo, a copy, offloaded": (lambda: dpo(base["llama"], reference="online"), lambda: dpo_data(folder), "Parts"),
        "selective": (lambda: sft(model=base["tied"], **selective), lambda: data(folder), "Parts"),
        "lora, every second": (lambda: sft(model=base["llama"], **second, lora=LORA), lambda: data(folder), "Parts"),
        "dpo, selective": (
            lambda: dpo(base["llama"], reference="online", **selective),
            lambda: dpo_data(folder),
            "Parts",
        ),
        "fp8": (lambda: sft(model=base["llama"], fp8="emulated"), lambda: data(folder, **packed), "Parts"),
        "dpo, fp8": (lambda: dpo(base["llama"], reference="online", fp8="emulated"), lambda: dpo_data(folder), "Parts"),
        "kept elsewhere": (lambda: sft(model=base["llama"], **elsewhere), lambda: data(folder, **packed), "Parts"),
        "dpo, moving": (lambda: dpo(base["tied"], sync_every=1), lambda: dpo_data(folder), "Parts"),
    }


def as_bytes(weights: dict) -> dict:
    """Quantized weights `[bytes, 1]` as numbers, in whatever dtype they are stored; others as they are."""
    return {n: w.view(torch.uint8).flatten().float() if w.shape[1:] == (1,) else w for n, w in weights.items()}


def trained(folder: Path, name: str, ranks: int, **trainer) -> tuple[dict, L.LightningModule, Start]:
    """Trains a case with the same rows per update on any number of ranks."""
    make_module, make_data, _ = cases(folder)[name]
    start, pl_module, rows = Start(), make_module(), make_data()
    rows.batch_size = ROWS // 4
    settings = {"max_steps": UPDATES, "accumulate_grad_batches": 4 // ranks, "callbacks": [start]} | trainer
    weights = fit(pl_module, rows, **settings)
    return (as_bytes(weights) if ranks == 1 else weights), pl_module, start


WORKER = """
import sys, torch
from pathlib import Path
from torch.distributed.fsdp import FSDPModule
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import oumi_pl.models.sharding as sharding
from tests.models.test_sharding import as_bytes, multiply_exactly, trained
out, ranks, replicas, fault = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if fault == "untied":
    def replace_each(model, replace):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    setattr(module, name, replace(weight))
    sharding._replace_parameters = replace_each
    sharding._detach_values = lambda *args, take=sharding._detach_values: (
        (values := take(*args)) | {{"hf.lm_head.weight": values["hf.transformer.wte.weight"].clone()}}
    )
elif fault == "no biases":
    part = sharding._part
    sharding._part = lambda value, *share: part(value * (value.ndim > 1), *share)
elif fault == "mean over one dimension":
    mesh = sharding._mesh
    sharding._mesh = lambda module: mesh(module)["shard"]
elif fault == "scales of another layer":
    import bitsandbytes, oumi_pl.modules.base as base
    def shard_and_swap(model, *args, **kwargs):
        copy = sharding.shard(model, *args, **kwargs)
        first, *_, last = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit) and
                           m.in_features == m.out_features]
        first.quant_state, last.quant_state = last.quant_state, first.quant_state
        return copy
    base.shard = shard_and_swap
elif fault == "adapters on in the reference":
    import contextlib, peft
    peft.PeftModel.disable_adapter = lambda self: contextlib.nullcontext()
if any("qlora" in name for name in sys.argv[5:]):
    multiply_exactly()
results = {{}}
for name in sys.argv[5:]:
    is_offloaded = "offloaded" in name
    strategy = sharding.Sharded(replicas=replicas, offload=is_offloaded, process_group_backend="gloo")
    weights, module, start = trained(out, name, ranks, devices=ranks, strategy=strategy)
    weights = as_bytes({{n: sharding.whole(p) for n, p in weights.items()}})
    groups = [m._get_fsdp_state()._fsdp_param_group for m in module.modules() if isinstance(m, FSDPModule)]
    assert all(part.offload_to_cpu == is_offloaded for group in groups for part in group.fsdp_params)
    results[name] = {{"weights": weights, "loss": float(module.trainer.callback_metrics["train/loss"]),
                     "start": start.fingerprint, "loading": start.loading, "notes": module.notes}}
if torch.distributed.get_rank() == 0:
    torch.save(results, out / "results.pt")
"""


def on_processes(folder: Path, ranks: int, names, replicas=1, fault="none") -> dict:
    """What a run of each case on several processes comes to; they are started once, since that takes longest."""
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    environment = {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), "OUMI_PL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(ranks), str(replicas), fault, *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


def distances(folder: Path, results: dict) -> dict[str, float]:
    """How far the weights of each case are from those of one process, relative to their size."""
    expected = {name: trained(folder, name, 1)[0] for name in results}
    common = {name: {key: result["weights"][key] for key in expected[name]} for name, result in results.items()}
    return {name: distance(weights, expected[name]) for name, weights in common.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    multiply_exactly(functools.partial(monkeypatch.setattr, raising=False))
    made_pretrained(tmp_path)
    return tmp_path


def assert_equal_to_one_process(folder: Path, results: dict) -> None:
    for name, result in results.items():
        expected, pl_module, start = trained(folder, name, 1)
        assert result["loading"] == cases(folder)[name][2], name
        assert result["start"] == start.fingerprint, f"{name}: other initial weights"
        # the first of the two computes the log-probabilities of a reference, and the other finds them in the cache
        assert [note.split(",")[0] for note in result["notes"]] == [note.split(",")[0] for note in pl_module.notes]
        assert result["loss"] == pytest.approx(float(pl_module.trainer.callback_metrics["train/loss"]), rel=1e-5)
        assert distance(result["weights"], expected) < 1e-5, name


def test_two_processes_train_what_one_trains(folder):
    names = ["pretrained", "tied", "lora", "dpo, a copy", "qlora", "lora, offloaded", "selective", "lora, every second"]
    assert_equal_to_one_process(folder, on_processes(folder, 2, names))


@pytest.mark.slow
def test_every_way_to_build_a_model_is_the_same_on_two_processes(folder):
    assert_equal_to_one_process(folder, on_processes(folder, 2, cases(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2], ids=["four shards", "two replicas of two shards"])
def test_four_processes_train_what_one_trains(folder, replicas):
    names = ["pretrained", "tied", "experts", "random", "lora", "dpo", "dpo, a copy", "reward", "qlora"]
    assert_equal_to_one_process(folder, on_processes(folder, 4, names, replicas))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name", "replicas"),
    [
        ("untied", "tied", 1),
        ("no biases", "tied", 1),
        ("mean over one dimension", "pretrained", 2),
        ("scales of another layer", "qlora", 1),
        ("adapters on in the reference", "qlora, dpo", 1),
    ],
)
def test_a_fault_in_sharding_would_be_caught(folder, fault, name, replicas):
    ranks = 4 if replicas > 1 else 2
    assert distances(folder, on_processes(folder, ranks, [name], replicas, fault))[name] > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="parts in host memory beside a device need a GPU")
def test_offloaded_parts_are_updated_in_host_memory_and_the_model_runs_on_the_gpu(folder):
    """On the same GPU, one rank with offload and one without."""
    results = []
    for offload in (False, True):
        pl_module = sft(model=str(folder / "llama"))
        strategy = Sharded(offload=offload)
        options = {"accelerator": "gpu", "strategy": strategy, "max_steps": UPDATES, "gradient_clip_val": 0.1}
        results.append({n: sharding.whole(p) for n, p in fit(pl_module, data(folder), **options).items()})
        kind = "cpu" if offload else "cuda"
        assert {p.to_local().device.type for p in pl_module.parameters()} == {kind}
        assert {b.device.type for b in pl_module.buffers()} == {pl_module.device.type} == {"cuda"}
    assert distance(results[1], results[0]) < 1e-5


# ---- in one process


def test_mixed_precision_rounds_no_numbers_of_a_batch_and_copies_no_masks(folder, monkeypatch):
    """FSDP2 casts what its modules are called with, in copies."""
    seen, masks = [], []
    loss_sum, attend = States.loss_sum, interface._attend_blocks
    monkeypatch.setattr(
        States, "loss_sum", lambda self, loss: seen.append(self.batch["weights"].clone()) or loss_sum(self, loss)
    )
    monkeypatch.setattr(interface, "_attend_blocks", lambda *args: masks.append(args[4]) or attend(*args))
    rows = [{"prompt": "a question", "completion": "an answer" + "!" * i, "weight": 0.3} for i in range(4)]
    rows = SFTData(write_jsonl(folder / "weighted.jsonl", rows), tokenizer=ByteTokenizer(), batch_size=4)
    try:
        fit(sft(model=str(folder / "llama")), rows, max_steps=1, strategy=Sharded(), precision="bf16-mixed")
    finally:
        torch.distributed.destroy_process_group()
    assert {float(weight) for weights in seen for weight in weights} == {float(torch.tensor(0.3))}
    layers = 2
    assert len(masks) > 6
    assert len({id(mask) for mask in masks}) <= len(masks) / layers


@pytest.mark.parametrize("name", ["llama", "tied", "experts"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_parts_of_all_ranks_are_the_model(folder, name, ranks):
    whole = build_model(str(folder / name))
    parts = [build_model(str(folder / name), loading=Parts(rank, ranks)) for rank in range(ranks)]
    for weight, expected in whole.named_parameters(remove_duplicate=False):  # tied weights by both names
        placeholders = [model.get_parameter(weight) for model in parts]
        assert all(p.untyped_storage().nbytes() == p.element_size() for p in placeholders), (
            "a placeholder holds one number"
        )
        assert torch.equal(torch.cat([p.part for p in placeholders]), expected), weight
    for buffer, expected in whole.named_buffers():
        assert all(torch.equal(model.get_buffer(buffer), expected) for model in parts), buffer


def test_adapters_are_drawn_as_on_a_whole_model(folder):
    torch.manual_seed(3)
    whole = build_model(str(folder / "llama"), lora=LORA)
    torch.manual_seed(3)
    part = build_model(str(folder / "llama"), lora=LORA, loading=Parts(1, 2))
    for name, expected in whole.named_parameters():
        if "lora_" in name:
            assert torch.equal(part.get_parameter(name), expected)


def test_a_layer_that_is_trained_whole_beside_adapters_keeps_its_part(folder):
    model = build_model(str(folder / "llama"), lora=LORA | {"modules_to_save": ["lm_head"]}, loading=Parts(1, 2))
    head = model.get_output_embeddings()
    copied, original = head.modules_to_save["default"].weight, head.original_module.weight
    assert copied is not original
    assert torch.equal(copied.part, original.part)


def test_a_placeholder_can_not_be_written_to(folder):
    weight = next(build_model(str(folder / "llama"), loading=Parts(0, 2)).parameters())
    with torch.no_grad(), pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        weight[1] = 3.0


def test_a_structure_draws_no_numbers_and_holds_no_weights():
    state = torch.get_rng_state()
    values = LLAMA | {"vocab_size": 300}
    structure = build_model(None, config=values, loading=Structure())
    assert torch.equal(torch.get_rng_state(), state)
    whole = build_model(None, config=values)
    assert {n: p.shape for n, p in structure.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(p.untyped_storage().nbytes() == 4 for p in structure.parameters())
    assert all(torch.equal(structure.get_buffer(name), value) for name, value in whole.named_buffers())
