"""Oumi's configs as recipes: what each key becomes, by hand."""

import re
from enum import Enum

import pytest

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe import FIELDS, to_recipe
from oumi_pl.core.recipe.fields import field_of, walk
from oumi_pl.errors import UserError
from tests.core.oumi import config, recipe, section, tiny_model

ALPACA = "oumi_pl.core.recipe.formats.alpaca"


# --- all fields -------------------------------------------------------------------------------------------------------


def test_something_is_said_of_every_field():
    full = config(data__validation__datasets='[{"dataset_name": "x"}]', data__train__datasets='[{"dataset_name": "y"}]')
    paths = [path for path, _, _ in walk(full)]
    assert len(paths) > 150
    assert [path for path in paths if field_of(path) is None] == []
    assert {field.how for field in FIELDS.values()} == {"honoured", "refused", "harmless"}
    assert all(len(field.why) > 3 for field in FIELDS.values())


def test_the_table_names_no_field_that_there_is_not():
    full = config(data__validation__datasets='[{"dataset_name": "x"}]', data__train__datasets='[{"dataset_name": "y"}]')
    known = {re.sub(r"\[\d+\]", "", path) for path, _, _ in walk(full)}
    sections = {path.rpartition(".")[0] for path in known} | {"data.test"}
    assert set(FIELDS) <= known | sections


VALUES = {int: 7, float: 0.25, str: "eager"}
SECTIONS = {
    "model": {},
    "training": {},
    "peft": {
        "training__use_peft": True,
        "peft__q_lora": True,
        "peft__bnb_4bit_quant_type": "nf4",
        "peft__bnb_4bit_compute_dtype": "bfloat16",
    },
    "fsdp": {"fsdp__enable_fsdp": True},
    "data.train": {},
}


def changed(value):
    """Another value than this one."""
    if isinstance(value, bool):
        return not value
    return [*type(value)][-1].name if isinstance(value, Enum) else VALUES.get(type(value), "7")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_field_that_is_set_is_reported_or_refused_by_its_name(section, tmp_path):
    """Each plain field of a section is changed alone."""
    given = {"model__model_name": tiny_model(tmp_path)} | SECTIONS[section]
    base, paths, silent = to_recipe(config(**given)), [], []
    for path, value, default in walk(config(**given)):
        if not path.startswith(f"{section}.") or value != default or isinstance(value, list | dict):
            continue
        paths.append(path)
        try:
            other = config(**given | {path.replace(".", "__"): changed(value)})
        except UserError as error:
            assert path.rpartition(".")[2] in str(error)  # the config itself takes no such value
            continue
        if path not in {field for field, now, default in walk(other) if now != default}:
            continue  # the config itself says it in another field
        try:
            translated = to_recipe(other)
        except UserError as error:
            assert str(error).startswith(f"{path}: "), (path, str(error))
        else:
            outcome = translated.became[path]
            if not outcome.startswith("nothing: ") and (translated.tree, translated.resume) == (base.tree, base.resume):
                silent.append(path)
    assert silent == []
    assert len(paths) > 9


# --- golden -----------------------------------------------------------------------------------------------------------


def test_trl_sft_on_alpaca():
    translated = recipe(
        engine=None,
        model__model_max_length=2048,
        model__torch_dtype_str="bfloat16",
        model__attn_implementation="sdpa",
        model__trust_remote_code=True,
        training__output_dir="output/smol",
        training__max_steps=10,
        training__learning_rate=2e-5,
        training__optimizer="adamw_torch_fused",
        training__lr_scheduler_type="cosine",
        training__warmup_ratio=0.03,
        training__weight_decay=0.01,
        training__gradient_accumulation_steps=4,
        training__per_device_train_batch_size=2,
        training__enable_gradient_checkpointing=True,
        training__save_steps=100,
        training__include_performance_metrics=True,
    )
    assert translated.tree == {
        "seed_everything": 42,
        "engine": "trl",
        "model": {
            "class_path": "SFT",
            "init_args": {
                "model": "org/model",
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
                "trust_remote_code": True,
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 2e-5, "weight_decay": 0.01}},
                "schedule": {"class_path": "Cosine", "init_args": {"warmup": 0.03}},
            },
        },
        "data": {
            "class_path": "SFTData",
            "init_args": {
                "train": {"path": "yahma/alpaca-cleaned", "format": ALPACA},
                "train_on": "all",
                "max_length": 2048,
                "overflow": "keep_start",
                "group_by_length": False,
                "batch_size": 2,
                "trust_remote_code": True,
            },
        },
        "trainer": {"devices": 1, "max_steps": 10, "accumulate_grad_batches": 4, "gradient_clip_val": 1.0},
        "name": "smol",
        "runs_dir": "output",
        "checkpoint": {"every": 100, "keep": 1000},
    }
    assert translated.became["training.learning_rate"] == "model.optimizer.lr"
    assert translated.became["training.include_performance_metrics"].startswith("nothing: ")
    assert translated.resume is None


def test_oumis_defaults_are_honoured():
    translated = recipe()
    assert section(translated, "model")["optimizer"] == {
        "class_path": "AdamW",
        "init_args": {"lr": 5e-5, "weight_decay": 0.0},
    }
    assert section(translated, "model")["schedule"] == {"class_path": "Linear"}
    assert section(translated, "model")["dtype"] == "auto"
    assert section(translated, "data")["max_length"] == 1024
    assert section(translated, "data")["batch_size"] == 8
    assert translated.tree["trainer"] == {"max_epochs": 3, "gradient_clip_val": 1.0}
    assert translated.tree["checkpoint"] == {"every": 500, "keep": 1000}
    assert (translated.tree["name"], translated.tree["runs_dir"]) == ("output", ".")
    assert "engine" not in translated.tree


@pytest.mark.parametrize(
    ("trainer_type", "engine", "data", "module"),
    [
        ("TRL_SFT", "trl", "SFTData", "SFT"),
        ("HF", "hf", "SFTData", "SFT"),
        ("OUMI", None, "SFTData", "SFT"),
        ("SFT", None, "SFTData", "SFT"),
    ],
)
def test_trainer_types(trainer_type, engine, data, module):
    translated = recipe(engine=None, training__trainer_type=trainer_type, model__model_max_length=64)
    assert translated.tree.get("engine") == engine
    assert (translated.tree["model"]["class_path"], translated.tree["data"]["class_path"]) == (module, data)
    assert (
        "engine"
        not in to_recipe(config(training__trainer_type=trainer_type, model__model_max_length=64), "lightning").tree
    )


def test_trl_dpo():
    translated = recipe(
        {"dataset_name": "mlabonne/orpo-dpo-mix-40k"},
        engine=None,
        training__trainer_type="TRL_DPO",
        training__trainer_kwargs='{"beta": 0.2, "loss_type": "ipo"}',
        training__data_seed=7,
        model__model_max_length=512,
    )
    assert translated.tree["engine"] == "trl"
    assert translated.tree["model"]["class_path"] == "DPO"
    assert section(translated, "model")["loss"] == {"class_path": "IPO", "init_args": {"beta": 0.2}}
    assert section(translated, "model")["optimizer"]["init_args"]["lr"] == 5e-5  # and not TRL's own 1e-6
    assert translated.tree["data"] == {
        "class_path": "DPOData",
        "init_args": {
            "train": {
                "path": "mlabonne/orpo-dpo-mix-40k",
                "format": "oumi_pl.core.recipe.formats.turns_preference",
            },
            "max_length": 512,
            "overflow": "keep_start",
            "batch_size": 8,
            "seed": 7,
        },
    }
    assert any("EOS twice" in text for text in translated.comments["data"])
    assert any("float32" in text for text in translated.comments["model"])


def test_trl_kto():
    kwargs = '{"beta": 0.2, "undesirable_weight": 1.5, "loss_type": "kto", "max_length": 128}'
    translated = recipe(
        {"dataset_name": "trl-lib/kto-mix-14k"},
        engine=None,
        training__trainer_type="TRL_KTO",
        training__trainer_kwargs=kwargs,
    )
    assert translated.tree["engine"] == "trl"
    assert translated.tree["model"]["class_path"] == "KTO"
    assert section(translated, "model")["loss"] == {"class_path": "KTOLoss", "init_args": {"beta": 0.2}}
    assert section(translated, "model")["undesirable_weight"] == 1.5
    assert "desirable_weight" not in section(translated, "model")
    assert translated.tree["data"]["class_path"] == "KTOData"
    assert section(translated, "data")["train"] == "trl-lib/kto-mix-14k"
    assert (section(translated, "data")["max_length"], section(translated, "data")["overflow"]) == (128, "keep_start")
    assert any("to another prompt" in text for text in translated.comments["data"])


def test_trl_kto_over_several_micro_batches():
    """TRL's divergence would be of each micro-batch; without one, TRL can do it."""
    several = {"training__trainer_type": "TRL_KTO", "training__gradient_accumulation_steps": 4}
    translated = recipe({"dataset_name": "org/feedback"}, engine=None, **several)
    assert "engine" not in translated.tree
    assert any("a KL divergence over several micro-batches" in text for text in translated.comments[""])
    apo = recipe(
        {"dataset_name": "org/feedback"},
        engine=None,
        training__trainer_kwargs='{"loss_type": "apo_zero_unpaired"}',
        **several,
    )
    assert apo.tree["engine"] == "trl"
    assert section(apo, "model")["loss"]["class_path"] == "APOZeroUnpaired"


GKD = {
    "training__trainer_type": "TRL_GKD",
    "training__gkd__teacher_model_name_or_path": "org/large",
    "training__gkd__lmbda": 0,
}
TURNS = {
    "dataset_name": "yahma/alpaca-cleaned",
    "dataset_kwargs": {"return_conversations": True, "return_conversations_format": "dict"},
}


@pytest.mark.parametrize(
    ("beta", "divergence"),
    [(0, None), (1, {"class_path": "ReverseKL"}), (0.3, {"class_path": "JSD", "init_args": {"beta": 0.3}})],
)
def test_trl_gkd(beta, divergence):
    """TRL's `beta` at 0 and 1 is the forward and the reverse KL."""
    init = '{"attn_implementation": "sdpa", "dtype": "bfloat16"}'
    translated = recipe(
        TURNS,
        engine=None,
        **GKD | {"training__gkd__beta": beta, "training__gkd__teacher_model_init_kwargs": init},
        training__gkd__temperature=0.7,
        model__model_max_length=256,
    )
    assert (translated.tree["engine"], translated.tree["model"]["class_path"]) == ("trl", "Distill")
    arguments = section(translated, "model")
    assert (arguments["teacher"], arguments["teacher_dtype"]) == ("org/large", "bfloat16")
    assert arguments.get("divergence") == divergence
    assert "temperature" not in arguments
    assert translated.became["training.gkd.temperature"].startswith("nothing: ")
    data = section(translated, "data")
    assert (data["train_on"], data["max_length"], data["train"]["format"]) == ("last_turn", 256, ALPACA)


def test_trl_gkd_on_what_the_student_generates():
    options = {"training__gkd__lmbda": 0.3, "training__gkd__temperature": 0.7, "training__gkd__max_new_tokens": 40}
    translated = recipe(TURNS, engine=None, **GKD | options, model__model_max_length=256)
    assert (translated.tree["engine"], translated.tree["data"]["class_path"]) == ("trl", "DistillData")
    data = section(translated, "data")
    assert (data["lmbda"], data["sampling"]) == (0.3, {"max_new_tokens": 40, "temperature": 0.7})
    assert (data["max_length"], data["train"]["format"]) == (256, ALPACA)
    assert "train_on" not in data
    assert translated.became["training.gkd.lmbda"] == "data.lmbda"
    assert translated.became["training.gkd.temperature"] == "data.sampling.temperature"
    teacher_writes = recipe(TURNS, **GKD | {"training__gkd__lmbda": 1, "training__gkd__seq_kd": True})
    assert section(teacher_writes, "data")["lmbda"] == 1
    assert teacher_writes.became["training.gkd.seq_kd"].startswith("nothing: with lmbda 1")


def test_the_section_of_gkd_is_read_by_gkd_alone():
    translated = recipe(training__gkd__teacher_model_name_or_path="org/large")
    path = "training.gkd.teacher_model_name_or_path"
    assert translated.became[path] == "nothing: it is only read with training.trainer_type TRL_GKD"


def test_registered_documents():
    translated = recipe(
        {
            "dataset_name": "HuggingFaceFW/fineweb-edu",
            "subset": "sample-10BT",
            "dataset_kwargs": {"seq_length": 128},
        },
        data__train__stream=True,
        data__train__pack=True,
        training__max_steps=10,
        model__model_max_length=64,
    )
    assert translated.tree["model"]["class_path"] == "Pretrain"
    assert translated.tree["data"] == {
        "class_path": "PretrainData",
        "init_args": {
            "train": {"path": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"},
            "max_length": 128,
            "streaming": True,
            "shuffle_buffer": 0,
            "batch_size": 8,
        },
    }
    assert "seq_length" in translated.became["model.model_max_length"]


def test_packed_conversations():
    translated = recipe(data__train__pack=True, model__chat_template="zephyr", training__max_steps=3)
    assert translated.tree["data"]["class_path"].endswith(".PackedChatData")
    assert section(translated, "data")["template"] == "oumi/zephyr"
    assert section(translated, "data")["max_length"] == 1024
    assert section(translated, "data")["train"]["format"] == ALPACA


def test_resuming():
    assert recipe(training__try_resume_from_last_checkpoint=True).resume == ""
    assert recipe(training__resume_from_checkpoint="runs/x").resume == "runs/x"


# --- parts ------------------------------------------------------------------------------------------------------------


def model_of(**changes):
    return section(recipe(**changes), "model")


def test_frozen_layers_have_adapters_that_are_trained_as_in_oumi():
    frozen = {"model__freeze_layers": "[model.embed_tokens]"}
    assert model_of(**frozen)["freeze"] == ["model.embed_tokens"]
    translated = recipe(**frozen, training__use_peft=True)
    assert "freeze" not in section(translated, "model")
    assert translated.became["model.freeze_layers"].startswith("nothing: Oumi trains the adapters in these layers")


def test_lora():
    translated = recipe(
        training__use_peft=True,
        peft__lora_r=16,
        peft__lora_alpha=32,
        peft__lora_dropout=0.05,
        peft__lora_target_modules="[q_proj, v_proj]",
        peft__lora_exclude_modules="[a.*, b]",
        peft__lora_bias="all",
        peft__lora_init_weights="GAUSSIAN",
        peft__peft_save_mode="MERGED",
    )
    assert section(translated, "model")["lora"] == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": "(?:a.*)|(?:b)",
        "bias": "all",
        "init_lora_weights": "gaussian",
    }
    assert translated.tree["export"] == {"merge": True}
    assert model_of(training__use_peft=True)["lora"] == {"r": 8, "lora_alpha": 8, "target_modules": None}
    all_linear = model_of(training__use_peft=True, peft__lora_target_modules="[all-linear]")
    assert all_linear["lora"] == {"r": 8, "lora_alpha": 8}


def test_a_peft_block_alone_does_nothing():
    translated = recipe(peft__lora_r=16, peft__q_lora=True)
    assert "lora" not in section(translated, "model")
    assert translated.became["peft.lora_r"] == "nothing: it is only read with training.use_peft"


def test_qlora():
    translated = model_of(
        training__use_peft=True,
        peft__q_lora=True,
        peft__bnb_4bit_quant_type="nf4",
        peft__bnb_4bit_compute_dtype="bfloat16",
    )
    assert translated["quantization"] == "nf4"
    assert model_of(training__use_peft=True, peft__q_lora=True, peft__q_lora_bits=8)["quantization"] == "int8"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": "sgd"}, {"class_path": "SGD", "init_args": {"lr": 5e-5, "weight_decay": 0.0}}),
        (
            {"optimizer": "adafactor", "weight_decay": 0.1},
            {
                "class_path": "transformers.Adafactor",
                "init_args": {
                    "lr": 5e-5,
                    "eps": [1e-30, 1e-3],
                    "relative_step": False,
                    "scale_parameter": False,
                    "weight_decay": 0.1,
                },
            },
        ),
        (
            {"adam_beta2": 0.95, "adam_epsilon": 1e-6},
            {"class_path": "AdamW", "init_args": {"lr": 5e-5, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.0}},
        ),
        (
            {"optimizer": "paged_adamw_8bit"},
            {"class_path": "bitsandbytes.optim.PagedAdamW8bit", "init_args": {"lr": 5e-5, "weight_decay": 0.0}},
        ),
        (
            {"trainer_type": "OUMI", "optimizer": "SGD", "sgd_momentum": 0.9},
            {"class_path": "SGD", "init_args": {"lr": 5e-5, "momentum": 0.9, "weight_decay": 0.0}},
        ),
    ],
)
def test_optimizers(changes, expected):
    changes = {f"training__{key}": value for key, value in changes.items()}
    assert model_of(model__model_max_length=64, **changes)["optimizer"] == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_steps": 5}, {"class_path": "Linear", "init_args": {"warmup": 5}}),
        ({"warmup_steps": 5, "warmup_ratio": 0.5}, {"class_path": "Linear", "init_args": {"warmup": 5}}),
        ({"warmup_ratio": 1.0}, {"class_path": "Linear", "init_args": {"warmup": 1}}),  # one step, in transformers 5
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, None),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
            {"class_path": "Constant", "init_args": {"warmup": 5}},
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5, "trainer_type": "OUMI"},
            {"class_path": "Constant", "init_args": {"warmup": 5}},
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 1.5}'},
            {"class_path": "Cosine", "init_args": {"cycles": 1.5}},
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 3}'},
            {"class_path": "CosineRestarts", "init_args": {"cycles": 3}},
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": '{"min_lr": 2.0e-6}',
                "learning_rate": 2e-5,
            },
            {"class_path": "Cosine", "init_args": {"floor": 0.1}},
        ),
    ],
)
def test_schedules(changes, expected):
    changes = {f"training__{key}": value for key, value in changes.items()}
    assert model_of(model__model_max_length=64, **changes).get("schedule") == expected


def test_precision():
    translated = recipe(model__torch_dtype_str="float32", training__mixed_precision_dtype="BF16")
    assert "dtype" not in section(translated, "model")
    assert translated.tree["trainer"]["precision"] == "bf16-mixed"
    # pure bfloat16 is what Oumi means by its dtype: no autocast
    assert "precision" not in recipe(model__torch_dtype_str="bf16").tree["trainer"]


def test_validation():
    translated = recipe(
        data__validation__datasets='[{"dataset_name": "yahma/alpaca-cleaned", "split": "train[:10]"}]',
        training__eval_strategy="steps",
        training__eval_steps=0.25,
        training__max_steps=10,
        training__per_device_eval_batch_size=2,
    )
    assert section(translated, "data")["validation"] == {
        "path": "yahma/alpaca-cleaned",
        "split": "train[:10]",
        "format": ALPACA,
    }
    assert translated.tree["val_every"] == 3  # transformers rounds up
    assert section(translated, "data")["eval_batch_size"] == 2
    quiet = recipe(data__validation__datasets='[{"dataset_name": "yahma/alpaca-cleaned"}]')
    assert "validation" not in section(quiet, "data")


def test_fsdp(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    translated = recipe(
        fsdp__enable_fsdp=True,
        fsdp__mixed_precision="bf16",
        model__torch_dtype_str="float32",
        fsdp__forward_prefetch=True,
        fsdp__auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    )
    assert translated.tree["trainer"]["strategy"] == "fsdp2"
    assert translated.tree["trainer"]["precision"] == "bf16-mixed"
    assert recipe(fsdp__enable_fsdp=True, fsdp__sharding_strategy="NO_SHARD").tree["trainer"]["strategy"] == "ddp"
    unused = recipe(fsdp__sharding_strategy="SHARD_GRAD_OP")
    assert "strategy" not in unused.tree["trainer"]
    given = to_recipe(config(fsdp__enable_fsdp=True), devices=8).tree["trainer"]
    assert (given["devices"], given["strategy"]) == (8, "fsdp2")


def test_loggers(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    translated = recipe(training__enable_wandb=True, training__enable_mlflow=True, training__run_name="a b")
    wandb, mlflow, *_ = translated.tree["trainer"]["logger"]
    assert wandb == {"class_path": "WandbLogger", "init_args": {"project": "mine", "name": "a_b"}}
    assert mlflow == {
        "class_path": "MLFlowLogger",
        "init_args": {"run_name": "a_b", "tracking_uri": "sqlite:///mlflow.db"},
    }


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_is_on_by_default_where_it_is_installed(installed, monkeypatch):
    monkeypatch.setattr("oumi_pl.core.recipe.trainer.find_spec", lambda name: object() if installed else None)
    translated = recipe(training__enable_tensorboard=True, training__output_dir="out/x")
    if installed:
        (logger,) = translated.tree["trainer"]["logger"]
        arguments = {"save_dir": "out/tensorboard", "name": "x", "version": ""}
        assert logger == {"class_path": "TensorBoardLogger", "init_args": arguments}
    else:
        assert "logger" not in translated.tree["trainer"]
        assert any("metrics.csv" in text for text in translated.comments["trainer"])


def test_a_config_of_defaults_names_what_is_missing():
    with pytest.raises(UserError, match=r"data\.train\.datasets"):
        to_recipe(TrainingConfig())


def test_text_only_takes_the_text_model():
    assert section(recipe(model__text_only=True), "model")["text_only"] is True


OFFLOADED = {"class_path": "Sharded", "init_args": {"offload": True}}


@pytest.mark.parametrize("stage", ["ZERO_1", "ZERO_2", "ZERO_3"])
def test_deepspeed_becomes_fsdp2_with_a_note(monkeypatch, stage):
    monkeypatch.setenv("WORLD_SIZE", "4")
    changes = {"model__torch_dtype_str": "float32", "deepspeed__offload_optimizer": "{device: CPU}"}
    translated = recipe(
        deepspeed__enable_deepspeed=True,
        deepspeed__zero_stage=stage,
        deepspeed__precision="BF16",
        engine=None,
        **changes,
    )
    assert translated.tree["trainer"]["strategy"] == OFFLOADED
    assert translated.tree["trainer"]["precision"] == "bf16-mixed"
    (note,) = (text for text in translated.comments["trainer.strategy"] if stage in text)
    assert note.endswith("offload: all of these are kept and updated in host memory")
    kept = recipe(deepspeed__enable_deepspeed=True, deepspeed__zero_stage=stage)
    assert kept.tree["trainer"]["strategy"] == "fsdp2"


def test_offloaded_shards_are_kept_in_host_memory_with_a_note():
    translated = recipe(fsdp__enable_fsdp=True, fsdp__cpu_offload=True)
    assert translated.tree["trainer"]["strategy"] == OFFLOADED
    assert any(text.startswith("offload: weights, gradients") for text in translated.comments["trainer.strategy"])


@pytest.mark.parametrize("engine", ["fsdp__enable_fsdp", "deepspeed__enable_deepspeed"])
def test_a_quantized_base_is_sharded(engine):
    zero = {"deepspeed__zero_stage": "ZERO_3"} if engine.startswith("deepspeed") else {}
    translated = recipe(
        training__use_peft=True,
        peft__q_lora=True,
        peft__bnb_4bit_quant_type="nf4",
        peft__bnb_4bit_compute_dtype="bfloat16",
        **{engine: True},
        **zero,
    )
    assert translated.tree["trainer"]["strategy"] == "fsdp2"
    assert section(translated, "model")["quantization"] == "nf4"


def test_layers_that_are_not_to_be_quantized_are_passed_on():
    translated = recipe(
        training__use_peft=True, peft__q_lora=True, peft__q_lora_bits=8, peft__llm_int8_skip_modules="[out_proj]"
    )
    assert section(translated, "model")["unquantized"] == ["out_proj"]
    assert any(text.startswith("the head is not") for text in translated.comments["model.init_args.unquantized"])


def test_what_torchdata_is_not_to_do_is_not_refused():
    assert "trainer" in recipe(data__train__use_torchdata=False).tree


def test_the_trainer_type_is_the_reason_named_before_its_section():
    with pytest.raises(UserError, match=r"training\.trainer_type: Oumi's TRL_GOLD is not among"):
        recipe(training__trainer_type="TRL_GOLD", training__gold__max_completion_length=8)
    with pytest.raises(UserError, match=r"training\.gold\.max_completion_length: GOLD is not among"):
        recipe(training__gold__max_completion_length=8)


def test_the_former_name_of_the_length_is_read_with_a_note():
    translated = recipe(training__trainer_kwargs='{"max_seq_length": 77}')
    assert section(translated, "data")["max_length"] == 77
    (note,) = (text for text in translated.comments["data.init_args.max_length"] if "max_seq_length" in text)
    assert "TRL's former name" in note


def test_a_profiler_is_a_callback_of_lightning():
    translated = recipe(
        engine=None,
        training__profiler__enable_cpu_profiling=True,
        training__profiler__record_shapes=True,
        training__profiler__schedule__enable_schedule=True,
    )
    (callback,) = translated.tree["trainer"]["callbacks"]
    assert callback["class_path"] == "oumi_pl.core.recipe.profiling.TorchProfile"
    assert callback["init_args"] == {
        "record_shapes": True,
        "schedule": {"skip_first": 1, "wait": 0, "warmup": 1, "active": 3, "repeat": 1},
    }
    assert translated.became["training.profiler.record_shapes"] == "trainer.callbacks, TorchProfile"
    assert "engine" not in translated.tree
    assert any("can't do profiling" in text for text in translated.comments[""])


def test_mxfp4_weights_are_dequantized_as_they_are_read():
    kwargs = '{"quantization_config": {"quant_method": "mxfp4"}}'
    expected = {"quantization_config": {"quant_method": "mxfp4", "dequantize": True}}
    assert section(recipe(model__model_kwargs=kwargs), "model")["config"] == expected


def test_differences_in_what_carries_loss_are_noted():
    by_dataset = recipe({"dataset_name": "yahma/alpaca-cleaned", "dataset_kwargs": {"assistant_only": True}})
    assert "newlines around it" in by_dataset.comments["data.init_args.train_on"][0]
    default = recipe(model__chat_template="default")
    assert any("ends with a newline too" in text for text in default.comments["data.init_args.template"])


def test_options_of_adam_beside_another_optimizer_are_noted():
    translated = recipe(training__optimizer="adafactor", training__adam_beta2=0.99)
    assert translated.became["training.adam_beta2"] == "nothing: adafactor has no such option"
    (note,) = translated.comments["model.init_args.optimizer"]
    assert note == "adam_beta2: adafactor has no such option, and Oumi ignores it"
