"""Configurations as Oumi's users write them: each loads, is complete, and survives being saved."""

import pytest

from oumi_pl.core.configs import (
    AutoWrapPolicy,
    BackwardPrefetch,
    DataParams,
    DatasetParams,
    DatasetSplitParams,
    ModelParams,
    OumiConfigError,
    PeftParams,
    PeftSaveMode,
    ShardingStrategy,
    TrainerType,
    TrainingConfig,
    TrainingParams,
    ZeRORuntimeStage,
)

ALPACA = """
model:
  model_name: HuggingFaceTB/SmolLM2-135M-Instruct
  model_max_length: 2048
  torch_dtype_str: bfloat16
  attn_implementation: sdpa
  load_pretrained_weights: True
  trust_remote_code: True
data:
  train:
    datasets:
      - dataset_name: yahma/alpaca-cleaned
training:
  trainer_type: TRL_SFT
  save_final_model: True
  save_steps: 100
  max_steps: 10
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  ddp_find_unused_parameters: False
  optimizer: adamw_torch
  learning_rate: 2.0e-05
  compile: False
  dataloader_num_workers: auto
  dataloader_prefetch_factor: 32
  seed: 192847
  use_deterministic: True
  logging_steps: 5
  log_model_summary: False
  empty_device_cache_steps: 50
  output_dir: output/smollm135m.fft
  include_performance_metrics: True
"""

QLORA_DPO = """
model:
  model_name: meta-llama/Llama-3.2-1B-Instruct
  model_max_length: 131072
  torch_dtype_str: "bfloat16"
  attn_implementation: "sdpa"
data:
  train:
    datasets:
      - dataset_name: mlabonne/orpo-dpo-mix-40k
        split: train
training:
  trainer_type: TRL_DPO
  use_peft: true
  num_train_epochs: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  enable_gradient_checkpointing: true
  gradient_checkpointing_kwargs: {use_reentrant: false}
  learning_rate: 3e-04
  lr_scheduler_type: cosine
  warmup_ratio: 0.1
  max_grad_norm: 0.5
  trainer_kwargs: {beta: 0.1}
  output_dir: output/llama3.2-1b.qlora.dpo
peft:
  q_lora: True
  lora_r: 16
  lora_alpha: 32
  lora_dropout: 0
  lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
  bnb_4bit_quant_type: nf4
  bnb_4bit_compute_dtype: bfloat16
  peft_save_mode: MERGED
"""

FSDP = """
model: {model_name: meta-llama/Llama-3.1-8B-Instruct, model_max_length: 8192, torch_dtype_str: bfloat16,
        enable_liger_kernel: True}
data:
  train:
    datasets:
      - {dataset_name: PromptResponseDataset, split: "train_sft[:50%]", shuffle: True, seed: 1,
         dataset_kwargs: {hf_dataset_path: "openai/gsm8k", prompt_column: question, response_column: answer},
         mixture_proportion: 0.25}
      - {dataset_name: yahma/alpaca-cleaned, transform_num_workers: auto, mixture_proportion: 0.75}
    collator_name: text_completions_only_with_padding
    train_target: ALL_ASSISTANT_TURNS
    mixture_strategy: all_exhausted
  validation:
    datasets: [{dataset_name: yahma/alpaca-cleaned, split: "train[:1%]"}]
    collator_name: text_completions_only_with_padding
training:
  trainer_type: TRL_SFT
  eval_strategy: steps
  eval_steps: 0.1
  enable_wandb: True
  run_name: llama3.1 8b/full
  optimizer: adamw_torch_fused
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {min_lr_rate: 0.1}
fsdp:
  enable_fsdp: True
  sharding_strategy: HYBRID_SHARD
  forward_prefetch: True
  backward_prefetch: BACKWARD_POST
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls: LlamaDecoderLayer
"""

DEEPSPEED = """
model: {model_name: meta-llama/Llama-3.1-8B-Instruct}
data: {train: {datasets: [{dataset_name: yahma/alpaca-cleaned}]}}
training: {trainer_type: TRL_SFT}
deepspeed:
  enable_deepspeed: True
  zero_stage: ZERO_3
  offload_optimizer: {device: CPU, pin_memory: True}
  offload_param: {device: CPU}
  precision: BF16
  reduce_bucket_size: auto
"""

PRETRAINING = """
model:
  model_name: gpt2
  model_max_length: 1024
  load_pretrained_weights: False
  model_kwargs: {disable_dropout: True}
data:
  train:
    datasets:
      - dataset_name: HuggingFaceFW/fineweb-edu
        subset: sample-10BT
        split: train
        dataset_kwargs: {seq_length: 1024}
    stream: True
    pack: True
training: {trainer_type: OUMI, max_steps: 19073, num_train_epochs: 0, warmup_steps: 715, weight_decay: 0.1,
           adam_beta2: 0.95, max_grad_norm: 1.0, logging_dir: "${training.output_dir}/runs"}
"""

SAMPLES = {"alpaca": ALPACA, "dpo": QLORA_DPO, "fsdp": FSDP, "deepspeed": DEEPSPEED, "pretraining": PRETRAINING}


@pytest.fixture
def read(tmp_path):
    def load(text):
        (tmp_path / "c.yaml").write_text(text)
        return TrainingConfig.from_yaml(tmp_path / "c.yaml")

    return load


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_a_sample_is_complete_and_survives_being_saved(read, tmp_path, text):
    config = read(text)
    config.finalize_and_validate()
    config.to_yaml(tmp_path / "saved.yaml")
    saved = TrainingConfig.from_yaml(tmp_path / "saved.yaml")
    assert saved == config
    saved.finalize_and_validate()
    assert saved == config


def test_alpaca(read):
    config = read(ALPACA)
    assert config.data.train.datasets == [DatasetParams(dataset_name="yahma/alpaca-cleaned")]
    assert config.training.trainer_type is TrainerType.TRL_SFT
    assert config.training.learning_rate == 2e-5
    assert config.training.dataloader_num_workers == "auto"
    assert config.training.trainer_kwargs == {"max_length": 2048}
    assert config.model.dtype == "bfloat16"
    assert config.training.num_train_epochs == 3


def test_dpo_with_adapters(read):
    config = read(QLORA_DPO)
    assert config.training.use_peft
    assert config.training.trainer_kwargs == {"beta": 0.1, "max_length": 131072}
    assert (config.peft.lora_r, config.peft.lora_alpha, config.peft.lora_dropout) == (16, 32, 0.0)
    assert config.peft.peft_save_mode is PeftSaveMode.MERGED
    assert config.training.learning_rate == 3e-4


def test_sharded(read):
    config = read(FSDP)
    assert config.fsdp.sharding_strategy is ShardingStrategy.HYBRID_SHARD
    assert config.fsdp.backward_prefetch is BackwardPrefetch.BACKWARD_POST
    assert config.fsdp.auto_wrap_policy is AutoWrapPolicy.TRANSFORMER_BASED_WRAP
    assert config.training.trainer_kwargs == {"max_length": 8192, "use_liger_kernel": True}
    assert config.training.run_name == "llama3.1_8b_full"
    assert [dataset.mixture_proportion for dataset in config.data.train.datasets] == [0.25, 0.75]


def test_deepspeed(read):
    config = read(DEEPSPEED)
    assert config.deepspeed.zero_stage is ZeRORuntimeStage.ZERO_3
    assert config.deepspeed.offload_param.pin_memory
    assert config.deepspeed.reduce_bucket_size == "auto"


def test_python_says_the_same_as_a_file(read):
    """The way of Oumi's own examples, where sections are objects."""
    config = TrainingConfig(
        data=DataParams(train=DatasetSplitParams(datasets=[DatasetParams(dataset_name="mlabonne/orpo-dpo-mix-40k")])),
        model=ModelParams(
            model_name="meta-llama/Llama-3.2-1B-Instruct",
            model_max_length=131072,
            torch_dtype_str="bfloat16",
            attn_implementation="sdpa",
        ),
        training=TrainingParams(
            trainer_type=TrainerType.TRL_DPO,
            use_peft=True,
            per_device_train_batch_size=2,
            enable_gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=3e-4,
            lr_scheduler_type="cosine",
            warmup_ratio=0.1,
            max_grad_norm=0.5,
            trainer_kwargs={"beta": 0.1},
            output_dir="output/llama3.2-1b.qlora.dpo",
        ),
        peft=PeftParams(
            q_lora=True,
            lora_r=16,
            lora_alpha=32,
            lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="bfloat16",
            peft_save_mode=PeftSaveMode.MERGED,
        ),
    )
    assert config == read(QLORA_DPO)


def test_a_section_does_not_change_what_it_was_made_of():
    arguments = {"beta": 0.1}
    training = TrainingParams(trainer_type=TrainerType.TRL_DPO, trainer_kwargs=arguments)
    TrainingConfig(model=ModelParams(model_max_length=8), training=training)
    assert arguments == {"beta": 0.1}


def test_a_misspelt_field_can_not_be_set():
    training = TrainingParams()
    training.learning_rate = 1e-3
    with pytest.raises(
        OumiConfigError, match="TrainingParams has no field 'learning_rat'; did you mean 'learning_rate'"
    ):
        training.learning_rat = 1e-3
