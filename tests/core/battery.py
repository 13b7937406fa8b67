"""Oumi's training configs as its recipes write them, on a tiny model and tiny files: what runs, and what is refused.

A config lacks what all of them share: `COMMON`, and where its output goes.
"""

COMMON = {
    "model": {"model_name": "tiny"},
    "training": {
        "output_dir": "out/run",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "enable_tensorboard": False,
    },
}

ROWS = "data: {train: {datasets: [{dataset_name: text_sft_jsonl, dataset_path: rows.jsonl}]}}\n"
SFT = ROWS + "training: {trainer_type: TRL_SFT}\n"
HELD_OUT = ROWS.replace("}]}}", "}]}, validation: {datasets: [{dataset_name: text_sft, dataset_path: oumi.jsonl}]}}")
PAIRS = "data: {train: {datasets: [{dataset_name: mlabonne/orpo-dpo-mix-40k, dataset_path: pairs.jsonl}]}}\n"
DOCUMENTS = (
    "data: {train: {datasets: [{dataset_name: allenai/c4, dataset_path: texts.jsonl, "
    "dataset_kwargs: {seq_length: 16}}]}}\n"
)
TARGETS = "lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
COMPLETIONS = "collator_name: text_completions_only_with_padding"


def sft(options, rest=""):
    """A config that fine-tunes on conversations, with these options of `training`."""
    return f"{ROWS}training: {{trainer_type: TRL_SFT, {options}}}\n{rest}"


def model(options, training=""):
    """The same with these options of `model`."""
    return sft(training, f"model: {{{options}}}\n")


def reads(dataset, split="", training=""):
    """A config that trains on this dataset, with these options of the split."""
    return f"data: {{train: {{datasets: [{{{dataset}}}], {split}}}}}\ntraining: {{trainer_type: TRL_SFT, {training}}}\n"


def lora(options="", training=""):
    """A config that trains an adapter."""
    return sft(f"use_peft: true, {training}", f"peft: {{lora_r: 2, lora_alpha: 4, {options}}}\n")


LLAMA_FULL = """
model:
  torch_dtype_str: "bfloat16"
  model_max_length: 128
  attn_implementation: "sdpa"
  load_pretrained_weights: True
  trust_remote_code: True
  enable_liger_kernel: True
  tokenizer_pad_token: "<|pad|>"
data:
  train:
    datasets:
      - dataset_name: "yahma/alpaca-cleaned"
        dataset_path: alpaca.jsonl
        transform_num_workers: auto
training:
  trainer_type: "TRL_SFT"
  use_peft: False
  save_steps: 200
  num_train_epochs: 3
  gradient_accumulation_steps: 2
  enable_gradient_checkpointing: True
  gradient_checkpointing_kwargs: {use_reentrant: False}
  ddp_find_unused_parameters: False
  optimizer: "adamw_torch_fused"
  learning_rate: 2.0e-05
  lr_scheduler_type: "cosine"
  warmup_ratio: 0.1
  weight_decay: 0.01
  max_grad_norm: 10
  dataloader_num_workers: 0
  dataloader_prefetch_factor: 32
  dataloader_main_process_only: False
  empty_device_cache_steps: 50
  logging_steps: 100
  log_model_summary: False
  include_performance_metrics: True
  telemetry: {telemetry_dir: figures, collect_telemetry_for_all_ranks: true}
"""

RUNS = {
    # as the recipes of Llama, SmolLM, GPT-2, Phi-3
    "llama full": LLAMA_FULL,
    "llama lora": LLAMA_FULL.replace("use_peft: False", "use_peft: True")
    + f"peft: {{lora_r: 8, lora_alpha: 16, {TARGETS}}}\n",
    "gpt2 pretraining": """
model: {model_max_length: 32, load_pretrained_weights: false, model_kwargs: {disable_dropout: true},
        torch_dtype_str: bfloat16}
data:
  train:
    datasets:
      - {dataset_name: HuggingFaceFW/fineweb-edu, dataset_path: texts.jsonl, subset: null, split: train,
         dataset_kwargs: {seq_length: 32}}
    stream: true
    pack: true
training: {trainer_type: TRL_SFT, save_final_model: true, adam_beta2: 0.95, adam_epsilon: 1e-6, compile: false}
""",
    "phi3 dpo lora": PAIRS
    + f"""
model: {{torch_dtype_str: float16, trust_remote_code: true, model_max_length: 128}}
training: {{trainer_type: TRL_DPO, use_peft: true, optimizer: adamw_torch_fused, learning_rate: 5e-5}}
peft: {{q_lora: false, {TARGETS}}}
""",
    # data
    "alpaca without system turn": reads(
        "dataset_name: Tatsu-Lab/Alpaca, dataset_path: alpaca.jsonl, dataset_kwargs: {include_system_prompt: false}"
    ),
    "text_sft of alpaca's columns": reads("dataset_name: text_sft, dataset_path: alpaca.jsonl"),
    "text_sft of conversations": reads("dataset_name: text_sft, dataset_path: oumi.jsonl"),
    "text_sft of a list": reads(
        "dataset_name: text_sft_jsonl, dataset_path: rows.json, dataset_kwargs: {format: oumi}"),
    "prompt and response": reads(
        "dataset_name: PromptResponseDataset, dataset_kwargs: "
        "{hf_dataset_path: asked.parquet, prompt_column: q, response_column: r}"
    ),
    "data set of the hub's": reads(
        "dataset_name: HuggingFaceDataset, split: 'train[:8]', dataset_kwargs: "
        "{hf_dataset_path: turns, messages_column: chat}"
    ),
    "saved to disk": reads("dataset_name: mine, dataset_path: disk"),
    "tulu": reads("dataset_name: allenai/tulu-3-sft-mixture, dataset_path: rows.jsonl, shuffle: true, seed: 3"),
    "fewer rows": reads("dataset_name: text_sft, dataset_path: rows.jsonl, sample_count: 5, shuffle: true, seed: 3"),
    "more rows": reads("dataset_name: text_sft, dataset_path: rows.jsonl, sample_count: 40"),
    "assistant only of the data set": reads(
        "dataset_name: text_sft, dataset_path: rows.jsonl, dataset_kwargs: {assistant_only: true, "
        "response_template: '<|im_start|>assistant', instruction_template: '<|im_start|>user'}"
    ),
    "all of the assistant's turns": reads(
        "dataset_name: text_sft, dataset_path: rows.jsonl", f"{COMPLETIONS}, train_target: ALL_ASSISTANT_TURNS"
    ),
    "the assistant's last turn": reads(
        "dataset_name: text_sft, dataset_path: rows.jsonl", f"{COMPLETIONS}, train_target: FINAL_ASSISTANT_TURN"
    ),
    "gpt-oss": reads(
        "dataset_name: text_sft, dataset_path: rows.jsonl",
        f"{COMPLETIONS}, collator_kwargs: {{response_template: '<|im_start|>assistant', instruction_template: u}}",
    ),
    "padding": reads("dataset_name: text_sft, dataset_path: rows.jsonl", "collator_name: text_with_padding"),
    "packed": reads("dataset_name: text_sft, dataset_path: rows.jsonl", "pack: true, stream: true"),
    "first exhausted": "data: {train: {seed: 1, mixture_strategy: first_exhausted, datasets: ["
    "{dataset_name: text_sft, dataset_path: rows.jsonl, mixture_proportion: 0.7},"
    "{dataset_name: yahma/alpaca-cleaned, dataset_path: alpaca.jsonl, mixture_proportion: 0.3}]}}\n"
    "training: {trainer_type: TRL_SFT}\n",
    "all exhausted": "data: {train: {seed: 1, mixture_strategy: all_exhausted, datasets: ["
    "{dataset_name: text_sft, dataset_path: rows.jsonl, mixture_proportion: 0.5},"
    "{dataset_name: yahma/alpaca-cleaned, dataset_path: alpaca.jsonl, mixture_proportion: 0.5}]}}\n"
    "training: {trainer_type: TRL_SFT}\n",
    "joined": "data: {train: {datasets: [{dataset_name: text_sft, dataset_path: rows.jsonl},"
    "{dataset_name: yahma/alpaca-cleaned, dataset_path: alpaca.jsonl}]}}\ntraining: {trainer_type: TRL_SFT}\n",
    # schedules and optimizers
    "linear": sft("lr_scheduler_type: linear, warmup_steps: 1"),
    "cosine with restarts": sft("lr_scheduler_type: cosine_with_restarts, lr_scheduler_kwargs: {num_cycles: 2}"),
    "cosine with a floor": sft("lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}"),
    "constant": sft("lr_scheduler_type: constant, warmup_ratio: 0.5, max_grad_norm: 0.0"),
    "constant with warm-up": sft("lr_scheduler_type: constant_with_warmup, warmup_ratio: 0.5, max_grad_norm: null"),
    "adamw_torch": sft("optimizer: adamw_torch, adam_beta1: 0.95, weight_decay: 1"),
    "sgd": sft("optimizer: sgd, learning_rate: '1e-3'"),
    "adafactor": sft("optimizer: adafactor, weight_decay: 0.1"),
    # saving
    "no checkpoints": sft("save_steps: 0"),
    "no model": sft("save_steps: 0, save_final_model: false"),
    "checkpoints by epoch": sft("save_steps: 0, save_epoch: true, max_steps: -1, num_train_epochs: 2, "
                                "per_device_train_batch_size: 8"),
    "adapter": lora(),
    "adapter merged": lora("peft_save_mode: MERGED, lora_dropout: 0"),
    "adapter and base": lora("peft_save_mode: ADAPTER_AND_BASE_MODEL, lora_init_weights: RANDOM"),
    "adapter on all linear layers": lora(
        "lora_target_modules: [all-linear], lora_bias: all, lora_init_weights: GAUSSIAN"),
    "adapter but for some": lora("lora_target_modules: [q_proj], lora_exclude_modules: ['.*layers.0.*']"),
    "a block of peft alone": sft("use_peft: false", "peft: {q_lora: true, lora_r: 64}\n"),
    # precision, memory, devices
    "float16": model("torch_dtype_str: f16"),
    "mixed precision": model("torch_dtype_str: float32", "mixed_precision_dtype: BF16"),
    "quoted": model("model_max_length: '64', trust_remote_code: 'yes'",
                    "seed: '7', use_deterministic: on, data_seed: 3"),
    "frozen": model("freeze_layers: [model.embed_tokens]"),
    "dropout": model("model_kwargs: {attention_dropout: 0.1}, attn_implementation: eager, device_map: auto"),
    "template": model("chat_template: llama3-instruct, tokenizer_name: tiny"),
    "template in capitals": model("chat_template: Zephyr"),
    "the tokenizer's own template": model("chat_template: auto, tokenizer_kwargs: {padding_side: left}"),
    "a block of fsdp alone": sft(
        "", "fsdp: {enable_fsdp: false, cpu_offload: true, sharding_strategy: HYBRID_SHARD}\n"),
    "not sharded": sft("", "fsdp: {enable_fsdp: true, sharding_strategy: NO_SHARD, auto_wrap_policy: NO_WRAP}\n"),
    "a block of deepspeed alone": sft("", "deepspeed: {zero_stage: ZERO_3, offload_param: {device: CPU}}\n"),
    "deepspeed": sft("", "deepspeed: {enable_deepspeed: true, zero_stage: ZERO_3}\n"),
    "fsdp with offload": sft("", "fsdp: {enable_fsdp: true, cpu_offload: true}\n"),
    # what is shown
    "text with a reference": sft(
        "logging_dir: '${training.output_dir}/runs', run_name: 'a b/c', logging_strategy: 'no'"),
    "no telemetry": sft("telemetry: {telemetry_dir: null}, log_level: debug, log_examples: true"),
    # trainer types and arguments
    "oumi": ROWS + "model: {model_max_length: 64}\ntraining: {trainer_type: OUMI, optimizer: ADAM, warmup_steps: 1}\n",
    "dpo": PAIRS + "training: {trainer_type: TRL_DPO, trainer_kwargs: {beta: 0.2, max_length: 64}}\n",
    "dpo of texts": "data: {train: {datasets: [{dataset_name: text_dpo_jsonl, dataset_path: rendered.jsonl}]}}\n"
    "training: {trainer_type: TRL_DPO}\n",
    "dpo of rows as they are": "data: {train: {datasets: [{dataset_name: org/pairs, dataset_path: pairs_disk}]}}\n"
    "training: {trainer_type: TRL_DPO, trainer_kwargs: {loss_type: ipo}}\n",
    "hf": ROWS + "model: {model_max_length: 64}\ntraining: {trainer_type: HF}\n",
    "sharded": sft("", "fsdp: {enable_fsdp: true, auto_wrap_policy: TRANSFORMER_BASED_WRAP, forward_prefetch: true, "
                   "transformer_layer_cls: LlamaDecoderLayer, sharding_strategy: HYBRID_SHARD}\n"),
    "whole modules": lora("lora_modules_to_save: [lm_head]"),
    "native sft": ROWS + "training: {trainer_type: SFT}\n",
    "native dpo": PAIRS + "training: {trainer_type: DPO, trainer_kwargs: {beta: 0.3}}\n",
    "native pretraining": DOCUMENTS + "model: {model_max_length: 32}\ntraining: {trainer_type: PRETRAIN}\n",
    "text field": "data: {train: {datasets: [{dataset_name: mine, dataset_path: texts_disk}]}}\n"
    "training: {trainer_type: TRL_SFT, trainer_kwargs: {dataset_text_field: body, packing: true}}\n",
}  # fmt: skip
"""Name -> a config that runs."""

OWN = {
    "llama full": "trl",
    "llama lora": "trl",
    "gpt2 pretraining": "hf",
    "packed": "hf",
    "saved to disk": "trl",
    "text field": "trl",
    "adafactor": "trl",
    "adapter and base": "trl",
    "adapter merged": "trl",
    "frozen": "trl",
    "hf": "hf",
    "dpo": "trl",
    "phi3 dpo lora": "trl",
    "sharded": "lightning",
    "whole modules": "lightning",
}
"""Name of a config that runs -> what drives the loop if nothing is said."""

EVALUATED = {
    "steps": ("eval_strategy: steps, eval_steps: 1", [1, 2], ()),
    "a share of max_steps": ("eval_strategy: steps, eval_steps: 0.5, max_steps: 3", [2, 3], ()),
    "epochs": (
        "eval_strategy: epoch, max_steps: -1, num_train_epochs: 2, per_device_eval_batch_size: 4", [8, 16],
        ("--engine", "lightning"),
    ),
    "never": ("eval_strategy: 'no', eval_steps: 1", [], ()),
    "the best": (
        "eval_strategy: steps, eval_steps: 1, save_steps: 1, trainer_kwargs: {load_best_model_at_end: true}", [1, 2], ()
    ),
}  # fmt: skip
"""Name -> options of `training`, the steps after which there is an evaluation, and what is typed."""

REFUSED = {
    # keys and values
    "a key that there is not": (sft("learning_rat: 1"), "training.learning_rat: unknown key", "'learning_rate'"),
    "a key of a data set": (
        reads("dataset_name: text_sft, dataset_pth: a"), "data.train.datasets[0].dataset_pth: unknown key", "_path"
    ),
    "a key of another section": (sft("model_max_length: 8"), "training.model_max_length", "model.model_max_length"),
    "peft_method": (lora("peft_method: lora"), "peft.peft_method: unknown key", ""),
    "a trainer type in lower case": (sft("").replace("TRL_SFT", "trl_sft"), "training.trainer_type", "TRL_SFT"),
    "a target in lower case": (
        reads("dataset_name: text_sft, dataset_path: rows.jsonl", f"{COMPLETIONS}, train_target: final_assistant_turn"),
        "data.train.train_target", "FINAL_ASSISTANT_TURN",
    ),
    "a stage as a number": (sft("", "deepspeed: {zero_stage: 3}\n"), "deepspeed.zero_stage", "ZERO_3"),
    "PISSA": (lora("lora_init_weights: PISSA"), "peft.lora_init_weights", "PISA"),
    "a strategy in capitals": (
        reads("dataset_name: text_sft, dataset_path: rows.jsonl", "mixture_strategy: FIRST_EXHAUSTED"),
        "data.train.mixture_strategy", "first_exhausted",
    ),
    "a float for a number of steps": (sft("max_steps: 3.0"), "training.max_steps", "3.0"),
    "workers in quotes": (sft("dataloader_num_workers: '4'"), "training.dataloader_num_workers", ""),
    "targets that are no list": (lora("lora_target_modules: q_proj"), "peft.lora_target_modules", "q_proj"),
    "a section of null": ("data: null\n", "data", ""),
    "no data": ("data: {train: {datasets: []}}\n", "data.train.datasets", ""),
    "a reference for a number": (sft("max_steps: '${training.seed}'"), "training.max_steps", "${training.seed}"),
    "reinforcement learning": (sft("").replace("TRL_SFT", "TRL_GRPO"), "data.train.datasets", "reads prompts"),
    "rewards": (sft("reward_functions: [f]"), "training.reward_functions", ""),
    # recipes that Oumi can't run either
    "beta of sft": (sft("trainer_kwargs: {beta: 0.1}"), "training.trainer_kwargs.beta", ""),
    "a field again": (sft("trainer_kwargs: {learning_rate: 1}"), "training.trainer_kwargs", "learning_rate"),
    "qwen2-instruct": (model("chat_template: qwen2-instruct"), "model.chat_template", "qwen2-instruct"),
    "evaluation without data": (sft("eval_strategy: steps"), "training.eval_strategy", "data.validation"),
    "data that are not there": (
        reads("dataset_name: text_sft, dataset_path: path/to/data.jsonl"), "data.train.datasets[0].dataset_path", ""
    ),
    "a stream without an end": (
        reads("dataset_name: allenai/c4, dataset_path: texts.jsonl, dataset_kwargs: {seq_length: 8}", "stream: true",
              "max_steps: -1"), "training.max_steps", "",
    ),
    "no window": (reads("dataset_name: allenai/c4, dataset_path: texts.jsonl", "stream: true"),
                  "data.train.datasets[0].dataset_kwargs.seq_length", "missing"),
    # proportions
    "proportions of some": (
        "data: {train: {datasets: [{dataset_name: a, mixture_proportion: 0.5}, {dataset_name: b}]}}\n",
        "data.train", "mixture_proportion",
    ),
    "proportions that are no whole": (
        "data: {train: {datasets: [{dataset_name: a, mixture_proportion: 0.5},"
        "{dataset_name: b, mixture_proportion: 0.4}]}}\n", "data.train", "0.9",
    ),
    # not on the reach of this
    "vision": (
        "data: {train: {collator_name: vision_language_with_padding, datasets: [{dataset_name: merve/vqav2-small,"
        "dataset_kwargs: {processor_name: p, return_tensors: true}}]}}\ntraining: {trainer_type: TRL_SFT}\n",
        "data.train.datasets[0].dataset_kwargs.processor_name", "images are not trained on",
    ),
    "vision dpo": (
        "data: {train: {datasets: [{dataset_name: vision_dpo_jsonl, dataset_path: pairs.jsonl}]}}\n"
        "training: {trainer_type: TRL_DPO}\n", "data.train.datasets[0].dataset_name", "images are not trained on",
    ),
    "torchdata": (reads("dataset_name: text_sft, dataset_path: rows.jsonl", "use_torchdata: true"),
                  "data.train.use_torchdata", ""),
    "an address of a model": (model("model_name: 'oumi://tiny'"), "model.model_name", "address"),
    "an address of data": (reads("dataset_name: 'oumi://rows'"), "data.train.datasets[0].dataset_name", "address"),
    "qlora of a base in fp4": (lora("q_lora: true"), "peft.bnb_4bit_quant_type", "nf4"),
    "qlora and a base": (
        lora("q_lora: true, q_lora_bits: 8, peft_save_mode: ADAPTER_AND_BASE_MODEL"), "peft.peft_save_mode", "ONLY"
    ),
    "sgd with momentum": (sft("optimizer: sgd, sgd_momentum: 0.9"), "training.sgd_momentum", ""),
    "adamw of TRL": (sft("optimizer: adamw"), "training.optimizer", "adamw_torch"),
    "a schedule that there is not": (sft("lr_scheduler_type: cosin"), "training.lr_scheduler_type", "'cosine'"),
    "reentrant checkpointing": (
        sft("enable_gradient_checkpointing: true, gradient_checkpointing_kwargs: {use_reentrant: true}"),
        "training.gradient_checkpointing_kwargs.use_reentrant", "",
    ),
}  # fmt: skip
"""Name -> a config that is refused, what the message begins with, and what else is in it."""
