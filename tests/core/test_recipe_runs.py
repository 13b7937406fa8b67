"""Converted recipes run: two steps each, from the text that `convert` prints."""

import json

import pytest

from oumi_pl.commands.convert import convert
from tests.command_line import CommandLine, jsonl
from tests.core.oumi import tiny_model
from tests.tiny import conversations, pairs


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    tiny_model(tmp_path / "tiny")
    return line


TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "output_dir": "out/run", "enable_tensorboard": False}


def run(cli, **sections):
    """Converts a config, runs the text, and returns the metrics of the run."""
    training = TRAINING | sections.pop("training", {})
    model = {"model_name": "tiny"} | sections.pop("model", {})
    cli.write("oumi.yaml", json.dumps({"model": model, "training": training, **sections}))
    cli.write("native.yaml", convert(cli.directory / "oumi.yaml", [], "lightning"))
    cli.works("fit", "--config", "native.yaml", "--trainer.accelerator", "cpu")
    assert cli.state("out/run")["status"] == "finished"
    return cli.column("out/run", "train/loss"), cli.column("out/run", "train/lr")


def dataset(path, name="text_sft_jsonl", dataset_kwargs=None, **kwargs):
    options = {"dataset_kwargs": dataset_kwargs} if dataset_kwargs else {}
    return {"train": {"datasets": [{"dataset_name": name, "dataset_path": path, **options}], **kwargs}}


def test_sft_in_bfloat16_with_a_schedule(cli):
    losses, rates = run(
        cli,
        data=dataset("rows.jsonl"),
        model={"torch_dtype_str": "bfloat16", "model_max_length": 64},
        training={"trainer_type": "TRL_SFT", "lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 1},
    )
    assert set(losses) == {1, 2}
    assert float(rates[1]) == 0.0  # of the step itself, as transformers logs it
    assert float(rates[2]) == pytest.approx(5e-5)


def test_sft_with_lora_and_validation(cli):
    cli.write("held.jsonl", jsonl(*conversations(4, seed=3)))
    run(
        cli,
        data=dataset(
            "rows.jsonl", collator_name="text_completions_only_with_padding", train_target="FINAL_ASSISTANT_TURN"
        )
        | {"validation": {"datasets": [{"dataset_name": "text_sft", "dataset_path": "held.jsonl"}]}},
        training={"trainer_type": "TRL_SFT", "use_peft": True, "eval_strategy": "steps", "eval_steps": 1},
        peft={"lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"], "peft_save_mode": "MERGED"},
    )
    assert set(cli.column("out/run", "val/loss")) == {1, 2}
    assert (cli.directory / "out/run/model/model.safetensors").exists()


def test_dpo(cli):
    cli.write("pairs.jsonl", jsonl(*pairs(8)))
    losses, _ = run(
        cli,
        data=dataset("pairs.jsonl", "mlabonne/orpo-dpo-mix-40k"),
        model={"torch_dtype_str": "float32"},
        training={"trainer_type": "TRL_DPO", "trainer_kwargs": {"beta": 0.3}},
    )
    assert float(losses[1]) == pytest.approx(0.693147, abs=1e-5)


def test_kto(cli):
    turns = [row["messages"] for row in conversations(8)]
    rows = ({"prompt": m[:1], "completion": m[1:], "label": i % 2 == 0} for i, m in enumerate(turns))
    cli.write("rows.jsonl", jsonl(*rows))
    losses, _ = run(
        cli,
        data=dataset("rows.jsonl", "trl-lib/kto-mix-14k"),
        training={"trainer_type": "TRL_KTO", "trainer_kwargs": {"beta": 0.3}, "per_device_train_batch_size": 2},
    )
    assert float(losses[1]) == pytest.approx(0.5, abs=1e-5)
    assert float(cli.column("out/run", "train/kl")[1]) == 0.0


@pytest.mark.parametrize(("beta", "lmbda"), [(0.0, 0.0), (0.4, 0.5), (1.0, 1.0)])
def test_gkd(cli, beta, lmbda):
    """A teacher that equals the student has nothing to teach."""
    losses, _ = run(
        cli,
        data=dataset(
            "rows.jsonl",
            dataset_kwargs={"return_conversations": True, "return_conversations_format": "dict"},
        ),
        model={"torch_dtype_str": "float32"},
        training={
            "trainer_type": "TRL_GKD",
            "gkd": {"teacher_model_name_or_path": "tiny", "lmbda": lmbda, "beta": beta, "max_new_tokens": 6},
        },
    )
    assert float(losses[1]) == pytest.approx(0.0, abs=1e-6)
    assert set(losses) == {1, 2}


def test_pretraining_from_random_weights_with_adafactor(cli):
    cli.write("texts.jsonl", jsonl(*({"text": f"document {i} " * 9} for i in range(20))))
    data = dataset("texts.jsonl", "HuggingFaceFW/fineweb-edu", stream=True)
    data["train"]["datasets"][0]["dataset_kwargs"] = {"seq_length": 32}
    losses, _ = run(
        cli,
        data=data,
        model={"load_pretrained_weights": False, "model_kwargs": {"attention_dropout": 0.1}},
        training={"trainer_type": "HF", "optimizer": "adafactor", "gradient_accumulation_steps": 2},
    )
    assert set(losses) == {1, 2}
    shape = json.loads((cli.directory / "out/run/model/config.json").read_text())
    assert (shape["hidden_size"], shape["attention_dropout"]) == (32, 0.1)


def test_packed_conversations(cli):
    losses, _ = run(
        cli,
        data=dataset("rows.jsonl", pack=True, stream=True),
        model={"model_max_length": 32, "chat_template": "zephyr"},
        training={"trainer_type": "OUMI"},
    )
    assert set(losses) == {1, 2}
