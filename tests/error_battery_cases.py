"""What a user may do wrong, one row a mistake: how it comes about, and the whole of what is said about it."""

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from oumi_pl.config import refusals
from tests.command_line import GONE, CommandLine, jsonl
from tests.models.test_lora import plain_tokenizer
from tests.tiny import LLAMA

HERE = "HERE"
"""In a message: the directory that the command was run in."""
MODEL, DATA = "model.init_args.", "data.init_args."


class Case(NamedTuple):
    """A recipe with `changes`, `files` beside it, and what `before` does to both, run with `args`."""

    message: str
    changes: Mapping[str, Any] = {}
    args: str = ""
    files: Mapping[str, str | bytes] = {}
    before: Callable[[CommandLine, pytest.MonkeyPatch], object] = lambda cli, patch: None


GOOD = {"prompt": "a b", "response": "c d"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PRETRAINED = {f"{MODEL}config": GONE, f"{MODEL}model": "./m"}
PRETRAINING = {
    "model.class_path": "Pretrain",
    "data.class_path": "PretrainData",
    f"{DATA}train": "texts.jsonl",
    f"{DATA}tokenizer": {"class_path": "ByteTokenizer", "init_args": {"chat_template": False}},
}
REWARDS = {"model.class_path": "Reward", "data.class_path": "RewardData"}
TEXTS = {"texts.jsonl": jsonl({"text": "a text"}, {"text": "another"})}


def reads(rows: str | bytes, message: str, **changes: Any) -> Case:
    """A recipe that trains on `data.jsonl`, which holds `rows`."""
    return Case(message, {f"{DATA}train": "data.jsonl"} | changes, files={"data.jsonl": rows})


def saved(cli: CommandLine, **config: Any) -> Path:
    """A tiny model's folder, `m`."""
    values = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"vocab_size": 300} | config
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(cli.directory / "m")
    return cli.directory / "m"


def of_other_tokens(cli: CommandLine, patch: pytest.MonkeyPatch) -> None:
    plain_tokenizer().save_pretrained(saved(cli))


def of_gpt2(cli: CommandLine, patch: pytest.MonkeyPatch) -> None:
    file = saved(cli) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gpt2"}))


def without_bitsandbytes(cli: CommandLine, patch: pytest.MonkeyPatch) -> None:
    saved(cli)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    patch.setattr("oumi_pl.models.build.version", missing)


def on_an_old_gpu(cli: CommandLine, patch: pytest.MonkeyPatch) -> None:
    refuse = refusals.refuse_unsupported_precision
    patch.setattr("oumi_pl.config.cli.refuse_unsupported_precision", lambda p, _: refuse(p, torch.device("cuda")))
    patch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    patch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")


def hub_unreachable(cli: CommandLine, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/home/me/.cache/huggingface/hub")
    patch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    patch.setattr("huggingface_hub.utils.get_session", fail)
    patch.setattr("datasets.config.HF_DATASETS_CACHE", "/home/me/.cache/huggingface/datasets")
    patch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no")))
    patch.delenv("HF_HUB_OFFLINE", raising=False)


def without_permission(cli: CommandLine, patch: pytest.MonkeyPatch) -> None:
    access = os.access
    patch.setattr("os.access", lambda path, mode: not mode & os.W_OK and access(path, mode))


def shards(cli: CommandLine, of: bytes | None) -> None:
    """Token shards whose first file holds other bytes, or is gone."""
    cli.works("prepare", "--config", "r.yaml", "--output", "shards")
    file = cli.directory / "shards/train/tokens-00000.bin"
    file.unlink() if of is None else file.write_bytes((of * file.stat().st_size)[: file.stat().st_size])


KEYS = {
    "misspelt key, at the top": Case(
        "sed_everything: unknown key; did you mean 'seed_everything'?", {"sed_everything": 1}
    ),
    "misspelt key, in a section": Case(
        "trainer.max_step: unknown key; did you mean 'trainer.max_steps'?", {"trainer.max_step": 1}
    ),
    "misspelt key, of a class": Case(
        "data.batchsize: unknown key; did you mean 'data.batch_size'?", {f"{DATA}batchsize": 1}
    ),
    "misspelt key, of a class in a class": Case(
        "model.optimizer.weight_deca: unknown key; did you mean 'model.optimizer.weight_decay'?",
        {f"{MODEL}optimizer.init_args.weight_deca": 1},
    ),
    "misspelt key, of a source": Case(
        "data.train.wieght: unknown key; did you mean 'data.train.weight'?",
        {f"{DATA}train": {"path": "rows.jsonl", "wieght": 1}},
    ),
    "misspelt option": Case(
        "unknown option --model.optimzer.lr; did you mean '--model.optimizer.lr'?", args="--model.optimzer.lr 1"
    ),
    "misspelt section of an option": Case(
        "unknown option --modle.optimizer.lr; did you mean '--model.optimizer.lr'?", args="--modle.optimizer.lr 1"
    ),
    "abbreviated flag": Case(
        "unknown option --trainer.max_s; did you mean '--trainer.max_steps'?", args="--trainer.max_s 3"
    ),
    "key twice": Case(
        "r.yaml line 3: the key model is repeated, first in line 1; keep one",
        before=lambda cli, _: cli.write("r.yaml", "model: SFT\ndata: {}\nmodel: DPO\n"),
    ),
    "key one level too high": Case(
        "model.dtype: belongs one level deeper, under model.init_args", {"model.dtype": "float32"}
    ),
}

VALUES = {
    "wrong type: text for a number": Case("data.max_length: 'long' is not an int", {f"{DATA}max_length": "long"}),
    "wrong type: a fraction of a step": Case("trainer.max_steps: 1.5 is not an int", {"trainer.max_steps": 1.5}),
    "wrong type: one number for two": Case(
        "model.optimizer.betas: 0.9 is not a list; write for example `betas: [0.9, 0.999]`",
        {f"{MODEL}optimizer.init_args.betas": 0.9},
    ),
    "wrong type: a number for a mapping": Case(
        "model.lora: 16 is not a mapping; write for example `lora: {r: 16}`", {f"{MODEL}lora": 16}
    ),
    "wrong type: in a source of a mixture": Case(
        "data.train.0.weight: 'a lot' is not a float", {f"{DATA}train": [{"path": "rows.jsonl", "weight": "a lot"}]}
    ),
    "wrong type: a number for a class": Case(
        "model.schedule: 100 is not a Schedule; write for example "
        "`schedule: {class_path: Cosine, init_args: {warmup: 100}}`",
        {f"{MODEL}schedule": 100},
    ),
    "wrong type: the name of a model for a class": Case(
        "model: 'org/name' is not a LanguageModule; write for example "
        "`model: {class_path: SFT, init_args: {model: org/name}}`",
        {"model": "org/name"},
    ),
    "out of range: rate": Case(
        "model.optimizer: Invalid learning rate: -0.001", {f"{MODEL}optimizer.init_args.lr": -1e-3}
    ),
    "out of range: warm-up": Case(
        "model.schedule.warmup is 1.5: a number of steps is whole, and a share of all steps is below 1",
        {f"{MODEL}schedule.init_args.warmup": 1.5},
    ),
    "out of range: held-out fraction": Case(
        "data.validation is 2.0, but a held-out fraction is between 0 and 1", {f"{DATA}validation": 2.0}
    ),
    "out of range: clipping": Case(
        "trainer.gradient_clip_val is -1.0, but a norm is above 0; leave it out to clip nothing",
        {"trainer.gradient_clip_val": -1.0},
    ),
    "out of range: rank": Case(
        "model.lora.r is -4, but has to be a whole number, at least 1", {f"{MODEL}lora": {"r": -4}}
    ),
    "out of range: seed": Case(
        "seed_everything is -1, but has to be between 0 and 4294967295", {"seed_everything": -1}
    ),
    "out of range: devices": Case(
        "trainer.devices: 'many' is neither how many (2), nor which ('0,2'), nor 'auto' for all",
        {"trainer.devices": "many"},
    ),
    "out of range: devices of a CPU": Case(
        "trainer.devices: -1 chooses among GPUs, but this runs on the CPU: set how many processes, 2 for example",
        {"trainer.devices": -1},
    ),
}

NO_PACKING = "set data.packing to false (data.isolate, of PretrainData)"
FSDP2 = "take strategy: fsdp2"
TOGETHER = {
    "QLoRA without bitsandbytes": Case(
        "model.quantization needs bitsandbytes: pip install 'oumi_pl[gpu]'",
        PRETRAINED | {f"{MODEL}quantization": "nf4", f"{MODEL}lora": {"r": 2}},
        before=without_bitsandbytes,
    ),
    "QLoRA without LoRA": Case(
        "model.quantization: quantized weights can't be trained; add `lora: {r: 16}`",
        PRETRAINED | {f"{MODEL}quantization": "nf4"},
    ),
    "bf16 where unsupported": Case(
        "trainer.precision: bf16-mixed needs a GPU with bfloat16 (NVIDIA's from Ampere on), but Tesla T4 has none; "
        "set it to 16-mixed or 32-true",
        {"trainer.precision": "bf16-mixed"},
        before=on_an_old_gpu,
    ),
    "clipping under a strategy that can't": Case(
        "trainer.gradient_clip_val: under fsdp no process sees the norm of all gradients, by which they are clipped; "
        f"{FSDP2}, or leave out clipping",
        {"trainer.strategy": "fsdp", "trainer.gradient_clip_val": 1.0},
    ),
    "a strategy that keeps its gradients": Case(
        f"trainer.strategy: deepspeed keeps gradients where their norm can't be computed; {FSDP2}",
        {"trainer.strategy": "deepspeed"},
    ),
    "outcomes without their loss": Case(
        "model.outcome_loss: 1 rows in data.train have an outcome and are no pairs; set it to MSE (for scores)",
        REWARDS | {f"{DATA}train": "data.jsonl"},
        files={"data.jsonl": jsonl(GOOD | {"score": 3})},
    ),
    "a reward model of an architecture without scores": Case(
        "model: transformers has no sequence-classification class for cohere, so nothing could load a reward model of "
        "it; start from an architecture that has one, for example gemma2, gpt2, llama, mistral, phi3, qwen2, qwen3, "
        "smollm3",
        REWARDS | {f"{DATA}train": "data.jsonl", f"{MODEL}config": {"model_type": "cohere", "hidden_size": 32}},
        files={"data.jsonl": jsonl({"prompt": "a ", "chosen": "b", "rejected": "c"})},
    ),
    "no teacher": Case(
        "model.teacher: missing, and there is no default",
        {"model.class_path": "Distill"},
    ),
    "a teacher that is not there": Case(
        "model.teacher: there is no folder './m'; it is looked for in HERE",
        {"model.class_path": "Distill", f"{MODEL}teacher": "./m"},
    ),
    "a teacher of other tokens": Case(
        "model.teacher: ./m reads other tokens than the data's tokenizer (258 there, 260 here; 'Ā' is 188 there and 0 "
        "here); distributions can only be compared over the same tokens",
        {"model.class_path": "Distill", f"{MODEL}teacher": "./m"},
        before=of_other_tokens,
    ),
    "a teacher with fewer logits than tokens": Case(
        "model.teacher: ./m has logits for 40 tokens, and the data's tokenizer has 260",
        {"model.class_path": "Distill", f"{MODEL}teacher": "./m"},
        before=lambda cli, patch: saved(cli, vocab_size=40),
    ),
    "a teacher's cache for a stream of documents": Case(
        "data: the rows of PretrainData are a stream, and a cache belongs to examples: run the reference beside the "
        "model (`model.reference: online`; with Distill leave out `model.top_k`)",
        PRETRAINING | {"model.class_path": "Distill", f"{MODEL}teacher": "./m", f"{MODEL}top_k": 4},
        files=TEXTS,
        before=lambda cli, patch: saved(cli, vocab_size=300),
    ),
    "rows longer than the table of positions": Case(
        "data.max_length is 128, but GPT2LMHeadModel has a table of 64 positions: set it to 64",
        {f"{MODEL}config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}},
    ),
}
