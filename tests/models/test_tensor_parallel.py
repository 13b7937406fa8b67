"""Tensor parallelism, alone and with FSDP2 and HSDP: the model of one process, trained as one process trains it."""

import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import oumi_pl.optim.muon
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models.build import build_model
from oumi_pl.models.recomputation import EveryNth, Selective
from oumi_pl.models.sharding import Parts, Sharded, data_ranks
from oumi_pl.models.tensor_parallel import Share, _Copies, checked_styles, refuse_undividable
from oumi_pl.modules.distill import Distill
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.sft import SFT
from oumi_pl.optim import MuonAdamW
from oumi_pl.types import TokenLoss
from tests.conftest import free_port
from tests.models.test_lora import pretrained
from tests.models.test_sharding import LORA, Start
from tests.tiny import (
    LLAMA,
    data,
    distance,
    dpo,
    dpo_data,
    fit,
    kto,
    kto_data,
    module,
    reward,
    reward_data,
    sgd,
    trainer,
)

BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16, "pad_token_id": 0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": None}
OTHERS = {
    name: LLAMA | SPECIAL | {"model_type": name} | (CAPPED if name == "gemma2" else {})
    # fused projections, norms over all heads, a soft cap, biases, a bias of the head, activations with parameters
    for name in ("phi3", "olmo2", "gemma2", "cohere", "qwen2", "glm4", "starcoder2", "phi", "apertus", "nemotron")
}
sft = functools.partial(SFT, optimizer=sgd)
muon = functools.partial(MuonAdamW, lr=0.01)
HEAD = ["q_proj", "down_proj", "lm_head"]
UPDATES, ROWS = 3, 4


class Squared(TokenLoss):
    """A loss that needs all logits."""

    def __call__(self, logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none") ** 2


def make_pretrained(folder: Path) -> None:
    """The folders of models that the cases load."""
    pretrained(folder / "llama", **LLAMA)
    pretrained(folder / "biased", **BIASED)
    pretrained(folder / "qwen3", **QWEN3)  # tied, with norms of single heads
    pretrained(folder / "gemma3", **GEMMA3)  # tied, with a scale on embeddings
    pretrained(folder / "odd", room=1, **QWEN3)  # a vocabulary that can't be divided


def cases(folder: Path) -> dict:
    """Name -> a module, its data, and settings of the trainer."""
    packed: dict = {"packing": True, "max_length": 64, "group_by_length": False}
    held_out = {"validation": data(folder, n=6, seed=1).sources["train"]}
    base = {name: str(folder / name) for name in ("llama", "biased", "qwen3", "gemma3", "odd")}
    smooth = CrossEntropy(label_smoothing=0.1, z_loss=1e-3)
    dropout = LORA | {"lora_dropout": 0.5}
    rows, packed_rows = (lambda: data(folder)), (lambda: data(folder, **packed))
    return {
        "packed": (lambda: sft(model=base["llama"]), packed_rows, {}),
        "qwen3": (lambda: sft(model=base["qwen3"]), lambda: data(folder, **packed, **held_out), {"max_steps": 4}),
        "gemma3": (lambda: sft(model=base["gemma3"]), rows, {}),
        "biased": (lambda: sft(model=base["biased"]), rows, {}),
        "odd": (lambda: sft(model=base["odd"]), packed_rows, {}),
        "random": (lambda: module(), packed_rows, {}),
        "one head per rank": (lambda: module(config={"num_key_value_heads": 4}), packed_rows, {}),
        "pretrain": (lambda: Pretrain(config=QWEN3, optimizer=sgd), rows, {}),
        "clipped": (lambda: sft(model=base["qwen3"]), rows, {"gradient_clip_val": 0.1}),
        "recomputed": (lambda: sft(model=base["qwen3"], gradient_checkpointing=True), packed_rows, {}),
        "selective": (lambda: sft(model=base["qwen3"], gradient_checkpointing=Selective()), packed_rows, {}),
        "every second": (lambda: sft(model=base["biased"], gradient_checkpointing=EveryNth(2)), rows, {}),
        "muon": (lambda: SFT(model=base["qwen3"], optimizer=muon), packed_rows, {}),
        "bf16-true": (lambda: sft(model=base["qwen3"]), packed_rows, {"precision": "bf16-true"}),
        "bf16-mixed": (lambda: sft(model=base["qwen3"]), packed_rows, {"precision": "bf16-mixed"}),
        "frozen": (lambda: sft(model=base["qwen3"], freeze=["model.embed_tokens"]), rows, {}),
        "smooth": (lambda: sft(model=base["qwen3"], loss=smooth), rows, {}),
        "squared": (lambda: sft(model=base["qwen3"], loss=Squared()), rows, {}),
        "lora": (lambda: sft(model=base["biased"], lora=LORA), packed_rows, {}),
        "lora of odd rank": (lambda: sft(model=base["llama"], lora={"r": 3}), rows, {}),
        "lora of the head": (lambda: sft(model=base["llama"], lora=LORA | {"target_modules": HEAD}), rows, {}),
        "lora and the head": (lambda: sft(model=base["llama"], lora=LORA | {"modules_to_save": ["lm_head"]}), rows, {}),
        "lora on random": (lambda: module(lora=LORA), rows, {}),
        "lora on phi3": (lambda: sft(config=OTHERS["phi3"], lora=LORA), rows, {}),
        "dropout": (lambda: sft(model=base["biased"], lora=dropout), rows, {}),
        "reward": (lambda: reward(base["llama"]), lambda: reward_data(folder), {}),
        "dpo": (lambda: dpo(base["llama"]), lambda: dpo_data(folder), {}),
        "dpo, adapters off": (lambda: dpo(base["qwen3"], lora=LORA), lambda: dpo_data(folder), {}),
        "dpo, odd": (lambda: dpo(base["odd"]), lambda: dpo_data(folder), {}),
        "dpo, a copy": (lambda: dpo(base["qwen3"], reference="online"), lambda: dpo_data(folder), {}),
        "kto": (lambda: kto(base["llama"]), lambda: kto_data(folder), {}),
        "distill": (lambda: Distill(base["qwen3"], teacher=base["llama"], optimizer=sgd), rows, {}),
        **{name: (functools.partial(sft, config=config), rows, {}) for name, config in OTHERS.items()},
    }


def trained(folder: Path, name: str, ranks: int, **of_trainer) -> tuple[dict, L.LightningModule, Start]:
    """Trains a case with the same rows per update on any number of ranks that read rows of their own."""
    make_module, make_data, settings = cases(folder)[name]
    start, pl_module, rows = Start(), make_module(), make_data()
    rows.batch_size = ROWS // 4
    defaults = {"max_steps": UPDATES, "accumulate_grad_batches": 4 // ranks, "callbacks": [start]}
    settings = defaults | settings | of_trainer
    return fit(pl_module, rows, **settings), pl_module, start


WORKER = """
import sys, json, torch, pytest
import torch.distributed as dist
from pathlib import Path
from torch.distributed.tensor import Replicate
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import oumi_pl.models.sharding as sharding
import oumi_pl.models.tensor_parallel as tensor_parallel
from tests.models.test_tensor_parallel import plant, trained
out, ranks, sizes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def is_same_in_group(weight):
    mesh = weight.device_mesh
    if not isinstance(weight.placements[-1], Replicate):
        return True
    parts = [torch.empty_like(weight.to_local()) for _ in range(mesh["tensor"].size())]
    dist.all_gather(parts, weight.to_local().contiguous(), group=mesh["tensor"].get_group())
    return all(torch.equal(part, parts[0]) for part in parts)

results = {{}}
for planned in sys.argv[4:]:
    name, _, fault = planned.partition(": ")
    strategy = sharding.Sharded(**sizes, process_group_backend="gloo")
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, fault)
        weights, module, start = trained(out, name, ranks // sizes["tensor"], devices=ranks, strategy=strategy)
    results[planned] = {{
        "divided": sum(not p.placements[-1].is_replicate() for p in weights.values()),
        "same": all([is_same_in_group(p) for p in weights.values()]),
        "weights": {{n: sharding.whole(p) for n, p in weights.items()}},
        "metrics": {{n: float(v) for n, v in module.trainer.callback_metrics.items()}},
        "start": start.fingerprint,
    }}
if dist.get_rank() == 0:
    torch.save(results, out / "results.pt")
"""


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    """Plants a fault, in a process of a run."""
    import torch.distributed.fsdp as fsdp

    from oumi_pl.models import tensor_parallel
    from oumi_pl.models.tensor_parallel import Replicate, _Whole

    shard, call = fsdp.fully_shard, _Whole.__call__

    def mean_over_all(layer, **settings):
        shard(layer, **settings).set_gradient_divide_factor(float(torch.distributed.get_world_size()))

    def counted_by_each(self, *args, **kwargs):
        self.sees_own_heads = isinstance(self.module, torch.nn.Embedding)
        return call(self, *args, **kwargs)

    if fault == "a mean over all ranks":
        patch.setattr(fsdp, "fully_shard", mean_over_all)
    elif fault == "a tied weight that each rank counts":
        patch.setattr(_Whole, "__call__", counted_by_each)
    elif fault == "exact iterations":
        iterate_exactly(patch)
    elif fault == "exact iterations of parts":
        iterate_exactly(patch)
        patch.setattr(oumi_pl.optim.muon, "_orthogonal", of_parts)
    elif fault in ("a lost bias", "a lost norm"):
        patch.setattr(tensor_parallel, "Partial", Replicate)
    else:
        assert not fault


def iterate_exactly(patch: pytest.MonkeyPatch) -> None:
    """Makes Muon iterate in float64: in bfloat16 it enlarges the last digits of gradients to percents of the update."""

    def orthogonal(matrix, coefficients, steps, eps):
        a, b, c = coefficients
        x = (matrix.T if matrix.size(0) > matrix.size(1) else matrix).double()
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.T if matrix.size(0) > matrix.size(1) else x).to(matrix.dtype)

    patch.setattr(oumi_pl.optim.muon, "_zeropower_via_newtonschulz", orthogonal)
    patch.setattr(torch.Tensor, "bfloat16", lambda self: self)


def of_parts(update, *settings):
    """Orthogonalises what a rank holds, by itself."""
    part = update.to_local() if isinstance(update, DTensor) else update
    part = oumi_pl.optim.muon._zeropower_via_newtonschulz(part, *settings)
    if not isinstance(update, DTensor):
        return part
    return DTensor.from_local(part, update.device_mesh, update.placements, shape=update.shape, stride=update.stride())


def on_processes(folder: Path, ranks: int, names, **sizes) -> dict:
    """What a run of each case on several processes comes to; they are started once, since that takes longest."""
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    environment = {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), "OUMI_PL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(ranks), json.dumps({"tensor": 2} | sizes), *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


def assert_equal_to_one_process(folder: Path, results: dict) -> None:
    for name, result in results.items():
        assert result["same"], f"{name}: whole weights differ between the ranks of a group"
        assert result["divided"], name
        if name == "dropout":  # other random numbers
            continue
        expected, pl_module, start = trained(folder, name, 1)
        assert result["start"] == start.fingerprint, f"{name}: other initial weights"
        for metric, value in pl_module.trainer.callback_metrics.items():
            assert result["metrics"][metric] == pytest.approx(float(value), rel=1e-5, abs=1e-6), (name, metric)
        assert distance(result["weights"], expected) < 1e-5, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
        make_pretrained(folder)
        yield folder


def test_two_processes_that_divide_layers_train_what_one_trains(folder):
    assert_equal_to_one_process(folder, on_processes(folder, 2, ["qwen3", "lora", "dpo", "selective"]))


@pytest.mark.slow
def test_every_model_and_trainer_type_is_the_same_on_two_processes(folder):
    names = [name for name in cases(folder) if not name.startswith(("bf16", "muon"))]
    assert_equal_to_one_process(folder, on_processes(folder, 2, names))


@pytest.mark.slow
def test_in_bfloat16_two_processes_round_as_much_as_one(folder):
    fault = "bf16-mixed: a mean over all ranks"
    results = on_processes(folder, 2, ["bf16-true", "bf16-mixed", fault])
    for name, result in results.items():
        case = name.partition(":")[0]
        one, exact = (trained(folder, case, 1, **settings)[0] for settings in ({}, {"precision": "32-true"}))
        of_one, of_two = (distance(in_float32(weights), exact) for weights in (one, result["weights"]))
        assert result["same"]
        assert {n: w.dtype for n, w in result["weights"].items()} == {n: w.dtype for n, w in one.items()}
        assert (of_two > 3 * of_one) if name == fault else (of_two < 2 * of_one), (name, of_one, of_two)


@pytest.mark.slow
def test_muon_orthogonalises_whole_matrices(folder, monkeypatch):
    names = ["muon: exact iterations", "muon: exact iterations of parts"]
    right, of_parts = (result["weights"] for result in on_processes(folder, 2, names).values())
    iterate_exactly(monkeypatch)
    expected = trained(folder, "muon", 1)[0]
    assert distance(right, expected) < 1e-5
    assert distance(of_parts, expected) > 1e-2


def in_float32(weights: dict) -> dict:
    return {name: weight.float() for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"shards": 2}, {"shards": 1, "replicas": 2}], ids=["two shards", "two replicas"])
def test_four_processes_train_what_one_trains(folder, sizes):
    names = ["packed", "qwen3", "gemma3", "biased", "odd", "random", "pretrain", "clipped", "recomputed", "lora"]
    names += ["lora of odd rank", "dropout", "reward", "dpo", "dpo, a copy", "kto", "distill"]
    assert_equal_to_one_process(folder, on_processes(folder, 4, names, **sizes))


@pytest.mark.slow
def test_four_processes_can_divide_four_heads(folder):
    assert_equal_to_one_process(folder, on_processes(folder, 4, ["one head per rank"], tensor=4))


@pytest.mark.slow
def test_faults_would_be_caught(folder):
    faults = [
        "packed: a mean over all ranks",
        "odd: a tied weight that each rank counts",
        "biased: a lost bias",
        "gemma3: a lost norm",
    ]
    results = on_processes(folder, 2, faults)
    for fault, result in results.items():
        expected = trained(folder, fault.partition(": ")[0], 1)[0]
        assert distance(result["weights"], expected) > 1e-4, fault


# ---- in one process


@pytest.mark.parametrize("name", ["biased", "qwen3", "gemma3", "odd"])
def test_the_parts_of_all_ranks_are_the_model(folder, name):
    whole = build_model(str(folder / name))
    shards, tensor = 2, 2
    parts = [
        [build_model(str(folder / name), loading=Parts(i, shards, Share(j, tensor))) for i in range(shards)]
        for j in range(tensor)
    ]
    styles = checked_styles(whole, tensor)
    assert sum(style.dim is not None for style in styles.values()) == 14 + 2 * (name != "odd")
    for weight, expected in whole.named_parameters():
        owner, _, kind = weight.rpartition(".")
        style = styles.get(whole.get_submodule(owner))
        divided = style.dim if style is not None and kind == "weight" else None
        joined = [
            torch.cat([model.get_parameter(weight).part for model in group], dim=1 if divided == 0 else 0)
            for group in parts
        ]
        assert torch.equal(joined[0] if divided is None else torch.cat(joined, divided), expected), weight


def config(**values) -> AutoConfig:
    return AutoConfig.for_model(**LLAMA | values)


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ({"model_type": "gpt2"}, 2, "no plan that divides the layers of gpt2; leave it out, and divide the weights"),
        ({}, 4, "tensor is 4, but has to divide the 2 key-value heads of llama; take one of 2, or leave it out"),
        ({}, 3, "tensor is 3, but has to divide the 4 attention heads of llama; take one of 2"),
        ({"num_key_value_heads": 1}, 2, "has to divide the 1 key-value heads of llama; leave it out"),
    ],
)
def test_a_model_that_can_not_be_divided_is_refused_by_its_config(values, size, message):
    refuse_undividable(config(), 2)
    with pytest.raises(UserError, match=message):
        refuse_undividable(AutoConfig.for_model(**values) if "model_type" in values else config(**values), size)


@pytest.mark.parametrize(
    ("values", "lora", "message"),
    [
        ({"intermediate_size": 63}, None, "tensor is 2, but has to divide the weight of model.layers.0.mlp.gate_proj"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, None, "mlp.experts would be divided as moe_tp_experts"),
        ({}, {"use_dora": True}, "q_proj can't be divided: plain LoRA of linear layers can, but not DoRA, nor"),
        ({}, {"target_modules": ["embed_tokens"]}, "the adapter of model.embed_tokens can't be divided"),
    ],
)
def test_layers_that_can_not_be_divided_are_refused_by_name(values, lora, message):
    model = build_model(None, config=LLAMA | {"vocab_size": 300} | values, lora=lora and {"r": 2} | lora)
    base = model if lora is None else model.get_base_model()
    with pytest.raises(UserError, match=message):
        checked_styles(base, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": True}, "model.compile can't be had with trainer.strategy.tensor"),
        ({"lora": {"use_dora": True}}, "model.lora.use_dora can't be had with trainer.strategy.tensor"),
        ({"lora": LORA, "quantization": "nf4"}, "model.quantization can't be had with trainer.strategy.tensor"),
    ],
)
def test_settings_are_refused_before_weights_are_loaded(settings, message):
    pl_module = SFT("no/such-model", **settings)
    pl_module.trainer = trainer(devices=2, strategy=Sharded(tensor=2))
    with pytest.raises(UserError, match=message):
        pl_module.configure_model()


def test_ranks_of_a_group_read_the_same_rows(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # which the environment below changes
    strategy = Sharded(tensor=2)
    run = trainer(devices=4, strategy=strategy)
    seen = []
    for rank in range(4):
        strategy.cluster_environment.set_global_rank(rank)
        ranks = data_ranks(run)
        assert strategy.distributed_sampler_kwargs == {"num_replicas": ranks.number, "rank": ranks.index}
        seen.append((ranks.number, ranks.index))
    assert seen == [(2, 0), (2, 0), (2, 1), (2, 1)]


def test_layers_with_the_same_input_share_the_sum_of_its_gradient():
    copies, x = _Copies(None), torch.ones(2, requires_grad=True)
    first = copies.of(x)
    assert copies.of(x) is first
    assert copies.of(x * 1) is not first
    with torch.no_grad():
        assert copies.of(x) is x
    y = x * 1
    copies.of(y)
    del y, first
    gc.collect()
    assert copies._copy is None, "a copy must not outlive its source"
