"""axolotl's YAML: each key becomes the one that means the same, or is named with the reason."""

import pytest

from oumi_pl.convert.axolotl import KEYS
from oumi_pl.convert.settings import Settings
from oumi_pl.errors import UserError
from tests.convert.helpers import assert_fits, at, converted

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
        ({"datasets": [{"path": "x", "type": "alpaca", "shards": 2}]}, "x: shards has no counterpart"),
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
