"""Under torchrun, a recipe that names no devices trains one model on all processes."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.core.oumi import tiny_model
from tests.core.test_train import CONFIG
from tests.crash.harness import Child, copy, prepare, torchrun, works
from tests.tiny import conversations, write_jsonl

CHANGES = {
    "model.init_args.optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}},
    "model.init_args.config.attention_dropout": 0.0,
}


def weights(run):
    return torch.load(max((run / "checkpoints").glob("step-*.ckpt")), weights_only=True)["state_dict"]


def assert_equal(actual, expected):
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-5, atol=1e-6), name


def test_two_processes_train_like_one(tmp_path):
    prepare(tmp_path / "two", changes=CHANGES)
    one = copy(tmp_path / "two", tmp_path / "one")
    works(one, "fit", "--config", "r.yaml", "--trainer.accumulate_grad_batches", "2")
    text = torchrun(tmp_path / "two", "fit", "--config", "r.yaml")
    assert "device: 2 x cpu" in text
    assert [path.name for path in (tmp_path / "two/runs").iterdir()] == ["r"]
    assert_equal(weights(tmp_path / "two/runs/r"), weights(one / "runs/r"))


def test_devices_that_contradict_the_launcher_are_refused(tmp_path):
    prepare(tmp_path / "r", changes={"trainer.devices": 1})
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    child = Child(tmp_path / "r", "fit", "--config", "r.yaml", environment=environment | {"TORCHELASTIC_RUN_ID": "x"})
    assert child.wait() == 2
    assert "trainer.devices: torchrun started 2 processes on each of 1 node, and the recipe has 1 on 1" in child.text


FSDP = ["--fsdp.enable_fsdp", "true"]


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param([], id="ddp"),
        pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow),
        pytest.param([*FSDP, "--fsdp.cpu_offload", "true"], id="offloaded", marks=pytest.mark.slow),
    ],
)
def test_an_oumi_config_trains_one_model_on_two_processes(tmp_path, strategy):
    start = tmp_path / "two"
    start.mkdir()
    tiny_model(start / "tiny")
    write_jsonl(start / "rows.jsonl", conversations(16))
    training = CONFIG["training"] | {"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 2}
    (start / "oumi.yaml").write_text(yaml.safe_dump(CONFIG | {"training": training}))
    one = copy(start, tmp_path / "one")
    works(one, "train", "-c", "oumi.yaml", "--engine", "lightning")
    torchrun(start, "train", "-c", "oumi.yaml", "--training.gradient_accumulation_steps", "1", *strategy)
    assert [path.name for path in (start / "out").iterdir()] == ["run"]
    actual, expected = (load_file(folder / "out/run/model.safetensors") for folder in (start, one))
    assert_equal(actual, expected)
