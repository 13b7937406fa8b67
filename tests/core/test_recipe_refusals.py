"""What has no counterpart is refused by its name, with what to do instead."""

import pytest

from oumi_pl.errors import UserError
from tests.core.oumi import recipe

PEFT = {"training__use_peft": True}
FSDP = {"fsdp__enable_fsdp": True}
ZERO = {"deepspeed__enable_deepspeed": True, "deepspeed__zero_stage": "ZERO_3"}
TURNS = {"return_conversations": True, "return_conversations_format": "dict"}
GKD = {
    "dataset": {"dataset_name": "yahma/alpaca-cleaned", "dataset_kwargs": TURNS},
    "training__trainer_type": "TRL_GKD",
    "training__gkd__teacher_model_name_or_path": "org/large",
    "training__gkd__lmbda": 0,
}
KTO = {"dataset": {"dataset_name": "trl-lib/kto-mix-14k"}, "training__trainer_type": "TRL_KTO"}
DPO = {"dataset": {"dataset_name": "mlabonne/orpo-dpo-mix-40k"}, "training__trainer_type": "TRL_DPO"}


def kwargs(text, **rest):
    return {"training__trainer_kwargs": text, **rest}


def dataset(**fields):
    return {"dataset": {"dataset_name": "text_sft", "dataset_path": "rows.jsonl", **fields}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # model
        ({"model__model_name": "oumi://x"}, r"model\.model_name: 'oumi://x' is an address"),
        ({"model__model_name": "MLPEncoder"}, r"model\.model_name: Oumi's MLPEncoder is no language model"),
        ({"model__adapter_model": "a"}, r"model\.adapter_model: a is set, .* merge it into its base"),
        ({"model__torch_dtype_str": "float64"}, r"model\.torch_dtype_str: float64"),
        ({"model__chat_template": "zephyrr"}, r"model\.chat_template: .*'zephyrr'; did you mean 'zephyr'"),
        ({"model__chat_template": "qwen2-instruct"}, r"'qwen2-instruct'; .*'auto' is the tokenizer's own$"),
        ({"model__chat_template": "llava"}, r"model\.chat_template: llava is for models that see"),
        ({"model__tokenizer_kwargs": '{"use_fast": false}'}, r"model\.tokenizer_kwargs\.use_fast"),
        ({"model__processor_kwargs": '{"a": 1}'}, r"model\.processor_kwargs: .*images are not trained on"),
        (
            {"model__model_kwargs": '{"quantization_config": {"quant_method": "awq"}}'},
            r"model\.model_kwargs\.quantization_config: weights in awq can't be trained; name a model in full",
        ),
        # adapters
        ({**PEFT, "peft__lora_init_weights": "PISA"}, r"peft\.lora_init_weights: PISA .*rewrites the base"),
        ({**PEFT, "peft__lora_init_weights": "EVA"}, r"peft\.lora_init_weights: EVA .*say that"),
        ({**PEFT, "peft__lora_task_type": "SEQ_CLS"}, r"peft\.lora_task_type: SEQ_CLS is set"),
        ({**PEFT, "peft__q_lora": True}, r"peft\.bnb_4bit_quant_type: fp4 has no counterpart; set nf4"),
        (
            {**PEFT, "peft__q_lora": True, "peft__bnb_4bit_quant_type": "nf4"},
            r"peft\.bnb_4bit_compute_dtype: float32 has no counterpart; set bfloat16",
        ),
        ({**PEFT, **FSDP, "peft__q_lora": True, "peft__q_lora_bits": 8}, r"peft\.q_lora_bits: 8 bits are not sharded"),
        (
            {**PEFT, **FSDP, "peft__peft_save_mode": "ADAPTER_AND_BASE_MODEL"},
            r"peft\.peft_save_mode: .*set ADAPTER_ONLY",
        ),
        # devices
        ({**FSDP, "fsdp__sharding_strategy": "SHARD_GRAD_OP"}, r"fsdp\.sharding_strategy: .* FULL_SHARD gives"),
        ({**FSDP, "fsdp__mixed_precision": "fp16"}, r"fsdp\.mixed_precision: fp16"),
        ({**ZERO, "deepspeed__precision": "FP16"}, r"deepspeed\.precision: fp16 is not sharded"),
        ({**ZERO, "deepspeed__gradient_clipping": 3}, r"deepspeed\.gradient_clipping: 3, but section training says 1"),
        ({**ZERO, "deepspeed__deepspeed_config_path": "x.json"}, r"deepspeed_config_path: .*name zero_stage"),
        ({**ZERO, "engine": "trl"}, r"deepspeed\.enable_deepspeed: trl can't do several devices"),
        ({"training__nccl_default_timeout_minutes": 3}, r"training\.nccl_default_timeout_minutes: 3\.0 is set"),
        # the loop
        ({"training__optimizer": "adamw"}, r"training\.optimizer: no counterpart of 'adamw'; did you mean"),
        ({"training__sgd_momentum": 0.9}, r"training\.sgd_momentum: TRL_SFT has no momentum"),
        ({"training__lr_scheduler_type": "cosin"}, r"training\.lr_scheduler_type: .*'cosin'; did you mean 'cosine'"),
        ({"training__lr_scheduler_kwargs": '{"a": 1}'}, r"training\.lr_scheduler_kwargs\.a: linear has no such"),
        (
            {"training__lr_scheduler_type": "cosine_with_min_lr"},
            r"training\.lr_scheduler_kwargs: .*one of them has to be set",
        ),
        (
            {"training__gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
            r"training\.gradient_checkpointing_kwargs\.use_reentrant: True has no counterpart",
        ),
        (
            {"engine": "trl", "training__save_steps": 0, "training__save_epoch": True},
            r"training\.save_epoch: trl can't do checkpoints by epoch here",
        ),
        ({**FSDP, "engine": "hf"}, r"fsdp\.enable_fsdp: hf can't do several devices here"),
        ({"training__eval_strategy": "epoch"}, r"training\.eval_strategy: epoch needs a dataset in data\.validation"),
        ({"training__metrics_function": "f"}, r"training\.metrics_function: f is set"),
        ({"training__telemetry__track_gpu_temperature": True}, r"telemetry\.track_gpu_temperature: .*system metrics"),
        (
            {"training__profiler__enable_cpu_profiling": True, "engine": "trl"},
            r"training\.profiler: trl can't do profiling here",
        ),
        ({"training__output_dir": ".hidden"}, r"training\.output_dir: '\.hidden'"),
        (kwargs('{"max_seq_length": 8}', **DPO), r"trainer_kwargs\.max_seq_length: .*model\.model_max_length"),
        (kwargs('{"packin": true}'), r"training\.trainer_kwargs\.packin: has no counterpart; did you mean 'packing'"),
        (kwargs('{"loss_type": "dft"}'), r"training\.trainer_kwargs\.loss_type: 'dft' .*nll"),
        (kwargs('{"max_prompt_length": 8}', **DPO), r"training\.trainer_kwargs\.max_prompt_length"),
        (kwargs('{"loss_type": "sigmoi"}', **DPO), r"training\.trainer_kwargs\.loss_type: .*did you mean 'sigmoid'"),
        (kwargs('{"truncation_mode": "keep_end"}', **DPO), r"training\.trainer_kwargs\.truncation_mode: 'keep_end'"),
        (
            kwargs('{"max_length": 8}', training__trainer_type="OUMI", model__model_max_length=8),
            r"training\.trainer_kwargs: Oumi's own trainer reads none",
        ),
        ({"training__trainer_type": "HF"}, r"model\.model_max_length: missing"),
        # data
        ({"data__train__use_torchdata": True}, r"data\.train\.use_torchdata: true is set"),
        (
            {"data__train__collator_name": "vision_language_with_padding"},
            r"data\.train\.collator_name: vision_language_with_padding is for images",
        ),
        (
            {"data__train__collator_name": "text_completions_only_with_padding"},
            r"data\.train\.train_target: missing",
        ),
        (
            {
                "data__train__collator_name": "text_completions_only_with_padding",
                "data__train__collator_kwargs": '{"tool_response_template": "x"}',
            },
            r"data\.train\.collator_kwargs\.tool_response_template: results of tools",
        ),
        (
            {
                "dataset": {"dataset_name": "merve/vqav2-small"},
                "data__train__use_torchdata": True,
                "model__compile": False,
            },
            r"datasets\[0\]\.dataset_name: .*images are not trained",
        ),
        ({"dataset": {"dataset_name": "merve/vqav2-small"}}, r"datasets\[0\]\.dataset_name: .*images are not trained"),
        (dataset(dataset_kwargs={"processor_name": "p"}), r"datasets\[0\]\.dataset_kwargs\.processor_name: .*images"),
        (
            dataset(dataset_kwargs={"assistant_onl": 1}),
            r"dataset_kwargs\.assistant_onl: .*did you mean 'assistant_only'",
        ),
        (dataset(dataset_kwargs={"task": "generation"}), r"dataset_kwargs\.task: 'generation' has no counterpart"),
        (dataset(dataset_path="rows.xlsx"), r"dataset_path: rows\.xlsx: spreadsheets are not read"),
        (dataset(split="train[:3]"), r"datasets\[0\]\.split: .*sample_count"),
        (dataset(sample_count=0), r"datasets\[0\]\.sample_count: is 0"),
        ({"dataset": {"dataset_name": "text_sft"}}, r"dataset_path: missing: text_sft reads a local file"),
        ({"dataset": {"dataset_name": "PromptResponseDataset"}}, r"dataset_kwargs\.hf_dataset_path: missing"),
        ({"dataset": {"dataset_name": "nvidia/ChatRAG-Bench"}}, r"dataset_name: .*text_sft_jsonl"),
        (
            {"dataset": {"dataset_name": "org/x", "dataset_path": "a.jsonl"}},
            r"dataset_path: Oumi ignores it for 'org/x'",
        ),
        (
            {"dataset": [{"dataset_name": "allenai/c4"}, {"dataset_name": "org/x"}]},
            r"data\.train\.datasets: document and raw data can't be mixed",
        ),
        ({"dataset": {"dataset_name": "allenai/c4"}}, r"dataset_kwargs\.seq_length: missing"),
        (
            {
                "dataset": {"dataset_name": "allenai/c4", "dataset_kwargs": {"seq_length": 8}},
                "data__train__stream": True,
            },
            r"training\.max_steps: missing",
        ),
        ({"training__trainer_type": "TRL_DPO"}, r"data\.train\.datasets: TRL_DPO reads pairs"),
        ({"training__trainer_type": "TRL_KTO"}, r"data\.train\.datasets: TRL_KTO reads responses with a label"),
        ({"dataset": {"dataset_name": "trl-lib/kto-mix-14k"}}, r"data\.train\.datasets: .*TRL_KTO trains on"),
        (kwargs('{"loss_type": "bco"}', **KTO), r"training\.trainer_kwargs\.loss_type: no counterpart of 'bco'"),
        (
            kwargs('{"desirable_weigt": 1}', **KTO),
            r"desirable_weigt: has no counterpart; did you mean 'desirable_weight'",
        ),
        ({**GKD, "training__gkd__seq_kd": True}, r"training\.gkd\.seq_kd: true .*with `oumi_pl generate`.* to false"),
        ({**GKD, "training__gkd__disable_dropout": False}, r"training\.gkd\.disable_dropout: False has no"),
        ({**GKD, "training__gkd__teacher_model_name_or_path": "null"}, r"teacher_model_name_or_path: missing"),
        (
            {**GKD, "training__gkd__teacher_model_init_kwargs": '{"revision": "x"}'},
            r"training\.gkd\.teacher_model_init_kwargs\.revision: has no counterpart",
        ),
        (
            {**GKD, "dataset": {"dataset_name": "yahma/alpaca-cleaned"}},
            r"dataset_kwargs\.return_conversations: missing: TRL_GKD reads conversations; set it to true",
        ),
        ({**GKD, "dataset": {"dataset_name": "allenai/c4"}}, r"data\.train\.datasets: TRL_GKD reads conversations"),
        ({**GKD, "data__train__pack": True}, r"data\.train\.pack: TRL_GKD does not pack"),
        ({**KTO, "data__train__pack": True}, r"data\.train\.pack: responses with a label are not packed"),
        ({"dataset": {"dataset_name": "mlabonne/orpo-dpo-mix-40k"}}, r"data\.train\.datasets: .*TRL_DPO trains on"),
        ({**DPO, "data__train__pack": True}, r"data\.train\.pack: pairs of responses are not packed"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(**changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_arguments_of_trls_sft_are_none_of_its_gkd():
    with pytest.raises(UserError, match=r"^training\.trainer_kwargs\.packing: has no counterpart"):
        recipe(**kwargs('{"packing": true}', **GKD))
