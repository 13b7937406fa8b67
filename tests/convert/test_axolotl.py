"""axolotl's YAML: each key becomes the one that means the same, or is named with the reason."""

import itertools
import math

import pytest

from oumi_pl.convert import training
from oumi_pl.convert.axolotl import KEYS
from oumi_pl.convert.settings import Settings
from oumi_pl.errors import UserError
from tests.convert import samples
from tests.convert.helpers import assert_fits, at, changed_by_null, converted, silent_keys

SFT = {
    "base_model": "org/base",
    "datasets": [{"path": "org/rows", "type": "alpaca"}],
    "learning_rate": "2e-5",
    "micro_batch_size": 2,
}
CHAT = SFT | {"datasets": [{"path": "org/chats", "type": "chat_template"}]}
LORA = SFT | {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
PAIRS = SFT | {"rl": "dpo", "datasets": [{"path": "org/pairs", "type": "chatml.intel"}]}


@pytest.mark.parametrize(
    ("base", "more", "place", "value"),
    [
        # what axolotl takes where nothing is said
        (SFT, {}, "data.max_length", 512),
        (SFT, {}, "data.overflow", "drop"),
        (SFT, {}, "model.optimizer.class_path", "AdamW"),
        (SFT, {}, "model.optimizer.init_args", {"lr": 2e-5, "weight_decay": 0.0}),
        (SFT, {}, "model.schedule", {"class_path": "Cosine", "init_args": {"warmup": 0.03}}),
        (SFT, {}, "trainer.max_epochs", 1),
        (SFT, {}, "trainer.gradient_clip_val", 1.0),
        (SFT, {}, "data.group_by_length", False),
        (SFT, {}, "data.packing", None),
        (SFT, {}, "data.train_on", None),
        (SFT, {}, "trainer.precision", "bf16-mixed"),  # axolotl's default of bf16 is auto
        (SFT, {}, "seed_everything", 42),
        # keys of the model
        (SFT, {"bf16": "auto"}, "model.dtype", "bfloat16"),
        (SFT, {"bf16": False}, "trainer.precision", None),
        (SFT, {"fp16": True}, "trainer.precision", "16-mixed"),
        (SFT, {"bf16": "auto"}, "trainer.precision", "bf16-mixed"),
        (SFT, {"fp16": True}, "model.dtype", "float32"),
        (SFT, {"gradient_checkpointing": True}, "model.gradient_checkpointing", True),
        (SFT, {"gradient_checkpointing": False}, "model.gradient_checkpointing", None),
        (LORA, {}, "model.lora", {"r": 8, "lora_alpha": 16}),
        (LORA, {"lora_dropout": 0.05}, "model.lora.lora_dropout", 0.05),
        (LORA, {"lora_target_linear": None}, "model.lora.target_modules", None),
        (
            LORA,
            {"lora_target_linear": None, "lora_target_modules": ["q_proj"]},
            "model.lora.target_modules",
            ["q_proj"],
        ),
        (LORA, {"adapter": "qlora", "load_in_4bit": True}, "model.quantization", "nf4"),
        (LORA, {"load_in_8bit": True}, "model.quantization", "int8"),
        (LORA, {"loraplus_lr_ratio": 16}, "model.groups", {"*lora_B*": {"lr_factor": 16.0}}),
        # optimizer and schedule
        (SFT, {"optimizer": "adamw_bnb_8bit"}, "model.optimizer.class_path", "bitsandbytes.optim.AdamW8bit"),
        (SFT, {"adam_beta2": 0.95}, "model.optimizer.betas", [0.9, 0.95]),
        (SFT, {"weight_decay": 0.1}, "model.optimizer.weight_decay", 0.1),
        (SFT, {"warmup_steps": 10}, "model.schedule.warmup", 10),
        (SFT, {"warmup_steps": 1}, "model.schedule.warmup", 2),
        (SFT, {"warmup_ratio": 0.1}, "model.schedule.warmup", 0.1),
        (SFT, {"cosine_min_lr_ratio": 0.1}, "model.schedule.floor", 0.1),
        (SFT, {"lr_scheduler": "constant"}, "model.schedule", None),
        (SFT, {"lr_scheduler": "constant_with_warmup", "warmup_steps": 5}, "model.schedule.class_path", "Constant"),
        # rows
        (SFT, {"sequence_len": 2048}, "data.max_length", 2048),
        (SFT, {"excess_length_strategy": "truncate"}, "data.overflow", "keep_start"),
        (SFT, {"sample_packing": True}, "data.packing", True),
        (SFT, {"train_on_inputs": True}, "data.train_on", "all"),
        (SFT, {"val_set_size": 0.05}, "data.validation", 0.05),
        (SFT, {"special_tokens": {"pad_token": "<pad>"}}, "data.pad_token", "<pad>"),
        (SFT, {"tokens": ["<a>"]}, "data.tokens", ["<a>"]),
        (SFT, {"dataset_exact_deduplication": True}, "data.duplicates", "drop"),
        (SFT, {"batch_size": 8}, "trainer.accumulate_grad_batches", 4),
        (SFT, {}, "data.train.format", "oumi_pl.convert.formats.alpaca"),
        (CHAT, {}, "data.train.format", "messages"),
        (CHAT, {}, "data.template", None),
        (CHAT, {"chat_template": "gemma3"}, "data.template", "trl/gemma3"),
        # the loop
        (SFT, {"max_steps": 20}, "trainer.max_epochs", None),
        (SFT, {"num_epochs": 3}, "trainer.max_epochs", 3),
        (SFT, {"val_set_size": 0.1, "evals_per_epoch": 4}, "trainer.val_check_interval", 0.25),
        (SFT, {"save_steps": 50, "save_total_limit": 2}, "checkpoint", {"every": 50, "keep": 2}),
        (SFT, {"output_dir": "./outputs/mine"}, "name", "mine"),
        (SFT, {"deepspeed": "deepspeed_configs/zero2.json"}, "trainer.strategy", "ddp"),
        (SFT, {"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "trainer.strategy", "fsdp2"),
        (SFT, {"fsdp_config": {"fsdp_version": 2}}, "trainer.strategy", "fsdp2"),
        (LORA, {"load_in_8bit": True, "fsdp_config": {"fsdp_version": 2}}, "trainer.strategy", "ddp"),
        (SFT, {"wandb_project": "mine"}, "logger", "wandb"),
        # objectives
        (PAIRS, {}, "model.loss", {"class_path": "Sigmoid", "init_args": {"beta": 0.1}}),
        (PAIRS, {"rl_beta": 0.5}, "model.loss.beta", 0.5),
        (PAIRS, {"rl": "ipo"}, "model.loss.class_path", "IPO"),
        (PAIRS, {"rl": "orpo", "orpo_alpha": 0.2}, "model.loss", {"class_path": "ORPO", "init_args": {"beta": 0.2}}),
        (PAIRS, {}, "data.template", "chatml"),
        (PAIRS, {}, "data.train", {"path": "org/pairs", "format": "question_preference"}),
        (
            SFT | {"rl": "kto", "datasets": [{"path": "org/f", "type": "llama3.ultra"}]},
            {"kto_desirable_weight": 0.2},
            "model.desirable_weight",
            0.2,
        ),
        (
            SFT | {"datasets": [{"path": "org/text", "type": "completion", "field": "body"}]},
            {},
            "data.train.columns",
            {"text": "body"},
        ),
        (SFT | {"datasets": [{"path": "org/text", "type": "completion"}]}, {}, "model.class_path", "Pretrain"),
    ],
)
def test_a_key_becomes_the_one_that_means_the_same(base, more, place, value):
    tree, settings = converted({key: one for key, one in (base | more).items() if one is not None})
    assert at(tree, place) == value
    assert set(more) - {key for key, one in more.items() if one is None} <= set(settings.notes.became) | {"plugins"}
    assert_fits(tree)


def test_bf16_that_is_null_is_off():
    tree, _ = converted(SFT | {"bf16": None})
    assert at(tree, "trainer.precision") is None


SAMPLES = {key: samples.TRAINING.get(key) for key in KEYS.translated if key in samples.TRAINING} | samples.AXOLOTL
SAMPLES |= {"gradient_checkpointing": True, "bf16": False}
KINDS = {
    "SFT": SFT,
    "chats": CHAT | {"val_set_size": 0.1},
    "LoRA": LORA,
    "QLoRA": LORA | {"adapter": "qlora"},
    "DPO": PAIRS,
    "SimPO": PAIRS | {"rl": "simpo"},
    "KTO": SFT | {"rl": "kto", "datasets": [{"path": "org/f", "type": "llama3.ultra"}]},
    "reward": SFT | {"reward_model": True, "datasets": [{"path": "org/p", "type": "bradley_terry.chat_template"}]},
    "texts": SFT | {"datasets": [{"path": "org/text", "type": "completion"}]},
    "stream": {key: value for key, value in SFT.items() if key != "datasets"}
    | {"pretraining_dataset": "org/text", "max_steps": 9},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_changes_the_recipe_or_is_named_with_a_reason(kind):
    defaults = {"QLoRA": ["load_in_4bit"], "texts": ["sample_packing"], "stream": ["sample_packing"]}.get(kind, [])
    assert silent_keys(KINDS[kind], SAMPLES, KEYS) == defaults


def test_a_key_that_no_code_reads_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Settings, "name_unread", lambda settings: None)
    silent = silent_keys(SFT, SAMPLES, KEYS)
    assert {"lora_r", "eaft_alpha", "simpo_gamma"} <= set(silent)


@pytest.mark.parametrize(
    ("kind", "changed"), [("SFT", {"bf16", "shuffle_merged_datasets"}), ("DPO", {"bf16", "shuffle_merged_datasets"})]
)
def test_null_is_the_default_but_where_axolotl_reads_it_otherwise(kind, changed):
    assert changed_by_null(KINDS[kind], SAMPLES, KEYS) == changed


def test_null_turns_off_what_is_on_by_default():
    assert at(converted(KINDS["stream"])[0], "data.isolate") is True
    assert at(converted(KINDS["stream"] | {"pretrain_multipack_attn": None})[0], "data.isolate") is False
    assert at(converted(KINDS["stream"])[0], "data.shuffle_buffer") == 10_000
    assert at(converted(KINDS["stream"] | {"shuffle_merged_datasets": None})[0], "data.shuffle_buffer") == 0


def test_a_stream_is_the_first_of_pretraining_dataset_also_beside_datasets():
    tree, settings = converted(
        KINDS["stream"] | {"datasets": SFT["datasets"], "pretraining_dataset": ["org/a", "org/b"]}
    )
    assert at(tree, "data.train") == {"path": "org/a"}
    assert {"datasets", "pretraining_dataset[1].path"} <= set(settings.notes.became)


def test_every_default_that_is_written_out_is_called_one():
    tree, settings = converted(SFT)
    comments = settings.notes.comments
    assert comments["data.init_args.overflow"] == ["excess_length_strategy: axolotl's default"]
    assert comments["model.init_args.optimizer"] == ["optimizer: axolotl's default"]
    assert "data.init_args.overflow" not in converted(SFT | {"excess_length_strategy": "drop"})[1].notes.comments
    assert tree["data"]["init_args"]["overflow"] == "drop"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"relora": True}, "relora: this method changes what is trained"),
        ({"qat": {"weight_dtype": "int8"}}, "qat: this method"),
        ({"processor_type": "AutoProcessor"}, "processor_type: images and audio are not trained on"),
        ({"rl": "grpo"}, "rl: grpo: this trainer type has no counterpart"),
        ({"lerning_rate": 1}, "lerning_rate is unknown here; did you mean 'learning_rate'"),
        ({"optimizer": "shampoo"}, "optimizer: 'shampoo' has no counterpart; use adamw_torch"),
        ({"lr_scheduler": "rex"}, "lr_scheduler: 'rex' has no counterpart"),
        ({"num_epochs": 0.5}, "num_epochs: 0.5 epochs are no whole ones; set max_steps"),
        ({"datasets": [{"path": "x", "type": "poem"}]}, "type poem has no counterpart"),
        (
            {"datasets": [{"path": "x", "type": "alpaca", "shards": 2}]},
            "datasets[0].shards: a part of the shuffled rows has no counterpart",
        ),
        ({"plugins": ["axolotl.integrations.diffusion.DiffusionPlugin"]}, "plugins: axolotl.integrations.diffusion"),
        ({"learning_rate": None}, "learning_rate: missing"),
    ],
)
def test_what_changes_the_training_and_has_no_counterpart_is_refused_by_name(more, message):
    with pytest.raises(UserError) as error:
        converted(SFT | more)
    assert message in str(error.value)


def test_all_refused_keys_are_in_one_message():
    with pytest.raises(UserError) as error:
        converted(SFT | {"relora": True, "lisa_n_layers": 4, "use_onebitllms": False})
    assert "relora" in str(error.value)
    assert "lisa_n_layers" in str(error.value)
    assert "onebit" not in str(error.value)
    assert str(error.value).endswith("Remove them to convert the rest")


def test_a_key_on_which_nothing_depends_is_named_with_the_reason():
    more = {"tf32": True, "wandb_watch": "all", "plugins": ["axolotl.integrations.liger.LigerPlugin"], "strict": False}
    header = "\n".join(converted(SFT | more)[1].header())
    assert "tf32, plugins, LigerPlugin: it decides on speed or memory alone" in header
    assert "wandb_watch: it decides on what is logged" in header
    assert "strict: it decides on nothing that is trained" in header


def test_no_key_has_two_meanings():
    both = set(KEYS.translated) & set(KEYS.without_effect) | set(KEYS.translated) & set(KEYS.refused)
    assert not both | set(KEYS.without_effect) & set(KEYS.refused)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({"field_messages": "conversations"}, {"format": "sharegpt"}),
        ({"field_messages": "talk"}, {"format": "messages", "columns": {"messages": "talk"}}),
        ({"message_property_mappings": {"role": "from", "content": "value"}}, {"format": "messages"}),
        ({"roles": {"user": ["human", "user"], "assistant": ["gpt"]}}, {"format": "messages"}),
        ({"drop_system_message": True}, {"format": "oumi_pl.convert.formats.without_system"}),
        ({"name": "a", "split": "train[:9]", "revision": "x"}, {"config": "a", "split": "train[:9]", "revision": "x"}),
        ({"message_property_mappings": {"role": "who"}}, "need a format of your own"),
        ({"roles": {"assistant": ["user"]}}, "need a format of your own"),
        ({"roles_to_train": ["user"]}, "only the assistant's turns are"),
        ({"message_field_training_detail": "detail"}, "by offsets, have no counterpart"),
        ({"field_thinking": "thoughts"}, "turns with reasoning_content in 'thoughts' need a format"),
        ({"field_thinking": "thinking", "template_thinking_key": "thinking"}, {"format": "messages"}),
        ({"field_thinking": "a", "message_property_mappings": {"role": "role"}}, {"format": "messages"}),
        ({"shards": 3}, r"datasets\[0\].shards: a part of the shuffled rows"),
        ({"fieldmessages": "x"}, r"datasets\[0\].fieldmessages is unknown here; did you mean 'field_messages'"),
    ],
)
def test_a_chat_is_read_as_its_keys_say(dataset, expected):
    values = CHAT | {"datasets": [CHAT["datasets"][0] | dataset]}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            converted(values)
        return
    source = at(converted(values)[0], "data.train")
    assert expected.items() <= source.items()


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ({"preprocess_shards": 4}, "it decides on speed or memory alone"),
        ({"ds_type": "json"}, "a file is read as its ending says"),
        ({"field_prompt": "q"}, "within a type of your own"),
        ({"shards_idx": 0}, "it is off"),
        ({"type": "alpaca", "roles": {"user": ["x"]}}, "it has no effect beside the other keys"),
        ({"type": "alpaca", "message_field_training_detail": ""}, "it is off"),
        ({"message_property_mappings": {"role": "role"}, "field_thinking": "a"}, "it has no effect"),
        ({"chat_template_jinja": "mine.jinja"}, "axolotl reads it beside `chat_template: jinja` alone"),
    ],
)
def test_a_key_of_a_data_set_that_is_not_taken_over_is_named(dataset, why):
    key = list(dataset)[-1]
    header = converted(CHAT | {"datasets": [CHAT["datasets"][0] | dataset]})[1].header()
    assert [line for line in header if f"datasets[0].{key}" in line and why in line]


def test_what_changes_the_rows_of_a_data_set_is_in_a_comment():
    stream = KINDS["stream"] | {"pretraining_dataset": [{"path": "org/text", "skip": 9}]}
    chats = CHAT | {"datasets": [CHAT["datasets"][0] | {"split_thinking": True}]}
    for values, key in ((stream, "skip 9"), (chats, "split_thinking")):
        comments = converted(values)[1].notes.comments
        assert any(key in text for texts in comments.values() for text in texts)


@pytest.mark.parametrize(
    ("of_all", "of_rows", "template"),
    [
        ({"chat_template_jinja": "mine.jinja"}, {}, "mine.jinja"),
        ({"chat_template": "jinja", "chat_template_jinja": "mine.jinja"}, {}, "mine.jinja"),
        ({"chat_template": "chatml", "chat_template_jinja": "mine.jinja"}, {}, "chatml"),
        ({}, {"chat_template": "jinja", "chat_template_jinja": "mine.jinja"}, "mine.jinja"),
        ({"chat_template": "chatml"}, {"chat_template": "jinja", "chat_template_jinja": "mine.jinja"}, "mine.jinja"),
        # axolotl fills in the tokenizer's template for rows of this type, and replaces that by the config's
        ({}, {"chat_template_jinja": "mine.jinja"}, None),
        ({"chat_template": "chatml"}, {"chat_template": "tokenizer_default"}, "chatml"),
    ],
)
def test_a_template_is_the_one_that_axolotl_takes(of_all, of_rows, template):
    tree, _ = converted(CHAT | of_all | {"datasets": [CHAT["datasets"][0] | of_rows]})
    assert at(tree, "data.template") == template


def test_a_template_that_is_text_is_refused_by_name():
    with pytest.raises(UserError, match=r"chat_template_jinja: save the template to a \.jinja file"):
        converted(CHAT | {"chat_template_jinja": "{% for m in messages %}{% endfor %}"})


FSDP = SFT | {"fsdp_config": {"offload_params": False}}


def sharded(**arguments):
    return {"class_path": "Sharded", "init_args": arguments}


@pytest.mark.parametrize(
    ("base", "more", "devices", "strategy"),
    [
        (FSDP, {"dp_shard_size": 4, "dp_replicate_size": 2}, None, sharded(shards=4, replicas=2)),
        (FSDP, {"dp_replicate_size": 2}, None, sharded(replicas=2)),
        (FSDP, {"dp_shard_size": 4}, 8, sharded(shards=4, replicas=2)),
        (FSDP, {"dp_shard_size": 4}, None, sharded(shards=4)),
        (FSDP, {"dp_shard_size": 1}, None, "fsdp2"),
        (FSDP, {"dp_shard_size": 2, "expert_parallel_size": 2}, 4, sharded(shards=4)),
        (FSDP, {"dp_shard_size": 2, "tensor_parallel_size": 2}, 4, sharded(shards=2, tensor=2)),
        (FSDP, {"dp_shard_size": 2, "context_parallel_size": 2}, 4, sharded(shards=4)),
        (FSDP, {"dp_shard_size": 2, "context_parallel_size": 4}, 8, sharded(shards=4, tensor=2)),
        (SFT, {"tensor_parallel_size": 2}, None, sharded(tensor=2)),
        (SFT, {"dp_replicate_size": 2}, None, None),
        (SFT, {"fsdp_config": {"fsdp_offload_params": True}}, None, sharded(offload=True)),
        (SFT, {"fsdp_config": {"offload_params": True}, "dp_replicate_size": 2}, None,
         sharded(replicas=2, offload=True)),
        (SFT, {"fsdp": ["full_shard", "offload"]}, None, sharded(offload=True)),
        (SFT, {"fsdp_config": {"sharding_strategy": "NO_SHARD"}}, None, "ddp"),
        (SFT, {"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_all.json"}, None, sharded(offload=True)),
        (SFT, {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}}, None,
         sharded(offload=True)),
        (SFT, {"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}}}, None, "ddp"),
    ],
)  # fmt: skip
def test_sizes_and_offloading_become_those_of_the_strategy(base, more, devices, strategy):
    tree, _ = converted(base | more | {"micro_batch_size": 2}, devices=devices)
    assert at(tree, "trainer.strategy") == strategy


def rows_of(tree, devices):
    """Rows of an update: those of each device that reads its own, times their number."""
    accumulated = at(tree, "trainer.accumulate_grad_batches") or 1
    return at(tree, "data.batch_size") * accumulated * devices // (at(tree, "trainer.strategy.tensor") or 1)


SIZES = [(size, accumulated, tensor, context) for size in (1, 2) for accumulated in (1, 4)
         for tensor in (1, 2) for context in (1, 2, 4)]  # fmt: skip


def wrong_rows(base):
    """The sizes for which an update has other rows than axolotl's: rows x accumulation x devices / tensor / context."""
    wrong = []
    for size, accumulated, tensor, context in SIZES:
        more = {"micro_batch_size": size, "gradient_accumulation_steps": accumulated}
        more |= {"tensor_parallel_size": tensor, "context_parallel_size": context}
        tree, settings = converted(base | more, devices=8)
        is_noted = "times as many rows" in str(settings.notes.comments.get("trainer"))
        if rows_of(tree, 8) != size * accumulated * 8 // tensor // context and not is_noted:
            wrong.append((size, accumulated, tensor, context))
    return wrong


@pytest.mark.parametrize("base", [SFT, FSDP, LORA, LORA | {"adapter": "qlora"}, LORA | {"load_in_8bit": True}])
def test_devices_that_share_rows_keep_the_rows_of_an_update(base):
    assert wrong_rows(base) == []


def test_devices_that_share_rows_would_change_the_update_unnoticed(monkeypatch):
    monkeypatch.setattr(training, "divide_rows", lambda settings, ranks, batch_size: ranks)
    assert set(wrong_rows(SFT)) == {sizes for sizes in SIZES if sizes[3] > 1}


def test_the_sizes_of_the_strategy_multiply_to_the_devices():
    for shards, replicas, (_, _, tensor, context) in itertools.product((2, 4), (1, 2), SIZES):
        devices = shards * replicas * tensor * context
        more = {"dp_shard_size": shards, "tensor_parallel_size": tensor, "context_parallel_size": context}
        more |= {"dp_replicate_size": replicas, "micro_batch_size": 1}
        strategy = at(converted(FSDP | more, devices=devices)[0], "trainer.strategy.init_args")
        assert math.prod(strategy.values()) == devices


@pytest.mark.parametrize("key", ["context_parallel_size", "sequence_parallel_degree"])
def test_the_former_name_of_a_size_means_the_same(key):
    tree, _ = converted(SFT | {"gradient_accumulation_steps": 4, key: 2})
    assert at(tree, "trainer.accumulate_grad_batches") == 2


def test_batches_that_are_split_among_devices_are_refused():
    with pytest.raises(UserError, match=r"accelerator_config\.split_batches: it divides a batch among the devices"):
        converted(SFT | {"accelerator_config": {"split_batches": True}})


def test_keys_of_fsdp_that_decide_on_nothing_are_named():
    header = converted(SFT | {"fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "x"}})[1].header()
    assert any("fsdp_config.version: it decides on speed" in line for line in header)
    assert any("fsdp_config.state_dict_type: checkpoints are written by all devices" in line for line in header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": "many"}, "num_epochs: 'many' is not a number"),
        ({"micro_batch_size": [2], "lora_r": "eight"}, "micro_batch_size: [2] is not a number; lora_r: 'eight' is not"),
        ({"bf16": "maybe"}, "bf16: 'maybe' is neither true nor false"),
    ],
)
def test_values_of_other_types_are_refused_by_name(changes, message):
    with pytest.raises(UserError) as error:
        Settings({"base_model": "some/model"} | changes, KEYS)
    assert message in str(error.value)
