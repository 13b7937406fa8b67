"""Settings whose losses are compared with Oumi's, with a model and data that any version of the libraries reads alike.

Nothing of oumi_pl is imported: `benchmarks/oumi_losses.py` runs these settings in an environment of Oumi's own.
"""

import json
import random

import numpy as np

WEIGHTS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KV_HEADS, VOCABULARY = 2, 260
SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
"""Without the newlines of ChatML, of which Oumi trains some and oumi_pl none (a note says so)."""
ROWS = 8
"""An update takes all rows, so that it doesn't matter in which order they come."""
UPDATES = 3


def training(trainer_type="TRL_SFT", **more):
    """The section `training` of a setting: plain SGD, which doesn't amplify rounding, on all rows at each update."""
    common = {
        "trainer_type": trainer_type,
        "output_dir": "out/run",
        "per_device_train_batch_size": ROWS,
        "max_steps": UPDATES,
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_steps": 0,
        "save_final_model": False,
        "enable_tensorboard": False,
    }
    return common | more


def data(name, file=None, dataset_kwargs=None, **split):
    dataset = {"dataset_name": name, "dataset_path": file} if file else {"dataset_name": name}
    if dataset_kwargs:
        dataset["dataset_kwargs"] = dataset_kwargs
    return {"train": {"datasets": [dataset]} | split}


CHAT = data("text_sft_jsonl", "chat.jsonl")
TURNS = data(
    "text_sft_jsonl",
    "chat.jsonl",
    collator_name="text_completions_only_with_padding",
    train_target="ALL_ASSISTANT_TURNS",
)
DOCUMENTS = {"seq_length": 64, "dataset_name_override": "documents"}
DICTS = {"return_conversations": True, "return_conversations_format": "dict"}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
ADAM = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "optimizer": "adamw_torch", "learning_rate": 1e-2}
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
TEACHER = {"teacher_model_name_or_path": "teacher", "lmbda": 0.0, "beta": 0.5}
ONE = {"per_device_train_batch_size": 1}
WINDOW = {"model_max_length": 128}
BARE = {"model_name": "bare"}
"""A template that doesn't write EOS, of which joined rows would have two in Oumi, and one here."""

SETTINGS = {
    "sft": {"data": CHAT, "training": training()},
    "sft_accumulated": {"data": CHAT, "training": training(**ACCUMULATED)},
    "sft_adamw_cosine": {"data": CHAT, "training": training(**ADAM)},
    "sft_alpaca_cut": {"data": data("yahma/alpaca-cleaned", "alpaca.jsonl"), "training": training()},
    "sft_completions": {"data": TURNS, "training": training()},
    "sft_last_turn": {
        "data": {"train": TURNS["train"] | {"train_target": "FINAL_ASSISTANT_TURN"}},
        "training": training(**ACCUMULATED),
    },
    "sft_prompt_completion": {"data": data("completions"), "training": training()},
    "sft_messages": {"data": data("chats"), "training": training()},
    "sft_lora": {"data": TURNS, "training": training(use_peft=True), "peft": LORA},
    "sft_hf": {"data": TURNS, "training": training("HF")},
    "packed": {
        "data": data("text_sft_jsonl", "many.jsonl", pack=True),
        "training": training("HF", **ONE),
        "model": WINDOW | BARE,
    },
    "packed_oumi": {
        "data": data("text_sft_jsonl", "many.jsonl", pack=True),
        "training": training("OUMI", **ONE),
        "model": WINDOW | BARE,
    },
    "pretraining": {
        "data": data(
            "Salesforce/wikitext", None, {"seq_length": 64, "dataset_name_override": "documents"}, stream=True
        ),
        "training": training("HF", **ONE),
    },
    "dpo": {"data": data("preferences"), "training": training("TRL_DPO")},
    "dpo_accumulated": {"data": data("preferences"), "training": training("TRL_DPO", **ACCUMULATED)},
    "dpo_lora": {"data": data("preferences"), "training": training("TRL_DPO", use_peft=True), "peft": LORA},
    "dpo_ipo": {
        "data": data("preferences"),
        "training": training("TRL_DPO", trainer_kwargs={"loss_type": "ipo", "beta": 0.5}),
    },
    "kto_apo": {
        "data": data("feedback"),
        "training": training("TRL_KTO", trainer_kwargs={"loss_type": "apo_zero_unpaired"}),
    },
    "gkd": {
        "data": data("text_sft_jsonl", "one.jsonl", DICTS),
        "training": training(
            "TRL_GKD", gkd={"teacher_model_name_or_path": "teacher", "lmbda": 0.0, "beta": 0.5}, **ONE
        ),
    },
}
"""Name -> what differs from a config that names the model."""
MODEL = {"model_name": "tiny", "torch_dtype_str": "float32", "model_max_length": 128, "device_map": None}


FIRST = {
    **dict.fromkeys(("sft", "sft_accumulated", "sft_adamw_cosine", "sft_messages"), (418, ROWS)),
    "sft_alpaca_cut": (128 * ROWS, ROWS),
    "packed": (128, 1),
    "pretraining": (64, 1),
}
"""Setting -> labels of an update, and rows whose first token has a label.

transformers divides an update's loss by all labels, also those of first tokens, which nothing predicts.
"""
WINDOWS = {"packed": 2e-3, "packed_oumi": 2e-3, "pretraining": 5e-3}
"""Setting -> relative tolerance: here each window also predicts the first token of the next one."""


def config(name):
    """The whole config of a setting."""
    return SETTINGS[name] | {"model": MODEL | SETTINGS[name].get("model", {})}


# --- the files ------------------------------------------------------------------------------------------------------


def write(folder):
    """Writes the model, its teacher and all rows into a folder."""
    write_model(folder / "tiny", seed=0)
    write_model(folder / "teacher", seed=1)
    write_model(folder / "bare", seed=0, template=TEMPLATE.replace("<|im_end|>", ""))
    rng = random.Random(7)
    chats = [exchange(rng) for _ in range(ROWS)]
    write_rows(folder / "one.jsonl", chats[:1])
    write_rows(folder / "many.jsonl", [exchange(rng) for _ in range(3 * ROWS)])
    chats[3]["messages"] += exchange(rng)["messages"]
    write_rows(folder / "chat.jsonl", chats)
    write_rows(folder / "chats" / "train.jsonl", chats)
    alpaca = [{"instruction": text(rng), "input": text(rng) if i % 2 else "", "output": text(rng)} for i in range(ROWS)]
    write_rows(folder / "alpaca.jsonl", alpaca)
    rows = [{"prompt": f"{text(rng)}: ", "completion": text(rng)} for _ in range(ROWS)]
    write_rows(folder / "completions" / "train.jsonl", rows)
    pairs = [
        {"prompt": text(rng)} | {name: [turn("assistant", text(rng))] for name in ("chosen", "rejected")}
        for _ in range(ROWS)
    ]
    rows = [row | {"prompt": [turn("user", row["prompt"])]} for row in pairs]
    write_rows(folder / "preferences" / "train.jsonl", rows)
    rows = [{"prompt": f"{text(rng)}: ", "completion": text(rng), "label": i % 3 != 1} for i in range(ROWS)]
    write_rows(folder / "feedback" / "train.jsonl", rows)
    documents = [{"text": " ".join(text(rng) for _ in range(3))} for _ in range(24)]
    write_rows(folder / "documents" / "train.jsonl", documents)


def exchange(rng):
    return {"messages": [turn("user", text(rng)), turn("assistant", text(rng))]}


def turn(role, content):
    return {"role": role, "content": content}


def text(rng):
    words = ("".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 6)))
    return " ".join(words)


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_model(folder, seed, template=TEMPLATE):
    """Writes a Llama with weights from NumPy's generator, and a tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    hidden, inner = WEIGHTS["hidden_size"], WEIGHTS["intermediate_size"]
    narrow = hidden // WEIGHTS["num_attention_heads"] * KV_HEADS
    shapes = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden), "model.norm": (hidden,)}
    for number in range(WEIGHTS["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (narrow, hidden) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, inner)}
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    weights = {
        f"{name}.weight": (0.1 * generator.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": None, "eos_token_id": 259, "pad_token_id": 256}
    shape = WEIGHTS | {"vocab_size": VOCABULARY, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 512}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(kind | shape | ids | {"torch_dtype": "float32"}))
    write_tokenizer(folder, template)


def write_tokenizer(folder, template):
    """Writes a tokenizer whose tokens are bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | tokens))


def adapter_weights(shape):
    """What LoRA's matrix A begins with here, where libraries draw other numbers."""
    return (np.random.default_rng(shape[1]).standard_normal(shape) * 0.1).astype(np.float32)
