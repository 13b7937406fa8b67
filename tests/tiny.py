"""A tiny model and tiny data, made here: what most tests train on."""

import json
import random
from pathlib import Path

import lightning as L
import torch

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.kto import KTOData
from oumi_pl.data.reward import RewardData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.kto import KTO
from oumi_pl.modules.reward import Reward
from oumi_pl.modules.sft import SFT

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def conversations(n, seed=0, longest=12):
    """Rows of ragged length: the laws are about those."""
    rng = random.Random(seed)

    def word():
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 6)))

    def text():
        return " ".join(word() for _ in range(rng.randint(1, longest)))

    return [
        {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]} for _ in range(n)
    ]


def pairs(n, seed=0, longest=12):
    """Rows of two responses to one prompt, all of ragged length."""
    built, rows = conversations(2 * n, seed, longest), []
    for a, b in zip(built[::2], built[1::2], strict=True):
        (prompt, chosen), (_, rejected) = a["messages"], b["messages"]
        rows.append({"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]})
    return rows


def feedback(n, seed=0, longest=12):
    """Rows of a prompt, a completion and a label, all of ragged length; two in three are desirable."""
    rows = [row["messages"] for row in conversations(n, seed, longest)]
    return [{"prompt": [p], "completion": [c], "label": i % 3 != 1} for i, (p, c) in enumerate(rows)]


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(path: Path, n=16, seed=0, **kwargs) -> SFTData:
    file = path / f"rows-{n}-{seed}.jsonl"
    if not file.exists():
        write_jsonl(file, conversations(n, seed))
    return SFTData(str(file), **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))


def module(optimizer=None, config=None, **kwargs) -> SFT:
    return SFT(config=LLAMA | (config or {}), optimizer=optimizer or sgd, **kwargs)


def dpo_data(path: Path, n=16, seed=0, **kwargs) -> DPOData:
    file = path / f"pairs-{n}-{seed}.jsonl"
    if not file.exists():
        write_jsonl(file, pairs(n, seed))
    return DPOData(str(file), **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))


def dpo(model=None, optimizer=None, config=None, **kwargs) -> DPO:
    """A DPO module; from random weights unless it names a model."""
    config = LLAMA | (config or {}) if model is None else config
    return DPO(model, config, optimizer=optimizer or sgd, **kwargs)


def kto_data(path: Path, n=16, seed=0, **kwargs) -> KTOData:
    file = path / f"feedback-{n}-{seed}.jsonl"
    if not file.exists():
        write_jsonl(file, feedback(n, seed))
    return KTOData(str(file), **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))


def kto(model=None, optimizer=None, config=None, **kwargs) -> KTO:
    """A KTO module; from random weights unless it names a model."""
    config = LLAMA | (config or {}) if model is None else config
    return KTO(model, config, optimizer=optimizer or sgd, **kwargs)


def rated(n, seed=0, longest=12):
    """Conversations with an outcome of 0 or 1."""
    rng = random.Random(seed)
    return [row | {"label": rng.randint(0, 1)} for row in conversations(n, seed, longest)]


def reward_data(path: Path, n=16, seed=0, outcomes=0, **kwargs) -> RewardData:
    """`n` pairs, and as many rated responses as `outcomes` says."""
    sources = []
    for name, count, rows in (("pairs", n, pairs), ("rated", outcomes, rated)):
        if count:
            file = path / f"{name}-{count}-{seed}.jsonl"
            if not file.exists():
                write_jsonl(file, rows(count, seed))
            sources.append(Source(str(file)))
    return RewardData(sources, **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))


def reward(model=None, optimizer=None, config=None, **kwargs) -> Reward:
    """A reward model; from random weights unless it names a model."""
    config = LLAMA | (config or {}) if model is None else config
    return Reward(model, config, optimizer=optimizer or sgd, **kwargs)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def trainer(**kwargs) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**(defaults | kwargs))


def fit(sft: SFT, sft_data: SFTData, seed=1, **kwargs) -> dict[str, torch.Tensor]:
    """Trains and returns the weights."""
    L.seed_everything(seed)
    trainer(**kwargs).fit(sft, sft_data)
    return weights(sft)


def weights(sft: SFT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in sft.causal_lm.hf.named_parameters()}


def distance(ours, theirs) -> float:
    """Largest relative distance of two sets of tensors: norm of the difference over the norm, per tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)) for n in ours)
